"""The miniature's table: the order of its jobs, going on after a stop, and what it shows."""

import dataclasses
import fcntl
import json
import subprocess
import sys

import pytest

from configs.mini import results, table
from configs.mini.plan import NO_STAGE_2, QUICK, STAGE_1, VARIANTS, Job, jobs, variants
from exprl_jax.evaluation.pass_at_k import Summary
from exprl_jax.evaluation.tables import EvaluatedModel, write_results


@dataclasses.dataclass(frozen=True)
class Script(Job):
    """A job that notes its name, and is done unless its config says `fail`."""

    def command(self, root):
        note = f"open({str(root / 'order')!r}, 'a').write({self.name!r} + ' ')"
        done = "" if self.config == "fail" else f"; import pathlib; pathlib.Path({str(root / self.name)!r}).mkdir()"
        done += "" if self.config == "fail" else f"; open({str(root / self.name / self.done)!r}, 'w')"
        return ["-c", note + done]


def script(name, starts_from="", config=""):
    return Script(name, config, (), starts_from, "export", 1.0)


def test_each_job_comes_after_what_it_starts_from():
    made = jobs([1, 2], list(STAGE_1), "mild", second=True)
    names = [job.name for job in made]
    # Base, then a seed's arms and Stage II from each and from the base, all of them evaluated.
    arms = len(STAGE_1)
    assert len(names) == len(set(names)) == 1 + 2 * 2 * (arms + (arms - len(NO_STAGE_2)) + 1)
    for i, job in enumerate(made):
        assert job.starts_from in ("", "configs/mini/models/base", *names[:i])
    assert len(jobs([1], QUICK, "hard", second=False)) == 1 + 2 * 3


def test_a_job_starts_from_the_best_checkpoint_of_the_one_before(tmp_path):
    for step in (40, 60):
        (tmp_path / f"hard/process-1/checkpoints/{step}").mkdir(parents=True)
    (tmp_path / "hard/process-1/checkpoints/tmp").mkdir()
    stage_2 = next(job for job in jobs([1], ["process"], "hard", second=True) if job.name == "hard/process-1-stage2")
    assert stage_2.weights(tmp_path) == str(tmp_path / "hard/process-1/checkpoints/40")
    assert f"--config.policy.weights={stage_2.weights(tmp_path)}" in stage_2.command(tmp_path)


def test_what_has_ended_is_not_done_again_and_what_waits_for_a_failure_is_left(tmp_path, capsys):
    todo = [script("a"), script("b", config="fail"), script("after-b", "b"), script("after-a", "a"), script("last")]
    assert table.run(todo, tmp_path, [0]) == ["b", "after-b"]
    assert (tmp_path / "order").read_text().split() == ["a", "b", "after-a", "last"]
    assert "0 left" in capsys.readouterr().out
    mended = [dataclasses.replace(job, config="") for job in todo]
    assert table.run(mended, tmp_path, [0, 0]) == []
    assert (tmp_path / "order").read_text().split()[4:] == ["b", "after-b"]


