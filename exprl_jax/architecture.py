"""What a decoder is, as a model's own config says; how we run it is `config.Execution`."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Changes to the rotary frequencies beyond `rope_theta`.

    Attributes:
      kind: `linear` divides every frequency by `factor`; `llama3` divides only the long wavelengths, with a smooth
        band between `low_freq_factor` and `high_freq_factor` (Llama 3.1's rule).
      original_positions: context length before scaling (`llama3` only).
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A Llama-shaped decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

    Attributes:
      family: the name under which files know it (`weights.families`); nothing is computed by it.
      qkv_bias: queries, keys and values have a bias.
      qk_norm: RMSNorm on each head of queries and keys.
      tied: the unembedding is the transposed embedding.
      rope_scaling: None for plain rotary frequencies.
    """

    family: str
    qkv_bias: bool
    qk_norm: bool
    vocab_size: int
    width: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    norm_eps: float
    tied: bool
    max_positions: int

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        heads, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        layer = self.width * (2 * heads + 2 * kv + 3 * self.ffn + 2)
        layer += (heads + 2 * kv) * self.qkv_bias + 2 * self.head_size * self.qk_norm
        return self.layers * layer + self.vocab_size * self.width * (1 if self.tied else 2) + self.width

    @property
    def products(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        """(dims that it takes in, dims that it gives) of every product of a layer, by its matrix's name."""
        D, F, E = (self.width,), (self.ffn,), self.head_size
        heads, kv = (self.heads, E), (self.kv_heads, E)
        layer = {"q": (D, heads), "k": (D, kv), "v": (D, kv), "o": (heads, D)}
        return layer | {"gate": (D, F), "up": (D, F), "down": (F, D)}

    @property
    def fault(self) -> str:
        """Why a decoder of these sizes cannot be; empty if it can."""
        if self.heads % self.kv_heads:
            return f"{self.heads} attention heads with {self.kv_heads} key-value heads (not a divisor)"
        if self.head_size < 2 or self.head_size % 2:
            return f"heads of size {self.head_size} (rotary positions need an even one)"
        return ""


def positive(value: Any, kind: type, what: str) -> Any:
    """A number out of a file that says what a model is.

    Args:
      kind: `int` for whole numbers; `float` for any.

    Raises:
      ValueError: it is not a positive, finite number of this kind; says so of `what`.
    """
    number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise ValueError(f"{what} is {value!r}, expected a positive {'whole ' if kind is int else ''}number")
    return value
