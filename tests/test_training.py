"The training traps, each with the number that betrays it"
import copy, json, math
from dataclasses import asdict, fields, replace
import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from wikidpo.chat import encode_prompt, end_id, load_tokenizer
from wikidpo.files import UserError, read_jsonl, write_jsonl
from wikidpo.logprobs import PairDataset, collate, seq_logprob
from wikidpo.loss import margin, preference_loss
from wikidpo.miniwiki import DATA
from wikidpo.model import GPT, GPTConfig, load_checkpoint
from wikidpo.sampling import PolicyConfig, pad_right
from wikidpo.training import TrainConfig, dpo, dpo_step, freeze, lr_at, pick_precision, train

TOK, MODEL = load_tokenizer(DATA/"tokenizer.json"), load_checkpoint(DATA/"model.safetensors")
POLICY = PolicyConfig(str(DATA/"model.safetensors"), str(DATA/"tokenizer.json"), device="cpu")
BASE = TrainConfig(lr=3e-4, batch_size=8, grad_accum_steps=2, warmup_steps=1, seed=0, precision="fp32")

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs")/"pairs.jsonl"
    write_jsonl(path, read_jsonl(DATA/"pairs.jsonl")[:44])
    return PairDataset(path, TOK, 256)

def by_definition(model, prompt, response):
    "Sum of log-probabilities with a plain Python loop over the tokens, in float64"
    logp = model(torch.tensor([prompt + response]))[0][0].double().log_softmax(-1)
    return sum(logp[len(prompt) + i - 1, t].item() for i, t in enumerate(response))

@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 40)), min_size=1, max_size=5), st.integers(0, 9), st.randoms(use_true_random=False))
def test_seq_logprob_is_the_definition_for_any_ragged_batch(sizes, extra, rng):
    rows = [([rng.randrange(4, 2000) for _ in range(p)], [rng.randrange(4, 2000) for _ in range(r)]) for p, r in sizes]
    ids, mask = (F.pad(pad_right(x)[0], (0, extra)) for x in ([p + r for p, r in rows], [[0] * len(p) + [1] * len(r) for p, r in rows]))
    with torch.no_grad():
        assert torch.allclose(seq_logprob(MODEL, ids, mask).double(), torch.tensor([by_definition(MODEL, *r) for r in rows], dtype=torch.double), atol=1e-3, rtol=1e-5)

def test_sampled_ids_are_what_is_trained_on(data):
    for pair, (p, c, r) in zip(data.pairs, data.rows):
        assert p == encode_prompt(TOK, pair["prompt"])
        assert c == pair["chosen_tokens"] + [end_id(TOK)] * pair["chosen_finished"] and r == pair["rejected_tokens"] + [end_id(TOK)] * pair["rejected_finished"]

def test_pad_equal_to_end_does_not_mask_the_real_end(data):
    ids, mask, *_ = collate([data[i] for i in range(8)])
    assert (mask.sum(1) == torch.tensor([len(data.rows[i][1]) for i in range(8)])).all()
    as_end = torch.where(torch.arange(ids.shape[1]) < torch.tensor([len(data[i][0][0]) for i in range(8)])[:, None], ids, end_id(TOK))
    with torch.no_grad(): assert torch.allclose(seq_logprob(MODEL, ids, mask), seq_logprob(MODEL, as_end, mask), atol=1e-4)

def test_changing_rejected_leaves_chosen_alone(data):
    c, cm, r, rm = collate([data[0], data[1]])
    both = lambda r: seq_logprob(MODEL, torch.cat([c, r]), torch.cat([cm, rm]))[:2]
    with torch.no_grad(): assert torch.allclose(both(r), both(torch.randint_like(r, 4, 2000)), atol=1e-5)

def test_bf16_logits_are_summed_in_float32():
    "200 summed tokens: bf16 all the way drifts by tenths of a nat, upcast first does not"
    torch.manual_seed(0)
    logits, labels = torch.randn(200, 32768).bfloat16(), torch.randint(32768, (200,))
    exact = logits.double().log_softmax(-1).gather(-1, labels[:, None]).sum()
    low = logits.log_softmax(-1).gather(-1, labels[:, None]).float().sum()
    ours = (logits.float().gather(-1, labels[:, None])[:, 0] - logits.float().logsumexp(-1)).sum()
    assert abs(ours - exact) < .01 < .1 < abs(low - exact)

class Noisy(torch.nn.Module):
    "A learner's model with dropout"
    def __init__(self): super().__init__(); self.inner, self.drop, self.cfg = copy.deepcopy(MODEL), torch.nn.Dropout(.3), MODEL.cfg
    def forward(self, ids, targets=None): return self.inner.head(self.drop(self.inner.hidden(ids))), None

@pytest.mark.parametrize("make", [lambda: copy.deepcopy(MODEL), Noisy])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("reference", ["cached", "live"])
def test_first_loss_is_ln_2_and_margins_are_zero(data, make, precision, reference):
    policy = make().train()
    h = dpo(policy, freeze(policy), data, replace(BASE, precision=precision, reference=reference))
    assert abs(h[0]["loss"] - math.log(2)) < 1e-6 and h[0]["reward/margin"] == 0 and h[-1]["loss"] < h[0]["loss"]
    assert all(p.dtype == torch.float32 for p in policy.parameters())

def test_reference_does_not_move_and_policy_does(data):
    policy = copy.deepcopy(MODEL); ref = freeze(policy)
    before = [p.clone() for p in ref.parameters()]
    dpo(policy, ref, data, BASE)
    assert all(torch.equal(a, b) for a, b in zip(before, ref.parameters()))
    assert any(not torch.equal(a, b) for a, b in zip(before, policy.parameters()))

