"""The update: packed rows are the rollouts, one by one, of the equations."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from exprl_jax import config, programs
from exprl_jax.data.packing import Example, assign_rows, fill_rows
from exprl_jax.hosts import put_microbatches
from exprl_jax.learning import advantages
from exprl_jax.learning.logprobs import token_logprobs
from exprl_jax.learning.losses import normaliser
from exprl_jax.learning.update import METRICS, make_optimizer, over_updates, train_step
from exprl_jax.mesh import DATA, MODEL, ONE_DEVICE, Placement, replicated
from exprl_jax.records import Experience, TrainState
from exprl_jax.weights.language_model import LanguageModel
from tests.oracles import learning_numpy as oracle
from tests.oracles.tiny_decoder import QWEN3, make_execution, random_params

P, G, R, V, D = 4, 4, 5, 8, 3
COEFFICIENTS = (0.2, 0.28, 3.0, 0.1, 0.05)  # the numbers of LOSS, in the order of config.Loss
LOSS = config.Loss(0.2, 0.28, dual_clip=3.0, kl_coef=0.1, entropy_coef=0.05, aggregate="token_mean")
NO_KL = config.Loss(0.2, 0.28, dual_clip=3.0, kl_coef=0.0, entropy_coef=0.0, aggregate="token_mean")
AGGREGATES = ["token_mean", "sequence_mean", "sequence_sum", "constant"]
CONSTANT = functools.partial(config.Optimizer, schedule="constant", warmup=0.0)
# With a smaller eps a gradient that is 0 but for rounding would be a whole step.
ADAMW = CONSTANT(learning_rate=0.05, b1=0.9, b2=0.999, eps=1e-4, weight_decay=0.2, clip_norm=1.0)
PLAIN = CONSTANT(learning_rate=0.05, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, clip_norm=1.0)
UPDATES = 100


class Sampled(NamedTuple):
    """Rollouts before they are packed; `mask` are the tokens with a loss, of the `length` that were sampled."""

    prompts: list
    tokens: np.ndarray
    length: np.ndarray
    mask: np.ndarray
    advantage: np.ndarray
    sampler: np.ndarray
    old: np.ndarray
    ref: np.ndarray


class Packing(NamedTuple):
    """How rollouts are packed: prompts once a row or with every rollout, width and number of a microbatch's rows."""

    share: bool
    row_tokens: int
    microbatch: int


APART = Packing(False, 0, P * G)  # a row for each rollout
NARROW = Packing(True, 9, 2)
PACKINGS = {
    "shared": Packing(True, 24, 2),
    "repeated": Packing(False, 24, 2),
    "wide": Packing(True, 64, 3),
    "narrow": NARROW,
    "row by row": Packing(True, 16, 1),
}


def sampled(seed=0):
    """Prompts of one to four tokens; rollouts of every length, one that is masked and one with a hole."""
    rng = np.random.default_rng(seed)
    length = rng.integers(0, R + 1, (P, G))
    length[0, :2], length[1, :2] = (0, R), (3, 4)
    mask = np.arange(R) < length[..., None]
    mask[1, 0], mask[1, 1, 1] = False, False
    prompts = [tuple(rng.integers(0, V, n).tolist()) for n in (1, 2, 3, 4)]
    numbers = rng.normal(size=(4, P, G, R)).astype(np.float32) - np.array([0, 2, 2, 2], np.float32).reshape(4, 1, 1, 1)
    return Sampled(prompts, rng.integers(0, V, (P, G, R)), length, mask, *numbers)


