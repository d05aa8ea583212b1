"""What the repository holds of the miniature, made from nothing.

    python -m configs.mini.make data      the problem sets, the tokenizer and the architecture
    python -m configs.mini.make base      the base policy: a corpus of half right solutions, and 800 updates on it
    python -m configs.mini.make judge     the learned judge, from the base: lessons, and a thousand updates on them
    python -m configs.mini.make controls  runs/mini-wrong.jsonl and runs/mini-none.jsonl: problems to test the judge by

The first three write into configs/mini; runs and corpora stay in runs/.  All are seeded, and what was killed goes on
where it was.  On one quiet core `base` takes 5 minutes, `judge` 15.
"""

from __future__ import annotations

import pathlib
import subprocess
import sys

from configs.mini import folder, lessons, puzzles, sft, start
from configs.mini.judge import STAGES, workdir

HERE = pathlib.Path(__file__).parent
CORPUS_ROWS = 51_200


def data() -> None:
    """Problem sets, tokenizer and architecture."""
    start.write(HERE / "models/start")
    puzzles.write_problem_sets(HERE / "data")


def base() -> None:
    """The base policy; its run stays in runs/mini-base."""
    corpus, run = pathlib.Path(sft.CORPUS), pathlib.Path("runs/mini-base")
    if not corpus.exists():
        puzzles.write_rows(corpus, puzzles.corpus_rows(CORPUS_ROWS))
    command = ["-m", "exprl_jax.main", "--config=configs/mini/sft.py:base", f"--workdir={run}"]
    subprocess.run([sys.executable, *command], check=True)
    folder.keep(run / "export", HERE / "models/base")


def judge() -> None:
    """The learned judge; the runs of its stages stay in runs/mini-judge-<stage>."""
    for arm, stage in STAGES.items():
        source = pathlib.Path(f"{workdir(arm)}.jsonl")
        if not source.exists():
            rows = lessons.lesson_rows(stage.rows, stage.seed, listed=stage.listed, shortest=stage.shortest)
            puzzles.write_rows(source, rows)
        command = ["-m", "exprl_jax.main", f"--config=configs/mini/judge.py:{arm}", f"--workdir={workdir(arm)}"]
        subprocess.run([sys.executable, *command], check=True)
    folder.keep(pathlib.Path(workdir("judge")) / "export", HERE / "models/judge")


def controls() -> None:
    """The hard training problems with the reference of another problem, and with none to speak of."""
    for name, shift in (("wrong", 7), ("none", 0)):
        rows = puzzles.problem_rows("k10_train", puzzles.problem_sets(puzzles.HARD)["train"], "answer_first")
        given = [row["reference"] for row in rows[shift:] + rows[:shift]] if shift else ["none"] * len(rows)
        path = pathlib.Path(f"runs/mini-{name}.jsonl")
        puzzles.write_rows(path, [row | {"reference": text} for row, text in zip(rows, given)])


MAKERS = {"data": data, "base": base, "judge": judge, "controls": controls}


def main(arguments: list[str]) -> int:
    """Makes what is named, in order, and returns the exit status."""
    unknown = [name for name in arguments if name not in MAKERS]
    if unknown or not arguments:
        print(f"configs.mini.make: expected one or several of {', '.join(MAKERS)}, got {unknown}", file=sys.stderr)
        return 2
    for name in arguments:
        MAKERS[name]()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
