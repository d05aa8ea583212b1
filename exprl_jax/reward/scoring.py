"""The judge's scoring pass: one forward, and the distribution over the five digits that could come next."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from exprl_jax.mesh import DATA
from exprl_jax.model.decoder import Params, Transformer, logits
from exprl_jax.records import Prefix, Rows


def score(
    transformer: Transformer, params: Params, prefix: Prefix, rows: Rows, *, digit_ids: tuple[int, ...]
) -> Float32[Array, "P J digits"]:
    """Probabilities of the digits 1..5, given that one of them follows each row.

    One problem's rows are scored against its prefix; the pass is mapped over problems.  Only the five digits' columns
    of the unembedding are used, at the last slot alone.
    """
    params = transformer.cast_kernels(params)
    inside = dataclasses.replace(transformer, placement=dataclasses.replace(transformer.placement, mapped=True))
    table_D5 = transformer.unembedding(params)[:, jnp.asarray(digit_ids)]

    def score_problem(layers, length, tokens_JT, start_J):
        one = Prefix(jax.tree.map(lambda x: jnp.expand_dims(x, -4), layers), length[None])
        own = Rows(tokens_JT[None], start_J[None])
        hidden_JTD = inside.hidden_states(params, one, own)[0]
        return jax.nn.softmax(logits(hidden_JTD[:, -1], table_D5), axis=-1)

    # Stacked layers carry L before P.
    problem_axis = 1 if transformer.execution.scan_layers else 0
    mapped = jax.vmap(score_problem, in_axes=(problem_axis, 0, 0, 0), spmd_axis_name=DATA)
    return mapped(prefix.layers, prefix.length_P, rows.tokens_PGT, rows.start_PG)
