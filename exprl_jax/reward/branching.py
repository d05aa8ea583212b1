"""Several questions about one trace in one row: on the host, token ids to `records.BranchRows`.

A prefix is asked about with the ids that it has alone.  Where they part from those of the whole trace, because the cut
divides what would be one token, the branch begins; what a row holds once is what they have in common.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from exprl_jax.records import BranchRows, Rows, Traces
from exprl_jax.rollout.call import padded_width

# Tokens in which a prefix's ids may part from the whole trace's, on average over a row's prefixes; where they are more,
# some prefixes have a row of their own.
_PARTED = 4
# Rows that go on from a trace in one call: all are fed, those that ask nothing too.  A trace of which more is asked is
# read again.
WRITTEN = 8


class BranchedTrace(NamedTuple):
    """What one row asks.

    Attributes:
      trace: ids of the longest of its texts.
      branches: (number of the question, ids of the trace that it has in common, its own ids after them) of each.
    """

    trace: Sequence[int]
    branches: Sequence[tuple[int, int, Sequence[int]]]

    @property
    def tokens(self) -> int:
        """That are read."""
        return len(self.trace) + sum(len(own) for _, _, own in self.branches)


def branch_tokens(trace: int, suffix: int, branches: int) -> int:
    """Of a row with the longest trace, off which so many branches go: each with the closing instruction, and a few
    tokens where a cut divides one."""
    return trace + branches * (suffix + _PARTED)


def own_width(suffix: int) -> int:
    """Slots for what a row that goes on from a trace has of its own: the closing instruction, and a few tokens where a
    cut divides one."""
    return padded_width(suffix + 2 * _PARTED)


def common_prefix(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ids, others)))


def branch_off(
    texts: Sequence[tuple[int, Sequence[int]]], suffix: Sequence[int], width: int, most: int, longest: int
) -> list[BranchedTrace]:
    """The rows that ask about some texts, of which the shorter begin the longer but for a few tokens.

    Args:
      texts: (number, ids) of each, none longer than a row has room for with the suffix.
      suffix: what follows each of them.
      width, most: slots of a row, and branches.
      longest: tokens of a branch's own.
    """
    # The longest of what is left is the trace: a text can branch off one that goes on, not off its own beginning.
    left, rows = sorted(texts, key=lambda text: -len(text[1])), []
    while left:
        trace, row, later = left[0][1], [], []
        used = len(trace)
        for number, ids in left:
            shared = common_prefix(ids, trace)
            # The suffix makes `own` non-empty: the last of these ids is where the score is read.
            own = (*ids[shared:], *suffix)
            if len(row) < most and used + len(own) <= width and len(own) <= longest:
                row.append((number, shared, own))
                used += len(own)
            else:
                later.append((number, ids))
        rows.append(BranchedTrace(trace, row))
        left = later
    return rows


def fill_branch_rows(
    problems: Sequence[Sequence[BranchedTrace]], group: int, width: int, most: int, pad_id: int
) -> BranchRows:
    """Host arrays [P, G, T] of up to `group` rows of each problem, and [P, G, N] of their branches."""
    shape = (len(problems), group, width)
    tokens = np.full(shape, pad_id, np.int32)
    segment, position, last = (
        np.zeros(shape, np.int32),
        np.zeros(shape, np.int32),
        np.zeros((*shape[:2], most), np.int32),
    )
    for i, rows in enumerate(problems):
        for g, row in enumerate(rows):
            # at       slot, in the order in which things lie; position counts on from where a branch begins.
            #     slot       0 1 2 3 | 4 5 | 6 7 8
            #     segment    1 1 1 1 | 2 2 | 3 3 3     1: the trace; 2, 3: branches, after 2 and 3 of its tokens
            #     position   0 1 2 3 | 2 3 | 3 4 5
            #     last                   5       8     slots whose hidden states answer
            at = 0
            for number, (begin, ids) in enumerate([(0, row.trace), *((begin, own) for _, begin, own in row.branches)]):
                slots = slice(at, at + len(ids))
                tokens[i, g, slots], segment[i, g, slots] = ids, 1 + number
                position[i, g, slots] = begin + np.arange(len(ids))
                at += len(ids)
                if number:
                    last[i, g, number - 1] = at - 1
    return BranchRows(tokens, segment, position, last)


def fill_traces(
    problems: Sequence[Sequence[BranchedTrace]], group: int, most: int, width: int, own: int, pad_id: int
) -> tuple[Rows, Traces, np.ndarray]:
    """Host arrays of rows that go on from up to `group` traces of each problem, Q = group · most of them: the rows,
    their traces, and which of the rows ask something.

    Args:
      most: rows of a trace.
      width, own: slots of a trace, and of what a row has of its own.
    """
    P, Q = len(problems), group * most
    traces = Rows(np.full((P, group, width), pad_id, np.int32), np.full((P, group), width - 1, np.int32))
    rows = Rows(np.full((P, Q, own), pad_id, np.int32), np.full((P, Q), own - 1, np.int32))
    begin_PQ, asked_PQ = np.zeros((P, Q), np.int32), np.zeros((P, Q), bool)
    for i, of_problem in enumerate(problems):
        for g, row in enumerate(of_problem):
            _fill_row(traces, (i, g), row.trace)
            for n, (_, begin, ids) in enumerate(row.branches):
                at = i, g * most + n
                _fill_row(rows, at, ids)
                begin_PQ[at], asked_PQ[at] = begin, True
    return rows, Traces(traces, begin_PQ), asked_PQ


def _fill_row(rows: Rows, at: tuple[int, int], ids: Sequence[int]) -> None:
    """Puts tokens at the end of a row of these host arrays; one without any keeps a token of padding."""
    if ids:
        rows.start_PG[at] = rows.tokens_PGT.shape[2] - len(ids)
        rows.tokens_PGT[at][rows.start_PG[at] :] = ids
