"""Attention of rows over their pages (`model.paged`): tokens are written into the pool, then its pages are read.

On TPU this is JAX's ragged paged attention kernel; elsewhere the pages are gathered.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention
from jaxtyping import Array, Float, Int

from exprl_jax.config import Execution
from exprl_jax.mesh import Placement
from exprl_jax.model import paged

# What fits into a TPU core's fast memory: bytes of the kernel's page buffers; pages, and queries × heads, at a time.
_BUFFER, _PAGES, _QUERIES = 4 * 1024**2, 8, 1024


def attend_pages(
    q_PGTHE: Float[Array, "P G T H E"],
    k_PGTKE: Float[Array, "P G T K E"],
    v_PGTKE: Float[Array, "P G T K E"],
    cache: paged.PagedCache,
    layer: Int[Array, ""] | int,
    slot: Int[Array, ""] | int,
    execution: Execution,
    placement: Placement,
) -> tuple[Float[Array, "P G T H E"], paged.PagedCache]:
    """Writes T more tokens a row into its pages, and attends to all that it has by then, its context included.

    Args:
      q_PGTHE, k_PGTKE, v_PGTKE: rotated queries and keys, and values.
      layer: whose pages.
      slot: of the first of these tokens, of all rows or of each [P, G]; a row's tokens before its start are padding,
        whose results mean nothing.
    """
    heads = placement.axis_of(k_PGTKE.shape[3])
    layers = cache.k_scale.shape[0]
    local = functools.partial(_write_and_attend, layers=layers, execution=execution, placement=placement)
    rows, pool, scale = (placement.data, None, None, heads), (placement.data, None, heads), (placement.data, heads)
    slot, pages = jnp.asarray(slot, jnp.int32), cache.pages
    # Scales of a slot are those of its problem.
    by_slot, of_slot = (placement.data,), (placement.data,) if slot.ndim else ()
    takes = (rows, rows, rows, pool, by_slot, scale, scale, (), of_slot)
    out, pool = placement.split(local, takes, (rows, pool))(
        q_PGTHE,
        k_PGTKE,
        v_PGTKE,
        cache.pool,
        (pages.table_PGn, pages.length_PG, pages.start_PG, pages.problem_P),
        cache.k_scale[layer],
        cache.v_scale[layer],
        jnp.int32(layer),
        slot,
    )
    return out, cache.replace(pool=pool)


def _write_and_attend(q, k, v, pool, read, k_scale, v_scale, layer, slot, *, layers, execution, placement):
    (P, G, T, H, E), (table, length_PG, start_PG, problem_P) = q.shape, read
    K, pages = k.shape[3], pool.shape[0] // layers
    if problem_P is not None:
        k_scale, v_scale = k_scale[problem_P], v_scale[problem_P]
    slot_T = slot[..., None] + jnp.arange(T)
    # A slot before the row's start has a position too, within its context or below 0: clipped here, for the gather
    # must stay in the table, and masked below, or padding would overwrite the context that all rows of it read.
    position_PGT = length_PG[..., None] + slot_T - start_PG[..., None]
    page_PGT = jnp.take_along_axis(table, jnp.clip(position_PGT // paged.PAGE, 0, table.shape[2] - 1), axis=2)
    # Padding is written nowhere: a number past the pool is dropped.
    page_PGT = jnp.where(slot_T >= start_PG[..., None], page_PGT + layer * pages, pool.shape[0])
    kv = paged.combine(k, v, k_scale[:, None, None], v_scale[:, None, None], execution, placement)
    pool = paged.put(pool, page_PGT, position_PGT % paged.PAGE, kv)

    q = q.reshape(P, G, T, K, H // K, E)
    if execution.kv_dtype == "int8":
        # Σ q · step · (k / step) over channels: the step goes to the query, which is one, and not to the pages.
        # In the same way a value's step multiplies the result.
        q = (q * k_scale[:, None, None, :, None]).astype(q.dtype)
    # A row that has not begun asks for its context's last token, to no purpose: the kernel wants a query of every row.
    own_PG = slot + T - start_PG
    asked, known = jnp.clip(own_PG, 1, T).ravel(), jnp.maximum(length_PG + jnp.maximum(own_PG, 0), 1).ravel()
    attention = _kernel if placement.on_tpu else _gathered
    out = attention(q.reshape(P * G, T, K, H // K, E), pool, (table + layer * pages).reshape(P * G, -1), known, asked)
    out = out.reshape(P, G, T, K, H // K, E)
    if execution.kv_dtype == "int8":
        out = (out * v_scale[:, None, None, :, None]).astype(q.dtype)
    return out.reshape(P, G, T, H, E), pool


def _gathered(q_BTKmE, pool, table, known_B, asked_B):
    """Attention over pages gathered into rows."""
    B, T, K, m, E = q_BTKmE.shape
    # A table's entries past a row's pages point at any page: what they hold lies past `known_B` and is not seen.
    kv = pool[table].reshape(B, -1, K, 2, E).astype(q_BTKmE.dtype)
    score = jnp.einsum("btkme,bske->bkmts", q_BTKmE * E**-0.5, kv[..., 0, :], preferred_element_type=jnp.float32)
    # The last query is the row's last token; what comes before the first asked one is padding.
    position_BT = known_B[:, None] - T + jnp.arange(T)
    seen = jnp.arange(kv.shape[1]) <= jnp.maximum(position_BT, 0)[..., None]
    weight = jax.nn.softmax(jnp.where(seen[:, None, None], score, -jnp.inf), axis=-1).astype(q_BTKmE.dtype)
    out = jnp.einsum("bkmts,bske->bkmte", weight, kv[..., 1, :], preferred_element_type=jnp.float32)
    return jnp.moveaxis(out.astype(q_BTKmE.dtype), 3, 1)


def _kernel(q_BTKmE, pool, table, known_B, asked_B):
    """The ragged paged attention kernel; it wants each row's queries behind one another, without padding.

    rows of T = 3      [ . a b | c d e | . . f ]      asked 2, 3, 1
    the kernel's       [ a b c d e f – – – ]          row i's queries are at end[i] … end[i + 1] − 1
    """
    B, T, K, m, E = q_BTKmE.shape
    end = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(asked_B, dtype=jnp.int32)])
    slot = jnp.arange(B * T)
    # Slot s of the kernel's is query s − end[row] of its row's asked ones, which are the row's last.
    row = jnp.minimum(jnp.searchsorted(end[1:], slot, side="right"), B - 1)
    source = jnp.minimum((row + 1) * T - asked_B[row] + slot - end[row], B * T - 1)
    heads = pool.shape[2] // 2
    q = q_BTKmE.reshape(B * T, K, m, E)[source]
    q = jnp.pad(q, ((0, 0), (0, heads - K), (0, 0), (0, pool.shape[3] - E))).reshape(B * T, heads * m, -1)
    page_bytes = pool[0].size * pool.dtype.itemsize
    out = ragged_paged_attention(
        q,
        pool,
        known_B.astype(jnp.int32),
        table,
        end,
        jnp.full(1, B, jnp.int32),
        sm_scale=E**-0.5,
        k_scale=1.0 if pool.dtype == jnp.int8 else None,
        v_scale=1.0 if pool.dtype == jnp.int8 else None,
        num_kv_pages_per_block=max(1, min(table.shape[1], _PAGES, _BUFFER // (2 * page_bytes))),
        num_queries_per_block=min(B * T, max(8, min(128, _QUERIES // q.shape[1]))),
    )
    out = out.reshape(B * T, heads, m, -1)[:, :K, :, :E]
    # And back: a row's queries end where its stretch does; what stood before the asked ones is padding again.
    back = jnp.maximum(end[1:, None] - T + jnp.arange(T), 0)
    return out[back.ravel()].reshape(B, T, K, m, E)
