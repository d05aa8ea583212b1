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

import ast
import concurrent.futures
import dataclasses
import decimal
import functools
import json
import re
import textwrap
import threading
import time
import warnings
from collections.abc import Sequence
from typing import Any

from exprl_jax.data.benchmarks import unpack_string
from exprl_jax.reward.verifiers.assert_worker import program_names
from exprl_jax.reward.verifiers.math import Grading
from exprl_jax.reward.verifiers.sandbox import MAX_OUTPUT, Isolation, Outcome, Sandbox, complaint, usual_names
from exprl_jax.reward.verifiers.verdict import Verdict
from exprl_jax.reward.verifiers.verifier import Verifier

# Characters; longer programs are not run.
MAX_PROGRAM = 1 << 18
# A row's tests may take this many times the limit of one, together.
ROW_LIMITS = 20
# A right output may be longer than the expected one, by escapes and by spaces: this many times, and MAX_OUTPUT more.
_LONGER = 4
# Digits from which on Python does not convert between text and integer.
_LONG_INTEGER = 4300

_FENCE = re.compile(r"(?P<indent>[ \t]*+)(?P<fence>`{3,}+|~{3,}+)(?P<info>[^`]*)")
_SURROGATE = re.compile("[\ud800-\udfff]")
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

    @functools.cached_property
    def given(self) -> str:
        """The arguments as JSON text, made once for all rollouts of a problem."""
        return _dumps(self.arguments)

    @functools.cached_property
    def longest(self) -> int:
        """Characters that a right output may have."""
        return MAX_OUTPUT + _LONGER * len(_dumps(self.result))


@dataclasses.dataclass(frozen=True)
class AssertTest:
    """Python text that raises an exception where the program is wrong; see `Sandbox.check`."""

    beginning: str
    setup: str
    tests: str
    entry_point: str
    solved: bool


@dataclasses.dataclass(frozen=True)
class Tests:
    """What a program must pass, in this order."""

    cases: tuple[StdoutTest | CallTest | AssertTest, ...]


class LongInteger(str):
    """The digits of an integer that is too long for Python to convert in reasonable time; equal to itself only."""


def parse_tests(answer: str) -> Tests:
    """Reads a code problem's answer.

    Args:
      answer: JSON text, or what LiveCodeBench makes of JSON text: base64 of zlib of a pickled string.  One of

        - `{"inputs": [...], "outputs": [...], "fn_name": name or null}`, as in APPS and LiveCodeBench;
        - a list of `{"input": ..., "output": ..., "testtype": "stdin" or "functional", "metadata": {"func_name":
          name}}`, where only functional tests need metadata;
        - `{"test": text, "entry_point": expression, "prompt": text, "canonical_solution": text}`, as in HumanEval: the
          text defines `check(candidate)`; the last two may be left out;
        - `{"test_list": [text, ...], "test_setup_code": text, "test_imports": [text, ...], "entry_point": name}`, as in
          MBPP; all but the first may be left out.

        An input on stdin and its output are strings.  A function's inputs and outputs are all JSON text (an input has
        one argument a line), or they are values: then an input is a list of arguments, and an output that is a string
        must not be JSON text as well, for nobody could tell `1` from `"1"`.

    Returns:
      At least one test.

    Raises:
      ValueError: the answer is none of these, or could be read in two ways.
    """
    try:
        return _parse_tests(answer)
    except RecursionError:
        raise ValueError(f"a code problem's tests are nested too deeply: {answer!r:.60}") from None


def check_tests(answer: str) -> None:
    """Refuses tests that cannot be read, or that no program could fail or pass; for the start of a run.

    Raises:
      ValueError: as `parse_tests`; or assert tests that are not Python, have no assert, or name nothing to test.
    """
    for case in parse_tests(answer).cases:
        if isinstance(case, AssertTest):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    _check_asserts(case)
            except (SyntaxError, RecursionError, MemoryError) as error:
                raise ValueError(f"assert tests are not Python: {error!s:.80}: {case.tests!r:.60}") from None


def _check_asserts(case: AssertTest) -> None:
    program_names(case.setup, case.tests, case.entry_point, usual_names())
    nodes = list(ast.walk(ast.parse(case.tests)))
    if not any(isinstance(node, ast.Assert | ast.Raise) for node in nodes):
        raise ValueError(f"assert tests assert nothing: {case.tests!r:.60}")


