"""What is known of a trace's progress apart from the judge, to measure the judge by; no reward is made from it.

  column:<name>   a column of the data: the results that a solution has to reach, texts in their order
  a function      `package.module:name` or `path/to/file.py:name`, as a judge's (docs/judges.md)

A truth is asked about the traces that the judge is asked about, and has the judge's interface.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from exprl_jax import config
from exprl_jax.data.problems import Problem
from exprl_jax.reward.function_judge import FunctionJudge
from exprl_jax.reward.functions import FunctionPool, function_files
from exprl_jax.reward.judgements import Judgements, Pending, Query
from exprl_jax.reward.rubric import Unit

_COLUMN = "column:"


@dataclasses.dataclass(frozen=True)
class ColumnTruth:
    """The share of a problem's results that a trace has reached: those before the first one that it has not.

    Attributes:
      results: by problem id, of the problems that will be asked about; those without are unknown.
      group: rollouts of a problem (G).
    """

    results: Mapping[str, Sequence[str]]
    group: int

    def submit(
        self, problems: Sequence[Problem], queries: Sequence[Sequence[Query]], segments: int
    ) -> Pending[Judgements]:
        """The truth of every query whose problem has one; arguments as of a judge's `submit`."""
        value_PGN = np.zeros((len(problems), self.group, segments))
        known_PGN, asked_PGN = np.zeros(value_PGN.shape, bool), np.zeros(value_PGN.shape, bool)
        for i, (problem, of_problem) in enumerate(zip(problems, queries, strict=True)):
            results = self.results.get(problem.id, ())
            for query in of_problem:
                asked_PGN[i, query.g, query.n] = True
                if results:
                    value_PGN[i, query.g, query.n] = share_reached(results, query.trace)
                    known_PGN[i, query.g, query.n] = True
        truths = Judgements(value_PGN, known_PGN, asked_PGN, np.zeros_like(asked_PGN), {}, 0)
        return Pending(lambda: truths)


AnyTruth = ColumnTruth | FunctionJudge


def truth_files(truth: config.Truth) -> dict[str, Sequence[pathlib.Path]]:
    """The files of a truth's function, by what names it in the config.

    Raises:
      ValueError: it cannot be loaded.
    """
    name = truth.function
    return {f"truth.source {name}": function_files("truth.source", name)} if name else {}


def share_reached(results: Sequence[str], trace: str) -> float:
    """How many of the results occur in a trace, in order and as whole words, up to the first that does not; as a
    share."""
    position, reached = 0, 0
    for result in results:
        match = re.compile(rf"(?<!\w){re.escape(result)}(?!\w)").search(trace, position)
        if not match:
            break
        position, reached = match.end(), reached + 1
    return reached / len(results)


def column_of(truth: config.Truth) -> str:
    """The column that a truth names; empty for a function, and for none."""
    return truth.source.removeprefix(_COLUMN) if truth.source.startswith(_COLUMN) else ""


def open_truth(
    truth: config.Truth,
    problems: Sequence[Problem],
    unit: Callable[[Problem], Unit],
    stack: contextlib.ExitStack,
    group: int,
) -> AnyTruth:
    """The truth that a config names; one that knows nothing where it names none.

    Args:
      problems: that will be asked about.
      unit: what of a problem's rollouts is asked about.
      stack: closes what it holds open.

    Raises:
      ValueError: the column is in none of the problems, or holds something else than texts.
    """
    if not truth.source or not problems:
        return ColumnTruth({}, group)
    if column_of(truth):
        return ColumnTruth(read_column(column_of(truth), problems), group)
    workers = truth.workers
    pool = FunctionPool("truth.source", truth.function, workers=workers.count, seconds=workers.seconds)
    units = {problem.id: unit(problem) for problem in problems}
    references = {problem.id: problem.reference for problem in problems}
    return FunctionJudge(truth, stack.enter_context(pool), units, references, group, key="truth.source")


def read_column(name: str, problems: Sequence[Problem]) -> dict[str, Sequence[str]]:
    """The results of each problem that has them, by its id.

    Raises:
      ValueError: none has, or one holds something else than texts.
    """
    results = {}
    for problem in problems:
        values = problem.extra.get(name)
        if values is None:
            continue
        if not isinstance(values, list) or not values or not all(isinstance(v, str) and v.strip() for v in values):
            raise ValueError(
                f"config.truth.source: column {name!r} of problem {problem.id!r} holds {values!r:.60}, expected a list "
                "of texts: the results that a solution reaches, in order"
            )
        results[problem.id] = [value.strip() for value in values]
    if not results:
        raise ValueError(
            f"config.truth.source: got '{_COLUMN}{name}', expected the name of a column of the data; no problem has it"
        )
    return results
