"""Advantages, losses and one optimizer update in numpy and plain loops, written from the paper's equations.

Nothing here imports the package; every function takes plain arrays and computes in float64.
"""

from __future__ import annotations

import math

import numpy as np

MISSING = None


def grpo(rewards, std_normalise=True, eps=1e-6):
    """One group's advantages; MISSING rewards give MISSING advantages."""
    given = [r for r in rewards if r is not MISSING]
    if len(given) < 2:
        return [MISSING if r is MISSING else 0.0 for r in rewards]
    mean = math.fsum(given) / len(given)
    std = math.sqrt(math.fsum((r - mean) ** 2 for r in given) / (len(given) - 1))
    if len(set(given)) == 1:
        return [MISSING if r is MISSING else 0.0 for r in rewards]
    return [MISSING if r is MISSING else (r - mean) / ((std + eps) if std_normalise else 1.0) for r in rewards]


def rloo(rewards):
    """Each reward less the mean of the others that were given, one rollout at a time."""
    advantages = []
    for i, reward in enumerate(rewards):
        others = [r for j, r in enumerate(rewards) if j != i and r is not MISSING]
        advantages.append(MISSING if reward is MISSING or not others else reward - sum(others) / len(others))
    return advantages


def maxrl(rewards):
    """(R − mean) / mean over the rewards that were given; 0 where all are 0 or there is one."""
    present = [r for r in rewards if r is not MISSING]
    mean = sum(present) / len(present) if present else 0
    if len(present) < 2 or mean == 0:
        return [MISSING if r is MISSING else 0.0 for r in rewards]
    return [MISSING if r is MISSING else (r - mean) / mean for r in rewards]


def delta_norm(scores):
    """A_1 = s_1 − s_T, A_t = s_t − s_{t−1}; MISSING where a term is."""
    return [_minus(s, scores[t - 1] if t else scores[-1]) for t, s in enumerate(scores)]


def delta_group(group):
    """A_1 = s_1 − mean over rollouts of s_1, A_t = s_t − s_{t−1}; MISSING where a term is."""
    first = [scores[0] for scores in group if scores[0] is not MISSING]
    mean = float(np.mean(first)) if first else MISSING
    return [[_minus(s, scores[t - 1] if t else mean) for t, s in enumerate(scores)] for scores in group]


def end_norm(scores):
    """A_t = s_t − s_T, A_T = s_T."""
    return [_minus(s, scores[-1]) for s in scores[:-1]] + [scores[-1]]


def group_norm(group):
    """A_t = s_t − mean over rollouts of the mean over steps; `group` is a list of score lists."""
    given = [[s for s in scores if s is not MISSING] for scores in group]
    means = [float(np.mean(scores)) for scores in given if scores]
    baseline = float(np.mean(means)) if means else MISSING
    return [[_minus(s, baseline) for s in scores] for scores in group]


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def token_logprobs(hidden, table, targets, temperature):
    """(log-probability of the target, entropy) with all logits at once."""
    logp = log_softmax(np.asarray(hidden, np.float64) @ np.asarray(table, np.float64) / temperature)
    return np.take_along_axis(logp, targets[..., None], -1)[..., 0], -(np.exp(logp) * logp).sum(-1)


def reverse_kl(hidden, table, teacher_hidden, teacher_table, temperature):
    """Σ_v π(v) (log π(v) − log π_teacher(v)) with all logits at once."""
    logp, teacher_logp = (
        log_softmax(np.asarray(h, np.float64) @ np.asarray(t, np.float64) / temperature)
        for h, t in ((hidden, table), (teacher_hidden, teacher_table))
    )
    return (np.exp(logp) * (logp - teacher_logp)).sum(-1)


def slope(function, x, step=1e-5):
    """The gradient of a scalar function of one array, by central differences."""
    x, gradient = np.array(x, np.float64), np.zeros(np.shape(x))
    for i in np.ndindex(x.shape):
        above, below = x.copy(), x.copy()
        above[i] += step
        below[i] -= step
        gradient[i] = (function(above) - function(below)) / (2 * step)
    return gradient


def token_loss(logp, old_logp, ref_logp, entropy, advantage, clip_low, clip_high, dual_clip, kl_coef, entropy_coef):
    """The loss of one token: (total, policy, k3); dual_clip 0 for none."""
    ratio = math.exp(min(max(logp - old_logp, -20.0), 20.0))
    clipped = min(max(ratio, 1 - clip_low), 1 + clip_high)
    policy = -min(advantage * ratio, advantage * clipped)
    if advantage < 0 and dual_clip:
        policy = min(policy, -advantage * dual_clip)
    d = min(max(ref_logp - logp, -20.0), 20.0)
    k3 = min(max(math.exp(d) - d - 1, -10.0), 10.0)
    return policy + kl_coef * k3 - entropy_coef * entropy, policy, k3


def aggregate(losses, mask, settings, max_tokens):
    """One number from [row][token] losses."""
    rows = [[x for x, m in zip(row, row_mask) if m] for row, row_mask in zip(losses, mask)]
    tokens = [x for row in rows for x in row]
    if not tokens:
        return 0.0
    if settings == "token_mean":
        return math.fsum(tokens) / len(tokens)
    if settings == "sequence_mean":
        means = [math.fsum(row) / len(row) for row in rows if row]
        return math.fsum(means) / len(means)
    if settings == "sequence_sum":
        return math.fsum(tokens) / len(rows)
    return math.fsum(tokens) / (len(rows) * max_tokens)


def adamw(param, gradients, learning_rate, b1, b2, eps, weight_decay, clip_norm):
    """The parameter after the given gradients, in turn, each clipped by its norm."""
    m = v = np.zeros_like(param)
    for t, gradient in enumerate(gradients, 1):
        gradient = gradient * min(1.0, clip_norm / max(np.sqrt((gradient**2).sum()), 1e-300))
        m, v = b1 * m + (1 - b1) * gradient, b2 * v + (1 - b2) * gradient**2
        step = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        param = param - learning_rate * (step + weight_decay * param)
    return param


def _minus(a, b):
    return MISSING if a is MISSING or b is MISSING else a - b
