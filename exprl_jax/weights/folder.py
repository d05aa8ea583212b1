"""Parameters in and out: safetensors folders and GGUF files, streamed slice by slice onto the mesh, and back."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import pathlib
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax
import ml_dtypes
import numpy as np
import safetensors
from jax.experimental import multihost_utils

from exprl_jax.architecture import Architecture
from exprl_jax.config import Execution
from exprl_jax.files import read_json
from exprl_jax.gguf_reader import read_gguf
from exprl_jax.weights import gguf_file, hf_layout
from exprl_jax.weights.sources import ModelSource

Params = dict[str, Any]
Entry = tuple[hf_layout.Leaf, str, int | None]  # as `hf_layout.stored_leaves` gives them

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_CODES = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(ml_dtypes.bfloat16): "BF16"}


class StoredTensor(Protocol):
    """A tensor in a file; a tuple of slices, one an axis, reads that part of it as a NumPy array."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: Any) -> np.ndarray: ...


class SavesTokenizer(Protocol):
    """The part of `data.tokenizer.Tokenizer` that an export needs."""

    vocab_size: int
    bos_id: int | None
    pad_id: int
    eos_ids: tuple[int, ...]

    def save(self, folder: Any) -> None: ...


def read_architecture(source: ModelSource) -> Architecture:
    """Reads `config.json` or the GGUF metadata.

    Raises:
      ValueError: the file is missing or damaged, or the architecture is not one of ours (names what is not).
    """
    if source.is_gguf:
        return gguf_file.parse_metadata(read_gguf(source.path), source.name)
    return hf_layout.parse_config(read_json(source.path / "config.json"), source.name)


def check_vocabulary(arch: Architecture, tokenizer: SavesTokenizer) -> None:
    """Refuses a tokenizer whose ids the embedding does not hold; an embedding padded beyond the tokenizer is fine.

    Raises:
      ValueError: naming the sizes or the ids.
    """
    if tokenizer.vocab_size > arch.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model's embedding only {arch.vocab_size}; "
            f"name the tokenizer that belongs to the model"
        )
    outside = [i for i in (*tokenizer.eos_ids, tokenizer.pad_id) if not 0 <= i < arch.vocab_size]
    if outside:
        raise ValueError(
            f"the tokenizer's end or padding ids {outside} lie outside the model's vocabulary of {arch.vocab_size}; "
            f"name the tokenizer that belongs to the model"
        )


