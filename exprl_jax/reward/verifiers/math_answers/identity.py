"""Whether two expressions are one value: exactly for numbers, at sampled points for expressions with unknowns."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

import sympy

from exprl_jax.reward.verifiers.math_answers.letters import COUNTERS

# Digits beyond the largest value's own to which a difference is worked out before it counts as zero.
_DIGITS = 80
# Points that are compared: with positive unknowns, with unknowns of both signs, and with whole ones.
_POSITIVE, _SIGNED, _WHOLE = 4, 4, 12
_CERTAIN_BITS = 8
# Beyond it a value is taken for infinite: the digits of 10^(10^6) take no time.
_LARGEST_EXPONENT = 10**6


class _Point(NamedTuple):
    """Values of unknowns: whole ones are put in, others taken as exact binary fractions wherever digits are needed."""

    whole: dict[sympy.Symbol, sympy.Integer]
    real: dict[sympy.Symbol, sympy.Float]
    positive: bool = True

    def digits(self, value: sympy.Expr, count: int, at_most: int) -> sympy.Expr:
        """A value there, to so many digits, if working with at most so many shows them."""
        return value.subs(self.whole).doit().evalf(count, subs=self.real, maxn=at_most)


def same_value(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Whether two values, or matrices, are equal wherever their unknowns make both real.

    Expressions whose difference has no digit at random points are one (Schwartz and Zippel's lemma, for analytic
    functions).  Letters that count, `n`, are whole numbers in what makes sense for those: floors, powers of -1.
    """
    if isinstance(a, sympy.MatrixBase) or isinstance(b, sympy.MatrixBase):
        shapes = [getattr(side, "shape", None) for side in (a, b)]
        return shapes[0] == shapes[1] and all(map(same_value, a, b))
    if a == b:
        return True
    if a.is_Rational and b.is_Rational:
        return False
    symbols = a.free_symbols | b.free_symbols
    points = list(_points(symbols, a, b)) if symbols else [_Point({}, {})]
    compared = [_same_at(a, b, point) for point in points]
    return False not in compared and compared.count(True) >= min(2, len(points))


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
    for point in _points(a.free_symbols, a, b):
        values = [point.digits(side, _DIGITS, 2 * _DIGITS) for side in (a, b)]
        if all(value.is_number and value.is_finite and value != 0 for value in values):
            ratios.append(values[0] / values[1])
    if len(ratios) < 3 or positive and not (ratios[0].is_real and ratios[0] > 0):
        return False
    return all(abs(ratio - ratios[0]) < abs(ratio) * sympy.Float(10) ** (10 - _DIGITS) for ratio in ratios)


def _same_at(a: sympy.Expr, b: sympy.Expr, point: _Point) -> bool | None:
    """Whether two expressions agree at a point; None where that says nothing."""
    values = [point.digits(side, 15, _DIGITS) for side in (a, b)]
    if any(value.has(sympy.zoo, sympy.nan) or not value.is_number for value in values):
        return None
    if any(value.is_infinite for value in values):
        return values[0] == values[1]
    if not point.positive and not all(_is_nothing(value.as_real_imag()[1:]) for value in values):
        return None  # of unknowns that are not positive, only what is real counts: ln(xy) is ln x + ln y
    sizes = [abs(value) for value in values]
    if any(size > sympy.Float(10) ** _LARGEST_EXPONENT for size in sizes):
        return None
    own_digits = max(int(sympy.log(size, 10).evalf(5)) if size > 1 else 0 for size in sizes)
    return _is_nothing(point.digits(a - b, 15, own_digits + _DIGITS).as_real_imag())


def _is_nothing(parts: tuple[sympy.Expr, ...]) -> bool:
    """Whether real numbers are zero, or no digit of them is certain: SymPy then leaves them a bit or two."""
    return all(part == 0 or getattr(part, "_prec", _CERTAIN_BITS) < _CERTAIN_BITS for part in parts)


def _points(symbols: set[sympy.Symbol], *expressions: sympy.Expr) -> Iterator[_Point]:
    """Points to compare at, the same ones every time."""
    rng = random.Random(0)
    ordered = sorted(symbols, key=str)
    counters = [symbol for symbol in ordered if symbol.name in COUNTERS] if any(map(_counts, expressions)) else []
    others = [symbol for symbol in ordered if symbol not in counters]
    for index in range(_WHOLE if counters else _POSITIVE + _SIGNED):
        positive = index < _POSITIVE or not others
        # Positive, then all negative, then either.
        signs = [1 if positive else -1 if index == _POSITIVE else rng.choice((-1, 1)) for _ in others]
        real = {symbol: sympy.Float(sign * rng.uniform(0.3, 3.0)) for symbol, sign in zip(others, signs, strict=True)}
        whole = {
            symbol: sympy.Integer(1 + (index * (1 + 2 * shift) + shift) % _WHOLE)
            for shift, symbol in enumerate(counters)
        }
        yield _Point(whole, real, positive)


def _counts(expression: sympy.Expr) -> bool:
    """Whether an expression makes sense for whole numbers above all."""
    if expression.has(sympy.floor, sympy.ceiling, sympy.Mod, sympy.factorial, sympy.binomial):
        return True
    return any(power.base.is_negative and power.exp.free_symbols for power in expression.atoms(sympy.Pow))
