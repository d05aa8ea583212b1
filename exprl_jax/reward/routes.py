"""Reward routes: where the reward of a problem comes from.  A config names one for each kind of problem
(`config.Routes`).

To add one, write its record here and its name into `config.Route`; nothing else compares routes by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from exprl_jax.reward.verifiers.verdict import Verdict


@dataclasses.dataclass(frozen=True)
class RewardRoute:
    """What scores the rollouts of a problem.

    Attributes:
      judged: a judge scores them against the reference solution, which is read for it.
      per_segment: every segment has a score, and `advantage.estimator` makes advantages of them; else a rollout has one
        score, compared within its group (`advantage.rollout_estimator`).
      verdict_reward: the reward of a verdict in [0, 1], None where there is none; for routes without a judge.
      answer_likelihood: the reward is the policy's own likelihood of the problem's answer (`reward.likelihood`); for
        routes without a judge and without `verdict_reward`.
    """

    judged: bool
    per_segment: bool
    verdict_reward: Callable[[Verdict], float | None] | None
    answer_likelihood: bool = False


def sparse_reward(verdict: Verdict) -> float | None:
    """1 for a correct answer and 0 for any other; nothing where the verifier itself failed."""
    return None if verdict == Verdict.missing else float(verdict == Verdict.correct)


ROUTES = {
    "process": RewardRoute(judged=True, per_segment=True, verdict_reward=None),
    "outcome": RewardRoute(judged=True, per_segment=False, verdict_reward=None),
    "verifier": RewardRoute(judged=False, per_segment=False, verdict_reward=sparse_reward),
    "likelihood": RewardRoute(judged=False, per_segment=False, verdict_reward=None, answer_likelihood=True),
}
