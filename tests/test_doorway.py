"""What comes from outside, by the command itself: odd values are refused by name before anything is written, and
whatever is said about foreign text is one line that a terminal shows as it is."""
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from runfolder import make_run, write_jsonl
from wikidpo import cli
from wikidpo.core.files import parse_json, read_jsonl, UserError
from wikidpo.judge.config import TeacherConfig
from wikidpo.run.config import MineConfig, PolicyConfig
from wikidpo.run.records import Pair, read_records, Summary, read_object, read_yaml
from wikidpo.run.rig import preflight
from wikidpo.world.facts import DATA

POLICY = PolicyConfig(checkpoint=str(DATA/"model.safetensors"), tokenizer=str(DATA/"tokenizer.json"))
CONTROL = "\x1b[2J\x07\rred\u2028\u202e"  # clears a screen, rings, goes back, breaks a line, turns the writing round
NAME = "odd\x1b[31m\nname"  # a file may be called so
LONG = CONTROL + "long " * 2000


@pytest.fixture
def at_home(tmp_path, monkeypatch):
    "An empty folder to be in, so that what is written by mistake is seen"
    home = tmp_path/"home"
    home.mkdir()
    monkeypatch.chdir(home)
    return home


def says(capsys, *words, status=2):
    "The one line that the command leaves with"
    capsys.readouterr()
    with pytest.raises(SystemExit) as e: cli.main([str(w) for w in words])
    err = capsys.readouterr().err
    assert e.value.code == status, err
    line = err.removesuffix("\n")
    assert line.startswith("error: ") and line.isprintable() and len(line) <= 1100, err[:2000]
    return line


# --- values

ODD_VALUES = [
    ("mine --temps 0.7 nan", "mine.temps"), ("mine --temps 0.7 inf", "mine.temps"), ("mine --temps -1 1", "mine.temps"),
    ("mine --seed 100000000000000", "mine.seed"), ("mine --seed -1", "mine.seed"),
    ("mine --top-k 10000000000000000000", "mine.top_k"), ("mine --max-new 0", "mine.max_new"),
    ("mine --gap 99", "mine.gap"), ("mine --teacher.noise inf", "teacher.noise"),
    ("mine --teacher.position-bias nan", "teacher.position_bias"),
    ("mine --teacher.length-bias inf", "teacher.length_bias"),
    ("mine --teacher.concurrency 30000", "teacher.concurrency"), ("mine --teacher.timeout-s nan", "teacher.timeout_s"),
    ("mine --teacher.seed 100000000000000", "teacher.seed"),
    ("mine --policy-concurrency 30000", "mine.policy_concurrency"),
    ("mine --out= --seed 1", "--out"), ("mine --prompts=", "--prompts"), ("mine --checkpoint=", "--checkpoint"),
    ("judge --temperature nan", "judge.temperature"), ("judge --temperature inf", "judge.temperature"),
    ("judge --seed 100000000000000", "judge.seed"), ("judge --n 10000000000", "judge.n"),
    ("train --lr inf", "train.lr"), ("train --beta nan", "beta"), ("train --seed 18446744073709551616", "train.seed"),
    ("train --batch-size 10000000000000000000", "train.batch_size"), ("train --warmup-steps -1", "train.warmup_steps"),
    ("train --valid nan", "train.valid"), ("train --max-grad-norm nan", "train.max_grad_norm"),
    ("rig --dollars nan", "rig.dollars"), ("rig --dollars -1", "rig.dollars"), ("sweep --betas 0.1 nan", "sweep.betas"),
    ("sweep --kl-prompts 10000000000000", "sweep.kl_prompts"), ("lesson --seed 100000000000000", "seed"),
    ("sft --seed 100000000000000", "sft.seed"), ("sft --lr nan", "sft.lr"), ("sft --n-embd 99999999999", "sft.n_embd"),
    ("sft --crisp nan", "shares"), ("teacher --offline --host=", "--host"), ("report --out=", "--out"),
    ("prompts grounded --n 10000000000000", "prompts.n"), ("report --out /dev/null", "/dev/null"),
    ("sft --out /dev/null", "/dev/null"), ("train --pairs /dev/zero", "/dev/zero"), ("train --pairs /", "/"),
    ("doctor /dev/null", "/dev/null"), (f"report --out {'x' * 300}", "xxx"),
    (f"train --pairs {'x/' * 3000}y", "train.pairs")]


