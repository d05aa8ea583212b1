"""What JAX's ragged paged attention kernel computes, in numpy, with its contract checked."""

import jax
import numpy as np


def ragged_attention(q, pool, known, table, end, rows, *, sm_scale, k_scale=None, v_scale=None):
    """Causal attention of each row's last queries over its pages; NaN where nobody asked.

    Args:
      q: [N, H, E], the queries of one row behind another's.
      pool: [pages, page, 2·K, E], keys and values side by side.
      known: [B], tokens of each row.
      table: [B, n], each row's pages.
      end: [B + 1], where each row's queries begin and end.
      rows: [1], B.
    """
    assert (k_scale, v_scale) == ((1.0, 1.0) if pool.dtype == np.int8 else (None, None))
    assert rows.tolist() == [len(table)] and end[0] == 0 and end[-1] <= len(q)
    assert known.max() <= table.shape[1] * pool.shape[1]
    assert (table[:, : -(-known.max() // pool.shape[1])] < len(pool)).all()
    out = np.full(q.shape, np.nan, q.dtype)
    for b, (first, last) in enumerate(zip(end[:-1], end[1:], strict=True)):
        asked = last - first
        assert 0 < asked <= known[b]
        kv = pool[table[b]].reshape(-1, *pool.shape[2:])[: known[b]].astype(np.float64)
        k, v = (np.repeat(kv[:, i::2], q.shape[1] * 2 // pool.shape[2], axis=1) for i in (0, 1))
        score = np.einsum("qhe,she->hqs", q[first:last], k) * sm_scale
        hidden = np.arange(known[b]) > (known[b] - asked + np.arange(asked))[:, None]
        weight = np.exp(np.where(hidden, -np.inf, score - score.max()))
        out[first:last] = np.einsum("hqs,she->qhe", weight / weight.sum(-1, keepdims=True), v)
    return out


def called_back(*arrays, num_kv_pages_per_block, num_queries_per_block, **scales):
    """`ragged_attention` from within a program, with the kernel's arguments."""
    assert 0 < num_kv_pages_per_block <= arrays[3].shape[1] and num_queries_per_block > 0

    def call(*arrays):
        return ragged_attention(*map(np.asarray, arrays), **scales)

    return jax.pure_callback(call, jax.ShapeDtypeStruct(arrays[0].shape, arrays[0].dtype), *arrays)
