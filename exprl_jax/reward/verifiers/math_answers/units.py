"""Units of measure: what they are called in answers, and their sizes and dimensions, which pint knows."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from fractions import Fraction
from typing import NamedTuple

import pint
import sympy

_REGISTRY = pint.UnitRegistry(non_int_type=Fraction)
_MONEY = {
    "USD": "$ dollar usd buck us-dollar",
    "EUR": "€ euro eur",
    "GBP": "£ gbp",
    "JPY": "¥ yen jpy",
    "INR": "₹ rupee inr Rs rs",
    "CNY": "yuan rmb cny",
    "RUB": "₽ ruble rouble rub",
    "AUD": "aud australian-dollar",
    "CAD": "cad canadian-dollar",
    "HKD": "hkd",
    "NZD": "nzd",
}
# Dimensions of their own: `square units` are no `cubic units`, decibels and percentage points are nothing else.
for _definition in (
    *(f"{currency} = [{currency.lower()}]" for currency in _MONEY),
    "US_cent = USD / 100",
    "UK_penny = GBP / 100",
    "level_decibel = [level]",
    "length_unit = [some_length]",
    "field_gauss = tesla / 10000",  # pint's is Gaussian, of another dimension
    "land_acre = 43560 * foot ** 2",  # pint's is of survey feet
    "percentage_point = [share]",
):
    _REGISTRY.define(_definition)

# By pint's names: the symbols with any prefix, and the words.
_PREFIXED = {
    "meter": "m metre",
    "gram": "g gm",
    "second": "s sec",
    "liter": "L l litre",
    "newton": "N",
    "joule": "J",
    "watt": "W",
    "volt": "V",
    "ampere": "A amp",
    "coulomb": "C",
    "farad": "F",
    "henry": "H",
    "tesla": "T",
    "weber": "Wb",
    "pascal": "Pa",
    "hertz": "Hz",
    "kelvin": "K",
    "mole": "mol",
    "electron_volt": "eV electronvolt",
    "calorie": "cal",
    "ohm": r"Ω \Omega",
    "byte": "B",
    "bit": "",
    "bar": "",
    "molar": "M",
    "parsec": "pc",
    "becquerel": "Bq",
    "gray": "Gy",
    "sievert": "Sv",
}
_PREFIXES = {
    "femto": "f",
    "pico": "p",
    "nano": "n",
    "micro": "µ u",
    "milli": "m",
    "centi": "c",
    "deci": "d",
    "hecto": "h",
    "kilo": "k",
    "mega": "M",
    "giga": "G",
    "tera": "T",
}
_UNPREFIXED = {
    "minute": "min",
    "hour": "h hr hrs",
    "day": "d",
    "week": "wk",
    "fortnight": "",
    "month": "mo",
    "year": "yr yrs",
    "decade": "",
    "century": "centuries",
    "inch": "in inches",
    "foot": "ft feet",
    "yard": "yd",
    "mile": "mi",
    "nautical_mile": "nmi",
    "astronomical_unit": "AU au",
    "light_year": "ly light-year",
    "micron": "",
    "angstrom": r"Å \AA",
    "land_acre": "acre",
    "hectare": "ha",
    "gallon": "gal",
    "quart": "qt",
    "pint": "pt",
    "cup": "",
    "fluid_ounce": "",
    "tablespoon": "tbsp",
    "teaspoon": "tsp",
    "cubic_centimeter": "cc",
    "pound": "lb lbs",
    "ounce": "oz",
    "ton": "",
    "metric_ton": "tonne t",
    "stone": "",
    "dalton": "u amu",
    "knot": "kn",
    "mile_per_hour": "mph",
    "kilometer_per_hour": "kph kmh kmph",
    "mile/gallon": "mpg",
    "standard_atmosphere": "atm atmosphere",
    "torr": "",
    "millimeter_Hg": "mmHg",
    "pound_force_per_square_inch": "psi",
    "dyne": "dyn",
    "erg": "",
    "horsepower": "hp",
    "british_thermal_unit": "Btu BTU",
    "newton*meter": "Nm",
    "newton*second": "Ns",
    "watt*hour": "Wh watt-hour",
    "kilowatt*hour": "kWh kilowatt-hour",
    "milliampere*hour": "mAh",
    "field_gauss": "gauss G",
    "radian": "rad",
    "degree": "deg °",
    "arcminute": "'",
    "arcsecond": "''",
    "turn": "revolution rev",
    "revolutions_per_minute": "rpm",
    "steradian": "sr",
    "lumen": "lm",
    "lux": "lx",
    "candela": "cd",
    "carat": "",
    "degC": "celsius °C",
    "degF": "fahrenheit °F",
    "percent": "%",
    "percentage_point": "",
    "level_decibel": "dB decibel",
    "length_unit": "unit",
    "US_cent": "cent ¢ penny pennies",
    "UK_penny": "pence",
    **_MONEY,
}
# Everyday words that a prefix and a symbol make up.
_NEVER = {"as", "us", "pm", "has", "mo"}


def _names() -> Mapping[str, str]:
    """What answers call units, each with pint's name."""
    names = {}
    for unit, others in _PREFIXED.items():
        for prefix, signs in _PREFIXES.items():
            for name in (unit.replace("_", ""), *others.split()):
                is_word = name.islower() and len(name) > 2 and name not in ("mol", "cal", "sec", "amp")
                rare = prefix in ("centi", "deci", "hecto") and unit not in ("meter", "liter", "gram", "pascal")
                if not rare:
                    names |= {(prefix if is_word else sign) + name: prefix + unit for sign in signs.split()}
    for unit, others in (_PREFIXED | _UNPREFIXED).items():
        names |= {name.replace("-", " "): unit for name in (unit.replace("_", " "), *others.split())}
    names |= {"kilo": "kilogram", "kcal": "kilocalorie"}
    return {name: unit for name, unit in names.items() if name not in _NEVER}


