import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exprl_jax import config
from exprl_jax.learning import advantages
from tests.oracles import learning_numpy as oracle

MISSING = oracle.MISSING
ESTIMATORS = {
    "delta_norm": advantages.delta_norm,
    "end_norm": advantages.end_norm,
    "group_norm": advantages.group_norm,
    "delta_group": advantages.delta_group,
}


STEPS, WHOLE = True, False


def config_of(estimator="delta_norm", **changes):
    settings = dict(
        estimator=estimator,
        one_segment="zero",
        rollout_estimator="grpo",
        std_normalise=True,
        min_spread=0.0,
        min_logits_spread=0.02,
        overlong="zero_score",
        overlong_penalty=-1.0,
        missing="drop_segment",
    )
    return config.Advantage(**(settings | changes))


def assigned(packed, overlong_PG, process_P, settings, logits_P=False):
    """`assign_advantages` where every problem has the same route and judge, or each its own."""
    process_P, logits_P = (np.broadcast_to(x, len(packed[0])) for x in (process_P, logits_P))
    return advantages.assign_advantages(*packed, overlong_PG, process_P, logits_P, settings)


def pack(groups):
    """[problem][rollout][segment] scores, None where missing → (score_PGN, NaN in all holes; valid_PGN; count_PG)."""
    N = max(len(scores) for group in groups for scores in group)
    score = np.full((len(groups), len(groups[0]), N), np.nan)
    for p, group in enumerate(groups):
        for g, scores in enumerate(group):
            score[p, g, : len(scores)] = [np.nan if s is MISSING else s for s in scores]
    count = np.array([[len(scores) for scores in group] for group in groups])
    return score, np.isfinite(score), count


def unpack(advantage, defined, count):
    """The defined advantages of every rollout, in one list; None where not defined, nothing for padding."""
    real = np.arange(advantage.shape[-1]) < count[..., None]
    return [a if d else MISSING for a, d in zip(advantage[real].tolist(), defined[real])]


def assert_same(ours, theirs):
    assert [a is MISSING for a in ours] == [a is MISSING for a in theirs]
    given_ours, given_theirs = ([a for a in x if a is not MISSING] for x in (ours, theirs))
    np.testing.assert_allclose(given_ours, given_theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "scores, delta, end",
    [
        ((0.5, 0.75, 1), (-0.5, 0.25, 0.25), (-0.5, -0.25, 1)),
        ((1,), (0,), (1,)),
        ((0.25, 0.25, 0.5), (-0.25, 0, 0.25), (-0.25, -0.25, 0.5)),
    ],
)
def test_golden_values(scores, delta, end):
    packed = pack([[scores]])
    for estimate, expected in ((advantages.delta_norm, delta), (advantages.end_norm, end)):
        advantage, defined = estimate(*packed)
        np.testing.assert_array_equal(advantage[0, 0], np.float32(expected))
        assert defined.all() and advantage.dtype == np.float32


def test_golden_group_baseline():
    advantage, _ = advantages.group_norm(*pack([[(0.5, 0.75, 1), (0.25, 0.25, 0.5)]]))
    np.testing.assert_allclose(0.75 - advantage[0, 0, 1], 0.541667, atol=1e-6)


def test_a_right_first_segment_is_never_worth_less_than_a_wrong_one_of_its_group():
    """`delta_norm` punishes it once what follows goes well."""
    packed = pack([[(0.5, 0.75, 1), (0.5, 0.75, 1), (0, 0, 0)]])
    assert advantages.delta_norm(*packed)[0][0, :, 0].tolist() == [-0.5, -0.5, 0]
    first = advantages.delta_group(*packed)[0][0, :, 0]
    np.testing.assert_allclose(first, [1 / 6, 1 / 6, -1 / 3], atol=1e-6)


# What the authors' code gives in these cases, and must not be given here.


