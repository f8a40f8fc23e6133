"Files of answers, judged against each other: matching, both orders, nothing asked twice, a ranking against a yardstick"
import json
import random
from collections import Counter

import numpy as np
import pytest

from wikidpo.cli import main
from wikidpo.core.files import read_jsonl, UserError
from wikidpo.core.stats import tally
from wikidpo.judge.config import TeacherConfig
from wikidpo.judge.offline import offline_app, serving
from wikidpo.run.compare import bradley_terry, compare, compare_table, file_names, ranking, read_files
from wikidpo.run.evaluate import summarize
from wikidpo.world.answers import answer
from wikidpo.world.facts import find_fact, prompts

Q = prompts("eval")[:40]


def texts(name, **mix):
    "One answer to each question, of qualities drawn by their shares"
    rng = random.Random(name)
    return [answer(find_fact(q), rng.choices([*mix], mix.values())[0], rng) for q in Q]


GOOD, FAIR = texts("good", crisp=7, rambling=3), texts("fair", crisp=4, rambling=6)
POOR = texts("poor", crisp=3, rambling=3, wrong=4)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def plain(answers): return [{"prompt": q, "response": a} for q, a in zip(Q, answers)]


def chat(answers):
    return [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
            for q, a in zip(Q, answers)]


@pytest.fixture
def three(tmp_path):
    "Three files of answers in three forms, the last in another order"
    trl = [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in chat(POOR)]
    return [write(tmp_path/"good.jsonl", plain(GOOD)), write(tmp_path/"fair.jsonl", chat(FAIR)),
            write(tmp_path/"poor.jsonl", trl[::-1])]


class Counting:
    "The offline judge's app, which counts how often each question was asked, and may refuse or die"
    def __init__(self, refuses=None, dies_after=None):
        self.app, self.asked = offline_app(), Counter()
        self.refuses, self.dies_after = refuses, dies_after

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http": return await self.app(scope, receive, send)
        request = await receive()
        content = json.loads(request["body"])["messages"][0]["content"] if request.get("body") else ""
        judging = "Answer A:" in content
        if judging: self.asked[content] += 1
        refused = judging and self.refuses and self.refuses in content
        if refused or judging and self.dies_after is not None and self.asked.total() > self.dies_after:
            await send({"type": "http.response.start", "status": 400 if refused else 503,
                        "headers": [(b"content-type", b"application/json"), (b"retry-after-ms", b"1")]})
            return await send({"type": "http.response.body", "body": b'{"error": {"message": "not this one"}}'})

        async def again(): return request
        await self.app(scope, again, send)


def judged_by(app, paths, out, **kw):
    with serving(app) as url: return compare(paths, TeacherConfig(url=url, concurrency=4, retries=0), out, **kw)


def test_the_command_compares_three_files_of_three_forms(three, tmp_path, capsys):
    main(["compare", *map(str, three), "--out", str(tmp_path/"run")])
    said = capsys.readouterr().out
    assert "40 prompts, which all 3 files have" in said and said.index("  good ") < said.index("  poor ")
    found = json.loads((tmp_path/"run"/"summary.json").read_text())["compare"]
    assert [c["n"] for c in found["comparisons"]] == [40] * 3 and found["unparsed"] == 0
    assert [row["name"] for row in found["ranking"]] == ["good", "fair", "poor"]
    rows = read_jsonl(tmp_path/"run"/"verdicts.jsonl")
    assert [row["prompt_id"] for row in rows] == list(range(120))
    for row in rows:
        at = Q.index(row["prompt"])
        assert row["a"] == {"good": GOOD, "fair": FAIR}[row["model_a"]][at]
        assert row["b"] == {"fair": FAIR, "poor": POOR}[row["model_b"]][at]
        assert row["result"] == tally(row["first"], row["second"]) and 1 <= row["truth_a"] <= 10
    first = [row for row in rows if (row["model_a"], row["model_b"]) == ("good", "fair")]
    numbers = {k: v for k, v in found["comparisons"][0].items() if k in summarize(first)}
    assert numbers == summarize(first)
    main(["compare", *map(str, three), "--out", str(tmp_path/"run")])
    assert "already done" in capsys.readouterr().out


