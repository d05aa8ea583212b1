"""The exact score of a solution, or of the beginning of one: what a perfect judge would say.

On the judge's scale of 1 to 5, of K steps the first c of which are right: 1 + 4c/K for a whole solution; for the
beginning of one 3 + 2c/K while every step is right, and 1 + c/K from the first wrong one on.  A whole solution with an
answer that is not the last right state gets no more than 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from configs.mini.task import OPERATIONS, parse_statement, progress

if TYPE_CHECKING:  # the judge's processes start faster without
    from exprl_jax.reward.attempt import Attempt


def score(attempts: Sequence[Attempt]) -> list[float]:
    """The judge's function: `likert` from 0 to 1."""
    return [(likert(attempt.problem, attempt.trace, attempt.unit) - 1) / 4 for attempt in attempts]


def right_so_far(attempts: Sequence[Attempt]) -> list[float]:
    """A judge that gives nothing for progress: 1 while every step is right, of a whole solution the answer too, else
    0."""
    scores = [likert(attempt.problem, attempt.trace, attempt.unit) for attempt in attempts]
    return [float(x == 5 if attempt.unit == "outcome" else x > 3) for x, attempt in zip(scores, attempts)]


def likert(statement: str, trace: str, unit: str) -> float:
    """The score.

    Args:
      statement: the puzzle.
      unit: `outcome`, a whole solution, or `prefix`, the beginning of one.
    """
    puzzle = parse_statement(statement)
    so_far, steps = progress(puzzle, trace), len(puzzle.letters)
    if unit == "outcome":
        return 1 + 4 * so_far.right / steps if so_far.solved or so_far.right < steps else 4.0
    if so_far.right == so_far.written > 0:
        return 3 + 2 * so_far.right / steps
    return 1 + so_far.right / steps


def digit(statement: str, likert_score: float) -> int:
    """A score as the whole digit that a judge writes: rounded down after a part of a digit was added that the puzzle's
    first letter says.

    So each puzzle has its own thresholds, and a step more shows in the digit for some puzzles wherever it is; with one
    rounding for all of them, four of ten steps in a row would be worth nothing.
    """
    letter = parse_statement(statement).letters[0]
    share = (list(OPERATIONS).index(letter) + 0.5) / len(OPERATIONS)
    return min(5, math.floor(likert_score + share))
