"""What a Pallas kernel costs, by formula: neither the compiler nor the tracer looks inside one."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple


class Operand(NamedTuple):
    """An argument of a kernel.

    Attributes:
      size: bytes of an element.
      floating: its elements are floating-point numbers.
    """

    shape: tuple[int, ...]
    size: float
    floating: bool


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one call on one device.

    Attributes:
      flops: floating-point operations of matrix products.
      bytes: read from and written to HBM.
    """

    flops: float
    bytes: float


Kernel = Callable[[Sequence[Operand]], Cost]


def splash(products: int, results: int) -> Kernel:
    """Splash attention over causal rows: the last query sees all keys, each before it one less.

    Args:
      products: matrix products per block of scores: 2 forward, 3 for dq, 4 for dk and dv, 5 for all three at once.
      results: arrays of the queries' size that it writes.
    """

    def cost(operands: Sequence[Operand]) -> Cost:
        # The first numbers among the arguments are queries and keys, [..., tokens, E]; before them stand the mask's blocks.
        query, key = [x for x in operands if x.floating][:2]
        *heads, queries, width = query.shape
        scores = math.prod(heads) * queries * (key.shape[-2] - (queries - 1) / 2)
        moved = sum(math.prod(x.shape) * x.size for x in operands) + results * math.prod(query.shape) * query.size
        return Cost(2 * products * scores * width, moved)

    return cost


def paged(reading: float, decoding: float) -> Kernel:
    """Ragged paged attention.

    Args:
      reading: tokens that each of several new tokens of a row attends to, on average over the calls.
      decoding: the same where a row has one new token.
    """

    def cost(operands: Sequence[Operand]) -> Cost:
        query = next(x for x in operands if len(x.shape) == 3)
        pool = next(x for x in operands if len(x.shape) == 4)
        table = next(x for x in operands if len(x.shape) == 2)
        (queries, heads, width), rows = query.shape, table.shape[0]
        tokens = reading if queries > rows else decoding
        combined = pool.shape[2]  # keys and values of every head
        # A row's keys come in once for each block of its queries; the kernel's blocks have up to 128.
        passes = rows * math.ceil(queries / rows / 128)
        moved = passes * tokens * combined * width * pool.size + 2 * math.prod(query.shape) * query.size
        return Cost(4 * queries * heads * tokens * width, moved)

    return cost


def kernel_cost(kernels: Mapping[str, Kernel], name: str, operands: Sequence[Operand]) -> Cost:
    """The cost of a kernel, by the first pattern that its name has in it.

    Raises:
      ValueError: there is none.
    """
    for pattern, cost in kernels.items():
        if re.search(pattern, name):
            return cost(operands)
    raise ValueError(f"no cost is known of the kernel {name!r}; give it in pods.kernels (known: {', '.join(kernels)})")


# The names that JAX's kernels give themselves.  A row of the update is counted as one example, the most that it can be.
KERNELS: Mapping[str, Kernel] = {
    r"splash_\w+_fwd": splash(products=2, results=1),
    r"splash_\w+_dq": splash(products=3, results=1),
    r"splash_\w+_dkv": splash(products=4, results=2),
}
