"The pairs report: each fault is planted in real files, and the report must find it, and find none where there is none"
import json, random, subprocess, sys
from itertools import accumulate

import pytest

from runfolder import make_run, write_jsonl
from test_report import assert_inert, HOSTILE, Page
from wikidpo.cli import main
from wikidpo.core.files import read_jsonl, UserError
from wikidpo.core.pairs import make_pairs
from wikidpo.run.prompts import Neighbours
from wikidpo.show.pairs_report import advice, ALARMS, near_twins, pairs_report, report_pairs, report_text, yields
from wikidpo.show.run import load_run
from wikidpo.world.facts import DATA, find_fact, prompts

WORDS = [f"word{i}" for i in range(400)]

def sound(n=300, seed=0):
    "Pairs with nothing to be said against them"
    rng = random.Random(seed)
    def text(): return " ".join(rng.choices(WORDS, k=rng.randint(12, 30)))
    return [{"prompt": text(), "chosen": text(), "rejected": text(), "score_chosen": rng.randint(6, 10),
             "score_rejected": rng.randint(1, 4), "temp_chosen": rng.choice([.7, 1.]),
             "temp_rejected": rng.choice([.7, 1.])} for _ in range(n)]

def write(tmp_path, rows):
    write_jsonl(tmp_path/"pairs.jsonl", rows)
    return tmp_path/"pairs.jsonl"

def alarms(path, **options): return {a["figure"] for a in report_pairs(path, **options)["advice"]}

def test_sound_pairs_raise_no_alarm(tmp_path):
    write_jsonl(tmp_path/"other.jsonl", sound(50, seed=1))
    path = write(tmp_path, sound())
    assert alarms(path, eval_prompts=tmp_path/"other.jsonl", sft_prompts=tmp_path/"other.jsonl") == set()

def longer(p): return p | {"chosen": p["chosen"] + " and so on and on" * 9}
def colder(p): return p | {"temp_chosen": .7, "temp_rejected": 1.}
def cut(p): return p | {"chosen_finished": False}
def at_ten(p): return p | {"score_chosen": 10}

@pytest.mark.parametrize("fault, share, figure", [
    (longer, .5, "length.rule.right"), (colder, 1, "temperature.rule.right"), (cut, .2, "length.cut"),
    (at_ten, 1, "scores.at_ten")])
def test_what_a_share_of_the_pairs_has_is_found(tmp_path, fault, share, figure):
    rows = sound()
    n = int(share * len(rows))
    assert alarms(write(tmp_path, list(map(fault, rows[:n])) + rows[n:])) == {figure}

@pytest.mark.parametrize("planted, figure", [
    (lambda p: p | {"rejected": p["chosen"]}, "duplicates.unusable"),
    (lambda p: p | {"chosen": " "}, "duplicates.unusable"),
    (lambda p: p | {"chosen": p["rejected"], "rejected": p["chosen"]}, "duplicates.turned")])
def test_one_pair_is_enough(tmp_path, planted, figure):
    rows = sound()
    assert alarms(write(tmp_path, [*rows, planted(rows[7])])) == {figure}

def test_what_is_there_twice(tmp_path):
    rows = sound()
    near = [p | {"prompt": p["prompt"].upper() + "!", "chosen": "Other."} for p in rows[:100]]
    report = report_pairs(write(tmp_path, [*rows, *rows[:10], *near]))
    found = report["duplicates"]
    assert (found["prompts"], round(found["same_pair"] * 410), round(found["near_share"] * 400)) == (400, 10, 100)
    assert found["example"][0] == rows[0]["prompt"] + "!" and found["example"][1] == rows[0]["prompt"]
    assert {"duplicates.same_pair", "duplicates.near_share"} <= {a["figure"] for a in report["advice"]}

def test_prompts_of_the_evaluation_and_of_the_fine_tuning(tmp_path):
    rows = sound()
    path = write(tmp_path, rows)
    write_jsonl(tmp_path/"eval.jsonl", [{"prompt": rows[0]["prompt"].upper()}])
    write_jsonl(tmp_path/"sft.jsonl", [{"prompt": f"{p['prompt']} please"} for p in rows[:60]] + rows[100:130])
    report = report_pairs(path, tmp_path/"eval.jsonl", tmp_path/"sft.jsonl")
    held, tuned = (report["overlap"][name] for name in ("evaluation", "fine_tuning"))
    assert (held["same"], tuned["same"], round(tuned["near_share"] * 270)) == (1, 30, 60)
    assert {a["figure"] for a in report["advice"]} == {"overlap.evaluation.same", "overlap.fine_tuning.same_share"}