@pytest.mark.parametrize("ends_well", [True, False])
def test_a_job_that_outlived_its_table_is_waited_for(tmp_path, ends_well):
    """What a table that was killed left running is not started beside itself, and again only if it came to nothing."""
    job = script("a")
    writes = f"; open({str(tmp_path / 'a/export')!r}, 'w')" if ends_well else ""
    (tmp_path / "a").mkdir()
    with (tmp_path / "a.log").open("ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        code = f"import time; time.sleep(0.5); open({str(tmp_path / 'first')!r}, 'w'){writes}"
        left = subprocess.Popen([sys.executable, "-c", code], stdout=log)
    restarted = dataclasses.replace(job, config="fail")  # it would find the folder there
    assert table.run([restarted], tmp_path, [0]) == ([] if ends_well else ["a"])
    assert (tmp_path / "first").exists() and left.wait() == 0
    assert (tmp_path / "order").exists() != ends_well


def test_a_variant_differs_from_the_arm_by_its_own_keys():
    process = next(job for job in jobs([2], ["process"], "hard", second=False) if job.name == "hard/process-2")
    made = variants([2], "hard")
    assert len({job.name for job in made}) == len(made) == len(VARIANTS)
    for job, (_, changes) in zip(made, VARIANTS.values()):
        assert (job.config, set(job.overrides)) == (process.config, {*process.overrides, *changes}) and changes


@pytest.mark.parametrize(
    "accuracies, step",
    [
        ([0.0] * 10 + [0.5] * 10 + [0.1] * 10, 20),  # means of five: .5 from step 16, .42, .34, .26, .18
        ([0.0] * 10 + [0.5] * 10 + [0.3] * 10, None),
        ([0.09] * 10 + [0.0] * 10, None),
        ([0.5] * 3, None),
    ],
)
def test_a_collapse_is_the_loss_of_half_of_what_was_there(accuracies, step):
    assert results.collapse(accuracies) == step


def workdir(root, name, accuracies, held_out, train):
    """A run of some steps (none: no run), and its evaluation: pass@1 and pass@16 of both sets."""
    folder, evaluated = root / "hard" / name, root / "hard" / f"{name}-eval"
    evaluated.mkdir(parents=True)
    sets = []
    for label, (first, last) in (("k10_held_out", held_out), ("k10_train", train)):
        curve = (first, *[0.5] * 14, last)
        low, high = (tuple(x + by for x in curve) for by in (-0.01, 0.01))
        sets.append(Summary(label, 128, 0, 16, 0, curve, low, high, 0.0, first, 0.0, 0.0, 55.0, 55.0, 55))
    write_results(evaluated / "results.json", EvaluatedModel(name, name, tuple(sets)))
    if accuracies:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"rollout": {"prompts": 16, "group": 8}}))
        shared = {"reward/mean": 0.5, "policy/entropy": 0.25, "response/length_mean": 55, "segments/mean": 1.0}
        shared |= {"evaluate/pass@1": 0.1, "evaluate/unsolved": 0.9}
        rows = [
            {"step": i + 1, "solve/accuracy": x, "solve/none": 1 - x, "time/step_seconds": 30.0} | shared
            for i, x in enumerate(accuracies)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_page_shows_what_is_there(tmp_path):
    for name, accuracies in (("process-1", [0.5] * 10 + [0.0] * 10), ("process_flat-1", [0.5] * 20)):
        workdir(tmp_path, name, accuracies, (0.4, 0.9), (0.3, 0.9))
        (tmp_path / "hard" / name / "export").mkdir()
    workdir(tmp_path, "base", [], (0.002, 0.03), (0.001, 0.04))
    workdir(tmp_path, "outcome-1", [0.1] * 5 + [0.75] * 10, (0.5, 0.9), (0.6, 0.95))
    workdir(tmp_path, "outcome-2", [0.1] * 5 + [0.25] * 10, (0.7, 0.8), (0.6, 0.85))
    workdir(tmp_path, "base-1-stage2", [0.0], (0.001, 0.02), (0.0, 0.0))
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n<!-- table -->\nold\n<!-- end -->\n\nText\n")
    for _ in range(2):
        results.write(tmp_path, tmp_path / "page", page, ["hard", "mild"])
        before, rest = page.read_text().split("<!-- table -->\n\n")
        table, after = rest.split("\n<!-- end -->\n")
        assert (before, after) == ("# Title\n\n", "\nText\n") and "old" not in table
    lines = table.splitlines()
    assert lines[0] == "**hard**" and "**mild**" not in lines
    cells = {line.split(" | ")[0].removeprefix("| "): line.strip("| ").split(" | ")[1:] for line in lines[4:]}
    assert cells["base"] == ["–", "–", "0.2 [-0.8, 1.2]", "3.0 [2.0, 4.0]", "96.0 [95.0, 97.0]", "–", "–"]
    outcome = ["2", "1920", "60.0 (50.0, 70.0)", "85.0 (90.0, 80.0)", "10.0 (5.0, 15.0)"]
    assert cells["ExpRL-Outcome"] == [*outcome, "accuracy 50, entropy 0.250, length 55", "7.5"]
    assert list(cells)[3] == "Stage II from base" and cells["Stage II from base"][1] == "128"
    assert (tmp_path / "page/curves_hard.png").stat().st_size > 1000
    assert len((tmp_path / "page/curves.csv").read_text().splitlines()) == 1 + 15 + 15 + 20 + 20 + 1
    assert cells["ExpRL-Outcome, seed 2"] == ["10.0 / 90"] * 15
    kept = cells["score 1 while all is right, else 0"]
    assert cells["DeltaNorm"][:4] == ["1", "10.0 (1)", "10.0", "step 9"]
    assert kept == ["1", "10.0 (1)", "10.0", "–", "accuracy 50, entropy 0.250, length 55"]
