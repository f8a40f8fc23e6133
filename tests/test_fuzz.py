"""Every reader of a file, on thousands of damaged files: what was written, or one line that names the file.

Nothing else may happen: no traceback, no hang, no half-written file. `fuzz` counts what became of them; the slow
test does 25 times as many."""
import contextlib
import io
import json
import math
import os
import random
import re
import signal
from collections import Counter
from dataclasses import asdict
from functools import cache, partial

import pytest
import yaml

from runfolder import make_run, margins, sweep_rows, verdicts, write_jsonl
from wikidpo.core.chat import encode_prompt, load_tokenizer, render_prompt, SPECIALS
from wikidpo.core.data import PairDataset, unusable
from wikidpo.core.files import UserError
from wikidpo.judge.config import TeacherConfig
from wikidpo.judge.quality import errors_table, judge_errors, OUTCOMES
from wikidpo.run import records
from wikidpo.run.compare import read_files
from wikidpo.run.config import MineConfig, PolicyConfig, PromptsConfig, RunTrainConfig
from wikidpo.run.controls import best_temperature, controls_table
from wikidpo.run.foreign import read_pairs
from wikidpo.run.profiles import load_profile, section
from wikidpo.run.prompts import read_prompt_file
from wikidpo.run.publish import CARD_MARK, dataset_card
from wikidpo.run.rig import preflight
from wikidpo.run.sweep import score_table
from wikidpo.run.winrate import win_rates
from wikidpo.show.curves import curves
from wikidpo.show.doctor import doctor
from wikidpo.show.inspector import PairInspector
from wikidpo.show.player import RunPlayer
from wikidpo.show.predict import predictions
from wikidpo.show.report import report
from wikidpo.show.run import load_run
from wikidpo.show.vote import BlindVote
from wikidpo.world.facts import DATA

SECONDS = 20  # after which a reader hangs
SETTING = re.compile("train[.:]|beta is|loss_type|label_smoothing is")  # of a profile, which is not one file

# --- damage

NOT_A_VALUE = object()
ODD = [None, True, False, -1, 0, 1, 7, .5, 1e30, 1e308, math.inf, -math.inf, math.nan, 2**31, 2**63, -2**63, 10**400,
       "", " ", "x", "5", "\ud83d", "\x00\x1b[2J", "a\u2028b\r\n", "[" * 50, "long " * 2000, [], {}, [None], [[1], "x"],
       {"x": {"y": None}}, [1e308, math.nan], [True], [-5], [2**40], NOT_A_VALUE]
BYTES = [b"", b"\xff", b"\x00", b"\xef\xbb\xbf", b"\r\n", b"\n", b"\n\n", b'"', b"{", b"]", b",", b"\\ud83d",
         b"\\u0000", b"null", b"NaN", b"-Infinity", b"1e999", b"[" * 10_000, b'{"a":' * 10_000, b"9" * 10_000,
         b"\xe2\x80\xa8", b"\x1b[2J\x07", b"\xc3", b"\xed\xa0\x80", b'"' + b"x" * 1_000_000 + b'"',
         b"!!python/object:os.system x", b"*a", b"&a [*a]", b"- ", b": ", b"2026-01-01", b"!!binary aGk="]


def places(value, path=()):
    "The paths to everything in a value, the value itself among them"
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items: yield from places(inner, (*path, key))


def with_odd_value(value, rng):
    "A copy in which something is another value, or is gone"
    value = json.loads(json.dumps(value))
    *way, last = rng.choice(list(places(value))) or (None,)
    odd = rng.choice(ODD)
    if last is None: return None if odd is NOT_A_VALUE else odd
    inside = value
    for key in way: inside = inside[key]
    if odd is NOT_A_VALUE: del inside[last]
    else: inside[last] = odd
    return value


