"""The sampling loop: what it records is what the trainer computes, and a row is a function of its identity alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny
from exprl_jax import config, hosts, mesh, programs
from exprl_jax.mesh import ONE_DEVICE, Placement
from exprl_jax.model import page_attention, paged
from exprl_jax.model.decoder import Transformer
from exprl_jax.records import Context, Draw, Packed, Rows
from exprl_jax.resolve import resolve
from exprl_jax.rollout import sampler
from exprl_jax.rollout.sampler import sample
from exprl_jax.weights.language_model import LanguageModel
from tests.oracles import pages_numpy
from tests.oracles.tiny_decoder import QWEN3, TpuWay, forward_logits, random_params
from tests.oracles.tiny_decoder import make_execution as execution

P, G, C, R, V = 4, 3, 5, 6, QWEN3.vocab_size
HOW, PAD, NEVER = execution(), 0, (V,)
PARAMS = random_params(QWEN3, HOW)
RANDOM = np.random.default_rng(8)
CONTEXT = Context(RANDOM.integers(0, V, (P, C), dtype=np.int32), np.array([3, 5, 0, 4], np.int32))
LAST_P = RANDOM.integers(0, V, P, dtype=np.int32)
PROBLEM_P = np.array([9, 4, 2**32 - 1, 7], np.uint32)


@functools.partial(jax.jit, static_argnames=("how", "tokens", "eos_ids", "pad_id", "place", "chunk"))
def run(
    params, context, rows, draw, how=HOW, tokens=R, eos_ids=NEVER, pad_id=PAD, place=ONE_DEVICE, chunk=sampler.CHUNK
):
    """`chunk` is what CHUNK is, so that another one is another program."""
    assert chunk == sampler.CHUNK
    prefix = Transformer(QWEN3, how, place).prefill(params, context)
    return sample(
        Transformer(QWEN3, how, place), params, prefix, rows, draw, max_tokens=tokens, eos_ids=eos_ids, pad_id=pad_id
    )[0]


def batch(temperature=0.8, seed=1, step=2, problem_P=PROBLEM_P, group=G):
    rows = Rows(np.broadcast_to(LAST_P[:, None, None], (P, group, 1)).copy(), np.zeros((P, group), np.int32))
    temperature_PG, budget_PG = np.full((P, group), temperature, np.float32), np.full((P, group), 1000, np.int32)
    draw = Draw(np.uint32(seed), np.int32(step), problem_P, temperature_PG, budget_PG)
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
    np.testing.assert_allclose(got.entropy_PGR, expected.entropy_PGR, atol=1e-5)


@functools.cache
def unending(temperature=0.8):
    """A reference that no row ends in."""
    out = rollouts(*batch(temperature))
    assert out.mask_PGR.all() and not out.ended_PG.any()
    assert len(np.unique(out.tokens_PGR)) > 10
    return out


# ----------------------------------------------------------------------------------------------- the policy's log-probs


@pytest.mark.parametrize("temperature", [0.8, 1.3])
def test_recorded_logp_and_entropy_are_what_the_trainer_computes(temperature):
    out = unending(temperature)
    logp, entropy = trainers(out, temperature, "float32")
    assert out.logp_PGR.std() > 0.5 and out.entropy_PGR.std() > 0.1
    np.testing.assert_allclose(out.logp_PGR, logp, atol=1e-5)
    np.testing.assert_allclose(out.entropy_PGR, entropy, atol=1e-5)


def test_in_bfloat16_sampler_and_trainer_round_alike():
    """Casting a norm's scale in one of them alone makes this 0.02."""
    out = rollouts(*batch(1.0), how=execution(dtype="bfloat16"))
    assert np.abs(out.logp_PGR - unending(1.0).logp_PGR).mean() > 1e-3
    assert np.abs(out.logp_PGR - trainers(out, 1.0, "bfloat16")[0]).mean() < 1e-3