def level(n=10):
    "Rows of a comparison of three in which nobody wins anything"
    names = [("x", "y"), ("x", "z"), ("y", "z")]
    return [{"prompt_number": i, "model_a": a, "model_b": b, "result": "tie"} for i in range(n) for a, b in names]


def test_nobody_leads_where_all_are_level():
    "The order of the files decides nothing"
    rows = ranking(level(), ["x", "y", "z"])
    assert [row["first"] for row in rows] == pytest.approx([1/3] * 3) and {row["strength"] for row in rows} == {0.}


def test_equal_answers_are_counted_apart(three, tmp_path, capsys):
    "Nobody is asked about them, so no judge has said that they tie; and an interval that cannot be had is not printed"
    copy = tmp_path/"copy.jsonl"
    copy.write_bytes(three[0].read_bytes())
    main(["compare", str(three[0]), str(copy), "--out", str(tmp_path/"run")])
    said = capsys.readouterr().out
    assert "tie 40 (said 0, orders disagreed 0, equal answers 40)" in said
    again = tmp_path/"again.jsonl"
    again.write_bytes(three[0].read_bytes())
    main(["compare", str(three[0]), str(copy), str(again), "--out", str(tmp_path/"level")])
    assert capsys.readouterr().out.count("(no interval)") == 3
    main(["report", "--out", str(tmp_path/"level")])
    page = (tmp_path/"level"/"report.html").read_text()
    assert "No file leads the ranking of 3 files" in page and "nobody was asked" in page


def test_two_files_get_the_table_of_a_win_rate(three, tmp_path, capsys):
    main(["compare", *map(str, three[:2]), "--out", str(tmp_path/"run"), "--n", "30"])
    said = capsys.readouterr().out
    assert "of 30 prompts" in said and "at equal length" in said and "sign test" in said and "ranking" not in said
    main(["report", "--out", str(tmp_path/"run")])                     # such a folder has no models, and a report
    assert (tmp_path/"run"/"report.html").stat().st_size > 1000


def test_who_stands_first_on_the_command_line_changes_nothing(three, tmp_path):
    "The same questions, so the same verdicts: wins become losses"
    one, two = (compare(files, TeacherConfig(), tmp_path/name)["comparisons"][0]
                for name, files in (("ab", three[:2]), ("ba", three[1::-1])))
    assert (one["win"], one["tie"], one["loss"]) == (two["loss"], two["tie"], two["win"])
    assert one["win_rate"] == pytest.approx(1 - two["win_rate"])
    def by_prompt(name): return {row["prompt"]: row for row in read_jsonl(tmp_path/name/"verdicts.jsonl")}
    rows = by_prompt("ab"), by_prompt("ba")
    for q in Q:
        assert (rows[0][q]["first"], rows[0][q]["second"]) == (rows[1][q]["second"], rows[1][q]["first"])


def test_no_question_is_asked_twice_and_equal_answers_not_at_all(tmp_path):
    "The second file has half of its answers from the first, the third is the first with other words around it"
    mixed = GOOD[:20] + FAIR[20:]
    paths = [write(tmp_path/f"{name}.jsonl", plain(answers))
             for name, answers in (("a", GOOD), ("b", mixed), ("c", FAIR), ("d", GOOD))]
    app = Counting()
    found = judged_by(app, paths, tmp_path/"run")
    assert set(app.asked.values()) == {1}
    distinct = {(q, *sorted(pair)) for q, pair in zip(Q, zip(GOOD, FAIR)) if pair[0] != pair[1]}
    assert len(app.asked) == 2 * len(distinct)
    same = {(c["a"], c["b"]): c["same"] for c in found["comparisons"]}
    assert same["a", "d"] == 40 and same["a", "b"] >= 20
    for row in read_jsonl(tmp_path/"run"/"verdicts.jsonl"):
        assert (row["result"] == "tie" and row["same"]) if row["a"] == row["b"] else "same" not in row
    every = {(row["prompt"], row["a"], row["b"]): row["result"] for row in read_jsonl(tmp_path/"run"/"verdicts.jsonl")}
    turned = {"a": "b", "b": "a", "tie": "tie"}
    for (q, a, b), result in every.items():
        if (q, b, a) in every: assert every[q, b, a] == turned[result]


