"""Inequalities: the real numbers that they hold for, or, in several unknowns, what is below what."""

from __future__ import annotations

from collections.abc import Callable

import sympy

from exprl_jax.reward.verifiers.math_answers.expression import NotUnderstood
from exprl_jax.reward.verifiers.math_answers.kinds import Inequality, Region


def inequality(left: sympy.Expr, sign: str, right: sympy.Expr) -> Inequality:
    """`left sign right` as a difference and one of the signs that point one way."""
    if sign in (">", r"\ge"):
        left, right = right, left
    return Inequality(left - right, {">": "<", r"\ge": r"\le"}.get(sign, sign))


def joined(regions: list[Region], words: set[str]) -> Region:
    """What several say, with those words between them.

    Raises:
      NotUnderstood: they are of several unknowns, or the words are not one of "and" and "or".
    """
    if len({region.name for region in regions}) > 1 or words not in ({"or"}, {"and"}):
        raise NotUnderstood("inequalities, with what between them?")
    combine = sympy.Union if words == {"or"} else sympy.Intersection
    return Region(combine(*(region.points for region in regions)), regions[0].name)


def solutions(left: sympy.Expr, sign: str, right: sympy.Expr, symbol: sympy.Symbol) -> sympy.Set:
    """The real numbers for which `left sign right`.

    Raises:
      NotUnderstood: it compares complex numbers, or SymPy cannot solve it.
    """
    if not all(side.is_real is not False for side in (left, right)):
        raise NotUnderstood("an order of complex numbers")
    if not left.free_symbols:
        left, right = right, left
        sign = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}.get(sign, sign)
    if left == symbol and not right.free_symbols:
        makers: dict[str, Callable[[], sympy.Set]] = {
            "<": lambda: sympy.Interval.open(-sympy.oo, right),
            ">": lambda: sympy.Interval.open(right, sympy.oo),
            r"\le": lambda: sympy.Interval(-sympy.oo, right),
            r"\ge": lambda: sympy.Interval(right, sympy.oo),
            r"\ne": lambda: sympy.Complement(sympy.S.Reals, sympy.FiniteSet(right)),
        }
        return makers[sign]()
    relation = {"<": sympy.Lt, ">": sympy.Gt, r"\le": sympy.Le, r"\ge": sympy.Ge, r"\ne": sympy.Ne}[sign]
    real = sympy.Symbol(symbol.name, real=True)
    try:
        return sympy.solveset(relation(left.subs(symbol, real), right.subs(symbol, real)), real, sympy.S.Reals)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise NotUnderstood("an inequality that SymPy cannot solve") from error
