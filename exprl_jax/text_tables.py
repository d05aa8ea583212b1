"""Tables as text: aligned columns for terminals, Markdown for pages, CSV for programs.  None: not measured."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any


def align(rows: Iterable[Sequence[object]], left: int | None = None) -> str:
    """Rows as lines whose columns are aligned and two spaces apart; no space ends a line, no newline ends the text.

    Args:
      rows: cells, which are written with `str`; the header, if there is one, is the first row.
      left: number of columns, from the first, that are flush left; the others are flush right.  None: all of them.

    Raises:
      ValueError: the rows have different numbers of cells.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    flush_left = len(widths) if left is None else left
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < flush_left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in cells
    )


def markdown(rows: Iterable[Sequence[object]]) -> str:
    """Rows as a Markdown table whose header is the first row; no newline ends the text."""
    header, *body = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *body))


def as_csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Comma-separated values; the field of a None is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)  # which writes None as an empty field
    return text.getvalue()


def percent(fraction: float | None) -> str:
    """A fraction in percent, to a tenth; a dash where it was not measured."""
    return "–" if fraction is None else f"{100 * fraction:.1f}"


def hundredths(value: float | None) -> str:
    """A number to hundredths; a dash where it was not measured."""
    return "–" if value is None else f"{value:.2f}"