def test_missing_first_score_is_dropped_not_a_sentinel():
    advantage, defined = advantages.delta_norm(*pack([[(MISSING, 0.75, 1)]]))
    assert advantage[0, 0].tolist() == [0, 0, 0.25]  # released: −101, .75, .25, all trained
    assert defined[0, 0].tolist() == [False, False, True]


def test_group_baseline_ignores_padding():
    group = [[(0.5, 0.75, 1), (0.25, 0.25, 0.5)]]
    score, valid, count = pack(group)
    wide = [np.pad(x, ((0, 0), (0, 0), (0, 1000))) for x in (score, valid)]
    advantage, defined = advantages.group_norm(*wide, count)  # released: divided by the padded width, so no baseline
    np.testing.assert_array_equal(advantage[..., :3], advantages.group_norm(score, valid, count)[0])
    assert not defined[..., 3:].any()


def test_last_segment_of_end_norm_keeps_its_score():
    assert advantages.end_norm(*pack([[(0.5, 1)]]))[0][0, 0, -1] == 1  # released: 0


def test_overlong_end_norm_is_zero():
    overlong = np.array([[True, False]])
    got = assigned(pack([[(0.5, 1), (0.5, 1)]]), overlong, STEPS, config_of("end_norm"))
    assert got.advantage_PGN[0].tolist() == [[0, 0], [-0.5, 1]]  # released: −s_T everywhere
    assert got.counted_PGN.all()


def test_single_segment_is_neither_rewarded_nor_punished():
    assert advantages.delta_norm(*pack([[(0.25,), (1,)]]))[0].ravel().tolist() == [0, 0]  # released: +s


def test_the_released_code_rewards_a_single_segment_with_its_score():
    groups = [[[0.75], [0.25, 0.5], [MISSING], [0.5, 0.75, 1.0]]]
    never = np.zeros((1, 4), bool)
    released = assigned(pack(groups), never, STEPS, config_of(one_segment="score"))
    by_equation = assigned(pack(groups), never, STEPS, config_of())
    assert released.advantage_PGN[0, 0].tolist() == [0.75, 0, 0] and by_equation.advantage_PGN[0, 0].tolist() == [
        0,
        0,
        0,
    ]
    assert (released.advantage_PGN[0, 1:] == by_equation.advantage_PGN[0, 1:]).all()
    assert (released.counted_PGN == by_equation.counted_PGN).all() and not released.counted_PGN[0, 2].any()
    overlong = assigned(pack(groups), ~never, STEPS, config_of(one_segment="score"))
    assert not overlong.advantage_PGN.any()
    other = assigned(pack(groups), never, STEPS, config_of("end_norm", one_segment="score"))
    assert (other.advantage_PGN == assigned(pack(groups), never, STEPS, config_of("end_norm")).advantage_PGN).all()


def test_missing_outcome_leaves_the_group_statistics():
    got = assigned(pack([[(1,), (0.5,), (MISSING,), (0,)]]), np.zeros((1, 4), bool), WHOLE, config_of())
    np.testing.assert_allclose(got.advantage_PGN[0, :, 0], [1, 0, 0, -1], atol=1e-5)  # released: a fourth reward 0
    assert got.counted_PGN[0, :, 0].tolist() == [True, True, False, True]


def test_outcome_advantage_is_on_every_token():
    got = assigned(pack([[(1,), (0,)]]), np.zeros((1, 2), bool), WHOLE, config_of(std_normalise=False))
    mask = np.array([[[True] * 4, [True] * 3 + [False]]])
    advantage, _ = advantages.to_tokens(got.advantage_PGN, got.counted_PGN, np.array([[[4], [3]]]), mask)
    assert advantage[0].tolist() == [[0.5] * 4, [-0.5] * 3 + [0]]  # released mixed runs: the EOS token alone, raw score


# Oracle.

SCORES = st.sampled_from([MISSING, 0.0, 0.1, 0.25, 1 / 3, 0.5, 0.75, 1.0])
GROUPS = st.integers(1, 4).flatmap(
    lambda G: st.lists(
        st.lists(st.lists(SCORES, min_size=1, max_size=5), min_size=G, max_size=G), min_size=1, max_size=3
    )
)


