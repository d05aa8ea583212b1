"""Reads GGUF files: the metadata, and tensors under their Hugging Face names, dequantised piece by piece.

The header is parsed here because `gguf.GGUFReader` builds an array for every string of the vocabulary, which takes
seconds; the quantisation formats are the `gguf` package's.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import pathlib
import struct
from typing import Any

import gguf
import numpy as np

from exprl_jax.architecture import Architecture, RopeScaling

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

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


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """The contents of a GGUF file.

    Attributes:
      metadata: its key-value pairs; arrays are lists.
      tensors: by Hugging Face name where there is one, else by their own.
    """

    metadata: dict[str, Any]
    tensors: dict[str, PackedTensor]


def read_gguf(path: str | os.PathLike[str]) -> GgufFile:
    """Opens a GGUF file (version 2 or 3, little-endian); tensor data stay on disk until they are sliced.

    Raises:
      ValueError: not a GGUF file, one of several parts, truncated, or quantised in a way the `gguf` package cannot
        undo.
    """
    file = pathlib.Path(path)
    stat = file.stat()
    return _read_gguf(file, stat.st_mtime_ns, stat.st_size)


# The same file is opened for its architecture, its parameters and its tokenizer.
@functools.lru_cache(maxsize=2)
def _read_gguf(path: pathlib.Path, mtime_ns: int, size: int) -> GgufFile:
    del mtime_ns  # only tells a replaced file from the one read before
    if size < 24:
        raise ValueError(f"model file {path} is no GGUF file: it holds {size} bytes")
    data = np.memmap(path, np.uint8, "r")
    header = _Header(data)
    try:
        if bytes(data[:4]) != b"GGUF" or header.scalar("I", 4) not in (2, 3):
            raise ValueError(f"model file {path} is no GGUF file of version 2 or 3")
        tensor_count, pair_count = header.scalar("Q"), header.scalar("Q")
        metadata = {header.string(): header.value(header.scalar("I")) for _ in range(pair_count)}
        entries = []
        for _ in range(tensor_count):
            name = header.string()
            dims = [header.scalar("Q") for _ in range(header.scalar("I"))]
            entries.append((name, tuple(reversed(dims)), header.scalar("I"), header.scalar("Q")))
    except (struct.error, UnicodeDecodeError, KeyError) as error:
        raise ValueError(
            f"model file {path} is truncated or damaged in its header ({error}); fetch it again"
        ) from error
    if metadata.get("split.count", 1) > 1:
        raise ValueError(f"model file {path} is one of {metadata['split.count']} parts; merge them with gguf-split")
    align = metadata.get("general.alignment", 32)
    start = -(-header.at // align) * align
    tensors = {}
    for name, shape, kind, offset in entries:
        tensor = _packed(path, data, name, shape, kind, start + offset)
        tensors[_hugging_face_name(name)] = _unpermuted(name, tensor, metadata)
    return GgufFile(metadata, tensors)


class _Header:
    """A cursor over the little-endian header."""

    def __init__(self, data: np.ndarray):
        self.data = memoryview(data)
        self.at = 0

    def scalar(self, code: str, at: int | None = None) -> Any:
        start = self.at if at is None else at
        (value,) = struct.unpack_from("<" + code, self.data, start)
        self.at = start + struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        if self.at + length > len(self.data):
            raise struct.error("a string beyond the end of the file")
        text = str(self.data[self.at : self.at + length], "utf-8")
        self.at += length
        return text

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        item, count = self.scalar("I"), self.scalar("Q")
        if item in (_STRING, _ARRAY):
            return [self.value(item) for _ in range(count)]
        code = f"<{count}{_SCALARS[item]}"
        values = list(struct.unpack_from(code, self.data, self.at))
        self.at += struct.calcsize(code)
        return values


def _packed(
    path: pathlib.Path, data: np.ndarray, name: str, shape: tuple[int, ...], kind: int, start: int
) -> PackedTensor:
    try:
        quantisation = gguf.GGMLQuantizationType(kind)
        block, size = gguf.GGML_QUANT_SIZES[quantisation]
        gguf.quants.dequantize(np.zeros((1, size), np.uint8), quantisation)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise ValueError(
            f"model file {path}: tensor {name} has a quantisation (type {kind}) that the gguf package cannot undo; "
            f"use a file quantised as Q4_1, Q8_0 or another common type, or the Hugging Face folder"
        ) from error
    if not shape or shape[-1] % block:
        raise ValueError(f"model file {path}: tensor {name} of shape {list(shape)} is not made of blocks of {block}")
    row = shape[-1] // block * size
    count = math.prod(shape[:-1]) * row
    if start + count > data.size:
        raise ValueError(
            f"model file {path} is truncated: tensor {name} ends at byte {start + count}, the file has {data.size}; "
            f"fetch it again"
        )
    view = np.asarray(data[start : start + count]).reshape(*shape[:-1], row)
    return PackedTensor(shape, view, quantisation, np.zeros(0, np.int64))


def _hugging_face_name(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    if stem in _OUTER_NAMES:
        return f"{_OUTER_NAMES[stem]}.{suffix}"
    parts = stem.split(".")
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in _LAYER_NAMES:
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{suffix}"
    return name


def _unpermuted(name: str, tensor: PackedTensor, metadata: dict[str, Any]) -> PackedTensor:
    """Undoes the row order of q and k in `llama` files.

    Those files rotate neighbouring pairs (2i, 2i + 1) of a head where Hugging Face rotates (i, i + E/2), so their
    converter stores each head's rows as E/2 pairs.  qwen2 and qwen3 files keep the Hugging Face order.
    """
    role = name.rsplit(".", 2)[-2] if name.count(".") >= 2 else ""
    if metadata.get("general.architecture") != "llama" or role not in ("attn_q", "attn_k") or len(tensor.shape) != 2:
        return tensor
    heads = metadata.get("llama.attention.head_count", 1)
    if role == "attn_k":
        heads = metadata.get("llama.attention.head_count_kv", heads)
    rows = tensor.shape[0]
    if not isinstance(heads, int) or rows % (2 * heads):
        return tensor  # the shape check that follows in `load_params` names it
    order = np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(rows)
    return dataclasses.replace(tensor, rows=order)


def parse_metadata(file: GgufFile, name: str) -> Architecture:
    """What `config.json` would say, from a GGUF file's metadata.

    Raises:
      ValueError: the file asks for something our decoder does not do, or lacks a field; names it and `name`.
    """

    def refuse(what: str) -> ValueError:
        return ValueError(
            f"model {name}: unsupported architecture: {what}; supported in GGUF files: llama, qwen2 and qwen3 with "
            f"full attention and default or linear rotary positions"
        )

    def need(key: str) -> Any:
        if f"{family}.{key}" not in metadata:
            raise ValueError(f"model {name}: the GGUF metadata lack {family}.{key}")
        value = metadata[f"{family}.{key}"]
        if isinstance(value, list):
            raise refuse(f"{key} that differs between layers")
        return value

    def optional(key: str, default: Any) -> Any:
        return need(key) if f"{family}.{key}" in metadata else default

    metadata = file.metadata
    family = metadata.get("general.architecture")
    if family not in ("llama", "qwen2", "qwen3"):
        raise refuse(f"general.architecture {family!r}")
    if "rope_freqs.weight" in file.tensors:
        # Llama 3.1's rule arrives as a table of factors without the numbers it came from, which export needs.
        raise refuse("rope_freqs.weight (llama3 rotary scaling; use the Hugging Face folder)")
    if optional("expert_count", 0):
        raise refuse("a mixture of experts")
    kind, scaling = optional("rope.scaling.type", "none"), None
    if kind == "linear":
        scaling = RopeScaling("linear", float(need("rope.scaling.factor")))
    elif kind != "none":
        raise refuse(f"rope scaling {kind!r}")
    width, heads = need("embedding_length"), need("attention.head_count")
    head_size = optional("attention.key_length", width // heads)
    if optional("rope.dimension_count", head_size) != head_size:
        raise refuse("rotary positions on a part of each head")
    if "model.embed_tokens.weight" not in file.tensors:
        raise ValueError(f"model {name}: the GGUF file lacks token_embd.weight")
    return Architecture(
        family=family,
        vocab_size=file.tensors["model.embed_tokens.weight"].shape[0],
        width=width,
        ffn=need("feed_forward_length"),
        layers=need("block_count"),
        heads=heads,
        kv_heads=optional("attention.head_count_kv", heads),
        head_size=head_size,
        rope_theta=_shortest(optional("rope.freq_base", 10000.0)),
        rope_scaling=scaling,
        norm_eps=_shortest(need("attention.layer_norm_rms_epsilon")),
        tied="lm_head.weight" not in file.tensors,
        max_positions=need("context_length"),
    )


def _shortest(value: float) -> float:
    """The shortest decimal of a float32: 1e-5, not 9.999999747378752e-06, as the model's own config says it."""
    return float(str(np.float32(value)))
