"""What the miniature's judge is taught: to write down reference and attempt side by side, and to count.

A judgement goes through the attempt step by step: its letter and registers, then the letter that was asked and the
registers of the reference, each said again where the attempt has the same and marked `!` where it has not:

    ### B g102603Bgg Bx1010 By0606 Bz03!
    Score: 2

It ends with the first step that is not right (`listed` ones go on to the last step), or with the answer, which is
compared in the same way.  Each word but the marks and the digit is a copy of something that stands after the same word
before it; a mark needs two words that are already there.  That is what a model of three layers learns in minutes, where
a digit alone teaches it nothing (docs/mini.md).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from configs.mini.exact import digit
from configs.mini.puzzles import HARD, MILD, problem_sets
from configs.mini.task import (
    LABELS,
    MODULUS,
    OPERATIONS,
    REGISTERS,
    RIGHT_RATES,
    Puzzle,
    State,
    draw_puzzle,
    noisy_states,
    reference,
    right_states,
    show,
    solution,
)

FAULTS = ("slip", "letter", "one register", "two registers", "all registers", "heading", "short", "values", "box")


class Judged(NamedTuple):
    """A judgement.

    Attributes:
      text: what the judge writes before its score.
      right: leading steps that are right.
      solved: all of them are, and the answer too.
    """

    text: str
    right: int
    solved: bool


class Attempted(NamedTuple):
    """An attempt with a known fault.

    Attributes:
      given: the states that the reference has.
      fault: one of `FAULTS`, or `none`.
      at: steps before the fault; all of them are right.
    """

    trace: str
    given: Sequence[State]
    fault: str
    at: int


def judge(puzzle: Puzzle, given: Sequence[State], trace: str, *, listed: bool = False) -> Judged:
    """Compares an attempt with the states of a reference.

    Args:
      listed: goes on after a step that is not right.
    """
    text, right, faulty = "", 0, False
    for n, (label, asked, state) in enumerate(zip(LABELS, puzzle.letters, given)):
        heading = "### A " if n == 0 else f"\n### {label} "
        found = re.search(rf"^### {label} ([a-z])((?:\d\d){{0,3}})", f"### A {trace}", re.MULTILINE)
        compared, same = _compared(label, state, found[2]) if found else ("!", False)
        if found and len(found[2]) == 6:
            compared = f"{found[1]}{found[2]}{label}{asked}{_mark(asked, found[1])}{compared}"
        elif found:
            compared = f"{found[1]}{found[2]}!"
        same = same and found is not None and found[1] == asked
        text, faulty, right = text + heading + compared, faulty or not same, right + (same and not faulty)
        if faulty and not listed:
            return Judged(text, right, False)
    box = re.search(r"\n\\boxed\{((?:\d\d){3})\}", trace)
    compared, same = _compared(LABELS[len(given) - 1], given[-1], box[1]) if box else ("!", False)
    text += "\n\\boxed{" + (f"{box[1]}}}" if box else "") + compared
    return Judged(text, right, not faulty and same)


def judgement(puzzle: Puzzle, given: Sequence[State], trace: str, *, listed: bool = False) -> str:
    """What the judge should write, its score included."""
    judged = judge(puzzle, given, trace, listed=listed)
    steps = len(puzzle.letters)
    likert = 4.0 if judged.right == steps and not judged.solved else 1 + 4 * judged.right / steps
    return f"{judged.text}\nScore: {digit(puzzle.statement, likert)}"


def attempt(rng: np.random.Generator, puzzle: Puzzle, *, table: bool) -> Attempted:
    """An attempt with a fault somewhere, or without.

    Args:
      table: the reference's states are drawn at random, so that nothing but looking them up tells what they are.
    """
    steps = len(puzzle.letters)
    given = [_any_state(rng) for _ in range(steps)] if table else right_states(puzzle)
    at = int(rng.integers(steps)) if rng.random() < 0.6 else min(int(rng.geometric(0.5)) - 1, steps - 1)
    fault = str(rng.choice([*FAULTS, "none"], p=[0.2, 0.12, 0.2, 0.12, 0.1, 0.04, 0.05, 0.04, 0.04, 0.09]))
    states, letters = list(given), list(puzzle.letters)
    if fault == "slip":
        states[at] = OPERATIONS[letters[at]].slip(given[at - 1] if at else puzzle.start)
    elif fault == "letter":
        letters[at] = str(rng.choice([x for x in OPERATIONS if x != letters[at]]))
        if rng.random() < 0.7:
            states[at] = OPERATIONS[letters[at]].right(given[at - 1] if at else puzzle.start)
    elif fault.endswith(("register", "registers")):
        count = {"one": 1, "two": 2, "all": 3}[fault.partition(" ")[0]]
        states[at] = _altered(rng, given[at], rng.permutation(3)[:count])
    if fault in FAULTS[:5] and rng.random() < 0.5:  # what follows goes on from there, instead of being right again
        rest = Puzzle(states[at], puzzle.letters[at + 1 :])
        after = [_any_state(rng) for _ in rest.letters] if table else noisy_states(rng, rest, RIGHT_RATES)
        states = [*states[: at + 1], *after]
    trace = solution("".join(letters), states)
    if fault == "short":
        at = max(at, 1)
        trace = solution("".join(letters[:at]), states[:at])
        trace = trace if rng.random() < 0.7 else trace.rpartition("\n")[0]
    elif fault == "heading" and at:
        trace = trace.replace(f"\n### {LABELS[at]} ", f"\n### {rng.choice(list(LABELS))} ", 1)
    elif fault == "values":
        lines = trace.split("\n")
        lines[at] = lines[at][: -2 * int(rng.integers(1, 4))]
        trace = "\n".join(lines)
    elif fault == "box":
        at, lines = steps, trace.split("\n")
        lines[-1] = f"\\boxed{{{show(_altered(rng, states[-1], rng.permutation(3)[: rng.integers(1, 4)]))}}}"
        trace = "\n".join(lines if rng.random() < 0.7 else lines[:-1])
    elif fault == "none":
        at = steps
    return Attempted(trace, given, fault, at)


def differing(rng: np.random.Generator, puzzle: Puzzle) -> Attempted:
    """Random tables of reference and attempt that mostly differ: copying the one for the other is hardly ever right."""
    given = [_any_state(rng) for _ in puzzle.letters]
    agree = float(rng.choice([0.0, 0.3, 0.7], p=[0.5, 0.3, 0.2]))
    states = [tuple(v if rng.random() < agree else int(rng.integers(MODULUS)) for v in state) for state in given]
    letters = [x if rng.random() < 0.7 else str(rng.choice(list(OPERATIONS))) for x in puzzle.letters]
    return Attempted(solution("".join(letters), states), given, "all registers", 0)


def lesson_rows(count: int, seed: int, *, listed: bool, shortest: int = HARD) -> Iterator[dict[str, str | None]]:
    """Rows for `task="judge"`.

    Args:
      listed: random tables, compared to the last step; else attempts with one fault, half of them against random
        tables, compared up to it, and a few without a reference, of which only the digit is taught.
      shortest: steps of the shortest puzzle; the longest has ten.
    """
    rng = np.random.default_rng([seed, listed])
    known = {puzzle for steps in (HARD, MILD) for puzzles in problem_sets(steps).values() for puzzle in puzzles}
    for _ in range(count):
        steps = HARD if shortest == HARD else int(rng.integers(shortest, HARD + 1))
        while (puzzle := draw_puzzle(rng, steps)) in known:
            pass
        if listed:
            made = differing(rng, puzzle) if rng.random() < 0.8 else attempt(rng, puzzle, table=True)
        else:
            made = attempt(rng, puzzle, table=rng.random() < 0.5)
        text = judgement(puzzle, made.given, made.trace, listed=listed)
        row = dict(problem=puzzle.statement, reference=reference(made.given, "answer_first"), trace=made.trace)
        if not listed and rng.random() < 0.03:
            row["reference"], text = None, text.rpartition("\n")[2]
        yield row | dict(unit="outcome", judgement=text)


def _compared(label: str, state: State, written: str) -> tuple[str, bool]:
    """Each register of the reference with its mark, and whether all are the same."""
    values = [f"{value:02d}" for value in state]
    found = [written[i : i + 2] for i in (0, 2, 4)]
    pairs = zip(REGISTERS, values, found)
    return "".join(f" {label}{register}{value}{_mark(value, own)}" for register, value, own in pairs), values == found


def _mark(wanted: str, found: str) -> str:
    return wanted if wanted == found else "!"


def _any_state(rng: np.random.Generator) -> State:
    return tuple(rng.integers(0, MODULUS, 3).tolist())


def _altered(rng: np.random.Generator, state: State, registers: Sequence[int]) -> State:
    """A state in which each of some registers has another value."""
    values = list(state)
    for register in registers:
        values[register] = (values[register] + int(rng.integers(1, MODULUS))) % MODULUS
    return tuple(values)
