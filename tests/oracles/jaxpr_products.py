"""Operations of a traced program by brute force: every matrix product in its jaxpr, as often as its loops run."""

import math

from jax.extend.core import ClosedJaxpr, Jaxpr


def count_products(traced, trips, turns=0):
    """(operations of products with weights, of attention): two for each multiplication and addition.

    Attention's products have batch dimensions, rows and heads; weights have none.

    Args:
      traced: a jaxpr.
      trips: how often the loops run that values end, in their order in the program.
      turns: how often those of attention do, which `trips` leaves out: all their products have batch dimensions.
    """
    left = iter(trips)

    def count(jaxpr):
        totals = [0, 0]
        for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
            for kind, operations in enumerate(cost(equation)):
                totals[kind] += operations
        return totals

    def cost(equation):
        name, params = equation.primitive.name, equation.params
        assert name not in ("pallas_call", "conv_general_dilated", "ragged_dot_general"), name
        if name == "dot_general":
            (contracted, _), (batch, _) = params["dimension_numbers"]
            terms = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            operations = 2 * math.prod(equation.outvars[0].aval.shape) * terms
            return (0, operations) if batch else (operations, 0)
        times = 1
        if name == "scan":
            times = params["length"]
        elif name == "while":
            times = next(left) if False in batches(equation.params["body_jaxpr"]) else turns
        elif name == "shard_map":
            times = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
        inner = [x for value in params.values() for x in (value if isinstance(value, tuple | list) else [value])]
        parts = [count(x) for x in inner if isinstance(x, ClosedJaxpr | Jaxpr)]
        together = max if name == "cond" else sum
        return [times * together([0, *(part[kind] for part in parts)]) for kind in (0, 1)]

    totals = count(traced)
    assert next(left, None) is None, "the program has fewer loops"
    return tuple(totals)


def batches(traced):
    """Of a program's products, whether they have batch dimensions: a set."""
    found = set()
    for equation in getattr(traced, "jaxpr", traced).eqns:
        if equation.primitive.name == "dot_general":
            found.add(any(equation.params["dimension_numbers"][1]))
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                found |= batches(inner) if isinstance(inner, ClosedJaxpr | Jaxpr) else set()
    return found


def kernels_of(traced):
    """Matrix products in the body of each Pallas kernel, by the kernel's name."""
    counts = {}

    def walk(jaxpr, kernel):
        for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
            name = equation.params["name"] if equation.primitive.name == "pallas_call" else kernel
            if name and equation.primitive.name == "dot_general":
                counts[name] = counts.get(name, 0) + 1
            for value in equation.params.values():
                for inner in value if isinstance(value, tuple | list) else (value,):
                    if isinstance(inner, ClosedJaxpr | Jaxpr):
                        walk(inner, name)

    walk(traced, None)
    return counts
