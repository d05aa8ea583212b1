r"""An expression with its units, `2\sqrt{3}\text{ km/h}`, as a SymPy value: a grammar in which every token has a meaning.

    sum     = [sign] term { sign term | ["and"] term }            the last form: `2 hours 30 minutes`
    term    = factor { [times | over] factor | noun }
    factor  = atom { "!" | "^" exponent | "%" | "squared" | ... }
    atom    = number | number word | letter | unit | function argument | "(" sum ")" | "\frac" sum sum | ...

Units and counted things are factors like any other, positive symbols of their own; `math_answer` takes them out again.
A parser of our own, because latex2sympy2_extended 1.11 loses what it does not know: to it `f'(x)` is `f(x)`, `A^T` is
`A`, and `2 3` is 5.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from fractions import Fraction

import sympy

from exprl_jax.reward.verifiers import math_units, math_words
from exprl_jax.reward.verifiers.math_tokens import Token

_UNIT, _NOUN = "unit ", "noun "
_END = Token("end of text", "")
LETTERS = set(
    r"\alpha \beta \gamma \delta \epsilon \zeta \eta \theta \iota \kappa \lambda \mu \nu \xi \rho \sigma \tau \upsilon \phi"
    r" \chi \psi \omega \Gamma \Delta \Theta \Lambda \Xi \Sigma \Phi \Psi \Omega \ell".split()
)
_CONSTANTS = {r"\pi": sympy.pi, r"\infty": sympy.oo, r"\hbar": sympy.Symbol("h") / (2 * sympy.pi)}
_ACCENTS = {r"\vec", r"\hat", r"\tilde", r"\dot", r"\ddot", r"\overline"}
_NAMES = {r"\angle", r"\triangle", r"\measuredangle", r"\odot"}
_APPLIED = set("fghFGP") | {r"\phi", r"\Gamma", r"\Phi", r"\psi"}
_FUNCTIONS: dict[str, Callable[..., sympy.Expr]] = {
    "sin": sympy.sin, "cos": sympy.cos, "tan": sympy.tan, "cot": sympy.cot, "sec": sympy.sec, "csc": sympy.csc,
    "sinh": sympy.sinh, "cosh": sympy.cosh, "tanh": sympy.tanh, "arcsin": sympy.asin, "arccos": sympy.acos,
    "arctan": sympy.atan, "arccot": sympy.acot, "ln": sympy.log, "exp": sympy.exp, "gcd": lambda *a: _integers(sympy.gcd, a),
    "lcm": lambda *a: _integers(sympy.lcm, a), "max": sympy.Max, "min": sympy.Min, "Re": sympy.re, "Im": sympy.im,
    "sgn": sympy.sign, "log": lambda x: sympy.log(x, 10), "sqrt": sympy.sqrt, "det": lambda m: m.det(),
    "floor": sympy.floor, "ceil": sympy.ceiling, "abs": sympy.Abs,
}  # fmt: skip
_INVERSES = {
    sympy.sin: sympy.asin, sympy.cos: sympy.acos, sympy.tan: sympy.atan, sympy.cot: sympy.acot, sympy.sinh: sympy.asinh,
    sympy.cosh: sympy.acosh, sympy.tanh: sympy.atanh,
}  # fmt: skip
_CLOSERS = {"(": ")", "[": "]", "{": "}"}
_MATRICES = {"matrix", "pmatrix", "bmatrix", "Bmatrix", "smallmatrix", "array", "vmatrix"}
_MONEY = set("$€£¥₹₽¢")
_DOLLARS = {"US": "USD", "A": "AUD", "AU": "AUD", "C": "CAD", "CA": "CAD", "HK": "HKD", "NZ": "NZD"}
_MULTIPLIES = {r"\cdot", r"\times", "*"}
_CONNECTIVES = {"and", "or", "per", "plus", "minus", "over", "divided", "percent"}
_STARTS = (
    LETTERS | _ACCENTS | _NAMES | set(_CONSTANTS) | set(_CLOSERS) | set(_MONEY) | {"\\" + name for name in _FUNCTIONS}
    | {r"\frac", r"\binom", r"\lfloor", r"\lceil", r"\sum", r"\prod", r"\int", r"\lim", r"\AA"}
)  # fmt: skip
# Letters in a row that are variables: `abcd`.
_LONGEST_PRODUCT = 5


class NotUnderstood(ValueError):
    """A token that has no meaning where it stands, or more than one."""


class Incomplete(NotUnderstood):
    """The tokens end in the middle of an expression."""


def unit(name: str) -> sympy.Symbol:
    """The symbol of a unit that `math_units.find` names."""
    return sympy.Symbol(_UNIT + name, positive=True)


_DEGREE, _MINUTE, _PERCENT = unit("degree"), unit("arcminute"), unit("percent")


def unit_name(symbol: sympy.Basic) -> str | None:
    """The name of a unit's symbol; None of any other."""
    return symbol.name.removeprefix(_UNIT) if symbol.is_Symbol and symbol.name.startswith(_UNIT) else None


