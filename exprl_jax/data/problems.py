"""Problems with reference solutions: one record, one reader for every kind of source, one order."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from exprl_jax.config import COLUMNS
from exprl_jax.data.benchmarks import BENCHMARKS, STARTER, read_benchmark
from exprl_jax.data.columns import box_marked, marked_answer, rename
from exprl_jax.data.problem_sources import Row, read_rows, split_sources
from exprl_jax.hosts import say
from exprl_jax.kinds import DOMAINS, KINDS, ProblemKind

_SHOWN = 100  # characters of a field that is shown


class Question(NamedTuple):
    """What a policy may see of a problem: the text, and (label, text) of each answer choice."""

    text: str
    choices: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Problem:
    """A problem, its reference solution and its final answer.

    Attributes:
      id: unique within a data set, and the same in every run: a rollout's random numbers are derived from it.
      problem: the statement.
      reference: a worked solution, for judges and teachers only; None where the reader was told to leave it out.
      answer: the final answer, for verifiers only (for code: whatever the code verifier runs).
      domain: `math`, `science`, `code`, or `custom`.
      choices: (label, text) of each answer choice; empty unless multiple choice.
      extra: the row's other columns, by name, as JSON has them; for functions of the user's only.
    """

    id: str
    problem: str
    reference: str | None
    answer: str
    domain: str
    choices: tuple[tuple[str, str], ...] = ()
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    @property
    def kind(self) -> str:
        """What decides its verifier and its reward, of `kinds.KINDS`: `choice` with answer choices, else its domain."""
        return "choice" if self.choices else self.domain

    @property
    def traits(self) -> ProblemKind:
        """What holds of its kind."""
        return KINDS[self.kind]

    @property
    def question(self) -> Question:
        """The problem without reference and answer: all that a policy prompt is made from."""
        return Question(self.problem, self.choices)

    @property
    def content(self) -> str:
        """All that it says: what a position in the data refers to."""
        others = f"\0{json.dumps(self.extra, sort_keys=True)}" if self.extra else ""
        return f"{self.id}\0{self.problem}\0{self.choices}\0{self.reference}\0{self.answer}{others}"

    @functools.cached_property
    def uid(self) -> int:
        """A stable uint32 made from `id`, to fold into random keys."""
        return int.from_bytes(hashlib.blake2b(self.id.encode(), digest_size=4).digest(), "little")


def read_problems(source: str, *, split: str = "train", references: bool = True, columns: str = "") -> list[Problem]:
    """Reads problems.

    Args:
      source: one or several, with commas between: `.jsonl` or `.parquet` files (paths or globs),
        `hf:<dataset id or folder>[:<config>]`, `hf:<dataset id>/<file>`, `tfds:<name or folder>`, or a benchmark,
        `<name>[:<path or glob>]` (see `data.benchmarks`).
      split: of `hf:` and `tfds:` data sets; files have none, and benchmarks their own.
      references: True requires a reference solution in every row; False leaves references out, for programs that must
        not have them.
      columns: which of ours are called otherwise (`config.Source.columns`); benchmarks have their own.

    Rows have either our columns, `problem`, `reference`, `answer` and optionally `id`, `domain` (default `math`) and
    `choices`; or those of the files released with the paper (`data_source`, `ability`, `reward_model`, `extra_info`).
    Choices are `{"label": […], "text": […]}` or a list of such pairs; null or empty means none.

    Of an answer that ends in a line `#### 42` (GSM8K) that line is read; a row without answer has its reference's such
    line.  In the reference that line becomes a `boxed` 42.

    Most benchmarks have no reference solutions and can only be read without.

    A row without `id` is named after its problem's text, so reordering a file changes no identity.

    Raises:
      ValueError: naming source and row for anything missing, empty, mistyped or given twice.
    """
    problems: dict[str, Problem] = {}
    wheres: dict[str, str] = {}
    unread: dict[str, str] = {}
    for row in _rows(source, split, columns):
        if "extra_info" in row.columns and not columns:
            problem = _released(row, references)
        else:
            problem = _plain(row, references)
            unread |= {name: row.where for name in row.columns if name not in (*COLUMNS, *unread)}
        if problem.id in problems:
            raise ValueError(
                f"{row.where}: problem id {problem.id!r} is already that of {wheres[problem.id]}; ids must be unique:"
                " remove one, or give each an `id`"
            )
        problems[problem.id], wheres[problem.id] = problem, row.where
    if not problems:
        raise ValueError(f"{source} holds no problems: expected at least one row")
    for name, where in unread.items():
        near = difflib.get_close_matches(str(name), COLUMNS, n=1)
        say(f"{where}: column {name!r} is read by functions alone{f'; did you mean {near[0]!r}?' if near else ''}")
    return list(problems.values())


def problem_hash(text: str) -> str:
    r"""A fingerprint of a statement, the same however it is typeset.

    Case, white space, LaTeX spacing, dollar signs, braces, quotation marks and sentence punctuation do not count, nor
    does the starter code that `data.benchmarks` puts below a statement; operators, digits and the points and commas
    between digits do.
    """
    statement = unicodedata.normalize("NFKC", text.partition(STARTER)[0]).casefold()
    for pattern, instead in _TYPESETTING:
        statement = pattern.sub(instead, statement)
    return hashlib.blake2b(statement.encode(), digest_size=16).hexdigest()


def check_held_out(problems: Sequence[Problem], held_out: Sequence[Problem]) -> None:
    """Refuses problems to train on that are held out for evaluation.

    Problems are the same if their statements are; of two multiple-choice problems, whose statements may be no more than
    "Which of these is true?", if their choices are the same too, in any order.

    Raises:
      ValueError: naming the first of those that are in both.
    """
    known: dict[str, list[Problem]] = {}
    for problem in held_out:
        known.setdefault(problem_hash(problem.problem), []).append(problem)
    shared = []
    for problem in problems:
        for other in known.get(problem_hash(problem.problem), ()):
            if not problem.choices or not other.choices or _options(problem) == _options(other):
                shared.append(f"{problem.id!r} is {other.id!r}")
                break
    if shared:
        raise ValueError(
            f"{len(shared)} of {len(problems)} training problems are held out for evaluation: {'; '.join(shared[:3])}"
            f"{'; …' if len(shared) > 3 else ''}: remove them, or set data.allow_held_out to train on them all the same"
        )


def order(size: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch: a permutation of `range(size)`, a pure function of its arguments.

    The permutation sorts raw Philox words, a stream that numpy keeps the same across versions and machines (its
    `permutation` is not promised to stay).
    """
    words = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(size)
    return np.argsort(words, kind="stable")


