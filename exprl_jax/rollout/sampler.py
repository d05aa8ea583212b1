"""The sampling loop: continues every row until it ends or its budget is spent.

Cache slots of rows that start with T = 4 tokens and may sample R = 5, one row of 4 and one of 2:

    slot       0   1   2   3 | 4   5   6   7
               a   b   c   d | A   B   C   D        A … E are sampled; E, the last, is never fed
               .   .   x   y | X   Y  eos  .        left-padded, so that every row's last token is in slot T − 1
               └─ read ──┘ └── fed by the loop, slot T − 1 + step

Slots before T − 1 are read in chunks, their hidden states unused.  The loop feeds slot T − 1 + step and samples the
next token from its hidden state; it stops when all rows have ended.  A row that has ended is fed padding, whose
results are masked: rows do not depend on one another.  With fewer decode slots than rows, the next row takes its slot
(`rollout.slots`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from exprl_jax.model import branch_pages, paged
from exprl_jax.model.decoder import Params, Transformer, logits
from exprl_jax.records import Array, Draw, Prefix, Rollouts, Rows, Traces, Usage
from exprl_jax.rollout.sampling import draw_tokens, row_keys
from exprl_jax.rollout.slots import RowInputs, Slots, empty_slots, fill_slots, write_rows

# Tokens of every row read at a time before the first is sampled; bounds activations.
CHUNK = 1024


@flax.struct.dataclass
class Sampling:
    """What the loop carries.  P and G of `slots` are the decoder's (`rollout.slots`), of all else the rows'.

    Attributes:
      step: int32 scalar, tokens fed so far to every slot.
      slots: what the decoder's rows hold.
      waiting_PG: bool, rows without a slot that have not ended; empty without a queue.
      cache: the slots' keys and values.
      tokens_PGR, logp_PGR, entropy_PGR: the responses so far, as in `Rollouts`.
      length_PG: int32, tokens of each.
      ended_PG: bool, EOS was sampled, or there was nothing to sample.
      busy_X, idle_X, restarts_X, pages_X: `Usage` of each data shard; idle in steps.
    """

    step: Array
    slots: Slots
    waiting_PG: Array
    cache: Any
    tokens_PGR: Array
    logp_PGR: Array
    entropy_PGR: Array
    length_PG: Array
    ended_PG: Array
    busy_X: Array
    idle_X: Array
    restarts_X: Array
    pages_X: Array


def sample(
    transformer: Transformer,
    params: Params,
    prefix: Prefix,
    rows: Rows,
    draw: Draw,
    *,
    max_tokens: int,
    eos_ids: tuple[int, ...],
    pad_id: int,
    slots: int = 0,
    expected_tokens: int = 0,
    traces: Traces | None = None,
) -> tuple[Rollouts, Usage]:
    """Samples up to `max_tokens` tokens a row; stops early when every row has ended.

    Args:
      prefix: the contexts, prefilled once a problem.
      rows: what each row starts with (for the policy the last prompt token, for a judge a trace and the closing
        instruction).
      draw: seeds, identities, temperatures, and how many tokens of which rows to sample at all.
      eos_ids: any of these ends a row.
      slots: rows of a data shard that are decoded at a time; rows are then of one token.  0, or as many as there are
        rows, decodes all.
      expected_tokens: by which the slots' common pages are counted; 0 for `max_tokens`.  They are handed out by
        `draw.expected_P` where that is given, and else by this too.
      traces: rows go on from beginnings of these, which are read once and kept once in pages on every platform; there
        are no slots then.

    Raises:
      ValueError: rows of several tokens are to wait for slots.
    """
    placement = transformer.placement
    (P, G, T), X = rows.tokens_PGT.shape, placement.shards
    queued = 0 < slots < P // X * G
    if queued and T > 1:
        raise ValueError(f"rows of {T} tokens cannot wait for slots: expected 1, the rest in their contexts")
    own = T - 1 + max_tokens  # tokens that a row caches; whole chunks add padding to the slots
    # From here on T includes that padding: `own` is taken before, or pages would be kept for padding.
    rows = _whole_chunks(rows)
    T = rows.tokens_PGT.shape[2]
    # A copy in the compute dtype and the layout of decoding, made once: no step of the loop casts or gathers.
    params = transformer.decoding_params(params)
    table_DV, eos = transformer.unembedding(params), jnp.asarray(eos_ids, jnp.int32)
    budget_PG = jnp.minimum(draw.budget_PG, max_tokens)
    expected_P = jnp.full(P, expected_tokens or max_tokens) if draw.expected_P is None else draw.expected_P
    expected_pages_P = paged.own_pages(jnp.clip(expected_P, 1, max_tokens))
    every_row = RowInputs(row_keys(draw), draw.temperature_PG, budget_PG, prefix.length_P, None, expected_pages_P)
    seat, note = _by_shard(transformer)
    if traces is not None:
        # Of a row's context, so many tokens: the problem's, and a beginning of its trace.
        every_row = every_row._replace(length_P=prefix.length_P[:, None] + traces.begin_PQ)

    def feed(cache, tokens_PGT, slot, start_PG=rows.start_PG, asked=every_row):
        of_rows = prefix.replace(length_P=asked.length_P)
        return transformer.continue_rows(params, of_rows, cache, tokens_PGT, start_PG, slot, asked.problem_P)

    def more(s: Sampling):
        return jnp.any(s.slots.busy_PG) | jnp.any(s.waiting_PG)

    def advance(s: Sampling) -> Sampling:
        asked, start_PG = every_row, rows.start_PG
        if queued:
            s, asked = seat(s, rows.tokens_PGT[..., -1], every_row)
            start_PG = jnp.zeros_like(s.slots.row_PG)  # one token a row, and no padding before it
        # Drawn is the response's token `count`; fed is the one before it, which for 0 is the prompt's last.
        now = s.slots
        hidden_PG1D, cache = feed(s.cache, now.token_PG[..., None], T - 1 + now.count, start_PG, asked)
        logits_PGV = logits(hidden_PG1D[:, :, 0], table_DV)
        # A token's key is of its row and its number in the response alone: no slot, no batch.
        count_PG = jnp.broadcast_to(now.count, now.busy_PG.shape)
        step_keys = jax.vmap(jax.vmap(jax.random.fold_in))(asked.key_PG, count_PG)
        token_PG, logp_PG, entropy_PG = draw_tokens(step_keys, logits_PGV, asked.temperature_PG)
        # Padding may be one of the EOS ids, and is fed to rows that have ended: only a busy row can hit one.
        token_PG = jnp.where(now.busy_PG, token_PG, pad_id)
        hit_PG = now.busy_PG & jnp.any(token_PG[..., None] == eos, axis=-1)
        logp_PG, entropy_PG = (jnp.where(now.busy_PG, x, 0.0) for x in (logp_PG, entropy_PG))
        s = s.replace(
            step=s.step + 1,
            cache=cache,
            slots=now.replace(
                token_PG=token_PG,
                busy_PG=now.busy_PG & ~hit_PG & (now.count + 1 < asked.budget_PG),
                count=now.count + 1,
            ),
        )
        if queued:
            # `now`, not `s.slots`: a row's last token belongs to it, though its slot is empty by now.
            return note(s, now, token_PG, logp_PG, entropy_PG, hit_PG)

        def record(into_PGR, value_PG):
            return jax.lax.dynamic_update_slice(into_PGR, value_PG[..., None], (0, 0, now.count))

        return s.replace(
            tokens_PGR=record(s.tokens_PGR, token_PG),
            logp_PGR=record(s.logp_PGR, logp_PG),
            entropy_PGR=record(s.entropy_PGR, entropy_PG),
            length_PG=s.length_PG + now.busy_PG,
            ended_PG=s.ended_PG | hit_PG,
        )

    if queued:
        cache = open_slots(transformer, prefix, slots, max_tokens, expected_tokens)
        opened, waiting_PG = empty_slots(slots * X), budget_PG > 0
    elif traces is not None:
        cache = _read_traces(transformer, params, prefix, traces.rows, branch_pages.spare_pages(G, own))
        cache = transformer.branch(cache, traces.begin_PQ, rows.start_PG, own)
        opened, waiting_PG = _together(rows, budget_PG)
    else:
        # The last slot's token is fed by the loop, so the cache needs no room for the last sampled one.
        cache = transformer.open_cache(prefix, rows.start_PG, T - 1 + max_tokens, own)
        opened, waiting_PG = _together(rows, budget_PG)
    if T > 1:
        length = min(CHUNK, T - 1)

        def read(i, cache):
            return feed(cache, jax.lax.dynamic_slice_in_dim(rows.tokens_PGT, i * length, length, axis=2), i * length)[1]

        # Rows are left-padded: before the first token of the longest there is nothing to read.
        cache = jax.lax.fori_loop(rows.start_PG.min() // length, (T - 1) // length, read, cache)
    none_X, nothing_PGR = jnp.zeros(X, jnp.int32), jnp.zeros((P, G, max_tokens), jnp.float32)
    start = Sampling(
        step=jnp.int32(0),
        slots=opened,
        waiting_PG=waiting_PG,
        cache=cache,
        tokens_PGR=jnp.full((P, G, max_tokens), pad_id, jnp.int32),
        logp_PGR=nothing_PGR,
        entropy_PGR=nothing_PGR,
        length_PG=jnp.zeros((P, G), jnp.int32),
        ended_PG=budget_PG == 0,
        busy_X=none_X,
        idle_X=none_X,
        restarts_X=none_X,
        pages_X=none_X.astype(jnp.float32),
    )
    s = jax.lax.while_loop(more, advance, start)
    mask_PGR = jnp.arange(max_tokens) < s.length_PG[..., None]
    decoded = slots * X if queued else P * G
    busy = s.busy_X.sum() if queued else s.length_PG.sum()
    idle_X = s.idle_X if queued else s.step - s.length_PG.reshape(X, -1).max(-1)
    pages_used = s.pages_X.mean() if queued and isinstance(cache, paged.PagedCache) else None
    usage = Usage(s.step, jnp.int32(decoded), busy, idle_X.sum() * (decoded // X), s.restarts_X.sum(), pages_used)
    return Rollouts(s.tokens_PGR, mask_PGR, s.logp_PGR, s.entropy_PGR, s.ended_PG), usage


def _together(rows: Rows, budget_PG: Array) -> tuple[Slots, Array]:
    """A slot for every row, and none that waits."""
    opened = Slots(rows.tokens_PGT[..., -1], budget_PG > 0, jnp.int32(0), None, None)
    return opened, jnp.zeros((0, 0), bool)


def _read_traces(transformer: Transformer, params: Params, prefix: Prefix, rows: Rows, spare: int) -> Any:
    """Pages with whole traces in them, read some tokens at a time, and spare ones of each problem."""
    tokens = rows.tokens_PGT.shape[2]
    padding = -tokens % min(CHUNK, tokens)
    tokens_PGT, start_PG = jnp.pad(rows.tokens_PGT, ((0, 0), (0, 0), (padding, 0))), rows.start_PG + padding
    length = min(CHUNK, tokens)

    def read(i, cache):
        some_PGT = jax.lax.dynamic_slice_in_dim(tokens_PGT, i * length, length, axis=2)
        return transformer.continue_rows(params, prefix, cache, some_PGT, start_PG, i * length)[1]

    cache = transformer.open_traces(prefix, start_PG, tokens, spare)
    return jax.lax.fori_loop(start_PG.min() // length, tokens_PGT.shape[2] // length, read, cache)


def open_slots(transformer: Transformer, prefix: Prefix, slots: int, max_tokens: int, expected_tokens: int) -> Any:
    """Where rows in decode slots keep their keys and values: pages where rows have such in any case, and where there
    are to be fewer than the slots' budgets; else room for `max_tokens` of each slot.  Arguments as of `sample`."""
    on_pages = paged.is_paged(transformer.execution, transformer.placement) or 0 < expected_tokens < max_tokens
    # A pool holds what the slots are expected to need together, and at least what one row may.
    expected, one_row = paged.own_pages(expected_tokens or max_tokens), paged.own_pages(max_tokens)
    pages = max(slots * expected, one_row) if on_pages else 0
    return transformer.open_slots(prefix, slots, max_tokens, pages)