def experience(batch, packing=NARROW, aggregate="token_mean", spare=0):
    """The rollouts that have a token, packed; `spare` microbatches more than they need."""
    group, index = np.nonzero(batch.length)
    examples = [Example(batch.prompts[p], batch.tokens[p, g, : batch.length[p, g]]) for p, g in zip(group, index)]
    shared, own, each = (
        [len(e.prompt) - 1 for e in examples],
        [len(e.response) for e in examples],
        np.arange(len(group)),
    )
    width = packing.row_tokens or 3 + R
    row = assign_rows(shared, own, group if packing.share else each, width) if packing.row_tokens else each
    microbatches = -(-(row.max() + 1) // packing.microbatch) + spare
    filled = fill_rows(examples, group, row, (microbatches, packing.microbatch, width), packing.share)

    def spread(x):
        return filled.spread([x[p, g, : batch.length[p, g]] for p, g in zip(group, index)], x.dtype)

    weight = normaliser(batch.mask, aggregate, R + 1)
    numbers = map(spread, (batch.mask, weight, batch.advantage, batch.sampler, batch.old, batch.ref))
    return jax.tree.map(jnp.asarray, Experience(filled.packed, *numbers, filled.used))


def bigram(params, packed, counted, placement=ONE_DEVICE):
    """A policy whose next token depends on the last one and, so that a lost or foreign context shows, on the sum of all
    that a slot sees."""
    segment, position = packed.segment_BT, packed.position_BT
    same = segment[:, :, None] == segment[:, None, :]
    shared = packed.shared_BT[:, :, None] == segment[:, None, :]
    seen = (same | shared) & (position[:, :, None] >= position[:, None, :])
    total = (seen * packed.tokens_BT[:, None, :]).sum(-1, keepdims=True)
    hidden = params["embed"][packed.tokens_BT] + 0.1 * params["context"] * total
    return token_logprobs(hidden, params["table"], packed.target_BT, 0.9, 16, placement, counted)


def by_sequence(params, batch, table=None):
    """(log-probs, entropies) [P, G, R] of the same policy in float64, prompt and response as one sequence."""
    params = {name: np.asarray(x, np.float64) for name, x in params.items()} | (
        {} if table is None else {"table": table}
    )
    logp, entropy = np.zeros((2, P, G, R))
    for p, g in np.ndindex(P, G):
        prompt = batch.prompts[p]
        ids = np.array([*prompt, *batch.tokens[p, g]])[:-1]
        hidden = params["embed"][ids] + 0.1 * params["context"] * np.cumsum(ids)[:, None]
        hidden = hidden[len(prompt) - 1 :]
        logp[p, g], entropy[p, g] = oracle.token_logprobs(hidden, params["table"], batch.tokens[p, g], 0.9)
    return logp, entropy


def fresh(optimizer=ADAMW, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"embed": (V, D), "context": (D,), "table": (D, V)}
    params = {name: jax.random.normal(k, shape, dtype) for k, (name, shape) in zip(keys, shapes.items())}
    return TrainState(jnp.int32(3), params, make_optimizer(optimizer, UPDATES).init(params), jnp.int32(0))


@functools.cache
def step(loss=LOSS, optimizer=ADAMW, on_policy=False, donate=False, logp_fn=bigram):
    return jax.jit(
        functools.partial(
            train_step,
            logp_fn=logp_fn,
            optimizer=make_optimizer(optimizer, UPDATES),
            loss=loss,
            on_policy=on_policy,
            keep_sharded=lambda tree: tree,
        ),
        donate_argnums=(0,) if donate else (),
    )


def with_aggregate(aggregate):
    return config.Loss(**{**vars(LOSS), "aggregate": aggregate})


def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **{"rtol": 2e-5, "atol": 1e-6} | tolerance), a, b)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# Packing.


