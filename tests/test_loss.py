"The loss against plain Python in double precision, against autograd, and against bad input"
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from wikidpo.core.files import UserError
from wikidpo.core.loss import (dpo_loss, gradient_weight, implicit_reward, margin,
                               preference_loss)

betas = st.floats(1e-3, 10)
margins = st.floats(-1e4, 1e4)
def f64(x): return torch.tensor(x, dtype=torch.float64)
def softplus(t): return max(t, 0) + math.log1p(math.exp(-abs(t))) # -log sigmoid(-t), without torch

four = st.tuples(*[st.floats(-1e3, 0)] * 4)
logps = st.lists(four, min_size=1, max_size=8).map(lambda rows: f64(rows).unbind(1))

repeatable = settings(deadline=None, derandomize=True, database=None)


@repeatable
@given(margins, betas)
def test_dpo_is_minus_log_sigmoid(z, beta):
    assert dpo_loss(f64(z), beta).item() == pytest.approx(softplus(-beta * z), rel=1e-12, abs=1e-300)
    rounded = dpo_loss(torch.tensor(z), beta).item() # float32: beta z itself is rounded
    assert rounded == pytest.approx(softplus(-beta * z), rel=1e-4, abs=1e-30)


def test_known_values():
    z = f64([0., 10., -10.])
    assert dpo_loss(z, .1).tolist() == pytest.approx([math.log(2), math.log(1 + math.exp(-1)), math.log(1 + math.e)])
    assert preference_loss(z, .1, "ipo").tolist() == pytest.approx([25, 25, 225])
    assert preference_loss(z, .1, "hinge").tolist() == pytest.approx([1, 0, 2])
    smoothed = [math.log(2), .8 * softplus(-1) + .2 * softplus(1), .8 * softplus(1) + .2 * softplus(-1)]
    assert preference_loss(z, .1, label_smoothing=.2).tolist() == pytest.approx(smoothed)


@repeatable
@given(logps)
def test_margin_is_the_difference_of_rewards(x):
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = x
    z = margin(*x)
    assert z.shape == policy_chosen.shape
    chosen = implicit_reward(policy_chosen, ref_chosen, .3)
    rejected = implicit_reward(policy_rejected, ref_rejected, .3)
    torch.testing.assert_close(.3 * z, chosen - rejected)
    turned = margin(policy_rejected, policy_chosen, ref_rejected, ref_chosen)     # the pair turned round
    torch.testing.assert_close(turned, -z)
    fallen = margin(policy_chosen - 7, policy_rejected - 7, ref_chosen, ref_rejected)
    torch.testing.assert_close(fallen, z)                                         # both fall alike: not seen
    assert (margin(policy_chosen + 1, policy_rejected, ref_chosen, ref_rejected) > z).all()
    assert (margin(policy_chosen, policy_rejected + 1, ref_chosen, ref_rejected) < z).all()
    assert (margin(policy_chosen, policy_rejected, ref_chosen + 1, ref_rejected) < z).all()
    assert (margin(policy_chosen, policy_rejected, ref_chosen, ref_rejected + 1) > z).all()


@repeatable
@given(logps, betas)
def test_a_copy_of_the_reference_starts_at_ln_2(x, beta): # trap 8
    c, r, _, _ = (t.float() for t in x)
    z = margin(c, r, c, r)
    assert (z == 0).all()
    assert dpo_loss(z, beta).sub(math.log(2)).abs().max() < 1e-6


@repeatable
@given(logps, betas)
def test_gradients_by_hand(x, beta):
    x = [t.clone().requires_grad_() for t in x]
    z = margin(*x)
    dpo_loss(z, beta).sum().backward()
    pull = beta * gradient_weight(z.detach(), beta)
    for t, sign in zip(x, (-1, 1, 1, -1)): torch.testing.assert_close(t.grad, sign * pull)


@pytest.mark.parametrize("kind, label_smoothing", [("dpo", 0), ("dpo", .1), ("ipo", 0), ("hinge", 0)])
def test_every_kind_passes_gradcheck(kind, label_smoothing):
    z = f64([-31., -2., .5, 7., 40.]).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: preference_loss(z, .1, kind, label_smoothing), z)


@pytest.mark.parametrize("kind, label_smoothing, rest", [
    ("dpo", .1, 10 * math.log(9)), ("dpo", .25, 10 * math.log(3)), ("ipo", 0, 5)])
def test_where_a_kind_rests(kind, label_smoothing, rest):
    z = f64(rest).requires_grad_()
    loss = preference_loss(z, .1, kind, label_smoothing)
    loss.backward()
    assert abs(z.grad) < 1e-12
    assert all(preference_loss(f64(rest + d), .1, kind, label_smoothing) > loss for d in (-1, 1))


@pytest.mark.parametrize("kind", ["dpo", "hinge"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_margins_stay_finite(kind, dtype):
    z = torch.tensor([-1e30, -1e4, -1e3, 1e3, 1e4, 1e30], dtype=dtype, requires_grad=True)
    loss = preference_loss(z, .1, kind)
    loss.sum().backward()
    assert loss.dtype == dtype and loss.isfinite().all() and z.grad.isfinite().all()
    assert z.grad.float().tolist() == pytest.approx([-.1] * 3 + [0] * 3, abs=1e-3)


def test_every_option_changes_the_loss_or_is_refused(): # trap 16
    z = torch.linspace(-30, 30, 7)
    plain = preference_loss(z, .1)
    for other in dict(beta=.2), dict(loss_type="ipo"), dict(loss_type="hinge"), dict(label_smoothing=.1):
        assert not torch.allclose(plain, preference_loss(z, **{"beta": .1, **other})), other
    for kind in "ipo", "hinge":
        with pytest.raises(UserError, match="no effect"): preference_loss(z, .1, kind, label_smoothing=.1)


@pytest.mark.parametrize("kind", ["dpo", "ipo", "hinge"])
@pytest.mark.parametrize("beta", [0, -.1, math.inf, math.nan])
def test_refuses_beta(kind, beta):
    with pytest.raises(UserError, match="beta is"): preference_loss(torch.zeros(1), beta, kind)
    with pytest.raises(UserError, match="beta is"): dpo_loss(torch.zeros(1), beta)


@pytest.mark.parametrize("label_smoothing", [-.1, .5, 1, math.nan])
def test_refuses_smoothing(label_smoothing):
    with pytest.raises(UserError, match="label_smoothing is"):
        preference_loss(torch.zeros(1), .1, label_smoothing=label_smoothing)


def test_refuses_kind():
    with pytest.raises(UserError, match="'sigmoid' is unknown: choose one of dpo, robust, ipo, hinge"):
        preference_loss(torch.zeros(1), .1, "sigmoid")
