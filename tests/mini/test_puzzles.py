"""The puzzles of the miniature against a second evaluator: their sets, the exact score, the tokenizer."""

import filecmp
import itertools
import json
import re
from typing import NamedTuple

import numpy as np
import pytest
from tiny_runs import ROOT

from configs.mini import puzzles, start
from configs.mini.exact import likert, right_so_far, score
from configs.mini.noise import misplaced
from configs.mini.task import (
    OPERATIONS,
    Puzzle,
    draw_puzzle,
    noisy_states,
    parse_statement,
    progress,
    reference,
    right_states,
    show,
    solution,
)
from exprl_jax.data.problems import check_held_out, read_problems
from exprl_jax.data.prompts import PromptStyle, policy_prompt
from exprl_jax.data.tokenizer import load_tokenizer
from exprl_jax.reward.judge_prompts import CONTINUATION, judge_messages

FOLDER = ROOT / "configs/mini"
FILES = sorted((FOLDER / "data").glob("*.jsonl"))
# What docs/mini.md says the letters mean, written down a second time: right reading, slip.
MEANINGS = {
    "f": ("x+3", "y+11"),
    "g": ("y+7", "z+2"),
    "h": ("z+12", "x+5"),
    "j": ("x+16", "z+9"),
    "k": ("y+4", "x+13"),
    "m": ("z+18", "y+6"),
    "n": ("x+10", "y+15"),
    "p": ("y+1", "z+17"),
}


def evaluate(statement, readings):
    """The registers after each operation, by the second table: `readings` says 0 (right) or 1 (slip) of each."""
    start = statement[-6:]
    values, after = {"x": int(start[:2]), "y": int(start[2:4]), "z": int(start[4:])}, []
    for letter, slip in zip(re.findall(r"[A-J]([a-z])", statement), readings, strict=True):
        register, constant = MEANINGS[letter][slip].split("+")
        values[register] = (values[register] + int(constant)) % 20
        after.append("".join(f"{values[name]:02}" for name in "xyz"))
    return after


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------------------------------ the task


def test_right_states_are_those_of_the_second_table():
    rng = np.random.default_rng(0)
    for steps in (1, 2, 6, 10, *rng.integers(1, 11, 40).tolist()):
        puzzle = draw_puzzle(rng, steps)
        assert parse_statement(puzzle.statement) == puzzle
        assert list(map(show, right_states(puzzle))) == evaluate(puzzle.statement, [0] * steps)


def test_a_solver_that_slips_takes_each_of_all_paths_as_often_as_it_should():
    puzzle, rates = Puzzle((3, 14, 15), "fkm"), {"f": 0.2, "k": 0.5, "m": 0.9}
    rng, count = np.random.default_rng(1), 4000
    drawn = [tuple(map(show, noisy_states(rng, puzzle, rates))) for _ in range(count)]
    expected = {}
    for readings in itertools.product((0, 1), repeat=3):
        share = np.prod([1 - rates[x] if slip else rates[x] for x, slip in zip(puzzle.letters, readings)])
        expected[tuple(evaluate(puzzle.statement, readings))] = share
    assert len(expected) == 8 and set(drawn) == set(expected)
    for path, share in expected.items():
        assert abs(drawn.count(path) / count - share) < 5 * (share * (1 - share) / count) ** 0.5


def test_no_reading_is_another_letters():
    readings = [rule for operation in OPERATIONS.values() for rule in operation]
    assert len({rule.constant for rule in readings}) == len(readings) == 16
    assert all(operation.right.register != operation.slip.register for operation in OPERATIONS.values())


# ------------------------------------------------------------------------------------------------ problem sets


def test_the_committed_sets_are_what_the_generator_writes(tmp_path):
    puzzles.write_problem_sets(tmp_path)
    names = [path.name for path in FILES]
    assert sorted(path.name for path in tmp_path.iterdir()) == names and len(names) == 8
    assert filecmp.cmpfiles(tmp_path, FOLDER / "data", names, shallow=False)[0] == names
    other = puzzles.problem_sets(10, seed=3)["train"]
    assert not set(other) & set(puzzles.problem_sets(10)["train"])


