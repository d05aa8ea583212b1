"""Decode slots: fewer than there are rows, so that a row that ends makes room for the next one.

A data shard with 3 slots and 7 rows, 2 of each problem, at some step:

    queue     0.0   0.1   1.0   1.1   2.0   2.1   3.0         rows in order, by problem and index in the group
              ended  │   ended   │     │   waiting …
    slots           [0.1]      [1.1] [2.0]                     each at its own token: 9, 4 and 0 so far

Every step first fills the slots whose rows have ended with the rows that wait, those in front first, then feeds one
token of every slot.  What a slot has is a function of its row alone, so that no row depends on which slot it has, when
it began, or what is beside it.

From pages (`model.paged`), slots hold pages for the tokens that they have, not for their budgets:

    one layer's pages    | c0 c0 | c1 c1 | c2 c2 | c3 c3 |  a  b  –  b  b  c  –  a  –  – |      slots a, b, c; – is free
                           contexts, read by their rows      a row's own, in any order

A slot takes a page when its tokens reach one, and gives all back when its row ends.  Where too few are free, the
youngest rows give theirs back: they wait again, in front, and begin anew later; their random numbers are their own, so
that they end up with the same tokens.  The oldest row never yields, hence every row ends, as long as the pool holds the
pages of one.

All functions here are of one data shard's slots, queue and pages.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.struct
import jax.numpy as jnp

from exprl_jax.model import paged
from exprl_jax.records import Array


@flax.struct.dataclass
class Slots:
    """What the decoder's slots hold.  With a queue, P stands for the slots and G is 1; without one they are the rows.

    Attributes:
      token_PG: int32, the token to feed next.
      busy_PG: bool, slots with a row that has not ended.
      count: int32 [P, G], tokens sampled so far by the slot's row; a scalar without a queue, where all began together.
      row_PG: int32, the row's number among its shard's; None without a queue.
      start_PG: int32, the step at which it began; None without a queue.
    """

    token_PG: Array
    busy_PG: Array
    count: Array
    row_PG: Array | None
    start_PG: Array | None


class RowInputs(NamedTuple):
    """What is asked of rows, or of the rows in slots.

    Attributes:
      key_PG: a row's random key.
      temperature_PG: float32.
      budget_PG: int32, tokens to sample at most.
      length_P: int32, tokens of the context.
      problem_P: int32, the context's number among its shard's; None where it is the index itself.
      expected_P: int32, pages that a row of the context is expected to need.
    """

    key_PG: Array
    temperature_PG: Array
    budget_PG: Array
    length_P: Array
    problem_P: Array | None
    expected_P: Array


def empty_slots(slots: int) -> Slots:
    """Slots that wait for rows."""
    none = jnp.zeros((slots, 1), jnp.int32)
    return Slots(none, none > 0, none, none, none)


def fill_slots(
    slots: Slots,
    waiting_PG: Array,
    first_PG: Array,
    rows: RowInputs,
    step: Array,
    pool: Array | None,
    pages: paged.Pages | None,
    *,
    layers: int,
) -> tuple[Slots, Array, RowInputs, Array | None, paged.Pages | None, Array]:
    """Gives rows that wait to empty slots, and pages to all slots that need one.

    Args:
      waiting_PG: rows that have not begun, or must begin anew.
      first_PG: the token with which each row starts.
      rows: what is asked of each.
      pool, pages: of the slots; None where a slot's keys and values have a place of their own.
      layers: of the pool.

    Returns:
      slots, waiting rows, what is asked of the rows in the slots, pool and pages, and [1], how many rows gave theirs
      back.
    """
    (P, G), waiting_B = waiting_PG.shape, waiting_PG.ravel()
    busy, row, start, count = (x[:, 0] for x in (slots.busy_PG, slots.row_PG, slots.start_PG, slots.count))
    # The n-th empty slot takes the n-th row that waits, if there is one.
    #     waiting    – – w – w w      running sum   0 0 1 1 2 3
    #     empty      – e e            running sum   0 1 2     → the first index with 1, 2: rows 2 and 4
    # Of a slot that is not empty the search finds something too, which `fresh` masks; where too few rows wait, P · G.
    next_row = jnp.searchsorted(jnp.cumsum(waiting_B), jnp.cumsum(~busy), method="compare_all").astype(jnp.int32)
    fresh = ~busy & (next_row < P * G)
    row, start, count = jnp.where(fresh, next_row, row), jnp.where(fresh, step, start), jnp.where(fresh, 0, count)
    # Rows are numbered problem by problem, so that the number alone says whose context a row reads.
    problem, seated = row // G, busy | fresh
    length, expected, kept = rows.length_P[problem], rows.expected_P[problem], seated
    if pages is not None:
        kept, pool, pages = paged.hand_out_pages(
            pool, pages, layers, P, expected, problem, length, count, seated, fresh, start
        )
    # Who has a slot waits no longer; who gave its pages back waits again.
    waiting_B = waiting_B.at[jnp.where(seated, row, P * G)].set(~kept, mode="drop")
    # `row` of an empty slot is stale: what is gathered with it is fed, for shapes are fixed, and masked by `kept`.
    token = jnp.where(fresh, first_PG.ravel()[row], slots.token_PG[:, 0])
    filled = Slots(*(x[:, None] for x in (token, kept, jnp.where(kept, count, 0), row, start)))
    of_rows = (x.ravel()[row][:, None] for x in (rows.key_PG, rows.temperature_PG, rows.budget_PG))
    asked = RowInputs(*of_rows, length, problem, expected)
    sent_away = jnp.sum(busy & ~kept, dtype=jnp.int32)[None]
    return filled, waiting_B.reshape(P, G), asked, pool, pages, sent_away


def write_rows(into: Array, slots: Slots, value_PG: Array) -> Array:
    """Writes what each busy slot has got into its row's place for it.

    Args:
      into: [P, G, R] of the queue's rows, written at the slot's count; or [P, G], one value a row.
    """
    (P, G), row = into.shape[:2], jnp.where(slots.busy_PG, slots.row_PG, into.shape[0] * into.shape[1])[:, 0]
    flat = into.reshape(P * G, *into.shape[2:])
    index = (row, slots.count[:, 0]) if into.ndim == 3 else (row,)
    return flat.at[index].set(value_PG[:, 0], mode="drop").reshape(into.shape)
