"""Attention over a context and a row's own past, and within packed rows, against a float64 softmax with a mask written
out by the definition.  The splash kernel is interpreted (`TpuWay`), cuDNN's is XLA behind the same call (`GpuWay`)."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from exprl_jax import config, hosts, mesh
from exprl_jax.mesh import DATA, ONE_DEVICE, Placement
from exprl_jax.model import attention, blocks
from exprl_jax.model.attention import attend, attend_packed, packed_turns, rotate
from exprl_jax.model.cache import KV
from tests.oracles.tiny_decoder import GpuWay, TpuWay

FORWARD, GRADIENT = 1e-5, 1e-4
SPLASH, CUDNN = TpuWay(None), GpuWay(None)

# P, G, T, H, K, E, C, S; contexts' lengths; starts
GROUPED = (2, 3, 7, 4, 2, 6, 5, 9), [3, 5], [[0, 2, 6], [1, 0, 4]]
NO_CONTEXT_TOKENS = (2, 3, 7, 4, 2, 6, 5, 9), [0, 1], [[0, 2, 6], [1, 0, 4]]
NO_CONTEXT_SLOTS = (2, 3, 7, 4, 2, 6, 0, 7), [0, 0], [[0, 2, 6], [1, 0, 4]]
A_HEAD_EACH = (1, 2, 5, 3, 3, 5, 4, 5), [3], [[0, 2]]
ONE_KEY_HEAD = (2, 1, 6, 5, 1, 7, 3, 6), [2, 3], [[5], [0]]


def close(got, expected, tolerance, what):
    """Says the error where it is too large."""
    error = np.abs(np.asarray(got, np.float64) - expected).max(initial=0)
    print(f"{what}: {error:.1e}")  # python -m pytest -rP shows all
    assert error <= tolerance, f"{what}: {error:.2e}"


def softmax_attention(q, k, v, seen):
    """[B, T, H, E] float64; queries that see nothing see everything, for a softmax over nothing is NaN."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    score = torch.einsum("bthe,bshe->bhts", q, k) / q.shape[-1] ** 0.5
    hidden = ~seen & seen.any(-1, keepdim=True)
    return torch.einsum("bhts,bshe->bthe", score.masked_fill(hidden[:, None], -torch.inf).softmax(-1), v)


def with_gradients(function, given, weight):
    """(result, gradients of weight · result) in float64 by torch."""
    given = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in given]
    out = function(*given)
    (out * torch.tensor(weight, dtype=torch.float64)).sum().backward()
    return out.detach().numpy(), [x.grad.numpy() for x in given]


def ours(function, given, weight):
    """The same of a function of ours, in one program."""

    def objective(*given):
        out = function(*given)
        return (weight * out).sum(), out

    gradients, out = jax.jit(jax.grad(objective, argnums=tuple(range(len(given))), has_aux=True))(*given)
    return np.asarray(out), [np.asarray(x) for x in gradients]


def assert_same(got, expected, real):
    (out, gradients), (expected_out, expected_gradients) = got, expected
    assert np.isfinite(out).all()
    close(out[real], expected_out[real], FORWARD, "forward")
    for name, a, b in zip(("q", "k", "v", "own k", "own v"), gradients, expected_gradients, strict=False):
        assert not b.size or np.abs(b).max() > 0.1
        close(a, b, GRADIENT, f"gradient of {name}")


# ------------------------------------------------------------------------------------------------ rows on a context


def arrays(sizes, seed=0):
    P, G, T, H, K, E, C, S = sizes
    random = np.random.default_rng(seed)
    shapes = [(P, G, T, H, E), (P, K, C, E), (P, K, C, E), (P, G, K, S, E), (P, G, K, S, E)]
    return [1.5 * random.standard_normal(shape).astype(np.float32) for shape in shapes]


def seen_by(sizes, length, start, slot):
    """[P, G, T, C + S]"""
    P, G, T, *_, C, S = sizes
    seen = np.zeros((P, G, T, C + S), bool)
    for p, g, t in np.ndindex(P, G, T):
        if slot + t >= start[p][g]:
            seen[p, g, t, : length[p]] = True
            seen[p, g, t, C + start[p][g] : C + slot + t + 1] = True
    return seen


def attend_by_definition(q, ck, cv, k, v, seen):
    P, G, T, H, E = q.shape
    keys, values = (
        torch.cat([x[:, None].expand(-1, G, -1, -1, -1), y], dim=3).flatten(0, 1).transpose(1, 2)
        for x, y in ((ck, k), (cv, v))
    )
    return softmax_attention(q.flatten(0, 1), keys, values, torch.tensor(seen).flatten(0, 1)).reshape(P, G, T, H, E)


