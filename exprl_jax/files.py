"""Files that a kill cannot spoil: text written whole or not at all, and JSON lines that are appended to."""

from __future__ import annotations

import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import UnionType
from typing import Any, NoReturn

Types = type | UnionType


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


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
      ValueError: the file cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}); mend it or fetch it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a JSON object; mend it or fetch it again")
    return content


# Half of a surrogate pair, as JSON can spell it: text that no UTF-8 file holds.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_CHUNK = 1 << 16


def read_jsonl(path: pathlib.Path, *, surrogates: bool = False) -> Iterator[dict[str, Any]]:
    """The whole rows of a JSONL file, one at a time; a last line that a kill has torn is left out; no file: no rows.

    Lines end at newlines alone: text may hold U+2028, which ends a line for Python's `splitlines`.

    Args:
      surrogates: texts may hold halves of surrogate pairs, which cannot be encoded.

    Raises:
      ValueError: a line that is no JSON object of numbers and text; names the file and the line.
    """
    if not path.exists():
        return
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                return
            try:
                yield parse_row(line.decode(), surrogates)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: not a row ({error}); restore or delete the line") from error


def parse_row(line: str, surrogates: bool) -> dict[str, Any]:
    """A JSON object of numbers and text.

    Raises:
      ValueError: anything else.
      RecursionError: it is nested too deep.
    """
    row = json.loads(line, parse_constant=_refuse_constant)
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {line.strip():.60}")
    if not surrogates and _SURROGATE.search(line):
        json.dumps(row, ensure_ascii=False).encode()  # whole pairs are text like any other
    return row


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number")


class Ledger:
    """A JSONL file of answers, each to one question; what is in it is not asked again.

    A row holds what identifies the question (`key`) and the answer.  Only the keys are kept in memory.
    """

    def __init__(self, path: pathlib.Path, kind: str, key: Sequence[str], fields: Mapping[str, Types]):
        """Opens a file or a new one; a last line that a kill has torn is removed.

        Args:
          kind: what a row is called in errors.
          key: the fields that identify a question.
          fields: the type of every field of a row that is read again, those of `key` among them.

        Raises:
          ValueError: a row without one of the fields, or a question that is answered twice.
        """
        self.path, self._kind, self._key, self._fields = path, kind, tuple(key), fields
        self._known: set[tuple[Any, ...]] = set()
        if path.exists():
            _drop_torn_line(path)
        for number, row in enumerate(self.rows(), 1):
            if self.key_of(row) in self._known:
                raise ValueError(f"{path}, row {number}: answers {self.key_of(row)} a second time; delete it")
            self._known.add(self.key_of(row))

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows, read from the file one at a time."""
        yield from read_rows(self.path, self._fields, self._kind)

    def key_of(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        """What identifies the row's question."""
        return tuple(row[name] for name in self._key)

    def __contains__(self, key: tuple[Any, ...]) -> bool:
        return key in self._known

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes answers, but for those to questions that have one; they are on disk when this returns.

        Raises:
          ValueError: a number is not finite, or the disk is full.
        """
        new = {key: row for row in rows if (key := self.key_of(row)) not in self._known}
        text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in new.values())
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ValueError(
                f"{self.path} could not be written ({error.strerror}); free some disk space and start again"
            ) from error
        self._known |= new.keys()


def read_rows(path: pathlib.Path, fields: Mapping[str, Types], kind: str) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file, which have fields of these types; others may be there besides.

    Args:
      kind: what a row is called in errors.

    Raises:
      ValueError: a row that has not; names the file and the row.
    """
    for number, row in enumerate(read_jsonl(path), 1):
        for name, types in fields.items():
            if name not in row:
                raise ValueError(f"{path}, row {number}: not a {kind} (it has no {name!r}); restore or delete it")
            # True is an int to Python, and no number here.
            if not isinstance(row[name], types) or (isinstance(row[name], bool) and types is not bool):
                raise ValueError(
                    f"{path}, row {number}: not a {kind} (its {name} is {row[name]!r:.40}, expected "
                    f"{_type_name(types)}); restore or delete it"
                )
        yield row


def _type_name(types: Types) -> str:
    return types.__name__ if isinstance(types, type) else str(types)


def _drop_torn_line(path: pathlib.Path) -> None:
    """Cuts off what follows the last newline, read from the end in chunks: the file may be large."""
    with open(path, "r+b") as file:
        size = end = file.seek(0, os.SEEK_END)
        newline = -1
        while end and newline < 0:
            start = max(0, end - _CHUNK)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            end = start + newline + 1
        if end < size:
            file.truncate(end)
            os.fsync(file.fileno())
