"""Text for a terminal: styled, wrapped to its width, and with nothing in it that a terminal would obey.

What is shown is anybody's text.  A control character in it could move the cursor or colour the rest, so each is written
out as `\\x1b`.
"""

from __future__ import annotations

import os
import shutil
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TextIO

_NARROWEST, _WIDEST = 60, 120
_NARROWEST_COLUMN = 3
_STYLES: Mapping[str, str] = {
    "title": "1;36",
    "strong": "1",
    "faint": "2",
    "good": "32",
    "bad": "31",
    "warning": "1;33",
    "judge": "35",
    "even": "38;5;39",
    "odd": "38;5;214",
}


class Span(NamedTuple):
    """A stretch of text and its style, a name of `_STYLES`; none for plain text."""

    text: str
    style: str = ""


class Paper(NamedTuple):
    """What is written on.

    Attributes:
      width: columns.
      colour: styles are written; without it, text alone.
    """

    width: int
    colour: bool

    def lines(self, spans: Iterable[Span], indent: str = "  ", style: str = "") -> list[str]:
        """The text of some spans in lines within the width, each after the indent.

        Lines break after blanks, or, in a word wider than the line, anywhere; no character is left out.

        Args:
          style: of the indent.
        """
        room = max(self.width - len(indent), 8)
        cells = [(char, span.style) for span in spans for char in visible(span.text)]
        before = self.styled(Span(indent, style))
        return [(before + self._painted(_stripped(line))).rstrip(" ") for line in _broken(cells, room)]

    def styled(self, span: Span) -> str:
        """The span's text in its style."""
        return (
            f"\x1b[{_STYLES[span.style]}m{span.text}\x1b[0m" if self.colour and span.style and span.text else span.text
        )

    def rule(self, title: str, note: str = "", line: str = "─") -> str:
        """A title across the whole width, with a note after it."""
        title = cut(visible(title), self.width - 6)
        note = cut(visible(note), max(self.width - columns(title) - 9, 0))
        rest = max(self.width - columns(title) - columns(note) - (7 if note else 4), 2)
        drawn = [Span(f"{line * 2} ", "faint"), Span(title, "title"), Span(f" {line * rest}", "faint")]
        return "".join(map(self.styled, [*drawn, *([Span(f" {note} {line}", "faint")] if note else [])]))

    def table(self, rows: Sequence[Sequence[Span]], indent: str = "  ") -> list[str]:
        """Rows with aligned columns, the first row a header; where they are wider than the paper, the widest is cut."""
        cells = [[Span(visible(span.text).replace("\n", "↵"), span.style) for span in row] for row in rows]
        widths = [max(columns(span.text) for span in column) for column in zip(*cells, strict=True)]
        room = self.width - len(indent) - 2 * (len(widths) - 1)
        while sum(widths) > room and max(widths) > _NARROWEST_COLUMN:
            widths[widths.index(max(widths))] -= 1
        lines = []
        for number, row in enumerate(cells):
            written = [
                self.styled(Span(cut(span.text, width), span.style or ("faint" if number == 0 else "")))
                + " " * (width - columns(cut(span.text, width)))
                for span, width in zip(row, widths)
            ]
            lines.append((indent + "  ".join(written)).rstrip(" "))
        return lines

    def _painted(self, line: Sequence[tuple[str, str]]) -> str:
        """A line's characters, those of one style together."""
        spans: list[Span] = []
        for char, style in line:
            if spans and spans[-1].style == style:
                spans[-1] = Span(spans[-1].text + char, style)
            else:
                spans.append(Span(char, style))
        return "".join(map(self.styled, spans))


def paper_of(stream: TextIO) -> Paper:
    """The stream's: as wide as its terminal, coloured where it is one that takes colours and `NO_COLOR` is not set."""
    colour = stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    width = shutil.get_terminal_size((100, 24)).columns
    return Paper(min(max(width, _NARROWEST), _WIDEST), colour)


def visible(text: str) -> str:
    r"""A text without anything that a terminal obeys: all but newlines and blanks is written out, `\x1b` for escape."""
    if text.isprintable():
        return text
    return "".join(char if char == "\n" or _is_plain(char) else _written_out(char) for char in text)


def columns(text: str) -> int:
    """Columns that a line of text takes."""
    return len(text) if text.isascii() else sum(map(_columns_of, text))


def cut(text: str, width: int) -> str:
    """A text that is at most so wide, with an ellipsis where something is missing."""
    if columns(text) <= width or width < 1:
        return text if width > 0 else ""
    kept = ""
    for char in text:
        if columns(kept + char) > width - 1:
            break
        kept += char
    return f"{kept}…"


def _is_plain(char: str) -> bool:
    return char.isprintable() or unicodedata.category(char) == "Zs"


def _written_out(char: str) -> str:
    return "    " if char == "\t" else char.encode("unicode_escape").decode()


def _columns_of(char: str) -> int:
    if unicodedata.combining(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def _stripped(line: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """A line's styled characters without the blanks at its end."""
    length = len("".join(char for char, _ in line).rstrip(" "))
    return line[:length]


def _broken(cells: Sequence[tuple[str, str]], room: int) -> list[list[tuple[str, str]]]:
    """Styled characters in lines of at most `room` columns; a newline ends a line and is not in it."""
    lines: list[list[tuple[str, str]]] = [[]]
    width, blank = 0, 0  # columns of the last line, and how many of its characters stand before its last break
    for char, style in cells:
        if char == "\n":
            lines.append([])
            width, blank = 0, 0
            continue
        if width + _columns_of(char) > room and char != " ":
            line = lines[-1]
            at = blank or len(line)
            lines[-1], rest = line[:at], line[at:]
            lines.append(rest)
            width, blank = sum(_columns_of(kept) for kept, _ in rest), 0
        lines[-1].append((char, style))
        width += _columns_of(char)
        if char == " " and any(kept != " " for kept, _ in lines[-1]):
            blank = len(lines[-1])
    return lines
