"""Evaluation inside a run: its numbers, that it compiles nothing and disturbs nothing, and that a resume keeps it."""

import collections
import itertools
import json
import zlib

import numpy as np
import pytest
from tiny_runs import assert_same_parameters, config_dict, read_jsonl, rows, run, sparse, tiny, write_problems

from exprl_jax import run_evaluation
from exprl_jax.data.problems import Problem
from exprl_jax.data.training import fixed_sample
from exprl_jax.evaluation.report_page import read_workdirs, render
from exprl_jax.help import describe
from exprl_jax.resolve import resolve
from exprl_jax.reward.statistics import VERDICTS
from exprl_jax.reward.verifiers.grading import Graders
from exprl_jax.reward.verifiers.verdict import Verdict
from exprl_jax.run import loop
from exprl_jax.run.clock import CompileLedger
from exprl_jax.run.evaluating import METRICS
from exprl_jax.run_evaluation import summarise

HELD_OUT = [dict(id=f"h{i}", problem=f"What is {i} + {i}?", answer=f"{i % 2}") for i in range(11)]
SAMPLES, TRAINING = 8, 5
EVALUATING = {
    "steps": 3,
    "rollout.max_tokens": 8,
    "evaluate.every": 2,
    "evaluate.training_problems": TRAINING,
    "evaluate.samples": SAMPLES,
    "evaluate.k": "2,8",
    "evaluate.temperature": 1.0,
    "checkpoint.best": "evaluate/pass@1",
}


@pytest.fixture(scope="module", autouse=True)
def graded():
    """Untrained responses end in an answer, 0 to 6 by their text, and every one that is graded is kept."""
    kept, submit = [], Graders.submit

    def answering(self, given):
        answered = [(problem, rf"{text} \boxed{{{zlib.crc32(text.encode()) % 7}}}") for problem, text in given]
        kept.extend(answered)
        return submit(self, answered)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Graders, "submit", answering)
        yield kept


@pytest.fixture(scope="module")
def changes(tmp_path_factory):
    return EVALUATING | {
        "evaluate.source": write_problems(tmp_path_factory.mktemp("held out") / "held_out.jsonl", HELD_OUT)
    }


@pytest.fixture(scope="module")
def whole(changes, graded, tmp_path_factory):
    """A run that is evaluated after 0, 2 and 3 steps; what it compiled by then; what was graded each time."""
    compiled, answers, measure = [], [], run_evaluation.measure

    class Watched(CompileLedger):
        def report(self):
            compiled.append(self.compiled + self.cached)
            return super().report()

    def counting(*arguments):
        graded.clear()
        row = measure(*arguments)
        answers.append(list(graded))
        return row

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "CompileLedger", Watched)
        patch.setattr(run_evaluation, "measure", counting)
        folder = run(sparse(changes), tmp_path_factory.mktemp("whole") / "run")
    return folder, compiled, answers


def by_hand(answers, k):
    """pass@k and unsolved from all draws of k answers of each problem."""
    right = collections.defaultdict(list)
    for problem, text in answers:
        right[problem.id].append(text.endswith(rf"\boxed{{{problem.answer}}}"))
    draws = [np.mean([any(draw) for draw in itertools.combinations(of_one, k)]) for of_one in right.values()]
    assert {len(of_one) for of_one in right.values()} == {SAMPLES}
    return np.mean(draws), np.mean([not any(of_one) for of_one in right.values()]), len(right)


def test_its_numbers_are_those_of_its_samples(whole):
    folder, _, answers = whole
    measured = [row for row in rows(folder) if row["evaluate/pass@1"] is not None]
    assert [row["step"] for row in measured] == [0, 2, 3] and len(answers) == 3
    for row, of_step in zip(measured, answers):
        for prefix, ours in (("", True), ("training_", False)):
            of_set = [(p, text) for p, text in of_step if p.id.startswith("h") == ours]
            for k in (1, 2, 8):
                solved, unsolved, count = by_hand(of_set, k)
                assert row[f"evaluate/{prefix}pass@{k}"] == pytest.approx(solved, abs=1e-12)
                assert row[f"evaluate/{prefix}unsolved"] == pytest.approx(unsolved, abs=1e-12)
            assert count == (len(HELD_OUT) if ours else TRAINING)
            assert row[f"evaluate/{prefix}missing"] == 0
            assert row[f"evaluate/{prefix}length_mean"] <= 8 and 0 < row[f"evaluate/{prefix}overlong"] <= 1
    for key in ("evaluate/pass@1", "evaluate/unsolved"):  # else the comparisons would prove little
        assert 0 < min(row[key] for row in measured) and len({row[key] for row in measured}) > 1


