"""How good the learned judge was on a run's own rollouts: by how far they are right, and by their first fault.

    python -m configs.mini.judged runs/mini-learned [first step] [last step]

Reads `rollouts/`, where the run has left the judge's scores, and compares them with the exact ones.  Averages hide
what RL finds: a judge that is right about 99 of 100 rollouts can be wrong about every one of the hundredth kind.
"""

from __future__ import annotations

import argparse
import collections
import operator as op
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from scipy.stats import spearmanr

from configs.mini.exact import digit, likert
from configs.mini.task import LABELS, Puzzle, parse_statement, progress, right_states
from exprl_jax.files import read_jsonl
from exprl_jax.text_tables import align


class Case(NamedTuple):
    """A rollout that was judged.

    Attributes:
      right: leading steps that are right.
      fault: the kind of the first fault.
      exact: the digit that an exact judge writes.
      judged: the learned judge's; None where it wrote no score.
      counted: steps that it wrote down before its first `!`; None where it wrote nothing.
    """

    right: int
    fault: str
    exact: int
    judged: int | None
    counted: int | None


def cases(rows: Iterator[Mapping[str, Any]]) -> Iterator[Case]:
    """Rollouts whose whole text was judged."""
    for row in rows:
        score, puzzle = row["segments"][0]["score"], parse_statement(row["problem"])
        exact = digit(row["problem"], likert(row["problem"], row["response"], "outcome"))
        right = progress(puzzle, row["response"]).right
        judged = None if score is None else round(1 + 4 * score)
        yield Case(right, first_fault(puzzle, row["response"]), exact, judged, counted(row["segments"][0]["judge"]))


def counted(judgement: str | None) -> int | None:
    """Steps without a `!` at the beginning of what a judge wrote."""
    if judgement is None:
        return None
    steps = re.split(r"(?:^|\n)### ", judgement.partition("\n\\boxed{")[0])[1:]
    return next((n for n, step in enumerate(steps) if "!" in step), len(steps))


def first_fault(puzzle: Puzzle, text: str) -> str:
    """What is wrong with the first step that is not right: which registers, or another kind of fault."""
    reached = progress(puzzle, text)
    if reached.right == len(puzzle.letters):
        return "none" if reached.solved else "answer"
    label, letter = LABELS[reached.right], puzzle.letters[reached.right]
    found = re.search(rf"^### {label} ([a-z])(\d\d)(\d\d)(\d\d)(?!\d)", f"### A {text}", re.MULTILINE)
    if found is None:
        return "form"
    values = [int(found[i]) for i in (2, 3, 4)]
    wrong = "".join(x for x, ours, its in zip("xyz", values, right_states(puzzle)[reached.right]) if ours != its)
    return " ".join(filter(None, [wrong, "" if found[1] == letter else "letter"]))


def report(found: list[Case]) -> str:
    """A table of agreement by fault and by leading right steps, and what is said of all."""
    told = [case for case in found if case.judged is not None]
    rank = spearmanr([case.exact for case in told], [case.judged for case in told])[0] if told else float("nan")
    by_right = spearmanr([case.right for case in told], [case.judged for case in told])[0] if told else float("nan")
    lines = [
        f"{len(found)} rollouts, {len(found) - len(told)} without a score; Spearman {rank:.3f} with the exact digit"
    ]
    lines[0] += f", {by_right:.3f} with leading right steps"
    if compared := [(case.right, case.counted) for case in found if case.counted is not None]:
        shares = [sum(test(a, b) for a, b in compared) / len(compared) for test in (op.lt, op.eq, op.gt)]
        lines.append("right steps counted: {:.3f} too many, {:.3f} equal, {:.3f} too few".format(*shares))
    for least in (2, 3, 4, 5):
        low = [case.judged >= least for case in told if case.exact < least]
        high = [case.judged < least for case in told if case.exact >= least]
        lines.append(f"at least {least}: false positives {_share(low)}, false negatives {_share(high)}")
    for name in ("fault", "right"):
        groups = collections.defaultdict(list)
        for case in told:
            groups[getattr(case, name)].append(case)
        rows = [[name, "rollouts", "too high", "equal", "too low"]]
        for key, group in sorted(groups.items()):
            counts = [sum(c.judged > c.exact for c in group), sum(c.judged == c.exact for c in group)]
            rows.append([key, len(group), counts[0], counts[1], len(group) - sum(counts)])
        lines += ["", align(rows, left=1)]
    return "\n".join(lines)


def _share(wrong: list[bool]) -> str:
    return f"{sum(wrong) / len(wrong):.3f} of {len(wrong)}" if wrong else "– of 0"


def main(arguments: list[str]) -> int:
    """Prints the tables and returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m configs.mini.judged", description=__doc__.partition("\n")[0])
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("first", type=int, nargs="?", default=1)
    parser.add_argument("last", type=int, nargs="?", default=2**31)
    options = parser.parse_args(arguments)
    steps = {int(path.stem.removeprefix("step_")): path for path in options.workdir.glob("rollouts/step_*.jsonl")}
    files = [steps[step] for step in sorted(steps) if options.first <= step <= options.last]
    print(report([case for path in files for case in cases(read_jsonl(path))]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
