"""Rows of problems from files, Hugging Face datasets and TensorFlow Datasets, all as plain Python values."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Row(NamedTuple):
    """One row: where it stands (lines count from 1, rows from 0), and its values by column; null means absent."""

    where: str
    columns: Mapping[str, Any]


def read_rows(source: str, split: str) -> Iterator[Row]:
    """The rows of a source (see `read_problems`), lazily."""
    kind, _, name = source.partition(":")
    if kind in ("hf", "tfds") and not name:
        raise ValueError(f"{source!r} names no data set: expected {kind}:<name>")
    if kind == "hf":
        yield from _hugging_face(name, split)
    elif kind == "tfds":
        yield from _tensorflow_datasets(name, split)
    else:
        for path in _paths(source):
            yield from _read_file(path)


def _paths(source: str) -> list[Path]:
    paths = []
    for pattern in filter(None, map(str.strip, source.split(","))):
        found = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise ValueError(
                f"no problems at {pattern!r}: no such file; expected .jsonl or .parquet files, hf:<id> or tfds:<name>"
            )
        paths += map(Path, found)
    if not paths:
        raise ValueError(f"{source!r} names no problems: expected .jsonl or .parquet files, hf:<id> or tfds:<name>")
    return paths


def _read_file(path: Path) -> Iterator[Row]:
    if path.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"{path}: expected a .jsonl or .parquet file, got {path.suffix or 'no suffix'}")
    if not path.is_file():
        raise ValueError(f"{path} is not a file: expected a .jsonl or .parquet file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: expected at least one problem")
    yield from _parquet(path) if path.suffix == ".parquet" else _jsonl(path)


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path} line {number}"
            if not line.strip():
                continue
            try:
                columns = json.loads(line.decode("utf-8"))
            except ValueError as error:
                raise ValueError(f"{where} is not JSON: {error}") from error
            if not isinstance(columns, dict):
                raise ValueError(f"{where} must be a JSON object, got {line.decode()!r:.60}")
            yield Row(where, columns)


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(str(path)).read()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a parquet file: {str(error).splitlines()[0]}") from error
    for number, columns in enumerate(table.to_pylist()):
        yield Row(f"{path} row {number}", columns)


def _hugging_face(name: str, split: str) -> Iterator[Row]:
    import datasets
    import huggingface_hub

    # Every retry would be a warning of its own; the error below says it once.
    huggingface_hub.utils.logging.set_verbosity_error()
    try:
        if Path(name, "dataset_info.json").is_file() or Path(name, "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(name)
            table = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            table = datasets.load_dataset(*name.split(":", 1), split=split)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"cannot load split {split!r} of the data set {name!r}: {reason}; check name, split and network"
        ) from error
    for number, columns in enumerate(table):
        yield Row(f"hf:{name} {split} row {number}", columns)


def _tensorflow_datasets(name: str, split: str) -> Iterator[Row]:
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(name) if Path(name).is_dir() else tfds.builder(name)
        # array_record files are read without TensorFlow.
        builder.download_and_prepare(file_format=tfds.core.FileFormat.ARRAY_RECORD)
        examples = builder.as_data_source(split=split)
    except (
        OSError,
        ValueError,
        KeyError,
        ImportError,
        NotImplementedError,
        AssertionError,
        tfds.core.DatasetNotFoundError,
    ) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"cannot load split {split!r} of the TFDS data set {name!r}: {reason}; check name, split, TFDS_DATA_DIR and"
            " network"
        ) from error
    for number in range(len(examples)):
        yield Row(f"tfds:{name} {split} row {number}", _python(examples[number]))


def _python(value: Any) -> Any:
    """Numpy and bytes to lists and text."""
    if isinstance(value, Mapping):
        return {key: _python(item) for key, item in value.items()}
    if isinstance(value, (np.ndarray, list, tuple)):
        return [_python(item) for item in value]
    if isinstance(value, np.generic):
        return _python(value.item())
    return value.decode("utf-8") if isinstance(value, bytes) else value