@pytest.mark.parametrize("words, name", ODD_VALUES)
def test_an_odd_value_is_refused_by_its_name_and_nothing_is_written(capsys, at_home, words, name):
    assert name in says(capsys, *words.split())
    assert not list(at_home.iterdir())


def test_a_profile_is_held_to_the_same_limits(capsys, at_home):
    config = at_home/"c.yaml"
    for text, name in (("mine: {seed: 100000000000000}", "mine.seed"),
                       ("judge: {temperature: .nan}", "judge.temperature"),
                       ("teacher: {noise: .inf}", "teacher.noise"), ('policy: {checkpoint: ""}', "policy.checkpoint"),
                       ('mine: {prompts: " "}', "mine.prompts")):
        config.write_text(text)
        assert name in says(capsys, "lesson", "--config", config)
    assert list(at_home.iterdir()) == [config]


# --- messages

def file(name, *rows):
    "A file in the folder we are in, and its name"
    Path(name).write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return name


def run_folder(**files):
    "A run of elsewhere, with some files replaced"
    folder = make_run(Path(NAME))
    for name, text in files.items(): (folder/name.replace("_", ".")).write_text(text)
    return folder


GOOD = {"prompt": "Who?", "chosen": "Ada.", "rejected": "Bob."}
# what the command is told, with foreign text in it
MESSAGES = {
    "verb": lambda: [LONG],
    "flag": lambda: ["train", f"--{LONG}", "1"],
    "number": lambda: ["train", "--lr", LONG],
    "choice": lambda: ["mine", "--sample-precision", LONG],
    "loss": lambda: ["train", "--loss-type", LONG],
    "precision": lambda: ["train", "--precision", LONG],
    "profile": lambda: ["train", "--profile", NAME],
    "long profile": lambda: ["train", "--profile", LONG],
    "config": lambda: ["train", "--config", NAME],
    "section": lambda: ["train", "--config", file(NAME, json.dumps({LONG: {}}))],
    "key": lambda: ["train", "--config", file(NAME, json.dumps({"train": {LONG: 1}}))],
    "value": lambda: ["train", "--config", file(NAME, json.dumps({"train": {"epochs": LONG}}))],
    "yaml": lambda: ["train", "--config", file(NAME, "train: [" + "long " * 2000 + "\x07")],
    "report": lambda: ["report", "--out", NAME],
    "doctor": lambda: ["doctor", NAME],
    "metrics": lambda: ["doctor", run_folder(metrics_jsonl=json.dumps({"step": 1, "loss": LONG}))],
    "column": lambda: ["doctor", run_folder(metrics_jsonl=json.dumps({"step": 1, LONG: "x"}))],
    "summary": lambda: ["report", "--out", run_folder(summary_json=json.dumps({"judge": {LONG: 1}}))],
    "run config": lambda: ["report", "--out", run_folder(config_yaml=json.dumps({"train": LONG}))],
    "no pairs": lambda: ["train", "--pairs", NAME],
    "field": lambda: ["train", "--pairs", file(NAME, {LONG: 1, "a" + CONTROL: 2})],
    "type": lambda: ["train", "--pairs", file(NAME, GOOD | {"chosen_finished": LONG})],
    "torn": lambda: ["train", "--pairs", file(NAME, '{"prompt": "' + CONTROL)],
    "checkpoint": lambda: ["train", "--pairs", file("p", GOOD), "--checkpoint", file(NAME, LONG)],
    "no checkpoint": lambda: ["train", "--pairs", file("p", GOOD), "--checkpoint", NAME],
    "tokenizer": lambda: ["train", "--pairs", file("p", GOOD), "--tokenizer", file(NAME, LONG)],
    "prompts": lambda: ["mine", "--prompts", NAME],
    "long prompt": lambda: ["mine", "--prompts", file(NAME, {"prompt": LONG})],
    "source": lambda: ["prompts", LONG],
    "columns": lambda: ["prompts", file(NAME + ".jsonl", {LONG: 1})],
    "wanted column": lambda: ["prompts", file(NAME + ".jsonl", GOOD), "--column", LONG],
    "shard": lambda: ["mine", "--shard", LONG],
    "shards": lambda: ["merge", NAME],
    "server": lambda: ["mine", "--engine", "vllm", "--policy-url", LONG],
    "key's name": lambda: ["mine", "--teacher.api-key-env", LONG],
    "repository": lambda: ["publish", NAME],
    "import": lambda: ["import", NAME]}


