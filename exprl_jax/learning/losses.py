"""The clipped policy loss, token by token, and the weights that make one number of it."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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
      dual_clipped: A < 0 and the dual clip binds, and with it the gradient is 0; never without a dual clip.
      approx_kl: log π_old − log π, an estimate of KL(old ‖ policy).
    """

    policy: Float32[Array, "*B T"]
    kl: Float32[Array, "*B T"]
    ratio: Float32[Array, "*B T"]
    clipped: Bool[Array, "*B T"]
    dual_clipped: Bool[Array, "*B T"]
    approx_kl: Float32[Array, "*B T"]


def policy_loss(
    logp_BT: Float32[Array, "*B T"],
    old_logp_BT: Float32[Array, "*B T"],
    ref_logp_BT: Float32[Array, "*B T"],
    entropy_BT: Float32[Array, "*B T"],
    advantage_BT: Float32[Array, "*B T"],
    coefficients: config.Loss,
) -> tuple[Float32[Array, "*B T"], Diagnostics]:
    """PPO clip with dual clip, plus kl_coef · k3 (estimates the KL to the reference), minus entropy_coef · entropy.

    With r = exp(clip(log π − log π_old, ±20)), ε = clip_low, ε' = clip_high, c = dual_clip:

      L₁ = −A·r      L₂ = −A·clip(r, 1 − ε, 1 + ε')      L = max(L₁, L₂), and min(L, −c·A) where A < 0

    On a tie the unclipped branch is taken, so that at r = 1 the gradient is exactly −A·∇log π.  With
    A = log π_teacher − log π, detached, that is the score-function gradient of the reverse KL to a teacher
    (self-distillation from sampled tokens).

    Without a dual clip (c = 0) tokens with A < 0 keep max(L₁, L₂).  With ε = 1 nothing is clipped from below, as r > 0,
    and 1 + ε' is a cap on the ratio of tokens with A > 0 (the released Stage II: ε' = 4).

    Args:
      logp_BT, old_logp_BT, ref_logp_BT: log π, log π_old, log π_ref of each token; `ref_logp_BT` is not read where
        kl_coef is 0.
      entropy_BT: of π where the token was sampled, in nats, with its gradient; not read where entropy_coef is 0.
      advantage_BT: A.
      coefficients: clips, and weights of the KL and entropy terms.

    Returns:
      (loss, diagnostics), both for each token.
    """
    logratio = jnp.clip(logp_BT - old_logp_BT, -LOGRATIO_BOUND, LOGRATIO_BOUND)
    ratio = jnp.exp(logratio)
    free = -advantage_BT * ratio
    bounded = -advantage_BT * jnp.clip(ratio, 1 - coefficients.clip_low, 1 + coefficients.clip_high)
    clipped = bounded > free
    policy = jnp.where(clipped, bounded, free)
    # Static choices, here and below: what has no coefficient is neither computed nor read.
    dual_clipped = jnp.zeros_like(clipped)
    if coefficients.dual_clip:
        bound = -advantage_BT * coefficients.dual_clip
        dual_clipped = (advantage_BT < 0) & (policy > bound)
        policy = jnp.where(dual_clipped, bound, policy)
    loss, kl = policy, jnp.zeros_like(policy)
    if coefficients.kl_coef:
        kl = k3(logp_BT, ref_logp_BT)
        loss += coefficients.kl_coef * kl
    if coefficients.entropy_coef:
        loss -= coefficients.entropy_coef * entropy_BT
    diagnostics = Diagnostics(policy, kl, ratio, clipped, dual_clipped, old_logp_BT - logp_BT)
    return loss, jax.lax.stop_gradient(diagnostics)


def k3(logp: Float32[Array, "..."], ref_logp: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """exp(d) − d − 1 with d = log π_ref − log π: never negative, and unbiased for KL(π ‖ π_ref) on samples of π.

    d is clamped to ±20 and the estimate to ±10 as in the released code; beyond either the gradient is 0.
    """
    d = jnp.clip(ref_logp - logp, -LOGRATIO_BOUND, LOGRATIO_BOUND)
    return jnp.clip(jnp.exp(d) - d - 1, -KL_BOUND, KL_BOUND)


def normaliser(
    mask_PGR: Bool[np.ndarray, "P G R"],
    aggregate: Literal["token_mean", "sequence_mean", "sequence_sum", "constant"],
    max_tokens: int,
) -> Float32[np.ndarray, "P G R"]:
    """The weight w of each token of an update's whole batch, such that Σ w·loss is the aggregated loss.

    Weights are made once from the whole batch and travel with the tokens, so the sum over microbatches is the whole
    batch's loss however rows are packed:

      token_mean     1 / Σ mask
      sequence_mean  1 / (tokens of this row · rows that have a counted token)
      sequence_sum   1 / rows                     (the released Stage II)
      constant       1 / (rows · max_tokens)      (Dr. GRPO)

    The rows of the last two are all rows of the update, those without a counted token included: the released Stage II
    divides by a fixed 512, and a row that was left out (a missing verdict, a masked overlong rollout) must not make
    the others louder.  Weights are 0 where the mask is False; a batch without counted tokens has weight 0 everywhere.
    """
    if aggregate == "token_mean":
        count = mask_PGR.sum()
    elif aggregate == "sequence_mean":
        tokens_PG1 = mask_PGR.sum(-1, keepdims=True)
        count = tokens_PG1 * (tokens_PG1 > 0).sum()
    else:
        rows = mask_PGR.shape[0] * mask_PGR.shape[1]
        count = rows if aggregate == "sequence_sum" else rows * max_tokens
    # Where the mask is True the count is at least 1.
    return np.where(mask_PGR, 1.0 / np.maximum(count, 1), 0.0).astype(np.float32)
