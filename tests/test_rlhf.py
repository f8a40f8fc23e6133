"RLHF in small: the edges that lesson 01 and its appendix, PPO in full, do not show"
import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wikidpo.core.chat import encode_prompt, end_id, load_tokenizer
from wikidpo.core.data import PairDataset
from wikidpo.core.files import UserError
from wikidpo.core.logps import seq_logprob
from wikidpo.core.model import GPT, GPTConfig
from wikidpo.core.rlhf import (gae, join_responses, join_rows, ppo, ppo_loss, PPOConfig,
                               reward_accuracy, reward_loss, reward_score, RewardConfig, rollout,
                               ScalarModel, token_logprob, token_reward, train_reward)
from wikidpo.core.sample import sample_k
from wikidpo.core.train import freeze
from wikidpo.models.checkpoints import load_checkpoint
from wikidpo.world.facts import DATA, prompts

TOK, SFT = load_tokenizer(DATA/"tokenizer.json"), load_checkpoint(DATA/"model.safetensors")
SMALL = PPOConfig(steps=2, batch_size=6, epochs=2, minibatches=2, max_new=12)


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return GPT(GPTConfig(TOK.get_vocab_size(), 128, 2, 2, None, 32, 48)).eval()


def four(gpt):
    "policy, reference, reward model, value model"
    rm = ScalarModel(gpt)
    torch.nn.init.normal_(rm.out.weight)
    return copy.deepcopy(gpt), freeze(gpt), rm.requires_grad_(False), ScalarModel(gpt)


def four_seeded(gpt):
    torch.manual_seed(1)
    return four(gpt)


def weights(model): return [p.detach().clone() for p in model.parameters()]


def same(model, before): return all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


def few_pairs(n):
    pairs = PairDataset(DATA/"pairs.jsonl", TOK, 128)
    return [pairs[i] for i in range(n)]


def by_definition(r, v, gamma, lam):
    "GAE of one answer, from its sums"
    def value(t): return v[t] if t < len(v) else 0.
    def advantage(t): return sum((gamma * lam)**(later - t) * delta[later] for later in range(t, len(r)))
    delta = [r[t] + gamma * value(t + 1) - value(t) for t in range(len(r))]
    return torch.tensor([advantage(t) for t in range(len(r))], dtype=torch.float64)


SPANS = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(SPANS, st.floats(0, 1), st.floats(0, 1), st.integers(0, 9))
def test_gae_is_the_definition_whatever_stands_around_the_answer(spans, gamma, lam, seed):
    g, T = torch.Generator().manual_seed(seed), max(a + n for a, n in spans) + 2
    mask = torch.zeros(len(spans), T, dtype=torch.float64)
    for row, (a, n) in zip(mask, spans): row[a:a + n] = 1
    r = torch.randn(len(spans), T, generator=g).double() * mask
    v = torch.randn(len(spans), T, generator=g).double()
    adv, ret = gae(r, v, mask, gamma, lam)
    for i, (a, n) in enumerate(spans):
        its = slice(a, a + n)
        want = by_definition(r[i, its].tolist(), v[i, its].tolist(), gamma, lam)
        assert torch.allclose(adv[i, its], want, atol=1e-9)
        assert torch.allclose(ret[i, its], want + v[i, its], atol=1e-9)
    assert not (adv * (1 - mask)).any() and not (ret * (1 - mask)).any()


def test_the_price_of_the_leash_and_the_score_add_up():
    "summed over an answer, the token rewards are the score minus kl times the log-ratio"
    mask = torch.tensor([[0., 1, 1, 0], [0, 0, 1, 1]])
    old, ref, score = torch.randn(2, 4), torch.randn(2, 4), torch.tensor([3., -2.])
    r = token_reward(score, old, ref, mask, .25)
    assert torch.allclose(r.sum(1), score - .25 * ((old - ref) * mask).sum(1), atol=1e-6)
    assert not (r * (1 - mask)).any()
    assert torch.equal(token_reward(score, old, old, mask, .25).nonzero(), torch.tensor([[0, 2], [1, 3]]))


