"""The evaluation task on a tiny model: what it leaves behind, that a kill changes nothing, and Stage I → II →
evaluation."""

import collections
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from tiny_runs import ROOT, config_dict, environment, tiny

from exprl_jax.evaluation import evaluate as room
from exprl_jax.evaluation.tables import read_results
from exprl_jax.report import main as report
from exprl_jax.resolve import resolve, to_dict
from exprl_jax.train import train
from exprl_jax.weights.language_model import pin_checkpoints

SMALL = {
    "data.source": str(ROOT / "configs/data/mixed.jsonl"),
    "sampling.samples": 4,
    "sampling.group": 2,
    "grader.seconds": 20.0,
}


def config(changes=None):
    return resolve(config_dict("evaluate", "tiny", SMALL | (changes or {})))


def samples(folder, name="mixed"):
    return [json.loads(line) for line in (folder / "samples" / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation") / "run"
    room.evaluate(config(), str(folder))
    return folder


def test_every_problem_is_sampled_equally_often_and_graded(whole):
    rows = samples(whole)
    assert collections.Counter(row["id"] for row in rows) == {row["id"]: 4 for row in rows} and len(rows) == 24 * 4
    assert {(row["id"], row["sample"]) for row in rows} == {(row["id"], n) for row in rows for n in range(4)}
    # Random weights answer nothing; open-ended answers got a yes or a no of the judge.
    assert {row["verdict"] for row in rows if row["kind"] == "science"} <= {"correct", "wrong"}
    assert {row["verdict"] for row in rows if row["kind"] in ("math", "code")} == {"no_answer"}
    assert all(row["reference"] is None for row in rows)
    assert all((row["answer"] is None) == (row["kind"] == "code") for row in rows)
    texts = collections.defaultdict(set)
    for row in rows:
        texts[row["id"]].add(row["response"])
        assert row["ended"] or row["length"] == 24
    assert all(len(different) == 4 for different in texts.values())


def test_results_tables_and_curves_are_written(whole):
    (summary,) = read_results(whole / "results.json").sets
    assert (summary.name, summary.problems, summary.n, len(summary.pass_at_k)) == ("mixed", 24, 4, 4)
    right = sum(row["verdict"] == "correct" for row in samples(whole))
    assert summary.pass_at_k[0] == pytest.approx(right / 96)
    for name in ("table.txt", "summary.csv", "pass_at_k.csv", "pass_at_k_mixed.png"):
        assert (whole / name).stat().st_size


def test_a_second_start_draws_nothing_again_and_leaves_the_samples_alone(whole, capsys):
    path, results = whole / "samples/mixed.jsonl", (whole / "results.json").read_text()
    before = path.stat().st_mtime_ns, path.stat().st_ino
    room.evaluate(config(), str(whole))
    assert (whole / "results.json").read_text() == results
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == before
    assert "groups of" not in capsys.readouterr().err


def test_what_a_kill_left_is_completed_to_the_same_samples(whole, tmp_path):
    expected = sorted(samples(whole), key=lambda row: (row["id"], row["sample"]))
    (tmp_path / "run/samples").mkdir(parents=True)
    (tmp_path / "run/config.json").write_text((whole / "config.json").read_text())
    lines = (whole / "samples/mixed.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run/samples/mixed.jsonl").write_text("".join(lines[:37]) + lines[37][:50])
    room.evaluate(config(), str(tmp_path / "run"))
    assert sorted(samples(tmp_path / "run"), key=lambda row: (row["id"], row["sample"])) == expected
    assert (tmp_path / "run/results.json").read_text() == (whole / "results.json").read_text()


def test_an_evaluation_is_given_more_samples_and_keeps_those_that_it_has(whole, tmp_path):
    """From 2 samples a problem to 4: stopped on the way, and gone on with, it ends with the files of one start."""
    folder = tmp_path / "run"
    room.evaluate(config({"sampling.samples": 2}), str(folder))
    first = (folder / "samples/mixed.jsonl").read_bytes()
    assert first.count(b"\n") == 24 * 2 and read_results(folder / "results.json").sets[0].n == 2
    room.evaluate(config(), str(folder))
    grown = (folder / "samples/mixed.jsonl").read_bytes()
    assert grown.startswith(first) and grown == (whole / "samples/mixed.jsonl").read_bytes()
    assert (folder / "results.json").read_text() == (whole / "results.json").read_text()
    # Fewer would not be those of which the results are.
    with pytest.raises(ValueError, match="another config.*sampling.samples: 2 != 4"):
        room.evaluate(config({"sampling.samples": 2}), str(folder))
    # Groups of another size have other random numbers.
    with pytest.raises(ValueError, match="another config.*sampling.group: 4 != 2"):
        room.evaluate(config({"sampling.samples": 8, "sampling.group": 4}), str(folder))


def test_samples_of_half_a_group_are_kept_and_the_others_drawn(whole, tmp_path):
    (tmp_path / "run/samples").mkdir(parents=True)
    (tmp_path / "run/config.json").write_text((whole / "config.json").read_text())
    lines = (whole / "samples/mixed.jsonl").read_text().splitlines(keepends=True)
    kept = lines[:5] + lines[20:95]
    (tmp_path / "run/samples/mixed.jsonl").write_text("".join(kept))
    room.evaluate(config(), str(tmp_path / "run"))
    completed = (tmp_path / "run/samples/mixed.jsonl").read_text().splitlines(keepends=True)
    assert completed[:80] == kept and sorted(completed) == sorted(lines)


@pytest.mark.parametrize(
    "line, problem",
    [
        ("{}", "row 4: not a sample .it has no 'id'"),
        ("7", "line 4: not a row .expected a JSON object, got 7"),
        ('{"id": "x"', "line 4: not a row"),
        ('{"id": ["x"], "sample": 0}', "row 4: not a sample .its id is"),
        ('{"response": "\\ud800"}', "line 4: not a row .*surrogates"),
        ("[" * 100_000, "line 4: not a row"),
        (None, "row 4: answers .* a second time"),
    ],
)
def test_a_broken_line_of_samples_is_named_before_anything_is_sampled(whole, tmp_path, line, problem):
    (tmp_path / "run/samples").mkdir(parents=True)
    (tmp_path / "run/config.json").write_text((whole / "config.json").read_text())
    lines = (whole / "samples/mixed.jsonl").read_text().splitlines()
    broken = "\n".join([*lines[:3], lines[0] if line is None else line, *lines[3:]]) + "\n"
    (tmp_path / "run/samples/mixed.jsonl").write_text(broken)
    with pytest.raises(ValueError, match=problem) as caught:
        room.evaluate(config(), str(tmp_path / "run"))
    assert "\n" not in str(caught.value) and "samples/mixed.jsonl" in str(caught.value)
    assert (tmp_path / "run/samples/mixed.jsonl").read_text() == broken


def test_another_config_is_refused_but_another_label_is_not(whole):
    with pytest.raises(ValueError, match="holds a run of another config"):
        room.evaluate(config({"sampling.temperature": 0.7}), str(whole))
    room.evaluate(config({"label": "other"}), str(whole))
    assert read_results(whole / "results.json").label == "other"
    room.evaluate(config(), str(whole))


def test_no_problem_is_left_out_for_its_length():
    with pytest.raises(ValueError, match="data.max_prompt_tokens: got 100, expected at least .* leaves no problem out"):
        room.checked_prompts(config({"data.max_prompt_tokens": 100}), *_opened())
    with pytest.raises(ValueError, match="the policy's context length"):
        room.checked_prompts(config({"sampling.max_tokens": 4096}), *_opened())


def test_no_problem_is_left_out_for_its_judge():
    with pytest.raises(
        ValueError, match="judge.max_context_tokens: got 100, expected at least .* leaves no problem out"
    ):
        room.checked_judge(config({"judge.max_context_tokens": 100}), _opened()[1])


def _opened():
    made = config()
    return room.open_model(made.policy), room.read_sets(made)["mixed"]


def test_sets_are_named_after_their_sources(tmp_path):
    assert room.set_name("aime25") == "aime25" and room.set_name("aime25:local/x.jsonl") == "aime25"
    assert room.set_name("a/b/hard.parquet") == "hard" and room.set_name("hf:some/set:test") == "some_set_test"
    (tmp_path / "mixed.jsonl").write_text((ROOT / "configs/data/mixed.jsonl").read_text())
    with pytest.raises(ValueError, match="two sets are called 'mixed'"):
        room.read_sets(config({"data.source": f"{SMALL['data.source']},{tmp_path}/mixed.jsonl"}))


def test_one_id_is_one_problem_in_all_sets(tmp_path):
    for name in "ab":
        row = {"id": "1", "problem": f"What is {name}?", "answer": name}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="'1' is another problem in 'b' than in a set before it"):
        room.read_sets(config({"data.source": f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl"}))


def test_samples_of_other_problems_are_not_added_to(whole, tmp_path):
    problems = (ROOT / "configs/data/mixed.jsonl").read_text()
    (tmp_path / "mixed.jsonl").write_text(problems)
    changes = {"data.source": f"{tmp_path}/mixed.jsonl", "sampling.samples": 2}
    room.evaluate(config(changes), str(tmp_path / "run"))
    (tmp_path / "mixed.jsonl").write_text(problems.replace('"answer": "C"', '"answer": "B"'))
    with pytest.raises(ValueError, match="its samples are of other problems"):
        room.evaluate(config(changes), str(tmp_path / "run"))


def test_a_wave_gives_every_device_a_problem(tmp_path):
    with pytest.raises(ValueError, match="config.sampling.wave: got 3, expected a multiple of mesh.data = 8"):
        room.evaluate(config({"sampling.wave": 3}), str(tmp_path / "run"))


def test_stage_2_goes_on_from_a_stage_1_checkpoint_and_is_evaluated_and_reported(tmp_path, capsys):
    first, second, third = (tmp_path / name for name in ("stage1", "stage2", "evaluation"))
    train(tiny("outcome", {"steps": 2}), str(first))
    train(tiny("stage2", {"policy.weights": str(first), "advantage.overlong": "keep"}), str(second))
    room.evaluate(
        config(
            {
                "policy.weights": f"{second}/checkpoints/2",
                "data.source": str(ROOT / "configs/data/arithmetic.jsonl"),
                "sampling.samples": 2,
            }
        ),
        str(third),
    )
    # The second run's checkpoints say by themselves what model they are of.
    shutil.rmtree(first / "checkpoints")
    assert room.open_model(tiny("stage2", {"policy.weights": str(second)}).policy).arch.family == "qwen3"
    rollouts = [json.loads(line) for line in (second / "rollouts/step_000001.jsonl").read_text().splitlines()]
    assert rollouts and all(row["reference"] is None for row in rollouts)
    assert report([str(path) for path in (first, second, third)] + [f"--output={tmp_path}/report.html"]) == 0
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_a_workdir_stands_for_the_checkpoint_that_it_had_when_the_run_began(tmp_path):
    train(tiny("outcome", {"steps": 1}), str(tmp_path / "run"))
    asked = config({"policy.weights": str(tmp_path / "run")})
    pinned = pin_checkpoints(asked, {})
    assert pinned.policy.weights == f"{tmp_path}/run/checkpoints/1" and pinned.judge == asked.judge
    train(tiny("outcome", {"steps": 2}), str(tmp_path / "run"))
    assert pin_checkpoints(asked, to_dict(pinned)) == pinned
    assert pin_checkpoints(asked, {}).policy.weights == f"{tmp_path}/run/checkpoints/2"
    named = config({"policy.weights": f"{tmp_path}/run/checkpoints/2"})
    assert pin_checkpoints(named, to_dict(pinned)) == named  # and is then refused as another config


@pytest.mark.slow
def test_kill_9_at_any_moment_changes_no_sample(whole, tmp_path):
    command = [
        sys.executable,
        "-m",
        "exprl_jax.main",
        f"--config={ROOT}/configs/evaluate.py:tiny",
        f"--workdir={tmp_path}/run",
    ]
    command += [f"--config.{path}={value}" for path, value in SMALL.items()]
    killed = 0
    for _ in range(40):
        with subprocess.Popen(
            command, cwd=ROOT, env=environment(8), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process:
            for line in process.stderr:
                if "groups of" in line:
                    time.sleep(0.01 * killed)
                    os.kill(process.pid, signal.SIGKILL)
                    killed += 1
                    break
        if process.returncode == 0:
            break
    assert killed >= 3
    key = lambda row: (row["id"], row["sample"])  # noqa: E731
    assert sorted(samples(tmp_path / "run"), key=key) == sorted(samples(whole), key=key)
