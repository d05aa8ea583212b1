r"""What an answer is: a number with its unit, a set, an interval, an equation, a statement ...

`read` tries the kinds from the strictest on; what is none of them is a statement, its tokens word for word.  Nothing is
dropped on the way but what says nothing: `The answer is`, `(correct)`, `for all n`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import sympy

from exprl_jax.reward.verifiers import math_expression, math_units, math_words
from exprl_jax.reward.verifiers.math_expression import Incomplete, NotUnderstood
from exprl_jax.reward.verifiers.math_identity import same_value
from exprl_jax.reward.verifiers.math_tokens import Token, tokenize


class Number(NamedTuple):
    """A value of any kind, an expression or a matrix too.

    Attributes:
      value: without its unit.
      unit: None of a plain number.
      nouns: what is counted, and its power.
      decimal: the numeral, if the answer is one and has a decimal point or a power of ten.
      inexact: a decimal stands somewhere in it.
      rounded: it is said to be about right, `\approx 3.14`.
    """

    value: sympy.Basic
    unit: math_units.Unit | None = None
    nouns: tuple[tuple[str, sympy.Expr], ...] = ()
    decimal: str | None = None
    inexact: bool = False
    rounded: bool = False


class Items(NamedTuple):
    """Several answers: in `brackets` "{}" a set, in "" a list, in "()", "[]", "(]" and "[)" a tuple or an interval."""

    brackets: str
    items: tuple[Any, ...]


class Region(NamedTuple):
    """A set of real numbers, and the unknown that lies in it, if it has a name."""

    points: sympy.Set
    name: sympy.Symbol | None = None


class Named(NamedTuple):
    """`name = value`; `difference` is zero where that holds, None if the name is no expression."""

    name: str
    value: Any
    difference: sympy.Expr | None = None


class Equation(NamedTuple):
    """An equation that names no value; `value` is its side without unknowns, where the other side has several."""

    difference: sympy.Expr
    value: Number | None = None


class Inequality(NamedTuple):
    """`difference < 0`, `<= 0` or `!= 0`, in several unknowns."""

    difference: sympy.Expr
    sign: str


class Ratio(NamedTuple):
    """`3:4:5`."""

    parts: tuple[sympy.Expr, ...]


class Clock(NamedTuple):
    """A time of day: seconds after twelve or, where `half` is empty, after midnight or twelve; `ratio` as a ratio."""

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


class Choice(NamedTuple):
    """An option's letter and what stands behind it: `(B) 12`."""

    letter: str
    rest: Any


class Statement(NamedTuple):
    """Words, or what is none of the other kinds; `value` if letters alone may be a product of variables."""

    words: tuple[str, ...]
    value: sympy.Expr | None = None


class Answer(NamedTuple):
    """What a box says.

    Attributes:
      body: one of the kinds above.
      words: its tokens.
      domains: what its letters run over, `{"n": "N"}`; says nothing new where the other side has none.
      condition: the tokens of another condition, `if x > 0`.
    """

    body: Any
    words: tuple[str, ...]
    domains: tuple[tuple[str, str], ...] = ()
    condition: tuple[str, ...] = ()


class Unreadable(ValueError):
    """Text that is no answer of any kind: nothing, or half of something."""


_OPENERS = {"(", "[", "{", r"\{", r"\lfloor", r"\lceil"}
_ENDERS = {")", "]", "}", r"\}", r"\rfloor", r"\rceil"}
_EQUALS, _ABOUT = {"=", r"\equiv", ":="}, {r"\approx"}
_ORDERS = {"<", ">", r"\le", r"\ge", r"\ne"}
_SETS = {
    "R": sympy.S.Reals,
    "Z": sympy.S.Integers,
    "N": sympy.S.Naturals,
    "Q": sympy.S.Rationals,
    "C": sympy.S.Complexes,
}
_TRIGONOMETRIC = {r"\sin", r"\cos", r"\tan", r"\cot", r"\sec", r"\csc"}

