"Mining: interrupted for real and started again, against an offline teacher served over HTTP and in process"
import json, shutil, signal, subprocess, sys, time
from contextlib import suppress
from dataclasses import replace

import pytest

from wikidpo.cli import main
from wikidpo.core.config import UNIT
from wikidpo.core.files import read_jsonl, UserError
from wikidpo.core.pairs import make_pairs
from wikidpo.core.stats import tally
from wikidpo.judge.config import TeacherConfig
from wikidpo.judge.offline import offline_app, OfflineTeacher, serving
from wikidpo.run import mine as mine_module
from wikidpo.run.config import EvaluateConfig, MineConfig, PolicyConfig, RunTrainConfig
from wikidpo.run.folder import write_jsonl
from wikidpo.run.mine import merge, mine
from wikidpo.run.publish import dataset_card
from wikidpo.run.rig import budget
from wikidpo.world.facts import DATA, prompts

POLICY = PolicyConfig(str(DATA/"model.safetensors"), str(DATA/"tokenizer.json"), device="cpu")
N = UNIT + 40 # a whole unit and a part of one
FILES = ("responses.jsonl", "samples.jsonl", "pairs.jsonl")

def config(**options):
    settings = {"prompts": str(DATA/"prompts_mine.jsonl"), "n_prompts": N, "seed": 0, "max_new": 48, "batch": 256}
    return MineConfig(**(settings | options))

def files(run): return {name: (run/name).read_bytes() for name in FILES}

def mine_summary(run): return json.loads((run/"summary.json").read_text())["mine"]

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = tmp_path_factory.mktemp("mine")/"run"
    mine(POLICY, TeacherConfig(), config(), run)
    return run

def test_files_are_complete_and_agree(whole):
    samples, pairs, summary = read_jsonl(whole/"samples.jsonl"), read_jsonl(whole/"pairs.jsonl"), mine_summary(whole)
    assert [(s["prompt_id"], s["k"]) for s in samples] == [(i, k) for i in range(N) for k in range(4)]
    assert [s["temperature"] for s in samples[:4]] == [.7, .9, 1.1, 1.3]
    assert [s["prompt"] for s in samples[::4]] == prompts("mine")[:N]
    teacher = OfflineTeacher()
    assert all(s["score"] == teacher.score(s["prompt"], s["text"]) for s in samples[:200] if s["text"])
    assert pairs == make_pairs(samples)[0]
    assert len(pairs) == summary["pairs"] and summary["survival"] == len(pairs) / N
    assert all(p["score_chosen"] >= 6 and p["score_chosen"] - p["score_rejected"] >= 2 for p in pairs)
    assert .5 <= summary["survival"] <= .75

@pytest.mark.parametrize("changes", [
    {"batch": 3}, {"top_k": 1}, {"max_new": 4}, {"temps": (.2, .9, 1.1, 1.3)}, {"seed": 9}], ids=str)
def test_what_is_asked_of_the_sampler_reaches_it(tmp_path, whole, changes):
    "And how many prompts are asked at once changes nothing"
    with suppress(UserError): mine(POLICY, TeacherConfig(), config(**changes | {"n_prompts": 8}), tmp_path/"run")
    def answers(run): return [s["text"] for s in read_jsonl(run/"samples.jsonl")[:32]]
    texts, plain = answers(tmp_path/"run"), answers(whole)
    assert (texts == plain) == ("batch" in changes)
    if "top_k" in changes: assert len(set(texts)) == 8, "one answer a prompt, at every temperature"

def start_command(words):
    "The command in a process that hears Ctrl-C: SIGINT is ignored where the tests run in a shell's background"
    def hear(): signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen([sys.executable, "-c", "from wikidpo.cli import main; main()", *words],
                            stderr=subprocess.PIPE, text=True, preexec_fn=hear)

def wait_for_lines(path, n, process):
    while not (path.exists() and path.read_bytes().count(b"\n") > n):
        time.sleep(.02)
        assert process.poll() is None, process.stderr.read()

