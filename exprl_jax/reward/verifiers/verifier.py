"""What a kind of problem has to bring for its answers to be verified (`kinds.ProblemKind.verifier` names it)."""

from __future__ import annotations

import dataclasses
import importlib
import pathlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from exprl_jax import config
from exprl_jax.data.problems import Problem
from exprl_jax.kinds import KINDS
from exprl_jax.reward.verifiers.verdict import Verdict


@dataclasses.dataclass(frozen=True)
class Verifier:
    """How answers to one kind of problem are verified.

    Attributes:
      open: (config.Grader, config.Code) → a pool: a context manager whose `submit` takes rows and returns at once, with
        a `math.Grading` of their verdicts.  None where nothing is opened: `row` then gives the verdict itself.
      row: (problem, response) → what the pool's `submit` takes of it.
      check: raises ValueError for a problem whose answer it could not use; called before a run starts.
      vote: (problem, response) → the answer as majority votes count it, None for none; None for kinds without a vote.
      readable: whether any answer can equal the problem's; a run warns of those that none can.
      files: those of the functions of the user's that it calls, by their names; raises ValueError where there are none
        and it needs one.
    """

    open: Callable[[config.Grader, config.Code], Any] | None
    row: Callable[[Problem, str], Any]
    check: Callable[[Problem], None]
    vote: Callable[[Problem, str], Hashable | None] | None
    readable: Callable[[Problem], bool] = lambda problem: True
    files: Callable[[config.Grader], Mapping[str, Sequence[pathlib.Path]]] = lambda grader: {}


def verifier_of(kind: str) -> Verifier:
    """The verifier of a kind of problem; its module is loaded when it is first asked for."""
    module, _, name = KINDS[kind].verifier.partition(":")
    return getattr(importlib.import_module(module), name)


def unverified(problem: Problem, response: str) -> Verdict:
    """The verdict of kinds that only a judge can verify."""
    return Verdict.missing