_ADJECTIVE = r"(?:positive|non ?negative|natural|whole|real|rational|complex)"
_NOUN = r"(?:integers?|numbers?|reals?|rationals?|naturals?|constants?)"
_DOMAIN = re.compile(
    rf"[,(]? ?(?:(?:for|where|with|\\forall),? )*(?:any |all |every |each |an? |arbitrary )*(?P<kind>(?:{_ADJECTIVE} )*(?:{_NOUN} ?)?)"
    r"(?P<letters>\\?[A-Za-z]+(?: , [A-Za-z])*)?(?: (?:(?:\\in|in)|(?:is|are|be)(?: any| an?)?) "
    rf"(?P<set>\\mathbb {{ [A-Z] }}(?: \^ (?:{{ )?[+*](?: }})?| _ (?:{{ )?[+>\\ge0 ]+(?: }})?)?|(?:{_ADJECTIVE} )*{_NOUN}))? ?\)?"
)
_KINDS = {
    "constant": "", "real constant": "R", "arbitrary constant": "",
    "": "", "integer": "Z", "real number": "R", "real": "R", "positive integer": "N", "natural number": "N", "natural": "N",
    "whole number": "N0", "nonnegative integer": "N0", "non negative integer": "N0", "rational number": "Q",
    "rational": "Q", "positive real number": "R+", "positive real": "R+", "complex number": "C", "number": "",
    "arbitrary": "",
}  # fmt: skip
_CONDITIONS = {
    "for",
    "where",
    "with",
    "if",
    "when",
    "whenever",
    "provided",
    "unless",
    "given",
    "such",
    "except",
    "otherwise",
}


def read(text: str, grouping: bool = True, bare_units: bool = True) -> Answer:
    """Reads an answer.

    Args:
      text: what a box holds.
      grouping: as in `tokenize`.
      bare_units: as in `math_expression.parse`.

    Raises:
      Unreadable: it is empty, or half of something.
    """
    try:
        tokens = _stripped(tokenize(text, grouping))
    except ValueError as error:
        raise Unreadable(str(error)) from error
    if not any(token.kind in ("number", "word") or token.text in _LONE for token in tokens):
        raise Unreadable("no word and no number")
    # The French way to write open ends: `]0, 1[`.
    if tokens[0].text == "]":
        tokens[0] = tokens[0]._replace(text="(")
    if tokens[-1].text == "[":
        tokens[-1] = tokens[-1]._replace(text=")")
    depth = sum((token.text in _OPENERS) - (token.text in _ENDERS) for token in tokens if token.kind != "word")
    if depth or any(a.text == "{" and b.text == "}" for a, b in zip(tokens, tokens[1:], strict=False)):
        raise Unreadable("a bracket without its other half, or nothing in one")
    words = _texts(tokens)
    tokens, domains, condition = _without_conditions(tokens)
    try:
        return Answer(_Reader(bare_units).answer(tokens), words, domains, condition)
    except Incomplete as error:
        raise Unreadable(str(error)) from error


_LONE = {r"\infty", r"\emptyset", r"\pi", r"\{", *(math_expression.LETTERS)}


def _stripped(tokens: Sequence[Token]) -> list[Token]:
    """Without the full stop or comma at the end, and without braces around everything."""
    tokens = list(tokens)
    while tokens and tokens[-1].kind == "mark" and tokens[-1].text in (".", ",", ";"):
        tokens.pop()
    while len(tokens) > 1 and tokens[0].text == "{" and _closing(tokens, 0) == len(tokens) - 1:
        tokens = tokens[1:-1]
    return tokens


def _closing(tokens: Sequence[Token], start: int) -> int:
    """Where the bracket at `start` closes, by any bracket; the length if it does not."""
    depth = 0
    for index in range(start, len(tokens)):
        token = tokens[index]
        depth += _step(token)
        if not depth:
            return index
    return len(tokens)


def _step(token: Token) -> int:
    if token.kind in ("begin", "end"):
        return 1 if token.kind == "begin" else -1
    return (token.text in _OPENERS) - (token.text in _ENDERS) if token.kind != "word" else 0


def _split(tokens: Sequence[Token], is_separator: Callable[[Token], bool]) -> tuple[list[list[Token]], list[Token]]:
    """The parts between separators outside brackets, and the separators."""
    parts, separators, depth = [[]], [], 0
    for token in tokens:
        depth += _step(token)
        if not depth and is_separator(token) and _step(token) == 0:
            parts.append([])
            separators.append(token)
        else:
            parts[-1].append(token)
    return parts, separators


def _is_word(token: Token, *words: str) -> bool:
    return token.kind == "word" and token.roman and token.text.casefold() in words


def _texts(tokens: Sequence[Token]) -> tuple[str, ...]:
    """The tokens' texts, without braces around a single one: `x_{1}` is `x_1`."""
    texts = [token.text for token in tokens if not (token.kind == "mark" and token.roman and token.text in ".,")]
    short: list[str] = []
    for text in texts:
        short.append(text)
        if text == "}" and len(short) > 2 and short[-3] == "{":
            short[-3:] = [short[-2]]
    return tuple(short)


