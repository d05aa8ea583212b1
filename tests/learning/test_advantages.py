import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exprl_jax import config
from exprl_jax.learning import advantages
from tests.oracles import learning_numpy as oracle

MISSING = oracle.MISSING
ESTIMATORS = {"delta_norm": advantages.delta_norm, "end_norm": advantages.end_norm, "group_norm": advantages.group_norm}


def how(estimator, **changes):
    settings = dict(
        estimator=estimator, std_normalise=True, min_spread=0.0, overlong="zero_score", overlong_penalty=-1.0,
        missing="drop_segment",
    )  # fmt: skip
    return config.Advantage(**(settings | changes))


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
    assigned = advantages.assign(*pack([[(0.5, 1), (0.5, 1)]]), overlong, how("end_norm"))
    assert assigned.advantage_PGN[0].tolist() == [[0, 0], [-0.5, 1]]  # released: −s_T everywhere
    assert assigned.counted_PGN.all()


def test_single_segment_is_neither_rewarded_nor_punished():
    assert advantages.delta_norm(*pack([[(0.25,), (1,)]]))[0].ravel().tolist() == [0, 0]  # released: +s


def test_missing_outcome_leaves_the_group_statistics():
    score, valid, count = pack([[(1,), (0.5,), (MISSING,), (0,)]])
    assigned = advantages.assign(score, valid, count, np.zeros((1, 4), bool), how("grpo"))
    np.testing.assert_allclose(assigned.advantage_PGN[0, :, 0], [1, 0, 0, -1], atol=1e-5)  # released: a fourth reward 0
    assert assigned.counted_PGN[0, :, 0].tolist() == [True, True, False, True]


def test_outcome_advantage_is_on_every_token():
    score, valid, count = pack([[(1,), (0,)]])
    assigned = advantages.assign(score, valid, count, np.zeros((1, 2), bool), how("grpo", std_normalise=False))
    mask = np.array([[[True] * 4, [True] * 3 + [False]]])
    advantage, _ = advantages.to_tokens(
        assigned.advantage_PGN, assigned.counted_PGN, np.array([[[4], [3]]]), mask
    )
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
        plain = advantages.assign(*packed, overlong, how(name))
        moved = advantages.assign(*(x[:, order] for x in packed), overlong[:, order], how(name))
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
    for name in ("grpo", "delta_norm", "group_norm"):
        assigned = advantages.assign(score, valid, count, overlong, how(name, std_normalise=std_normalise))
        assert (assigned.advantage_PGN == 0).all() and assigned.counted_PGN.all() and not assigned.live_P.any()


# The rules of `assign`.


def test_too_few_valid_rollouts_give_nothing():
    score, valid, count = pack([[(1,), (MISSING,)], [(MISSING,), (MISSING,)], [(1,), (0,)]])
    assigned = advantages.assign(score, valid, count, np.zeros((3, 2), bool), how("grpo"))
    assert assigned.live_P.tolist() == [False, False, True]
    assert (assigned.advantage_PGN[:2] == 0).all()
    assert assigned.counted_PGN[..., 0].tolist() == [[True, False], [False, False], [True, True]]


def test_small_spread_is_no_signal():
    score, valid, count = pack([[(0.50,), (0.52,)], [(0.2,), (0.8,)]])
    assigned = advantages.assign(
        score, valid, count, np.zeros((2, 2), bool), how("grpo", min_spread=0.1, std_normalise=False)
    )
    np.testing.assert_allclose(assigned.advantage_PGN[..., 0], [[0, 0], [-0.3, 0.3]], atol=1e-6)
    assert assigned.live_P.tolist() == [False, True]


def test_missing_rules():
    groups = [[(0.5, MISSING, 1), (0.25, 0.5)]]
    overlong = np.zeros((1, 2), bool)
    segment = advantages.assign(*pack(groups), overlong, how("delta_norm"))
    assert segment.counted_PGN[0].tolist() == [[True, False, False], [True, True, False]]
    rollout = advantages.assign(*pack(groups), overlong, how("delta_norm", missing="drop_rollout"))
    assert rollout.counted_PGN[0].tolist() == [[False] * 3, [True, True, False]]
    assert (rollout.advantage_PGN[~rollout.counted_PGN] == 0).all()
    # The dropped rollout leaves the baseline too: what remains is centred on its own mean.
    rollout = advantages.assign(*pack(groups), overlong, how("group_norm", missing="drop_rollout"))
    np.testing.assert_allclose(rollout.advantage_PGN[0, 1, :2], [-0.125, 0.125])


@pytest.mark.parametrize(
    "rule, advantage, counted",
    [
        ("zero_score", [0.5, 0, -0.5, 0], [True, True, True, True]),
        ("mask", [0.25, -0.25, 0, 0], [True, True, False, True]),
        ("penalty", [0.25, -0.25, -2, 0], [True, True, True, True]),
    ],
)
def test_overlong_rules_on_outcomes(rule, advantage, counted):
    # The third rollout is overlong, and its score is not even known.  The fourth has the mean of those that count.
    rewards = {"zero_score": (1.0, 0.5, MISSING, 0.5)}.get(rule, (1.0, 0.5, MISSING, 0.75))
    packed = pack([[(r,) for r in rewards]])
    overlong = np.array([[False, False, True, False]])
    options = how("grpo", overlong=rule, overlong_penalty=-2.0, std_normalise=False)
    assigned = advantages.assign(*packed, overlong, options)
    np.testing.assert_allclose(assigned.advantage_PGN[0, :, 0], advantage, atol=1e-7)
    assert assigned.counted_PGN[0, :, 0].tolist() == counted
    assert assigned.live_P.all()


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
    assigned = advantages.assign(*packed, overlong, how(estimator))
    assert assigned.advantage_PGN[0].tolist() == [others, zero] and assigned.counted_PGN.all()
    masked = advantages.assign(*packed, overlong, how(estimator, overlong="mask"))
    assert not masked.counted_PGN[0, 1].any() and (masked.advantage_PGN[0, 1] == 0).all()
    penalty = advantages.assign(*packed, overlong, how(estimator, overlong="penalty"))
    assert penalty.counted_PGN[0, 1].all() and (penalty.advantage_PGN[0, 1] == -1).all()
    np.testing.assert_array_equal(penalty.advantage_PGN[0, 0], masked.advantage_PGN[0, 0])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s, v, c, o: (s, v, c + 5, o), "expected 0 to 2"),
        (lambda s, v, c, o: (s * np.nan, v, c, o), "not finite"),
    ],
)
def test_assign_refuses(change, message):
    arguments = (*pack([[(0.5, 1), (0.25, 0.5)]]), np.zeros((1, 2), bool))
    with pytest.raises(ValueError, match=message):
        advantages.assign(*change(*arguments), how("delta_norm"))
    with pytest.raises(ValueError, match="expected 1 with"):
        advantages.assign(*arguments, how("grpo"))


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
