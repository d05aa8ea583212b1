"""One supervised update as one pure function: a model learns to write the responses of packed examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float32, Int

from exprl_jax.learning.update import APPLIED, accumulate, apply_gradient
from exprl_jax.records import Lesson, TrainState

LessonLogp = Callable[[Any, Lesson], tuple[Float32[Array, "B T"], Float32[Array, "B T"]]]

METRICS: Mapping[str, str] = {
    "loss/total": "negative log-probability of the response tokens, end of sequence included, mean over them, nats",
    "policy/entropy": "entropy of the distributions that they were predicted with, mean over them, nats",
    **APPLIED,
    "update/tokens": "counted tokens",
    "update/learning_rate": "learning rate of the update",
}
"""Every key of `sft_step`'s metrics and what it is the value of, for the update's whole batch."""

VALIDATION: Mapping[str, str] = {
    "validation/loss": "loss/total of the held-back examples after the update; null at updates without a validation",
    "validation/accuracy": (
        "fraction of their response tokens that are the most likely one; of a judge's score between two digits, "
        "either digit counts"
    ),
}
"""Every key that a validation adds to a row."""

JUDGE_VALIDATION: Mapping[str, str] = {
    "validation/spearman": (
        "rank correlation of the scores that the judge gives the held-back texts, asked as in a run, and those that "
        "they should get; null where either are all equal"
    ),
    "validation/misplaced": (
        "mean of the false positive and the false negative rate of saying 4 or more; null where the lessons hold only "
        "one kind"
    ),
    "validation/parsed": "fraction of the held-back texts that got a score",
}
"""Every key that a judge's training adds to a validation."""


def sft_step(
    state: TrainState,
    lesson: Lesson,
    *,
    logp_fn: LessonLogp,
    optimizer: optax.GradientTransformation,
    rate: optax.Schedule,
    keep_sharded: Callable[[Any], Any],
) -> tuple[TrainState, dict[str, Float32[Array, ""]]]:
    """One update by −Σ m · log π(token) / Σ m; meant to be jitted with `state` donated.

    The mean is over the whole batch's counted tokens: which examples share a row, and which rows a microbatch, changes
    nothing but memory and time.  Gradients are summed in float32; an update that is not finite is skipped
    (`update.apply_gradient`).

    Args:
      state: as of the last update; its `step` is that of a run with one update a step, and is left alone.
      lesson: packed examples.
      logp_fn: (params, a microbatch of the lesson) → (log π of each slot's target, the entropy of that distribution);
        what stands where the mask is False is not read.
      optimizer: see `update.make_optimizer`.
      rate: the learning rate that the optimizer uses, as a function of the updates it has made; for the metric.
      keep_sharded: constrains a tree of gradients to the parameters' sharding.

    Returns:
      (state, metrics); the metrics are those of `METRICS`.
    """
    tokens = lesson.mask_MBT.sum()
    weight = 1.0 / jnp.maximum(tokens, 1)
    made = state.step - state.skipped

    def objective(params, part):
        # Whatever stands outside the mask must not reach the loss: 0 · NaN is NaN, in the gradient too.
        logp, entropy = (jnp.where(part.mask_MBT, x, 0.0) for x in logp_fn(params, part))
        return -weight * logp.sum(), ({"policy/entropy": entropy.sum() * weight}, {})

    slots = lesson.replace(used=jnp.zeros(lesson.mask_MBT.shape[0]))
    gradient, total, (sums, _) = accumulate(objective, state.params, slots, lesson.used, keep_sharded)
    state, applied = apply_gradient(state, gradient, total, optimizer)
    return state, applied | sums | {
        "update/tokens": tokens.astype(jnp.float32),
        "update/learning_rate": jnp.asarray(rate(made), jnp.float32),
    }


def validate(params: Any, lesson: Lesson, *, measures_fn: Callable) -> dict[str, Float32[Array, ""]]:
    """Sums over a batch of examples that nothing is learned from.

    Args:
      measures_fn: (params, a microbatch of the lesson) → (log π of each slot's target, whether it is the most likely
        token).

    Returns:
      `loss`, `right` and `tokens`: the sums of −log π, of the tokens that are most likely, and of all, over the mask.
    """
    slots = lesson.replace(used=jnp.zeros(lesson.mask_MBT.shape[0]))

    def add(m, sums):
        part = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, m, keepdims=False), slots)
        logp, right = measures_fn(params, part)
        return sums + jnp.stack([jnp.where(part.mask_MBT, x, 0.0).sum() for x in (-logp, right, jnp.ones_like(logp))])

    sums = jax.lax.fori_loop(0, lesson.used, add, jnp.zeros(3, jnp.float32))
    return dict(zip(("loss", "right", "tokens"), sums))


def is_right(
    top_BT: Int[Array, "B T"], target_BT: Int[Array, "B T"], share_BT: Float32[Array, "B T"], digit_ids: tuple[int, ...]
) -> Bool[Array, "B T"]:
    """Whether the most likely token is the target, or, where a score lies between two digits, the next digit."""
    ids = jnp.asarray(digit_ids, jnp.int32)
    next_BT = (jnp.roll(target_BT[..., None] == ids, 1, axis=-1) * ids).sum(-1)
    return (top_BT == target_BT) | ((share_BT > 0) & (top_BT == next_BT))


def towards_next_digit(
    logits_BT5: Float32[Array, "B T 5"],
    target_BT: Int[Array, "B T"],
    share_BT: Float32[Array, "B T"],
    digit_ids: tuple[int, ...],
) -> Float32[Array, "B T"]:
    """What a score between two digits adds to the log π of the lower one: share · (log π(next) − log π(target)).

    With it the loss is the cross-entropy −(1 − share) · log π(target) − share · log π(next), whose least value is where
    π is the two weights.  The normalisers of the two are one, so that a difference of logits is all that is needed.

    Args:
      logits_BT5: of the digits, at the slots that predict the targets.
      target_BT: where `share_BT` is not 0, a digit's id that is not the last.
      digit_ids: of the digits.
    """
    here_BT5 = (target_BT[..., None] == jnp.asarray(digit_ids)).astype(jnp.float32)
    return share_BT * (logits_BT5 * (jnp.roll(here_BT5, 1, axis=-1) - here_BT5)).sum(-1)
