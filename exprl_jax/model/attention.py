"""Rotary positions, and attention in memory linear in the tokens: of rows over a context and themselves, and of packed
rows over what their segments may see.

Behind one function each: chunks of queries, or of packed rows blocks (`model.blocks`), in plain XLA; on TPU the splash
kernel, and on NVIDIA's GPUs cuDNN's flash attention for what has no past in a cache.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jaxtyping import Array, Float, Int

from exprl_jax.architecture import Architecture
from exprl_jax.mesh import MODEL, ONE_DEVICE, Placement
from exprl_jax.model import blocks
from exprl_jax.model.blocks import KEPT
from exprl_jax.model.cache import KV

# Scores (query × key × head × row; one head of the mask is all that cuDNN needs) that exist at once on a device, in
# forward and backward; queries are cut to fit.
SCORES = 2**26
# Tokens of a block of the splash kernel, and the lanes of a TPU vector: heads are padded to a multiple of those.
_BLOCK, _LANES = 512, 128


def rotary_frequencies(arch: Architecture) -> np.ndarray:
    """Angular frequency of each pair of features, [E/2], float32 (RoFormer, with the model's own scaling)."""
    half = np.arange(0, arch.head_size, 2, dtype=np.float32) / np.float32(arch.head_size)
    frequency = 1.0 / np.float32(arch.rope_theta) ** half
    scaling = arch.rope_scaling
    if scaling is None:
        return frequency.astype(np.float32)
    if scaling.kind == "linear":
        return (frequency / scaling.factor).astype(np.float32)
    # Llama 3.1: wavelengths beyond original/low are stretched by factor, below original/high kept, blended between.
    turns = scaling.original_positions * frequency / (2 * np.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = np.clip(kept, 0.0, 1.0)
    return ((1 - kept) * frequency / scaling.factor + kept * frequency).astype(np.float32)


def rotate(x: Float[Array, "P G T N E"], positions: Int[Array, "P G T"], frequency: np.ndarray):
    """Rotates each head's feature pairs (i, i + E/2) by position × frequency; float32 inside, x's dtype out."""
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attend(
    q_PGTHE: Float[Array, "P G T H E"],
    context: KV,
    length_P: Int[Array, " P"],
    own: KV,
    start_PG: Int[Array, "P G"],
    slot: Int[Array, ""] | Int[Array, "P G"] | int,
    placement: Placement = ONE_DEVICE,
) -> Float[Array, "P G T H E"]:
    """Softmax attention over two sets of keys: the problem's context and the row's own slots.

        keys                 p p p . . | . . x x x x       context (3 real of 5) | own slots (start = 2)
        query of slot 4      ✓ ✓ ✓     |     ✓ ✓ ✓
        query of slot 1                |   ✓               padding sees itself: a softmax over nothing is NaN

    The query in own slot `slot + t` sees every real context token and own slots `start … slot + t`; before `start`,
    itself.

    Args:
      q_PGTHE: rotated queries.
      context: rotated keys and values, [P, K, C, E]; the first `length_P` slots are real.
      own: rotated keys and values, [P, G, K, S, E], the queries' own included.
      start_PG: first real own slot.
      slot: own slot of the first query, of all rows or of each; 0 on TPU, where rows with a past have pages
        (`model.paged`).
    """
    if placement.on_tpu:
        return _splash_rows(q_PGTHE, context, length_P, own, start_PG, placement)
    P, G, T, H, E = q_PGTHE.shape
    C, S = context.k.shape[2], own.k.shape[3]
    slot_PGT = jnp.atleast_2d(slot)[..., None] + jnp.arange(T)  # [1, 1, T] where all rows have one
    if placement.has_cudnn(q_PGTHE.dtype, E) and (C, S) == (0, T):
        k, v = (jnp.swapaxes(x.reshape(P * G, -1, S, E), 1, 2) for x in (own.k, own.v))
        segment_BT = (slot_PGT >= start_PG[..., None]).reshape(P * G, T).astype(jnp.int32)
        position_BT = jnp.broadcast_to(jnp.arange(T), segment_BT.shape)
        q = q_PGTHE.reshape(P * G, T, H, E)
        return _cudnn_packed(q, k, v, segment_BT, segment_BT, position_BT, placement).reshape(q_PGTHE.shape)
    slot_S = jnp.arange(S)

    # Chunks are cut from queries alone; keys are seen whole, so what a chunk sees is told by its slots, which are cut
    # with it.
    def some(q, slot_PGT):
        past_PGTS = (slot_S >= start_PG[..., None, None]) & (slot_S <= slot_PGT[..., None])
        return _attend_rows(q, context, length_P, own, past_PGTS | (slot_S == slot_PGT[..., None]))

    return _in_chunks(some, (q_PGTHE, slot_PGT), H, C + S, placement)


def attend_branches(
    q_PGTHE: Float[Array, "P G T H E"],
    context: KV,
    length_P: Int[Array, " P"],
    own: KV,
    segment_PGT: Int[Array, "P G T"],
    position_PGT: Int[Array, "P G T"],
    placement: Placement = ONE_DEVICE,
) -> Float[Array, "P G T H E"]:
    """Softmax attention over the problem's context and the slots of a row off which sequences branch.

    Args:
      q_PGTHE: rotated queries.
      context: as of `attend`.
      own: rotated keys and values of the same slots, [P, G, K, T, E].
      segment_PGT, position_PGT: as of `records.BranchRows`.
    """
    P, G, T, H, _ = q_PGTHE.shape
    slot_PGT = jnp.broadcast_to(jnp.arange(T), (P, G, T))
    branch_PGT = first_positions(segment_PGT, position_PGT)
    segment_PG1S, position_PG1S = segment_PGT[:, :, None], position_PGT[:, :, None]

    def some(q, segment, branch, slot):
        trace = (segment_PG1S == 1) & (position_PG1S < branch[..., None])
        seen_PGTS = (segment_PG1S == segment[..., None]) | trace
        seen_PGTS &= slot_PGT[:, :, None] <= slot[..., None]
        return _attend_rows(q, context, length_P, own, seen_PGTS | (slot_PGT[:, :, None] == slot[..., None]))

    queries = q_PGTHE, segment_PGT, branch_PGT, slot_PGT
    return _in_chunks(some, queries, H, context.k.shape[2] + T, placement)


def packed_turns(
    segment_BT: Int[Array, "B T"],
    shared_BT: Int[Array, "B T"],
    position_BT: Int[Array, "B T"],
    dtype: Any,
    head_size: int,
    placement: Placement = ONE_DEVICE,
) -> blocks.Turns | None:
    """What `attend_packed` of such heads goes by in every layer, made once; None where a kernel knows by itself."""
    if placement.on_tpu or placement.has_cudnn(dtype, head_size):
        return None
    return blocks.turns_of(segment_BT, shared_BT, position_BT, first_positions(segment_BT, position_BT))


def attend_packed(
    q_BTHE: Float[Array, "B T H E"],
    k_BTKE: Float[Array, "B T K E"],
    v_BTKE: Float[Array, "B T K E"],
    segment_BT: Int[Array, "B T"],
    shared_BT: Int[Array, "B T"],
    position_BT: Int[Array, "B T"],
    turns: blocks.Turns | None,
    placement: Placement = ONE_DEVICE,
) -> Float[Array, "B T H E"]:
    """Softmax attention within packed rows: a token sees earlier slots of its own segment and of the one it shares.

        segment              1 1 1 2 2 3 3 0      shared of segments 2 and 3: 1   (see `data.packing`)
        position             0 1 2 3 4 2 3 .
        query of slot 4      ✓ ✓ ✓ ✓ ✓
        query of slot 6      ✓ ✓       ✓ ✓        its segment branches off at position 2

    Args:
      q_BTHE, k_BTKE, v_BTKE: rotated queries and keys, and values.
      segment_BT: a segment is a run of slots with one id, unique in its row.
      shared_BT: id of another segment of the row that a slot sees too; its own where there is none.  The splash kernel
        knows only segments, and does not read this.
      position_BT: in each slot's sequence, one more from slot to slot of a segment; of the shared segment a slot sees
        what stands before the first position of its own.
      turns: of these rows, by `packed_turns`.
    """
    if placement.on_tpu:
        swap = functools.partial(jnp.swapaxes, axis1=1, axis2=2)
        return swap(_splash(swap(q_BTHE), swap(k_BTKE), swap(v_BTKE), segment_BT, segment_BT, placement))
    if placement.has_cudnn(q_BTHE.dtype, q_BTHE.shape[3]):
        return _cudnn_packed(q_BTHE, k_BTKE, v_BTKE, segment_BT, shared_BT, position_BT, placement)
    rows = (placement.data, None, placement.axis_of(k_BTKE.shape[2]))
    attend_each = placement.split(blocks.attend_blocks, (rows, rows, rows, rows[:1]), rows)
    return attend_each(q_BTHE, k_BTKE, v_BTKE, turns)


def _cudnn_packed(q_BTHE, k_BTKE, v_BTKE, segment_BT, shared_BT, position_BT, placement):
    """Some queries at a time: the kernel's mask has an entry for every query and key."""
    T = q_BTHE.shape[1]
    slot_BT = jnp.broadcast_to(jnp.arange(T), segment_BT.shape)
    branch_BT = first_positions(segment_BT, position_BT)
    queries = [x[:, None] for x in (q_BTHE, segment_BT, shared_BT, branch_BT, slot_BT)]

    def some(q, *where):
        seen_BTS = _seen(segment_BT, position_BT, *(x[:, 0] for x in where))
        return _cudnn(q[:, 0], k_BTKE, v_BTKE, seen_BTS, placement)[:, None]

    return checkpoint_name(_in_chunks(some, queries, 1, T, placement)[:, 0], KEPT)


def _in_chunks(function, queries, heads, keys, placement):
    """`function` of some tokens (axis 2) of each of `queries` at a time, recomputed in the backward pass."""
    P, G, T = queries[0].shape[:3]
    if placement.mesh is not None:
        P = P // placement.mesh.shape[placement.data] if placement.data else P
        heads = heads // placement.mesh.shape[MODEL] if placement.axis_of(heads) else heads
    length = max(1, SCORES // max(1, P * G * heads * keys))
    if T <= length:
        return function(*queries)
    # Chunks of one length, the shortest that so many chunks can have: the last is padded by as little as possible.
    chunks = -(-T // length)
    length = -(-T // chunks)

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, 0), (0, chunks * length - T)) + ((0, 0),) * (x.ndim - 3))
        return jnp.moveaxis(x.reshape(*x.shape[:2], chunks, length, *x.shape[3:]), 2, 0)

    out = jax.lax.map(jax.checkpoint(lambda part: function(*part)), tuple(map(cut, queries)))
    out = jnp.moveaxis(out, 0, 2)
    return out.reshape(*out.shape[:2], -1, *out.shape[4:])[:, :, :T]


def _attend_rows(q, context: KV, length_P, own: KV, seen_PGTS):
    """Padding queries would see nothing, and a softmax over nothing is NaN: what they see includes themselves."""
    P, G, T, H, E = q.shape
    K, C = own.k.shape[2], context.k.shape[2]
    q = q.reshape(P, G, T, K, H // K, E) * jnp.asarray(E**-0.5, q.dtype)
    f32 = {"preferred_element_type": jnp.float32}
    score_context = jnp.einsum("pgtkme,pkce->pgkmtc", q, context.k, **f32)
    score_own = jnp.einsum("pgtkme,pgkse->pgkmts", q, own.k, **f32)

    real_PC = jnp.arange(C) < length_P[:, None]
    score_context = jnp.where(real_PC[:, None, None, None, None], score_context, -jnp.inf)
    score_own = jnp.where(seen_PGTS[:, :, None, None], score_own, -jnp.inf)

    weight = jax.nn.softmax(jnp.concatenate([score_context, score_own], axis=-1), axis=-1).astype(q.dtype)
    # Each product comes out in its own order of dims: XLA's CPU has no bfloat16 product with a transposed result.
    out = jnp.swapaxes(jnp.einsum("pgkmtc,pkce->pkgmte", weight[..., :C], context.v, **f32), 1, 2)
    out += jnp.einsum("pgkmts,pgkse->pgkmte", weight[..., C:], own.v, **f32)
    return jnp.moveaxis(out.astype(q.dtype), 4, 2).reshape(P, G, T, H, E)


def first_positions(segment_BT: Int[Array, "*B T"], position_BT: Int[Array, "*B T"]) -> Int[Array, "*B T"]:
    """The position of the first slot of each slot's segment."""
    slot_T = jnp.arange(segment_BT.shape[-1])
    # A segment is a run, so its first slot is the last slot so far that begins one; slot 0 always does, though rolling
    # compares it with the row's end.
    #     segment    1 1 1 2 2 3
    #     first      0 0 0 3 3 5      cummax of the slots that begin a run
    begins = segment_BT != jnp.roll(segment_BT, 1, axis=-1)
    first_BT = jax.lax.cummax(jnp.where(begins | (slot_T == 0), slot_T, 0), axis=segment_BT.ndim - 1)
    return position_BT - (slot_T - first_BT)


def _seen(segment_BS, position_BS, segment_BT, shared_BT, branch_BT, slot_BT):
    """[B, T, S]: what packed queries see."""
    slot_S = jnp.arange(segment_BS.shape[1])
    common = (segment_BS[:, None] == shared_BT[..., None]) & (position_BS[:, None] < branch_BT[..., None])
    seen = (segment_BS[:, None] == segment_BT[..., None]) | common
    seen &= slot_S <= slot_BT[..., None]
    # What pads the last chunk stands for slot 0 of a segment that may not be that slot's: it sees it all the same.
    return seen | (slot_S == slot_BT[..., None])


def _cudnn(q, k, v, seen_BTS, placement):
    """The same on each device's rows and heads by cuDNN, or where there is none by XLA behind the same call."""
    T, S = seen_BTS.shape[1:]
    # With a mask, the kernel of the backward pass takes even lengths only.
    q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
    seen_BTS = jnp.pad(seen_BTS, ((0, 0), (0, T % 2), (0, S % 2)))
    implementation = "cudnn" if placement.platform == "gpu" else "xla"

    def on_device(q, k, v, seen_BTS):
        return jax.nn.dot_product_attention(q, k, v, mask=seen_BTS[:, None], implementation=implementation)

    rows = (placement.data, None, placement.axis_of(k.shape[2]))
    return placement.split(on_device, (rows, rows, rows, rows[:1]), rows)(q, k, v, seen_BTS)[:, :T]


def _splash_rows(q_PGTHE, context: KV, length_P, own: KV, start_PG, placement):
    """Rows without a past: keys are the context's, once for every row, then the row's own."""
    P, G, T, H, E = q_PGTHE.shape
    C = context.k.shape[2]
    k, v = (
        jnp.concatenate([jnp.broadcast_to(x[:, None], (P, G, *x.shape[1:])), y], axis=3).reshape(P * G, -1, C + T, E)
        for x, y in ((context.k, own.k), (context.v, own.v))
    )
    real_PGT = (jnp.arange(T) >= start_PG[..., None]).astype(jnp.int32)
    # The context's padding has an id of its own; a row's padding sees only itself.
    real_PGC = jnp.broadcast_to(jnp.where(jnp.arange(C) < length_P[:, None], 1, 2)[:, None], (P, G, C))
    segment_BS = jnp.concatenate([real_PGC, real_PGT], axis=2).reshape(P * G, C + T)
    q = jnp.swapaxes(q_PGTHE.reshape(P * G, T, H, E), 1, 2)
    out = _splash(q, k, v, real_PGT.reshape(P * G, T), segment_BS, placement)
    return jnp.swapaxes(out, 1, 2).reshape(P, G, T, H, E)


def _splash(q_BHTE, k_BKSE, v_BKSE, segment_BT, segment_BS, placement):
    """The splash kernel on each device's rows and heads, interpreted where those are no TPUs; causal, with the last
    query in the last key's slot."""
    (_, H, T, E), (_, K, S, _) = q_BHTE.shape, k_BKSE.shape
    heads = placement.axis_of(K)
    lanes, block = -E % _LANES, min(_BLOCK, -(-T // _LANES) * _LANES)
    # Queries are padded behind, keys as much behind and, to whole blocks, in front: the two ends stay aligned.
    #     queries           [         a b c . ]
    #     keys   [ . . p p p p p p p a b c . ]      the causal mask's offset is the difference of their lengths
    behind = -T % block
    front = -(S + behind) % block
    scaled = q_BHTE * jnp.asarray(E**-0.5, q_BHTE.dtype)
    q, k, v = (
        jnp.pad(x, ((0, 0), (0, 0), ends, (0, lanes)))
        for x, ends in ((scaled, (0, behind)), (k_BKSE, (front, behind)), (v_BKSE, (front, behind)))
    )
    # No token has these ids, so none sees padding; padded queries see the keys padded with them, and are cut off below.
    # A softmax over nothing would be NaN, and its gradient too.
    nothing = {"constant_values": -1}
    segment_q = jnp.pad(segment_BT, ((0, 0), (0, behind)), **nothing)
    segment_kv = jnp.pad(
        jnp.pad(segment_BS, ((0, 0), (0, behind)), **nothing), ((0, 0), (front, 0)), constant_values=-2
    )
    shards = 1 if heads is None else placement.mesh.shape[MODEL]
    offset = k.shape[2] - q.shape[2]
    mask = splash_mask.MultiHeadMask([splash_mask.CausalMask((q.shape[2], k.shape[2]), offset)] * (H // shards))
    sizes = splash.BlockSizes(**dict.fromkeys(_SIZES, block))

    def each_row(q, k, v, segment_q, segment_kv):
        kernel = splash.make_splash_mha(
            mask,
            head_shards=1,
            q_seq_shards=1,
            block_sizes=sizes,
            residual_checkpoint_name=KEPT,
            interpret=placement.platform != "tpu",
        )
        return jax.vmap(lambda *row: kernel(*row[:3], splash.SegmentIds(*row[3:])))(q, k, v, segment_q, segment_kv)

    rows = (placement.data, heads)
    out = placement.split(each_row, (rows, rows, rows, rows[:1], rows[:1]), rows)(q, k, v, segment_q, segment_kv)
    return out[:, :, :T, :E]


_SIZES = (
    "block_q",
    "block_kv",
    "block_kv_compute",
    "block_q_dkv",
    "block_kv_dkv",
    "block_kv_dkv_compute",
    "block_q_dq",
    "block_kv_dq",
)
