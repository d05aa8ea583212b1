"""When a run evaluates its policy, and what it then writes down: the loop's side of an evaluation inside a run.

A point of the curve belongs to the parameters after a step: step 0 is the start, before the first update.  What it says
is a function of those parameters, seed, problems and config, so that a resumed run has the points of one that never
stopped; step 0's is measured once, in the run's first start.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from exprl_jax.data.problems import Problem
from exprl_jax.records import TrainState
from exprl_jax.run.clock import Clock

Row = dict[str, float | None]
_OF_A_SET = {
    "pass@1": "mean over problems of the chance that one sample is right",
    "pass@k": "mean over problems of the chance that at least one of k samples is right, for each k of evaluate.k "
    "(unbiased estimate)",
    "unsolved": "fraction of problems none of whose samples is right",
    "missing": "fraction of samples whose verifier failed; they count neither as right nor as wrong",
    "length_mean": "tokens a sample, EOS included",
    "overlong": "fraction of samples that reached max_tokens without EOS",
}
HELD_OUT, TRAINING = "", "training_"
SETS = {HELD_OUT: "held-out", TRAINING: "training"}
METRICS: Mapping[str, str] = {
    **{f"evaluate/{HELD_OUT}{name}": f"held-out problems: {text}" for name, text in _OF_A_SET.items()},
    **{f"evaluate/{TRAINING}{name}": f"fixed training problems: {text}" for name, text in _OF_A_SET.items()},
}
"""Every key of an evaluation and what it is; null at steps without one."""


def names_of(prefix: str, ks: Sequence[int]) -> list[str]:
    """The keys of one set of problems."""
    plain = [name for name in _OF_A_SET if not name.startswith("pass@")]
    return [f"evaluate/{prefix}{name}" for name in (*(f"pass@{k}" for k in ks), *plain)]


class Measured(NamedTuple):
    """What an evaluation says.

    Attributes:
      row: its part of the step's metrics.
      problems: rows of `evaluations/step_N.jsonl`: `set` (`held-out` or `training`), `id` and text of the problem, and
        how many of its samples were `graded` and `correct`; none at a step without an evaluation.
    """

    row: Row
    problems: Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What the loop has to know of it.

    Attributes:
      every: steps between evaluations.
      steps: of the whole run.
      problems: all that are evaluated on.
      names: the keys of a row.
      measure: (state, step, clock) → those keys' values, and its problems; every process calls it.
    """

    every: int
    steps: int
    problems: Sequence[Problem]
    names: Sequence[str]
    measure: Callable[[TrainState, int, Clock], Measured]

    def at(self, state: TrainState, step: int, clock: Clock) -> Measured:
        """What belongs to a step: nulls where no evaluation is made."""
        if step % self.every and step != self.steps:
            return Measured(dict.fromkeys(self.names), [])
        return self.measure(state, step, clock)


def headline(step: int, row: Mapping[str, float | None]) -> str:
    """An evaluation in a few words, for the line that says how far a run is; empty where the row has none."""
    for prefix, name in SETS.items():
        solved, unsolved = (row.get(f"evaluate/{prefix}{key}") for key in ("pass@1", "unsolved"))
        if solved is not None and unsolved is not None:
            return f"{name} pass@1 {solved:.3f}, unsolved {unsolved:.3f} (step {step})"
    return ""
