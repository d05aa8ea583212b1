"""Low-rank adapters on disk: merged into an export, and beside it for PEFT."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import numpy as np

from exprl_jax.architecture import Architecture
from exprl_jax.config import Execution, Lora
from exprl_jax.model.decoder import LORA_A, LORA_B
from exprl_jax.model.lora import Adapted, adapt
from exprl_jax.run.workdir import Workdir
from exprl_jax.weights.folder import Entry, export_folder, fetch_tensor, whole_array, write_tensors
from exprl_jax.weights.hf_layout import layer_leaves
from exprl_jax.weights.language_model import LanguageModel


def export_policy(lora: Lora, policy: LanguageModel, base: Any, params: Any, workdir: Workdir) -> None:
    """Writes the trained policy as a Hugging Face folder; adapters merged into their base, and beside it for PEFT."""
    execution = policy.execution
    if lora.rank:
        adapters = jax.tree.map(whole_array, params)
        if jax.process_index() == 0:
            save_adapters(workdir.adapter, adapters, policy.arch, execution, lora, policy.config.weights)
    export_folder(
        adapt(lora, base, params),
        policy.arch,
        execution,
        workdir.export,
        policy.tokenizer,
        policy.config.param_dtype,
        fetch=fetch_merged if lora.rank else fetch_tensor,
    )


def fetch_merged(adapted: Adapted, execution: Execution, entry: Entry) -> np.ndarray:
    """One tensor, on this host, of the ordinary model that computes the same: W + scale · A·B in float32.

    No second model ever exists.  See `folder.fetch_tensor`.
    """
    leaf, name, layer = entry
    weight = fetch_tensor(adapted.base, execution, entry)
    pair = {} if layer is None else adapted.adapters["layers" if execution.scan_layers else f"layer_{layer}"]
    if name + LORA_A not in pair:
        return weight
    a, b = (fetch_tensor(adapted.adapters, execution, (leaf, name + part, layer)) for part in (LORA_A, LORA_B))
    product = np.tensordot(a.astype(np.float32), b.astype(np.float32), 1)
    return weight.astype(np.float32) + np.float32(adapted.scale) * product


def save_adapters(
    folder: pathlib.Path, adapters: Any, arch: Architecture, execution: Execution, lora: Lora, base: str
) -> None:
    """Writes a folder that PEFT's `PeftModel.from_pretrained` loads; call on one process, with whole arrays.

    Args:
      adapters: as in `Adapted`, as numpy arrays.
      base: the model's name, for PEFT to find it by.
    """
    folder.mkdir(parents=True, exist_ok=True)
    leaves = layer_leaves(arch)
    modules = {name: leaves[name].name.removesuffix(".weight") for name in lora.names}
    tensors = {}
    for layer in range(arch.layers):
        layer_adapters = (
            {k: x[layer] for k, x in adapters["layers"].items()}
            if execution.scan_layers
            else adapters[f"layer_{layer}"]
        )
        for name in lora.names:
            a, b = (np.asarray(layer_adapters[name + part], np.float32) for part in (LORA_A, LORA_B))
            module = "base_model.model." + modules[name].format(layer)  # PEFT's name of it
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
        "target_modules": [module.rpartition(".")[2] for module in modules.values()],
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