@pytest.mark.parametrize("sizes", [(1,) * 11, (4, 4, 3), (10, 1), (3, 3, 3, 2)])
def test_accumulation_gives_the_gradient_of_one_batch_also_when_ragged(data, sizes):
    def step(*sizes):
        policy = copy.deepcopy(MODEL)
        with torch.no_grad(): policy.embed.weight.mul_(1.01)
        rows, at = [data[i] for i in range(11)], 0
        m = dpo_step(policy, MODEL, [collate(rows[sum(sizes[:i]):sum(sizes[:i + 1])]) for i in range(len(sizes))], BASE)
        return torch.cat([p.grad.flatten() for p in policy.parameters()]), m
    (g, m), (g1, m1) = step(*sizes), step(11)
    assert F.cosine_similarity(g, g1, 0) > .99999 and torch.allclose(g, g1, atol=1e-4)
    assert all(abs(m[k] - m1[k]) < 1e-5 for k in m)

def test_every_pair_is_seen_once_an_epoch_also_in_the_last_partial_window(data):
    seen = []
    class Counting(PairDataset):
        def __getitem__(self, i): seen.append(i); return super().__getitem__(i)
    data.__class__ = Counting
    try: h = dpo(copy.deepcopy(MODEL), MODEL, data, replace(BASE, epochs=2, reference="live"))
    finally: data.__class__ = PairDataset
    assert sorted(seen) == sorted(2 * list(range(44))) and seen[:44] != seen[44:] and len(h) == 2 * 3

def test_order_depends_on_the_seed_and_on_nothing_else(data):
    def run(seed, noise): torch.manual_seed(noise); return dpo(copy.deepcopy(MODEL), MODEL, data, replace(BASE, seed=seed))
    assert run(0, 1) == run(0, 2) and run(0, 1) != run(5, 1)

def test_every_field_of_the_configuration_changes_something_or_is_refused(tmp_path, data):
    pairs = tmp_path/"pairs.jsonl"
    write_jsonl(pairs, data.pairs)
    other = tmp_path/"other.jsonl"; write_jsonl(other, data.pairs[:30])
    def run(name, **kw):
        out = tmp_path/name
        train(POLICY, replace(BASE, pairs=str(pairs), wandb="disabled") if not kw else replace(BASE, **({"pairs": str(pairs), "wandb": "disabled"} | kw)), out)
        return (out/"metrics.jsonl").read_text()
    base = run("base")
    change = dict(seed=1, pairs=str(other), block_size=24, beta=.2, loss_type="ipo", label_smoothing=.1, lr=1e-3, epochs=2, batch_size=4, grad_accum_steps=1, warmup_steps=0, max_grad_norm=.01, precision="bf16")
    assert set(change) | {"wandb", "project", "reference", "save_every", "shard", "watch"} == {f.name for f in fields(TrainConfig)} # save_every and shard: test_ranks.py; watch: test_widgets.py
    rows = [r for r in data.rows if len(r[0]) >= 24]
    for name, value in change.items():
        if name == "block_size" and rows:
            with pytest.raises(UserError, match="leaves no room"): run(name, block_size=24)
        else: assert run(name, **{name: value}) != base, name
    run("wandb", wandb="offline", project="another")
    assert list((tmp_path/"wandb"/"wandb").glob("offline-run-*"))
    kept = set((tmp_path/".cache").iterdir())
    run("live", seed=7, reference="live"); assert set((tmp_path/".cache").iterdir()) == kept
    run("again", seed=7); assert len(set((tmp_path/".cache").iterdir()) - kept) == 1
    with pytest.raises(UserError, match="train.reference: expected one of cached, live, found 'none'"): replace(BASE, reference="none")

def test_the_watched_pairs_are_computed_twice(tmp_path, data):
    "margins.jsonl holds two independent computations of the reference's log-probabilities, the second one token by token"
    write_jsonl(tmp_path/"pairs.jsonl", data.pairs)
    train(POLICY, replace(BASE, pairs=str(tmp_path/"pairs.jsonl"), wandb="disabled"), tmp_path/"run")
    first = read_jsonl(tmp_path/"run"/"margins.jsonl")[0]
    watched = range(0, 44, 44 // 32)[:8]
    want = torch.tensor([[by_definition(MODEL, data.rows[i][0], r) for r in data.rows[i][1:]] for i in watched])
    assert first["tokens"] == [[len(r) for r in data.rows[i][1:]] for i in watched]
    for name in ("logps", "token_by_token"): assert torch.allclose(torch.tensor(first[name])[:8], want.float(), atol=1e-3), name

def test_a_run_that_explodes_says_so_and_leaves_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="lower train.lr"): train(POLICY, replace(BASE, pairs=str(DATA/"pairs.jsonl"), lr=1e30, wandb="disabled"), tmp_path/"run")
    assert not (tmp_path/"run"/"dpo.pt").exists()

def test_schedule_warms_up_and_ends_at_zero():
    lrs = [lr_at(s, 300, 20) for s in range(300)]
    assert lrs[:20] == sorted(lrs[:20]) and lrs[20:] == sorted(lrs[20:], reverse=True) and max(lrs) == 1 and 0 < lrs[-1] < 1e-3 and lrs[0] > 0

def test_a_trained_checkpoint_is_in_the_course_form_and_loads(tmp_path, data):
    write_jsonl(tmp_path/"pairs.jsonl", data.pairs)
    train(POLICY, replace(BASE, pairs=str(tmp_path/"pairs.jsonl"), wandb="disabled"), tmp_path/"run")
    ckpt = torch.load(tmp_path/"run"/"dpo.pt", weights_only=True)
    assert set(ckpt) == {"model", "config"} and load_checkpoint(tmp_path/"run"/"dpo.pt").cfg == MODEL.cfg
