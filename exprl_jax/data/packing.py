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

Sequences may also branch from different points of what they share.  Scores S of the prefixes a, a b and a b c of a text
after the prompt p, each asked for by the question ?:

                 ┌ shared      ┐┌ of a ┐┌ of a b ┐┌ of a b c
    tokens       p   a   b   c   ?       ?         ?   .   .
    target       .   .   .   .   S       S         S   .   .
    segment      1   1   1   1   2       3         4   0   0
    position     0   1   2   3   2       3         4   .   .    a slot sees what of the shared segment stands before the
    sees         p   pa  pab …   pa?     pab?      pabc?        position at which its own segment begins
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


class Branches(NamedTuple):
    """Examples that begin alike.

    Attributes:
      examples: at least one.
      shared: of each, how many of its first tokens it has in common with the one that has most; less than its prompt.
    """

    examples: Sequence[Example]
    shared: Sequence[int]

    @property
    def tokens(self) -> int:
        """Of all of them, what they share counted once."""
        own = sum(len(x.prompt) - n + len(x.response) for x, n in zip(self.examples, self.shared))
        return max(self.shared) + own


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
        # A row of its group costs a sequence its own tokens alone, any other the shared ones besides.
        row = next((row for row in mine if room[row] >= own_N[i]), None)
        if row is None:
            # There are as many rows as sequences, so one is always free: argmax finds the first with room.
            row = int(np.argmax(room >= shared_N[i] + own_N[i]))
            room[row] -= shared_N[i]
            mine.append(row)
        room[row] -= own_N[i]
        rows_N[i] = row
    return rows_N


def pack_branches(batch: Sequence[Branches], shape: tuple[int, int, int], share: bool) -> PackedRows:
    """All examples of a batch in rows, those of one element in one row (`share`), or each as if it stood alone.

    Args:
      shape: [M, B, T]; with room for a row an element, or an example.
    """
    examples = [example for element in batch for example in element.examples]
    group_N = np.repeat(np.arange(len(batch)), [len(element.examples) for element in batch])
    if share:
        shared_N = [count for element in batch for count in element.shared]
        # An example's last token is never fed.
        fed = [element.tokens - len(element.examples) for element in batch]
        row_N = assign_rows(np.zeros(len(batch)), fed, np.arange(len(batch)), shape[-1])[group_N]
    else:
        shared_N = np.zeros(len(examples), np.int64)
        fed = [len(example.prompt) + len(example.response) - 1 for example in examples]
        row_N = assign_rows(shared_N, fed, np.arange(len(examples)), shape[-1])
    return fill_branches(examples, group_N, row_N, shape, shared_N)


def fill_rows(
    examples: Sequence[Example], group_N: Sequence[int], row_N: np.ndarray, shape: tuple[int, int, int], share: bool
) -> PackedRows:
    """`fill_branches` where examples of one group have one prompt, which without its last token stands once a row
    (`share`), or with every example."""
    shared_N = [max(0, len(example.prompt) - 1) * share for example in examples]
    return fill_branches(examples, group_N, row_N, shape, shared_N)


def fill_branches(
    examples: Sequence[Example],
    group_N: Sequence[int],
    row_N: np.ndarray,
    shape: tuple[int, int, int],
    shared_N: Sequence[int],
) -> PackedRows:
    """Host arrays [M, B, T] that hold every example whole; rows that are not needed stay empty.

    Args:
      group_N: examples of one group begin alike.
      row_N: as of `assign_rows`.
      shared_N: how many of its prompt's tokens, less than all, an example has in common with the one of its group that
        has most; those of the latter stand once a row, for all of the group there.

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
    longest: dict[tuple[int, int], int] = {}  # of each group in each row, the example that shares most
    for i, key in enumerate(zip(group_N, row_N)):
        if key not in longest or shared_N[i] > shared_N[longest[key]]:
            longest[key] = i

    def put(row, fed, at, sees=0):
        """Appends a segment that starts at position `at`; returns (its slots, its id)."""
        slots = slice(used[row], used[row] + len(fed))
        used[row] += len(fed)
        count[row] += 1  # segments are numbered from 1 within a row
        tokens[row, slots], segment[row, slots] = fed, count[row]
        # A segment that shares nothing names itself, so that no slot looks for an id 0, which is padding.
        common[row, slots], position[row, slots] = sees or count[row], at + np.arange(len(fed))
        return slots, int(count[row])

    for i, (example, group, row) in enumerate(zip(examples, group_N, row_N, strict=True)):
        shared, written = int(shared_N[i]), np.asarray(example.response, np.int32)
        if shared and (group, row) not in contexts:
            first = longest[group, row]
            contexts[group, row] = put(row, examples[first].prompt[: shared_N[first]], 0)[1]
        # What is fed: all of the prompt that is its own, and all of the response but its last.
        own = np.concatenate([np.asarray(example.prompt[shared:], np.int32), written[:-1]])
        slots, _ = put(row, own, shared, contexts[group, row] if shared else 0)
        # A target stands one slot before its token: that of the response's first is the slot of the prompt's last,
        # which is never shared, for each response needs that slot's target for itself.
        first_N[i] = slots.start + len(example.prompt) - 1 - shared
        target[row, first_N[i] : first_N[i] + len(written)] = written
    arrays = (x.reshape(M, B, T) for x in (tokens, target, segment, common, position))
    return PackedRows(Packed(*arrays), np.asarray(row_N), first_N)
