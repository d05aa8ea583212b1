"""The one grader for "correct": the last boxed answer, compared by its reference's kind, under a hard time limit.

A comparison can run for ever (`9^{9^{9^9}}`), in C code that no Python signal interrupts, so it runs in a process that
is killed.  Training metrics, sparse rewards and evaluation all grade here.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import queue
import re
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from exprl_jax.reward.verifiers.answers.tokens import Unreadable, tokenize
from exprl_jax.reward.verifiers.verdict import Verdict
from exprl_jax.reward.verifiers.verifier import Verifier

# Longer answers are not mathematics that anyone would box, and parsing time grows faster than length.
MAX_ANSWER = 2000
_START_LIMIT_S = 120.0
_PACKAGE_ROOT = str(Path(__file__).resolve().parents[3])

_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_JOINT = re.compile(r"(?:[\s$~]|\\[,; ])*(?:[,;]|,?\s*(?:and|or)|\\text\s*\{\s*(?:and|or)\s*\})(?:[\s$~]|\\[,; ])*")
_LONGEST_JOINT = 30


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}`, or None where its braces do not balance; the inner one of nested boxes.

    Boxes with nothing but a comma, a semicolon, "and" or "or" between them are one answer, `2, 3`.  Escaped braces,
    `\{` and `\}`, are text and do not count.
    """
    opened: list[tuple[int, int, _Box | None]] = []  # where its command and its content begin; the box closed before it
    last = closed = None
    start_of_last = -1
    for found in _BRACES.finditer(text):
        if found[0] == "}":
            if opened:
                command, start, before = opened.pop()
                if command >= 0:
                    closed = _Box(command, start, found.start(), before)
                    if last is None or start > last.start:
                        last = closed
        elif found[0] == "{":
            opened.append((-1, found.end(), None))
        elif found[0][-1] == "{" and found[0] != "\\{":
            opened.append((found.start(), found.end(), closed))
            start_of_last = found.end()
    if last is None or last.start != start_of_last:
        return None
    parts = [text[last.start : last.end]]
    while (before := last.before) and _is_joint(text, before.end + 1, last.command):
        last = before
        if text[last.start : last.end] not in parts:
            parts.append(text[last.start : last.end])
    return ", ".join(reversed(parts))


def unboxed(answer: str) -> str:
    """A reference answer without the box around it, if it has one."""
    inner = last_boxed(answer)
    return answer if inner is None else inner


def is_readable(answer: str) -> bool:
    """Whether a reference answer has words or numbers and matching brackets; without it no response is right."""
    try:
        return bool(tokenize(unboxed(answer)))
    except Unreadable:
        return False


class _Box(NamedTuple):
    command: int
    start: int
    end: int
    before: _Box | None


def _is_joint(text: str, start: int, end: int) -> bool:
    return end - start <= _LONGEST_JOINT and _JOINT.fullmatch(text, start, end) is not None


class Grading:
    """Verdicts that are being worked out."""

    def __init__(self, futures: Sequence[concurrent.futures.Future[Verdict]]):
        self._futures = futures

    def done(self) -> bool:
        """True once `result` will not wait."""
        return all(future.done() for future in self._futures)

    def when_done(self, call: Callable[[object], None]) -> None:
        """Calls it once for every row, when the row is done; from any thread."""
        for future in self._futures:
            future.add_done_callback(call)

    def result(self) -> list[Verdict]:
        """Waits for every row; verdicts in row order.

        Raises:
          ValueError: a worker could not be started.
          concurrent.futures.CancelledError: the grader was closed first.
        """
        return [future.result() for future in self._futures]


