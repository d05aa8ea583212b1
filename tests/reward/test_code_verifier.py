"""The code grader: which program it takes, which tests it reads, and what no program can talk it into."""

from __future__ import annotations

import base64
import concurrent.futures
import datetime
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import zlib
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exprl_jax.reward.verifiers import code, code_tests
from exprl_jax.reward.verifiers.code import CodeGrader, last_program, same_stdout, same_value
from exprl_jax.reward.verifiers.code_tests import (
    AssertTest,
    CallTest,
    StdoutTest,
    check_tests,
    dumps,
    loads,
    parse_tests,
)
from exprl_jax.reward.verifiers.sandbox import Isolation, complaint
from exprl_jax.reward.verifiers.sandbox import complaint as sandbox_complaint
from exprl_jax.reward.verifiers.verdict import Verdict

ROOT = Path(__file__).resolve().parents[2]
MEMORY = 512 << 20


def fenced(program, language="python"):
    return f"Here it is:\n\n```{language}\n{program}\n```\n\nDone."


def on_stdin(*pairs):
    return json.dumps({"inputs": [given for given, _ in pairs], "outputs": [out for _, out in pairs], "fn_name": None})


def on_call(name, *pairs):
    return json.dumps({"inputs": [given for given, _ in pairs], "outputs": [out for _, out in pairs], "fn_name": name})


def packed(content, pickled=True):
    """LiveCodeBench's private_test_cases."""
    return base64.b64encode(zlib.compress(pickle.dumps(content) if pickled else content)).decode()


@pytest.fixture(scope="module")
def grader():
    if all(complaint(isolation) for isolation in Isolation):
        pytest.skip("; ".join(f"{isolation.value}: {complaint(isolation)}" for isolation in Isolation))
    with CodeGrader(workers=2, limit_s=20.0, memory_bytes=MEMORY, allow_unsandboxed=True) as grader:
        yield grader


# --- the program -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, program",
    [
        ("```python\na\n```", "a"),
        ("```py\na\n```", "a"),
        ("```Python3\na\n```", "a"),
        ("```python3.11 title=x\na\n```", "a"),
        ("``` python\na\n```", "a"),
        ("```\na\n```", "a"),
        ("~~~python\na\n~~~", "a"),
        ("```python\r\na\r\nb\r\n```\r\n", "a\r\nb\r"),
        ("```python\na\n```\nthen\n```python\nb\n```", "b"),
        ("```python\na\n```\nprints\n```\n3\n```", "a"),
        ("```\n3\n```\n```python\na\n```", "a"),
        ("```\na\n```\n```text\nb\n```", "a"),
        ("```python\na\n```\n```cpp\nb\n```", "a"),
        ("```python\na\n```\n```python\nb", "a"),
        ("````python\na\n```\nb\n````", "a\n```\nb"),
        ("```python\na\n~~~\nb\n```", "a\n~~~\nb"),
        ("```python\na\n````", "a"),
        ("1. So:\n   ```python\n   if a:\n       b\n   ```", "if a:\n    b"),
        ("```python\n    indented\n```", "    indented"),
        ("```python\nx = '\x0c\u2028'\n```", "x = '\x0c\u2028'"),
        ("```python\n```", ""),
        ("```python\n\n```", ""),
        ("```cpp\na\n```", None),
        ("```pythonic\na\n```", None),
        ("```python a```", None),
        ("a `b` c", None),
        ("```python\na", None),
        ("", None),
    ],
)
def test_last_closed_python_block(text, program):
    assert last_program(text) == program


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.lists(st.sampled_from(["```python", "```", "```text", "~~~", "a", "  b"]), max_size=12))
def test_blocks_agree_with_a_reader_of_one_line_at_a_time(lines):
    named, unnamed, opened, block = None, None, None, []
    for line in lines:
        if opened is None and line[0] in "`~":
            opened, block = line, []
        elif opened is not None and line == opened[:3]:
            if opened == "```python":
                named = "\n".join(block)
            elif opened == opened[:3]:
                unnamed = "\n".join(block)
            opened = None
        elif opened is not None:
            block.append(line)
    assert last_program("\n".join(lines)) == (unnamed if named is None else named)


def test_a_megabyte_of_fences_takes_no_time():
    for text in ("```" * 300_000, "```python\n" * 100_000, "```" + " " * 10**6 + "`", " " * 10**6 + "x"):
        assert last_program(text) is None or text.startswith("```python\n")
    assert last_program("```" + " x" * 500_000 + "`\n" + fenced("a")) == "a"


# --- the tests -------------------------------------------------------------------------------------------------------

STDIN = (StdoutTest("1\n", "2\n"), StdoutTest("", "3"))
CALL = (CallTest("f", ([1, 2], "x"), True), CallTest("f", (), [1.5]))
STDIN_LIST = [
    {"input": "1\n", "output": "2\n", "testtype": "stdin"},
    {"input": "", "output": "3", "testtype": "stdin", "metadata": {}},
]
CALL_LIST = [
    {"input": '[1, 2]\n"x"', "output": "true", "testtype": "functional", "metadata": {"func_name": "f"}},
    {"input": "", "output": "[1.5]", "testtype": "functional", "metadata": {"func_name": "f"}},
]
CALL_VALUES = on_call("f", ([[1, 2], "x"], True), ([], [1.5]))


@pytest.mark.parametrize(
    "answer, cases",
    [
        (on_stdin(("1\n", "2\n"), ("", "3")), STDIN),
        (json.dumps({"inputs": ["1\n", ""], "outputs": ["2\n", "3"]}), STDIN),
        (f"\n {json.dumps(STDIN_LIST)}\n", STDIN),
        (packed(json.dumps(STDIN_LIST)), STDIN),
        (packed(on_stdin(("1\n", "2\n"), ("", "3"))), STDIN),
        (packed(json.dumps(STDIN_LIST).encode()), STDIN),
        (on_call("f", ('[1, 2]\n"x"\n', "true"), ("", "[1.5]")), CALL),
        (CALL_VALUES, CALL),
        (json.dumps(CALL_LIST), CALL),
        (packed(CALL_VALUES), CALL),
        (json.dumps(STDIN_LIST[:1] + CALL_LIST[:1]), STDIN[:1] + CALL[:1]),
    ],
)
def test_every_format_is_read(answer, cases):
    assert parse_tests(answer) == code_tests.Tests(cases)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("/tmp/evil-pickle",)


