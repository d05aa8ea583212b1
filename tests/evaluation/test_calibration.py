"""Judge calibration: statistics against scikit-learn and brute force, derangements, runs on a model and a stub."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import math
import re

import numpy as np
import pytest
from calibration_runs import REFERENCES, calibration, lines, results, stub_judge, write_rollouts
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score, confusion_matrix, roc_auc_score
from stub_endpoint import Answer, StubEndpoint
from tiny_runs import ROOT, config_dict, read_jsonl

from exprl_jax.data.problems import Problem
from exprl_jax.evaluation.calibrate import calibrate
from exprl_jax.evaluation.calibration import agreement, derangement, error_rates, histogram, likelihood, spread
from exprl_jax.evaluation.calibration_tables import judge_accuracies, prefix_pairs, repeated_scores
from exprl_jax.evaluation.fixed_rollouts import FixedRollout, read_rollouts
from exprl_jax.evaluation.judge_task import SCORE_KEY
from exprl_jax.evaluation.passes import decides, wrong_references
from exprl_jax.files import Ledger
from exprl_jax.reward.judge_prompts import (
    CONTINUATION,
    blind_messages,
    judge_messages,
    parse_score,
    reference_last_messages,
)
from exprl_jax.reward.statistics import auroc, correlation, midranks
from exprl_jax.reward.verifiers.verdict import Verdict

RNG = np.random.default_rng(0)

# ------------------------------------------------------------------------------------------------ statistics


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("n", [2, 7, 200])
def test_rates_and_auroc_are_scikit_learns(n, whole):
    for _ in range(5):
        score = RNG.integers(1, 6, n).astype(float) if whole else RNG.uniform(1, 5, n).round(1)
        correct = RNG.permutation(np.arange(n) % 3 == 0)
        (tn, fp), (fn, tp) = confusion_matrix(correct, score >= 4, labels=[False, True])
        rates = error_rates(score, correct)
        assert rates.false_positive == pytest.approx(fp / (fp + tn))
        assert rates.false_negative == pytest.approx(fn / (fn + tp))
        assert rates.misplacement == pytest.approx((fp / (fp + tn) + fn / (fn + tp)) / 2)
        assert auroc(score, correct) == pytest.approx(roc_auc_score(correct, score))


def test_a_judge_says_correct_from_four_on():
    rates = error_rates(np.array([3.99, 4.0, 4.0, 3.99]), np.array([True, True, False, False]))
    assert (rates.false_negative, rates.false_positive) == (0.5, 0.5)


def test_what_one_class_leaves_open_is_none():
    rates = error_rates(np.array([5.0, 2.0]), np.array([True, True]))
    assert (rates.false_positive, rates.false_negative, rates.misplacement) == (None, 0.5, None)
    assert auroc(np.array([5.0, 2.0]), np.array([True, True])) is None
    nothing = error_rates(np.zeros(0), np.zeros(0, bool))
    assert (nothing.false_positive, nothing.false_negative) == (None, None)


def test_auroc_counts_pairs():
    score, correct = np.array([1, 2, 2, 4, 5, 5]), np.array([0, 1, 0, 0, 1, 0], bool)
    pairs = [(a > b) + (a == b) / 2 for a, b in itertools.product(score[correct], score[~correct])]
    assert auroc(score, correct) == pytest.approx(np.mean(pairs))
    assert midranks(np.array([7, 3, 7, 1])).tolist() == [3.5, 2, 3.5, 1]


def test_agreement_is_scikit_learns_kappa():
    for _ in range(10):
        a, b = RNG.integers(1, 6, 50), RNG.integers(1, 6, 50)
        b[:20] = a[:20]
        result = agreement(a, b)
        assert result.kappa == pytest.approx(cohen_kappa_score(a, b, weights="quadratic"))
        assert result.exact == np.mean(a == b) and result.within_one == np.mean(abs(a - b) <= 1) and result.n == 50
    assert agreement(np.array([3.0, 3.4]), np.array([3.2, 2.6])).kappa is None
    assert agreement(np.array([4.5, 1.2]), np.array([5.0, 1.0])).exact == 1.0
    assert agreement(np.zeros(0), np.zeros(0)).exact is None


def test_a_histogram_counts_the_nearest_digits():
    assert histogram(np.array([1.0, 1.49, 1.5, 3, 4.6, 5])).tolist() == [2, 1, 1, 0, 2]
    assert histogram(np.zeros(0)).tolist() == [0] * 5


def test_spread_is_within_and_between():
    result = spread([[1, 3], [4, 4], [5]])
    assert result.rollouts == 2
    assert result.within == pytest.approx(math.sqrt((2 + 0) / 2))
    assert result.between == pytest.approx(np.std([2, 4], ddof=1))
    assert spread([[1]]).within is None and spread([[1, 2]]).between is None


def test_likelihood_groups_by_digit():
    result = likelihood(np.array([1.2, 1, 4, 5]), np.array([0.0, 0.5, 0.5, 1.0]))
    assert result.count_5 == (2, 0, 0, 1, 1) and result.success_5 == (0.25, None, None, 0.5, 1.0)
    assert result.pearson == pytest.approx(np.corrcoef([1.2, 1, 4, 5], [0, 0.5, 0.5, 1])[0, 1])
    assert result.spearman == pytest.approx(np.corrcoef([2, 1, 3, 4], [1, 2.5, 2.5, 4])[0, 1])
    assert correlation(np.array([1.0, 1.0]), np.array([0.0, 1.0])) is None


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("pqrstuv"), st.sampled_from("abcdefg")), max_size=12), st.integers(0, 99))
def test_a_derangement_shares_no_text(texts, seed):
    shares = [[a[0] == b[0] or a[1] == b[1] for b in texts] for a in texts]
    for k, i, j in itertools.product(range(len(texts)), repeat=3):  # through others too
        shares[i][j] |= shares[i][k] and shares[k][j]
    if any(2 * sum(row) > len(texts) for row in shares):
        with pytest.raises(ValueError, match="no wrong references"):
            derangement(texts, seed)
        return
    taken = derangement(texts, seed)
    assert sorted(taken) == list(range(len(texts)))
    assert not any(shares[i][j] for i, j in enumerate(taken))
    assert derangement(texts, seed).tolist() == taken.tolist()


def test_derangements_differ_by_seed_and_see_through_blanks():
    texts = [(str(i), f"r{i}") for i in range(9)]
    assert len({tuple(derangement(texts, seed)) for seed in range(20)}) > 10
    with pytest.raises(ValueError, match="2 of 3 problems share"):
        derangement([("p", " r"), ("q", "r\n"), ("s", "t")], 0)


def test_wrong_references_stay_within_their_domain():
    problems = [Problem(f"{d}{i}", f"{d} {i}?", f"{d} because {i}", "1", d) for d in ("math", "code") for i in range(4)]
    result = wrong_references([*problems, problems[0]], 3)
    assert len(result) == 8
    for problem in problems:
        assert result[problem.id] != problem.reference and result[problem.id].startswith(problem.domain)


# ------------------------------------------------------------------------------------------------ prompts

ASKED = ("WHICH?", (("A", "one"),), "BECAUSE", "math", "outcome")


@pytest.mark.parametrize("readout", ["text", "logits"])
def test_the_released_order_has_the_trace_before_the_reference(readout):
    system, user = reference_last_messages(*ASKED, readout, "MARK")
    at = [user.content.index(part) for part in ("WHICH?", "A. one", "MARK", "BECAUSE")]
    assert at == sorted(at) and user.content.count("MARK") == 1
    ours = judge_messages(*ASKED, readout, "MARK")
    assert system == ours[0]
    assert user.content.splitlines()[-1] == ours[1].content.splitlines()[-1]
    with pytest.raises(ValueError, match="no reference solution"):
        reference_last_messages("p", (), " ", "math", "outcome", readout, "MARK")


@pytest.mark.parametrize("domain", ["math", "science", "code"])
@pytest.mark.parametrize("readout", ["text", "logits"])
def test_the_blind_prompt_knows_no_reference(domain, readout):
    system, user = blind_messages("WHICH?", (("A", "one"),), domain, readout, "MARK")
    assert "eference" not in system.content + user.content
    assert all(f"{digit}:" in system.content for digit in range(1, 6)) and "{" not in system.content + user.content
    assert user.content.index("A. one") < user.content.index("MARK")
    if readout == "text":
        assert parse_score(user.content.replace("<1-5>", "<3>")) == 3
    assert CONTINUATION[readout] in ("", "Score: ")


# ------------------------------------------------------------------------------------------------ whole runs


def synthetic(seen, before):
    """With the right reference 5 to attempts n.1 and n.2, 2 to n.0; with another's 1; without 4, once nonsense."""
    question = seen.content
    i, g = map(int, re.search(r"Attempt (\d)\.(\d)\.", question).groups())
    given = question.replace(f"Attempt {i}.{g}.\nWe count.\n{REFERENCES[i]}", "")
    if "Reference solution" not in given:
        return Answer("no idea" if (i, g) == (0, 0) else "Score: 4")
    if REFERENCES[i] not in given:
        return Answer("Score: 1")
    released = question.index("Attempt:") < question.index("Reference solution:")
    return Answer(f"Score: {2 if g == 0 else 4 if released else 5}")


