"""Whether an answer says what the reference says; the reference's kind decides what counts."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import sympy

from exprl_jax.reward.verifiers import math_answer, math_units, math_words
from exprl_jax.reward.verifiers.math_answer import (
    Answer,
    Choice,
    Clock,
    Equation,
    Inequality,
    Items,
    Named,
    Number,
    Numeral,
    Ordinal,
    Ratio,
    Region,
    Statement,
)
from exprl_jax.reward.verifiers.math_expression import number_value
from exprl_jax.reward.verifiers.math_identity import proportional, same_value

# A reference with as many digits is a rounded value, and an answer that rounds to it is right.
_ROUNDED_DIGITS = 3


def same_answer(expected: Answer, got: Answer) -> bool:
    """Whether an answer is right.

    Args:
      expected: the reference.
      got: the answer.
    """
    if expected.words == got.words:
        return True
    if got.condition and not math_words.same_words(expected.condition, got.condition):
        return False
    if expected.condition and not got.condition and isinstance(expected.body, Statement) and not expected.body.value:
        return False
    if expected.domains and got.domains and _kinds(expected) != _kinds(got):
        return False
    return same(expected.body, got.body)


def _kinds(answer: Answer) -> set[str]:
    return {kind for _, kind in answer.domains if kind} or {""}


def same(expected: Any, got: Any) -> bool:
    """Whether `got` says what `expected` says; both are of `math_answer`'s kinds."""
    if isinstance(expected, Named):
        return _same_named(expected, got)
    if isinstance(got, Named):
        return _same_equation(expected, got) if isinstance(expected, Equation) else same(expected, got.value)
    if isinstance(got, Choice) and not isinstance(expected, Choice):
        return (
            expected == Statement((got.letter,), getattr(expected, "value", None))
            or got.rest is not None
            and same(expected, got.rest)
        )
    if isinstance(expected, Choice) and isinstance(got, Statement):
        return got.words == (expected.letter,)
    return _COMPARED[type(expected)](expected, got)


# --- numbers ---------------------------------------------------------------------------------------------------------


def _same_number(expected: Number, got: Any) -> bool:
    if isinstance(got, Equation):
        return got.value is not None and _same_number(expected, got.value)
    if isinstance(got, (Ratio, Clock)):
        ratio = got if isinstance(got, Ratio) else got.ratio
        plain = expected.unit is None and expected.value.is_Rational and not expected.value.is_Integer
        return bool(
            plain
            and ratio
            and len(ratio.parts) == 2
            and ratio.parts[1] != 0
            and same_value(expected.value, ratio.parts[0] / ratio.parts[1])
        )
    if isinstance(got, Numeral):
        return expected.unit is None and expected.value == _numeral_value(got)
    if isinstance(got, Statement):
        got = Number(got.value) if got.value is not None else None
    if not isinstance(got, Number):
        return False
    if got.rounded and not (expected.rounded or expected.decimal or expected.inexact):
        return False
    # `5 apples` are no `5 kg`.
    if expected.nouns and got.unit and not expected.unit or got.nouns and expected.unit and not got.unit:
        return False
    if expected.nouns and got.nouns and not _same_nouns(expected.nouns, got.nouns):
        return False
    return _same_measure(expected, got)


def _same_nouns(expected: Sequence[tuple[str, sympy.Expr]], got: Sequence[tuple[str, sympy.Expr]]) -> bool:
    """Whether what is counted is the same, or one of the two says more about it: `apples`, `red apples`."""
    return len(expected) == len(got) and all(
        a_power == b_power and (a.split() == b.split()[-len(a.split()) :] or b.split() == a.split()[-len(b.split()) :])
        for (a, a_power), (b, b_power) in zip(expected, got, strict=True)
    )


def _same_measure(expected: Number, got: Number) -> bool:
    """Whether two values are one, with their units; a unit may be left out, and added to a plain number."""
    one, other = expected.unit, got.unit
    if one is not None and other is not None:
        converted = _converted(got.value, other, one)
        return converted is not None and _same_or_rounded(expected, got._replace(value=converted))
    unit = one or other
    if unit is None or unit.names not in _STAND_FOR_NUMBERS:
        return _same_or_rounded(expected, got)
    measure, plain = (expected, got) if one is not None else (got, expected)
    size = _STAND_FOR_NUMBERS[unit.names]
    if same_value(measure.value * size, plain.value):
        return True
    # `50` for `50 %` and `90` for `90°`; but 0.5 is 50 %, and pi is 180°.
    stands_alone = plain.value > 1 if unit.names == _PERCENT and plain.value.is_real else not plain.value.has(sympy.pi)
    return bool(stands_alone) and _same_or_rounded(expected, got)


_PERCENT, _DEGREE = (("percent", 1),), (("degree", 1),)
_STAND_FOR_NUMBERS = {_PERCENT: sympy.Rational(1, 100), _DEGREE: sympy.pi / 180}