def rows_of(case, slot, placement):
    """(function of the five arrays, the arrays, weights, expected, mask of the queries that are not padding)."""
    sizes, length, start = case
    given, seen = arrays(sizes), seen_by(*case, slot)
    real = seen.any(-1)
    weight = np.random.default_rng(1).standard_normal(given[0].shape).astype(np.float32) * real[..., None, None]
    expected = with_gradients(functools.partial(attend_by_definition, seen=seen), given, weight)

    def function(q, ck, cv, k, v):
        return attend(q, KV(ck, cv), jnp.asarray(length), KV(k, v), jnp.asarray(start), slot, placement)

    return function, given, weight, expected, real


def cut_queries(monkeypatch, sizes, chunk):
    """Has queries cut into chunks of so many."""
    P, G, T, H, K, E, C, S = sizes
    monkeypatch.setattr(attention, "SCORES", chunk * P * G * H * (C + S))


@pytest.mark.parametrize(
    "case, slot, chunk",
    [
        (GROUPED, 0, 7),
        (GROUPED, 2, 7),
        (GROUPED, 2, 3),
        (GROUPED, 0, 1),
        (NO_CONTEXT_TOKENS, 0, 7),
        (NO_CONTEXT_TOKENS, 2, 6),
        (NO_CONTEXT_SLOTS, 0, 4),
        (A_HEAD_EACH, 0, 5),
        (A_HEAD_EACH, 0, 2),
        (ONE_KEY_HEAD, 0, 4),
    ],
)
def test_rows_attend_by_definition(case, slot, chunk, monkeypatch):
    cut_queries(monkeypatch, case[0], chunk)
    function, given, weight, expected, real = rows_of(case, slot, ONE_DEVICE)
    assert_same(ours(function, given, weight), expected, real)
    assert ("scan" in str(jax.make_jaxpr(function)(*given))) == (chunk < case[0][2])


@pytest.mark.parametrize("chunk", [7, 3])
def test_padding_queries_have_finite_gradients(chunk, monkeypatch):
    """Nothing may become NaN where slots see only themselves: a model's padding has a gradient of 0 · that."""
    cut_queries(monkeypatch, NO_CONTEXT_TOKENS[0], chunk)
    function, given, _, _, real = rows_of(NO_CONTEXT_TOKENS, 0, ONE_DEVICE)
    assert not real.all()
    out, gradients = ours(function, given, np.ones_like(given[0]))
    assert all(np.isfinite(x).all() for x in (out, *gradients))


# Tokens no multiple of the kernel's blocks, one block and several; keys in front of the first; E = 64 and less.
SPLASH_ROWS = [
    ((2, 2, 7, 4, 2, 64, 5, 7), [3, 5], [[0, 2], [6, 0]]),
    ((2, 1, 130, 2, 2, 64, 150, 130), [150, 3], [[0], [121]]),
    ((1, 2, 300, 2, 1, 128, 40, 300), [33], [[0, 199]]),
    ((2, 1, 128, 2, 1, 6, 0, 128), [0, 0], [[0], [5]]),
]


@pytest.mark.parametrize("case", SPLASH_ROWS)
def test_rows_on_splash_attend_by_definition(case, monkeypatch):
    monkeypatch.setattr(attention, "_BLOCK", 128)
    function, given, weight, expected, real = rows_of(case, 0, SPLASH)
    assert_same(ours(function, given, weight), expected, real)


@pytest.mark.parametrize("slots, chunk", [(7, 7), (7, 3), (9, 7)])
def test_rows_on_cudnn_attend_by_definition(slots, chunk, monkeypatch):
    """Without a context and a past they are packed rows of one segment; with slots behind their own they are not."""
    sizes, length, start = NO_CONTEXT_SLOTS
    P, G, T, *heads, C, _ = sizes
    monkeypatch.setattr(attention, "SCORES", chunk * P * G * slots)
    function, given, weight, expected, real = rows_of(((P, G, T, *heads, C, slots), length, start), 0, CUDNN)
    assert_same(ours(function, given, weight), expected, real)
    packed = f"name={attention.KEPT}" in str(jax.make_jaxpr(function)(*given))
    assert packed == (slots == T)


