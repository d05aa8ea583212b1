"""Several sequences to a row: first fit, longest first.  On the host; the result is one update's microbatches.

Two rollouts a b c and d e of one prompt p q r, and one x y of another, u v, in a row of 12 slots:

                 ┌ shared ┐┌ own of abc ┐┌ own ┐┌ another ┐
    tokens       p   q     r   a   b     r   d   u   v   x   .   .
    target       .   .     a   b   c     d   e   .   x   y   .   .    the mask is True where a response's token is one
    segment      1   1     2   2   2     3   3   4   5   5   0   0    runs of slots; 0 is padding
    shared       1   1     1   1   1     1   1   4   4   4   0   0    a slot sees its own segment and this one
    position     0   1     2   3   4     2   3   0   1   2   .   .    of each slot in its own sequence

The prompt's last token opens every rollout's own segment, for it predicts the rollout's first.  A rollout's last token
is a target only: nothing follows it, so it is never fed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from exprl_jax.records import Packed


class Example(NamedTuple):
    """What a model is shown and what it writes, or should write, then, in token ids; neither is empty.

    Attributes:
      prompt: shown.
      response: written; includes its end of sequence.
    """

    prompt: Sequence[int]
    response: Sequence[int]


class PackedRows(NamedTuple):
    """Packed rows and where each example is.

    Attributes:
      packed: host arrays [M, B, T].
      row_N: the row of each example, among all M·B in order.
      first_N: the slot whose target is the first token of the response; the others follow.
    """

    packed: Packed
    row_N: np.ndarray
    first_N: np.ndarray

    @property
    def used(self) -> np.int32:
        """Microbatches that hold anything."""
        rows = self.packed.segment_BT.shape[1]
        return np.int32(self.row_N.max(initial=-1) // rows + 1)

    @property
    def padding(self) -> float:
        """Fraction of the used microbatches' slots that hold no token."""
        return float(np.mean(self.packed.segment_BT[: self.used] == 0)) if self.used else 0.0

    def spread(self, values: Sequence[np.ndarray], dtype: type) -> np.ndarray:
        """[M, B, T]: each example's values at the slots whose targets are its response's tokens, 0 elsewhere."""
        shape = self.packed.segment_BT.shape
        out = np.zeros((shape[0] * shape[1], shape[2]), dtype)
        for row, first, value in zip(self.row_N, self.first_N, values, strict=True):
            out[row, first : first + len(value)] = value
        return out.reshape(shape)


def assign_rows(shared_N: Sequence[int], own_N: Sequence[int], group_N: Sequence[int], row_tokens: int) -> np.ndarray:
    """The row of each sequence, [N]: each into the first row that has its group's shared tokens and room, or else into
    the first that has room for those too.

    Two orders are tried, and the one that needs fewer rows is taken: longest first; or group by group, that with most
    tokens first, and longest first in it, which repeats fewer shared tokens.  A pure function of its arguments.  Where
    every sequence is a group of its own this is first fit decreasing, whose rows are at most 11/9 of the fewest
    possible plus 6/9 (Dósa 2007).

    Args:
      shared_N: tokens that a sequence has in common with its group.
      own_N: its other tokens.
      group_N: ids of groups, 0 … .

    Raises:
      ValueError: a sequence is longer than a row.
    """
    shared_N, own_N, group_N = (np.asarray(x, np.int64) for x in (shared_N, own_N, group_N))
    if not own_N.size:
        return np.zeros(0, np.int64)
    longest = (shared_N + own_N).max()  # alone in a row it needs its shared tokens too
    if longest > row_tokens:
        raise ValueError(
            f"cannot pack an example of {longest} tokens into rows of {row_tokens}: drop it or widen the rows"
        )
    # Tokens of each group, its shared ones once: bincount adds them once a sequence, hence the division.
    total = np.bincount(group_N, own_N) + np.bincount(group_N, shared_N) / np.maximum(np.bincount(group_N), 1)
    length_N, index = -(shared_N + own_N), np.arange(own_N.size)
    orders = np.lexsort((index, length_N, group_N, -total[group_N])), np.lexsort((index, length_N))
    return min((_first_fit(order, shared_N, own_N, group_N, row_tokens) for order in orders), key=np.max)


def _first_fit(order, shared_N, own_N, group_N, row_tokens):
    rows_N, room = np.zeros(own_N.size, np.int64), np.full(own_N.size, row_tokens)
    rows_of: dict[int, list[int]] = {}  # of each group, those that hold its shared tokens already
    for i in order:
        mine = rows_of.setdefault(int(group_N[i]), [])
        row = next((row for row in mine if room[row] >= own_N[i]), None)
        if row is None:
            # There are as many rows as sequences, so one is always free: argmax finds the first with room.
            row = int(np.argmax(room >= shared_N[i] + own_N[i]))
            room[row] -= shared_N[i]
            mine.append(row)
        room[row] -= own_N[i]
        rows_N[i] = row
    return rows_N


def fill_rows(
    examples: Sequence[Example], group_N: Sequence[int], row_N: np.ndarray, shape: tuple[int, int, int], share: bool
) -> PackedRows:
    """Host arrays [M, B, T] that hold every example whole; rows that are not needed stay empty.

    Args:
      group_N: examples of one group have one prompt.
      row_N: as of `assign_rows`.
      share: a prompt without its last token stands once a row, for all of its group there.

    Raises:
      ValueError: an example without a prompt or response, or more rows than there are.
    """
    M, B, T = shape
    if not all(len(example.prompt) and len(example.response) for example in examples):
        raise ValueError("cannot pack an example without a prompt or without a response: nothing would be predicted")
    if row_N.max(initial=-1) >= M * B:
        raise ValueError(f"{len(examples)} examples need {row_N.max() + 1} rows of {T} tokens, got {M * B}")
    tokens, target, segment, common, position = (np.zeros((M * B, T), np.int32) for _ in range(5))
    used, count, first_N = np.zeros(M * B, np.int64), np.zeros(M * B, np.int32), np.zeros(len(examples), np.int64)
    contexts: dict[tuple[int, int], int] = {}

    def put(row, fed, at, sees=0):
        """Appends a segment that starts at position `at`; returns (its slots, its id)."""
        slots = slice(used[row], used[row] + len(fed))
        used[row] += len(fed)
        count[row] += 1  # segments are numbered from 1 within a row
        tokens[row, slots], segment[row, slots] = fed, count[row]
        common[row, slots], position[row, slots] = sees or count[row], at + np.arange(len(fed))
        return slots, int(count[row])

    for i, (example, group, row) in enumerate(zip(examples, group_N, row_N, strict=True)):
        context, written = len(example.prompt) - 1, np.asarray(example.response, np.int32)
        # What is fed: the prompt's last token and all of the response but its last.
        start = np.concatenate([np.asarray(example.prompt[-1:], np.int32), written[:-1]])
        if share and context:
            if (group, row) not in contexts:
                contexts[group, row] = put(row, example.prompt[:-1], 0)[1]
            first_N[i] = put(row, start, context, contexts[group, row])[0].start
        else:
            first_N[i] = (
                put(row, np.concatenate([np.asarray(example.prompt[:-1], np.int32), start]), 0)[0].start + context
            )
        target[row, first_N[i] : first_N[i] + len(written)] = written
    arrays = (x.reshape(M, B, T) for x in (tokens, target, segment, common, position))
    return PackedRows(Packed(*arrays), np.asarray(row_N), first_N)
