"""Every number of a step's summary, against the same number counted rollout by rollout."""

import dataclasses
import math

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from configs import tiny
from exprl_jax.resolve import resolve
from exprl_jax.reward.statistics import BY_KIND, METRICS, VERDICTS, auroc, rollout_statistics, summarise
from exprl_jax.reward.verifiers.verdict import Verdict

P, G, N = 6, 5, 3
KINDS = ("choice", "math", "science")
ADVANTAGE = resolve(tiny.get_config("process")).advantage


def rule(overlong):
    return dataclasses.replace(ADVANTAGE, overlong=overlong)


def rows(seed=0):
    random = np.random.default_rng(seed)
    count = random.integers(1, N + 1, (P, G))
    ended = random.random((P, G)) < 0.7
    asked = (np.arange(N) < count[..., None]) & ended[..., None]
    valid = asked & (random.random((P, G, N)) < 0.8)
    verdict = random.integers(0, len(VERDICTS), (P, G))
    verdict[0], verdict[1] = VERDICTS.index(Verdict.correct), VERDICTS.index(Verdict.wrong)
    return {
        "kind_P": np.array([1, 1, 0, 1, 2, 0]),
        "resampled_P": np.array([0, 2, 0, 0, 1, 0]),
        "hinted_P": np.array([True, False, True, True, False, False]),
        "nudged_P": np.array([True, False, False, True, False, False]),
        "length_PG": random.integers(1, 30, (P, G)),
        "ended_PG": ended,
        "verdict_PG": verdict,
        "score_PGN": np.where(valid, random.integers(0, 9, (P, G, N)) / 8, 0).astype(np.float32),
        "valid_PGN": valid,
        "asked_PGN": asked,
        "cut_PGN": asked & (random.random((P, G, N)) < 0.3),
        "count_PG": count,
        "advantage_PGN": random.standard_normal((P, G, N)).astype(np.float32),
        "counted_PGN": (np.arange(N) < count[..., None]) & (random.random((P, G, N)) < 0.6),
        "truth_PGN": np.where(asked, random.integers(0, 6, (P, G, N)) / 5, 0).astype(np.float32),
        "known_PGN": asked & (random.random((P, G, N)) < 0.9),
        "live_P": np.array([True, False, True, True, False, True]),
        "fallback_P": np.array([True, False, False, True, False, False]),
    }


def mean(values):
    values = [float(v) for v in values]
    return sum(values) / len(values) if values else None


def deviation(values):
    values = [float(v) for v in values]
    return math.sqrt(mean((v - mean(values)) ** 2 for v in values)) if values else None


def pearson(pairs):
    xs, ys = [float(x) for x, _ in pairs], [float(y) for _, y in pairs]
    both = deviation(xs) * deviation(ys) if pairs else 0
    return mean((x - mean(xs)) * (y - mean(ys)) for x, y in pairs) / both if both else None


def auroc_by_scikit_learn(judged):
    right = [bool(correct) for _, _, correct in judged]
    return sklearn.metrics.roc_auc_score(right, [reward for reward, *_ in judged]) if len({*right}) == 2 else None


def ranked_by_scipy(pairs):
    constant = any(len(set(values)) < 2 for values in zip(*pairs))
    return None if len(pairs) < 2 or constant else scipy.stats.spearmanr(*zip(*pairs)).statistic