# --- conditions ------------------------------------------------------------------------------------------------------


def _without_conditions(
    tokens: list[Token],
) -> tuple[list[Token], tuple[tuple[str, str], ...], tuple[str, ...]]:
    """The answer, what its letters run over, and any other condition."""
    if _is_word(tokens[0], "for") or tokens[0].text == r"\forall":
        commas = [index for index, token in enumerate(tokens) if token.text == ","]
        if commas:
            tokens = tokens[commas[-1] + 1 :] + tokens[: commas[-1]]
    at = _start_of_condition(tokens)
    if at is None:
        return tokens, (), ()
    head, tail = _stripped(tokens[:at]), tokens[at:]
    domains = _domains(tail)
    return head, domains or (), _texts(tail) if domains is None else ()


def _start_of_condition(tokens: list[Token]) -> int | None:
    depth = 0
    for index, token in enumerate(tokens):
        if index and not depth:
            if _is_word(token, *_CONDITIONS) or token.text == r"\forall":
                return index
            letter = tokens[index + 1 : index + 3]
            starts = token.text in (",", ";") or token.text == "(" and _closing(tokens, index) == len(tokens) - 1
            if starts and len(letter) == 2 and letter[0].kind == "word" and letter[1].text == r"\in":
                return index
        depth += _step(token)
    return None


def _domains(tokens: list[Token]) -> tuple[tuple[str, str], ...] | None:
    """What letters run over, as a condition says; None if it says anything else."""
    match = _DOMAIN.fullmatch(" ".join(token.text for token in tokens))
    if (
        not match
        or match["letters"]
        and len(match["letters"].split(" , ")[0].lstrip("\\")) > 1
        and match["letters"][0] != "\\"
    ):
        return None
    kinds = [_kind(match[group]) for group in ("kind", "set") if match[group]]
    if None in kinds or not (kinds or match["letters"]):
        return None
    letters = (match["letters"] or "").split(" , ")
    return tuple((letter, kind) for letter in letters for kind in kinds or [""])


def _kind(text: str) -> str | None:
    text = text.strip()
    if text.startswith(r"\mathbb"):
        name = re.search("[A-Z]", text)[0] + "+" * ("+" in text or ">" in text)
        return {"Z+": "N"}.get(name, name)
    return _KINDS.get(re.sub(r"s$", "", text.replace("numbers", "number").replace("integers", "integer")))


# --- kinds -----------------------------------------------------------------------------------------------------------


