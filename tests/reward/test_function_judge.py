"""A function as judge: what it is given, what is made of what it returns, and that nothing waits for it without end."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import signal
import textwrap
import time

import numpy as np
import pytest
from tiny_runs import MIXED, PROBLEMS, assert_same_parameters, read_jsonl, rows, run, tiny, write_problems

from exprl_jax.data.problems import Problem, read_problems
from exprl_jax.reward.function_judge import FunctionJudge
from exprl_jax.reward.functions import function_files
from exprl_jax.reward.judgements import Query
from exprl_jax.reward.judges import judge_pool
from exprl_jax.reward.verifiers.verdict import Verdict

PATIENCE = 60.0  # far more than a loaded machine needs; no test waits for it
ASKED = [
    Problem("p0", "1 + {2}?", reference="three", answer="3", domain="math", extra={"level": 4, "tags": ["a"]}),
    Problem("p1", "Which?", reference="B.", answer="B", domain="science", choices=(("A", "iron"), ("B", "water"))),
    Problem("p2", "Why?", reference="So.", answer="so", domain="science"),
]
QUERIES = [[Query(0, 0, "a", True), Query(1, 2, "ab\n\ud7ff", False)], [], [Query(0, 1, "", None)]]
UNITS = {"p0": "prefix", "p1": "prefix", "p2": "outcome"}

# Files of functions, by the name of what they do.
SCORERS = {
    "by_length": """
        def score(attempts):
            return [None if not a.trace else len(a.trace) / 10 for a in attempts]
    """,
    "recording": """
        import dataclasses, json, pathlib
        def score(attempts):
            print("seen", len(attempts))
            with pathlib.Path(__file__).with_suffix(".jsonl").open("a") as file:
                file.write(json.dumps([dataclasses.asdict(a) for a in attempts]) + "\\n")
            return [1] * len(attempts)
    """,
    "arrays": """
        import numpy
        from neighbour import HALF
        def score(attempts):
            return numpy.full(len(attempts), HALF)
    """,
    "raising": """
        def score(attempts):
            return [float(a.extra["level"]) / 4 for a in attempts]
    """,
    "hanging": """
        import time
        def score(attempts):
            if any(a.trace == "a" for a in attempts):
                time.sleep(1000)
            return [0.5] * len(attempts)
    """,
    "dying": """
        import os
        def score(attempts):
            if any(a.trace == "a" for a in attempts):
                os._exit(3)
            return [0.5] * len(attempts)
    """,
}


def write(folder, body, name="scorer.py"):
    path = folder / name
    path.write_text(textwrap.dedent(body), encoding="utf-8")
    return f"{path}:score"


@contextlib.contextmanager
def judging(function, **workers):
    """A judge of ASKED."""
    config = tiny("process").judge
    limits = dataclasses.replace(config.workers, **dict(count=1, seconds=PATIENCE) | workers)
    config = dataclasses.replace(config, backend="function", function=function, workers=limits)
    with judge_pool(config) as pool:
        yield FunctionJudge(config, pool, UNITS, {p.id: p.reference for p in ASKED}, group=2)


# ------------------------------------------------------------------------------------------------ what is scored


def test_scores_stand_where_their_queries_do(tmp_path):
    with judging(write(tmp_path, SCORERS["by_length"]), batch=2, count=2) as judge:
        got = judge.score(ASKED, QUERIES, 3)
    score, valid, asked = (np.zeros((3, 2, 3), kind) for kind in (float, bool, bool))
    for index, value in {(0, 0, 0): 0.1, (0, 1, 2): 0.4, (2, 0, 1): None}.items():
        score[index], valid[index], asked[index] = value or 0.0, value is not None, True
    np.testing.assert_array_equal(got.score_PGN, score)
    np.testing.assert_array_equal(got.valid_PGN, valid)
    np.testing.assert_array_equal(got.asked_PGN, asked)
    assert not got.cut_PGN.any() and got.text == {} and got.tokens == 0


def test_a_function_sees_all_of_problem_and_trace(tmp_path):
    function = write(tmp_path, SCORERS["recording"])
    with judging(function, batch=2) as judge:
        judge.score(ASKED, QUERIES, 3)
        judge.verify(ASKED, [[], [], ["x"]])
    calls = read_jsonl(tmp_path / "scorer.jsonl")
    assert [len(call) for call in calls] == [2, 1, 1]  # of `batch`, over problems
    ours = ("id", "problem", "reference", "answer", "domain", "choices", "extra")
    expected = [
        (ASKED[0], dict(trace="a", unit="prefix", segment=0, ended=True)),
        (ASKED[0], dict(trace="ab\n\ud7ff", unit="prefix", segment=2, ended=False)),
        (ASKED[2], dict(trace="", unit="outcome", segment=1, ended=None)),
        (ASKED[2], dict(trace="x", unit="answer", segment=0, ended=None)),
    ]
    plain = json.loads(json.dumps([{n: getattr(p, n) for n in ours} | more for p, more in expected]))
    assert [attempt for call in calls for attempt in call] == plain


def test_the_other_columns_of_a_row_are_its_extra(tmp_path):
    row = dict(problem="1 + 2?", reference="three", answer="3", level=4, tags=["a", None], note=None)
    (problem,) = read_problems(write_problems(tmp_path / "a.jsonl", [row]))
    assert problem.extra == {"level": 4, "tags": ["a", None]}
    assert read_problems(str(tmp_path / "a.jsonl"), references=False)[0].extra == problem.extra


def test_whole_numbers_and_arrays_are_numbers(tmp_path):
    (tmp_path / "neighbour.py").write_text("HALF = 0.5")
    with judging(write(tmp_path, SCORERS["arrays"])) as judge:
        got = judge.score(ASKED, QUERIES, 3)
    assert got.valid_PGN.sum() == 3 and set(got.score_PGN[got.valid_PGN]) == {0.5}


def test_verdicts_are_scores_of_the_final_answer(tmp_path):
    with judging(write(tmp_path, SCORERS["by_length"])) as judge:
        got = judge.verify(ASKED, [[], [], ["12345", "1234", ""]])
    assert got == [[], [], [Verdict.correct, Verdict.wrong, Verdict.missing]]


# ------------------------------------------------------------------------------------------------ what goes wrong


def refused(function, **workers):
    with judging(function, **workers) as judge, pytest.raises(ValueError) as caught:
        judge.score(ASKED, QUERIES, 3)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_exception_is_named_with_its_problem_and_its_line(tmp_path):
    function = write(tmp_path, SCORERS["raising"])
    message = refused(function, batch=3)
    assert message == f"config.judge.function: {function}, problem 'p2': KeyError: 'level' (scorer.py line 3)"


@pytest.mark.parametrize(
    "returned, message",
    [
        ("[0.5]", "it returned 1 values for 3 attempts, expected one for each"),
        ("0.5", "it returned 0.5, expected a list with a value for each attempt"),
        ("'abc'", "it returned 'abc', expected a list with a value for each attempt"),
        ("[[1]] * len(attempts)", "it returned [1] for an attempt"),
        ("[1.5] * len(attempts)", "it returned 1.5, expected a number in [0, 1], or None for no score"),
        ("[float('nan')] * len(attempts)", "it returned nan, expected a number in [0, 1]"),
        ("[-10 ** 400] * len(attempts)", "expected a number in [0, 1]"),
        ("['0.5'] * len(attempts)", "it returned '0.5', expected a number in [0, 1]"),
        ("exit(3)", "SystemExit: 3"),
    ],
)
def test_what_is_no_list_of_scores_is_refused(returned, message, tmp_path):
    body = f"\n        def score(attempts):\n            return {returned}\n"
    assert message in refused(write(tmp_path, body), batch=3)


def test_a_call_beyond_its_time_has_no_scores_and_the_next_has(tmp_path):
    with judging(write(tmp_path, SCORERS["hanging"]), batch=1, seconds=2.0) as judge:
        before = judge.pool.pids
        got = judge.score(ASKED, QUERIES, 3)
        assert judge.pool.pids != before
        assert judge.score(ASKED, [[], [], [Query(0, 0, "b")]], 3).valid_PGN.sum() == 1
    assert np.argwhere(got.valid_PGN).tolist() == [[0, 1, 2], [2, 0, 1]] and got.asked_PGN.sum() == 3


def test_a_call_whose_process_dies_has_no_scores_and_the_next_has(tmp_path):
    with judging(write(tmp_path, SCORERS["dying"]), batch=1) as judge:
        got = judge.score(ASKED, QUERIES, 3)
    assert np.argwhere(got.valid_PGN).tolist() == [[0, 1, 2], [2, 0, 1]] and got.asked_PGN.sum() == 3


def test_too_many_missing_scores_end_the_run(tmp_path):
    function = write(tmp_path, SCORERS["dying"])
    assert refused(function, batch=2) == (
        f"config.judge.function: {function}: 2 of 3 scores are missing, more than the fraction workers.max_missing = "
        f"0.5; the last: the call ended its process (workers.seconds = {PATIENCE:g})"
    )


def test_workers_that_somebody_kills_are_replaced(tmp_path):
    body = SCORERS["arrays"].replace("from neighbour import HALF", "HALF = 1")
    with judging(write(tmp_path, body), batch=1) as judge:
        assert judge.score(ASKED, QUERIES, 3).valid_PGN.sum() == 3
        os.kill(judge.pool.pids[0], signal.SIGKILL)
        assert judge.score(ASKED, QUERIES, 3).valid_PGN.sum() == 3  # asked again in a fresh process


def test_closing_does_not_wait_for_what_hangs(tmp_path):
    body = SCORERS["hanging"].replace("time.sleep", "open(__file__ + '.hangs', 'w'); time.sleep")
    with judging(write(tmp_path, body), seconds=10 * PATIENCE) as judge:
        pending, begun = judge.submit(ASKED, QUERIES, 3), time.monotonic()
        while not (tmp_path / "scorer.py.hangs").exists() and time.monotonic() - begun < PATIENCE:
            time.sleep(0.05)
        begun = time.monotonic()
    with pytest.raises(ValueError, match="ended its process"):
        pending.result()
    assert time.monotonic() - begun < PATIENCE


@pytest.mark.parametrize(
    "name, message",
    [
        ("nowhere.py:score", "FileNotFoundError: no such file in "),
        ("no.such.module:score", "ModuleNotFoundError: No module named 'no'"),
        ("json:score", "json has no function 'score'; it has dump, dumps, "),
        ("{folder}/broken.py:score", r"SyntaxError: invalid syntax \(broken.py, line 1\)"),
        ("{folder}/late.py:score", r"ZeroDivisionError: division by zero \(late.py line 2\)"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_one_line(name, message, tmp_path):
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "late.py").write_text("x = 0\n1 / x\n")
    with pytest.raises(ValueError, match=rf"^config.judge.function: .*{message}") as caught:
        function_files("judge.function", name.format(folder=tmp_path))
    assert "\n" not in str(caught.value)


def test_the_files_of_a_function_are_its_modules_and_its_own(tmp_path):
    (tmp_path / "there.py").write_text("def score(attempts): return []")
    (tmp_path / "here.py").write_text("from there import score")
    files = function_files("judge.function", f"{tmp_path}/here.py:score")
    assert [file.name for file in files] == ["here.py", "there.py"]


# ------------------------------------------------------------------------------------------------ in a run


SPREAD = """
    import zlib
    def score(attempts):
        return [zlib.crc32((a.unit + a.reference + a.trace).encode()) % 101 / 100 for a in attempts]
