"""Rows of problems from files, Hugging Face datasets and TensorFlow Datasets, all as plain Python values."""

from __future__ import annotations

import codecs
import collections
import glob
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from exprl_jax.packaged import locate

_SUFFIXES = (".jsonl", ".parquet")
_GZIP = b"\x1f\x8b"
_PARQUET_ROWS = 256
_EXPECTED = "expected .jsonl or .parquet files, hf:<id>, tfds:<name> or a benchmark's name"


class Row(NamedTuple):
    """One row: where it stands (lines count from 1, rows from 0), and its values by column; null means absent."""

    where: str
    columns: Mapping[str, Any]


def split_sources(source: str) -> list[str]:
    """The single sources of one that names several, with commas between.

    A file whose path has commas is one source: of the ways to read a comma, that which names a file there is.

    Raises:
      ValueError: it names none.
    """
    parts, sources = source.split(","), []
    while parts:
        joined = [",".join(parts[:count]).strip() for count in range(len(parts), 1, -1)]
        path = next((path for path in joined if Path(locate(path)).is_file()), parts[0].strip())
        sources.append(path)
        parts = parts[path.count(",") + 1 :]
    sources = [name for name in sources if name]
    if not sources:
        raise ValueError(f"{source!r} names no problems: {_EXPECTED}")
    return sources


def read_rows(source: str, split: str) -> Iterator[Row]:
    """The rows of one source (see `read_problems`), lazily."""
    kind, _, name = source.partition(":")
    if kind in ("hf", "tfds") and not name:
        raise ValueError(f"{source!r} names no data set: expected {kind}:<name>")
    if kind == "hf" and name.endswith(_SUFFIXES):
        yield from _hub_file(name)
    elif kind == "hf":
        yield from _hugging_face(name, split)
    elif kind == "tfds":
        yield from _tensorflow_datasets(name, split)
    else:
        there = locate(source)
        paths = [there] if Path(there).is_file() else sorted(glob.glob(there, recursive=True))
        if not paths:
            raise ValueError(f"no problems at {source!r}: no such file; {_EXPECTED}")
        for path in paths:
            yield from _read_file(Path(path), str(path))


def _read_file(path: Path, name: str) -> Iterator[Row]:
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"{name}: expected a .jsonl or .parquet file, got {path.suffix or 'no suffix'}")
    if not path.is_file():
        raise ValueError(f"{name} is not a file: expected a .jsonl or .parquet file")
    if path.stat().st_size == 0:
        raise ValueError(f"{name} is empty: expected at least one problem")
    yield from _parquet(path, name) if path.suffix == ".parquet" else _jsonl(path, name)


def _jsonl(path: Path, name: str) -> Iterator[Row]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{name} line {number}"
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
                if line.startswith(_GZIP):
                    raise ValueError(f"{name} is compressed; expected JSON lines: gunzip it")
            if not line.strip():
                continue
            try:
                columns = json.loads(line.decode("utf-8"), object_pairs_hook=_object)
            except UnicodeError as error:
                fault = f"{error.reason} at byte {error.start}"
                raise ValueError(f"{where} is not UTF-8 ({fault}); write the file as UTF-8") from error
            except ValueError as error:
                raise ValueError(f"{where} is not JSON: {error}") from error
            except RecursionError as error:
                raise ValueError(f"{where} is nested too deeply for a problem: expected text by column") from error
            if not isinstance(columns, dict):
                raise ValueError(f"{where} must be a JSON object, got {line.decode()!r:.60}")
            yield Row(where, columns)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of two values of one name nobody knows which is meant."""
    named = dict(pairs)
    if len(named) < len(pairs):
        twice = next(name for name, count in collections.Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"an object has the name {twice!r} twice; remove one")
    return named


def _parquet(path: Path, name: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        # In small batches: a whole row group is one array a column, and nested arrays of over 2 GB cannot be read.
        file = pyarrow.parquet.ParquetFile(str(path))
        twice = [column for column, count in collections.Counter(file.schema_arrow.names).items() if count > 1]
        if twice:
            raise ValueError(f"{name} has the column {twice[0]!r} twice; remove or rename one")
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
            for columns in batch.to_pylist():
                yield Row(f"{name} row {number}", columns)
                number += 1
    except (pyarrow.ArrowException, OSError) as error:
        where = f"{name}, after {number} rows," if number else name
        raise ValueError(f"{where} is not a parquet file: {str(error).splitlines()[0]}") from error


def _hub_file(name: str) -> Iterator[Row]:
    import huggingface_hub

    huggingface_hub.utils.logging.set_verbosity_error()
    owner, _, rest = name.partition("/")
    data_set, _, file = rest.partition("/")
    if not file:
        raise ValueError(f"hf:{name} names no file of a data set: expected hf:<owner>/<data set>/<file>")
    try:
        path = huggingface_hub.hf_hub_download(f"{owner}/{data_set}", file, repo_type="dataset")
    # Where the client cannot go through a proxy, an ImportError names the package that it lacks.
    except (ImportError, OSError, ValueError, huggingface_hub.errors.EntryNotFoundError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"cannot load {file!r} of the data set '{owner}/{data_set}': {reason}; check name, access and network"
        ) from error
    yield from _read_file(Path(path), f"hf:{name}")


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