def test_a_judge_of_known_faults_gives_the_known_numbers(tmp_path, capsys):
    rollouts = write_rollouts(
        tmp_path / "r.jsonl",
        verdict=lambda i, g: "timed_out" if (i, g) == (3, 2) else "correct" if (i + g) % 2 else "wrong",
    )
    with StubEndpoint(synthetic) as stub:
        config = calibration(rollouts, judges=stub_judge(stub))
        calibrate(config, str(tmp_path / "run"))
        asked = len(stub.seen)
        calibrate(config, str(tmp_path / "run"))
        assert len(stub.seen) == asked == 4 * 11
    folder = tmp_path / "run"
    # correct: (0,1) (1,0) (1,2) (2,1) (3,0), and (3,2) without a verdict; wrong: (0,0) (0,2) (1,1) (2,0) (2,2) (3,1)
    (ours,) = lines(folder, condition="correct", order="trace_last", domain="all")
    assert ours["rollouts"] == ours["scored"] == 11 and ours["correct"] == 5
    assert ours["false_negative"] == pytest.approx(2 / 5) and ours["false_positive"] == pytest.approx(4 / 6)
    assert ours["misplacement"] == pytest.approx((2 / 5 + 4 / 6) / 2)
    truth, score = [1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0], [5, 2, 5, 5, 2, 2, 5, 5, 2, 5, 5]
    assert ours["auroc"] == pytest.approx(roc_auc_score(truth, score))
    (blind,) = lines(folder, condition="none", domain="math")
    assert (blind["asked"], blind["scored"], blind["parse_rate"]) == (11, 10, pytest.approx(10 / 11))
    assert blind["unanswered"] == 0  # nonsense is an answer
    assert (blind["false_positive"], blind["false_negative"], blind["auroc"]) == (1.0, 0.0, 0.5)
    (wrong,) = lines(folder, condition="wrong", domain="all")
    assert (wrong["false_positive"], wrong["false_negative"], wrong["misplacement"]) == (0.0, 1.0, 0.5)
    (order,) = results(folder)["orders"]
    assert (order["n"], order["exact"], order["within_one"]) == (11, pytest.approx(4 / 11), 1.0)
    ours_then, theirs_then = [2, 5, 5, 2, 5, 5, 2, 5, 5, 2, 5], [2, 4, 4, 2, 4, 4, 2, 4, 4, 2, 4]
    assert order["kappa"] == pytest.approx(
        cohen_kappa_score(ours_then, theirs_then, weights="quadratic", labels=[1, 2, 3, 4, 5])
    )
    counts = {h["condition"]: (h["correct"], h["wrong"]) for h in results(folder)["histograms"]}
    assert counts["correct"] == ([0, 2, 0, 0, 3], [0, 2, 0, 0, 4]) and counts["wrong"] == (
        [5, 0, 0, 0, 0],
        [6, 0, 0, 0, 0],
    )
    assert results(folder)["counts"] == {"rollouts": 11, "left_out": 1}
    with open(folder / "calibration.csv") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 4 * 2 and float(table[0]["misplacement"]) == pytest.approx(ours["misplacement"])
    assert sum(int(row["tokens"]) for row in table if row["domain"] == "all") > 0
    assert "misplaced" in capsys.readouterr().out
    assert (folder / "histograms.png").read_bytes()[:4] == b"\x89PNG"
    assert not (folder / "prefix_check.png").exists()


