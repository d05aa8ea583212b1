"""Text tables: columns line up, cells survive Markdown and CSV, and what was not measured is no number."""

import csv
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exprl_jax.text_tables import align, as_csv, hundredths, markdown, percent

ROWS = [["name", "n", "share"], ["a", 1, "12.5"], ["longer", 100, "–"]]


def test_columns_line_up():
    assert align(ROWS).split("\n") == ["name    n    share", "a       1    12.5", "longer  100  –"]
    assert align(ROWS, left=1).split("\n") == ["name      n  share", "a         1   12.5", "longer  100      –"]
    assert align(ROWS, left=0).split("\n")[1] == "     a    1   12.5"
    assert align([]) == "" and align([["alone"]]) == "alone"


def test_rows_of_different_lengths_are_refused():
    for rows in ([["a", "b"], ["c"]], [["a"], ["b", "c"]], [[], ["a"]]):
        with pytest.raises(ValueError):
            align(rows)


CELLS = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=9)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.integers(1, 4).flatmap(lambda n: st.lists(st.lists(CELLS, min_size=n, max_size=n), min_size=1)), st.data())
def test_every_cell_stands_in_its_column(rows, data):
    """At its left or right edge, with nothing else between it and the next, whatever the other cells are."""
    left = data.draw(st.integers(0, len(rows[0])))
    lines, start = align(rows, left).split("\n"), 0
    for i, column in enumerate(zip(*rows)):
        width = max(len(cell) for cell in column)
        for line, cell in zip(lines, column):
            assert line[start:].startswith(cell) if i < left else line[: start + width].endswith(cell)
            assert line[start : start + width].strip() == cell
            assert line[start + width : start + width + 2].strip() == ""
        start += width + 2


def test_markdown_has_a_header_and_no_stray_column():
    assert markdown([["key", "what"], ["a|b", 1]]).split("\n") == ["| key | what |", "| --- | --- |", "| a\\|b | 1 |"]


def test_csv_is_read_back_and_none_is_empty():
    rows = [["a, b", None, 0.1], ['"quoted"\nline', 2, 1e-12]]
    header, *read = csv.reader(io.StringIO(as_csv(["x", "y", "z"], rows)))
    assert header == ["x", "y", "z"] and read == [["a, b", "", "0.1"], ['"quoted"\nline', "2", "1e-12"]]


def test_what_was_not_measured_is_a_dash():
    assert [percent(None), percent(0.0), percent(0.125)] == ["–", "0.0", "12.5"]
    assert [hundredths(None), hundredths(0.0), hundredths(-1.005)] == ["–", "0.00", "-1.00"]