def with_odd_bytes(data, rng):
    "The bytes with something put in, cut out, or cut off"
    i, n = rng.randrange(len(data) + 1), rng.choice((0, 0, 1, 5, 50, len(data)))
    return data[:i] + rng.choice((*BYTES, bytes([rng.randrange(256)]))) + data[i + n:]


def damaged(data, lines, rng):
    "A file that is damaged in one place, or in several"
    if rng.random() < .4:
        for _ in range(rng.choice((1, 1, 1, 3))): data = with_odd_bytes(data, rng)
        return data
    values = [json.loads(line) for line in data.decode().splitlines()] if lines else json.loads(data)
    if not lines: return json.dumps(with_odd_value(values, rng)).encode()
    k = rng.randrange(len(values))
    values[k] = with_odd_value(values[k], rng)
    return "\n".join(map(json.dumps, values)).encode()


# --- the readers

class Reader:
    "A good folder, the files in it that get damaged, and who reads them"
    def __init__(self, files, read, right=lambda path, found: True, cost=1):
        self.files, self.read = files, read
        self.right, self.cost = right, cost


def same_as_written(path, found):
    "What was read is what Python reads of each line, and nothing that cannot be written again"
    rows = [json.loads(line) for line in path.read_bytes().decode("utf-8-sig").split("\n") if line.strip()]
    assert json.dumps(found) == json.dumps(rows)
    json.dumps(found, ensure_ascii=False).encode()


def same_value(path, found):
    assert json.dumps(found) == json.dumps(json.loads(path.read_bytes().decode("utf-8-sig")))


def plain_config(path, found):
    "Sections of plain values, which can be written again"
    assert all(isinstance(values, dict | None) for values in found.values())
    yaml.safe_dump(json.loads(json.dumps(found)))


def whole_ids(path, dataset):
    "All ids are symbols of the tokenizer, and each side ends at most once"
    n = dataset.tok.get_vocab_size()
    end = dataset.tok.token_to_id("<|end|>")
    for prompt, chosen, rejected in dataset.rows:
        assert prompt and {*prompt, *chosen, *rejected} <= set(range(n))
        assert chosen.count(end) <= 1 and rejected.count(end) <= 1
    same_as_written(path, dataset.pairs)


@cache
def tokenizer(): return load_tokenizer(DATA/"tokenizer.json")


def figures(path):
    "All that is drawn of a run"
    run = load_run(path.parent)
    return curves(run), RunPlayer(run).static_figure()


def written_report(path):
    before = {p.name for p in path.parent.iterdir()}
    out = report(path.parent)
    assert {p.name for p in path.parent.iterdir()} == before | {"report.html"}
    return out


def whole_page(path, out):
    page = out.read_text(encoding="utf-8")
    assert page.rstrip().endswith("</html>") and "\x1b" not in page
    out.unlink()


def inspected(path):
    widget = PairInspector(path)
    widget.order = "longer, but worse"
    return widget.view, widget.pair, widget.error, widget.static_figure()


def voted(path): return BlindVote(verdicts(20), path).table()


def configured(path): return section(RunTrainConfig, "train", load_profile(None, path)["train"])


def configs_are_sound(path, cfg): assert cfg.beta > 0 and 0 <= cfg.seed < 2**32 and cfg.epochs >= 1


def predicted(path):
    os.environ["WIKIDPO_PREDICTIONS"] = str(path)
    try: return predictions()
    finally: del os.environ["WIKIDPO_PREDICTIONS"]


def templated(path):
    "The template in use: a prompt through it, and back"
    tok = load_tokenizer(path.with_name("tokenizer.json"))
    return tok.chat, tok.decode(encode_prompt(tok, "Who?"), skip_special_tokens=False)


def same_template(path, found):
    "Each value is the file's; what is asked stands between prefix and suffix"
    chat, prompt = found
    if path.name == "chat.json":
        there = json.loads(path.read_bytes().decode("utf-8-sig"))
        assert {name: value for name, value in json.loads(json.dumps(asdict(chat))).items() if name in there} == there
    assert render_prompt("Who?", chat) == f"{chat.prefix}Who?{chat.suffix}" and isinstance(prompt, str)


