"""The sampling loop: what it records is what the trainer computes, and a row is a function of its identity alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny
from exprl_jax import config, mesh, programs
from exprl_jax.model.decoder import abstract_params, forward_logits, identity, prefill
from exprl_jax.model.language_model import LanguageModel
from exprl_jax.records import Context, Draw, Rows
from exprl_jax.rollout.sampler import sample
from tests.oracles.tiny_decoder import QWEN3, execution, random_params

P, G, C, R, V = 4, 3, 5, 6, QWEN3.vocab_size
HOW, PAD, NEVER = execution(), 0, (V,)
PARAMS = random_params(QWEN3, HOW)
RANDOM = np.random.default_rng(8)
CONTEXT = Context(RANDOM.integers(0, V, (P, C), dtype=np.int32), np.array([3, 5, 0, 4], np.int32))
LAST_P = RANDOM.integers(0, V, P, dtype=np.int32)
PROBLEM_P = np.array([9, 4, 2**32 - 1, 7], np.uint32)


@functools.partial(jax.jit, static_argnames=("how", "tokens", "eos_ids", "pad_id", "constrain"))
def run(params, context, rows, draw, how=HOW, tokens=R, eos_ids=NEVER, pad_id=PAD, constrain=identity):
    prefix = prefill(params, QWEN3, how, context, constrain)
    return sample(
        params, QWEN3, how, prefix, rows, draw, max_tokens=tokens, eos_ids=eos_ids, pad_id=pad_id, constrain=constrain
    )


def batch(temperature=0.8, seed=1, step=2, problem_P=PROBLEM_P, group=G):
    rows = Rows(np.broadcast_to(LAST_P[:, None, None], (P, group, 1)).copy(), np.zeros((P, group), np.int32))
    temperature_PG, live_PG = np.full((P, group), temperature, np.float32), np.ones((P, group), bool)
    draw = Draw(np.uint32(seed), np.int32(step), problem_P, temperature_PG, live_PG)
    return CONTEXT, rows, draw


def rollouts(*given, **how):
    return jax.tree.map(np.asarray, run(PARAMS, *given, **how))


def take(tree, index):
    """Some problems of a batch; scalars are everybody's."""
    return jax.tree.map(lambda x: x[index] if x.ndim else x, tree)


def assert_same(got, expected):
    np.testing.assert_array_equal(got.tokens_PGR, expected.tokens_PGR)
    np.testing.assert_array_equal(got.mask_PGR, expected.mask_PGR)
    np.testing.assert_array_equal(got.ended_PG, expected.ended_PG)
    np.testing.assert_allclose(got.logp_PGR, expected.logp_PGR, atol=1e-5)


@functools.cache
def unending(temperature=0.8):
    """A reference that no row ends in."""
    out = rollouts(*batch(temperature))
    assert out.mask_PGR.all() and not out.ended_PG.any()
    assert len(np.unique(out.tokens_PGR)) > 10
    return out


# ------------------------------------------------------------------------------------------------ the policy's log-probs


@pytest.mark.parametrize("temperature", [0.8, 1.3])
def test_recorded_logp_is_what_the_trainer_computes(temperature):
    out = unending(temperature)
    assert out.logp_PGR.std() > 0.5
    np.testing.assert_allclose(out.logp_PGR, trainer_logp(out, temperature, "float32"), atol=1e-5)


def test_in_bfloat16_sampler_and_trainer_round_alike():
    """Casting a norm's scale in one of them alone makes this 0.02."""
    out = rollouts(*batch(1.0), how=execution(dtype="bfloat16"))
    assert np.abs(out.logp_PGR - unending(1.0).logp_PGR).mean() > 1e-3
    assert np.abs(out.logp_PGR - trainer_logp(out, 1.0, "bfloat16")).mean() < 1e-3


def trainer_logp(out, temperature, dtype):
    settings = config.resolve(tiny.get_config())
    settings = dataclasses.replace(settings, rollout=dataclasses.replace(settings.rollout, temperature=temperature))
    how = dataclasses.replace(settings.policy, execution=execution(dtype=dtype))
    one = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
    policy = LanguageModel(how=how, arch=QWEN3, tokenizer=None, source=None)
    trainer = functools.partial(programs.token_logp_and_entropy, config=settings, mesh=one, policy=policy)
    return np.asarray(jax.jit(trainer)(PARAMS, CONTEXT, LAST_P, out.tokens_PGR)[0])