def asked(rollout, score, repeat=0, segment=None, judge="a"):
    key = dict(
        judge=judge, condition="correct", order="trace_last", repeat=repeat, id="p", rollout=rollout, segment=segment
    )
    return key | dict(score=score, text="", tokens=2.5, seconds=0.5)


def test_whole_rollouts_repeats_and_prefixes_are_kept_apart():
    problem = Problem("p", "p", "r", "1", "math")
    rollouts = [FixedRollout(problem, n, "", verdict) for n, verdict in enumerate((Verdict.correct, Verdict.no_answer))]
    scores = [
        asked(0, 1.0),
        asked(1, 0.5),
        asked(0, 0.0, repeat=1),
        asked(0, 0.5, repeat=2),
        asked(0, None, repeat=3),
        asked(0, 0.25, segment=0),
        asked(1, 0.75, segment=0),
        asked(1, 0.0, segment=1),
        asked(0, 1.0, segment=0, judge="b"),
    ]
    line = judge_accuracies(["a"], rollouts, scores)[0]
    assert (line.asked, line.scored, line.correct, line.tokens, line.seconds) == (2, 2, 1, 5, 1.0)
    assert (line.false_positive, line.false_negative, line.auroc) == (0.0, 0.0, 1.0)
    assert repeated_scores(scores, "a") == [[1.0, 3.0]]
    drawn = [(0, 0, 0, 1, 2), (0, 0, 1, 2, 2), (1, 0, 0, 0, 2), (1, 1, 0, 0, 0)]
    continued = [dict(zip(("rollout", "segment", "part", "correct", "graded"), each), id="p") for each in drawn]
    score, success = prefix_pairs(scores, continued, "a")
    assert score.tolist() == [2.0, 4.0] and success.tolist() == [0.75, 0.0]


