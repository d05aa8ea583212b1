"""What a batch of rollouts says about policy, judge and signal: numpy in, named scalars out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from exprl_jax import config
from exprl_jax.reward.judge_prompts import DIGITS
from exprl_jax.reward.verifiers.verdict import Verdict

VERDICTS = tuple(Verdict)

METRICS: Mapping[str, str] = {
    "reward/mean": (
        "mean reward of whole rollouts: the judge's normalised score (of the last prefix), the verifier's 0 or 1, or "
        "the likelihood; overlong rollouts count as 0 under zero_score"
    ),
    "reward/std": "standard deviation over the batch of the reward of whole rollouts",
    "solve/accuracy": "fraction of rollouts that the verifier finds correct, without those that it gave no verdict on",
    "solve/none": "fraction of prompts with no correct rollout (unsolved prompts)",
    "solve/some": "fraction of prompts with some correct rollouts",
    "solve/all": "fraction of prompts with all rollouts correct",
    "solve/no_answer": "fraction of rollouts without an answer",
    "solve/timed_out": "fraction of rollouts whose comparison or program hit its time limit",
    "solve/missing": "fraction of rollouts whose verifier failed: a judging model that said neither yes nor no",
    "response/length_mean": "tokens a rollout, EOS included",
    "response/length_max": "longest rollout",
    "response/overlong": "fraction of rollouts that reached max_tokens without EOS",
    "rollout/resampled": (
        "how often a group was sampled again because it gave no advantage; the other metrics are of the last time"
    ),
    "rollout/hinted": (
        "groups without any success that were sampled again with a hint (`rollout.hints`); `solve/` is still of the "
        "bare prompts"
    ),
    "rollout/nudged": (
        "groups that had a success with a hint and are trained on as then sampled; reward and advantage are of these"
    ),
    "segments/mean": "segments a rollout",
    "segments/max": "most segments of a rollout",
    "advantage/mean": "mean advantage over counted segments",
    "advantage/std": "standard deviation of the advantage over counted segments",
    "advantage/max": "largest advantage of a counted segment",
    "advantage/min": "smallest advantage of a counted segment",
    "advantage/counted": "fraction of segments that carry a loss",
    "advantage/live_groups": "fraction of prompts with any advantage other than 0",
    "judge/asked": "scores that the judge was asked for",
    "judge/parsed": "fraction of the scores asked for that the judge gave",
    "judge/truncated": "fraction of the scores asked for whose answer reached its budget or whose trace did not fit",
    **{f"judge/score_{digit}": f"fraction of scores that round to {digit}" for digit in DIGITS},
    "judge/checklist_fallback": (
        "fraction of the scores asked for that are of problems without a usable checklist, which are scored against "
        "their reference; null without judge.rubric = 'per_problem'"
    ),
    "judge/group_spread": "mean over prompts of the standard deviation of their rollouts' rewards",
    "judge/length_correlation": "Pearson correlation of the judge's reward and response length",
    "judge/correct_correlation": "Pearson correlation of the judge's reward and correctness",
    "judge/truth_mean": "mean truth (config.truth) of whole rollouts that the judge was asked about; null without one",
    "judge/truth_spearman_failed": (
        "rank correlation of the judge's reward and the truth over rollouts that the verifier found wrong"
    ),
    "judge/truth_spearman_prefixes": (
        "rank correlation of the judge's score and the truth over all segments except each rollout's last"
    ),
    "judge/correct_auroc": (
        "probability that a correct rollout has a higher reward than a wrong one; a tie counts one half"
    ),
}
"""Every key of `summarise` and what it is; null where it is not defined (a mean over nothing, no spread)."""

BY_KIND = (
    "reward/mean",
    "solve/accuracy",
    "solve/none",
    "response/length_mean",
    "response/overlong",
    "advantage/live_groups",
)
"""Where the data holds problems of several kinds (math, choice, science, ...), these have
one value for each kind too (`<key>/<kind>`)."""


def verdict_indices(verdicts: Sequence[Sequence[Verdict]]) -> np.ndarray:
    """Verdicts by problem and index in the group, [P, G], as their places in `VERDICTS`."""
    return np.array([[VERDICTS.index(verdict) for verdict in group] for group in verdicts])


def summarise(
    rows: Mapping[str, np.ndarray], advantage: config.Advantage, kinds: Sequence[str]
) -> dict[str, float | None]:
    """The metrics of one step.

    Args:
      rows: of the whole batch: kind_P (index into `kinds`), length_PG, ended_PG, verdict_PG (index into `VERDICTS`),
        score_PGN, valid_PGN, asked_PGN, cut_PGN, count_PG, advantage_PGN, counted_PGN, live_P, resampled_P, hinted_P,
        nudged_P, truth_PGN, known_PGN (whether it is); and fallback_P of a judge that has checklists.
      advantage: for what an overlong rollout is worth.
      kinds: of the problems in the data.
    """
    summary = _summarise(rows, advantage)
    if len(kinds) > 1:
        for position, kind in enumerate(kinds):
            of_kind = _summarise({name: x[rows["kind_P"] == position] for name, x in rows.items()}, advantage)
            summary |= {f"{name}/{kind}": of_kind[name] for name in BY_KIND}
    return summary


def _summarise(rows: Mapping[str, np.ndarray], advantage: config.Advantage) -> dict[str, float | None]:
    score, valid, asked, cut = (rows[name] for name in ("score_PGN", "valid_PGN", "asked_PGN", "cut_PGN"))
    counted, advantages, length = rows["counted_PGN"], rows["advantage_PGN"], rows["length_PG"].astype(np.int64)
    overlong, verdict = rows["ended_PG"] == 0, rows["verdict_PG"]
    correct, known = verdict == VERDICTS.index(Verdict.correct), verdict != VERDICTS.index(Verdict.missing)

    last = np.maximum(rows["count_PG"] - 1, 0)[..., None]
    reward, given, wanted = (np.take_along_axis(x, last, -1)[..., 0] for x in (score, valid, asked))
    compared = given & wanted & known
    judged = reward[compared], length[compared], correct[compared]
    truth, has_truth = (np.take_along_axis(rows[name], last, -1)[..., 0] for name in ("truth_PGN", "known_PGN"))
    failed = compared & has_truth & ~correct
    measured = given & wanted & has_truth
    spearman_failed = spearman(reward[failed], truth[failed])
    before_last = valid & asked & rows["known_PGN"] & (np.arange(score.shape[-1]) < last)
    if advantage.overlong == "zero_score":
        reward, given = np.where(overlong, 0.0, reward), given | overlong
    real = np.arange(score.shape[-1]) < rows["count_PG"][..., None]
    likert = np.rint(score[valid & asked] * 4 + 1)
    values = advantages[counted]
    spread = [_std(r[g]) for r, g in zip(reward, given) if g.sum() > 1]

    return {
        "reward/mean": mean(reward[given]),
        "reward/std": _std(reward[given]),
        **rollout_statistics(rows),
        "rollout/resampled": float(rows["resampled_P"].sum()),
        "rollout/hinted": float(rows["hinted_P"].sum()),
        "rollout/nudged": float(rows["nudged_P"].sum()),
        "segments/mean": mean(rows["count_PG"]),
        "segments/max": float(rows["count_PG"].max()) if length.size else None,
        "advantage/mean": mean(values),
        "advantage/std": _std(values),
        "advantage/max": float(values.max()) if values.size else None,
        "advantage/min": float(values.min()) if values.size else None,
        "advantage/counted": mean(counted[real]),
        "advantage/live_groups": mean(rows["live_P"]),
        "judge/asked": float(asked.sum()),
        "judge/parsed": mean(valid[asked]),
        "judge/truncated": mean(cut[asked]),
        **{f"judge/score_{digit}": mean(likert == digit) for digit in DIGITS},
        "judge/checklist_fallback": _fallback(rows),
        "judge/group_spread": mean(spread),
        "judge/length_correlation": correlation(judged[0], judged[1]),
        "judge/correct_correlation": correlation(judged[0], judged[2]),
        "judge/truth_mean": mean(truth[measured]),
        "judge/truth_spearman_failed": spearman_failed,
        "judge/truth_spearman_prefixes": spearman(score[before_last], rows["truth_PGN"][before_last]),
        "judge/correct_auroc": auroc(judged[0], judged[2]),
    }


def _fallback(rows: Mapping[str, np.ndarray]) -> float | None:
    """Of the scores that were wanted, those of problems without a checklist."""
    if "fallback_P" not in rows:
        return None
    asked_P = rows["asked_PGN"].sum((1, 2))
    return mean(np.repeat(rows["fallback_P"], asked_P))


def rollout_statistics(rows: Mapping[str, np.ndarray]) -> dict[str, float | None]:
    """What rollouts say by themselves: `solve/` and `response/`.

    Args:
      rows: of the whole batch: length_PG, ended_PG, verdict_PG (index into `VERDICTS`).
    """
    length, ended, verdict = (rows[name].astype(np.int64) for name in ("length_PG", "ended_PG", "verdict_PG"))
    correct, known = verdict == VERDICTS.index(Verdict.correct), verdict != VERDICTS.index(Verdict.missing)
    solved = np.array([of_group[some].mean() for of_group, some in zip(correct, known) if some.any()])
    return {
        "solve/accuracy": mean(correct[known]),
        "solve/none": mean(solved == 0),
        "solve/some": mean((solved > 0) & (solved < 1)),
        "solve/all": mean(solved == 1),
        "solve/no_answer": mean(verdict == VERDICTS.index(Verdict.no_answer)),
        "solve/timed_out": mean(verdict == VERDICTS.index(Verdict.timed_out)),
        "solve/missing": mean(~known),
        "response/length_mean": mean(length),
        "response/length_max": float(length.max()) if length.size else None,
        "response/overlong": mean(ended == 0),
    }


def auroc(score_N: np.ndarray, positive_N: np.ndarray) -> float | None:
    """P(score of a positive > score of a negative) + ½ P(equal), the area under the ROC curve; None without both kinds.

    Rank sum of the positives less its smallest value, over the number of pairs (Mann and Whitney): n log n, where the
    pairs themselves would be n².
    """
    positive_N = np.asarray(positive_N, bool)
    positives = int(positive_N.sum())
    negatives = len(positive_N) - positives
    if not positives or not negatives:
        return None
    rank_sum = midranks(score_N)[positive_N].sum()
    return float((rank_sum - positives * (positives + 1) / 2) / (positives * negatives))


def midranks(value_N: np.ndarray) -> np.ndarray:
    """Ranks from 1, float64 [N]; equal values share the mean of theirs."""
    _, index_N, count = np.unique(np.asarray(value_N), return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[index_N]


def correlation(a_N: np.ndarray, b_N: np.ndarray) -> float | None:
    """Pearson's; None where either is constant or there are fewer than two pairs."""
    a_N, b_N = np.asarray(a_N, np.float64), np.asarray(b_N, np.float64)
    if a_N.size < 2 or np.ptp(a_N) == 0 or np.ptp(b_N) == 0:
        return None
    return float(np.corrcoef(a_N, b_N)[0, 1])


def spearman(a_N: np.ndarray, b_N: np.ndarray) -> float | None:
    """Rank correlation, equal values by their mean rank; None where either is constant or there are fewer than two."""
    return correlation(midranks(a_N), midranks(b_N))


def mean(values: object) -> float | None:
    """In float64; None of nothing."""
    values = np.asarray(values, np.float64)
    return float(values.mean()) if values.size else None


def _std(x: np.ndarray) -> float | None:
    # In float64, where the mean of equal float32 numbers is that number, so that no spread is exactly 0.
    return float(np.asarray(x, np.float64).std()) if x.size else None
