"""From scores to advantages.  Host side: numpy in, float32 out, computed in float64.

Scores are normalised to [0, 1].  A score that the judge did not give is a False in a mask, whatever number stands in
its place (D2 in docs/method.md).  N pads the segments of the longest rollout; a rollout has `count` of them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int

from exprl_jax import config


class SegmentAdvantages(NamedTuple):
    """Advantages of a batch's segments.

    Attributes:
      advantage_PGN: 0 where not counted.
      counted_PGN: segments whose tokens carry a loss.
      live_P: groups with any advantage other than 0.
    """

    advantage_PGN: Float32[np.ndarray, "P G N"]
    counted_PGN: Bool[np.ndarray, "P G N"]
    live_P: Bool[np.ndarray, " P"]


def grpo(
    score_PG: Float[np.ndarray, "P G"],
    valid_PG: Bool[np.ndarray, "P G"],
    *,
    std_normalise: bool,
    min_spread: float | np.ndarray,
    eps: float = 1e-6,
) -> tuple[Float32[np.ndarray, "P G"], Bool[np.ndarray, " P"]]:
    """Group-normalised advantage of whole rollouts: A = (R − mean_group) / (std_group + eps)   (paper §3).

    Mean and standard deviation (unbiased, as in the released code) are over the group's valid rollouts.  A group gives
    advantage 0 and is not live with fewer than two valid rollouts, with equal scores, or with a standard deviation
    below `min_spread` (of all groups, or [P, 1]), whether or not the advantage is divided by it.

    Returns:
      (advantage_PG, 0 where not valid; live_P).
    """
    group = _group(score_PG, valid_PG, min_spread)
    return group.assign(group.centred / (group.std + eps) if std_normalise else group.centred)


def rloo(
    score_PG: Float[np.ndarray, "P G"], valid_PG: Bool[np.ndarray, "P G"], *, min_spread: float | np.ndarray
) -> tuple[Float32[np.ndarray, "P G"], Bool[np.ndarray, " P"]]:
    """Leave-one-out advantage of whole rollouts: A_i = R_i − mean of the group's other R_j   (arXiv 2402.14740, Eq. 4).

    That is n / (n − 1) · (R_i − mean_group) over the group's n valid rollouts.  Groups are live as in `grpo`.

    Returns:
      (advantage_PG, 0 where not valid; live_P).
    """
    group = _group(score_PG, valid_PG, min_spread)
    return group.assign(group.centred * group.count / np.maximum(group.count - 1, 1))


def maxrl(
    score_PG: Float[np.ndarray, "P G"], valid_PG: Bool[np.ndarray, "P G"], *, min_spread: float | np.ndarray
) -> tuple[Float32[np.ndarray, "P G"], Bool[np.ndarray, " P"]]:
    """Advantage of whole rollouts relative to their group's mean: A = (R − mean_group) / mean_group   (arXiv
    2602.02710).

    A rare success counts the more, the rarer it is.  Scores are not negative, so a group whose mean is 0 has equal
    scores, and no advantage.  Groups are live as in `grpo`.

    Returns:
      (advantage_PG, 0 where not valid; live_P).
    """
    group = _group(score_PG, valid_PG, min_spread)
    return group.assign(group.centred / np.where(group.mean > 0, group.mean, 1.0))


def delta_norm(
    score_PGN: Float[np.ndarray, "P G N"], valid_PGN: Bool[np.ndarray, "P G N"], count_PG: Int[np.ndarray, "P G"]
) -> tuple[Float32[np.ndarray, "P G N"], Bool[np.ndarray, "P G N"]]:
    """A_t = s_t − s_{t−1} for t > 1, and A_1 = s_1 − s_T   (paper Eq. 2 and 5).

    The advantages of a rollout sum to 0; a rollout of one segment has advantage 0 (D3; `delta_norm_or_score` differs).

    Returns:
      (advantage_PGN; defined_PGN, True where both scores that the segment needs were given).
    """
    score, valid, _ = _segments(score_PGN, valid_PGN, count_PG)
    previous, previous_valid = np.roll(score, 1, -1), np.roll(valid, 1, -1)
    previous[..., :1], previous_valid[..., :1] = _final(score, count_PG), _final(valid, count_PG)
    return _where_defined(score - previous, valid & previous_valid)


def delta_norm_or_score(
    score_PGN: Float[np.ndarray, "P G N"], valid_PGN: Bool[np.ndarray, "P G N"], count_PG: Int[np.ndarray, "P G"]
) -> tuple[Float32[np.ndarray, "P G N"], Bool[np.ndarray, "P G N"]]:
    """`delta_norm` as the released code computes it: a rollout of one segment has its score as advantage.

    Returns:
      as `delta_norm`.
    """
    score, valid, _ = _segments(score_PGN, valid_PGN, count_PG)
    advantage, defined = delta_norm(score_PGN, valid_PGN, count_PG)
    return _where_defined(np.where(np.asarray(count_PG)[..., None] == 1, score, advantage), defined & valid)


def end_norm(
    score_PGN: Float[np.ndarray, "P G N"], valid_PGN: Bool[np.ndarray, "P G N"], count_PG: Int[np.ndarray, "P G"]
) -> tuple[Float32[np.ndarray, "P G N"], Bool[np.ndarray, "P G N"]]:
    """A_t = s_t − s_T for t < T, and A_T = s_T   (paper Eq. 4).

    Returns:
      (advantage_PGN; defined_PGN, True where the scores that the segment needs were given).
    """
    score, valid, last = _segments(score_PGN, valid_PGN, count_PG)
    advantage = np.where(last, score, score - _final(score, count_PG))
    return _where_defined(advantage, valid & _final(valid, count_PG))


def group_norm(
    score_PGN: Float[np.ndarray, "P G N"], valid_PGN: Bool[np.ndarray, "P G N"], count_PG: Int[np.ndarray, "P G"]
) -> tuple[Float32[np.ndarray, "P G N"], Bool[np.ndarray, "P G N"]]:
    """A_t = s_t − mean over the group's rollouts of (mean over that rollout's steps of s)   (paper Eq. 6).

    Both means are over what was scored: steps with a score, and rollouts with at least one such step.

    Returns:
      (advantage_PGN; defined_PGN, True where the segment's own score was given).
    """
    _, valid, _ = _segments(score_PGN, valid_PGN, count_PG)
    P, G, N = valid.shape
    above = _above_lowest(np.reshape(score_PGN, (P, G * N)), valid.reshape(P, G * N)).reshape(P, G, N)
    steps_PG = valid.sum(-1)
    rollout_PG = above.sum(-1) / np.maximum(steps_PG, 1)
    baseline_P = rollout_PG.sum(-1) / np.maximum((steps_PG > 0).sum(-1), 1)
    return _where_defined(above - baseline_P[:, None, None], valid)


def delta_group(
    score_PGN: Float[np.ndarray, "P G N"], valid_PGN: Bool[np.ndarray, "P G N"], count_PG: Int[np.ndarray, "P G"]
) -> tuple[Float32[np.ndarray, "P G N"], Bool[np.ndarray, "P G N"]]:
    """A_t = s_t − s_{t−1} for t > 1, and A_1 = s_1 − mean over the group's rollouts of s_1   (not the paper's).

    The paper's A_1 = s_1 − s_T turns against a right first segment as soon as rollouts that begin with one end well
    (docs/mini.md).  The mean is over the first scores that were given.

    Returns:
      (advantage_PGN; defined_PGN, True where the scores that the segment needs were given).
    """
    _, valid, _ = _segments(score_PGN, valid_PGN, count_PG)
    advantage, defined = delta_norm(score_PGN, valid_PGN, count_PG)
    above, given = _above_lowest(score_PGN[..., 0], valid[..., 0]), valid[..., 0]
    mean_P1 = above.sum(-1, keepdims=True) / np.maximum(given.sum(-1, keepdims=True), 1)
    first = np.arange(valid.shape[-1]) == 0
    advantage = np.where(first, (above - mean_P1)[..., None], advantage)
    return _where_defined(advantage, np.where(first, given[..., None], defined))


PROCESS_ESTIMATORS = {
    "delta_norm": delta_norm,
    "end_norm": end_norm,
    "group_norm": group_norm,
    "delta_group": delta_group,
}
ROLLOUT_ESTIMATORS = {"grpo": grpo, "rloo": rloo, "maxrl": maxrl}


def assign_advantages(
    score_PGN: Float[np.ndarray, "P G N"],
    valid_PGN: Bool[np.ndarray, "P G N"],
    count_PG: Int[np.ndarray, "P G"],
    overlong_PG: Bool[np.ndarray, "P G"],
    process_P: Bool[np.ndarray, " P"],
    logits_P: Bool[np.ndarray, " P"],
    rules: config.Advantage,
) -> SegmentAdvantages:
    """Advantages of a batch under `rules`, with the rules for missing scores (D2) and overlong rollouts (D3).

    Each problem keeps its own estimator in a mixed batch: `rules.estimator` where `process_P`, and group-normalised
    scores of whole rollouts, one a rollout, elsewhere.

    `missing`: `drop_segment` leaves out the segments whose equation lacks a score; `drop_rollout` leaves out rollouts
    with any missing score, of group statistics too.

    `overlong`: under `zero_score` every score of an overlong rollout is 0, given or not, and the estimator sees
    nothing else: `grpo` a reward of 0, `delta_norm` and `end_norm` come to 0, `group_norm` to minus the baseline.
    Under `mask` the rollout leaves loss and group statistics.  Under `penalty` it leaves the group statistics and all
    its segments have the advantage `overlong_penalty`.  Under `keep` it is like any other.

    Args:
      score_PGN: normalised scores.
      valid_PGN: scores that the judge gave.
      count_PG: segments of each rollout, 0 ≤ count ≤ N.
      overlong_PG: rollouts that reached the token limit without EOS.
      process_P: problems whose rollouts have a score a segment.
      logits_P: problems whose scores are a judge's by its digits' probabilities.
      rules: estimator, and what becomes of missing scores and overlong rollouts.

    Raises:
      ValueError: counts that do not fit, or a valid score that is not finite.
    """
    score, valid, count, overlong = map(np.asarray, (score_PGN, valid_PGN, count_PG, overlong_PG))
    process = np.asarray(process_P, bool)
    N = score.shape[-1]
    if (count < 0).any() or (count > N).any():
        raise ValueError(f"assign: got segment counts from {count.min()} to {count.max()}, expected 0 to {N}")
    if (count[~process] > 1).any():
        raise ValueError(f"assign: got {count[~process].max()} scores a rollout where only whole rollouts are scored")
    real = np.arange(N) < count[..., None]
    valid, overlong = valid & real, overlong[..., None]
    if not np.isfinite(score[valid]).all():
        raise ValueError("assign: a score marked valid is not finite; mark scores that were not given as not valid")
    if rules.overlong == "zero_score":
        score, valid = np.where(overlong, 0.0, score), valid | (overlong & real)
    elif rules.overlong != "keep":
        valid = valid & ~overlong
    if rules.missing == "drop_rollout":
        valid = valid & (valid | ~real).all(-1, keepdims=True)

    released = rules.estimator == "delta_norm" and rules.one_segment == "score"
    estimate = delta_norm_or_score if released else PROCESS_ESTIMATORS[rules.estimator]
    advantage, counted = estimate(score, valid, count)
    options = {"std_normalise": rules.std_normalise} if rules.rollout_estimator == "grpo" else {}
    least_P1 = np.where(np.asarray(logits_P, bool), rules.min_logits_spread, rules.min_spread)[:, None]
    whole, _ = ROLLOUT_ESTIMATORS[rules.rollout_estimator](score[..., 0], valid[..., 0], min_spread=least_P1, **options)
    first = np.arange(N) == 0
    advantage = np.where(process[:, None, None], advantage, np.where(first, whole[..., None], np.float32(0)))
    counted = np.where(process[:, None, None], counted, valid & first)
    if rules.overlong == "penalty":
        advantage = np.where(overlong & real, np.float32(rules.overlong_penalty), advantage)
        counted = counted | (overlong & real)
    return SegmentAdvantages(advantage, counted, (advantage != 0).any((1, 2)))


def to_tokens(
    advantage_PGN: Float[np.ndarray, "P G N"],
    counted_PGN: Bool[np.ndarray, "P G N"],
    ends_PGN: Int[np.ndarray, "P G N"],
    mask_PGR: Bool[np.ndarray, "P G R"],
) -> tuple[Float32[np.ndarray, "P G R"], Bool[np.ndarray, "P G R"]]:
    """Every token takes its segment's advantage, undivided by any length (paper Eq. 1).

    Args:
      ends_PGN: token index at which each segment ends, exclusive; padded with the last end or anything larger.
      mask_PGR: sampled tokens.

    Returns:
      (advantage_PGR, loss_mask_PGR): 0 and False for tokens that were not sampled, lie in a segment that is not
      counted, or come after the last end.

    Raises:
      ValueError: ends that decrease or are negative.
    """
    P, G, R = mask_PGR.shape
    N = ends_PGN.shape[-1]
    if (np.diff(ends_PGN, axis=-1, prepend=0) < 0).any():
        row = np.argwhere((np.diff(ends_PGN, axis=-1, prepend=0) < 0).any(-1))[0]
        raise ValueError(
            f"to_tokens: the segment ends of rollout {row[1]} of problem {row[0]} are {ends_PGN[tuple(row)].tolist()}, "
            "expected non-negative ends that never decrease (pad with the last end)"
        )
    # The segment of token r is the number of ends ≤ r: a histogram of the ends, summed up, without a [.., R, N] array.
    places = np.arange(P * G)[:, None] * (R + 1) + np.minimum(ends_PGN, R).reshape(P * G, N)
    passed = np.bincount(places.ravel(), minlength=P * G * (R + 1)).reshape(P, G, R + 1)[..., :R]
    segment_PGR = passed.cumsum(-1)
    beyond = [(0, 0), (0, 0), (0, 1)]  # one more segment, neither counted nor valued, for tokens after the last end
    counted = np.pad(np.asarray(counted_PGN, bool), beyond)
    advantage = np.where(counted, np.pad(np.asarray(advantage_PGN, np.float32), beyond), np.float32(0))
    loss_mask_PGR = mask_PGR & np.take_along_axis(counted, segment_PGR, -1)
    advantage_PGR = np.where(loss_mask_PGR, np.take_along_axis(advantage, segment_PGR, -1), np.float32(0))
    return advantage_PGR, loss_mask_PGR


class _Group(NamedTuple):
    """Statistics of groups of whole rollouts, over the valid ones."""

    valid_PG: np.ndarray
    centred: np.ndarray  # [P, G]: score less mean, 0 where not valid
    mean: np.ndarray  # [P, 1]
    std: np.ndarray
    count: np.ndarray
    live: np.ndarray

    def assign(self, advantage_PG):
        """(advantages of live groups' valid rollouts, 0 elsewhere; live_P)."""
        return np.where(self.live & self.valid_PG, advantage_PG, 0.0).astype(np.float32), self.live[..., 0]


def _group(score_PG, valid_PG, min_spread):
    above, valid = _above_lowest(score_PG, valid_PG), np.asarray(valid_PG, bool)
    count = valid.sum(-1, keepdims=True)
    centred = np.where(valid, above - above.sum(-1, keepdims=True) / np.maximum(count, 1), 0.0)
    std = np.sqrt((centred**2).sum(-1, keepdims=True) / np.maximum(count - 1, 1))
    mean = np.where(valid, score_PG, 0.0).sum(-1, keepdims=True) / np.maximum(count, 1)
    return _Group(valid, centred, mean, std, count, (count >= 2) & (std > 0) & (std >= min_spread))


def _above_lowest(score, valid):
    """Valid scores less the lowest in the last axis, 0 elsewhere.

    Means are taken of this, so that equal scores come to exactly 0: the mean of three 0.1s is not 0.1.
    """
    score, valid = np.asarray(score, np.float64), np.asarray(valid, bool)
    lowest = np.where(valid, score, np.inf).min(-1, keepdims=True)
    return np.where(valid, score - np.where(np.isfinite(lowest), lowest, 0.0), 0.0)


def _segments(score_PGN, valid_PGN, count_PG):
    """(score with 0 where there is none, valid within the count, last segment)."""
    index = np.arange(np.shape(score_PGN)[-1])
    valid = np.asarray(valid_PGN, bool) & (index < np.asarray(count_PG)[..., None])
    return np.where(valid, np.asarray(score_PGN, np.float64), 0.0), valid, index == np.asarray(count_PG)[..., None] - 1


def _final(x_PGN, count_PG):
    return np.take_along_axis(x_PGN, np.maximum(np.asarray(count_PG)[..., None] - 1, 0), -1)


def _where_defined(advantage, defined):
    return np.where(defined, advantage, 0.0).astype(np.float32), defined
