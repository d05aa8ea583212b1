"""One supervised update as one pure function: the policy learns to write the responses of packed examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32

from exprl_jax.learning.update import APPLIED, PackedLogp, accumulate, apply_gradient
from exprl_jax.records import Lesson, TrainState

METRICS: Mapping[str, str] = {
    "loss/total": "negative log-probability of the response tokens, end of sequence included, mean over them, nats",
    "policy/entropy": "entropy of the distributions that they were predicted with, mean over them, nats",
    **APPLIED,
    "update/tokens": "counted tokens",
    "update/learning_rate": "learning rate of the update",
}
"""Every key of `sft_step`'s metrics and what it is the value of, for the update's whole batch."""


def sft_step(
    state: TrainState,
    lesson: Lesson,
    *,
    logp_fn: PackedLogp,
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
      logp_fn: (params, packed) → (log π of each slot's target, the entropy of that distribution); what stands where the
        mask is False is not read.
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
        packed, mask_BT = part
        # Whatever stands outside the mask must not reach the loss: 0 · NaN is NaN, in the gradient too.
        logp, entropy = (jnp.where(mask_BT, x, 0.0) for x in logp_fn(params, packed))
        return -weight * logp.sum(), ({"policy/entropy": entropy.sum() * weight}, {})

    slots = lesson.packed, lesson.mask_MBT
    gradient, total, (sums, _) = accumulate(objective, state.params, slots, lesson.used, keep_sharded)
    state, applied = apply_gradient(state, gradient, total, optimizer)
    return state, applied | sums | {
        "update/tokens": tokens.astype(jnp.float32),
        "update/learning_rate": jnp.asarray(rate(made), jnp.float32),
    }
