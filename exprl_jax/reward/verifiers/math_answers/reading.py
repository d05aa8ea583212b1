r"""Tokens to one of the kinds of answers.

The kinds are tried from the strictest on; what is none of them is a statement, its tokens word for word.  Only what
says nothing is dropped on the way: `The answer is`, `(correct)`, `for all n`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import sympy
from sympy.core.function import AppliedUndef

from exprl_jax.reward.verifiers.math_answers import (
    calendar_days,
    cases,
    conditions,
    congruences,
    expression,
    inequalities,
    leads,
    number_words,
    numerals,
    phrases,
    units,
)
from exprl_jax.reward.verifiers.math_answers.expression import Incomplete, NotUnderstood
from exprl_jax.reward.verifiers.math_answers.identity import same_value
from exprl_jax.reward.verifiers.math_answers.kinds import (
    NOTHING,
    Answer,
    Body,
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
from exprl_jax.reward.verifiers.math_answers.markup import LETTERS
from exprl_jax.reward.verifiers.math_answers.tokens import (
    ORDERS,
    Token,
    Unreadable,
    closing,
    split,
    stripped,
    texts,
    tokenize,
)

_EQUALS, _ABOUT, _IN = {"=", r"\equiv"}, r"\approx", r"\in"
_SETS = {
    "R": sympy.S.Reals,
    "Z": sympy.S.Integers,
    "N": sympy.S.Naturals,
    "Q": sympy.S.Rationals,
    "C": sympy.S.Complexes,
}
_IN_NAMES = {"(", ")", "{", "}", "[", "]", ",", "_", "'", ".", ":", r"\angle", r"\triangle", r"\overline", *LETTERS}
_DERIVATIVE = re.compile(r"\\frac\{?d[A-Za-z]?\}?\{?d[A-Za-z]\}?")
_TRIGONOMETRIC = {r"\sin", r"\cos", r"\tan", r"\cot", r"\sec", r"\csc"}
_NUMERAL = re.compile(
    r"\(?([0-9A-F]*[0-9][0-9A-F]*|[A-F]+)\)?(?:_[({]*([0-9]{1,2})[)}]*|(?:in)?base([0-9]{1,2}))", re.ASCII
)
_HALF_LINE = re.compile(r"\\mathbb\{?R\}?[\^_](\+|\{\+\}|>0|\{(?:>|\\ge)0\}|\{\+,0\}|\{0,\+\})")


def read(text: str, commas: bool = True, bare_units: bool = True) -> Answer:
    """Reads an answer.

    Args:
      text: what a box holds.
      commas: as in `tokens.tokenize`.
      bare_units: as in `expression.parse`.

    Raises:
      Unreadable: it is empty, or half of something.
    """
    tokens = leads.without(tokenize(text, commas))
    words = texts(tokens)
    try:
        if (points := _Reader(bare_units).reals_but(tokens)) is not None:
            return Answer(points, words)
        tokens, domains, condition = conditions.without(tokens)
        return Answer(_Reader(bare_units).body(tokens), words, domains, condition)
    except NotUnderstood as error:  # incomplete, or nothing but separators
        raise Unreadable(str(error)) from error


class _Reader:
    """Reads tokens as the first kind that understands all of them."""

    def __init__(self, bare_units: bool):
        self._bare_units = bare_units

    def body(self, tokens: Sequence[Token]) -> Body:
        """One of the kinds.

        Raises:
          Incomplete: the tokens end in the middle of an expression.
          NotUnderstood: there are none.
        """
        tokens = stripped(tokens)
        if not tokens:
            raise NotUnderstood("nothing between two separators")
        incomplete = None
        for kind in (
            self._special,
            self._letters,
            self._rarer,
            self._remarked,
            self._option,
            self._quantity,
            self._several,
            self._related,
            self._combined,
            self._bracketed,
            self._ratio,
            self._about,
        ):
            try:
                body = kind(tokens)
            except NotUnderstood as error:
                if isinstance(error, Incomplete) and kind == self._quantity:
                    incomplete = error
            else:
                if body is not None:
                    return body
        if incomplete and not any(token.roman for token in tokens):
            raise incomplete
        return Statement(phrases.statement(texts(tokens)))

    def reals_but(self, tokens: list[Token]) -> Region | None:
        """`all real numbers except 0`; None of what says something else."""
        said = [token.text.casefold() if token.roman else "" for token in tokens]
        at = said.index("except") if "except" in said else 0
        if " ".join(said[:at]) not in ("all real numbers", "all reals", "all real numbers x"):
            return None
        body = self.body(tokens[at + 1 + (said[at + 1 : at + 2] == ["for"]) :])
        items = body.items if isinstance(body, Items) and body.brackets in ("", "{}") else (body,)
        values = [item.value if isinstance(item, Named) else item for item in items]
        if not all(isinstance(value, Number) and value.unit is None and value.value.is_number for value in values):
            return None
        return Region(sympy.Complement(sympy.S.Reals, sympy.FiniteSet(*(value.value for value in values))))

    def _value(self, tokens: Sequence[Token]) -> sympy.Expr:
        return expression.parse(tokens, self._bare_units)

    # --- one value ---------------------------------------------------------------------------------------------------

    def _special(self, tokens: list[Token]) -> Body | None:
        """Constants, numerals, ordinals and times of day."""
        said = texts(tokens)
        words, joined = [text.casefold() for text in said], "".join(said)
        if joined == r"\{\}":
            return NOTHING
        if words == ["none"]:
            return Number(sympy.Integer(0))
        means = " ".join(phrases.statement(said))
        if means in (r"\infty", r"\emptyset"):
            return NOTHING if means == r"\emptyset" else Number(sympy.oo)
        if match := re.fullmatch(r"\\mathbb \{? ?([A-Z])(?: \})?|\\mathbb ([A-Z])|\\([A-Z])", means):
            points = _SETS.get(match[1] or match[2] or match[3])
            return None if points is None else Region(points)
        if match := _HALF_LINE.fullmatch(joined):
            return Region(sympy.Interval(0, sympy.oo, left_open="0" not in match[1] or ">" in match[1]))
        if match := _NUMERAL.fullmatch(_in_digits(joined)):
            base = int(match[2] or match[3])
            return Numeral(match[1], base) if 2 <= base <= 36 else None
        if match := re.fullmatch(r"(\d+)(?:\^\{?)?(st|nd|rd|th)\}?", joined.lower(), re.ASCII):
            place = int(match[1])
            return Ordinal(place) if match[2] == number_words.suffix(place) else None
        place = number_words.ordinal(words[words[0] == "the" :])
        if place and all(token.roman for token in tokens):
            return Ordinal(place)
        return calendar_days.clock(joined.lower())

    def _letters(self, tokens: list[Token]) -> Statement | None:
        """A word, or letters that may be a product of variables as well: `AB`, `x`."""
        bracketed = len(tokens) == 3 and (tokens[0].text, tokens[2].text) == ("(", ")")
        token = tokens[bracketed]
        if len(tokens) != 1 + 2 * bracketed or token.kind != "word":
            return None
        is_word = token.roman and len(token.text) > 1
        if token.text == "pi" or is_word and number_words.number((token.text.casefold(),)) is not None:
            return None
        plain = not is_word and len(token.text) <= 5
        value = self._value([token._replace(roman=False)]) if plain else None
        return Statement(phrases.statement([token.text]), value)

    def _rarer(self, tokens: list[Token]) -> Body | None:
        """Days of the year and congruences."""
        return calendar_days.read(tokens) or congruences.read(tokens, self.body)

    def _remarked(self, tokens: list[Token]) -> Body | None:
        """An answer with a remark in brackets behind it, `(correct)`, or with itself in words, `5 (five)`."""
        ends = [
            at for at, token in enumerate(tokens) if at and token.text == "(" and closing(tokens, at) == len(tokens) - 1
        ]
        said = tokens[ends[0] :] if ends else []
        in_words = ends and all(token.kind == "word" and token.roman for token in tokens[: ends[0]])  # `five (5)`
        if not in_words and not any(token.kind == "word" and token.roman for token in said):
            return None
        body, inner = self.body(tokens[: ends[0]]), tokens[ends[0] + 1 : -1]
        if tuple(text.casefold() for text in texts(inner)) in phrases.REMARKS:
            return body
        again = self.body(inner)
        both = isinstance(body, Number) and isinstance(again, Number) and body.unit == again.unit
        if both and same_value(body.value, again.value):
            return body
        raise NotUnderstood("a remark")

    def _quantity(self, tokens: list[Token]) -> Number | None:
        """An expression with its unit; a unit alone is none."""
        value, unit, things = expression.measured(self._value(tokens))
        if value == 0:
            unit, things = self._unit_of_zero(tokens)
        if value == 1 and (unit or things) and not any(map(_is_number, tokens)):
            return None
        if tokens[0].text == "[" and closing(tokens, 0) == len(tokens) - 1 and tokens[1].kind != "begin":
            return None  # a list of one, or the whole part
        numbers = [token.text for token in tokens if token.kind == "number"]
        inexact = any(re.search("[.e]", number) and "(" not in number for number in numbers)
        return Number(value, unit, things, _decimal(tokens), inexact)

    def _unit_of_zero(self, tokens: list[Token]) -> tuple[units.Unit | None, expression.Things]:
        """The unit of nothing, which a product with nothing has lost: 0 °C are not 0 K."""
        zeros = [at for at, token in enumerate(tokens) if token.kind == "number" and not numerals.value(token.text)]
        if len(zeros) != 1:
            return None, ()
        one = [token._replace(text="1") if at == zeros[0] else token for at, token in enumerate(tokens)]
        return expression.measured(self._value(one))[1:]

    def _about(self, tokens: list[Token]) -> Number | None:
        """A number that is said to be about right."""
        if tokens[0].text != _ABOUT and not tokens[0].is_word(*phrases.APPROXIMATE):
            return None
        body = self.body(tokens[1:])
        return body._replace(rounded=True) if isinstance(body, Number) else None

    def _ratio(self, tokens: list[Token]) -> Ratio | None:
        parts, _ = split(tokens, lambda token: token.text == ":" or token.is_word("to"))
        if len(parts) == 1:
            return None
        values = [expression.measured(self._value(part)) for part in parts]
        if any(unit or things for _, unit, things in values):
            raise NotUnderstood("a ratio of measures")
        return Ratio(tuple(value for value, _, _ in values))

    def _option(self, tokens: list[Token]) -> Option | None:
        r"""An option's letter, alone or before its text: `Option B`, `(B) 12`, `B. 12`."""
        tokens = tokens[tokens[0].is_word("option", "choice", "answer") :]
        bracket = bool(tokens) and tokens[0].text == "("
        letter, rest = tokens[bracket : bracket + 1], tokens[bracket + 1 :]
        if not letter or letter[0].kind != "word" or not re.fullmatch("[A-J]", letter[0].text):
            return None
        if bracket or rest:
            closers = [")"] if bracket else [")", "."] + [":"] * letter[0].roman
            if not rest or rest[0].text not in closers:
                return None
            rest = rest[1:]
        if rest and not rest[0].space and not letter[0].roman:
            return None  # `(A)x` is a product
        return Option(letter[0].text, self.body(rest) if rest else None)

    # --- several values ----------------------------------------------------------------------------------------------

    def _several(self, tokens: list[Token]) -> Body | None:
        """Answers with commas, "and" or "or" between them, and the two of a plus-minus sign."""
        parts, separators = split(tokens, lambda token: token.text in (",", ";") or token.is_word("and", "or"))
        if not separators:
            return self._both_signs(tokens)
        before_word = [separator.kind == "word" for separator in separators] + [False]
        parts = [part for part, before in zip(parts, before_word, strict=True) if part or not before]  # `2, and 3`
        if len(parts) == 1 or any(token.text == "…" for token in tokens):
            raise NotUnderstood("a series that goes on")
        items: list[Body] = []
        for part in parts:
            item = self.body(part)
            items += item.items if isinstance(item, Items) and not item.brackets else [item]
        if all(isinstance(item, Region) for item in items):
            return inequalities.joined(items, {separator.text.casefold() for separator in separators})
        either = any(separator.is_word("or") for separator in separators)
        return Items("", _with_shared_name(items), either)

    def _both_signs(self, tokens: list[Token]) -> Items | None:
        if not any(token.text in (r"\pm", r"\mp") for token in tokens):
            return None
        signs = ({r"\pm": "+", r"\mp": "-"}, {r"\pm": "-", r"\mp": "+"})
        return Items("", tuple(self.body([_with_sign(token, sign) for token in tokens]) for sign in signs))

    def _bracketed(self, tokens: list[Token]) -> Body | None:
        """Sets, tuples, intervals, and equations one below another."""
        if closing(tokens, 0) != len(tokens) - 1:
            return None
        brackets, inner = tokens[0].text + tokens[-1].text, tokens[1:-1]
        if tokens[0].kind == "begin" and tokens[0].text == "cases":
            rows, _ = split(inner, lambda token: token.text == r"\\")
            if any(token.text == "&" for token in inner):
                return cases.read(inner, self.body)
            return Items("", tuple(self.body(row) for row in rows if row))
        if brackets == r"\{\}":
            return self._set(inner)
        if brackets not in ("()", "[]", "(]", "[)"):
            return None
        parts, separators = split(inner, lambda token: token.text in (",", ";"))
        if not separators:
            return self.body(inner) if brackets == "()" else None
        return Items(brackets, tuple(map(self.body, parts)))

    def _set(self, inner: list[Token]) -> Body:
        builder, bars = split(inner, lambda token: token.text in (":", "|"))
        if len(bars) != 1:
            body = self.body(inner)
            return Items("{}", body.items if isinstance(body, Items) and not body.brackets else (body,))
        element, body = map(self.body, builder)
        is_real = isinstance(element, Statement) or isinstance(element, Region) and element.points == sympy.S.Reals
        if is_real and isinstance(body, Region):
            return Region(body.points)
        return Statement((*texts(builder[0]), "|", *texts(builder[1])))

    def _combined(self, tokens: list[Token]) -> Region | None:
        """Unions, intersections and differences of sets."""
        operations = {(r"\cup",): sympy.Union, (r"\cap",): sympy.Intersection, (r"\setminus", "-"): sympy.Complement}
        for signs, combine in operations.items():
            parts, separators = split(tokens, lambda token, signs=signs: token.text in signs)
            if not separators:
                continue
            regions = [region(self.body(part)) for part in parts]
            if None in regions:
                raise NotUnderstood("an operation on what is no set")
            points = regions[0].points
            for other in regions[1:]:
                points = combine(points, other.points)
            return Region(points)
        return None

    # --- relations ---------------------------------------------------------------------------------------------------

    def _related(self, tokens: list[Token]) -> Body | None:
        """Equations, inequalities and what lies in a set."""
        relations = _EQUALS | ORDERS | {_ABOUT, _IN}
        sides, signs = split(tokens, lambda token: token.text in relations or token.is_word("is", "equals"))
        if not signs:
            sides, signs = split(tokens, lambda token: token.text == ":")
            if len(signs) != 1 or not all(token.roman and len(token.text) > 1 for token in sides[0]):
                return None  # no `Total: 7`
        if not all(sides[1:]) or not sides[0] and signs[0].text != _ABOUT:
            raise NotUnderstood("nothing beside a relation")
        kinds = {"=" if token.text in _EQUALS | {":"} or token.kind == "word" else token.text for token in signs}
        if kinds <= {"=", _ABOUT}:
            return self._equation(sides, signs)
        if kinds <= ORDERS:
            return self._inequality(sides, signs)
        if kinds == {_IN} and len(sides) == 2:
            return self._member(*sides)
        raise NotUnderstood("several relations")

    def _equation(self, sides: list[list[Token]], signs: list[Token]) -> Body | None:
        if not sides[0]:
            return None  # `\approx 3`
        names = [at for at, side in enumerate(sides) if self._is_name(side, first=at == 0)]
        names = names[: len(sides) - 1]
        bodies: list[Body] = []
        for at, side in enumerate(sides):
            if at not in names:
                body = self.body(side)
                about = at and signs[at - 1].text == _ABOUT and isinstance(body, Number)
                bodies.append(body._replace(rounded=True) if about else body)
        in_words = any(token.kind == "word" for token in signs)
        if in_words and any(
            isinstance(body, Statement) and body.value is None and len(body.words) > 1 for body in bodies
        ):
            raise NotUnderstood("a sentence")
        if all(_agree(bodies[0], body) for body in bodies[1:]):
            # Of `The answer is x = 7` the name is x.
            return self._with_name(sides[names[-1]], bodies[0]) if names else bodies[0]
        if not names and len(sides) == 2 and all(isinstance(body, (Number, Statement)) for body in bodies):
            left, right = map(_plain, bodies)
            if (left - right).free_symbols:
                pairs = ((left, right), (right, left))
                # Of `x + y = 1` nobody knows whether it is a line or an answer.
                bare = [
                    side for side, other in pairs if not side.free_symbols and _is_asked(other) and side not in (0, 1)
                ]
                return Equation(left - right, Number(bare[0]) if bare else None)
        raise NotUnderstood("sides that differ")

    def _is_name(self, tokens: list[Token], first: bool) -> bool:
        """Whether a side of an equation only names what another side says."""
        names = texts(tokens)
        if not names:
            return False
        if len(tokens) == 1 and tokens[0].kind == "word" and not tokens[0].roman:
            return True  # x, AB
        if first and any(token.roman and len(token.text) > 1 for token in tokens):  # The area of ABC
            is_name = all(token.kind == "word" or token.text in _IN_NAMES for token in tokens)
            denies = {token.text.casefold() for token in tokens} & phrases.DENIALS
            return is_name and not denies and not any(map(_is_number, tokens))
        is_call = len(tokens) > 3 and tokens[0].kind == "word" and names[1] == "("
        if is_call and len(names[0]) == 1 and closing(tokens, 1) == len(tokens) - 1:
            return True  # P(X = 3)
        if first and names[0] == "(" and closing(tokens, 0) == len(tokens) - 1:  # (x, y)
            parts, _ = split(tokens[1:-1], lambda token: token.text == ",")
            return all(len(part) == 1 and _is_letter(part[0]) for part in parts)
        joined = "".join(names)
        if first and (
            names[0] in _TRIGONOMETRIC
            or re.fullmatch(r"[A-Za-z]+(:[A-Za-z]+)+", joined)
            or _DERIVATIVE.fullmatch(joined)
        ):
            return True  # sin x, a:b, dy/dx
        try:
            return isinstance(self._value(tokens), (sympy.Symbol, AppliedUndef))
        except NotUnderstood:
            return False

    def _with_name(self, side: list[Token], body: Body) -> Body:
        words = next((at for at, token in enumerate(side) if not token.roman or len(token.text) == 1), 0)
        side = side if side[words].text == "(" else side[words:]  # `The function f(x)`
        if side[0].text == "(":
            letters = [token.text for token in side[1:-1] if _is_letter(token)]
            if not isinstance(body, Items) or len(body.items) != len(letters):
                raise NotUnderstood("as many values as names")
            return Items("()", tuple(map(Named, letters, body.items)))
        name, difference = "".join(texts(side)), None
        if re.fullmatch(r"\\angle[A-Z]{3}", name):
            name = min(name, name[:-3] + name[:-4:-1])  # from its other end
        if isinstance(body, (Number, Statement)) and not any(token.roman and len(token.text) > 1 for token in side):
            body = Number(body.value) if isinstance(body, Statement) and body.value is not None else body
            if _DERIVATIVE.fullmatch(name):
                return Named(name, body)
            try:
                difference = self._value(side) - _plain(body)
            except (NotUnderstood, TypeError):  # P(X = 3), or a matrix
                difference = None
        if difference is not None and sympy.Symbol(name) in body.value.free_symbols:
            return Equation(difference)
        return Named(name, body, difference)

    def _inequality(self, sides: list[list[Token]], signs: list[Token]) -> Region | Inequality | Items:
        values = [self._value(side) for side in sides]
        symbols = set().union(*(value.free_symbols for value in values))
        if len(symbols) == 1:
            (symbol,) = symbols
            points = sympy.S.Reals
            for left, sign, right in zip(values, signs, values[1:], strict=False):
                points = points.intersect(inequalities.solutions(left, sign.text, right, symbol))
            return Region(points, symbol)
        if not symbols:
            raise NotUnderstood("an inequality of numbers")
        links = tuple(
            inequalities.inequality(left, sign.text, right)
            for left, sign, right in zip(values, signs, values[1:], strict=False)
        )
        return links[0] if len(links) == 1 else Items("", links)

    def _member(self, left: list[Token], right: list[Token]) -> Body:
        if not self._is_name(left, first=True):
            raise NotUnderstood("an element that is no unknown")
        body = self.body(right)
        if isinstance(body, Items) and body.brackets == "{}":
            name = "".join(texts(left))
            return body._replace(items=tuple(Named(name, item) for item in body.items))
        points = region(body)
        return body if points is None else Region(points.points, sympy.Symbol("".join(texts(left))))