def whole_card(path, card):
    "The head is YAML of known names, each table has its rows, what fences hold does not end them, nothing is invisible"
    _, head, body = card.split("---\n", 2)
    assert set(yaml.safe_load(head)) == {"license", "task_categories", "tags", "size_categories", "configs"}
    assert CARD_MARK in body and body.count("\n```") == 6 and body.count("\n| ") == 9 and body.count("\n## ") == 3
    assert all(line.isprintable() for line in card.split("\n"))


def rigged(path):
    "What `wikidpo rig` looks at before it measures, line by line; what will not do is a refusal"
    folder = path.parent
    policy = PolicyConfig(checkpoint=str(DATA/"model.safetensors"), tokenizer=str(folder/"tokenizer.json"))
    mine = MineConfig(prompts=str(folder/"prompts.jsonl"), n_prompts=3, max_new=8, batch=1)
    checks = preflight(policy, TeacherConfig(), mine, folder)
    lines = "\n".join(map(str, checks)).split("\n")
    assert all(line.isprintable() and line[:4] in ("ok  ", "NO  ", "--  ", "    ") for line in lines)
    assert len(checks) <= len(lines) <= 2 * len(checks)
    if bad := [check.found for check in checks if check.ok is False]: raise UserError(bad[0])
    return lines


def usable_pairs(path, taken):
    "Every line is a pair of ours that can be trained on, or is counted as left out"
    lines = [line for line in path.read_bytes().decode("utf-8-sig").split("\n") if line.strip()]
    assert len(taken.rows) + taken.left_out.total() == len(lines)
    assert not any(map(unusable, taken.rows)) and json.dumps(taken.rows)


def compared(path): return read_files([path, path.with_name("b.jsonl")])


def answers_in_both(path, found):
    files, keys = found
    assert keys and all(isinstance(f.found[key], str) for f in files for key in keys)


def controlled(path):
    judged = records.read_object(path, records.Summary).get("judge") or {}
    return controls_table(judged) if judged.get("controls") else ""


def judged(path):
    rows = records.read_records(path, records.Verdict)
    return errors_table(judge_errors(rows, [OUTCOMES[row["prompt_id"] % 3] for row in rows]))


LINES = {"prompts": records.Prompt, "responses": records.Answer, "samples": records.Sample, "pairs": records.Pair,
         "verdicts": records.Verdict, "margins": records.Margins, "metrics": records.Metrics, "votes": records.Vote,
         "instructions": records.Written}
RUN = ("config.yaml", "summary.json", "metrics.jsonl", "margins.jsonl", "samples.jsonl", "pairs.jsonl",
       "verdicts.jsonl")
def lines_of(name):
    "A reader of one kind of lines"
    return Reader((f"{name}.jsonl",), lambda path: records.read_records(path, LINES[name]), same_as_written)