def test_failed_requests_are_missing_scores(tmp_path):
    rollouts = write_rollouts(tmp_path / "r.jsonl", problems=2)
    with StubEndpoint(
        lambda seen, _: Answer(status=400) if "Attempt 0.0" in seen.content else Answer("Score: 5")
    ) as stub:
        calibrate(
            calibration(rollouts, {"judges.stub.endpoint.max_missing": 0.9}, stub_judge(stub)), str(tmp_path / "run")
        )
    (ours,) = lines(tmp_path / "run", condition="correct", order="trace_last", domain="all")
    assert (ours["asked"], ours["scored"], ours["unanswered"]) == (6, 5, 1)


SYNTHETIC = """
import re
REFERENCES = {references!r}
def score(attempts):
    scores = []
    for a in attempts:
        i, g = map(int, re.search(r"Attempt (\\d)\\.(\\d)\\.", a.trace).groups())
        wrong = None if (i, g) == (0, 0) else 0.75
        scores.append(wrong if a.reference is None else 0.0 if a.reference != REFERENCES[i] else 1.0 if g else 0.25)
        assert a.unit == "outcome" and a.answer
    return scores
"""


def test_a_function_of_the_same_scores_has_the_numbers_of_the_endpoint(tmp_path):
    (tmp_path / "truth.py").write_text(SYNTHETIC.format(references=REFERENCES))
    rollouts = write_rollouts(tmp_path / "r.jsonl")
    function = config_dict("calibrate", "tiny").judges.text.copy_and_resolve_references().unlock()
    function.update(backend="function", function=f"{tmp_path}/truth.py:score")
    with StubEndpoint(synthetic) as stub:
        judges = {"ours": function} | stub_judge(stub)
        folder = tmp_path / "run"
        calibrate(calibration(rollouts, {"repeats.rollouts": 0}, judges), str(folder))
    for condition in ("correct", "none", "wrong"):
        of_judge = [
            {k: v for k, v in line.items() if k not in ("judge", "tokens", "seconds", "unanswered")}
            for line in lines(folder, condition=condition, order="trace_last", domain="all")
        ]
        assert len(of_judge) == 2 and of_judge[0] == of_judge[1]
    assert not [row for row in read_jsonl(folder / "scores.jsonl") if row["judge"] == "ours" and row["text"]]
    assert {row["order"] for row in read_jsonl(folder / "scores.jsonl") if row["judge"] == "ours"} == {"trace_last"}
    assert results(folder)["weights"]["ours"] == f"{tmp_path}/truth.py:score"


