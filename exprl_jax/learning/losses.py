"""The clipped policy loss, token by token, and the weights that make one number of it."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32

from exprl_jax import config

LOGRATIO_BOUND = 20.0  # exp(±20) is still finite in float32, and so are its products with advantages
KL_BOUND = 10.0


class Diagnostics(NamedTuple):
    """What the loss of each token is made of.

    Attributes:
      policy: clipped policy loss.
      kl: k3 estimate of KL(policy ‖ reference); 0 where kl_coef is 0.
      ratio: probability of the token under the policy over that under the old policy.
      clipped: the PPO clip binds, and with it the gradient is 0.
      dual_clipped: A < 0 and the dual clip binds, and with it the gradient is 0.
      approx_kl: log π_old − log π, an estimate of KL(old ‖ policy).
    """

    policy: Float32[Array, "P G R"]
    kl: Float32[Array, "P G R"]
    ratio: Float32[Array, "P G R"]
    clipped: Bool[Array, "P G R"]
    dual_clipped: Bool[Array, "P G R"]
    approx_kl: Float32[Array, "P G R"]


def policy_loss(
    logp_PGR: Float32[Array, "P G R"],
    old_logp_PGR: Float32[Array, "P G R"],
    ref_logp_PGR: Float32[Array, "P G R"],
    advantage_PGR: Float32[Array, "P G R"],
    how: config.Loss,
) -> tuple[Float32[Array, "P G R"], Diagnostics]:
    """PPO clip with dual clip, plus kl_coef times the k3 estimate of the KL to the reference.

    With r = exp(clip(log π − log π_old, ±20)), ε = clip_low, ε' = clip_high, c = dual_clip:

      L₁ = −A·r      L₂ = −A·clip(r, 1 − ε, 1 + ε')      L = max(L₁, L₂), and min(L, −c·A) where A < 0

    On a tie the unclipped branch is taken, so that at r = 1 the gradient is exactly −A·∇log π.

    Returns:
      (loss, diagnostics), both for each token.
    """
    logratio = jnp.clip(logp_PGR - old_logp_PGR, -LOGRATIO_BOUND, LOGRATIO_BOUND)
    ratio = jnp.exp(logratio)
    free = -advantage_PGR * ratio
    held = -advantage_PGR * jnp.clip(ratio, 1 - how.clip_low, 1 + how.clip_high)
    clipped = held > free
    policy = jnp.where(clipped, held, free)
    bound = -advantage_PGR * how.dual_clip
    dual_clipped = (advantage_PGR < 0) & (policy > bound)
    policy = jnp.where(dual_clipped, bound, policy)
    # A static choice: without the penalty there are no reference log-probs to read.
    kl = k3(logp_PGR, ref_logp_PGR) if how.kl_coef else jnp.zeros_like(policy)
    diagnostics = Diagnostics(policy, kl, ratio, clipped, dual_clipped, old_logp_PGR - logp_PGR)
    return policy + how.kl_coef * kl, jax.lax.stop_gradient(diagnostics)


def k3(logp: Float32[Array, "..."], ref_logp: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """exp(d) − d − 1 with d = log π_ref − log π: never negative, and unbiased for KL(π ‖ π_ref) on samples of π.

    d is clamped to ±20 and the estimate to ±10 as in the released code; beyond either the gradient is 0.
    """
    d = jnp.clip(ref_logp - logp, -LOGRATIO_BOUND, LOGRATIO_BOUND)
    return jnp.clip(jnp.exp(d) - d - 1, -KL_BOUND, KL_BOUND)


def normaliser(
    mask_PGR: Bool[Array, "P G R"], aggregate: Literal["token_mean", "sequence_mean", "constant"], max_tokens: int
) -> Float32[Array, "P G R"]:
    """The weight w of each token of an update's whole batch, such that Σ w·loss is the aggregated loss.

    Weights are made once from the whole batch and travel with the tokens, so the sum over microbatches is the whole
    batch's loss however rows are packed:

      token_mean     1 / Σ mask
      sequence_mean  1 / (tokens of this row · rows that have a counted token)
      constant       1 / (rows · max_tokens)      (Dr. GRPO)

    and 0 where the mask is False; a batch without counted tokens has weight 0 everywhere.
    """
    if aggregate == "token_mean":
        count = mask_PGR.sum()
    elif aggregate == "sequence_mean":
        tokens_PG1 = mask_PGR.sum(-1, keepdims=True)
        count = tokens_PG1.astype(jnp.float32) * (tokens_PG1 > 0).sum()
    else:
        count = jnp.asarray(mask_PGR.shape[0] * mask_PGR.shape[1] * max_tokens)
    # Where the mask is True the count is at least 1.
    return jnp.where(mask_PGR, 1.0 / count.astype(jnp.float32), 0.0)
