"""Whether an answer says what the reference says; the reference's kind decides what counts."""

from __future__ import annotations

import re
from collections.abc import Sequence

import sympy

from exprl_jax.reward.verifiers.math_answers import letters, numerals, phrases, units
from exprl_jax.reward.verifiers.math_answers.identity import proportional, same_value
from exprl_jax.reward.verifiers.math_answers.kinds import (
    NOTHING,
    Answer,
    Body,
    Cases,
    Clock,
    Congruence,
    Date,
    Equation,
    Inequality,
    Items,
    Named,
    Number,
    Numeral,
    Option,
    Ordinal,
    Ratio,
    Region,
    Statement,
    region,
)

# A decimal of as many digits is taken for a rounded value: what rounds to it is right.
_ROUNDED_DIGITS = 3
# Units whose number may stand without them, and what one of them is.
_PERCENT, _DEGREE = (("percent", 1),), (("degree", 1),)
_PLAIN_SIZES = {_PERCENT: sympy.Rational(1, 100), _DEGREE: sympy.pi / 180}


def same_answer(expected: Answer, got: Answer) -> bool:
    """Whether an answer is right.

    Args:
      expected: the reference.
      got: the answer.
    """
    if expected.words == got.words:
        return True
    if expected.condition != got.condition and (got.condition or not _may_be_left_out(expected)):
        return False
    domains = [{kind for _, kind in answer.domains if kind} for answer in (expected, got)]
    if all(domains) and domains[0] != domains[1]:
        return False
    return _same(expected.body, letters.renamed(expected, got).body)


def _may_be_left_out(expected: Answer) -> bool:
    """Whether the reference's condition only bounds a letter, `for n >= 1`; one in words is part of a statement."""
    first, *rest = expected.condition
    is_bound = first in ("for", "where", r"\forall", ",") and not any(word.isalpha() and len(word) > 1 for word in rest)
    return is_bound and not isinstance(expected.body, Statement)


def _same(expected: Body, got: Body) -> bool:
    if isinstance(expected, Named):
        return _same_named(expected, got)
    if isinstance(got, Named):
        return _same_equation(expected, got) if isinstance(expected, Equation) else _same(expected, got.value)
    if isinstance(got, Option) and not isinstance(expected, Option):
        if isinstance(expected, Statement) and expected.words == (got.letter,):
            # `(B) 12` is B; what words say behind it may be anything, `(B) is wrong`.
            return got.rest is None or isinstance(got.rest, Number)
        return got.rest is not None and _same(expected, got.rest)
    match expected:
        case Number():
            return _same_number(expected, got)
        case Items():
            return _same_items(expected, got)
        case Region():
            return _same_region(expected, got)
        case Equation():
            return _same_equation(expected, got)
        case Inequality():
            is_one = isinstance(got, Inequality) and expected.sign == got.sign
            return is_one and proportional(expected.difference, got.difference, positive=True)
        case Ratio():
            return _same_ratio(expected, got)
        case Clock():
            return _same_clock(expected, got)
        case Numeral():
            return _same_numeral(expected, got)
        case Ordinal() | Congruence():
            return expected == got
        case Date():
            days = [(day.month, day.day) for day in (expected, got)] if isinstance(got, Date) else [None, ()]
            return days[0] == days[1] and got.year in (expected.year, None)
        case Cases():
            return isinstance(got, Cases) and _same_cases(expected, got)
        case Option():
            return _same_option(expected, got)
        case Statement():
            return _same_statement(expected, got)


# --- numbers ---------------------------------------------------------------------------------------------------------