def _converted(value: sympy.Basic, unit: math_units.Unit, to: math_units.Unit) -> sympy.Basic | None:
    # A pound is a mass, or money.
    money = {unit.names, to.names} == {(("pound", 1),), (("GBP", 1),)}
    return value if money else math_units.converted(value, unit, to)


def _same_or_rounded(expected: Number, got: Number) -> bool:
    if same_value(expected.value, got.value):
        return True
    if expected.decimal is None or got.inexact or not getattr(got.value, "is_number", False):
        return False
    digits, _, power = expected.decimal.partition("e")
    places = len(digits.partition(".")[2]) - int(power or 0)
    if len(digits.replace(".", "").lstrip("0")) < _ROUNDED_DIGITS or got.value.is_real is not True:
        return False
    if got.value.is_Integer and places > 0:
        return False
    scale = expected.value / number_value(expected.decimal) if number_value(expected.decimal) else 1
    return bool(abs(got.value - expected.value) * 2 * sympy.Integer(10) ** places <= abs(scale))


def _numeral_value(numeral: Numeral) -> int | None:
    try:
        return int(numeral.digits, numeral.base)
    except ValueError:  # a digit that the base has not
        return None


def _same_numeral(expected: Numeral, got: Any) -> bool:
    """Whether numbers in a base are one; without its base an answer may be the number in that base, or in ten."""
    if isinstance(got, Numeral):
        return expected == got or None is not _numeral_value(expected) == _numeral_value(got)
    if isinstance(got, Statement):
        return got.words == (expected.digits,)
    if not isinstance(got, Number) or got.unit is not None:
        return False
    return got.value == _numeral_value(expected) or str(got.value) == expected.digits


# --- several values --------------------------------------------------------------------------------------------------


def _same_items(expected: Items, got: Any) -> bool:
    if isinstance(got, Region):
        own = math_answer.region(expected) if expected.brackets != "{}" else None
        return own is not None and _same_region(own, got)
    if not isinstance(got, Items):
        return False
    if expected.brackets in ("", "{}"):
        if got.brackets == "" and (by_name := _by_name(got)) and not _by_name(expected):
            # `x_1 = 1, x_2 = 2` names two values of one unknown, `x = 2, y = 1` those of two.
            if len({name[0] for name in by_name}) > 1:
                return _in_order(expected.items, list(by_name.values()))
        if got.brackets in ("", "{}"):
            unique = expected.brackets == "{}" or got.brackets == "{}"
            if expected.brackets == "" and got.brackets == "{}" and len(_unique(expected.items)) != len(expected.items):
                return False
            return _same_members(
                _unique(expected.items) if unique else expected.items,
                _unique(got.items) if got.brackets == "{}" else got.items,
            )
        return expected.brackets == "" and got.brackets == "()" and _in_order(expected.items, got.items)
    named, other = _by_name(expected), _by_name(got)
    if named and other and set(named) == set(other):
        return all(same(named[name], other[name]) for name in named)
    if expected.brackets != got.brackets and (got.brackets or expected.brackets != "()"):
        return False
    mine, theirs = [
        list(names.values()) if names else list(items.items) for names, items in ((named, expected), (other, got))
    ]
    if not got.brackets and not other and _may_be_interval(expected):
        return False
    return _in_order(mine, theirs)


def _by_name(items: Items) -> dict[str, Any]:
    """The values of several unknowns, in the unknowns' order; empty where they are not all named, by different names."""
    names = [item.name for item in items.items if isinstance(item, Named)]
    if len(set(names)) != len(items.items) or len(names) < 2:
        return {}
    return {item.name: item.value for item in sorted(items.items, key=lambda item: item.name)}


def _may_be_interval(items: Items) -> bool:
    region = math_answer.region(items)
    return region is not None and region.points is not sympy.S.EmptySet


def _in_order(expected: Sequence[Any], got: Sequence[Any]) -> bool:
    return len(expected) == len(got) and all(map(same, expected, got))


def _unique(items: Sequence[Any]) -> list[Any]:
    unique: list[Any] = []
    for item in items:
        if not any(same(other, item) for other in unique):
            unique.append(item)
    return unique


def _same_members(expected: Sequence[Any], got: Sequence[Any]) -> bool:
    """Whether two collections hold the same, each as often, in any order."""
    left = list(got)
    for item in expected:
        match = next((index for index, other in enumerate(left) if same(item, other)), None)
        if match is None:
            return False
        del left[match]
    return not left


def _same_region(expected: Region, got: Any) -> bool:
    if isinstance(got, (Items, Statement)):
        got = math_answer.region(got) if not (isinstance(got, Items) and got.brackets == "{}") else None
    if not isinstance(got, Region) or expected.name and got.name and expected.name != got.name:
        return False
    if expected.points == got.points:
        return True
    pieces = [_pieces(region.points) for region in (expected, got)]
    if None in pieces or len(pieces[0]) != len(pieces[1]):
        return False
    return all(
        a[2:] == b[2:] and same_value(a[0], b[0]) and same_value(a[1], b[1]) for a, b in zip(*pieces, strict=True)
    )


