"""What every judge is asked and what is made of its answers: a model on the mesh or behind an endpoint, a function.

Query ─ score_messages, fill ─→ chat ─ a judge ─→ Answer ─ judgements_of, verdicts_of ─→ Judgements, verdicts
"""

from __future__ import annotations

import dataclasses
import secrets
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from exprl_jax import config as schema
from exprl_jax.data.problems import Problem
from exprl_jax.data.tokenizer import Message
from exprl_jax.reward.checklist import read_items
from exprl_jax.reward.judge_prompts import DIGITS, Unit, judge_messages, normalise, parse_score
from exprl_jax.reward.verifiers.open_ended import parse_verdict, verdict_from_digits, verify_messages
from exprl_jax.reward.verifiers.verdict import Verdict

T = TypeVar("T")

# Stands for the judged text in a prompt; nobody can guess it, so no problem contains it.
MARKER = f"trace{secrets.token_hex(16)}"


class Query(NamedTuple):
    """One thing to score: rollout `g`'s trace up to (or of) segment `n`.

    Attributes:
      ended: whether the rollout ended before its budget; None where that is not known.
    """

    g: int
    n: int
    trace: str
    ended: bool | None = None


class Judgements(NamedTuple):
    """What the judge said of this process's problems.

    Attributes:
      score_PGN: float64, normalised to [0, 1]; 0 where not valid.
      valid_PGN: bool, a score was given.
      asked_PGN: bool, a score was wanted.
      cut_PGN: bool, the answer (`text`) reached its budget, or the trace did not fit; not valid then unless parsed.
      text: what the judge wrote, by (problem, g, n); empty for `logits`.
      tokens: trace tokens read and answer tokens written.
      digits: the probabilities of the digits 1 to 5, by (problem, g, n); empty for `text`.
    """

    score_PGN: np.ndarray
    valid_PGN: np.ndarray
    asked_PGN: np.ndarray
    cut_PGN: np.ndarray
    text: Mapping[tuple[int, int, int], str]
    tokens: int
    digits: Mapping[tuple[int, int, int], tuple[float, ...]] = types.MappingProxyType({})

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by name."""
        return {name: getattr(self, name) for name in ("score_PGN", "valid_PGN", "asked_PGN", "cut_PGN")}


@dataclasses.dataclass(frozen=True)
class Pending(Generic[T]):
    """What a judge was asked, and may still be answering.

    Attributes:
      result: waits for the answers and gives what is made of them.  To be called once, by all processes in the order in
        which they asked, for they agree in it on whether too many answers are missing.
    """

    result: Callable[[], T]


class Answer(NamedTuple):
    """A judge's answer about one text.

    Attributes:
      problem, query: index of the problem, and of the text among those about the problem.
      text: what the judge wrote; None for the read-out `logits`, and where no answer came.
      probability_5: of the digits 1 to 5, for the read-out `logits`; None where no answer came.
      cut: the answer reached its budget.
      tokens: read and written.
      at_end: only the end of `text` may be a score or a verdict.
      score: in [0, 1], of a judge that gives it as such; None of one that does not, and where it gives none.
    """

    problem: int
    query: int
    text: str | None
    probability_5: Sequence[float] | np.ndarray | None
    cut: bool
    tokens: int
    at_end: bool = False
    score: float | None = None


# --- asking ----------------------------------------------------------------------------------------------------------


def score_messages(judge_config: schema.Judge, problem: Problem, unit: Unit) -> list[Message]:
    """The chat that asks for a score against the reference, with `MARKER` in the trace's place.

    Raises:
      ValueError: the problem has no reference, or the rubric has no such prompt.
    """
    reference, readout = needed_reference(problem), judge_config.readout
    asked = (problem.problem, problem.choices, reference, problem.domain, unit, readout)
    return judge_messages(*asked, MARKER, judge_config.template)


def verdict_messages(judge_config: schema.Judge, problem: Problem) -> list[Message]:
    """The chat that asks whether a response's answer is the problem's, with `MARKER` in the response's place."""
    return verify_messages(problem.problem, problem.answer, judge_config.readout, MARKER)


def fill(messages: Sequence[Message], text: str) -> list[Message]:
    """A chat with a text in the place of the marker, which stands once in its last message."""
    *opening, last = messages
    head, suffix = last.content.split(MARKER)
    return [*opening, Message(last.role, f"{head}{text}{suffix}")]


def needed_reference(problem: Problem) -> str:
    """The problem's reference solution.

    Raises:
      ValueError: it has none.
    """
    if problem.reference is None:
        raise ValueError(f"problem {problem.id!r} has no reference solution, which the judge scores against")
    return problem.reference


# --- reading ---------------------------------------------------------------------------------------------------------


def judgements_of(
    judge_config: schema.Judge,
    answers: Iterable[Answer],
    queries: Sequence[Sequence[Query]],
    group: int,
    segments: int,
    items: Sequence[int] = (),
) -> Judgements:
    """Scores in their rows; a query without an answer did not fit.

    Args:
      answers: to some of the queries.
      queries: of each problem (P); any number.
      group, segments: G and N of the result.
      items: of each problem's checklist, that `text` is answered by; 0 where a score line answers, as everywhere where
        it is empty.
    """
    shape = (len(queries), group, segments)
    score, cut = np.zeros(shape), np.zeros(shape, bool)
    valid, asked, text, tokens = cut.copy(), cut.copy(), {}, 0
    digits = {}
    for i, of_problem in enumerate(queries):
        for query in of_problem:
            asked[i, query.g, query.n] = cut[i, query.g, query.n] = True
    for answer in answers:
        query = queries[answer.problem][answer.query]
        index = answer.problem, query.g, query.n
        tokens, cut[index] = tokens + answer.tokens, answer.cut
        if answer.text is not None:
            text[index] = answer.text
        if answer.probability_5 is not None:
            digits[index] = tuple(map(float, answer.probability_5))
        given = _score(judge_config, answer, items[answer.problem] if items else 0)
        if given is not None:
            score[index], valid[index] = given, True
    return Judgements(score, valid, asked, cut, text, tokens, digits)


def verdicts_of(answers: Iterable[Answer], responses: Sequence[Sequence[Any]]) -> list[list[Verdict]]:
    """A verdict a response, by problem; `missing` where no answer came, or one that says neither yes nor no."""
    verdicts = [[Verdict.missing] * len(of_problem) for of_problem in responses]
    for answer in answers:
        if answer.score is not None:
            right = answer.score >= 0.5
            verdicts[answer.problem][answer.query] = Verdict.correct if right else Verdict.wrong
        elif answer.probability_5 is not None:
            verdicts[answer.problem][answer.query] = verdict_from_digits(answer.probability_5)
        elif answer.text is not None:
            verdicts[answer.problem][answer.query] = parse_verdict(answer.text, at_end=answer.at_end)
    return verdicts


def _score(judge_config: schema.Judge, answer: Answer, items: int) -> float | None:
    """In [0, 1]; None where the answer holds none."""
    if answer.score is not None:
        return answer.score
    if items and answer.probability_5 is None:
        return None if answer.text is None else read_items(answer.text, items, at_end=answer.at_end)
    if answer.probability_5 is None:
        likert = None if answer.text is None else parse_score(answer.text, at_end=answer.at_end)
        return None if likert is None else normalise(likert)
    probability_5 = np.asarray(answer.probability_5, np.float64)
    if judge_config.logits_value == "argmax":
        return normalise(DIGITS[probability_5.argmax()])
    return normalise(probability_5 @ np.array(DIGITS))
