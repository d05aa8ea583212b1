"""How far a judge's scores of rollouts can be trusted: statistics, numpy in, numbers out.

Scores here are on the judge's own scale, 1 to 5, whole or (an expected digit) not; N rollouts.  A rate is a fraction;
None is what the rollouts do not tell, such as the false positive rate of rollouts that are all correct.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from exprl_jax.reward.judge_prompts import DIGITS
from exprl_jax.reward.statistics import correlation, mean, spearman

SAYS_CORRECT = 4  # the judge calls a rollout correct at this score and above   (paper Tables 5 and 6)


@dataclasses.dataclass(frozen=True)
class ErrorRates:
    """Where a judge and the verifier disagree.

    Attributes:
      false_positive: share of wrong rollouts that the judge calls correct.
      false_negative: share of correct rollouts that it calls wrong.
    """

    false_positive: float | None
    false_negative: float | None

    @property
    def misplacement(self) -> float | None:
        """(FPR + FNR) / 2   (paper Tables 5 and 6)."""
        if self.false_positive is None or self.false_negative is None:
            return None
        return (self.false_positive + self.false_negative) / 2


def error_rates(score_N: Float[np.ndarray, " N"], correct_N: Bool[np.ndarray, " N"]) -> ErrorRates:
    """The judge says correct iff its score is at least `SAYS_CORRECT`."""
    accepted_N = np.asarray(score_N) >= SAYS_CORRECT
    correct_N = np.asarray(correct_N, bool)
    return ErrorRates(mean(accepted_N[~correct_N]), mean(~accepted_N[correct_N]))


def histogram(score_N: Float[np.ndarray, " N"]) -> Int[np.ndarray, "5"]:
    """How many scores are nearest to each of the five digits; halves go up."""
    return np.bincount(nearest_digit(score_N) - DIGITS[0], minlength=len(DIGITS))


def nearest_digit(score_N: Float[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
    """The digit that an expected digit is nearest to; halves go up."""
    return np.floor(np.asarray(score_N, np.float64) + 0.5).astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Two scores of the same rollouts, each as its nearest digit.

    Attributes:
      n: rollouts with both scores.
      exact, within_one: shares with equal digits, and with digits at most 1 apart.
      kappa: Cohen's, with quadratic weights; None where both are the same constant, or there is no rollout.
    """

    n: int
    exact: float | None
    within_one: float | None
    kappa: float | None


def agreement(ours_N: Float[np.ndarray, " N"], theirs_N: Float[np.ndarray, " N"]) -> Agreement:
    """How far two scores of the same rollouts agree."""
    a, b = nearest_digit(ours_N), nearest_digit(theirs_N)
    apart = np.abs(a - b)
    kappa = None
    if len(a):
        # Quadratic weights: 1 − E[(a − b)²] / E[(a − b′)²] with b′ drawn apart from a.
        by_chance = a.var() + b.var() + (a.mean() - b.mean()) ** 2
        kappa = float(1 - np.mean(apart**2) / by_chance) if by_chance else None
    return Agreement(len(a), mean(apart == 0), mean(apart <= 1), kappa)


@dataclasses.dataclass(frozen=True)
class Spread:
    """Scores of rollouts that were each judged several times.

    Attributes:
      rollouts: with at least two scores.
      within: root mean over rollouts of the variance of a rollout's scores (divisor r − 1).
      between: standard deviation over rollouts of their mean scores (divisor n − 1); it holds the share of `within`
        that means over few scores keep.
    """

    rollouts: int
    within: float | None
    between: float | None


def spread(scores: Sequence[Sequence[float]]) -> Spread:
    """Within rollouts and between them; rollouts with fewer than two scores are left out."""
    several = [np.asarray(of_rollout, np.float64) for of_rollout in scores if len(of_rollout) > 1]
    if not several:
        return Spread(0, None, None)
    within = float(np.sqrt(np.mean([of_rollout.var(ddof=1) for of_rollout in several])))
    between = float(np.std([of_rollout.mean() for of_rollout in several], ddof=1)) if len(several) > 1 else None
    return Spread(len(several), within, between)


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """Prefix scores against the success of continuations   (paper Fig. 11b).

    Attributes:
      n: prefixes with a score and a graded continuation.
      count_5, success_5: by the digit nearest to the score: prefixes, and their mean success.
      pearson, spearman: correlation of score and success over prefixes; None where either is constant.
    """

    n: int
    count_5: tuple[int, ...]
    success_5: tuple[float | None, ...]
    pearson: float | None
    spearman: float | None


def likelihood(score_N: Float[np.ndarray, " N"], success_N: Float[np.ndarray, " N"]) -> Likelihood:
    """`success_N` is the share of a prefix's graded continuations that are correct."""
    score_N, success_N = np.asarray(score_N, np.float64), np.asarray(success_N, np.float64)
    digit_N = nearest_digit(score_N)
    return Likelihood(
        n=len(score_N),
        count_5=tuple(histogram(score_N).tolist()),
        success_5=tuple(mean(success_N[digit_N == digit]) for digit in DIGITS),
        pearson=correlation(score_N, success_N),
        spearman=spearman(score_N, success_N),
    )


def derangement(texts: Sequence[tuple[str, ...]], seed: int) -> Int[np.ndarray, " P"]:
    """A permutation that gives every item the index of another, and never of one which shares a text with it.

    Items that share a text, directly or through others, form a group.  In a random order with groups together, every
    item gets the index of the one as many further on as the largest group has items: out of its own group, wherever
    the groups lie.

        order    a a a b b c c      largest group: 3
        gets     b b c c a a a

    Args:
      texts: of each item; compared without outer blanks, kind by kind (a problem with problems, and so on).

    Returns:
      The index of the item that each one gets.

    Raises:
      ValueError: one group has more than half of the items, so that there is no such permutation.
    """
    group = list(range(len(texts)))

    def root(i: int) -> int:
        while group[i] != i:
            i = group[i]
        return i

    first: dict[tuple[int, str], int] = {}
    for i, of_item in enumerate(texts):
        for kind, text in enumerate(of_item):
            group[root(i)] = root(first.setdefault((kind, text.strip()), i))
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed])))
    members: dict[int, list[int]] = {}
    for i in rng.permutation(len(texts)).tolist():
        members.setdefault(root(i), []).append(i)
    largest = max(map(len, members.values()), default=0)
    if 2 * largest > len(texts):
        raise ValueError(
            f"no wrong references: {largest} of {len(texts)} problems share a problem text or a reference; expected at "
            "most half, so that each can get another's"
        )
    order = np.array([i for of_group in members.values() for i in of_group], np.int64)
    other = np.empty(len(texts), np.int64)
    other[order] = np.roll(order, -largest)
    return other
