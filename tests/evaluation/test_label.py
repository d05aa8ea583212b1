"""Rollouts become lessons: cut as a run cuts them, judged as in training, and read back by a judge's training."""

import json
import re

import numpy as np
import pytest
from stub_endpoint import Answer, StubEndpoint
from tiny_runs import config_dict, read_jsonl, write_problems

from exprl_jax.evaluation.label import label
from exprl_jax.resolve import resolve
from exprl_jax.reward.judge_prompts import parse_score
from exprl_jax.reward.lessons import read_lessons
from exprl_jax.run.stopping import StopRequest

PROBLEMS = [
    {"id": f"p{i}", "problem": f"{i} + 2?", "reference": f"It is {i + 2}.", "answer": f"{i + 2}"} for i in range(3)
]
CHOICES = {"label": ["A", "B"], "text": ["iron", "water"]}
PROBLEMS.append(
    {
        "id": "c",
        "problem": "Which is wet?",
        "reference": "Water.",
        "answer": "B",
        "domain": "science",
        "choices": CHOICES,
    }
)
RESPONSES = ["### One\nfirst\n### Two\nsecond übel\n### Three\nthird", "### Only\none", ""]


def rollouts(path):
    """Three of each problem, as a run or an evaluation writes them."""
    made = []
    for problem in PROBLEMS:
        kind = "choice" if "choices" in problem else "math"
        row = {"kind": kind, "domain": problem.get("domain", "math"), "verdict": "wrong"}
        row |= {key: problem[key] for key in ("id", "problem", "reference", "answer")}
        made += [row | {"response": response} for response in RESPONSES]
    return write_problems(path, made)


def trace_of(content):
    return re.search(r"\n(?:Attempt|Attempt so far|Step):\n(.*)\n\nThat is the end of the", content, re.DOTALL)[1]


def words(seen, before=None):
    """A judge that counts words: a score of 1 to 5, and a judgement that says it; of four words it says nothing."""
    count = len(trace_of(seen.content).split())
    return Answer("I cannot say." if count == 4 else f"{count} words.\nScore: {min(5, 1 + count)}")


def labelling(tmp_path, stub, **changes):
    data = write_problems(tmp_path / "problems.jsonl", PROBLEMS)
    endpoint = {"base_url": stub.base_url, "model": "m", "api_key_variable": "", "concurrency": 4, "seconds": 20.0}
    changes = {f"judge.endpoint.{key}": value for key, value in endpoint.items()} | changes
    changes = {"judge.backend": "openai", "judge.readout": "text", "segments.rule": "heading"} | changes
    changes |= {"segments.max_segments": 5, "data.source": data, "rollouts": rollouts(tmp_path / "rollouts.jsonl")}
    return resolve(config_dict("label", "tiny", changes))


@pytest.fixture(scope="module")
def stub():
    with StubEndpoint(words) as server:
        yield server


def test_beginnings_of_rollouts_become_lessons_that_a_judge_can_be_taught(tmp_path, stub, capfd):
    label(labelling(tmp_path, stub), str(tmp_path / "run"))
    rows = read_jsonl(tmp_path / "run/lessons.jsonl")
    assert len(rows) == 12 and {row["unit"] for row in rows} == {"prefix"}
    three, one, empty = rows[:3]
    assert "".join(x["text"] for x in three["segments"]) == RESPONSES[0]
    assert [x["text"].count("###") for x in three["segments"]] == [2, 1, 0]  # a heading closes what stands before it
    for row in rows:
        before = ""
        for segment in row["segments"]:
            before += segment["text"]
            count = len(before.split())
            assert segment["score"] == (None if count == 4 else min(4, count) / 4)
            assert segment["judgement"] == (None if count == 4 else f"{count} words.\nScore: {min(5, 1 + count)}")
    lessons = read_lessons(str(tmp_path / "run/lessons.jsonl"))
    assert len(lessons) == 12 and "is not read" not in capfd.readouterr().err
    assert lessons[-1].problem.choices == (("A", "iron"), ("B", "water")) and lessons[-1].problem.kind == "choice"
    for lesson in lessons:
        assert lesson.problem.reference == next(
            x["reference"] for x in PROBLEMS if x["problem"] == lesson.problem.problem
        )
        assert all(parse_score(x.judgement) == 1 + 4 * x.score for x in lesson.labels)


FUNCTION = """
def words(attempts):
    counts = [len(a.trace.split()) for a in attempts]
    assert all(a.reference and a.ended is None and a.unit == "{unit}" for a in attempts)
    return [None if count == 4 else min(4, count) / 4 for count in counts]
"""


