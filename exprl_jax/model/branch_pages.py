"""Pages of rows that go on from a beginning of another row: of a rollout's trace, of which a judge is asked often.

A problem with one trace r of 2 pages and a bit after a context of 1 page and a bit, and three rows that go on from it:

    r      [ c page 0 | r page 0 | r page 1 | r page 2 ]        its first own page begins with the context's tail
    row 0  [ c page 0 | own 0 … ]                               sees a few tokens of r, all in r's page 0
    row 1  [ c page 0 | r page 0 | own 0 … ]
    row 2  [ c page 0 | r page 0 | r page 1 | own 0 … ]         the page in which its beginning ends is copied to the
                                                                head of its first own page; before that all are r's

So a trace is read once, whatever is asked about its beginnings, and its pages are kept once.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from exprl_jax.mesh import Placement
from exprl_jax.model import paged


def spare_pages(branches: int, tokens: int) -> int:
    """Pages of a problem with so many rows, each of so many tokens of its own, that go on from traces."""
    return branches * paged.own_pages(tokens)


def branch(
    cache: paged.PagedCache,
    begin_PG: Int[Array, "P G"],
    start_PG: Int[Array, "P G"],
    tokens: int,
    placement: Placement,
    kv_heads: int,
) -> paged.PagedCache:
    """The cache of the rows that go on.

    Args:
      cache: of traces, all of them read, with `spare_pages`.
      begin_PG: tokens of its trace that each row sees; rows of one trace stand side by side.
      start_PG: the first real slot of each row, of its own ones.
      tokens: own ones of each row, at most.
    """
    layers, own = cache.k_scale.shape[0], paged.own_pages(tokens)

    def on_device(pool, table_PTn, length_P, begin_PG):
        (P, T, n), G = table_PTn.shape, begin_PG.shape[1]
        of_layer = pool.shape[0] // layers
        length_PG = length_P[:, :1] + begin_PG
        full_PG = length_PG // paged.PAGE
        # The spare pages are the last of each layer.
        first_PG = of_layer - P * G * own + own * jnp.arange(P * G, dtype=jnp.int32).reshape(P, G)
        trace_PGn = jnp.repeat(table_PTn, G // T, axis=1)
        entry = jnp.arange(n + own)
        past = entry - full_PG[..., None]
        seen = jnp.pad(trace_PGn, ((0, 0), (0, 0), (0, own)))
        table = jnp.where(past < 0, seen, first_PG[..., None] + jnp.clip(past, 0, own - 1))
        # Where a beginning ends with its page, nothing of the next one is seen: what is copied is overwritten.
        tail_PG = jnp.take_along_axis(trace_PGn, jnp.minimum(full_PG, n - 1)[..., None], axis=2)[..., 0]
        layer_page, tails, firsts = jnp.arange(layers) * of_layer, tail_PG.ravel(), first_PG.ravel()

        def copy_tail(row, pool):
            return pool.at[layer_page + firsts[row]].set(pool[layer_page + tails[row]])

        return jax.lax.fori_loop(0, P * G, copy_tail, pool), table.astype(jnp.int32), length_PG

    data, heads = placement.data, placement.axis_of(kv_heads)
    pool, rows = (data, None, heads), (data,)
    split = placement.split(on_device, (pool, rows, rows, rows), (pool, rows, rows))
    pool, table, length_PG = split(cache.pool, cache.pages.table_PGn, cache.pages.length_PG, begin_PG)
    return cache.replace(pool=pool, pages=paged.Pages(table, length_PG, start_PG))
