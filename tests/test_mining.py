"Mining: interrupted for real and started again, against an offline teacher served over HTTP and in process"
import json, os, signal, subprocess, sys, time
import pytest
from wikidpo.files import read_jsonl, write_jsonl
from wikidpo.miniwiki import DATA, prompts
from wikidpo.pairs import MineConfig, make_pairs, mine
from wikidpo.sampling import UNIT, PolicyConfig
from wikidpo.files import UserError
from wikidpo.teacher import OfflineTeacher, TeacherConfig, offline_app, serving

POLICY = PolicyConfig(str(DATA/"model.safetensors"), str(DATA/"tokenizer.json"), device="cpu")
N = UNIT + 40                                                     # a whole unit and a part of one

def config(**kw): return MineConfig(**({"prompts": str(DATA/"prompts_mine.jsonl"), "n_prompts": N, "seed": 0, "max_new": 48, "batch": 256} | kw))

def files(run): return {n: (run/n).read_bytes() for n in ("responses.jsonl", "samples.jsonl", "pairs.jsonl")}

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = tmp_path_factory.mktemp("mine")/"run"
    mine(POLICY, TeacherConfig(), config(), run)
    return run

def test_files_are_complete_and_agree(whole):
    samples, pairs, summary = read_jsonl(whole/"samples.jsonl"), read_jsonl(whole/"pairs.jsonl"), json.loads((whole/"summary.json").read_text())["mine"]
    assert [(s["prompt_id"], s["k"]) for s in samples] == [(i, k) for i in range(N) for k in range(4)]
    assert [s["temperature"] for s in samples[:4]] == [.7, .9, 1.1, 1.3]
    assert [s["prompt"] for s in samples[::4]] == prompts("mine")[:N]
    teacher = OfflineTeacher(.5, .45, 0)
    assert all(s["score"] == teacher.score(s["prompt"], s["text"]) for s in samples[:200] if s["text"])
    assert pairs == make_pairs(samples)[0] and len(pairs) == summary["pairs"] and summary["survival"] == len(pairs) / N
    assert all(p["score_chosen"] >= 6 and p["score_chosen"] - p["score_rejected"] >= 2 for p in pairs)
    assert .5 <= summary["survival"] <= .75

def test_sigint_then_the_same_command_gives_the_same_bytes(whole, tmp_path):
    "The command is killed by a real Ctrl-C while requests are in flight to a slow server; nothing is asked twice"
    asked, app = [], offline_app()
    async def counting(scope, receive, send):
        if scope["type"] == "http" and scope["path"].endswith("completions"): asked.append(time.time())
        await app(scope, receive, send)
    with serving(counting) as url:
        words = ["mine", "--out", str(tmp_path/"run"), "--n-prompts", str(N), "--max-new", "48", "--teacher.url", url]
        p = subprocess.Popen([sys.executable, "-c", "from wikidpo.cli import main; main()", *words], stderr=subprocess.PIPE, text=True)
        samples = tmp_path/"run"/"samples.jsonl"
        while not (samples.exists() and samples.read_bytes().count(b"\n") > 100): time.sleep(.02); assert p.poll() is None, p.stderr.read()
        p.send_signal(signal.SIGINT)
        err = p.communicate(timeout=60)[1]
        assert p.returncode == 130 and "the same command goes on from here" in err and "Traceback" not in err
        kept, before = samples.read_bytes(), len(asked)
        done = kept.count(b"\n")
        assert 100 < done < 4 * N and done <= before <= done + 32 + 3            # what was in flight may be lost, no more (and the probe)
        subprocess.run([sys.executable, "-c", "from wikidpo.cli import main; main()", *words], check=True, stderr=subprocess.PIPE)
        assert len(asked) - before <= 4 * N - done + 1                          # the rest, and one probe
    assert set(kept.split(b"\n")) - {b""} <= set(samples.read_bytes().split(b"\n"))
    assert files(tmp_path/"run") == files(whole)

def test_a_unit_cut_in_the_middle_is_sampled_again(whole, tmp_path):
    run = tmp_path/"run"; run.mkdir()
    (run/"config.yaml").write_text((whole/"config.yaml").read_text())
    (run/"responses.jsonl").write_bytes((whole/"responses.jsonl").read_bytes()[:-3000])
    mine(POLICY, TeacherConfig(), config(), run)
    assert files(run) == files(whole)

def test_another_seed_is_another_run(whole, tmp_path):
    with pytest.raises(UserError, match=r"holds another run \(mine.seed is 0 there, 1 here\)"): mine(POLICY, TeacherConfig(), config(seed=1), whole)
    mine(POLICY, TeacherConfig(), config(seed=1, n_prompts=20), tmp_path/"run")
    assert read_jsonl(tmp_path/"run"/"samples.jsonl")[:4] != read_jsonl(whole/"samples.jsonl")[:4]

def test_filters_are_a_view_over_the_samples(whole):
    samples = read_jsonl(whole/"samples.jsonl")
    n = [len(make_pairs(samples, gap=g)[0]) for g in (1, 2, 3, 5, 8)]
    assert n == sorted(n, reverse=True) and n[0] > n[-1]
    unscored = [s | {"score": None} if s["k"] == 0 else s for s in samples]
    pairs, counts = make_pairs(unscored)
    assert all(p["temp_chosen"] != .7 and p["temp_rejected"] != .7 for p in pairs) and counts["prompts"] == N

def test_prompts_the_teacher_cannot_place_give_no_pairs(tmp_path):
    write_jsonl(tmp_path/"p.jsonl", [{"prompt": "Who are you?"}, {"prompt": "Write a poem."}])
    with pytest.raises(UserError, match="no MiniWiki question"): mine(POLICY, TeacherConfig(), config(prompts=str(tmp_path/"p.jsonl")), tmp_path/"run")
