"""How long a run's rollouts have been, and what that says of those to come.

A problem's rollouts are expected to be as long as its last ones, or, where it had none, as those of the last steps.  By
that pages are handed out (`rollout.slots`) and problems are dealt; no token of any rollout depends on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from exprl_jax.data.problems import Problem

# Steps by whose rollouts those of new problems are judged.
STEPS = 8


class LengthRecord:
    """Mean lengths so far, the same on every process; a checkpoint holds them."""

    def __init__(self) -> None:
        """Knows nothing yet."""
        self._of_problem: dict[str, float] = {}
        self._of_steps: list[float] = []

    def note(self, problems: Sequence[Problem], length_PG: np.ndarray) -> None:
        """Takes in a step's batch.

        Args:
          length_PG: of all its rollouts, in the problems' order.
        """
        means = np.asarray(length_PG, np.float64).mean(-1)
        self._of_problem.update(zip((problem.id for problem in problems), means.tolist(), strict=True))
        self._of_steps = [*self._of_steps, float(means.mean())][-STEPS:]

    def expected(self, problems: Sequence[Problem]) -> np.ndarray | None:
        """Tokens [P] that a rollout of each problem is expected to have; None before the first step."""
        if not self._of_steps:
            return None
        otherwise = sum(self._of_steps) / len(self._of_steps)
        return np.array([self._of_problem.get(problem.id, otherwise) for problem in problems])

    def state(self) -> dict[str, Any]:
        """As JSON, for `restore`."""
        return {"problems": self._of_problem, "steps": self._of_steps}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state`."""
        self._of_problem, self._of_steps = dict(state["problems"]), list(state["steps"])


def deal(expected_P: np.ndarray, queues: int) -> np.ndarray:
    """The order in which problems stand in so many queues, one after another: of each the longest first, and all of
    about the same length in sum.

    The longest go to one queue each, the next in the opposite order, and so on:

        expected   9 8 7 6 5 4 3 2   →   9 6 5 2 | 8 7 4 3

    Problems of which nothing sets one apart stay as they are.

    Args:
      expected_P: P is a multiple of `queues`.
    """
    if np.ptp(expected_P) == 0:
        return np.arange(len(expected_P))
    rounds = np.argsort(-expected_P, kind="stable").reshape(-1, queues)
    rounds[1::2] = rounds[1::2, ::-1]
    return rounds.T.ravel()