class _Reader:
    """Reads tokens as the first kind that understands all of them."""

    def __init__(self, bare_units: bool):
        self._bare_units = bare_units

    def answer(self, tokens: Sequence[Token]) -> Any:
        """One of the kinds.

        Raises:
          Incomplete: the tokens end in the middle of an expression.
          NotUnderstood: there are none.
        """
        tokens = _stripped(tokens)
        if not tokens:
            raise NotUnderstood("nothing between two separators")
        kinds = (
            self._special, self._letters, self._remarked, self._quantity, self._several, self._related, self._combined,
            self._bracketed, self._option, self._ratio, self._about,
        )  # fmt: skip
        incomplete = None
        for kind in kinds:
            try:
                value = kind(tokens)
            except Incomplete as error:
                incomplete = incomplete or error
            except NotUnderstood:
                continue
            else:
                if value is not None:
                    return value
        if incomplete and not any(token.roman for token in tokens):
            raise incomplete
        return Statement(math_words.statement(_texts(tokens)))

    def _expression(self, tokens: Sequence[Token]) -> sympy.Expr:
        return math_expression.parse(tokens, self._bare_units)

    def _letters(self, tokens: list[Token]) -> Statement | None:
        """A word, or letters that may be a product of variables as well: `AB`, `x`."""
        inner = tokens[1:-1] if len(tokens) == 3 and tokens[0].text == "(" and tokens[2].text == ")" else tokens
        if len(inner) != 1 or inner[0].kind != "word":
            return None
        word = inner[0]
        if word.roman and len(word.text) > 1:
            number = math_words.read_number((word.text.casefold(),))
            if number is not None or word.text.casefold() in ("none", "noon", "midnight", "pi"):
                return None
            if math_words.read_ordinal([word.text.casefold()]):
                return None
        plain = len(word.text) <= 5 and word.text != "pi" and (len(word.text) == 1 or not word.roman)
        value = self._expression([word._replace(roman=False)]) if plain else None
        return Statement(math_words.statement([word.text]), value)

    def _special(self, tokens: list[Token]) -> Any:
        """Constants, numerals, times of day and ordinals."""
        texts = _texts(tokens)
        joined, words = "".join(texts), [text.casefold() for text in texts]
        if joined in (r"\emptyset", r"\{\}"):
            return Statement((r"\emptyset",))
        if words == ["none"]:
            return Number(sympy.Integer(0))
        if match := re.fullmatch(r"\\mathbb\{?([A-Z])\}?|\\([A-Z])", joined):
            points = _SETS.get(match[1] or match[2])
            return Region(points) if points is not None else None
        statement = math_words.statement(texts)
        if statement in ((r"\mathbb { r }",), (r"\mathbb { z }",)):
            return Region(_SETS[statement[0][10].upper()])
        if statement in ((r"\infty",), (r"\emptyset",)):
            return Number(sympy.oo) if statement == (r"\infty",) else Statement(statement)
        numeral = re.fullmatch(
            r"\(?([0-9][0-9A-F]*|[A-F][0-9A-F]*)\)?(?:_[({]*([0-9]{1,2})[)}]*|(?:in)?base([0-9]{1,2}))", joined
        )
        if numeral and 2 <= int(numeral[2] or numeral[3]) <= 36:
            return Numeral(numeral[1], int(numeral[2] or numeral[3]))
        if match := re.fullmatch(r"(\d+)(?:\^\{?)?(st|nd|rd|th)\}?", joined.lower()):
            return Ordinal(int(match[1])) if match[2] == _suffix(int(match[1])) else None
        if all(token.roman for token in tokens) and (place := math_words.read_ordinal(words[words[0] == "the" :])):
            return Ordinal(place)
        return _clock(joined.lower())

    def _quantity(self, tokens: list[Token]) -> Number | None:
        """An expression with its unit; a unit alone is none."""
        value = self._expression(tokens)
        value, unit, nouns = _measured(value)
        if value == 1 and (unit or nouns) and not _has_number(tokens):
            return None
        numbers = [token.text for token in tokens if token.kind == "number"]
        inexact = any(("." in number or "e" in number) and "(" not in number for number in numbers)
        return Number(value, unit, nouns, _decimal(tokens), inexact)

    def _remarked(self, tokens: list[Token]) -> Any:
        """An answer with a remark in brackets behind it, `(correct)`, or with itself in words, `5 (five)`."""
        if tokens[-1].text != ")":
            return None
        starts = [
            index
            for index, token in enumerate(tokens)
            if index and token.text == "(" and _closing(tokens, index) == len(tokens) - 1
        ]
        if not starts or not any(token.roman for token in tokens[starts[0] + 1 : -1] if token.kind == "word"):
            return None
        value, inner = self.answer(tokens[: starts[0]]), tokens[starts[0] + 1 : -1]
        if tuple(text.casefold() for text in _texts(inner)) in math_words.REMARKS:
            return value
        again = self.answer(inner)
        if (
            isinstance(value, Number)
            and isinstance(again, Number)
            and value.unit == again.unit
            and same_value(value.value, again.value)
        ):
            return value
        raise NotUnderstood("a remark that is not understood")

    def _about(self, tokens: list[Token]) -> Number | None:
        """A number that is said to be about right."""
        if tokens[0].text in _ABOUT or _is_word(tokens[0], *math_words.APPROXIMATE):
            value = self.answer(tokens[1:])
            return value._replace(rounded=True) if isinstance(value, Number) else None
        return None

    def _several(self, tokens: list[Token]) -> Any:
        """Answers with commas, "and" or "or" between them, and the two of a plus-minus sign."""
        parts, separators = _split(
            tokens, lambda token: token.text in (",", ";") and token.kind == "mark" or _is_word(token, "and", "or")
        )
        if len(parts) == 1:
            return self._two(tokens)
        doubled = [_is_word(separator, "and", "or") for separator in separators] + [False]
        parts = [
            part for part, before_word in zip(parts, doubled, strict=True) if part or not before_word
        ]  # `2, and 3`
        if any(token.text == "…" for token in tokens) or not all(parts):
            raise NotUnderstood("a series that goes on")
        if len(parts) == 1:
            raise NotUnderstood("one part beside a separator")
        items: list[Any] = []
        for part in parts:
            item = self.answer(part)
            items += item.items if isinstance(item, Items) and not item.brackets and r"\pm" in _texts(part) else [item]
        if all(isinstance(item, Region) for item in items):
            return _joined(items, {separator.text.casefold() for separator in separators})
        return Items("", _shared_name(items))

    def _two(self, tokens: list[Token]) -> Items | None:
        if not any(token.text in (r"\pm", r"\mp") for token in tokens):
            return None
        signs = ({r"\pm": "+", r"\mp": "-"}, {r"\pm": "-", r"\mp": "+"})
        both = [
            [
                token._replace(kind="mark", text=sign.get(token.text, token.text)) if token.text in sign else token
                for token in tokens
            ]
            for sign in signs
        ]
        return Items("", tuple(map(self.answer, both)))

    def _related(self, tokens: list[Token]) -> Any:
        """Equations, inequalities and what lies in a set."""
        if _is_word(tokens[0], "all") and len(tokens) > 2 and tokens[1].kind == "word" and tokens[2].text in _ORDERS:
            tokens = tokens[1:]
        sides, signs = _split(
            tokens, lambda token: token.text in _EQUALS | _ABOUT | _ORDERS | {r"\in"} or _is_word(token, "is", "equals")
        )
        if len(sides) == 1:
            head, colons = _split(tokens, lambda token: token.text == ":")
            if not colons or not head[0] or not all(token.roman and len(token.text) > 1 for token in head[0]):
                return None
            sides, signs = [head[0], tokens[len(head[0]) + 1 :]], [Token("mark", "=")]
        kinds = {"=" if token.text in _EQUALS or token.kind == "word" else token.text for token in signs}
        if kinds <= {"="} | _ABOUT:
            return self._equation(sides, signs)
        if kinds <= _ORDERS:
            return self._inequality(sides, signs)
        if kinds == {r"\in"} and len(sides) == 2:
            return self._member(*sides)
        raise NotUnderstood("several relations")

    def _equation(self, sides: list[list[Token]], signs: list[Token]) -> Any:
        if not sides[0]:
            return self._about([signs[0], *sides[1]]) if len(sides) == 2 and signs[0].text in _ABOUT else None
        names = [index for index, side in enumerate(sides) if self._is_name(side, index == 0)]
        if len(names) == len(sides):
            names = names[:-1]
        values: list[Any] = []
        for index, side in enumerate(sides):
            if index not in names:
                value = self.answer(side)
                about = index and signs[index - 1].text in _ABOUT and isinstance(value, Number)
                values.append(value._replace(rounded=True) if about else value)
        if any(isinstance(value, Statement) and value.value is None for value in values) and any(
            token.kind == "word" for token in signs
        ):
            raise NotUnderstood("a sentence")
        if all(_agree(values[0], value) for value in values[1:]):
            value = values[0]
            return self._named(sides[names[0]], value) if names else value
        if not names and len(sides) == 2 and all(isinstance(value, (Number, Statement)) for value in values):
            left, right = map(_plain, values)
            if (left - right).free_symbols:
                bare = [
                    side
                    for side, other in ((left, right), (right, left))
                    if not side.free_symbols and len(other.free_symbols) > 1
                ]
                return Equation(left - right, Number(bare[0]) if bare else None)
        raise NotUnderstood("sides that differ")

    def _is_name(self, tokens: list[Token], first: bool) -> bool:
        """Whether a side of an equation only names what the other side says."""
        texts = _texts(tokens)
        if len(tokens) == 1 and tokens[0].kind == "word" and not tokens[0].roman:
            return True
        if first and any(token.roman and len(token.text) > 1 for token in tokens):
            words = {token.text.casefold() for token in tokens}
            return not words & math_words.DENIALS and not any(token.kind == "number" for token in tokens)
        if (
            len(tokens) > 3
            and tokens[0].kind == "word"
            and len(tokens[0].text) == 1
            and _closing(tokens, 1) == len(tokens) - 1
            and tokens[1].text == "("
        ):
            return True
        if first and texts[0] == "(" and _closing(tokens, 0) == len(tokens) - 1:
            return all(
                len(part) == 1 and part[0].kind == "word"
                for part in _split(tokens[1:-1], lambda token: token.text == ",")[0]
            )
        if first and (":" in texts or texts[0] in _TRIGONOMETRIC or re.match(r"\\frac\{d.*\}\{d.+\}$", "".join(texts))):
            return True
        try:
            value = self._expression(tokens)
        except NotUnderstood:
            return False
        return isinstance(value, (sympy.Symbol, sympy.core.function.AppliedUndef))

    def _named(self, side: list[Token], value: Any) -> Any:
        if (
            side[0].text == "("
            and isinstance(value, Items)
            and len(value.items) == len(letters := [token.text for token in side[1:-1] if token.kind == "word"])
        ):
            return Items("()", tuple(Named(letter, item) for letter, item in zip(letters, value.items, strict=True)))
        if side[0].text == "(":
            raise NotUnderstood("as many values as names")
        difference = None
        if not any(token.roman and len(token.text) > 1 for token in side) and isinstance(value, (Number, Statement)):
            value = Number(value.value) if value.value is not None and isinstance(value, Statement) else value
            try:
                difference = self._expression(side) - _plain(value)
            except (NotUnderstood, TypeError):
                difference = None
        name = "".join(_texts(side))
        if difference is not None and len(name) == 1 and sympy.Symbol(name) in _plain(value).free_symbols:
            return Equation(difference)
        return Named(name, value, difference)

    def _inequality(self, sides: list[list[Token]], signs: list[Token]) -> Region | Inequality:
        values = [self._expression(side) for side in sides]
        symbols = set().union(*(value.free_symbols for value in values))
        if len(symbols) == 1:
            (symbol,) = symbols
            points = sympy.S.Reals
            for left, sign, right in zip(values, signs, values[1:], strict=False):
                points = points.intersect(_solutions(left, sign.text, right, symbol))
            return Region(points, symbol)
        if len(sides) != 2 or not symbols:
            raise NotUnderstood("an inequality of numbers, or a chain in several unknowns")
        left, right = values if signs[0].text in ("<", r"\le", r"\ne") else values[::-1]
        return Inequality(left - right, {">": "<", r"\ge": r"\le"}.get(signs[0].text, signs[0].text))

    def _member(self, left: list[Token], right: list[Token]) -> Any:
        if not self._is_name(left, True):
            raise NotUnderstood("an element that is no unknown")
        value = self.answer(right)
        points = region(value)
        if points is not None and not (isinstance(value, Items) and value.brackets == "{}"):
            return Region(points.points, sympy.Symbol("".join(_texts(left))))
        return value

    def _combined(self, tokens: list[Token]) -> Region | None:
        """Unions, intersections and differences of sets."""
        for signs, combine in (
            ({r"\cup"}, sympy.Union),
            ({r"\cap"}, sympy.Intersection),
            ({r"\setminus", "-"}, sympy.Complement),
        ):
            parts, found = _split(tokens, lambda token: token.text in signs)
            if not found:
                continue
            regions = [region(self.answer(part)) for part in parts]
            if None in regions:
                raise NotUnderstood("a set operation on what is no set")
            points = regions[0].points
            for other in regions[1:]:
                points = combine(points, other.points)
            return Region(points)
        return None

    def _bracketed(self, tokens: list[Token]) -> Any:
        first, last = tokens[0].text, tokens[-1].text
        if tokens[0].kind == "begin" and first == "cases":
            rows, _ = _split(tokens[1:-1], lambda token: token.text == r"\\")
            if any(token.text == "&" for token in tokens):
                raise NotUnderstood("a function by cases")
            return Items("", tuple(self.answer(row) for row in rows if row))
        if _closing(tokens, 0) != len(tokens) - 1:
            return None
        inner = tokens[1:-1]
        if first == r"\{" and last == r"\}":
            return self._set(inner)
        if first not in "([" or last not in ")]":
            return None
        parts, _ = _split(inner, lambda token: token.text in (",", ";"))
        if len(parts) == 1:
            return self.answer(inner) if first + last == "()" else None
        return Items(first + last, tuple(map(self.answer, parts)))

    def _set(self, inner: list[Token]) -> Any:
        builder, bars = _split(inner, lambda token: token.text in (":", "|"))
        if len(bars) == 1 and len(builder) == 2:
            element = self.answer(builder[0])
            value = self.answer(builder[1])
            named = isinstance(element, Statement) or isinstance(element, Region) and element.points == sympy.S.Reals
            if named and isinstance(value, Region):
                return Region(value.points)
            return Statement((*_texts(builder[0]), "|", *_texts(builder[1])))
        value = self.answer(inner)
        items = value.items if isinstance(value, Items) and not value.brackets else (value,)
        return Items("{}", items)

    def _ratio(self, tokens: list[Token]) -> Ratio | None:
        parts, _ = _split(tokens, lambda token: token.text == ":" or _is_word(token, "to"))
        if len(parts) == 1:
            return None
        values = tuple(map(self._expression, parts))
        if any(value.free_symbols and math_expression.is_unit(value) for value in values):
            raise NotUnderstood("a ratio of units")
        return Ratio(values)

    def _option(self, tokens: list[Token]) -> Choice | None:
        r"""An option's letter, alone or before its text: `Option B`, `(B) 12`, `B. 12`."""
        tokens = tokens[_is_word(tokens[0], "option", "choice", "answer") :]
        bracket = bool(tokens) and tokens[0].text == "("
        rest = tokens[bracket:]
        if not rest or rest[0].kind != "word" or not re.fullmatch("[A-J]", rest[0].text):
            return None
        behind = rest[1:]
        if bracket or behind:
            closers = [")"] if bracket else [")", "."] + [":"] * rest[0].roman
            if not behind or behind[0].text not in closers:
                return None
            behind = behind[1:]
        if behind and not behind[0].space and not rest[0].roman:
            return None
        return Choice(rest[0].text, self.answer(behind) if behind else None)