def noun(symbol: sympy.Basic) -> str | None:
    """The words of a counted thing's symbol; None of any other."""
    return symbol.name.removeprefix(_NOUN) if symbol.is_Symbol and symbol.name.startswith(_NOUN) else None


def number_value(text: str) -> sympy.Rational:
    """The value of a number token: exact, repeating decimals and powers of ten included."""
    digits, _, power = text.partition("e")
    whole, _, rest = digits.partition(".")
    decimals, _, period = rest.removesuffix(")").partition("(")
    value = Fraction(int((whole + decimals) or "0"), 10 ** len(decimals))
    if period:
        value += Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(decimals))
    return sympy.Rational(value.numerator, value.denominator) * sympy.Integer(10) ** int(power or 0)


def parse(tokens: Sequence[Token], bare_units: bool = False) -> sympy.Expr:
    r"""The value of an expression.

    Args:
      tokens: all of it.
      bare_units: whether letters behind a number are a unit where they can be, `12cm`; variables otherwise.

    Raises:
      NotUnderstood: a token has no meaning where it stands.
    """
    parser = _Parser(tokens, bare_units)
    value = parser.choice_of()
    if parser.next is not _END:
        raise NotUnderstood(f"{parser.next.text!r} after an expression")
    if isinstance(value, sympy.Expr) and value.has(sympy.zoo, sympy.nan):
        raise NotUnderstood("a division by zero")
    return value


def _integers(function: Callable[..., sympy.Expr], values: tuple[sympy.Expr, ...]) -> sympy.Expr:
    if not all(value.is_Integer for value in values):
        raise NotUnderstood("a divisor of what is no whole number")
    return functools.reduce(function, values)