@pytest.mark.parametrize("placement", [ONE_DEVICE, SPLASH])
def test_what_no_real_query_may_see_has_no_influence(placement):
    (P, G, T, H, K, E, C, S), length, start = GROUPED
    S = T if placement.on_tpu else S
    function, given, *_, real = rows_of(((P, G, T, H, K, E, C, S), length, start), 0, placement)
    function, (q, ck, cv, k, v) = jax.jit(function), given
    before = np.asarray(function(*given))
    ck, cv, k, v = ck.copy(), cv.copy(), k.copy(), v.copy()
    for x in (ck, cv):
        x[0, :, length[0] :] = 1e4
    for x in (k, v):
        x[:, :, :, T:] = 1e4  # slots not yet written
        x[0, 2, :, : start[0][2]] = 1e4  # a row's padding
    np.testing.assert_array_equal(np.asarray(function(q, ck, cv, k, v))[real], before[real])


# ------------------------------------------------------------------------------------------------ packed rows


class Cut:
    """Rows cut into segments: (length, id of the segment it sees too or 0, how much of that it sees, if not all) of
    each of a row, the rest padding."""

    def __init__(self, rows, tokens):
        self.segment_BT, self.shared_BT, self.position_BT = np.zeros((3, len(rows), tokens), np.int32)
        self.branches = [[] for _ in rows]
        for b, row in enumerate(rows):
            at = 0
            for number, (length, sees, *some) in enumerate(row, start=1):
                branch = some[0] if some else row[sees - 1][0] if sees else 0
                self.branches[b].append(branch)
                self.segment_BT[b, at : at + length] = number
                self.shared_BT[b, at : at + length] = sees or number
                self.position_BT[b, at : at + length] = branch + np.arange(length)
                at += length

    def seen(self):
        B, T = self.segment_BT.shape
        seen = np.zeros((B, T, T), bool)
        for b, t in np.ndindex(B, T):
            own, shared = self.segment_BT[b, t], self.shared_BT[b, t]
            for s in range(t + 1) if own else ():
                if self.segment_BT[b, s] == own:
                    seen[b, t, s] = True
                elif self.segment_BT[b, s] == shared:
                    first = np.flatnonzero(self.segment_BT[b] == shared)[0]
                    seen[b, t, s] = s - first < self.branches[b][own - 1]
        return seen


SHARED = Cut([[(4, 0), (2, 1), (3, 1)], [(3, 0), (2, 0), (1, 2), (3, 1)], [(9, 0)], []], 11)
# Segments that see all of the first, two of its slots, one, and none of them.
BRANCHES = Cut(
    [[(5, 0), (2, 1), (1, 1, 2), (2, 1, 1)], [(4, 0), (3, 1, 3), (2, 0), (1, 3, 1)], [(6, 0), (2, 1, 5)]], 11
)
APART = Cut([[(4, 0), (2, 0), (5, 0)], [(1, 0), (6, 0)], [(9, 0)], []], 11)
LONG = Cut([[(130, 0), (3, 0), (150, 0)], [(299, 0)]], 300)


def packed_of(cut, heads, key_heads, size, placement):
    (B, T), random = cut.segment_BT.shape, np.random.default_rng(3)
    shapes = (B, T, heads, size), (B, T, key_heads, size), (B, T, key_heads, size)
    given = [1.5 * random.standard_normal(shape).astype(np.float32) for shape in shapes]
    real, seen = cut.segment_BT > 0, torch.tensor(cut.seen())
    weight = random.standard_normal(given[0].shape).astype(np.float32) * real[..., None, None]
    expected = with_gradients(functools.partial(softmax_attention, seen=seen), given, weight)

    def function(q, k, v):
        where = [jnp.asarray(x) for x in (cut.segment_BT, cut.shared_BT, cut.position_BT)]
        return attend_packed(q, k, v, *where, packed_turns(*where, q.dtype, size, placement), placement)

    return function, given, weight, expected, real


