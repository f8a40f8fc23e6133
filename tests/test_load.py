"Large files: read a line at a time, each text worked on once, and nothing held that is not needed"
import gc
import json
import random
import tracemalloc

import pytest

from engines import TOK
from runfolder import make_run, pairs, samples, verdicts, write_jsonl
from wikidpo.core.data import PairDataset
from wikidpo.core.files import UserError, each_line, no_collector, quoted, read_in_order, read_jsonl
from wikidpo.core.pairs import make_pairs
from wikidpo.show import vote
from wikidpo.show.inspector import PairInspector
from wikidpo.show.report import mining_view
from wikidpo.show.run import load_run

# ---- lines

ODD = b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": "\xe2\x80\xa8"}\n{"a": NaN, "b": [1, 2]}\r\n{"a": 4}'


def test_a_line_has_its_number_and_its_place(tmp_path):
    path = tmp_path/"odd.jsonl"
    path.write_bytes(ODD)
    lines = list(each_line(path))
    assert [n for n, _, _ in lines] == [1, 4, 5, 6]
    assert [row["a"] for _, _, row in lines if row["a"] == row["a"]] == [1, "\u2028", 4]
    for _, begin, row in lines[1:]:
        assert str(json.loads(ODD[begin:].split(b"\n")[0])) == str(row)
    assert lines[0][1] == 0
    last_first = read_in_order(path, lambda row: -len(row))
    assert [list(row) for row in last_first] == [["a", "b"], ["a"], ["a"], ["a"]]


@pytest.mark.parametrize("line, says", [
    (b'{"a": 1', "2: broken JSON"), (b"[1]", "2: expected an object with fields, found list"),
    (b"null", "2: expected an object with fields, found NoneType"),
    (b'{"b": 1}', "2: the field 'a' is missing .found: b"),
    (b'{"a": "\\t "}', "2: the field 'a' is empty"), (b'{"a": "\xff"}', r"not UTF-8 text .byte 16\)"),
    (b'{"a": "\\ud83d"}', "half a character"), (b'{"a": "\\uDC00"}', "half a character"),
    (b"[" * 10_000, "2: broken JSON"),
    (b'{"a": ' + b"9" * 10_000 + b"}", "a number of thousands of digits"), (b'{"a": "no"}', "2: that is no question"),
    (b'{"a": 1} {"a": 2}', "Extra data"), (b"\xef\xbb\xbf{}", "broken JSON"), (b'{"a": "\x00"}', "Invalid control")])
def test_a_line_that_is_wrong_is_named_and_the_collector_comes_back(tmp_path, line, says):
    path = tmp_path/"rows.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 3}\n')
    wrong = {"a": "no"}
    with pytest.raises(UserError, match=says):
        read_jsonl(path, ["a"], lambda row: "that is no question" if row == wrong else None)
    assert gc.isenabled()


def test_the_collector_stays_off_where_somebody_wants_it_off(tmp_path):
    write_jsonl(tmp_path/"rows.jsonl", [{"a": 1}])
    gc.disable()
    try:
        assert read_jsonl(tmp_path/"rows.jsonl") == [{"a": 1}] and not gc.isenabled()
        with no_collector(): pass
        assert not gc.isenabled()
    finally: gc.enable()


def test_what_is_quoted_is_cut_and_what_is_not_too_long_is_not():
    assert quoted("x" * 120) == "x" * 120 and quoted("x" * 121) == "x" * 119 + "…"
    assert quoted("\x1b[31m\n") == r"\x1b[31m\n"


def test_the_names_of_fields_are_held_once(tmp_path):
    write_jsonl(tmp_path/"rows.jsonl", [{"a_name_of_a_field": i} for i in range(3)])
    names = [next(iter(row)) for row in read_jsonl(tmp_path/"rows.jsonl")]
    assert names[0] is names[1] is names[2]


# ---- memory and work

def held(work):
    "The most bytes of Python objects at a time while `work` runs"
    gc.collect()
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()