@given(GROUPS)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_process_estimators_match_the_equations(groups):
    packed = pack(groups)
    expected = {
        "delta_norm": [[oracle.delta_norm(scores) for scores in group] for group in groups],
        "end_norm": [[oracle.end_norm(scores) for scores in group] for group in groups],
        "group_norm": [oracle.group_norm(group) for group in groups],
        "delta_group": [oracle.delta_group(group) for group in groups],
    }
    for name, estimate in ESTIMATORS.items():
        flat = [a for group in expected[name] for rollout in group for a in rollout]
        assert_same(unpack(*estimate(*packed), packed[2]), flat)


@given(st.lists(SCORES, min_size=1, max_size=8), st.booleans())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_grpo_matches_the_equation(rewards, std_normalise):
    score, valid, _ = pack([[(r,) for r in rewards]])
    advantage, live = advantages.grpo(score[..., 0], valid[..., 0], std_normalise=std_normalise, min_spread=0.0)
    expected = [0.0 if a is MISSING else a for a in oracle.grpo(rewards, std_normalise)]
    np.testing.assert_allclose(advantage[0], expected, rtol=1e-6, atol=1e-7)
    assert live[0] == any(a != 0 for a in expected)


@pytest.mark.parametrize(
    "rewards, rloo, maxrl",
    [
        ([0.0, 0.0, 0.0, 1.0], [-1 / 3, -1 / 3, -1 / 3, 1.0], [-1.0, -1.0, -1.0, 3.0]),
        ([0.0, 1.0, 1.0, 1.0], [-1.0, 1 / 3, 1 / 3, 1 / 3], [-1.0, 1 / 3, 1 / 3, 1 / 3]),
        ([0.25, 0.75], [-0.5, 0.5], [-0.5, 0.5]),
        ([0.0, 0.0], [0.0, 0.0], [0.0, 0.0]),
        ([0.5, 0.5], [0.0, 0.0], [0.0, 0.0]),
        ([0.5, MISSING], [0.0, 0.0], [0.0, 0.0]),
        ([1.0, 0.0, MISSING], [1.0, -1.0, 0.0], [1.0, -1.0, 0.0]),
    ],
)
def test_golden_values_of_whole_rollout_estimators(rewards, rloo, maxrl):
    score, valid, _ = pack([[[reward] for reward in rewards]])
    for name, expected in (("rloo", rloo), ("maxrl", maxrl)):
        advantage, live = advantages.ROLLOUT_ESTIMATORS[name](score[..., 0], valid[..., 0], min_spread=0.0)
        np.testing.assert_allclose(advantage[0], expected, atol=1e-7)
        assert live[0] == any(expected)


@given(
    st.lists(st.one_of(st.just(MISSING), st.floats(0, 1)), min_size=2, max_size=8), st.sampled_from(["rloo", "maxrl"])
)
def test_whole_rollout_estimators_match_their_equations(rewards, name):
    score, valid, _ = pack([[[reward] for reward in rewards]])
    advantage, live = advantages.ROLLOUT_ESTIMATORS[name](score[..., 0], valid[..., 0], min_spread=0.0)
    expected = [0.0 if a is MISSING else a for a in getattr(oracle, name)(rewards)]
    np.testing.assert_allclose(advantage[0], expected if live[0] else np.zeros(len(rewards)), rtol=1e-5, atol=1e-6)
    assert live[0] or np.ptp([r for r in rewards if r is not MISSING] or [0]) < 1e-6


@pytest.mark.parametrize("name", ["rloo", "maxrl"])
def test_a_spread_below_the_least_is_no_signal_to_any_estimator(name):
    score = np.array([[0.5, 0.51], [0.0, 1.0]])
    advantage, live = advantages.ROLLOUT_ESTIMATORS[name](score, np.ones((2, 2), bool), min_spread=0.1)
    assert live.tolist() == [False, True] and not advantage[0].any() and advantage[1].any()