def counted_by_hand(rows, overlong_rule):
    """The summary by loops over rollouts and segments, from the words of `METRICS`."""
    rewards, judged, spreads = [], [], []
    truths, failed, before = [], [], []
    groups = len(rows["count_PG"])
    for p in range(groups):
        of_group = []
        for g in range(G):
            last = rows["count_PG"][p, g] - 1
            verdict = VERDICTS[rows["verdict_PG"][p, g]]
            scored = [(rows["score_PGN"][p, g, n], rows["truth_PGN"][p, g, n]) for n in range(last + 1)]
            both = [rows["valid_PGN"][p, g, n] and rows["known_PGN"][p, g, n] for n in range(last + 1)]
            before += [pair for pair, known in zip(scored[:-1], both) if known]
            if both[-1]:
                truths.append(scored[-1][1])
                failed += [scored[-1]] if verdict not in (Verdict.missing, Verdict.correct) else []
            if rows["valid_PGN"][p, g, last]:
                reward = rows["score_PGN"][p, g, last]
                if verdict != Verdict.missing:
                    judged.append((reward, rows["length_PG"][p, g], verdict == Verdict.correct))
                of_group.append(reward)
            elif overlong_rule == "zero_score" and not rows["ended_PG"][p, g]:
                of_group.append(0.0)
        rewards += of_group
        if len(of_group) > 1:
            spreads.append(deviation(of_group))
    verdicts = [[VERDICTS[v] for v in group] for group in rows["verdict_PG"]]
    flat = [v for group in verdicts for v in group]
    known = [[v for v in group if v != Verdict.missing] for group in verdicts]
    solved = [sum(v == Verdict.correct for v in group) / len(group) for group in known if group]
    places = [(p, g, n) for p in range(groups) for g in range(G) for n in range(rows["count_PG"][p, g])]
    advantages = [rows["advantage_PGN"][at] for at in places if rows["counted_PGN"][at]]
    asked = [at for at in places if rows["asked_PGN"][at]]
    likert = [1 + 4 * float(rows["score_PGN"][at]) for at in places if rows["valid_PGN"][at]]
    return {
        "reward/mean": mean(rewards),
        "reward/std": deviation(rewards),
        "solve/accuracy": mean(v == Verdict.correct for group in known for v in group),
        "solve/none": mean(s == 0 for s in solved),
        "solve/some": mean(0 < s < 1 for s in solved),
        "solve/all": mean(s == 1 for s in solved),
        "solve/no_answer": mean(v == Verdict.no_answer for v in flat),
        "solve/timed_out": mean(v == Verdict.timed_out for v in flat),
        "solve/missing": mean(v == Verdict.missing for v in flat),
        "response/length_mean": mean(rows["length_PG"].ravel()),
        "response/length_max": max(rows["length_PG"].ravel()),
        "response/overlong": mean(not e for e in rows["ended_PG"].ravel()),
        "rollout/resampled": sum(rows["resampled_P"]),
        "rollout/hinted": sum(rows["hinted_P"]),
        "rollout/nudged": sum(rows["nudged_P"]),
        "segments/mean": mean(rows["count_PG"].ravel()),
        "segments/max": max(rows["count_PG"].ravel()),
        "advantage/mean": mean(advantages),
        "advantage/std": deviation(advantages),
        "advantage/max": max(advantages),
        "advantage/min": min(advantages),
        "advantage/counted": len(advantages) / len(places),
        "advantage/live_groups": mean(rows["live_P"]),
        "judge/asked": len(asked),
        "judge/parsed": mean(rows["valid_PGN"][at] for at in asked),
        "judge/truncated": mean(rows["cut_PGN"][at] for at in asked),
        # Half-way scores round to the even digit, as Python's round does.
        **{f"judge/score_{digit}": mean(round(x) == digit for x in likert) for digit in range(1, 6)},
        "judge/checklist_fallback": mean(rows["fallback_P"][p] for p, _, _ in asked),
        "judge/group_spread": mean(spreads),
        "judge/length_correlation": pearson([(r, length) for r, length, _ in judged]),
        "judge/correct_correlation": pearson([(r, right) for r, _, right in judged]),
        "judge/truth_mean": mean(truths),
        "judge/truth_spearman_failed": ranked_by_scipy(failed),
        "judge/truth_spearman_prefixes": ranked_by_scipy(before),
        "judge/correct_auroc": auroc_by_scikit_learn(judged),
    }


@pytest.mark.parametrize("overlong", ["zero_score", "mask"])
def test_every_number_is_the_one_counted_by_hand(overlong):
    given = rows()
    # What distinguishes the rules is there: overlong rollouts, and judged ones whose last score is missing.
    assert not given["ended_PG"].all()
    last = np.take_along_axis(given["valid_PGN"], given["count_PG"][..., None] - 1, -1)[..., 0]
    assert (given["valid_PGN"].any(-1) & ~last).any()
    assert (last & (given["verdict_PG"] == VERDICTS.index(Verdict.missing))).any()
    got, expected = summarise(given, rule(overlong), ["math"]), counted_by_hand(given, overlong)
    assert set(got) == set(expected) == set(METRICS)
    for name, value in got.items():
        assert type(value) is float
        assert value == pytest.approx(expected[name], rel=1e-6, abs=1e-9), name


def test_what_is_not_defined_is_none():
    given = rows()
    nothing = {name: np.zeros_like(given[name]) for name in ("valid_PGN", "asked_PGN", "cut_PGN", "counted_PGN")}
    got = summarise(given | nothing, rule("mask"), ["math"])
    assert set(got) == set(METRICS)
    assert {name for name, value in got.items() if value is None} == {
        "reward/mean",
        "reward/std",
        "advantage/mean",
        "advantage/std",
        "advantage/max",
        "advantage/min",
        "judge/parsed",
        "judge/truncated",
        *(f"judge/score_{digit}" for digit in range(1, 6)),
        "judge/checklist_fallback",
        "judge/group_spread",
        "judge/length_correlation",
        "judge/correct_correlation",
        "judge/truth_mean",
        "judge/truth_spearman_failed",
        "judge/truth_spearman_prefixes",
        "judge/correct_auroc",
    }
    assert got["judge/asked"] == 0.0
    without = {name: values for name, values in given.items() if name != "fallback_P"}
    assert summarise(without, rule("mask"), ["math"])["judge/checklist_fallback"] is None
    # The paper's rule: a rollout that never ended has the lowest reward without anybody being asked.
    assert summarise(given | nothing, rule("zero_score"), ["math"])["reward/mean"] == 0.0


