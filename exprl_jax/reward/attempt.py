"""What a function of one's own is given about a rollout, be it a judge or a verifier."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Attempt:
    """Something to be scored, with its problem.

    Attributes:
      id: the problem's.
      problem: the statement.
      reference: the worked solution; None where the run reads none.
      answer: the final answer.
      domain: as the data have it, `math` for instance.
      choices: (label, text) of each answer choice; empty unless multiple choice.
      extra: the data row's other columns, by name.
      trace: the text to score: a whole rollout, a prefix of one, or one segment.
      unit: what the trace is: `outcome` (a whole rollout), `prefix`, `step` (a segment on its own) or `answer` (a whole
        rollout, of which only the final answer is to be compared with the problem's).
      segment: number of the rollout's segment, from 0, with which the trace ends; 0 for a whole rollout.
      ended: whether the rollout that the trace is from ended before the budget; None where that is not known.
    """

    id: str
    problem: str
    reference: str | None
    answer: str
    domain: str
    choices: tuple[tuple[str, str], ...]
    extra: Mapping[str, Any]
    trace: str
    unit: str
    segment: int
    ended: bool | None