def _same_number(expected: Number, got: Body) -> bool:
    if isinstance(got, Equation):
        return expected.unit is None and got.value is not None and _same_number(expected, got.value)
    if isinstance(got, Clock):
        got = got.ratio
    if isinstance(got, Ratio):
        # 1:2 is one half; but 7:1 is no 7.
        is_fraction = expected.unit is None and expected.value.is_Rational and not expected.value.is_Integer
        return bool(is_fraction) and _same_ratio(got, expected)
    if isinstance(got, Numeral):
        return expected.unit is None and expected.value == _numeral_value(got)
    if isinstance(got, Statement) and got.value is not None:
        got = Number(got.value)
    if not isinstance(got, Number) or got.rounded and not (expected.rounded or expected.inexact):
        return False
    if not _same_things(expected, got):
        return False
    if expected.unit is not None and got.unit is not None:
        value = _converted(got.value, got.unit, expected.unit)
        return value is not None and _equal_or_rounded(expected, got._replace(value=value))
    unit = expected.unit or got.unit
    if unit is None or unit.names not in _PLAIN_SIZES:
        return _equal_or_rounded(expected, got)
    measure, plain = (expected, got) if expected.unit is not None else (got, expected)
    if same_value(measure.value * _PLAIN_SIZES[unit.names], plain.value):
        return True
    # `50` for `50 %` and `90` for `90°`; but 0.5 is 50 %, and pi is 180°.
    is_share = plain.value.is_real is not True or plain.value <= 1
    if is_share if unit.names == _PERCENT else plain.value.has(sympy.pi):
        return False
    return _equal_or_rounded(expected, got)


def _same_things(expected: Number, got: Number) -> bool:
    """Whether the same is counted: of two phrases one may say more, `red apples`; of two sides one may say nothing."""
    if not expected.things or not got.things:
        # `5 apples` are no `5 kg`.
        return not (expected.things and got.unit and not expected.unit or got.things and expected.unit and not got.unit)
    return len(expected.things) == len(got.things) and all(
        power == other_power and _extends(phrase.split(), other.split())
        for (phrase, power), (other, other_power) in zip(expected.things, got.things, strict=True)
    )


def _extends(a: list[str], b: list[str]) -> bool:
    short, long = sorted((a, b), key=len)
    return long[: len(short)] == short or long[-len(short) :] == short


def _converted(value: sympy.Expr, unit: units.Unit, to: units.Unit) -> sympy.Expr | None:
    # A pound is a mass, or money.
    is_money = {unit.names, to.names} == {(("pound", 1),), (("GBP", 1),)}
    return value if is_money else units.converted(value, unit, to)


def _equal_or_rounded(expected: Number, got: Number) -> bool:
    """Whether two values are one, or the answer's exact value rounds to the reference's decimal."""
    if same_value(expected.value, got.value):
        return True
    decimal = expected.decimal
    if decimal is None or got.inexact or numerals.significant(decimal) < _ROUNDED_DIGITS:
        return False
    if getattr(got.value, "is_number", False) is not True or got.value.is_real is not True:
        return False
    scale = abs(expected.value / sympy.Rational(str(numerals.value(decimal))))  # of `3.14 million`
    half_a_digit = scale / (2 * sympy.Integer(10) ** numerals.places(decimal))
    return bool(abs(got.value - expected.value) <= half_a_digit)


def _same_ratio(expected: Ratio, got: Body) -> bool:
    if isinstance(got, Clock):
        got = got.ratio
    if isinstance(got, Number) and got.unit is None and len(expected.parts) == 2 and expected.parts[1] != 0:
        value = expected.parts[0] / expected.parts[1]
        return not value.is_Integer and same_value(value, got.value)
    if not isinstance(got, Ratio) or len(expected.parts) != len(got.parts):
        return False
    first, other_first = expected.parts[0], got.parts[0]
    if first == 0 or other_first == 0:
        return all(map(same_value, expected.parts, got.parts))
    return all(
        same_value(part * other_first, other * first) for part, other in zip(expected.parts, got.parts, strict=True)
    )


def _same_clock(expected: Clock, got: Body) -> bool:
    if isinstance(got, Clock):
        return expected.seconds == got.seconds and len({expected.half, got.half} - {""}) < 2
    return expected.ratio is not None and isinstance(got, Ratio) and _same_ratio(expected.ratio, got)


def _numeral_value(numeral: Numeral) -> int | None:
    try:
        return int(numeral.digits, numeral.base)
    except ValueError:  # a digit that the base has not
        return None


def _same_numeral(expected: Numeral, got: Body) -> bool:
    """Whether numbers in a base are one; an answer without a base may be the number in that base, or in ten."""
    if isinstance(got, Numeral):
        value = _numeral_value(expected)
        return expected == got or value is not None and value == _numeral_value(got)
    if isinstance(got, Statement):
        return got.words == (expected.digits,)
    is_plain = isinstance(got, Number) and got.unit is None
    return is_plain and (got.value == _numeral_value(expected) or str(got.value) == expected.digits)


# --- several values --------------------------------------------------------------------------------------------------