def test_a_local_judge_scores_all_that_fits(tmp_path):
    """Random weights by logits: a problem over the budget is not asked about at all, a trace over it gets no score."""
    rollouts = write_rollouts(tmp_path / "r.jsonl", problems=5, group=2)
    rows = read_jsonl(rollouts)
    rows[0]["response"] = "x" * 200  # the budget is 96 bytes, and what rounding widths up leaves
    rows[2]["response"] = "x" * 96
    for row in rows[8:]:
        row["problem"] += " Really?" * 300
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judges = {"logits": config_dict("calibrate", "tiny").judges.logits}
    calibrate(calibration(rollouts, {"data.source": ""}, judges), str(tmp_path / "run"))
    for condition, order in (
        ("correct", "trace_last"),
        ("none", "trace_last"),
        ("wrong", "trace_last"),
        ("correct", "reference_last"),
    ):
        (line,) = lines(tmp_path / "run", condition=condition, order=order, domain="all")
        assert (line["rollouts"], line["asked"], line["scored"], line["unanswered"]) == (10, 8, 7, 1)
        assert line["parse_rate"] == 7 / 8
        assert line["auroc"] is not None and line["tokens"] > 8 * 96 / 2 and line["seconds"] > 0
    scores = {
        (row["condition"], row["order"], row["id"], row["rollout"]): row["score"]
        for row in read_jsonl(tmp_path / "run" / "scores.jsonl")
    }
    assert len(scores) == 4 * 8 and all(0 <= score <= 1 for score in scores.values() if score is not None)
    # The passes are different prompts, so a model that reads them says different things.
    assert (
        len({score for (*_, identity, number), score in scores.items() if (identity, number) == (rows[2]["id"], 0)})
        == 4
    )


def test_an_endpoint_repeats_itself_at_a_temperature_with_other_seeds(tmp_path):
    rollouts = write_rollouts(tmp_path / "r.jsonl", problems=2)

    def answer(seen, before):
        return Answer(f"Score: {1 + seen.body['seed'] % 4}" if "seed" in seen.body else "Score: 3")

    with StubEndpoint(answer) as stub:
        config = calibration(rollouts, {"repeats.rollouts": 4, "repeats.count": 3}, stub_judge(stub))
        calibrate(config, str(tmp_path / "run"))
        drawn = [seen.body for seen in stub.seen if seen.body["temperature"]]
        calibrate(config, str(tmp_path / "run"))
        assert len(stub.seen) == 4 * 6 + 4 * 3
    assert [body["temperature"] for body in drawn] == [0.8] * 12
    assert sorted(body["seed"] for body in drawn) == sorted([config.seed + k for k in (1, 2, 3)] * 4)
    (row,) = results(tmp_path / "run")["repeats"]
    digits = [1 + (config.seed + k) % 4 for k in (1, 2, 3)]
    assert (row["rollouts"], row["between"]) == (4, 0.0)
    assert row["within"] == pytest.approx(np.std(digits, ddof=1))


def test_an_endpoint_that_dies_between_its_repeats_ends_the_run_and_is_not_asked_twice(tmp_path):
    rollouts = write_rollouts(tmp_path / "r.jsonl", problems=2)
    dead = [True]

    def answer(seen, before):
        if "seed" in seen.body and seen.body["seed"] == first + 2 and dead[0]:
            return Answer(status=400)
        return Answer("Score: 3")

    with StubEndpoint(answer) as stub:
        config = calibration(rollouts, {"repeats.rollouts": 4, "repeats.count": 3}, stub_judge(stub))
        first = config.seed
        with pytest.raises(ValueError, match="4 of 4 repeated scores are missing"):
            calibrate(config, str(tmp_path / "run"))
        dead[0], asked = False, len(stub.seen)
        calibrate(config, str(tmp_path / "run"))
        seeds = [seen.body["seed"] for seen in stub.seen[asked:] if "seed" in seen.body]
    assert sorted(seeds) == sorted([first + 2, first + 3] * 4)  # the first answers are kept


