"""English number words as a grammar: `two hundred and five`, `half a dozen`, `three and a half`, `twenty-first`.

number   = whole ["and" part] | part | whole "point" digit...
part     = "half" | (whole | "a") ("half" | "thirds" | ...) | "half" ["of"] "a" ("dozen" | "million" | ...)
whole    = (hundreds | "a") [scale] ["and"] ..., the scales falling, | whole collective
hundreds = [(1..19 | "a") "hundred" ["and"]] 0..99
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from fractions import Fraction

_UNITS = {
    word: number
    for number, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen".split()
    )
}
_TENS = {
    word: 10 * number
    for number, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), start=2)
}
_SCALES = {
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "quadrillion": 10**15,
    "lakh": 10**5,
    "crore": 10**7,
}
_COLLECTIVES = {"dozen": 12, "score": 20, "gross": 144, "pair": 2, "couple": 2}
_ORDINALS = {
    word: number
    for number, word in enumerate(
        "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth "
        "fifteenth sixteenth seventeenth eighteenth nineteenth".split(),
        start=1,
    )
}
_ORDINALS |= {word[:-1] + "ieth": number for word, number in _TENS.items()}
_ORDINALS |= {word + "th": number for word, number in _SCALES.items()}
# What one is divided by: `third`; not `second`, which is a time.
_PARTS = {word: number for word, number in _ORDINALS.items() if number > 2} | {"half": 2, "quarter": 4}
_PLURALS = {word + "s": word for word in (*_PARTS, *_SCALES, "dozen", "pair", "couple") if word != "half"}
_PLURALS["halves"] = "half"

_FACTORS = {word: Fraction(number) for word, number in (_SCALES | _COLLECTIVES).items()}
_FACTORS |= {plural: _FACTORS[word] for plural, word in _PLURALS.items() if word in _FACTORS}
_FACTORS |= {plural: Fraction(1, _PARTS[word]) for plural, word in _PLURALS.items() if word in _PARTS}

WORDS = {*_UNITS, *_TENS, *_SCALES, *_COLLECTIVES, *_PARTS, *_PLURALS} - {"score", "gross"}
# Words that a number may hold between others.
JOINTS = {"a", "an", "and", "of", "point"}


def factor(word: str) -> Fraction | None:
    """What a word behind a number multiplies it by: `million`, `dozen`, `tenths`."""
    return _FACTORS.get(word)


@functools.lru_cache(maxsize=4096)
def number(words: tuple[str, ...]) -> Fraction | None:
    """The number that lower-case words spell, all of them; None where they spell none."""
    if not words or words in (("a",), ("an",)):
        return None
    if words[0] == "half" and len(words) > 1:
        rest = words[1 + (words[1] == "of") :]
        whole = factor(rest[1]) if len(rest) == 2 and rest[0] in ("a", "an") else None
        return whole / 2 if whole and whole > 1 else None
    if "point" in words:
        at = words.index("point")
        whole, digits = _whole(words[:at]), [_UNITS.get(word, 10) for word in words[at + 1 :]]
        if whole is None or not digits or max(digits) > 9:
            return None
        return whole + Fraction(int("".join(map(str, digits))), 10 ** len(digits))
    if words[-1] in _COLLECTIVES or _PLURALS.get(words[-1]) in _COLLECTIVES:
        count = _whole(words[:-1])
        return None if count is None else count * _FACTORS[words[-1]]
    whole = _whole(words)
    if whole is not None:
        return whole
    for at, word in enumerate(words):
        if word == "and" and (whole := _whole(words[:at])) is not None and (rest := _part(words[at + 1 :])):
            return whole + rest
    return _part(words)


def ordinal(words: Sequence[str]) -> int | None:
    """The place that words name, `twenty-first`, without an article; None where they name none."""
    last = _ORDINALS.get(words[-1]) if words else None
    if last is None or len(words) == 1:
        return last
    if last in _SCALES.values():
        count = _below_thousand(words[:-1])
        return None if count is None else count * last
    return _TENS[words[0]] + last if len(words) == 2 and words[0] in _TENS and last < 10 else None


def suffix(place: int) -> str:
    """What follows the digits of an ordinal: `st` of 21."""
    return "th" if place % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(place % 10, "th")


def _part(words: Sequence[str]) -> Fraction | None:
    """`half`, `two thirds`."""
    if words == ("half",):
        return Fraction(1, 2)
    if len(words) < 2:
        return None
    count, name = _whole(words[:-1]), _PLURALS.get(words[-1], words[-1])
    if count is None or name not in _PARTS or (count == 1) == (words[-1] in _PLURALS):
        return None
    return Fraction(count, _PARTS[name])


def _whole(words: Sequence[str]) -> Fraction | None:
    """Groups below a thousand, each with its scale, in falling order."""
    total, last, group = 0, math.inf, []
    for word in words:
        if word not in _SCALES or word == "hundred":
            group.append(word)
            continue
        count = _below_thousand(group)
        if count is None or _SCALES[word] >= last:
            return None
        total, last, group = total + count * _SCALES[word], _SCALES[word], []
    if last < math.inf:
        if not group:
            return Fraction(total)
        group = group[group[0] == "and" :]
        if group in (["a"], ["an"]):
            return None
    count = _below_thousand(group)
    return None if count is None or count >= last else Fraction(total + count)


def _below_thousand(words: Sequence[str]) -> int | None:
    words = list(words)
    if words in (["a"], ["an"]):
        return 1
    if "hundred" in words:
        at = words.index("hundred")
        head, tail = words[:at], words[at + 1 :]
        count = 1 if head in ([], ["a"]) else _UNITS.get(head[0]) if len(head) == 1 else None
        rest = 0 if not tail else None if "hundred" in tail else _below_thousand(tail[tail[0] == "and" :])
        return None if not count or rest is None else 100 * count + rest
    if len(words) == 1:
        return _UNITS.get(words[0], _TENS.get(words[0]))
    if len(words) == 2 and words[0] in _TENS and 0 < _UNITS.get(words[1], 0) < 10:
        return _TENS[words[0]] + _UNITS[words[1]]
    return None
