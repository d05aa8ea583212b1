"""Story sums: somebody has some things, gets more and gives away, several times over; how many are left?

    python -m configs.sums.stories        writes configs/data/story_sums*.jsonl

Steps and the size of the numbers are the dial of difficulty.  A solution writes one sum a line and boxes the last:

    12 + 5 = 17
    17 - 8 = 9
    9 + 3 = 12
    The answer is \\boxed{12}.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "data"
STEPS, LARGEST = 3, 9  # of the committed sets
# In the order in which they are drawn: no story is in two of them.
SETS = {"story_sums": 256, "story_sums_tune": 64, "story_sums_held_out": 128, "story_sums_examples": 2}
NAMES = "Ada Ben Cleo Dan Elif Finn Gita Hugo Ines Jun Kofi Lena Mara Nils Olga Paul Rosa Sami Tove Yuri".split()
THINGS = "apples beads books buttons cards coins marbles pens shells stamps".split()


class Story(NamedTuple):
    """A problem.

    Attributes:
      start: what there is at first.
      changes: what comes (positive) or goes (negative), in order.
    """

    name: str
    thing: str
    start: int
    changes: tuple[int, ...]

    @property
    def statement(self) -> str:
        """What the model is given."""
        told = ", then ".join(f"gets {n} more" if n > 0 else f"gives away {-n}" for n in self.changes)
        return f"{self.name} has {self.start} {self.thing}, {told}. How many {self.thing} does {self.name} have now?"

    @property
    def results(self) -> list[int]:
        """How many there are after each change."""
        return np.cumsum([self.start, *self.changes])[1:].tolist()

    @property
    def solution(self) -> str:
        """The reference."""
        before = [self.start, *self.results]
        sums = [
            f"{old} {'+' if n > 0 else '-'} {abs(n)} = {new}" for old, n, new in zip(before, self.changes, before[1:])
        ]
        return "\n".join([*sums, f"The answer is \\boxed{{{before[-1]}}}."])


def draw_story(rng: np.random.Generator, steps: int, largest: int) -> Story:
    """A story of as many changes of 2 to `largest`; nobody gives away as much as there is."""
    name, thing = str(rng.choice(NAMES)), str(rng.choice(THINGS))
    start = now = int(rng.integers(5, 2 * largest + 3))
    changes = []
    for _ in range(steps):
        size = int(rng.integers(2, largest + 1))
        changes.append(-size if rng.random() < 0.5 and now > size else size)
        now += changes[-1]
    return Story(name, thing, start, tuple(changes))


def story_sets(seed: int = 1) -> dict[str, list[Story]]:
    """The stories of each of `SETS`; no two, of one set or of two, have the same numbers."""
    rng, seen = np.random.default_rng(seed), set()
    return {name: [_fresh(rng, seen) for _ in range(size)] for name, size in SETS.items()}


def rows(name: str, stories: list[Story]) -> Iterator[dict[str, str]]:
    """As `data.problems` reads them.

    Args:
      name: begins the ids.
    """
    for i, story in enumerate(stories):
        problem = dict(problem=story.statement, reference=story.solution, answer=str(story.results[-1]))
        yield dict(id=f"{name}/{i}", **problem, domain="math")


def write(folder: pathlib.Path) -> None:
    """Writes a file for each set."""
    for name, stories in story_sets().items():
        text = "".join(json.dumps(row) + "\n" for row in rows(name, stories))
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def _fresh(rng: np.random.Generator, seen: set[tuple[object, ...]]) -> Story:
    while (numbers := (story := draw_story(rng, STEPS, LARGEST))[2:]) in seen:
        pass
    seen.add(numbers)
    return story


if __name__ == "__main__":
    write(FOLDER)
