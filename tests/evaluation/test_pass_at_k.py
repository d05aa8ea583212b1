"""pass@k against enumeration, its intervals against a case that is known, and what a set's summary counts."""

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exprl_jax.data.problems import Problem
from exprl_jax.evaluation.pass_at_k import bootstrap, majority_vote, pass_at_k, summarise
from exprl_jax.reward.verifiers.verifier import verifier_of
from exprl_jax.reward.verifiers.votes import normalise_answer

few = settings(max_examples=60, deadline=None, derandomize=True)


def problem(name="p", answer="2", choices=(), domain="math"):
    return Problem(name, "?", None, answer, domain, choices)


def row(name="p", sample=0, verdict="correct", response="\\boxed{2}", length=10, ended=True):
    return {"id": name, "sample": sample, "response": response, "length": length, "ended": ended, "verdict": verdict}


@pytest.mark.parametrize("n", range(1, 9))
def test_it_is_the_share_of_subsets_with_a_success(n):
    for c in range(n + 1):
        outcomes = [True] * c + [False] * (n - c)
        expected = [np.mean([any(subset) for subset in itertools.combinations(outcomes, k)]) for k in range(1, n + 1)]
        np.testing.assert_allclose(pass_at_k(np.array([n]), np.array([c]), n)[0], expected, rtol=1e-14)


@pytest.mark.parametrize("n", [100, 1024])
def test_it_is_exact_where_binomial_coefficients_overflow(n):
    correct = np.array([0, 1, 2, 17, n // 2, n - 1, n])
    expected = [[1 - math.comb(n - int(c), k) / math.comb(n, k) for k in range(1, n + 1)] for c in correct]
    got = pass_at_k(np.full(len(correct), n), correct, n)
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-15)
    assert (got[0] == 0).all() and (got[-1] == 1).all() and (got[1:, -1] == 1).all()


@few
@given(data=st.data(), n=st.integers(1, 1024))
def test_it_grows_with_k_and_with_every_success(data, n):
    c = data.draw(st.integers(0, n - 1))
    less, more = pass_at_k(np.array([n, n]), np.array([c, c + 1]), n)
    assert (np.diff(less) >= 0).all() and (less <= more + 1e-12).all() and ((0 <= less) & (more <= 1)).all()
    assert less[0] == c / n and more[0] == (c + 1) / n


def test_problems_may_have_different_n_where_k_fits_them_all():
    both = pass_at_k(np.array([8, 5]), np.array([3, 1]), 5)
    np.testing.assert_array_equal(both[0], pass_at_k(np.array([8]), np.array([3]), 8)[0, :5])
    np.testing.assert_allclose(both[1], np.arange(1, 6) / 5)


@pytest.mark.parametrize(
    ("graded", "correct", "most", "match"),
    [
        ([4, 4], [1, 5], 4, "problem 1 has 5 correct of 4 samples"),
        ([4], [-1], 4, "problem 0 has -1 correct"),
        ([4, 3], [1, 1], 4, "k up to 4; expected 1 to 3"),
        ([4], [1], 0, "k up to 0"),
        ([], [], 1, "got 0 sample counts"),
        ([4], [1, 1], 4, "1 sample counts and 2 correct"),
    ],
)
def test_counts_that_contradict_each_other_are_refused(graded, correct, most, match):
    with pytest.raises(ValueError, match=match) as caught:
        pass_at_k(np.array(graded, int), np.array(correct, int), most)
    assert "\n" not in str(caught.value)


def test_intervals_are_those_of_resampling_problem_by_problem():
    """Against a plain loop over the same words."""
    value = np.random.default_rng(0).random((7, 3))
    words = np.random.Philox(np.random.SeedSequence([5])).random_raw(50 * 7)
    means = [
        np.mean([value[(int(word) >> 32) * 7 >> 32] for word in words[draw * 7 : draw * 7 + 7]], axis=0)
        for draw in range(50)
    ]
    low, high = bootstrap(value, seed=5, draws=50, coverage=0.8)
    np.testing.assert_allclose(low, np.percentile(means, 10, axis=0), rtol=1e-12)
    np.testing.assert_allclose(high, np.percentile(means, 90, axis=0), rtol=1e-12)


def test_intervals_never_change_and_do_not_depend_on_how_much_is_held_at_once(monkeypatch):
    value = (np.arange(40) % 3 == 0)[:, None] * np.ones((1, 2))
    low, high = bootstrap(value)
    np.testing.assert_allclose([low[0], high[0]], [0.2, 0.5], rtol=1e-12)  # recorded; numpy keeps Philox words
    monkeypatch.setattr("exprl_jax.evaluation.pass_at_k._AT_ONCE", 100)
    np.testing.assert_array_equal(bootstrap(value), (low, high))
    uneven = np.arange(40.0)[:, None]
    assert len({bootstrap(uneven, seed)[0][0] for seed in range(4)}) > 1


def test_intervals_of_problems_that_agree_are_points():
    low, high = bootstrap(np.full((12, 4), 0.3))
    np.testing.assert_allclose(low, 0.3)
    np.testing.assert_allclose(high, 0.3)


def test_intervals_cover_a_known_mean_about_as_often_as_they_say():
    """60 problems whose pass@1 is drawn uniformly from [0, 1]: mean 1/2, and the standard error is that of the mean."""
    draw = np.random.default_rng(1)
    truth, covered, widths = 0.5, 0, []
    for trial in range(500):
        low, high = bootstrap(draw.random((60, 1)), seed=trial, draws=400)
        covered += low[0] <= truth <= high[0]
        widths.append(high[0] - low[0])
    assert 0.91 <= covered / 500 <= 0.97
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.sqrt(1 / 12 / 60), rel=0.05)