def test_greedy_is_the_teacher_forced_argmax_and_its_logp_is_at_temperature_1():
    out = unending(0.0)
    for p in range(P):
        prompt = [*CONTEXT.tokens_PC[p, : CONTEXT.length_P[p]], LAST_P[p]]
        tokens = np.array([[*prompt, *response] for response in out.tokens_PGR[p]], np.int32)
        padded = np.pad(tokens, ((0, 0), (0, C + 1 + R - tokens.shape[1])))
        logits = np.asarray(plain_logits(padded))[:, len(prompt) - 1 : len(prompt) - 1 + R]
        np.testing.assert_array_equal(logits.argmax(-1), out.tokens_PGR[p])
        logp = logits.max(-1) - np.log(np.exp(logits.astype(np.float64)).sum(-1))
        np.testing.assert_allclose(out.logp_PGR[p], logp, atol=1e-5)


@jax.jit
def plain_logits(tokens_BT):
    return forward_logits(PARAMS, QWEN3, HOW, tokens_BT)


# ------------------------------------------------------------------------------------------------ where rows end


def ending(tokens_PGR, eos_ids):
    """For each row the number of tokens up to its first EOS, that included; R + 1 where there is none."""
    hit = np.isin(tokens_PGR, eos_ids)
    return np.where(hit.any(-1), hit.argmax(-1) + 1, R + 1)


def eos_first_last_and_absent():
    """Two ids of which one opens a row, one closes a row, and neither is in a third row."""
    tokens = unending().tokens_PGR
    for a in np.unique(tokens[..., 0]):
        for b in np.unique(tokens[..., -1]):
            if {1, R, R + 1} <= set(ending(tokens, (a, b)).ravel()):
                return int(a), int(b)
    raise AssertionError("no such pair of tokens; take another seed")


def test_ends_a_row_after_its_first_eos():
    whole, eos_ids = unending(), eos_first_last_and_absent()
    pad = eos_ids[1]  # an id that is also an EOS, and may be sampled: the mask tells which is which
    out = rollouts(*batch(), eos_ids=eos_ids, pad_id=pad)
    length = ending(whole.tokens_PGR, eos_ids)
    mask = np.arange(R) < length[..., None]
    np.testing.assert_array_equal(out.mask_PGR, mask)
    np.testing.assert_array_equal(out.ended_PG, length <= R)
    np.testing.assert_array_equal(out.tokens_PGR, np.where(mask, whole.tokens_PGR, pad))
    np.testing.assert_allclose(out.logp_PGR, np.where(mask, whole.logp_PGR, 0), atol=1e-6)


def test_stops_when_every_row_has_ended():
    passes = []

    def count(x):
        jax.debug.callback(lambda: passes.append(1))
        return x

    first = tuple(np.unique(unending().tokens_PGR[..., :2]).tolist())
    out = rollouts(*batch(), eos_ids=first, tokens=50, constrain=count)
    jax.effects_barrier()
    steps = out.mask_PGR.sum(-1).max()
    assert steps <= 2 and out.ended_PG.all()
    assert (out.tokens_PGR[~out.mask_PGR] == PAD).all() and (out.logp_PGR[~out.mask_PGR] == 0).all()
    # The residual is constrained after the embedding and twice a layer, in the prefill and in each step.
    assert len(passes) == (1 + steps) * (1 + 2 * QWEN3.layers)


# ------------------------------------------------------------------------------------------------ what a row depends on


def test_order_neighbours_and_wave_change_nothing():
    expected, order = unending(), np.array([2, 0, 3, 1])
    assert_same(rollouts(*take(batch(), order)), take(expected, order))
    for wave in (order[:2], order[2:]):
        assert_same(rollouts(*take(batch(), wave)), take(expected, wave))


