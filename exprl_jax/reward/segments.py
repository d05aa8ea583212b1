"""Where a response is cut into the segments that each get a judge score.

The cut is decided on the text (the bytes that the response's tokens stand for) and carried to tokens by an exact map
of byte offsets; nothing is decoded.  A *delimiter* is a stretch of text.  The token that completes it belongs to the
segment before it, along with whatever else that token holds; the next token opens the next segment.  What follows the
last delimiter, EOS included, is the last segment.

A delimiter cuts only where the segment it would close has text that is not blank, and where text that is not blank
follows in later tokens.  So a leading heading opens the first segment instead of making an empty one, a dangling
heading before EOS makes no segment of EOS alone, and a run of blank lines is one cut.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from exprl_jax.config import Config, Segments
from exprl_jax.reward.routes import ROUTES

# Both are searched in b"\n" + text, so that one literal byte leads the pattern and the scan runs at memchr speed.
_HEADING_OR_FENCE = re.compile(rb"\n {0,3}(?:###(?!#)|(`{3,})(?=[^`\n]*(?:\n|\Z))|(~{3,}))")
_CLOSING_FENCE = re.compile(rb"\n {0,3}(`{3,}|~{3,})[ \t\r]*(?=\n|\Z)")
_PARAGRAPH = re.compile(rb"\n(?:[ \t\r]*\n)+")
_LINE = re.compile(rb"\n(?:[ \t\r]*\n)*")


@dataclasses.dataclass(frozen=True)
class SegmentRule:
    """What separates one segment from the next.

    Attributes:
      kind: `heading`: the `###` of a Markdown heading: at the start of a line, after at most three spaces (CommonMark's
          limit; four are an indented code block), not followed by a further `#`, not inside a fenced code block
          (``` or ~~~, an unclosed fence runs to the end).  Unlike CommonMark, no blank is required after `###`, since
          models leave it out; and fences are recognised by their own line alone, not by the list or quote around them.
        `paragraph`: one or more blank lines.
        `line`: the end of each line that is not blank.
        `stride`: every `stride` tokens, whatever they hold.
        `regex`: every match of `pattern`, on the response's UTF-8 bytes, where `^` and `$` match at line ends.  The
          token that completes the match ends a segment; a match of no width, such as `(?=Step \\d)`, cuts before
          the text that it looks at.
      max_segments: later segments are merged into this one.
      stride: tokens a segment, for `stride` only.
      pattern: the regular expression, for `regex` only.

    Raises:
      ValueError: a count below 1, a pattern that does not compile or that matches the empty text, or a setting of
        another kind.
    """

    kind: Literal["heading", "paragraph", "line", "stride", "regex"] = "heading"
    max_segments: int = 64
    stride: int = 0
    pattern: str = ""

    def __post_init__(self):
        kinds = ("heading", "paragraph", "line", "stride", "regex")
        if self.kind not in kinds:
            raise ValueError(f"unknown segment rule {self.kind!r}; expected one of {', '.join(kinds)}")
        if self.max_segments < 1:
            raise ValueError(f"max_segments is {self.max_segments}; expected at least 1 (1 keeps the response whole)")
        if self.kind == "stride" and self.stride < 1:
            raise ValueError(f"segment rule 'stride' got stride={self.stride}; expected at least 1 token a segment")
        if self.kind != "stride" and self.stride:
            raise ValueError(f"stride={self.stride} has no meaning for segment rule {self.kind!r}; leave it at 0")
        if self.kind != "regex" and self.pattern:
            raise ValueError(f"pattern={self.pattern!r} has no meaning for segment rule {self.kind!r}; leave it empty")
        if self.kind == "regex":
            _compile(self.pattern)


class Splitter:
    """Cuts responses of one vocabulary by one rule; holds the byte length of every token.

    Attributes:
      token_bytes: the bytes of each token id; empty for special tokens, which hold no text.
      rule: the rule.
    """

    def __init__(self, token_bytes: Sequence[bytes], rule: SegmentRule):
        self.token_bytes = tuple(token_bytes)
        self.rule = rule
        self._lengths = np.fromiter(map(len, self.token_bytes), np.int64, len(self.token_bytes))

    def segment_ends(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """The exclusive token offset at which each segment of a response ends.

        Args:
          ids: the response's token ids, without padding.

        Returns:
          int32, strictly increasing, the last one len(ids).  A response of at least one token has at least one
          segment; a response of none has none.

        Raises:
          ValueError: an id outside the vocabulary.
        """
        ids = np.asarray(ids, np.int64)
        count = len(ids)
        if not count:
            return np.zeros(0, np.int32)
        if ids.min() < 0 or ids.max() >= len(self._lengths):
            bad = int(ids.min()) if ids.min() < 0 else int(ids.max())
            raise ValueError(
                f"token id {bad} is outside the tokenizer's vocabulary of {len(self._lengths)}; "
                "pass only real tokens (no padding), of the tokenizer that the model was trained with"
            )
        if self.rule.kind == "stride":
            cuts = list(range(self.rule.stride, count, self.rule.stride))
        else:
            cuts = self._text_cuts(ids)
        return np.array([*cuts[: self.rule.max_segments - 1], count], np.int32)

    def _text_cuts(self, ids: np.ndarray) -> list[int]:
        """Token offsets of the cuts, the end of the response excluded."""
        text = b"".join(map(self.token_bytes.__getitem__, ids.tolist()))
        offsets = np.cumsum(self._lengths[ids])
        spans = list(_delimiters(self.rule, text))
        # The token that holds a delimiter's last byte: the first one to end at or after the delimiter's end.  (A token
        # of no bytes ends where the one before it does, and is never the first.)
        closers = np.searchsorted(offsets, [end for _, end in spans], side="left")

        cuts, opened = [], 0  # `opened`: where the text of the segment being built starts
        for (start, end), closer in zip(spans, closers.tolist(), strict=True):
            if text[opened:start].strip():
                cuts.append(closer + 1)
                opened = int(offsets[closer])
            # A delimiter that closed nothing is no text of the segment it opens.
            opened = max(opened, end)
        if cuts and not text[offsets[cuts[-1] - 1] :].strip():
            cuts.pop()
        return cuts


@functools.lru_cache
def _compile(pattern: str) -> re.Pattern[bytes]:
    try:
        compiled = re.compile(pattern.encode(), re.MULTILINE)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"segment pattern {pattern!r} is not a regular expression: {error}") from error
    if compiled.search(b""):
        raise ValueError(f"segment pattern {pattern!r} matches the empty text; expected one that needs some text")
    return compiled


def _delimiters(rule: SegmentRule, text: bytes) -> Iterator[tuple[int, int]]:
    """Byte spans of the delimiters."""
    if rule.kind == "heading":
        return _headings(text)
    pattern = {"paragraph": _PARAGRAPH, "line": _LINE}.get(rule.kind) or _compile(rule.pattern)
    return (match.span() for match in pattern.finditer(text))


def _headings(text: bytes) -> Iterator[tuple[int, int]]:
    """Byte spans of the `###` of headings, with the spaces before them, outside fenced code."""
    lines = b"\n" + text
    position = 0
    while match := _HEADING_OR_FENCE.search(lines, position):
        fence = match[1] or match[2]
        if fence is None:
            # One byte back for the newline put in front; the span starts after the line's own newline.
            yield match.start(), match.end() - 1
            position = match.end()
        else:
            position = _after_fence(lines, match.end(), fence)


def _after_fence(lines: bytes, position: int, fence: bytes) -> int:
    """Where the scan goes on after a fenced block: at the end of the closing fence, or of the text."""
    for match in _CLOSING_FENCE.finditer(lines, position):
        if match[1][:1] == fence[:1] and len(match[1]) >= len(fence):
            return match.end()
    return len(lines)


def segment_rule(config: Config) -> SegmentRule:
    """The config's rule; one segment a rollout where only whole rollouts are scored."""
    whole_only = not any(ROUTES[name].per_segment for name in config.routes.all)
    return parse_rule(dataclasses.replace(config.segments, max_segments=1) if whole_only else config.segments)


def parse_rule(segments: Segments) -> SegmentRule:
    """The rule that a config's words stand for.

    Raises:
      ValueError: they stand for none.
    """
    kind, _, argument = segments.rule.partition(":")
    limit = segments.max_segments
    if kind == "stride":
        if not argument.isdecimal():
            raise ValueError(f"config.segments.rule: got {segments.rule!r}, expected stride:<tokens>")
        return SegmentRule("stride", limit, stride=int(argument))
    if kind == "regex":
        return SegmentRule("regex", limit, pattern=argument)
    if argument:
        raise ValueError(f"config.segments.rule: got {segments.rule!r}; only stride: and regex: take an argument")
    return SegmentRule(kind, limit)
