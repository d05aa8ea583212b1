"""Columns of a data set under other names than ours, and answers written as GSM8K writes them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator

from exprl_jax.config import column_pairs
from exprl_jax.data.problem_sources import Row
from exprl_jax.hosts import say

# What every row has; the other columns may be missing in some.
_TEXTS = ("problem", "reference", "answer")
# A text's last line, `#### 42`, after whatever stands before it.
_MARKED = re.compile(r"(?s)\A(?P<before>.*?)(?:\A|\n)[ \t]*####[ \t]*(?P<answer>[^\s#][^\n]*?)\s*\Z")


def rename(rows: Iterable[Row], columns: str) -> Iterator[Row]:
    """Rows of a source in our columns, lazily.  What `columns` leaves out keeps its name.

    Args:
      columns: `config.Source.columns`.

    Raises:
      ValueError: a row is without a text that it must have, or all rows are without what a column is read from.
    """
    names = {ours: theirs for theirs, ours in column_pairs(columns)}
    absent, known, where, replaced = set(names), {}, "", set()
    for row in rows:
        where = where or row.where
        absent -= {ours for ours, theirs in names.items() if theirs in row.columns}
        known |= dict.fromkeys(map(str, row.columns))
        for ours in _TEXTS:
            if ours in names and names[ours] not in row.columns:
                raise ValueError(_missing(row.where, ours, names[ours], row.columns))
        kept = {key: value for key, value in row.columns.items() if key not in names.values()}
        for key in kept.keys() & names.keys() - replaced:
            say(f"{row.where}: column {key!r} is not read; config.data.columns reads {names[key]!r} in its place")
        replaced |= kept.keys() & names.keys()
        yield Row(row.where, kept | {ours: row.columns.get(theirs) for ours, theirs in names.items()})
    for ours in absent if known else ():
        raise ValueError(_missing(f"{where} and all after it", ours, names[ours], known))


def _missing(where: str, ours: str, theirs: str, known: Iterable[str]) -> str:
    known = list(map(str, known))
    near = difflib.get_close_matches(theirs, known, n=1)
    return (
        f"{where}: no column {theirs!r}, which config.data.columns reads as {ours!r}; the columns are "
        f"{', '.join(known) or 'none'}{f'; did you mean {near[0]!r}?' if near else ''}"
    )


def marked_answer(text: str) -> str | None:
    """The answer of a text whose last line is `#### <answer>`; None for other texts."""
    match = _MARKED.match(text)
    return match["answer"] if match else None


def box_marked(text: str) -> str:
    r"""A solution with its last line, `#### 42`, written as `\boxed{42}`, which is how the policy is told to answer."""
    match = _MARKED.match(text)
    if match is None:
        return text
    return f"{match['before']}\n\\boxed{{{match['answer']}}}".lstrip("\n")
