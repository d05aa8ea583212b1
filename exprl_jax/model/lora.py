"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685): a frozen model and a small trained part.

A product h·W of a target becomes h·W + (alpha / rank) · (h·A)·B, A of shape [in, rank] and random, B of shape [rank,
out] and 0 at the start, so that training begins at the frozen model.  Adapters stand in a tree of their own beside the
model's, under the names of their targets.
"""

from __future__ import annotations

import math

import flax.struct
import jax
import jax.numpy as jnp

from exprl_jax.architecture import Architecture
from exprl_jax.config import Execution, Lora
from exprl_jax.model.decoder import LORA_A, LORA_B, Params


@flax.struct.dataclass
class Adapted:
    """A frozen model with its adapters; stands wherever a model's parameters do.

    Attributes:
      base: the model's parameters.
      adapters: A and B of every target.
      scale: alpha / rank.
    """

    base: Params
    adapters: Params
    scale: float = flax.struct.field(pytree_node=False)


def adapt(lora: Lora, base: Params, params: Params) -> Params | Adapted:
    """What a run trains, as a model: with adapters, those on their base; without, the parameters themselves."""
    return Adapted(base, params, lora.alpha / lora.rank) if lora.rank else params


def attached(params: Params | Adapted) -> Params:
    """One tree for the decoder, with the scale in every B; nothing to do for parameters without adapters."""
    if not isinstance(params, Adapted):
        return params
    scaled = jax.tree_util.tree_map_with_path(
        lambda path, x: x * params.scale if path[-1].key.endswith(LORA_B) else x, params.adapters
    )
    return params.base | {layer: params.base[layer] | own for layer, own in scaled.items()}


def init_adapters(arch: Architecture, execution: Execution, lora: Lora, dtype: str, key: jax.Array) -> Params:
    """A uniform within ±1/√in, as in PEFT; B 0."""
    shapes = arch.products

    def layer(key):
        made = {}
        for name in lora.names:
            inputs, outputs = shapes[name]
            bound = 1 / math.sqrt(math.prod(inputs))
            own = jax.random.fold_in(key, list(shapes).index(name))
            made[name + LORA_A] = jax.random.uniform(own, (*inputs, lora.rank), dtype, -bound, bound)
            made[name + LORA_B] = jnp.zeros((lora.rank, *outputs), dtype)
        return made

    keys = jax.random.split(key, arch.layers)
    if execution.scan_layers:
        return {"layers": jax.vmap(layer)(keys)}
    return {f"layer_{i}": layer(keys[i]) for i in range(arch.layers)}
