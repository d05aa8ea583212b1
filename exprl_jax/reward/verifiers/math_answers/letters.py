r"""Letters that run over a set, `k\in\mathbb{Z}`: what they are called says nothing."""

from __future__ import annotations

import sympy

from exprl_jax.reward.verifiers.math_answers.kinds import Answer, Body, Items, Named, Number, Statement

# What a letter that counts is called where nothing is said of it.
COUNTERS = frozenset("ijklmnKMN")


def renamed(expected: Answer, got: Answer) -> Answer:
    r"""An answer in the letters of the reference, where each has one letter that runs over whole numbers.

    `\pi/4 + n\pi, n\in\mathbb{Z}` is then `\pi/4 + k\pi`, with `k\in\mathbb{Z}` or without.
    """
    (letter, kind), *more = got.domains or (("", ""),)
    if more or not letter or not kind:
        return got
    mine, theirs = free(expected.body), free(got.body)
    own = [name for name, own_kind in expected.domains if own_kind] or sorted(COUNTERS & mine - theirs)
    if len(own) != 1 or own[0] == letter or letter in mine or own[0] in theirs or letter not in theirs:
        return got
    return got._replace(body=_renamed(got.body, {sympy.Symbol(letter): sympy.Symbol(own[0])}))


def free(body: Body) -> set[str]:
    """The letters of an answer."""
    if isinstance(body, Items):
        return set().union(*map(free, body.items))
    if isinstance(body, Named):
        return free(body.value)
    value = body.value if isinstance(body, (Number, Statement)) else None
    return set() if value is None else {symbol.name for symbol in value.free_symbols}


def _renamed(body: Body, letters: dict[sympy.Symbol, sympy.Symbol]) -> Body:
    if isinstance(body, Items):
        return body._replace(items=tuple(_renamed(item, letters) for item in body.items))
    if isinstance(body, Named):
        difference = None if body.difference is None else body.difference.xreplace(letters)
        return body._replace(value=_renamed(body.value, letters), difference=difference)
    if isinstance(body, Statement) and body.value is not None:
        names = {old.name: new.name for old, new in letters.items()}
        words = tuple(names.get(word, word) for word in body.words)
        return Statement(words, body.value.xreplace(letters))
    if isinstance(body, Number):
        return body._replace(value=body.value.xreplace(letters))
    return body
