"""Text for a terminal: within its width, nothing left out, and nothing in it that a terminal obeys."""

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exprl_jax.show.terminal import Paper, Span, columns, cut, paper_of, visible

CODES = re.compile(r"\x1b\[[0-9;]*m")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@given(st.text(), st.integers(12, 60))
def test_lines_are_within_the_width_and_hold_every_character(text, width):
    lines = Paper(width, False).lines([Span(text[::2]), Span(text[1::2], "bad")])
    assert all(columns(line) <= width or len(line) <= 3 for line in lines)
    expected = visible(text[::2] + text[1::2])
    assert "".join("".join(lines).split()) == "".join(expected.split())


@given(st.text())
def test_what_is_visible_has_no_control_characters(text):
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", visible(text))


def test_a_terminals_commands_in_a_text_are_written_out():
    hostile = "fine\x1b[2J\x1b]0;title\x07 \u202eright to left"
    (line,) = Paper(100, True).lines([Span(hostile, "judge")])
    assert CODES.sub("", line) == "  fine\\x1b[2J\\x1b]0;title\\x07 \\u202eright to left"
    assert line.count("\x1b") == 2  # ours: one opens the style, one closes it
    (row,) = Paper(100, False).table([[Span("a\nb\x1b"), Span("c")]])
    assert row == "  a↵b\\x1b  c"


def test_lines_break_after_blanks_and_keep_their_styles():
    paper = Paper(14, True)
    lines = paper.lines([Span("one two "), Span("three four", "good")], indent="| ")
    assert lines == ["| one two", "| \x1b[32mthree four\x1b[0m"]
    assert Paper(12, False).lines([Span("abcdefghijklmno")], indent="") == ["abcdefghijkl", "mno"]
    # Two columns a character.
    assert Paper(10, False).lines([Span("数学问题数学问题")], indent="") == ["数学问题数", "学问题"]


def test_tables_are_aligned_and_cut_at_the_width():
    rows = [[Span("score"), Span("text")], [Span("0.25"), Span("a very long text, which does not fit")]]
    assert Paper(30, False).table(rows) == ["  score  text", "  0.25   a very long text, wh…"]
    assert cut("数学问题", 5) == "数学…"
    many = [[Span("n"), Span("scores"), Span("advantages")], [Span("0"), Span("0.5 " * 20), Span("-0.25 " * 20)]]
    assert [columns(line) for line in Paper(60, False).table(many)] == [43, 60]


def test_a_rule_is_as_wide_as_the_page_whatever_stands_in_it():
    paper = Paper(50, False)
    for title, note in (("group", ""), ("group", "4 of 4"), ("t" * 80, ""), ("group", "n" * 80), ("t" * 80, "n" * 80)):
        assert columns(paper.rule(title, note)) <= 50 and paper.rule(title, note).startswith(f"── {title[:20]}")


@pytest.mark.parametrize(
    "stream, variables, colour",
    [
        (Terminal(), {"TERM": "xterm"}, True),
        (Terminal(), {"TERM": "xterm", "NO_COLOR": "1"}, False),
        (Terminal(), {"TERM": "dumb"}, False),
        (io.StringIO(), {"TERM": "xterm"}, False),
    ],
)
def test_colour_is_for_terminals_that_want_it(stream, variables, colour, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("COLUMNS", "97")
    assert paper_of(stream) == Paper(97, colour)