def _same_items(expected: Items, got: Body) -> bool:
    if isinstance(got, Region) and isinstance(got.points, sympy.FiniteSet):
        got = Items("{}", tuple(map(Number, got.points)))
    if isinstance(got, Region):
        own = region(expected) if expected.brackets != "{}" else None
        return own is not None and _same_region(own, got)
    if not isinstance(got, Items):
        return False
    names_alone = all(isinstance(item, (Statement, Option)) for item in expected.items)
    if names_alone and got.either and not expected.either:
        return False  # `A or C` for `A and C`; but the roots 1 and 3 are 1 or 3
    got = got._replace(items=_without_numbers(expected.items, got.items))
    named, other_named = _by_name(expected), _by_name(got)
    if expected.brackets in ("", "{}") and not named:
        # `x_1 = 1, x_2 = 2` gives two values of one unknown, `x = 2, y = 1` those of two.
        if not got.brackets and len({name[0] for name in other_named}) > 1:
            return expected.brackets == "" and _in_order(expected.items, list(other_named.values()))
        if got.brackets not in ("", "{}"):
            theirs = list(other_named.values()) or got.items
            return expected.brackets == "" and got.brackets == "()" and _in_order(expected.items, theirs)
        return _same_collection(expected, got)
    if named and other_named and set(named) == set(other_named):
        return all(_same(named[name], other_named[name]) for name in named)
    if not got.brackets and expected.brackets == "()":
        if not other_named and _may_be_interval(expected):
            return False
    elif expected.brackets != got.brackets and not (named and got.brackets == "()"):
        return False
    both = [list(names.values()) or items.items for names, items in ((named, expected), (other_named, got))]
    return _in_order(*both)


def _same_cases(expected: Cases, got: Cases) -> bool:
    """Whether two functions are equal case by case, in any order."""
    cases, others = (list(zip(side.values, side.where, strict=True)) for side in (expected, got))
    if expected.name != got.name or len(cases) != len(others):
        return False
    for value, points in cases:
        match = next(
            (
                at
                for at, (other, theirs) in enumerate(others)
                if _same_region(Region(points), Region(theirs)) and same_value(value, other)
            ),
            None,
        )
        if match is None:
            return False
        del others[match]
    return True


def _without_numbers(expected: Sequence[Body], got: Sequence[Body]) -> tuple[Body, ...]:
    """Of values of one unknown, `x = 1, x = 2`, those that are numbered, `x_1 = 1, x_2 = 2`, by its own name."""
    names = {item.name if isinstance(item, Named) else "" for item in expected}
    numbered = [re.fullmatch(r"(.+)_\{?\d+\}?", item.name) if isinstance(item, Named) else None for item in got]
    if len(names) != 1 or not all(numbered) or {match[1] for match in numbered} != names:
        return tuple(got)
    return tuple(item._replace(name=match[1]) for item, match in zip(got, numbered, strict=True))


def _by_name(items: Items) -> dict[str, Body]:
    """The values of several unknowns; empty where not each is named, by a name of its own.

    They come in alphabetical order, Greek names, `(r, \\theta)`, as they stand.
    """
    named = [item for item in items.items if isinstance(item, Named)]
    if len({item.name for item in named}) < len(items.items) or len(named) < 2:
        return {}
    is_latin = not any(item.name.startswith("\\") for item in named)
    return {item.name: item.value for item in (sorted(named, key=lambda item: item.name) if is_latin else named)}


def _may_be_interval(items: Items) -> bool:
    interval = region(items)
    return interval is not None and interval.points is not sympy.S.EmptySet


def _in_order(expected: Sequence[Body], got: Sequence[Body]) -> bool:
    return len(expected) == len(got) and all(map(_same, expected, got))


def _same_collection(expected: Items, got: Items) -> bool:
    """Whether two lists or sets hold the same: a list each as often, a set each once."""
    mine, theirs = (_unique(items.items) if items.brackets else list(items.items) for items in (expected, got))
    if expected.brackets:
        theirs = _unique(theirs)
    for item in mine:
        match = next((at for at, other in enumerate(theirs) if _same(item, other)), None)
        if match is None:
            return False
        del theirs[match]
    return not theirs


def _unique(items: Sequence[Body]) -> list[Body]:
    unique: list[Body] = []
    for item in items:
        if not any(_same(other, item) for other in unique):
            unique.append(item)
    return unique