READERS = {f"{name}.jsonl": lines_of(name) for name in LINES}
READERS |= {
    "summary.json": Reader(("summary.json",), partial(records.read_object, kind=records.Summary), same_value),
    "sweep.json": Reader(("sweep.json",), partial(records.read_object, kind=records.SweepRows), same_value),
    "prediction.json": Reader(("prediction.json",), partial(records.read_object, kind=records.SweepPrediction),
                              same_value),
    "predictions.json": Reader(("predictions.json",), predicted, same_value),
    "config.yaml": Reader(("config.yaml",), records.read_yaml, plain_config),
    "training pairs": Reader(("pairs.jsonl",), lambda path: PairDataset(path, tokenizer(), 64), whole_ids),
    "profile": Reader(("config.yaml",), configured, configs_are_sound),
    "prompt file": Reader(("prompts.jsonl",), lambda path: read_prompt_file(path, PromptsConfig())),
    "chat.json": Reader(("chat.json",), templated, same_template, cost=6),
    "tokenizer.json": Reader(("tokenizer.json",), templated, same_template, cost=30),
    "card": Reader(("config.yaml", "summary.json", "pairs.jsonl"), lambda path: dataset_card(path.parent), whole_card,
                   cost=10),
    "rig": Reader(("chat.json", "tokenizer.json", "prompts.jsonl"), rigged, cost=100),
    "pairs of elsewhere": Reader(("theirs.jsonl",), read_pairs, usable_pairs),
    "answers": Reader(("a.jsonl",), compared, answers_in_both),
    "controls": Reader(("controls.json",), controlled, lambda path, table: isinstance(table, str)),
    "the judge's errors": Reader(("verdicts.jsonl",), judged, lambda path, table: isinstance(table, str)),
    "doctor": Reader(RUN, lambda path: doctor(path.parent), cost=2),
    "sweep": Reader(("sweep.json", "prediction.json"), lambda path: score_table(path.parent), cost=3),
    "vote": Reader(("votes.jsonl",), voted, cost=3),
    "inspector": Reader(("pairs.jsonl", "samples.jsonl"), inspected, cost=20),
    "figures": Reader(RUN[:4], figures, cost=60),
    "report": Reader(RUN, written_report, whole_page, cost=60)}


def make_mined(folder):
    "What a mining says of itself, and the files that it names"
    (folder/"policy.pt").write_bytes(b"a checkpoint")
    (folder/"tokenizer.json").write_bytes((DATA/"tokenizer.json").read_bytes())
    (folder/"chat.json").write_text(json.dumps({"prefix": "<|user|>\n", "suffix": "\n<|end|>\n<|assistant|>\n",
                                                "end": "<|end|>", "specials": list(SPECIALS), "trim": True,
                                                "system": ["<|user|>\n", "\n"]}))
    mined = {"prompts": "prompts.jsonl", "temps": [.7, 1.3], "gap": 2, "best": 6, "seed": 0, "top_k": 50, "max_new": 64,
             "policy": {"checkpoint": str(folder/"policy.pt"), "tokenizer": str(folder/"tokenizer.json")},
             "teacher": {"model": "a-judge", "expected": False}}
    train = {"beta": .1, "lr": 1e-4, "epochs": 1, "seed": 3}
    (folder/"config.yaml").write_text(json.dumps({"mine": mined, "train": train}))
    counted = {"prompts": 12, "responses": 48, "tie": 1, "bad": 2, "unscored": 1, "unparsable": 3, "survival": .6}
    summary = json.loads((folder/"summary.json").read_text())
    (folder/"summary.json").write_text(json.dumps(summary | {"mine": summary["mine"] | counted}))


def make_theirs(folder):
    "Pairs and answers in other people's forms, and what controls say"
    def said(*texts): return [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts)]
    hh = {side: f"\n\nHuman: Why?\n\nAssistant: {side}." for side in ("chosen", "rejected")}
    ultra = {"system": "Be brief.", "chosen": said("Why?", "So."), "rejected": said("Why?", "No."), "score_chosen": 8}
    trl = {"prompt": said("Why?"), "chosen": said("", "So.")[1:], "rejected": said("", "No.")[1:]}
    write_jsonl(folder/"theirs.jsonl", [hh, ultra, trl])
    write_jsonl(folder/"a.jsonl", [{"messages": said("Why?", "So.")}, {"prompt": "Who?", "response": "I."}])
    write_jsonl(folder/"b.jsonl", [{"question": "Why?", "answer": "No."}, {"prompt": "Who?", "response": "You."}])
    found = win_rates(["A", "A", "TIE"], ["B", "A", "TIE"], [3, -1, 0])
    best = best_temperature({"itself": ["a", "b", "tie", "a"]}, ["a", "a", "b", "tie"])
    controls = {"controls": {"itself": found, "constant": found}, "best_temperature": best}
    (folder/"controls.json").write_text(json.dumps({"judge": found | controls}))


