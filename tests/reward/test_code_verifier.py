"""The code grader: which program it takes, which tests it reads, and what no program can talk it into."""

from __future__ import annotations

import base64
import concurrent.futures
import datetime
import json
import os
import pickle
import time
import zlib
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exprl_jax.reward.verifiers import code
from exprl_jax.reward.verifiers.code import CallTest, CodeGrader, StdoutTest, last_program, parse_tests, same_stdout
from exprl_jax.reward.verifiers.sandbox import Isolation, complaint
from exprl_jax.reward.verifiers.verdict import Verdict

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
    assert parse_tests(answer) == code.Tests(cases)


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
        ('{"inputs": ["1"]}', r"no \['outputs'\]"),
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
                "    return [key, max(chain(*rows))], True"
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


def test_closing_drops_what_waits_and_stops_a_row_at_its_next_test():
    if all(complaint(isolation) for isolation in Isolation):
        pytest.skip("no program can be run on this machine")
    grader = CodeGrader(1, 20.0, MEMORY, allow_unsandboxed=True)
    slow = fenced("import time; time.sleep(0.3); print(input())")
    working, waiting = (grader.submit([(slow, on_stdin(*[("1", "1")] * 1000))]) for _ in range(2))
    time.sleep(0.2)  # until the first is in work
    grader.close()
    for grading in (working, waiting):
        assert grading.done()
        with pytest.raises(concurrent.futures.CancelledError):
            grading.result()


# --- doors -----------------------------------------------------------------------------------------------------------


def test_unreadable_tests_stop_the_grading_instead_of_counting(grader):
    for response in (fenced(ADDS), "no program"):
        with pytest.raises(ValueError, match="must be JSON"):
            grader.grade([(response, "nonsense")])


def test_without_isolation_it_must_be_told(monkeypatch):
    monkeypatch.setattr(code, "complaint", lambda isolation: f"no {isolation.value} today" if isolation.real else "")
    words = "cannot be isolated.*no bubblewrap today.*no namespaces today.*allow_unsandboxed"
    with pytest.raises(ValueError, match=words):
        CodeGrader(1, 1.0, MEMORY, allow_unsandboxed=False)
    with CodeGrader(1, 20.0, MEMORY, allow_unsandboxed=True) as grader:
        assert grader.isolation is Isolation.limits and "NOT isolated" in grader.isolation.sentence
        if not complaint(Isolation.limits):
            assert grader.grade([(fenced(ADDS), ADD), (fenced("print(3)"), ADD)]) == [Verdict.correct, Verdict.wrong]
    monkeypatch.setattr(code, "complaint", lambda isolation: "broken")
    with pytest.raises(ValueError, match="cannot be isolated.*limits: broken"):
        CodeGrader(1, 1.0, MEMORY, allow_unsandboxed=True)


def test_the_strongest_isolation_is_taken():
    working = [isolation for isolation in Isolation if not complaint(isolation)]
    if not working or not working[0].real:
        with pytest.raises(ValueError, match="cannot be isolated"):
            CodeGrader(1, 1.0, MEMORY, allow_unsandboxed=False)
        pytest.skip("no isolation on this machine: " + "; ".join(map(complaint, list(Isolation)[:2])))
    with CodeGrader(1, 1.0, MEMORY, allow_unsandboxed=False) as grader:
        assert grader.isolation is working[0]


@pytest.mark.parametrize(
    "workers, limit_s, memory_bytes, words",
    [(0, 1.0, MEMORY, "workers=0"), (1, 0.0, MEMORY, "limit_s=0.0"), (1, 1.0, 1000, "memory_bytes=1000")],
)
def test_settings_out_of_range_are_refused(grader, workers, limit_s, memory_bytes, words):
    with pytest.raises(ValueError, match=words):
        CodeGrader(workers, limit_s, memory_bytes, allow_unsandboxed=True)
