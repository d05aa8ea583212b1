r"""Congruences: `x \equiv 3 \pmod 7`, `n \equiv \pm 1 (mod 5)`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from exprl_jax.reward.verifiers.math_answers.kinds import Body, Congruence, Items, Number, Statement
from exprl_jax.reward.verifiers.math_answers.tokens import Token, split, stripped, texts

_COMMANDS = {r"\pmod", r"\bmod", r"\mod", r"\pod"}


def read(tokens: Sequence[Token], body: Callable[[Sequence[Token]], Body]) -> Congruence | None:
    """A congruence of a letter; None of anything else.

    Args:
      tokens: all of them.
      body: reads a part as a kind of its own.
    """
    at = next((at for at, token in enumerate(tokens) if token.text in _COMMANDS or token.is_word("mod")), None)
    if at is None:
        return None
    bracket = at and tokens[at - 1].text == "(" and tokens[-1].text == ")"
    sides, signs = split(tokens[: at - bool(bracket)], lambda token: token.text in (r"\equiv", "="))
    modulus = stripped(tokens[at + 1 : len(tokens) - bool(bracket)])
    if len(signs) != 1 or signs[0].text != r"\equiv" or len(modulus) != 1 or not modulus[0].text.isdecimal():
        return None
    size, left = int(modulus[0].text), sides[0]
    remainders = _whole_numbers(body(sides[1])) if sides[1] else None
    if not size or not remainders or len(left) != 1 or not isinstance(body(left), Statement):
        return None
    return Congruence("".join(texts(left)), frozenset(remainder % size for remainder in remainders), size)


def _whole_numbers(body: Body) -> list[int] | None:
    items = body.items if isinstance(body, Items) and not body.brackets else (body,)
    is_whole = all(isinstance(item, Number) and item.unit is None and item.value.is_Integer for item in items)
    return [int(item.value) for item in items] if is_whole else None
