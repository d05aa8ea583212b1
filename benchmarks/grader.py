"""How often the graders agree with hand-labelled pairs of response and reference.

    python -m benchmarks.grader

Grades `grader_pairs*.jsonl` in tests/data/ with the math and the choice verifier, writes the figures
of docs/grader.md and prints the rate.
"""

from __future__ import annotations

import collections
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exprl_jax.reward.verifiers.choice import grade_choice
from exprl_jax.reward.verifiers.math import MathGrader

ROOT = Path(__file__).resolve().parents[1]
PAIRS = sorted((ROOT / "tests" / "data").glob("grader_pairs*.jsonl"))
DOCUMENT = ROOT / "docs" / "grader.md"

Pair = dict[str, Any]

# What is written by hand above it in the document stays.
_HEADING = "## The figures\n"


def read_pairs() -> list[Pair]:
    """The labelled pairs, file by file, in their order, with their file's stem."""
    lines = [(path, line) for path in PAIRS for line in path.read_text(encoding="utf-8").splitlines()]
    return [{"file": path.stem, **json.loads(line)} for path, line in lines]


def grade(pairs: Sequence[Pair], grader: MathGrader) -> list[str]:
    """The verdict of each pair's own verifier."""
    of_math = iter(grader.grade([(pair["response"], pair["answer"]) for pair in pairs if pair["kind"] == "math"]))
    return [
        str(
            next(of_math)
            if pair["kind"] == "math"
            else grade_choice(pair["response"], pair["answer"], tuple(map(tuple, pair["choices"])))
        )
        for pair in pairs
    ]


def report(pairs: Sequence[Pair], verdicts: Sequence[str]) -> str:
    """The figures of the document: agreement by kind and form, and every disagreement."""
    groups: dict[str, list[tuple[str, str]]] = collections.defaultdict(list)
    for pair, verdict in zip(pairs, verdicts, strict=True):
        for name in (f"**{pair['kind']}**", f"{pair['kind']}: {pair['form']}"):
            groups[name].append((pair["label"], verdict))
    lines = [_HEADING, "\n| | pairs | agree | agreement | called right, is not |\n|---|---|---|---|---|\n"]
    for name in sorted(groups, key=lambda name: (name.strip("*").partition(":")[0] != "math", name.lstrip("*"), name)):
        labels = groups[name]
        agree = sum(label == verdict for label, verdict in labels)
        false = sum(verdict == "correct" != label for label, verdict in labels)
        lines.append(f"| {name} | {len(labels)} | {agree} | {100 * agree / len(labels):.1f} % | {false} |\n")
    lines.append("\n## Every disagreement\n\n| form | response (its end) | reference | by hand | grader | |\n")
    lines.append("|---|---|---|---|---|---|\n")
    for pair, verdict in zip(pairs, verdicts, strict=True):
        if verdict != pair["label"]:
            cells = [pair["response"][-60:], pair["answer"]]
            shown = ["`" + " ".join(cell.replace("|", "\\|").split()) + "`" for cell in cells]
            why = pair.get("why", "")
            lines.append(f"| {pair['form']} | {shown[0]} | {shown[1]} | {pair['label']} | {verdict} | {why} |\n")
    return "".join(lines)


def main() -> None:
    """Writes the document and prints agreement and speed."""
    pairs = read_pairs()
    with MathGrader(workers=1, limit_s=20.0) as grader:
        grader.grade([("\\boxed{1}", "1")])
        start = time.perf_counter()
        verdicts = grade(pairs, grader)
        seconds = time.perf_counter() - start
    by_hand = DOCUMENT.read_text(encoding="utf-8").partition(_HEADING)[0]
    DOCUMENT.write_text(by_hand + report(pairs, verdicts), encoding="utf-8")
    agree = sum(verdict == pair["label"] for pair, verdict in zip(pairs, verdicts, strict=True))
    print(f"{agree} of {len(pairs)} agree ({100 * agree / len(pairs):.1f} %); {len(pairs) / seconds:.0f} pairs/s")


if __name__ == "__main__":
    main()
