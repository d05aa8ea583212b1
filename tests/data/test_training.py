"""The problems of a run: what is held out, and a position in data that have changed."""

import dataclasses

import pytest
from tiny_runs import PROBLEMS, ROOT, tiny, write_problems

from exprl_jax.data.problems import read_problems
from exprl_jax.data.training import check_position, fingerprint, read_training_problems


def test_held_out_problems_are_refused_unless_told_otherwise(tmp_path):
    held_out = write_problems(tmp_path / "held_out.jsonl", [PROBLEMS[1] | {"id": "elsewhere"}])
    source = {"data.source": write_problems(tmp_path / "problems.jsonl", PROBLEMS), "data.held_out": held_out}
    with pytest.raises(ValueError, match="1 of 8 training problems are held out for evaluation: 'm1' is 'elsewhere'"):
        read_training_problems(tiny("outcome", source).data, references=True)
    allowed = tiny("outcome", source | {"data.allow_held_out": True}).data
    assert len(read_training_problems(allowed, references=True)) == 8


def test_a_position_is_refused_in_other_data():
    problems = read_problems(str(ROOT / "configs/data/arithmetic.jsonl"))
    position = {"next_batch": 3, "problems": fingerprint(problems)}
    check_position(position, list(problems))
    message = "config.data.source: its problems are not those of the run's first 3 steps"
    for others in (problems[:-1], problems[::-1], [dataclasses.replace(problems[0], answer="0"), *problems[1:]]):
        with pytest.raises(ValueError, match=message):
            check_position(position, others)
