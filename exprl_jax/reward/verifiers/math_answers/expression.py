r"""An expression with its units, `2\sqrt{3}\text{ km/h}`, as a SymPy value: a grammar that gives every token a meaning.

    sum      = [sign] term { sign term | ["and"] term }            the last form: `2 hours 30 minutes`
    term     = factor { [times | over] factor | counted things }
    factor   = atom { "!" | "^" exponent | "%" | "squared" | ... }
    atom     = number | number words | letter | unit | function argument | "(" sum ")" | "\frac" sum sum | ...

Units and counted things are factors like any other, symbols of their own; `measured` takes them out again.

The parser is our own because latex2sympy2_extended 1.11 loses what it does not know: to it `f'(x)` is `f(x)`, `A^T` is
`A`, and `2 3` is 5.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from fractions import Fraction

import sympy

from exprl_jax.reward.verifiers.math_answers import number_words, numerals, phrases, units
from exprl_jax.reward.verifiers.math_answers.markup import LETTERS
from exprl_jax.reward.verifiers.math_answers.tokens import Token

_UNIT, _THING = "unit ", "thing "
_END = Token("end", "the end")
_CONSTANTS = {r"\pi": sympy.pi, r"\infty": sympy.oo, r"\hbar": sympy.Symbol("h") / (2 * sympy.pi)}
_ACCENTS = {r"\vec", r"\hat", r"\tilde", r"\dot", r"\ddot", r"\overline"}
_NAMES = {r"\angle", r"\measuredangle", r"\triangle", r"\odot"}
# Letters whose brackets hold an argument, and no factor.
_APPLIED = {*"fghFGP", r"\phi", r"\Phi", r"\psi", r"\Gamma"}
_FUNCTIONS: dict[str, Callable[..., sympy.Expr]] = {
    **{name: getattr(sympy, name) for name in "sin cos tan cot sec csc sinh cosh tanh exp sqrt gcd lcm".split()},
    "arcsin": sympy.asin,
    "arccos": sympy.acos,
    "arctan": sympy.atan,
    "arccot": sympy.acot,
    "ln": sympy.log,
    "log": lambda value: sympy.log(value, 10),
    "max": sympy.Max,
    "min": sympy.Min,
    "abs": sympy.Abs,
    "floor": sympy.floor,
    "ceil": sympy.ceiling,
    "sgn": sympy.sign,
    "Re": sympy.re,
    "Im": sympy.im,
    "det": lambda matrix: matrix.det(),
    "cis": lambda angle: sympy.cos(angle) + sympy.I * sympy.sin(angle),
}
_INVERSES = {
    sympy.sin: sympy.asin,
    sympy.cos: sympy.acos,
    sympy.tan: sympy.atan,
    sympy.cot: sympy.acot,
    sympy.sinh: sympy.asinh,
    sympy.cosh: sympy.acosh,
    sympy.tanh: sympy.atanh,
}
_BRACKETS = {"(": ")", "[": "]", "{": "}"}
_MATRICES = {"matrix", "pmatrix", "bmatrix", "Bmatrix", "smallmatrix", "array", "vmatrix"}
_MONEY = set("$€£¥₹₽¢")
_TRANSPOSED = {"T", "t", r"\top", r"\intercal"}
_THOUSANDS = {"k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9}  # behind money alone: `$3M`
_DOLLARS = {"US": "USD", "A": "AUD", "AU": "AUD", "C": "CAD", "CA": "CAD", "HK": "HKD", "NZ": "NZD"}
_TIMES, _OVER = {r"\cdot", r"\times", "*"}, {"/", r"\div"}
_CONNECTIVES = {"and", "or", "per", "plus", "minus", "over", "divided", "percent"}
_STARTS = (
    LETTERS
    | _ACCENTS
    | _NAMES
    | _MONEY
    | set(_CONSTANTS)
    | set(_BRACKETS)
    | {"\\" + name for name in _FUNCTIONS}
    | {r"\frac", r"\binom", r"\lfloor", r"\lceil", r"\sum", r"\prod", r"\int", r"\lim", r"\AA"}
)
# Letters in a row that are variables, `abcd`; more are a word.
_LONGEST_PRODUCT = 5


class NotUnderstood(ValueError):
    """A token that has no meaning where it stands, or more than one."""


class Incomplete(NotUnderstood):
    """The tokens end in the middle of an expression."""


def _unit(name: str) -> sympy.Symbol:
    return sympy.Symbol(_UNIT + name, positive=True)


_DEGREE, _MINUTE, _PERCENT = _unit("degree"), _unit("arcminute"), _unit("percent")


def _unit_name(symbol: sympy.Symbol) -> str | None:
    return symbol.name.removeprefix(_UNIT) if symbol.name.startswith(_UNIT) else None


def _is_measure(symbol: sympy.Symbol) -> bool:
    return symbol.name.startswith((_UNIT, _THING))


def _is_unit(value: sympy.Basic) -> bool:
    """Whether a factor is a unit, or a product of units."""
    return bool(value.free_symbols) and all(map(_unit_name, value.free_symbols)) and value.as_coeff_Mul()[0] == 1


def _rational(value: Fraction) -> sympy.Rational:
    return sympy.Rational(value.numerator, value.denominator)


def parse(tokens: Sequence[Token], bare_units: bool = False) -> sympy.Expr:
    r"""The value of an expression: a number, a formula or a matrix.

    Args:
      tokens: all of it.
      bare_units: whether letters behind a number are a unit where they can be, `12cm`; variables otherwise.

    Raises:
      NotUnderstood: a token has no meaning where it stands.
      Incomplete: there are too few tokens.
    """
    parser = _Parser(tokens, bare_units)
    try:
        value = parser.whole()
        parser.expect_end()
    except NotUnderstood:
        raise
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:  # SymPy: (1/2)!!, a matrix and a number
        raise NotUnderstood(f"no value: {error}") from error
    if isinstance(value, sympy.Expr) and value.has(sympy.zoo, sympy.nan):
        raise NotUnderstood("a division by zero")
    return value


Things = tuple[tuple[str, sympy.Expr], ...]


def measured(value: sympy.Expr) -> tuple[sympy.Expr, units.Unit | None, Things]:
    """A value without its unit, the unit, and what is counted with its power.

    The parts of one quantity, `2 hours 30 minutes`, come in its largest unit.

    Raises:
      NotUnderstood: a unit stands where none can be, or the parts are of several kinds.
    """
    if not any(map(_is_measure, value.free_symbols)):
        return value, None, ()
    if isinstance(value, sympy.MatrixBase):
        raise NotUnderstood("units in a matrix")
    parts = sorted(map(_part, sympy.Add.make_args(value)), key=lambda part: -part[1].size.evalf() if part[1] else 0)
    first = parts[0]
    if len(parts) > 1 and first[1] is None:
        raise NotUnderstood("several counted things, or numbers with and without a unit")
    total = sympy.Integer(0)
    for number, unit, things in parts:
        converted = number if unit == first[1] else unit and units.converted(number, unit, first[1])
        if converted is None or things != first[2]:
            raise NotUnderstood("parts of several kinds")
        total += converted
    return total, *first[1:]


def _part(term: sympy.Expr) -> tuple[sympy.Expr, units.Unit | None, Things]:
    powers = {base: power for base, power in term.as_powers_dict().items() if base.is_Symbol and _is_measure(base)}
    number = term / sympy.Mul(*(base**power for base, power in powers.items()))
    if any(map(_is_measure, number.free_symbols)):
        raise NotUnderstood("a unit where none can be")
    names = {_unit_name(base): power for base, power in powers.items() if _unit_name(base)}
    things = sorted((base.name.removeprefix(_THING), power) for base, power in powers.items() if not _unit_name(base))
    return number, units.product(names) if names else None, tuple(things)


class _Parser:
    """Reads from the left, a token ahead."""

    def __init__(self, tokens: Sequence[Token], bare_units: bool):
        self._tokens, self._at = list(tokens), 0
        self._bare_units = bare_units
        self._bars = 0  # how many `|` are open
        self._indices: set[str] = set()  # of sums, which may be called `i`
        self._last: sympy.Expr | None = None  # the factor that was read last

    # --- tokens ------------------------------------------------------------------------------------------------------

    def _peek(self, ahead: int = 0) -> Token:
        at = self._at + ahead
        return self._tokens[at] if 0 <= at < len(self._tokens) else _END

    def _take(self) -> Token:
        token = self._peek()
        self._at += 1
        return token

    def _is(self, *texts: str, ahead: int = 0) -> bool:
        token = self._peek(ahead)
        return token.kind in ("mark", "command") and token.text in texts

    def _accept(self, *texts: str) -> bool:
        accepted = self._is(*texts)
        self._at += accepted
        return accepted

    def _expect(self, *texts: str) -> None:
        if not self._accept(*texts):
            raise self._unexpected(texts[0])

    def expect_end(self) -> None:
        """Raises NotUnderstood unless all tokens are read."""
        if self._peek() is not _END:
            raise self._unexpected("the end")

    def _unexpected(self, expected: str) -> NotUnderstood:
        kind = Incomplete if self._peek() is _END else NotUnderstood
        return kind(f"got {self._peek().text!r}, expected {expected}")

    def _word(self, ahead: int = 0) -> str:
        """The upright word there, in lower case; empty if there is none."""
        token = self._peek(ahead)
        return token.text.casefold() if token.kind == "word" and token.roman else ""

    def _words(self, wanted: Callable[[str], bool], ahead: int = 0) -> tuple[str, ...]:
        """The upright words from there on, as long as they are wanted."""
        words: list[str] = []
        while (word := self._word(ahead + len(words))) and wanted(word):
            words.append(word)
        return tuple(words)

    def _operation(self) -> str:
        """The operation that comes next, spelled as a sign or in words; empty if none does."""
        if self._peek().kind in ("mark", "command"):
            return self._peek().text
        word, then = self._word(), self._word(1)
        if (word, then) in _PAIRS:
            return _PAIRS[word, then]
        if word in ("every", "each", "a", "an") and self._unit_of(1) and self._ends_measured():
            return "/"  # `18 dollars every day`, `8 hours a day`
        if word == "times" and self._peek(1).kind != "number" and then not in number_words.WORDS:
            return ""  # `7 times`
        return phrases.OPERATIONS.get(word, "")

    def _take_operation(self) -> None:
        self._at += 2 if (self._word(), self._word(1)) in _PAIRS else 1

    # --- sums and products -------------------------------------------------------------------------------------------

    def whole(self) -> sympy.Expr:
        r"""A sum, or `n \choose k`."""
        value = self._sum()
        return sympy.binomial(value, self._sum()) if self._accept(r"\choose") else value

    def _sum(self) -> sympy.Expr:
        sign = self._sign()
        value = sign * self._term()
        while True:
            joint = int(self._word() == "and")
            if self._operation() in ("+", "-") and self._word() != "negative":
                value += self._sign() * self._term()
            elif self._peek(joint).kind == "number" and self._ends_measured():
                self._at += joint
                value += sign * self._term()
            else:
                return value

    def _sign(self) -> int:
        operation = self._operation()
        self._at += operation in ("+", "-")
        return -1 if operation == "-" else 1

    def _term(self) -> sympy.Expr:
        value, over = self._factor(), None
        while True:
            operation = self._operation()
            if operation in _TIMES:
                self._take_operation()
                value = _times(value, over, self._sign() * self._factor())
            elif operation in _OVER:
                self._take_operation()
                over = self._factor(counted=True)
                value = value / over
            elif self._is_thing():
                value = value * self._thing(single=isinstance(value, sympy.Rational) and 0 < value <= 1)
            elif self._starts_factor():
                spaced = self._peek().space
                factor = self._factor()
                if over is not None and not _is_unit(factor):
                    # `1/2 mv^2` is half of it; of `x/2y` nobody knows which half.
                    if not (spaced and isinstance(value, sympy.Rational)):
                        raise NotUnderstood("a product behind a slash")
                    over = None
                value = _times(value, over, factor)
            else:
                return value

    def _starts_factor(self) -> bool:
        token = self._peek()
        if token.kind == "number":
            return self._is("!", ")", ahead=-1)  # `3!7!`, `(n-1)2^n`
        if token.kind == "word":
            return self._word() not in _CONNECTIVES
        if token.text == "|":
            return not self._bars
        return token.kind == "begin" or token.text in _STARTS

    def _factor(self, counted: bool = False) -> sympy.Expr:
        if power := self._power_word():
            self._at += 1 + self._is(".", ahead=1)
            value = self._atom() ** power
        elif counted and self._is_thing():
            value = self._thing(single=True)
        else:
            value = self._postfix(self._atom())
        self._last = value
        return value

    def _postfix(self, value: sympy.Expr) -> sympy.Expr:
        while True:
            operation = self._operation()
            if operation == "!":
                self._at += 1
                value = sympy.factorial2(value) if self._accept("!") else sympy.factorial(value)
            elif operation == "^":
                self._at += 1
                value = self._raised(value)
            elif operation in ("^2", "^3"):
                self._at += 1
                value = value ** int(operation[1])
            elif operation == "%":
                self._take_operation()
                value = value * _PERCENT
            elif operation == "choose":
                self._at += 1
                value = sympy.binomial(value, self._atom())
            elif operation == "'" and self._is_minute():
                self._at += 1
                value = value * (_unit("arcsecond") if self._accept("'") else _MINUTE)
            else:
                return value

    def _is_minute(self) -> bool:
        """Whether a prime means minutes: behind a number, behind degrees."""
        return self._peek(-1).kind == "number" and self._last is not None and self._last.has(_DEGREE, _MINUTE)

    def _raised(self, value: sympy.Expr) -> sympy.Expr:
        r"""A value to the power that follows, or in degrees: `90^\circ`."""
        group = self._accept("{")
        degrees = self._accept(r"\circ")
        is_transposed = isinstance(value, sympy.MatrixBase) and self._peek().text in _TRANSPOSED
        self._at += is_transposed
        exponent = None
        if not (degrees or is_transposed):
            exponent = self._sum() if group else self._sign() * self._argument()
        if group:
            self._expect("}")
        if is_transposed:
            return value.T
        return value * self._degree() if degrees else value**exponent

    def _degree(self) -> sympy.Symbol:
        """What a degree sign means by the letter behind it: of an angle, or of a temperature."""
        name = {"C": "degC", "F": "degF", "celsius": "degC", "fahrenheit": "degF"}
        token = self._peek()
        scale = name.get(token.text) or name.get(self._word()) if token.kind == "word" else None
        self._at += scale is not None
        return _unit(scale) if scale else _DEGREE

    # --- counted things and units ------------------------------------------------------------------------------------

    def _is_thing(self) -> bool:
        """Whether an upright word comes that is none of a unit, a number, a function or a letter."""
        word = self._word()
        return len(word) > 1 and not (
            word in number_words.WORDS
            or self._operation() == "/"
            or word in _CONNECTIVES
            or self._peek().text in _FUNCTIONS
            or self._unit_here()[0]
            or self._power_word()
            or self._is("$", ahead=1)
        )

    def _thing(self, single: bool) -> sympy.Expr:
        """What is counted; the number one where the words add nothing to what stands before them."""
        words = self._words(lambda word: word not in _CONNECTIVES)
        self._at += len(words)
        # `$5 more` are five; `50 % more` is one and a half times as much.
        is_change = words[0] == "more" and self._last is not None and self._last.has(_PERCENT)
        is_behind = words[0] == "of" or self._ends_measured() or words[0] in phrases.BEHIND_NUMBERS
        is_behind = is_behind and not is_change
        if is_behind and phrases.adds_nothing(words):
            return sympy.Integer(1)
        phrase = phrases.counted(words, single)
        if not phrase:
            raise NotUnderstood(f"{' '.join(words)!r} behind a number")
        self._last = sympy.Symbol(_THING + phrase, positive=True)
        return self._last

    def _ends_measured(self) -> bool:
        """Whether the factor that was read last is a unit or a counted thing."""
        symbols = set() if self._last is None else self._last.free_symbols
        return bool(symbols) and all(map(_is_measure, symbols))

    def _power_word(self) -> int:
        """The power of a unit that a word before it says, `square feet`; 0 if none does."""
        power = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}.get(self._word(), 0)
        return power if self._unit_of(1 + self._is(".", ahead=1)) else 0

    def _unit_of(self, ahead: int) -> str | None:
        """The unit that the upright word there names; None if it names none."""
        text = self._peek(ahead).text
        # `12 in` is a length, `12 in total` and `12 in base 8` are not.
        return units.find(text) if self._word(ahead) and not (text == "in" and self._word(ahead + 1)) else None

    def _unit_here(self) -> tuple[str | None, int]:
        r"""The unit that upright words here name, one of two, `light years`, `k\Omega`; and how many tokens it is."""
        token, then = self._peek(), self._peek(1)
        name = None
        if self._word(1):
            name = units.find(f"{token.text} {then.text}".casefold())
        elif self._is(r"\Omega", ahead=1) and len(token.text) == 1:
            name = units.find(token.text + "Ω")
        return (name, 2) if name else (self._unit_of(0), 1)

    def _take_unit(self) -> sympy.Symbol | None:
        """The unit that upright words here name, taken."""
        name, length = self._unit_here()
        if name is None:
            return None
        if self._take().text in ("Rs", "rs"):
            self._accept(".")
        self._at += length - 1
        return self._degree() if name == "degree" else _unit(name)

    def _money(self, currency: sympy.Symbol) -> sympy.Expr:
        r"""A currency before its number, which may have the sign, `\$-18`; or a currency behind its number."""
        negative = self._is("-")
        if self._peek(negative).kind != "number":
            return currency
        self._at += negative
        number = self._number() * (-1) ** negative
        if self._peek().text in _THOUSANDS and not self._peek().space:
            number *= _THOUSANDS[self._take().text]
        return currency * number

    # --- atoms -------------------------------------------------------------------------------------------------------

    def _atom(self) -> sympy.Expr:
        token = self._peek()
        if token.kind == "number":
            return self._number()
        if token.kind == "word":
            return self._of_word()
        if token.kind == "begin":
            return self._matrix()
        if token.text in _BRACKETS:
            return self._bracket()
        if token.text == "|":
            return self._absolute()
        if token.text in _MONEY:
            return self._money(_unit(units.find(self._take().text)))
        if token.text == "^" and self._is(r"\circ", ahead=1):
            self._at += 2
            return self._degree()
        if token.kind == "command":
            return self._of_command(self._take().text)
        raise self._unexpected("a value")

    def _number(self) -> sympy.Expr:
        token = self._take()
        value = _rational(numerals.value(token.text))
        if token.text.isdigit():
            value = self._mixed(value)
        if self._word() == "and":  # `3 and a half`
            words = self._words(lambda word: word in number_words.WORDS | number_words.JOINTS, ahead=1)
            part = number_words.number(words)
            if part and part < 1:
                self._at += 1 + len(words)
                value += _rational(part)
        while factor := number_words.factor(self._word()):
            self._at += 1
            value *= _rational(factor)
        return value

    def _mixed(self, whole: sympy.Rational) -> sympy.Expr:
        r"""A whole number and the fraction behind it: `3\frac{1}{2}` and `3 1/2` are three and a half."""
        if self._accept(r"\frac"):
            part = self._of_command(r"\frac")
        elif self._peek().kind == "number" and self._peek().space and self._is("/", ahead=1):
            top, _, bottom = self._take(), self._take(), self._take()
            if not (top.text.isdigit() and bottom.text.isdigit() and int(bottom.text)):
                raise NotUnderstood("a number behind a number")
            part = sympy.Rational(int(top.text), int(bottom.text))
        else:
            return whole
        if not isinstance(part, sympy.Rational):
            return whole * part
        if not 0 < part < 1:
            raise NotUnderstood("an improper fraction behind a whole number")
        return whole + part

    def _of_word(self) -> sympy.Expr:
        token, word = self._peek(), self._word()
        if word in number_words.WORDS or token.text in ("a", "an"):
            words = self._words(lambda word: word in number_words.WORDS | number_words.JOINTS)
            for length in range(len(words), 0, -1):
                number = number_words.number(words[:length])
                if number is not None:
                    self._at += length
                    return _rational(number)
        if self._bare_units and not word and self._is_behind_number() and (name := units.find(token.text)):
            self._at += 1
            return _unit(name)
        if token.text in _DOLLARS and self._is("$", ahead=1):
            self._at += 2
            return self._money(_unit(_DOLLARS[token.text]))
        is_time = word in ("min", "sec") and not self._is("(", r"\{", ahead=1)
        if token.text in _FUNCTIONS and not is_time:
            self._at += 1
            return self._function(token.text)
        behind = self._peek(-1).kind == "number"  # `3 dollars 50 cents`
        if word and (unit := self._take_unit()) is not None:
            is_money = units.is_money(_unit_name(unit) or "") and not behind
            return self._money(unit) if is_money else unit
        if token.text == "pi":
            self._at += 1
            return sympy.pi
        if len(word) > 1 or len(token.text) > _LONGEST_PRODUCT:
            raise NotUnderstood(f"the word {token.text!r} in an expression")
        if len(token.text) == 1:
            self._at += 1
            return self._letter(token.text)
        # A product of letters is read one by one, so that an exponent or an index is the last one's.
        self._tokens[self._at] = token._replace(text=token.text[1:], space=False)
        return self._constant(token.text[0])

    def _is_behind_number(self) -> bool:
        """Whether letters stand behind a number, with no variable and no power before: `3 m`, `12cm`, not `3m`."""
        before = self._tokens[: self._at]
        return (
            bool(before)
            and before[-1].kind == "number"
            and all(token.kind in ("number", "mark") and token.text != "^" for token in before)
            and (len(self._peek().text) > 1 or self._peek().space)
        )

    def _letter(self, name: str) -> sympy.Expr:
        """A letter with what hangs on it: `x_{12}`, `x'`, `f(t)`."""
        full = name
        if self._accept("_"):
            full += "_" + self._verbatim()
        while self._accept("'"):
            full += "'"
        if name in _APPLIED and self._is("(") and not self._peek().space:
            return sympy.Function(full)(*self._arguments())
        return self._constant(full)

    def _constant(self, name: str) -> sympy.Expr:
        if name == "e":
            return sympy.E
        return sympy.I if name == "i" and name not in self._indices else sympy.Symbol(name)

    def _verbatim(self) -> str:
        """The texts of a group's tokens, or of one token."""
        if not self._accept("{"):
            token = self._take()
            if token.kind not in ("word", "number", "command") or token.kind == "word" and len(token.text) > 1:
                raise NotUnderstood(f"{token.text!r} as an index")
            return token.text
        inner, depth = [], 1
        while depth:
            token = self._take()
            if token is _END:
                raise Incomplete("a group without its end")
            depth += (token.text == "{") - (token.text == "}")
            inner.append(token.text)
        return "".join(inner[:-1])

    def _bracket(self) -> sympy.Expr:
        opener, bars, self._bars = self._take().text, self._bars, 0
        value = self.whole()
        self._expect(_BRACKETS[opener])
        self._bars = bars
        return value

    def _absolute(self) -> sympy.Expr:
        self._take()
        self._bars += 1
        value = self._sum()
        self._bars -= 1
        self._expect("|")
        return value.det() if isinstance(value, sympy.MatrixBase) else sympy.Abs(value)

    def _of_command(self, name: str) -> sympy.Expr:
        """What a command means that is taken already."""
        if name in _CONSTANTS:
            return _CONSTANTS[name]
        if name[1:] in _FUNCTIONS and name != r"\sqrt":
            return self._function(name[1:])
        behind_number = self._peek(-2).kind == "number"
        if (
            name == r"\mu"
            and behind_number
            and (self._peek().roman or self._bare_units and self._peek().kind == "word")
        ):
            if micro := units.find("µ" + self._peek().text):
                self._at += 1
                return _unit(micro)
        if name in (r"\Omega", r"\AA") and behind_number:
            return _unit(units.find(name))
        if name in LETTERS:
            return self._letter(name)
        if name == r"\frac":
            return self._argument(split=True) / self._argument(split=True)
        if name == r"\binom":
            return sympy.binomial(self._argument(split=True), self._argument(split=True))
        if name == r"\sqrt":
            index = sympy.Integer(2)
            if self._accept("["):
                index = self._sum()
                self._expect("]")
            return _root(self._argument(), index)
        if name in (r"\lfloor", r"\lceil"):
            value = self._sum()
            self._expect(name.replace("l", "r", 1))
            return sympy.floor(value) if name == r"\lfloor" else sympy.ceiling(value)
        if name in (r"\sum", r"\prod"):
            return self._repeated(sympy.Sum if name == r"\sum" else sympy.Product)
        if name == r"\int":
            return self._integral()
        if name == r"\lim":
            return self._limit()
        if name in _ACCENTS | _NAMES:
            return self._named(name)
        raise NotUnderstood(f"the command {name}")

    def _argument(self, split: bool = False) -> sympy.Expr:
        r"""A group or one token; of a number its first digit alone, if `split`: `\frac12`."""
        token = self._peek()
        if token.kind == "number" and split and len(token.text) > 1:
            if not token.text.isdigit():
                raise NotUnderstood(f"{token.text!r} as an argument without braces")
            self._tokens[self._at] = Token("number", token.text[1:])
            return sympy.Integer(int(token.text[0]))
        if token.kind == "number":
            return _rational(numerals.value(self._take().text))
        return self._bracket() if token.text == "{" else self._atom()

    def _arguments(self) -> list[sympy.Expr]:
        opener, bars, self._bars = self._take().text, self._bars, 0
        values = [self._sum()]
        while self._accept(","):
            values.append(self._sum())
        self._expect(_BRACKETS.get(opener, r"\}"))
        self._bars = bars
        return values

    def _function(self, name: str) -> sympy.Expr:
        """A function with its power, its base and its argument: in brackets, or the product behind it."""
        function, power, base = _FUNCTIONS[name], sympy.Integer(1), None
        while self._is("^", "_"):
            if self._take().text == "^":
                power = self._sign() * self._argument()
            elif name == "log":
                base = self._argument(split=True)
            else:
                raise NotUnderstood(f"an index of {name}")
        if power.is_negative:
            if power != -1 or function not in _INVERSES:
                raise NotUnderstood(f"a negative power of {name}")
            function, power = _INVERSES[function], sympy.Integer(1)
        if self._is("(", "[", "{", r"\{"):
            arguments = self._arguments()
        else:
            arguments = [self._sign() * self._factor()]
            while self._starts_factor() and not self._word() and self._peek().text.removeprefix("\\") not in _FUNCTIONS:
                arguments[0] *= self._factor()
        arguments = [argument.xreplace({_DEGREE: sympy.pi / 180}) for argument in arguments]
        if name in ("gcd", "lcm"):
            if not all(argument.is_Integer for argument in arguments):
                if any(argument.is_number for argument in arguments):
                    raise NotUnderstood("a divisor of what is no whole number")
                return sympy.Function(name)(*sorted(arguments, key=str)) ** power
            return functools.reduce(function, arguments) ** power
        return (function(*arguments) if base is None else sympy.log(*arguments, base)) ** power

    def _repeated(self, kind: Callable[..., sympy.Expr]) -> sympy.Expr:
        """A sum or a product over an index from one whole number to another."""
        self._expect("_")
        self._expect("{")
        index = self._take().text
        self._expect("=")
        first = self._sum()
        self._expect("}")
        self._expect("^")
        last = self._argument()
        self._indices.add(index)
        value = kind(self._term(), (sympy.Symbol(index), first, last)).doit()
        self._indices.discard(index)
        return value

    def _integral(self) -> sympy.Expr:
        """An integral from one bound to another."""
        self._expect("_")
        first = self._argument(split=True)
        self._expect("^")
        last = self._argument(split=True)
        rest = range(self._at, len(self._tokens))
        end = next((at for at in rest if re.fullmatch("d[a-z]", self._tokens[at].text)), None)
        if end is None:
            raise NotUnderstood("an integral over nothing")
        inner = parse(self._tokens[self._at : end]) if end > self._at else sympy.Integer(1)
        self._at = end + 1
        return sympy.Integral(inner, (sympy.Symbol(self._tokens[end].text[1]), first, last)).doit()

    def _limit(self) -> sympy.Expr:
        self._expect("_")
        self._expect("{")
        symbol = self._take().text
        self._expect(r"\to", r"\rightarrow")
        point = self._sum()
        self._expect("}")
        return sympy.limit(self._term(), sympy.Symbol(symbol), point)

    def _named(self, name: str) -> sympy.Expr:
        r"""A letter with an accent, or the name of a thing: `\vec{v}`, `\overline{AB}`, `\angle ABC`."""
        letters = self._verbatim() if self._is("{") else self._take().text
        if not letters.removeprefix("\\").isalpha():
            raise NotUnderstood(f"{name} of {letters!r}")
        if name == r"\overline" or name in (r"\angle", r"\measuredangle") and len(letters) == 3:
            letters = min(letters, letters[::-1])  # a segment or an angle, from its other end
        return self._letter(f"{name} {letters}")

    def _matrix(self) -> sympy.Expr:
        kind, rows = self._take().text, [[]]
        if kind not in _MATRICES:
            raise NotUnderstood(f"the environment {kind}")
        while self._peek().kind != "end":
            rows[-1].append(self._sum())
            if self._accept(r"\\"):
                rows.append([])
            elif not self._accept("&") and self._peek().kind != "end":
                raise self._unexpected("another entry of a matrix")
        self._expect_end_of_matrix()
        rows = [row for row in rows if row]
        if len({len(row) for row in rows}) != 1:
            raise NotUnderstood("rows of different lengths")
        if kind == "array" and len(rows) == len(rows[0]) == 1:
            return rows[0][0]
        matrix = sympy.ImmutableMatrix(rows)
        return matrix.det() if kind == "vmatrix" else matrix

    def _expect_end_of_matrix(self) -> None:
        if self._peek() is _END:
            raise Incomplete("a matrix without its end")
        self._at += 1


_PAIRS = {("per", "cent"): "%", ("out", "of"): "/", ("divided", "by"): "/", ("multiplied", "by"): "*"}


def _root(value: sympy.Expr, index: sympy.Expr) -> sympy.Expr:
    """The real root where there is one: the cube root of -8 is -2."""
    return -((-value) ** (1 / index)) if value.is_negative and index.is_odd else value ** (1 / index)


def _times(value: sympy.Expr, over: sympy.Expr | None, factor: sympy.Expr) -> sympy.Expr:
    """The product; units behind a slash all stand below it, `J/kg K`, and a currency may be said twice, `$5 USD`."""
    if over is not None and _is_unit(over) and _is_unit(factor):
        return value / factor
    if factor in value.free_symbols and units.is_money(_unit_name(factor) or ""):
        return value
    return value * factor