def test_a_pickle_that_names_a_function_is_refused(tmp_path, monkeypatch):
    target = tmp_path / "made"
    monkeypatch.setattr(Evil, "__reduce__", lambda self: (os.mkdir, (str(target),)))
    answer = packed(Evil())
    with pytest.raises(ValueError, match="something else than one string"):
        parse_tests(answer)
    assert not target.exists()
    pickle.loads(zlib.decompress(base64.b64decode(answer)))
    assert target.exists()  # as it would have been
    with pytest.raises(ValueError, match="something else than one string"):
        parse_tests(packed(datetime.date(2026, 1, 1)))


def cut(text):
    return base64.b64encode(zlib.compress(pickle.dumps(text))[:-6]).decode()


@pytest.mark.parametrize(
    "answer, words",
    [
        ("", "must be JSON, or base64"),
        ("12", "must be JSON, or base64"),
        ("not base64 at all", "must be JSON, or base64"),
        (base64.b64encode(b"not zlib").decode(), "must be JSON, or base64"),
        (packed(b"no pickle", pickled=False), "opcode b'n' unknown"),
        (packed(b"", pickled=False), "exhausted"),
        (packed(b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f", pickled=False), "exhausted"),
        (packed([{"input": ""}]), "something else than one string"),
        (packed("nothing"), "must be JSON"),
        (packed(b"\xff"), "utf-8"),
        (cut(json.dumps(STDIN_LIST)), "cut short"),
        ("{", "must be JSON"),
        ("[" * 100_000, "nested too deeply"),
        (packed("1"), "must be a JSON object or list, got 1"),
        ("[]", "no tests"),
        ('{"inputs": [], "outputs": []}', "no tests"),
        ('{"inputs": ["1"]}', "tests have inputs; expected inputs and outputs, or test"),
        ('{"cases": []}', "none of the known fields"),
        (
            '{"inputs": ["1"], "outputs": ["1"], "test_list": ["assert f() == 1"]}',
            "inputs, outputs, test_list; expected",
        ),
        ('{"inputs": ["1"], "inputs": ["2"], "outputs": ["1"]}', "a name twice"),
        ('{"inputs": ["\\ud800"], "outputs": ["1"]}', "Unicode text"),
        ('{"inputs": ["1"], "outputs": ["\\udc80"]}', "Unicode text"),
        # A string or JSON text?  Nobody can tell 1 from "1".
        ('{"inputs": [[1]], "outputs": ["1"], "fn_name": "f"}', "may be a string or JSON text"),
        ('{"inputs": [[1], [2]], "outputs": ["one", "[2]"], "fn_name": "f"}', "may be a string or JSON text"),
        ('{"inputs": [["a"]], "outputs": ["null"], "fn_name": "f"}', "may be a string or JSON text"),
        ('{"inputs": ["1", "2"], "outputs": ["1", 2], "fn_name": "f"}', "may be a string or JSON text"),
        ('{"inputs": [[]], "outputs": ["1e5"], "fn_name": "f"}', "may be a string or JSON text"),
        (
            '{"test": "def check(candidate):\\n    assert candidate(1)"}',
            "entry_point of assert tests must be Python text",
        ),
        ('{"test": "assert f(1)", "entry_point": "f"}', r"must define check\(candidate\)"),
        ('{"test": 3, "entry_point": "f"}', "test of assert tests must be Python text, got 3"),
        ('{"test_list": "assert f(1)"}', "test_list of assert tests must be a list"),
        ('{"test_list": []}', "test_list is empty"),
        ('{"test_list": [1]}', "test_list of assert tests must be a list"),
        (
            '{"test_list": ["assert f(1)"], "test_imports": "import math"}',
            "test_imports of assert tests must be a list",
        ),
        ('{"inputs": ["1"], "outputs": []}', "same length"),
        ('{"inputs": "1", "outputs": "1"}', "two lists"),
        ('{"inputs": [1], "outputs": ["1"]}', "two strings"),
        ('{"inputs": ["1"], "outputs": [1]}', "two strings"),
        ('{"inputs": ["1"], "outputs": ["1"], "fn_name": 3}', "Python name, got 3"),
        ('{"inputs": ["1"], "outputs": ["1"], "fn_name": "a.b"}', "Python name"),
        ('{"inputs": ["x"], "outputs": ["1"], "fn_name": "f"}', "argument of a test must be JSON"),
        ('{"inputs": ["1"], "outputs": ["x"], "fn_name": "f"}', "output of a test must be JSON"),
        ('{"inputs": [3], "outputs": ["1"], "fn_name": "f"}', "list of arguments"),
        ("[3]", "must be an object with input, output and testtype"),
        ('[{"input": "", "output": ""}]', "must be an object with input, output and testtype"),
        ('[{"input": "", "output": "", "testtype": "file"}]', "stdin or functional, got 'file'"),
        ('[{"input": "", "output": "1", "testtype": "functional"}]', "must name its function"),
        ('[{"input": "", "output": "1", "testtype": "functional", "metadata": {"func_name": null}}]', "must name its"),
    ],
)
def test_tests_that_cannot_be_read_are_refused_in_one_line(answer, words):
    with pytest.raises(ValueError, match=words) as raised:
        parse_tests(answer)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


HUMAN_EVAL = {
    "task_id": "HumanEval/0",
    "prompt": "from math import sqrt\n\n\ndef root(x: float) -> float:\n    '''Its root.'''\n",
    "entry_point": "root",
    "canonical_solution": "    return sqrt(x)\n",
    "test": "def check(candidate):\n    assert abs(candidate(2.0) - 1.414) < 1e-3\n    assert candidate(4.0) == 2.0\n",
}
MBPP = {
    "task_id": 2,
    "text": "Write a function to find the shared elements of two lists.",
    "code": "def shared(a, b):\n    return tuple(sorted(set(a) & set(b)))",
    "test_list": ["assert shared((3, 4, 5), (5, 4)) == (4, 5)", "assert set(shared([1], [2])) == set()"],
    "test_setup_code": "",
    "challenge_test_list": [],
}


def test_assert_tests_are_read():
    (case,) = parse_tests(json.dumps(HUMAN_EVAL)).cases
    prompt = HUMAN_EVAL["prompt"]
    solution = prompt + HUMAN_EVAL["canonical_solution"]
    assert case == AssertTest(prompt, solution, f"{HUMAN_EVAL['test']}\ncheck(candidate)", "root", True)
    bare = {key: HUMAN_EVAL[key] for key in ("test", "entry_point")}
    (case,) = parse_tests(json.dumps(bare)).cases
    assert case == AssertTest("", "", f"{HUMAN_EVAL['test']}\ncheck(candidate)", "root", False)
    (case,) = parse_tests(
        packed(json.dumps(MBPP | {"test_imports": ["import math"], "test_setup_code": "n = 1"}))
    ).cases
    assert case == AssertTest("", "import math\nn = 1", "\n".join(MBPP["test_list"]), "", False)
    for answer in (HUMAN_EVAL, bare, MBPP):
        check_tests(json.dumps(answer))


@pytest.mark.parametrize(
    "answer, words",
    [
        (MBPP | {"test_list": ["assert f(1) = 2"]}, "are not Python"),
        (MBPP | {"test_list": ["assert f('\0')"]}, "are not Python|null bytes"),
        (MBPP | {"test_list": ["f(1)"]}, "assert nothing"),
        (MBPP | {"test_list": ["assert True"]}, "call nothing that could be the program's"),
        (MBPP | {"test_list": ["assert set(sorted([1])) == {1}"]}, "unclear which of set, sorted is tested"),
        (MBPP | {"test_list": ["assert gcd(lcm(1, 2), 2) == 2"]}, "unclear which of gcd, lcm is tested"),
        (MBPP | {"test_list": ["assert f(1)"], "test_setup_code": "x ="}, "are not Python"),
        (HUMAN_EVAL | {"test": "def check(candidate):\n    pass"}, "assert nothing"),
        (HUMAN_EVAL | {"entry_point": "f("}, "are not Python"),
        (MBPP | {"test_list": ["assert f(" + "(" * 5000 + ")" * 5000 + ")"]}, "are not Python"),
    ],
)
def test_assert_tests_that_no_program_could_be_tested_with_are_refused(answer, words):
    with pytest.raises(ValueError, match=words) as raised:
        check_tests(json.dumps(answer))
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


def test_long_integers_are_digits():
    long = "1" + "0" * 5000
    (case,) = parse_tests(on_call("f", (f"{long}\n[-{long}]", long))).cases
    assert case.arguments == (long, [f"-{long}"]) and case.result == long
    assert dumps(case.arguments) == f"[{long}, [-{long}]]"
    with pytest.raises(ValueError, match="Exceeds the limit"):
        json.loads(long)


def test_tests_that_swell_are_refused(monkeypatch):
    monkeypatch.setattr("exprl_jax.data.benchmarks.MAX_TESTS", 10**5)
    assert parse_tests(packed(on_stdin(("x" * 90_000, "y")))).cases[0].stdout == "y"
    with pytest.raises(ValueError, match="more than 100000 bytes"):
        parse_tests(packed(on_stdin(("x" * 200_000, "y"))))


# --- comparison ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "got, expected, same",
    [
        ("1 2\n3\n", "1 2\n3", True),
        ("\n 1 2  \n3\n\n", "1 2\n3", True),
        ("1\r\n2\r\n", "1\n2", True),
        ("1 2 3", "1\n2\n3", False),
        ("1\n\n2", "1\n2", False),
        ("1\n2", "1", False),
        ("", "1", False),
        ("", "\n", True),
        ("Yes", "yes", False),
        ("a  b", "a b", False),
        ("1  2", "1 2", True),
        ("1.0", "1", True),
        ("1.50 2e3", "1.5 2000", True),
        ("0.3333333", "0.3333334", False),
        ("10000000000000000000001", "10000000000000000000000", False),
        ("1 a", "1.0 a", False),
        ("1 2", "1", False),
        ("nan", "NaN", False),
        ("sNaN", "1", False),
        ("inf", "Infinity", True),
        ("1e999999999", "1e999999998", False),
        ("1e999999999999999999999999", "1", False),
    ],
)
def test_outputs_agree(got, expected, same):
    assert same_stdout(got, expected) is same


@settings(max_examples=50, derandomize=True, deadline=None)
@given(st.lists(st.lists(st.decimals(allow_nan=False, allow_infinity=False), min_size=1, max_size=3), min_size=1))
def test_numbers_agree_however_they_are_written(rows):
    plain = "\n".join(" ".join(f"{x:f}" if abs(x.adjusted()) < 50 else str(x) for x in row) for row in rows)
    scientific = "\n".join("  ".join(f"{x:E}" for x in row) for row in rows)
    assert same_stdout(plain, scientific)
    rows[-1][-1] = rows[-1][-1] + (Decimal(1) if abs(rows[-1][-1].adjusted()) < 20 else rows[-1][-1])
    changed = "\n".join(" ".join(str(x) for x in row) for row in rows)
    assert same_stdout(plain, changed) is False


@pytest.mark.parametrize(
    "got, expected, same",
    [
        ("1_000", "1000", False),
        ("\u0661", "1", False),
        ("+1", "1", True),
        (".5 1.", "0.5 1.0", True),
        ("1" * 10_000, "1" * 10_000 + ".0", True),
        ("1" * 10_000, "1" * 9_999 + "2", False),
        ("True", "1", False),
        ("1", "1 ", True),
    ],
)
def test_numbers_are_what_programs_print(got, expected, same):
    assert same_stdout(got, expected) is same


def test_a_hostile_line_of_digits_takes_no_time():
    for line in ("1" * 10**7 + "x", "1." * 10**6, "e" * 10**7, "." * 10**7):
        assert not same_stdout(line, line[:-1] + "0")


VALUES = [
    "1",
    "1.0",
    "true",
    "0",
    "false",
    "null",
    '"1"',
    "[1]",
    "[true]",
    "[[1]]",
    "[[true]]",
    '{"a": 1}',
    '{"a": true}',
]
VALUES += [
    "NaN",
    "[NaN]",
    "Infinity",
    "-Infinity",
    '""',
    "[]",
    "{}",
    "9007199254740993",
    "9007199254740992.0",
    "1" * 5000,
]


@pytest.mark.parametrize("text", VALUES)
def test_values_agree_with_themselves_and_their_like(text):
    """As many classes as values, but for 1 and 1.0: what JSON calls a number is compared by its value."""
    got = loads(text)
    alike = {"1": {"1", "1.0"}, "1.0": {"1", "1.0"}}
    assert {other for other in VALUES if same_value(got, loads(other))} == alike.get(text, {text})
    assert same_value(loads(f'{{"x": [{text}, 2]}}'), loads(f'{{"x": [{text}, 2.0]}}'))
    assert not same_value([got], got) and not same_value([got, got], [got])


# --- verdicts --------------------------------------------------------------------------------------------------------

ADD = on_stdin(("1 2\n", "3\n"), ("5 5\n", "10"))
ADDS = "a, b = map(int, input().split())\nprint(a + b)"
TOP = on_call("top", ('[[1, 2], [3]]\n"k"', '[["k", 3], 1]'), ('[[0]]\n""', '[["", 0], 1]'))
TOPS = "def top(rows, key):\n    return (key, max(map(max, rows))), 1"


def test_verdicts(grader):
    rows = [
        (fenced(ADDS), ADD, "correct"),
        (fenced("print(3)"), ADD, "wrong"),
        (fenced("print(3"), ADD, "wrong"),
        (fenced(ADDS + "\nraise SystemExit(1)"), ADD, "correct"),
        (fenced(ADDS + "\nraise ValueError"), ADD, "wrong"),
        (ADDS, ADD, "no_answer"),
        ("", ADD, "no_answer"),
        (fenced(""), ADD, "unparsable"),
        (fenced("#" * (code.MAX_PROGRAM + 1)), ADD, "unparsable"),
        (fenced(TOPS), TOP, "correct"),
        (
            fenced(
                "class Solution:\n  def top(self, rows: List[List[int]], key: str):\n    print(1)\n"
                "    return [key, max(chain(*rows))], 1"
            ),
            TOP,
            "correct",
        ),
        (fenced("def top(rows, key): return [key, 3], 1"), TOP, "wrong"),
        (fenced("def other(rows, key): return 1"), TOP, "wrong"),
        (fenced("def top(rows, key): return {1}"), TOP, "wrong"),
        (
            fenced(
                "import numpy as np\ndef top(rows, key): return [key, np.int64(max(map(max, rows)))], np.float64(1)"
            ),
            TOP,
            "correct",
        ),
        (fenced("def f(n): return {1: n}"), on_call("f", ("2", '{"1": 2}')), "correct"),
        (fenced("def f(n): return float('nan')"), on_call("f", ("2", "0.5")), "wrong"),
    ]
    got = grader.grade([row[:2] for row in rows])
    assert {row[0]: verdict for row, verdict in zip(rows, got, strict=True) if row[2] != verdict} == {}


LONG = "3 ** 20_000"


def test_what_is_right_is_right_however_it_ends_or_is_typed(grader):
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        digits, other = str(3**20_000), str(3**20_000 + 1)
    finally:
        sys.set_int_max_str_digits(limit)
    echo = on_stdin(("x", "x"))
    leave = ["exit()", "quit()", "exit(0)", "quit(1)", "import sys; sys.exit()", "raise SystemExit", "os._exit(0)"]
    rows = [(fenced(f"import os\nprint(input(), flush=True)\n{end}"), echo, "correct") for end in leave]
    rows += [
        (fenced(f"import os\ndef f(x): return x\n{end}"), on_call("f", ('"x"', '"x"')), "correct") for end in leave
    ]
    rows += [(fenced(f"import os\ndef f(x):\n    {end}"), on_call("f", ('"x"', "null")), "wrong") for end in leave]
    rows += [
        # Typed by JSON.
        (fenced("def f(x): return '1'"), on_call("f", ("0", "1")), "wrong"),
        (fenced("def f(x): return 1"), on_call("f", ("0", '"1"')), "wrong"),
        (fenced("def f(x): return True"), on_call("f", ("0", "1")), "wrong"),
        (fenced("def f(x): return 1"), on_call("f", ("0", "true")), "wrong"),
        (fenced("def f(x): return [[True]]"), on_call("f", ("0", "[[1]]")), "wrong"),
        (fenced("def f(x): return {'a': False}"), on_call("f", ("0", '{"a": 0}')), "wrong"),
        (fenced("def f(x): return (1, (2.0,))"), on_call("f", ("0", "[1, [2]]")), "correct"),
        (fenced("def f(x): return float('nan')"), on_call("f", ("0", "NaN")), "correct"),
        (fenced("def f(x): return {1: 2, '1': 3}"), on_call("f", ("0", '{"1": 3}')), "wrong"),
        (fenced("def f(x): return {1, 2}"), on_call("f", ("0", "[1, 2]")), "wrong"),
        (fenced("def f(x): return 'abc'"), on_call("f", ([0], "abc")), "correct"),
        # Long integers.
        (fenced(f"print({LONG})"), on_stdin(("", digits)), "correct"),
        (fenced(f"print({LONG})"), on_stdin(("", other)), "wrong"),
        (fenced(f"print({LONG} == int(input()))"), on_stdin((digits, "True")), "correct"),
        (fenced("def f(x): return [x + 1]"), on_call("f", (digits, f"[{other}]")), "correct"),
        (fenced("def f(x): return [x + 1]"), on_call("f", (digits, f"[{digits}]")), "wrong"),
        (fenced("def f(x): return [str(x)]"), on_call("f", (digits, f"[{digits}]")), "wrong"),
        (fenced("def f(x): return [float(x % 7)]"), on_call("f", (digits, f"[{digits}]")), "wrong"),
        # Bytes that are no text.
        (fenced("import sys; sys.stdout.buffer.write(b'\\xff')"), on_stdin(("", "\ufffd")), "wrong"),
        (fenced("import sys; sys.stdout.buffer.write(b'a\\xed\\xa0\\x80')"), on_stdin(("", "a\ufffd")), "wrong"),
        (fenced("print('\\ufffd')"), on_stdin(("", "\ufffd")), "correct"),
        (fenced("print('é')"), on_stdin(("", "é")), "correct"),
    ]
    got = grader.grade([row[:2] for row in rows])
    assert {row[0][-60:-12]: verdict for row, verdict in zip(rows, got, strict=True) if row[2] != verdict} == {}


def test_outputs_over_16_mb_are_compared(grader):
    long = "x" * (17 << 20)
    rows = [
        (fenced("print('x' * (17 << 20))"), on_stdin(("", long)), "correct"),
        (fenced("print('x' * (17 << 20) + 'y')"), on_stdin(("", long)), "wrong"),
        (fenced("def f(n): return 'x' * n"), on_call("f", (str(17 << 20), json.dumps(long))), "correct"),
        (fenced("while True: print('x' * 10**6)"), on_stdin(("", long)), "wrong"),
        (fenced("print('x' * (17 << 20))"), on_stdin(("", "x")), "wrong"),
    ]
    assert [str(verdict) for verdict in grader.grade([row[:2] for row in rows])] == [row[2] for row in rows]


# --- assert tests ----------------------------------------------------------------------------------------------------

SQUARE = {
    "test": "def check(candidate):\n    assert candidate(3) == 9\n    assert candidate(-4) == 16",
    "entry_point": "f",
}
SQUARE_LIST = {"test_list": ["assert f(3) == 9", "assert f(-4) == 16"]}
FORMS = (SQUARE, SQUARE_LIST)
# Each gets past a checker that runs program and tests in one process; see the test below.
FORGERIES = {
    "equal to all": "class A:\n  __eq__ = lambda *a: True\n  __bool__ = lambda a: True\ndef f(x): return A()",
    "an int equal to all": "class A(int):\n  __eq__ = lambda *a: True\n  __hash__ = None\ndef f(x): return A(1)",
    "exits": "import os\ndef f(x): os._exit(0)",
    "exits at once": "import os\nos._exit(0)",
    "exits by an exception": "def f(x): raise SystemExit(0)",
    "exits when it is over": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 1",
    "reads what is expected from the frame": (
        "import sys\ndef f(x):\n  constants = sys._getframe(1).f_code.co_consts\n"
        "  found = [value for value in constants if type(value) is int and value > 8]\n"
        "  return found[0 if x == 3 else -1]"
    ),
    "reads what is expected from the file": (
        "import re\ndef f(x): return int(re.search(rf'f\\({x}\\) == ([0-9]+)', open(__file__).read())[1])"
    ),
    "swallows the failure": (
        "import sys\ndef f(x): return 1\ndef hook(*a):\n  import os; os._exit(0)\nsys.excepthook = hook"
    ),
    "traces the tests": (
        "import sys\ndef tracer(frame, event, value):\n  if event == 'exception':\n    import os; os._exit(0)\n"
        "  return tracer\nsys.settrace(tracer)\ndef f(x):\n  sys._getframe(1).f_trace = tracer\n  return 1"
    ),
    "a thread that exits": (
        "import os, threading\nthreading.Thread(target=lambda: os._exit(0)).start()\ndef f(x):\n"
        "  import time; time.sleep(1); return 1"
    ),
    "a signal that exits": (
        "import os, signal\nsignal.signal(signal.SIGALRM, lambda *a: os._exit(0))\nsignal.setitimer(0, 0.05)\n"
        "def f(x):\n  import time; time.sleep(1); return 1"
    ),
    "a child that goes on": "import os, sys\ndef f(x):\n  os._exit(0) if os.fork() else None\n  return 1",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_pass_works_in_one_process(name, tmp_path):
    """So that the test below tests something: exit status 0 is what a checker in one process goes by."""
    (tmp_path / "together.py").write_text("\n".join([FORGERIES[name], *SQUARE_LIST["test_list"]]))
    done = subprocess.run([sys.executable, tmp_path / "together.py"], capture_output=True, timeout=30)
    assert done.returncode == 0, done.stderr


# Run in the sandbox only.
HOSTILE = {
    "patches Python": (
        "import builtins\nclass E(Exception): pass\nbuiltins.AssertionError = E\nbuiltins.abs = lambda x: 0\n"
        "builtins.check = lambda c: None\nbuiltins.candidate = {3: 9, -4: 16}.get\n"
        "builtins.__build_class__ = None\ndef check(c): pass\ndef f(x): return 1"
    ),
    "prints success": "import os\nfor fd in (1, 2):\n  os.write(fd, b'passed 0 correct\\n')\ndef f(x): return 1",
    "writes to every descriptor": (
        "import os\nfor fd in range(3, 32):\n  try: os.write(fd, b'{\"value\": 9}\\n' * 3)\n  except OSError: pass\n"
        "def f(x): return 1"
    ),
    "answers for itself": (
        "import os\ndef f(x):\n  for fd in range(3, 32):\n    try: os.write(fd, b'{\"value\": true}\\n')\n"
        "    except OSError: pass\n  os._exit(0)"
    ),
    "sends nonsense": (
        "import os\ndef f(x):\n  for fd in range(3, 32):\n    try: os.write(fd, b'[1, 2\\n')\n"
        "    except OSError: pass\n"
        "  import time; time.sleep(9)"
    ),
    "sends an object of the tests": (
        "import os\ndef f(x):\n  for fd in range(3, 32):\n"
        '    try: os.write(fd, b\'{"do": "getattr", "of": {"yours": 0}, "arguments": ["__globals__"],'
        ' "keywords": {}}\\n\')\n    except OSError: pass\n  os._exit(0)'
    ),
    "kills its parent": "import os, signal\ndef f(x):\n  os.kill(os.getppid(), signal.SIGKILL)",
    "returns nothing": "def f(x): pass",
    "defines nothing": "x = 1",
    "is no program": "def f(x: return 9",
    "fails later": "def f(x): return 9 if x == 3 else 15",
    "returns text": "def f(x): return str(x * x)",
    "returns NaN": "def f(x): return float('nan')",
    "returns itself": "def f(x): return f",
    "patches JSON": "import json\njson.dumps = lambda *a, **k: '{\"value\": true}'\ndef f(x): return 1",
    "patches the worker": (
        "import sys\nworker = sys.modules.get('assert_worker')\n"
        "if worker: worker.Channel._answer = lambda s, m: s._write({'value': True})\ndef f(x): return 1"
    ),
}


def test_no_forged_pass_is_taken(grader):
    rows = [
        (fenced(program), json.dumps(form)) for program in (*FORGERIES.values(), *HOSTILE.values()) for form in FORMS
    ]
    got = grader.grade(rows)
    right = [program for (program, _), verdict in zip(rows, got, strict=True) if verdict != Verdict.wrong]
    assert [text for text in right if "time.sleep(9)" not in text and "os.fork" not in text] == []
    assert Verdict.correct not in got


RIGHT = {
    "a function": "def f(x): return x * x",
    "a method": "class Solution:\n  def f(self, x: int) -> int: return x ** 2",
    "a lambda": "f = lambda x: x * x",
    "an object": "class F:\n  def __call__(self, x): return x * x\nf = F()",
    "noise": "print('hello')\ndef f(x):\n  print(x)\n  return x * x",
    "a main": "def f(x): return x * x\nif __name__ == '__main__':\n  print(f(int(input())))",
    "an exit": "def f(x): return x * x\nexit()",
    "a hard exit": "import os\ndef f(x): return x * x\nos._exit(0)",
    "a bool": "def f(x): return x * x + False",
    "an array's number": "import numpy as np\ndef f(x): return np.int64(x) ** 2",
    "a float": "def f(x): return x * 1.0 * x",
    "the usual names": "def f(x: Optional[int]): return reduce(mul, [x, x])",
    "a thread that waits": (
        "import threading\nthreading.Thread(target=threading.Event().wait).start()\ndef f(x): return x * x"
    ),
}


def test_right_programs_pass_assert_tests(grader):
    rows = [(fenced(program), json.dumps(form)) for program in RIGHT.values() for form in FORMS]
    got = grader.grade(rows)
    assert [row[0] for row, verdict in zip(rows, got, strict=True) if verdict != Verdict.correct] == []


# What tests may do to a program, each with a right and a wrong one.
TESTS = {
    "types are Python's": (["assert f(1) == (1, [2], {3})"], "return (1, [2], {3})", "return [1, [2], {3}]"),
    "sets": (["assert f(1) == {1, 2} and type(f(1)) is set"], "return {1, 2}", "return [1, 2]"),
    "True is 1 in Python": (["assert f(1) is True"], "return True", "return 1"),
    "dicts": (["assert f(1) == {1: None, (2,): 'x'}"], "return {1: None, (2,): 'x'}", "return {'1': None}"),
    "numbers": (["assert f(1) == (1j, 2.5, 10**5000)"], "return (1j, 2.5, 10**5000)", "return (1j, 2.5, 10**5001)"),
    "texts": (["assert f(1) == ('é\\udc80\\n', b'\\xff')"], "return ('é\\udc80\\n', b'\\xff')", "return ('é', b'')"),
    "fractions": (
        [
            "from fractions import Fraction",
            "from decimal import Decimal",
            "assert f(1) == [Fraction(1, 3), Decimal('0.1')]",
        ],
        "return [Fraction(1, 3), Decimal('0.1')]",
        "return [1 / 3, 0.1]",
    ),
    "dates": (
        ["import datetime", "assert f(1) == datetime.date(2026, 1, 2)"],
        "return date(2026, 1, 2)",
        "return '2026'",
    ),
    "counters": (["assert f(1) == {'a': 2}"], "return Counter('aa')", "return Counter('a')"),
    "ranges": (["assert list(f(range(3))) == [0, 1, 2]"], "return x", "return range(2)"),
    "types": (["assert f(int) == int and f(str) is str"], "return x", "return object"),
    "generators": (["assert list(f(3)) == [0, 1, 2]"], "return (i for i in range(x))", "return (i for i in range(2))"),
    "endless generators": (
        ["from itertools import islice", "assert list(islice(f(3), 2)) == [3, 4]", "assert next(f(3)) == 3"],
        "return count(x)",
        "return count(x + 1)",
    ),
    "truth": (["assert f(1)", "assert not f(0)"], "return object() if x else []", "return object()"),
    "matches": (["assert f('ab')", "assert not f('b')"], "return re.match('a', x)", "return re.match('b', x)"),
    "exceptions": (
        [
            "try:\n    f(0)\nexcept ZeroDivisionError as error:\n    assert 'zero' in str(error)\n"
            "else:\n    assert False"
        ],
        "return 1 / x",
        "return 1",
    ),
    "exceptions of its own": (
        ["try:\n    f(0)\nexcept ValueError:\n    pass\nelse:\n    assert False"],
        "raise type('Mine', (ValueError,), {})('x')",
        "raise type('Mine', (KeyError,), {})('x')",
    ),
    "what is changed in place": (["x = [3, 1, 2]", "f(x)", "assert x == [1, 2, 3]"], "x.sort()", "sorted(x)"),
    "what is changed deep": (
        ["x = {'a': [1]}", "assert f(x) is None", "assert x == {'a': [1, 2]}"],
        "x['a'].append(2)",
        "",
    ),
    "functions of the tests": (
        ["assert f(lambda n: n + 1) == 43", "assert f(len_of := (lambda n: -n)) == -42"],
        "return x(42)",
        "return 43",
    ),
    "functions of the program": (["assert f(2)(3) == 5"], "return lambda y: x + y", "return lambda y: 5.5"),
    "functions there and back": (
        ["assert f(lambda g: g(1))(2) == 3"],
        "return lambda y: x(lambda z: z + y)",
        "return int",
    ),
    "keywords": (["assert f(x=3) == 3"], "return x", "return 4"),
    "arrays": (
        [
            "import numpy as np",
            "assert (f(np.arange(3)) == np.array([0, 2, 4])).all()",
            "assert f(np.arange(2)).shape == (2,)",
        ],
        "return x * 2",
        "return x",
    ),
    "random tests": (
        ["import random", "rng = random.Random(0)"]
        + ["for _ in range(50):\n    x = [rng.randint(0, 9) for _ in range(5)]\n    assert f(x) == sorted(x)"],
        "return sorted(x)",
        "return sorted(set(x))",
    ),
    "modules that nobody imported": (
        ["assert math.isclose(f(2), 1.4142135623730951)"],
        "return 2 ** 0.5",
        "return 1.4",
    ),
}


def test_tests_may_do_what_tests_do(grader):
    rows = []
    for tests, right, wrong in TESTS.values():
        answer = json.dumps({"test_list": tests})
        check_tests(answer)
        rows += [(fenced(f"def f(x):\n    {body or 'pass'}"), answer) for body in (right, wrong)]
    got = grader.grade(rows)
    by_name = dict(zip(TESTS, zip(got[::2], got[1::2], strict=True), strict=True))
    assert {name: verdicts for name, verdicts in by_name.items() if verdicts != ("correct", "wrong")} == {}


def test_classes_of_a_program_are_used_from_afar(grader):
    account = """
class Account:
    def __init__(self, owner, balance=0):
        self.owner, self.balance = owner, balance
    def deposit(self, amount):
        if amount <= 0:
            raise ValueError("amount")
        self.balance += amount
        return self
    def __len__(self):
        return 7
    def __str__(self):
        return f"{self.owner}: {self.balance}"
    def __getitem__(self, key):
        return [key]
"""
    tests = """
a = Account("x", balance=2)
assert a.deposit(3).balance == 5
a.balance = 9
assert str(a) == "x: 9" and len(a) == 7 and a[3] == [3] and a["y"] == ["y"]
try:
    a.deposit(0)
    assert False
except ValueError:
    pass
assert not hasattr(a, "missing")
"""
    nodes = {
        "test_setup_code": "root = Node(1)\r\nroot.left = Node(2)\r\nroot.left.left = Node(4)",
        "test_list": ["assert (height(root)) == 3", "assert height(Node(1)) == 1", "assert height(None) == 0"],
    }
    node = "class Node:\n  def __init__(self, x):\n    self.left = self.right = None\n"
    height = "def height(n): return 0 if n is None else 1 + max(height(n.left), height(n.right))"
    rows = [
        (fenced(account), json.dumps({"test_list": [tests]}), "correct"),
        (fenced(account.replace("+= amount", "= amount")), json.dumps({"test_list": [tests]}), "wrong"),
        (fenced(node + height), json.dumps(nodes), "correct"),
        (fenced(node + height.replace("1 + max", "max")), json.dumps(nodes), "wrong"),
        (fenced(height), json.dumps(nodes), "wrong"),
        # Whether two of them are equal is the program's word alone.
        (
            fenced("class P:\n  def __eq__(s, o): return True"),
            json.dumps({"test_list": ["assert P() == P()"]}),
            "wrong",
        ),
        (fenced("class P: pass"), json.dumps({"test_list": ["assert P() != P()"]}), "wrong"),
    ]
    method = {"test": "def check(candidate):\n    assert candidate([1, 2]) == 3", "entry_point": "Solution().total"}
    rows += [(fenced("class Solution:\n  def total(self, x): return sum(x)"), json.dumps(method), "correct")]
    rows += [(fenced("class Solution:\n  def total(self, x): return 4"), json.dumps(method), "wrong")]
    assert [str(verdict) for verdict in grader.grade([row[:2] for row in rows])] == [row[2] for row in rows]


def test_names_of_python_stay_pythons(grader):
    """A program that defines what the tests use to compare forges nothing; one that is tested under such a name is."""
    close = {"test_list": ["assert isclose(f(1), 2.0)", "assert sorted(f2(1)) == [1, 2]", "assert abs(f(1) - 2) < 0.1"]}
    forged = "def isclose(*a): return True\ndef sorted(*a): return [1, 2]\ndef abs(x): return 0\n"
    wrong, right = "def f(x): return 7\ndef f2(x): return [3]", "def f(x): return 2\ndef f2(x): return [2, 1]"
    total = {"test_list": ["assert sum(10, 15) == 6"]}
    rows = [
        (fenced(right), json.dumps(close), "correct"),
        (fenced(forged + wrong), json.dumps(close), "wrong"),
        (fenced("def sum(a, b): return 6"), json.dumps(total), "correct"),
        (fenced("def total(a, b): return 6"), json.dumps(total), "wrong"),
        (fenced("def merge(a): return {1}"), json.dumps({"test_list": ["assert set(merge([1])) == {1}"]}), "correct"),
        (fenced("def merge(a): return {2}"), json.dumps({"test_list": ["assert set(merge([1])) == {1}"]}), "wrong"),
        (
            fenced("def sorted(x): return {1}"),
            json.dumps({"test_list": ["assert set(sorted([1])) == {1}"], "entry_point": "sorted"}),
            "correct",
        ),
    ]
    assert [str(verdict) for verdict in grader.grade([row[:2] for row in rows])] == [row[2] for row in rows]


def test_a_benchmarks_own_solution_is_compared_with(grader):
    """HumanEval's tests compare some programs with themselves; its solution stands for them there."""
    row = HUMAN_EVAL | {
        "test": "def check(candidate):\n    for x in (1.0, 4.0):\n        assert candidate(x) == root(x)"
    }
    alone = {key: row[key] for key in ("test", "entry_point")}
    wrong = fenced("def root(x): return 7")
    assert grader.grade([(wrong, json.dumps(row)), (wrong, json.dumps(alone))]) == ["wrong", "correct"]
    # The prompt's imports and helpers are there for a program that leaves them out.
    assert grader.grade([(fenced("def root(x): return sqrt(x)"), json.dumps(HUMAN_EVAL))]) == ["correct"]


def test_tests_that_cannot_leave_their_process_say_nothing_of_a_program(grader):
    tests = json.dumps({"test_list": ["class Mine: pass", "assert f(Mine()) == 1"]})
    caught = json.dumps(
        {"test_list": ["class Mine: pass", "try:\n    f(Mine())\nexcept BaseException:\n    pass", "assert 1"]}
    )
    program = fenced("def f(x): return 1")
    assert grader.grade([(program, tests), (program, caught)]) == ["missing", "missing"]
    # A program cannot bring this about: exit status 3 is nothing special in it.
    leaves = fenced("import os\ndef f(x): os._exit(3)\nos.system('exit 3')")
    assert grader.grade([(leaves, json.dumps(SQUARE_LIST)), (fenced("import os\nos._exit(3)"), ADD)]) == [
        "wrong",
        "wrong",
    ]


def test_endless_programs_and_tests_time_out():
    if complaint(Isolation.bubblewrap):
        pytest.skip(complaint(Isolation.bubblewrap))
    with CodeGrader(4, 2.0, MEMORY, allow_unsandboxed=False) as quick:
        rows = [
            (fenced("def f(x):\n  while True: pass"), json.dumps(SQUARE)),
            (fenced("while True: pass"), json.dumps(SQUARE_LIST)),
            (fenced("def f(x): return 9"), json.dumps({"test_list": ["while f(1): pass", "assert f(3)"]})),
            (fenced("import time\ndef f(x): time.sleep(99)"), json.dumps(SQUARE)),
        ]
        assert quick.grade(rows) == [Verdict.timed_out] * 4


def test_every_test_must_pass(grader):
    pairs = [(f"{i}\n", f"{i * i}\n") for i in range(5)]
    for wrong_at in range(5):
        program = fenced(f"n = int(input())\nprint(n * n + (n == {wrong_at}))")
        assert grader.grade([(program, on_stdin(*pairs))]) == [Verdict.wrong]
    assert grader.grade([(fenced("print(int(input()) ** 2)"), on_stdin(*pairs))]) == [Verdict.correct]


def test_verdicts_come_in_row_order(grader):
    programs = [f"import time; time.sleep({(12 - i) / 100})\nprint({i % 3})" for i in range(12)]
    rows = [(fenced(program), on_stdin(("", "1"))) for program in programs]
    assert grader.grade(rows) == [Verdict.correct if i % 3 == 1 else Verdict.wrong for i in range(12)]
    assert grader.grade([]) == []


def test_claims_of_success_are_output_like_any_other(grader):
    claims = [
        "print('correct')",
        'print(\'{"verdict": "correct"}\')',
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "import os\nfor fd in range(20):\n try: os.write(fd, b'correct\\n')\n except OSError: pass",
        "class Any(str):\n __eq__ = lambda self, other: True\nprint(Any())",
        "import sys; sys.stdout = None",
        "import sys\nfor module in list(sys.modules.values()): setattr(module, 'same_stdout', lambda *a: True)",
    ]
    call = "class Same:\n __eq__ = lambda *a: True\n tolist = lambda self: 'same'\ndef top(*a): return Same()"
    result = "import os\ndef top(*a):\n os.write(1, b'[]')\n os._exit(0)"
    rows = [(fenced(claim), ADD) for claim in claims] + [(fenced(call), TOP), (fenced(result), TOP)]
    assert set(grader.grade(rows)) == {Verdict.wrong}


def test_what_is_expected_is_not_in_the_sandbox(grader):
    """The program looks everywhere for the answer; where the answer is in its input, it finds it."""
    program = fenced("""
import glob, os, re
found = []
for path in glob.glob("/proc/*/cmdline") + glob.glob("/proc/*/environ") + glob.glob("/proc/*/fd/*") + glob.glob("*"):
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            found.append(file.read(1 << 20) or b"")
    except OSError:
        pass
for line in open("/proc/self/maps"):
    words = line.split()
    start, end = (int(x, 16) for x in words[0].split("-"))
    if words[1].startswith("rw") and end - start < 1 << 26:
        try:
            with open("/proc/self/mem", "rb") as memory:
                memory.seek(start)
                found.append(memory.read(end - start))
        except OSError:
            pass
for text in found:
    match = re.search(rb"hidden-[4]2", text)
    if match:
        print(match[0].decode())
        break
""")
    with CodeGrader(1, 20.0, MEMORY, allow_unsandboxed=True) as alone:
        assert alone.grade([(program, on_stdin(("hidden-42", "hidden-42")))]) == [Verdict.correct]
        assert alone.grade([(program, on_stdin(("", "hidden-42")))]) == [Verdict.wrong]


# --- time ------------------------------------------------------------------------------------------------------------


def test_a_test_and_a_row_have_their_limits(grader, monkeypatch):
    monkeypatch.setattr(code, "ROW_LIMITS", 2)
    with CodeGrader(2, 3.0, MEMORY, allow_unsandboxed=True) as quick:
        rows = [
            (fenced("while True: pass"), ADD),
            (fenced("def top(*a):\n    while True: pass"), TOP),
            (fenced("import time; time.sleep(1.5); print(input())"), on_stdin(*[("1", "1")] * 20)),
            (fenced("print(input())"), on_stdin(("1", "1"))),
            # The first test that does not pass decides.
            (fenced("if input() == '1': print(2)\nwhile True: pass"), on_stdin(("1", "1"))),
            (fenced("if input() == '1': print(2)\nelse:\n    while True: pass"), on_stdin(("1", "1"), ("2", "2"))),
        ]
        assert quick.grade(rows) == ["timed_out", "timed_out", "timed_out", "correct", "timed_out", "wrong"]


def test_closing_drops_what_waits_and_ends_what_runs():
    if all(complaint(isolation) for isolation in Isolation):
        pytest.skip("no program can be run on this machine")
    grader = CodeGrader(1, 1000.0, MEMORY, allow_unsandboxed=True)
    working, waiting = (grader.submit([(fenced("while True: pass"), ADD)]) for _ in range(2))
    time.sleep(0.5)  # until the first is in work
    start = time.monotonic()
    grader.close()
    assert time.monotonic() - start < 5
    for grading in (working, waiting):
        assert grading.done()
        with pytest.raises(concurrent.futures.CancelledError):
            grading.result()


@pytest.mark.parametrize("form", [ADD, json.dumps(SQUARE)])
def test_ctrl_c_ends_a_grader_within_seconds(form):
    """However long the limit, and however many rows are waiting."""
    if all(complaint(isolation) for isolation in Isolation):
        pytest.skip("no program can be run on this machine")
    # A shell that starts the tests in the background has its children ignore SIGINT.
    program = (
        "import signal\n"
        "from exprl_jax.reward.verifiers.code import CodeGrader\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"with CodeGrader(2, 1000.0, {MEMORY}, allow_unsandboxed=True) as grader:\n"
        f"    grading = grader.submit([({fenced('while True: pass')!r}, {form!r})] * 50)\n"
        "    print('grading', flush=True)\n"
        "    grading.result()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as run:
        try:
            assert run.stdout.readline() == b"grading\n"
            time.sleep(1.0)
            start = time.monotonic()
            run.send_signal(signal.SIGINT)
            _, errors = run.communicate(timeout=60)
        finally:
            run.kill()  # or leaving the block would wait for it without an end
    assert time.monotonic() - start < 5 and run.returncode != 0 and b"KeyboardInterrupt" in errors


# --- doors -----------------------------------------------------------------------------------------------------------


def test_unreadable_tests_stop_the_grading_instead_of_counting(grader):
    for response in (fenced(ADDS), "no program"):
        with pytest.raises(ValueError, match="must be JSON"):
            grader.grade([(response, "nonsense")])


def test_without_isolation_it_must_be_told(monkeypatch):
    monkeypatch.setattr(code, "complaint", lambda isolation: f"no {isolation.value} today" if isolation.real else "")
    words = "cannot be isolated.*no bubblewrap today.*apt-get install bubblewrap.*allow_unsandboxed"
    with pytest.raises(ValueError, match=words):
        CodeGrader(1, 1.0, MEMORY, allow_unsandboxed=False)
    with CodeGrader(1, 20.0, MEMORY, allow_unsandboxed=True) as grader:
        assert grader.isolation is Isolation.limits and "NOT isolated" in grader.isolation.sentence
        if not sandbox_complaint(Isolation.limits):
            assert grader.grade([(fenced(ADDS), ADD), (fenced("print(3)"), ADD)]) == [Verdict.correct, Verdict.wrong]
    monkeypatch.setattr(code, "complaint", lambda isolation: "broken")
    with pytest.raises(ValueError, match="cannot be isolated.*limits: broken"):
        CodeGrader(1, 1.0, MEMORY, allow_unsandboxed=True)


def test_the_strongest_isolation_is_taken():
    working = [isolation for isolation in Isolation if not complaint(isolation)]
    if not working or not working[0].real:
        with pytest.raises(ValueError, match="cannot be isolated"):
            CodeGrader(1, 1.0, MEMORY, allow_unsandboxed=False)
        pytest.skip(f"no isolation on this machine: {complaint(Isolation.bubblewrap)}")
    with CodeGrader(1, 1.0, MEMORY, allow_unsandboxed=False) as grader:
        assert grader.isolation is working[0]


@pytest.mark.parametrize(
    "workers, limit_s, memory_bytes, words",
    [(0, 1.0, MEMORY, "workers=0"), (1, 0.0, MEMORY, "limit_s=0.0"), (1, 1.0, 1000, "memory_bytes=1000")],
)
def test_settings_out_of_range_are_refused(grader, workers, limit_s, memory_bytes, words):
    with pytest.raises(ValueError, match=words):
        CodeGrader(workers, limit_s, memory_bytes, allow_unsandboxed=True)
