"""What leads an answer in, or out, and says nothing: `so x = 3`, `the point (3, -1)`, `on Tuesday`, `n = 1 only`."""

from __future__ import annotations

import re

from exprl_jax.reward.verifiers.math_answers import calendar_days
from exprl_jax.reward.verifiers.math_answers.tokens import Token, texts

_LEADS = set("so thus hence therefore exactly precisely".split())
_POINTS = {"point", "points", "vertex", "vertices"}
_ENDS = [tuple(end.split()) for end in ("is the only solution", "is the only one", "only")]  # behind `n = 1`
_YEAR = re.compile(r"[12]\d{3}", re.ASCII)


def without(tokens: list[Token]) -> list[Token]:
    """An answer without its lead; all of it where it has none, or where what leads it in may change it."""
    while len(tokens) > 2 and tokens[0].is_word(*_LEADS) and tokens[1].text == ",":
        tokens = tokens[2:]
    while len(tokens) > 1 and tokens[0].is_word(*_LEADS) and not (tokens[1].kind == "word" and tokens[1].roman):
        tokens = tokens[1:]
    if any(token.text == "=" for token in tokens):
        end = next((len(words) for words in _ENDS if _said(tokens[-len(words) :]) == words), 0)
        tokens = tokens[: len(tokens) - end]
    at = int(tokens[0].is_word("the"))
    if len(tokens) > at + 2 and tokens[at].is_word(*_POINTS) and tokens[at + 1].text == "(":
        return tokens[at + 1 :]
    return _day(tokens)


def _said(tokens: list[Token]) -> tuple[str, ...]:
    return tuple(token.text.casefold() if token.roman else "" for token in tokens)


def _day(tokens: list[Token]) -> list[Token]:
    """A day, a month, a year or a time without "in", "on" or "at" before it."""
    rest = tokens[tokens[0].is_word("on", "in", "at") :]
    year = rest[sum(token.is_word("the", "year") for token in rest[:2]) :]
    if len(year) == 1 and len(year) < len(tokens) and _YEAR.fullmatch(year[0].text):
        return year
    if len(rest) == len(tokens) or not rest:
        return tokens
    is_day = calendar_days.is_named(rest) or calendar_days.read(rest)
    return rest if is_day or calendar_days.clock("".join(texts(rest)).lower()) else tokens
