"""The look at the first batch: each silent failure is said, with its cure, and a healthy batch is left in peace."""

import dataclasses

import pytest

from configs import tiny
from exprl_jax import config
from exprl_jax.resolve import resolve, to_dict
from exprl_jax.reward import probe
from exprl_jax.reward.statistics import METRICS

HEALTHY = {name: 0.5 for name in METRICS} | {
    "response/overlong": 0.1,
    "advantage/live_groups": 0.9,
    "judge/parsed": 1.0,
}


def settings(strict=False, arm="outcome", **judge):
    resolved = resolve(tiny.get_config(arm))
    return dataclasses.replace(resolved, probe=config.Probe(strict), judge=dataclasses.replace(resolved.judge, **judge))


def test_a_healthy_batch_is_left_in_peace(capsys):
    probe.probe_batch(HEALTHY, settings(strict=True))
    assert capsys.readouterr() == ("", "")


FAULTS = [
    ({"response/overlong": 0.6}, {}, ["60% of the rollouts were cut", "rollout.max_tokens = 24", "raise it"]),
    ({"advantage/live_groups": 0.25}, {}, ["only 25% of the groups have any advantage", "raise rollout.group"]),
    ({"judge/parsed": 0.1}, dict(readout="text"), ["10% of the judge's answers", "raise judge.max_tokens"]),
    ({"judge/parsed": 0.1}, dict(readout="logits"), ["10% of the judge's answers", "raise judge.max_trace_tokens"]),
    ({"judge/group_spread": 1e-4}, {}, ["differ by 0.0001", "that is noise", "min_logits_spread"]),
    ({"reward/std": 0.0}, {}, ["all scores are equal", "rollouts/step_000001.jsonl"]),
]


@pytest.mark.parametrize("fault, judge, words", FAULTS)
def test_each_fault_is_one_line_with_its_cure(fault, judge, words, capsys):
    execution = settings(**judge)
    probe.probe_batch(HEALTHY | fault, execution)
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("warning: probe: ") and err.count("\n") == 1
    assert all(word in err for word in words)
    with pytest.raises(ValueError, match="probe: .*config.probe.strict is set") as raised:
        probe.probe_batch(HEALTHY | fault, dataclasses.replace(execution, probe=config.Probe(strict=True)))
    assert words[0] in str(raised.value) and "\n" not in str(raised.value)


def test_dead_groups_are_cured_by_what_the_routes_allow():
    """Whole rollouts are compared within a group, steps with one another."""
    dead = HEALTHY | {"advantage/live_groups": 0.25}
    (whole,), (steps,) = (probe.warnings(dead, settings(arm=arm)) for arm in ("outcome", "process"))
    assert "raise rollout.group or rollout.max_resample, lower advantage.min_logits_spread" in whole
    assert "choose a segments.rule that cuts these rollouts" in steps and "rollout.group" not in steps


def test_sparse_rewards_are_not_advised_about_judges():
    sparse = settings(arm="sparse")
    assert probe.warnings(HEALTHY | {"advantage/live_groups": 0.25, "reward/std": 0.0}, sparse) == []
    (line,) = probe.warnings(HEALTHY | {"advantage/live_groups": 0.05}, sparse)
    assert "start from a primed policy" in line and "judge" not in line
    kept = dataclasses.replace(sparse, advantage=dataclasses.replace(sparse.advantage, overlong="keep"))
    for execution, scored in ((sparse, False), (kept, True)):
        (line,) = probe.warnings(HEALTHY | {"response/overlong": 0.6}, execution)
        assert ("are not scored" in line) != scored


def test_several_faults_are_several_lines_and_one_error(capsys):
    bad = HEALTHY | {"response/overlong": 1.0, "advantage/live_groups": 0.0}
    probe.probe_batch(bad, settings())
    assert capsys.readouterr().err.count("warning: probe: ") == 2
    with pytest.raises(ValueError, match="100% of the rollouts .*; only 0% of the groups"):
        probe.probe_batch(bad, settings(strict=True))


def test_keys_that_the_lines_name_exist():
    worst = {name: 0.0 for name in METRICS} | {"response/overlong": 1.0, "judge/asked": 8.0}
    every = "\n".join(
        line
        for arm in ("outcome", "process")
        for readout in ("text", "logits")
        for line in probe.warnings(worst, settings(arm=arm, readout=readout))
    )
    tree = to_dict(settings())
    named = {word.strip(",:;'") for word in every.split() if word.split(".")[0] in tree and "." in word}
    assert len(named) >= 8
    for name in named:
        section, key = name.split(".")
        assert key in tree[section], name


def test_where_nothing_was_judged_no_score_is_called_equal():
    """All rollouts cut under overlong 'mask': there is one fault, and it is not the judge's."""
    row = HEALTHY | {"response/overlong": 1.0, "judge/asked": 0.0, "judge/parsed": None, "reward/std": None}
    assert len(probe.warnings(row, settings())) == 1
