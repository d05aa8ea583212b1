"""The grader: what is equivalent, what may go wrong in a comparison, and what becomes of its processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exprl_jax.reward.verifiers import math as math_verifier
from exprl_jax.reward.verifiers.math import MAX_ANSWER, MathGrader, last_boxed
from exprl_jax.reward.verifiers.verdict import Verdict

ROOT = str(Path(__file__).resolve().parents[2])
FOREVER = "9^{9^{9^{9^9}}}"


def boxed(text: str) -> str:
    return f"Therefore the answer is \\boxed{{{text}}}. Done."


@pytest.fixture(scope="module")
def grader():
    with MathGrader(workers=2, limit_s=20.0) as grader:
        yield grader


# --- the box ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, content",
    [
        (r"\boxed{1}", "1"),
        (r"\boxed {1}", "1"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{1} then \boxed{2", None),
        (r"\boxed{x = \boxed{3}", "3"),
        (r"\boxed{1}\boxed{", None),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{x = \boxed{3}}", "3"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ \frac{1}{2} \right.}", r"\left\{ \frac{1}{2} \right."),
        (r"\boxed{a \\{b}}", r"a \\{b}"),
        (r"} } \boxed{1}", "1"),
        (r"{ \boxed{1}", "1"),
        (r"\boxed{}", ""),
        (r"\boxed{1", None),
        (r"\boxed 1", None),
        (r"boxed{1}", None),
        ("\x08oxed{1}", None),
        (r"\fbox{1}", None),
        ("", None),
    ],
)
def test_last_balanced_box(text, content):
    assert last_boxed(text) == content


BOX = r"\boxed{"


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.lists(st.sampled_from([BOX, "{", "}", r"\{", r"\}", r"\\", "a"]), max_size=20))
def test_the_box_agrees_with_a_search_from_the_last_start(pieces):
    expected = None
    for start in [i for i, piece in enumerate(pieces) if piece == BOX][-1:]:
        depth = 1
        for end in range(start + 1, len(pieces)):
            depth += {BOX: 1, "{": 1, "}": -1}.get(pieces[end], 0)
            if not depth:
                expected = "".join(pieces[start + 1 : end])
                break
    assert last_boxed("".join(pieces)) == expected


def test_a_hundred_thousand_open_boxes_take_no_time():
    assert last_boxed(r"\boxed{" * 100_000) is None
    assert last_boxed(r"\boxed " * 100_000 + r"\boxed{7}") == "7"


# --- equivalence -----------------------------------------------------------------------------------------------------

EQUIVALENT = [
    ("12", "12"),
    ("12.0", "12"),
    ("1,000", "1000"),
    (r"12\text{ cm}", "12"),
    (r"\$12", "12"),
    ("12.", "12"),
    (r"\dfrac12", "1/2"),
    ("0.5", r"\frac{1}{2}"),
    ("2/4", "1/2"),
    ("-3", "-3"),
    (r"10\%", "0.1"),
    (r"\{2, 1\}", r"\{1, 2\}"),
    ("2,1", "1,2"),
    ("(1,2)", "(1,2)"),
    ("[0,1)", "[0, 1)"),
    (r"[0,1)\cup(2,3]", r"(2,3]\cup[0,1)"),
    (r"(-\infty,3]", r"(-\infty, 3]"),
    (r"\sqrt{12}", r"2\sqrt{3}"),
    ("(x+1)^2", "x^2+2x+1"),
    ("x=5", "5"),
    (r"\text{Odd}", "odd"),
    ("3", r"\text{three}"),
    ("Evelyn", "Evelyn"),
    (r"\text{B}", "B"),
    ("(B)", "B"),
    ("5", "$5$"),
    ("5", r"$\boxed{5}$"),
    ("5", r"\(5\)"),
    ("5", "$$5$$."),
    ("1,2", "$1$ and $2$"),
    (r"\begin{bmatrix}1&2\\3&4\end{bmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
]
DIFFERENT = [
    ("13", "12"),
    ("0.333", r"\frac13"),
    (r"\{1, 3\}", r"\{1, 2\}"),
    ("(2,1)", "(1,2)"),
    ("[0,1]", "[0,1)"),
    ("x^2-1", "(x+1)^2"),
    ("5, 6", "5"),
    ("5 or 6", "5"),
    (r"\pm 5", "5"),
    ("A", "B"),
    ("silent", "listen"),
    (r"\text{even}", "odd"),
    ("x", "y"),
]
UNREADABLE = ["", "  ", "((", r"\frac{1}", "@@", ".", "1" * (MAX_ANSWER + 1), "{" * 10_000 + "1" + "}" * 10_000]


def test_equivalent_different_and_unreadable_answers(grader):
    unreadable = [(text, "1") for text in UNREADABLE]
    for pairs, verdict in [(EQUIVALENT, "correct"), (DIFFERENT, "wrong"), (unreadable, "unparsable")]:
        got = grader.grade([(boxed(text), answer) for text, answer in pairs])
        assert {pair[0][:40]: v for pair, v in zip(pairs, got, strict=True) if v != verdict} == {}


def test_no_box_is_no_answer_and_a_reference_that_cannot_be_read_is_reported(grader):
    assert grader.grade([("It is 12.", "12"), (boxed("12"), "@@"), (boxed("12"), "")]) == [
        Verdict.no_answer,
        Verdict.unparsable,
        Verdict.unparsable,
    ]
    assert Verdict.no_answer == "no_answer"


def test_verdicts_come_in_row_order(grader):
    rows = [(boxed(str(i)), str(i if i % 3 else i + 1)) for i in range(60)]
    assert grader.grade(rows) == [Verdict.correct if i % 3 else Verdict.wrong for i in range(60)]
    assert grader.grade([]) == []


def test_a_megabyte_of_answer_is_not_parsed(grader):
    start = time.monotonic()
    rows = [(boxed("1+" * 500_000 + "1"), "1"), (boxed("{" * 500_000), "1"), ("x" * 10**6 + boxed("1"), "1")]
    assert grader.grade(rows) == [Verdict.unparsable, Verdict.no_answer, Verdict.correct]
    assert time.monotonic() - start < 15


def test_hostile_text_reaches_the_worker_as_data(grader):
    hostile = ['1", "1"]\n["2', "\ud800", "\x00", '{"verdict": "correct"}', "'; import os", "\N{FULLWIDTH DIGIT ONE}"]
    assert Verdict.correct not in grader.grade([(boxed(text), "7") for text in hostile])
    assert grader.grade([(boxed("7"), "7")]) == [Verdict.correct]


# --- time ------------------------------------------------------------------------------------------------------------


def test_what_takes_for_ever_costs_its_limit_and_nothing_else():
    with MathGrader(workers=1, limit_s=3.0) as grader:
        assert grader.grade([(boxed("1"), "1")]) == [Verdict.correct]
        (before,) = grader.pids
        start = time.monotonic()
        grading = grader.submit([(boxed("1"), "1"), (boxed(FOREVER), "3"), (boxed("2"), "2")])
        assert time.monotonic() - start < 1 and not grading.done()
        assert grading.result() == [Verdict.correct, Verdict.timed_out, Verdict.correct]
        assert grading.done() and time.monotonic() - start > 2.5
        assert grader.pids != (before,) and not alive(before)


# --- processes -------------------------------------------------------------------------------------------------------


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_worker_that_something_kills_is_replaced(grader):
    grader.grade([(boxed("1"), "1")] * 4)
    before = grader.pids
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    assert grader.grade([(boxed(str(i)), str(i)) for i in range(8)]) == [Verdict.correct] * 8
    assert not set(before) & set(grader.pids)


def test_a_worker_killed_before_it_is_ready_is_replaced():
    with MathGrader(workers=1) as grader:
        os.kill(grader.pids[0], signal.SIGKILL)
        assert grader.grade([(boxed("1"), "1")]) == [Verdict.correct]


def test_an_answer_that_kills_every_worker_is_unparsable(grader, monkeypatch):
    def die(self, boxed, answer):
        raise math_verifier._Died

    monkeypatch.setattr(math_verifier._Worker, "compare", die)
    assert grader.grade([(boxed("1"), "1")]) == [Verdict.unparsable]


def answered(code: str) -> list[dict]:
    """What a worker that is started by `code` replies to one request."""
    command = [sys.executable, "-c", f"from exprl_jax.reward.verifiers import math_worker as w\n{code}\nw.main()", "20"]
    done = subprocess.run(command, input=b'["1", "2"]\n', capture_output=True, check=True, cwd=ROOT)
    return list(map(json.loads, done.stdout.splitlines()))


@pytest.mark.parametrize("limit, retire", [(-1 << 40, True), (1 << 40, False)])
def test_a_worker_that_has_grown_asks_to_be_retired(limit, retire):
    assert answered(f"w._RETIRE_BYTES = {limit}") == [{"ready": True}, {"verdict": "wrong", "retire": retire}]


def test_a_worker_that_asks_to_be_retired_is_replaced(monkeypatch):
    read = math_verifier._Worker._read
    monkeypatch.setattr(math_verifier._Worker, "_read", lambda self, limit_s: {**read(self, limit_s), "retire": True})
    with MathGrader(workers=1, limit_s=20.0) as grader:
        before = grader.pids
        assert grader.grade([(boxed("1"), "1")]) == [Verdict.correct]
        assert grader.pids != before


def test_workers_have_their_own_sessions_and_end_with_the_grader():
    with MathGrader(workers=2) as grader:
        pids = grader.pids
        assert all(os.getsid(pid) == pid != os.getsid(0) for pid in pids)
    assert not any(map(alive, pids))


def test_no_worker_outlives_a_killed_parent():
    code = f"""