def test_sigint_then_the_same_command_gives_the_same_bytes(whole, tmp_path):
    "The command is killed by a real Ctrl-C while requests are in flight to a slow server; nothing is asked twice"
    asked, app, run = [], offline_app(), tmp_path/"run"
    async def counting(scope, receive, send):
        if scope["type"] == "http" and scope["path"].endswith("completions"): asked.append(time.time())
        await app(scope, receive, send)
    with serving(counting) as url:
        words = ["mine", "--out", str(run), "--n-prompts", str(N), "--max-new", "48", "--teacher.url", url]
        process = start_command(words)
        wait_for_lines(run/"samples.jsonl", 100, process)
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=60)[1]
        assert process.returncode == 130
        assert "the same command goes on from here" in err and "Traceback" not in err
        kept, before = (run/"samples.jsonl").read_bytes(), len(asked)
        done = kept.count(b"\n")
        assert 100 < done < 4 * N
        assert done <= before <= done + 32 + 3 # what was in flight may be lost, no more (and the probes)
        again = start_command(words)
        again.communicate()
        assert again.returncode == 0
        assert len(asked) - before <= 4 * N - done + 2 # the rest, and the two probes at the start
    assert set(kept.split(b"\n")) - {b""} <= set((run/"samples.jsonl").read_bytes().split(b"\n"))
    assert files(run) == files(whole)

def test_a_unit_cut_in_the_middle_is_sampled_again(whole, tmp_path):
    run = tmp_path/"run"
    run.mkdir()
    (run/"config.yaml").write_text((whole/"config.yaml").read_text())
    (run/"responses.jsonl").write_bytes((whole/"responses.jsonl").read_bytes()[:-3000])
    judged = (whole/"samples.jsonl").read_bytes().splitlines(keepends=True)
    (run/"samples.jsonl").write_bytes(b"".join(judged[500:900] + judged[:100])) # these are not judged again
    mine(POLICY, TeacherConfig(), config(), run)
    assert files(run) == files(whole)

def test_a_mining_that_only_has_to_be_judged_opens_no_policy(whole, tmp_path, monkeypatch):
    "A large one takes a minute to be made ready for sampling"
    run = shutil.copytree(whole, tmp_path/"run")
    (run/"summary.json").unlink()
    scored = (run/"samples.jsonl").read_bytes().splitlines(keepends=True)
    (run/"samples.jsonl").write_bytes(b"".join(scored[:-7]))
    monkeypatch.setattr(mine_module, "open_policy", lambda policy: pytest.fail("the policy was opened"))
    mine(POLICY, TeacherConfig(), config(), run)
    assert files(run) == files(whole)

def test_another_seed_is_another_run(whole, tmp_path):
    with pytest.raises(UserError, match=r"holds another run \(mine.seed is 0 there, 1 here\)"):
        mine(POLICY, TeacherConfig(), config(seed=1), whole)
    mine(POLICY, TeacherConfig(), config(seed=1, n_prompts=20), tmp_path/"run")
    assert read_jsonl(tmp_path/"run"/"samples.jsonl")[:4] != read_jsonl(whole/"samples.jsonl")[:4]

def test_filters_are_a_view_over_the_samples(whole):
    samples = read_jsonl(whole/"samples.jsonl")
    n = [len(make_pairs(samples, gap=g)[0]) for g in (1, 2, 3, 5, 8)]
    assert n == sorted(n, reverse=True) and n[0] > n[-1]
    unscored = [s | {"score": None} if s["k"] == 0 else s for s in samples]
    pairs, counts = make_pairs(unscored)
    assert all(p["temp_chosen"] != .7 and p["temp_rejected"] != .7 for p in pairs) and counts["prompts"] == N

def test_the_filters_are_those_of_the_configuration_and_what_has_no_score_is_counted(tmp_path):
    asked = read_jsonl(DATA/"prompts_mine.jsonl")[:16]
    write_jsonl(tmp_path/"p.jsonl", [*asked, {"prompt": "Write a poem."}]) # no MiniWiki question
    found = mine(POLICY, TeacherConfig(), config(prompts=str(tmp_path/"p.jsonl"), gap=1, best=3), tmp_path/"run")
    samples, pairs = (read_jsonl(tmp_path/"run"/name) for name in ("samples.jsonl", "pairs.jsonl"))
    assert pairs == make_pairs(samples, 1, 3)[0] != make_pairs(samples)[0]
    assert found["unparsable"] == sum(s["score"] is None for s in samples) >= 4 and found["pairs"] == len(pairs)

def test_a_prompt_that_leaves_no_room_is_refused_before_the_first_is_asked(tmp_path):
    write_jsonl(tmp_path/"p.jsonl", [{"prompt": "Who are you?"}, {"prompt": "word " * 300}])
    with pytest.raises(UserError, match="prompt 2 is too long to leave room for mine.max_new 48"):
        mine(POLICY, TeacherConfig(), config(prompts=str(tmp_path/"p.jsonl")), tmp_path/"run")
    assert not (tmp_path/"run"/"responses.jsonl").exists()

