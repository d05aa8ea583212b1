import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from exprl_jax import config
from exprl_jax.learning.logprobs import reverse_kl, token_logprobs
from exprl_jax.learning.losses import k3, normaliser, policy_loss
from tests.oracles import learning_numpy as oracle

LOSS = config.Loss(0.2, 0.28, dual_clip=3.0, kl_coef=0.001, entropy_coef=0.0, aggregate="token_mean")
PLAIN = dataclasses.replace(LOSS, kl_coef=0.0)
STAGE_2 = config.Loss(1.0, 4.0, dual_clip=0.0, kl_coef=0.0, entropy_coef=1e-4, aggregate="sequence_sum")
AGGREGATES = ("token_mean", "sequence_mean", "sequence_sum", "constant")


def one(ratio, advantage, settings=LOSS):
    """Loss, gradient with respect to log π, and diagnostics of one token with the given ratio; no KL, no entropy."""
    old, advantage = jnp.zeros((1, 1, 1)), jnp.full((1, 1, 1), advantage)

    def loss(logp):
        value, diagnostics = policy_loss(logp, old, logp, jnp.zeros_like(logp), advantage, settings)
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
    tight = dataclasses.replace(PLAIN, clip_low=0.0, clip_high=0.0, dual_clip=1.5)
    assert one(1.0, advantage, tight)[:2] == (-advantage, -advantage)


def test_logratio_is_bounded():
    value, gradient, _ = one(math.exp(30), -1.0)
    assert (value, gradient) == (3.0, 0.0)
    assert float(one(math.exp(30), -1.0)[2].ratio.sum()) == pytest.approx(math.exp(20), rel=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        dataclasses.replace(LOSS, kl_coef=0.3),
        dataclasses.replace(LOSS, dual_clip=0.0, kl_coef=0.3, entropy_coef=0.7),
        STAGE_2,
    ],
)
def test_matches_the_equations_and_their_numeric_gradient(settings):
    rng = np.random.default_rng(0)
    logp, old, ref = rng.normal(-2, 1.0, (3, 2, 3, 40))
    entropy = rng.uniform(0, 3, logp.shape)
    ref[0, 0, :4] += (30, -30, 12, -12)  # beyond both clamps
    advantage = rng.normal(0, 1, logp.shape)
    options = (settings.clip_low, settings.clip_high, settings.dual_clip, settings.kl_coef, settings.entropy_coef)
    arrays = [jnp.asarray(x, jnp.float32) for x in (logp, old, ref, entropy, advantage)]
    loss, diagnostics = policy_loss(*arrays, settings)
    gradient = jax.grad(lambda x: policy_loss(x, *arrays[1:], settings)[0].sum())(arrays[0])
    step = 1e-6
    for i in np.ndindex(logp.shape):
        rest = (old[i], ref[i], entropy[i], advantage[i], *options)
        total, policy, kl = oracle.token_loss(logp[i], *rest)
        kl = kl if settings.kl_coef else 0.0
        slope = (oracle.token_loss(logp[i] + step, *rest)[0] - oracle.token_loss(logp[i] - step, *rest)[0]) / (2 * step)
        np.testing.assert_allclose(
            (loss[i], diagnostics.policy[i], diagnostics.kl[i], gradient[i]),
            (total, policy, kl, slope),
            rtol=1e-4,
            atol=1e-5,
        )


def test_matches_torch_autograd():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    logp, old, ref, advantage = rng.normal(-2, 0.7, (4, 2, 2, 30)).astype(np.float32)
    settings = dataclasses.replace(LOSS, clip_high=0.26, kl_coef=0.1)
    x = torch.tensor(logp, requires_grad=True)
    o, r, a = map(torch.tensor, (old, ref, advantage))
    ratio = (x - o).clamp(-20, 20).exp()
    loss = torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.26))
    loss = torch.where(a < 0, torch.minimum(loss, -a * 3.0), loss)
    d = (r - x).clamp(-20, 20)
    (loss + 0.1 * (d.exp() - d - 1).clamp(-10, 10)).sum().backward()
    arrays = [jnp.asarray(y) for y in (logp, old, ref, np.zeros_like(logp), advantage)]
    gradient = jax.grad(lambda y: policy_loss(y, *arrays[1:], settings)[0].sum())(arrays[0])
    np.testing.assert_allclose(gradient, x.grad, rtol=1e-4, atol=1e-5)