def check_tensors(source: ModelSource, arch: Architecture) -> Mapping[str, StoredTensor]:
    """Opens a model's tensors and compares their names and shapes with what `arch` needs; reads no data.

    Returns:
      The tensors by their Hugging Face name.

    Raises:
      ValueError: missing, extra and mis-shaped tensors, all in one message.
    """
    tensors = gguf_file.open_tensors(read_gguf(source.path), source.name) if source.is_gguf else _open_folder(source)
    if arch.layers > len(tensors):  # a number out of a file: it may be one to count up to for hours
        raise ValueError(f"model {source.name}: {arch.layers} layers, but only {len(tensors)} tensors; fetch it again")
    # Old checkpoints store the rotary frequencies, which follow from the config.
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    needed = {leaf.name: leaf.stored_shape for leaf, _, _ in hf_layout.stored_leaves(arch)}
    if arch.tied and "lm_head.weight" in tensors:
        _check_tied(tensors, source)
        del tensors["lm_head.weight"]
    missing = [name for name in needed if name not in tensors]
    extra = [name for name in tensors if name not in needed]
    misshaped = [
        f"{name} {list(tensors[name].shape)} instead of {list(shape)}"
        for name, shape in needed.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    faults = [("missing", missing), ("extra", extra), ("mis-shaped", misshaped)]
    if any(names for _, names in faults):
        listed = "; ".join(f"{len(names)} {kind}: {_some(names)}" for kind, names in faults if names)
        raise ValueError(
            f"model {source.name}: the tensors are not those of a {arch.family} model with {arch.layers} layers "
            f"(tied embedding: {arch.tied}): {listed}; check that config and weights belong together"
        )
    return tensors


def load_params(
    source: ModelSource, arch: Architecture, execution: Execution, dtype: str, shardings: Mapping[str, Any]
) -> Params:
    """Loads a model's parameters, each device's part straight from the file.

    Files are memory-mapped; each process reads only the slices its own devices hold, and transposes and casts them
    on the way, so at no time is there more than one leaf's part on the host.

    Args:
      dtype: of the parameters, `float32` or `bfloat16`.
      shardings: a `jax.sharding.Sharding` for each leaf of the parameter tree.

    Raises:
      ValueError: before anything is loaded, if tensors are missing, extra or mis-shaped (names them).
    """
    tensors = check_tensors(source, arch)
    dtype = jax.dtypes.canonicalize_dtype(dtype)

    def load(leaf: hf_layout.Leaf, sharding: jax.sharding.Sharding) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            return np.ascontiguousarray(leaf.read(tensors[leaf.name], index), dtype)

        return jax.make_array_from_callback(leaf.shape, sharding, part, dtype=dtype)

    def load_stacked(leaf: hf_layout.Leaf, sharding: jax.sharding.Sharding) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            layers = range(arch.layers)[index[0]]
            sizes = [len(range(size)[cut]) for size, cut in zip(leaf.shape, index[1:])]
            stack = np.empty((len(layers), *sizes), dtype)
            for row, layer in enumerate(layers):
                stack[row] = leaf.read(tensors[leaf.name.format(layer)], index[1:])
            return stack

        return jax.make_array_from_callback((arch.layers, *leaf.shape), sharding, part, dtype=dtype)

    params = {key: load(leaf, shardings[key]) for key, leaf in hf_layout.outer_leaves(arch).items()}
    layer_leaves = hf_layout.layer_leaves(arch)
    if execution.scan_layers:
        params["layers"] = {key: load_stacked(leaf, shardings["layers"][key]) for key, leaf in layer_leaves.items()}
        return params
    for layer in range(arch.layers):
        params[f"layer_{layer}"] = {
            key: load(leaf.at_layer(layer), shardings[f"layer_{layer}"][key]) for key, leaf in layer_leaves.items()
        }
    return params


def fetch_tensor(params: Params, execution: Execution, entry: Entry) -> np.ndarray:
    """One tensor of the checkpoint, in our axes, on this host; every process takes part."""
    _, key, layer = entry
    if layer is None:
        array = params[key]
    elif execution.scan_layers:
        array = jax.lax.dynamic_index_in_dim(params["layers"][key], layer, keepdims=False)
    else:
        array = params[f"layer_{layer}"][key]
    return whole_array(array)


def whole_array(array: jax.Array) -> np.ndarray:
    """An array on this host, wherever its parts are; every process takes part."""
    return np.asarray(array if array.is_fully_addressable else multihost_utils.process_allgather(array, tiled=True))


def export_folder(
    params: Params,
    arch: Architecture,
    execution: Execution,
    folder: str | os.PathLike[str],
    tokenizer: SavesTokenizer,
    dtype: str,
    shard_bytes: int = 5_000_000_000,
    fetch: Callable[[Any, Execution, Entry], np.ndarray] = fetch_tensor,
) -> None:
    """Writes a Hugging Face model folder: config.json, safetensors and the tokenizer's files.

    The folder appears complete or not at all, and replaces an earlier export.  Every process must call this (sharded
    parameters are gathered, one tensor at a time); process 0 writes.  The stacked layer axis must not be sharded.

    Args:
      dtype: of the tensors in the file, `float32` or `bfloat16`.
      shard_bytes: tensors are spread over files of at most this size; one file if they fit.
      fetch: makes one tensor of the parameters, on this host; for parameters that are not stored as such.

    Raises:
      ValueError: something stands there that is not a model folder, or the disk has no room.
    """
    folder = pathlib.Path(folder)
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    files = _plan_files(arch, dtype, shard_bytes)
    if jax.process_index() != 0:
        for stored in files.values():
            for entry in stored:
                fetch(params, execution, entry)
        return
    _check_target(folder, arch.parameters * dtype.itemsize)
    scratch = folder.with_name(f".{folder.name}.writing-{os.getpid()}")
    try:
        scratch.mkdir(parents=True)
        for name, stored in files.items():
            arrays = (entry[0].store(fetch(params, execution, entry)) for entry in stored)
            _write_stream(scratch / name, dtype, {leaf.name: leaf.stored_shape for leaf, _, _ in stored}, arrays)
        if len(files) > 1:
            file_of = {leaf.name: name for name, stored in files.items() for leaf, _, _ in stored}
            sizes = {"total_size": arch.parameters * dtype.itemsize}
            _write_json(scratch / _INDEX, {"metadata": sizes, "weight_map": file_of})
        write_description(scratch, arch, tokenizer, dtype.name)
        _replace_folder(folder, scratch)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise ValueError(f"no space left on the disk for the export {folder}; free some and start again") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_description(folder: pathlib.Path, arch: Architecture, tokenizer: SavesTokenizer, dtype: str) -> None:
    """Writes config.json and the tokenizer's files, generation_config.json included: a Hugging Face folder without its
    weights."""
    config = hf_layout.render_config(
        arch, dtype, bos_id=tokenizer.bos_id, eos_ids=tokenizer.eos_ids, pad_id=tokenizer.pad_id
    )
    _write_json(folder / "config.json", config)
    tokenizer.save(folder)


def _plan_files(arch: Architecture, dtype: np.dtype, shard_bytes: int) -> dict[str, list[Entry]]:
    """Which tensors go to which file, in the order of the model, at most `shard_bytes` a file (or one tensor)."""
    shards, size = [[]], 0
    for entry in hf_layout.stored_leaves(arch):
        nbytes = math.prod(entry[0].shape) * dtype.itemsize
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += nbytes
    if len(shards) == 1:
        return {_SINGLE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def write_tensors(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes float32 arrays by name."""
    _write_stream(path, np.dtype(np.float32), {name: x.shape for name, x in tensors.items()}, tensors.values())


def _write_stream(
    path: pathlib.Path, dtype: np.dtype, shapes: Mapping[str, Sequence[int]], arrays: Iterable[np.ndarray]
) -> None:
    """Writes a safetensors file, each array as it comes: the library would want all of them in memory at once.

        8 bytes    length of the header, little-endian
        header     JSON: {name: {dtype, shape, data_offsets}}, filled up with blanks to a multiple of 8
        arrays     one after another, offsets counted from here

    Format: https://github.com/huggingface/safetensors.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes.items():
        end = start + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in arrays:
            file.write(np.ascontiguousarray(array, dtype).view(np.uint8).data)


def _open_folder(source: ModelSource) -> dict[str, StoredTensor]:
    """All tensors of a folder's safetensors files, mapped from disk."""
    folder = source.path
    if (folder / _INDEX).is_file():
        index = read_json(folder / _INDEX)
        if not isinstance(index.get("weight_map"), dict):
            raise ValueError(f"model {source.name}: {_INDEX} has no weight_map")
        names = sorted(set(index["weight_map"].values()))
    elif (folder / _SINGLE).is_file():
        names = [_SINGLE]
    else:
        raise ValueError(
            f"model {source.name}: {folder} holds neither {_SINGLE} nor {_INDEX}; "
            f"convert other formats with transformers' save_pretrained(safe_serialization=True); for new, random "
            f"weights name random:{source.name}"
        )
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise ValueError(f"model {source.name}: {len(absent)} files of {_INDEX} are absent: {_some(absent)}")
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        tensors |= _open_safetensors(folder / name, source)
    return tensors


@dataclasses.dataclass(frozen=True)
class SafeTensor:
    """A tensor of a safetensors file, of which only the parts that are asked for are read."""

    stored: Any
    shape: tuple[int, ...]

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        # The library refuses what NumPy clips: a slice that goes beyond the end.
        return self.stored[tuple(slice(*part.indices(size)) for part, size in zip(index, self.shape))]


def _open_safetensors(path: pathlib.Path, source: ModelSource) -> dict[str, StoredTensor]:
    try:
        file = safetensors.safe_open(path, "numpy")
        stored = {name: file.get_slice(name) for name in file.keys()}
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"model {source.name}: {path.name} is not a readable safetensors file ({reason}); fetch it again"
        ) from error
    for name, tensor in stored.items():
        if tensor.get_dtype() not in _CODES.values():
            raise ValueError(
                f"model {source.name}: tensor {name} in {path.name} has dtype {tensor.get_dtype()}; "
                f"expected {', '.join(_CODES.values())}: name the unquantised model"
            )
    return {name: SafeTensor(tensor, tuple(tensor.get_shape())) for name, tensor in stored.items()}


def _check_tied(tensors: Mapping[str, StoredTensor], source: ModelSource) -> None:
    """A model that ties its embedding may store the unembedding as well, but not another one."""
    embed, unembed = tensors.get("model.embed_tokens.weight"), tensors["lm_head.weight"]
    step = 4096  # rows at a time: a vocabulary is up to gigabytes
    if embed is not None and (
        embed.shape != unembed.shape
        or any(
            not np.array_equal(embed[i : i + step, :], unembed[i : i + step, :]) for i in range(0, embed.shape[0], step)
        )
    ):
        raise ValueError(
            f"model {source.name}: config.json ties the embedding, but lm_head.weight differs from "
            f"model.embed_tokens.weight; set tie_word_embeddings to false"
        )


def _check_target(folder: pathlib.Path, nbytes: int) -> None:
    if folder.exists() and not (folder.is_dir() and ((folder / "config.json").is_file() or not any(folder.iterdir()))):
        raise ValueError(f"export {folder} would replace something that is not a model folder; name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < nbytes:
        raise ValueError(
            f"no disk space for the export {folder}: it needs {nbytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"
        )


def _replace_folder(folder: pathlib.Path, complete: pathlib.Path) -> None:
    """Puts a complete folder in its place; the one it replaces goes only then."""
    old = folder.with_name(f".{folder.name}.replaced-{os.getpid()}")
    if folder.exists():
        folder.rename(old)
    complete.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