@pytest.mark.parametrize("name", ["rloo", "maxrl"])
def test_the_config_chooses_the_whole_rollout_estimator(name):
    rewards = [0.0, 0.0, 1.0]
    rules = config_of(rollout_estimator=name, std_normalise=False)
    made = assigned(pack([[[reward] for reward in rewards]]), np.zeros((1, 3), bool), WHOLE, rules)
    np.testing.assert_allclose(made.advantage_PGN[0, :, 0], getattr(oracle, name)(rewards), rtol=1e-6)


# Properties.

REWARDS = hnp.arrays(np.float64, (2, 6), elements=st.integers(0, 100).map(lambda n: n / 100))


@given(REWARDS, st.floats(-3, 3), st.floats(0.5, 4))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_grpo_sums_to_zero_and_ignores_shift_and_scale(reward, shift, scale):
    valid = np.ones(reward.shape, bool)
    options = dict(std_normalise=True, min_spread=0.0)
    advantage, live = advantages.grpo(reward, valid, **options)
    np.testing.assert_allclose(advantage.sum(-1), 0, atol=1e-5)
    np.testing.assert_allclose(advantages.grpo(scale * reward, valid, **options)[0], advantage, rtol=1e-3, atol=1e-6)
    # Within the rounding of reward + shift, ties included, which is why the shift is a multiple of 1/8.
    shifted = advantages.grpo(reward + np.round(shift * 8) / 8, valid, **options)[0]
    np.testing.assert_allclose(shifted[live], advantage[live], rtol=1e-3, atol=1e-6)


@given(GROUPS, st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_assign_follows_permutation_within_a_group(groups, random):
    order = list(range(len(groups[0])))
    random.shuffle(order)
    for name in ESTIMATORS:
        packed = pack(groups)
        overlong = np.arange(len(order))[None].repeat(len(groups), 0) % 3 == 1
        routes = (packed[2] > 1).any(-1)  # a whole rollout has one score
        plain = assigned(packed, overlong, routes, config_of(name))
        moved = assigned([x[:, order] for x in packed], overlong[:, order], routes, config_of(name))
        np.testing.assert_allclose(moved.advantage_PGN, plain.advantage_PGN[:, order], atol=1e-7)
        np.testing.assert_array_equal(moved.counted_PGN, plain.counted_PGN[:, order])


@given(
    hnp.arrays(np.float64, (2, 3, 5), elements=st.floats(0, 1)),
    hnp.arrays(np.int64, (2, 3), elements=st.integers(1, 5)),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_delta_norm_sums_to_zero(score, count):
    advantage, _ = advantages.delta_norm(score, np.ones(score.shape, bool), count)
    np.testing.assert_allclose(advantage.sum(-1), 0, atol=1e-6)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.7])
@pytest.mark.parametrize("std_normalise", [True, False])
def test_equal_rewards_are_exactly_zero(value, std_normalise):
    score = np.full((1, 3, 1), value)
    valid, overlong = np.ones((1, 3, 1), bool), np.zeros((1, 3), bool)
    count = np.ones((1, 3), int)
    for route, name in ((WHOLE, "delta_norm"), (STEPS, "delta_norm"), (STEPS, "group_norm")):
        got = assigned((score, valid, count), overlong, route, config_of(name, std_normalise=std_normalise))
        assert (got.advantage_PGN == 0).all() and got.counted_PGN.all() and not got.live_P.any()


# The rules of `assign`.


def test_too_few_valid_rollouts_give_nothing():
    packed = pack([[(1,), (MISSING,)], [(MISSING,), (MISSING,)], [(1,), (0,)]])
    got = assigned(packed, np.zeros((3, 2), bool), WHOLE, config_of())
    assert got.live_P.tolist() == [False, False, True]
    assert (got.advantage_PGN[:2] == 0).all()
    assert got.counted_PGN[..., 0].tolist() == [[True, False], [False, False], [True, True]]


