"""The story sums of configs/smoke.py: what is told is what is asked, and the exact score is a second evaluator's."""

import json
import re

import numpy as np
import pytest
from tiny_runs import ROOT

from configs.sums import exact, stories

DATA = ROOT / "configs/data"


def told(statement):
    """The amounts of a story, as its words say: at first, and after each change."""
    amounts = [int(re.search(r" has (\d+) ", statement)[1])]
    for verb, size in re.findall(r"(gets|gives away) (\d+)", statement):
        amounts.append(amounts[-1] + int(size) * (1 if verb == "gets" else -1))
    return amounts


def test_the_committed_sets_are_what_the_generator_writes(tmp_path):
    stories.write(tmp_path)
    assert {path.stem for path in tmp_path.iterdir()} == set(stories.SETS)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (DATA / path.name).read_bytes()


def test_each_story_has_its_answer_and_no_two_have_the_same_numbers():
    rows = [json.loads(line) for name in stories.SETS for line in (DATA / f"{name}.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows) == sum(stories.SETS.values())
    assert len({tuple(told(row["problem"])) for row in rows}) == len(rows)
    assert all(told(row["problem"])[-1] == int(row["answer"]) and min(told(row["problem"])) > 0 for row in rows)
    assert stories.story_sets(2) != stories.story_sets(1) == stories.story_sets(1)


@pytest.mark.parametrize("steps, largest", [(1, 5), (3, 9), (6, 40)])
def test_steps_and_size_are_the_dial(steps, largest):
    drawn = [stories.draw_story(np.random.default_rng(seed), steps, largest) for seed in range(300)]
    assert {len(story.changes) for story in drawn} == {steps}
    assert {abs(n) for story in drawn for n in story.changes} == set(range(2, largest + 1))
    assert all(eval(line.partition("=")[0]) == result for story in drawn for line, result in checked(story))


def checked(story):
    """Each sum of a solution with the amount that the words of its story give."""
    lines = story.solution.splitlines()
    assert lines[-1] == f"The answer is \\boxed{{{told(story.statement)[-1]}}}."
    assert [int(line.partition("= ")[2]) for line in lines[:-1]] == told(story.statement)[1:]
    return zip(lines[:-1], told(story.statement)[1:], strict=True)


REFERENCE = "13 + 5 = 18\n18 - 6 = 12\n12 + 7 = 19\nThe answer is \\boxed{19}."


@pytest.mark.parametrize(
    "trace, whole, beginning",
    [
        (REFERENCE, 1.0, 1.0),
        ("\n13+5=18.\n\n18 - 6 = 12\n12 + 7 = 19\nSo \\boxed{ 19 }", 1.0, 1.0),
        ("13 + 5 = 18\n18 - 6 = 12\n", 0.5, 0.75),
        ("13 + 5 = 18\n18 + 6 = 24\n24 + 7 = 31\n\\boxed{31}", 0.25, 0.0625),
        ("13 + 5 = 18\n18 - 6 = 12\n12 + 7 = 19\nThe answer is \\boxed{18}.", 0.75, 0.1875),
        (f"{REFERENCE}\nNo: \\boxed{{20}}", 0.75, 0.25),
        ("The answer is \\boxed{19}.", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_the_exact_score(trace, whole, beginning):
    assert exact.value(REFERENCE, trace, "outcome") == whole
    assert exact.value(REFERENCE, trace, "prefix") == beginning


def test_a_random_fault_costs_what_comes_after_it():
    rng = np.random.default_rng(3)
    for _ in range(200):
        story = stories.draw_story(rng, int(rng.integers(1, 6)), 9)
        lines, n = story.solution.splitlines(), int(rng.integers(len(story.changes)))
        lines[n] = re.sub(r"= (\d+)", lambda found: f"= {int(found[1]) + 1}", lines[n])
        assert exact.value(story.solution, "\n".join(lines), "outcome") == n / (len(story.changes) + 1)
        assert exact.value(story.solution, "\n".join(lines[:n]), "prefix") == (
            0.5 + 0.5 * n / (len(story.changes) + 1) if n else 0.0
        )