def test_the_packings_differ():
    """Else the comparisons below would be of one thing with itself."""
    batch = sampled()
    made = {name: experience(batch, packing) for name, packing in PACKINGS.items()}
    tokens = {name: int((x.packed.segment_BT > 0).sum()) for name, x in made.items()}
    own = batch.length.sum()
    assert tokens["wide"] == own + sum(len(prompt) - 1 for prompt in batch.prompts)
    assert tokens["wide"] < tokens["shared"] < tokens["narrow"] < tokens["repeated"]
    assert {name: int(x.used) for name, x in made.items()} == {name: x.mask_MBT.shape[0] for name, x in made.items()}
    assert len({int(x.used) for x in made.values()}) >= 3
    assert all(x.mask_MBT.sum() == batch.mask.sum() < own for x in made.values())


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_how_rollouts_are_packed_changes_nothing(aggregate):
    loss, batch = with_aggregate(aggregate), sampled()
    state, metrics = step(loss)(fresh(), experience(batch, APART, aggregate))
    for name, packing in PACKINGS.items():
        packed_state, packed_metrics = step(loss)(fresh(), experience(batch, packing, aggregate))
        assert_close(packed_metrics, metrics, atol=1e-5, err_msg=name)
        assert_close(packed_state.params, state.params, atol=1e-5, err_msg=name)


def test_the_decoders_gradient_does_not_depend_on_the_packing():
    """The real model: a shared prompt gets the gradients of all of its rollouts."""
    policy = LanguageModel(config.Model("unread", make_execution(), "float32", ""), QWEN3, tokenizer=None, source=None)
    logp_fn = functools.partial(programs.packed_logp_and_entropy, policy.on(None), temperature=0.8, chunk=64)
    params, batch, sgd = (
        random_params(QWEN3, make_execution()),
        sampled(),
        CONSTANT(learning_rate=1.0, b1=0.0, b2=0.0, eps=1.0, weight_decay=0.0, clip_norm=1e9),
    )
    state = TrainState(jnp.int32(0), params, make_optimizer(sgd, UPDATES).init(params), jnp.int32(0))
    run = step(LOSS, sgd, logp_fn=logp_fn)
    expected, metrics = run(state, experience(batch, APART))
    result, packed_metrics = run(state, experience(batch, PACKINGS["shared"]))
    assert_close(packed_metrics, metrics, atol=1e-5)
    moments = [x.opt_state[1][0].mu for x in (result, expected)]  # with b1 = 0 the gradient itself
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(moments)) > 0.01
    assert_close(*moments, rtol=1e-4, atol=1e-5)
    assert_close(result.params, expected.params, atol=1e-5)


def test_unused_microbatches_are_not_computed():
    batch = sampled()
    expected = step()(fresh(), experience(batch))
    roomy = experience(batch, spare=2)
    unused = jnp.arange(roomy.mask_MBT.shape[0]) >= roomy.used
    assert unused.sum() == 2
    assert_same(step()(fresh(), roomy), expected)

    def spoil(x):
        bad = jnp.nan if x.dtype == jnp.float32 else -1 if x.dtype == jnp.int32 else False
        return jnp.where(unused.reshape(-1, 1, 1), bad, x) if x.ndim else x

    assert_same(step()(fresh(), jax.tree.map(spoil, roomy)), expected)
    # What is spoilt would show, were it used.
    _, metrics = step()(fresh(), jax.tree.map(spoil, roomy).replace(used=roomy.used + 1))
    assert float(metrics["update/skipped"]) == 1


def test_an_update_without_any_rollout_is_no_gradient():
    batch = experience(sampled()).replace(used=jnp.int32(0))
    state = fresh(PLAIN)
    after, metrics = step(LOSS, PLAIN)(state, batch.replace(mask_MBT=jnp.zeros_like(batch.mask_MBT)))
    assert_same(after.params, state.params)
    assert all(float(x) == 0 for x in metrics.values())


@pytest.mark.parametrize("data, model", [(2, 4), (1, 8), (8, 1)])
def test_sharded_is_unsharded(data, model):
    mesh = Mesh(np.array(jax.devices()).reshape(data, model), (DATA, MODEL))
    state, batch = fresh(), experience(sampled(), Packing(True, 9, 8))
    expected, metrics = step()(state, batch)
    sharded = step(logp_fn=functools.partial(bigram, placement=Placement(mesh)))
    given = jax.device_put(state, replicated(mesh)), put_microbatches(mesh, jax.tree.map(np.asarray, batch))
    result, sharded_metrics = sharded(*given)
    assert_close(sharded_metrics, metrics)
    assert_close(result.params, expected.params, atol=1e-5)


