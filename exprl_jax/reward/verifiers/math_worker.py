"""The process that compares answers: `python -m exprl_jax.reward.verifiers.math_worker <limit in seconds>`.

Requests are JSON lines on stdin, `[boxed, answer]`; each is answered by one line on stdout, a JSON object.  The first
line, before any request, is `{"ready": true}`, or `{"error": "..."}` where the process cannot work.  It ends when stdin
closes, and, whatever it is doing and whoever still lives, soon after an item's time limit.

JAX is not imported here: a worker starts in the time that math-verify takes to load.
"""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import signal
import sys
from typing import Any, NamedTuple

import sympy

from exprl_jax.reward.verifiers.math import last_boxed

# A comparison may ask for any amount of memory; beyond this the request fails instead of the machine.
_ADDRESS_SPACE = 4 << 30
# SymPy's caches grow; a worker that holds this much more than when it was ready is replaced.
_RETIRE_BYTES = 256 << 20
# The parent kills at the limit; this is for a worker whose parent was killed first.
_GRACE_S = 1.0

_WRAPPER = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_WORDS = re.compile(r"[A-Za-z]{3,}(?:[ '-]+[A-Za-z]+)*")
_BASED = re.compile(r"(\d[\dA-Fa-f]*)_\{?(\d{1,2})\}?")
_CLOCK = re.compile(r"\d{1,2}:[0-5]\d(?::[0-5]\d)?")

# Units that are compared and converted: `dimension: unit and its names = size, ...`.  All others are dropped.
_UNITS: dict[str, tuple[str, str]] = {}
for _line in """
length: mm millimeter millimetre = 1/1000, cm centimeter centimetre = 1/100, m meter metre = 1, km kilometer = 1000
length: in inch inche = 127/5000, ft foot feet = 381/1250, yd yard = 1143/1250, mi mile = 201168/125
mass: mg milligram = 1/1000, g gram = 1, kg kilogram = 1000
time: s sec second = 1, min minute = 60, h hr hour = 3600, day = 86400, week = 604800
angle: degree deg = pi/180, rad radian = 1
money: cent = 1/100, dollar usd = 1
percent: percent = 1/100
morning: am = 1
afternoon: pm = 1
""".strip().splitlines():
    _dimension, _, _list = _line.partition(": ")
    for _entry in _list.split(", "):
        _names, _, _size = _entry.partition(" = ")
        _UNITS |= {name: (_dimension, _size) for name in _names.split()}
_RATIOS = {"percent", "angle"}  # a number without unit may be this unit, or the plain number that it stands for

_UNIT_TEXT = re.compile(
    r"(.*[^\s^_{(\[+\-*/=<>,\\])(?:\\[,;:! ]|[~\s])*"
    r"\\(?:text|textrm|mathrm|mbox)\s*\{((?!\s*(?:[deijT]|and|or)\s*\})(?:[^{}]|\{\d\})*)\}(?:\^\{?(\d)\}?)?",
    re.DOTALL,
)
_UNIT_BARE = re.compile(r"([-+]?[\d.,:/]+)(\s*)([A-Za-z][A-Za-z. ]*[A-Za-z.]|[A-Za-z])(?:\^\{?(\d)\}?)?")
_PERCENT = re.compile(r"(.+?)\s*(?:\\?%|\\text\s*\{\s*\\?%\s*\})", re.DOTALL)
_DEGREE = re.compile(r"\s*\^\s*\{?\s*\\circ\s*\}?")
_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
_CURRENCY = re.compile(r"^([-+]?)\s*(?:\\\$|[€£¥])")