class _Parser:
    """Reads from the left, a token ahead."""

    def __init__(self, tokens: Sequence[Token], bare_units: bool):
        self._tokens, self._at = list(tokens), 0
        self._bare_units = bare_units
        self._bars = 0  # how many `|` are open
        self._bound: set[str] = set()  # indices of sums, which may be called `i`
        self._last: sympy.Expr | None = None  # the factor that was read last

    # --- tokens ------------------------------------------------------------------------------------------------------

    @property
    def next(self) -> Token:
        """The token that is read next."""
        return self._peek(0)

    def _peek(self, ahead: int) -> Token:
        at = self._at + ahead
        return self._tokens[at] if 0 <= at < len(self._tokens) else _END

    def _take(self) -> Token:
        token = self.next
        self._at += 1
        return token

    def _is(self, *texts: str, ahead: int = 0) -> bool:
        token = self._peek(ahead)
        return token.kind in ("mark", "command") and token.text in texts

    def _accept(self, *texts: str) -> bool:
        if self._is(*texts):
            self._at += 1
            return True
        return False

    def _expect(self, *texts: str) -> None:
        if not self._accept(*texts):
            raise self._unexpected(texts[0])

    def _unexpected(self, expected: str) -> NotUnderstood:
        kind = Incomplete if self.next is _END else NotUnderstood
        return kind(f"{self.next.text!r} where {expected} is expected")

    def _word(self, ahead: int = 0) -> str:
        """The upright word there, in lower case; empty if there is none."""
        token = self._peek(ahead)
        return token.text.casefold() if token.kind == "word" and token.roman else ""

    def _words(self) -> tuple[str, ...]:
        """The upright words from here to one that connects."""
        words: list[str] = []
        while (word := self._word(len(words))) and word not in _CONNECTIVES:
            words.append(word)
        return tuple(words)

    def _operation(self) -> str:
        """The operation that comes next, spelled as a sign or as a word; empty if there is none."""
        if self.next.kind in ("mark", "command"):
            return self.next.text
        word, then = self._word(), self._word(1)
        if word in ("per", "divided", "multiplied") and then in ("cent", "by"):
            return {"per": "%", "divided": "/", "multiplied": "*"}[word]
        if word == "times" and not (self._peek(1).kind == "number" or then in math_words.NUMBER_WORDS):
            return ""
        return math_words.OPERATIONS.get(word, "")

    def _take_operation(self) -> None:
        self._at += 1 + (self._word() in ("per", "divided", "multiplied") and self._word(1) in ("cent", "by"))

    # --- sums and products -------------------------------------------------------------------------------------------

    def choice_of(self) -> sympy.Expr:
        r"""A sum, or `n \choose k`."""
        value = self.sum()
        return sympy.binomial(value, self.sum()) if self._accept(r"\choose") else value

    def sum(self) -> sympy.Expr:
        """Terms with signs between them, or parts of one quantity, `2 hours 30 minutes`."""
        sign = self._sign()
        value = sign * self._term()
        while True:
            joined = int(self._word() == "and")
            if self._operation() in ("+", "-") and self._word() != "negative":
                value += self._sign() * self._term()
            elif self._peek(joined).kind == "number" and self._last is not None and _is_measured(self._last):
                self._at += joined
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
            if operation in _MULTIPLIES:
                self._take_operation()
                value = _times(value, over, self._sign() * self._factor())
            elif operation in ("/", r"\div"):
                self._take_operation()
                over = self._factor(one=True)
                value = value / over
            elif self._is_noun():
                value = value * self._noun(one=isinstance(value, sympy.Rational) and 0 < value <= 1)
            elif self._starts_factor():
                spaced = self.next.space
                factor = self._factor()
                if over is not None and not is_unit(factor) and not (spaced and isinstance(value, sympy.Rational)):
                    raise NotUnderstood("a product behind a slash: on which side of it?")
                value = _times(value, over, factor)
                over = over if is_unit(factor) else None
            else:
                return value

    def _starts_factor(self) -> bool:
        token = self.next
        if token.kind == "number":
            return self._is("!", ahead=-1)
        if token.kind == "word":
            return self._word() not in _CONNECTIVES
        if token.text == "|":
            return not self._bars
        return token.kind == "begin" or token.text in _STARTS

    def _factor(self, one: bool = False) -> sympy.Expr:
        if power := self._unit_power():
            self._at += 1 + self._is(".", ahead=1)
            value = self._atom() ** power
        elif one and self._is_noun():
            value = self._noun(one=True)
        else:
            value = self._postfix(self._atom())
        self._last = value
        return value

    def _unit_power(self) -> int:
        """The power of a unit that a word before it says, `square feet`; 0 if none does."""
        power = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}.get(self._word(), 0)
        return power if self._unit_name(1 + self._is(".", ahead=1)) else 0

    def _postfix(self, value: sympy.Expr) -> sympy.Expr:
        while True:
            operation = self._operation()
            if operation == "!":
                self._at += 1
                value = sympy.factorial2(value) if self._accept("!") else sympy.factorial(value)
            elif operation == "^":
                self._at += 1
                value = self._power(value)
            elif operation in ("^2", "^3"):
                self._at += 1
                value = value ** int(operation[1])
            elif operation == "%":
                self._take_operation()
                value = value * _PERCENT
            elif operation == "choose":
                self._at += 1
                value = sympy.binomial(value, self._atom())
            elif operation == "'" and self._last is not None and self._last.has(_DEGREE, _MINUTE):
                self._at += 1
                value = value * (unit("arcsecond") if self._accept("'") else _MINUTE)
            else:
                return value

    def _power(self, value: sympy.Expr) -> sympy.Expr:
        group = self._accept("{")
        if self._accept(r"\circ"):
            if group:
                self._expect("}")
            return value * self._degree()
        exponent = self.sum() if group else self._sign() * self._atom()
        if group:
            self._expect("}")
        return value**exponent

    def _degree(self) -> sympy.Symbol:
        """What a degree sign means by the letter behind it: of an angle, or of a temperature."""
        scale = {"C": "degC", "F": "degF", "celsius": "degC", "fahrenheit": "degF"}
        token = self.next
        name = scale.get(token.text if len(token.text) == 1 else self._word())
        if token.kind != "word" or name is None:
            return _DEGREE
        self._at += 1
        return unit(name)

    # --- nouns and units ---------------------------------------------------------------------------------------------

    def _is_noun(self) -> bool:
        """Whether an upright word comes that is none of a unit, a number, a function or a letter."""
        word = self._word()
        return len(word) > 1 and not (
            word in math_words.NUMBER_WORDS
            or word in _CONNECTIVES
            or self.next.text in _FUNCTIONS
            or self._unit_name(0)
            or self._unit_power()
            or self._is("$", ahead=1)
        )

    def _noun(self, one: bool) -> sympy.Expr:
        """What is counted; the number one where the words add nothing to the unit before them."""
        words = self._words()
        self._at += len(words)
        if (words[0] == "of" or self._last is not None and _is_measured(self._last)) and math_words.is_tail(words):
            return sympy.Integer(1)
        phrase = math_words.counted(words, one)
        if not phrase:
            raise NotUnderstood(f"{' '.join(words)!r} behind a number")
        self._last = sympy.Symbol(_NOUN + phrase, positive=True)
        return self._last

    def _unit_name(self, ahead: int) -> str | None:
        """The unit that the upright word there names; None if it names none."""
        if not self._word(ahead):
            return None
        text = self._peek(ahead).text
        # `12 in` is a length, `12 in total` and `12 in base 8` are not.
        return None if text == "in" and self._word(ahead + 1) else math_units.find(text)

    def _unit(self) -> sympy.Symbol | None:
        """The unit of one or two upright words, taken."""
        if self._word(1) and (name := math_units.find(f"{self.next.text} {self._peek(1).text}".casefold())):
            self._at += 2
            return unit(name)
        prefixed = self._peek(1).text if self._is(r"\Omega", ahead=1) and len(self.next.text) == 1 else ""
        name = math_units.find(self.next.text + "Ω") if prefixed else self._unit_name(0)
        if name is None:
            return None
        self._at += 1 + bool(prefixed)
        return self._degree() if name == "degree" else unit(name)

    # --- atoms -------------------------------------------------------------------------------------------------------

    def _atom(self) -> sympy.Expr:
        token = self.next
        if token.kind == "number":
            return self._number()
        if token.kind == "word":
            return self._of_word()
        if token.kind == "begin":
            return self._matrix()
        if token.text in _CLOSERS:
            return self._group()
        if token.text == "|":
            return self._absolute()
        if token.text in _MONEY:
            return self._money(self._unit_of_sign(self._take().text))
        if token.text == "^" and self._is(r"\circ", ahead=1):
            self._at += 2
            return self._degree()
        if token.kind == "command":
            return self._of_command(self._take().text)
        raise self._unexpected("a value")

    def _number(self) -> sympy.Expr:
        token = self._take()
        value = number_value(token.text)
        if token.text.isdigit():
            value = self._mixed(value)
        if self._word() == "and":
            for count in (3, 2, 1):
                words = tuple(self._word(ahead) for ahead in range(1, count + 1))
                part = math_words.read_number(words) if all(words) else None
                if part and part < 1:
                    self._at += count + 1
                    value += sympy.Rational(part.numerator, part.denominator)
                    break
        while factor := math_words.factor(self._word()):
            self._at += 1
            value *= sympy.Rational(factor.numerator, factor.denominator)
        return value

    def _mixed(self, whole: sympy.Rational) -> sympy.Expr:
        r"""A whole number and the fraction behind it: `3\frac{1}{2}` and `3 1/2` are three and a half."""
        if self._is(r"\frac"):
            part = self._of_command(self._take().text)
        elif self.next.kind == "number" and self.next.space and self._is("/", ahead=1):
            top, _, bottom = self._take(), self._take(), self._take()
            if not (top.text.isdigit() and bottom.text.isdigit() and int(bottom.text)):
                raise NotUnderstood("a number behind a number")
            part = sympy.Rational(int(top.text), int(bottom.text))
        else:
            return whole
        if not isinstance(part, sympy.Rational):
            return whole * part
        if not 0 < part < 1:
            raise NotUnderstood("an improper fraction behind a number")
        return whole + part

    def _of_word(self) -> sympy.Expr:
        token, word = self.next, self._word()
        if word in math_words.NUMBER_WORDS or token.text in ("a", "an"):
            for count in range(len(self._words_of_number()), 0, -1):
                number = math_words.read_number(tuple(self._word(ahead) for ahead in range(count)))
                if number is not None:
                    self._at += count
                    return sympy.Rational(number.numerator, number.denominator)
        bare = self._bare_units and self._is_behind_number() and math_units.find(token.text)
        if bare:
            self._at += 1
            return unit(bare)
        if token.text in _DOLLARS and self._is("$", ahead=1):
            self._at += 2
            return self._money(unit(_DOLLARS[token.text]))
        if token.text in _FUNCTIONS:
            self._at += 1
            return self._function(token.text)
        if word and (found := self._unit()) is not None:
            self._accept(*["."] * (token.text in ("Rs", "rs")))
            return self._money(found) if math_units.is_money(unit_name(found)) else found
        if token.text == "pi":
            self._at += 1
            return sympy.pi
        if word and len(word) > 1:
            raise NotUnderstood(f"{token.text!r} in an expression")
        if len(token.text) > _LONGEST_PRODUCT:
            raise NotUnderstood(f"the letters {token.text!r}, which are a word rather than a product")
        first, rest = token.text[0], token.text[1:]
        self._at += 1
        if rest:
            self._at -= 1
            self._tokens[self._at] = Token("word", rest, False, token.roman)
        return self._symbol(first, is_last=not rest)

    def _is_behind_number(self) -> bool:
        """Whether letters stand behind a number, with no variable and no power before: `3 m`, `12cm`, not `3m`."""
        before = self._tokens[: self._at]
        return (
            bool(before)
            and before[-1].kind == "number"
            and all(token.kind in ("number", "mark") and token.text != "^" for token in before)
            and (len(self.next.text) > 1 or self.next.space)
        )

    def _words_of_number(self) -> list[str]:
        words: list[str] = []
        while (word := self._word(len(words))) and (
            word in math_words.NUMBER_WORDS or word in ("a", "an", "and", "of", "point")
        ):
            words.append(word)
        return words

    def _symbol(self, name: str, is_last: bool = True) -> sympy.Expr:
        """A letter with what hangs on it: `x_{12}`, `x'`, `f(t)`."""
        full = name
        if is_last and self._accept("_"):
            full += "_" + self._verbatim()
        while is_last and self._accept("'"):
            full += "'"
        if full == "e":
            return sympy.E
        if full == "i" and full not in self._bound:
            return sympy.I
        if name in _APPLIED and is_last and self._is("(") and not self.next.space:
            return sympy.Function(full)(*self._arguments())
        return sympy.Symbol(full)

    def _verbatim(self) -> str:
        """The texts of a group's tokens, or of one token."""
        if not self._accept("{"):
            token = self._take()
            if token.kind not in ("word", "number", "command") or len(token.text) > 1 and token.kind == "word":
                raise NotUnderstood(f"{token.text!r} as an index")
            return token.text
        texts, depth = [], 1
        while depth:
            token = self._take()
            if token is _END:
                raise NotUnderstood("an open group")
            depth += (token.text == "{") - (token.text == "}")
            texts.append(token.text)
        return "".join(texts[:-1])

    def _group(self) -> sympy.Expr:
        opener, bars, self._bars = self._take().text, self._bars, 0
        value = self.choice_of()
        self._expect(_CLOSERS[opener])
        self._bars = bars
        return value

    def _absolute(self) -> sympy.Expr:
        self._take()
        self._bars += 1
        value = self.sum()
        self._bars -= 1
        self._expect("|")
        return value.det() if isinstance(value, sympy.MatrixBase) else sympy.Abs(value)

    def _unit_of_sign(self, sign: str) -> sympy.Symbol:
        return unit(math_units.find(sign))

    def _money(self, currency: sympy.Symbol) -> sympy.Expr:
        r"""A currency before its number, which may have the sign: `\$-18`; or behind it, alone."""
        negative = self._is("-")
        if self._peek(negative).kind != "number":
            return currency
        self._at += negative
        return currency * self._number() * (-1) ** negative

    def _of_command(self, name: str) -> sympy.Expr:
        if name in _CONSTANTS:
            return _CONSTANTS[name]
        if name[1:] in _FUNCTIONS and name != r"\sqrt":
            return self._function(name[1:])
        if name == r"\mu" and self.next.kind == "word" and self._peek(-2).kind == "number":
            micro = math_units.find("µ" + self.next.text)
            if micro and (self.next.roman or self._bare_units):
                self._at += 1
                return unit(micro)
        if name in (r"\Omega", r"\AA") and self._peek(-2).kind == "number":
            return unit(math_units.find(name))
        if name in LETTERS:
            return self._symbol(name)
        if name == r"\frac":
            top, bottom = self._argument(split=True), self._argument(split=True)
            return top / bottom
        if name == r"\binom":
            return sympy.binomial(self._argument(split=True), self._argument(split=True))
        if name == r"\sqrt":
            index = sympy.Integer(2)
            if self._accept("["):
                index = self.sum()
                self._expect("]")
            return self._argument() ** (1 / index)
        if name in (r"\lfloor", r"\lceil"):
            value = self.sum()
            self._expect(name.replace("l", "r", 1))
            return sympy.floor(value) if name == r"\lfloor" else sympy.ceiling(value)
        if name in (r"\sum", r"\prod"):
            return self._repeated(sympy.Sum if name == r"\sum" else sympy.Product)
        if name == r"\int":
            return self._integral()
        if name == r"\lim":
            return self._limit()
        if name in _ACCENTS or name in _NAMES:
            return self._named(name)
        raise NotUnderstood(f"the command {name}")

    def _argument(self, split: bool = False) -> sympy.Expr:
        """A group or one token; of a number its first digit alone, if `split`: `\\frac12`."""
        if self._is("{"):
            return self._group()
        token = self.next
        if split and token.kind == "number" and len(token.text) > 1:
            if not token.text.isdigit():
                raise NotUnderstood(f"{token.text!r} as an argument without braces")
            self._tokens[self._at] = Token("number", token.text[1:])
            return sympy.Integer(int(token.text[0]))
        if token.kind == "number":
            return number_value(self._take().text)
        return self._atom()

    def _arguments(self) -> list[sympy.Expr]:
        opener, bars, self._bars = self._take().text, self._bars, 0
        values = [self.sum()]
        while self._accept(","):
            values.append(self.sum())
        self._expect(_CLOSERS.get(opener, r"\}"))
        self._bars = bars
        return values

    def _function(self, name: str) -> sympy.Expr:
        """A function with its power, its base and its argument: in brackets, or the product behind it."""
        function, power = _FUNCTIONS[name], sympy.Integer(1)
        base = None
        while self._is("^", "_"):
            if self._take().text == "^":
                power = self._argument() if not self._is("-") else self._sign() * self._argument()
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
            while self._starts_factor() and not self._starts_function():
                arguments[0] *= self._factor()
        arguments = [argument.xreplace({_DEGREE: sympy.pi / 180}) for argument in arguments]
        value = function(*arguments) if base is None else sympy.log(*arguments, base)
        return value**power

    def _starts_function(self) -> bool:
        return self.next.text.removeprefix("\\") in _FUNCTIONS or bool(self._word())

    def _repeated(self, kind: Callable[..., sympy.Expr]) -> sympy.Expr:
        """A sum or a product over an index from one whole number to another."""
        self._expect("_")
        self._expect("{")
        index = self._take().text
        self._expect("=")
        first = self.sum()
        self._expect("}")
        self._expect("^")
        last = self._argument()
        self._bound.add(index)
        value = kind(self._term(), (sympy.Symbol(index), first, last)).doit()
        self._bound.discard(index)
        return value

    def _integral(self) -> sympy.Expr:
        """An integral from one bound to another."""
        self._expect("_")
        first = self._argument(split=True)
        self._expect("^")
        last = self._argument(split=True)
        end = next(
            (at for at in range(self._at, len(self._tokens)) if re.fullmatch("d[a-z]", self._tokens[at].text)), None
        )
        if end is None:
            raise NotUnderstood("an integral over nothing")
        inner = _Parser(self._tokens[self._at : end], self._bare_units).sum() if end > self._at else sympy.Integer(1)
        self._at = end + 1
        return sympy.Integral(inner, (sympy.Symbol(self._tokens[end].text[1]), first, last)).doit()

    def _limit(self) -> sympy.Expr:
        self._expect("_")
        self._expect("{")
        symbol = self._take().text
        self._expect(r"\to", r"\rightarrow")
        point = self.sum()
        self._expect("}")
        return sympy.limit(self._term(), sympy.Symbol(symbol), point)

    def _named(self, name: str) -> sympy.Expr:
        r"""A letter with an accent, or the name of a thing: `\vec{v}`, `\overline{AB}`, `\angle ABC`."""
        letters = self._verbatim() if self._is("{") else self._take().text
        if not letters.removeprefix("\\").isalpha():
            raise NotUnderstood(f"{name} of {letters!r}")
        if name == r"\overline" or name.endswith("angle") and len(letters) == 3 and name != r"\triangle":
            letters = min(letters, letters[::-1])  # a segment, an angle: the same from its other end
        return self._symbol(f"{name} {letters}")

    def _matrix(self) -> sympy.Expr:
        kind = self._take().text
        if kind not in _MATRICES:
            raise NotUnderstood(f"the environment {kind}")
        rows = [[]]
        while self.next.kind != "end":
            rows[-1].append(self.sum())
            if self._accept("\\\\"):
                rows.append([])
            elif not self._accept("&") and self.next.kind != "end":
                raise NotUnderstood(f"{self.next.text!r} in a matrix")
        self._take()
        rows = [row for row in rows if row]
        if len({len(row) for row in rows}) != 1:
            raise NotUnderstood("rows of different lengths")
        matrix = sympy.ImmutableMatrix(rows)
        return matrix.det() if kind == "vmatrix" else matrix


def is_unit(value: sympy.Expr) -> bool:
    """Whether a factor is a unit, or a product of units."""
    symbols = getattr(value, "free_symbols", None)
    return bool(symbols) and all(map(unit_name, symbols)) and value.as_coeff_Mul()[0] == 1


def _is_measured(value: sympy.Expr) -> bool:
    """Whether a factor ends with a unit or a counted thing."""
    symbols = getattr(value, "free_symbols", None)
    return bool(symbols) and all(unit_name(symbol) or noun(symbol) for symbol in symbols)


def _times(value: sympy.Expr, over: sympy.Expr | None, factor: sympy.Expr) -> sympy.Expr:
    """The product; of units behind a slash, which all stand below it: `J/kg K`; of a currency said twice, once."""
    if factor.is_Symbol and math_units.is_money(unit_name(factor) or "") and factor in value.free_symbols:
        return value
    return value / factor if over is not None and is_unit(over) and is_unit(factor) else value * factor
