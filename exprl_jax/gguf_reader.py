"""Opens GGUF files with the `gguf` package, each once, for a model's weights and for its tokenizer."""

from __future__ import annotations

import functools
import os
import pathlib
from typing import Any, NamedTuple

import gguf
import numpy as np


class GgufFile(NamedTuple):
    """The contents of a GGUF file.

    Attributes:
      metadata: its key-value pairs; arrays are lists.
      tensors: in the file's order and under its own names; their data stay on disk until they are read.
    """

    metadata: dict[str, Any]
    tensors: tuple[gguf.ReaderTensor, ...]


def read_gguf(path: str | os.PathLike[str]) -> GgufFile:
    """Opens a GGUF file (version 2 or 3, little-endian).

    Raises:
      ValueError: not a GGUF file, truncated, damaged, or one of several parts.
    """
    file = pathlib.Path(path)
    stat = file.stat()
    return _read_gguf(file, stat.st_mtime_ns, stat.st_size)


# Reading takes seconds where the vocabulary is large, and the architecture, the tensors and the tokenizer all need it.
@functools.lru_cache(maxsize=2)
def _read_gguf(path: pathlib.Path, mtime_ns: int, size: int) -> GgufFile:
    del mtime_ns, size  # they only tell a replaced file from the one read before
    try:
        reader = _StrictReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OSError) as error:  # UnicodeDecodeError is a ValueError
        reason = str(error) or type(error).__name__
        raise ValueError(f"model file {path} is not a readable GGUF file ({reason}); fetch it again") from error
    if reader.byte_order != "I":
        raise ValueError(f"model file {path} is a big-endian GGUF file; convert it for little-endian machines")
    if metadata.get("split.count", 1) > 1:
        raise ValueError(f"model file {path} is one of {metadata['split.count']} parts; merge them with gguf-split")
    return GgufFile(metadata, tuple(reader.tensors))


class _StrictReader(gguf.GGUFReader):
    """Ends at the end of the file.

    The package's own reader takes an empty array there: a damaged length of an array would then have it append empty
    numbers until memory is full.
    """

    def _get(self, offset, dtype, count=1, override_order=None):
        if int(offset) + int(count) * np.dtype(dtype).itemsize > len(self.data):
            raise IndexError(f"it ends at byte {len(self.data)}, where more was to come")
        return super()._get(offset, dtype, count, override_order)
