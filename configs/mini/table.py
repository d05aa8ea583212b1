"""The miniature's table: every arm, Stage II from each, their evaluations, and what docs/mini.md shows of them.

    python -m configs.mini.table                    both difficulties, two seeds
    python -m configs.mini.table --quick            one seed of three arms, without Stage II
    python -m configs.mini.table --write_only       the page from the runs that are there

Each job is an ordinary command, which is printed; as many run at a time as there are cores, one core each.  Kill it and
start it again: what has ended is not done again, and a run goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from configs.mini import results
from configs.mini.plan import QUICK, STAGE_1, Job, jobs


def main(arguments: Sequence[str]) -> int:
    """Runs what is left to run, writes the page's parts, and returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m configs.mini.table", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed of three arms, without Stage II")
    parser.add_argument("--write_only", action="store_true", help="run nothing")
    parser.add_argument("--seeds", default="1,2", help="with commas between")
    parser.add_argument("--arms", default=",".join(STAGE_1), help="with commas between")
    parser.add_argument("--difficulties", default="hard,mild", help="with commas between")
    parser.add_argument("--match", default="", help="run only jobs whose name has this in it, a regular expression")
    parser.add_argument("--root", type=pathlib.Path, default=pathlib.Path("runs/mini-table"), help="of the workdirs")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("docs/mini"), help="of curves")
    parser.add_argument("--page", type=pathlib.Path, default=pathlib.Path("docs/mini.md"), help="that has the table")
    options = parser.parse_args(arguments)
    arms, seeds, difficulties = (options.arms.split(","), options.seeds.split(","), options.difficulties.split(","))
    if options.quick:
        arms, seeds, difficulties = QUICK, seeds[:1], difficulties[:1]
    if unknown := [arm for arm in arms if arm not in STAGE_1]:
        parser.error(f"unknown arm {unknown[0]!r}; expected some of {', '.join(STAGE_1)}")
    todo = [
        job
        for difficulty in difficulties
        for job in jobs([int(seed) for seed in seeds], arms, difficulty, second=not options.quick)
        if re.search(options.match, job.name)
    ]
    signal.signal(signal.SIGTERM, _interrupt)
    failed = [] if options.write_only else run(todo, options.root, sorted(os.sched_getaffinity(0))[:2])
    results.write(options.root, options.output, options.page, difficulties)
    print(options.page)
    for name in failed:
        print(f"configs.mini.table: {name} failed; see {options.root / name}.log", file=sys.stderr)
    return 1 if failed else 0


def run(todo: Sequence[Job], root: pathlib.Path, cores: Sequence[int]) -> list[str]:
    """Runs the jobs that have not ended, one a core, each once what it starts from has ended; returns those that failed
    and those that wait for them.

    An interruption ends the jobs that are running, which save and go on at the next start.
    """
    left = [job for job in todo if not (root / job.name / job.done).exists()]
    running: dict[int, tuple[Job, subprocess.Popen[bytes]]] = {}
    failed: list[str] = []
    try:
        while left or running:
            waiting_for = {job.name for job in left} | {job.name for job, _ in running.values()}
            for core in [core for core in cores if core not in running]:
                ready = [job for job in left if job.starts_from not in waiting_for]
                if ready:
                    left.remove(ready[0])
                    if ready[0].starts_from in failed:
                        failed.append(ready[0].name)
                    else:
                        running[core] = ready[0], _start(ready[0], root, core)
            for core, (job, process) in list(running.items()):
                if process.poll() is not None:
                    del running[core]
                    if process.returncode or not (root / job.name / job.done).exists():
                        failed.append(job.name)
                    seconds = sum(other.seconds for other in [*left, *(other for other, _ in running.values())])
                    ended = "failed" if job.name in failed else "done"
                    print(f"{ended} {job.name}; {len(left)} left, ETA {seconds / len(cores) / 60:.0f} min", flush=True)
            time.sleep(0.2)
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()
    return failed


def _start(job: Job, root: pathlib.Path, core: int) -> subprocess.Popen[bytes]:
    command = job.command(root)
    print(f"core {core}: python {shlex.join(command)}", flush=True)
    log = (root / job.name).with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    # A process inherits the cores of the thread that starts it; setting them after a fork is not safe beside threads.
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, [core])
    try:
        with log.open("ab") as file:
            return subprocess.Popen([sys.executable, *command], stdout=file, stderr=subprocess.STDOUT)
    finally:
        os.sched_setaffinity(0, own)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
