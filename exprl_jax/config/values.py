"""What values config keys take: ranges of numbers, and JSON texts."""

from __future__ import annotations

import datetime
import json
import math
from typing import Annotated, Any, NamedTuple


class Range(NamedTuple):
    """What numbers a key takes; `resolve` checks it.

    Attributes:
      least, most: both are allowed.
      expected: the same in words.
    """

    least: float
    most: float
    expected: str

    def holds(self, value: float) -> bool:
        """Whether a number is in it."""
        return self.least <= value <= self.most


class JsonObject(NamedTuple):
    """JSON texts that a key takes; `resolve` checks it.

    Attributes:
      without: keys that the object must not have.
    """

    without: tuple[str, ...]

    @property
    def expected(self) -> str:
        """The same in words."""
        return f"a JSON object without the keys {', '.join(self.without)}, and no key twice"

    def holds(self, text: str) -> bool:
        """Whether a text is one of them."""
        try:
            value = json.loads(text, object_pairs_hook=_object)
            json.dumps(value, allow_nan=False)
        except (ValueError, RecursionError):
            return False
        return isinstance(value, dict) and not value.keys() & set(self.without)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("a name twice")
    return dict(pairs)


class Date(NamedTuple):
    """Texts that are a day, or empty; `resolve` checks it."""

    expected: str = "a day that is in the calendar, as YYYY-MM-DD; '' for none"

    def holds(self, text: str) -> bool:
        """Whether a text is one of them."""
        try:
            return text == "" or datetime.date.fromisoformat(text).isoformat() == text
        except ValueError:
            return False


# The least and the largest positive number that float32, in which steps are computed, holds in full.
SMALLEST, LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127
_TINIEST, _BELOW_ONE, _INT32 = 5e-324, 1 - 2**-53, 2**31 - 1
Count = Annotated[int, Range(1, _INT32, "a positive number below 2^31")]
CountOrNone = Annotated[int, Range(0, _INT32, "zero or more, below 2^31")]
GroupSize = Annotated[int, Range(1, 1 << 16, "a positive number, at most 65536")]
Workers = Annotated[int, Range(1, 1024, "a positive number of processes, at most 1024")]
Seconds = Annotated[float, Range(_TINIEST, 86_400, "a positive number of seconds, at most 86400 (a day)")]
Seed = Annotated[int, Range(0, 2**32 - 1, "zero or more, below 2^32")]
Positive = Annotated[float, Range(_TINIEST, math.inf, "a positive number")]
NotNegative = Annotated[float, Range(0, math.inf, "zero or more")]
Fraction = Annotated[float, Range(0, _BELOW_ONE, "a number in [0, 1)")]
Number = Annotated[float, Range(-math.inf, math.inf, "a number")]
Day = Annotated[str, Date()]