def test_a_question_that_another_comparison_has_answered_is_not_asked_again(tmp_path):
    "A run that lost the rows of two of its three comparisons, whose questions are those of the first"
    paths = [write(tmp_path/f"{name}.jsonl", plain(answers)) for name, answers in zip("abc", (GOOD, FAIR, GOOD))]
    app, out = Counting(), tmp_path/"run"
    with serving(app) as url:
        judge = TeacherConfig(url=url, retries=0)
        whole, rows, asked = compare(paths, judge, out), read_jsonl(out/"verdicts.jsonl"), app.asked.total()
        write(out/"verdicts.jsonl", [row for row in rows if row["model_b"] == "b"])
        (out/"summary.json").unlink()
        assert compare(paths, judge, out)["comparisons"] == whole["comparisons"]
    assert app.asked.total() == asked and len(read_jsonl(out/"verdicts.jsonl")) == len(rows) == 120


def test_files_that_agree_everywhere_need_no_judgement(tmp_path):
    app = Counting()
    found = judged_by(app, [write(tmp_path/f"{n}.jsonl", plain(GOOD)) for n in "ab"], tmp_path/"run")
    assert not app.asked and found["comparisons"][0]["tie"] == 40 == found["comparisons"][0]["same"]


def test_a_judge_that_dies_leaves_what_it_said_and_the_rest_is_asked_later(three, tmp_path):
    first, second = Counting(dies_after=60), Counting()
    with pytest.raises(UserError, match="calls in a row failed"): judged_by(first, three, tmp_path/"run")
    path = tmp_path/"run"/"verdicts.jsonl"
    kept = path.read_text().splitlines()
    assert 10 < len(kept) < 120
    path.write_bytes(path.read_bytes() + b'{"prompt_id": 7, "pro')           # and the process with it
    with serving(second) as url:
        config = (tmp_path/"run"/"config.yaml").read_text()
        old = next(line for line in config.splitlines() if "url:" in line)
        (tmp_path/"run"/"config.yaml").write_text(config.replace(old, f"    url: {url}"))
        found = compare(three, TeacherConfig(url=url, concurrency=4, retries=0), tmp_path/"run")
    rows = {row["prompt_id"]: row for row in read_jsonl(path)}
    assert sorted(rows) == list(range(120)) and found["unparsed"] == 0
    for line in kept:
        row = json.loads(line)
        if row["result"]: assert rows[row["prompt_id"]] == row
    answered = {json.dumps([r["prompt"], *sorted((r["a"], r["b"]))]) for r in map(json.loads, kept) if r["result"]}
    whole = compare(three, TeacherConfig(), tmp_path/"whole")
    assert whole["comparisons"] == found["comparisons"] and whole["ranking"] == found["ranking"]
    asked = {json.dumps([r["prompt"], *sorted((r["a"], r["b"]))]) for r in rows.values() if r["a"] != r["b"]}
    assert len(second.asked) == 2 * len(asked - answered)


def test_what_the_judge_refuses_is_counted_and_asked_again(three, tmp_path, capsys):
    app = Counting(refuses=Q[3])
    with serving(app) as url:
        judge = TeacherConfig(url=url, retries=0)
        found = compare(three, judge, tmp_path/"run")
        lost = [row for row in read_jsonl(tmp_path/"run"/"verdicts.jsonl") if not row["result"]]
        assert 1 <= found["unparsed"] == len(lost) <= 3 and {row["prompt"] for row in lost} == {Q[3]}
        assert "comparisons have no verdict" in capsys.readouterr().out
        assert sum(c["n"] for c in found["comparisons"]) == 120 - len(lost)
        app.refuses, before = None, app.asked.total()
        assert compare(three, judge, tmp_path/"run")["unparsed"] == 0
    distinct = {tuple(sorted((row["a"], row["b"]))) for row in lost}
    assert app.asked.total() == before + 2 * len(distinct)


def test_a_comparison_without_any_verdict_can_be_asked_again(three, tmp_path):
    app = Counting(refuses=Q[0])
    with serving(app) as url:
        judge = TeacherConfig(url=url, retries=0)
        found = compare(three, judge, tmp_path/"run", 1)
        assert [c["n"] for c in found["comparisons"]].count(0) >= 1
        assert "NaN" not in (tmp_path/"run"/"summary.json").read_text()
        app.refuses = None
        assert compare(three, judge, tmp_path/"run", 1)["unparsed"] == 0
        assert compare(three, judge, tmp_path/"run", 1, restart=True)["unparsed"] == 0


