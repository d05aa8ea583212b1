"""A wave's life: sampled again where nothing can be learned of it, verified once, rewarded by its route."""

import contextlib
import dataclasses
import types

import jax
import numpy as np
import pytest
from tiny_runs import LONG, tiny

from exprl_jax import programs
from exprl_jax.kinds import KINDS
from exprl_jax.reward.judge import Judgements
from exprl_jax.reward.routes import ROUTES
from exprl_jax.reward.verifiers.verdict import Verdict
from exprl_jax.rl_run import open_run
from exprl_jax.rollout.usage import usage_metrics
from exprl_jax.run.clock import Clock
from exprl_jax.wave import Wave, WaveRequest, add_verdict_rewards, finish_wave, sample_wave, start_wave, verify_wave


@pytest.fixture(scope="module")
def scoring():
    """Scores a wave of a policy under changed settings; half of its groups are without spread at first."""
    base = tiny("outcome", LONG | {"advantage.overlong": "keep", "steps": 1})
    with contextlib.ExitStack() as stack:
        run = open_run(base, stack)
        policy = run.frozen[base.reference]
        problems = run.problems[: base.rollout.wave]

        def score(max_resample, min_spread):
            rollout = dataclasses.replace(base.rollout, max_resample=max_resample)
            advantage = dataclasses.replace(base.advantage, min_logits_spread=min_spread)
            config = dataclasses.replace(base, rollout=rollout, advantage=advantage)
            changed, clock, index_P = dataclasses.replace(run, config=config), Clock(), np.arange(len(problems))
            request = WaveRequest(problems, index_P, step=0, attempt=0, live_P=np.ones(len(problems), bool))
            return finish_wave(changed, policy, start_wave(changed, policy, request, clock), clock)

        first = score(0, 0.0)
        spread = np.median(first.judgements.score_PGN[..., 0].std(-1, ddof=1))
        yield lambda max_resample: score(max_resample, spread), first


def same_group(a, b, p):
    """Whether two scored waves hold the same group, bit for bit."""
    ours, theirs = ([*jax.tree.leaves(x.wave.rollouts), *x.judgements.arrays.values(), *x.advantages] for x in (a, b))
    equal = all(np.array_equal(x[p], y[p]) for x, y in zip(ours, theirs, strict=True))
    return equal and a.wave.responses[p] == b.wave.responses[p] and list(a.verdicts[p]) == list(b.verdicts[p])


def test_groups_without_spread_are_sampled_again_and_others_left_alone(scoring):
    score, _ = scoring
    before, once, twice = score(0), score(1), score(2)
    dead = ~before.advantages.live_P
    assert 2 <= dead.sum() <= 6 and not before.resampled_P.any()
    for p in range(len(dead)):
        assert same_group(before, once, p) == (not dead[p])
        assert same_group(once, twice, p) == bool(once.advantages.live_P[p])
    np.testing.assert_array_equal(once.resampled_P, dead)
    np.testing.assert_array_equal(twice.resampled_P, dead.astype(int) + ~once.advantages.live_P)
    assert once.advantages.live_P.sum() > before.advantages.live_P.sum()


def test_what_was_thrown_away_is_counted_as_work(scoring):
    score, _ = scoring
    before, once = score(0), score(1)
    dead = ~before.advantages.live_P
    kept = once.wave.rollouts.mask_PGR[dead].sum()
    assert once.sampled == before.sampled + kept
    assert once.judgements.tokens > before.judgements.tokens


def test_a_group_that_stays_without_spread_is_sampled_no_more_than_allowed(scoring):
    score, first = scoring
    spread = first.judgements.score_PGN[..., 0].std(-1, ddof=1)
    assert spread.max() < 1
    for limit in (1, 3):
        resampled = score(limit).resampled_P
        assert resampled.max() <= limit


def test_an_attempt_has_random_numbers_of_its_own_and_the_first_those_of_a_run_without(scoring):
    score, first = scoring
    before, once = score(0), score(1)
    np.testing.assert_array_equal(before.wave.rollouts.tokens_PGR, first.wave.rollouts.tokens_PGR)
    dead = ~before.advantages.live_P
    ours, theirs = once.wave.rollouts.tokens_PGR[dead], before.wave.rollouts.tokens_PGR[dead]
    assert (ours != theirs).any((-1, -2)).all()
    # Every rollout of the group is new, also its first token for most of them.
    assert (ours[..., 0] != theirs[..., 0]).mean() > 0.5


