"""Rollouts that a run or an evaluation has left behind, and what keeps answers about them true to them."""

from __future__ import annotations

import glob
import hashlib
import os
import pathlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from exprl_jax import config
from exprl_jax.data.problems import Problem, read_problems
from exprl_jax.files import Ledger, read_rows
from exprl_jax.reward.routes import ROUTES
from exprl_jax.reward.verifiers.verdict import Verdict
from exprl_jax.run.workdir import recorded_config

# The answer may be null (of code, whose tests rows leave out), and so may the reference.
_FIELDS = {
    "id": str,
    "problem": str,
    "response": str,
    "reference": str | None,
    "answer": str | None,
    "kind": str,
    "domain": str,
    "verdict": str,
}


class StoredSegment(NamedTuple):
    """A segment as a run wrote it down.

    Attributes:
      score: its judge's, in [0, 1], of the prefix that ends with it; None where it gave none.
      judge: what the judge wrote; None for a judge that writes nothing.
    """

    text: str
    score: float | None
    judge: str | None


class FixedRollout(NamedTuple):
    """A rollout as it was written.

    Attributes:
      number: among the rollouts of its problem, in the order of the files.
      segments: of a run's rollouts; none of an evaluation's.
      labels: the row's other numbers, by their names.
    """

    problem: Problem
    number: int
    response: str
    verdict: Verdict
    segments: tuple[StoredSegment, ...] = ()
    labels: Mapping[str, float] = MappingProxyType({})

    @property
    def key(self) -> tuple[str, int]:
        """Its problem's id and its number."""
        return self.problem.id, self.number

    @property
    def fingerprint(self) -> str:
        """Of the response, by which a file that has changed is known."""
        return hashlib.blake2b(self.response.encode(), digest_size=8).hexdigest()


def read_rollouts(source: str, data: config.Source, *, references: bool) -> list[FixedRollout]:
    """Reads rollouts, each with its problem: from `data.source` where it is there, else as the row has it.

    Args:
      source: JSONL files or globs with commas between, of a run (`rollouts/step_N.jsonl`) or an evaluation
        (`samples/<set>.jsonl`).
      data: the problems; one with answer choices must be there, for rows have none.
      references: whether `data.source` must hold reference solutions.

    Raises:
      ValueError: no file, a row that is none, a problem that differs from the one of its id.
    """
    problems: dict[str, Problem] = {}
    if data.source:
        read = read_problems(data.source, split=data.split, references=references, columns=data.columns)
        problems = {p.id: p for p in read}
    rollouts: list[FixedRollout] = []
    counts: dict[str, int] = {}
    for path in _list_files(source):
        run = recorded_config(path.parents[1])
        for number, row in enumerate(read_rows(path, _FIELDS, "rollout"), 1):
            try:
                problem = problems.setdefault(row["id"], _problem_of(row, problems.get(row["id"])))
                verdict, segments = Verdict(row["verdict"]), _segments_of(row, run)
            except ValueError as error:
                raise ValueError(f"{path}, row {number}: not a rollout ({error})") from error
            index = counts.get(problem.id, 0)
            counts[problem.id] = index + 1
            rollouts.append(FixedRollout(problem, index, row["response"], verdict, segments, _labels_of(row)))
    if not rollouts:
        raise ValueError(f"rollouts: {source!r} holds none; expected at least one row")
    return rollouts


def check_unchanged(ledger: Ledger, rollouts: Sequence[FixedRollout]) -> None:
    """Refuses to go on with other rollouts than those that were asked about.

    Raises:
      ValueError: names one that has changed.
    """
    fingerprints = {rollout.key: rollout.fingerprint for rollout in rollouts}
    for row in ledger.rows():
        if fingerprints.get((row["id"], row["rollout"])) != row["fingerprint"]:
            raise ValueError(
                f"{ledger.path}: rollout {row['rollout']} of problem {row['id']!r} is not the one that it was; "
                "restore the files of its rollouts, or choose another --workdir"
            )


def _list_files(source: str) -> list[pathlib.Path]:
    files = []
    for part in filter(None, map(str.strip, source.split(","))):
        paths = sorted(glob.glob(os.path.expanduser(part)))
        if not paths:
            raise ValueError(f"rollouts: {part!r} matches no file; expected JSONL files of a run or an evaluation")
        files += [pathlib.Path(path).resolve() for path in paths]
    return list(dict.fromkeys(files))  # globs may overlap


def _labels_of(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in row.items() if type(value) in (int, float)}


def _segments_of(row: Mapping[str, Any], run: Mapping[str, Any]) -> tuple[StoredSegment, ...]:
    """The row's segments, if it has them.

    Args:
      run: the config of the run that wrote the row, as far as it is known: what a verifier gave, and what a judge said
        of single steps, is no judge's score of a rollout or a prefix.

    Raises:
      ValueError: one that is none.
    """
    route = ROUTES.get(run.get("routes", {}).get(row["kind"], ""))
    of_steps = route is not None and route.per_segment and run["judge"]["unit"] == "step"
    judged = route is None or (route.judged and not of_steps)
    segments = []
    for segment in row.get("segments") or ():
        values = [segment.get(name) for name in StoredSegment._fields] if isinstance(segment, Mapping) else [None] * 3
        text, score, judge = values
        numeric = score is None or (isinstance(score, int | float) and not isinstance(score, bool) and 0 <= score <= 1)
        if not isinstance(text, str) or not numeric or not isinstance(judge, str | None):
            raise ValueError(f"a segment is {segment!r:.60}, expected its text, a score in [0, 1] or null, and judge")
        segments.append(StoredSegment(text, score if judged else None, judge))
    return tuple(segments)


def _problem_of(row: Mapping[str, Any], known: Problem | None) -> Problem:
    """The row's problem: the known one of its id, if there is one.

    Raises:
      ValueError: that is another problem, or there is none and the row does not hold enough to make one.
    """
    if known is None and row["kind"] == "choice":
        raise ValueError(
            f"problem {row['id']!r} has answer choices, which rows leave out; name its data in config.data.source"
        )
    problem = known or Problem(row["id"], row["problem"], row["reference"], row["answer"], row["domain"])
    if problem.problem.strip() != row["problem"].strip() or problem.kind != row["kind"]:
        raise ValueError(
            f"problem {problem.id!r} has another text or kind before, or in config.data.source; name the data of the "
            "rollouts"
        )
    return problem