def _suffix(place: int) -> str:
    return "th" if place % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(place % 10, "th")


def _clock(text: str) -> Clock | None:
    text = {"noon": "12:00pm", "midnight": "12:00am"}.get(text, re.sub(r"^(\d+)o'clock", r"\1:00", text))
    match = re.fullmatch(r"(\d{1,2})(?::([0-5]\d)(?::([0-5]\d))?)?([ap]m)?", text)
    if not match or not (match[2] or match[4]) or int(match[1]) > (12 if match[4] else 23):
        return None
    hour, minute, second = (int(part or 0) for part in match.groups()[:3])
    half = match[4] or ("pm" if hour > 12 else "am" if hour == 0 else "")
    ratio = None if match[4] or match[3] or match[2][0] == "0" else Ratio((sympy.Integer(hour), sympy.Integer(minute)))
    return Clock((hour % 12 * 60 + minute) * 60 + second, half, ratio)


def _has_number(tokens: Sequence[Token]) -> bool:
    return any(
        token.kind == "number"
        or token.kind == "word"
        and token.text.casefold() in {*math_words.NUMBER_WORDS, "a", "an"}
        for token in tokens
    )


def _decimal(tokens: Sequence[Token]) -> str | None:
    """The numeral at the start, `3.14` or `6.28e3`, if a unit or nothing is behind it and it is a decimal."""
    tokens = [token for token in tokens if token.kind != "mark" or token.text not in "$€£"]
    sign = tokens[0].text if tokens and tokens[0].text in "+-" else ""
    tokens = tokens[bool(sign) :]
    if not tokens or tokens[0].kind != "number" or "(" in tokens[0].text:
        return None
    number, rest = tokens[0].text, "".join(_texts(tokens[1:]))
    if power := re.match(r"(?:\\times|\\cdot)10\^\{?(-?\d+)\}?", rest):
        number, rest = f"{number}e{power[1]}", rest[power.end() :]
    if "." not in number and "e" not in number or re.match(r"[-+*/^!\d({|]|\\(?!Omega|mu|AA|frac|circ)", rest):
        return None
    return number