def test_equal_scores_have_no_spread_and_no_correlation():
    """Also where their mean, taken in float32, is another number."""
    given = rows() | {"count_PG": np.ones((P, G), int), "ended_PG": np.ones((P, G), bool)}
    given |= {"valid_PGN": np.ones((P, G, N), bool), "score_PGN": np.full((P, G, N), 0.3, np.float32)}
    got = summarise(given, rule("mask"), ["math"])
    assert np.full(7, 0.3, np.float32).std() > 0
    assert got["reward/std"] == got["judge/group_spread"] == 0.0
    assert got["judge/length_correlation"] is got["judge/correct_correlation"] is None
    assert got["judge/correct_auroc"] == 0.5


@pytest.mark.parametrize("overlong", ["zero_score", "mask"])
def test_several_kinds_have_numbers_of_their_own(overlong):
    given = rows()
    whole, got = summarise(given, rule(overlong), ["math"]), summarise(given, rule(overlong), KINDS)
    assert set(got) == set(METRICS) | {f"{name}/{kind}" for name in BY_KIND for kind in KINDS}
    assert {name: got[name] for name in METRICS} == whole
    for place, kind in enumerate(KINDS):
        expected = counted_by_hand({name: x[given["kind_P"] == place] for name, x in given.items()}, overlong)
        for name in BY_KIND:
            assert got[f"{name}/{kind}"] == pytest.approx(expected[name], rel=1e-6, abs=1e-9), (name, kind)
    assert len({got[f"response/length_mean/{kind}"] for kind in KINDS}) == 3


def test_a_kind_that_is_not_in_the_batch_is_not_defined():
    given = rows()
    got = summarise(given, rule("mask"), (*KINDS, "code"))
    assert [got[f"{name}/code"] for name in BY_KIND] == [None] * len(BY_KIND)


def test_only_what_the_report_may_ask_for_is_given_by_kind():
    assert set(BY_KIND) <= set(METRICS)


def test_missing_verdicts_are_no_wrong_answers():
    """Neither in the accuracy, nor in what is solved, nor in what the judge is compared with."""
    right, wrong, missing = (VERDICTS.index(v) for v in (Verdict.correct, Verdict.wrong, Verdict.missing))
    rows = {
        "verdict_PG": np.array([[right, missing], [wrong, missing], [right, wrong], [missing, missing]]),
        "length_PG": np.full((4, 2), 5),
        "ended_PG": np.ones((4, 2), bool),
    }
    got = rollout_statistics(rows)
    assert got["solve/accuracy"] == 2 / 4
    assert got["solve/all"] == got["solve/none"] == got["solve/some"] == pytest.approx(1 / 3)
    assert got["solve/missing"] == 4 / 8
    nothing = rollout_statistics(rows | {"verdict_PG": np.full((4, 2), missing)})
    assert {name for name, value in nothing.items() if value is None} == {
        "solve/accuracy",
        "solve/none",
        "solve/some",
        "solve/all",
    }


def test_what_rollouts_say_by_themselves_is_part_of_the_summary():
    given = rows()
    alone, whole = rollout_statistics(given), summarise(given, rule("mask"), ["math"])
    assert set(alone) == {name for name in METRICS if name.startswith(("solve/", "response/"))}
    assert alone == {name: whole[name] for name in alone}


def test_auroc():
    score = np.array([0.1, 0.9, 0.5, 0.5])
    assert auroc(score, np.array([False, True, True, False])) == pytest.approx((1 + 1 + 1 + 0.5) / 4)
    assert auroc(-score, np.array([False, True, True, False])) == pytest.approx(0.5 / 4)
    assert auroc(score, np.ones(4, bool)) is None and auroc(score, np.zeros(4, bool)) is None


@pytest.mark.parametrize("seed", range(8))
def test_auroc_is_that_of_scikit_learn(seed):
    """With ties, which the judge's few values bring."""
    random = np.random.default_rng(seed)
    size = random.integers(2, 200)
    score, positive = random.integers(0, 5, size) / 4, random.random(size) < 0.3
    positive[:2] = True, False
    assert auroc(score, positive) == pytest.approx(sklearn.metrics.roc_auc_score(positive, score), abs=1e-12)