def _in_digits(joined: str) -> str:
    """A numeral whose base is spelled as a word, and whose digits are small letters, as others are written."""
    head, sign, base = joined.rpartition("_")
    base = base.strip("{}")
    spelled = number_words.number((base.casefold(),))
    base = str(spelled) if spelled and spelled.denominator == 1 else base
    if not sign or not base.isdecimal():
        return re.sub(r"\((?:in)?base(\d+)\)$", r"base\1", joined)
    is_numeral = re.fullmatch(r"\(?\d[\da-f]*\)?", head, re.ASCII) and int(base) > 10
    return (head.upper() if is_numeral else head) + "_" + base


def _is_number(token: Token) -> bool:
    return token.kind == "number" or token.kind == "word" and token.text.casefold() in number_words.WORDS | {"a", "an"}


def _is_asked(value: sympy.Expr) -> bool:
    """Whether a problem may ask for an expression's value: for m + n, for the sine of an angle; not for 2x, nor -x."""
    return len(value.free_symbols) > 1 and value.as_coeff_Mul()[0] == 1


def _is_letter(token: Token) -> bool:
    return token.kind == "word" or token.text in LETTERS


def _with_sign(token: Token, signs: dict[str, str]) -> Token:
    return token._replace(kind="mark", text=signs[token.text]) if token.text in signs else token