def batch_indices(size: int, batch: int, seed: int, step: int) -> tuple[np.ndarray, int]:
    """The problems of one step and the epoch it belongs to, from the step alone: a position needs no other state.

    An epoch has `size // batch` steps.  The problems left over at its end are dropped; the next epoch's order brings
    them back.

    Raises:
      ValueError: the batch is not between 1 and the number of problems.
    """
    if not 1 <= batch <= size:
        raise ValueError(f"a batch of {batch} problems cannot be drawn from {size}: expected 1 ≤ batch ≤ {size}")
    epoch, position = divmod(step, size // batch)
    return order(size, seed, epoch)[position * batch : (position + 1) * batch], epoch


def drop_overlong(problems: Sequence[Problem], lengths: Sequence[int], limit: int) -> tuple[list[Problem], int]:
    """The problems whose prompt has at most `limit` tokens, and how many were dropped.

    Args:
      lengths: tokens of each problem's prompt.

    Raises:
      ValueError: none is left.
    """
    kept = [problem for problem, length in zip(problems, lengths, strict=True) if length <= limit]
    if not kept:
        raise ValueError(
            f"no problem is left: all {len(problems)} prompts are longer than {limit} tokens (the shortest has"
            f" {min(lengths, default=0)}): raise the prompt length"
        )
    return kept, len(problems) - len(kept)


_TYPESETTING = (
    (re.compile(r"\\[dt]frac(?![a-z])"), r"\\frac"),
    (re.compile(r"\\(?:left|right|displaystyle|quad|qquad)(?![a-z])|\\[,;:!()\[\]\s]"), ""),
    (re.compile(r"[‐‑–—−]"), "-"),
    (re.compile(r"’"), "'"),
    (re.compile(r"``|''(?!\()"), ""),  # LaTeX's quotation marks; f''(x) stays
    (re.compile(r"[\s~$\\{}\"`“”„«»?]"), ""),
    (re.compile(r"(?<!\d)[.,:;]|[.,:;](?!\d)"), ""),
)


def _options(problem: Problem) -> list[str]:
    return sorted(problem_hash(text) for _, text in problem.choices)


def show_first(problems: Sequence[Problem], name: str) -> None:
    """Says what was read of the first problem of a set, a line a field, so that a column in the wrong place is seen."""
    first = problems[0]
    choices = "; ".join(f"{label}: {text}" for label, text in first.choices)
    fields = dict(
        id=first.id,
        problem=first.problem,
        choices=choices,
        reference=first.reference,
        answer=first.answer,
        domain=first.domain,
    )
    say(f"{name}: {len(problems)} problems; what was read of the first:")
    for field, text in fields.items():
        if text:
            line = " ".join(text.split())
            short = line if len(line) <= _SHOWN else f"{line[:_SHOWN]} … ({len(text)} characters)"
            say(f"  {field:<9} {short}")


def _rows(source: str, split: str, columns: str) -> Iterator[Row]:
    for part in split_sources(source):
        name, _, path = part.partition(":")
        if name in BENCHMARKS:
            yield from read_benchmark(name, path)
        else:
            yield from rename(read_rows(part, split), columns) if columns else read_rows(part, split)


def _plain(row: Row, references: bool) -> Problem:
    columns = row.columns
    text = read_text(row, columns, "problem")
    has_id = columns.get("id") is not None
    return Problem(
        id=read_text(row, columns, "id") if has_id else _hash(text),
        problem=text,
        reference=box_marked(read_text(row, columns, "reference")) if references else None,
        answer=_answer(row, columns),
        domain=read_domain(row, "domain", columns.get("domain") or "math"),
        choices=read_choices(row, columns.get("choices")),
        extra=_extra(columns, COLUMNS),
    )


def _released(row: Row, references: bool) -> Problem:
    columns = row.columns
    extra = _struct(row, columns, "extra_info")
    text = read_text(row, extra, "question", "extra_info.")
    index = extra.get("index")
    number = "" if index is None else f"{index}-"
    return Problem(
        # Several released files number their rows from 0 under one data_source, hence the text's hash.
        id=f"{read_text(row, columns, 'data_source')}/{number}{_hash(text)}",
        problem=text,
        reference=read_text(row, extra, "solution", "extra_info.") if references else None,
        answer=read_text(row, _struct(row, columns, "reward_model"), "ground_truth", "reward_model."),
        domain=read_domain(row, "ability", read_text(row, columns, "ability")),
        # Concatenated data sets share one struct type, so a key that is present may well be null.
        choices=read_choices(row, extra.get("choices")),
        extra=_extra(extra, ("question", "solution", "answer", "choices")),
    )


def _answer(row: Row, columns: Mapping[str, Any]) -> str:
    """The answer column's, or its marked part; without one, the marked answer of the reference."""
    if columns.get("answer") is None and columns.get("reference") is not None:
        answer = marked_answer(read_text(row, columns, "reference"))
        if answer is None:
            have = ", ".join(map(str, columns))
            line = "its reference does not end in a line '#### <answer>'"
            raise ValueError(f"{row.where}: no answer; the row has {have}, and {line}")
        return answer
    answer = read_text(row, columns, "answer")
    return marked_answer(answer) or answer


def _extra(columns: Mapping[str, Any], read: Sequence[str]) -> dict[str, Any]:
    """The columns that are not read, as JSON has them: a date, say, is its text."""
    others = {str(name): value for name, value in columns.items() if name not in read and value is not None}
    return json.loads(json.dumps(others, default=str))


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def read_text(row: Row, columns: Mapping[str, Any], key: str, prefix: str = "") -> str:
    """A row's text under a key.

    Raises:
      ValueError: there is none; names the row.
    """
    if columns.get(key) is None:
        raise ValueError(f"{row.where}: no {prefix}{key}; the row has {', '.join(map(str, columns)) or 'nothing'}")
    value = columns[key]
    if type(value) is int and key in ("id", "answer", "ground_truth"):  # often written as numbers
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{row.where}: {prefix}{key} must be a non-empty string, got {value!r:.60}")
    return _encodable(row, f"{prefix}{key}", value)


def _encodable(row: Row, key: str, text: str) -> str:
    """Text that UTF-8 can hold: JSON may spell half of a surrogate pair, which stands for no character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{row.where}: {key} holds {text[error.start]!r} at character {error.start}, half of a surrogate pair; "
            "write the whole character"
        ) from error
    return text


def _struct(row: Row, columns: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = columns.get(key)
    if not isinstance(value, Mapping):
        raise ValueError(f"{row.where}: {key} must be a struct with named fields, got {value!r:.60}")
    return value


def read_domain(row: Row, key: str, value: Any) -> str:
    """The domain that a row's word means.

    Raises:
      ValueError: it means none; names the row.
    """
    domain = DOMAINS.get(value.lower()) if isinstance(value, str) else None
    if domain is None:
        raise ValueError(f"{row.where}: {key} must be one of {', '.join(DOMAINS)}, got {value!r:.60}")
    return domain


def read_choices(row: Row, value: Any) -> tuple[tuple[str, str], ...]:
    """(label, text) of each answer choice of a row; none for null.

    Raises:
      ValueError: they are not in one of the two forms; names the row.
    """
    if not value:
        return ()
    if isinstance(value, Mapping):
        labels, texts = value.get("label"), value.get("text")
        if labels is None and texts is None:  # a struct filled with nulls
            return ()
    elif isinstance(value, list) and all(isinstance(choice, Mapping) for choice in value):
        labels, texts = ([choice.get(key) for choice in value] for key in ("label", "text"))
    else:
        labels = texts = None
    if (
        not isinstance(labels, list)
        or not isinstance(texts, list)
        or len(labels) != len(texts)
        or not all(isinstance(item, str) for item in [*labels, *texts])
    ):
        raise ValueError(
            f'{row.where}: choices must be {{"label": [strings], "text": [strings]}} of equal length or a list of such'
            f" pairs, got {value!r:.80}"
        )
    return tuple(
        (_encodable(row, "choices", label), _encodable(row, "choices", text))
        for label, text in zip(labels, texts, strict=True)
    )