def test_reward_loss_gradient_is_the_share_of_surprise():
    r_c, r_r = torch.tensor([0., 5., -5.], requires_grad=True), torch.zeros(3)
    reward_loss(r_c, r_r).sum().backward()
    assert torch.allclose(r_c.grad, -torch.sigmoid(-r_c.detach()), atol=1e-6)
    assert reward_loss(torch.tensor([-1e4]), torch.zeros(1)).item() == 1e4 # no overflow far out


def test_reward_loss_by_hand():
    r_c, r_r = torch.tensor([2., 0., -1.]), torch.tensor([1., 0., 3.])
    by_hand = torch.tensor([math.log(1 + math.exp(-1)), math.log(2), math.log(1 + math.exp(4))])
    assert torch.allclose(reward_loss(r_c, r_r), by_hand, atol=1e-6)
    assert torch.allclose(reward_loss(r_c + 7, r_r + 7), by_hand, atol=1e-6) # only differences count


def test_a_score_is_read_at_the_end_of_the_answer():
    "a model whose numbers are the token ids shows which token is read"
    ids, mask = join_rows([[5, 6], [5, 6, 7]], [[8, 9, end_id(TOK)], [8, end_id(TOK)]])
    assert reward_score(lambda ids: ids.float(), ids, mask).tolist() == [end_id(TOK)] * 2


def test_scalar_model_wants_a_wikigpt():
    with pytest.raises(UserError, match="needs a WikiGPT"): ScalarModel(torch.nn.Linear(2, 2))


def test_scores_do_not_depend_on_padding_or_on_the_other_rows(tiny):
    rm, prompt = four(tiny)[2], [5, 6, 7]
    short, long = [8, 9, end_id(TOK)], [8, 9, 10, 11, 12, end_id(TOK)]
    both = reward_score(rm, *join_rows([prompt, prompt], [short, long]))
    alone = reward_score(rm, *join_rows([prompt], [short]))
    assert torch.allclose(both[:1], alone, atol=1e-6) and (both[0] - both[1]).abs() > 1e-3


def test_joined_responses_end_where_they_ended():
    asked, g = prompts("mine")[:6], torch.Generator().manual_seed(0)
    responses = [group[0] for group in sample_k(SFT, TOK, asked, temps=(1.,), max_new=12, generator=g)]
    ids, mask = join_responses(TOK, asked, responses)
    assert {r.finished for r in responses} == {True, False}, "the test needs finished and cut answers"
    for r, row, kept in zip(responses, ids, mask.bool()):
        assert row[kept].tolist() == r.ids + [end_id(TOK)] * r.finished


def test_a_reward_model_copies_the_trunk_and_leaves_the_policy_alone(tiny):
    before, rm = weights(tiny), ScalarModel(tiny)
    losses = train_reward(rm, few_pairs(20), RewardConfig(batch_size=8, epochs=2))
    assert len(losses) == 2 * 3 and abs(losses[0] - math.log(2)) < 1e-6 # the last, partial batch counts too
    assert same(tiny, before) and not same(rm.trunk, before)


def test_a_constant_reward_model_orders_nothing(tiny):
    assert reward_accuracy(ScalarModel(tiny), few_pairs(5)) == 0.


def test_rollout_scores_what_was_sampled(tiny):
    """The ids that are scored are prompt and sampled tokens, the end only where it was reached, and old is the
    policy's own log-probability."""
    policy, ref, rm, value = four(SFT)
    asked, end = prompts("mine")[:6], end_id(TOK)
    batch, metrics = rollout(policy, ref, rm, value, TOK, asked, SMALL, torch.Generator().manual_seed(0))
    ends = 0
    for p, row, m in zip(asked, batch.ids.tolist(), batch.mask):
        prompt = encode_prompt(TOK, p)
        n = len(prompt) + int(m.sum())
        assert row[:len(prompt)] == prompt and not m[:len(prompt)].any() and m[len(prompt):n].all() and not m[n:].any()
        response = row[len(prompt):n]
        assert end not in response[:-1] and (response[-1] == end or len(response) == SMALL.max_new)
        ends += response[-1] == end
    assert metrics["finished"] == ends / 6 and 0 < ends < 6, "the test needs finished and cut answers"
    with torch.no_grad(): whole = seq_logprob(policy, batch.ids, batch.mask)
    assert torch.allclose(batch.old.sum(1), whole, atol=1e-4)