def test_it_leaves_how_often_each_problem_was_solved(whole):
    folder, _, answers = whole
    assert sorted(path.name for path in (folder / "evaluations").iterdir()) == [
        f"step_{step:06d}.jsonl" for step in (0, 2, 3)
    ]
    for step, of_step in zip((0, 2, 3), answers):
        right = collections.Counter(p.id for p, text in of_step if text.endswith(rf"\boxed{{{p.answer}}}"))
        written = read_jsonl(folder / f"evaluations/step_{step:06d}.jsonl")
        assert [row["set"] for row in written] == ["held-out"] * len(HELD_OUT) + ["training"] * TRAINING
        assert {row["id"]: row["correct"] for row in written} == {p.id: right[p.id] for p, _ in of_step}
        assert {row["graded"] for row in written} == {SAMPLES}
        assert written[1]["problem"] == HELD_OUT[1]["problem"]


def test_the_report_of_the_run_is_as_of_its_last_checkpoint(whole):
    folder, _, _ = whole
    assert (folder / "report.html").read_text() == render(read_workdirs([folder])[0])


def test_the_training_problems_are_the_same_ones_every_time(whole):
    _, _, answers = whole
    drawn = [{problem.id for problem, _ in of_step if not problem.id.startswith("h")} for of_step in answers]
    assert len(drawn[0]) == TRAINING and drawn[0] == drawn[1] == drawn[2]


def test_samples_of_one_problem_and_step_differ(whole):
    _, _, answers = whole
    texts = [text for problem, text in answers[0] if problem.id == "h0"]
    assert len(set(texts)) == SAMPLES
    assert set(texts).isdisjoint(text for problem, text in answers[1] if problem.id == "h0")


def test_every_row_has_its_keys_and_none_is_invented(whole):
    folder, _, _ = whole
    expected = {key.replace("@k", f"@{k}") for key in METRICS for k in (2, 8)}
    for row in rows(folder):
        assert {key for key in row if key.startswith("evaluate/")} == expected
    assert set(rows(folder)[0]) == expected | {"step"}
    assert all(rows(folder)[1][key] is None for key in expected)


def test_it_compiles_nothing_of_its_own(whole):
    """Before the first step it compiles the two sampling programs; a run without it compiles no fewer."""
    _, compiled, _ = whole
    names = [{name: count for name, count in by_then.items() if name != "jit(slice)"} for by_then in compiled]
    assert compiled[0]["jit(prefill)"] == compiled[0]["jit(sample)"] == 1
    assert names[1] == names[2] == names[3] and names[1]["jit(sample)"] == names[1]["jit(prefill)"] == 1


def test_training_is_what_it_is_without(whole, tmp_path):
    folder, compiled, _ = whole
    watched = []

    class Watched(CompileLedger):
        def report(self):
            watched.append(self.compiled + self.cached)
            return super().report()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "CompileLedger", Watched)
        bare = run(sparse({"steps": 3, "rollout.max_tokens": 8}), tmp_path / "run")
    trained = [{k: v for k, v in row.items() if not k.startswith("evaluate/")} for row in rows(folder)[1:]]
    assert trained == rows(bare)
    assert_same_parameters(folder, bare)
    # The process has the small ones, of the loop's own sum and of a save, from the run before.
    assert set(compiled[-1]) - set(watched[-1]) <= {"jit(add)", "jit(slice)"}


def test_the_best_checkpoint_is_the_one_that_was_evaluated_best(whole, capfd):
    folder, _, _ = whole
    value = {row["step"]: row["evaluate/pass@1"] for row in rows(folder)}
    best = 3 if value[3] > value[2] else 2
    position = json.loads((folder / "checkpoints/3/position/metadata").read_text())
    assert position["best"] == {"step": best, "value": value[best]}


@pytest.mark.parametrize("stops", [1, 2])
def test_a_stop_neither_repeats_nor_loses_a_point(stops, changes, whole, tmp_path, monkeypatch, capfd):
    folder, _, _ = whole
    asked, config = iter([*[False] * (stops - 1), True]), sparse(changes)
    with monkeypatch.context() as patch:
        patch.setattr(loop.StopRequest, "agreed", lambda self: next(asked))
        run(config, tmp_path / "run")
    assert [row["step"] for row in rows(tmp_path / "run")] == [*range(stops + 1)]
    run(config, tmp_path / "run")
    assert rows(tmp_path / "run") == rows(folder)
    assert_same_parameters(tmp_path / "run", folder)
    for path in (folder / "evaluations").iterdir():
        assert (tmp_path / "run/evaluations" / path.name).read_text() == path.read_text()
    shown = [line for line in capfd.readouterr().err.splitlines() if line.startswith("step 3/3")]
    value = rows(folder)[-1]
    assert shown[0].endswith(
        f"held-out pass@1 {value['evaluate/pass@1']:.3f}, unsolved {value['evaluate/unsolved']:.3f} (step 3)"
    )


