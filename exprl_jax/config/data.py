"""Problems, and how they are sampled for an evaluation."""

from __future__ import annotations

import dataclasses

from exprl_jax.config.values import Count, CountOrNone, GroupSize, NotNegative

# Of a problem's row, in our own schema.
COLUMNS = ("id", "problem", "reference", "answer", "domain", "choices")


def column_pairs(columns: str) -> list[tuple[str, str]]:
    """(theirs, ours) of every column that is renamed."""
    pairs = [pair.rpartition(":") for pair in columns.split(",")] if columns else []
    return [(theirs.strip(), ours.strip()) for theirs, _, ours in pairs]


@dataclasses.dataclass(frozen=True)
class Source:
    """Where problems come from and how they are put to the policy.

    Attributes:
      source: JSONL or parquet paths and globs, `hf:<dataset id>[:<config>]`, `tfds:<name>` or a benchmark's name
        (docs/data.md); several with commas between.
      split: the split that is read of `hf:` and `tfds:` sources.
      columns: other names that the columns of the problems have, `theirs:ours` with commas between
        (`question:problem,solution:reference`); ours are `problem,reference,answer,domain,choices,id`.  Empty: the
        names as they are.  Benchmarks and `worked_examples` have their own.
      worked_examples: JSONL of solved problems shown to the policy as earlier turns; empty for none.
      max_prompt_tokens: longest prompt; training drops longer ones and counts them.
    """

    source: str
    split: str
    columns: str
    worked_examples: str
    max_prompt_tokens: Count


@dataclasses.dataclass(frozen=True)
class Data(Source):
    """Problems to train on.

    Attributes:
      held_out: sources, written as in `source`, whose problems must not be among these; empty for none.
      allow_held_out: train on such problems nevertheless.
    """

    held_out: str
    allow_held_out: bool


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Samples for an evaluation.

    Attributes:
      samples: samples a problem (n).
      group: samples of a problem drawn at a time, a divisor of `samples`.
      wave: problems sampled at a time; without `slots` it bounds the KV cache.
      slots: rows that a data shard decodes at a time, as `rollout.slots`; 0 decodes all rows of a wave together.
      max_tokens: longest response.
      temperature: the policy's; 0 is greedy.
    """

    samples: GroupSize
    group: GroupSize
    wave: Count
    slots: CountOrNone
    max_tokens: Count
    temperature: NotNegative