def test_the_advantages_of_a_rollout_are_standardized(tiny):
    batch, _ = rollout(*four(SFT), TOK, prompts("mine")[:6], SMALL, torch.Generator().manual_seed(0))
    keep, adv = batch.mask[:, 1:].float(), batch.adv
    assert abs((adv * keep).sum()) < 1e-3 and abs((adv**2 * keep).sum() / keep.sum() - 1) < 1e-3
    assert not (adv * (1 - keep)).any()


def test_only_policy_and_value_model_learn(tiny):
    models = four(tiny)
    before = [weights(m) for m in models]
    history = ppo(*models, TOK, prompts("mine"), SMALL)
    assert [same(m, b) for m, b in zip(models, before)] == [False, True, True, False]
    assert history[0]["kl"] == 0. and [h["step"] for h in history] == [1, 2]


def test_the_policy_loss_does_not_reach_the_value_model_nor_the_other_way(tiny):
    policy, ref, rm, value = four(tiny)
    batch, _ = rollout(policy, ref, rm, value, TOK, prompts("mine")[:6], SMALL)
    assert not any(t.requires_grad for t in (batch.old, batch.adv, batch.ret))
    ppo_loss(token_logprob(policy, batch.ids, batch.mask), batch.old, batch.adv).sum().backward()
    assert all(p.grad is None for m in (ref, rm, value) for p in m.parameters())
    assert all(p.grad is not None for p in policy.parameters())


def test_first_gradient_is_plain_policy_gradient(tiny):
    "at ratio 1 the clip does nothing: the gradient is that of -A log pi"
    policy, ref, rm, value = four(tiny)
    batch, _ = rollout(policy, ref, rm, value, TOK, prompts("mine")[:6], SMALL)

    def gradient(loss): return torch.autograd.grad(loss.sum(), list(policy.parameters()))
    clipped = gradient(ppo_loss(token_logprob(policy, batch.ids, batch.mask), batch.old, batch.adv))
    plain = gradient(-(batch.adv * token_logprob(policy, batch.ids, batch.mask)))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(clipped, plain))


def test_same_seed_same_run(tiny):
    runs = [ppo(*four_seeded(tiny), TOK, prompts("mine"), SMALL) for _ in range(2)]
    assert runs[0] == runs[1]


class Brief(torch.nn.Module):
    "A reward that a program gives: every token of an answer costs a tenth"
    def forward(self, ids): return -(ids == TOK.token_to_id("<|assistant|>")).cumsum(1).cumsum(1) / 10


def test_ppo_finds_a_reward_that_a_program_gives_unless_the_leash_is_too_dear():
    tokens = {}
    for kl in (0., 100.):
        cfg = PPOConfig(steps=8, batch_size=16, max_new=24, kl=kl, lam=1., lr=5e-4)
        history = ppo(copy.deepcopy(SFT), freeze(SFT), Brief(), ScalarModel(SFT), TOK, prompts("mine")[:16], cfg)
        tokens[kl] = history[-1]["tokens"] / history[0]["tokens"]
    assert tokens[0.] < .75 < tokens[100.], tokens


def test_a_loss_that_is_no_number_is_reported(tiny):
    models = four(tiny)
    models[2].out.bias.data.fill_(math.nan)
    with pytest.raises(UserError, match="no longer a number at step 1; lower ppo.lr"):
        ppo(*models, TOK, prompts("mine"), SMALL)


BAD_PPO = [dict(kl=-.1), dict(gamma=1.1), dict(eps=0), dict(steps=0), dict(minibatches=40), dict(lr=0.),
           dict(max_grad_norm=0.)]


@pytest.mark.parametrize("bad", BAD_PPO)
def test_ppo_config_refuses(bad):
    with pytest.raises(UserError, match=f"ppo.{next(iter(bad))}"): PPOConfig(**bad)


@pytest.mark.parametrize("bad", [dict(lr=0.), dict(batch_size=0), dict(epochs=0)])
def test_reward_config_refuses(bad):
    with pytest.raises(UserError, match=f"reward.{next(iter(bad))}"): RewardConfig(**bad)