def test_k3_is_zero_only_at_the_reference_and_unbiased():
    assert float(k3(jnp.float32(-1.3), jnp.float32(-1.3))) == 0
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    estimates = np.asarray(k3(jnp.log(p), jnp.log(q)))
    assert (estimates >= 0).all()
    assert (p * estimates).sum() == pytest.approx((p * np.log(p / q)).sum(), rel=1e-5)


def test_without_a_coefficient_reference_and_entropy_are_not_read():
    x = jnp.full((1, 1, 2), -1.0)
    unread = jnp.full_like(x, jnp.nan)
    loss, diagnostics = policy_loss(x, x, unread, unread, jnp.ones_like(x), PLAIN)
    assert (loss == -1).all() and (diagnostics.kl == 0).all()


def test_more_entropy_is_less_loss():
    x, entropy = jnp.full((1, 1, 2), -1.0), jnp.array([[[0.5, 2.0]]])
    settings = dataclasses.replace(PLAIN, entropy_coef=0.25)

    def loss(entropy):
        value, diagnostics = policy_loss(x, x, x, entropy, jnp.zeros_like(x), settings)
        return value.sum(), (value, diagnostics.policy)

    gradient, (value, policy) = jax.grad(loss, has_aux=True)(entropy)
    assert value.tolist() == [[[-0.125, -0.5]]] and (gradient == -0.25).all()
    assert (policy == 0).all()  # the diagnostics keep the terms apart


@pytest.mark.parametrize(
    "ratio, advantage, loss, gradient",
    [
        (0.01, 2.0, -0.02, -0.02),
        (4.9, 2.0, -9.8, -9.8),
        (6.0, 2.0, -10.0, 0.0),  # capped at 5
        (0.01, -2.0, 0.02, 0.02),  # with a lower clip: stopped
        (6.0, -2.0, 12.0, 12.0),  # with a dual clip: stopped
    ],
)
def test_stage_2_caps_the_ratio_of_positive_advantages_alone(ratio, advantage, loss, gradient):
    value, slope, diagnostics = one(ratio, advantage, STAGE_2)
    assert value == pytest.approx(loss, rel=1e-5) and slope == pytest.approx(gradient, rel=1e-5)
    assert bool(diagnostics.clipped.all()) is (gradient == 0.0) and not diagnostics.dual_clipped.any()


# Self-distillation: REINFORCE on d = log π − log π_teacher of the sampled tokens.


def distillation_problem():
    keys = jax.random.split(jax.random.key(3), 4)
    V, W = 6, 3
    student = (jax.random.normal(keys[0], (2, 4, 5)), jax.random.normal(keys[1], (5, V)))
    teacher = (jax.random.normal(keys[2], (2, 4, W)), jax.random.normal(keys[3], (W, V)))
    return student, teacher, V


def every_token(hidden, V):
    """(hidden, tokens) of V times the rows, in which every slot has drawn each token of the vocabulary."""
    B, R, D = hidden.shape
    tokens = jnp.broadcast_to(jnp.arange(V)[:, None, None], (V, B, R)).reshape(V * B, R)
    return jnp.broadcast_to(hidden, (V, B, R, D)).reshape(V * B, R, D), tokens


