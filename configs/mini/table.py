"""The miniature's table: every arm, Stage II from each, their evaluations, and what docs/mini.md shows of them.

    python -m configs.mini.table                    both difficulties, three seeds, and DeltaNorm's variants
    python -m configs.mini.table --quick            one seed of three arms, without Stage II
    python -m configs.mini.table --write_only       the page from the runs that are there

Each job is an ordinary command, which is printed; as many run at a time as there are cores, one core each.  Kill it and
start it again: what has ended is not done again, a run goes on from its last checkpoint, and a job that outlived the
table that started it is waited for.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from configs.mini import results
from configs.mini.plan import QUICK, STAGE_1, Job, jobs, variants


class Started(NamedTuple):
    """A job that is running.

    Attributes:
      start: of `time.monotonic`.
    """

    job: Job
    process: subprocess.Popen[bytes]
    start: float


def main(arguments: Sequence[str]) -> int:
    """Runs what is left to run, writes the page's parts, and returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m configs.mini.table", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed of three arms, without Stage II")
    parser.add_argument("--write_only", action="store_true", help="run nothing")
    parser.add_argument("--seeds", default="1,2,3", help="with commas between")
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
    numbers = [int(seed) for seed in seeds]
    todo = [job for level in difficulties for job in jobs(numbers, arms, level, second=not options.quick)]
    if "process" in arms and "hard" in difficulties and not options.quick:
        todo += variants(numbers, "hard")
    todo = [job for job in todo if re.search(options.match, job.name)]
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        failed = [] if options.write_only else run(todo, options.root, sorted(os.sched_getaffinity(0))[:2])
    except KeyboardInterrupt:
        print("configs.mini.table: stopped; the same command goes on from here", file=sys.stderr)
        return 130
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
    left, failed = list(todo), []
    running: dict[int, Started] = {}
    spent, planned = 1e-9, 1e-9  # seconds of the jobs that have ended, in truth and on a quiet core
    try:
        while left or running:
            left = [job for job in left if not (root / job.name / job.done).exists()]
            for core in [core for core in cores if core not in running]:
                waiting_for = {job.name for job in left} | {started.job.name for started in running.values()}
                for job in [job for job in left if job.starts_from not in waiting_for]:
                    if job.starts_from in failed:
                        left.remove(job)
                        failed.append(job.name)
                    elif (process := _start(job, root, core)) is not None:
                        left.remove(job)
                        running[core] = Started(job, process, time.monotonic())
                        break
            for core, (job, process, start) in list(running.items()):
                if process.poll() is not None:
                    del running[core]
                    if process.returncode or not (root / job.name / job.done).exists():
                        failed.append(job.name)
                    spent, planned = spent + time.monotonic() - start, planned + job.seconds
                    seconds = sum(other.seconds for other in [*left, *(started.job for started in running.values())])
                    minutes = seconds * spent / planned / len(cores) / 60
                    ended = "failed" if job.name in failed else "done"
                    print(f"{ended} {job.name}; {len(left)} left, ETA {minutes:.0f} min", flush=True)
            time.sleep(0.2)
    finally:
        for started in running.values():
            started.process.terminate()
        for started in running.values():
            started.process.wait()
    return failed


def _start(job: Job, root: pathlib.Path, core: int) -> subprocess.Popen[bytes] | None:
    """Starts a job; None while one that an earlier table started, and that was left running, has not ended."""
    command = job.command(root)
    log = (root / job.name).with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the job's own for as long as the log is its output
        except BlockingIOError:
            return None
        print(f"core {core}: python {shlex.join(command)}", flush=True)
        # A process inherits the cores of the thread that starts it; to set them after a fork is not safe beside
        # threads.
        own = os.sched_getaffinity(0)
        os.sched_setaffinity(0, [core])
        try:
            return subprocess.Popen([sys.executable, *command], stdout=file, stderr=subprocess.STDOUT)
        finally:
            os.sched_setaffinity(0, own)


def _interrupt(number: int, frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the jobs end after the step that is under way
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
