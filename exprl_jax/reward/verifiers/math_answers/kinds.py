"""The kinds of answers."""

from __future__ import annotations

from typing import NamedTuple

import sympy

from exprl_jax.reward.verifiers.math_answers import units


class Number(NamedTuple):
    r"""A value of any kind, a formula or a matrix too.

    Attributes:
      value: without its unit.
      unit: None of a plain number.
      things: what is counted, and its power.
      decimal: the numeral's plain form, if the answer is one and has a decimal point or a power of ten.
      inexact: a decimal that may be rounded stands somewhere in it.
      rounded: it is said to be about right: `\approx 3.14`.
    """

    value: sympy.Expr
    unit: units.Unit | None = None
    things: tuple[tuple[str, sympy.Expr], ...] = ()
    decimal: str | None = None
    inexact: bool = False
    rounded: bool = False


class Items(NamedTuple):
    """Several answers: in `brackets` "{}" a set, in "" a list, in "()", "[]", "(]" and "[)" a tuple or an interval.

    Attributes:
      brackets: around them.
      items: the answers.
      either: whether an "or" stands between them.
    """

    brackets: str
    items: tuple[Body, ...]
    either: bool = False


class Region(NamedTuple):
    """A set of real numbers, and the unknown that lies in it, if that has a name."""

    points: sympy.Set
    name: sympy.Symbol | None = None


class Named(NamedTuple):
    """`name = value`; `difference` is zero where that holds, None if the name is no expression."""

    name: str
    value: Body
    difference: sympy.Expr | None = None


class Equation(NamedTuple):
    """An equation that names no value; `value` is its side without unknowns, where the other side has several."""

    difference: sympy.Expr
    value: Number | None = None


class Inequality(NamedTuple):
    r"""`difference sign 0` in several unknowns; the sign is `<`, `\le` or `\ne`."""

    difference: sympy.Expr
    sign: str


class Congruence(NamedTuple):
    """`name` leaves one of some remainders, each below the modulus."""

    name: str
    remainders: frozenset[int]
    modulus: int


class Cases(NamedTuple):
    """A function by cases: its values, each where the unknown of that name lies in a set of real numbers."""

    name: str
    values: tuple[sympy.Expr, ...]
    where: tuple[sympy.Set, ...]


class Date(NamedTuple):
    """A day; its year where it has one."""

    month: int
    day: int
    year: int | None


class Ratio(NamedTuple):
    """`3:4:5`."""

    parts: tuple[sympy.Expr, ...]


class Clock(NamedTuple):
    """A time of day: seconds since twelve, in the "am" or "pm" half if it says; `ratio` if it may be one, `3:45`."""

    seconds: int
    half: str
    ratio: Ratio | None


class Numeral(NamedTuple):
    """Digits in a base."""

    digits: str
    base: int


class Ordinal(NamedTuple):
    """`21st`."""

    place: int


class Option(NamedTuple):
    """An option's letter and what stands behind it: `(B) 12`."""

    letter: str
    rest: Body | None


class Statement(NamedTuple):
    """Words, or what is of no other kind; `value` if its letters may be a product of variables."""

    words: tuple[str, ...]
    value: sympy.Expr | None = None


NOTHING = Statement((r"\emptyset",))
Body = (
    Number
    | Items
    | Region
    | Named
    | Equation
    | Inequality
    | Congruence
    | Cases
    | Date
    | Ratio
    | Clock
    | Numeral
    | Ordinal
    | Option
    | Statement
)


class Answer(NamedTuple):
    """What a box says.

    Attributes:
      body: one of the kinds.
      words: its tokens.
      domains: what its letters run over, `(("n", "N"),)`.
      condition: the tokens of another condition, `if x > 0`.
    """

    body: Body
    words: tuple[str, ...]
    domains: tuple[tuple[str, str], ...] = ()
    condition: tuple[str, ...] = ()


def region(body: Body) -> Region | None:
    """The set of real numbers that an interval, a set of numbers or a region is; None of anything else."""
    if isinstance(body, Region):
        return body
    if body == NOTHING:
        return Region(sympy.S.EmptySet)
    if not isinstance(body, Items) or not all(map(_is_real, body.items)):
        return None
    numbers = [item.value for item in body.items]
    if body.brackets == "{}":
        return Region(sympy.FiniteSet(*numbers))
    if len(numbers) != 2 or not body.brackets:
        return None
    opens = body.brackets[0] == "(", body.brackets[1] == ")"
    return Region(sympy.Interval(*numbers, *opens))


def _is_real(body: Body) -> bool:
    return isinstance(body, Number) and body.unit is None and body.value.is_extended_real is True
