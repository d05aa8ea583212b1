"""The decoder's ways to compute one thing: shared context, cache, scan, remat and padding change nothing.

`forward_logits` is the reference here; test_families holds it to transformers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from exprl_jax.mesh import Placement
from exprl_jax.model.cache import empty_cache
from exprl_jax.model.decoder import Transformer, logits
from exprl_jax.records import Context, Packed, Rows
from tests.oracles.tiny_decoder import QWEN3, TpuWay, architecture, forward_logits, make_execution, random_params

P, G, C, T, V = 2, 3, 5, 4, QWEN3.vocab_size
RANDOM = np.random.default_rng(5)
CONTEXT = Context(RANDOM.integers(0, V, (P, C), dtype=np.int32), np.array([3, 5], np.int32))
ROWS = Rows(RANDOM.integers(0, V, (P, G, T), dtype=np.int32), np.array([[0, 2, 3], [1, 0, 0]], np.int32))
LAYOUTS = [("llama", False), ("qwen2", True), ("qwen3", False), ("qwen3", True)]


@functools.partial(jax.jit, static_argnums=(1, 2))
def shared_logits(params, arch, execution, context, rows):
    """[P, G, T, V] through one prefill a problem."""
    hidden = Transformer(arch, execution).hidden_states(
        params, Transformer(arch, execution).prefill(params, context), rows
    )
    return logits(hidden, Transformer(arch, execution).unembedding(params))


@functools.partial(jax.jit, static_argnums=(1, 2))
def plain_logits(params, arch, execution, tokens_BT):
    return forward_logits(params, arch, execution, tokens_BT)


def concatenated(context, rows):
    """Each row's whole sequence, right-padded (harmless to a causal forward), and where its own tokens begin."""
    count, first = rows.tokens_PGT.shape[:2], []
    whole = np.zeros((*count, context.tokens_PC.shape[1] + rows.tokens_PGT.shape[2]), np.int32)
    for p, g in np.ndindex(count):
        sequence = [*context.tokens_PC[p, : context.length_P[p]], *rows.tokens_PGT[p, g, rows.start_PG[p, g] :]]
        whole[p, g, : len(sequence)] = sequence
        first.append(context.length_P[p])
    return whole.reshape(-1, whole.shape[-1]), np.array(first).reshape(count)


def assert_real_equal(got_PGTX, expected_BTX, rows, first_PG, atol=2e-5):
    """Compares a layout of contexts and rows with whole sequences, where rows are not padding."""
    got, expected = np.asarray(got_PGTX), np.asarray(expected_BTX).reshape(*first_PG.shape, *expected_BTX.shape[1:])
    assert np.isfinite(got).all()
    for p, g in np.ndindex(first_PG.shape):
        start, first = rows.start_PG[p, g], first_PG[p, g]
        own = got[p, g, start:]
        np.testing.assert_allclose(own, expected[p, g, first : first + len(own)], atol=atol)


@pytest.mark.parametrize("family, scan", LAYOUTS)
def test_context_and_rows_are_the_plain_forward_of_their_concatenation(family, scan):
    arch, execution = architecture(family), make_execution(scan)
    params = random_params(arch, execution)
    sequences, first = concatenated(CONTEXT, ROWS)
    expected = plain_logits(params, arch, execution, sequences)
    assert 1 < expected.std() < 5
    assert_real_equal(shared_logits(params, arch, execution, CONTEXT, ROWS), expected, ROWS, first)


@pytest.mark.parametrize("family, scan", [("qwen2", True), ("qwen3", False)])
def test_token_by_token_through_a_cache_is_the_forward_at_once(family, scan):
    arch, execution = architecture(family), make_execution(scan)
    params = random_params(arch, execution)
    transformer = Transformer(arch, execution)
    prefix = jax.jit(transformer.prefill)(params, CONTEXT)
    whole = jax.jit(transformer.hidden_states)(params, prefix, ROWS)
    step = jax.jit(transformer.continue_rows)
    cache, hidden = empty_cache(arch, execution, P, G, T + 2), []
    for t in range(T):
        out, cache = step(params, prefix, cache, ROWS.tokens_PGT[..., t : t + 1], ROWS.start_PG, t)
        hidden.append(out)
    real = np.arange(T) >= ROWS.start_PG[..., None]
    np.testing.assert_allclose(np.concatenate(hidden, 2)[real], np.asarray(whole)[real], atol=2e-5)


@functools.cache
def value_and_gradient(scan, remat, separate=False):
    """Of a smooth function of all real hidden states, in the unrolled layout; `separate` repeats contexts by row."""
    arch, execution = QWEN3, make_execution(scan, remat)
    context, rows = CONTEXT, ROWS
    if separate:
        context = jax.tree.map(lambda x: np.repeat(x, G, axis=0), context)
        rows = jax.tree.map(lambda x: x.reshape(P * G, 1, *x.shape[2:]), rows)
    context, rows = jax.tree.map(jnp.asarray, (context, rows))
    weight = np.random.default_rng(6).standard_normal((P, G, T, arch.width)).astype(np.float32)
    weight *= (np.arange(T) >= ROWS.start_PG[..., None])[..., None]

    def objective(params):
        hidden = Transformer(arch, execution).hidden_states(
            params, Transformer(arch, execution).prefill(params, context), rows
        )
        return (weight * jnp.sin(hidden.reshape(weight.shape))).sum()

    value, gradient = jax.jit(jax.value_and_grad(objective))(random_params(arch, execution))
    if scan:
        stacked = gradient.pop("layers")
        gradient |= {f"layer_{i}": jax.tree.map(lambda x: x[i], stacked) for i in range(arch.layers)}
    return value, gradient


