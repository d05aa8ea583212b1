"""Grades programs: the last Python block of a response, run on a problem's tests in a sandbox.

A program gets a test's input and nothing else; what it should have answered stays in this process, which compares, or
in a sandbox of its own, where assert tests run.  So there is nothing in the sandbox of a program that it could read, or
forge, to be called correct.

As in LiveCodeBench's published grader, a program finds the usual names imported, its stdout is compared line by line
without outer whitespace and lines of numbers by their exact decimal values, and `sys.exit` is no failure.

The result of a call is compared as JSON values are (`same_value`): a tuple is a list, 1.0 is 1, `true` is not 1, the
keys of a dict are strings, and NaN is NaN.  Assert tests compare as Python does.
"""

from __future__ import annotations

import concurrent.futures
import decimal
import functools
import re
import threading
import time
from collections.abc import Sequence
from typing import Any

from exprl_jax.reward.verifiers.code_tests import (
    LONGER,
    AssertTest,
    CallTest,
    StdoutTest,
    check_tests,
    loads,
    parse_tests,
)
from exprl_jax.reward.verifiers.math import Grading
from exprl_jax.reward.verifiers.sandbox import MAX_OUTPUT, Isolation, Outcome, Sandbox, complaint
from exprl_jax.reward.verifiers.verdict import Verdict
from exprl_jax.reward.verifiers.verifier import Verifier

# Characters; longer programs are not run.
MAX_PROGRAM = 1 << 18
# A row's tests may take this many times the limit of one, together.
ROW_LIMITS = 20

_FENCE = re.compile(r"(?P<indent>[ \t]*+)(?P<fence>`{3,}+|~{3,}+)(?P<info>[^`]*)")
_NUMBER = re.compile(r"[+-]?(?:(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)(?:e[+-]?[0-9]{1,17})?|inf|infinity)", re.IGNORECASE)
_PYTHON = re.compile(r"\s*(python|py)[\d.]*(\s.*)?", re.IGNORECASE)


def last_program(text: str) -> str | None:
    """The last closed block fenced as Python; where none is, the last that names no language; or None."""
    programs: dict[bool, str] = {}
    lines = text.split("\n")
    at = 0
    while at < len(lines):
        opened = _FENCE.fullmatch(lines[at])
        at += 1
        if opened is None:
            continue
        fence, start = opened["fence"], at
        closing = re.compile(rf"[ \t]*+{fence[0]}{{{len(fence)},}}+\s*")
        while at < len(lines) and not closing.fullmatch(lines[at]):
            at += 1
        if at == len(lines):
            break
        # A block in a list is indented as a whole.
        block = "\n".join(line.removeprefix(opened["indent"]) for line in lines[start:at])
        at += 1
        named = bool(opened["info"].strip())
        if not named or _PYTHON.fullmatch(opened["info"]):
            programs[named] = block
    return programs.get(True, programs.get(False))


# Rollouts of one problem come together, and LiveCodeBench's tests may be megabytes.
_cached_tests = functools.lru_cache(maxsize=16)(parse_tests)


def same_stdout(got: str, expected: str) -> bool:
    """Whether two outputs agree: as many lines, and each pair equal, or both all numbers of the same exact values.

    Whitespace around the output and around each line does not count.
    """
    got_lines, expected_lines = got.strip().split("\n"), expected.strip().split("\n")
    return len(got_lines) == len(expected_lines) and all(
        mine.strip() == theirs.strip() or _same_numbers(mine, theirs)
        for mine, theirs in zip(got_lines, expected_lines, strict=True)
    )


def _same_numbers(got: str, expected: str) -> bool:
    words, expected_words = got.split(), expected.split()
    return len(words) == len(expected_words) and all(
        _NUMBER.fullmatch(mine) and _NUMBER.fullmatch(theirs) and decimal.Decimal(mine) == decimal.Decimal(theirs)
        for mine, theirs in zip(words, expected_words, strict=True)
    )


def same_value(got: Any, expected: Any) -> bool:
    """Whether two JSON values, as `json.loads` gives them, agree: numbers by value, and true and false are no numbers.

    NaN, which Python writes as JSON, agrees with itself.
    """
    if isinstance(expected, list):
        return type(got) is list and len(got) == len(expected) and all(map(same_value, got, expected))
    if isinstance(expected, dict):
        return (
            type(got) is dict
            and got.keys() == expected.keys()
            and all(same_value(got[name], value) for name, value in expected.items())
        )
    if type(got) in (int, float) and type(expected) in (int, float):
        return got == expected or (got != got and expected != expected)
    return type(got) is type(expected) and got == expected


