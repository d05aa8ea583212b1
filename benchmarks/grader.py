"""How often the graders agree with hand-labelled pairs of response and reference.

    python -m benchmarks.grader

Grades tests/data/grader_pairs*.jsonl with the math and the choice verifier, writes docs/grader.md and prints the rate.
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

_HEAD = """\
# What the graders call right

This page is written by `python -m benchmarks.grader`; tests/reward/test_grader_agreement.py fails when it is out of date.

## How a mathematical answer is judged

The last `\\boxed{{...}}` counts; if it never closes, or there is none, the response has no answer. Its content is read as
one of the kinds below, by a grammar in which every token has a meaning; what is of no kind is a statement, and right
only word for word. Nothing is dropped but what says nothing: markup (`\\textcolor{{red}}{{18}}`, `**18**`), lead-ins (`The
answer is`), `(correct)`, and what letters run over (`for all n`, `k\\in\\mathbb{{Z}}`). The kind of the *reference* decides
what is right. Where two answers can be defended, the grader says wrong; such rules are marked †.

| reference | right | wrong |
|---|---|---|
| number | any form of it: `1{{,}}234`, `12,34,567`, `1.234,5`, `3\\frac12`, `0.1\\overline6`, `1.2\\times10^3`, `two thirds`, `3 million`, `7 dozen` for 84; a value with any unit or counted thing, `12 cm`, `7 red apples`; an equation that gives it, `x=7`, `7=x`, `m+n=7` | another value; `7 minus 1`, `7 or 8`, `at least 7`; `2x=7`†; `7:1`†; `7th`†; `\\{{7\\}}`†; `about 7`† of a number that is no decimal |
| decimal | also an exact value that rounds to it, if it has three digits or more: `\\pi` for 3.14 | fewer digits, more digits, another rounding |
| with a unit | the number alone; the same measure in another unit, exactly: 72 km/h for 20 m/s, 25 °C for 77 °F | another dimension; 60 mph for 60 km/h; 5 kJ for 5 J; 5 apples for 5 kg; hertz for radians a second† |
| money | the number alone; cents for dollars; `US\\$18` and `18 USD` for `\\$18` | another currency; `\\$18 per hour` for `\\$18` |
| percent | `50` and `0.5` for 50 %, and the other way round | `0.5 %` for 0.5 and `1 %` for 1: a number of at most one is a share† |
| angle | `90` and `\\frac{{\\pi}}{{2}}` for 90° | `90` for `\\frac{{\\pi}}{{2}}`; 25° for 25 °C |
| set | its elements in any order, as a set or a list | a tuple, an interval; the element alone† |
| list | as often as they come, in any order; a set if none comes twice; a tuple in the same order | `1,2,2` for `1,1,2`; `[1,2]` |
| tuple | in order; by name, `y=2, x=1`; a list in order, unless it might be an interval† | a set, another order, a column vector† |
| interval, inequality | the same set of numbers, as either or as a union; `]0,1[` | another end, open or closed; another unknown |
| equation | the same solutions: sides whose difference is a constant multiple; a value where it names one | another unknown or function's name |
| function | in other letters, `f(t)=t^2`; with `for all n` or without | `for all even n`, `for x>0`: a condition that the reference has not |
| ratio | the same ratio; a fraction that is no whole number | another order; a number for `7:1`† |
| expression | equal for all values of its unknowns, to 50 digits at random points; counted letters, `n`, are whole numbers under floors, binomials and powers of -1 | a product behind a slash, `x/2y`† |
| letters alone, words | the same, whatever the case of a word; without articles; `DNE`, `no solution` and their like in other words | letters in another order: `on`, `VI`, `BA`†; NaCl and NACl; `\\angle ACB` for `\\angle ABC` |
| option | its letter, `(B)`, `Option B`, `(B) 12` | with words behind it, `(B) is wrong` |
| time of day | `3:45 PM` for 3:45, 15:45 for 3:45 PM | the other half of the day |

## How often they agree with a careful human

{rows} pairs of response and reference, tests/data/grader_pairs*.jsonl, were labelled by hand: by what is true, not by what
a grader says. Of multiple choice, an answer that is no option, or several, is unparsable.

The graders were mended with these pairs in view, so the table says what they can do, not how they do on answers that
nobody looked at. What they did at first sight, before they were mended for a set:

| math pairs | grader | agreed | wrong ones called right | right ones refused |
|---|---|---|---|---|
| 995, of all kinds | rewrites before math-verify | 62.0 % | 119 of 426 | 237 of 569 |
| 326, fresh | the grammar, first form | 95.1 % | 1 of 133 | 15 of 193 |
| 320, fresh | the grammar, mended | 96.9 % | 1 of 154 | 8 of 166 |

`correct` and not `correct` is what a reward sees; the table below asks for the same word, `no_answer` and `unparsable` too.

| | pairs | agree | agreement | called right, is not |
|---|---|---|---|---|
"""


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
    """The document: agreement by kind and form, and every disagreement."""
    groups: dict[str, list[tuple[str, str]]] = collections.defaultdict(list)
    for pair, verdict in zip(pairs, verdicts, strict=True):
        for name in (f"**{pair['kind']}**", f"{pair['kind']}: {pair['form']}"):
            groups[name].append((pair["label"], verdict))
    lines = [_HEAD.format(rows=len(pairs))]
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
    DOCUMENT.write_text(report(pairs, verdicts), encoding="utf-8")
    agree = sum(verdict == pair["label"] for pair, verdict in zip(pairs, verdicts, strict=True))
    print(f"{agree} of {len(pairs)} agree ({100 * agree / len(pairs):.1f} %); {len(pairs) / seconds:.0f} pairs/s")


if __name__ == "__main__":
    main()
