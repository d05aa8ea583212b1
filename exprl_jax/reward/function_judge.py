"""A judge that is a function of the user's."""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from exprl_jax import config as schema
from exprl_jax.data.problems import Problem
from exprl_jax.hosts import sum_over_processes
from exprl_jax.reward.functions import Asked, FunctionPool, Lost
from exprl_jax.reward.judge_prompts import Unit
from exprl_jax.reward.judgements import Answer, Judgements, Pending, Query, judgements_of, verdicts_of
from exprl_jax.reward.verifiers.verdict import Verdict


@dataclasses.dataclass(frozen=True)
class FunctionJudge:
    """A function as judge: it gives scores in [0, 1], or None for none.

    A call that took too long or whose process died twice has no scores: they are missing.  More than
    `workers.max_missing` of what was asked at a time missing so, and an exception, end the run.

    Attributes:
      pool: open for as long as the judge is at work.
      units: by problem id, of the problems that will be scored: what of them is scored.
      references: the same: what they are scored against; None for nothing.
      group: rollouts of a problem (G).
      key: the config's that names the function, for errors.
    """

    config: schema.Judge | schema.Truth
    pool: FunctionPool
    units: Mapping[str, Unit]
    references: Mapping[str, str | None]
    group: int
    key: str = "judge.function"
    on_mesh: ClassVar[bool] = False

    def submit(
        self, problems: Sequence[Problem], queries: Sequence[Sequence[Query]], segments: int
    ) -> Pending[Judgements]:
        """Begins to score every query, and returns at once; arguments as of the other judges' `submit`.

        Returns:
          `result` raises ValueError where the function raised, gave something else than a number in [0, 1] or None, or
          too many scores are missing.
        """
        asked = []
        for problem, of_problem in zip(problems, queries, strict=True):
            if of_problem:
                shown = dataclasses.replace(problem, reference=self.references[problem.id])
                unit = self.units[problem.id]
                asked.append([Asked(shown, query.trace, unit, query.n, query.ended) for query in of_problem])
            else:
                asked.append([])
        answers = self._submit(asked, "scores")
        return Pending(lambda: judgements_of(self.config, answers(), queries, self.group, segments))

    def score(self, problems: Sequence[Problem], queries: Sequence[Sequence[Query]], segments: int) -> Judgements:
        """The result of `submit`."""
        return self.submit(problems, queries, segments).result()

    def submit_verify(
        self, problems: Sequence[Problem], responses: Sequence[Sequence[str]]
    ) -> Pending[list[list[Verdict]]]:
        """Begins to ask whether each response's final answer is right, and returns at once: of 0.5 and more it is."""
        answers = self.submit_answers(problems, responses)
        return Pending(lambda: verdicts_of(answers.result(), responses))

    def submit_answers(self, problems: Sequence[Problem], responses: Sequence[Sequence[str]]) -> Pending[list[Answer]]:
        """What `submit_verify` makes its verdicts of."""
        asked = [
            [Asked(problem, response, "answer") for response in of_problem]
            for problem, of_problem in zip(problems, responses, strict=True)
        ]
        return Pending(self._submit(asked, "verdicts"))

    def verify(self, problems: Sequence[Problem], responses: Sequence[Sequence[str]]) -> list[list[Verdict]]:
        """The result of `submit_verify`."""
        return self.submit_verify(problems, responses).result()

    def report(self) -> dict[str, float]:
        """Metrics of its own: none."""
        return {}

    def _submit(self, asked: Sequence[Sequence[Asked]], wanted: str) -> Callable[[], list[Answer]]:
        rows = [(i, j, one) for i, of_problem in enumerate(asked) for j, one in enumerate(of_problem)]
        size = self.config.workers.batch
        calls = [rows[start : start + size] for start in range(0, len(rows), size)]
        futures = self.pool.submit([[one for _, _, one in call] for call in calls], self._scores)

        def answers() -> list[Answer]:
            values = self._wait(calls, futures, wanted)
            return [Answer(i, j, None, None, False, 0, score=value) for (i, j, _), value in zip(rows, values)]

        return answers

    def _wait(
        self,
        calls: Sequence[Sequence[tuple[int, int, Asked]]],
        futures: Sequence[concurrent.futures.Future[list[float | None] | Lost]],
        wanted: str,
    ) -> list[float | None]:
        """A score for each row of the calls.  All processes raise if one of them does."""
        fault, values, lost, why = "", [], 0, ""
        try:
            for call, future in zip(calls, futures, strict=True):
                made = future.result()
                if isinstance(made, Lost):
                    values, lost, why = values + [None] * len(call), lost + len(call), made.value
                else:
                    values += made
        except ValueError as error:
            fault = str(error)
        faults, lost_of_all, asked = sum_over_processes([bool(fault), lost, sum(map(len, calls))])
        if faults:
            raise ValueError(fault or f"config.{self.key}: it failed in another process; its own message says how")
        workers = self.config.workers
        if lost_of_all > workers.max_missing * asked:
            reason = f"the call {why} (workers.seconds = {workers.seconds:g})" if why else "see another process"
            raise ValueError(
                f"config.{self.key}: {self.config.function}: {lost_of_all} of {asked} {wanted} are missing, more "
                f"than the fraction workers.max_missing = {workers.max_missing:g}; the last: {reason}"
            )
        return values

    def _scores(self, asked: Sequence[Asked], values: list[Any] | Lost) -> list[float | None] | Lost:
        if isinstance(values, Lost):
            return values
        return [self._score(one.problem, value) for one, value in zip(asked, values, strict=True)]

    def _score(self, problem: Problem, value: Any) -> float | None:
        if value is None:
            return None
        if isinstance(value, str) or not 0 <= value <= 1:
            raise ValueError(
                f"config.{self.key}: {self.config.function}, problem {problem.id!r}: it returned {value!r:.60}, "
                "expected a number in [0, 1], or None for no score"
            )
        return float(value)
