"""One update of a policy towards a teacher, over the full vocabulary, as one pure function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Float32

from exprl_jax.learning.logprobs import reverse_kl
from exprl_jax.learning.update import APPLIED, accumulate, apply_gradient
from exprl_jax.mesh import Placement
from exprl_jax.records import Experience, Packed, Teaching, TrainState

PackedStates = Callable[[Any, Packed], tuple[Float[Array, "B T D"], Float[Array, "D V"]]]

METRICS: Mapping[str, str] = {
    "loss/total": "reverse KL(policy ‖ teacher) under loss.aggregate",
    "distill/kl": (
        "reverse KL(policy ‖ teacher), mean over response tokens, nats; of the sampled tokens alone, or exact"
    ),
    **APPLIED,
    "update/tokens": "counted tokens",
}
"""Every key of `distill_step`'s metrics and what it is the value of."""


def distill_step(
    state: TrainState,
    teacher: Any,
    teaching: Teaching,
    experience: Experience,
    *,
    states_fn: PackedStates,
    teacher_fn: PackedStates,
    temperature: float,
    chunk: int,
    optimizer: optax.GradientTransformation,
    placement: Placement,
    keep_sharded: Callable[[Any], Any],
) -> tuple[TrainState, dict[str, Float32[Array, ""]]]:
    """One update by Σ w · KL(π ‖ π_teacher), the KL of each response token's whole distribution at the sampling
    temperature.  Gradients flow into the policy alone, and not through what was sampled.

    Args:
      state: as of the last update; meant to be donated.
      teacher: parameters of the policy's architecture.
      teaching: the same responses after the teacher's prompts, which hold the references, in the same rows.
      experience: the rollouts, with the policy's own prompts; advantages and log-probs are not read.
      states_fn, teacher_fn: (params, packed) → (the hidden states of its slots, unembedding), of policy and teacher.
      chunk: rows × tokens whose logits exist at once.
      keep_sharded: as in `update.train_step`.

    Returns:
      (state, metrics); the metrics are those of `METRICS`.
    """

    def objective(params, part):
        packed, teaching, mask_BT, weight_BT = part
        hidden_BTD, table_DV = states_fn(params, packed)
        shown_BTD, teacher_table_DV = teacher_fn(teacher, teaching.packed)
        shown_BTD = jnp.take_along_axis(shown_BTD, teaching.at_MBT[..., None], axis=1)
        kl = reverse_kl(hidden_BTD, table_DV, shown_BTD, teacher_table_DV, temperature, chunk, placement)
        kl = jnp.where(mask_BT, kl, 0.0)
        return (weight_BT * kl).sum(), ({"distill/kl": kl.sum()}, {})

    slots = experience.packed, teaching, experience.mask_MBT, experience.weight_MBT
    gradient, total, (sums, _) = accumulate(objective, state.params, slots, experience.used, keep_sharded)
    state, applied = apply_gradient(state, gradient, total, optimizer)
    tokens = experience.mask_MBT.sum().astype(jnp.float32)
    return state, applied | {"distill/kl": sums["distill/kl"] / jnp.maximum(tokens, 1), "update/tokens": tokens}