_NAMES = _names()
# Whose size has a pi in it, which pint rounds.
_ANGLES = {
    "degree": sympy.pi / 180,
    "arcminute": sympy.pi / 10800,
    "arcsecond": sympy.pi / 648000,
    "turn": 2 * sympy.pi,
    "revolutions_per_minute": sympy.pi / 30,
}
# How far zero is above absolute zero, in the scale's own degrees.
_ZEROS = {"degC": sympy.Rational(27315, 100), "degF": sympy.Rational(45967, 100)}
_DEGREES = {"degC": "kelvin", "degF": "delta_degree_Fahrenheit"}


class Unit(NamedTuple):
    """A product of units.

    Attributes:
      names: pint's names and their powers.
      size: of one of it, in the basic units of `dimension`.
      dimension: basic units and their powers.
      zero: what is added before `size` multiplies; not zero for a temperature that stands alone.
    """

    names: tuple[tuple[str, sympy.Expr], ...]
    size: sympy.Expr
    dimension: tuple[tuple[str, sympy.Expr], ...]
    zero: sympy.Expr


@functools.lru_cache(maxsize=4096)
def find(name: str) -> str | None:
    """Pint's name of what an answer calls `name`, `km` or `Kilometers`; None if that is no unit."""
    lower = name.casefold()
    candidates = [name]
    if len(name) > 3:
        candidates += [name.removesuffix("s"), lower, lower.removesuffix("s")]
    return next((_NAMES[candidate] for candidate in candidates if candidate in _NAMES), None)


def is_money(name: str) -> bool:
    """Whether pint's name is a currency's."""
    return name in _MONEY


@functools.lru_cache(maxsize=4096)
def _basic(name: str) -> tuple[sympy.Expr, tuple[tuple[str, sympy.Expr], ...]]:
    one = _REGISTRY.Quantity(Fraction(1), _DEGREES.get(name, name)).to_root_units()
    size = Fraction(one.magnitude)
    units = tuple((unit, sympy.Rational(str(power))) for unit, power in one.unit_items())
    return _ANGLES.get(name, sympy.Rational(size.numerator, size.denominator)), units


def product(powers: Mapping[str, sympy.Expr]) -> Unit:
    """The product of units, by pint's names, to their powers."""
    size, dimension = sympy.Integer(1), {}
    for name, power in powers.items():
        basic, units = _basic(name)
        size *= basic**power
        for unit, exponent in units:
            dimension[unit] = dimension.get(unit, 0) + exponent * power
    alone = next(iter(powers)) if set(powers.values()) == {1} and len(powers) == 1 else ""
    return Unit(
        names=tuple(sorted(powers.items(), key=str)),
        size=size,
        dimension=tuple(sorted((unit, power) for unit, power in dimension.items() if power)),
        zero=_ZEROS.get(alone, sympy.Integer(0)),
    )


def converted(value: sympy.Expr, unit: Unit, to: Unit) -> sympy.Expr | None:
    """A value in another unit; None if that has other dimensions."""
    if unit.dimension != to.dimension:
        return None
    if (unit.size, unit.zero) == (to.size, to.zero):
        return value
    return (value + unit.zero) * unit.size / to.size - to.zero