@pytest.mark.parametrize("settings", [PLAIN, dataclasses.replace(STAGE_2, entropy_coef=0.0)])
def test_sampled_reverse_kl_is_the_on_policy_loss(settings):
    """No ratio, no clip: with A = −d the on-policy loss has the gradient of Σ d.detach · log π, and no more."""
    student, teacher, V = distillation_problem()
    tokens = jax.random.randint(jax.random.key(4), (2, 4), 0, V)
    teacher_logp, _ = token_logprobs(*teacher, tokens, 0.8, 4)

    def released(student):
        logp, _ = token_logprobs(*student, tokens, 0.8, 4)
        return (jax.lax.stop_gradient(logp - teacher_logp) * logp).sum()

    def ours(student):
        logp, entropy = token_logprobs(*student, tokens, 0.8, 4)
        old = jax.lax.stop_gradient(logp)
        return policy_loss(logp, old, logp, entropy, teacher_logp - old, settings)[0].sum()

    assert_close(jax.grad(ours)(student), jax.grad(released)(student), rtol=1e-5, atol=1e-6)


def test_sampled_reverse_kl_is_the_full_one_in_expectation():
    """Over every token that the policy could have drawn, weighted by its probability: value and gradient."""
    student, teacher, V = distillation_problem()
    hidden, tokens = every_token(student[0], V)
    teacher_logp, _ = token_logprobs(every_token(teacher[0], V)[0], teacher[1], tokens, 0.8, 4)
    probability = jnp.exp(token_logprobs(hidden, student[1], tokens, 0.8, 4)[0])
    slope = jax.random.normal(jax.random.key(5), (2, 4))  # so that every slot's KL is compared
    weight = probability * jnp.broadcast_to(slope, (V, 2, 4)).reshape(tokens.shape)

    def sampled(student):
        logp, entropy = token_logprobs(every_token(student[0], V)[0], student[1], tokens, 0.8, 4)
        old = jax.lax.stop_gradient(logp)
        loss, _ = policy_loss(logp, old, logp, entropy, teacher_logp - old, PLAIN)
        return (weight * loss).sum()

    def full(student):
        return (reverse_kl(*student, *teacher, 0.8, 4) * slope).sum()

    expected, gradient = jax.value_and_grad(full)(student)
    assert_close(jax.grad(sampled)(student), gradient, rtol=1e-4, atol=1e-5)
    assert float(sampled(student)) == pytest.approx(float(expected), rel=1e-5)


# From tokens to one number.


def masks():
    ragged = np.arange(5) < np.array([[5, 1, 0], [3, 0, 2]])[..., None]
    holes = np.random.default_rng(0).random((2, 3, 5)) < 0.5
    return {"ragged": ragged, "holes": holes, "full": np.ones_like(ragged), "empty": np.zeros_like(ragged)}


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("name", masks())
def test_weights_make_the_aggregate(aggregate, name):
    mask = masks()[name]
    loss = np.random.default_rng(1).normal(size=mask.shape).astype(np.float32)
    weight = normaliser(mask, aggregate, 8)
    expected = oracle.aggregate(loss.reshape(6, 5), mask.reshape(6, 5), aggregate, 8)
    assert (weight * loss).sum() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert (weight[~mask] == 0).all() and np.isfinite(weight).all()
    assert weight.dtype == np.float32


def test_rows_without_a_counted_token_count_in_sums_and_not_in_means():
    mask = np.array([[[True, True], [False, False]], [[True, False], [False, False]]])
    weight = {settings: normaliser(mask, settings, 4)[mask] for settings in AGGREGATES}
    np.testing.assert_allclose(weight["sequence_sum"], [1 / 4, 1 / 4, 1 / 4])
    np.testing.assert_allclose(weight["constant"], [1 / 16, 1 / 16, 1 / 16])
    np.testing.assert_allclose(weight["sequence_mean"], [1 / 4, 1 / 4, 1 / 2])
    np.testing.assert_allclose(weight["token_mean"], [1 / 3, 1 / 3, 1 / 3])


def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)