_REWRITES = [
    (re.compile(pattern), by)
    for pattern, by in [
        (r"(?<!\\)\\[()\[\]]", ""),
        (r"^\s*(?:\\approx|\\sim|≈|~)\s*", ""),
        (r"\\approx|≈", "="),
        (r"√\s*(?=\{)", r"\\sqrt"),
        (r"√\s*(\d+|\w)", r"\\sqrt{\1}"),
        (r"^\\text\s*\{[^{}]*(?:\bis|[:=])\s*\}\s*(?=\S)", ""),
        (r"\\varnothing|∅", r"\\emptyset"),
        (r"\\degree(?![A-Za-z])|°", r"^\\circ"),
        (r"−|–", "-"),
        (r"∞", r"\\infty "),
        (r"π", r"\\pi "),
        (r"×", r"\\times "),
        (r"·", r"\\cdot "),
        (r"≤|\\leqslant", r"\\le "),
        (r"≥|\\geqslant", r"\\ge "),
        (r"^(?:\\text\s*\{)?\s*(?:infinity|infinitely many)\s*\}?$", r"\\infty"),
        (r"^(?:\\text\s*\{)?\s*[Nn]o (?:real )?solutions?\s*\}?$", r"\\emptyset"),
        (r"\\langle", "("),
        (r"\\rangle", ")"),
        (r"^\\\{\s*[a-z]\s*(?:\\mid|\||:)(.+)\\\}$", r"\1"),
        (r"[,;]?(?:\\[,;:! ]|\\q?quad|\s)*\(?[a-z]\s*\\in\s*\\mathbb\s*\{?[ZN]\}?\)?$", ""),
        (r"^([^,]*)\\pm([^,]*)$", r"\1+\2, \1-\2"),
        # Digits in groups of three.
        (r"(?<=\d)(?:\{,\}|\\!,|,\\!|\\[,;:! ])(?=\d{3}(?!\d))", ""),
        (r"^(-?\d{1,3}) (?=\d{3}(?: \d{3})*$)|(?<=\d{3}) (?=\d{3}(?: \d{3})*$)", r"\1"),
        (r"^(-?\d+(?:\.\d+)?)[eE]([-+]?\d+)$", r"\1\\cdot 10^{\2}"),
        (r"(?<![A-Za-z\\])C_\{?(\d+)\}?\^\{?(\d+)\}?", r"\\binom{\1}{\2}"),
        (r"(\d)\1\1(?:\\ldots|\\dots|\\cdots|\.\.\.|…)$", r"\\overline{\1}"),
    ]
]
# Most answers are numbers, which the grammar reads some twenty times as slowly.
_NUMBER = re.compile(r"([-+]?(?:\d+|\d{1,3}(?:,\d{3})+)(?:\.\d+)?)(/(\d+))?")
_COMMAS = re.compile(r"(?<![\d,])\d{1,3}(?:,\d{3})+(?=\.\d)")
_DECIMAL = re.compile(r"(?<![\d.])(\d*)\.(\d*)(?:\\overline\{(\d+)\})?(?![\d.])")
_IMAGINARY = re.compile(r"(?<![A-Za-z\\])i(?![A-Za-z])|\\i(?![A-Za-z])|\\(?:bar|overline|mathbb\{C\})")


class _Quantity(NamedTuple):
    """What one side of a comparison says: SymPy's value, its unit and the unit's power."""

    value: Any
    unit: str | None
    power: int


def compare(boxed: str, answer: str) -> str:
    """Whether what a response boxed is equivalent to the reference answer.

    Args:
      boxed: the content of the response's box.
      answer: the reference answer, bare, in dollar signs, or boxed.

    Returns:
      `correct`, `wrong`, or `unparsable` where one of the two cannot be read at all.
    """
    boxed, answer = (_bare(text) for text in (boxed, answer))
    if not boxed or not answer:
        return "unparsable"
    if boxed == answer:
        return "correct"
    # As mathematics a word is the product of its letters: "listen" would equal "silent".
    if _WORDS.fullmatch(_words(answer)):
        return "correct" if _words(boxed) == _words(answer) else "wrong"
    based = [_BASED.fullmatch(text) for text in (boxed, answer)]
    if any(based) and all(found or text.isalnum() for found, text in zip(based, (boxed, answer), strict=True)):
        return "correct" if _same_based(boxed, answer) else "wrong"
    got, expected = _read(boxed, answer), _read(answer, boxed)
    if not got or not expected:
        return "unparsable"
    return "correct" if _same_quantity(expected, got) or _rounds_to(got, answer, boxed) else "wrong"


def _bare(text: str) -> str:
    """The text inside boxes and dollar signs, written in LaTeX's symbols."""
    inner = last_boxed(text)
    text = (text if inner is None else inner).strip()
    if text.startswith("$") and text.endswith("$") and text.count("$") - text.count("\\$") in (2, 4):
        text = text.strip("$")
    for pattern, by in _REWRITES:
        text = pattern.sub(by, text)
    return text.strip().removesuffix("$").removesuffix(".").strip()


def _words(text: str) -> str:
    words = " ".join(_WRAPPER.sub(r"\1", text).split()).casefold().rstrip(".")
    words = re.sub(r"^(?:an?|the) ", "", words)
    return " and ".join(sorted(words.split(" and ")))


def _same_based(*texts: str) -> bool:
    """Whether numerals such as `1011_2` are one number; without its base a numeral may be either of two."""
    numbers = []
    for text in texts:
        found = _BASED.fullmatch(text)
        digits, base = found.groups() if found else (text, None)
        try:
            numbers.append((digits.upper(), base, int(digits, int(base or 10))))
        except ValueError:  # a digit that the base has not
            numbers.append((digits.upper(), base, None))
    (a_digits, a_base, a), (b_digits, b_base, b) = numbers
    if a is not None and a == b:
        return True
    return a_digits == b_digits and (a_base == b_base or a_base is None or b_base is None)


