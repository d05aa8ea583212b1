"""Rows decoded from pages are the rows of the dense cache, whatever pages their contexts fill; int8 stays near.

The TPU's kernel does not run here.  What it is handed goes through JAX's own checks and its own reference (once), and
through a numpy reference within programs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel

from exprl_jax import config, hosts, mesh
from exprl_jax.mesh import ONE_DEVICE, Placement
from exprl_jax.model import page_attention, paged
from exprl_jax.model.attention import attend
from exprl_jax.model.cache import KV
from exprl_jax.model.decoder import Transformer, logits
from exprl_jax.records import Context, Prefix, Rows
from tests.oracles import pages_numpy
from tests.oracles.tiny_decoder import QWEN3, TpuWay, make_execution, random_params

PAGE, P, G, C, T, V = 4, 4, 2, 10, 9, QWEN3.vocab_size
# Of a context shorter than a page, of exactly one, of more than two, of none.
LENGTH_P = np.array([3, 4, 9, 0], np.int32)
START_PG = np.array([[0, 5], [2, 6], [4, 7], [1, 3]], np.int32)
# Chunks in which some rows have not begun, begin, or have; then token by token.
CHUNKS = (3, 3, 1, 1, 1)
REAL_PGT = np.arange(T) >= START_PG[..., None]
RANDOM = np.random.default_rng(20)
CONTEXT = Context(RANDOM.integers(0, V, (P, C), dtype=np.int32), LENGTH_P)
ROWS = Rows(RANDOM.integers(0, V, (P, G, T), dtype=np.int32), START_PG)


@pytest.fixture(autouse=True)
def small_pages(monkeypatch):
    monkeypatch.setattr(paged, "PAGE", PAGE)


@pytest.fixture
def pages_everywhere(monkeypatch):
    monkeypatch.setattr(paged, "is_paged", lambda execution, placement: True)


# ------------------------------------------------------------------------------------------------ attention alone

H, K, E, LAYERS = QWEN3.heads, QWEN3.kv_heads, QWEN3.head_size, QWEN3.layers


@functools.cache
def layers():
    """(q, k, v) of all rows' tokens, and the contexts' keys and values, of each layer."""
    random = np.random.default_rng(21)

    def draw(*shape):
        return jnp.asarray(1.5 * random.standard_normal(shape).astype(np.float32))

    rows = [(draw(P, G, T, H, E), draw(P, G, T, K, E), draw(P, G, T, K, E)) for _ in range(LAYERS)]
    return rows, tuple(KV(draw(P, K, C, E), draw(P, K, C, E)) for _ in range(LAYERS))


def through_pages(placement, execution, chunks=CHUNKS, jitted=True, of=tuple(range(LAYERS))):
    """[layer, P, G, T, H, E] of some layers, and the cache."""
    rows, contexts = layers()
    step = functools.partial(page_attention.attend_pages, execution=execution, placement=placement)
    step = jax.jit(step) if jitted else step
    cache, out, slot = (
        paged.open_pages(QWEN3, execution, placement, Prefix(contexts, LENGTH_P), jnp.asarray(START_PG), T),
        [],
        0,
    )
    for n in chunks:
        part = []
        for layer in of:
            a, cache = step(*(x[:, :, slot : slot + n] for x in rows[layer]), cache=cache, layer=layer, slot=slot)
            part.append(a)
        out.append(np.stack(part))
        slot += n
    return np.concatenate(out, axis=3), cache


@functools.cache
def dense():
    """The same on contexts and slots."""
    rows, contexts = layers()

    def one(q, k, v, context):
        own = KV(jnp.swapaxes(k, 2, 3), jnp.swapaxes(v, 2, 3))
        return attend(q, context, jnp.asarray(LENGTH_P), own, jnp.asarray(START_PG), 0)

    return np.stack([jax.jit(one)(*qkv, context) for qkv, context in zip(rows, contexts)])


@pytest.mark.parametrize("chunks", [CHUNKS, (T,), (1,) * T])
def test_pages_attend_as_slots_do(chunks):
    got, _ = through_pages(ONE_DEVICE, make_execution(), chunks)
    np.testing.assert_allclose(got[:, REAL_PGT], dense()[:, REAL_PGT], atol=1e-5)
    assert np.isfinite(got).all()


def test_a_context_is_kept_once_and_never_written_again():
    _, contexts = layers()
    _, cache = through_pages(ONE_DEVICE, make_execution())
    shared, own = C // PAGE, -(-(PAGE - 1 + T) // PAGE)
    a_layer = P * (shared + G * own)
    assert cache.pool.shape == (LAYERS * a_layer, PAGE, 2 * K, E) and cache.pool.dtype == jnp.float32
    table = np.asarray(cache.pages.table_PGn)
    for p, length in enumerate(LENGTH_P):
        full = length // PAGE
        assert (table[p, :, :full] == table[p, :1, :full]).all()
        for layer, context in enumerate(contexts):
            lying = np.asarray(cache.pool)[table[p, 0, :full] + layer * a_layer].reshape(-1, K, 2, E)
            np.testing.assert_array_equal(lying[:, :, 0], np.swapaxes(context.k[p], 0, 1)[: full * PAGE])
            np.testing.assert_array_equal(lying[:, :, 1], np.swapaxes(context.v[p], 0, 1)[: full * PAGE])
    # What a row can write into, nobody else reads.
    rows = table.reshape(P * G, -1)
    for i, (row, length) in enumerate(zip(rows, np.repeat(LENGTH_P, G))):
        mine = set(row[length // PAGE :].tolist())
        assert not mine & set(np.delete(rows, i, axis=0).ravel().tolist())


def test_what_the_tpus_kernel_is_handed_obeys_its_contract(monkeypatch):
    """JAX's checks of the kernel's arguments, and its reference in the kernel's place, which like it leaves what nobody
    asked for undefined.  Our own reference is that one."""
    calls = []

    def checked(q, *arrays, num_kv_pages_per_block, num_queries_per_block, **scales):
        blocks = dict(num_kv_pages_per_block=num_kv_pages_per_block, num_queries_per_block=num_queries_per_block)
        kernel.dynamic_validate_inputs(q, *arrays, **scales, **blocks)
        out = kernel.ref_ragged_paged_attention(q, *arrays, **scales)
        out = jnp.pad(out, ((0, len(q) - len(out)), (0, 0), (0, 0)), constant_values=jnp.nan)
        expected = pages_numpy.ragged_attention(*map(np.asarray, (q, *arrays)), **scales)
        np.testing.assert_allclose(out, expected, atol=1e-5, rtol=1e-5)
        calls.append(np.diff(arrays[3]).tolist())
        return out

    monkeypatch.setattr(page_attention, "ragged_paged_attention", checked)
    got, cache = through_pages(TpuWay(None), make_execution(), (6, 1), jitted=False, of=(1,))
    real = REAL_PGT[:, :, :7]
    np.testing.assert_allclose(got[0][real], dense()[1, :, :, :7][real], atol=1e-5)
    # A query of every row, also of those that have not begun; as many as it has of those that have.
    assert calls == [[6, 1, 4, 1, 2, 1, 5, 3], [1] * 8]
    assert cache.pool.shape[3] == 128  # a TPU's lanes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_the_tpus_kernel_has_tiles_for_the_padded_heads(dtype):
    for heads in range(1, 33):
        padded = paged._tiled(heads, jnp.dtype(dtype))
        assert padded >= heads
        for queries in (1, 2, 4, 5, 7):
            kernel.get_min_heads_per_blk(padded * queries, 2 * padded, jnp.bfloat16, jnp.dtype(dtype))
    # Qwen3's 8 key heads, on one device or over two, take no padding but what an int8's tile does.
    assert [paged._tiled(heads, jnp.bfloat16) for heads in (1, 2, 4, 8)] == [1, 2, 4, 8]


# ------------------------------------------------------------------------------------------------ through the decoder


@functools.partial(jax.jit, static_argnames=("execution", "placement", "chunks"))
def decoded(params, context, rows, execution=make_execution(), placement=ONE_DEVICE, chunks=CHUNKS):
    """Hidden states of rows fed in chunks, from whatever cache there is."""
    prefix = Transformer(QWEN3, execution, placement).prefill(params, context)
    cache, hidden, slot = Transformer(QWEN3, execution, placement).open_cache(prefix, rows.start_PG, T, T), [], 0
    assert isinstance(cache, paged.PagedCache)
    for n in chunks:
        tokens = rows.tokens_PGT[:, :, slot : slot + n]
        h, cache = Transformer(QWEN3, execution, placement).continue_rows(
            params, prefix, cache, tokens, rows.start_PG, slot
        )
        hidden.append(h)
        slot += n
    return jnp.concatenate(hidden, axis=2)


@jax.jit
def undecoded(params, context, rows):
    execution = make_execution()
    return Transformer(QWEN3, execution).hidden_states(
        params, Transformer(QWEN3, execution).prefill(params, context), rows
    )


@functools.cache
def at_once():
    return np.asarray(undecoded(random_params(QWEN3, make_execution()), CONTEXT, ROWS))


@pytest.mark.parametrize("scan", [False, True])
def test_decoding_from_pages_is_the_forward_at_once(scan, pages_everywhere):
    execution = make_execution(scan)
    got = np.asarray(decoded(random_params(QWEN3, execution), CONTEXT, ROWS, execution))
    np.testing.assert_allclose(got[REAL_PGT], at_once()[REAL_PGT], atol=1e-5)


def test_no_row_depends_on_another(pages_everywhere):
    params = random_params(QWEN3, make_execution())
    before = np.asarray(decoded(params, CONTEXT, ROWS))
    for p, g in np.ndindex(P, G):
        tokens = ROWS.tokens_PGT.copy()
        tokens[p, g] = (tokens[p, g] + 1) % V
        after = np.asarray(decoded(params, CONTEXT, Rows(tokens, START_PG)))
        others = REAL_PGT.copy()
        others[p, g] = False
        np.testing.assert_array_equal(after[others], before[others])
        assert (after[p, g] != before[p, g])[REAL_PGT[p, g]].any(-1).all()


@pytest.mark.parametrize("kv_dtype, data, model", [("compute", 4, 2), ("compute", 2, 4), ("int8", 4, 2)])
def test_sharded_is_unsharded(kv_dtype, data, model, pages_everywhere):
    """Pages of a device are of its problems and heads; 2 key heads do not divide over 4."""
    execution, over = make_execution(True, kv_dtype=kv_dtype), mesh.make_mesh(config.Mesh(data, model))
    params = random_params(QWEN3, execution)
    placed = jax.device_put(params, mesh.shard_parameters(params, QWEN3, execution, over))
    got = decoded(placed, *hosts.put_rows(over, (CONTEXT, ROWS), P), execution, Placement(over))
    expected = at_once() if kv_dtype == "compute" else np.asarray(decoded(params, CONTEXT, ROWS, execution))
    np.testing.assert_allclose(np.asarray(got)[REAL_PGT], expected[REAL_PGT], atol=1e-5)


@pytest.mark.parametrize("kv_dtype", ["compute", "int8"])
def test_the_tpus_way_through_the_decoder(kv_dtype, monkeypatch):
    """Splash for the contexts, pages and a stand-in of the kernel for the rows."""
    monkeypatch.setattr(page_attention, "ragged_paged_attention", pages_numpy.called_back)
    execution = make_execution(kv_dtype=kv_dtype)
    params = random_params(QWEN3, execution)
    got = np.asarray(decoded(params, CONTEXT, ROWS, execution, TpuWay(None)))
    expected = at_once() if kv_dtype == "compute" else np.asarray(decoded(params, CONTEXT, ROWS, execution))
    np.testing.assert_allclose(got[REAL_PGT], expected[REAL_PGT], atol=1e-5)


# ------------------------------------------------------------------------------------------------ int8

INT8_ATTENTION_MEAN, INT8_ATTENTION_MAX = 0.02, 0.3
INT8_LOGP_MEAN, INT8_LOGP_MAX = 0.04, 0.8


def test_int8_saturates_and_does_not_wrap():
    """Keys and values far beyond their context's are ± the largest int8, on their own side."""
    execution, scale = make_execution(kv_dtype="int8"), jnp.full((1, 1), 0.5)
    k = jnp.array([[[1000.0, -1000.0, 63.5, -64.5, 0.3, -0.2, 0.0, 1.2]]])
    kept = np.asarray(paged.combine(k, -k, scale, scale, execution, ONE_DEVICE))
    assert kept.dtype == np.int8
    assert kept[0, 0].tolist() == [127, -127, 127, -127, 1, 0, 0, 2]
    np.testing.assert_array_equal(kept[0, 1], -kept[0, 0])