def test_a_judge_that_says_nothing_useful_is_an_error(three, tmp_path):
    class Odd(Counting):
        async def __call__(self, scope, receive, send):
            await receive()
            body = json.dumps({"choices": [{"message": {"content": "I cannot say"}}]}).encode()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": body})
    different = [write(tmp_path/"x.jsonl", plain(GOOD)), write(tmp_path/"y.jsonl", plain(["No."] * 40))]
    with pytest.raises(UserError, match="no verdict could be read on 40 prompts"):
        judged_by(Odd(), different, tmp_path/"run")


def test_what_is_not_in_all_files_is_counted_and_what_cannot_be_read_is_said(tmp_path, capsys):
    a = write(tmp_path/"a.jsonl", plain(GOOD)[:30] + [{"prompt": Q[0]}, {"prompt": Q[1], "response": 3}])
    b = write(tmp_path/"b.jsonl", plain(FAIR)[10:])
    found = compare([a, b], TeacherConfig(), tmp_path/"run")
    assert found["prompts"] == 20
    counts = [(f["answers"], f["unmatched"], sum(f["left_out"].values())) for f in found["files"]]
    assert counts == [(30, 10, 2), (30, 10, 0)]
    said = capsys.readouterr().out
    assert f"1 left out, from {a}:31 on: there is no answer" in said and f"{a}:32 on: expected a text" in said
    table = compare_table(found)
    assert "30 answers, 10 without a counterpart, 2 rows could not be read" in table


def test_a_prompt_that_stands_twice_is_matched_in_order(tmp_path):
    rows = [{"prompt": Q[0], "response": text} for text in ("One.", "Two.", "Three.")]
    more = {"prompt": f" {Q[0]}\n", "response": "Five."}
    (one, two), keys = read_files([write(tmp_path/"a.jsonl", rows), write(tmp_path/"b.jsonl", [*rows[1:], more])])
    met = [(one.found[key], two.found[key]) for key in keys]
    assert met == [("One.", "Two."), ("Two.", "Three."), ("Three.", "Five.")]


@pytest.mark.parametrize("n, says", [(0, "n: must be at least 1"), (-3, "n: must be at least 1")])
def test_numbers_that_are_none(three, tmp_path, n, says):
    with pytest.raises(UserError, match=says): compare(three, TeacherConfig(), tmp_path/"run", n)
    assert not (tmp_path/"run").exists()


def test_what_cannot_be_compared_is_refused_before_anything_is_written(three, tmp_path):
    def refused(says, *paths):
        with pytest.raises(UserError, match=says): compare(paths, TeacherConfig(), tmp_path/"run")
        assert not (tmp_path/"run").exists()
    refused("two different files", three[0])
    refused("two different files", three[0], three[0])
    refused("good.jsonl is named twice", *three, three[0].parent/"."/"good.jsonl")
    refused("no such file", three[0], tmp_path/"none.jsonl")
    refused("no prompt in common", three[0], write(tmp_path/"o.jsonl", [{"prompt": "Why?", "response": "So."}]))
    refused(r"o.jsonl:1: there is no answer", three[0], write(tmp_path/"o.jsonl", [{"prompt": "Why?"}]))
    (tmp_path/"torn.jsonl").write_text('{"prompt": "Wh')
    refused("torn.jsonl:1: broken JSON", three[0], tmp_path/"torn.jsonl")
    with pytest.raises(UserError, match="no teacher at"):
        compare(three, TeacherConfig(url="http://127.0.0.1:9/v1"), tmp_path/"run")
    assert not (tmp_path/"run").exists()


def test_a_folder_holds_one_set_of_verdicts(three, tmp_path):
    from wikidpo.run.profiles import claim
    claim(tmp_path/"judged", "judge", {"n": 3})
    with pytest.raises(UserError, match="holds the verdicts.jsonl of `wikidpo judge`"):
        compare(three, TeacherConfig(), tmp_path/"judged", restart=True)
    compare(three[:2], TeacherConfig(), tmp_path/"run", 5)
    with pytest.raises(UserError, match="holds the verdicts.jsonl of `wikidpo compare`"):
        claim(tmp_path/"run", "judge", {"n": 3})
    three[0].write_text(three[0].read_text() + "\n")
    with pytest.raises(UserError, match="compare.file 1 has another content now"):
        compare(three[:2], TeacherConfig(), tmp_path/"run", 5)
    assert compare(three[1:], TeacherConfig(), tmp_path/"run", 6, restart=True)["prompts"] == 6
    assert len(read_jsonl(tmp_path/"run"/"verdicts.jsonl")) == 6


