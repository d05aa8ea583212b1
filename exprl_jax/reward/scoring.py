"""The judge's scoring passes: one forward, and the distribution over the five digits that could come next."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from exprl_jax.mesh import DATA
from exprl_jax.model.decoder import Params, Transformer, logits
from exprl_jax.records import BranchRows, Prefix, Rows


def score(
    transformer: Transformer, params: Params, prefix: Prefix, rows: Rows, *, digit_ids: tuple[int, ...]
) -> Float32[Array, "P J digits"]:
    """Probabilities of the digits 1..5, given that one of them follows each row.

    One problem's rows are scored against its prefix; the pass is mapped over problems.  Only the five digits' columns
    of the unembedding are used, at the last slot alone.
    """

    def hidden_fn(inside, params, one, own):
        return inside.hidden_states(params, one, own)[0][:, -1]

    return _by_problem(transformer, params, prefix, rows, digit_ids, hidden_fn)


def score_branches(
    transformer: Transformer, params: Params, prefix: Prefix, rows: BranchRows, *, digit_ids: tuple[int, ...]
) -> Float32[Array, "P G N digits"]:
    """The same, given that one of the digits follows each branch of each row: the prefixes of a trace in one pass."""

    def hidden_fn(inside, params, one, own):
        hidden_GTD = inside.branch_hidden_states(params, one, own)[0]
        return jnp.take_along_axis(hidden_GTD, own.last_PGN[0][..., None], axis=1)

    return _by_problem(transformer, params, prefix, rows, digit_ids, hidden_fn)


def _by_problem(transformer, params, prefix, rows, digit_ids, hidden_fn):
    """The digits' probabilities after some hidden states, which are computed problem by problem.

    Args:
      hidden_fn: (transformer, params, a problem's prefix, its rows) → the hidden states.
    """
    params = transformer.cast_kernels(params)
    inside = dataclasses.replace(transformer, placement=dataclasses.replace(transformer.placement, mapped=True))
    table_D5 = transformer.unembedding(params)[:, jnp.asarray(digit_ids)]

    def score_problem(layers, length, own):
        one = Prefix(jax.tree.map(lambda x: jnp.expand_dims(x, -4), layers), length[None])
        own = jax.tree.map(lambda x: x[None], own)
        return jax.nn.softmax(logits(hidden_fn(inside, params, one, own), table_D5), axis=-1)

    # Stacked layers carry L before P.
    problem_axis = 1 if transformer.execution.scan_layers else 0
    mapped = jax.vmap(score_problem, in_axes=(problem_axis, 0, 0), spmd_axis_name=DATA)
    return mapped(prefix.layers, prefix.length_P, rows)
