"Looks at a policy while it trains, and the doctor who does not wait for the end"
import json, time
from dataclasses import replace

import pytest, torch
from starlette.responses import JSONResponse

from engines import MINI, TOK
from faulty_server import faulty
from wikidpo.cli import main
from wikidpo.core.chat import encode_prompt, encode_response
from wikidpo.core.files import read_jsonl, UserError
from wikidpo.judge.config import TeacherConfig
from wikidpo.judge.offline import offline_app, serving
from wikidpo.models.checkpoints import load_checkpoint
from wikidpo.run.config import PolicyConfig, RunTrainConfig
from wikidpo.run.folder import write_jsonl
from wikidpo.run.mine import read_prompts
from wikidpo.run.train import train
from wikidpo.show.logs import wandb_records
from wikidpo.run.watch import Duel, kl_to_reference, miniwiki_text, perplexity, Sickness
from wikidpo.world.facts import DATA

POLICY = PolicyConfig(str(DATA/"model.safetensors"), str(DATA/"tokenizer.json"), device="cpu")
PROMPTS = str(DATA/"prompts_eval.jsonl")
LOOKING = dict(eval_every=2, eval_n=12, eval_max_new=40)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "A configuration of five steps, with pairs"
    pairs = tmp_path_factory.mktemp("pairs")/"pairs.jsonl"
    write_jsonl(pairs, read_jsonl(DATA/"pairs.jsonl")[:50])
    return RunTrainConfig(lr=3e-4, batch_size=8, grad_accum_steps=1, warmup_steps=1, seed=0, precision="fp32",
                          wandb="disabled", pairs=str(pairs), valid=.2, watch=0)


@pytest.fixture(scope="module")
def looked(base, tmp_path_factory):
    "Its run folder, with a look every second step and a judge"
    out = tmp_path_factory.mktemp("looked")/"run"
    cfg = replace(base, eval_judge=True, eval_prompts=PROMPTS, **LOOKING)
    train(POLICY, cfg, out, teacher=TeacherConfig())
    return out


def weights(out): return load_checkpoint(out/"dpo.pt").state_dict()


def test_a_look_changes_nothing_of_the_training(base, looked, tmp_path):
    train(POLICY, base, tmp_path/"plain")
    for name, w in weights(tmp_path/"plain").items(): assert torch.equal(w, weights(looked)[name]), name
    def of_step(row): return {k: v for k, v in row.items() if not k.startswith(("eval/", "valid/"))}
    plain, watched = (read_jsonl(out/"metrics.jsonl") for out in (tmp_path/"plain", looked))
    assert [of_step(row) for row in plain] == [of_step(row) for row in watched] and len(plain) == 5


def test_a_look_sees_what_is_asked_for(looked):
    metrics = {row["step"]: row for row in read_jsonl(looked/"metrics.jsonl")}
    seen = [step for step, row in metrics.items() if "eval/kl" in row]
    assert seen == [2, 4, 5] == [step for step, row in metrics.items() if "valid/loss" in row]
    last, policy = metrics[5], load_checkpoint(looked/"dpo.pt")
    prompts = read_prompts(PROMPTS, 12)
    kl, error = kl_to_reference(policy, MINI, TOK, prompts, 40)
    assert last["eval/kl"] == pytest.approx(kl, abs=1e-3) and last["eval/kl_se"] == pytest.approx(error, abs=1e-3)
    text = miniwiki_text(prompts)
    assert last["eval/perplexity"] == pytest.approx(perplexity(policy, TOK, text), rel=1e-4) and len(text) == 12
    assert 0 <= last["eval/win_low"] <= last["eval/win_rate"] <= last["eval/win_high"] <= 1
    rows = read_jsonl(looked/"looks.jsonl")
    assert [row["step"] for row in rows] == [0, 2, 4, 5]
    assert rows[0]["seen"] == {"kl": 0., "kl_se": 0., "perplexity": pytest.approx(perplexity(MINI, TOK, text))}
    assert [a[0] for a in rows[-1]["answers"]] == prompts[:8]
    assert all(ours == theirs for _, ours, theirs in rows[0]["answers"])


def test_perplexity_is_its_definition():
    "e to the mean loss of the answers' tokens, one conversation at a time, in float64"
    text, losses = miniwiki_text(read_prompts(PROMPTS, 5)), []
    for prompt, answer in text:
        asked, answered = encode_prompt(TOK, prompt), encode_response(TOK, answer)
        with torch.no_grad(): logps = MINI(torch.tensor([asked + answered]))[0][0].double().log_softmax(-1)
        losses += [-logps[len(asked) + i - 1, t].item() for i, t in enumerate(answered)]
    assert perplexity(MINI, TOK, text) == pytest.approx(torch.tensor(losses).mean().exp().item(), rel=1e-5)