@pytest.mark.parametrize(
    "cut, heads, block",
    [
        (SHARED, (4, 2, 6), 64),
        (SHARED, (4, 2, 6), 4),
        (SHARED, (3, 1, 5), 1),
        (APART, (3, 3, 7), 5),
        (BRANCHES, (4, 2, 6), 2),
        (BRANCHES, (3, 1, 5), 3),
        (LONG, (2, 1, 6), 64),
    ],
)
def test_packed_rows_attend_by_definition(cut, heads, block, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", block)
    function, given, weight, expected, real = packed_of(cut, *heads, ONE_DEVICE)
    assert_same(ours(function, given, weight), expected, real)


def test_blocks_take_turns_with_what_they_see_and_no_more(monkeypatch):
    """By hand: a prompt of a block, two answers of a block and a half, and padding in half a block."""
    monkeypatch.setattr(blocks, "BLOCK", 4)
    cut = Cut([[(4, 0), (6, 1), (6, 1)], [(14, 0)]], 18)
    where = map(jnp.asarray, (cut.segment_BT, cut.shared_BT, cut.position_BT))
    _, order, count = packed_turns(*where, jnp.float32, 6)
    sees = [[set(order[b, i, : count[b, i]].tolist()) for i in range(5)] for b in range(2)]
    assert sees[0] == [{0}, {1, 0}, {2, 1, 0}, {3, 2, 0}, {4}]
    assert sees[1] == [{0}, {1, 0}, {2, 1, 0}, {3, 2, 1, 0}, {4, 3}]  # padding sees padding
    assert order[:, :, 0].tolist() == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.parametrize("cut, heads", [(APART, (4, 2, 64)), (APART, (3, 1, 6)), (LONG, (2, 1, 128))])
def test_packed_rows_on_splash_attend_by_definition(cut, heads, monkeypatch):
    monkeypatch.setattr(attention, "_BLOCK", 128)
    function, given, weight, expected, real = packed_of(cut, *heads, SPLASH)
    assert_same(ours(function, given, weight), expected, real)


@pytest.mark.parametrize(
    "cut, heads, chunk",
    [
        (SHARED, (4, 2, 6), 11),
        (SHARED, (4, 2, 6), 4),
        (SHARED, (3, 1, 5), 3),
        (APART, (3, 3, 7), 5),
        (LONG, (2, 1, 128), 300),
    ],
)
def test_packed_rows_on_cudnn_attend_by_definition(cut, heads, chunk, monkeypatch):
    B, T = cut.segment_BT.shape
    monkeypatch.setattr(attention, "SCORES", chunk * B * T)
    function, given, weight, expected, real = packed_of(cut, *heads, CUDNN)
    assert_same(ours(function, given, weight), expected, real)
    assert ("scan" in str(jax.make_jaxpr(function)(*given))) == (chunk < T)


@pytest.mark.parametrize("tokens", [256, 255])
def test_packed_rows_lower_to_cudnns_kernels(tokens, monkeypatch):
    """As far as can be seen without a GPU: JAX takes shapes, dtypes and mask, and puts the two kernels into the
    program; no product of queries and keys is left."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(GpuWay, "platform", "gpu")
    q, k = (jax.ShapeDtypeStruct((2, tokens, heads, 64), jnp.bfloat16) for heads in (4, 2))
    segment = jax.ShapeDtypeStruct((2, tokens), jnp.int32)

    def loss(q, k, v, segment, shared):
        return attend_packed(q, k, v, segment, shared, segment, None, CUDNN).astype(jnp.float32).sum()

    traced = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).trace(q, k, k, segment, segment)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__cudnn$fmhaScaleBiasSoftmax(") == text.count("@__cudnn$fmhaScaleBiasSoftmaxBackward(") == 1
    assert "dot_general" not in text


@pytest.mark.parametrize(
    "dtype, size, version, capability, has",
    [
        ("bfloat16", 128, "cuda 12080", "8.0", True),
        ("float16", 64, "cuda 12080", "10.0", True),
        ("float32", 128, "cuda 12080", "9.0", False),
        ("bfloat16", 256, "cuda 12080", "9.0", False),
        ("bfloat16", 36, "cuda 12080", "9.0", False),
        ("bfloat16", 128, "cuda 12080", "7.5", False),
        ("bfloat16", 128, "rocm 60300", "gfx942", False),
    ],
)
def test_cudnn_is_asked_for_what_it_has(dtype, size, version, capability, has):
    device = types.SimpleNamespace(
        platform="gpu", client=types.SimpleNamespace(platform_version=version), compute_capability=capability
    )
    placement = Placement(types.SimpleNamespace(devices=np.array([device])))
    assert placement.has_cudnn(jnp.dtype(dtype), size) == has
    assert not Placement(make(2, 4)).has_cudnn(jnp.dtype(dtype), size) and not ONE_DEVICE.has_cudnn(
        jnp.dtype(dtype), size
    )


# ------------------------------------------------------------------------------------------------ memory


def intermediates(jaxpr):
    """Sizes of all arrays that a program names, loops' bodies included."""
    for eqn in jaxpr.eqns:
        yield from (x.aval.size for x in eqn.outvars)
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from intermediates(inner)


def test_no_more_scores_exist_at_once_than_said(monkeypatch):
    """Forward and backward: arrays are no larger than the queries, or than SCORES, of packed rows than BLOCK for each
    query."""
    T, H, E = 256, 2, 4
    q, where = jnp.ones((1, T, H, E)), [jnp.ones((1, T), jnp.int32)] * 3
    monkeypatch.setattr(attention, "SCORES", 16 * H * T)
    monkeypatch.setattr(blocks, "BLOCK", 16)
    packed = jax.make_jaxpr(jax.grad(lambda x: attend_packed(x, x, x, *where, packed_turns(*where, x.dtype, E)).sum()))(
        q
    )
    row, start = q[:, None], jnp.zeros((1, 1), jnp.int32)

    def of_rows(x):
        kv = KV(*(jnp.moveaxis(x, 3, 2),) * 2)
        return attend(x, KV(kv.k[:, 0, :, :0], kv.v[:, 0, :, :0]), jnp.zeros(1, jnp.int32), kv, start, 0).sum()

    for program in (packed, jax.make_jaxpr(jax.grad(of_rows))(row)):
        assert max(intermediates(program.jaxpr)) == 16 * H * T < H * T * T


# ------------------------------------------------------------------------------------------------ on a mesh


def make(data, model):
    return mesh.make_mesh(config.Mesh(data, model))


@pytest.mark.parametrize("data, model", [(2, 4), (4, 2)])
@pytest.mark.parametrize("way", [Placement, TpuWay, GpuWay])
def test_sharded_is_by_definition(way, data, model):
    """Rows over `data`, heads over `model` where key heads divide: 2 over 2, but not over 4."""
    placement = way(make(data, model))
    cut = Cut([[(4, 0), (i + 1, 0)] for i in range(8)], 12)
    function, given, weight, expected, real = packed_of(cut, 4, 2, 6, placement)
    assert_same(ours(function, hosts.put_rows(placement.mesh, given, 8), weight), expected, real)

    random = np.random.default_rng(4)
    case = (8, 2, 5, 4, 2, 6, 3, 5), random.integers(0, 4, 8).tolist(), random.integers(0, 5, (8, 2)).tolist()
    function, given, weight, expected, real = rows_of(case, 0, placement)
    assert_same(ours(function, hosts.put_rows(placement.mesh, given, 8), weight), expected, real)


def test_queries_are_cut_by_what_a_device_holds(monkeypatch):
    """8 rows of 4 heads are 2 rows of 2 heads on each of 4 × 2."""
    case = (8, 1, 12, 4, 2, 6, 0, 12), [0] * 8, [[0]] * 8
    monkeypatch.setattr(attention, "SCORES", 12 * 2 * 2 * 12)
    for placement, cut in ((Placement(make(4, 2)), False), (ONE_DEVICE, True)):
        function, given, *_ = rows_of(case, 0, placement)
        assert ("scan" in str(jax.make_jaxpr(function)(*given))) == cut


@pytest.mark.parametrize("way", [Placement, TpuWay])
def test_mapped_over_sharded_problems_is_by_definition(way):
    """As the judge's scoring is."""
    placement = way(make(4, 2), mapped=True)
    random = np.random.default_rng(5)
    case = (8, 2, 5, 4, 2, 6, 3, 5), random.integers(0, 4, 8).tolist(), random.integers(0, 5, (8, 2)).tolist()
    _, given, weight, expected, real = rows_of(case, 0, placement)

    def one(q, ck, cv, k, v, length, start):
        q, ck, cv, k, v = (x[None] for x in (q, ck, cv, k, v))
        return attend(q, KV(ck, cv), length[None], KV(k, v), start[None], 0, placement)[0]

    mapped = jax.vmap(one, spmd_axis_name=DATA)
    where = hosts.put_rows(placement.mesh, (np.array(case[1], np.int32), np.array(case[2], np.int32)), 8)
    got = ours(lambda *given: mapped(*given, *where), hosts.put_rows(placement.mesh, given, 8), weight)
    assert_same(got, expected, real)


def test_rotation_is_multiplication_by_a_phase():
    x = np.random.default_rng(2).standard_normal((1, 1, 3, 2, 8)).astype(np.float32)
    positions, frequency = np.array([[[0, 1, 70]]]), np.array([1.0, 0.3, 0.1, 0.01], np.float32)
    phase = np.exp(1j * positions[..., None, None] * frequency)
    expected = (x[..., :4] + 1j * x[..., 4:]) * phase
    out = np.asarray(rotate(jnp.asarray(x), jnp.asarray(positions), frequency))
    np.testing.assert_allclose(out, np.concatenate([expected.real, expected.imag], -1), atol=1e-5)