@pytest.mark.parametrize(
    ("rows", "settings", "match"),
    [(1, {}, "got 1 problems"), (3, {"draws": 0}, "draws=0"), (3, {"coverage": 1.0}, "coverage=1.0")],
)
def test_intervals_need_something_to_resample(rows, settings, match):
    with pytest.raises(ValueError, match=match):
        bootstrap(np.ones((rows, 2)), **settings)


@pytest.mark.parametrize(
    ("answers", "share"),
    [
        ([("2", True), ("3", False), ("2", True)], 1.0),
        ([("2", True), ("3", False), ("3", False)], 0.0),
        ([("2", True), ("3", False)], 0.5),
        ([("2", True), ("3", False), ("4", False)], 1 / 3),
        ([("2", True), ("3", False), (None, False), (None, False)], 0.5),
        ([("2", True), ("2", False), ("3", False)], 1.0),  # the second was timed out
        ([(None, False)], 0.0),
        ([], 0.0),
    ],
)
def test_the_most_frequent_answer_wins_and_ties_split(answers, share):
    assert majority_vote(answers) == share


@few
@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c", None]), st.just(False)), max_size=8), st.randoms())
def test_votes_do_not_depend_on_the_order_of_samples(answers, rng):
    answers = [(answer, answer == "a") for answer, _ in answers]
    shuffled = list(answers)
    rng.shuffle(shuffled)
    assert majority_vote(answers) == majority_vote(shuffled)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("42", " 42. "),
        ("42", "042"),
        ("42", "42.0"),
        ("0", "-0"),
        ("0", "0.00"),
        ("1234", "1,234"),
        ("1234", "1{,}234"),
        ("\\frac{1}{2}", "\\dfrac{1}{2}"),
        ("\\left(1, 2\\right)", "(1,2)"),
        ("x \\, y", "xy"),
        ("$7$", "7"),
        ("\\text{even}", "even"),
        ("\\mathrm{A}", "A"),
        ("\\(3\\)", "3"),
        ("a\\quad b", "ab"),
        ("+5", "5"),
        ("-5", "-5.0"),
    ],
)
def test_answers_in_another_dress_are_one(one, other):
    assert normalise_answer(one) == normalise_answer(other)
    assert normalise_answer(normalise_answer(one)) == normalise_answer(one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("5", "-5"),
        ("1,2", "12"),
        ("(1,234)", "1234"),
        ("x", "X"),
        ("\\frac{1}{2}", "\\frac{2}{1}"),
        ("1.5", "15"),
        ("100", "1"),
        ("0.1", "0.01"),
        ("\\leftarrow", "arrow"),
        ("[0,1]", "(0,1)"),
        ("\\{1\\}", "1"),
    ],
)
def test_answers_that_differ_stay_apart(one, other):
    assert normalise_answer(one) != normalise_answer(other)


def vote(of, response):
    return verifier_of(of.kind).vote(of, response)


def test_a_response_votes_for_its_box_or_its_choice():
    options = (("A", "iron"), ("B", "gold"))
    assert vote(problem(), "so \\boxed{ 2 }") == "2"
    assert vote(problem(), "so 2") is None and vote(problem(), "\\boxed{ }") is None
    assert vote(problem(choices=options), "Answer: B") == "B" and vote(problem(choices=options), "\\boxed{iron}") == "A"
    assert vote(problem(choices=options), "A or B") is None
    assert verifier_of("code").vote is None and verifier_of("science").vote is None


