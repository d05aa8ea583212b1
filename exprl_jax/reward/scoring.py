"""The judge's scoring pass: one forward, and the distribution over the five digits that could come next."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from exprl_jax.architecture import Architecture
from exprl_jax.config import Execution
from exprl_jax.mesh import DATA, ONE_DEVICE, Placement
from exprl_jax.model import decoder
from exprl_jax.records import Prefix, Rows


def score(
    params: decoder.Params,
    arch: Architecture,
    how: Execution,
    prefix: Prefix,
    rows: Rows,
    *,
    digit_ids: tuple[int, ...],
    place: Placement = ONE_DEVICE,
) -> Float32[Array, "P J digits"]:
    """Probabilities of the digits 1..5, given that one of them follows each row.

    One problem's rows are scored against its prefix; the pass is mapped over problems.  Only the five digits' columns
    of the unembedding are used, at the last slot alone.
    """
    params, inside = decoder.cast_kernels(params, how), dataclasses.replace(place, mapped=True)
    table_D5 = decoder.unembedding(params, arch)[:, jnp.asarray(digit_ids)]

    def score_problem(layers, length, tokens_JT, start_J):
        one = Prefix(jax.tree.map(lambda x: jnp.expand_dims(x, -4), layers), length[None])
        own = Rows(tokens_JT[None], start_J[None])
        hidden_JTD = decoder.hidden_states(params, arch, how, one, own, inside)[0]
        return jax.nn.softmax(decoder.logits(hidden_JTD[:, -1], table_D5), axis=-1)

    # Stacked layers carry L before P.
    problem_axis = 1 if how.scan_layers else 0
    mapped = jax.vmap(score_problem, in_axes=(problem_axis, 0, 0, 0), spmd_axis_name=DATA)
    return mapped(prefix.layers, prefix.length_P, rows.tokens_PGT, rows.start_PG)
