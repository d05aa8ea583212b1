"""What an evaluation says of one problem set: pass@k with its uncertainty, majority vote, lengths, what went missing.

Host side, float64.  P problems, K values of k (1..K), B bootstrap draws.  Graded samples are those whose verifier said
anything; a `missing` verdict says nothing of the response and is left out of its problem's n, never counted as wrong.
"""

from __future__ import annotations

import collections
import dataclasses
import statistics
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int

from exprl_jax.data.problems import Problem
from exprl_jax.reward.verifiers.verdict import Verdict
from exprl_jax.reward.verifiers.verifier import verifier_of

DRAWS = 2000
COVERAGE = 0.95
_AT_ONCE = 1 << 22  # resampled problems held in memory at a time


@dataclasses.dataclass(frozen=True)
class Summary:
    """One problem set under one policy.  Rates are fractions, not percent; None is what the samples do not tell.

    Attributes:
      name: of the set.
      problems: problems with at least one graded sample; every mean over problems is over these.
      ungraded: problems left out, none of whose samples was graded.
      n: samples drawn a problem.
      missing: samples, over all problems, that the verifier failed to grade.
      pass_at_k: pass@1 .. pass@n; None where some problem has fewer than k graded samples, so that every point of the
        curve is a mean over the same problems.
      low, high: 95 % interval of pass_at_k; None where that is None, or where one problem leaves nothing to resample.
      majority: share of problems whose most frequent answer is right; None for kinds without a vote.
      accuracy: correct / graded samples, over all problems.
      no_answer: share of graded samples without an answer in the form that the verifier reads.
      overlong: share of drawn samples that reached the token limit.
      length_mean, length_median, length_max: tokens of the drawn samples.
    """

    name: str
    problems: int
    ungraded: int
    n: int
    missing: int
    pass_at_k: tuple[float | None, ...]
    low: tuple[float | None, ...]
    high: tuple[float | None, ...]
    majority: float | None
    accuracy: float | None
    no_answer: float | None
    overlong: float
    length_mean: float
    length_median: float
    length_max: int


def pass_at_k(
    graded_P: Int[np.ndarray, " P"], correct_P: Int[np.ndarray, " P"], most: int
) -> Float64[np.ndarray, "P K"]:
    """Unbiased estimates 1 − C(n−c, k) / C(n, k) for k = 1..most (K), of each problem   (Chen et al. 2021; paper §6).

    Computed as the chance that the first success comes at draw 1, 2, .., k without replacement: a sum of k positive
    terms, without a binomial coefficient and without cancellation.

    Args:
      graded_P: n of each problem; `most` ≤ n.
      correct_P: c of each problem, 0 ≤ c ≤ n.

    Raises:
      ValueError: counts that contradict each other, or `most` outside 1..min n.
    """
    n, c = np.asarray(graded_P), np.asarray(correct_P)
    if n.size == 0 or n.shape != c.shape:
        raise ValueError(
            f"pass_at_k: got {n.size} sample counts and {c.size} correct counts; expected as many, at least 1"
        )
    if (c < 0).any() or (c > n).any():
        row = int(np.flatnonzero((c < 0) | (c > n))[0])
        raise ValueError(
            f"pass_at_k: problem {row} has {c[row]} correct of {n[row]} samples; expected 0 ≤ correct ≤ samples"
        )
    if not 1 <= most <= n.min():
        raise ValueError(f"pass_at_k: got k up to {most}; expected 1 to {n.min()}, the fewest samples of any problem")
    draw = np.arange(most)
    hit = c[:, None] / (n[:, None] - draw)  # above 1 only where `before` is 0
    failed = np.cumprod(np.maximum(1.0 - hit, 0.0), axis=1)
    before = np.concatenate([np.ones((len(n), 1)), failed[:, :-1]], axis=1)
    return np.where(failed == 0.0, 1.0, np.minimum(np.cumsum(before * hit, axis=1), 1.0))