"""
JUDGED = {"judge.backend": "function", "judge.workers.seconds": PATIENCE, "advantage.overlong": "keep", "steps": 1}


RECORDED = """
    import json, pathlib, zlib
    def score(attempts):
        scores = [zlib.crc32((a.unit + a.trace).encode()) % 101 / 100 for a in attempts]
        with pathlib.Path(__file__).with_suffix(".jsonl").open("a") as file:
            for a, score in zip(attempts, scores):
                assert a.reference
                file.write(json.dumps([a.id, a.unit, a.segment, a.ended, a.trace, score]) + "\\n")
        return scores
"""


def test_a_function_judges_every_route_and_verifies(tmp_path):
    """A real run: scores of the rollouts are the function's, of every unit, and open-ended answers are its too."""
    source = write_problems(tmp_path / "problems.jsonl", PROBLEMS)
    changes = {"judge.function": write(tmp_path, RECORDED), "data.source": source, "judge.workers.count": 1}
    folder = run(tiny("outcome", MIXED | JUDGED | changes), tmp_path / "run")
    (row,), recorded = rows(folder), read_jsonl(tmp_path / "scorer.jsonl")
    samples = [s for s in read_jsonl(folder / "rollouts" / "step_000001.jsonl") if s["kind"] != "code"]
    ours = collections.Counter(
        (sample["id"], n, sample["ended"], segment["score"])
        for sample in samples
        for n, segment in enumerate(sample["segments"])
    )
    scored = [each for each in recorded if each[1] != "answer"]
    assert ours == collections.Counter((name, n, ended, score) for name, _, n, ended, _, score in scored)
    units = {name: {each[1] for each in scored if each[0] == name} for name in ("m0", "c0", "s0")}
    assert units == {"m0": {"prefix"}, "c0": {"prefix"}, "s0": {"outcome"}}
    asked = {trace: score for *_, unit, _, _, trace, score in recorded if unit == "answer"}
    science = [sample for sample in samples if sample["kind"] == "science"]
    assert {s["response"]: s["verdict"] == "correct" for s in science} == {t: x >= 0.5 for t, x in asked.items()}
    assert row["judge/parsed"] == 1 and row["judge/asked"] == len(scored) and row["solve/missing"] == 0


def test_a_changed_function_is_noticed_when_a_run_goes_on(tmp_path):
    function = write(tmp_path, SPREAD)
    config = tiny("outcome", JUDGED | {"judge.function": function})
    folder = run(config, tmp_path / "run")
    longer = dataclasses.replace(config, steps=2)
    write(tmp_path, SPREAD.replace("% 101 / 100", "% 11 / 10"))
    with pytest.raises(ValueError, match=rf"function {function} is not what the run began with"):
        run(longer, folder)
    write(tmp_path, SPREAD)
    run(longer, folder)
    whole = run(longer, tmp_path / "whole")
    assert_same_parameters(folder, whole)
    assert rows(folder) == rows(whole)
    assert rows(whole)[0]["advantage/live_groups"] == 1