def test_a_program_that_is_too_slow_is_wrong_and_a_comparison_that_is_too_slow_is_neither():
    problems = {kind: Problem(kind, "p", None, "1", kind) for kind in ("math", "code")}
    assert decides(problems["code"], Verdict.timed_out) and not decides(problems["math"], Verdict.timed_out)
    assert not any(decides(each, Verdict.missing) for each in problems.values())
    assert all(decides(each, Verdict.no_answer) for each in problems.values())


@pytest.mark.parametrize(
    "field, value", [("response", None), ("problem", None), ("reference", 5), ("id", 3), ("answer", [])]
)
def test_a_row_whose_texts_are_none_is_refused(tmp_path, field, value):
    path = tmp_path / "r.jsonl"
    write_rollouts(path, problems=1)
    path.write_text("".join(json.dumps(row | {field: value}) + "\n" for row in read_jsonl(path)))
    with pytest.raises(ValueError, match=f"row 1: not a rollout .its {field} is "):
        read_rollouts(str(path), calibration("x").data, references=False)


def test_globs_that_overlap_count_a_file_once(tmp_path):
    path = write_rollouts(tmp_path / "r.jsonl", problems=2)
    data = calibration("x").data
    once = read_rollouts(path, data, references=False)
    assert read_rollouts(f"{path},{tmp_path}/*.jsonl", data, references=False) == once


class Interrupted(Exception):
    pass


@pytest.mark.slow
def test_a_calibration_goes_on_where_its_files_end(tmp_path, monkeypatch):
    """Tiny random models, all passes; killed in mid-pass with a torn line, and again among the continuations."""
    rollouts = write_rollouts(tmp_path / "r.jsonl", reference=False)
    small = {
        "prefixes.rollouts": 2,
        "prefixes.segments.rule": "line",
        "prefixes.segments.max_segments": 2,
        "prefixes.sampling.wave": 8,
        "prefixes.sampling.samples": 4,
        "prefixes.sampling.group": 2,
        "prefixes.sampling.max_tokens": 8,
        "repeats.rollouts": 2,
        "repeats.count": 2,
        "judges.text.max_tokens": 8,
    }
    config = calibration(rollouts, small)
    calibrate(config, str(tmp_path / "whole"))

    asked, add = [], Ledger.add

    def interrupted(ledger, rows):
        add(ledger, rows)
        asked.append(ledger.path.name)
        if len(asked) == 3 or asked.count("continuations.jsonl") == 1:
            raise Interrupted

    monkeypatch.setattr(Ledger, "add", interrupted)
    with pytest.raises(Interrupted):
        calibrate(config, str(tmp_path / "cut"))
    path = tmp_path / "cut" / "scores.jsonl"
    torn = path.read_bytes()
    path.write_bytes(torn[: len(torn) - 20])
    with pytest.raises(Interrupted):
        calibrate(config, str(tmp_path / "cut"))
    assert len(asked) > 3 and asked[-1] == "continuations.jsonl"
    calibrate(config, str(tmp_path / "cut"))

    for name in ("scores.jsonl", "continuations.jsonl"):
        ours, theirs = (
            {tuple(row.get(k) for k in SCORE_KEY + ("part",)): row for row in read_jsonl(tmp_path / run / name)}
            for run in ("cut", "whole")
        )
        assert ours.keys() == theirs.keys() and len(ours) == len(read_jsonl(tmp_path / "cut" / name))
        for key, row in theirs.items():
            for field in row.keys() - {"seconds", "tokens", "score"}:
                assert ours[key][field] == row[field]
            if row.get("score") is not None:
                assert ours[key]["score"] == pytest.approx(row["score"], abs=1e-6)
    scores = read_jsonl(tmp_path / "whole" / "scores.jsonl")
    assert sum(row["repeat"] > 0 for row in scores) == 2 * 2
    # One prefix of each of two rollouts, two judges, three references (correct, none, wrong).
    assert sum(row["segment"] is not None for row in scores) == 2 * 2 * 3
    assert all(row["graded"] == 2 for row in read_jsonl(tmp_path / "whole" / "continuations.jsonl"))
    assert (tmp_path / "whole" / "prefix_check.png").exists()
    assert results(tmp_path / "cut")["histograms"] == results(tmp_path / "whole")["histograms"]

    other = (tmp_path / "r.jsonl").read_text().replace("We count", "We guess")
    (tmp_path / "r.jsonl").write_text(other)
    with pytest.raises(ValueError, match="is not the one that it was; restore the files of its rollouts"):
        calibrate(config, str(tmp_path / "whole"))