@pytest.fixture(scope="module")
def mined(tmp_path_factory):
    "A run folder with 8,000 samples, in the order in which the scores came"
    path = make_run(tmp_path_factory.mktemp("load")/"run", ())
    rows = samples(2000)
    write_jsonl(path/"pairs.jsonl", pairs(rows[:400]))
    write_jsonl(path/"samples.jsonl", random.Random(1).sample(rows, len(rows)))
    return path


def test_the_report_counts_samples_and_keeps_none(mined):
    view = []
    size = (mined/"samples.jsonl").stat().st_size
    assert held(lambda: view.append(mining_view(load_run(mined)))) < size / 2 # with all pairs
    rows = read_jsonl(mined/"samples.jsonl")
    scores = view[0]["scores"]
    for t in scores["temps"]:
        scored = [r["score"] for r in rows if f"{r['temperature']:g}" == t["name"] and r["score"] is not None]
        assert t["counts"] == [scored.count(i) for i in range(1, 11)]
        assert t["mean"] == f"{sum(scored) / len(scored):.1f}"
    assert scores["unread"] == sum(r["score"] is None for r in rows) > 50
    assert scores["top"] == max(max(t["counts"]) for t in scores["temps"])


def test_the_inspector_of_samples_in_any_order_is_that_of_their_list(mined):
    rows = read_jsonl(mined/"samples.jsonl")
    there, here = PairInspector(mined/"samples.jsonl"), PairInspector(rows)
    assert there.pairs == here.pairs == make_pairs(rows, 0, 0)[0]
    assert there.total == here.total == 2000 > len(there.pairs) and there.unit == "prompts"
    with pytest.raises(UserError, match="row 8001: the field 'prompt_id' is missing"):
        PairInspector([*rows, {"prompt": "?"}])
    bad = mined.parent/"mixed.jsonl"
    write_jsonl(bad, [*rows[:3], {"prompt": "?"}])
    with pytest.raises(UserError, match="mixed.jsonl:4: the field 'prompt_id' is missing"): PairInspector(bad)


def test_a_dataset_hands_each_text_to_the_tokenizer_once_and_not_one_by_one(tmp_path):
    calls = {"encode_batch_fast": [], "decode_batch": []}

    class Counting:
        chat = TOK.chat
        def __getattr__(self, name):
            found = getattr(TOK, name)
            if name not in calls: return found
            return lambda items, *a, **kw: calls[name].append(len(items)) or found(items, *a, **kw)

    tokens = {"chosen": TOK.encode("Yes.").ids, "rejected": TOK.encode("No.").ids}
    row = {"prompt": "Is it?", "chosen": "Yes.", "rejected": "No."} | {f"{k}_tokens": v for k, v in tokens.items()}
    write_jsonl(tmp_path/"pairs.jsonl", [row] * 2500)
    data = PairDataset(tmp_path/"pairs.jsonl", Counting(), 256)
    assert len(data) == 2500 and data.rows[2499] == data.rows[0]
    assert sum(calls["encode_batch_fast"]) == 2500 and sum(calls["decode_batch"]) == 5000
    assert sum(map(len, calls.values())) < 20


def test_a_vote_does_not_look_at_all_questions_again(tmp_path, monkeypatch):
    "Counts the drawing of lots: once a question, and twice the sides of those that are asked"
    drawn, draw = [], vote._stable_random
    monkeypatch.setattr(vote, "_stable_random", lambda *what: drawn.append(what) or draw(*what))
    rows = verdicts(500)
    w = vote.BlindVote(rows, tmp_path/"votes.jsonl")
    n, before = len(w.rows), len(drawn)
    asked = [w.current]
    for _ in range(20):
        w.vote("tie")
        asked.append(w.current)
    assert before <= n + 2 and len(drawn) == before + 40
    assert asked == sorted(w.rows, key=lambda i: draw(0, "order", i))[:21]
    again = vote.BlindVote(rows, tmp_path/"votes.jsonl")
    assert again.current == asked[20] and not w.error
