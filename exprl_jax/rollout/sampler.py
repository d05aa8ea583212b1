"""The sampling loop: continues every row until it ends or its budget is spent.

Cache slots of rows that start with T = 4 tokens and may sample R = 5, one row of 4 and one of 2:

    slot       0   1   2   3 | 4   5   6   7
               a   b   c   d | A   B   C   D        A … E are sampled; E, the last, is never fed
               .   .   x   y | X   Y  eos  .        left-padded, so that every row's last token is in slot T − 1
               └─ read ──┘ └── fed by the loop, slot T − 1 + step

Slots before T − 1 are read in chunks, their hidden states unused.  The loop feeds slot T − 1 + step and samples the
next token from its hidden state; it stops when all rows have ended.  A row that has ended is fed padding, whose
results are
masked: rows do not depend on one another.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from exprl_jax.model.decoder import Params, Transformer, logits
from exprl_jax.records import Array, Draw, Prefix, Rollouts, Rows
from exprl_jax.rollout.sampling import draw_tokens, row_keys

# Tokens of every row read at a time before the first is sampled; bounds activations.
CHUNK = 1024


@flax.struct.dataclass
class Sampling:
    """What the loop carries.

    Attributes:
      step: int32 scalar, tokens sampled so far by rows that have not ended.
      token_PG: int32, the token to feed next.
      ended_PG: bool, EOS was sampled, or there was nothing to sample.
      cache: the rows' keys and values.
      tokens_PGR, mask_PGR, logp_PGR: the responses so far, as in `Rollouts`.
    """

    step: Array
    token_PG: Array
    ended_PG: Array
    cache: Any
    tokens_PGR: Array
    mask_PGR: Array
    logp_PGR: Array


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
) -> Rollouts:
    """Samples up to `max_tokens` tokens a row; stops early when every row has ended.

    Args:
      prefix: the contexts, prefilled once a problem.
      rows: what each row starts with (for the policy the last prompt token, for a judge a trace and the closing
        instruction).
      draw: seeds, identities, temperatures, and which rows to sample at all.
      eos_ids: any of these ends a row.
    """
    own = rows.tokens_PGT.shape[2] - 1 + max_tokens  # tokens that a row caches; whole chunks add padding to the slots
    rows = _whole_chunks(rows)
    P, G, T = rows.tokens_PGT.shape
    # A copy in the compute dtype and the layout of decoding, made once: no step of the loop casts or gathers.
    params = transformer.decoding_params(params)
    table_DV, key_PG, eos = transformer.unembedding(params), row_keys(draw), jnp.asarray(eos_ids, jnp.int32)

    def feed(cache, tokens_PGT, slot):
        return transformer.continue_rows(params, prefix, cache, tokens_PGT, rows.start_PG, slot)

    def more(s: Sampling):
        return (s.step < max_tokens) & ~jnp.all(s.ended_PG)

    def advance(s: Sampling) -> Sampling:
        hidden_PG1D, cache = feed(s.cache, s.token_PG[..., None], T - 1 + s.step)
        logits_PGV = logits(hidden_PG1D[:, :, 0], table_DV)
        # A token's key is of its row and its number in the response alone: no slot, no batch.
        step_keys = jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(0, None)), in_axes=(0, None))(key_PG, s.step)
        token_PG, logp_PG = draw_tokens(step_keys, logits_PGV, draw.temperature_PG)
        live_PG = ~s.ended_PG
        token_PG = jnp.where(live_PG, token_PG, pad_id)

        def record(into_PGR, value_PG):
            return jax.lax.dynamic_update_slice(into_PGR, value_PG[..., None], (0, 0, s.step))

        return Sampling(
            step=s.step + 1,
            token_PG=token_PG,
            ended_PG=s.ended_PG | (live_PG & jnp.any(token_PG[..., None] == eos, axis=-1)),
            cache=cache,
            tokens_PGR=record(s.tokens_PGR, token_PG),
            mask_PGR=record(s.mask_PGR, live_PG),
            logp_PGR=record(s.logp_PGR, jnp.where(live_PG, logp_PG, 0.0)),
        )

    # The last slot's token is fed by the loop, so the cache needs no room for the last sampled one.
    cache = transformer.open_cache(prefix, rows.start_PG, T - 1 + max_tokens, own)
    if T > 1:
        length = min(CHUNK, T - 1)

        def read(i, cache):
            return feed(cache, jax.lax.dynamic_slice_in_dim(rows.tokens_PGT, i * length, length, axis=2), i * length)[1]

        # Rows are left-padded: before the first token of the longest there is nothing to read.
        cache = jax.lax.fori_loop(rows.start_PG.min() // length, (T - 1) // length, read, cache)
    responses = (P, G, max_tokens)
    start = Sampling(
        step=jnp.int32(0),
        token_PG=rows.tokens_PGT[..., -1],
        ended_PG=~draw.live_PG,
        cache=cache,
        tokens_PGR=jnp.full(responses, pad_id, jnp.int32),
        mask_PGR=jnp.zeros(responses, bool),
        logp_PGR=jnp.zeros(responses, jnp.float32),
    )
    s = jax.lax.while_loop(more, advance, start)
    return Rollouts(s.tokens_PGR, s.mask_PGR, s.logp_PGR, s.ended_PG)


def _whole_chunks(rows: Rows) -> Rows:
    """Pads rows on the left until all but their last token, which the loop feeds, are whole chunks."""
    read = rows.tokens_PGT.shape[2] - 1
    padding = -read % CHUNK if read > CHUNK else 0
    return Rows(jnp.pad(rows.tokens_PGT, ((0, 0), (0, 0), (padding, 0))), rows.start_PG + padding)
