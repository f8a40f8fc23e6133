"Bad input through the real command: one line on stderr, exit status 2, and nothing written"
import json
import os
import re
import subprocess
import sys

import pytest
import torch

from wikidpo.cli import compared, main, parse, table, VERBS
from wikidpo.core.files import read_jsonl
from wikidpo.core.model import GPT, GPTConfig
from wikidpo.judge.offline import offline_app, serving
from wikidpo.models.checkpoints import save_checkpoint
from wikidpo.run.winrate import win_rates
from wikidpo.world.facts import DATA

COMMAND = [sys.executable, "-c", "from wikidpo.cli import main; main()"]
NOBODY = "http://127.0.0.1:9/v1" # where no teacher listens


def fails(capsys, *words):
    "The one line that the command prints before it leaves with status 2"
    capsys.readouterr()                                           # what earlier commands printed
    with pytest.raises(SystemExit) as e: main([str(w) for w in words])
    err = capsys.readouterr().err.strip()
    assert e.value.code == 2, err
    assert err.startswith("error: ") and "\n" not in err, err
    return err


@pytest.fixture
def pairs(tmp_path):
    "A function that writes pairs.jsonl from lines and returns its path"
    def write(*lines):
        path = tmp_path/"pairs.jsonl"
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text("".join(text + "\n" for text in texts))
        return path
    return write


GOOD = {"prompt": "What is the capital of Peru?", "chosen": "Lima.", "rejected": "Rome."}


@pytest.mark.parametrize("lines, says", [
    ([GOOD, '{"prompt": "What'], "pairs.jsonl:2: broken JSON"),
    ([GOOD, {"prompt": "x", "chosen": "y"}], "pairs.jsonl:2: the field 'rejected' is missing"),
    ([GOOD | {"chosen": ""}], "pairs.jsonl:1: the field 'chosen' is empty"),
    ([GOOD, GOOD, GOOD | {"rejected": "Lima."}], "pairs.jsonl:3: chosen and rejected are the same text"),
    ([GOOD | {"prompt": "word " * 400}], "pairs.jsonl:1: the prompt has"),
    ([], "pairs.jsonl: holds no pairs"),
])
def test_bad_pairs(capsys, tmp_path, pairs, lines, says):
    assert says in fails(capsys, "train", "--pairs", pairs(*lines), "--out", tmp_path/"run", "--wandb", "disabled")
    assert not (tmp_path/"run").exists()


def test_missing_pairs_file_is_named(capsys, tmp_path):
    assert "pairs.jsonl: no such file" in fails(capsys, "train", "--out", tmp_path/"run")


@pytest.mark.parametrize("flags, says", [
    (["--beta", "0"], "beta is 0"), (["--beta", "-1"], "beta is -1"), (["--lr", "0"], "train.lr"),
    (["--loss-type", "ppo"], "ppo"), (["--precision", "fp8"], "train.precision")])
def test_bad_numbers(capsys, tmp_path, pairs, flags, says):
    assert says in fails(capsys, "train", "--pairs", pairs(GOOD), "--out", tmp_path/"run", *flags)
    assert not (tmp_path/"run").exists()


def test_checkpoint_missing_corrupt_or_of_another_size(capsys, tmp_path, pairs):
    path = pairs(GOOD)

    def refused(name):
        return fails(capsys, "train", "--pairs", path, "--out", tmp_path/"run", "--checkpoint", tmp_path/name)

    assert "none.pt: no such checkpoint" in refused("none.pt")
    (tmp_path/"torn.pt").write_bytes(b"PK\3\4 this is no zip file")
    assert "torn.pt: not a checkpoint" in refused("torn.pt")
    (tmp_path/"torn.safetensors").write_bytes((DATA/"model.safetensors").read_bytes()[:100_000])
    assert "torn.safetensors: not a checkpoint" in refused("torn.safetensors")
    big = GPTConfig(vocab_size=4096, block_size=64, n_layer=1, n_head=2, n_embd=16, ffn_dim=32)
    save_checkpoint(tmp_path/"big.pt", GPT(big))
    assert "4096 symbols, the tokenizer 2048" in refused("big.pt")
    assert not (tmp_path/"run").exists()