def test_small_spread_is_no_signal():
    packed = pack([[(0.50,), (0.52,)], [(0.2,), (0.8,)]])
    got = assigned(packed, np.zeros((2, 2), bool), WHOLE, config_of(min_spread=0.1, std_normalise=False))
    np.testing.assert_allclose(got.advantage_PGN[..., 0], [[0, 0], [-0.3, 0.3]], atol=1e-6)
    assert got.live_P.tolist() == [False, True]


def test_noise_of_a_judge_read_by_its_digits_is_no_signal():
    """A spread of 1e-4 in written scores is a difference; in expectations over digits it is rounding."""
    noise, signal = [[[0.5], [0.5001], [0.4999]]], [[[0.2], [0.5], [0.9]]]
    packed, none = pack(noise * 2 + signal * 2), np.zeros((4, 3), bool)
    made = assigned(packed, none, WHOLE, config_of(), logits_P=np.array([True, False, True, False]))
    assert made.live_P.tolist() == [False, True, True, True] and not made.advantage_PGN[0].any()
    np.testing.assert_array_equal(made.advantage_PGN[2], made.advantage_PGN[3])
    assert np.abs(made.advantage_PGN[1]).max() > 0.9
    kept = assigned(packed, none, WHOLE, config_of(min_logits_spread=0.0), logits_P=True)
    assert kept.live_P.all()


def test_missing_rules():
    groups = [[(0.5, MISSING, 1), (0.25, 0.5)]]
    overlong = np.zeros((1, 2), bool)
    segment = assigned(pack(groups), overlong, STEPS, config_of("delta_norm"))
    assert segment.counted_PGN[0].tolist() == [[True, False, False], [True, True, False]]
    rollout = assigned(pack(groups), overlong, STEPS, config_of("delta_norm", missing="drop_rollout"))
    assert rollout.counted_PGN[0].tolist() == [[False] * 3, [True, True, False]]
    assert (rollout.advantage_PGN[~rollout.counted_PGN] == 0).all()
    # The dropped rollout leaves the baseline too: what remains is centred on its own mean.
    rollout = assigned(pack(groups), overlong, STEPS, config_of("group_norm", missing="drop_rollout"))
    np.testing.assert_allclose(rollout.advantage_PGN[0, 1, :2], [-0.125, 0.125])


@pytest.mark.parametrize(
    "rule, advantage, counted",
    [
        ("zero_score", [0.5, 0, -0.5, 0], [True, True, True, True]),
        ("mask", [0.25, -0.25, 0, 0], [True, True, False, True]),
        ("penalty", [0.25, -0.25, -2, 0], [True, True, True, True]),
        ("keep", [0.25, -0.25, 0, 0], [True, True, False, True]),
    ],
)
def test_overlong_rules_on_outcomes(rule, advantage, counted):
    # The third rollout is overlong, and its score is not even known.  The fourth has the mean of those that count.
    rewards = {"zero_score": (1.0, 0.5, MISSING, 0.5)}.get(rule, (1.0, 0.5, MISSING, 0.75))
    packed = pack([[(r,) for r in rewards]])
    overlong = np.array([[False, False, True, False]])
    got = assigned(packed, overlong, WHOLE, config_of(overlong=rule, overlong_penalty=-2.0, std_normalise=False))
    np.testing.assert_allclose(got.advantage_PGN[0, :, 0], advantage, atol=1e-7)
    assert got.counted_PGN[0, :, 0].tolist() == counted
    assert got.live_P.all()