def test_held_out_pairs_lend_their_prompts_and_a_file_the_text(base, tmp_path):
    prompt, answer = "Who wrote Hamlet?", "William Shakespeare wrote Hamlet."
    write_jsonl(tmp_path/"text.jsonl", [{"prompt": prompt, "response": answer}])
    train(POLICY, replace(base, eval_text=str(tmp_path/"text.jsonl"), **LOOKING), tmp_path/"run")
    held_out = [row["prompt"] for row in read_jsonl(base.pairs)[-10:]]
    look = read_jsonl(tmp_path/"run"/"looks.jsonl")[-1]
    assert [a[0] for a in look["answers"]] == list(dict.fromkeys(held_out))[:8]
    want = perplexity(load_checkpoint(tmp_path/"run"/"dpo.pt"), TOK, [(prompt, answer)])
    assert look["seen"]["perplexity"] == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("changes, words", [
    (dict(valid=0., eval_every=2), "train.eval_every: needs prompts that are not trained on"),
    (dict(eval_every=2, eval_judge=True), "train.eval_judge: needs a teacher"),
    (dict(eval_every=2, eval_text="none.jsonl"), "none.jsonl: no such file")])
def test_a_look_that_cannot_be_taken_is_refused_before_the_first_step(base, tmp_path, changes, words):
    with pytest.raises(UserError, match=words): train(POLICY, replace(base, **changes), tmp_path/"run")
    assert not (tmp_path/"run"/"metrics.jsonl").exists() and not (tmp_path/"run"/"dpo.pt").exists()


@pytest.mark.parametrize("changes, words", [
    (dict(eval_judge=True), "train.eval_judge: has no effect without train.eval_every"),
    (dict(eval_text="x"), "train.eval_text: has no effect without"), (dict(eval_every=0), "must be at least 1"),
    (dict(on_sickness="panic"), "train.on_sickness: expected one of warn, stop, ignore, found 'panic'")])
def test_settings_that_make_no_sense_are_refused(base, changes, words):
    with pytest.raises(UserError, match=words): replace(base, **changes)


def test_who_looks_on_does_not_make_it_another_run(base, looked, capsys):
    train(POLICY, replace(base, on_sickness="stop"), looked)
    assert "already done" in capsys.readouterr().out


def test_a_judge_that_is_lost_costs_the_win_rate_and_not_the_run(capsys):
    prompts = read_prompts(PROMPTS, 2)
    with faulty(offline_app(), ["drop"], share=0.) as server:
        duel = Duel(TeacherConfig(url=server.url, retries=0, timeout_s=5., concurrency=2), prompts, ["Yes.", "No."])
        server.share = 1.
        assert duel(["No.", "Yes."]) == {}


def test_answers_are_a_table_in_wandb(base, tmp_path):
    cfg = replace(base, wandb="offline", lr=1e-2, epochs=3, **LOOKING | {"eval_every": 15})
    train(POLICY, cfg, tmp_path/"run")
    table = next((tmp_path/"run"/"wandb").glob("*/files/media/table/eval/answers*.table.json"))
    found = json.loads(table.read_text())
    assert found["columns"] == ["prompt", "policy", "reference"] and len(found["data"]) == 8
    log = next((tmp_path/"run"/"wandb").glob("offline-run-*/*.wandb"))
    end = time.monotonic() + 30 # W&B writes on for a moment
    while not (told := any(b"looks sick" in record for record in wandb_records(log))) and time.monotonic() < end:
        time.sleep(.1)
    assert told


# --- Sickness

HOT = dict(lr=1e-2, epochs=4, save_every=100) # 20 steps


def test_a_sick_run_is_told_in_a_line_and_goes_on(base, tmp_path, capsys):
    train(POLICY, replace(base, **HOT), tmp_path/"run")
    told = [line for line in capsys.readouterr().out.splitlines() if "looks sick" in line]
    warned = read_jsonl(tmp_path/"run"/"warnings.jsonl")
    assert told and len(told) == len(warned) and (tmp_path/"run"/"dpo.pt").exists()
    assert told[0].startswith("train: looks sick at step 10: the policy is fleeing the reference: the learning rate")
    assert "what to change: divide the learning rate" in told[0]
    assert len({row["sign"] for row in warned}) == len(warned) and warned[0]["step"] == 10
    train(POLICY, replace(base, on_sickness="ignore", **HOT | {"epochs": 2}), tmp_path/"quiet") # its tenth step is sick
    assert "looks sick" not in capsys.readouterr().out and not (tmp_path/"quiet"/"warnings.jsonl").exists()