def test_tokenizer_missing_or_without_special_tokens(capsys, tmp_path, pairs):
    path = pairs(GOOD)

    def refused(name):
        return fails(capsys, "train", "--pairs", path, "--out", tmp_path/"run", "--tokenizer", tmp_path/name)

    assert "none.json: no such tokenizer" in refused("none.json")
    tok = json.loads((DATA/"tokenizer.json").read_text())
    tok["added_tokens"] = []
    for s in ("<|user|>", "<|end|>"): tok["model"]["vocab"].pop(s)
    (tmp_path/"plain.json").write_text(json.dumps(tok))
    assert "lacks the special tokens <|user|> <|end|>" in refused("plain.json")


def test_unreachable_teacher_names_url_and_remedy(capsys, tmp_path):
    err = fails(capsys, "mine", "--teacher.url", NOBODY, "--out", tmp_path/"run", "--n-prompts", "4")
    assert NOBODY in err and "wikidpo teacher" in err
    assert not (tmp_path/"run").exists()


def test_prompt_that_does_not_fit_is_named(capsys, tmp_path):
    (tmp_path/"p.jsonl").write_text(json.dumps({"prompt": "word " * 300}) + "\n")
    assert "prompt 1 is too long" in fails(capsys, "mine", "--prompts", tmp_path/"p.jsonl", "--out", tmp_path/"run")
    assert not (tmp_path/"run").exists()


def test_folder_that_holds_another_run(capsys, tmp_path, pairs):
    def content(): return {f.name: f.read_bytes() for f in (tmp_path/"run").iterdir()}

    train = ["train", "--pairs", str(pairs(GOOD)), "--out", str(tmp_path/"run"), "--wandb", "disabled"]
    main(train)
    before = content()
    assert "holds another run (train.beta is 1.25 there, 0.5 here)" in fails(capsys, *train, "--beta", "0.5")
    assert content() == before
    (tmp_path/"notes.txt").write_text("mine")
    assert "is no run folder" in fails(capsys, "mine", "--out", tmp_path)


def test_config_file_with_a_misspelt_key(capsys, tmp_path):
    path = tmp_path/"c.yaml"
    path.write_text("train:\n  btea: 0.5\n")
    assert "train: unknown key 'btea'; did you mean 'beta'?" in fails(capsys, "train", "--config", path)
    path.write_text("train:\n  epochs: many\n")
    assert "train.epochs" in fails(capsys, "train", "--config", path)
    assert "no profile 'gpu'" in fails(capsys, "lesson", "--profile", "gpu")


def test_report_of_no_run(capsys, tmp_path):
    assert str(tmp_path/"nothing") in fails(capsys, "report", "--out", tmp_path/"nothing")


@pytest.mark.parametrize("verb", VERBS)
def test_help_explains_every_flag(capsys, verb):
    "In words, behind its name and the kind of its value"
    with pytest.raises(SystemExit) as e: main([verb, "--help"])
    out = capsys.readouterr().out
    assert e.value.code == 0 and f"wikidpo {verb}" in out
    flags = [" ".join(flag.split()) for flag in re.split(r"\n\s+(?=--?[a-z])", out)[1:]]
    assert flags
    for flag in flags:
        said = re.sub(r"^(--?[\w.-]+,? )+(\{\S*\}\S* |[A-Z|{}\[\].]+ )?", "", flag).split("(default")[0]
        assert re.search("[a-z]{3}", said), flag
    if verb == "train": assert "strength of the KL leash" in out and "0.1" in out


def test_the_command_itself_explains_every_verb(capsys):
    main(["--help"])
    out = capsys.readouterr().out
    for verb in VERBS: assert f"\n  {verb} " in out


ARGUMENTS = (["--help"], ["train", "--help"], ["prompts", "--help"], ["prompts", "grounded", "--n", "0"],
             ["train", "--lr", "many"], ["train", "--beta", "0"])


@pytest.mark.parametrize("words", ARGUMENTS)
def test_looking_at_arguments_imports_nothing_heavy(words):
    look = ("import sys; from wikidpo.cli import main\ntry: main()\nexcept SystemExit: pass\n"
            "print('heavy', sorted({'torch', 'openai', 'numpy', 'starlette', 'matplotlib'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", look, *words], capture_output=True, text=True)
    assert done.stdout.strip().endswith("heavy []"), done.stdout