def test_decode_slots_change_no_rollout_and_are_counted():
    """Two slots for a wave's 16 rows on each of two devices, and pages for half of what they may need."""
    config = tiny("outcome", {"rollout.prompts": 8, "mesh.data": 2, "mesh.model": 4})
    with contextlib.ExitStack() as stack:
        run = open_run(config, stack)
        policy, problems = run.frozen[config.reference], run.problems[: config.rollout.wave]
        request = WaveRequest(problems, np.arange(len(problems)), 0, 0, np.ones(len(problems), bool))
        sizes = dict(max_tokens=config.rollout.max_tokens, wave=config.rollout.wave)
        waves = []
        for slots in ({}, {"slots": 2}, {"slots": 2, "expected_tokens": 12}):
            sampler = programs.build_sampler(run.policy, run.mesh, **sizes, **slots)
            waves.append(sample_wave(dataclasses.replace(run, sampler=sampler), policy, request))
    for wave in waves[1:]:
        np.testing.assert_array_equal(wave.rollouts.tokens_PGR, waves[0].rollouts.tokens_PGR)
        np.testing.assert_allclose(wave.rollouts.logp_PGR, waves[0].rollouts.logp_PGR, atol=1e-5)
    together, queued, paged = (usage_metrics(wave.usage) for wave in waves)
    lengths = waves[0].rollouts.mask_PGR.sum(-1)
    assert together["rollout/occupancy"] == lengths.mean() / lengths.max()
    assert together["rollout/pages"] is None and queued["rollout/pages"] is None and 0 < paged["rollout/pages"] <= 1
    assert waves[1].usage[0].busy == lengths.sum() and waves[1].usage[0].slots == 4
    assert usage_metrics([*waves[1].usage] * 2) == queued
    assert usage_metrics([])["rollout/occupancy"] is None


def test_open_ended_groups_that_are_left_alone_are_not_verified_again():
    """A judge costs something, an endpoint money."""
    problems = [types.SimpleNamespace(kind=kind, traits=KINDS[kind]) for kind in ("science", "science", "math")]
    asked = []
    judge = types.SimpleNamespace(submit_verify=lambda problems, responses: asked.append(responses) or responses)
    wave = Wave(problems, None, [[[2], [3]], [[], []], [[1], [1]]], [["a", "b"], ["", ""], ["c", "d"]])
    run = types.SimpleNamespace(judge=judge)
    assert verify_wave(run, wave, np.array([True, True, True])) == [["a", "b"], [], []]
    assert asked.pop() == [["a", "b"], [], []]
    # Nor by a process that shares the rows with one that asks.
    assert verify_wave(run, wave, np.array([False, True, True])) == [[], [], []]


def test_verdicts_are_the_rewards_of_sparse_problems():
    """1 for correct, 0 for anything else, none where the verifier failed; others keep the judge's."""
    verdicts = [
        [Verdict.correct, Verdict.wrong, Verdict.timed_out],
        [Verdict.missing, Verdict.no_answer, Verdict.correct],
        [Verdict.correct] * 3,
    ]
    score, valid = np.full((3, 3, 2), 0.5), np.ones((3, 3, 2), bool)
    judgements = Judgements(score, valid, valid, ~valid, {}, 0)
    run = types.SimpleNamespace(route=ROUTES.get)
    wave = Wave(["verifier", "verifier", "process"], None, [[[2], [2], [2]], [[2], [2], []], [[1, 2]] * 3], None)
    got = add_verdict_rewards(run, wave, judgements, verdicts)
    assert got.score_PGN[..., 0].tolist() == [[1, 0, 0], [0, 0, 1], [0.5] * 3]
    assert got.valid_PGN[:2].tolist() == [[[True, False]] * 3, [[False, False], [True, False], [False, False]]]
    np.testing.assert_array_equal(got.score_PGN[2], score[2])
    np.testing.assert_array_equal(got.valid_PGN[2], valid[2])