# Against the equations.


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_two_updates_match_the_oracle(aggregate):
    """Loss by the oracle on the policy's log-probs; its gradient by differences; AdamW by the oracle."""
    loss, state, gradients = with_aggregate(aggregate), fresh(), []
    start = np.asarray(state.params["table"], np.float64)
    for batch in (sampled(1), sampled(2)):
        objective = functools.partial(oracle_objective, state.params, batch, aggregate)
        table = np.asarray(state.params["table"], np.float64)
        gradient = oracle.slope(objective, table, 1e-6)
        state, metrics = step(loss)(state, experience(batch, NARROW, aggregate))
        assert float(metrics["loss/total"]) == pytest.approx(objective(table), rel=1e-4)
        # The clip is by the norm over all parameters; the differences here are of one of them.
        gradients.append(gradient * min(1.0, 1.0 / float(metrics["grad/norm"])))
    expected = oracle.adamw(start, gradients, 0.05, 0.9, 0.999, 1e-4, 0.2, clip_norm=np.inf)
    np.testing.assert_allclose(state.params["table"], expected, rtol=1e-3, atol=1e-4)


def oracle_objective(params, batch, aggregate, table):
    """The whole batch's loss with another `table`, in float64."""
    logp, entropy = by_sequence(params, batch, table)
    fields = (logp, batch.old, batch.ref, entropy, batch.advantage)
    rows = zip(*(np.asarray(x, np.float64).reshape(P * G, R) for x in fields))
    losses = [[oracle.token_loss(*token, *COEFFICIENTS)[0] for token in zip(*row)] for row in rows]
    return oracle.aggregate(losses, batch.mask.reshape(P * G, R), aggregate, R + 1)


def test_two_updates_of_one_batch_compare_with_the_policy_before_it():
    """Half of the problems each, with the old log-probs of the start: the second half's ratios come of the first."""
    start, batch = fresh(), sampled()
    batch = batch._replace(old=by_sequence(start.params, batch)[0].astype(np.float32))

    def half(u):
        return batch._replace(mask=batch.mask & (np.arange(P) % 2 == u)[:, None, None])

    state, first = step()(start, experience(half(0)))
    assert float(first["policy/ratio_max"]) == pytest.approx(1, abs=1e-5)
    ratio = np.exp(by_sequence(state.params, batch)[0] - batch.old)[half(1).mask]
    _, second = step()(state, experience(half(1)))
    assert float(second["policy/ratio_max"]) == pytest.approx(ratio.max(), rel=1e-4)
    assert float(second["policy/ratio_mean"]) == pytest.approx(ratio.mean(), rel=1e-4)
    assert ratio.max() > 1.02


