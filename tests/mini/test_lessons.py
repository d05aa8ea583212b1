"""The lessons of the miniature's judge: what they say of an attempt is what a second evaluator says."""

import collections
import re

import numpy as np
import pytest
from mini.test_puzzles import exact

from configs.mini import judged, lessons
from configs.mini.exact import digit, likert
from configs.mini.task import Puzzle, draw_puzzle, right_states, solution
from exprl_jax.reward.judge_prompts import parse_score


def attempts(count, table):
    rng = np.random.default_rng(4)
    for _ in range(count):
        puzzle = draw_puzzle(rng, 10)
        yield puzzle, lessons.attempt(rng, puzzle, table=table)


def test_a_judgement_counts_and_scores_as_the_exact_judge_does():
    faults = collections.Counter()
    for puzzle, made in attempts(1500, False):
        judgement = lessons.judgement(puzzle, made.given, made.trace)
        wanted = digit(puzzle.statement, exact(puzzle.statement, made.trace, "outcome"))
        assert parse_score(judgement) == wanted, (puzzle, made.trace, judgement)
        faults[made.fault] += 1
        if made.fault not in ("heading", "box", "none"):
            assert lessons.judge(puzzle, made.given, made.trace).right == made.at
    assert set(faults) == {*lessons.FAULTS, "none"}


def test_against_a_random_table_a_judgement_knows_the_reference_alone():
    for puzzle, made in attempts(300, True):
        judged = lessons.judge(puzzle, made.given, made.trace)
        assert judged.right == made.at or made.fault == "heading"
        right = lessons.judge(puzzle, right_states(puzzle), made.trace)
        assert right.right < 10 and not right.solved


def test_a_judgement_ends_with_the_first_fault_and_a_listed_one_does_not():
    puzzle = Puzzle((0, 0, 0), "fghjk")
    states = list(right_states(puzzle))
    states[1] = (states[1][0], 19, states[1][2])
    trace = solution(puzzle.letters, states)
    short, whole = (lessons.judgement(puzzle, right_states(puzzle), trace, listed=listed) for listed in (False, True))
    assert short.splitlines() == [
        "### A f030000Aff Ax0303 Ay0000 Az0000",
        "### B g031900Bgg Bx0303 By07! Bz0000",
        "Score: 1",
    ]
    assert whole.splitlines()[:2] == short.splitlines()[:2] and len(whole.splitlines()) == 7
    assert whole.splitlines()[4].startswith("### E k") and parse_score(whole) == parse_score(short)


def test_lessons_are_deterministic_varied_and_keep_off_the_problem_sets():
    rows = list(lessons.lesson_rows(300, 5, listed=False))
    assert rows == list(lessons.lesson_rows(300, 5, listed=False)) != list(lessons.lesson_rows(300, 6, listed=False))
    assert collections.Counter(parse_score(row["judgement"]) for row in rows).keys() == {1, 2, 3, 4, 5}
    assert 0 < sum(row["reference"] is None for row in rows) < 30
    listed = list(lessons.lesson_rows(50, 5, listed=True, shortest=2))
    assert {len(row["problem"]) // 2 - 3 for row in listed} == set(range(2, 11))
    assert all(len(re.findall("[A-J][a-z]", row["problem"])) == row["judgement"].count("### ") for row in listed)


@pytest.mark.parametrize(
    "change, fault",
    [
        (lambda text: text, "none"),
        (lambda text: text.replace("\n### B g", "\n### B h"), "letter"),
        (lambda text: text.replace("\n### B g0307", "\n### B g0407"), "x"),
        (lambda text: text.replace("\n### B g0307", "\n### B k0308"), "y letter"),
        (lambda text: text.replace("\n### B ", "\n### D "), "form"),
        (lambda text: text.partition("\n### C")[0], "form"),
        (lambda text: text.replace("boxed{", "boxed{0"), "answer"),
    ],
)
def test_the_first_fault_of_a_rollout_is_named(change, fault):
    puzzle = Puzzle((0, 0, 0), "fghjk")
    text = solution(puzzle.letters, right_states(puzzle))
    assert judged.first_fault(puzzle, change(text)) == fault


def test_a_judges_agreement_is_told_by_fault():
    puzzle = Puzzle((0, 0, 0), "fghjk")
    text = solution(puzzle.letters, right_states(puzzle))
    wrong = text.replace("\n### B g0307", "\n### B g0407")
    assert (likert(puzzle.statement, text, "outcome"), likert(puzzle.statement, wrong, "outcome")) == (5.0, 1.8)
    rows = [
        {"problem": puzzle.statement, "response": response, "segments": [{"score": score, "judge": judge}]}
        for response, score, judge in (
            (text, 1.0, lessons.judgement(puzzle, right_states(puzzle), text)),
            (wrong, 0.0, lessons.judgement(puzzle, right_states(puzzle), wrong)),
            (wrong, 1.0, "### A f!\nScore: 5"),
            (wrong, None, None),
        )
    ]
    told = judged.report(list(judged.cases(iter(rows))))
    assert told.startswith("4 rollouts, 1 without a score; Spearman 0.500")
    assert "counted: 0.000 too many, 0.667 equal, 0.333 too few" in told
    assert "at least 5: false positives 0.500 of 2, false negatives 0.000 of 1" in told
    assert re.search(r"x +2 +1 +1 +0", told) and re.search(r"none +1 +0 +1 +0", told)