def _measured(value: sympy.Basic) -> tuple[sympy.Basic, math_units.Unit | None, tuple[tuple[str, sympy.Expr], ...]]:
    """A value without its unit, the unit and what is counted; parts of one quantity in the first part's unit."""
    if isinstance(value, sympy.MatrixBase):
        if any(map(_is_measure, value.free_symbols)):
            raise NotUnderstood("units in a matrix")
        return value, None, ()
    if not any(map(_is_measure, value.free_symbols)):
        return value, None, ()
    terms = sorted(sympy.Add.make_args(value), key=lambda term: _size(term), reverse=True)
    total, first = sympy.Integer(0), None
    for term in terms:
        powers = {base: power for base, power in term.as_powers_dict().items() if base.is_Symbol and _is_measure(base)}
        number = term / sympy.Mul(*(base**power for base, power in powers.items()))
        units = {
            math_expression.unit_name(base): power for base, power in powers.items() if math_expression.unit_name(base)
        }
        nouns = tuple(
            sorted((math_expression.noun(base), power) for base, power in powers.items() if math_expression.noun(base))
        )
        if any(map(_is_measure, number.free_symbols)) or len(terms) > 1 and not units:
            raise NotUnderstood("a unit where none can be")
        unit = math_units.product(units) if units else None
        first = first or (unit, nouns)
        if nouns != first[1]:
            raise NotUnderstood("things of two kinds")
        if unit is not None and unit != first[0]:
            number = math_units.converted(number, unit, first[0])
            if number is None:
                raise NotUnderstood("units of two dimensions")
        total += number
    return total, *first