@pytest.mark.parametrize(
    "other", [(False, "full"), (True, "full"), (False, "but_attention"), (True, "but_attention"), (False, "none", True)]
)
def test_scan_remat_and_a_context_a_row_give_the_same_value_and_gradient(other):
    value, gradient = value_and_gradient(False, "none")
    other_value, other_gradient = value_and_gradient(*other)
    np.testing.assert_allclose(other_value, value, rtol=1e-5)
    gradient.pop("unembed", None), other_gradient.pop("unembed", None)  # not part of the hidden states
    for path, g in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.abs(g).max() > 1e-3, path
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max()), other_gradient, gradient)


def test_padding_width_changes_nothing():
    params, execution = random_params(QWEN3, make_execution()), make_execution()
    narrow = np.asarray(shared_logits(params, QWEN3, execution, CONTEXT, ROWS))
    garbage = np.random.default_rng(7).integers(0, V, (P, G, 3), dtype=np.int32)
    context = Context(np.concatenate([CONTEXT.tokens_PC, garbage[:, 0]], 1), CONTEXT.length_P)
    rows = Rows(np.concatenate([garbage, ROWS.tokens_PGT], 2), ROWS.start_PG + 3)
    wide = np.asarray(shared_logits(params, QWEN3, execution, context, rows))[:, :, 3:]
    real = np.arange(T) >= ROWS.start_PG[..., None]
    np.testing.assert_allclose(wide[real], narrow[real], atol=2e-5)


@pytest.mark.parametrize("scan, remat", [(False, "none"), (True, "but_attention")])
def test_on_splash_contexts_and_rows_are_the_same(scan, remat):
    execution = make_execution(scan, remat)
    params = random_params(QWEN3, execution)
    expected = shared_logits(params, QWEN3, execution, CONTEXT, ROWS)
    got = jax.jit(splash_logits, static_argnums=(1, 2))(params, QWEN3, execution, CONTEXT, ROWS)
    real = np.arange(T) >= ROWS.start_PG[..., None]
    np.testing.assert_allclose(np.asarray(got)[real], np.asarray(expected)[real], atol=2e-5)


def splash_logits(params, arch, execution, context, rows):
    placement = TpuWay(None)
    hidden = Transformer(arch, execution, placement).hidden_states(
        params, Transformer(arch, execution, placement).prefill(params, context), rows
    )
    return logits(hidden, Transformer(arch, execution).unembedding(params))


@pytest.mark.parametrize(
    "way, line, lines",
    [(Placement, "named 'attention'", 2), (TpuWay, "output of jitted function '_splash_attention'", 2)],
)
def test_what_rematerialisation_keeps(way, line, lines, capsys):
    """`but_attention` keeps a layer's result of attention and the log of its normaliser, of blocks and of splash, which
    then do not run again; `full` keeps neither."""
    ones = jnp.ones((1, 16), jnp.int32)
    packed = Packed(ones, ones, ones, ones, ones)

    def named(remat):
        execution = make_execution(remat=remat)
        transformer, params = Transformer(QWEN3, execution, way(None)), random_params(QWEN3, execution)
        jax.ad_checkpoint.print_saved_residuals(
            lambda params: transformer.packed_hidden_states(params, packed).sum(), params
        )
        return capsys.readouterr().out.count(line)

    assert named("full") == 0 and named("but_attention") == lines * QWEN3.layers


def test_scanned_layers_are_the_unrolled_ones():
    arch, tokens = architecture("qwen2"), CONTEXT.tokens_PC
    scanned, unrolled = (
        plain_logits(random_params(arch, h), arch, h, tokens) for h in (make_execution(True), make_execution())
    )
    np.testing.assert_allclose(scanned, unrolled, atol=2e-5)


@pytest.mark.parametrize("slots", [0, C])
def test_context_of_no_tokens(slots):
    params, execution = random_params(QWEN3, make_execution()), make_execution()
    context = Context(CONTEXT.tokens_PC[:, :slots], np.zeros(P, np.int32))
    sequences, first = concatenated(context, ROWS)
    expected = plain_logits(params, QWEN3, execution, sequences)
    assert_real_equal(shared_logits(params, QWEN3, execution, context, ROWS), expected, ROWS, first)


@pytest.mark.parametrize("scan", [False, True])
def test_bfloat16_stays_near_float32(scan):
    rough, exact = make_execution(scan, dtype="bfloat16"), make_execution(scan)
    params = random_params(QWEN3, exact)
    got = shared_logits(params, QWEN3, rough, CONTEXT, ROWS)
    expected = shared_logits(params, QWEN3, exact, CONTEXT, ROWS)
    real = np.arange(T) >= ROWS.start_PG[..., None]
    error = np.abs(np.asarray(got) - np.asarray(expected))[real]
    assert got.dtype == jnp.float32 and 1e-4 < error.mean() < 0.1


@pytest.mark.parametrize("family, scan", [("qwen2", False), ("qwen3", True)])
def test_kernels_cast_early_give_the_same_bits(family, scan):
    arch, execution = architecture(family), make_execution(scan, dtype="bfloat16")
    params = random_params(arch, execution)
    early = Transformer(arch, execution).cast_kernels(params)
    assert {x.dtype for x in jax.tree.leaves(early)} == {jnp.dtype("float32"), jnp.dtype("bfloat16")}
    np.testing.assert_array_equal(
        shared_logits(early, arch, execution, CONTEXT, ROWS), shared_logits(params, arch, execution, CONTEXT, ROWS)
    )
