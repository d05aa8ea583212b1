"""A judge that is overheard: what it says of open-ended answers, from which a run takes the verdicts alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from exprl_jax.data.problems import Problem
from exprl_jax.reward.judgements import Answer, Judgements, Pending, Query, verdicts_of
from exprl_jax.reward.judges import AnyJudge
from exprl_jax.reward.verifiers.verdict import Verdict


class Listening:
    """Asks a judge, and keeps its answers about open-ended responses."""

    def __init__(self, judge: AnyJudge):
        """Args: judge: that is asked."""
        self._judge, self.on_mesh = judge, judge.on_mesh
        self._heard: dict[tuple[str, str], Answer] = {}

    def submit(
        self, problems: Sequence[Problem], queries: Sequence[Sequence[Query]], segments: int
    ) -> Pending[Judgements]:
        """As the judge."""
        return self._judge.submit(problems, queries, segments)

    def submit_verify(
        self, problems: Sequence[Problem], responses: Sequence[Sequence[str]]
    ) -> Pending[list[list[Verdict]]]:
        """As the judge; what it answers is kept."""
        if not any(responses):
            return self._judge.submit_verify(problems, responses)
        asked = self._judge.submit_answers(problems, responses)

        def result() -> list[list[Verdict]]:
            answers = asked.result()
            for answer in answers:
                self._heard[problems[answer.problem].id, responses[answer.problem][answer.query]] = answer
            return verdicts_of(answers, responses)

        return Pending(result)

    def verify(self, problems: Sequence[Problem], responses: Sequence[Sequence[str]]) -> list[list[Verdict]]:
        """The result of `submit_verify`."""
        return self.submit_verify(problems, responses).result()

    def said_of(self, problem: str, response: str) -> dict[str, Any] | None:
        """Of a response to a problem, by its id: the judge's words, the probabilities of no and yes, or a function's
        score; None where it was not asked, or the response did not fit."""
        answer = self._heard.get((problem, response))
        if answer is None:
            return None
        digits = answer.probability_5
        return {
            "text": answer.text,
            "no_yes": None if digits is None else [round(float(p), 6) for p in digits[:2]],
            "score": answer.score,
            "cut": answer.cut,
        }
