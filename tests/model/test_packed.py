"""Packed rows: every sequence as if it stood alone, in values and gradients; the same as in transformers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from exprl_jax import config, hosts, mesh
from exprl_jax.data.packing import Example, fill_branches, fill_rows
from exprl_jax.mesh import ONE_DEVICE, Placement
from exprl_jax.model import blocks
from exprl_jax.model.cache import empty_context
from exprl_jax.model.decoder import Transformer, logits
from exprl_jax.records import Packed, Prefix, Rows
from exprl_jax.weights import folder as weights
from exprl_jax.weights.sources import resolve_model
from tests.oracles import torch_models
from tests.oracles.tiny_decoder import QWEN3, TpuWay, architecture, make_execution, random_params

# A row that is full, one with padding and an example of one token, one that is empty, one that holds one example.
LENGTHS = [[7, 4, 9], [5, 1, 6], [], [8]]
T = 20
WAYS = [
    ("llama", False, "none", blocks.BLOCK),
    ("qwen2", True, "none", 3),
    ("qwen3", False, "full", blocks.BLOCK),
    ("qwen3", True, "full", 8),
    ("qwen3", True, "but_attention", 5),
]


def packed(vocabulary=QWEN3.vocab_size):
    tokens = np.random.default_rng(0).integers(0, vocabulary, (len(LENGTHS), T), dtype=np.int32)
    segment = np.array([np.repeat([*range(1, len(row) + 1), 0], [*row, T - sum(row)]) for row in LENGTHS], np.int32)
    position = np.zeros_like(segment)
    for b, slots in examples():
        position[b, slots] = np.arange(slots.stop - slots.start)
    return Packed(tokens, np.zeros_like(tokens), segment, segment, position)


def examples():
    """(row, slots) of each."""
    return [(b, slice(sum(row[:i]), sum(row[: i + 1]))) for b, row in enumerate(LENGTHS) for i in range(len(row))]


REAL_BT = packed().segment_BT > 0


@functools.partial(jax.jit, static_argnames=("arch", "execution", "block", "placement"))
def forward(params, arch, execution, rows, block=blocks.BLOCK, placement=ONE_DEVICE):
    """Hidden states; `block` is what BLOCK is, so that another one is another program."""
    assert block == blocks.BLOCK
    return Transformer(arch, execution, placement).packed_hidden_states(params, rows)


@functools.partial(jax.jit, static_argnames=("arch", "execution"))
def plain(params, arch, execution, rows):
    """Hidden states of whole sequences; padding to their right is harmless to a causal forward."""
    B = len(rows)
    nothing = Prefix(empty_context(arch, execution, B), jnp.zeros(B, jnp.int32))
    return Transformer(arch, execution).hidden_states(
        params, nothing, Rows(rows[:, None], jnp.zeros((B, 1), jnp.int32))
    )[:, 0]


def apart(x_BT):
    """A row for each example, padded with zeros."""
    out = np.zeros((len(examples()), *x_BT.shape[1:]), x_BT.dtype)
    for i, (b, slots) in enumerate(examples()):
        out[i, : slots.stop - slots.start] = x_BT[b, slots]
    return out


@pytest.mark.parametrize("family, scan, remat, block", WAYS)
def test_each_example_is_as_if_alone(family, scan, remat, block, monkeypatch):
    """Hidden states, and the gradient of a smooth function of them."""
    arch, execution, rows = architecture(family), make_execution(scan, remat), packed()
    params = random_params(arch, execution)
    weight = np.random.default_rng(1).standard_normal((*REAL_BT.shape, arch.width)).astype(np.float32)
    weight *= REAL_BT[..., None]
    alone = functools.partial(plain, arch=arch, execution=execution, rows=apart(rows.tokens_BT))
    expected, expected_gradient = value_and_gradient(alone, params, apart(weight))
    monkeypatch.setattr(blocks, "BLOCK", block)
    together = functools.partial(forward, arch=arch, execution=execution, rows=rows, block=block)
    got, gradient = value_and_gradient(together, params, weight)

    assert np.isfinite(got).all()
    real = apart(REAL_BT)
    np.testing.assert_allclose(apart(np.asarray(got))[real], np.asarray(expected)[real], atol=1e-5)
    assert_gradients_equal(gradient, expected_gradient)


def value_and_gradient(hidden_fn, params, weight):
    def objective(params):
        hidden = hidden_fn(params)
        return (weight * jnp.sin(hidden)).sum(), hidden

    gradient, hidden = jax.jit(jax.grad(objective, has_aux=True))(params)
    return hidden, gradient


def assert_gradients_equal(gradient, expected):
    gradient.pop("unembed", None), expected.pop("unembed", None)  # not part of the hidden states
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(expected), strict=True):
        if path[-1].key != "k_bias":  # a shift of all keys changes no softmax
            assert np.abs(b).max() > 1e-3, path
        np.testing.assert_allclose(a, b, atol=1e-4 * max(1, np.abs(b).max()), err_msg=jax.tree_util.keystr(path))


# ------------------------------------------------------------------------------------------------ as the update packs

# (prompt's tokens, tokens of each response): groups in one row, a prompt of one token, a group over two rows.
GROUPS = [(5, [3, 4, 2]), (1, [3, 2]), (4, [6, 5])]
ROW_N = [0, 0, 0, 1, 1, 1, 2]


def rollouts():
    """(examples, group of each)"""
    random, drawn, group_N = np.random.default_rng(12), [], []
    for g, (prompt, responses) in enumerate(GROUPS):
        shown = random.integers(0, QWEN3.vocab_size, prompt)
        for n in responses:
            drawn.append(Example(shown, random.integers(0, QWEN3.vocab_size, n)))
            group_N.append(g)
    return drawn, group_N


@functools.cache
def of_responses(share, scan=False, remat="none", way=Placement):
    """(hidden state of every response's slots, gradient of a smooth function of those); prompts shared, repeated, or
    (`share` None) an example a row."""
    execution, (drawn, group_N) = make_execution(scan, remat), rollouts()
    if share is None:
        filled = fill_rows(drawn, group_N, np.arange(len(drawn)), (1, len(drawn), 12), False)
    else:
        filled = fill_rows(drawn, group_N, np.array(ROW_N), (1, 3, 24), share)
    rows = jax.tree.map(lambda x: jnp.asarray(x[0]), filled.packed)
    slots = [np.arange(first, first + len(e.response)) for first, e in zip(filled.first_N, drawn)]
    row, slot = np.concatenate([[r] * len(s) for r, s in zip(filled.row_N, slots)]), np.concatenate(slots)
    weight = np.random.default_rng(13).standard_normal((len(slot), QWEN3.width)).astype(np.float32)
    transformer = Transformer(QWEN3, execution, way(None))
    return value_and_gradient(
        lambda params: transformer.packed_hidden_states(params, rows)[row, slot],
        random_params(QWEN3, execution),
        weight,
    )


@pytest.mark.parametrize(
    "share, scan, remat, way",
    [
        (True, True, "full", Placement),
        (True, False, "but_attention", Placement),
        (False, False, "none", Placement),
        (False, True, "but_attention", TpuWay),
    ],
)
def test_prompts_shared_and_repeated_are_a_row_each(share, scan, remat, way):
    (got, gradient), (expected, expected_gradient) = of_responses(share, scan, remat, way), of_responses(None, scan)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert_gradients_equal(dict(gradient), dict(expected_gradient))


def branches():
    """(examples, group of each, tokens that each shares): questions about beginnings of two texts, and one alone."""
    random, drawn, group_N, shared_N = np.random.default_rng(14), [], [], []
    for g, (tokens, cuts) in enumerate([(9, (9, 2, 5, 8)), (6, (3, 6)), (4, (0,))]):
        text, ask = random.integers(0, QWEN3.vocab_size, tokens), random.integers(0, QWEN3.vocab_size, 3)
        for cut in cuts:
            answer = random.integers(0, QWEN3.vocab_size, 2)
            drawn.append(Example(np.concatenate([text[:cut], ask]), answer))
            group_N.append(g)
            shared_N.append(cut)
    return drawn, group_N, shared_N


@pytest.mark.parametrize("scan, remat", [(False, "none"), (True, "full")])
def test_branches_of_a_text_are_a_row_each(scan, remat):
    """Hidden states of the answers' slots, and the gradient of a smooth function of them."""
    (drawn, group_N, shared_N), execution = branches(), make_execution(scan, remat)
    apart = fill_rows(drawn, group_N, np.arange(len(drawn)), (1, len(drawn), 14), False)
    together = fill_branches(drawn, group_N, np.array([0] * 4 + [1] * 3), (1, 2, 32), shared_N)
    results = []
    for filled in (apart, together):
        rows = jax.tree.map(lambda x: jnp.asarray(x[0]), filled.packed)
        row, slot = np.repeat(filled.row_N, 2), (filled.first_N[:, None] + np.arange(2)).reshape(-1)
        weight = np.random.default_rng(15).standard_normal((len(slot), QWEN3.width)).astype(np.float32)
        transformer = Transformer(QWEN3, execution)
        hidden_fn = lambda params: transformer.packed_hidden_states(params, rows)[row, slot]  # noqa: B023, E731
        results.append(value_and_gradient(hidden_fn, random_params(QWEN3, execution), weight))
    (expected, expected_gradient), (got, gradient) = results
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert_gradients_equal(dict(gradient), dict(expected_gradient))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_token_sees_another_example(dtype):
    execution, rows = make_execution(dtype=dtype), packed()
    params = random_params(QWEN3, execution)
    before = np.asarray(forward(params, QWEN3, execution, rows))
    for b, slots in examples():
        tokens = rows.tokens_BT.copy()
        tokens[b, slots] = (tokens[b, slots] + 1) % QWEN3.vocab_size
        after = np.asarray(forward(params, QWEN3, execution, rows.replace(tokens_BT=tokens)))
        own = np.zeros((len(LENGTHS), T), bool)
        own[b, slots] = True
        assert (after[own] != before[own]).any(-1).all()
        np.testing.assert_array_equal(after[~own], before[~own])


def test_no_token_sees_a_later_one():
    params, rows = random_params(QWEN3, make_execution()), packed()
    before = np.asarray(forward(params, QWEN3, make_execution(), rows))
    tokens = rows.tokens_BT.copy()
    tokens[0, 9] = (tokens[0, 9] + 1) % QWEN3.vocab_size  # in the middle of the second example
    after = forward(params, QWEN3, make_execution(), rows.replace(tokens_BT=tokens))
    changed = (np.asarray(after) != before).any(-1)
    assert changed[0, 9:11].all() and changed.sum() == 2


@pytest.mark.parametrize("name", ["qwen3", "llama_llama3_rope", "qwen2"])
def test_logits_are_those_of_transformers(name, tmp_path):
    """With its own position ids and a mask written out from the segments."""
    model, rows = torch_models.tiny_model(name), packed(97)
    source = resolve_model(str(torch_models.save(model, tmp_path)))
    arch, execution = weights.read_architecture(source), make_execution()
    one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: one_device, Transformer(arch, execution).abstract_params("float32"))
    params = weights.load_params(source, arch, execution, "float32", shardings)

    segment, slot = rows.segment_BT, np.arange(T)
    seen = (segment[:, :, None] == segment[:, None]) & (slot[:, None] >= slot)
    with torch.no_grad():
        expected = model(
            torch.from_numpy(rows.tokens_BT).long(),
            attention_mask=torch.from_numpy(np.where(seen, 0, -1e30).astype(np.float32))[:, None],
            position_ids=torch.from_numpy(rows.position_BT).long(),
        ).logits.numpy()
    got = np.asarray(logits(forward(params, arch, execution, rows), Transformer(arch, execution).unembedding(params)))
    assert expected.std() > 0.5
    np.testing.assert_allclose(got[REAL_BT], expected[REAL_BT], atol=1e-4)


