"""Collapses that public runs have shown, and runs that are well."""

import dataclasses
import json
import pathlib
import types

import pytest
from tiny_runs import tiny

from exprl_jax.config import Checkpoint, Watch
from exprl_jax.learning.update import learning_rate
from exprl_jax.run.loop import Best, better_of, first_moving
from exprl_jax.run.watch import SYMPTOMS, RunWatch, check_moved

HEALTHY = {
    "segments/mean": 7.5,
    "response/overlong": 0.1,
    "advantage/live_groups": 0.8,
    "response/length_mean": 900.0,
    "policy/entropy": 0.4,
    "solve/accuracy": 0.3,
}
# The process run of the issue: segments 10 → 1.5, overlong share up to .94.
COLLAPSED = {
    "segments/mean": 1.5,
    "response/overlong": 0.94,
    "advantage/live_groups": 0.02,
    "response/length_mean": 100.0,
    "policy/entropy": 0.01,
    "solve/accuracy": 0.05,
}
BETTER = {"segments/mean": 9.0, "response/overlong": 0.02, "solve/accuracy": 0.6, "advantage/live_groups": 0.5}


def told(rows, capsys, window=3, strict=False, before=()):
    watch = RunWatch(Watch(window, strict), before)
    for step, row in enumerate(rows, len(before) + 1):
        watch.see(step, row)
    assert capsys.readouterr().err.splitlines() == [f"warning: watch: {line}" for line in watch.told]
    return watch.told


def test_every_symptom_has_a_case():
    assert {symptom.metric for symptom in SYMPTOMS} == set(HEALTHY) == set(COLLAPSED)


@pytest.mark.parametrize("metric", HEALTHY)
def test_a_collapse_is_told_once_with_its_cure(metric, capsys):
    rows = [HEALTHY] * 5 + [HEALTHY | {metric: COLLAPSED[metric]}] * 8
    (line,) = told(rows, capsys)
    cure = next(symptom.cure for symptom in SYMPTOMS if symptom.metric == metric)
    assert f": {metric} went from {HEALTHY[metric]:.3g} to " in line and line.endswith(cure)


def test_a_run_that_is_well_or_gets_better_is_told_nothing(capsys):
    assert told([HEALTHY] * 20, capsys) == told([HEALTHY] * 5 + [HEALTHY | BETTER] * 20, capsys) == []


