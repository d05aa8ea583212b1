"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685): a frozen model and a small trained part.

A product h·W of a target becomes h·W + (alpha / rank) · (h·A)·B, A of shape [in, rank] and random, B of shape [rank,
out] and 0 at the start, so that training begins at the frozen model.  Adapters stand in a tree of their own beside the
model's, under the names of their targets.
"""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from exprl_jax.config import Lora
from exprl_jax.model.config import Architecture, Execution
from exprl_jax.model.decoder import LORA_A, LORA_B, Params
from exprl_jax.model.weights import Entry, fetch_tensor, write_tensors

# PEFT's names of the modules.
_MODULES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


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


def adapt(how: Lora, base: Params, params: Params) -> Params | Adapted:
    """What a run trains, as a model: with adapters, those on their base; without, the parameters themselves."""
    return Adapted(base, params, how.alpha / how.rank) if how.rank else params


def attached(params: Params | Adapted) -> Params:
    """One tree for the decoder, with the scale in every B; nothing to do for parameters without adapters."""
    if not isinstance(params, Adapted):
        return params
    scaled = jax.tree_util.tree_map_with_path(
        lambda path, x: x * params.scale if path[-1].key.endswith(LORA_B) else x, params.adapters
    )
    return params.base | {layer: params.base[layer] | own for layer, own in scaled.items()}


def fetch_merged(adapted: Adapted, how: Execution, entry: Entry) -> np.ndarray:
    """One tensor of the ordinary model that computes the same, W + scale · A·B in float32, on this host: no second
    model ever exists.  See `weights.fetch_tensor`."""
    leaf, name, layer = entry
    weight = fetch_tensor(adapted.base, how, entry)
    own = {} if layer is None else adapted.adapters["layers" if how.scan_layers else f"layer_{layer}"]
    if name + LORA_A not in own:
        return weight
    a, b = (fetch_tensor(adapted.adapters, how, (leaf, name + part, layer)) for part in (LORA_A, LORA_B))
    product = np.tensordot(a.astype(np.float32), b.astype(np.float32), 1)
    return weight.astype(np.float32) + np.float32(adapted.scale) * product


def init_adapters(arch: Architecture, how: Execution, lora: Lora, dtype: str, key: jax.Array) -> Params:
    """A uniform within ±1/√in, as in PEFT; B 0."""
    shapes = _shapes(arch)

    def layer(key):
        made = {}
        for name in lora.names:
            taken, given = shapes[name]
            bound = 1 / math.sqrt(math.prod(taken))
            own = jax.random.fold_in(key, list(shapes).index(name))
            made[name + LORA_A] = jax.random.uniform(own, (*taken, lora.rank), dtype, -bound, bound)
            made[name + LORA_B] = jnp.zeros((lora.rank, *given), dtype)
        return made

    keys = jax.random.split(key, arch.layers)
    if how.scan_layers:
        return {"layers": jax.vmap(layer)(keys)}
    return {f"layer_{i}": layer(keys[i]) for i in range(arch.layers)}


def abstract_adapters(arch: Architecture, how: Execution, lora: Lora, dtype: str) -> Params:
    """Shapes and dtypes; allocates nothing."""
    return jax.eval_shape(lambda: init_adapters(arch, how, lora, dtype, jax.random.key(0)))


def _shapes(arch: Architecture) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """(dims that a target's product takes in, dims that it gives)."""
    D, F, E = (arch.width,), (arch.ffn,), arch.head_size
    heads, kv = (arch.heads, E), (arch.kv_heads, E)
    return {"q": (D, heads), "k": (D, kv), "v": (D, kv), "o": (heads, D), "gate": (D, F), "up": (D, F), "down": (F, D)}


def save_adapters(
    folder: pathlib.Path, adapters: Any, arch: Architecture, how: Execution, lora: Lora, base: str
) -> None:
    """Writes a folder that PEFT's `PeftModel.from_pretrained` loads; call on one process, with arrays of its own.

    Args:
      adapters: as in `Adapted`, as numpy arrays.
      base: the model's name, for PEFT to find it by.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for layer in range(arch.layers):
        own = {k: x[layer] for k, x in adapters["layers"].items()} if how.scan_layers else adapters[f"layer_{layer}"]
        for name in lora.names:
            a, b = (np.asarray(own[name + part], np.float32) for part in (LORA_A, LORA_B))
            module = f"base_model.model.model.layers.{layer}.{_MODULES[name]}"
            # torch holds [out, in].
            tensors[f"{module}.lora_A.weight"] = a.reshape(-1, lora.rank).T
            tensors[f"{module}.lora_B.weight"] = b.reshape(lora.rank, -1).T
    write_tensors(folder / "adapter_model.safetensors", tensors)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": [_MODULES[name].partition(".")[2] for name in lora.names],
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
