r"""Numbers as they are written: digits in groups, decimal commas, repeating decimals, powers of ten.

A number's plain form is what `value` reads: `1234.5` for `1{,}234.5`, `0.1(6)` for `0.1\overline{6}`, `1.5e3`.
"""

from __future__ import annotations

import functools
import re
from fractions import Fraction

_THIN = r"\{,\}|\\!,|,\\!|\\[,;:! ]|\\thinspace\s?|[ ~'_]"
# The forms of a number; COMMA is a comma where commas group digits, and nothing else where they do not.
_FORMS = [
    # 1.234.567,89 and 1.234.567: two points can only group.
    r"(?P<continental>[1-9]\d{0,2}(?:\.\d{3})+(?:,|\{,\})\d+|[1-9]\d{0,2}(?:\.\d{3}){2,})(?![\d.])",
    # 1,234,567.8, with one separator throughout.
    r"(?P<grouped>[1-9]\d{0,2}(?P<by>THIN|COMMA)\d{3}(?:(?P=by)\d{3})*(?!(?P=by)?\d)(?:\.\d+)?)(?!,\d)",
    # 12,34,567
    r"(?P<indian>[1-9]\d?(?:COMMA\d{2})+COMMA\d{3})(?!,?\d)",
    # 3{,}14
    r"(?P<decimal>\d+\{,\}\d+)(?!\{,\})",
    # 0.1\overline{6}, 0.\dot{1}2\dot{3} and 0.1(6)
    r"(?P<fixed>\d*\.\d*)(?P<period>\\(?:overline|bar|dot)\s*(?:\{\d+\}|\d)(?:\d*\\dot\s*\{?\d\}?)?|\(\d+\))",
    # 0.1666... shows its period three times, a long one twice.
    r"(?P<start>\d*\.\d*?)(?:(?P<short>\d{1,2}?)(?P=short){2,}|(?P<long>\d{3,9}?)(?P=long)+)\s*…",
    r"(?P<plain>\d+(?:\.\d+)?|\.\d+)(?:[eE](?P<power>[-+]?\d+)(?![\dA-Za-z]))?",
]


@functools.cache
def pattern(commas: bool) -> re.Pattern[str]:
    """A number; `commas` says whether a comma groups digits, `1,234`, or separates two numbers."""
    forms = "|".join(_FORMS).replace("THIN", _THIN).replace("COMMA", "," if commas else "(?!)")
    return re.compile(forms, re.ASCII)


def plain(match: re.Match[str]) -> str:
    """The plain form of a number that `pattern` matches."""
    part = match.groupdict()
    if part["plain"]:
        return part["plain"] + ("e" + part["power"] if part["power"] else "")
    if part["fixed"] is not None:
        return f"{part['fixed']}({_digits(part['period'])})"
    if part["start"] is not None:
        return f"{part['start']}({part['short'] or part['long']})"
    if part["decimal"]:
        return part["decimal"].replace("{,}", ".")
    if part["continental"]:
        whole, _, decimals = part["continental"].partition(",")
        return _digits(whole) + ("." + _digits(decimals) if decimals else "")
    whole, point, decimals = (part["grouped"] or part["indian"]).partition(".")
    return _digits(whole) + point + decimals


def _digits(text: str) -> str:
    return re.sub("[^0-9]", "", text)


def value(text: str) -> Fraction:
    """The value of a plain form: exact, its period included."""
    digits, _, power = text.partition("e")
    whole, _, rest = digits.partition(".")
    decimals, _, period = rest.removesuffix(")").partition("(")
    number = Fraction(int((whole + decimals) or "0"), 10 ** len(decimals))
    if period:
        number += Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(decimals))
    return number * Fraction(10) ** int(power or 0)


def places(text: str) -> int:
    """The decimals that a plain form gives: 2 of `3.14`, -1 of `6.28e3`."""
    digits, _, power = text.partition("e")
    return len(digits.partition(".")[2]) - int(power or 0)


def significant(text: str) -> int:
    """The digits of a plain form from its first that is not zero."""
    return len(text.partition("e")[0].replace(".", "").lstrip("0"))