def make_good(folder):
    "A small run with every file in it"
    make_run(folder)
    rows = [json.loads(line) for line in (folder/"samples.jsonl").read_text().splitlines()][:12]
    write_jsonl(folder/"samples.jsonl", rows)
    unscored = ("prompt_id", "k", "prompt", "text", "temperature", "ids", "finished")
    write_jsonl(folder/"responses.jsonl", [dict(zip(unscored, map(row.get, unscored))) for row in rows])
    for name in ("pairs", "verdicts", "metrics"):
        lines = (folder/f"{name}.jsonl").read_text().splitlines()[:8]
        (folder/f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    write_jsonl(folder/"margins.jsonl", margins())
    write_jsonl(folder/"prompts.jsonl", [{"prompt": f"Which river runs through {i}?"} for i in range(3)])
    write_jsonl(folder/"votes.jsonl", [{"prompt_id": i, "vote": "tie", "shown_first": "a"} for i in (3, 5, 6)])
    write_jsonl(folder/"instructions.jsonl", [{"passage": "ab12", "kind": "list", "reply": "Name them."}])
    make_mined(folder)
    make_theirs(folder)
    (folder/"sweep.json").write_text(json.dumps(sweep_rows()))
    (folder/"prediction.json").write_text(json.dumps({"margin": .05, "closest": .5, "wins": .1}))
    stored = {"03-colder": {"question": "?", "answer": "yes", "outcome": "no"}}
    (folder/"predictions.json").write_text(json.dumps(stored))
    return folder


# --- the test

@contextlib.contextmanager
def no_hang():
    def stop(*_): raise AssertionError(f"hangs: {SECONDS} s are over")
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try: yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def written(folder):
    "What would be another if anything in the folder were written"
    with os.scandir(folder) as found:
        return {f.name: (f.inode(), f.stat().st_size, f.stat().st_mtime_ns) for f in found}


def outcome(reader, path):
    "read, or refused in one line that names the file; anything else is an error of the reader"
    before = written(path.parent)
    with no_hang(), contextlib.redirect_stdout(io.StringIO()):
        try: found = reader.read(path)
        except UserError as e:
            says = str(e)
            assert says.isprintable() and len(says) <= 1000, says
            assert path.name in says or str(path.parent) in says or SETTING.match(says), says
            result = "refused"
        else:
            assert reader.right(path, found) is not False
            result = "read"
    assert written(path.parent) == before
    return result


def fuzz(name, tries, folder):
    "How many of the damaged files were read, and how many refused"
    reader, counts = READERS[name], Counter()
    good = {file: (folder/file).read_bytes() for file in reader.files}
    for i in range(tries):
        rng = random.Random(f"{name} {i}")
        file = rng.choice(reader.files)
        (folder/file).write_bytes(damaged(good[file], file.endswith(".jsonl"), rng))
        try: counts[outcome(reader, folder/file)] += 1
        except Exception as e: raise AssertionError(f"{name}, input {i} ({file}): {type(e).__name__}: {e}") from e
        (folder/file).write_bytes(good[file])
    return counts


SHARES = {name: 1 / reader.cost for name, reader in READERS.items()}


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_rightly_or_refused_in_a_line(tmp_path, name):
    tries = max(5, round(1000 * SHARES[name] / sum(SHARES.values())))
    counts = fuzz(name, tries, make_good(tmp_path/"run"))
    assert counts.total() == tries and counts["refused"]


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_many_damaged_files(tmp_path, name):
    tries = max(100, round(25_000 * SHARES[name] / sum(SHARES.values())))
    print(name, dict(fuzz(name, tries, make_good(tmp_path/"run"))))


@pytest.mark.parametrize("name", READERS)
def test_the_good_files_are_read(tmp_path, name):
    "What is damaged above is whole before"
    folder = make_good(tmp_path/"run")
    for file in READERS[name].files: assert outcome(READERS[name], folder/file) == "read"
