"""A process beside the run that answers requests, one JSON line for one JSON line, and is killed at a time limit.

What it computes can run for ever, in C code that no Python signal interrupts; so nothing waits for it without an end.
Its first line, before any request, is `{"ready": true, ...}`, or `{"error": "..."}` where it cannot work.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import queue
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

START_LIMIT_S = 120.0
_PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])


class Died(Exception):
    """The worker's process ended without a reply."""


class LineWorker:
    """One process at a time; used by one thread at a time.

    The process starts at once and loads in the background.  It lives in a session of its own, so that Ctrl-C reaches
    only the parent, and sees the end of its stdin when the parent ends, however it ends.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        name: str,
        cure: str = "",
        limit_s: float,
        start_limit_s: float = START_LIMIT_S,
        shows: bool = False,
    ):
        """Starts it.

        Args:
          module: what is run, as `python -m`.
          name: what errors call such a process.
          cure: what errors say at their end.
          limit_s: wall-clock seconds from a request to its reply.
          start_limit_s: wall-clock seconds until it is ready.
          shows: what it prints goes to this process's stderr; else it is kept for the error of a failed start.
        """
        self._command, self._name, self._cure = [sys.executable, "-m", module, *arguments], name, cure
        self._limit_s, self._start_limit_s, self._shows = limit_s, start_limit_s, shows
        self.ready: dict[str, Any] | None = None
        self._start()

    @property
    def pid(self) -> int:
        """Of the process; one that is replaced gets another."""
        return self._process.pid

    def _start(self) -> None:
        path = os.pathsep.join(filter(None, [_PACKAGE_ROOT, os.environ.get("PYTHONPATH")]))
        self._complaints = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if self._shows else self._complaints,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
            bufsize=0,
        )
        self.ready = None
        self._unread = b""

    def restart(self) -> None:
        """Puts a fresh process in its place."""
        self.stop()
        self._start()

    def kill(self) -> None:
        """Ends the process; whoever waits for its reply sees `Died`.  From any thread."""
        self._process.kill()

    def stop(self) -> None:
        """Ends the process and closes what leads to it."""
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
        self._complaints.close()

    def ask(self, request: Any) -> dict[str, Any] | None:
        """The reply to a request; None at the time limit, after which a fresh process stands in its place.

        Raises:
          Died: it ended first; it must be restarted then.
          ValueError: no process can be started.
        """
        if self.ready is None:
            self.await_start()
        try:
            written = self._write(json.dumps(request).encode() + b"\n", self._limit_s)
            reply = self._read(self._limit_s) if written else None
        except BrokenPipeError:
            raise Died from None
        if reply is None:
            self.restart()
        return reply

    def await_start(self) -> dict[str, Any]:
        """Waits until the process is ready; its first line.

        Raises:
          Died: somebody killed it; a fresh one may do better.
          ValueError: it cannot work, or is not ready in time.
        """
        try:
            reply = self._read(self._start_limit_s)
        except Died:
            try:
                status = self._process.wait(self._limit_s)
            except subprocess.TimeoutExpired:
                raise Died from None  # it has closed its output and lives on
            if status < 0:
                raise
            self._complaints.seek(0)
            lines = self._complaints.read().decode("utf-8", "replace").strip().splitlines()
            reason = lines[-1] if lines else f"exit status {self._process.returncode}"
            raise ValueError(f"{self._name} could not be started: {reason}{self._cure}") from None
        if reply is None:
            raise ValueError(f"{self._name} could not be started: not ready after {self._start_limit_s:.0f} s")
        if "error" in reply:
            raise ValueError(reply["error"])
        self.ready = reply
        return reply

    def _write(self, line: bytes, limit_s: float) -> bool:
        """Whether all of a line was taken within the limit: a pipe holds little, and a worker that hangs reads none."""
        deadline, pipe = time.monotonic() + limit_s, self._process.stdin.fileno()
        poll = select.poll()
        poll.register(pipe, select.POLLOUT)
        os.set_blocking(pipe, False)
        while line:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                return False
            line = line[os.write(pipe, line) :]
        return True

    def _read(self, limit_s: float) -> dict[str, Any] | None:
        """The next reply, or None at the time limit; raises Died at the end of the stream."""
        deadline = time.monotonic() + limit_s
        poll = select.poll()
        poll.register(self._process.stdout, select.POLLIN)
        while b"\n" not in self._unread:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                return None
            received = os.read(self._process.stdout.fileno(), 1 << 16)
            if not received:
                raise Died
            self._unread += received
        line, _, self._unread = self._unread.partition(b"\n")
        return json.loads(line)


W = TypeVar("W", bound=LineWorker)


class WorkerPool(Generic[W]):
    """Workers and as many threads, each of which borrows one for a request; use as a context manager."""

    def __init__(self, workers: Sequence[W], name: str):
        """Args: name: what the threads are called."""
        self._workers = list(workers)
        self._idle: queue.SimpleQueue[W] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = concurrent.futures.ThreadPoolExecutor(len(self._workers), thread_name_prefix=name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the workers; a worker that is replaced gets another."""
        return tuple(worker.pid for worker in self._workers)

    def close(self) -> None:
        """Drops what is waiting, lets what is in work end (within the limit) and ends the workers."""
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.stop()

    @contextlib.contextmanager
    def _borrowed(self) -> Iterator[W]:
        worker = self._idle.get()
        try:
            yield worker
        finally:
            self._idle.put(worker)