def _pieces(points: sympy.Set) -> list[tuple[sympy.Expr, sympy.Expr, bool, bool]] | None:
    """The intervals of a set, in order; None of one that is no union of intervals."""
    intervals = []
    for part in points.args if isinstance(points, sympy.Union) else (points,):
        if isinstance(part, sympy.Interval):
            intervals.append((part.start, part.end, bool(part.left_open), bool(part.right_open)))
        elif isinstance(part, sympy.FiniteSet):
            intervals += [(point, point, False, False) for point in part]
        else:
            return None
    return sorted(intervals, key=lambda interval: interval[0].evalf())


# --- relations -------------------------------------------------------------------------------------------------------


def _same_named(expected: Named, got: Any) -> bool:
    if isinstance(got, Named):
        renamed = _renamed(expected, got)
        if expected.name == got.name or renamed is not None:
            if same(expected.value, renamed if renamed is not None else got.value):
                return True
        elif not _is_letter(expected.name) and not _is_letter(got.name):
            return not {"(", "\\"} & {*expected.name, *got.name} and same(expected.value, got.value)
    elif not isinstance(got, Equation):
        return same(expected.value, got)
    return _same_equation(expected, got, unknowns=2)


def _is_letter(name: str) -> bool:
    return len(name) < 3 or "_" in name or "(" in name or name[0] == "\\"


def _renamed(expected: Named, got: Named) -> Any:
    """The value of `f(t)` in the letters of `f(x)`; None if they are not one function of letters."""
    if expected.name == got.name or expected.name[:1] != got.name[:1] or "(" not in expected.name + got.name:
        return None
    own, theirs = (
        [part for part in named.name[2:-1].split(",")] if named.name[1:2] == "(" else [] for named in (expected, got)
    )
    if len(own) != len(theirs) or not all(len(letter) == 1 and letter.isalpha() for letter in own + theirs):
        return None
    if not isinstance(got.value, (Number, Statement)) or got.value.value is None:
        return None
    letters = dict(zip(map(sympy.Symbol, theirs), map(sympy.Symbol, own), strict=True))
    value = got.value.value.subs(letters, simultaneous=True)
    return Number(value)


def _same_equation(expected: Named | Equation, got: Any, unknowns: int = 1) -> bool:
    """Whether two equations have the same solutions: their sides' differences are proportional."""
    differences = [getattr(side, "difference", None) for side in (expected, got)]
    if None in differences or any(not isinstance(side, sympy.Expr) for side in differences):
        return False
    return len(differences[0].free_symbols) >= unknowns and proportional(*differences)


def _same_inequality(expected: Inequality, got: Any) -> bool:
    return (
        isinstance(got, Inequality)
        and expected.sign == got.sign
        and proportional(expected.difference, got.difference, True)
    )


def _same_ratio(expected: Ratio, got: Any) -> bool:
    if isinstance(got, Clock):
        got = got.ratio
    if isinstance(got, Number) and got.unit is None and len(expected.parts) == 2 and expected.parts[1] != 0:
        value = expected.parts[0] / expected.parts[1]
        return not value.is_Integer and same_value(value, got.value)
    if not isinstance(got, Ratio) or len(expected.parts) != len(got.parts):
        return False
    if expected.parts[0] == 0 or got.parts[0] == 0:
        return all(map(same_value, expected.parts, got.parts))
    return all(
        same_value(mine * got.parts[0], theirs * expected.parts[0])
        for mine, theirs in zip(expected.parts, got.parts, strict=True)
    )


def _same_clock(expected: Clock, got: Any) -> bool:
    if isinstance(got, Clock):
        halves = {expected.half, got.half} - {""}
        return expected.seconds == got.seconds and len(halves) < 2
    return expected.ratio is not None and isinstance(got, Ratio) and _same_ratio(expected.ratio, got)


# --- words -----------------------------------------------------------------------------------------------------------


def _same_statement(expected: Statement, got: Any) -> bool:
    if isinstance(got, Statement):
        return math_words.same_words(expected.words, got.words)
    if expected.words == (r"\emptyset",) and isinstance(got, Region):
        return got.points is sympy.S.EmptySet
    return expected.value is not None and isinstance(got, (Number, Items)) and _same_number(Number(expected.value), got)


def _same_choice(expected: Choice, got: Any) -> bool:
    if isinstance(got, Choice):
        return expected.letter == got.letter and (
            expected.rest is None or got.rest is None or same(expected.rest, got.rest)
        )
    return expected.rest is not None and same(expected.rest, got)


_COMPARED = {
    Number: _same_number, Items: _same_items, Region: _same_region, Equation: _same_equation, Inequality: _same_inequality,
    Ratio: _same_ratio, Clock: _same_clock, Numeral: _same_numeral, Ordinal: lambda expected, got: expected == got,
    Choice: _same_choice, Statement: _same_statement,
}  # fmt: skip