@pytest.mark.parametrize("unit", ["prefix", "outcome"])
def test_a_function_labels_as_an_endpoint_of_the_same_scores_does_but_for_its_words(tmp_path, stub, unit, capfd):
    asked = labelling(tmp_path, stub, unit=unit)
    label(asked, str(tmp_path / "asked"))
    (tmp_path / "mine.py").write_text(FUNCTION.format(unit=unit))
    function = {"judge.backend": "function", "judge.function": f"{tmp_path}/mine.py:words"}
    config = labelling(tmp_path, stub, unit=unit, **function)
    capfd.readouterr()
    label(config, str(tmp_path / "run"))
    assert "max_context_tokens" not in capfd.readouterr().err  # there is no prompt
    ours, theirs = (read_jsonl(tmp_path / name / "lessons.jsonl") for name in ("run", "asked"))
    for row in theirs:
        for labelled in row.get("segments", [row]):
            labelled["judgement"] = None
    assert ours == theirs and len(ours) == (12 if unit == "prefix" else len(theirs))
    assert read_lessons(str(tmp_path / "run/lessons.jsonl"))
    path, before = tmp_path / "run/lessons.jsonl", (tmp_path / "run/lessons.jsonl").read_bytes()
    label(config, str(tmp_path / "run"))
    assert path.read_bytes() == before
    (tmp_path / "mine.py").write_text(FUNCTION.format(unit=unit) + "\n# another")
    with pytest.raises(ValueError, match="is not what the run began with"):
        label(config, str(tmp_path / "run"))


def test_whole_rollouts_and_some_of_them(tmp_path, stub):
    label(labelling(tmp_path, stub, unit="outcome", count=7), str(tmp_path / "run"))
    rows = read_jsonl(tmp_path / "run/lessons.jsonl")
    assert len(rows) == 7 and all(row["trace"] in RESPONSES and "segments" not in row for row in rows)
    assert {row["score"] for row in rows} <= {0.0, 0.75, 1.0} and len({(x["id"], x["rollout"]) for x in rows}) == 7
    assert len(read_lessons(str(tmp_path / "run/lessons.jsonl"))) == 7


def test_a_rollout_without_any_score_is_no_lesson(tmp_path):
    with StubEndpoint(lambda seen, before: Answer("No idea.")) as silent:
        label(labelling(tmp_path, silent, unit="outcome"), str(tmp_path / "run"))
        asked = len(silent.seen)
        label(labelling(tmp_path, silent, unit="outcome"), str(tmp_path / "run"))
        assert asked == len(silent.seen) == 12  # nor asked again
    assert (tmp_path / "run/lessons.jsonl").read_text() == ""


def test_stopped_and_started_again_it_asks_only_what_is_missing(tmp_path, monkeypatch, capfd):
    with StubEndpoint(words) as server:
        config = labelling(tmp_path, server, wave=8, group=1)
        asked = iter([False, True])
        with monkeypatch.context() as stopping:
            stopping.setattr(StopRequest, "agreed", lambda self: next(asked))
            label(config, str(tmp_path / "run"))
        assert "stopped; start again" in capfd.readouterr().err and not (tmp_path / "run/lessons.jsonl").exists()
        before = len(server.seen)
        label(config, str(tmp_path / "run"))
        label(config, str(tmp_path / "whole"))
        again = len(server.seen) - before
    whole, run = ((tmp_path / name / "lessons.jsonl").read_text() for name in ("whole", "run"))
    assert run == whole and 0 < before and before + again == 2 * len([x for row in read_jsonl_text(whole) for x in row])


def read_jsonl_text(text):
    return [json.loads(line)["segments"] for line in text.splitlines()]


def test_other_rollouts_are_refused_in_a_folder_that_has_asked(tmp_path, stub):
    config = labelling(tmp_path, stub)
    label(config, str(tmp_path / "run"))
    path = tmp_path / "rollouts.jsonl"
    path.write_text(path.read_text().replace("third", "fourth"))
    with pytest.raises(ValueError, match="scores.jsonl: rollout 0 of problem 'p0' is not the one that it was"):
        label(config, str(tmp_path / "run"))


def test_scores_by_the_nearest_digit_are_said(tmp_path, stub, capfd):
    label(labelling(tmp_path, stub, unit="outcome"), str(tmp_path / "run"))
    output = capfd.readouterr().out
    digits = np.array([int(x) for x in re.search(r"1: (\d+), 2: (\d+), 3: (\d+), 4: (\d+), 5: (\d+)", output).groups()])
    assert digits.tolist() == [4, 0, 0, 4, 4] and "12 of 12 with a score; 12 scores" in output
