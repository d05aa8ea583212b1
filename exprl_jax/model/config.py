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


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a decoder runs; changes speed and memory, never (beyond rounding) the result.

    Attributes:
      scan_layers: True stacks the layers' parameters in one array each and scans over them (one layer is compiled,
        for accelerators); False keeps a subtree a layer (no copy of a layer's weights a step, for CPUs).
      compute_dtype: dtype of the matrix products; norms, softmax and log-probabilities are float32 in any case.
      remat: what the backward pass computes again instead of keeping it: `none`; a `full` layer from its input;
        `but_attention`, a layer with the result of its attention kept.
      kv_dtype: of the keys and values that rows are decoded with: `compute_dtype`'s, or `int8`.
    """

    scan_layers: bool
    compute_dtype: Literal["float32", "bfloat16"]
    remat: Literal["none", "full", "but_attention"]
    kv_dtype: Literal["compute", "int8"]
