"""One compiled program of a run as a plan describes it: its arguments' shapes, their owners, its cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from exprl_jax.config import AnyConfig
from exprl_jax.plan.costs import Cost

Planned = AnyConfig
# Owners of bytes, beside models that are kept frozen.
POLICY, ADAM, BATCH, KEYS, COPY, GRADIENT = "policy", "Adam", "batch", "KV", "working copy", "gradient"


class Result(NamedTuple):
    """An argument that another program of the run computes, and that the compiler lays out as it likes.

    Attributes:
      name: of that program's call.
      bytes: a device's, divided as keys and values can be.
    """

    name: str
    bytes: int


@dataclasses.dataclass(frozen=True)
class Call:
    """One compiled program of a run.

    Attributes:
      name: of the program; with the model in brackets where it is compiled for several.
      phase: of a step, as the metrics name it; `start` for what runs once.
      program: the jitted function.
      arguments: (owner, tree of `jax.ShapeDtypeStruct` with shardings, or a `Result`) of each; a `TrainState` is the
        policy's and Adam's, whatever owner stands there.
      times: calls in one step, at most.
      cost: of one call, for rollouts, traces and judgements that reach their budgets.
      settings: config keys that make it smaller, those that help most first.
      steps: trips, at most, of the loop whose end depends on values; 0 where there is none.
      inside: bytes a device that the program is known to allocate beside its arguments, by owner.
      beside: bytes a device that lie there meanwhile and are no argument, by owner.
    """

    name: str
    phase: str
    program: Callable
    arguments: tuple[tuple[str, Any], ...]
    times: int
    cost: Cost
    settings: tuple[str, ...]
    steps: int = 0
    inside: Mapping[str, int] = dataclasses.field(default_factory=dict)
    beside: Mapping[str, int] = dataclasses.field(default_factory=dict)


class RowShapes(NamedTuple):
    """What a sampler or a judge is given.

    Attributes:
      problems, group: contexts, and rows of each.
      context, width: slots of a context, and of a row before its answer.
      answer: tokens that are sampled after them; 0 where a row is only read.
      slots, expected_tokens: as `rollout.sampler.sample` takes them.
      own: slots of what a row has of its own that goes on from a trace, where rows do.
    """

    problems: int
    group: int
    context: int
    width: int
    answer: int
    slots: int = 0
    expected_tokens: int = 0
    own: int = 1

    def turns(self, shards: int) -> int:
        """How often a decode slot is taken, at most: as often as the rows of a shard fill all slots."""
        rows = self.problems * self.group // shards
        return -(-rows // self.slots) if self.slots else 1
