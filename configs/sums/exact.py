"""The exact score of a story sum's solution, or of the beginning of one: what a perfect judge would say.

With the first c of K + 1 lines right, the boxed answer the last: c/(K + 1) for a whole solution, less than 1 if
anything follows the answer; for the beginning of one ½ + ½ · c/(K + 1) while every line is right, and ¼ · c/(K + 1)
from the first wrong one on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the judge's processes start faster without
    from exprl_jax.reward.attempt import Attempt

_SUM = re.compile(r"(\d+) ?([-+]) ?(\d+) ?= ?(\d+)\.?")
_BOX = re.compile(r"\\boxed\{ ?(\d+) ?\}")


def score(attempts: Sequence[Attempt]) -> list[float]:
    """The judge's function."""
    return [value(attempt.reference, attempt.trace, attempt.unit) for attempt in attempts]


def value(reference: str, trace: str, unit: str) -> float:
    """The score, from 0 to 1.

    Args:
      reference: as `stories` writes it.
      unit: `outcome`, a whole solution, or `prefix`, the beginning of one.
    """
    wanted = [_content(line) for line in reference.splitlines()]
    written = [_content(line.strip()) for line in trace.splitlines() if line.strip()]
    right = 0
    while right < min(len(written), len(wanted)) and written[right] == wanted[right]:
        right += 1
    if unit == "outcome" and right < len(written):  # something after the answer
        right = min(right, len(wanted) - 1)
    share = right / len(wanted)
    if unit == "outcome":
        return share
    return 0.5 + 0.5 * share if right == len(written) > 0 else 0.25 * share


def _content(line: str) -> tuple[str, ...] | None:
    """The numbers and the sign of a sum, or the boxed answer; None for any other line."""
    if found := _SUM.fullmatch(line) or _BOX.search(line):
        return found.groups()
    return None