def test_a_share_of_few_pairs_is_no_alarm(tmp_path):
    rows = sound(4)
    rows = [*map(longer, rows[:3]), rows[3] | {"rejected": rows[3]["rejected"] + " and more" * 30}]
    report = report_pairs(write(tmp_path, rows))
    assert report["length"]["rule"]["right"] == .75 > ALARMS[4].above and ALARMS[4].figure == "length.rule.right"
    assert "length.rule.right" not in {a["figure"] for a in report["advice"]}

def test_labels_against_the_truth(tmp_path):
    "MiniWiki's own pairs, of which a known share is turned around"
    rows = read_jsonl(DATA/"pairs.jsonl")[:400]
    other = {"chosen": "rejected", "rejected": "chosen"}
    def turn(p): return p | {side: p[other[side]] for side in other}
    turned = list(map(turn, rows[:100]))
    before = report_pairs(write(tmp_path, rows))["noise"]
    after = report_pairs(write(tmp_path, turned + rows[100:]))
    assert after["noise"]["known"] == 400 and after["noise"]["points"] < before["points"]
    assert .2 < after["noise"]["wrong"] - before["wrong"] < .26 and before["wrong"] < .06
    assert "noise.wrong" in {a["figure"] for a in after["advice"]}

def test_a_mining_says_where_prompts_were_lost(tmp_path):
    run = make_run(tmp_path/"run")
    samples = read_jsonl(run/"samples.jsonl")
    for s in samples:
        if s["prompt_id"] == 0: s["text"] = " "
        if s["prompt_id"] == 1: s["score"] = None
        if s["prompt_id"] == 2: s["score"] = 7
        if s["prompt_id"] == 3: s["score"] = 6 + s["k"] % 2
        if s["prompt_id"] == 4: s["score"] = 1 + s["k"]
        if s["prompt_id"] == 5: s |= {"score": 1 + s["k"] * 2, "text": "the same"}
    write_jsonl(run/"samples.jsonl", random.Random(0).sample(samples, len(samples))) # in any order
    found, counts = yields(load_run(run)), make_pairs(samples)[1]
    assert min(found["lost"].values()) >= 1 and found["pairs"] == counts["pairs"]
    lost = found["lost"]
    assert lost["fewer than two answers"] + lost["fewer than two scores"] == counts["unscored"]
    ties = "all the same score", "too small a gap", "best and worst the same text"
    assert sum(lost[name] for name in ties) == counts["tie"] and lost["best too low"] == counts["bad"]

def test_what_a_bare_file_cannot_show_is_said(tmp_path):
    def bare(p): return {k: p[k] for k in ("prompt", "chosen", "rejected")}
    path = write(tmp_path, list(map(bare, sound())))
    report = report_pairs(path)
    assert [report[name] for name in ("yield", "scores", "temperature", "noise")] == [None] * 4
    assert len(report["not_shown"]) == 6
    text = report_text(report)
    assert "This cannot be shown: the yield (it needs a run folder" in text and "Temperature" not in text

def test_the_command_prints_and_writes_both(tmp_path, capsys):
    path = write(tmp_path, [longer(p) for p in sound()])
    main(["pairs-report", str(path), "--out", str(tmp_path/"there")])
    out = capsys.readouterr().out
    assert "! 'the longer answer' is right in" in out and "as much as it earns" in out
    report = json.loads((tmp_path/"there"/"pairs_report.json").read_text())
    assert report["advice"][0]["figure"] == "length.rule.right" and report["pairs"] == 300
    page = Page((tmp_path/"there"/"pairs_report.html").read_text(encoding="utf-8"))
    assert_inert(page)
    assert "'the longer answer' is right in" in page.words and "What cannot be shown" in page.words

def test_the_command_on_a_run_folder(tmp_path, capsys):
    run = make_run(tmp_path/"run")
    main(["pairs-report", str(run)])
    out = capsys.readouterr().out
    assert "Yield" in out and "Temperature" in out
    assert (run/"pairs_report.json").exists()
    words = Page((run/"pairs_report.html").read_text(encoding="utf-8")).words
    assert "rejected at 1.3" in words and "Yield" in words

@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_text_stays_text(tmp_path, kind, capsys):
    rows = sound(40) + [p | {"prompt": f"{HOSTILE[kind]} {p['prompt']} {i}"} for i, p in enumerate(sound(20) * 2)]
    text, (_, html) = pairs_report(write(tmp_path, rows))
    assert_inert(Page(html.read_text(encoding="utf-8")))
    assert "\x1b" not in text and "\u202e" not in text

def test_pairs_that_others_wrote_are_read_and_what_is_left_out_is_said(tmp_path):
    ours = sound(40)
    def said(role, text): return {"role": role, "content": text}
    def told(p, side): return [said("user", p["prompt"]), said("assistant", p[side])]
    def sides(p): return {side: told(p, side) for side in ("chosen", "rejected")}
    theirs = tmp_path/"theirs.jsonl"
    write_jsonl(theirs, [*map(sides, ours), {"chosen": [], "rejected": []}])
    found, same = report_pairs(theirs), report_pairs(write(tmp_path, ours))
    for name in ("pairs", "length", "duplicates", "noise"): assert found[name] == same[name]
    assert "40 pairs in" in report_text(found) and "1 left out, from" in report_text(found)
    assert "1 left out, from" in pairs_report(theirs)[1][1].read_text(encoding="utf-8")