def bootstrap(
    value_PK: Float64[np.ndarray, "P K"], seed: int = 0, draws: int = DRAWS, coverage: float = COVERAGE
) -> tuple[Float64[np.ndarray, " K"], Float64[np.ndarray, " K"]]:
    """Percentile bootstrap interval of the mean over problems, resampling problems with replacement.

    The resamples are a function of P, `seed` and `draws` alone, from raw Philox words (a stream that numpy keeps the
    same): runs on one set are resampled alike.

    Returns:
      (low_K, high_K).

    Raises:
      ValueError: fewer than 2 problems, no draws, or a coverage outside (0, 1).
    """
    P, K = np.shape(value_PK)
    if P < 2:
        raise ValueError(f"bootstrap: got {P} problems; expected at least 2")
    if draws < 1 or not 0 < coverage < 1:
        raise ValueError(f"bootstrap: got draws={draws}, coverage={coverage}; expected draws ≥ 1 and 0 < coverage < 1")
    bits = np.random.Philox(np.random.SeedSequence([seed]))
    means_BK = np.empty((draws, K))
    step = max(1, _AT_ONCE // P)
    for start in range(0, draws, step):
        rows = min(step, draws - start)
        # The upper 32 bits times P, over 2³²: an index below P, off uniform by less than P / 2³².
        index = ((bits.random_raw(rows * P) >> np.uint64(32)) * np.uint64(P) >> np.uint64(32)).astype(np.int64)
        slot = index + np.repeat(np.arange(rows), P) * P
        count_BP = np.bincount(slot, minlength=rows * P).reshape(rows, P)
        means_BK[start : start + rows] = count_BP @ value_PK / P
    tail = (1 - coverage) / 2
    return np.quantile(means_BK, tail, axis=0), np.quantile(means_BK, 1 - tail, axis=0)


def majority_vote(answers: Sequence[tuple[Hashable | None, bool]]) -> float:
    """Whether the most frequent answer of one problem is right; groups that tie share the vote evenly.

    Equal answers are one answer, so a group is right if any of its samples was graded correct (another may have been
    timed out).  Without any answer the vote is lost.

    Args:
      answers: (answer or None for none, graded correct) of each sample.

    Returns:
      0 to 1.
    """
    size: collections.Counter[Hashable] = collections.Counter()
    right: set[Hashable] = set()
    for answer, correct in answers:
        if answer is not None:
            size[answer] += 1
            if correct:
                right.add(answer)
    most = max(size.values(), default=0)
    winners = [answer for answer, count in size.items() if count == most]
    return sum(answer in right for answer in winners) / len(winners) if winners else 0.0


class _Sample(NamedTuple):
    """What a summary keeps of a sample: responses of a large set would be gigabytes."""

    verdict: Verdict
    vote: Hashable | None
    length: int
    ended: bool


def summarise(
    name: str, problems: Sequence[Problem], samples: Iterable[Mapping[str, Any]], *, seed: int = 0
) -> Summary:
    """A set's summary from the rows of its `samples/<set>.jsonl`, in any order.

    Every problem must have been sampled equally often.  Verdicts that are `missing` shorten their own problem's n
    alone: pass@k of every problem is estimated, without bias, from what was graded of it.

    Args:
      problems: the whole set.
      samples: rows with `id`, `sample`, `response`, `length`, `ended` and `verdict`.
      seed: of the bootstrap.

    Raises:
      ValueError: a sample given twice or of no problem of the set, problems sampled unequally often or not at all, or
        a verdict that is none.
    """
    by_id = {problem.id: problem for problem in problems}
    samples_of: dict[str, dict[int, _Sample]] = {name: {} for name in by_id}
    votes = {problem.kind: verifier_of(problem.kind).vote for problem in problems}
    voted = None not in votes.values()
    for row in samples:
        where = f"{name}: problem {row['id']!r} sample {row['sample']}"
        if row["id"] not in by_id:
            raise ValueError(f"{where} is of no problem of the set; expected one of its {len(problems)} problems")
        if row["sample"] in samples_of[row["id"]]:
            raise ValueError(f"{where} is given twice; expected one row a sample")
        if row["verdict"] not in list(Verdict):
            raise ValueError(f"{where} has the verdict {row['verdict']!r}; expected one of {', '.join(Verdict)}")
        problem = by_id[row["id"]]
        answer = votes[problem.kind](problem, row["response"]) if voted else None
        sample = _Sample(Verdict(row["verdict"]), answer, row["length"], row["ended"])
        samples_of[row["id"]][row["sample"]] = sample
    n = max((len(of_problem) for of_problem in samples_of.values()), default=0)
    short = [problem for problem, of_problem in samples_of.items() if len(of_problem) < n or not of_problem]
    if short or not n:
        raise ValueError(
            f"{name}: {len(short)} of {len(problems)} problems have fewer samples than {max(n, 1)}, the first"
            f" {', '.join(map(repr, short[:3])) or 'none'}; expected equally many of each: finish the evaluation"
        )

    drawn = [sample for of_problem in samples_of.values() for sample in of_problem.values()]
    graded = [[s for s in samples_of[name].values() if s.verdict != Verdict.missing] for name in by_id]
    graded = [of_problem for of_problem in graded if of_problem]
    total = sum(map(len, graded))
    low = high = curve = (None,) * n
    majority = accuracy = no_answer = None
    if graded:
        graded_P = np.array([len(of_problem) for of_problem in graded])
        correct_P = np.array([sum(s.verdict == Verdict.correct for s in of_problem) for of_problem in graded])
        value_PK = pass_at_k(graded_P, correct_P, int(graded_P.min()))
        curve = _padded(value_PK.mean(0), n)
        if len(graded) > 1:
            low, high = (_padded(bound, n) for bound in bootstrap(value_PK, seed))
        accuracy = int(correct_P.sum()) / total
        no_answer = sum(s.verdict == Verdict.no_answer for of_problem in graded for s in of_problem) / total
        if voted:
            majority = statistics.fmean(
                majority_vote([(s.vote, s.verdict == Verdict.correct) for s in of_problem]) for of_problem in graded
            )
    lengths = [sample.length for sample in drawn]
    return Summary(
        name=name,
        problems=len(graded),
        ungraded=len(by_id) - len(graded),
        n=n,
        missing=len(drawn) - total,
        pass_at_k=curve,
        low=low,
        high=high,
        majority=majority,
        accuracy=accuracy,
        no_answer=no_answer,
        overlong=sum(not sample.ended for sample in drawn) / len(drawn),
        length_mean=statistics.fmean(lengths),
        length_median=float(statistics.median(lengths)),
        length_max=max(lengths),
    )


def _padded(values: np.ndarray, size: int) -> tuple[float | None, ...]:
    return tuple(values.tolist()) + (None,) * (size - len(values))