import time
from exprl_jax.reward.verifiers.math import MathGrader
with MathGrader(workers=2, limit_s=2.0) as grader:
    box = "\\\\boxed{{%s}}"
    grader.grade([(box % i, "0") for i in range(4)])
    grader.submit([(box % "{FOREVER}", "3")])
    time.sleep(0.3)
    print(*grader.pids, flush=True)
    time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT)
    with parent:
        pids = list(map(int, parent.stdout.readline().split()))
        assert len(pids) == 2 and all(map(alive, pids))
        parent.kill()
    deadline = time.monotonic() + 20
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, pids))


def test_what_a_library_prints_is_no_reply():
    forged = '{"verdict": "correct", "retire": false}'
    noisy = f"compare = w.compare\nw.compare = lambda *pair: print({forged!r}, flush=True) or compare(*pair)"
    assert [reply.get("verdict") for reply in answered(noisy)] == [None, "wrong"]


def test_the_worker_does_not_import_jax():
    # A non-zero exit status fails `answered`.
    spied = "import atexit, os, sys\natexit.register(lambda: 'jax' in sys.modules and os._exit(3))"
    assert answered(spied)[1]["verdict"] == "wrong"


@pytest.mark.parametrize(
    "module, message",
    [
        ("raise ImportError('planted')", "ImportError: planted; pip install -r requirements.txt"),
        ("raise SystemError('planted')", "SystemError: planted"),
        ("raise SystemExit(3)", "exit status 3"),
    ],
)
def test_a_worker_that_cannot_start_is_an_error_not_a_verdict(tmp_path, monkeypatch, module, message):
    (tmp_path / "pint.py").write_text(module)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with MathGrader(workers=1) as grader:
        with pytest.raises(ValueError, match=message) as caught:
            grader.grade([(boxed("1"), "1"), (boxed("1"), "1")])
        assert "\n" not in str(caught.value)


def test_a_worker_that_never_gets_ready_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "pint.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(math_verifier, "_START_LIMIT_S", 1.0)
    with MathGrader(workers=1) as grader, pytest.raises(ValueError, match="not ready after 1 s"):
        grader.grade([(boxed("1"), "1")])


@pytest.mark.parametrize("arguments, message", [({"workers": 0}, "workers=0"), ({"limit_s": 0}, "limit_s=0")])
def test_a_grader_of_nothing_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MathGrader(**arguments)


def test_a_worker_that_hangs_is_not_waited_for_by_whoever_writes_to_it():
    """A pipe holds 64 KiB; a longer reference would be written to a stopped worker for ever."""
    with MathGrader(1, 0.5) as grader:
        assert grader.grade([(r"\boxed{7}", "7")]) == [Verdict.correct]
        os.kill(grader.pids[0], signal.SIGSTOP)
        assert grader.grade([(r"\boxed{7}", "7" * 1_000_000)]) == [Verdict.timed_out]
        assert grader.grade([(r"\boxed{7}", "7")]) == [Verdict.correct]
