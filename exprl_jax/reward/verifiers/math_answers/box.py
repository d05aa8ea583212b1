"""The box that holds an answer."""

from __future__ import annotations

import re
from typing import NamedTuple

_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_SPACE = r"(?:[\s$~]|\\[,; ]|\\q?quad(?![A-Za-z]))*"
_JOINT = re.compile(rf"{_SPACE}(?:[,;]|,?\s*(?:and|or)|\\text\s*\{{\s*(?:and|or)\s*\}}){_SPACE}")
_LONGEST_JOINT = 40


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}`, or None where its braces do not balance; the inner one of nested boxes.

    Boxes with nothing but a comma, a semicolon, "and" or "or" between them are one answer, `2, 3`.  Escaped braces,
    `\{` and `\}`, are text and do not count.
    """
    # Of each open brace: where its command and its content begin, -1 of a brace that is no box, and the box before it.
    opened: list[tuple[int, int, _Box | None]] = []
    last = closed = None
    last_start = -1
    for brace in _BRACES.finditer(text):
        if brace[0] == "}":
            if opened:
                command, start, before = opened.pop()
                if command >= 0:
                    closed = _Box(command, start, brace.start(), before)
                    last = closed if start == last_start else last
        elif brace[0] == "{":
            opened.append((-1, brace.end(), None))
        elif brace[0][-1] == "{" and brace[0] != "\\{":
            opened.append((brace.start(), brace.end(), closed))
            last, last_start = None, brace.end()
    if last is None:
        return None
    parts = [text[last.start : last.end]]
    while (before := last.before) and _is_joint(text, before.end + 1, last.command):
        last = before
        if text[last.start : last.end] not in parts:
            parts.append(text[last.start : last.end])
    return ", ".join(reversed(parts))


def unboxed(answer: str) -> str:
    """A reference answer without the box around it, if it has one."""
    inner = last_boxed(answer)
    return answer if inner is None else inner


class _Box(NamedTuple):
    command: int
    start: int
    end: int
    before: _Box | None


def _is_joint(text: str, start: int, end: int) -> bool:
    return end - start <= _LONGEST_JOINT and _JOINT.fullmatch(text, start, end) is not None