def test_what_is_no_pair_is_refused_in_one_line(tmp_path, capsys):
    path = write(tmp_path, [*sound(2), {"prompt": "p", "chosen": 3, "rejected": "r"}])
    with pytest.raises(UserError, match=r"pairs.jsonl:3: the field 'chosen'"): report_pairs(path)
    (tmp_path/"run").mkdir()
    (tmp_path/"run"/"config.yaml").write_text("{}")
    with pytest.raises(UserError, match="has no pairs.jsonl yet; mine first"): report_pairs(tmp_path/"run")
    with pytest.raises(SystemExit) as e: main(["pairs-report", str(tmp_path/"none.jsonl")])
    assert e.value.code == 2 and "none.jsonl: no such file" in capsys.readouterr().err

def test_twins_are_those_of_comparing_each_with_all():
    rng = random.Random(1)
    base = [" ".join(rng.choices(WORDS[:60], k=rng.randint(1, 25))) for _ in range(400)]
    def edit(text): return " ".join(rng.choice(WORDS) if rng.random() < .15 else w for w in text.split())
    texts, slow = base + list(map(edit, base)), Neighbours()
    wanted = [slow.seen(text) for text in texts]
    assert [t is not None for t in near_twins(texts)] == wanted and 50 < sum(wanted) < 750

def test_the_defaults_of_a_miniwiki_run(tmp_path):
    "The evaluation beside the mining's prompts and the fine-tuning of the shipped policy are known"
    run = make_run(tmp_path/"run")
    (run/"config.yaml").write_text(json.dumps({"mine": {
        "prompts": str(DATA/"prompts_mine.jsonl"), "policy": {"checkpoint": str(DATA/"model.safetensors")}}}))
    write_jsonl(run/"pairs.jsonl", [{"prompt": p, "chosen": find_fact(p).value, "rejected": "No idea."}
                                    for p in prompts("mine")[:20] + prompts("eval")[:3] + prompts("sft")[:2]])
    report = report_pairs(run)
    assert (report["overlap"]["evaluation"]["same"], report["overlap"]["fine_tuning"]["same"]) == (3, 2)

def test_every_alarm_looks_at_a_figure_and_says_why(tmp_path):
    report = report_pairs(write(tmp_path, sound(20)))
    report["yield"] = {"lost_share": {"fewer than two scores": 1, "all the same score": 1, "best too low": 1}}
    report["overlap"] = {k: {"same": 1, "same_share": 1, "near_share": 1} for k in ("evaluation", "fine_tuning")}
    report["noise"] = {"wrong": 1, "low": .9}
    for name in ("length", "temperature"): report[name]["rule"] |= {"right": .9, "low": .8}
    report["length"]["cut"] = report["scores"]["at_ten"] = 1
    report["duplicates"] |= {"unusable": 1, "turned": 1, "same_pair": 1, "near_share": 1}
    assert [a["figure"] for a in advice(report)] == [a.figure for a in ALARMS]
    assert all(alarm.reason and "{" in alarm.says for alarm in ALARMS)

@pytest.mark.slow
def test_100_000_pairs_take_seconds_and_little_memory(tmp_path):
    "Measured in a process of its own: processor time, and memory above what the imports take"
    rng, words = random.Random(0), [f"word{i}" for i in range(20_000)]
    common = list(accumulate(1 / (i + 1) for i in range(20_000)))
    def text(k): return " ".join(rng.choices(words, cum_weights=common, k=k))
    rows = [{"prompt": text(rng.randint(8, 60)), "chosen": text(20), "rejected": text(30)} for _ in range(90_000)]
    def edit(text): return " ".join(rng.choice(words) if rng.random() < .03 else w for w in text.split())
    path = write(tmp_path, rows + [p | {"prompt": edit(p["prompt"])} for p in rows[:10_000]])
    look = ("import json, re, sys, time; from wikidpo.show.pairs_report import report_pairs\n"
            "def mb(): return int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024\n"
            "before, start = mb(), time.process_time(); report = report_pairs(sys.argv[1])\n"
            "print(json.dumps([report['pairs'], time.process_time() - start, mb() - before]))")
    done = subprocess.run([sys.executable, "-c", look, str(path)], capture_output=True, text=True, check=True)
    pairs, seconds, mb = json.loads(done.stdout)
    print(f"{seconds:.0f} s, {mb:.0f} MB")
    assert pairs == 100_000 and seconds < 60 and mb < 600