def test_a_kill_before_the_first_checkpoint_keeps_the_first_point(changes, whole, tmp_path, monkeypatch):
    folder, _, _ = whole
    config = sparse(changes | {"checkpoint.every": 2})

    def killed(self, step, *_):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(loop.Checkpoints, "save", killed)
        with pytest.raises(RuntimeError, match="killed"):
            run(config, tmp_path / "run")
    assert [row["step"] for row in rows(tmp_path / "run")] == [0, 1, 2]
    measured, measure = [], run_evaluation.measure
    monkeypatch.setattr(run_evaluation, "measure", lambda *given: measured.append(given[-2]) or measure(*given))
    run(config, tmp_path / "run")
    assert measured == [2, 3]
    assert rows(tmp_path / "run") == rows(folder)


def test_self_distillation_asks_the_judge_about_open_ended_answers(tmp_path):
    """Which it has no other use for."""
    science = dict(id="s", problem="Why do apples fall?", answer="gravity", domain="science")
    source = write_problems(tmp_path / "held_out.jsonl", [*HELD_OUT[:2], science])
    evaluating = {"evaluate.every": 1, "evaluate.source": source, "evaluate.samples": 4}
    folder = run(tiny("distill", {"steps": 1, "rollout.max_tokens": 8} | evaluating), tmp_path / "run")
    assert [row["evaluate/missing"] for row in rows(folder)] == [0, 0]
    assert not [key for key in rows(folder)[0] if key.startswith("evaluate/training_")]


def table(verdicts):
    verdict = np.array([[VERDICTS.index(getattr(Verdict, name)) for name in row] for row in verdicts])
    return {"verdict_PG": verdict, "length_PG": np.full(verdict.shape, 3), "ended_PG": np.arange(2) * (verdict >= 0)}


def test_what_no_verifier_graded_counts_neither_as_right_nor_as_wrong():
    row = summarise("", table([["correct", "missing"], ["wrong", "wrong"], ["missing", "missing"]]), (1, 2))
    assert row == {
        "evaluate/pass@1": 0.5,
        "evaluate/pass@2": None,  # of one problem a single sample was graded
        "evaluate/unsolved": 0.5,
        "evaluate/missing": 0.5,
        "evaluate/length_mean": 3.0,
        "evaluate/overlong": 0.5,
    }
    row = summarise("training_", table([["missing", "missing"]]), (1,))
    assert row["evaluate/training_pass@1"] is None and row["evaluate/training_unsolved"] is None


def test_the_fixed_sample_hangs_on_seed_and_ids_alone():
    problems = [Problem(f"p{i}", "?", None, "1", "math") for i in range(50)]
    drawn = fixed_sample(problems, 10, 1)
    assert len(drawn) == 10 and drawn == fixed_sample(problems[::-1], 10, 1) != fixed_sample(problems, 10, 2)
    kept = [problem for problem in problems if problem not in drawn[:3]]
    assert fixed_sample(kept, 7, 1) == drawn[3:]


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"evaluate.source": "", "evaluate.training_problems": 0}, "config.evaluate.source: got '', expected held-out"),
        (
            {"evaluate.samples": 6, "evaluate.k": ""},
            "config.evaluate.samples: got 6, expected a multiple of rollout.group = 4",
        ),
        ({"evaluate.samples": 4 << 10}, "config.evaluate.samples: got 4096, expected less than 1024 times"),
        ({"evaluate.k": "2,9"}, "config.evaluate.k: got '2,9', expected positive numbers, at most samples = 8"),
        ({"evaluate.k": "0"}, "config.evaluate.k: got '0', expected positive"),
        ({"evaluate.k": "2;8"}, "config.evaluate.k: got '2;8', expected positive"),
        ({"evaluate.every": 0}, "config.checkpoint.best: got 'evaluate/pass@1', expected a metric that is measured"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(changed, message, changes):
    with pytest.raises(ValueError) as refused:
        resolve(config_dict("tiny", "sparse", changes | changed))
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)


LONG = dict(id="long", problem="How many? " * 60, answer="1")


@pytest.mark.parametrize(
    "problems, changed, message",
    [
        ([LONG], {}, "config.data.max_prompt_tokens: got 216, expected at least"),
        (["trained on"], {}, "1 of 64 training problems are held out for evaluation"),
        (["renamed"], {}, "config.evaluate.source: 'arithmetic/00' is another problem there than in config.data."),
        (HELD_OUT, {"evaluate.training_problems": 65}, "config.evaluate.training_problems: got 65, expected at most"),
    ],
    ids=["too long", "trained on", "another of that name", "too many"],
)
def test_problems_that_cannot_be_evaluated_on_are_refused(problems, changed, message, changes, tmp_path):
    trained = read_jsonl(sparse().data.source)[0]
    made = {"trained on": trained, "renamed": trained | {"problem": "Another?"}}
    problems = [made[problem] if isinstance(problem, str) else problem for problem in problems]
    source = write_problems(tmp_path / "held_out.jsonl", problems)
    with pytest.raises(ValueError) as refused:
        run(sparse(changes | {"evaluate.source": source} | changed), tmp_path / "run")
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)


def test_help_on_the_section_stands_beside_the_task_of_that_name():
    output = describe("evaluate", {})
    assert "sampling.samples" in output and "evaluate.training_problems" in output
