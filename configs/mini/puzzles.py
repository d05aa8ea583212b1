"""The miniature's problem sets and the base policy's corpus, as rows that `data.problems` reads.

Every set has a seed of its own; a set holds no puzzle that an earlier set of the same number of operations holds, and
the corpus none of any set.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from configs.mini.task import (
    RIGHT_RATES,
    Puzzle,
    Style,
    draw_puzzle,
    noisy_states,
    reference,
    right_states,
    show,
    solution,
)

# Of ten operations the base solves next to none; of six it solves a few percent.
HARD, MILD = 10, 6
SETS = {"train": 256, "tune": 64, "held_out": 128}
Row = dict[str, str]


def problem_sets(steps: int, seed: int = 1) -> dict[str, list[Puzzle]]:
    """The puzzles of each of `SETS`, no puzzle twice.

    Args:
      steps: operations of each puzzle.
    """
    rng, seen = np.random.default_rng([seed, steps]), set()
    return {name: [_fresh(rng, steps, seen) for _ in range(size)] for name, size in SETS.items()}


def problem_rows(name: str, puzzles: Sequence[Puzzle], style: Style) -> list[Row]:
    """Rows with right references.

    Args:
      name: begins the ids.
    """
    return [_row(f"{name}/{i}", puzzle, reference(right_states(puzzle), style)) for i, puzzle in enumerate(puzzles)]


def corpus_rows(count: int, seed: int = 2) -> Iterator[Row]:
    """Solutions in the model's own style that slip at every other step, of 1 to 10 operations, longer ones more often.

    There are few puzzles of one or two operations, and they occur again; of the others none occurs twice or is in a
    problem set.
    """
    rng = np.random.default_rng(seed)
    seen = {puzzle for steps in (HARD, MILD) for puzzles in problem_sets(steps).values() for puzzle in puzzles}
    lengths = np.arange(1, HARD + 1)
    for i in range(count):
        steps = int(rng.choice(lengths, p=lengths / lengths.sum()))
        puzzle = draw_puzzle(rng, steps) if steps <= 2 else _fresh(rng, steps, seen)
        states = noisy_states(rng, puzzle, RIGHT_RATES)
        yield _row(f"corpus/{i}", puzzle, solution(puzzle.letters, states))


def write_problem_sets(folder: pathlib.Path) -> None:
    """`k10_train.jsonl`, `k10_train_forward.jsonl` and so on: each set with the answer first, and the training set with
    references in the forward style too."""
    for steps in (HARD, MILD):
        for name, puzzles in problem_sets(steps).items():
            stem = f"k{steps}_{name}"
            write_rows(folder / f"{stem}.jsonl", problem_rows(stem, puzzles, "answer_first"))
            if name == "train":
                write_rows(folder / f"{stem}_forward.jsonl", problem_rows(stem, puzzles, "forward"))


def write_rows(path: pathlib.Path, rows: Iterator[Row] | Sequence[Row]) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _row(name: str, puzzle: Puzzle, text: str) -> Row:
    return dict(id=name, problem=puzzle.statement, reference=text, answer=show(right_states(puzzle)[-1]))


def _fresh(rng: np.random.Generator, steps: int, seen: set[Puzzle]) -> Puzzle:
    while (puzzle := draw_puzzle(rng, steps)) in seen:
        pass
    seen.add(puzzle)
    return puzzle