def test_group_size_and_context_width_change_nothing():
    context, rows, draw = batch(group=G + 2)
    garbage = np.random.default_rng(9).integers(0, V, (P, 4), dtype=np.int32)
    out = rollouts(Context(np.concatenate([context.tokens_PC, garbage], 1), context.length_P), rows, draw)
    assert_same(jax.tree.map(lambda x: x[:, :G], out), unending())


def test_a_greedy_neighbour_changes_nothing():
    context, rows, draw = batch()
    temperature = draw.temperature_PG.copy()
    temperature[:, 1] = 0
    out = rollouts(context, rows, draw.replace(temperature_PG=temperature))
    assert_same(*(jax.tree.map(lambda x: x[:, ::2], tree) for tree in (out, unending())))
    assert_same(*(jax.tree.map(lambda x: x[:, 1], tree) for tree in (out, unending(0.0))))


def test_seed_step_problem_and_index_each_change_the_row():
    def rows_of(out):
        return {tuple(row) for row in out.tokens_PGR.reshape(-1, R).tolist()}

    base = rows_of(unending())
    assert len(base) == P * G
    for changed in (dict(seed=2), dict(step=3), dict(problem_P=PROBLEM_P - 1)):
        assert not base & rows_of(rollouts(*batch(**changed)))


def test_rows_of_several_tokens_continue_as_the_concatenated_sequence():
    """A row's own tokens may as well stand at the end of its context, its last one excepted."""
    _, _, draw = batch(group=1)
    own = np.random.default_rng(10).integers(0, V, (P, 1, 4), dtype=np.int32)
    start = np.array([[0], [1], [3], [2]], np.int32)
    out = rollouts(CONTEXT, Rows(own, start), draw)
    length = CONTEXT.length_P + 3 - start[:, 0]
    moved = np.zeros((P, C + 3), np.int32)
    for p in range(P):
        moved[p, : length[p]] = [*CONTEXT.tokens_PC[p, : CONTEXT.length_P[p]], *own[p, 0, start[p, 0] : -1]]
    expected = rollouts(Context(moved, length), Rows(own[..., -1:], np.zeros((P, 1), np.int32)), draw)
    assert len(np.unique(expected.tokens_PGR)) > 10
    assert_same(out, expected)


# ------------------------------------------------------------------------------------------------ on a mesh


@pytest.mark.parametrize("data, model, scan", [(1, 8, False), (2, 4, True), (8, 1, False)])
def test_the_mesh_changes_nothing(data, model, scan):
    context, rows, draw = batch()
    # Eight problems, so that eight devices have one each; the second four are the first under other names.
    twice = jax.tree.map(lambda x: np.concatenate([x, x]) if x.ndim else x, (context, rows, draw))
    twice[2].problem_P[P:] += 100
    expected = rollouts(*twice)
    assert_same(take(expected, slice(0, P)), unending())

    how, over = execution(scan), mesh.make_mesh(config.Mesh(data, model))
    shardings = mesh.shard_parameters(abstract_params(QWEN3, how, "float32"), QWEN3, how, over)
    params = jax.device_put(random_params(QWEN3, how), shardings)
    out = run(params, *mesh.put_rows(over, twice, 2 * P), how=how, constrain=mesh.constrain_rows(over))
    assert len(jnp.asarray(out.tokens_PGR).sharding.device_set) == 8
    whole = jax.device_put(out, mesh.rows_sharding(over))
    assert_same(mesh.fetch_rows(whole), expected)


def test_rows_that_are_not_live_stay_empty_and_disturb_nobody():
    context, rows, draw = batch()
    live = np.arange(P * G).reshape(P, G) % 3 != 0
    some, all_ = rollouts(context, rows, draw.replace(live_PG=live)), rollouts(context, rows, draw)
    assert not some.mask_PGR[~live].any() and (some.tokens_PGR[~live] == PAD).all() and not some.logp_PGR[~live].any()
    np.testing.assert_array_equal(some.tokens_PGR[live], all_.tokens_PGR[live])
    nobody = rollouts(context, rows, draw.replace(live_PG=np.zeros((P, G), bool)))
    assert not nobody.mask_PGR.any()
