"""Whether two expressions are one value: exactly for numbers, at sampled points for expressions with unknowns."""

from __future__ import annotations

import random
from collections.abc import Iterator

import sympy

# Digits that numbers are worked out to, and in which two that are one agree: of numbers, and at a sampled point.
_DIGITS, _AGREE, _AGREE_AT_POINTS = 80, 70, 50
# Points that are compared: with positive unknowns, with unknowns of both signs, and with whole ones.
_POSITIVE, _SIGNED, _WHOLE = 4, 4, 12
_COUNTERS = set("ijklmnKMN")

_Point = dict[sympy.Symbol, sympy.Expr]


def same_value(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Whether two values, or matrices, are equal wherever their unknowns make both real.

    Expressions that agree to 50 digits at random points are one (Schwartz and Zippel's lemma, for analytic functions).
    Letters that count, `n`, are whole numbers in what makes sense for those: floors, binomials, powers of -1.
    """
    if isinstance(a, sympy.MatrixBase) or isinstance(b, sympy.MatrixBase):
        shapes = [getattr(side, "shape", None) for side in (a, b)]
        return shapes[0] == shapes[1] and all(map(same_value, a, b))
    if a == b:
        return True
    if a.is_Rational and b.is_Rational:
        return False
    symbols = a.free_symbols | b.free_symbols
    if not symbols:
        return _same_number(a, b, _AGREE)
    compared = [_same_at(a, b, point, positive) for point, positive in _points(symbols, a, b)]
    return False not in compared and compared.count(True) >= 2


def proportional(a: sympy.Expr, b: sympy.Expr, positive: bool = False) -> bool:
    """Whether two expressions are equal up to a constant factor, and so have the same zeros.

    Args:
      a: an expression with unknowns; of a fraction its numerator counts, unless `positive`.
      b: another.
      positive: whether the factor must be positive, as between two sides of an inequality.
    """
    if not positive:
        a, b = (sympy.fraction(sympy.together(side))[0] for side in (a, b))
    if a.free_symbols != b.free_symbols or not a.free_symbols:
        return False
    ratios = []
    for point, _ in _points(a.free_symbols, a, b):
        values = [side.subs(point).evalf(_DIGITS) for side in (a, b)]
        if all(value.is_number and value.is_finite and value != 0 for value in values):
            ratios.append(values[0] / values[1])
    if len(ratios) < 3 or positive and not (ratios[0].is_real and ratios[0] > 0):
        return False
    return all(abs(ratio - ratios[0]) < abs(ratio) * sympy.Float(10) ** -_AGREE_AT_POINTS for ratio in ratios)


def _same_number(a: sympy.Expr, b: sympy.Expr, digits: int) -> bool:
    if not (a.is_number and b.is_number):
        return False
    if a.is_infinite or b.is_infinite:
        return a == b
    difference = (a - b).evalf(_DIGITS, maxn=2 * _DIGITS)
    if difference == 0 or getattr(difference, "_prec", 2) == 1:  # no digit of it is certain: nothing is left
        return True
    size = max(abs(side.evalf(_DIGITS)) for side in (a, b))
    return bool(size.is_finite and abs(difference) < size * sympy.Float(10) ** -digits)


def _same_at(a: sympy.Expr, b: sympy.Expr, point: _Point, positive: bool) -> bool | None:
    """Whether two expressions agree at a point; None where that says nothing."""
    values = [side.subs(point).doit() for side in (a, b)]
    if any(value.has(sympy.zoo, sympy.nan) or not value.is_number for value in values):
        return None
    if not positive and any(abs(sympy.im(value.evalf(30))) > sympy.Float(10) ** -20 for value in values):
        return None  # of unknowns that are not positive, only what is real counts: ln(xy) is ln x + ln y
    return _same_number(*values, _AGREE_AT_POINTS)


def _points(symbols: set[sympy.Symbol], *expressions: sympy.Expr) -> Iterator[tuple[_Point, bool]]:
    """Points, the same ones every time, and whether their unknowns are positive."""
    rng = random.Random(0)
    ordered = sorted(symbols, key=str)
    counters = [symbol for symbol in ordered if symbol.name in _COUNTERS] if any(map(_counts, expressions)) else []
    for index in range(_WHOLE if counters else _POSITIVE + _SIGNED):
        # No fractions: SymPy would look for their roots.
        point = {symbol: sympy.Float(rng.uniform(0.3, 3.0), _DIGITS) for symbol in ordered}
        positive = index < _POSITIVE or len(counters) == len(ordered)
        if not positive:
            # All negative, then either.
            point = {
                symbol: value * (-1 if index == _POSITIVE else rng.choice((-1, 1))) for symbol, value in point.items()
            }
        for shift, symbol in enumerate(counters):
            point[symbol] = sympy.Integer(1 + (index * (1 + 2 * shift) + shift) % _WHOLE)
        yield point, positive


def _counts(expression: sympy.Expr) -> bool:
    """Whether an expression makes sense for whole numbers above all."""
    if expression.has(sympy.floor, sympy.ceiling, sympy.Mod, sympy.factorial, sympy.binomial):
        return True
    return any(power.base.is_negative and power.exp.free_symbols for power in expression.atoms(sympy.Pow))
