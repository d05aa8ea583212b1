"""Every pytree that crosses from one room to the next, and the key of dimension letters.

    P  problems (prompts) in a batch        T  tokens of a sequence      D  model width
    G  rollouts of one problem (a group)    C  context slots (prefix)    F  feed-forward width
    B  rows, B = P·G                        R  response slots            H  query heads
    J  judge queries of one problem         S  cache slots               K  key/value heads
    N  segments of one rollout              L  layers                    E  head size
                                            V  vocabulary
    M  microbatches of an update            W  a teacher's model width
    A  decode slots

A name such as `tokens_PGR` carries its dimensions as a suffix.  Masks are bool and True means "counted".

Sampling and judging have one layout.  A batch is P *contexts* (the tokens that a group shares) and P·G *rows* (the
tokens of its own that each row continues its context with):

    context_PC   [ p p p p p . . ]          right-padded, one a problem, computed once for its G rows
    rows_PGT     [ . . x x x x x ]          each token attends to its problem's context and to its own row's past

For the policy the context is the prompt without its last token; a row starts with that last token, followed by the
response.  For the judge the context is rubric, problem and reference; a row is a trace and the closing instruction.

Training packs rows by a token budget (`Packed`), M microbatches of B rows of T slots; a row shares contexts too.

Records hold arrays only.  This module is not type-checked by jaxtyping's import hook: JAX rebuilds pytrees through
their `__init__` with leaves that are not arrays.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax

Array = jax.Array


@flax.struct.dataclass
class Context:
    """Token sequences that the rows of one problem share.

    Attributes:
      tokens_PC: int32, right-padded.
      length_P: int32, number of real tokens, 0 ≤ length ≤ C.
    """

    tokens_PC: Array
    length_P: Array


@flax.struct.dataclass
class Prefix:
    """The keys and values of a `Context`, computed once and read by every row of its problem.

    Attributes:
      layers: keys and values of every layer (`model.cache.KV`, dims P C K E), in the decoder's own layout.
      length_P: int32, number of real context tokens.
    """

    layers: Any
    length_P: Array


@flax.struct.dataclass
class Rows:
    """What each row continues its context with.

    Attributes:
      tokens_PGT: int32, left-padded, so that every row ends in slot T − 1.
      start_PG: int32, the first real slot, 0 ≤ start < T.
    """

    tokens_PGT: Array
    start_PG: Array


@flax.struct.dataclass
class BranchRows:
    """Rows off which several sequences branch: the trace, which each continues from a point of its own.

        slot       0 1 2 3 4 5 6 7 8 9      a trace a b c d, asked about after b, after a b c and at its end
        token      a b c d ? ! ? ! ? !
        segment    1 1 1 1 2 2 3 3 4 4      0 is padding
        position   0 1 2 3 2 3 3 4 4 5      counted on after the context's
        last       5 7 9                    of each branch

    Attributes:
      tokens_PGT: int32, right-padded.
      segment_PGT: int32, 1 for the trace, 2 … for its branches.
      position_PGT: int32; a branch sees of the trace what stands before its own first position.
      last_PGN: int32, slot of each branch's last token; 0 where there is none.
    """

    tokens_PGT: Array
    segment_PGT: Array
    position_PGT: Array
    last_PGN: Array


@flax.struct.dataclass
class Traces:
    """Texts from whose beginnings rows go on: N rows from each of a problem's traces, trace by trace.

        trace     a b c d e          begin of its N = 3 rows: 2, 5, 0 (nothing is asked there)
        row 0     a b ? ! …          `Rows` hold what follows the beginning, and what is sampled comes after that
        row 1     a b c d e ? ! …

    Attributes:
      rows: the traces, left-padded; [P, G, T].
      begin_PQ: int32, tokens of its trace that each of the Q = G·N rows sees.
    """

    rows: Rows
    begin_PQ: Array


@flax.struct.dataclass
class Draw:
    """How rows are sampled; a row's identity, not its place in the batch, determines its random numbers.

    Attributes:
      seed: uint32 scalar, the run's seed.
      step: int32 scalar, the RL step.
      problem_P: uint32, the problem's identity; with the index within the group it is the row's.
      temperature_PG: float32; 0 means greedy.
      budget_PG: int32, tokens to sample at most; rows with 0 only fill the batch and stay empty.
      expected_P: int32, tokens that a row of each problem is expected to sample, by which rows in decode slots get
        pages; None where all are expected to be alike.
    """

    seed: Array
    step: Array
    problem_P: Array
    temperature_PG: Array
    budget_PG: Array
    expected_P: Array | None = None


@flax.struct.dataclass
class Rollouts:
    """Sampled responses.

    Attributes:
      tokens_PGR: int32, right-padded with the pad id.
      mask_PGR: bool, True for sampled tokens, EOS included.
      logp_PGR: float32, log-probability of each sampled token under the distribution it was drawn from
        (logits / temperature); 0 where the mask is False.
      entropy_PGR: float32, entropy of that distribution in nats; 0 where the mask is False.
      ended_PG: bool, True where an EOS was sampled within R tokens.
    """

    tokens_PGR: Array
    mask_PGR: Array
    logp_PGR: Array
    entropy_PGR: Array
    ended_PG: Array


@flax.struct.dataclass
class Usage:
    """What a sampling call did, over all data shards: scalars.

    Attributes:
      steps: int32, tokens that each decode slot was fed; empty slots are fed padding.
      slots: int32, rows decoded at a time.
      busy: int32, tokens fed to slots with a row that had not ended.
      idle: int32, tokens fed to slots of data shards all of whose rows had ended, while others' had not.
      restarts: int32, rows that gave their pages back and began anew later.
      pages: float32, the fraction of the rows' pages that was in use, summed over steps; None where rows have theirs
        from the start.
    """

    steps: Array
    slots: Array
    busy: Array
    idle: Array
    restarts: Array
    pages: Array | None


@flax.struct.dataclass
class Packed:
    """Whole token sequences, several to a row, each independent of the others: rows of a microbatch, or, with a leading
    M, all microbatches of an update.

    A row is cut into segments, runs of slots.  A segment is a sequence, or, where several sequences of a row begin
    alike, what they share (a prompt without its last token) and then each one's own tokens, which see the shared ones
    too: those that stand before the position at which their own segment begins, for sequences may share different
    lengths of one text (`data.packing` draws both).

    Attributes:
      tokens_BT: int32, what is fed.
      target_BT: int32, the token that follows each slot's in its sequence; anything where nothing does.
      segment_BT: int32, 1 … n within a row; 0 for padding.
      shared_BT: int32, the segment that a slot sees besides its own; its own where there is none.
      position_BT: int32, of each slot in its sequence.
    """

    tokens_BT: Array
    target_BT: Array
    segment_BT: Array
    shared_BT: Array
    position_BT: Array


@flax.struct.dataclass
class Lesson:
    """One supervised update's batch: `used` microbatches of packed rows, then nothing.

    Attributes:
      packed: [M, B, T].
      mask_MBT: bool, slots whose target carries a loss.
      share_MBT: float32, where the target is a score's digit, how far the score lies towards the next digit; else 0.
      used: int32 scalar.
    """

    packed: Packed
    mask_MBT: Array
    share_MBT: Array
    used: Array


@flax.struct.dataclass
class Experience:
    """One RL update's batch: `used` microbatches of packed rows, then nothing.  A slot's numbers are of its target.

    Attributes:
      packed: [M, B, T].
      mask_MBT: bool, slots whose target carries a loss.
      weight_MBT: float32, of each token in the loss of the whole update; 0 where the mask is False.
      advantage_MBT: float32.
      sampler_logp_MBT: float32, recorded by the sampler.
      old_logp_MBT: float32, of the policy before the first update on this batch, recomputed by the trainer's forward.
      ref_logp_MBT: float32, of the reference policy.
      used: int32 scalar.
    """

    packed: Packed
    mask_MBT: Array
    weight_MBT: Array
    advantage_MBT: Array
    sampler_logp_MBT: Array
    old_logp_MBT: Array
    ref_logp_MBT: Array
    used: Array


@flax.struct.dataclass
class Teaching:
    """An experience's responses as its teacher is shown them.

    Attributes:
      packed: [M, B, T'], after the teacher's prompts, each in the row where the experience has it.
      at_MBT: int32, by the experience's slots: the teacher's slot that has the same target.
    """

    packed: Packed
    at_MBT: Array


@flax.struct.dataclass
class TrainState:
    """What an update changes, and what a checkpoint holds.

    Attributes:
      step: int32, RL steps taken (not optimizer updates).
      params: the policy's parameters.
      opt_state: Optax state.
      skipped: int32, updates skipped because of a non-finite gradient.
    """

    step: Array
    params: Any
    opt_state: Any
    skipped: Array