def test_prompts_the_teacher_cannot_place_give_no_pairs(tmp_path):
    write_jsonl(tmp_path/"p.jsonl", [{"prompt": "Who are you?"}, {"prompt": "Write a poem."}])
    with pytest.raises(UserError, match="no MiniWiki question"):
        mine(POLICY, TeacherConfig(), config(prompts=str(tmp_path/"p.jsonl")), tmp_path/"run")


# --- shards

SHORT = ["--n-prompts", str(2 * UNIT + 88), "--max-new", "12"]

def command(verb, *words): main([verb, *map(str, words)])

@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    "The folder of one process, and those of two shards: one unit, and two of which the last is cut"
    tmp = tmp_path_factory.mktemp("shards")
    command("mine", "--out", tmp/"one", *SHORT)
    for i in (1, 2): command("mine", "--out", tmp/f"s{i}", "--shard", f"{i}/2", *SHORT)
    return tmp

def test_shards_merge_to_the_same_bytes(sharded, capsys):
    one, merged = sharded/"one", sharded/"all"
    command("merge", sharded/"s2", sharded/"s1", "--out", merged)
    assert files(merged) == files(one) and len(read_jsonl(merged/"pairs.jsonl")) > 100
    assert (merged/"config.yaml").read_bytes() == (one/"config.yaml").read_bytes()
    assert mine_summary(one) | {"seconds": 0} == mine_summary(merged) | {"seconds": 0}
    before = files(merged)
    command("mine", "--out", merged, *SHORT) # it is the run folder that this command would write
    assert "already done" in capsys.readouterr().out and files(merged) == before

