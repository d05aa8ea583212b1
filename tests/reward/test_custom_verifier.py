"""Answers that a function of the user's verifies: its verdicts, its faults, and its place in a run."""

from __future__ import annotations

import collections
import dataclasses
import textwrap

import pytest
from tiny_runs import read_jsonl, rows, run, tiny, write_problems

from exprl_jax.data.problems import read_problems
from exprl_jax.reward.verifiers.grading import Graders, check_answers, verifier_files

PATIENCE = 60.0
VERDICTS = """
    import os, time
    def verify(attempts):
        (a,) = attempts
        assert a.unit == "answer" and a.extra["sorted"] is True and a.reference is None
        if a.trace == "hang":
            time.sleep(1000)
        if a.trace == "die":
            os._exit(3)
        said = {"right": a.answer == "1 2 3", "wrong": False, "zero": 0, "mute": "no_answer", "unsure": None}
        return [said[a.trace]]
"""
ROW = dict(problem="Sort 3 1 2.", answer="1 2 3", domain="custom", sorted=True)


def named(tmp_path, body, name="verify"):
    path = tmp_path / "mine.py"
    path.write_text(textwrap.dedent(body))
    return f"{path}:{name}"


def problem(tmp_path):
    (read,) = read_problems(write_problems(tmp_path / "problems.jsonl", [ROW]), references=False)
    return read


def graded(tmp_path, body, responses, seconds=PATIENCE):
    grader = dataclasses.replace(tiny("sparse").grader, function=named(tmp_path, body), seconds=seconds, workers=1)
    sorting = problem(tmp_path)
    check_answers([sorting])
    with Graders(grader, tiny("sparse").code, [sorting.kind]) as graders:
        return [str(verdict) for verdict in graders.submit([(sorting, text) for text in responses]).result()]


def test_verdicts_are_what_the_function_says(tmp_path):
    outcomes = graded(tmp_path, VERDICTS, ["right", "wrong", "zero", "mute", "unsure"])
    assert outcomes == ["correct", "wrong", "wrong", "no_answer", "missing"]


def test_what_hangs_has_timed_out_and_what_dies_twice_is_unparsable(tmp_path):
    outcomes = graded(tmp_path, VERDICTS, ["hang", "right", "die", "right"], seconds=2.0)
    assert outcomes == ["timed_out", "correct", "unparsable", "correct"]


@pytest.mark.parametrize(
    "returned, said",
    [
        ("[0.5]", "it returned 0.5, expected True, False, None or one of correct, wrong, no_answer"),
        ("['yes']", "it returned 'yes', expected True, False, None or one of"),
        ("[a.extra['level'] for a in attempts]", "KeyError: 'level' (mine.py line 3)"),
        ("True", "it returned True, expected a list with a value for each attempt"),
    ],
)
def test_what_is_no_verdict_ends_the_run(returned, said, tmp_path):
    with pytest.raises(ValueError) as caught:
        graded(tmp_path, f"\n    def verify(attempts):\n        return {returned}\n", ["x"])
    message, name = str(caught.value), problem(tmp_path).id
    assert message.startswith(f"config.grader.function: {tmp_path}/mine.py:verify, problem {name!r}: ")
    assert said in message and "\n" not in message


def test_a_function_must_be_there(tmp_path):
    grader = tiny("sparse").grader
    with pytest.raises(ValueError, match=r"^config.grader.function: got '', expected .*domain 'custom'$"):
        verifier_files(grader, ["custom"])
    with pytest.raises(ValueError, match=r"^config.grader.function: .*mine.py has no function 'grade'; it has verify$"):
        verifier_files(dataclasses.replace(grader, function=named(tmp_path, VERDICTS, "grade")), ["math", "custom"])
    assert verifier_files(grader, ["math", "code"]) == {}


EVEN = """
    def verify(attempts):
        return [len(a.trace) % 2 == 0 for a in attempts]
"""


def test_verdicts_are_the_rewards_of_a_sparse_run_and_a_changed_function_is_noticed(tmp_path):
    sources = [dict(problem=f"Sort {i} 1 2.", answer=f"1 2 {i}", domain="custom", id=f"q{i}") for i in range(8)]
    changes = {
        "data.source": write_problems(tmp_path / "problems.jsonl", sources),
        "grader.function": named(tmp_path, EVEN),
        "grader.seconds": PATIENCE,
        "log.rollouts": 32,
        "steps": 1,
    }
    config = tiny("sparse", changes)
    folder = run(config, tmp_path / "run")
    (row,) = rows(folder)
    samples = read_jsonl(folder / "rollouts" / "step_000001.jsonl")
    verdicts = collections.Counter(sample["verdict"] for sample in samples)
    assert all((sample["verdict"] == "correct") == (len(sample["response"]) % 2 == 0) for sample in samples)
    assert verdicts["correct"] > 0 and verdicts["wrong"] > 0 and len(samples) == 32
    assert row["solve/accuracy"] == row["reward/mean"] == verdicts["correct"] / 32
    named(tmp_path, EVEN.replace("== 0", "== 1"))
    with pytest.raises(ValueError, match="function .*mine.py:verify is not what the run began with"):
        run(dataclasses.replace(config, steps=2), folder)