def _size(term: sympy.Expr) -> sympy.Expr:
    units = {
        math_expression.unit_name(base): power
        for base, power in term.as_powers_dict().items()
        if base.is_Symbol and math_expression.unit_name(base)
    }
    return math_units.product(units).size.evalf() if units else sympy.Integer(0)


def _is_measure(symbol: sympy.Symbol) -> bool:
    return bool(math_expression.unit_name(symbol) or math_expression.noun(symbol))


def _plain(value: Number | Statement) -> sympy.Expr:
    if value.value is None or isinstance(value, Number) and (value.unit or value.nouns):
        raise NotUnderstood("a side that is no plain expression")
    return value.value


def _agree(first: Any, other: Any) -> bool:
    """Whether two sides of a chain say the same; what is about right may differ in its last digit."""
    if not all(isinstance(value, (Number, Statement)) and value.value is not None for value in (first, other)):
        return first == other
    if isinstance(other, Number) and other.rounded and isinstance(first, Number) and not first.rounded:
        difference = (first.value - other.value).evalf(30)
        places = len((other.decimal or "").partition("e")[0].partition(".")[2])
        return first.unit == other.unit and difference.is_real is True and bool(abs(difference) * 10**places < 1)
    units = [value.unit if isinstance(value, Number) else None for value in (first, other)]
    if None not in units and units[0] != units[1]:
        converted = math_units.converted(other.value, units[1], units[0])
        return converted is not None and same_value(first.value, converted)
    return same_value(first.value, other.value)