@pytest.mark.parametrize(
    "estimator, zero, others",
    [
        ("delta_norm", [0, 0], [-0.5, 0.5]),
        ("end_norm", [0, 0], [-0.5, 1]),
        ("group_norm", [-0.375, -0.375], [0.125, 0.625]),
    ],
)
def test_overlong_rules_on_steps(estimator, zero, others):
    packed = pack([[(0.5, 1), (0.25, MISSING)]])
    overlong = np.array([[False, True]])
    got = assigned(packed, overlong, STEPS, config_of(estimator))
    assert got.advantage_PGN[0].tolist() == [others, zero] and got.counted_PGN.all()
    masked = assigned(packed, overlong, STEPS, config_of(estimator, overlong="mask"))
    assert not masked.counted_PGN[0, 1].any() and (masked.advantage_PGN[0, 1] == 0).all()
    penalty = assigned(packed, overlong, STEPS, config_of(estimator, overlong="penalty"))
    assert penalty.counted_PGN[0, 1].all() and (penalty.advantage_PGN[0, 1] == -1).all()
    np.testing.assert_array_equal(penalty.advantage_PGN[0, 0], masked.advantage_PGN[0, 0])


@pytest.mark.parametrize("route", [STEPS, WHOLE])
def test_an_overlong_rollout_that_is_kept_is_like_any_other(route):
    packed = pack([[(0.5, 1), (0.25, 0.75)], [(0, 1), (1, 0.25)]] if route else [[(0.5,), (0.25,)], [(0,), (1,)]])
    for estimator in ESTIMATORS:
        kept = assigned(packed, np.array([[True, False], [True, True]]), route, config_of(estimator, overlong="keep"))
        ended = assigned(packed, np.zeros((2, 2), bool), route, config_of(estimator))
        for a, b in zip(kept, ended):
            np.testing.assert_array_equal(a, b)
        assert kept.live_P.all() and kept.counted_PGN.all()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s, v, c, o: (s, v, c + 5, o), "expected 0 to 2"),
        (lambda s, v, c, o: (s * np.nan, v, c, o), "not finite"),
    ],
)
def test_assign_refuses(change, message):
    *packed, overlong = change(*pack([[(0.5, 1), (0.25, 0.5)]]), np.zeros((1, 2), bool))
    with pytest.raises(ValueError, match=message):
        assigned(packed, overlong, STEPS, config_of())


def test_whole_rollouts_have_one_score():
    packed, overlong = pack([[(0.5, 1), (0.25, 0.5)], [(0.5,), (0.25,)]]), np.zeros((2, 2), bool)
    with pytest.raises(ValueError, match="got 2 scores a rollout where only whole rollouts are scored"):
        assigned(packed, overlong, [False, True], config_of())
    assigned(packed, overlong, [True, False], config_of())


# Mixed batches.

MIXED = st.lists(
    st.tuples(st.booleans(), st.lists(st.lists(SCORES, min_size=1, max_size=4), min_size=3, max_size=3)),
    min_size=2,
    max_size=4,
)


