import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from exprl_jax import config
from exprl_jax.learning.losses import k3, normaliser, policy_loss
from tests.oracles import learning_numpy as oracle

HOW = config.Loss(clip_low=0.2, clip_high=0.28, dual_clip=3.0, kl_coef=0.001, aggregate="token_mean")
AGGREGATES = ("token_mean", "sequence_mean", "constant")


def one(ratio, advantage, how=HOW):
    """Loss, gradient with respect to log π, and diagnostics of one token with the given ratio; no KL."""
    old, advantage = jnp.zeros((1, 1, 1)), jnp.full((1, 1, 1), advantage)

    def loss(logp):
        value, diagnostics = policy_loss(logp, old, logp, advantage, how)
        return value.sum(), diagnostics

    logp = jnp.full((1, 1, 1), math.log(ratio))
    (value, diagnostics), gradient = jax.value_and_grad(loss, has_aux=True)(logp)
    return float(value), float(gradient.sum()), diagnostics


@pytest.mark.parametrize(
    "ratio, advantage, loss, gradient, clipped, dual_clipped",
    [
        (1.0, 2.0, -2.0, -2.0, False, False),
        (1.2, 2.0, -2.4, -2.4, False, False),
        (1.5, 2.0, -2.56, 0.0, True, False),  # too likely already
        (0.5, 2.0, -1.0, -1.0, False, False),  # the clip never stops a way back
        (1.0, -2.0, 2.0, 2.0, False, False),
        (0.5, -2.0, 1.6, 0.0, True, False),  # too unlikely already
        (2.0, -2.0, 4.0, 4.0, False, False),
        (4.0, -2.0, 6.0, 0.0, False, True),  # at most −c·A
        (4.0, 2.0, -2.56, 0.0, True, False),
        (1.0, 0.0, 0.0, 0.0, False, False),
    ],
)
def test_branches(ratio, advantage, loss, gradient, clipped, dual_clipped):
    value, slope, diagnostics = one(ratio, advantage)
    assert value == pytest.approx(loss, rel=1e-5) and slope == pytest.approx(gradient, rel=1e-5)
    assert bool(diagnostics.clipped.all()) is clipped and bool(diagnostics.dual_clipped.all()) is dual_clipped
    assert float(diagnostics.ratio.sum()) == pytest.approx(ratio, rel=1e-5)
    assert float(diagnostics.approx_kl.sum()) == pytest.approx(-math.log(ratio), abs=1e-6)


@pytest.mark.parametrize("advantage", [1.5, -1.5])
def test_on_policy_gradient_does_not_depend_on_the_clip_range(advantage):
    tight = config.Loss(clip_low=0.0, clip_high=0.0, dual_clip=1.5, kl_coef=0.0, aggregate="token_mean")
    assert one(1.0, advantage, tight)[:2] == (-advantage, -advantage)


def test_logratio_is_bounded():
    value, gradient, _ = one(math.exp(30), -1.0)
    assert (value, gradient) == (3.0, 0.0)
    assert float(one(math.exp(30), -1.0)[2].ratio.sum()) == pytest.approx(math.exp(20), rel=1e-4)


def test_matches_the_equations_and_their_numeric_gradient():
    rng = np.random.default_rng(0)
    logp, old, ref = rng.normal(-2, 1.0, (3, 2, 3, 40))
    ref[0, 0, :4] += (30, -30, 12, -12)  # beyond both clamps
    advantage = rng.normal(0, 1, logp.shape)
    how = config.Loss(0.2, 0.28, 3.0, 0.3, "token_mean")
    options = (how.clip_low, how.clip_high, how.dual_clip, how.kl_coef)
    arrays = [jnp.asarray(x, jnp.float32) for x in (logp, old, ref, advantage)]
    loss, diagnostics = policy_loss(*arrays, how)
    gradient = jax.grad(lambda x: policy_loss(x, *arrays[1:], how)[0].sum())(arrays[0])
    step = 1e-6
    for i in np.ndindex(logp.shape):
        rest = (old[i], ref[i], advantage[i], *options)
        total, policy, kl = oracle.token_loss(logp[i], *rest)
        slope = (oracle.token_loss(logp[i] + step, *rest)[0] - oracle.token_loss(logp[i] - step, *rest)[0]) / (2 * step)
        np.testing.assert_allclose(
            (loss[i], diagnostics.policy[i], diagnostics.kl[i], gradient[i]), (total, policy, kl, slope),
            rtol=1e-4, atol=1e-5,
        )  # fmt: skip


def test_matches_torch_autograd():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    logp, old, ref, advantage = rng.normal(-2, 0.7, (4, 2, 2, 30)).astype(np.float32)
    how = config.Loss(0.2, 0.26, 3.0, 0.1, "token_mean")
    x = torch.tensor(logp, requires_grad=True)
    o, r, a = map(torch.tensor, (old, ref, advantage))
    ratio = (x - o).clamp(-20, 20).exp()
    loss = torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.26))
    loss = torch.where(a < 0, torch.minimum(loss, -a * 3.0), loss)
    d = (r - x).clamp(-20, 20)
    (loss + 0.1 * (d.exp() - d - 1).clamp(-10, 10)).sum().backward()
    arrays = [jnp.asarray(y) for y in (logp, old, ref, advantage)]
    gradient = jax.grad(lambda y: policy_loss(y, *arrays[1:], how)[0].sum())(arrays[0])
    np.testing.assert_allclose(gradient, x.grad, rtol=1e-4, atol=1e-5)


def test_k3_is_zero_only_at_the_reference_and_unbiased():
    assert float(k3(jnp.float32(-1.3), jnp.float32(-1.3))) == 0
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    estimates = np.asarray(k3(jnp.log(p), jnp.log(q)))
    assert (estimates >= 0).all()
    assert (p * estimates).sum() == pytest.approx((p * np.log(p / q)).sum(), rel=1e-5)


def test_without_a_coefficient_the_reference_is_not_read():
    how = config.Loss(0.2, 0.28, 3.0, 0.0, "token_mean")
    x = jnp.full((1, 1, 2), -1.0)
    loss, diagnostics = policy_loss(x, x, jnp.full_like(x, jnp.nan), jnp.ones_like(x), how)
    assert (loss == -1).all() and (diagnostics.kl == 0).all()


def masks():
    ragged = np.arange(5) < np.array([[5, 1, 0], [3, 0, 2]])[..., None]
    holes = np.random.default_rng(0).random((2, 3, 5)) < 0.5
    return {"ragged": ragged, "holes": holes, "full": np.ones_like(ragged), "empty": np.zeros_like(ragged)}


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("name", masks())
def test_weights_make_the_aggregate(aggregate, name):
    mask = masks()[name]
    loss = np.random.default_rng(1).normal(size=mask.shape).astype(np.float32)
    weight = np.asarray(normaliser(jnp.asarray(mask), aggregate, 8))
    expected = oracle.aggregate(loss.reshape(6, 5), mask.reshape(6, 5), aggregate, 8)
    assert (weight * loss).sum() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert (weight[~mask] == 0).all() and np.isfinite(weight).all()
