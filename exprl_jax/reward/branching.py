"""Several questions about one trace in one row: on the host, token ids to `records.BranchRows`.

A prefix is asked about with the ids that it has alone.  Where they part from those of the whole trace, because the cut
divides what would be one token, the branch begins; what a row holds once is what they have in common.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from exprl_jax.records import BranchRows

# Tokens in which a prefix's ids may part from the whole trace's, on average over a row's prefixes; where they are more,
# some prefixes have a row of their own.
_PARTED = 4


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


def common_prefix(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ids, others)))


def branch_off(
    texts: Sequence[tuple[int, Sequence[int]]], suffix: Sequence[int], width: int, most: int
) -> list[BranchedTrace]:
    """The rows that ask about some texts, of which the shorter begin the longer but for a few tokens.

    Args:
      texts: (number, ids) of each, none longer than a row has room for with the suffix.
      suffix: what follows each of them.
      width, most: slots of a row, and branches.
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
            if len(row) < most and used + len(own) <= width:
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