def _shared_name(items: list[Any]) -> tuple[Any, ...]:
    """`x = 1, 2` names both."""
    first = items[0]
    if isinstance(first, Named) and not any(isinstance(item, Named) for item in items[1:]):
        return tuple(Named(first.name, item.value if isinstance(item, Named) else item) for item in items)
    return tuple(items)


def _joined(regions: list[Region], words: set[str]) -> Region:
    if len({region.name for region in regions}) > 1 or not words <= {"or"} and not words <= {"and"}:
        raise NotUnderstood("inequalities, with what between them?")
    combine = sympy.Union if words == {"or"} else sympy.Intersection
    return Region(combine(*(region.points for region in regions)), regions[0].name)


def _solutions(left: sympy.Expr, sign: str, right: sympy.Expr, symbol: sympy.Symbol) -> sympy.Set:
    """The real numbers for which `left sign right`."""
    if not left.free_symbols:
        left, right = right, left
        sign = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}.get(sign, sign)
    if left == symbol and not right.free_symbols:
        return {
            "<": sympy.Interval.open(-sympy.oo, right),
            ">": sympy.Interval.open(right, sympy.oo),
            r"\le": sympy.Interval(-sympy.oo, right),
            r"\ge": sympy.Interval(right, sympy.oo),
            r"\ne": sympy.Complement(sympy.S.Reals, sympy.FiniteSet(right)),
        }[sign]
    real = sympy.Symbol(symbol.name, real=True)
    relation = {"<": sympy.Lt, ">": sympy.Gt, r"\le": sympy.Le, r"\ge": sympy.Ge, r"\ne": sympy.Ne}[sign]
    try:
        return sympy.solveset(relation(left.subs(symbol, real), right.subs(symbol, real)), real, sympy.S.Reals)
    except (NotImplementedError, TypeError) as error:
        raise NotUnderstood("an inequality that SymPy cannot solve") from error


def region(value: Any) -> Region | None:
    """The set of real numbers that an interval, a set of numbers or a region is; None of anything else."""
    if isinstance(value, Region):
        return value
    if value == Statement((r"\emptyset",)):
        return Region(sympy.S.EmptySet)
    if not isinstance(value, Items) or not all(
        isinstance(item, Number) and not item.unit and item.value.is_extended_real for item in value.items
    ):
        return None
    numbers = [item.value for item in value.items]
    if value.brackets == "{}":
        return Region(sympy.FiniteSet(*numbers))
    if len(numbers) != 2 or not value.brackets:
        return None
    return Region(sympy.Interval(*numbers, left_open=value.brackets[0] == "(", right_open=value.brackets[1] == ")"))
