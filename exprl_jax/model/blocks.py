"""Attention within packed rows, block by block: a block of keys that none of a block's queries sees is not scored.

    block of keys       0 1 2 3 4      a prompt in block 0, its rollouts behind it: a block of queries sees its own, the
    queries of block 3  2 . 3 1 .      prompt's and mostly the one before; the number says in which turn

In turn n every block of queries attends to the n-th of the blocks that it sees, its own first, in one batch of
products.  There are as many turns as the block that sees most needs: packed rows decide that, not their shape.  Forward
keeps a running maximum and sum (Milakov & Gimelshein 2018); backward makes the weights again from the log of the
normaliser (Dao et al. 2022).  All in plain XLA, in memory linear in the tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

# Tokens of a block.  Smaller ones skip more, larger ones make larger products.
BLOCK = 64
# Under this name a rematerialised layer may keep the result of its attention.
KEPT = "attention"
_UNSEEN = -1e30  # finite: a turn in which a query sees nothing leaves its maximum alone


class Slots(NamedTuple):
    """Of packed rows: what `attention.attend_packed` takes, and the position at which each slot's segment begins."""

    segment: Int[Array, "B n S"]
    shared: Int[Array, "B n S"]
    position: Int[Array, "B n S"]
    branch: Int[Array, "B n S"]


class Turns(NamedTuple):
    """Which blocks see which; the same for all layers.

    Attributes:
      slots: of n blocks of S slots.
      order: of each block of queries, all blocks of keys, those that it sees first and of these its own.
      count: how many it sees.
    """

    slots: Slots
    order: Int[Array, "B n n"]
    count: Int[Array, "B n"]


def turns_of(
    segment_BT: Int[Array, "B T"], shared_BT: Int[Array, "B T"], position_BT: Int[Array, "B T"], branch_BT: Array
) -> Turns:
    """What packed rows' blocks see; [B, T, T] never exists."""
    # Slots that fill the last block are a segment of their own.
    filled = zip((segment_BT, shared_BT, position_BT, branch_BT), (-1, -1, 0, 0))
    slots = Slots(*(_cut(x, fill) for x, fill in filled))
    n = slots.segment.shape[1]

    def needs(i):
        queries = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i, 1, axis=1), slots)
        return _seen(queries, jnp.full(n, i), slots, jnp.arange(n)).any((2, 3))

    needed = jnp.moveaxis(jax.lax.map(needs, jnp.arange(n)), 0, 1)
    rank = jnp.where(jnp.eye(n, dtype=bool), 2, needed.astype(jnp.int32))
    order = jnp.argsort(-rank, axis=2, stable=True).astype(jnp.int32)
    return Turns(slots, order, (rank > 0).sum(2, dtype=jnp.int32))