class MathGrader:
    """Worker processes that grade answers; use as a context manager.

    The processes start at once and load in the background.  They live in sessions of their own, so that Ctrl-C reaches
    only the parent, and end when their parent does, however it ends.
    """

    def __init__(self, workers: int = 2, limit_s: float = 5.0):
        """Starts the workers.

        Args:
          workers: number of processes.
          limit_s: wall-clock seconds that one comparison may take.

        Raises:
          ValueError: fewer than one worker, or a limit that is not positive.
        """
        if workers < 1:
            raise ValueError(f"the grader got workers={workers}; expected at least 1")
        if not limit_s > 0:
            raise ValueError(f"the grader got limit_s={limit_s}; expected a positive number of seconds")
        self._workers = [_Worker(limit_s) for _ in range(workers)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="grader")

    def __enter__(self) -> MathGrader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the workers; a worker that is replaced gets another."""
        return tuple(worker.pid for worker in self._workers)

    def submit(self, rows: Sequence[tuple[str, str]]) -> Grading:
        """Begins to grade (response text, reference answer) rows and returns at once."""
        return Grading([self._threads.submit(self._grade_row, *row) for row in rows])

    def grade(self, rows: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Grades (response text, reference answer) rows.

        Returns:
          A verdict a row, in row order.

        Raises:
          ValueError: a worker could not be started.
        """
        return self.submit(rows).result()

    def close(self) -> None:
        """Drops the rows that are waiting, lets those in work end (within the limit) and ends the workers."""
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.stop()

    def _grade_row(self, response: str, answer: str) -> Verdict:
        boxed = last_boxed(response)
        if boxed is None:
            return Verdict.no_answer
        if not boxed.strip() or len(boxed) > MAX_ANSWER:
            return Verdict.unparsable
        worker = self._idle.get()
        try:
            # Twice: a worker that something else killed says nothing about the answer.
            for _ in range(2):
                try:
                    return worker.compare(boxed, answer)
                except _Died:
                    worker.restart()
            return Verdict.unparsable
        finally:
            self._idle.put(worker)


class _Died(Exception):
    """The worker's process ended without a reply."""


class _Worker:
    """One process at a time; used by one thread at a time."""

    def __init__(self, limit_s: float):
        self._limit_s = limit_s
        self._start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def _start(self) -> None:
        path = os.pathsep.join(filter(None, [_PACKAGE_ROOT, os.environ.get("PYTHONPATH")]))
        self._complaints = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "exprl_jax.reward.verifiers.math_worker", str(self._limit_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
            bufsize=0,
        )
        self._ready = False
        self._unread = b""

    def restart(self) -> None:
        self.stop()
        self._start()

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
        self._complaints.close()

    def compare(self, boxed: str, answer: str) -> Verdict:
        """Raises _Died, after which it must be restarted, and ValueError where no process can be started."""
        if not self._ready:
            self._await_ready()
        try:
            self._process.stdin.write(json.dumps([boxed, answer]).encode() + b"\n")
            reply = self._read(self._limit_s)
        except BrokenPipeError:
            raise _Died from None
        if reply is None:
            self.restart()
            return Verdict.timed_out
        if reply["retire"]:
            self.restart()
        return Verdict(reply["verdict"])

    def _await_ready(self) -> None:
        try:
            reply = self._read(_START_LIMIT_S)
        except _Died:
            if self._process.wait() < 0:
                raise  # killed by somebody; a fresh one may do better
            self._complaints.seek(0)
            lines = self._complaints.read().decode("utf-8", "replace").strip().splitlines()
            reason = lines[-1] if lines else f"exit status {self._process.returncode}"
            raise ValueError(
                f"an answer-grading process could not be started: {reason}; pip install -r requirements.txt"
            ) from None
        if reply is None:
            raise ValueError(f"an answer-grading process could not be started: not ready after {_START_LIMIT_S:.0f} s")
        self._ready = True

    def _read(self, limit_s: float) -> dict[str, Any] | None:
        """The next reply, or None at the time limit; raises _Died at the end of the stream."""
        deadline = time.monotonic() + limit_s
        poll = select.poll()
        poll.register(self._process.stdout, select.POLLIN)
        while b"\n" not in self._unread:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                return None
            received = os.read(self._process.stdout.fileno(), 1 << 16)
            if not received:
                raise _Died
            self._unread += received
        line, _, self._unread = self._unread.partition(b"\n")
        return json.loads(line)


VERIFIER = Verifier(
    open=lambda grader, code: MathGrader(grader.workers, grader.seconds),
    row=lambda problem, response: (response, problem.answer),
    check=lambda problem: None,
    vote=None,
)
