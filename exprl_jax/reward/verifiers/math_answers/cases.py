r"""Functions by cases: `\begin{cases} x & x \ge 0 \\ -x & \text{otherwise} \end{cases}`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import sympy

from exprl_jax.reward.verifiers.math_answers.kinds import Body, Cases, Number, Region, Statement
from exprl_jax.reward.verifiers.math_answers.tokens import Token, split, stripped

_CONDITIONS = ("if", "for", "when", "where")
_ELSE = ("otherwise", "else")


def read(inner: Sequence[Token], body: Callable[[Sequence[Token]], Body]) -> Cases | None:
    """A function by cases of one unknown; None if a case is no expression, or its condition no set of numbers.

    Args:
      inner: what the environment holds.
      body: reads a part as a kind of its own.
    """
    rows, _ = split(inner, lambda token: token.text == r"\\")
    values: list[sympy.Expr] = []
    where: list[sympy.Set] = []
    names: set[str] = set()
    for row in rows:
        if not row:
            continue
        parts, _ = split(row, lambda token: token.text == "&")
        value, condition = (stripped(part) for part in parts) if len(parts) == 2 else ([], [])
        while condition and condition[0].is_word(*_CONDITIONS):
            condition = condition[1:]
        read_value = body(value) if value and condition else None
        if not isinstance(read_value, (Number, Statement)) or read_value.value is None:
            return None
        if isinstance(read_value, Number) and (read_value.unit or read_value.things):
            return None
        if condition[0].is_word(*_ELSE) and len(condition) == 1:
            points = sympy.Complement(sympy.S.Reals, sympy.Union(*where))
        else:
            lies = body(condition)
            points = _points(lies)
            names.add(str(getattr(lies, "name", "")))
        if points is None:
            return None
        values.append(read_value.value)
        where.append(points)
    return Cases(names.pop(), tuple(values), tuple(where)) if len(values) > 1 and len(names) == 1 else None


def _points(body: Body) -> sympy.Set | None:
    if isinstance(body, Region):
        return body.points
    if getattr(body, "name", None) and isinstance(getattr(body, "value", None), Number):  # x = 0
        return sympy.FiniteSet(body.value.value)
    return None
