"""Answers that a function of the user's verifies: `grader.function`, of the domain `custom`.

The function is given attempts of the unit `answer` and returns for each True (correct), False (wrong), None (it cannot
say: `missing`, no reward) or a verdict's word, `no_answer` for instance.  One attempt at a time: one that takes longer
than `grader.seconds` has timed out, and one whose process dies twice is `unparsable`, as in mathematics.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from exprl_jax import config
from exprl_jax.data.problems import Problem
from exprl_jax.reward.functions import Asked, FunctionPool, Lost, function_files
from exprl_jax.reward.verifiers.math import Grading
from exprl_jax.reward.verifiers.verdict import Verdict
from exprl_jax.reward.verifiers.verifier import Verifier

_KEY = "grader.function"
_OF_LOST = {Lost.timed_out: Verdict.timed_out, Lost.died: Verdict.unparsable}
_OF_VALUE = {True: Verdict.correct, False: Verdict.wrong, None: Verdict.missing} | {str(v): v for v in Verdict}


class FunctionGrader:
    """Worker processes that verify answers by a function; use as a context manager."""

    def __init__(self, grader: config.Grader):
        """Starts the workers."""
        self._name = grader.function
        self._pool = FunctionPool(_KEY, grader.function, workers=grader.workers, seconds=grader.seconds)

    def __enter__(self) -> FunctionGrader:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.close()

    def submit(self, rows: Sequence[tuple[Problem, str]]) -> Grading:
        """Begins to verify (problem, response) rows and returns at once.

        Returns:
          `result` raises ValueError where the function raised, or returned something else than a verdict.
        """
        return Grading(self._pool.submit([[Asked(*row, "answer")] for row in rows], self._verdict))

    def _verdict(self, asked: Sequence[Asked], values: list[Any] | Lost) -> Verdict:
        if isinstance(values, Lost):
            return _OF_LOST[values]
        (value,) = values
        if value not in _OF_VALUE:
            raise ValueError(
                f"config.{_KEY}: {self._name}, problem {asked[0].problem.id!r}: it returned {value!r:.60}, expected "
                f"True, False, None or one of {', '.join(Verdict)}"
            )
        return _OF_VALUE[value]


def _files(grader: config.Grader) -> Mapping[str, Sequence[pathlib.Path]]:
    if not grader.function:
        raise ValueError(
            f"config.{_KEY}: got '', expected 'package.module:name' or 'path/to/file.py:name': it verifies the data's "
            "problems of the domain 'custom'"
        )
    return {f"function {grader.function}": function_files(_KEY, grader.function)}


VERIFIER = Verifier(
    open=lambda grader, code: FunctionGrader(grader),
    row=lambda problem, response: (problem, response),
    check=lambda problem: None,
    vote=None,
    files=_files,
)
