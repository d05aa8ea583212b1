"""What a judge is taught: texts and the scores or judgements that it should give them, put to it as in a run.

Two lines of a lessons file

    {"problem": "2 + 3?", "reference": "2 + 3 = 5", "trace": "It is 6.", "unit": "outcome", "score": 0.25}
    {"problem": "2 + 3?", "reference": "2 + 3 = 5", "unit": "prefix",
     "segments": [{"text": "2 + 3", "score": 0.5}, {"text": " = 6.", "score": 0.25}]}

An example's prompt is the one that a judge is asked with (`judge.score_prompt`), token for token, and its response is
what that read-out reads:

    logits    … Score: ⟦2⟧              the digit alone; a score between two digits is a weight on each of them
    text      … ⟦The sum is off.\\nScore: 2<end>⟧

The prefixes of one text are examples that branch off it (`data.packing`), so that the text is read once:

    rubric problem reference  2 + 3  = 6.
                                  ↘     ↘
                                   ? ⟦3⟧   ? ⟦2⟧       ? is what follows a trace: the closing instruction
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_args

from exprl_jax import config as schema
from exprl_jax.data.packing import Branches, Example
from exprl_jax.data.problem_sources import Row, read_rows, split_sources
from exprl_jax.data.problems import Problem, read_choices, read_domain, read_text
from exprl_jax.data.tokenizer import SplitPrompt, Tokenizer
from exprl_jax.hosts import say
from exprl_jax.reward.branching import common_prefix
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

COLUMNS = ("problem", "reference", "trace", "segments", "unit", "score", "judgement", "domain", "choices")
# What `evaluation.label` writes besides, for people.
_NOT_READ = ("id", "rollout")


class Label(NamedTuple):
    """What a judge should say of a text.

    Attributes:
      trace: the text.
      score: in [0, 1].
      judgement: what a `text` judge should write, its score line included; None where only a score was given.
    """

    trace: str
    score: float
    judgement: str | None


@dataclasses.dataclass(frozen=True)
class JudgeLesson:
    """Texts about one problem, and what a judge should say of each.

    Attributes:
      where: file and line that it is from.
      problem: with the reference that the judge sees, None for a judge without; its answer is empty.
      unit: what the texts are: whole attempts, beginnings of one, or its steps.
      labels: of each text, at least one; of beginnings, from the shortest on.
    """

    where: str
    problem: Problem
    unit: Unit
    labels: tuple[Label, ...]

    @property
    def content(self) -> str:
        """All that it says: what a position in the data refers to."""
        return f"{self.problem.content}\0{self.unit}\0{self.labels}"


class Taught(NamedTuple):
    """A lesson as it is trained on.

    Attributes:
      branches: for each label the judge's prompt, and what it should answer.
      shares: of each label, how far the score lies towards the digit after the one that it ends in, in [0, 1).
    """

    branches: Branches
    shares: tuple[float, ...]


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
            unread |= {name: row.where for name in row.columns if name not in (*COLUMNS, *_NOT_READ, *unread)}
    if not lessons:
        raise ValueError(f"{source} holds no lessons: expected at least one row")
    for name, where in unread.items():
        near = difflib.get_close_matches(str(name), COLUMNS, n=1)
        say(f"{where}: column {name!r} is not read{f'; did you mean {near[0]!r}?' if near else ''}")
    return lessons


def lesson_prompt(judge_config: schema.Judge, tokenizer: Tokenizer, lesson: JudgeLesson) -> SplitPrompt:
    """The prompt that the judge is asked with about such texts, with a hole for one."""
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

    Where texts begin alike their ids may still part before their characters do, for a prefix is tokenized as it is
    asked about, alone: what is shared is found in the ids.

    Args:
      prompt: its `lesson_prompt`.
      digit_ids: of the digits, for the read-out `logits`.

    Raises:
      ValueError: the lesson has not what the read-out needs.
    """
    traces = [tuple(prompt.encode(label.trace)) for label in lesson.labels]
    asked = [(*prompt.head, *trace, *prompt.suffix) for trace in traces]
    answers = [_answer(judge_config, tokenizer, digit_ids, lesson.where, label) for label in lesson.labels]
    whole = (*prompt.head, *max(traces, key=len))
    shared = [min(common_prefix(ids, whole), len(ids) - 1) if len(traces) > 1 else 0 for ids in asked]
    examples = [Example(ids, answer) for ids, (answer, _) in zip(asked, answers)]
    return Taught(Branches(examples, shared), tuple(share for _, share in answers))