def trainers(out, temperature, dtype):
    """Log-probs and entropies, of a packed row a rollout."""
    how = dataclasses.replace(resolve(tiny.get_config()).policy, execution=execution(dtype=dtype))
    one = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
    policy = LanguageModel(config=how, arch=QWEN3, tokenizer=None, source=None)
    length_B = np.repeat(CONTEXT.length_P, G)
    tokens, target = np.zeros((2, P * G, C + R), np.int32)
    for b, length in enumerate(length_B):
        prompt, response = CONTEXT.tokens_PC[b // G, :length], out.tokens_PGR[b // G, b % G]
        tokens[b, : length + R] = [*prompt, LAST_P[b // G], *response[:-1]]
        target[b, length : length + R] = response
    segment = (np.arange(C + R) < length_B[:, None] + R).astype(np.int32)
    packed = Packed(tokens, target, segment, segment, np.broadcast_to(np.arange(C + R, dtype=np.int32), segment.shape))
    trainer = functools.partial(programs.packed_logp_and_entropy, policy.on(one), chunk=64)
    computed = jax.jit(functools.partial(trainer, temperature=temperature))(PARAMS, packed, segment > 0)
    return [
        np.stack([x[b, length : length + R] for b, length in enumerate(length_B)]).reshape(P, G, R)
        for x in map(np.asarray, computed)
    ]


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
    np.testing.assert_allclose(out.entropy_PGR, np.where(mask, whole.entropy_PGR, 0), atol=1e-6)


def test_stops_when_every_row_has_ended():
    """Counted where a forward places its residual: after the embedding and twice a layer, in the prefill and in
    each step."""
    passes = []

    class Counting(Placement):
        def by_tokens(self, x_PGTD):
            jax.debug.callback(lambda: passes.append(1))
            return x_PGTD

    first = tuple(np.unique(unending().tokens_PGR[..., :2]).tolist())
    out = rollouts(*batch(), eos_ids=first, tokens=50, place=Counting(None))
    jax.effects_barrier()
    steps = out.mask_PGR.sum(-1).max()
    assert steps <= 2 and out.ended_PG.all()
    assert (out.tokens_PGR[~out.mask_PGR] == PAD).all() and (out.logp_PGR[~out.mask_PGR] == 0).all()
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


OWN = np.random.default_rng(10).integers(0, V, (P, 1, 8), dtype=np.int32)
START = np.array([[0], [1], [7], [5]], np.int32)


def rows_of_several_tokens():
    _, _, draw = batch(group=1)
    return CONTEXT, Rows(OWN, START), draw


@functools.cache
def continued():
    """A row's own tokens may as well stand at the end of its context, its last one excepted."""
    _, _, draw = batch(group=1)
    length = CONTEXT.length_P + 7 - START[:, 0]
    moved = np.zeros((P, C + 7), np.int32)
    for p in range(P):
        moved[p, : length[p]] = [*CONTEXT.tokens_PC[p, : CONTEXT.length_P[p]], *OWN[p, 0, START[p, 0] : -1]]
    out = rollouts(Context(moved, length), Rows(OWN[..., -1:], np.zeros((P, 1), np.int32)), draw)
    assert len(np.unique(out.tokens_PGR)) > 10
    return out


@pytest.mark.parametrize("chunk", [1024, 7, 3, 2])
def test_rows_of_several_tokens_continue_as_the_concatenated_sequence(chunk, monkeypatch):
    """Read at once, and in chunks of which the first may be padding in part or in whole."""
    monkeypatch.setattr(sampler, "CHUNK", chunk)
    assert_same(rollouts(*rows_of_several_tokens(), chunk=chunk), continued())


def test_chunks_of_nothing_but_padding_are_not_read(monkeypatch):
    """Counted as steps are above; here only the loop's own feeding of the last token and two chunks of four remain."""
    monkeypatch.setattr(sampler, "CHUNK", 2)
    passes = []

    class Counting(Placement):
        def by_tokens(self, x_PGTD):
            if x_PGTD.shape[2] == 2:
                jax.debug.callback(lambda: passes.append(1))
            return x_PGTD

    context, rows, draw = rows_of_several_tokens()
    rollouts(context, rows.replace(start_PG=np.maximum(START, 4)), draw, chunk=2, place=Counting(None))
    jax.effects_barrier()
    assert len(passes) == 2 * (1 + 2 * QWEN3.layers)


# ------------------------------------------------------------------------------------------------ from pages


@pytest.fixture
def small_pages(monkeypatch):
    monkeypatch.setattr(paged, "PAGE", 4)
    monkeypatch.setattr(paged, "is_paged", lambda how, place: True)


class Paged(Placement):
    """A placement of its own, so that its program is."""


def test_pages_change_nothing(small_pages, monkeypatch):
    """Contexts and rows that end within a page, with it, and beyond it; read in chunks; then the TPU's way, with a
    stand-in for its kernel."""
    assert_same(rollouts(*batch(), place=Paged(None)), unending())
    monkeypatch.setattr(sampler, "CHUNK", 3)
    assert_same(rollouts(*rows_of_several_tokens(), chunk=3, place=Paged(None)), continued())
    monkeypatch.setattr(page_attention, "ragged_paged_attention", pages_numpy.called_back)
    assert_same(rollouts(*rows_of_several_tokens(), chunk=3, place=TpuWay(None)), continued())


def test_ended_rows_and_those_not_live_disturb_nobody_on_pages(small_pages):
    eos_ids = eos_first_last_and_absent()
    expected = rollouts(*batch(), eos_ids=eos_ids)
    assert_same(rollouts(*batch(), eos_ids=eos_ids, place=Paged(None)), expected)
    context, rows, draw = batch()
    draw = draw.replace(budget_PG=np.where(np.arange(P * G).reshape(P, G) % 3, R, 0).astype(np.int32))
    assert_same(rollouts(context, rows, draw, place=Paged(None)), rollouts(context, rows, draw))


def test_int8_samples_alike():
    """With contexts of up to five tokens, the worst case for scales that are a context's."""
    out, expected = rollouts(*batch(0.0), how=execution(kv_dtype="int8")), unending(0.0)
    assert (out.tokens_PGR == expected.tokens_PGR).mean() > 0.5
    assert 1e-4 < np.abs(out.logp_PGR - expected.logp_PGR).mean() < 0.2


# ------------------------------------------------------------------------------------------------ on a mesh


@pytest.mark.parametrize(
    "data, model, scan, pages", [(1, 8, False, False), (2, 4, True, False), (8, 1, False, False), (4, 2, True, True)]
)
def test_the_mesh_changes_nothing(data, model, scan, pages, request):
    context, rows, draw = batch()
    # Eight problems, so that eight devices have one each; the second four are the first under other names.
    twice = jax.tree.map(lambda x: np.concatenate([x, x]) if x.ndim else x, (context, rows, draw))
    twice[2].problem_P[P:] += 100
    expected = rollouts(*twice)
    assert_same(take(expected, slice(0, P)), unending())

    if pages:
        request.getfixturevalue("small_pages")
    how, over = execution(scan), mesh.make_mesh(config.Mesh(data, model))
    params = random_params(QWEN3, how)
    params = jax.device_put(params, mesh.shard_parameters(params, QWEN3, how, over))
    out = run(params, *hosts.put_rows(over, twice, 2 * P), how=how, place=(Paged if pages else Placement)(over))
    assert len(jnp.asarray(out.tokens_PGR).sharding.device_set) == 8
    whole = jax.device_put(out, mesh.rows_sharding(over))
    assert_same(hosts.fetch_rows(whole), expected)


def test_rows_that_are_not_live_stay_empty_and_disturb_nobody():
    context, rows, draw = batch()
    live = np.arange(P * G).reshape(P, G) % 3 != 0
    budget_PG = np.where(live, R, 0).astype(np.int32)
    some, all_ = rollouts(context, rows, draw.replace(budget_PG=budget_PG)), rollouts(context, rows, draw)
    assert not some.mask_PGR[~live].any() and (some.tokens_PGR[~live] == PAD).all() and not some.logp_PGR[~live].any()
    np.testing.assert_array_equal(some.tokens_PGR[live], all_.tokens_PGR[live])
    nobody = rollouts(context, rows, draw.replace(budget_PG=np.zeros((P, G), np.int32)))
    assert not nobody.mask_PGR.any()