def attend_blocks(
    q_BTHE: Float[Array, "B T H E"], k_BTKE: Float[Array, "B T K E"], v_BTKE: Float[Array, "B T K E"], turns: Turns
) -> Float[Array, "B T H E"]:
    """Softmax attention of packed rows on one device; see `attention.attend_packed`."""
    B, T, H, E = q_BTHE.shape
    K, n = k_BTKE.shape[2], turns.count.shape[1]
    k, v = (_cut(x).swapaxes(2, 3) for x in (k_BTKE, v_BTKE))  # [B, n, K, BLOCK, E]
    scaled = _cut(q_BTHE * jnp.asarray(E**-0.5, q_BTHE.dtype)).reshape(B, n, BLOCK, K, H // K, E)
    # All queries of a key's head, whose query heads lie side by side, in one product:  R = H / K · BLOCK.
    q = jnp.moveaxis(scaled, 2, 4).reshape(B, n, K, H // K * BLOCK, E)
    out = jnp.moveaxis(_attend(q, k, v, turns).reshape(B, n, K, H // K, BLOCK, E), 4, 2)
    return out.reshape(B, n * BLOCK, H, E)[:, :T]


def _cut(x, fill=0):
    """[B, T, ...] → [B, blocks, BLOCK, ...]."""
    T = x.shape[1]
    x = jnp.pad(x, ((0, 0), (0, -T % BLOCK)) + ((0, 0),) * (x.ndim - 2), constant_values=fill)
    return x.reshape(x.shape[0], -1, BLOCK, *x.shape[2:])


def _seen(q: Slots, block_q, k: Slots, block_k):
    """[B, n, BLOCK queries, BLOCK keys]: what queries of blocks, `block_q` of a row, see of blocks `block_k`."""
    (segment, shared, _, branch), (key, _, position, _) = ((x[..., None] for x in q), (x[:, :, None] for x in k))
    slot = jnp.arange(BLOCK)
    before = (block_k * BLOCK)[..., None, None] + slot <= ((block_q * BLOCK)[..., None] + slot)[..., None]
    return ((key == segment) | ((key == shared) & (position < branch))) & before


@jax.custom_vjp
def _attend(q, k, v, turns):
    return _forward(q, k, v, turns)[0]


def _turn(q, k, turns, turn):
    """(the block of keys that each block of queries sees in this turn [B, n], scores [B, n, K, R, BLOCK])."""
    at = jax.lax.dynamic_index_in_dim(turns.order, turn, axis=2, keepdims=False)
    keys = Slots(*(jnp.take_along_axis(x, at[..., None], axis=1) for x in turns.slots))
    seen = _seen(turns.slots, jnp.arange(q.shape[1]), keys, at) & (turn < turns.count)[..., None, None]
    score = jnp.einsum("bnkre,bnkse->bnkrs", q, _take(k, at), preferred_element_type=jnp.float32)
    by_head = score.reshape(*score.shape[:3], -1, BLOCK, BLOCK)
    return at, jnp.where(seen[:, :, None, None], by_head, _UNSEEN).reshape(score.shape)


def _take(x, at):
    return jnp.take_along_axis(x, at[..., None, None, None], axis=1)


def _forward(q, k, v, turns):
    f32 = {"preferred_element_type": jnp.float32}

    def add(turn, so_far):
        top, total, out = so_far
        at, score = _turn(q, k, turns, turn)
        higher = jnp.maximum(top, score.max(-1))
        weight, less = jnp.exp(score - higher[..., None]), jnp.exp(top - higher)
        values = jnp.einsum("bnkrs,bnkse->bnkre", weight.astype(q.dtype), _take(v, at), **f32)
        return higher, total * less + weight.sum(-1), out * less[..., None] + values

    def normalise(turn, so_far):
        top, total = so_far
        _, score = _turn(q, k, turns, turn)
        higher = jnp.maximum(top, score.max(-1))
        return higher, total * jnp.exp(top - higher) + jnp.exp(score - higher[..., None]).sum(-1)

    def add_normalised(turn, out):
        at, score = _turn(q, k, turns, turn)
        weight = jnp.exp(score - top[..., None]) / total[..., None]
        return out + jnp.einsum("bnkrs,bnkse->bnkre", weight.astype(q.dtype), _take(v, at), **f32)

    most, zeros = turns.count.max(), jnp.zeros(q.shape, jnp.float32)
    nothing = jnp.full(q.shape[:-1], _UNSEEN, jnp.float32), jnp.zeros(q.shape[:-1], jnp.float32)
    if q.dtype == jnp.float32:
        top, total, out = jax.lax.fori_loop(0, most, add, (*nothing, zeros))
        out /= total[..., None]
    else:
        # Weights are rounded as the sampler rounds them, after they are normalised: scores are made twice for that.
        top, total = jax.lax.fori_loop(0, most, normalise, nothing)
        out = jax.lax.fori_loop(0, most, add_normalised, zeros)
    out = checkpoint_name(out.astype(q.dtype), KEPT)
    log_normaliser = checkpoint_name(top + jnp.log(total), KEPT)
    return out, (q, k, v, turns, out, log_normaliser)


def _backward(saved, d_out):
    q, k, v, turns, out, log_normaliser = saved
    f32 = {"preferred_element_type": jnp.float32}
    inner = (d_out.astype(jnp.float32) * out).sum(-1, keepdims=True)
    row = jnp.arange(q.shape[0])[:, None]

    def add(turn, so_far):
        d_q, d_k, d_v = so_far
        at, score = _turn(q, k, turns, turn)
        weight = jnp.exp(score - log_normaliser[..., None])
        d_weight = jnp.einsum("bnkre,bnkse->bnkrs", d_out, _take(v, at), **f32)
        d_score = (weight * (d_weight - inner)).astype(q.dtype)
        d_q += jnp.einsum("bnkrs,bnkse->bnkre", d_score, _take(k, at), **f32)
        d_k = d_k.at[row, at].add(jnp.einsum("bnkrs,bnkre->bnkse", d_score, q, **f32))
        d_v = d_v.at[row, at].add(jnp.einsum("bnkrs,bnkre->bnkse", weight.astype(q.dtype), d_out, **f32))
        return d_q, d_k, d_v

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    return *(x.astype(q.dtype) for x in jax.lax.fori_loop(0, turns.count.max(), add, zeros)), None


_attend.defvjp(_forward, _backward)