def test_metrics_match_the_equations():
    batch, state = sampled(), fresh()
    _, metrics = step()(state, experience(batch))
    assert set(metrics) == set(METRICS) and all(x.shape == () and x.dtype == jnp.float32 for x in metrics.values())
    mask, fields = batch.mask, (*by_sequence(state.params, batch), batch.old, batch.ref, batch.sampler, batch.advantage)
    logp, entropy, old, ref, sampler, A = (np.asarray(x, np.float64)[mask] for x in fields)
    ratio, d = np.exp(logp - old), ref - logp
    parts = np.array([oracle.token_loss(*token, *COEFFICIENTS) for token in zip(logp, old, ref, entropy, A)])
    clipped = ((A > 0) & (ratio > 1.28)) | ((A < 0) & (ratio < 0.8))
    expected = {
        "loss/total": parts[:, 0].mean(),
        "loss/policy": parts[:, 1].mean(),
        "loss/kl": np.minimum(np.exp(d) - d - 1, 10).mean(),
        "policy/entropy": entropy.mean(),
        "policy/ratio_mean": ratio.mean(),
        "policy/ratio_max": ratio.max(),
        "policy/clip_fraction": clipped.mean(),
        "policy/dual_clip_fraction": ((A < 0) & (ratio > 3)).mean(),
        "policy/approx_kl": (old - logp).mean(),
        "policy/sampler_gap_mean": np.abs(sampler - old).mean(),
        "policy/sampler_gap_max": np.abs(sampler - old).max(),
        "update/skipped": 0.0,
        "update/tokens": mask.sum(),
    }
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_on_policy_is_the_explicit_old_policy():
    batch, state = sampled(), fresh()
    old = by_sequence(state.params, batch)[0].astype(np.float32)
    explicit, explicit_metrics = step()(state, experience(batch._replace(old=old)))
    unread = experience(batch._replace(old=np.full_like(old, np.nan)))
    implicit, metrics = step(on_policy=True)(state, unread)
    assert_close(metrics, explicit_metrics, atol=2e-6)
    assert_close(implicit.params, explicit.params)
    assert float(metrics["policy/ratio_max"]) == 1 and float(metrics["grad/norm"]) > 0.01


def test_optimizer_clips_the_global_norm():
    gradient = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}
    params = jax.tree.map(jnp.ones_like, gradient)
    momentum_only = CONSTANT(learning_rate=1.0, b1=0.0, b2=0.0, eps=1.0, weight_decay=0.0, clip_norm=1.0)
    optimizer = make_optimizer(momentum_only, UPDATES)
    changes, _ = optimizer.update(gradient, optimizer.init(params), params)
    assert_close(changes, {"a": jnp.array([-0.6 / 1.6, 0.0]), "b": jnp.array([[-0.8 / 1.8]])})


# What must not change anything.


@pytest.mark.parametrize("where", ["advantage", "parameter"])
def test_non_finite_update_is_skipped_and_counted(where):
    batch, run = experience(sampled()), step()
    state, _ = run(fresh(), batch)
    bad_batch, bad = batch, state
    if where == "advantage":
        last = tuple(np.argwhere(np.asarray(batch.mask_MBT))[-1])
        bad_batch = batch.replace(advantage_MBT=batch.advantage_MBT.at[last].set(jnp.nan))
    else:
        bad = state.replace(params=state.params | {"context": state.params["context"].at[0].set(jnp.inf)})
    after, metrics = run(bad, bad_batch)
    assert_same((after.params, after.opt_state), (bad.params, bad.opt_state))
    assert int(after.skipped) == 1 and float(metrics["update/skipped"]) == 1
    assert int(after.opt_state[1][0].count) == 1  # Adam's bias correction has seen one update
    again, metrics = run(state.replace(skipped=after.skipped), batch)
    assert int(again.skipped) == 1 and float(metrics["update/skipped"]) == 0
    assert int(again.opt_state[1][0].count) == 2 and int(again.step) == 3


def test_what_is_outside_the_mask_is_not_read():
    batch, run = experience(sampled()), step()
    expected = run(fresh(), batch)
    names = ("advantage_MBT", "sampler_logp_MBT", "old_logp_MBT", "ref_logp_MBT")
    poisoned = batch.replace(**{n: jnp.where(batch.mask_MBT, getattr(batch, n), jnp.nan) for n in names})
    assert_same(run(fresh(), poisoned), expected)
    # The log-prob of a target that is none is NaN.
    no_target = jnp.where(batch.mask_MBT, batch.packed.target_BT, V)
    assert_same(run(fresh(), batch.replace(packed=batch.packed.replace(target_BT=no_target))), expected)


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_a_batch_without_counted_tokens_is_no_gradient(aggregate):
    state, batch = fresh(PLAIN), sampled()
    batch = experience(batch._replace(mask=np.zeros_like(batch.mask)), NARROW, aggregate)
    assert batch.used > 1
    after, metrics = step(with_aggregate(aggregate), PLAIN)(state, batch)
    assert_same(after.params, state.params)
    assert all(float(x) == 0 for x in metrics.values())


