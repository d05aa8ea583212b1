"""What a judge is taught: texts and the scores or judgements that it should give them, put to it as in a run.

A line of a lessons file

    {"problem": "2 + 3?", "reference": "2 + 3 = 5", "trace": "It is 6.", "unit": "outcome", "score": 0.25}

is an example whose prompt is the one that a judge is asked with (`judge.score_prompt`), token for token, and whose
response is what that read-out reads:

    logits    … Score: ⟦2⟧              the digit alone; a score between two digits is a weight on each of them
    text      … ⟦The sum is off.\\nScore: 2<end>⟧
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_args

from exprl_jax import config as schema
from exprl_jax.data.packing import Example
from exprl_jax.data.problem_sources import Row, read_rows, split_sources
from exprl_jax.data.problems import Problem, read_choices, read_domain, read_text
from exprl_jax.data.tokenizer import SplitPrompt, Tokenizer
from exprl_jax.hosts import say
from exprl_jax.reward.judge import score_prompt
from exprl_jax.reward.judge_prompts import (
    CONTINUATION,
    DIGITS,
    Unit,
    blind_messages,
    normalise,
    parse_score,
    render_score,
)
from exprl_jax.reward.judgements import MARKER

COLUMNS = ("problem", "reference", "trace", "unit", "score", "judgement", "domain", "choices")


@dataclasses.dataclass(frozen=True)
class JudgeLesson:
    """A text, and what a judge should say of it.

    Attributes:
      where: file and line that it is from.
      problem: with the reference that the judge sees, None for a judge without; its answer is empty.
      unit: what the trace is: a whole attempt, one so far, or a step.
      trace: what is judged.
      score: in [0, 1]; None where only a judgement was given.
      judgement: what a `text` judge should write, its score line included; None where only a score was given.
    """

    where: str
    problem: Problem
    unit: Unit
    trace: str
    score: float | None
    judgement: str | None

    @property
    def content(self) -> str:
        """All that it says: what a position in the data refers to."""
        return f"{self.problem.content}\0{self.unit}\0{self.trace}\0{self.score}\0{self.judgement}"


class Taught(NamedTuple):
    """A lesson as it is trained on.

    Attributes:
      example: the judge's prompt, and what it should answer.
      share: how far the score lies towards the digit after the one that the example ends in, in [0, 1).
    """

    example: Example
    share: float


def read_lessons(source: str) -> list[JudgeLesson]:
    """Reads lessons.

    Args:
      source: JSONL or parquet paths and globs, `hf:` or `tfds:` data sets, with commas between.

    Raises:
      ValueError: names the line of anything missing, mistyped or contradictory.
    """
    lessons: list[JudgeLesson] = []
    unread: dict[str, str] = {}
    for part in split_sources(source):
        for row in read_rows(part, "train"):
            lessons.append(_lesson(row))
            unread |= {name: row.where for name in row.columns if name not in (*COLUMNS, *unread)}
    if not lessons:
        raise ValueError(f"{source} holds no lessons: expected at least one row")
    for name, where in unread.items():
        near = difflib.get_close_matches(str(name), COLUMNS, n=1)
        say(f"{where}: column {name!r} is not read{f'; did you mean {near[0]!r}?' if near else ''}")
    return lessons


def lesson_prompt(judge_config: schema.Judge, tokenizer: Tokenizer, lesson: JudgeLesson) -> SplitPrompt:
    """The prompt that the judge is asked with about such a text, with a hole for it."""
    problem, readout = lesson.problem, judge_config.readout
    if problem.reference is not None:
        return score_prompt(judge_config, tokenizer, problem, lesson.unit)
    asked = (problem.problem, problem.choices, problem.domain, readout)
    messages = blind_messages(*asked, MARKER, lesson.unit, judge_config.template)
    return tokenizer.render_split(messages, MARKER, CONTINUATION[readout])


def teach(
    judge_config: schema.Judge, tokenizer: Tokenizer, prompt: SplitPrompt, digit_ids: Sequence[int], lesson: JudgeLesson
) -> Taught:
    """A lesson in token ids.

    Args:
      prompt: its `lesson_prompt`.
      digit_ids: of the digits, for the read-out `logits`.

    Raises:
      ValueError: the lesson has not what the read-out needs.
    """
    asked = (*prompt.head, *prompt.tail(lesson.trace))
    if judge_config.readout == "logits":
        if lesson.score is None:
            raise ValueError(f"{lesson.where}: no score, which a judge with the read-out 'logits' is taught")
        likert = _likert(lesson.score)
        digit = math.floor(likert)
        return Taught(Example(asked, (digit_ids[DIGITS.index(digit)],)), likert - digit)
    text = lesson.judgement
    if text is None:
        likert = _likert(lesson.score)
        if likert != round(likert):
            raise ValueError(
                f"{lesson.where}: no judgement, and the score {lesson.score} is no whole digit from 1 to 5 that a line "
                "of one could hold; give 0, 0.25, 0.5, 0.75 or 1, a judgement, or train the read-out 'logits'"
            )
        text = render_score(round(likert))
    return Taught(Example(asked, (*tokenizer.encode(text), tokenizer.eos_ids[0])), 0.0)


def _likert(score: float) -> float:
    """The inverse of `judge_prompts.normalise`."""
    return DIGITS[0] + score * (DIGITS[-1] - DIGITS[0])


def _lesson(row: Row) -> JudgeLesson:
    columns, where = row.columns, row.where
    text = read_text(row, columns, "problem")
    reference = None if columns.get("reference") is None else read_text(row, columns, "reference")
    unit = columns.get("unit") or "outcome"
    if unit not in get_args(Unit):
        raise ValueError(f"{where}: unit must be one of {', '.join(get_args(Unit))}, got {unit!r:.60}")
    if reference is None and unit != "outcome":
        raise ValueError(f"{where}: unit {unit!r} without a reference; a judge without one is asked of whole attempts")
    trace = columns.get("trace")
    if not isinstance(trace, str):  # it may be empty: so are some rollouts
        raise ValueError(f"{where}: trace must be a string, got {trace!r:.60}; the row has {', '.join(columns)}")
    judgement = None if columns.get("judgement") is None else read_text(row, columns, "judgement")
    problem = Problem(
        id=hashlib.blake2b(text.encode(), digest_size=6).hexdigest(),
        problem=text,
        reference=reference,
        answer="",
        domain=read_domain(row, "domain", columns.get("domain") or "math"),
        choices=read_choices(row, columns.get("choices")),
    )
    return JudgeLesson(where, problem, unit, trace, _score(where, columns, judgement), judgement)


def _score(where: str, columns: Mapping[str, Any], judgement: str | None) -> float | None:
    score = columns.get("score")
    if score is not None and (isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1):
        raise ValueError(f"{where}: score must be a number in [0, 1], where 0 means the digit 1, got {score!r:.60}")
    if judgement is None:
        if score is None:
            raise ValueError(f"{where}: neither a score nor a judgement; a lesson says what the judge should answer")
        return float(score)
    written = parse_score(judgement)
    if written is None:
        raise ValueError(f"{where}: the judgement has no score line such as {render_score(3)!r}, got {judgement!r:.80}")
    if score is not None and round(_likert(score)) != written:
        raise ValueError(f"{where}: the judgement says {written}, and the score {score} is {_likert(score):.3g}")
    return normalise(written) if score is None else float(score)