def _decimal(tokens: Sequence[Token]) -> str | None:
    """The plain form of a decimal, `3.14` or `6.28e3`, if that is the answer but for a sign and a unit."""
    start = next((at for at, token in enumerate(tokens) if token.text not in {*"$€£+-"}), len(tokens))
    number, *rest = tokens[start:] or [Token("end", "")]
    if number.kind != "number" or "(" in number.text:
        return None
    decimal, behind = number.text, "".join(texts(rest))
    if power := re.match(r"(?:\\times|\\cdot)10\^\{?(-?\d+)\}?", behind):
        decimal, behind = f"{decimal}e{power[1]}", behind[power.end() :]
    is_alone = not re.match(r"[-+*/^!\d({|]|\\(?!Omega|mu|AA|circ)", behind)
    return decimal if is_alone and re.search("[.e]", decimal) else None


def _plain(body: Number | Statement) -> sympy.Expr:
    if body.value is None or isinstance(body, Number) and (body.unit or body.things):
        raise NotUnderstood("a side that is no plain expression")
    return body.value


def _agree(first: Body, other: Body) -> bool:
    """Whether two sides of a chain say the same; what is about right may differ in its last digit."""
    if not all(isinstance(body, (Number, Statement)) and body.value is not None for body in (first, other)):
        return first == other
    if isinstance(first, Number) and isinstance(other, Number):
        if other.rounded and not first.rounded:
            return first.unit == other.unit and _shortens(other, first.value)
        if first.unit and other.unit and first.unit != other.unit:
            converted = units.converted(other.value, other.unit, first.unit)
            return converted is not None and same_value(first.value, converted)
    return same_value(first.value, other.value)


def _shortens(short: Number, value: sympy.Expr) -> bool:
    """Whether a decimal is what a value rounds to, or is cut to."""
    if not all(side.is_number and side.is_real for side in (value, short.value)):
        return False
    if short.decimal is None and not short.value.is_Integer:
        return same_value(short.value, value)
    last_digit = sympy.Integer(10) ** -(numerals.places(short.decimal) if short.decimal else 0)
    left = abs(value) - abs(short.value)
    return value * short.value > 0 and bool(-last_digit / 2 <= left) and bool(left < last_digit)


def _with_shared_name(items: list[Body]) -> tuple[Body, ...]:
    """`x = 1, 2` names both."""
    first, *others = items
    if isinstance(first, Named) and not any(isinstance(item, Named) for item in others):
        return (first, *(Named(first.name, item) for item in others))
    return tuple(items)
