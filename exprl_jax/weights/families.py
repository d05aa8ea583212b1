"""The model families that we know, an entry each: how their decoders differ, and how their files say so.

What a family computes is in the fields of `Architecture`; the decoder never asks for a family's name.  Where nothing
new is computed, a family is an entry here and nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from exprl_jax.architecture import Architecture


@dataclasses.dataclass(frozen=True)
class Family:
    """What the models of a family have in common.

    Attributes:
      class_name: of their class in `transformers`.
      qkv_bias, qk_norm: as in `Architecture`.
      settings: keys of config.json with the one value that we compute.  Other values are refused, and exports have
        these.
      required: keys that config.json must have, because without them `transformers` assumes other values than we do.
      gguf_rotates_neighbours: rotary positions turn rows 2i and 2i + 1 of a head of a GGUF file, not i and i + E/2.
    """

    class_name: str
    settings: Mapping[str, Any]
    qkv_bias: bool = False
    qk_norm: bool = False
    required: tuple[str, ...] = ()
    gguf_rotates_neighbours: bool = False

    def architecture(self, name: str, **sizes: Any) -> Architecture:
        """The architecture of a model of this family, which is called `name`."""
        return Architecture(family=name, qkv_bias=self.qkv_bias, qk_norm=self.qk_norm, **sizes)


# By the `model_type` of config.json, which is also the `general.architecture` of GGUF files.
FAMILIES = {
    "llama": Family(
        class_name="LlamaForCausalLM",
        settings={"attention_bias": False, "mlp_bias": False},
        gguf_rotates_neighbours=True,
    ),
    "qwen2": Family(
        class_name="Qwen2ForCausalLM",
        settings={"use_sliding_window": False},
        qkv_bias=True,
        required=("num_key_value_heads",),
    ),
    "qwen3": Family(
        class_name="Qwen3ForCausalLM",
        settings={"attention_bias": False, "use_sliding_window": False},
        qk_norm=True,
        required=("num_key_value_heads", "head_dim"),
    ),
    "mistral": Family(
        class_name="MistralForCausalLM",
        settings={"sliding_window": None},
        required=("num_key_value_heads", "sliding_window"),
    ),
}