def test_int8_scales_are_of_real_tokens_and_of_pairs_that_rotate():
    execution, (_, contexts) = make_execution(kv_dtype="int8"), layers()
    loud = tuple(
        jax.tree.map(lambda x: jnp.where(jnp.arange(C)[:, None] < LENGTH_P[:, None, None, None], x, 1e4), kv)
        for kv in contexts
    )
    caches = [
        paged.open_pages(QWEN3, execution, ONE_DEVICE, Prefix(each, LENGTH_P), jnp.asarray(START_PG), T)
        for each in (contexts, loud)
    ]
    for name in ("k_scale", "v_scale"):
        quiet, padded = (np.asarray(getattr(cache, name)) for cache in caches)
        np.testing.assert_array_equal(quiet, padded)
        assert quiet.shape == (LAYERS, P, K, E) and (quiet > 0).all()
    k_scale = np.asarray(caches[0].k_scale)
    np.testing.assert_array_equal(k_scale[..., : E // 2], k_scale[..., E // 2 :])  # a rotation mixes the two
    assert (np.asarray(contexts[0].v)[2, :, : LENGTH_P[2]] <= 127 * np.asarray(caches[0].v_scale)[0, 2][:, None]).all()


def test_int8_attention_is_near():
    """Errors of a hundredth of values of deviation 1.5: half a step of 127 in key and value."""
    got, cache = through_pages(ONE_DEVICE, make_execution(kv_dtype="int8"))
    assert cache.pool.dtype == jnp.int8
    # Contexts of 3 tokens or none say little about what follows them.
    error = np.abs(got - dense())[:, 2][:, REAL_PGT[2]]
    assert 1e-4 < error.mean() < INT8_ATTENTION_MEAN and error.max() < INT8_ATTENTION_MAX, (error.mean(), error.max())


@functools.partial(jax.jit, static_argnames=("execution", "chunks"))
def next_logp(params, context, rows, execution, chunks):
    """log-probs [P, G, T, V] of the next token, decoded."""
    prefix = Transformer(QWEN3, execution).prefill(params, context)
    cache, out, slot = (
        Transformer(QWEN3, execution).open_cache(prefix, rows.start_PG, *[rows.tokens_PGT.shape[2]] * 2),
        [],
        0,
    )
    for n in chunks:
        tokens = rows.tokens_PGT[:, :, slot : slot + n]
        hidden, cache = Transformer(QWEN3, execution).continue_rows(params, prefix, cache, tokens, rows.start_PG, slot)
        out.append(logits(hidden, Transformer(QWEN3, execution).unembedding(params)))
        slot += n
    return jax.nn.log_softmax(jnp.concatenate(out, axis=2))


@functools.cache
def int8_error(context_tokens):
    """|log-prob − log-prob with float32 keys and values| of the tokens that follow, [P, G, T]."""
    random, tokens = np.random.default_rng(22), 20
    context = Context(random.integers(0, V, (8, context_tokens), dtype=np.int32), np.full(8, context_tokens, np.int32))
    rows = Rows(random.integers(0, V, (8, 2, tokens), dtype=np.int32), np.zeros((8, 2), np.int32))
    params, chunks = random_params(QWEN3, make_execution()), (19, 1)
    exact, rough = (
        np.asarray(next_logp(params, context, rows, make_execution(kv_dtype=kv), chunks)) for kv in ("compute", "int8")
    )
    target = rows.tokens_PGT[:, :, 1:, None]
    return np.abs(np.take_along_axis((rough - exact)[:, :, :-1], target, -1))


def test_int8_log_probs_are_near():
    error = int8_error(32)
    assert 1e-5 < error.mean() < INT8_LOGP_MEAN and error.max() < INT8_LOGP_MAX, (error.mean(), error.max())