@given(
    MIXED,
    st.sampled_from(sorted(ESTIMATORS)),
    st.booleans(),
    st.sampled_from(["zero_score", "mask", "penalty", "keep"]),
    st.sampled_from(["drop_segment", "drop_rollout"]),
    st.randoms(use_true_random=False),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_each_problem_of_a_mixed_batch_has_what_it_would_have_alone(drawn, estimator, std, rule, missing, random):
    """A batch of one problem has one estimator, which the tests above hold to the equations."""
    routes = np.array([process for process, _ in drawn])
    groups = [group if process else [scores[:1] for scores in group] for process, group in drawn]
    overlong = np.array([[random.random() < 0.3 for _ in range(3)] for _ in groups])
    options = config_of(estimator, std_normalise=std, overlong=rule, missing=missing)
    together = assigned(pack(groups), overlong, routes, options)
    for p, group in enumerate(groups):
        alone = assigned(pack([group]), overlong[p : p + 1], routes[p : p + 1], options)
        N = alone.advantage_PGN.shape[-1]
        np.testing.assert_array_equal(together.advantage_PGN[p, :, :N], alone.advantage_PGN[0])
        np.testing.assert_array_equal(together.counted_PGN[p, :, :N], alone.counted_PGN[0])
        assert not together.advantage_PGN[p, :, N:].any() and not together.counted_PGN[p, :, N:].any()
        assert together.live_P[p] == alone.live_P[0]


@given(MIXED, st.sampled_from(sorted(ESTIMATORS)), st.booleans())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_each_problem_of_a_mixed_batch_has_its_own_equation(drawn, estimator, std_normalise):
    """Steps by the estimator, whole rollouts by their group's mean and deviation, missing scores left out of both."""
    routes = np.array([process for process, _ in drawn])
    groups = [group if process else [scores[:1] for scores in group] for process, group in drawn]
    score, valid, count = pack(groups)
    options = config_of(estimator, std_normalise=std_normalise)
    got = assigned((score, valid, count), np.zeros(count.shape, bool), routes, options)
    steps, defined = ESTIMATORS[estimator](score, valid, count)
    for p, (process, group) in enumerate(zip(routes, groups)):
        if process:
            np.testing.assert_array_equal(got.advantage_PGN[p], steps[p])
            np.testing.assert_array_equal(got.counted_PGN[p], defined[p])
            continue
        expected = oracle.grpo([scores[0] for scores in group], std_normalise)
        assert_same(unpack(got.advantage_PGN[p, :, :1], got.counted_PGN[p, :, :1], count[p]), expected)
        assert not got.counted_PGN[p, :, 1:].any()


def test_an_outcome_row_of_a_mixed_batch_has_its_advantage_on_every_token():
    packed = pack([[(0.5, 1), (0.25, 0.5)], [(1,), (0,)]])
    got = assigned(packed, np.zeros((2, 2), bool), [True, False], config_of(std_normalise=False))
    ends = np.array([[[2, 4], [1, 4]], [[4, 4], [3, 3]]])
    mask = np.ones((2, 2, 4), bool)
    mask[1, 1, 3] = False
    advantage, counted = advantages.to_tokens(got.advantage_PGN, got.counted_PGN, ends, mask)
    assert advantage[0].tolist() == [[-0.5, -0.5, 0.5, 0.5], [-0.25, 0.25, 0.25, 0.25]]
    assert advantage[1].tolist() == [[0.5] * 4, [-0.5] * 3 + [0]]
    np.testing.assert_array_equal(counted, mask)


# Segments to tokens.


@given(st.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_tokens_take_the_advantage_of_their_segment(data):
    P, G, R, N = 2, 2, 7, 3
    advantage = np.arange(1, P * G * N + 1, dtype=np.float32).reshape(P, G, N)
    lengths = [[data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=N)) for _ in range(G)] for _ in range(P)]
    ends, counted, mask = np.zeros((P, G, N), int), np.zeros((P, G, N), bool), np.zeros((P, G, R), bool)
    expected = np.zeros((P, G, R), np.float32)
    for p in range(P):
        for g in range(G):
            last = np.cumsum(lengths[p][g])
            ends[p, g] = np.append(last, [data.draw(st.sampled_from([last[-1], R, 99]))] * N)[:N]
            counted[p, g, : len(last)] = data.draw(st.lists(st.booleans(), min_size=len(last), max_size=len(last)))
            mask[p, g, : data.draw(st.integers(0, R))] = True
            for n, end in enumerate(last):
                for r in range(end - lengths[p][g][n], min(end, R)):
                    expected[p, g, r] = advantage[p, g, n] if counted[p, g, n] and mask[p, g, r] else 0
    values, loss_mask = advantages.to_tokens(advantage, counted, ends, mask)
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(loss_mask, expected != 0)
    assert values.dtype == np.float32


def test_to_tokens_refuses_ends_padded_with_zero():
    one = np.ones((1, 1, 2))
    with pytest.raises(ValueError, match="never decrease"):
        advantages.to_tokens(one, one > 0, np.array([[[3, 0]]]), np.ones((1, 1, 4), bool))
