"""Grades programs: the last Python block of a response, run on a problem's tests in a sandbox.

A program gets a test's input and nothing else; what it should have answered stays in this process, which compares.  So
there is nothing in the sandbox that a program could read, or forge, to be called correct.

As in LiveCodeBench's published grader, a program finds the usual names imported, its stdout is compared line by line
without outer whitespace and lines of numbers by their exact decimal values, results of calls are compared as Python
compares JSON values, and `sys.exit` is no failure.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import decimal
import functools
import json
import re
import threading
import time
from collections.abc import Sequence
from typing import Any

from exprl_jax.data.benchmarks import unpack_string
from exprl_jax.reward.verifiers.math import Grading
from exprl_jax.reward.verifiers.sandbox import Isolation, Outcome, Sandbox, complaint
from exprl_jax.reward.verifiers.verdict import Verdict
from exprl_jax.reward.verifiers.verifier import Verifier

# Characters; longer programs are not run.
MAX_PROGRAM = 1 << 18
# A row's tests may take this many times the limit of one, together.
ROW_LIMITS = 20

_FENCE = re.compile(r"(?P<indent>[ \t]*+)(?P<fence>`{3,}+|~{3,}+)(?P<info>[^`]*)")
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


@dataclasses.dataclass(frozen=True)
class StdoutTest:
    """A program reads `stdin` and should write `stdout`."""

    stdin: str
    stdout: str


@dataclasses.dataclass(frozen=True)
class CallTest:
    """`function(*arguments)` should return `result`; all of it is what JSON can say."""

    function: str
    arguments: tuple[Any, ...]
    result: Any


@dataclasses.dataclass(frozen=True)
class Tests:
    """What a program must pass, in this order."""

    cases: tuple[StdoutTest | CallTest, ...]


def parse_tests(answer: str) -> Tests:
    """Reads a code problem's answer.

    Args:
      answer: JSON text, or what LiveCodeBench makes of JSON text: base64 of zlib of a pickled string.  The JSON is
        `{"inputs": [...], "outputs": [...], "fn_name": name or null}`, or a list of
        `{"input": ..., "output": ..., "testtype": "stdin" or "functional", "metadata": {"func_name": name}}`, where
        only functional tests need metadata.  An input on stdin and its output are strings.  A function's input is a
        list of arguments, or a string with one JSON value a line; its output is a string of JSON, or another value.

    Returns:
      At least one test.

    Raises:
      ValueError: the answer is none of these.
    """
    try:
        return _parse_tests(answer)
    except RecursionError:
        raise ValueError(f"a code problem's tests are nested too deeply: {answer!r:.60}") from None


def _parse_tests(answer: str) -> Tests:
    text = answer.strip()
    found = _json(text if text[:1] in ("{", "[") else _unpacked(text), "a code problem's answer")
    if isinstance(found, dict):
        missing = {"inputs", "outputs"} - found.keys()
        if missing:
            raise ValueError(f"a code problem's tests have no {sorted(missing)}; expected inputs, outputs and fn_name")
        inputs, outputs, name = found["inputs"], found["outputs"], found["fn_name"] if "fn_name" in found else None
        if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
            raise ValueError("a code problem's inputs and outputs must be two lists of the same length")
        rows = [(given, expected, name) for given, expected in zip(inputs, outputs, strict=True)]
    elif isinstance(found, list):
        rows = [_listed(item) for item in found]
    else:
        raise ValueError(f"a code problem's tests must be a JSON object or list, got {found!r:.60}")
    if not rows:
        raise ValueError("a code problem has no tests; expected at least one")
    return Tests(tuple(_case(*row) for row in rows))


def _listed(item: Any) -> tuple[Any, Any, str | None]:
    if not isinstance(item, dict) or not {"input", "output", "testtype"} <= item.keys():
        raise ValueError(f"a test must be an object with input, output and testtype, got {item!r:.60}")
    if item["testtype"] == "stdin":
        return item["input"], item["output"], None
    if item["testtype"] != "functional":
        raise ValueError(f"a test's testtype must be stdin or functional, got {item['testtype']!r}")
    metadata = item["metadata"] if "metadata" in item else None
    if not isinstance(metadata, dict) or not isinstance(metadata.get("func_name"), str):
        raise ValueError('a functional test must name its function: {"metadata": {"func_name": "solve"}}')
    return item["input"], item["output"], metadata["func_name"]


def _case(given: Any, expected: Any, function: Any) -> StdoutTest | CallTest:
    if function is None:
        if not isinstance(given, str) or not isinstance(expected, str):
            raise ValueError(f"a test on stdin must have two strings, got {given!r:.40} and {expected!r:.40}")
        return StdoutTest(given, expected)
    if not isinstance(function, str) or not function.isidentifier():
        raise ValueError(f"a test's function must be a Python name, got {function!r:.60}")
    if isinstance(given, str):
        given = [_json(line, "an argument of a test") for line in given.splitlines() if line.strip()]
    if not isinstance(given, list):
        raise ValueError(f"the input of a function must be a list of arguments or lines of JSON, got {given!r:.60}")
    return CallTest(
        function, tuple(given), _json(expected, "the output of a test") if isinstance(expected, str) else expected
    )


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{what} must be JSON, got {text!r:.60}: {error}") from None


def _unpacked(text: str) -> str:
    try:
        return unpack_string(text)
    except ValueError as error:
        raise ValueError(f"a code problem's answer must be JSON, or {error}") from None


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
    try:
        return len(words) == len(expected_words) and all(
            decimal.Decimal(mine) == decimal.Decimal(theirs) for mine, theirs in zip(words, expected_words, strict=True)
        )
    except decimal.InvalidOperation:
        return False


def _passes(case: StdoutTest | CallTest, outcome: Outcome) -> bool:
    if outcome.ended != "finished":
        return False
    if isinstance(case, StdoutTest):
        return same_stdout(outcome.output.decode("utf-8", "replace"), case.stdout)
    try:
        return bool(json.loads(outcome.output) == case.result)
    except (ValueError, RecursionError):
        return False


class CodeGrader:
    """Threads that each run one program at a time in a sandbox; use as a context manager."""

    def __init__(self, workers: int, limit_s: float, memory_bytes: int, allow_unsandboxed: bool):
        """Finds the strongest isolation by running a trial program in each; starts nothing else.

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
        working = [isolation for isolation in Isolation if not complaint(isolation)]
        if not working or not (working[0].real or allow_unsandboxed):
            reasons = "; ".join(f"{each.value}: {complaint(each)}" for each in Isolation if complaint(each))
            raise ValueError(
                f"programs cannot be isolated on this machine ({reasons}); install bubblewrap, let the kernel give "
                f"user namespaces, or, where all that it can reach may be lost, set code.allow_unsandboxed"
            )
        self._isolation = working[0]
        self._sandbox = Sandbox(working[0], limit_s, memory_bytes)
        self._row_limit_s = ROW_LIMITS * limit_s
        self._closed = threading.Event()
        self._threads = concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="code")

    def __enter__(self) -> CodeGrader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def isolation(self) -> Isolation:
        """What is in force; its `sentence` is for the run's first lines."""
        return self._isolation

    def submit(self, rows: Sequence[tuple[str, str]]) -> Grading:
        """Begins to grade (response text, tests as `parse_tests` reads them) rows and returns at once."""
        return Grading([self._threads.submit(self._grade_row, *row) for row in rows])

    def grade(self, rows: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Grades (response text, tests as `parse_tests` reads them) rows.

        Returns:
          A verdict a row, in row order: `no_answer` without a program, `unparsable` for an empty or endless one,
          `correct` where every test passes; else the first that does not pass says `timed_out` or `wrong`.

        Raises:
          ValueError: tests that cannot be read.
        """
        return self.submit(rows).result()

    def close(self) -> None:
        """Drops the rows that are waiting; those in work end after the test that they are at."""
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
            if isinstance(case, StdoutTest):
                outcome = self._sandbox.run(program, case.stdin)
            else:
                outcome = self._sandbox.call(program, case.function, case.arguments)
            if outcome.ended == "timed_out":
                return Verdict.timed_out
            if not _passes(case, outcome):
                return Verdict.wrong
        return Verdict.correct


VERIFIER = Verifier(
    open=lambda grader, code: CodeGrader(
        grader.workers, code.seconds, code.memory_mb * 1_000_000, code.allow_unsandboxed
    ),
    row=lambda problem, response: (response, problem.answer),
    check=lambda problem: parse_tests(problem.answer),
    vote=None,
)