def _read(text: str, other: str) -> _Quantity | None:
    """Text as a quantity; None if it cannot be read.  How the other side is written may decide a reading."""
    from latex2sympy2_extended import NormalizationConfig, latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig

    text, unit, power = _without_unit(text)
    if _CLOCK.fullmatch(text) and (unit or _CLOCK.fullmatch(_without_unit(other)[0])):
        text = "(" + text.replace(":", ",") + ",0)"  # a time, not a ratio
    elif re.fullmatch(r"\d+(?::\d+){2,}", text):
        *parts, last = text.split(":")
        text = "(" + ",".join(rf"\frac{{{part}}}{{{last}}}" for part in parts) + ",1,0)"
    plain = _NUMBER.fullmatch(text)
    if plain and int(plain[3] or 1):
        return _Quantity(sympy.Rational(plain[1].replace(",", "")) / int(plain[3] or 1), unit, power)
    # Their own reading of units takes the variable off the end of `r^2 h`, and of case, R - r for zero.
    normalization = NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="none")
    imaginary = _IMAGINARY.search(text) or _IMAGINARY.search(other)
    for part in (_COMMAS.sub(lambda found: found[0].replace(",", ""), text), text.rpartition("=")[2]):
        try:
            value = latex2sympy(
                _DECIMAL.sub(_fraction, part),
                is_real=None if imaginary else True,
                normalization_config=normalization,
                conversion_config=ConversionConfig(lowercase_symbols=False),
            )
            if imaginary:
                value = value.subs({symbol: sympy.I for symbol in value.free_symbols if symbol.name == "i"})
            return _Quantity(value, unit, power)
        except Exception:  # the parser raises whatever it meets
            continue
    return None


def _without_unit(text: str) -> tuple[str, str | None, int]:
    """Text without the unit at its end, the unit if it is in the table, and its power."""
    known, power = None, 1
    sign = _CURRENCY.match(text)
    if sign:
        known, text = "dollar" if "$" in sign[0] else None, sign[1] + text[sign.end() :].strip()
    text = text.replace("$", "").replace("\\text{ }", " ").strip()
    for pattern, names in ((_UNIT_TEXT, 2), (_UNIT_BARE, 3)):
        found = pattern.fullmatch(text)
        if found:
            name = found[names].replace(".", "").strip().casefold()
            marked = re.fullmatch(r"(.*?)\^\{?(\d)\}?", name)
            name, exponent = (marked[1], marked[2]) if marked else (name, found[names + 1])
            unit = next((each for each in (name, name.removesuffix("s")) if each in _UNITS), None)
            # Letters behind a number are a unit if they are one in the table, or a word behind a space.
            if names == 3 and not (len(name) > 2 and found[2] or unit and (found[2] or len(name) > 1)):
                break
            if re.search(r"\b(?:or|and|to)\b", name):
                break
            text, known, power = found[1].strip(), unit or known, int(exponent or 1)
    percent = _PERCENT.fullmatch(text)
    if percent:
        text, known, power = percent[1], "percent", 1
    if _TRIGONOMETRIC.search(text):
        text = re.sub(rf"(\d+(?:\.\d+)?){_DEGREE.pattern}", r"(\\frac{\1}{180}\\pi)", text)
    elif _DEGREE.search(text):
        text, known, power = _DEGREE.sub("", text), "degree", 1
    return text, known, power


def _fraction(decimal: re.Match[str]) -> str:
    """A decimal as the fraction that it is, so that nothing is rounded; with an overlined end, the periodic one."""
    whole, digits, period = decimal.groups()
    if not digits and not period:
        return decimal[0]
    start = int((whole + digits) or "0")
    if period is None:
        return rf"{{\frac{{{start}}}{{{10 ** len(digits)}}}}}"
    top = int(whole + digits + period) - start
    return rf"{{\frac{{{top}}}{{{10 ** len(digits) * (10 ** len(period) - 1)}}}}}"


def _same_quantity(expected: _Quantity, got: _Quantity) -> bool:
    if expected.unit and got.unit:
        (dimension, size), (other_dimension, other_size) = _UNITS[expected.unit], _UNITS[got.unit]
        if (dimension, expected.power) != (other_dimension, got.power):
            return False
        factor = (sympy.sympify(other_size) / sympy.sympify(size)) ** got.power
        return _same(expected.value, got.value) if factor == 1 else _same(expected.value, _scaled(got.value, factor))
    if _same(expected.value, got.value):
        return True
    for unit in filter(None, (expected.unit, got.unit)):
        dimension, size = _UNITS[unit]
        if dimension in _RATIOS:
            sides = [_scaled(side.value, sympy.sympify(size)) if side.unit else side.value for side in (expected, got)]
            return _same(*sides)
    return False