def _answer(judge_config, tokenizer, digit_ids, where, label) -> tuple[tuple[int, ...], float]:
    """(what the judge should answer, how far the score lies towards the next digit)."""
    digits = likert(label.score)
    if judge_config.readout == "logits":
        digit = math.floor(digits)
        return (digit_ids[DIGITS.index(digit)],), digits - digit
    text = label.judgement
    if text is None:
        if digits != round(digits):
            raise ValueError(
                f"{where}: no judgement, and the score {label.score} is no whole digit from 1 to 5 that a line "
                "of one could hold; give 0, 0.25, 0.5, 0.75 or 1, a judgement, or train the read-out 'logits'"
            )
        text = render_score(round(digits))
    return (*tokenizer.encode(text), tokenizer.eos_ids[0]), 0.0


def likert(score: Any) -> Any:
    """From 0..1 to 1..5, a number or an array: the inverse of `judge_prompts.normalise`."""
    return DIGITS[0] + score * (DIGITS[-1] - DIGITS[0])


def _lesson(row: Row) -> JudgeLesson:
    columns, where = row.columns, row.where
    text = read_text(row, columns, "problem")
    reference = None if columns.get("reference") is None else read_text(row, columns, "reference")
    segments = columns.get("segments")
    unit = columns.get("unit") or ("outcome" if segments is None else "prefix")
    if unit not in get_args(Unit):
        raise ValueError(f"{where}: unit must be one of {', '.join(get_args(Unit))}, got {unit!r:.60}")
    if reference is None and unit != "outcome":
        expected = "expected 'outcome': a judge without one is asked about whole attempts alone"
        raise ValueError(f"{where}: unit {unit!r} without a reference; {expected}")
    problem = Problem(
        id=hashlib.blake2b(text.encode(), digest_size=6).hexdigest(),
        problem=text,
        reference=reference,
        answer="",
        domain=read_domain(row, "domain", columns.get("domain") or "math"),
        choices=read_choices(row, columns.get("choices")),
    )
    labels = [_label(row, columns, columns.get("trace"), "trace")] if segments is None else _labels(row, unit, segments)
    return JudgeLesson(where, problem, unit, tuple(labels))


def _labels(row: Row, unit: Unit, segments: Any) -> list[Label]:
    """The labels of a text that is given by its segments; those without score and judgement are no lesson."""
    where = row.where
    if unit == "outcome":
        raise ValueError(f"{where}: unit 'outcome' with segments, which are of the units prefix and step; give a trace")
    if other := [name for name in ("trace", "score", "judgement") if row.columns.get(name) is not None]:
        raise ValueError(f"{where}: {other[0]} beside segments, which hold texts and scores themselves; give one")
    if not isinstance(segments, list) or not all(isinstance(segment, Mapping) for segment in segments):
        raise ValueError(f"{where}: segments must be a list of objects with text and score, got {segments!r:.60}")
    labels, before = [], ""
    for number, segment in enumerate(segments, 1):
        text = segment.get("text")
        if not isinstance(text, str):
            raise ValueError(f"{where}: segment {number}: text must be a string, got {text!r:.60}")
        before += text
        if segment.get("score") is not None or segment.get("judgement") is not None:
            at = row._replace(where=f"{where}: segment {number}")
            labels.append(_label(at, segment, before if unit == "prefix" else text, "text"))
    if not labels:
        raise ValueError(f"{where}: no segment has a score or a judgement; a lesson says what the judge should answer")
    return labels


def _label(row: Row, values: Mapping[str, Any], trace: Any, key: str) -> Label:
    where, score = row.where, values.get("score")
    if not isinstance(trace, str):  # it may be empty: so are some rollouts
        raise ValueError(f"{where}: {key} must be a string, got {trace!r:.60}; the row has {', '.join(values)}")
    if score is not None and (isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1):
        raise ValueError(f"{where}: score must be a number in [0, 1], where 0 means the digit 1, got {score!r:.60}")
    if values.get("judgement") is None:
        if score is None:
            raise ValueError(f"{where}: neither a score nor a judgement; a lesson says what the judge should answer")
        return Label(trace, float(score), None)
    judgement = read_text(row, values, "judgement")
    written = parse_score(judgement)
    if written is None:
        raise ValueError(f"{where}: the judgement has no score line such as {render_score(3)!r}, got {judgement!r:.80}")
    if score is not None and abs(likert(score) - written) > 0.5:
        raise ValueError(f"{where}: the judgement says {written}, and the score {score} is {likert(score):.3g}")
    return Label(trace, normalise(written) if score is None else float(score), judgement)
