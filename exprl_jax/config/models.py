"""Models, how they run and on which devices."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from exprl_jax.config.values import _INT32, Count, CountOrNone, Day, Positive, Range


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each axis.

    Attributes:
      data: parts of the batch and of each parameter (FSDP); −1 for all devices that `model` leaves.
      model: parts of the heads, the feed-forward and the vocabulary (tensor parallelism).
    """

    data: Annotated[int, Range(-1, _INT32, "a positive number, or -1 for all devices")]
    model: Count


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a decoder runs; changes speed and memory, never (beyond rounding) the result.

    Attributes:
      scan_layers: True stacks the layers' parameters in one array each and scans over them (one layer is compiled,
        for accelerators); False keeps a subtree a layer (no copy of a layer's weights a step, for CPUs).
      compute_dtype: dtype of matrix products; norms, softmax and log-probabilities are float32 in any case.
      remat: what the backward pass computes again instead of keeping it: `none`; a `full` layer from its input;
        `but_attention`, a layer with the result of its attention kept.
      kv_dtype: dtype of the keys and values that rows are decoded with: `compute`, as `compute_dtype`, or `int8`.
    """

    scan_layers: bool
    compute_dtype: Literal["float32", "bfloat16"]
    remat: Literal["none", "full", "but_attention"]
    kv_dtype: Literal["compute", "int8"]


@dataclasses.dataclass(frozen=True)
class Model:
    """A language model: where its weights come from and how it runs.

    Attributes:
      weights: a Hugging Face folder, a `.gguf` file, `pip:<package>==<version>`, a hub id, a run's workdir or one of
        its checkpoints, `random:<folder>` (new weights from the seed, for the config.json and the tokenizer of a
        folder), or `random:<family>` (a tiny architecture with a byte tokenizer).
      execution: how it runs.
      param_dtype: dtype the parameters are held in.
      date: the day, YYYY-MM-DD, that a chat template is told when it asks for today's; a fixed one, so that prompts are
        the same tomorrow, on every host and in every stage.
    """

    weights: str
    execution: Execution
    param_dtype: Literal["float32", "bfloat16"]
    date: Day


@dataclasses.dataclass(frozen=True)
class Lora:
    """Training low-rank adapters of a frozen policy, instead of all its parameters.

    Attributes:
      rank: rank of the adapters; 0 trains the parameters themselves.
      alpha: the adapters' product is scaled by alpha / rank.
      targets: the matrices that get adapters: some of `q,k,v,o,gate,up,down`, with commas between.
    """

    rank: CountOrNone
    alpha: Positive
    targets: str

    @property
    def names(self) -> tuple[str, ...]:
        """The targets."""
        return tuple(self.targets.split(","))