# Steps at which runs of the miniature (docs/mini.md; their metrics are in the file) lose what they had learned, by the
# solved share of their rollouts, and how many steps later at most the watch says so.
FALLS = {
    "end-1": (21, 5),
    "process-1": (52, 3),
    "process-2": (39, 5),
    "process-3": (40, 2),
    "process_flat-1": (54, 6),
    "process_heading-1": (34, 4),
}
SERIES = json.loads((pathlib.Path(__file__).parents[1] / "data" / "mini_runs.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", SERIES)
def test_real_runs_that_collapse_are_told_of_soon_and_no_others(name, capsys):
    rows = [dict(zip(SERIES[name], values, strict=True)) for values in zip(*SERIES[name].values(), strict=True)]
    steps = [int(line.split()[1].rstrip(":")) for line in told(rows, capsys, window=10) if "solve/accuracy" in line]
    if name in FALLS:
        begins, later = FALLS[name]
        assert len(steps) == 1 and begins <= steps[0] <= begins + later
    else:
        assert told(rows, capsys, window=10) == []


def test_a_fall_within_the_noise_of_the_best_steps_is_none(capsys):
    noisy = [HEALTHY | {"solve/accuracy": value} for value in (0.0, 0.3, 0.0)]
    assert told([*noisy, *[HEALTHY | {"solve/accuracy": 0.05}] * 2], capsys) == []


def test_a_run_shorter_than_a_window_and_a_half_is_told_nothing(capsys):
    assert told([HEALTHY] * 4 + [COLLAPSED], capsys, window=4) == []
    assert len(told([HEALTHY] * 4 + [COLLAPSED] * 2, capsys, window=4)) == len(SYMPTOMS)


def test_what_is_not_defined_is_no_symptom(capsys):
    assert told([HEALTHY] * 3 + [dict.fromkeys(HEALTHY)] * 6, capsys) == []
    assert told([{}] * 12, capsys) == []


def test_a_symptom_that_comes_back_is_told_again(capsys):
    bad = HEALTHY | {"response/overlong": 0.9}
    assert len(told([HEALTHY] * 3 + [bad] * 4 + [HEALTHY] * 4 + [bad] * 4, capsys)) == 2


def test_a_run_that_goes_on_is_compared_with_its_own_start_and_told_nothing_twice(capsys):
    before = [HEALTHY] * 3 + [COLLAPSED] * 3
    assert told([COLLAPSED] * 4, capsys, before=before) == []
    assert len(told([COLLAPSED] * 4, capsys, before=before[:3])) == len(SYMPTOMS)


def test_a_strict_watch_ends_the_run(capsys):
    with pytest.raises(ValueError, match="watch: step 4: response/overlong .*config.watch.strict is set"):
        told([HEALTHY] * 3 + [HEALTHY | {"response/overlong": 0.99}] * 3, capsys, strict=True)


def test_parameters_that_do_not_move_are_told_whatever_the_task(capsys):
    check_moved(3, {"update/moved": 0.019})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: step 3: the update changed 1.9% of the parameters") and "param_dtype" in line
    for row in ({"update/moved": 0.6}, {"update/moved": None}, {}):
        check_moved(3, row)
    assert capsys.readouterr().err == ""


HIGHEST, LOWEST = (Checkpoint(10, 2, "solve/accuracy", best_is) for best_is in ("highest", "lowest"))


def rows(*values):
    return [{"solve/accuracy": value} for value in values]


def test_the_best_checkpoint_is_by_the_mean_of_the_later_half_since_the_one_before():
    best = better_of(None, HIGHEST, 10, rows(0.9, 0.1, 0.3))
    assert best == Best(10, 0.2)
    assert better_of(best, HIGHEST, 20, rows(0.0, 0.0, 0.2, 0.4)) == Best(20, pytest.approx(0.3))
    assert better_of(best, LOWEST, 20, rows(0.0, 0.0, 0.2, 0.4)) == best
    assert better_of(best, LOWEST, 20, rows(0.1)) == Best(20, 0.1)


def test_a_policy_that_has_just_collapsed_is_not_the_best():
    """Of the miniature's third seed of DeltaNorm, steps 21 to 40, rounded: it collapsed at step 38."""
    before = rows(0.4, 0.45, 0.5, 0.5, 0.58, 0.48, 0.66, 0.52, 0.55, 0.65)
    collapsing = rows(0.55, 0.64, 0.7, 0.69, 0.64, 0.63, 0.52, 0.57, 0.45, 0.12)
    best = better_of(None, HIGHEST, 30, before)
    assert better_of(best, HIGHEST, 40, collapsing) == best


def test_what_ties_or_is_not_defined_is_no_better():
    best = Best(10, 0.2)
    assert better_of(best, HIGHEST, 20, rows(0.2)) == better_of(best, HIGHEST, 20, rows(None)) == best
    assert better_of(best, HIGHEST, 20, rows(None, 0.4)) == Best(20, 0.4)
    assert better_of(None, HIGHEST, 20, rows(None)) is None
    assert better_of(None, Checkpoint(10, 2, "", "highest"), 20, rows(1.0)) is None


def test_a_metric_that_the_run_does_not_have_is_named_with_the_nearest():
    with pytest.raises(ValueError, match="checkpoint.best: got 'solve/acuracy'.*solve/accuracy"):
        better_of(None, Checkpoint(10, 2, "solve/acuracy", "highest"), 10, rows(0.1))


@pytest.mark.parametrize(
    "warmup, steps, updates, done, first",
    [
        (0.0, 10, 1, 0, 0),
        (0.0, 10, 1, 4, 4),
        (0.1, 10, 1, 0, 1),
        (0.1, 10, 1, 4, 4),
        (0.1, 9, 1, 0, 0),
        (0.1, 10, 2, 0, 0),
    ],
)
def test_the_first_update_of_a_warm_up_moves_nothing(warmup, steps, updates, done, first):
    """Its rate is 0; of several updates of the first step only the first one's."""
    optimizer = dataclasses.replace(tiny().optimizer, warmup=warmup)
    task = types.SimpleNamespace(config=types.SimpleNamespace(optimizer=optimizer), steps=steps, updates=updates)
    assert first_moving(task, done) == first
    rate = learning_rate(optimizer, steps * updates)
    moves = [not callable(rate) or float(rate(step * updates + updates - 1)) > 0 for step in range(done, steps)]
    assert moves.index(True) + done == first
