"""Segments against a slow, separately written splitter; every sentence of the rules has a case."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exprl_jax.reward.segments import SegmentRule, Splitter


def tokens_of(*tokens: str | bytes) -> tuple[list[bytes], list[int]]:
    """A vocabulary with one id a token, in order."""
    return [t if isinstance(t, bytes) else t.encode() for t in tokens], list(range(len(tokens)))


def split(rule: SegmentRule, *tokens: str | bytes) -> list[bytes]:
    """The text of each segment."""
    vocabulary, ids = tokens_of(*tokens)
    ends = Splitter(vocabulary, rule).segment_ends(ids).tolist()
    return [b"".join(vocabulary[a:b]) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def letters(text: str) -> list[str]:
    return list(text)


# --- an oracle: byte by byte, token by token -------------------------------------------------------------------------

BLANK = b" \t\n\r\x0b\x0c"


def oracle_delimiters(kind: str, text: bytes) -> list[tuple[int, int]]:
    if kind == "heading":
        spans, at, fence = [], 0, None
        for line in text.split(b"\n"):
            indent = 0
            while indent < len(line) and line[indent : indent + 1] == b" ":
                indent += 1
            body = line[indent:]
            run = 0
            while run < len(body) and body[run] == body[0] and body[:1] in (b"`", b"~", b"#"):
                run += 1
            rest = body[run:]
            if indent > 3 or run < 3:
                pass
            elif body[:1] == b"#":
                if fence is None and run == 3:
                    spans.append((at, at + indent + 3))
            elif fence is None:
                if body[:1] == b"~" or b"`" not in rest:
                    fence = body[:run]
            elif body[:1] == fence[:1] and run >= len(fence) and all(c in b" \t\r" for c in rest):
                fence = None
            at += len(line) + 1
        return spans
    spans, i = [], 0
    while i < len(text):
        if text[i : i + 1] != b"\n":
            i += 1
            continue
        end, j = i + 1, i + 1
        while j < len(text) and text[j] in b" \t\r\n":
            if text[j : j + 1] == b"\n":
                end = j + 1
            j += 1
        if kind == "line" or end > i + 1:
            spans.append((i, end))
        i = end
    return spans


def oracle_ends(kind: str, tokens: list[bytes], limit: int) -> list[int]:
    text = b"".join(tokens)
    delimiters = oracle_delimiters(kind, text)
    inside = {i for a, b in delimiters for i in range(a, b)}
    start_of = {b: a for a, b in delimiters}
    cuts, segment, at = [], [], 0
    for number, token in enumerate(tokens):
        close = False
        for _ in token:
            segment.append(at)
            at += 1
            if at in start_of:
                close |= any(i < start_of[at] and i not in inside and text[i] not in BLANK for i in segment)
        if close:
            cuts.append(number + 1)
            segment = []
    if cuts and all(text[i] in BLANK for i in segment):
        cuts.pop()
    return [*cuts[: limit - 1], len(tokens)]


CHARACTERS = ["###", "#", "####", "\n", "\n\n", " ", "   ", "    ", "\t", "\r\n", "```", "~~~", "````", "`", "py", "a"]
CHARACTERS += ["é", "한", "🙂", "b c"]
LINES = ["\n###", "\n```", "\n````", "\n~~~", "\n", " ", "x"]


@st.composite
def tokenised(draw) -> list[bytes]:
    fragments = st.sampled_from(draw(st.sampled_from([CHARACTERS, LINES])))
    text = "".join(draw(st.lists(fragments, max_size=30))).encode()
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=25)))  # equal cuts make empty (special) tokens
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@pytest.mark.parametrize("kind", ["heading", "paragraph", "line"])
@settings(max_examples=400, derandomize=True, deadline=None)
@given(tokens=tokenised(), limit=st.integers(1, 5))
def test_any_text_in_any_tokens_is_cut_as_the_oracle_cuts_it(kind, tokens, limit):
    ids = list(range(len(tokens)))
    ends = Splitter(tokens, SegmentRule(kind, max_segments=limit)).segment_ends(ids)
    assert ends.dtype == np.int32
    assert ends.tolist() == oracle_ends(kind, tokens, limit)
    assert ends[-1] == len(tokens) and np.all(np.diff(ends) > 0) and ends[0] > 0 and len(ends) <= limit


@settings(max_examples=200, derandomize=True, deadline=None)
@given(tokens=tokenised())
def test_regex_of_a_heading_without_fences_is_the_heading_rule(tokens):
    tokens = [token.replace(b"`", b"x").replace(b"~", b"x") for token in tokens]
    ids = list(range(len(tokens)))
    by_regex = Splitter(tokens, SegmentRule("regex", pattern=r"^ {0,3}###(?!#)")).segment_ends(ids)
    assert by_regex.tolist() == Splitter(tokens, SegmentRule()).segment_ends(ids).tolist()


# --- headings --------------------------------------------------------------------------------------------------------


def test_the_token_that_completes_the_heading_closes_the_segment_before_it():
    tokens = ["a", "\n", "###", " 1", "\n", "###", " 2", "<eos>"]
    assert split(SegmentRule(), *tokens) == [b"a\n###", b" 1\n###", b" 2<eos>"]
    assert split(SegmentRule(), "a\n", "#", "##", " 1") == [b"a\n###", b" 1"]


def test_a_token_that_holds_more_than_the_heading_goes_to_the_earlier_segment():
    assert split(SegmentRule(), "a", ".\n\n### One", " two") == [b"a.\n\n### One", b" two"]


def test_no_heading_is_one_segment():
    assert split(SegmentRule(), "a", " ## b", "\n## c") == [b"a ## b\n## c"]


@pytest.mark.parametrize("before", ["", "\n", " \n \n", "   "])
def test_a_leading_heading_opens_the_first_segment(before):
    whole = before + "### A\ntext\n### B\nmore"
    assert split(SegmentRule(), *letters(whole)) == [(before + "### A\ntext\n###").encode(), b" B\nmore"]


def test_a_sub_heading_does_not_split_even_when_its_tokens_split_after_three():
    assert split(SegmentRule(), "a\n", "###", "#", " b") == [b"a\n#### b"]
    assert split(SegmentRule(), "a\n", "####", "##", " b") == [b"a\n###### b"]


def test_a_heading_in_mid_line_does_not_split():
    assert len(split(SegmentRule(), *letters("a ### b\nc ###\n- ### d"))) == 1


@pytest.mark.parametrize("indent, segments", [(0, 2), (1, 2), (3, 2), (4, 1)])
def test_up_to_three_spaces_may_stand_before_a_heading(indent, segments):
    assert len(split(SegmentRule(), *letters("a\n" + " " * indent + "### b"))) == segments


def test_a_heading_needs_no_blank_after_it():
    assert len(split(SegmentRule(), *letters("a\n###Step 1: b"))) == 2


@pytest.mark.parametrize(
    "text, segments",
    [
        ("a\n```\n### b\n```\nc", 1),
        ("a\n```python\n### b\n```\nc\n### d", 2),
        ("a\n~~~\n### b\n```\n### c", 1),  # another kind of fence does not close
        ("a\n````\n```\n### b", 1),  # nor does a shorter one
        ("a\n~~~\n### b\n```\n### c\n~~~\n### d", 2),
        ("a\n```\n### b\n`````  \n### c", 2),  # a longer one does
        ("a\n```\n### b\n``` py\n### c", 1),  # a closing fence carries no text
        ("a\n```\n### b\n### c", 1),  # an unclosed fence runs to the end
        ("a\n``` `x` ```\n### b", 2),  # inline code that starts a line is no fence
        ("a\n    ```\n### b", 2),  # four spaces: no fence
        ("a\n``\n### b", 2),
        ("a\r\n```\r\n### b\r\n```\r\n### c", 2),
        ("```\n### b\n```\n### c", 2),
    ],
)
def test_fenced_code_does_not_split(text, segments):
    assert len(split(SegmentRule(), *letters(text))) == segments


def test_headings_with_nothing_between_them_are_one_cut():
    assert split(SegmentRule(), *letters("a\n###\n### b")) == [b"a\n###", b"\n### b"]
    assert split(SegmentRule(), *letters("###\n###\n### b")) == [b"###\n###\n### b"]


@pytest.mark.parametrize("tail", [[], [b""], ["\n"], [" ", "\n", b""]])
def test_a_dangling_heading_makes_no_segment_of_what_is_blank(tail):
    assert len(split(SegmentRule(), "a", "\n", "###", *tail)) == 1
    assert len(split(SegmentRule(), "a", "\n", "### b", *tail)) == 1  # the heading's token swallowed its text
    assert len(split(SegmentRule(), "a", "\n", "###", " b", *tail)) == 2


def test_a_character_split_over_tokens_is_kept_whole_in_bytes():
    smile = "🙂".encode()
    assert split(SegmentRule(), smile[:2], smile[2:], "\n###", smile[:1], smile[1:]) == [smile + b"\n###", smile]


# --- the other rules -------------------------------------------------------------------------------------------------


def test_paragraphs_end_at_blank_lines():
    assert split(SegmentRule("paragraph"), *letters("\n\na\nb\n\nc\n \t\r\n\nd\n\n")) == [
        b"\n\na\nb\n\n",
        b"c\n \t\r\n\n",
        b"d\n\n",
    ]
    assert split(SegmentRule("paragraph"), "a", ".\n\n", "b") == [b"a.\n\n", b"b"]


def test_lines_end_at_newlines_and_blank_lines_go_to_the_line_before():
    assert split(SegmentRule("line"), *letters("a\nb\n\n \nc\n")) == [b"a\n", b"b\n\n \n", b"c\n"]


def test_strides_count_tokens():
    vocabulary, ids = tokens_of(*letters("abcdefg"))
    for stride, ends in [(3, [3, 6, 7]), (7, [7]), (100, [7]), (1, [1, 2, 3, 4, 5, 6, 7])]:
        assert Splitter(vocabulary, SegmentRule("stride", stride=stride)).segment_ends(ids).tolist() == ends
    assert Splitter(vocabulary, SegmentRule("stride", 2, stride=2)).segment_ends(ids).tolist() == [2, 7]


def test_a_regular_expression_is_multiline_and_may_look_ahead():
    text = letters("Step 1 a\nno Step 2\nStep 3 b")
    assert split(SegmentRule("regex", pattern=r"^Step \d"), *text) == [b"Step 1 a\nno Step 2\nStep 3", b" b"]
    assert split(SegmentRule("regex", pattern=r"^(?=Step \d)"), *text) == [b"Step 1 a\nno Step 2\n", b"Step 3 b"]


def test_max_segments_merges_the_tail():
    text = letters("a\n### b\n### c\n### d")
    assert split(SegmentRule(max_segments=2), *text) == [b"a\n###", b" b\n### c\n### d"]
    assert len(split(SegmentRule(max_segments=1), *text)) == 1
    assert len(split(SegmentRule(max_segments=4), *text)) == 4


# --- edges and doors -------------------------------------------------------------------------------------------------

RULES = [SegmentRule(kind) for kind in ("heading", "paragraph", "line")]
RULES += [SegmentRule("stride", stride=2), SegmentRule("regex", pattern="x+")]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)
def test_no_tokens_have_no_segment_and_an_end_token_alone_has_one(rule):
    splitter = Splitter([b"", b" "], rule)
    assert splitter.segment_ends([]).tolist() == []
    assert splitter.segment_ends(np.array([0])).tolist() == [1]
    assert splitter.segment_ends(np.array([1, 0], np.int32)).tolist() == [2]


@pytest.mark.parametrize("bad", [-1, 2, 10**6])
def test_an_id_outside_the_vocabulary_is_refused(bad):
    with pytest.raises(ValueError, match=f"token id {bad} is outside"):
        Splitter([b"a", b"b"], SegmentRule()).segment_ends([0, bad])


@pytest.mark.parametrize(
    "settings_, message",
    [
        ({"kind": "sentence"}, "unknown segment rule 'sentence'; expected one of heading"),
        ({"max_segments": 0}, "max_segments is 0"),
        ({"kind": "stride"}, "stride=0"),
        ({"stride": 3}, "no meaning"),
        ({"kind": "line", "pattern": "x"}, "no meaning"),
        ({"kind": "regex", "pattern": "("}, "not a regular expression"),
        ({"kind": "regex", "pattern": "a{99999999999999}"}, "not a regular expression"),
        ({"kind": "regex", "pattern": "x*"}, "matches the empty text"),
        ({"kind": "regex"}, "matches the empty text"),
    ],
)
def test_a_bad_rule_is_refused(settings_, message):
    with pytest.raises(ValueError, match=message) as caught:
        SegmentRule(**settings_)
    assert "\n" not in str(caught.value)