def test_names_are_short_where_they_can_be():
    assert file_names(["x/a.jsonl", "b.json"]) == ["a", "b"]
    assert file_names(["x/a.jsonl", "y/a.jsonl", "b.json"]) == ["x/a.jsonl", "y/a.jsonl", "b"]


# ---- the ranking

POINTS = np.array([[0, 31, 31, 49], [21, 0, 30.5, 7], [11, 14.5, 0, 21.5], [10, 13, 10.5, 0]])


def test_strengths_are_those_of_evalica_and_choix():
    """evalica 0.4.2 (`bradley_terry`, tolerance 1e-12, ties half) and choix 0.4.1 (`ilsr_pairwise`, alpha 0) on these
    points both give these numbers, to seven places"""
    assert bradley_terry(POINTS) == pytest.approx([.7344501, .1155068, -.2969504, -.5530065], abs=2e-7)


def test_strengths_at_the_maximum_expect_the_points_that_were_won():
    rng = np.random.default_rng(0)
    points = rng.integers(0, 40, (50, 6, 6)) + .5
    points *= 1 - np.eye(6)
    points[0] = np.triu(np.full((6, 6), 300.), 1) + .5 * (1 - np.eye(6))  # each beats all that come after it
    s = bradley_terry(points)
    chance = 1 / (1 + np.exp(s[:, None] - s[:, :, None]))
    expected = ((points + points.swapaxes(1, 2)) * chance).sum(2)
    assert np.allclose(expected, points.sum(2), atol=1e-6) and np.allclose(s.sum(1), 0)
    assert (np.diff(s[0]) < 0).all() and np.isfinite(s).all()


def judged(results): # {(a, b): a result a prompt}
    return [{"prompt_number": i, "model_a": a, "model_b": b, "result": r}
            for (a, b), some in results.items() for i, r in enumerate(some)]


def test_a_circle_ranks_nobody_and_a_clear_order_ranks_all():
    wins, half = ["a"] * 40, ["a", "b"] * 20
    circle = ranking(judged({("x", "y"): wins, ("y", "z"): wins, ("x", "z"): ["b"] * 40}), ["x", "y", "z"])
    assert all(abs(row["strength"]) < 1e-9 and row["low"] <= 0 <= row["high"] for row in circle)
    clear = ranking(judged({("x", "y"): wins, ("y", "z"): wins, ("x", "z"): wins}), ["z", "y", "x"])
    assert [row["name"] for row in clear] == ["x", "y", "z"] and clear[0]["first"] == 1
    assert clear[0]["points"] == 1 and clear[2]["points"] == 0 and np.isfinite(clear[0]["strength"])
    even = ranking(judged({("x", "y"): half, ("y", "z"): half, ("x", "z"): ["tie"] * 40}), ["x", "y", "z"])
    assert all(row["points"] == .5 and row["low"] < 0 < row["high"] for row in even)


def test_the_interval_of_a_strength_is_that_of_a_share():
    "Of two files the difference in strength is the log-odds of the share, whose standard error is a formula"
    first, second = ranking(judged({("x", "y"): ["a"] * 240 + ["b"] * 160}), ["x", "y"])
    assert first["strength"] - second["strength"] == pytest.approx(np.log(.6/.4), abs=.01)
    assert first["high"] - first["low"] == pytest.approx(1.96 / (400 * .6 * .4)**.5, rel=.15)


def test_prompts_are_drawn_and_not_comparisons():
    "A prompt that stands five times over makes no interval narrower; five times as many prompts do"
    results = random.Random(0).choices(["a", "b", "tie"], k=30)
    def width(some): return np.ptp([ranking(judged({("x", "y"): some}), ["x", "y"])[0][k] for k in ("low", "high")])
    five = [row | {"prompt_number": row["prompt_number"] % 30} for row in judged({("x", "y"): results * 5})]
    repeated = ranking(five, ["x", "y"])[0]
    assert repeated["high"] - repeated["low"] == pytest.approx(width(results), rel=.1)
    assert width(results * 5) < .6 * width(results)
