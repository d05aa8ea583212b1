"""The one grader for "correct": the last boxed answer, compared by its reference's kind, under a hard time limit.

A comparison can run for ever (`9^{9^{9^9}}`), in C code that no Python signal interrupts, so it runs in a process that
is killed.  Training metrics, sparse rewards and evaluation all grade here.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Sequence

from exprl_jax.data.problems import Problem
from exprl_jax.reward.line_worker import START_LIMIT_S as _START_LIMIT_S
from exprl_jax.reward.line_worker import Died as _Died
from exprl_jax.reward.line_worker import LineWorker, WorkerPool
from exprl_jax.reward.verifiers.math_answers.box import last_boxed, unboxed
from exprl_jax.reward.verifiers.math_answers.tokens import Unreadable, tokenize
from exprl_jax.reward.verifiers.verdict import Verdict
from exprl_jax.reward.verifiers.verifier import Verifier
from exprl_jax.reward.verifiers.votes import normalise_answer

# Longer answers are not mathematics that anyone would box, and parsing time grows faster than length.
MAX_ANSWER = 2000


def is_readable(answer: str) -> bool:
    """Whether a reference answer has words or numbers and matching brackets; without it no response is right."""
    try:
        return bool(tokenize(unboxed(answer)))
    except Unreadable:
        return False


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


class MathGrader(WorkerPool["_Worker"]):
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
        super().__init__([_Worker(limit_s) for _ in range(workers)], "grader")

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

    def _grade_row(self, response: str, answer: str) -> Verdict:
        boxed = last_boxed(response)
        if boxed is None:
            return Verdict.no_answer
        if not boxed.strip() or len(boxed) > MAX_ANSWER:
            return Verdict.unparsable
        with self._borrowed() as worker:
            # Twice: a worker that something else killed says nothing about the answer.
            for _ in range(2):
                try:
                    return worker.compare(boxed, answer)
                except _Died:
                    worker.restart()
            return Verdict.unparsable


class _Worker(LineWorker):
    """A process that compares answers."""

    def __init__(self, limit_s: float):
        super().__init__(
            "exprl_jax.reward.verifiers.math_worker",
            [str(limit_s)],
            name="an answer-grading process",
            cure="; pip install -r requirements.txt",
            limit_s=limit_s,
            start_limit_s=_START_LIMIT_S,
        )

    def compare(self, boxed: str, answer: str) -> Verdict:
        """Raises _Died, after which it must be restarted, and ValueError where no process can be started."""
        reply = self.ask([boxed, answer])
        if reply is None:
            return Verdict.timed_out
        if reply["retire"]:
            self.restart()
        return Verdict(reply["verdict"])


def vote(problem: Problem, response: str) -> str | None:
    """The boxed answer that a response votes for; None without one."""
    boxed = last_boxed(response)
    return None if boxed is None or not boxed.strip() else normalise_answer(boxed)


VERIFIER = Verifier(
    open=lambda grader, code: MathGrader(grader.workers, grader.seconds),
    row=lambda problem, response: (response, problem.answer),
    check=lambda problem: None,
    vote=vote,
    readable=lambda problem: is_readable(problem.answer),
)