def _scaled(value: Any, factor: Any) -> Any:
    return value * factor if isinstance(value, sympy.Expr) else None


def _same(expected: Any, got: Any) -> bool:
    import math_verify

    if expected is None or got is None:
        return False
    expected, got = _ordered(expected, got)
    # Their own time limit is an alarm, which a long computation in C does not notice; ours is outside.
    if math_verify.verify(expected, got, allow_set_relation_comp=True, timeout_seconds=None):
        distance = _distance(expected, got)
        return distance is None or distance < 10**-15
    return _same_root(expected, got) or _same_solutions(expected, got)


def _ordered(expected: Any, got: Any) -> tuple[Any, Any]:
    """Values of several unknowns, `x=2, y=1`, in their order, where the other side names no unknowns."""
    sides = [getattr(side, "_unsorted_args", None) or () for side in (expected, got)]
    unknowns = [{arg.lhs for arg in args if isinstance(arg, sympy.Eq)} for args in sides]
    if all(len(args) > 1 for args in sides) and sorted(map(len, unknowns))[0] == 0 and max(map(len, unknowns)) > 1:
        return tuple(sympy.Tuple(*(arg.rhs if isinstance(arg, sympy.Eq) else arg for arg in args)) for args in sides)
    return expected, got


def _distance(expected: Any, got: Any) -> float | None:
    """How far apart two numbers are, relative to the larger; None unless both are numbers.

    math-verify rounds what is close to zero: it takes 10^{-20} for 10^{-21}.
    """
    if not all(isinstance(side, sympy.Expr) and side.is_number and side.is_finite for side in (expected, got)):
        return None
    a, b = (side.evalf(60) for side in (expected, got))
    largest = max(abs(a), abs(b))
    # What is left of an irrational zero is noise.
    if largest == 0 or largest < 10**-100 and not (expected.is_rational and got.is_rational):
        return 0.0
    return float(abs(a - b) / largest)


def _same_root(expected: Any, got: Any) -> bool:
    """Whether irrational numbers agree in forty digits; math-verify does not simplify every root."""
    if getattr(expected, "is_rational", True) and getattr(got, "is_rational", True):
        return False
    distance = _distance(expected, got)
    return distance is not None and distance < 10**-40


def _same_solutions(expected: Any, got: Any) -> bool:
    """Whether two inequalities in one unknown have the same solutions."""
    unknowns = [getattr(side, "free_symbols", None) for side in (expected, got)]
    inequalities = (sympy.And, sympy.Gt, sympy.Ge, sympy.Lt, sympy.Le)
    if unknowns[0] != unknowns[1] or len(unknowns[0] or ()) != 1:
        return False
    if not all(isinstance(side, inequalities) for side in (expected, got)):
        return False
    try:
        return expected.as_set() == got.as_set()
    except (NotImplementedError, TypeError, ValueError):  # SymPy cannot solve it
        return False


def _rounds_to(got: _Quantity, answer: str, boxed: str) -> bool:
    """Whether an exact value rounds to a reference that is a decimal of at least three digits."""
    if not re.fullmatch(r"-?\d*\.\d+", answer) or len(answer.strip("-0.").replace(".", "")) < 3 or "." in boxed:
        return False
    value = got.value
    if got.unit or not isinstance(value, sympy.Expr) or not value.is_number or value.is_integer or not value.is_real:
        return False
    places = len(answer.partition(".")[2])
    return bool(abs(value - sympy.Rational(answer)) * 2 * 10**places <= 1)


def _resident_bytes() -> int:
    """Memory held now; not `ru_maxrss`, which a process inherits from the parent that executed it."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def main() -> None:
    """Answers requests until stdin closes."""
    limit_s = float(sys.argv[1])
    # Replies leave by a descriptor of their own, so that nothing a library prints can be taken for one.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def reply(**fields: Any) -> None:
        replies.write(json.dumps(fields) + "\n")
        replies.flush()

    try:
        logging.disable(logging.CRITICAL)
        # The first comparison loads what the package loads late.
        working = compare("\\frac{1}{2}", "0.5") == "correct" and compare("x + 1", "(x - 1)") == "wrong"
    except ImportError as error:
        reply(error=f"the answer grader needs the package math-verify: {error}; pip install math-verify")
        return
    if not working:
        reply(error="math-verify says that 1/2 is not 0.5, or that x + 1 is x - 1: it is broken; reinstall it")
        return
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
    # The kernel's own response to the alarm, which asks nothing of the interpreter.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    at_start = _resident_bytes()
    reply(ready=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, limit_s + _GRACE_S)
        verdict = compare(*json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, 0)
        retire = _resident_bytes() - at_start > _RETIRE_BYTES
        reply(verdict=verdict, retire=retire)


if __name__ == "__main__":
    main()
