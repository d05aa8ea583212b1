"""One optimizer update as one pure function: microbatches, loss, gradient, AdamW, metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float32

from exprl_jax import config
from exprl_jax.learning.losses import Diagnostics, policy_loss
from exprl_jax.records import Experience, Packed, TrainState

PackedLogp = Callable[[Any, Packed, Array], tuple[Float32[Array, "B T"], Float32[Array, "B T"]]]

# Of every update, whatever its loss: see `apply_gradient`.
APPLIED: Mapping[str, str] = {
    "grad/norm": "global norm of the gradient before the clip",
    "update/skipped": "1 if loss, gradient, update or new parameters were not finite, and nothing was updated",
    "update/moved": (
        "fraction of the parameters that the update changed: in bfloat16 a small learning rate is rounded away"
    ),
}
METRICS: Mapping[str, str] = {
    "loss/total": (
        "what was minimised, under loss.aggregate: loss/policy plus kl_coef times the k3 KL minus entropy_coef times "
        "the entropy"
    ),
    "loss/policy": "clipped policy loss under loss.aggregate",
    "loss/kl": "k3 estimate of KL(policy ‖ reference), mean over counted tokens, nats; null when kl_coef is 0",
    "policy/entropy": "entropy of the sampled distribution, mean over counted tokens, nats",
    "policy/ratio_mean": "mean of policy over old policy probability of the sampled tokens; 1 when on-policy",
    "policy/ratio_max": "largest such ratio",
    "policy/clip_fraction": "fraction of counted tokens whose gradient the PPO clip stops",
    "policy/dual_clip_fraction": "fraction of counted tokens with a negative advantage that the dual clip stops",
    "policy/approx_kl": "mean of log old policy - log policy, an estimate of KL(old ‖ policy), nats",
    "policy/sampler_gap_mean": (
        "mean absolute difference of the sampler's and the trainer's log-prob of the old policy, nats"
    ),
    "policy/sampler_gap_max": "largest such difference",
    **APPLIED,
    "update/tokens": "counted tokens",
}
"""Every key of `train_step`'s metrics and what it is the value of, for the update's whole batch."""


def make_optimizer(settings: config.Optimizer, updates: int) -> optax.GradientTransformation:
    """Global-norm clip, then AdamW with weight decay on every parameter (the released settings).

    Args:
      updates: optimizer updates of the whole run, over which a `cosine` rate goes to 0.
    """
    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.adamw(
            learning_rate(settings, updates),
            b1=settings.b1,
            b2=settings.b2,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        ),
    )


def learning_rate(settings: config.Optimizer, updates: int) -> optax.ScalarOrSchedule:
    """The rate, or its schedule: a linear rise over `warmup` of the updates, then constant, or a cosine to 0."""
    rise = int(settings.warmup * updates)
    if settings.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, settings.learning_rate, rise, updates)
    if rise:
        return optax.linear_schedule(0.0, settings.learning_rate, rise)
    return settings.learning_rate


def train_step(
    state: TrainState,
    experience: Experience,
    *,
    logp_fn: PackedLogp,
    optimizer: optax.GradientTransformation,
    loss: config.Loss,
    on_policy: bool,
    keep_sharded: Callable[[Any], Any],
) -> tuple[TrainState, dict[str, Float32[Array, ""]]]:
    """One update of the policy on `experience`; meant to be jitted with `state` donated.

    Gradients are summed over microbatches in float32, with weights made from the whole batch (`losses.normaliser`):
    how the batch is packed changes nothing but memory and time.  An update that is not finite is skipped
    (`apply_gradient`).  `step` is left alone: it counts RL steps, of which an update may be a part.

    Args:
      state: as of the last update.
      experience: packed rollouts.  What stands where the mask is False is never read.
      logp_fn: (params, packed, the mask) → (log π of the target of each slot that counts, the entropy of that
        distribution).
      optimizer: see `make_optimizer`.
      loss: see `config.Loss`; with kl_coef 0 `ref_logp_MBT` is not read, and with entropy_coef 0 no gradient flows
        through the entropy.
      on_policy: the batch's first and only update.  The old policy is then the current one, so that the old log-probs
        are this forward's own, detached, and `old_logp_MBT` is not read.
      keep_sharded: constrains a tree of gradients to the parameters' sharding.

    Returns:
      (state, metrics); the metrics are those of `METRICS`.
    """

    def objective(params, part):
        logp, entropy = logp_fn(params, part.packed, part.mask_MBT)
        # Whatever stands outside the mask must not reach the loss: 0 · NaN is NaN, in the gradient too.
        logp, entropy, old, ref, advantage = (
            jnp.where(part.mask_MBT, x, 0.0)
            for x in (logp, entropy, part.old_logp_MBT, part.ref_logp_MBT, part.advantage_MBT)
        )
        if on_policy:
            old = jax.lax.stop_gradient(logp)
        token_loss, diagnostics = policy_loss(logp, old, ref, entropy, advantage, loss)
        gap = jnp.abs(part.sampler_logp_MBT - old)
        return (part.weight_MBT * token_loss).sum(), _summaries(
            part.mask_MBT, part.weight_MBT, diagnostics, entropy, gap
        )

    # `accumulate` indexes every leaf by microbatch, and `used` has no such axis: zeros, never read, stand in for it.
    slots = experience.replace(used=jnp.zeros(experience.mask_MBT.shape[0]))
    gradient, total, summaries = accumulate(objective, state.params, slots, experience.used, keep_sharded)
    state, applied = apply_gradient(state, gradient, total, optimizer)
    return state, _reduce(summaries, experience.mask_MBT.sum()) | applied


def accumulate(
    objective: Callable, params: Any, slots: Any, used: Array, keep_sharded: Callable[[Any], Any]
) -> tuple[Any, Array, tuple[Mapping, Mapping]]:
    """Sums a gradient over microbatches, in float32; as many as are used are computed, whatever room there is.

    Args:
      objective: (params, slot) → (total, (sums, maxima)), the last two dicts of scalars.
      slots: arguments of every microbatch, stacked in front.
      used: microbatches that count, the first ones.
      keep_sharded: see `train_step`.

    Returns:
      (gradient, total, (sums, maxima)) over all.
    """

    def slot(m):
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, m, keepdims=False), slots)

    def add(m, so_far):
        gradient, total, (sums, maxima) = so_far
        (value, (more, larger)), part = jax.value_and_grad(objective, has_aux=True)(params, slot(m))
        gradient = jax.tree.map(lambda a, b: a + b.astype(jnp.float32), gradient, keep_sharded(part))
        return gradient, total + value, (jax.tree.map(jnp.add, sums, more), jax.tree.map(jnp.maximum, maxima, larger))

    # The sum begins sharded as the parameters are: the loop would else be free to carry a whole float32 copy of them on
    # every device.
    zeros = keep_sharded(jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params))
    shapes = jax.eval_shape(objective, params, jax.eval_shape(slot, 0))
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.fori_loop(0, used, add, (zeros, *nothing))


def apply_gradient(
    state: TrainState, gradient: Any, total: Array, optimizer: optax.GradientTransformation
) -> tuple[TrainState, dict[str, Array]]:
    """One step of the optimizer.  If loss, gradient, update or new parameters are not finite, parameters and optimizer
    state, Adam's count included, stay as they are and `skipped` goes up by one.

    A finite gradient is not enough: a learning rate beyond float32, or parameters near its end, give an update that is
    not finite, and all later losses are NaN.

    Args:
      total: the loss.

    Returns:
      (state, metrics `loss/total` and those of `APPLIED`).
    """
    # A finite loss may have a gradient that is not: a square root at 0.
    norm = optax.tree.norm(gradient)
    changes, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    updated = optax.apply_updates(state.params, changes)
    # A change that is not finite leaves no parameter finite, so that the new parameters speak for the changes too.
    finite = jnp.isfinite(total) & jnp.isfinite(norm) & all_finite(updated)
    # Elementwise, so that it fuses with the update itself: no second copy of the state exists.
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old).astype(old.dtype),
        (updated, opt_state),
        (state.params, state.opt_state),
    )
    unmoved, size = equal_entries(params, state.params), float(sum(x.size for x in jax.tree.leaves(params)))
    skipped = 1 - finite.astype(jnp.int32)
    state = state.replace(params=params, opt_state=opt_state, skipped=state.skipped + skipped)
    metrics = {"loss/total": total, "grad/norm": norm, "update/moved": (size - unmoved) / size}
    return state, metrics | {"update/skipped": skipped.astype(jnp.float32)}


def all_finite(tree: Any) -> Bool[Array, ""]:
    """Whether no number of a tree is infinite or NaN."""
    # 0 · x is 0 where x is finite, and else NaN.  The norm, because what a root comes out of XLA computes once: a chain
    # of a few hundred conjunctions it would fuse into each of as many consumers, and compile for minutes.
    return optax.tree.norm(jax.tree.map(lambda x: 0 * x.astype(jnp.float32), tree)) == 0


def equal_entries(new: Any, old: Any) -> Float32[Array, ""]:
    """How many numbers of two trees are equal; float32, for a count of billions is no int32."""
    equal = jax.tree.map(lambda a, b: jnp.sum(a == b, dtype=jnp.float32), new, old)
    return jnp.stack(jax.tree.leaves(equal)).sum()


def _summaries(mask, weight, diagnostics: Diagnostics, entropy, gap):
    """Two dicts of scalars that reduce over microbatches, by sum and by maximum."""

    def total(x):
        return jnp.where(mask, x, 0).astype(jnp.float32).sum()

    def largest(x):
        return jnp.where(mask, x, 0).max()

    sums = {
        "loss/policy": (weight * diagnostics.policy).sum(),
        "loss/kl": total(diagnostics.kl),
        "policy/entropy": total(entropy),
        "policy/ratio_mean": total(diagnostics.ratio),
        "policy/clip_fraction": total(diagnostics.clipped),
        "policy/dual_clip_fraction": total(diagnostics.dual_clipped),
        "policy/approx_kl": total(diagnostics.approx_kl),
        "policy/sampler_gap_mean": total(gap),
    }
    maxima = {"policy/ratio_max": largest(diagnostics.ratio), "policy/sampler_gap_max": largest(gap)}
    return sums, maxima


def _reduce(summaries, tokens):
    sums, maxima = summaries
    count = jnp.maximum(tokens, 1).astype(jnp.float32)
    means = {name: x if name == "loss/policy" else x / count for name, x in sums.items()}
    return means | maxima | {"update/tokens": tokens.astype(jnp.float32)}


def over_updates(updates: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """One row from a step's updates: means, but maxima of maxima and sums of counts; null if all were skipped."""
    joined = {}
    for name in updates[0]:
        values = [float(update[name]) for update in updates]
        # What is not finite in a skipped update was counted there; anywhere else it ends the run.
        values = [v for v, update in zip(values, updates) if np.isfinite(v) or not update["update/skipped"]]
        if not values:
            joined[name] = None
            continue
        if name.endswith("_max"):
            joined[name] = max(values)
        elif name in ("update/skipped", "update/tokens"):
            joined[name] = sum(values)
        else:
            joined[name] = sum(values) / len(values)
    return joined
