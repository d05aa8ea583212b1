"""What a decoder is (`Architecture`, read from a model's own config) and how we run it (`Execution`, ours)."""

from __future__ import annotations

import dataclasses
from typing import Literal


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
      family: `llama` (SmolLM2 included), `qwen2` (bias on q, k, v) or `qwen3` (RMSNorm on each query and key head).
      tied: the unembedding is the transposed embedding.
      rope_scaling: None for plain rotary frequencies.
    """

    family: Literal["llama", "qwen2", "qwen3"]
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
    def qkv_bias(self) -> bool:
        return self.family == "qwen2"

    @property
    def qk_norm(self) -> bool:
        return self.family == "qwen3"

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        heads, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        layer = self.width * (2 * heads + 2 * kv + 3 * self.ffn + 2)
        layer += (heads + 2 * kv) * self.qkv_bias + 2 * self.head_size * self.qk_norm
        return self.layers * layer + self.vocab_size * self.width * (1 if self.tied else 2) + self.width
