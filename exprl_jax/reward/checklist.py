"""A problem's checklist: what a judge writes from the reference, and how its answers to it are read.

    1. The speed is 3 m/s.              Item 1: yes
    2. Momentum is conserved.     →     Item 2: no      →     score 1/3, the share of items that are fulfilled
    3. The result is 7 J.               Item 3: no

A list that is not exactly one is none: its problem is scored against the reference, and counted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from exprl_jax.reward.answers import answer_of, bracketed, read_labelled

FEWEST, MOST, LONGEST = 2, 12, 600  # items, and characters of one
_ITEM = re.compile(r"[ \t>*_-]{0,4}(\d{1,2})[.):][*_]*[ \t]+(\S.*)")
_FENCE = re.compile(r"\s*(?:```|~~~)\w*\s*")
_VALUES = {value: word == "yes" for word in ("yes", "no") for value in bracketed(word)}


def parse_checklist(text: str) -> tuple[str, ...]:
    """The items of the list that a judge wrote after its thoughts; none where it is not exactly one list.

    Items have the numbers 1, 2, ... in order, each on a line of its own; an indented line goes on with the item before
    it.  What stands before the first and after the last is no item.
    """
    items: list[str] = []
    ended = False
    for line in answer_of(text).splitlines():
        if not line.strip() or _FENCE.fullmatch(line):
            continue
        match = _ITEM.fullmatch(line)
        if match and (ended or int(match[1]) != len(items) + 1):
            return ()
        if match:
            items.append(match[2].strip())
        elif items and line[0] in " \t" and not ended:
            items[-1] += f" {line.strip()}"
        else:
            ended = bool(items)
    readable = FEWEST <= len(items) <= MOST and all(len(item) <= LONGEST for item in items)
    return tuple(items) if readable else ()


def render_items(fulfilled: Sequence[bool]) -> str:
    """The lines that `read_items` reads and that the judge is asked for."""
    return "\n".join(f"Item {number}: {'yes' if yes else 'no'}" for number, yes in enumerate(fulfilled, 1))


def read_items(text: str, count: int, *, at_end: bool = False) -> float | None:
    """The share of the items that are fulfilled, in [0, 1]; None unless each has its line and the line says so.

    Args:
      count: items of the checklist.
      at_end: nothing may follow the last item's line.
    """
    values = [
        read_labelled(text, f"item {number}", _VALUES, at_end=at_end and number == count)
        for number in range(1, count + 1)
    ]
    return None if None in values else sum(values) / count