def test_a_shard_holds_its_units_alone(sharded):
    def units(name): return {r["prompt_id"] // UNIT for r in read_jsonl(sharded/name/"samples.jsonl")}
    assert units("s1") == {0} and units("s2") == {1, 2}

def test_a_merge_of_shards_that_have_changed_is_not_kept_for_the_new_one(sharded, tmp_path):
    shards = [shutil.copytree(sharded/name, tmp_path/name) for name in ("s1", "s2")]
    merge(shards, tmp_path/"all")
    before = files(tmp_path/"all")
    merge(shards, tmp_path/"all")
    changed = (tmp_path/"s2"/"samples.jsonl").read_text().replace('"score": 9', '"score": 8', 1)
    (tmp_path/"s2"/"samples.jsonl").write_text(changed)
    with pytest.raises(UserError, match="samples.jsonl is not what these shards hold now; choose another --out"):
        merge(shards, tmp_path/"all")
    assert files(tmp_path/"all") == before
    merge(shards, tmp_path/"new")

@pytest.mark.parametrize("names, says", [
    (["s1"], "shard 2/2 is missing"),
    ([], "name the run folders"),
    (["s1", "s1"], "are both shard 1/2"),
    (["one", "s2"], "one: is no shard"),
    (["s1", "none"], "none: holds no finished mining"),
])
def test_merge_refuses(sharded, tmp_path, capsys, names, says):
    with pytest.raises(SystemExit) as e: command("merge", *(sharded/n for n in names), "--out", tmp_path/"all")
    err = capsys.readouterr().err.strip()
    assert e.value.code == 2 and says in err and "\n" not in err and not (tmp_path/"all").exists()

def test_merge_refuses_other_and_damaged_shards(sharded, tmp_path):
    shards = [shutil.copytree(sharded/name, tmp_path/name) for name in ("s1", "s2")]
    second = tmp_path/"s2"
    def fails(says):
        with pytest.raises(UserError, match=says): merge(shards, tmp_path/"all")
        assert not (tmp_path/"all").exists()
    config, samples = (second/"config.yaml").read_text(), (second/"samples.jsonl").read_bytes()
    (second/"config.yaml").write_text(config.replace("gap: 2", "gap: 3"))
    fails("s2: is of another mining than .*s1 .mine.gap is 3 there, 2 here")
    (second/"config.yaml").write_text(config.replace("shard: 2/2", "shard: 2/3"))
    fails("mine.shard")
    (second/"config.yaml").write_text(config)
    (second/"samples.jsonl").write_bytes(samples[:-3000])
    fails("samples.jsonl: the shards hold")
    (second/"samples.jsonl").write_bytes(samples)
    (second/"summary.json").unlink()
    fails("s2: holds no finished mining")

@pytest.mark.parametrize("shard, says", [
    ("0/2", "i from 1 to n"),
    ("3/2", "i from 1 to n"),
    ("1", "i from 1 to n"),
    ("a/b", "i from 1 to n"),
    ("1/0", "i from 1 to n"),
    ("1/4", "600 prompts are 3 units of 256: use at most 3 shards"),
])
def test_a_shard_that_cannot_be(tmp_path, capsys, shard, says):
    with pytest.raises(SystemExit) as e: command("mine", "--out", tmp_path/"run", "--shard", shard, *SHORT)
    assert e.value.code == 2 and says in capsys.readouterr().err and not (tmp_path/"run").exists()


# --- pairs confirmed by a comparison in both orders

SMALL = ["--n-prompts", "64", "--max-new", "48"]

@pytest.fixture(scope="module")
def confirmed(tmp_path_factory):
    "The folder of a mining whose pairs were confirmed, and that of the same without"
    tmp = tmp_path_factory.mktemp("confirmed")
    command("mine", "--out", tmp/"all", *SMALL)
    command("mine", "--out", tmp/"confirmed", *SMALL, "--confirm")
    return tmp

def test_a_pair_stays_if_both_orders_say_so(confirmed):
    every, kept = (read_jsonl(confirmed/run/"pairs.jsonl") for run in ("all", "confirmed"))
    judge = OfflineTeacher()
    def asked(p, *sides): return judge.verdict(p["prompt"], *(p[side] for side in sides))
    results = [tally(asked(p, "chosen", "rejected"), asked(p, "rejected", "chosen")) for p in every]
    assert kept == [p for p, result in zip(every, results) if result == "a"] and 9 < len(kept) < len(every)
    counts = mine_summary(confirmed/"confirmed")
    assert counts["pairs"] == counts["confirmed"]["kept"] == len(kept)
    assert counts["confirmed"]["compared"] == len(every) and counts["confirmed"]["reversed"] == results.count("b")
    assert sum(counts["confirmed"][name] for name in ("tied", "flipped")) == results.count("tie")
    assert "confirmed" not in mine_summary(confirmed/"all")
    assert (confirmed/"confirmed"/"config.yaml").read_bytes() == (confirmed/"all"/"config.yaml").read_bytes()
    verdicts = read_jsonl(confirmed/"confirmed"/"confirmed.jsonl")
    assert [v["result"] for v in verdicts] == results
    assert [(v["a"], v["b"]) for v in verdicts] == [(p["chosen"], p["rejected"]) for p in every]

def test_the_card_of_published_pairs_says_that_they_were_confirmed(confirmed):
    counts = mine_summary(confirmed/"confirmed")["confirmed"]
    said = f"both times in {counts['kept']} of {counts['compared']}, which stayed |"
    assert said in dataset_card(confirmed/"confirmed") and "both times" not in dataset_card(confirmed/"all")

def test_a_mining_is_confirmed_when_it_is_done_and_back(confirmed, tmp_path):
    "Nothing is sampled or scored again"
    run = shutil.copytree(confirmed/"all", tmp_path/"run")
    before = files(run)
    command("mine", "--out", run, *SMALL, "--confirm")
    for name in (*FILES, "confirmed.jsonl"): assert (run/name).read_bytes() == (confirmed/"confirmed"/name).read_bytes()
    command("mine", "--out", run, *SMALL)
    assert files(run) == before and "confirmed" not in mine_summary(run)

def test_pairs_that_were_trained_on_stay(confirmed, tmp_path, capsys):
    run = shutil.copytree(confirmed/"all", tmp_path/"run")
    with open(run/"config.yaml", "a") as f: f.write("train: {}\n")
    before = files(run)
    with pytest.raises(SystemExit): command("mine", "--out", run, *SMALL, "--confirm")
    assert "a training used these pairs, mined without --confirm" in capsys.readouterr().err and files(run) == before

class Served:
    "The offline teacher over HTTP, which counts what it is asked, and may be struck dumb where it should compare"
    def __init__(self): self.app, self.asked, self.dumb = offline_app(), 0, False

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or not scope["path"].endswith("completions"):
            return await self.app(scope, receive, send)
        self.asked += 1
        message = await receive()
        if self.dumb and b"Answer B" in message["body"]:
            body = json.dumps({"choices": [{"message": {"content": "perhaps"}}]}).encode()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            return await send({"type": "http.response.body", "body": body})
        async def again(): return message
        await self.app(scope, again, send)

def test_a_stopped_confirming_goes_on(confirmed, tmp_path):
    "Half of the verdicts are there; one of these is of other answers, one has no result, and the last line is torn"
    served, run = Served(), tmp_path/"run"
    with serving(served) as url:
        words = ["--out", run, *SMALL, "--confirm", "--teacher.url", url]
        command("mine", *words)
        whole = {name: (run/name).read_bytes() for name in (*FILES, "confirmed.jsonl")}
        rows = read_jsonl(run/"confirmed.jsonl")
        half = [dict(row) for row in rows[len(rows) // 2:][::-1]]
        half[0]["a"] = "Something else."
        half[1] |= {"first": None, "second": None, "result": None}
        write_jsonl(run/"confirmed.jsonl", half)
        with open(run/"confirmed.jsonl", "a") as f: f.write('{"prompt_id": 3, "pro')
        (run/"summary.json").unlink()
        served.asked = 0
        command("mine", *words)
    assert {name: (run/name).read_bytes() for name in whole} == whole
    assert served.asked == 2 * (len(rows) - len(half) + 2) + 2 # both orders of what is missing, and the two probes
    assert whole["pairs.jsonl"] == (confirmed/"confirmed"/"pairs.jsonl").read_bytes()

def test_a_pair_without_a_verdict_is_dropped_and_asked_for_again(confirmed, tmp_path, capsys):
    served, run = Served(), tmp_path/"run"
    with serving(served) as url:
        words = ["--out", run, *SMALL, "--teacher.url", url]
        command("mine", *words)
        served.dumb = True
        with pytest.raises(SystemExit): command("mine", *words, "--confirm")
        assert "pairs was confirmed: mine without --confirm, or ask another judge" in capsys.readouterr().err
        served.dumb = False
        command("mine", *words, "--confirm")
    assert (run/"pairs.jsonl").read_bytes() == (confirmed/"confirmed"/"pairs.jsonl").read_bytes()
    assert mine_summary(run)["confirmed"]["unread"] == 0

def test_confirmed_shards_merge_to_the_same_bytes(sharded, tmp_path, capsys):
    folders = {name: shutil.copytree(sharded/name, tmp_path/name) for name in ("one", "s1", "s2")}
    command("mine", "--out", folders["s1"], "--shard", "1/2", *SHORT, "--confirm")
    with pytest.raises(SystemExit): command("merge", folders["s2"], folders["s1"], "--out", tmp_path/"mixed")
    assert "its pairs are not confirmed" in capsys.readouterr().err
    command("mine", "--out", folders["s2"], "--shard", "2/2", *SHORT, "--confirm")
    command("mine", "--out", folders["one"], *SHORT, "--confirm")
    command("merge", folders["s2"], folders["s1"], "--out", tmp_path/"all")
    for name in (*FILES, "confirmed.jsonl"):
        assert (tmp_path/"all"/name).read_bytes() == (folders["one"]/name).read_bytes()
    assert mine_summary(tmp_path/"all")["confirmed"] == mine_summary(folders["one"])["confirmed"]

def test_the_budget_counts_the_calls_of_a_confirming():
    cfg, judging, training = config(confirm=True), EvaluateConfig("p.jsonl"), RunTrainConfig()
    rates = dict.fromkeys(("responses", "scores", "pairs", "verdicts"), 10.)
    [phase] = [p for p in budget(rates, cfg, judging, training, 1.) if p.name == "confirm"]
    assert (phase.work, phase.seconds) == (f"{2 * N:,} verdicts", 2 * N / 10)
    assert "confirm" not in [p.name for p in budget(rates, config(), judging, training)]


def test_how_many_prompts_stand_in_the_batch_may_be_left_to_the_machine(tmp_path, monkeypatch):
    asked, sample = [], mine_module.sample_unit

    def sample_unit(model, tok, prompts, unit, seed, batch, **options):
        asked.append(batch)
        return sample(model, tok, prompts, unit, seed, batch, **options)
    monkeypatch.setattr(mine_module, "sample_unit", sample_unit)
    cfg = MineConfig(str(DATA/"prompts_mine.jsonl"), n_prompts=3, max_new=8)
    for batch in (None, 2): mine(POLICY, TeacherConfig(), replace(cfg, batch=batch), tmp_path/str(batch))
    assert asked == [64, 2]
    assert (tmp_path/"None"/"samples.jsonl").read_text() == (tmp_path/"2"/"samples.jsonl").read_text()
    with pytest.raises(UserError, match="mine.batch: must be at least 1, found 0"): replace(cfg, batch=0)
