"""The miniature's task: three registers, and a list of operations that the model half knows.

A puzzle is a start state of three registers mod 20 and K operations, written `AfBgCk…071903`: label and letter of each
operation, then the start state.  An operation adds a constant to one register.  Each letter has a right reading and a
*slip*, which adds another constant to another register; a model that slips at every other step solves hardly any puzzle
of ten, though it can do each of its steps.  K and the rate of right readings are the dial of difficulty.

The model writes its own style, one step a heading:

    f101903
    ### B g102603
    …
    \\boxed{030103}

References are in two foreign styles, a tag for each register: the answer first, before anything from which it could be
computed, or forward with the answer at the end:

    \\boxed{030103} Ax10 Ay19 Az03 Bx10 By06 …          Ax10 Ay19 Az03 Bx10 By06 … \\boxed{030103}

Everything here is a pure function of its arguments and of a numpy Generator.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

MODULUS = 20
LABELS = "ABCDEFGHIJ"
REGISTERS = "xyz"

State = tuple[int, int, int]
Style = Literal["answer_first", "forward"]


class Rule(NamedTuple):
    """Adds a constant to a register, mod 20.

    Attributes:
      register: 0, 1 or 2.
      constant: 1 to 19.
    """

    register: int
    constant: int

    def __call__(self, state: State) -> State:
        """The state after it."""
        values = list(state)
        values[self.register] = (values[self.register] + self.constant) % MODULUS
        return tuple(values)


class Operation(NamedTuple):
    """What a letter means, and what a model that slips takes it for."""

    right: Rule
    slip: Rule


# Sixteen different constants, so that no reading is another letter's.
OPERATIONS = {
    "f": Operation(Rule(0, 3), Rule(1, 11)),
    "g": Operation(Rule(1, 7), Rule(2, 2)),
    "h": Operation(Rule(2, 12), Rule(0, 5)),
    "j": Operation(Rule(0, 16), Rule(2, 9)),
    "k": Operation(Rule(1, 4), Rule(0, 13)),
    "m": Operation(Rule(2, 18), Rule(1, 6)),
    "n": Operation(Rule(0, 10), Rule(1, 15)),
    "p": Operation(Rule(1, 1), Rule(2, 17)),
}
# How often the base policy's corpus reads each letter rightly: .40 to .60.
RIGHT_RATES = dict(zip(OPERATIONS, np.linspace(0.4, 0.6, len(OPERATIONS)).tolist()))


class Puzzle(NamedTuple):
    """A start state, and the letters of at most ten operations."""

    start: State
    letters: str

    @property
    def statement(self) -> str:
        """What the model is given."""
        return "".join(map("".join, zip(LABELS, self.letters))) + show(self.start)


class Progress(NamedTuple):
    """How far a solution in the model's own style is right.

    Attributes:
      right: leading steps with the asked letter, in its place, and the right state after it.
      written: steps.
      solved: all steps are right, and nothing else is boxed than the last state.
    """

    right: int
    written: int
    solved: bool


def draw_puzzle(rng: np.random.Generator, steps: int) -> Puzzle:
    """A puzzle of as many operations, all equally likely."""
    start = tuple(rng.integers(0, MODULUS, 3).tolist())
    return Puzzle(start, "".join(rng.choice(list(OPERATIONS), steps)))


def parse_statement(text: str) -> Puzzle:
    """The puzzle of a statement."""
    return Puzzle(read_state(text[-6:]), text[1:-6:2])


def right_states(puzzle: Puzzle) -> list[State]:
    """The state after each operation."""
    return noisy_states(np.random.default_rng(0), puzzle, dict.fromkeys(OPERATIONS, 1.0))


def noisy_states(rng: np.random.Generator, puzzle: Puzzle, right_rates: Mapping[str, float]) -> list[State]:
    """The state after each step of a solver that slips; a step goes on from the state before it, right or not.

    Args:
      right_rates: of each letter, the probability of its right reading.
    """
    states, state = [], puzzle.start
    for letter in puzzle.letters:
        operation = OPERATIONS[letter]
        state = (operation.right if rng.random() < right_rates[letter] else operation.slip)(state)
        states.append(state)
    return states


def solution(letters: str, states: Sequence[State]) -> str:
    """A whole solution in the model's own style, with the last state boxed.

    The first step has no heading: the state before any step then stands as far from it as before any other.
    """
    steps = [f"{letter}{show(state)}" for letter, state in zip(letters, states)]
    return f"{''.join(map(''.join, zip(_openings(len(steps)), steps)))}\n\\boxed{{{show(states[-1])}}}"


def reference(states: Sequence[State], style: Style) -> str:
    """The right states in a foreign style."""
    listed = [
        f"{label}{register}{value:02d}"
        for label, state in zip(LABELS, states)
        for register, value in zip(REGISTERS, state)
    ]
    box = f"\\boxed{{{show(states[-1])}}}"
    return " ".join([box, *listed] if style == "answer_first" else [*listed, box])


def progress(puzzle: Puzzle, text: str) -> Progress:
    """How far a solution, or the beginning of one, is right."""
    steps = re.findall(r"^### ([A-J]) ([a-z])(\d{6})(?!\d)", f"### A {text}", re.MULTILINE)
    wanted = list(zip(LABELS, puzzle.letters, map(show, right_states(puzzle))))
    right = 0
    while right < min(len(steps), len(wanted)) and steps[right] == wanted[right]:
        right += 1
    boxed = re.findall(r"\\boxed\{([^}]*)\}", text)
    return Progress(right, len(steps), right == len(steps) == len(wanted) and boxed == [wanted[-1][2]])


def show(state: State) -> str:
    """A state as six digits."""
    return "".join(f"{value:02d}" for value in state)


def read_state(text: str) -> State:
    """A state of six digits."""
    return tuple(int(text[i : i + 2]) for i in (0, 2, 4))


def _openings(steps: int) -> list[str]:
    """What stands before each step."""
    return ["", *(f"\n### {label} " for label in LABELS[1:steps])]