@pytest.mark.parametrize("steps", [10, 6])
def test_sets_share_no_puzzle_with_one_another_or_with_the_corpus(steps):
    sets = {name: read_problems(str(FOLDER / f"data/k{steps}_{name}.jsonl")) for name in puzzles.SETS}
    assert {name: len(problems) for name, problems in sets.items()} == puzzles.SETS
    statements = [problem.problem for problems in sets.values() for problem in problems]
    assert len(set(statements)) == len(statements)
    for one, other in itertools.combinations(sets.values(), 2):
        check_held_out(one, other)
    corpus = [row["problem"] for row in puzzles.corpus_rows(4000)]
    assert not set(corpus) & set(statements)
    long = [statement for statement in corpus if len(statement) > 10]  # of more than two operations
    assert len(set(long)) == len(long)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_references_and_answers_are_right_in_both_styles(path):
    for row in rows(path):
        states = evaluate(row["problem"], [0] * (len(row["problem"]) // 2 - 3))
        listed = [
            f"{label}{x}{state[i : i + 2]}"
            for label, state in zip("ABCDEFGHIJ", states)
            for x, i in zip("xyz", (0, 2, 4))
        ]
        box = f"\\boxed{{{states[-1]}}}"
        assert row["answer"] == states[-1]
        assert row["reference"].split(" ") == ([*listed, box] if "forward" in path.stem else [box, *listed])


def test_the_corpus_slips_as_often_as_the_rates_say():
    right, asked = dict.fromkeys(MEANINGS, 0), dict.fromkeys(MEANINGS, 0)
    for row in puzzles.corpus_rows(3000):
        before, written = row["problem"][-6:], re.findall(r"([a-z])(\d{6})\n", row["reference"])
        assert "".join(letter for letter, _ in written) == row["problem"][1:-6:2]
        for letter, state in written:
            asked[letter] += 1
            right[letter] += evaluate(f"A{letter}{before}", [0]) == [state]
            assert state in (evaluate(f"A{letter}{before}", [0]) + evaluate(f"A{letter}{before}", [1]))
            before = state
    for i, letter in enumerate(MEANINGS):
        share = 0.4 + 0.2 * i / 7
        assert abs(right[letter] / asked[letter] - share) < 5 * (share * (1 - share) / asked[letter]) ** 0.5


# ------------------------------------------------------------------------------------------------ the exact score


def exact(statement, trace, unit):
    """The score, read off the lines of a trace without a pattern over the whole."""
    steps = evaluate(statement, [0] * (len(statement) // 2 - 3))
    lines, right, written, broken = trace.split("\n"), 0, 0, False
    for n, line in enumerate(lines):
        heading, body = ("### A", line) if n == 0 and not line.startswith("###") else (line[:5], line[6:])
        if not heading.startswith("### ") or len(body) < 7 or not body[1:7].isdigit() or body[7:8].isdigit():
            continue
        written += 1
        label = "ABCDEFGHIJ"[written - 1] if written <= 10 else "?"
        wanted = f"{statement[2 * written - 1]}{steps[written - 1]}" if written <= len(steps) else None
        broken = broken or heading != f"### {label}" or body[:7] != wanted
        right += not broken
    if unit == "prefix":
        return 3 + 2 * right / len(steps) if right == written > 0 else 1 + right / len(steps)
    boxes = [part.partition("}")[0] for part in trace.split("\\boxed{")[1:] if "}" in part]
    whole = right == written == len(steps) and boxes == [steps[-1]]
    return 5.0 if whole else 4.0 if right == len(steps) else 1 + 4 * right / len(steps)


def traces(rng):
    """Solutions with faults of many kinds, and beginnings of them."""
    for _ in range(400):
        puzzle = draw_puzzle(rng, int(rng.integers(1, 11)))
        states, letters = list(right_states(puzzle)), list(puzzle.letters)
        fault, n = rng.integers(8), int(rng.integers(len(letters)))
        if fault == 0:
            states = noisy_states(rng, puzzle, dict.fromkeys(OPERATIONS, 0.7))
        elif fault == 1:
            letters[n] = str(rng.choice(list(OPERATIONS)))
        elif fault == 2:  # one register alone
            values = list(states[n])
            values[rng.integers(3)] = int(rng.integers(20))
            states[n] = tuple(values)
        text = solution("".join(letters), states)
        if fault == 3:
            text = text.rpartition("\n")[0]
        elif fault == 4:
            text += str(rng.choice([" \\boxed{000000}", " \\boxed{" + show(states[-1]) + "}", "\n### A "]))
        elif fault == 5:
            text = text.replace("\n### ", "\n## ", 1)
        elif fault == 6:
            text = text.replace("}", "7}")
        yield puzzle.statement, text
        yield puzzle.statement, text[: int(rng.integers(len(text) + 1))]


def test_the_exact_score_is_that_of_a_second_evaluator():
    seen = set()
    for statement, trace in traces(np.random.default_rng(2)):
        for unit in ("outcome", "prefix"):
            assert likert(statement, trace, unit) == pytest.approx(exact(statement, trace, unit)), (trace, unit)
            seen.add((unit, round(likert(statement, trace, unit))))
    assert seen == set(itertools.product(("outcome", "prefix"), range(1, 6)))


def test_the_score_of_a_half_right_solution_is_what_the_table_says():
    puzzle = Puzzle((0, 0, 0), "fghjk")
    right = right_states(puzzle)
    half = solution(puzzle.letters, [*right[:2], (9, 9, 9), *right[3:]])
    assert likert(puzzle.statement, half, "outcome") == pytest.approx(1 + 4 * 2 / 5)
    assert likert(puzzle.statement, half, "prefix") == pytest.approx(1 + 2 / 5)
    assert likert(puzzle.statement, half.partition("\n### C")[0] + "\n### C ", "prefix") == pytest.approx(3 + 2 * 2 / 5)
    assert progress(puzzle, half) == (2, 5, False)


class Text(NamedTuple):
    """What the functions read of an attempt."""

    problem: str
    trace: str
    unit: str = "outcome"


def test_a_flat_score_is_of_what_a_second_evaluator_finds_right_so_far():
    told = {}
    for statement, trace in traces(np.random.default_rng(6)):
        for unit, right in (("outcome", 5.0), ("prefix", 3.01)):
            (flat,) = right_so_far([Text(statement, trace, unit)])
            assert flat == (exact(statement, trace, unit) >= right), (trace, unit)
            told.setdefault(unit, set()).add(flat)
    assert told == {"outcome": {0.0, 1.0}, "prefix": {0.0, 1.0}}


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_a_share_of_scores_is_misplaced_and_always_the_same_ones(share):
    rng = np.random.default_rng(5)
    drawn = [draw_puzzle(rng, 10) for _ in range(1500)]
    rates = dict.fromkeys(OPERATIONS, 0.7)
    attempts = [Text(x.statement, solution(x.letters, noisy_states(rng, x, rates))) for x in drawn]
    right, told = score(attempts), misplaced(attempts, share)
    assert told == misplaced(attempts[::-1], share)[::-1]
    wrong = [a != pytest.approx(b) for a, b in zip(right, told)]
    assert abs(np.mean(wrong) - share) < 5 * (share * (1 - share) / 1500) ** 0.5 + 1e-9
    assert {round(10 * x, 6) for x in told} <= set(range(11))


# ------------------------------------------------------------------------------------------------ the tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(FOLDER / "models/start", "2026-01-01")


def test_the_committed_folder_is_what_the_generator_writes(tmp_path):
    """A prompt that has been reworded since is found here: then write folder and models anew."""
    start.write(tmp_path)
    for path in tmp_path.iterdir():
        assert json.loads(path.read_text()) == json.loads((FOLDER / "models/start" / path.name).read_text())


def test_every_prompt_is_short_and_every_text_comes_back(tokenizer):
    fallback = {i for i, content in enumerate(tokenizer.token_bytes) if len(content) == 1 and content[0] > 126}
    for path in FILES:
        for problem in read_problems(str(path)):
            prompt = policy_prompt(tokenizer, problem.question, PromptStyle())
            assert len(prompt) == 7 + 2 * (len(problem.problem) // 2 - 3) and not fallback & set(prompt)
            puzzle = parse_statement(problem.problem)
            own = solution(puzzle.letters, right_states(puzzle))
            for text, tokens in ((own, 5 * len(puzzle.letters) + 4), (problem.reference, 6 * len(puzzle.letters) + 5)):
                ids = tokenizer.encode(text)
                assert tokenizer.decode(ids) == text and len(ids) == tokens


@pytest.mark.parametrize("unit", ["outcome", "prefix"])
@pytest.mark.parametrize("readout", CONTINUATION)
def test_the_fixed_parts_of_a_judges_prompt_are_single_tokens(tokenizer, unit, readout):
    puzzle = draw_puzzle(np.random.default_rng(3), 10)
    given = reference(right_states(puzzle), "answer_first")
    messages = judge_messages(puzzle.statement, (), given, "math", unit, readout, "TRACE")
    prompt = tokenizer.render_split(messages, "TRACE", CONTINUATION[readout])
    # Role, rubric, role, "Problem:", the puzzle, "Reference solution:", the reference, "Attempt:" …
    assert len(prompt.head) == 3 + 1 + 23 + 1 + 65 + 1
    assert len(prompt.suffix) <= 3
