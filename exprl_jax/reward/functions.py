"""Functions of the user's at work: called with attempts in worker processes, within a time limit.

A call is a list of attempts, and its result a list of as many values.  What follows where there is none, and nothing
waits without an end:

  the function raises, or returns no such list   ValueError with function, problem and exception: the run ends
  the call takes longer than its limit           the process is killed and replaced; `Lost.timed_out`
  the process dies during the call               once more in a fresh one, then `Lost.died`
"""

from __future__ import annotations

import concurrent.futures
import enum
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from exprl_jax.data.problems import Problem
from exprl_jax.reward.line_worker import START_LIMIT_S, Died, LineWorker, WorkerPool

T = TypeVar("T")


class Asked(NamedTuple):
    """What of a problem is to be scored; the fields are those of `attempt.Attempt`."""

    problem: Problem
    trace: str
    unit: str
    segment: int = 0
    ended: bool | None = None


class Lost(enum.StrEnum):
    """Why a call has no values."""

    timed_out = "took longer than the limit"
    died = "ended its process"


def function_files(key: str, name: str) -> list[pathlib.Path]:
    """Loads a function in a process of its own, and gives the files that it was read from.

    Raises:
      ValueError: it cannot be loaded; names the config's key.
    """
    worker = _worker(key, name, 1.0)
    try:
        return [pathlib.Path(file) for file in worker.await_start()["files"]]
    except Died:
        raise ValueError(f"config.{key}: {name}: the process that loads it was killed") from None
    except ValueError as error:
        raise ValueError(f"config.{key}: {error}") from None
    finally:
        worker.stop()


class FunctionPool(WorkerPool[LineWorker]):
    """Worker processes that call one function; use as a context manager."""

    def __init__(self, key: str, name: str, *, workers: int, seconds: float):
        """Starts the workers, which load the function in the background.

        Args:
          key: the config's, for errors.
          name: of the function.
          workers: number of processes.
          seconds: wall-clock limit of one call.
        """
        self._key, self._name, self._closing = key, name, False
        super().__init__([_worker(key, name, seconds) for _ in range(workers)], "function")

    def submit(
        self, calls: Sequence[Sequence[Asked]], read: Callable[[Sequence[Asked], list[Any] | Lost], T]
    ) -> list[concurrent.futures.Future[T]]:
        """Begins to make some calls and returns at once.

        Args:
          read: makes a result of a call and its values, or of why there are none.

        Returns:
          A result each.  `result` raises ValueError where the function raised, what `read` raises, and CancelledError
          where the pool was closed first.
        """
        return [self._threads.submit(lambda call: read(call, self._call(call)), call) for call in calls]

    def close(self) -> None:
        """Drops the calls that are waiting, and ends the workers with those that are in work."""
        self._closing = True
        for worker in self._workers:
            worker.kill()
        super().close()

    def _call(self, asked: Sequence[Asked]) -> list[Any] | Lost:
        try:
            with self._borrowed() as worker:
                reply = self._ask(worker, request_of(asked))
        except Died:
            return Lost.died
        except ValueError as error:
            raise ValueError(f"config.{self._key}: {error}") from None
        if reply is None:
            return Lost.timed_out
        if "fault" in reply:
            raise ValueError(f"config.{self._key}: {self._name}, problem {reply['problem']!r}: {reply['fault']}")
        return reply["values"]

    def _ask(self, worker: LineWorker, request: dict[str, Any]) -> dict[str, Any] | None:
        try:
            return worker.ask(request)
        except Died:
            # A worker that something else killed says nothing about the attempts.
            if self._closing:
                raise
            worker.restart()
        try:
            return worker.ask(request)
        except Died:
            if not self._closing:
                worker.restart()
            raise


def request_of(asked: Sequence[Asked]) -> dict[str, Any]:
    """Attempts as JSON, each problem once: the tests of a programming problem are megabytes."""
    problems = list({one.problem.id: one.problem for one in asked}.values())
    number = {problem.id: index for index, problem in enumerate(problems)}
    fields = ("id", "problem", "reference", "answer", "domain", "choices", "extra")
    return {
        "problems": [{name: getattr(problem, name) for name in fields} for problem in problems],
        "attempts": [{"of": number[one.problem.id]} | dict(zip(Asked._fields[1:], one[1:])) for one in asked],
    }


def _worker(key: str, name: str, seconds: float) -> LineWorker:
    return LineWorker(
        "exprl_jax.reward.function_worker",
        [name, str(seconds)],
        name=f"a process for config.{key} = {name!r}",
        limit_s=seconds,
        # A function may load a model when it is imported.
        start_limit_s=max(START_LIMIT_S, seconds),
        shows=True,
    )
