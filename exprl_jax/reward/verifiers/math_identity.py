"""Whether two expressions are one value: exactly for numbers, at sampled points for expressions with unknowns."""

from __future__ import annotations

import random

import sympy

# Digits that a number without unknowns is worked out to, and digits in which two that are equal agree.
_DIGITS, _AGREE, _AGREE_AT_POINTS = 80, 70, 50
# Where unknowns are set: positive reals, then reals of both signs, then whole numbers.
_POSITIVE, _SIGNED, _WHOLE = 4, 3, 12
_COUNTS = set("ijklmnKMN")


def same_value(a: sympy.Basic, b: sympy.Basic) -> bool:
    """Whether two values are equal, for every value of their unknowns where both are real.

    Unknowns are sampled: two analytic expressions that agree to 70 digits at random points are one (Schwartz, Zippel).
    Letters that count, `n`, are whole numbers in what only whole numbers make sense of, floors and powers of -1.
    """
    if isinstance(a, sympy.MatrixBase) or isinstance(b, sympy.MatrixBase):
        shapes = [getattr(side, "shape", None) for side in (a, b)]
        return shapes[0] == shapes[1] and all(map(same_value, a, b))
    if a == b:
        return True
    if a.is_Rational and b.is_Rational:
        return False
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    if not symbols:
        return _same_number(a, b)
    points = _points(symbols, a, b)
    compared = [_same_at(a, b, point, strict) for point, strict in points]
    return False not in compared and compared.count(True) >= 2


def proportional(a: sympy.Expr, b: sympy.Expr, positive: bool = False) -> bool:
    """Whether two expressions are equal up to a constant factor, and so have the same zeros.

    Args:
      a: an expression with unknowns.
      b: another.
      positive: whether the factor must be positive, as between two sides of an inequality.
    """
    a, b = (sympy.fraction(sympy.together(side))[0] if not positive else side for side in (a, b))
    if a.free_symbols != b.free_symbols or not a.free_symbols:
        return False
    ratios = []
    for point, _ in _points(sorted(a.free_symbols, key=str), a, b):
        values = [side.subs(point).evalf(_DIGITS) for side in (a, b)]
        if all(value.is_number and value.is_finite and value != 0 for value in values):
            ratios.append(values[0] / values[1])
    first = ratios[0] if len(ratios) > 2 else sympy.Integer(0)
    constant = all(abs(ratio - first) <= abs(first) * sympy.Float(10) ** -40 for ratio in ratios)
    return bool(first != 0 and constant and (not positive or first.is_real and first > 0))


def _same_number(a: sympy.Expr, b: sympy.Expr, digits: int = _AGREE) -> bool:
    if not (a.is_number and b.is_number):
        return False
    if a.is_infinite or b.is_infinite:
        return a == b
    difference = (a - b).evalf(_DIGITS, maxn=2 * _DIGITS)
    if difference == 0 or getattr(difference, "_prec", 2) == 1:  # no digit of it is certain: nothing is left
        return True
    size = max(abs(side.evalf(_DIGITS)) for side in (a, b))
    return bool(size.is_finite and abs(difference) < size * sympy.Float(10) ** -digits)


def _points(
    symbols: list[sympy.Symbol], a: sympy.Expr, b: sympy.Expr
) -> list[tuple[dict[sympy.Symbol, sympy.Expr], bool]]:
    """Points to compare at, the same ones every time, and whether values that are not real count there."""
    rng = random.Random(0)
    counts = [symbol for symbol in symbols if symbol.name in _COUNTS] if _counts(a) or _counts(b) else []
    points = []
    for index in range(_WHOLE if counts else _POSITIVE + _SIGNED):
        point = {}
        for symbol in symbols:
            # No fraction: SymPy looks for roots of those.
            value = sympy.Float(rng.uniform(0.3, 3.0), _DIGITS)
            point[symbol] = value if index < _POSITIVE else value * rng.choice((-1, 1))
        for shift, symbol in enumerate(counts):
            point[symbol] = sympy.Integer(1 + (index * (1 + 2 * shift) + shift) % _WHOLE)
        points.append((point, index < _POSITIVE))
    if not counts:
        points.append(({symbol: -abs(value) for symbol, value in points[0][0].items()}, False))
    return points


def _counts(expression: sympy.Expr) -> bool:
    """Whether an expression makes sense for whole numbers alone."""
    if expression.has(sympy.floor, sympy.ceiling, sympy.Mod, sympy.factorial, sympy.binomial):
        return True
    return any(power.base.is_negative and power.exp.free_symbols for power in expression.atoms(sympy.Pow))


def _same_at(a: sympy.Expr, b: sympy.Expr, point: dict[sympy.Symbol, sympy.Expr], strict: bool) -> bool | None:
    """Whether two expressions agree at a point; None where that says nothing."""
    values = [side.subs(point).doit() for side in (a, b)]
    if any(value.has(sympy.zoo, sympy.nan) or not value.is_number for value in values):
        return None
    if not strict and not all(abs(sympy.im(value.evalf(30))) < sympy.Float(10) ** -20 for value in values):
        return None
    return _same_number(*values, _AGREE_AT_POINTS)