def four(name, verdicts, responses=None):
    responses = responses or [{"correct": "\\boxed{2}", "no_answer": "none"}.get(v, "\\boxed{3}") for v in verdicts]
    return [
        row(name, i, verdict, response) for i, (verdict, response) in enumerate(zip(verdicts, responses, strict=True))
    ]


def test_a_set_is_summed_up():
    samples = [
        *four("a", ["correct", "correct", "wrong", "no_answer"], ["\\boxed{2}", "\\boxed{2.0}", "\\boxed{3}", "none"]),
        *four(
            "b", ["wrong", "correct", "wrong", "timed_out"], ["\\boxed{3}", "\\boxed{2}", "\\boxed{3}", "\\boxed{9^9}"]
        ),
    ]
    samples[0] |= {"length": 50, "ended": False}
    random.Random(0).shuffle(samples)
    got = summarise("tiny", [problem("a"), problem("b")], samples)
    assert (got.name, got.problems, got.ungraded, got.n, got.missing) == ("tiny", 2, 0, 4, 0)
    np.testing.assert_allclose(got.pass_at_k, np.mean([[1 / 2, 5 / 6, 1, 1], [1 / 4, 1 / 2, 3 / 4, 1]], axis=0))
    assert got.accuracy == 3 / 8 and got.no_answer == 1 / 8 and got.overlong == 1 / 8 and got.majority == 0.5
    assert (got.length_mean, got.length_median, got.length_max) == (15.0, 10.0, 50)
    assert got.low[0] == 0.25 and got.high[0] == 0.5 and got.low[3] == got.high[3] == 1.0
    assert summarise("tiny", [problem("a"), problem("b")], samples[::-1]) == got


def test_missing_verdicts_are_left_out_and_never_counted_as_wrong():
    problems = [problem("a"), problem("b"), problem("c")]
    samples = [
        *four("a", ["correct", "missing", "correct", "missing"]),
        *four("b", ["correct", "wrong", "no_answer", "missing"]),
        *four("c", ["missing"] * 4),
    ]
    got = summarise("tiny", problems, samples)
    assert (got.problems, got.ungraded, got.n, got.missing) == (2, 1, 4, 7)
    # k beyond the 2 graded samples of `a` has no estimate over the same problems.
    np.testing.assert_allclose(got.pass_at_k[:2], [(1 + 1 / 3) / 2, (1 + 2 / 3) / 2])
    assert got.pass_at_k[2:] == got.low[2:] == got.high[2:] == (None, None)
    assert got.accuracy == 3 / 5 and got.majority == 0.75 and got.no_answer == 1 / 5
    assert got.length_mean == 10


def test_a_set_without_any_verdict_has_no_numbers():
    got = summarise("tiny", [problem("a")], four("a", ["missing", "missing"]))
    assert got.pass_at_k == got.low == got.high == (None, None)
    assert got.accuracy is None and got.majority is None and got.no_answer is None and got.problems == 0


def test_one_problem_has_no_interval():
    got = summarise("tiny", [problem("a")], four("a", ["correct", "wrong"]))
    assert got.pass_at_k == (0.5, 1.0) and got.low == got.high == (None, None)


def test_the_seed_is_that_of_the_resamples():
    problems = [problem(str(i)) for i in range(9)]
    samples = [row(str(i), j, "correct" if j < i else "wrong") for i in range(9) for j in range(9)]
    assert len({summarise("tiny", problems, samples, seed=seed).low for seed in range(4)}) > 1


def test_kinds_without_a_vote_have_no_majority():
    got = summarise("code", [problem("a", domain="code")], four("a", ["correct", "wrong"]))
    assert got.majority is None and got.accuracy == 0.5


@pytest.mark.parametrize(
    ("samples", "match"),
    [
        ([], "tiny: 2 of 2 problems have fewer samples than 1, the first 'a', 'b'"),
        (four("a", ["correct"] * 2), "1 of 2 problems have fewer samples than 2, the first 'b'"),
        ([*four("a", ["correct"] * 2), *four("b", ["correct"])], "1 of 2 .* the first 'b'.*finish"),
        ([row("a"), row("a")], "problem 'a' sample 0 is given twice"),
        ([row("c")], "problem 'c' sample 0 is of no problem of the set"),
        ([row("a", verdict="fine")], "verdict 'fine'; expected one of correct, wrong"),
        ([row("a", verdict=None)], "verdict None"),
    ],
)
def test_samples_that_are_no_whole_set_are_refused(samples, match):
    with pytest.raises(ValueError, match=match) as caught:
        summarise("tiny", [problem("a"), problem("b")], samples)
    assert "\n" not in str(caught.value)
