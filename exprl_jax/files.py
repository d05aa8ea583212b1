"""Files that a kill cannot tear: text written whole or not at all, and JSON lines."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Writes a file so that a kill at any moment leaves the old content or the new, never a part.

    Raises:
      ValueError: it could not be written, for instance because the disk is full; the old content stands.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise ValueError(
            f"{path} could not be written ({error.strerror}); free some disk space or mend the cause, and start again"
        ) from error


def sync_folder(folder: pathlib.Path) -> None:
    """Makes renames and removals in a folder survive a power cut, not only a kill."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_jsonl(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """The whole rows of a samples file; a last line that a kill has torn is left out.

    Raises:
      ValueError: another line that is none.
    """
    if not path.exists():
        return
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is torn, or nothing
        try:
            yield json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}: not a sample ({error}); delete the line to draw it again"
            ) from error


def append_jsonl(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Adds rows to a JSONL file; they are on disk when this returns."""
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
        file.flush()
        os.fsync(file.fileno())