# ------------------------------------------------------------------------------------------------ doors


@pytest.mark.parametrize(
    "change, message",
    [
        ({"id": None}, "not a rollout"),
        ({"verdict": "perhaps"}, "not a rollout .*perhaps"),
        ({"problem": "Another?"}, "has another text or kind before"),
        ({"kind": "choice"}, "has another text or kind before"),
        ({"id": "new", "kind": "choice"}, "problem 'new' has answer choices"),
    ],
)
def test_rows_that_are_no_rollouts_are_refused(tmp_path, change, message):
    path = tmp_path / "r.jsonl"
    write_rollouts(path, problems=1)
    (row, *_) = read_jsonl(path)
    bad = {k: v for k, v in (row | change).items() if v is not None}
    path.write_text(json.dumps(row) + "\n" + json.dumps(bad) + "\n")
    data = calibration(str(path)).data
    with pytest.raises(ValueError, match=message):
        read_rollouts(str(path), data, references=True)


def test_rollouts_are_numbered_over_all_files(tmp_path):
    write_rollouts(tmp_path / "a.jsonl", problems=1)
    write_rollouts(tmp_path / "b.jsonl", problems=2)
    read = read_rollouts(f"{tmp_path}/*.jsonl", calibration("x").data, references=True)
    assert [(r.problem.id[-1], r.number) for r in read] == [("0", n) for n in range(6)] + [("1", n) for n in range(3)]
    with pytest.raises(ValueError, match="matches no file"):
        read_rollouts(f"{tmp_path}/none.jsonl", calibration("x").data, references=True)
    bare = tmp_path / "problems.jsonl"
    bare.write_text(
        "".join(
            json.dumps(row | {"reference": ""}) + "\n" for row in read_jsonl(ROOT / "configs/data/arithmetic.jsonl")
        )
    )
    data = dataclasses.replace(calibration("x").data, source=str(bare))
    assert read_rollouts(f"{tmp_path}/a.jsonl", data, references=False)[0].problem.reference is None
    with pytest.raises(ValueError, match="reference"):
        read_rollouts(f"{tmp_path}/a.jsonl", data, references=True)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds none"):
        read_rollouts(f"{tmp_path}/empty.jsonl", calibration("x").data, references=True)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"repeats.rollouts": 1, "repeats.count": 1}, "config.repeats.count: got 1, expected at least 2"),
        (
            {"repeats.rollouts": 1, "repeats.temperature": 0.0},
            "config.repeats.temperature: got 0.0, expected a positive",
        ),
        ({"prefixes.sampling.group": 3}, "config.prefixes.sampling.group: got 3, expected a divisor"),
        ({"judges": {}}, "config.judges: expected a section with at least one named entry"),
        ({"judges.text.max_tokens": 0}, "config.judges.text.max_tokens: got 0, expected a positive number"),
        ({"judges.text.readout": "json"}, "config.judges.text.readout: got 'json', expected one of"),
    ],
)
def test_calibrations_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        calibration("x", changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"judges.logits.max_context_tokens": 10, "judges.text.max_context_tokens": 10},
            "max_context_tokens: got 10, expected at least",
        ),
        ({"prefixes.rollouts": 2, "prefixes.segments.rule": "heading"}, "'heading' cuts none of the rollouts"),
        ({"judges.text.max_tokens": 4096, "judges.logits.max_context_tokens": 4096}, "the judge's context length"),
    ],
)
def test_runs_that_cannot_work_end_with_a_line(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        calibrate(calibration(write_rollouts(tmp_path / "r.jsonl"), changes), str(tmp_path / "run"))


def test_rollouts_without_verdicts_are_refused(tmp_path):
    rollouts = write_rollouts(tmp_path / "r.jsonl", verdict=lambda i, g: "missing")
    with pytest.raises(ValueError, match="got 12 rollouts, expected some found right or wrong"):
        calibrate(calibration(rollouts), str(tmp_path / "run"))