@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_about_foreign_text_is_one_line_that_can_be_shown(capsys, at_home, name):
    line = says(capsys, *MESSAGES[name]())
    assert "long long long" not in line or line.count("long") <= 200


def test_the_same_from_a_shell(at_home):
    words = [sys.executable, "-c", "from wikidpo.cli import main; main()", "train", "--lr", LONG]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.removesuffix("\n").isprintable() and len(done.stderr) < 1100


# --- what nobody foresaw, and what the system refuses

@dataclass
class Stumble:
    "A verb with a bug"
    out: Path = Path("runs/lesson")
    def run(self): return {}[CONTROL + "x" * 10_000]


@pytest.fixture
def stumble(monkeypatch): monkeypatch.setitem(cli.VERBS, "stumble", Stumble)


def test_a_bug_is_one_line_and_its_traceback_a_file_in_the_run(capsys, at_home, stumble):
    run = make_run(at_home/"run")
    line = says(capsys, "stumble", "--out", run, status=1)
    log, = run.glob("error-*.log")
    assert "KeyError" in line and str(log) in line
    assert "in run" in log.read_text() and "KeyError" in log.read_text()


def test_without_a_run_the_traceback_is_in_the_temporary_folder(capsys, at_home, stumble, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (at_home/"thesis").mkdir()
    line = says(capsys, "stumble", "--out", at_home/"thesis", status=1)
    log, = tmp_path.glob("error-*.log")
    assert str(log) in line and not list((at_home/"thesis").iterdir())


def test_debug_shows_the_traceback(capsys, at_home, stumble):
    with pytest.raises(SystemExit) as e: cli.main(["stumble", "--debug"])
    err = capsys.readouterr().err
    assert e.value.code == 1 and err.startswith("Traceback") and "in run" in err
    with pytest.raises(SystemExit) as e: cli.main(["report", "--debug", "--out", "nowhere"])
    assert e.value.code == 2 and "UserError" in capsys.readouterr().err


def test_what_the_system_refuses_is_a_line_with_the_file(capsys, at_home):
    run = make_run(at_home/"run")
    (run/"report.html").mkdir()
    assert "report.html" in (line := says(capsys, "report", "--out", run)) and "Is a directory" in line


PIPED = """import sys
import time
from dataclasses import dataclass
from wikidpo import cli
@dataclass
class Talk:
    "Prints more than a pipe holds"
    def run(self): cli.say("line\\n" * 100_000)
cli.VERBS["talk"] = Talk
cli.main()"""


@pytest.mark.parametrize("words", [["talk"], ["--help"], ["train", "--help"]])
def test_a_reader_that_has_seen_enough_hears_no_complaint(words):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", PIPED, *words], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_what_the_command_prints_is_shown_as_it_is(capsys, at_home):
    "The doctor names the folder, `prompts` its source: neither moves the cursor"
    cli.main(["doctor", str(make_run(Path(NAME)))])
    asked = [{"prompt": f"Which river runs through {i} towns of {i * i}?"} for i in range(400)]
    write_jsonl(Path(f"{NAME}.jsonl"), asked)
    cli.main(["prompts", f"{NAME}.jsonl", "--n-eval", "20", "--out", f"{NAME}.prompts"])
    out = capsys.readouterr().out
    assert r"odd\x1b[31m\nname" in out and all(line.isprintable() for line in out.split("\n"))


# --- files

def test_the_schema_is_as_quick_as_it_was_without(tmp_path):
    "Looking at 20 columns of a row costs less than reading it"
    path = tmp_path/"pairs.jsonl"
    path.write_bytes((DATA/"pairs.jsonl").read_bytes() * 2)

    def seconds(read):
        times = []
        for _ in range(3):
            start = time.process_time()
            read()
            times.append(time.process_time() - start)
        return min(times)

    assert seconds(lambda: read_records(path, Pair)) < 2 * seconds(lambda: read_jsonl(path)) + .05


@pytest.mark.parametrize("text", ["[" * 51 + "]" * 51, '{"a":' * 200 + "1" + "}" * 200, "[" * 10_000, "9" * 5000,
                                  r'"\ud800"', r'["\uDFFF"]', '{"a": "\x01"}'])
def test_json_that_cannot_be_kept_is_refused(text):
    with pytest.raises(ValueError) as e: parse_json(text)
    assert str(e.value).isprintable()


def test_an_odd_but_honest_text_is_kept():
    for value in ("\U0001f600", "a\u2028b", [[[[1]]]], "[" * 100, "\\ud800 as text"):
        assert parse_json(json.dumps(value)) == value


@pytest.mark.parametrize("text, says", [
    (b"\xff", "not UTF-8"), (b"- 1", "an object with fields"), (b"train: 2026-01-01", "'train'"), (b"1: {}", "1"),
    (b"train: {x: 2026-01-01}", "train.x"), (b"a: &a {b: 1}\nc: *a", "write out"), (b"a: &a [*a]", "write out"),
    (b"a: " + b"[" * 10_000, "too deep"), (b"a: " + b"[" * 60 + b"]" * 60, "too deep"),
    (b'train: {x: "\\ud800"}', "half"),
    (b"x: {y: 1}\n" * 30_000, "no configuration"), (b"a: !!python/object:os.system {}", "broken YAML"),
    (b"a: {b: " + b"9" * 10_000 + b"}", "broken YAML"), (b"train: {x: !!binary aGk=}", "train.x"),
    (b"train: {x: !!set {a}}", "train.x")])
def test_yaml_is_plain_values_or_refused_in_a_line(tmp_path, text, says):
    (tmp_path/"config.yaml").write_bytes(text)
    with pytest.raises(UserError, match="config.yaml: ") as e: read_yaml(tmp_path/"config.yaml")
    assert says in str(e.value) and str(e.value).isprintable()


def test_a_pipe_is_no_file_to_read(tmp_path):
    os.mkfifo(tmp_path/"pairs.jsonl")
    with pytest.raises(UserError, match="pairs.jsonl: cannot be read"): read_jsonl(tmp_path/"pairs.jsonl")
    with pytest.raises(UserError, match="summary.json: no such file"): read_object(tmp_path/"summary.json", Summary)


# ---- what the rig prints

@pytest.mark.parametrize("url, says", [
    (f"http://a{CONTROL}b:8000/v1", "teacher.url is "), ("http://[::1/v1", "teacher.url is no address"),
    (f"http://127.0.0.1:99999/v1?{LONG}", "teacher.url is "), (f"http://{'a' * 64}/v1", "the teacher lives at aaa")],
    ids=["control", "half an address", "a port too high", "a name too long"])
def test_the_rig_says_of_an_odd_address_what_is_wrong_with_it(at_home, url, says):
    "Line by line, with the mark of each, and no traceback"
    mine = MineConfig(str(DATA/"prompts_mine.jsonl"), n_prompts=3)
    checks = preflight(POLICY, TeacherConfig(url=url, model=NAME), mine, at_home/NAME)
    lines = "\n".join(map(str, checks)).split("\n")
    assert all(line.isprintable() and line[:2] in ("ok", "NO", "--", "  ") for line in lines)
    assert checks[-1].name == "teacher" and checks[-1].ok is False and "teacher.url is '" in checks[-1].found
    assert any(says in line for line in lines) and not list(at_home.iterdir())