@pytest.mark.parametrize(
    "scan, way, data, model", [(False, Placement, 4, 2), (True, Placement, 2, 4), (True, TpuWay, 4, 2)]
)
def test_sharded_is_unsharded(scan, way, data, model):
    execution = make_execution(scan, remat="full")
    params, rows = random_params(QWEN3, execution), packed()
    over = mesh.make_mesh(config.Mesh(data, model))
    placed = jax.device_put(params, mesh.shard_parameters(params, QWEN3, execution, over))
    hidden = forward(placed, QWEN3, execution, hosts.put_rows(over, rows, len(LENGTHS)), placement=way(over))
    assert hidden.sharding.shard_shape(hidden.shape)[0] == len(LENGTHS) // data
    expected = np.asarray(forward(params, QWEN3, execution, rows))
    np.testing.assert_allclose(np.asarray(hidden)[REAL_BT], expected[REAL_BT], atol=1e-5)


def test_bfloat16_stays_near_float32():
    rough, exact = make_execution(dtype="bfloat16"), make_execution()
    params, rows = random_params(QWEN3, exact), packed()
    got, expected = forward(params, QWEN3, rough, rows), forward(params, QWEN3, exact, rows)
    error = np.abs(np.asarray(got, np.float32) - expected)[REAL_BT]
    assert 1e-4 < error.mean() < 0.1
