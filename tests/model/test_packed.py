"""Packed rows: every example as if it stood alone, in values and gradients; the same as in transformers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import Mesh

from exprl_jax.mesh import constrain_rows, put_rows
from exprl_jax.model import attention, weights
from exprl_jax.model.cache import empty_context
from exprl_jax.model.decoder import (
    abstract_params, hidden_states, logits, packed_hidden_states, segment_starts, unembedding,
)  # fmt: skip
from exprl_jax.model.sources import resolve_model
from exprl_jax.records import Packed, Prefix, Rows
from tests.oracles import torch_models
from tests.oracles.tiny_decoder import QWEN3, architecture, execution, random_params

# A row that is full, one with padding and an example of one token, one that is empty, one that holds one example.
LENGTHS = [[7, 4, 9], [5, 1, 6], [], [8]]
T = 20
WAYS = [("llama", False, False, 3), ("qwen2", True, False, 512), ("qwen3", False, True, 512), ("qwen3", True, True, 6)]


def packed(vocabulary=QWEN3.vocab_size):
    tokens = np.random.default_rng(0).integers(0, vocabulary, (len(LENGTHS), T), dtype=np.int32)
    segment = np.array([np.repeat([*range(1, len(row) + 1), 0], [*row, T - sum(row)]) for row in LENGTHS], np.int32)
    return Packed(tokens, segment, segment > 0)


def examples():
    """(row, slots) of each."""
    return [(b, slice(sum(row[:i]), sum(row[: i + 1]))) for b, row in enumerate(LENGTHS) for i in range(len(row))]


@functools.partial(jax.jit, static_argnums=(1, 2, 4))
def forward(params, arch, how, rows, chunk=512):
    """Hidden states; `chunk` is what QUERY_CHUNK is, so that another one is another program."""
    assert chunk == attention.QUERY_CHUNK
    return packed_hidden_states(params, arch, how, rows)


@functools.partial(jax.jit, static_argnums=(1, 2))
def plain(params, arch, how, rows):
    """Hidden states of whole sequences; padding to their right is harmless to a causal forward."""
    B = len(rows)
    nothing = Prefix(empty_context(arch, how, B), jnp.zeros(B, jnp.int32))
    return hidden_states(params, arch, how, nothing, Rows(rows[:, None], jnp.zeros((B, 1), jnp.int32)))[:, 0]


def apart(x_BT):
    """A row for each example, padded with zeros."""
    out = np.zeros((len(examples()), *x_BT.shape[1:]), x_BT.dtype)
    for i, (b, slots) in enumerate(examples()):
        out[i, : slots.stop - slots.start] = x_BT[b, slots]
    return out


def test_starts_are_where_the_segment_id_changes():
    segment = np.array([[1, 1, 2, 3, 3, 0, 0], [1] * 7, [0] * 7])
    expected = [[0, 0, 2, 3, 3, 5, 5], [0] * 7, [0] * 7]
    np.testing.assert_array_equal(segment_starts(jnp.asarray(segment)), expected)


def test_positions_count_from_each_examples_first_token(monkeypatch):
    """Seen at the rotation itself: rotary attention depends on differences of positions, so results hardly tell."""
    params, rows = random_params(QWEN3, execution()), jax.tree.map(jnp.asarray, packed())
    seen, rotate = [], attention.rotate

    def keep(x, positions, frequency):
        seen.append(np.asarray(positions))
        return rotate(x, positions, frequency)

    monkeypatch.setattr(attention, "rotate", keep)
    packed_hidden_states(params, QWEN3, execution(), rows)
    assert len(seen) == 2 * QWEN3.layers
    for positions in seen:
        for b, slots in examples():
            assert positions[b, 0, slots].tolist() == list(range(slots.stop - slots.start))


@pytest.mark.parametrize("family, scan, remat, chunk", WAYS)
def test_each_example_is_as_if_alone(family, scan, remat, chunk, monkeypatch):
    """Hidden states, and the gradient of a smooth function of them."""
    arch, how, rows = architecture(family), execution(scan, remat), packed()
    params = random_params(arch, how)
    weight = np.random.default_rng(1).standard_normal((*rows.mask_BT.shape, arch.width)).astype(np.float32)
    weight *= rows.mask_BT[..., None]
    alone = functools.partial(plain, arch=arch, how=how, rows=apart(rows.tokens_BT))
    expected, expected_gradient = value_and_gradient(alone, params, apart(weight))
    monkeypatch.setattr(attention, "QUERY_CHUNK", chunk)
    together = functools.partial(forward, arch=arch, how=how, rows=rows, chunk=chunk)
    got, gradient = value_and_gradient(together, params, weight)

    assert np.isfinite(got).all()
    real = apart(rows.mask_BT)
    np.testing.assert_allclose(apart(np.asarray(got))[real], np.asarray(expected)[real], atol=1e-5)
    gradient.pop("unembed", None), expected_gradient.pop("unembed", None)  # not part of the hidden states
    paths, leaves = jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(expected_gradient)
    for (path, a), b in zip(paths, leaves, strict=True):
        if path[-1].key != "k_bias":  # a shift of all keys changes no softmax
            assert np.abs(b).max() > 1e-3, path
        np.testing.assert_allclose(a, b, atol=1e-4 * max(1, np.abs(b).max()), err_msg=jax.tree_util.keystr(path))


def value_and_gradient(hidden_fn, params, weight):
    def objective(params):
        hidden = hidden_fn(params)
        return (weight * jnp.sin(hidden)).sum(), hidden

    gradient, hidden = jax.jit(jax.grad(objective, has_aux=True))(params)
    return hidden, gradient


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_token_sees_another_example(dtype):
    how, rows = execution(dtype=dtype), packed()
    params = random_params(QWEN3, how)
    before = np.asarray(forward(params, QWEN3, how, rows))
    for b, slots in examples():
        tokens = rows.tokens_BT.copy()
        tokens[b, slots] = (tokens[b, slots] + 1) % QWEN3.vocab_size
        after = np.asarray(forward(params, QWEN3, how, rows.replace(tokens_BT=tokens)))
        own = np.zeros((len(LENGTHS), T), bool)
        own[b, slots] = True
        assert (after[own] != before[own]).any(-1).all()
        np.testing.assert_array_equal(after[~own], before[~own])


def test_no_token_sees_a_later_one():
    params, rows = random_params(QWEN3, execution()), packed()
    before = np.asarray(forward(params, QWEN3, execution(), rows))
    tokens = rows.tokens_BT.copy()
    tokens[0, 9] = (tokens[0, 9] + 1) % QWEN3.vocab_size  # in the middle of the second example
    after = forward(params, QWEN3, execution(), rows.replace(tokens_BT=tokens))
    changed = (np.asarray(after) != before).any(-1)
    assert changed[0, 9:11].all() and changed.sum() == 2


@pytest.mark.parametrize("name", ["qwen3", "llama_llama3_rope", "qwen2"])
def test_logits_are_those_of_transformers(name, tmp_path):
    """With its own position ids and a mask written out from the segments."""
    model, rows = torch_models.tiny_model(name), packed(97)
    source = resolve_model(str(torch_models.save(model, tmp_path)))
    arch, how = weights.read_architecture(source), execution()
    one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: one_device, abstract_params(arch, how, "float32"))
    params = weights.load_params(source, arch, how, "float32", shardings)

    segment, slot = rows.segment_BT, np.arange(T)
    seen = (segment[:, :, None] == segment[:, None]) & (slot[:, None] >= slot)
    positions = np.zeros((len(LENGTHS), T), np.int64)
    for b, slots in examples():
        positions[b, slots] = np.arange(slots.stop - slots.start)
    with torch.no_grad():
        expected = model(
            torch.from_numpy(rows.tokens_BT).long(),
            attention_mask=torch.from_numpy(np.where(seen, 0, -1e30).astype(np.float32))[:, None],
            position_ids=torch.from_numpy(positions),
        ).logits.numpy()
    got = np.asarray(logits(forward(params, arch, how, rows), unembedding(params, arch)))
    assert expected.std() > 0.5
    np.testing.assert_allclose(got[rows.mask_BT], expected[rows.mask_BT], atol=1e-4)


@pytest.mark.parametrize("scan", [False, True])
def test_sharded_is_unsharded(scan):
    how = execution(scan, remat="full")
    params, rows = random_params(QWEN3, how), packed()
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
    run = jax.jit(lambda params, rows: packed_hidden_states(params, QWEN3, how, rows, constrain_rows(mesh)))
    hidden = run(params, put_rows(mesh, rows, len(LENGTHS)))
    assert hidden.sharding.shard_shape(hidden.shape)[0] == 1
    np.testing.assert_allclose(hidden, forward(params, QWEN3, how, rows), atol=1e-5)


def test_bfloat16_stays_near_float32():
    rough, exact = execution(dtype="bfloat16"), execution()
    params, rows = random_params(QWEN3, exact), packed()
    got, expected = forward(params, QWEN3, rough, rows), forward(params, QWEN3, exact, rows)
    error = np.abs(np.asarray(got, np.float32) - expected)[rows.mask_BT]
    assert 1e-4 < error.mean() < 0.1
