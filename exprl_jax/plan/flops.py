"""Floating-point operations of a traced program, loops included.

The compiler's own count takes a loop's body once and leaves kernels out.  Ours counts matrix products, where all but a
thousandth of a transformer's operations are, over the whole mesh; recomputation counts where it runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from exprl_jax.plan.kernels import Kernel, Operand, kernel_cost

_UNKNOWN = {"conv_general_dilated", "ragged_dot", "ragged_dot_general", "scaled_matmul"}


def matrix_flops(traced: ClosedJaxpr | Jaxpr, steps: int, kernels: Mapping[str, Kernel]) -> float:
    """Operations of all matrix products, two for each multiplication and addition.

    Args:
      steps: trips of the loop whose end depends on values; 0 where there is none.
      kernels: costs of Pallas kernels, by a pattern of their names.

    Raises:
      ValueError: such a loop and `steps` is 0, one inside another, or a product or kernel of unknown cost.
    """

    def count(jaxpr: Any, dynamic: bool) -> float:
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        return sum(cost(equation, dynamic) for equation in jaxpr.eqns)

    def cost(equation: Any, dynamic: bool) -> float:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
        if name in _UNKNOWN:
            raise ValueError(f"the operations of {name} are not counted; add it to pods.flops")
        if name == "pallas_call":
            avals = [x.aval for x in equation.invars]
            given = [Operand(x.shape, x.dtype.itemsize, jnp.issubdtype(x.dtype, jnp.floating)) for x in avals]
            return kernel_cost(kernels, params["name"], given).flops
        if name == "scan":
            return params["length"] * count(params["jaxpr"], dynamic)
        if name == "while":
            trips = _known_trips(equation)
            if trips is not None:
                return trips * count(params["body_jaxpr"], dynamic)
            body = count(params["body_jaxpr"], True)
            if body and (dynamic or not steps):
                why = "lies inside another such loop" if dynamic else "got no number of steps for it"
                raise ValueError(f"a loop ends where values say, and {why}")
            return steps * body
        if name == "cond":
            return max(count(branch, dynamic) for branch in params["branches"])
        if name == "shard_map":
            sizes = params["mesh"].shape
            return math.prod(sizes[axis] for axis in params["newly_manual_axes"]) * count(params["jaxpr"], dynamic)
        return sum(count(inner, dynamic) for inner in _inner(params))

    return count(traced, False)


def _known_trips(loop: Any) -> int | None:
    """Trips, at most, of a loop that counts by ones to a number that it carries along, as `fori_loop` makes them."""
    condition, consts = loop.params["cond_jaxpr"].jaxpr, loop.params["cond_nconsts"]
    carried = loop.invars[consts + loop.params["body_nconsts"] :]
    if [equation.primitive.name for equation in condition.eqns] != ["lt"]:
        return None
    ends = [x.val if isinstance(x, Literal) else None for x in (*loop.invars[:consts], *carried)]
    limit = condition.eqns[0].invars[1]
    end = limit.val if isinstance(limit, Literal) else ends[condition.invars.index(limit)]
    first = condition.eqns[0].invars[0]
    start = None if isinstance(first, Literal) else ends[condition.invars.index(first)]
    return None if end is None else max(int(end) - int(start or 0), 0)


def _inner(params: Mapping[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if isinstance(each, ClosedJaxpr | Jaxpr):
                yield each
