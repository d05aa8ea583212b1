"""Rollouts that a run or an evaluation has left behind, and files of what was asked about them."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from exprl_jax import config
from exprl_jax.data.problems import Problem, read_problems
from exprl_jax.files import append_jsonl, read_jsonl, write_atomically
from exprl_jax.reward.verifiers.verdict import Verdict


class Rollout(NamedTuple):
    """A rollout as it was written.

    Attributes:
      number: among the rollouts of its problem, in the order of the files.
    """

    problem: Problem
    number: int
    response: str
    verdict: Verdict

    @property
    def fingerprint(self) -> str:
        """Of the response, by which a file that has changed is known."""
        return hashlib.blake2b(self.response.encode(), digest_size=8).hexdigest()


def read_rollouts(source: str, data: config.Source, *, references: bool) -> list[Rollout]:
    """Reads rollouts, each with its problem: from `data.source` where it is there, else as the row has it.

    Args:
      source: JSONL files or globs with commas between, of a run (`rollouts/step_N.jsonl`) or an evaluation
        (`samples/<set>.jsonl`).
      data: the problems; one with answer choices must be there, for rows have none.
      references: whether `data.source` must hold reference solutions.

    Raises:
      ValueError: no file, a row that is none, a problem that differs from the one of its id.
    """
    known = (
        {p.id: p for p in read_problems(data.source, split=data.split, references=references)} if data.source else {}
    )
    rollouts: list[Rollout] = []
    numbers: dict[str, int] = {}
    for path in _files(source):
        for place, row in enumerate(read_jsonl(path), 1):
            where = f"{path}, row {place}"
            try:
                _check_texts(row)
                problem = known.setdefault(row["id"], _problem(row, known))
                response, verdict = row["response"], Verdict(row["verdict"])
            except (KeyError, TypeError, ValueError) as error:
                said = f"it has no {error}" if isinstance(error, KeyError) else error
                raise ValueError(f"{where}: not a rollout ({said})") from error
            numbers[problem.id] = numbers.get(problem.id, -1) + 1
            rollouts.append(Rollout(problem, numbers[problem.id], response, verdict))
    if not rollouts:
        raise ValueError(f"rollouts: {source!r} holds none; expected at least one row")
    return rollouts


def _check_texts(row: Mapping[str, Any]) -> None:
    """The answer may be null (of code, whose tests rows leave out), and so may the reference."""
    for name, types in (
        ("id", str),
        ("problem", str),
        ("response", str),
        ("reference", str | None),
        ("answer", str | None),
    ):
        if not isinstance(row[name], types):
            raise ValueError(f"its {name} is {row[name]!r:.40}, expected text")


def _files(source: str) -> list[pathlib.Path]:
    files = []
    for part in filter(None, (each.strip() for each in source.split(","))):
        found = sorted(glob.glob(os.path.expanduser(part)))
        if not found:
            raise ValueError(f"rollouts: {part!r} matches no file; expected JSONL files of a run or an evaluation")
        files += [pathlib.Path(each).resolve() for each in found]
    return list(dict.fromkeys(files))  # globs may overlap


def _problem(row: Mapping[str, Any], known: Mapping[str, Problem]) -> Problem:
    found = known.get(row["id"])
    if found is None and row["kind"] == "choice":
        raise ValueError(
            f"problem {row['id']!r} has answer choices, which rows leave out; name its data in config.data.source"
        )
    if found is None:
        return Problem(row["id"], row["problem"], row["reference"], row["answer"], row["domain"])
    if found.problem.strip() != row["problem"].strip() or found.kind != row["kind"]:
        raise ValueError(
            f"problem {found.id!r} has another text or kind before, or in config.data.source; name the data of the "
            "rollouts"
        )
    return found


class Ledger:
    """A JSONL file of answers, each to one question; what is in it is not asked again.

    A row is what identifies the question (`key`) and the answer.  Rows are on disk when `add` returns; a last line that
    a kill has torn is dropped.
    """

    def __init__(self, path: pathlib.Path, key: Sequence[str]):
        """Reads what is there.

        Raises:
          ValueError: a line that is none, or has not the keys.
        """
        self.path, self._key, self.rows = path, tuple(key), {}
        read = list(read_jsonl(path))
        try:
            self.rows = {self.key_of(row): row for row in read}
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: a row has no {error}; delete it to ask again") from error
        if path.exists() and not path.read_bytes().endswith(b"\n"):
            write_atomically(path, "".join(json.dumps(row) + "\n" for row in read))

    def key_of(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        """What identifies the row's question."""
        return tuple(row[name] for name in self._key)

    def __contains__(self, key: tuple[Any, ...]) -> bool:
        return key in self.rows

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes answers."""
        new = {self.key_of(row): row for row in rows}
        append_jsonl(self.path, list(new.values()))
        self.rows |= new

    def check_unchanged(self, rollouts: Sequence[Rollout]) -> None:
        """Refuses to go on with other rollouts than those that were asked about.

        Raises:
          ValueError: names one that has changed.
        """
        ours = {(rollout.problem.id, rollout.number): rollout.fingerprint for rollout in rollouts}
        for row in self.rows.values():
            if ours.get((row["id"], row["rollout"])) != row["fingerprint"]:
                raise ValueError(
                    f"{self.path}: rollout {row['rollout']} of problem {row['id']!r} is not the one that it was; "
                    "restore the files of its rollouts, or choose another --workdir"
                )


def renamed(problem: Problem, identity: str) -> Problem:
    """The problem under another id, as which it gets prompts and random numbers of its own."""
    return dataclasses.replace(problem, id=identity)
