"""The tests of a code problem: its `answer`, JSON in one of several forms, read and checked.

Numbers of more digits than Python converts stay text (`LongInteger`), so that a test may hold them.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import re
import textwrap
import warnings
from typing import Any

from exprl_jax.data.benchmarks import unpack_string
from exprl_jax.reward.verifiers.assert_worker import program_names
from exprl_jax.reward.verifiers.sandbox import MAX_OUTPUT, usual_names

# A right output may be longer than the expected one, by escapes and by spaces: this many times, and MAX_OUTPUT more.
LONGER = 4
# Digits from which on Python does not convert between text and integer.
_LONG_INTEGER = 4300
_SURROGATE = re.compile("[\ud800-\udfff]")


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
        return dumps(self.arguments)

    @functools.cached_property
    def longest(self) -> int:
        """Characters that a right output may have."""
        return MAX_OUTPUT + LONGER * len(dumps(self.result))


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


loads = functools.partial(json.loads, parse_int=_integer, object_pairs_hook=_object)


def dumps(value: Any) -> str:
    """JSON text of what `loads` made."""
    if isinstance(value, LongInteger):
        return value
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(dumps, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{json.dumps(name)}: {dumps(item)}' for name, item in value.items())}}}"
    return json.dumps(value)


def _json(text: str, what: str) -> Any:
    try:
        return loads(text)
    except ValueError as error:
        raise ValueError(f"{what} must be JSON, got {text!r:.60}: {error}") from None


def _is_json(text: str) -> bool:
    try:
        loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _unpacked(text: str) -> str:
    try:
        return unpack_string(text)
    except ValueError as error:
        raise ValueError(f"a code problem's answer must be JSON, or {error}") from None