def _passes(case: StdoutTest | CallTest | AssertTest, outcome: Outcome) -> bool:
    if outcome.ended != "finished":
        return False
    try:
        if isinstance(case, StdoutTest):
            return same_stdout(outcome.output.decode(), case.stdout)
        return isinstance(case, AssertTest) or same_value(loads(outcome.output), case.result)
    except (ValueError, RecursionError):  # no UTF-8, or no JSON
        return False


class CodeGrader:
    """Threads that each run one program at a time in a sandbox; use as a context manager."""

    def __init__(self, workers: int, limit_s: float, memory_bytes: int, allow_unsandboxed: bool):
        """Finds the strongest isolation by running a trial program in one after another; starts nothing else.

        Args:
          workers: programs that run at once; more than the processor's cores makes them miss their limits.
          limit_s: wall-clock seconds of one test; a row has ROW_LIMITS times as many for all its tests.
          memory_bytes: memory that one program may use.
          allow_unsandboxed: whether to go on where a program can only be limited, not isolated.

        Raises:
          ValueError: no workers, a limit out of range, or no isolation that is allowed.
        """
        if workers < 1:
            raise ValueError(f"the code grader got workers={workers}; expected at least 1")
        strongest = next((isolation for isolation in Isolation if not complaint(isolation)), None)
        if strongest is None or not (strongest.real or allow_unsandboxed):
            reasons = "; ".join(f"{way.value}: {complaint(way)}" for way in Isolation if complaint(way))
            raise ValueError(
                f"programs cannot be isolated on this machine ({reasons}); `apt-get install bubblewrap libseccomp2`,"
                " let the kernel give namespaces, or, where all that it can reach may be lost, set"
                " code.allow_unsandboxed"
            )
        self._closed = threading.Event()
        self._sandbox = Sandbox(strongest, limit_s, memory_bytes, self._closed)
        self._row_limit_s = ROW_LIMITS * limit_s
        self._threads = concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="code")

    def __enter__(self) -> CodeGrader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def isolation(self) -> Isolation:
        """What is in force; its `sentence` is for the run's first lines."""
        return self._sandbox.isolation

    def submit(self, rows: Sequence[tuple[str, str]]) -> Grading:
        """Begins to grade (response text, tests as `parse_tests` reads them) rows and returns at once."""
        return Grading([self._threads.submit(self._grade_row, *row) for row in rows])

    def grade(self, rows: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Grades (response text, tests as `parse_tests` reads them) rows.

        Returns:
          A verdict a row, in row order: `no_answer` without a program, `unparsable` for an empty or endless one,
          `correct` where every test passes; else the first that does not pass says `timed_out` or `wrong`, or `missing`
          where assert tests pass to a program what cannot leave their process.

        Raises:
          ValueError: tests that cannot be read.
        """
        return self.submit(rows).result()

    def close(self) -> None:
        """Drops the rows that are waiting, and ends the programs that are running."""
        self._closed.set()
        self._threads.shutdown(cancel_futures=True)

    def _grade_row(self, response: str, answer: str) -> Verdict:
        tests = _cached_tests(answer)
        program = last_program(response)
        if program is None:
            return Verdict.no_answer
        if not program.strip() or len(program) > MAX_PROGRAM:
            return Verdict.unparsable
        deadline = time.monotonic() + self._row_limit_s
        for case in tests.cases:
            if self._closed.is_set():
                raise concurrent.futures.CancelledError
            if time.monotonic() >= deadline:
                return Verdict.timed_out
            outcome = self._outcome(program, case)
            if self._closed.is_set():
                raise concurrent.futures.CancelledError
            if outcome.ended == "timed_out":
                return Verdict.timed_out
            if outcome.ended == "unsupported":
                return Verdict.missing
            if not _passes(case, outcome):
                return Verdict.wrong
        return Verdict.correct

    def _outcome(self, program: str, case: StdoutTest | CallTest | AssertTest) -> Outcome:
        if isinstance(case, AssertTest):
            asserts = (case.setup, case.tests, case.entry_point, case.solved)
            return self._sandbox.check(case.beginning, program, *asserts)
        if isinstance(case, StdoutTest):
            return self._sandbox.run(program, case.stdin, MAX_OUTPUT + LONGER * len(case.stdout.encode()))
        return self._sandbox.call(program, case.function, case.given, case.longest)


VERIFIER = Verifier(
    open=lambda grader, code: CodeGrader(
        grader.workers, code.seconds, code.memory_mb * 1_000_000, code.allow_unsandboxed
    ),
    row=lambda problem, response: (response, problem.answer),
    check=lambda problem: check_tests(problem.answer),
    vote=None,
)