def _by_shard(transformer: Transformer) -> tuple[Callable, Callable]:
    """`slots.fill_slots` and `slots.write_rows` of every data shard: what each has in its slots is its own affair."""
    placement, layers = transformer.placement, transformer.arch.layers
    shard = (placement.data,)
    pool_axes = (placement.data, None, placement.axis_of(transformer.arch.kv_heads))

    def seat(s: Sampling, first_PG: Array, rows: RowInputs) -> tuple[Sampling, RowInputs]:
        on_pages = isinstance(s.cache, paged.PagedCache)
        pool, pages = (s.cache.pool, s.cache.pages) if on_pages else (None, None)
        fill = placement.split(
            functools.partial(fill_slots, layers=layers),
            (shard, shard, shard, shard, (), pool_axes, shard),
            (shard, shard, shard, pool_axes, shard, shard),
        )
        slots, waiting_PG, asked, pool, pages, sent_away_X = fill(
            s.slots, s.waiting_PG, first_PG, rows, s.step, pool, pages
        )
        s = s.replace(slots=slots, waiting_PG=waiting_PG, restarts_X=s.restarts_X + sent_away_X)
        busy_XA = slots.busy_PG.reshape(len(s.busy_X), -1)
        # The oldest row always has its slot: where none has one, no row is left.
        s = s.replace(busy_X=s.busy_X + busy_XA.sum(-1, dtype=jnp.int32), idle_X=s.idle_X + ~busy_XA.any(-1))
        if on_pages:
            owner_XN = pages.owner_N.reshape(len(s.pages_X), -1)
            in_use_X = jnp.mean(owner_XN < slots.busy_PG.shape[0] // len(s.pages_X), axis=1)
            s = s.replace(cache=s.cache.replace(pool=pool, pages=pages), pages_X=s.pages_X + in_use_X)
        return s, asked

    def note(s: Sampling, slots: Slots, token_PG: Array, logp_PG: Array, entropy_PG: Array, hit_PG: Array) -> Sampling:
        # `slots` as they were fed.
        write = placement.split(write_rows, (shard, shard, shard), shard)
        return s.replace(
            tokens_PGR=write(s.tokens_PGR, slots, token_PG),
            logp_PGR=write(s.logp_PGR, slots, logp_PG),
            entropy_PGR=write(s.entropy_PGR, slots, entropy_PG),
            length_PG=write(s.length_PG, slots, slots.count + 1),
            ended_PG=write(s.ended_PG, slots, hit_PG),
        )

    return seat, note


def _whole_chunks(rows: Rows) -> Rows:
    """Pads rows on the left until all but their last token, which the loop feeds, are whole chunks."""
    read = rows.tokens_PGT.shape[2] - 1
    padding = -read % CHUNK if read > CHUNK else 0
    return Rows(jnp.pad(rows.tokens_PGT, ((0, 0), (0, 0), (padding, 0))), rows.start_PG + padding)
