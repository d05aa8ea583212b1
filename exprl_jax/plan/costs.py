"""What a call must at least compute and move, counted from the model's parameters and the shapes.

Operations are those of matrix products, two for each multiplication and addition, on all devices together: all but a
thousandth of a transformer's.  Bytes are what a device exchanges with its HBM: the weights, once for each pass over
them; the keys and values that queries attend to; the optimizer's state.  Activations are left out.

Nothing that compiles counts this: `cost_analysis()` takes a loop's body once and a Pallas kernel as nothing, and
`jax.experimental.roofline` knows no collectives that the partitioner makes.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax

from exprl_jax.architecture import Architecture
from exprl_jax.config import Execution

# Of a layer's matrices, by their parameters' names.
_ALL, _ADAPTERS, _LAST = r"(q|k|v|o|gate|up|down)(_lora_[ab])?", r".*_lora_[ab]", r"down(_lora_b)?"
# Matrix products of attention for each pair of a query and a key that it sees: scores and values going forward; going
# back, the splash kernels make the scores again for both of theirs: 3 for dq, and 4 for dk and dv.
FORWARD, BACKWARD = 2, 7


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one call.

    Attributes:
      products: operations of products with weights, on all devices together.
      attention: the same of attention's scores and values.
      bytes: to and from HBM, a device.
    """

    products: float = 0.0
    attention: float = 0.0
    bytes: float = 0.0

    @property
    def flops(self) -> float:
        return self.products + self.attention

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.products + other.products, self.attention + other.attention, self.bytes + other.bytes)


def seen_pairs(queries: int, keys: int) -> float:
    """Pairs of a query and a key that it sees, where the queries are the last of the keys' tokens.

        keys →            the last query sees all keys, each before it one less:
    q   x x x x . .
    ↓   x x x x x .       queries · (keys − (queries − 1) / 2)
        x x x x x x
    """
    return queries * (keys - (queries - 1) / 2)


def forward(arch: Architecture, params: Any, tokens: float, pairs: float, logits: float = 0.0) -> Cost:
    """One pass.

    Args:
      params: of the model, adapters included; arrays or shapes.
      tokens: that go through the layers.
      pairs: of queries and keys that they see, over all rows.
      logits: tokens whose distribution over the vocabulary is computed.
    """
    products = tokens * _elements(params, _ALL) + logits * arch.width * arch.vocab_size
    return Cost(2 * products, FORWARD * _attention(arch, pairs))


def update(
    arch: Architecture, execution: Execution, params: Any, tokens: float, pairs: float, *, teacher: bool = False
) -> Cost:
    """A forward and its gradient, with logits of every token.

    Going back, a product x·W costs another for the gradient of x, and one for W's where W is trained.  Before that the
    layers run again where they are rematerialised, but for what nothing reads: the product that ends them; the logits
    are computed again in any case.

    Args:
      params: as in `forward`; where there are adapters, they alone are trained.
      teacher: another model's logits are computed beside, going forward and going back.
    """
    matrices, adapters = _elements(params, _ALL), _elements(params, _ADAPTERS)
    elements, again = 2 * matrices + (adapters or matrices), 0
    if execution.remat != "none":
        elements += matrices - _elements(params, _LAST)
        again = FORWARD if execution.remat == "full" else 0
    logits = (3 if adapters else 4) + 2 * teacher
    products = tokens * (elements + logits * arch.width * arch.vocab_size)
    return Cost(2 * products, (FORWARD + again + BACKWARD) * _attention(arch, pairs))


def _attention(arch: Architecture, pairs: float) -> float:
    return 2 * pairs * arch.layers * arch.heads * arch.head_size


def _elements(params: Any, pattern: str) -> int:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return sum(leaf.size for path, leaf in leaves if re.fullmatch(pattern, path[-1].key))
