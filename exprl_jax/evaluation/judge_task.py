"""A judge of a calibration, what it is asked within, and the ledger of what it has answered."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from exprl_jax import config as schema
from exprl_jax.data.problems import Problem
from exprl_jax.data.tokenizer import Message, SplitPrompt
from exprl_jax.evaluation.passes import ScoringPass, Trace
from exprl_jax.files import Ledger
from exprl_jax.reward.checklists import ChecklistJudge, ChecklistPrompts, Checklists
from exprl_jax.reward.endpoint_judge import EndpointJudge
from exprl_jax.reward.judge import Judge
from exprl_jax.reward.judges import check_judge_lengths, open_checklists, with_checklists
from exprl_jax.run.stopping import StopRequest
from exprl_jax.weights.language_model import LanguageModel, open_model

SCORE_KEY = ("judge", "condition", "order", "repeat", "id", "rollout", "segment")

SCORE_FIELDS = {
    **{"judge": str, "condition": str, "order": str, "repeat": int},
    **{"id": str, "rollout": int, "segment": int | None, "fingerprint": str},
    **{"score": int | float | None, "text": str | None, "tokens": int | float, "seconds": int | float},
}

AnyScorer = Judge | EndpointJudge | ChecklistJudge

Prompts = Mapping[str, SplitPrompt]  # by problem id


@dataclasses.dataclass(frozen=True)
class JudgeTask:
    """A judge and what it is asked within.

    Attributes:
      name: in tables and figures.
      model: of a judge on the mesh, whose parameters are not loaded; None for the others.
      scores: what it has answered.
    """

    name: str
    judge: schema.Judge
    model: LanguageModel | None
    config: schema.Calibrate
    scores: Ledger
    stop: StopRequest

    @property
    def repeats(self) -> list[int]:
        """Numbers of the answers at a temperature; 0 is the answer that training would get."""
        return list(range(1, self.config.repeats.count + 1))

    def question(self, scoring_pass: ScoringPass, trace: Trace, repeat: int) -> dict[str, Any]:
        """What identifies a question in the ledger."""
        return {
            "judge": self.name,
            "condition": scoring_pass.condition,
            "order": scoring_pass.order,
            "repeat": repeat,
            "id": trace.rollout.problem.id,
            "rollout": trace.rollout.number,
            "segment": trace.segment,
            "fingerprint": trace.rollout.fingerprint,
        }

    def with_checklists(self, scorer: Judge | EndpointJudge, scoring_pass: ScoringPass) -> AnyScorer:
        """The judge of a pass, with checklists where its rubric is per problem and it sees a reference.

        Raises:
          ValueError: checklists are missing that the judge cannot write.
        """
        if not self.judge.per_problem or scoring_pass.condition == "none":
            return scorer
        problems = {t.rollout.problem.id: scoring_pass.shown(t.rollout.problem) for t in scoring_pass.traces}
        checklists = self.checklists(list(problems.values()))
        if isinstance(scorer, Judge):
            return with_checklists(scorer, checklists, list(problems.values()), lambda _: scoring_pass.unit)
        return ChecklistJudge(scorer, checklists, ChecklistPrompts(self.judge, None, lambda _: scoring_pass.unit))

    def checklists(self, problems: Sequence[Problem]) -> Checklists:
        """Those of the judge that are there, and where it writes others."""
        checklists = open_checklists(self.judge, [] if self.model is None else [self.model], problems)
        checklists.open(self.scores.path.parent)
        return checklists

    def chat(self, scoring_pass: ScoringPass, problem: Problem) -> list[Message]:
        """What the judge was asked about a problem's traces, with `MARKER` in the trace's place."""
        shown = scoring_pass.shown(problem)
        if self.judge.per_problem and scoring_pass.condition != "none":
            if items := self.checklists([shown]).items(shown):
                return ChecklistPrompts(self.judge, None, lambda _: scoring_pass.unit).score(shown, items)
        return scoring_pass.chats(self.judge)[problem.id]

    def answered(self, scoring_pass: ScoringPass, trace: Trace, repeat: int) -> bool:
        """Whether the ledger has the answer."""
        return self.scores.key_of(self.question(scoring_pass, trace, repeat)) in self.scores


class TooShort(ValueError):
    """A judge's context, or its budget, is too short for what it would be asked."""


def open_judge_model(judge: schema.Judge) -> LanguageModel | None:
    """Finds a local judge's files; None for other judges.

    Raises:
      ValueError: the model cannot be opened.
      TooShort: it has too short a context.
    """
    if judge.backend != "local":
        return None
    model = open_model(judge.model)
    try:
        check_judge_lengths(judge, model.arch)
    except ValueError as error:
        raise TooShort(str(error)) from error
    return model


def whole_prompt(task: JudgeTask, prompts: Prompts, trace: Trace) -> list[int]:
    """All that a judge model reads of a rollout; nothing where it is over the budget."""
    prompt = prompts[trace.rollout.problem.id]
    tail = prompt.tail_within(trace.text, task.judge.max_trace_tokens)
    return [] if tail is None else [*prompt.head, *tail]
