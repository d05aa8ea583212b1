"""Keys and values of rows in one pool of pages, for decoding: the context of a problem is kept once for all its rows.

The pool of one device, with P problems of G rows (here 2 of 2), `shared` pages a context and `own` pages a row:

    layer 0                                                          layer 1
    | c0 c0 c0 | c1 c1 c1 | r00 r00 | r01 r01 | r10 r10 | r11 r11 |  | c0 …        [L·N, page, 2·K, E]
      P·shared pages of contexts        P·G·own pages of rows            N = P·(shared + G·own) pages a layer

The layer is folded into the page's number, so that a loop over layers and tokens carries one array and writes into it
in place: with a leading L the compiler would copy a layer's pages in and out at every step.

What row (1, 0) reads, if its context has 2 full pages and a bit:

    table    [ c1 page 0 | c1 page 1 | r10 page 0 | r10 page 1 | – ]
    tokens     full        full        tail of c1,   …            the tail of a context, which fills no page, is copied
                                       then its own               to the head of every row's first own page

Keys and values of a head lie side by side (even and odd rows of a page, as the TPU kernel wants them).  Pages may be
int8: each channel of a problem's context sets its scale (`_int8_steps`).  `model.page_attention` reads them.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from exprl_jax.architecture import Architecture
from exprl_jax.config import Execution
from exprl_jax.mesh import Placement
from exprl_jax.records import Prefix

PAGE = 128
# Lanes of a TPU vector: heads are padded to a multiple.
_LANES = 128
# How far later keys and values may exceed their context's largest before an int8 saturates.
_HEADROOM = 1.5


@flax.struct.dataclass
class Pages:
    """Which pages a row reads, in the order of its tokens.

    Attributes:
      table_PGn: int32, numbers of pages, without the layer.
      length_PG: int32, tokens of the context; [P, 1] where a problem's rows have all of it.
      start_PG: int32, first real slot of each row.
      problem_P: int32, the context's number among its shard's; None where it is the index itself.
      owner_N: int32, of each page that is no context's, its slot, or the number of slots where it is free; None where
        every row has its pages from the start.
    """

    table_PGn: Array
    length_PG: Array
    start_PG: Array
    problem_P: Array | None = None
    owner_N: Array | None = None


@flax.struct.dataclass
class PagedCache:
    """A pool and what reads it.

    Attributes:
      pool: [data shards · L·N, page, 2·K, E], in the compute dtype or int8.
      pages: of every row.
      k_scale, v_scale: float32 [L, P, K, E], one step of an int8; 1 where pages are not int8.
    """

    pool: Array
    pages: Pages
    k_scale: Array
    v_scale: Array


def is_paged(execution: Execution, placement: Placement) -> bool:
    """Whether rows are decoded from pages: on TPU, and wherever keys and values are int8."""
    return placement.on_tpu or execution.kv_dtype == "int8"


def open_pages(
    arch: Architecture,
    execution: Execution,
    placement: Placement,
    prefix: Prefix,
    start_PG: Int[Array, "P G"],
    slots: int,
    spare: int = 0,
) -> PagedCache:
    """A pool that holds the contexts, with room for `slots` tokens of each row, and so many spare pages a problem."""
    k, v, scales = _keys_values_scales(arch, execution, prefix)

    def fill(k_LPKCE, v_LPKCE, k_scale, v_scale, length_P, start_PG):
        (L, P, _, C, _), G = k_LPKCE.shape, start_PG.shape[1]
        shared, own = C // PAGE, own_pages(slots)
        k, v = (jnp.moveaxis(x, 2, 3) for x in (k_LPKCE, v_LPKCE))
        kv = combine(k, v, k_scale[:, :, None], v_scale[:, :, None], execution, placement)
        full_P, pages = length_P // PAGE, P * (shared + G * own + spare)
        pool = jnp.zeros((L * pages, PAGE, *kv.shape[3:]), kv.dtype)
        if C:
            layer_page, offset = jnp.arange(L)[:, None, None] * pages, jnp.arange(PAGE)
            # Every context token at its page.  Token by token, as the loop writes: with any other form the compiler
            # lays the pool out anew.  What lies past the last whole page has no page among the shared ones.
            page = layer_page + (jnp.arange(P)[:, None] * shared + jnp.arange(C) // PAGE)
            page = jnp.where(jnp.arange(C) < shared * PAGE, page, pool.shape[0])
            pool = put(pool, page, jnp.broadcast_to(jnp.arange(C) % PAGE, page.shape), kv)
            # The tail of each context, from its last full page on, at the head of the first own page of its G rows.
            tail_token = jnp.minimum(full_P[:, None] * PAGE + offset, C - 1)
            tail = jnp.take_along_axis(kv, tail_token[None, :, :, None, None], axis=2)
            first_own = layer_page + (P * shared + jnp.arange(P * G) * own)[:, None] + jnp.zeros_like(offset)
            pool = put(pool, first_own, jnp.broadcast_to(offset, first_own.shape), jnp.repeat(tail, G, axis=1))
        # The table: entry i is the context's page i while that is full, then the row's own pages in order.
        entry = jnp.arange(shared + own)
        past_context = entry - full_P[:, None, None]
        own_page = P * shared + jnp.arange(P * G).reshape(P, G, 1) * own
        context_page = jnp.arange(P)[:, None, None] * shared + entry
        # Past its own pages a row has none; it never gets there.
        table = jnp.where(past_context < 0, context_page, own_page + jnp.clip(past_context, 0, own - 1))
        return pool, table.astype(jnp.int32)

    data, heads = placement.data, placement.axis_of(arch.kv_heads)
    # Contexts and scales are sharded alike: problems over `data`, heads over `model`.
    fill = placement.split(fill, ((None, data, heads),) * 4 + ((data,),) * 2, ((data, None, heads), (data,)))
    pool, table = fill(k, v, *scales, prefix.length_P, start_PG)
    return PagedCache(pool, Pages(table, prefix.length_P[:, None], start_PG), *scales)


def open_pool(
    arch: Architecture, execution: Execution, placement: Placement, prefix: Prefix, slots: int, tokens: int, pages: int
) -> PagedCache:
    """A pool that holds the contexts, whole, and pages that rows in slots take as they need them (`hand_out_pages`).

    Args:
      slots: of a data shard.
      tokens: a row's own, at most.
      pages: of a data shard for the rows; at least those of one row (`own_pages`).
    """
    k, v, scales = _keys_values_scales(arch, execution, prefix)

    def fill(k_LPKCE, v_LPKCE, k_scale, v_scale):
        L, P, _, C, _ = k_LPKCE.shape
        shared = -(-C // PAGE)
        kv = combine(
            *(jnp.moveaxis(x, 2, 3) for x in (k_LPKCE, v_LPKCE)),
            k_scale[:, :, None],
            v_scale[:, :, None],
            execution,
            placement,
        )
        pool = jnp.zeros((L * (P * shared + pages), PAGE, *kv.shape[3:]), kv.dtype)
        page = jnp.arange(L)[:, None, None] * (P * shared + pages) + jnp.arange(P)[:, None] * shared
        page = page + jnp.arange(C) // PAGE
        pool = put(pool, page, jnp.broadcast_to(jnp.arange(C) % PAGE, page.shape), kv)
        table = jnp.zeros((slots, 1, C // PAGE + own_pages(tokens)), jnp.int32)
        return pool, table, jnp.full(pages, slots, jnp.int32)

    data, heads = placement.data, placement.axis_of(arch.kv_heads)
    fill = placement.split(fill, ((None, data, heads),) * 4, ((data, None, heads), (data,), (data,)))
    pool, table, owner = fill(k, v, *scales)
    none = jnp.zeros(len(table), jnp.int32)
    return PagedCache(pool, Pages(table, none[:, None], none[:, None], none, owner), *scales)


def own_pages(tokens: int) -> int:
    """Pages of a row with so many tokens of its own; up to PAGE − 1 of its context's tail stand before them."""
    return -(-(PAGE - 1 + tokens) // PAGE)


def hand_out_pages(
    pool: Array,
    pages: Pages,
    layers: int,
    problems: int,
    expected_A: Int[Array, " A"],
    problem_A: Int[Array, " A"],
    length_A: Int[Array, " A"],
    count_A: Int[Array, " A"],
    busy_A: Bool[Array, " A"],
    fresh_A: Bool[Array, " A"],
    start_A: Int[Array, " A"],
) -> tuple[Bool[Array, " A"], Array, Pages]:
    """Frees the pages of slots that are not busy, and gives one to each that begins or whose tokens have reached one.

    Where too few are free, the youngest rows give theirs back.  A row begins only where the pool has the expected pages
    for it and for every older row, so that few are sent away later.  Of one data shard.

    Args:
      pool, pages: of the slots, as `open_pool` and this function leave them.
      layers, problems: of the pool.
      expected_A: pages that each slot's row is expected to need.
      problem_A, length_A: each slot's context, and its tokens.
      count_A: tokens of its own by now.
      fresh_A: slots whose row begins; busy ones.
      start_A: the step at which it began.

    Returns:
      slots that are still busy, and the pool and the pages in which they have theirs.
    """
    table, owner, of_layer = pages.table_PGn[:, 0], pages.owner_N, pool.shape[0] // layers
    A, n, N = len(busy_A), table.shape[1], len(owner)
    shared = (of_layer - N) // problems
    # A row's tokens go on where its context's end, in the middle of a page: with 2 full pages and 5 tokens of context,
    # its own token 0 has offset 5 of its table's entry 2, which is its first own page.
    position_A, full_A = length_A + count_A, length_A // PAGE

    owner = _release(owner, busy_A & ~fresh_A)  # a fresh row owns nothing of what the one before it had
    owned_A = jnp.zeros(A, jnp.int32).at[owner].add(1, mode="drop")
    need_A = busy_A & (fresh_A | (position_A % PAGE == 0))
    free = jnp.sum(owner == A)
    # Who fits, as sums over the slots from the oldest to the youngest: each may use the free pages and those of all
    # that are younger, which yield to it, less what the older ones want too.
    #     oldest first   a  b  c  d        free 1
    #     owns           2  1  1  1
    #     needs          1  0  1  1
    #     wanted         1  1  2  3        running sum of what is needed
    #     available      4  3  2  1        1 + what all that are younger own
    #     fits           ✓  ✓  ✓  –        d gives its page back, which c takes
    oldest_first = jnp.argsort(jnp.where(busy_A, start_A, jnp.iinfo(jnp.int32).max), stable=True)
    need, owned, fresh, expected = (
        x[oldest_first] for x in (need_A.astype(jnp.int32), owned_A, fresh_A, jnp.where(busy_A, expected_A, 0))
    )
    wanted = jnp.cumsum(need)
    available = free + owned.sum() - jnp.cumsum(owned)
    fits = (wanted <= available) & (~fresh | (jnp.cumsum(jnp.maximum(owned + need, expected)) <= N))
    # The first that does not fit ends it for all that are younger, small or not: the oldest rows end first.
    kept_A = jnp.zeros(A, bool).at[oldest_first].set(jnp.cumsum(~fits) == 0) & busy_A

    owner, need_A = _release(owner, kept_A), need_A & kept_A
    free_pages = jnp.nonzero(owner == A, size=A, fill_value=N)[0].astype(jnp.int32)
    # The n-th slot that needs a page takes the n-th free one.  Where none is needed the index may be −1, jnp's last
    # entry: that is masked, not read.
    page_A = jnp.where(need_A, free_pages[jnp.cumsum(need_A) - 1], N)
    owner = owner.at[page_A].set(jnp.arange(A, dtype=jnp.int32), mode="drop")

    # Pages count from 0 among the rows' (`owner_N`), but behind the contexts' in the pool and in the table.
    begins_A, entry = kept_A & fresh_A, jnp.arange(n)
    of_context = jnp.where(entry < full_A[:, None], problem_A[:, None] * shared + entry, 0)
    table = jnp.where(begins_A[:, None], of_context, table)
    number_A, column_A = problems * shared + page_A, jnp.where(need_A, position_A // PAGE, n)
    table = table.at[jnp.arange(A), column_A].set(number_A, mode="drop")

    # The tail of a context, which fills no page, is copied to the head of its row's first own page.
    copies_A, layer_page = begins_A & (length_A % PAGE > 0), jnp.arange(layers) * of_layer

    def copy_tail(slot, pool):
        tail = layer_page + problem_A[slot] * shared + jnp.minimum(full_A[slot], shared - 1)
        # To nowhere, past the pool, where there is nothing to copy.
        first_own = jnp.where(copies_A[slot], layer_page + number_A[slot], len(pool))
        return pool.at[first_own].set(pool[tail], mode="drop")

    # One trip a slot in every step, most of which read a page and write nothing.  Around a branch for steps in which
    # a row begins, the TPU's compiler copies the whole pool; and `plan.hlo` counts no loop that values end in another.
    pool = jax.lax.fori_loop(0, A, copy_tail, pool)
    # What is fed to an empty slot is padding: nothing of it is kept.
    start_PG = jnp.where(kept_A, 0, jnp.iinfo(jnp.int32).max)[:, None]
    return kept_A, pool, Pages(table[:, None], length_A[:, None], start_PG, problem_A, owner)


def _release(owner_N, kept_A):
    """The pages' owners without the slots that are not kept."""
    # The number of slots stands for a free page; it indexes the appended entry, which is never kept.
    return jnp.where(jnp.append(kept_A, False)[owner_N], owner_N, len(kept_A))


def _keys_values_scales(arch: Architecture, execution: Execution, prefix: Prefix):
    """The contexts' keys and values [L, P, K, C, E], and the steps of each [L, P, K, E], 1 where pages are not int8."""
    k, v = (
        getattr(prefix.layers, name)
        if execution.scan_layers
        else jnp.stack([getattr(layer, name) for layer in prefix.layers])
        for name in ("k", "v")
    )
    scales = jnp.ones((), jnp.float32), jnp.ones((), jnp.float32)
    if execution.kv_dtype == "int8":
        scales = _int8_steps(k, v, prefix.length_P)
    return k, v, [jnp.broadcast_to(x, (*k.shape[:3], arch.head_size)) for x in scales]


def _int8_steps(k_LPKCE, v_LPKCE, length_P):
    """The steps of keys' and of values' int8, [L, P, K, E]: of each channel of each context.

    A key's pair of channels (i, i + E/2) is rotated on by later positions, so either may become as long as the pair is.
    """
    real = (jnp.arange(k_LPKCE.shape[3]) < length_P[:, None])[None, :, None, :, None]
    k, v = (jnp.where(real, x, 0).astype(jnp.float32) for x in (k_LPKCE, v_LPKCE))
    first, second = jnp.split(k, 2, axis=-1)
    pair = jnp.sqrt(first**2 + second**2)
    k_largest = jnp.concatenate([pair, pair], -1).max(3, initial=0)
    return _int8_step(k_largest, k, length_P), _int8_step(jnp.abs(v).max(3, initial=0), v, length_P)


def _int8_step(largest_LPKE, real_LPKCE, length_P):
    """One step of an int8: 127 of them reach beyond each channel's largest.  In a short context that is little to go
    by: no channel is taken to be smaller than twice its head's root mean square, or than 4 where there is no context at
    all (normed keys and values are of the order of 1)."""
    tokens_P11 = jnp.maximum(length_P, 1)[:, None, None]
    spread = jnp.sqrt(jnp.square(real_LPKCE).sum((3, 4))[..., None] / (tokens_P11 * real_LPKCE.shape[4]))
    largest = jnp.maximum(largest_LPKE, 2 * spread)
    return jnp.where(length_P[:, None, None] > 0, largest, 4.0) * (_HEADROOM / 127)


def put(pool, page, offset, kv):
    """Writes tokens into the pool in place; those whose page is none of its are dropped."""
    return pool.at[page.ravel(), offset.ravel()].set(kv.reshape(-1, *pool.shape[2:]), mode="drop")


def combine(k, v, k_scale, v_scale, execution: Execution, placement: Placement):
    """[..., K, E] keys and values → [..., 2·K, E], as pages hold them."""
    if execution.kv_dtype == "int8":
        k, v = (
            jnp.clip(jnp.round(x.astype(jnp.float32) / scale), -127, 127).astype(jnp.int8)
            for x, scale in ((k, k_scale), (v, v_scale))
        )
    K, E = k.shape[-2:]
    kv = jnp.stack([k, v], axis=-2)
    if placement.on_tpu:
        padding = [(0, 0)] * (kv.ndim - 3) + [(0, _tiled(K, kv.dtype) - K), (0, 0), (0, -E % _LANES)]
        kv = jnp.pad(kv, padding)
    return kv.reshape(*kv.shape[:-3], 2 * kv.shape[-3], kv.shape[-1])


def _tiled(heads: int, dtype: Any) -> int:
    """Key/value heads, with some of zeros, in a number that the TPU kernel's tiles are made for."""
    packing = 4 // jnp.dtype(dtype).itemsize
    sizes = [n for n in (1, 2, 4, 8) if n * packing >= 2 * heads and n * packing % 2 == 0]
    return sizes[0] * packing // 2 if sizes else -(-heads // (4 * packing)) * 4 * packing
