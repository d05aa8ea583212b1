"""Keys and values of past tokens.

A cache keeps heads before slots, `P G K S E`, so that both attention products read it without a transpose.  Over
layers it has the decoder's own layout: a tuple of `KV`, or one `KV` with leading `L` when layers are scanned.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from exprl_jax.architecture import Architecture
from exprl_jax.config import Execution


@flax.struct.dataclass
class KV:
    """Keys and values of one layer (or, with a leading L, of all).

    Attributes:
      k, v: [P, G, K, S, E] of rows; [P, K, C, E] of contexts.
    """

    k: jax.Array
    v: jax.Array


def empty_cache(arch: Architecture, execution: Execution, problems: int, group: int, slots: int) -> Any:
    """Zeros for the rows of `problems` × `group` sequences; with 0 slots, a cache that keeps nothing."""
    return _zeros(arch, execution, (problems, group, arch.kv_heads, slots, arch.head_size))


def empty_context(arch: Architecture, execution: Execution, problems: int) -> Any:
    """The keys and values of a context of no tokens."""
    return _zeros(arch, execution, (problems, arch.kv_heads, 0, arch.head_size))


def row_to_context(layers: Any) -> Any:
    """Takes the one row of each problem ([P, 1, K, S, E]) as that problem's context ([P, K, S, E])."""
    return jax.tree.map(lambda x: x.squeeze(-4), layers)


def _zeros(arch: Architecture, execution: Execution, shape: tuple[int, ...]) -> Any:
    dtype = jnp.dtype(execution.compute_dtype)
    if execution.scan_layers:
        shape = (arch.layers, *shape)
        return KV(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
    return tuple(KV(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(arch.layers))