def test_the_installed_command_fails_in_one_line(tmp_path):
    words = ["train", "--out", str(tmp_path/"run"), "--checkpoint", "none.pt"]
    done = subprocess.run([*COMMAND, *words], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.strip() == "error: none.pt: no such checkpoint"


def test_train_writes_a_whole_run(tmp_path, pairs):
    run = tmp_path/"run"
    some = pairs(*read_jsonl(DATA/"pairs.jsonl")[:256])
    main(["train", "--pairs", str(some), "--out", str(run), "--wandb", "offline", "--epochs", "1",
          "--batch-size", "32", "--grad-accum-steps", "4"])
    logged = ["step", "loss", "reward/chosen", "reward/rejected", "reward/margin", "reward/accuracy", "lr", "grad_norm"]
    metrics = read_jsonl(run/"metrics.jsonl", logged)
    assert abs(metrics[0]["loss"] - 0.693147) < 1e-6 and metrics[0]["reward/margin"] == 0
    assert json.loads((run/"summary.json").read_text())["train"]["steps"] == len(metrics)
    assert list((run/"wandb").glob("offline-run-*"))
    assert set(torch.load(run/"dpo.pt", weights_only=True)) == {"model", "config", "digest"}


def test_rig_that_is_not_ready(capsys, tmp_path):
    words = ["rig", "--out", str(tmp_path/"run"), "--teacher.url", NOBODY]
    assert "the rig is not ready" in fails(capsys, *words)
    with pytest.raises(SystemExit): main(words)
    out = capsys.readouterr().out
    assert f"NO  teacher no teacher at {NOBODY}" in out and "ok  policy" in out
    assert not (tmp_path/"run").exists()


def test_rig_does_not_take_refusals_for_scores(capsys, tmp_path):
    "The offline teacher knows MiniWiki's questions only"
    foreign = tmp_path/"foreign.jsonl"
    foreign.write_text("".join(json.dumps({"prompt": f"Which is the best of {i} songs?"}) + "\n" for i in range(8)))
    says = fails(capsys, "rig", "--out", str(tmp_path/"run"), "--mine.prompts", str(foreign))
    assert "the teacher refuses all that it is asked to judge: HTTP 422: no MiniWiki question" in says


def test_rig_keeps_the_rates_that_it_prints(capsys, tmp_path):
    main(["rig", "--out", str(tmp_path/"run"), "--save", str(tmp_path/"rig.json")])
    printed = re.search("measured: (.*) a second", capsys.readouterr().out)[1]
    saved = json.loads((tmp_path/"rig.json").read_text())
    rates = {name: float(rate.replace(",", "")) for rate, name in map(str.split, printed.split(", "))}
    assert saved["policy"] == "miniwiki/model.safetensors" and rates.keys() == saved["rates"].keys()
    for name, rate in rates.items(): assert rate > 0 and saved["rates"][name] == pytest.approx(rate, rel=.02), name
    assert not (tmp_path/"run").exists()


def test_sft_writes_over_nobodys_files(tmp_path, capsys):
    (tmp_path/"mine.txt").write_text("mine")
    assert f"{tmp_path}: is not empty" in fails(capsys, "sft", "--out", str(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_the_seed_of_a_lesson_is_that_of_all_its_steps(monkeypatch):
    "Seen where each step begins; a forgotten one would share its answers or its judge's noise between seeds"
    lesson, seen = parse(["lesson", "--seed", "7"]), []
    class Stop(Exception): pass
    def look(step):
        seen.append(step)
        raise Stop
    monkeypatch.setattr("wikidpo.cli.Mine.run", look)
    with pytest.raises(Stop): lesson.run()
    assert [getattr(lesson, name).seed for name in ("teacher", "mine", "train", "judge")] == [7] * 4
    assert seen[0].mine.seed == seen[0].teacher.seed == 7


def test_the_profile_from_the_environment(monkeypatch):
    monkeypatch.setenv("WIKIDPO_PROFILE", "wikigpt")
    assert parse(["train"]).train.beta == .1 and parse(["train", "--profile", "miniwiki"]).train.beta == 1.25


def test_the_teacher_from_the_environment(monkeypatch):
    "Profile, then environment, then flags; the key's variable is the only thing that is known of the key"
    monkeypatch.setenv("WIKIDPO_TEACHER_URL", "http://judge:1/v1")
    monkeypatch.setenv("WIKIDPO_TEACHER_MODEL", "some-judge")
    teacher = parse(["mine"]).teacher
    assert (teacher.url, teacher.model) == ("http://judge:1/v1", "some-judge")
    assert parse(["mine", "--teacher.url", "offline"]).teacher.url == "offline"
    assert parse(["judge", "--profile", "wikigpt"]).teacher.model == "some-judge"
    assert parse(["lesson"]).teacher.api_key_env == "WIKIDPO_TEACHER_KEY"


SMALL = ["--mine.n-prompts", "48", "--judge.n", "12", "--train.batch-size", "4", "--train.grad-accum-steps", "1",
         "--train.wandb", "offline"]
WRITTEN = {"config.yaml", "summary.json", "samples.jsonl", "verdicts.jsonl", "report.html"}


def test_no_secret_is_in_anything_that_a_run_writes(tmp_path):
    """A whole lesson with a key in the environment, a password and a key in the URL.

    All files of the run, W&B's among them, and the output"""
    key, password, query = secrets = ["sk-environment-canary", "password-canary", "query-canary"]
    with serving(offline_app()) as url:
        secret_url = f"http://me:{password}@{url.removeprefix('http://')}?key={query}"
        words = ["lesson", "--teacher.url", secret_url, *SMALL, "--out", str(tmp_path/"run")]
        env = os.environ | {"WIKIDPO_TEACHER_KEY": key}
        done = subprocess.run([*COMMAND, *words], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files = [f for f in tmp_path.rglob("*") if f.is_file()]
    assert {f.name for f in files} >= WRITTEN and any(f.suffix == ".wandb" for f in files)
    texts = {f.name: f.read_bytes().decode("latin1") for f in files} | {"output": done.stdout + done.stderr}
    assert [(name, s) for name, text in texts.items() for s in secrets if s in text] == []
    assert url in texts["config.yaml"]


def test_judge_prints_the_comparison_and_its_controls_and_draws_it(tmp_path):
    words = ["judge", "--a", str(DATA/"model.safetensors"), "--n", "8", "--controls", "--out", str(tmp_path/"run")]
    done = subprocess.run([*COMMAND, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line in ("win rate, ties half", "sign test", "would be found", "itself ", "at_0.4 ", "constant "):
        assert line in done.stdout, done.stdout
    assert {f.name for f in (tmp_path/"run").iterdir()} >= {"verdicts.jsonl", "winrate.svg", "controls"}
    again = subprocess.run([*COMMAND, *words], capture_output=True, text=True)
    assert again.stdout.split("\n")[1:] == done.stdout.split("\n"), "done, kept, and told again"


@pytest.mark.parametrize("words, names", [
    (["judge"], ("DPO", "SFT")), (["lesson"], ("DPO", "SFT")), (["mine"], ("DPO", "SFT")),
    (["judge", "--a", "runs/mine.pt"], ("mine", "SFT")), (["lesson", "--judge.b", "theirs.pt"], ("DPO", "theirs"))])
def test_a_comparison_calls_the_models_that_it_was_given_by_their_files(words, names):
    step = parse(words)
    assert compared(step) == names
    a_wins = win_rates(["A"] * 40, ["B"] * 40, [1] * 40)
    summary = {"judge": a_wins | dict(n=40, chars_a=1., chars_b=1., seconds=1.)}
    assert f"{names[0]} is better than {names[1]}" in table(summary, compared(step))


def test_after_a_restart_the_same_command_is_not_advised(tmp_path, capsys, monkeypatch):
    "It would begin anew, and remove what was made"
    def stopped(*args): raise KeyboardInterrupt
    monkeypatch.setattr("wikidpo.run.mine.mine", stopped)
    for flags, says in ((["--restart"], "same command without --restart goes on"), ([], "same command goes on")):
        with pytest.raises(SystemExit) as e: main(["mine", "--out", str(tmp_path/"run"), *flags])
        assert e.value.code == 130 and says in capsys.readouterr().err


def test_a_lesson_looks_for_its_last_input_first(tmp_path, capsys):
    with pytest.raises(SystemExit): main(["lesson", "--judge.prompts", "none.jsonl", "--out", str(tmp_path/"run")])
    assert "none.jsonl: no such file" in capsys.readouterr().err and not (tmp_path/"run").exists()
