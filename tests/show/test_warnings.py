"""What is off with a problem's rollouts is said, with the key that has a say in it; what is fine is not."""

import pytest
from tiny_runs import tiny

from exprl_jax.show.warnings import rollout_warnings, score_warnings


def segment(score=0.5, **changes):
    return {"score": score, "asked": True, "cut": False, "judge": None} | changes


def rollout(number, *segments, **changes):
    row = {"rollout": number, "response": "Six.", "ended": True, "verdict": "correct", "segments": list(segments)}
    return row | changes


def record(*rollouts, route="outcome", live=True):
    return {"rollouts": list(rollouts), "route": route, "live": live, "judge": {}}


def told(config, made):
    return rollout_warnings(made, 24) + score_warnings(made, config)


FINE = [rollout(0, segment(0.25)), rollout(1, segment(0.75), verdict="wrong")]


def test_a_group_that_is_fine_has_none():
    assert told(tiny("outcome"), record(*FINE)) == []
    halves = [rollout(0, segment(0.25), segment(0.5)), rollout(1, segment(0.75))]
    assert told(tiny("process"), record(*halves, route="process")) == []


def odd(*segments, **changes):
    """A fine group and one rollout more."""
    return record(*FINE, rollout(2, *(segments or [segment()]), **changes))


OVERLONG = record(FINE[0], rollout(1, segment(None, asked=False), ended=False))
EQUAL, NEAR = ([rollout(0, segment(0.5)), rollout(1, segment(other))] for other in (0.5, 0.52))
MANY = rollout(0, *(segment(0.1 * n) for n in range(3)))


@pytest.mark.parametrize(
    "arm, made, starts",
    [
        (
            "outcome",
            OVERLONG,
            [
                "rollout 1: no end within max_tokens = 24",
                "rollout 1: not given to the judge, advantage.overlong = 'penalty'",
            ],
        ),
        ("outcome", odd(response=" "), ["rollout 2: nothing but the end"]),
        ("outcome", odd(verdict="missing"), ["rollout 2: no verdict"]),
        ("outcome", odd(verdict="timed_out"), ["rollout 2: the verifier ran into"]),
        ("outcome", odd(verdict="no_answer"), ["rollout 2: no answer that the"]),
        ("text", odd(segment(None, judge="Good.")), ["1 of 3 scores were not given: 1 answered without a score"]),
        ("text", odd(segment(None, judge="Go", cut=True)), ["1 of 3 scores were not given: 1 cut at judge.max_tokens"]),
        ("text", odd(segment(None)), ["1 of 3 scores were not given"]),
        ("outcome", record(*EQUAL, live=False), ["all scores of the group are equal, 0.5"]),
        (
            "outcome",
            record(*NEAR, live=False),
            ["no advantage in this group: its scores spread by 0.014, advantage.min_logits_spread"],
        ),
        ("process", record(*FINE, route="process"), ["no segments: segments.rule = 'stride:8' cuts no rollout"]),
        ("process", record(MANY, route="process"), ["segments.max_segments = 3 is reached"]),
    ],
)
def test_what_is_off_is_said(arm, made, starts):
    lines = told(tiny(arm), made)
    assert len(lines) == len(starts)
    for line, start in zip(lines, starts, strict=True):
        assert line.startswith(start)


def test_several_rollouts_are_named_and_all_are_all():
    some = record(*FINE, *(rollout(n, segment(), verdict="missing") for n in (2, 3)))
    assert rollout_warnings(some, 24) == ["rollouts 2, 3: no verdict; whether they are right is not known"]
    every = record(*(rollout(n, segment(), verdict="missing") for n in (0, 1)))
    assert rollout_warnings(every, 24) == ["all 2 rollouts: no verdict; whether they are right is not known"]