def test_equal_rewards_are_no_gradient():
    state, batch = fresh(PLAIN), sampled()
    batch = experience(batch._replace(advantage=np.zeros_like(batch.advantage)))
    after, metrics = step(NO_KL, PLAIN)(state, batch)
    assert float(metrics["grad/norm"]) == 0
    assert_same(after.params, state.params)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_donated_state_keeps_its_types(dtype):
    run, state = step(donate=True), fresh(dtype=dtype)
    compiled = run._cache_size()
    types = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    given = jax.tree.leaves(state.params)
    roomy = [experience(sampled(seed), Packing(True, 64, 1), spare=1) for seed in range(3)]
    assert len({x.mask_MBT.shape for x in roomy}) == 1 and len({int(x.used) for x in roomy}) == 1
    for batch in (*roomy, roomy[0].replace(used=roomy[0].used - 1)):  # how many are used is no shape
        state, _ = run(state, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == types
    assert all(x.is_deleted() for x in given)
    assert run._cache_size() == compiled + 1


# A problem with a known optimum, solved by the real step.


@pytest.mark.parametrize("sign, low, high", [(1, 0.95, 1.0), (-1, 0.0, 0.01)])
def test_reward_for_one_token_moves_its_probability(sign, low, high):
    probability, _, _ = bandit(lambda rewarded: sign * rewarded)
    assert low <= probability <= high


def test_constant_reward_is_no_drift():
    probability, params, start = bandit(lambda rewarded: np.full_like(rewarded, 0.3))
    assert_same(params, start)


def bandit(reward):
    """60 on-policy updates on rollouts of one token; (probability of token 2, parameters, parameters at the start)."""
    state, run = fresh(PLAIN), step(NO_KL, PLAIN, on_policy=True, donate=True)
    start = jax.tree.map(np.asarray, state.params)
    rng = np.random.default_rng(0)
    base = sampled()._replace(prompts=[(0,)] * P, length=np.ones((P, G), int), mask=np.arange(R) < np.ones((P, G, 1)))

    def distribution(params):
        logits = np.asarray(params["embed"], np.float64)[0] @ np.asarray(params["table"], np.float64)
        return np.exp(oracle.log_softmax(logits / 0.9))

    for _ in range(60):
        tokens = np.zeros((P, G, R), np.int32)
        tokens[..., 0] = rng.choice(V, (P, G), p=distribution(state.params))
        advantage, _ = advantages.grpo(
            reward((tokens[..., 0] == 2).astype(float)), np.ones((P, G), bool), std_normalise=True, min_spread=0.0
        )
        spread = advantage[..., None].repeat(R, -1).astype(np.float32)
        state, _ = run(state, experience(base._replace(tokens=tokens, advantage=spread), Packing(True, 16, 1)))
    return distribution(state.params)[2], jax.tree.map(np.asarray, state.params), start


def test_a_skipped_update_is_null_in_the_row_and_counted():
    bad = {
        "loss/total": np.float32("nan"),
        "grad/norm": np.float32("inf"),
        "policy/ratio_max": 2.0,
        "update/skipped": 1.0,
    }
    good = {"loss/total": np.float32(0.5), "grad/norm": np.float32(1.0), "policy/ratio_max": 1.0, "update/skipped": 0.0}
    row = over_updates([bad])
    assert row == {"loss/total": None, "grad/norm": None, "policy/ratio_max": 2.0, "update/skipped": 1.0}
    row = over_updates([bad, good])
    assert row == {"loss/total": 0.5, "grad/norm": 1.0, "policy/ratio_max": 2.0, "update/skipped": 1.0}
    assert np.isnan(over_updates([good | {"grad/norm": np.float32("nan")}])["grad/norm"])
