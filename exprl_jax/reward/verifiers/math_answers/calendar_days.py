"""Days of the year and times of the day: `March 14`, `14th of March, 2023`, `2023-03-14`, `3:45 PM`."""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence

import sympy

from exprl_jax.reward.verifiers.math_answers.kinds import Clock, Date, Ratio
from exprl_jax.reward.verifiers.math_answers.tokens import Token

_NAMES = "january february march april may june july august september october november december".split()
_MONTHS = {name: month for month, name in enumerate(_NAMES, start=1)}
_MONTHS |= {name[:3]: month for name, month in _MONTHS.items()} | {"sept": 9}
_DAY = r"(?:the )?(?P<day>\d{1,2}) ?(?:st|nd|rd|th)?"
_MONTH = rf"(?P<month>{'|'.join(sorted(_MONTHS, key=len, reverse=True))})"
_YEAR = r"(?: ?,? ?(?P<year>[12]\d{3}))?"
_FORMS = [
    re.compile(form, re.ASCII)
    for form in (
        rf"{_MONTH} {_DAY}{_YEAR}",
        rf"{_DAY} (?:of )?{_MONTH}{_YEAR}",
        r"(?P<year>[12]\d{3}) - (?P<month>\d\d) - (?P<day>\d\d)",
    )
]
_LEAP_YEAR = 2000
_CLOCK = re.compile(r"(\d{1,2})(?::([0-5]\d)(?::([0-5]\d))?)?(am|pm|o'clock)?", re.ASCII)
_TIMES = {"noon": "12:00pm", "midnight": "12:00am"}


_WEEKDAYS = set("monday tuesday wednesday thursday friday saturday sunday".split())


def is_named(tokens: Sequence[Token]) -> bool:
    """Whether a month or a day of the week is all that is said."""
    return len(tokens) == 1 and tokens[0].text.casefold() in _WEEKDAYS | set(_NAMES)


def read(tokens: Sequence[Token]) -> Date | None:
    """A day; None of what names no day that is in the calendar."""
    if not 2 <= len(tokens) <= 8:
        return None
    said = " ".join(token.text for token in tokens if token.text not in (".", "^", "{", "}")).casefold()
    match = next(filter(None, (form.fullmatch(said) for form in _FORMS)), None)
    if not match:
        return None
    month = _MONTHS.get(match["month"]) or int(match["month"])
    year = int(match["year"]) if match["year"] else None
    try:
        datetime.date(year or _LEAP_YEAR, month, int(match["day"]))
    except ValueError:
        return None
    return Date(month, int(match["day"]), year)


def clock(text: str) -> Clock | None:
    """A time of day, in lower case and without spaces."""
    match = _CLOCK.fullmatch(_TIMES.get(text.removeprefix("12:00").removeprefix("12"), text))
    if not match or not (match[2] or match[4]):
        return None
    hour, minute, second = (int(part or 0) for part in match.groups()[:3])
    half = match[4] if match[4] in ("am", "pm") else "pm" if hour > 12 else "am" if hour == 0 else ""
    if hour > (12 if match[4] else 23):
        return None
    ratio = None if match[4] or match[3] or match[2][0] == "0" else Ratio((sympy.Integer(hour), sympy.Integer(minute)))
    return Clock((hour % 12 * 60 + minute) * 60 + second, half, ratio)
