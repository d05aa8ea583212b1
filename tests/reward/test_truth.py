"""A truth about progress: columns and functions, as metrics of a run that no reward is made from."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from scipy.stats import spearmanr
from tiny_runs import LONG, config_dict, read_jsonl, rows, run, tiny, write_problems

from exprl_jax.data.problems import Problem
from exprl_jax.resolve import resolve
from exprl_jax.reward.judgements import Query
from exprl_jax.reward.truth import ColumnTruth, open_truth, read_column, share_reached


@pytest.mark.parametrize(
    "trace, share",
    [
        ("", 0),
        ("7 then 13 then 4", 1),
        ("so 7, and 13.", 2 / 3),
        ("13, 7, 4", 1 / 3),  # 13 is not reached after 7
        ("17 and 13 and 4", 0),  # 7 is no word of its own
        ("7 and 4", 1 / 3),  # up to the first that is missing
        ("7 13 13 4 9", 1),
    ],
)
def test_results_are_reached_in_order_and_as_whole_words(trace, share):
    assert share_reached(["7", "13", "4"], trace) == share


PROBLEMS = [Problem(f"p{i}", "?", "r", "1", "math", (), {"steps": ["7", "a+b"]} if i else {}) for i in range(3)]


def test_a_column_is_the_truth_of_the_problems_that_have_it():
    truth = ColumnTruth(read_column("steps", PROBLEMS), group=2)
    queries = [[Query(0, 0, "7")], [Query(0, 0, "x"), Query(1, 1, "7 a+b")], []]
    found = truth.submit(PROBLEMS, queries, 2).result()
    assert found.valid_PGN.tolist() == [[[False] * 2] * 2, [[True, False], [False, True]], [[False] * 2] * 2]
    assert found.score_PGN[1].tolist() == [[0, 0], [0, 1]] and found.asked_PGN.sum() == 3


@pytest.mark.parametrize("value", ["7", [], [7], [" "], {"a": "b"}])
def test_a_column_of_something_else_is_refused(value):
    problem = Problem("q", "?", "r", "1", "math", (), {"steps": value})
    with pytest.raises(ValueError, match="config.truth.source: column 'steps' of problem 'q' holds .*expected a list"):
        read_column("steps", [problem])


def test_a_column_that_no_problem_has_is_refused():
    with pytest.raises(ValueError, match="config.truth.source: got 'column:stps', expected the name of a column"):
        read_column("stps", PROBLEMS)


def test_no_source_is_no_truth():
    truth = resolve(config_dict("tiny")).truth
    opened = open_truth(truth, PROBLEMS, lambda _: "outcome", None, group=1)
    assert not opened.submit(PROBLEMS, [[Query(0, 0, "7")]] * 3, 1).result().valid_PGN.any()


@pytest.mark.parametrize("source", ["column:", "nothing", "a.py:", "a b:c"])
def test_a_source_that_is_none_is_refused(source):
    with pytest.raises(ValueError, match="^config.truth.source: got .*, expected '', 'column:<name>', 'package.module"):
        resolve(config_dict("tiny", None, {"truth.source": source}))


FUNCTION = '''
import zlib

def share(attempts):
    """A number that problem and segment decide; nothing is known of an empty trace."""
    return [zlib.crc32(f"{a.id} {a.segment}".encode()) % 997 / 996 if a.trace else None for a in attempts]
'''


@pytest.mark.long
def test_a_run_ranks_its_judge_by_a_function_and_its_rewards_do_not_know_it(tmp_path):
    """Prefixes and failed rollouts, against scipy on what the run wrote down; the run is the one without a truth."""
    (tmp_path / "truth.py").write_text(FUNCTION)
    changes = LONG | {"steps": 1, "advantage.overlong": "keep"}
    without = run(tiny("process", changes), tmp_path / "without")
    folder = run(tiny("process", changes | {"truth.source": f"{tmp_path}/truth.py:share"}), tmp_path / "with")
    (row,), (bare,) = rows(folder), rows(without)
    (path,) = (folder / "rollouts").glob("*")
    written = read_jsonl(path)
    assert len(written) == 32  # all of the step's
    pairs = {"failed": [], "prefixes": []}
    for rollout in written:
        segments = rollout["segments"]
        for n, segment in enumerate(segments):
            expected = zlib.crc32(f"{rollout['id']} {n}".encode()) % 997 / 996
            assert segment["truth"] == pytest.approx(expected, abs=1e-6)
        *before, last = [(s["score"], s["truth"]) for s in segments]
        pairs["prefixes"] += before
        pairs["failed"] += [last] if rollout["verdict"] != "correct" else []
    for name, of in pairs.items():
        scored = [pair for pair in of if pair[0] is not None]
        assert row[f"judge/truth_spearman_{name}"] == pytest.approx(spearmanr(*zip(*scored)).statistic, abs=1e-3)
    assert row["judge/truth_mean"] == pytest.approx(np.mean([r["segments"][-1]["truth"] for r in written]), abs=1e-6)
    truths = {name for name in row if "truth" in name}
    assert all(bare[name] is None for name in truths)
    assert {k: v for k, v in row.items() if k not in truths} == {k: v for k, v in bare.items() if k not in truths}


@pytest.mark.long
def test_a_function_of_another_content_is_noticed(tmp_path):
    (tmp_path / "truth.py").write_text(FUNCTION)
    changes = {"truth.source": f"{tmp_path}/truth.py:share", "steps": 1}
    folder = run(tiny("outcome", changes), tmp_path / "run")
    (tmp_path / "truth.py").write_text(FUNCTION + "\n\n")
    with pytest.raises(ValueError, match="truth.py:share is not what the run began with"):
        run(tiny("outcome", changes | {"steps": 2}), folder)


@pytest.mark.long
def test_a_column_is_a_runs_truth(tmp_path):
    data = [dict(id=f"m{i}", problem=f"{i} + 1?", reference=f"{i + 1}", answer="x", steps=["a", "b"]) for i in range(8)]
    changes = {"data.source": write_problems(tmp_path / "p.jsonl", data), "truth.source": "column:steps", "steps": 1}
    (row,) = rows(run(tiny("outcome", changes | {"advantage.overlong": "keep"}), tmp_path / "run"))
    assert 0 <= row["judge/truth_mean"] <= 1 and row["judge/truth_spearman_prefixes"] is None
