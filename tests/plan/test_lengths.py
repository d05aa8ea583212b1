"""A step at likely lengths: against simulated rows, by hand, and against the same calls at their budgets."""

import json

import numpy as np
import pytest
from jax.sharding import AbstractMesh
from tiny_runs import config_dict

from exprl_jax.plan.calls import calls_of
from exprl_jax.plan.costs import seen_pairs
from exprl_jax.plan.lengths import Lengths, at_lengths, parse_lengths, quantiles, slot_steps
from exprl_jax.plan.memory import token_bytes, weight_bytes
from exprl_jax.plan.models import known_model
from exprl_jax.resolve import resolve

CAP = 16_384
MESH = AbstractMesh((2, 8), ("data", "model"))


def test_lengths_are_those_of_a_cut_lognormal():
    """Their mean is as asked, their median and their share at the cap those of many draws."""
    got = quantiles(Lengths(9000, 0.6, 8), 2000, CAP)
    assert abs(got.mean() - 9000) < 10 and got.max() == CAP and (np.diff(got) >= 0).all()
    drawn = np.exp(0.6 * np.random.default_rng(0).normal(size=200_000))
    scale = next(s for s in np.arange(5000.0, 20_000, 5) if np.minimum(s * drawn, CAP).mean() >= 9000)
    drawn = np.minimum(scale * drawn, CAP)
    assert np.median(got) == pytest.approx(np.median(drawn), rel=0.01)
    assert (got == CAP).mean() == pytest.approx((drawn == CAP).mean(), abs=0.01)


def test_lengths_of_a_run_are_its_last_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    share = float((quantiles(Lengths(900, 0.7, 1), 1000, 2048) == 2048).mean())
    row = {"response/length_mean": 900.0, "response/overlong": share, "segments/mean": 5.0}
    first = {"response/length_mean": 10.0, "response/overlong": 0.0, "segments/mean": 1.0}
    path.write_text("".join(json.dumps(x) + "\n" for x in [first, {"response/length_mean": None}, *[row] * 8]))
    got = parse_lengths(str(path), 2048)
    assert got.mean == 900 and got.segments == 5 and got.spread == pytest.approx(0.7, rel=0.05)


@pytest.mark.parametrize(
    "text, said",
    [
        ("9000", "expected mean,spread,segments, such as 9000,0.6,8"),
        ("9000,x,8", "expected mean,spread,segments"),
        ("20000,0.6,8", "expected a mean between 0 and rollout.max_tokens = 16384"),
        ("9000,0.6,0", "one segment or more"),
        ("nothing.jsonl", "nothing.jsonl cannot be read"),
    ],
)
def test_lengths_that_cannot_be_are_refused(text, said):
    with pytest.raises(ValueError, match=said):
        parse_lengths(text, CAP)


def test_rows_take_the_first_free_slot():
    assert slot_steps([3, 1, 1, 5], 2) == 7 and slot_steps([3, 1, 1, 5], 1) == 10 and slot_steps([4], 3) == 4


def stage1(**changes):
    config = resolve(config_dict("stage1", "outcome", changes))
    calls = calls_of(config, MESH)
    return (
        config,
        {c.name: c for c in calls},
        {c.name: c for c in at_lengths(calls, config, MESH, Lengths(9000, 0.6, 8))},
    )


def test_waves_wait_for_their_longest_and_slots_do_not():
    config, budget, likely = stage1()
    # Of 40 rows one reaches the cap in every wave: nothing is gained.
    assert likely["sample"].steps == CAP and likely["sample"].cost.bytes == pytest.approx(budget["sample"].cost.bytes)
    queue = {"rollout.wave": 18, "rollout.slots": 36, "rollout.expected_tokens": 9216}
    _, most, slots = stage1(**queue)
    call, model = slots["sample"], known_model(config.policy)
    # Of 90 rows in 36 slots a shard; at least the mean's share of steps, at most the longest more.
    assert 90 * 9000 / 36 * 0.98 < call.steps < 90 * 9000 / 36 + CAP < most["sample"].steps
    weights, token = weight_bytes(model, MESH), token_bytes(model, MESH)
    pairs = (call.cost.bytes - call.steps * weights) / token
    lengths = quantiles(Lengths(9000, 0.6, 8), 360, CAP)
    mean = sum(seen_pairs(int(n), 4096 + int(n)) for n in lengths) / 4  # two waves, two shards
    assert mean <= pairs < 1.1 * mean
    assert slots["prefill"] == most["prefill"] and call.inside == most["sample"].inside


def test_a_judge_reads_what_there_is_and_updates_what_rows_hold():
    _, budget, likely = stage1()
    assert likely["judge"].times == budget["judge"].times
    assert 0.7 < likely["judge"].cost.bytes / budget["judge"].cost.bytes < 1
    for name in ("token_logp", "token_logp (reference)", "train_step"):
        share = likely[name].steps / budget[name].steps
        assert 0.6 < share < 0.9 and likely[name].cost.flops == pytest.approx(share * budget[name].cost.flops)
    # Almost every row at its budget is the plan at budgets.
    config = resolve(config_dict("stage1", "outcome"))
    calls = calls_of(config, MESH)
    for full, call in zip(calls, at_lengths(calls, config, MESH, Lengths(CAP - 1, 1.0, 8))):
        if full.name in ("sample", "train_step"):
            assert call.cost.bytes == pytest.approx(full.cost.bytes, rel=0.01), full.name


def test_what_samples_nothing_has_no_lengths():
    config = resolve(config_dict("tiny", "sft"))
    with pytest.raises(ValueError, match="--lengths: of a run with config.task = 'rl', got 'sft'"):
        at_lengths([], config, MESH, Lengths(10, 0.5, 1))
