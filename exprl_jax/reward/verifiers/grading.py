"""The one grader of a run: each problem's kind has its verifier, and verdicts come in row order.

Math, code and multiple choice are graded in processes and threads beside the accelerator.  Open-ended science needs a
judge model, so it is not graded here but by the judge's `verify`, on the mesh or at an endpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

from exprl_jax import config
from exprl_jax.data.problems import Problem
from exprl_jax.hosts import processes_here, say
from exprl_jax.reward.verifiers.math import Grading
from exprl_jax.reward.verifiers.verdict import Verdict
from exprl_jax.reward.verifiers.verifier import verifier_of


class Verdicts:
    """Verdicts that are being worked out."""

    def __init__(self, verdicts: Sequence[Verdict], pending: Sequence[tuple[Sequence[int], Grading]]):
        """Args: verdicts: of all rows, those that are known at once; pending: (indices of rows, their grading)."""
        self._verdicts = list(verdicts)
        self._pending = pending

    def result(self) -> list[Verdict]:
        """Waits for every row; verdicts in row order.  Open-ended science rows are `missing`: see `Judge.verify`."""
        verdicts = list(self._verdicts)
        for indices, grading in self._pending:
            for index, verdict in zip(indices, grading.result(), strict=True):
                verdicts[index] = verdict
        return verdicts


class Throughput:
    """Rows that pools have graded, and the time that at least one of them was at work."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows = self._open = 0
        self._seconds, self._since = 0.0, 0.0

    def begin(self, rows: int) -> None:
        """So many rows are waiting from now on."""
        with self._lock:
            if not self._open:
                self._since = time.perf_counter()
            self._open += rows

    def end(self, _: object) -> None:
        """A row is done."""
        with self._lock:
            self._open, self._rows = self._open - 1, self._rows + 1
            if not self._open:
                self._seconds += time.perf_counter() - self._since

    def report(self) -> dict[str, float]:
        """`time/graded_rows`, and `time/grading_seconds` in which they were graded, since the last report."""
        with self._lock:
            row = {"time/graded_rows": self._rows, "time/grading_seconds": self._seconds}
            self._rows, self._seconds = 0, 0.0
            return row


class Graders:
    """The verifiers of some kinds of problems; a context manager, for they hold processes.

    Attributes:
      throughput: of the pools; multiple choice is graded in no time, where it is submitted.
    """

    def __init__(self, grader: config.Grader, code: config.Code, kinds: Collection[str]):
        """Starts what the kinds need.

        Raises:
          ValueError: programs would have to be run without isolation.
        """
        self.throughput = Throughput()
        self._stack = contextlib.ExitStack()
        self._verifiers = {kind: verifier_of(kind) for kind in kinds}
        self._pools = {
            kind: self._stack.enter_context(verifier.open(grader, code))
            for kind, verifier in self._verifiers.items()
            if verifier.open is not None
        }

    @property
    def isolation(self) -> str:
        """What keeps the programs of rollouts apart from this machine; empty where none are run."""
        return "; ".join(pool.isolation.sentence for pool in self._pools.values() if hasattr(pool, "isolation"))

    def __enter__(self) -> Graders:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def submit(self, rows: Sequence[tuple[Problem, str]]) -> Verdicts:
        """Begins to grade (problem, response) rows and returns at once."""
        verdicts, waiting = [Verdict.missing] * len(rows), {kind: [] for kind in self._pools}
        for index, (problem, response) in enumerate(rows):
            if problem.kind in waiting:
                waiting[problem.kind].append(index)
            else:
                verdicts[index] = self._verifiers[problem.kind].row(problem, response)
        pending = []
        for kind, indices in waiting.items():
            self.throughput.begin(len(indices))
            grading = self._pools[kind].submit([self._verifiers[kind].row(*rows[index]) for index in indices])
            grading.when_done(self.throughput.end)
            pending.append((indices, grading))
        return Verdicts(verdicts, pending)


def submit_owned(
    graders: Graders, problems: Sequence[Problem], responses: Sequence[Sequence[str]], owned_P: Sequence[bool]
) -> Callable[[], list[list[Verdict]]]:
    """Begins to grade the responses to the problems that this process owns (`hosts.owned_problems`).

    Returns:
      What waits for a verdict a response, by problem: `missing` for problems that another process has graded, whose
      verdicts are taken.
    """
    owned = [(p, text) for p, group, mine in zip(problems, responses, owned_P, strict=True) if mine for text in group]
    grading = graders.submit(owned)

    def verdicts() -> list[list[Verdict]]:
        graded = iter(grading.result())
        return [[next(graded) if mine else Verdict.missing for _ in group] for group, mine in zip(responses, owned_P)]

    return verdicts


def check_answers(problems: Sequence[Problem]) -> None:
    """Refuses problems whose answer their verifier could not use, before a run starts; names what no answer equals.

    Raises:
      ValueError: names the problem.
    """
    unreadable = [problem.id for problem in problems if not verifier_of(problem.kind).readable(problem)]
    if unreadable:
        say(
            f"warning: {len(unreadable)} of {len(problems)} problems have an answer that the grader cannot read, and no"
            f" response to them is right: {', '.join(unreadable[:5])}{', ...' * (len(unreadable) > 5)}; mend them"
        )
    for problem in problems:
        try:
            verifier_of(problem.kind).check(problem)
        except ValueError as error:
            raise ValueError(f"problem {problem.id!r}: {error}") from error


def verifier_files(grader: config.Grader, kinds: Collection[str]) -> dict[str, Sequence[pathlib.Path]]:
    """The files of the functions of the user's that verify some kinds of problems, by their names.

    Raises:
      ValueError: there is none, or it cannot be loaded; names the config's key.
    """
    return {name: paths for kind in kinds for name, paths in verifier_of(kind).files(grader).items()}


def open_graders(grader: Any, code: Any, kinds: Sequence[str], grades: bool = True) -> Graders:
    """The verifiers of these kinds; says what isolates the programs of rollouts, where there are any.

    Every process must call this: those of a host share its `grader.workers`, and each has one at least.

    Args:
      grades: whether this process grades any rows.
    """
    sharing = processes_here(grades)
    workers = max(1, grader.workers // sharing) if grades else 1
    graders = Graders(dataclasses.replace(grader, workers=workers), code, kinds)
    if graders.isolation:
        say(graders.isolation)
    return graders