def _parse_tests(answer: str) -> Tests:
    text = answer.strip()
    content = _json(text if text[:1] in ("{", "[") else _unpacked(text), "a code problem's answer")
    if isinstance(content, dict):
        kinds = [key for key in ("inputs", "outputs", "test", "test_list") if key in content]
        if kinds not in (["inputs", "outputs"], ["test"], ["test_list"]):
            raise ValueError(
                f"a code problem's tests have {', '.join(kinds) or 'none of the known fields'}; expected inputs and"
                " outputs, or test and entry_point, or test_list"
            )
        if kinds[0] in ("test", "test_list"):
            return Tests((_assert_test(content),))
        inputs, outputs, name = content["inputs"], content["outputs"], content.get("fn_name")
        if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
            raise ValueError("a code problem's inputs and outputs must be two lists of the same length")
        rows = [(given, expected, name) for given, expected in zip(inputs, outputs, strict=True)]
    elif isinstance(content, list):
        rows = [_listed(item) for item in content]
    else:
        raise ValueError(f"a code problem's tests must be a JSON object or list, got {content!r:.60}")
    if not rows:
        raise ValueError("a code problem has no tests; expected at least one")
    calls = [row for row in rows if row[2] is not None]
    as_text = all(isinstance(given, str) and isinstance(expected, str) for given, expected, _ in calls)
    return Tests(tuple(_stdout_test(*row[:2]) if row[2] is None else _call_test(*row, as_text) for row in rows))


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


def _stdout_test(given: Any, expected: Any) -> StdoutTest:
    if not _is_text(given) or not _is_text(expected):
        raise ValueError(f"a test on stdin must have two strings of Unicode text, got {given!r:.40}, {expected!r:.40}")
    return StdoutTest(given, expected)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not isinstance(value, LongInteger) and not _SURROGATE.search(value)


def _call_test(given: Any, expected: Any, function: Any, as_text: bool) -> CallTest:
    """Args: as_text: every input and output of the row is a string, and so JSON text."""
    if not isinstance(function, str) or not function.isidentifier():
        raise ValueError(f"a test's function must be a Python name, got {function!r:.60}")
    if isinstance(given, str):
        given = [_json(line, "an argument of a test") for line in given.splitlines() if line.strip()]
    if not isinstance(given, list):
        raise ValueError(f"the input of a function must be a list of arguments or lines of JSON, got {given!r:.60}")
    if as_text:
        expected = _json(expected, "the output of a test")
    elif isinstance(expected, str) and not isinstance(expected, LongInteger) and _is_json(expected):
        raise ValueError(
            f"the output {expected!r:.40} of a function may be a string or JSON text: write all inputs and outputs of"
            " the row as JSON text, an argument a line"
        )
    return CallTest(function, tuple(given), expected)


def _assert_test(content: dict[str, Any]) -> AssertTest:
    def text(key: str, default: str | None = None) -> str:
        value = content.get(key)
        value = default if value is None and default is not None else value
        if not _is_text(value):
            raise ValueError(f"{key} of assert tests must be Python text, got {value!r:.60}")
        return value

    def texts(key: str) -> str:
        value = content.get(key) or []
        if not isinstance(value, list) or not all(map(_is_text, value)):
            raise ValueError(f"{key} of assert tests must be a list of Python texts, got {value!r:.60}")
        return "\n".join(textwrap.dedent(item).strip() for item in value)

    if "test_list" in content:
        tests = texts("test_list")
        if not tests.strip():
            raise ValueError("a code problem's test_list is empty; expected at least one assert")
        setup = f"{texts('test_imports')}\n{text('test_setup_code', '')}"
        return AssertTest("", setup, tests, text("entry_point", ""), solved=False)
    tests, entry_point, prompt = text("test"), text("entry_point"), text("prompt", "")
    if not re.search(r"^def check\(", tests, re.MULTILINE):
        raise ValueError(f"test of assert tests must define check(candidate), got {tests!r:.60}")
    solution = text("canonical_solution", "")
    return AssertTest(prompt, prompt + solution, f"{tests}\ncheck(candidate)", entry_point, solved=bool(solution))


def _integer(digits: str) -> int | LongInteger:
    return int(digits) if len(digits) < _LONG_INTEGER else LongInteger(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError("an object has a name twice")
    return dict(pairs)


_loads = functools.partial(json.loads, parse_int=_integer, object_pairs_hook=_object)


def _dumps(value: Any) -> str:
    """JSON text of what `_loads` made."""
    if isinstance(value, LongInteger):
        return value
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_dumps, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{json.dumps(name)}: {_dumps(item)}' for name, item in value.items())}}}"
    return json.dumps(value)


def _json(text: str, what: str) -> Any:
    try:
        return _loads(text)
    except ValueError as error:
        raise ValueError(f"{what} must be JSON, got {text!r:.60}: {error}") from None


def _is_json(text: str) -> bool:
    try:
        _loads(text)
    except (ValueError, RecursionError):
        return False
    return True


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
        return isinstance(case, AssertTest) or same_value(_loads(outcome.output), case.result)
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
            return self._sandbox.run(program, case.stdin, MAX_OUTPUT + _LONGER * len(case.stdout.encode()))
        return self._sandbox.call(program, case.function, case.given, case.longest)


VERIFIER = Verifier(
    open=lambda grader, code: CodeGrader(
        grader.workers, code.seconds, code.memory_mb * 1_000_000, code.allow_unsandboxed
    ),
    row=lambda problem, response: (response, problem.answer),
    check=lambda problem: check_tests(problem.answer),
    vote=None,
)