def _same_region(expected: Region, got: Body) -> bool:
    if not isinstance(got, Region):
        got = None if isinstance(got, Items) and got.brackets == "{}" else region(got)
    if got is None or expected.name and got.name and expected.name != got.name:
        return False
    if expected.points == got.points:
        return True
    pieces, others = _pieces(expected.points), _pieces(got.points)
    if pieces is None or others is None or len(pieces) != len(others):
        return False
    return all(
        opens == other_opens and same_value(start, other_start) and same_value(end, other_end)
        for (start, end, opens), (other_start, other_end, other_opens) in zip(pieces, others, strict=True)
    )


def _pieces(points: sympy.Set) -> list[tuple[sympy.Expr, sympy.Expr, tuple[bool, bool]]] | None:
    """The intervals of a set in order, each with its open ends; None of a set that is no union of intervals."""
    pieces = []
    for part in points.args if isinstance(points, sympy.Union) else (points,):
        if isinstance(part, sympy.Interval):
            pieces.append((part.start, part.end, (bool(part.left_open), bool(part.right_open))))
        elif isinstance(part, sympy.FiniteSet):
            pieces += [(point, point, (False, False)) for point in part]
        else:
            return None
    return sorted(pieces, key=lambda piece: piece[0].evalf())


# --- equations and words ---------------------------------------------------------------------------------------------


def _same_named(expected: Named, got: Body) -> bool:
    if not isinstance(got, (Named, Equation)):
        return _same(expected.value, got)
    if isinstance(got, Named):
        # `C_{\min} = 1/8` for `C = 1/8`, and `f \equiv 0` for `f(x) = 0`.
        is_extreme = re.fullmatch(re.escape(expected.name) + r"_\{?\\?(min|max)\}?", got.name)
        is_constant = expected.name.startswith(f"{got.name}(") and not letters.free(got.value)
        if expected.name == got.name or is_extreme or is_constant:
            value = got.value
        elif (renamed := _renamed(expected, got)) is not None:
            value = renamed
        elif any(len(named.name) > 2 and named.name.isalpha() for named in (expected, got)):
            value = got.value  # a name in words, `Area = 5`
        else:
            value = None
        if value is not None and _same(expected.value, value):
            return True
    # An unknown that is not alone on its side is not solved for.
    has_several = expected.difference is not None and len(expected.difference.free_symbols) > 1
    return has_several and _same_equation(expected, got)


def _renamed(expected: Named, got: Named) -> Number | None:
    """The value of `f(t)` in the letters of `f(x)`; None if the two are not one function of letters."""
    functions = [(named.name[0], named.name[2:-1].split(",")) for named in (expected, got) if named.name[1:2] == "("]
    if len(functions) < 2 or functions[0][0] != functions[1][0] or len(functions[0][1]) != len(functions[1][1]):
        return None
    names, others = functions[0][1], functions[1][1]
    is_plain = isinstance(got.value, (Number, Statement)) and got.value.value is not None
    if not is_plain or not all(len(letter) == 1 and letter.isalpha() for letter in names + others):
        return None
    renaming = dict(zip(map(sympy.Symbol, others), map(sympy.Symbol, names), strict=True))
    return Number(got.value.value.subs(renaming, simultaneous=True))


def _same_equation(expected: Named | Equation, got: Body) -> bool:
    """Whether two equations have the same solutions: the differences of their sides are proportional."""
    if not isinstance(got, (Named, Equation)):
        return False
    differences = [side.difference for side in (expected, got)]
    return all(isinstance(difference, sympy.Expr) for difference in differences) and proportional(*differences)


def _same_statement(expected: Statement, got: Body) -> bool:
    if isinstance(got, Statement):
        return phrases.same_words(expected.words, got.words)
    if expected == NOTHING:
        return isinstance(got, Region) and got.points is sympy.S.EmptySet
    return expected.value is not None and isinstance(got, Number) and _same_number(Number(expected.value), got)


def _same_option(expected: Option, got: Body) -> bool:
    if isinstance(got, Option):
        if expected.rest is None:
            return expected.letter == got.letter and isinstance(got.rest, (Number, type(None)))
        return expected.letter == got.letter and (got.rest is None or _same(expected.rest, got.rest))
    if isinstance(got, Statement) and got.words == (expected.letter,):
        return True
    return expected.rest is not None and _same(expected.rest, got)