def test_a_run_that_goes_on_hears_of_no_illness_twice():
    "Two signs fail at once, one of them is said; after a stop the other is no news"
    sick = {"loss": 3., "reward/margin": -1., "reward/accuracy": .3, "reward/chosen": -9., "grad_norm": 1.}

    def watching(warned=()):
        said = []
        return said, Sickness(RunTrainConfig(warmup_steps=1), 60, said.append, lambda: None, warned)

    told, whole = watching()
    for step in range(1, 61): whole(sick | {"step": step})
    first, before = watching()
    for step in range(1, 31): before(sick | {"step": step})
    later, after = watching(first)
    for step in range(1, 31): after.was_done(sick | {"step": step})
    for step in range(31, 61): after(sick | {"step": step})
    assert first and first + later == told


def test_a_judge_whose_key_expires_costs_a_win_rate_and_not_the_training(capsys):
    class Expiring:
        app, left = offline_app(), 8

        async def __call__(self, scope, receive, send):
            if scope["type"] != "http": return await self.app(scope, receive, send)
            self.left -= 1
            if self.left > 0: return await self.app(scope, receive, send)
            await JSONResponse({"error": {"message": "expired"}}, 401)(scope, receive, send)

    prompts = read_prompts(PROMPTS, 20)
    with serving(Expiring()) as url:
        duel = Duel(TeacherConfig(url=url, retries=0, concurrency=1), prompts, ["Lima."] * 20)
        assert duel(["Rome, I think."] * 20) == {}
    assert "no win rate at this look" in capsys.readouterr().out


def test_a_run_that_stops_is_whole_and_goes_on(base, tmp_path, capsys):
    "The same command is refused; one that only warns goes on, and ends where a run without a stop does"
    out, cfg = tmp_path/"run", replace(base, on_sickness="stop", **HOT)
    with pytest.raises(UserError, match="stopped at step 10: the policy is fleeing.*--on-sickness warn"):
        train(POLICY, cfg, out)
    assert len(read_jsonl(out/"metrics.jsonl")) == 10 and (out/"state.pt").exists() and not (out/"dpo.pt").exists()
    assert [row["step"] for row in read_jsonl(out/"warnings.jsonl")] == [10]
    with pytest.raises(UserError, match="was found sick at step 10"): train(POLICY, cfg, out)
    train(POLICY, replace(cfg, on_sickness="warn"), out)
    train(POLICY, replace(cfg, on_sickness="ignore"), tmp_path/"whole")
    assert (out/"metrics.jsonl").read_text() == (tmp_path/"whole"/"metrics.jsonl").read_text()
    for name, w in weights(out).items(): assert torch.equal(w, weights(tmp_path/"whole")[name]), name
    steps = [row["sign"] for row in read_jsonl(out/"warnings.jsonl")]
    assert len(steps) == len(set(steps)), "said once"


def test_restart_forgets_what_was_said(base, tmp_path):
    out, cfg = tmp_path/"run", replace(base, on_sickness="stop", **HOT)
    with pytest.raises(UserError, match="stopped at step"): train(POLICY, cfg, out)
    train(POLICY, replace(cfg, lr=3e-4, epochs=1), out, restart=True)
    assert not (out/"warnings.jsonl").exists() and (out/"dpo.pt").exists()


def test_a_healthy_run_is_left_alone(base, tmp_path, capsys):
    train(POLICY, replace(base, epochs=3, on_sickness="stop"), tmp_path/"run")
    assert "looks sick" not in capsys.readouterr().out and not (tmp_path/"run"/"warnings.jsonl").exists()


def test_the_first_step_is_asked_at_once(base, tmp_path, monkeypatch):
    "A reference that is not the policy's start"
    from wikidpo.run import train as room

    def disturbed(model):
        ref = load_checkpoint(DATA/"model.safetensors")
        with torch.no_grad(): ref.norm.weight.mul_(1.01)
        return ref

    monkeypatch.setattr(room, "freeze", disturbed)
    with pytest.raises(UserError, match="stopped at step 1: the reference is not the policy's start"):
        train(POLICY, replace(base, reference="live", on_sickness="stop"), tmp_path/"run")


def test_the_command_stops_with_2(base, tmp_path, capsys):
    flags = ["--pairs", base.pairs, "--valid", ".2", "--watch", "0", "--batch-size", "8", "--warmup-steps", "1"]
    flags += ["--lr", "1e-2", "--epochs", "4"]
    with pytest.raises(SystemExit) as e:
        main(["train", "--out", str(tmp_path/"run"), "--wandb", "disabled", "--on-sickness", "stop", *flags])
    assert e.value.code == 2 and "stopped at step 10" in capsys.readouterr().err
