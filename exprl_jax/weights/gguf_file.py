"""A GGUF file as a model: the architecture in its metadata, and its tensors under their Hugging Face names.

Tensors are dequantised piece by piece, by the `gguf` package.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np

from exprl_jax.architecture import Architecture, RopeScaling, positive
from exprl_jax.gguf_reader import GgufFile
from exprl_jax.weights.families import FAMILIES

_OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclasses.dataclass(frozen=True)
class PackedTensor:
    """A tensor of a GGUF file; slicing it reads and dequantises only the rows and blocks asked for.

    Attributes:
      shape: (rows, columns) or (length,).
      data: the bytes, one row of blocks a stored row, mapped from the file.
      kind: the quantisation.
      rows: for a 2-D tensor whose rows the file keeps in another order, where each row lies; empty otherwise.
    """

    shape: tuple[int, ...]
    data: np.ndarray
    kind: gguf.GGMLQuantizationType
    rows: np.ndarray

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        start, stop, _ = index[-1].indices(self.shape[-1])
        first, last = start // block, -(-stop // block)
        data = self.data[..., first * size : last * size]
        if len(self.shape) == 2:
            data = data[self.rows[index[0]]] if self.rows.size else data[index[0]]
        values = gguf.quants.dequantize(np.ascontiguousarray(data), self.kind)
        return values[..., start - first * block : stop - first * block]


def open_tensors(file: GgufFile, name: str) -> dict[str, PackedTensor]:
    """The file's tensors by their Hugging Face name where there is one, else by their own; no data are read.

    Raises:
      ValueError: one is quantised in a way that the `gguf` package cannot undo; names it and the model `name`.
    """
    tensors = {}
    for stored in file.tensors:
        kind = stored.tensor_type
        try:
            gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError as error:
            raise ValueError(
                f"model {name}: tensor {stored.name} is quantised as {kind.name}, which the gguf package cannot undo; "
                f"use a file quantised as Q4_1, Q8_0 or another common type, or the Hugging Face folder"
            ) from error
        shape = tuple(reversed(stored.shape.tolist()))
        rows = _stored_rows(stored.name, shape, file.metadata)
        tensors[_hugging_face_name(stored.name)] = PackedTensor(shape, stored.data.view(np.uint8), kind, rows)
    return tensors


def _hugging_face_name(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    if stem in _OUTER_NAMES:
        return f"{_OUTER_NAMES[stem]}.{suffix}"
    parts = stem.split(".")
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in _LAYER_NAMES:
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{suffix}"
    return name


def _stored_rows(name: str, shape: tuple[int, ...], metadata: Mapping[str, Any]) -> np.ndarray:
    """Where the file keeps each row of q and k; empty where it keeps them in order.

    Hugging Face rotates row i of a head together with row i + E/2.  Where a file rotates neighbours (2i, 2i + 1), its
    converter has stored each head's rows in this order:

        row of the file        0     1     2     3   ...   E−2    E−1
        row of Hugging Face    0    E/2    1   E/2+1 ...  E/2−1   E−1
    """
    model_type = metadata.get("general.architecture")
    family, role = FAMILIES.get(model_type), name.rsplit(".", 2)[-2:-1]
    if family is None or not family.gguf_rotates_neighbours or role not in (["attn_q"], ["attn_k"]) or len(shape) != 2:
        return np.zeros(0, np.int64)
    heads = metadata.get(f"{model_type}.attention.head_count", 1)
    if role == ["attn_k"]:
        heads = metadata.get(f"{model_type}.attention.head_count_kv", heads)
    if not isinstance(heads, int) or shape[0] % (2 * heads):
        return np.zeros(0, np.int64)  # the shapes' check that follows names it
    return np.arange(shape[0]).reshape(heads, shape[0] // heads // 2, 2).swapaxes(1, 2).reshape(shape[0])


def parse_metadata(file: GgufFile, name: str) -> Architecture:
    """What `config.json` would say, from a GGUF file's metadata.

    Raises:
      ValueError: the file asks for something our decoder does not do, lacks a field or has nonsense in it; names the
        field and `name`.
    """

    def refuse(what: str) -> ValueError:
        return ValueError(
            f"model {name}: unsupported architecture: {what}; supported in GGUF files: {', '.join(FAMILIES)}, with "
            f"full attention and default or linear rotary positions"
        )

    def need(key: str, kind: type = int) -> Any:
        key = f"{model_type}.{key}"
        if key not in metadata:
            raise ValueError(f"model {name}: the GGUF metadata lack {key}")
        if isinstance(metadata[key], list):
            raise refuse(f"{key} that differs between layers")
        return positive(metadata[key], kind, f"model {name}: {key}")

    def optional(key: str, default: Any, kind: type = int) -> Any:
        return need(key, kind) if f"{model_type}.{key}" in metadata else default

    metadata = file.metadata
    model_type = metadata.get("general.architecture")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise refuse(f"general.architecture {model_type!r}")
    tensors = {tensor.name: tensor for tensor in file.tensors}
    if "rope_freqs.weight" in tensors:
        # Llama 3.1's rule arrives as a table of factors without the numbers it came from, which export needs.
        raise refuse("rope_freqs.weight (llama3 rotary scaling; use the Hugging Face folder)")
    if metadata.get(f"{model_type}.expert_count"):
        raise refuse("a mixture of experts")
    scaling_type, scaling = metadata.get(f"{model_type}.rope.scaling.type", "none"), None
    if scaling_type == "linear":
        scaling = RopeScaling("linear", float(need("rope.scaling.factor", float)))
    elif scaling_type != "none":
        raise refuse(f"rope scaling {scaling_type!r}")
    width, heads = need("embedding_length"), need("attention.head_count")
    head_size = optional("attention.key_length", width // heads)
    if optional("rope.dimension_count", head_size) != head_size:
        raise refuse("rotary positions on a part of each head")
    if "token_embd.weight" not in tensors:
        raise ValueError(f"model {name}: the GGUF file lacks token_embd.weight")
    arch = FAMILIES[model_type].architecture(
        model_type,
        vocab_size=int(tensors["token_embd.weight"].shape[-1]),
        width=width,
        ffn=need("feed_forward_length"),
        layers=need("block_count"),
        heads=heads,
        kv_heads=optional("attention.head_count_kv", heads),
        head_size=head_size,
        rope_theta=_shortest(optional("rope.freq_base", 10_000.0, float)),
        rope_scaling=scaling,
        norm_eps=_shortest(need("attention.layer_norm_rms_epsilon", float)),
        tied="output.weight" not in tensors,
        max_positions=need("context_length"),
    )
    if arch.fault:
        raise refuse(arch.fault)
    return arch


def _shortest(value: float) -> float:
    """The shortest decimal of a float32: 1e-5, not 9.999999747378752e-06, as the model's own config says it."""
    return float(str(np.float32(value)))
