"""The paper's held-out problem sets, from their hub ids or from local files with the same columns.

A source `<name>` reads a set from the hub, `<name>:<path or glob>` from files.  Here rows are only translated into our
own columns; `read_problems` checks them like any others.  None but OlympiadBench (`solution`), GPQA (`Explanation`),
HumanEval (`canonical_solution`) and MBPP (`code`) has anything to read as a reference.

| source | hub | problems | columns read |
|---|---|---|---|
| aime25 | opencompass/AIME2025, both configs | 30 | question, answer |
| aime26 | MathArena/aime_2026 | 30 | problem_idx, problem, answer |
| hmmt_nov25 | MathArena/hmmt_nov_2025 | 30 | problem_idx, problem, answer |
| imo_answerbench | Hwilner/imo-answerbench | 400 | Problem ID, Problem, Short Answer |
| gpqa_diamond | Idavidrein/gpqa, gpqa_diamond (gated) | 198 | Record ID, Question, Correct/Incorrect Answer (1–3) |
| olympiadbench_physics | Hothan/OlympiadBench, OE_TO_physics_en_COMP | 236 | id, context, question, final_answer |
| livecodebench_v5, _v6 | livecodebench/code_generation_lite, shards 1–5, 1–6 | 880, 1055 | see `_livecodebench` |
| humaneval | openai/openai_humaneval | 164 | task_id, prompt, entry_point, test, canonical_solution |
| mbpp | google-research-datasets/mbpp, full, test | 500 | task_id, text or prompt, test_list, code, … (`_mbpp`) |

Columns and sizes are those of the data cards and of public readers of the sets, as of 2026; no hub could be reached
when this was written.  The least certain are the card of `aime_2026`, taken to be that of its sister sets, and the
types of OlympiadBench's `unit` and `error`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import pickle
import pickletools
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from exprl_jax.data.problem_sources import Row, read_rows

# Stands between the statement of a code problem and the starter code below it.
STARTER = "\n\nComplete this starter code:\n"
# Bytes of a problem's tests, decompressed.
MAX_TESTS = 1 << 28


class Benchmark(NamedTuple):
    """A problem set on the hub.

    Attributes:
      hub: its sources, as `read_rows` takes them.
      split: of those.
      translate: a row's columns in ours.
    """

    hub: tuple[str, ...]
    split: str
    translate: Callable[[str, Row], dict[str, Any]]


def read_benchmark(name: str, path: str) -> Iterator[Row]:
    """The rows of a benchmark in our columns (see `problems.read_problems`), lazily.

    Args:
      name: a key of `BENCHMARKS`.
      path: of files with the benchmark's columns; empty for the hub.

    Raises:
      ValueError: a row lacks a column, or the set cannot be read.
    """
    benchmark = BENCHMARKS[name]
    for source in (path,) if path else benchmark.hub:
        for row in read_rows(source, benchmark.split):
            yield Row(row.where, benchmark.translate(name, row))


def _math(text: str, answer: str, identity: str) -> Callable[[str, Row], dict[str, Any]]:
    def translate(name: str, row: Row) -> dict[str, Any]:
        return {
            "id": _identity(name, row, identity, text),
            "problem": _column(row, text),
            "answer": _column(row, answer),
            "domain": "math",
        }

    return translate


def _gpqa(name: str, row: Row) -> dict[str, Any]:
    """Four options, in an order made from the problem's and the options' texts alone."""
    question = _string(row, "Question").strip()
    options = [_string(row, key).strip() for key in ("Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3)))]
    key = hashlib.blake2b(question.encode()).digest()
    order = sorted(range(4), key=lambda i: (hashlib.blake2b(options[i].encode(), key=key).digest(), i))
    return {
        "id": _identity(name, row, "Record ID", "Question"),
        "problem": question,
        "reference": row.columns.get("Explanation"),
        "answer": "ABCD"[order.index(0)],
        "domain": "science",
        "choices": {"label": list("ABCD"), "text": [options[i] for i in order]},
    }


def _olympiadbench(name: str, row: Row) -> dict[str, Any]:
    """Answer: every part, with its unit and the absolute error that is allowed, for a judge to compare with."""
    answers = _strings(row, "final_answer")
    if row.columns.get("image_1") is not None:
        raise ValueError(
            f"{row.where} has an image: expected rows of a text-only config, such as OE_TO_physics_en_COMP"
        )
    unit, error = row.columns.get("unit"), row.columns.get("error")
    context, solution = row.columns.get("context"), row.columns.get("solution")
    notes = [f"unit: {unit}"] * bool(unit) + [f"allowed absolute error: {error}"] * bool(error)
    return {
        "id": _identity(name, row, "id", "question"),
        "problem": "\n\n".join(filter(None, [context, _string(row, "question")])),
        "reference": "\n\n".join(solution) if isinstance(solution, list) and solution else None,
        "answer": "; ".join(answers) + (f" ({', '.join(notes)})" if notes else ""),
        "domain": "science",
    }


def _livecodebench(name: str, row: Row) -> dict[str, Any]:
    """Columns: question_content, platform, question_id, contest_date, starter_code, public_test_cases,
    private_test_cases, metadata (JSON with `func_name` where a function is called).

    A problem has the same id in both versions, for it is the same problem: shards 1–5 are part of 1–6.

    The answer holds public and private tests, packed as the set packs the private ones (gigabytes, otherwise).
    """
    tests = [*_tests(row, "public_test_cases"), *_tests(row, "private_test_cases")]
    kinds = {test["testtype"] for test in tests}
    metadata = _json(row, "metadata", _string(row, "metadata"), dict) if kinds == {"functional"} else {}
    if kinds not in ({"stdin"}, {"functional"}) or (kinds == {"functional"} and not metadata.get("func_name")):
        raise ValueError(
            f"{row.where}: expected tests that are all stdin, or all functional with a func_name in metadata, got"
            f" {', '.join(sorted(map(str, kinds))) or 'no tests'}"
        )
    packed = {
        "inputs": [test["input"] for test in tests],
        "outputs": [test["output"] for test in tests],
        "fn_name": metadata.get("func_name"),
    }
    starter = row.columns.get("starter_code") or ""
    fenced = f"```python\n{starter}\n```"
    date = str(_column(row, "contest_date"))[:10]
    return {
        "id": f"livecodebench/{_column(row, 'platform')}/{date}/{_column(row, 'question_id')}",
        "problem": _string(row, "question_content").strip() + (STARTER + fenced if starter else ""),
        "answer": base64.b64encode(zlib.compress(pickle.dumps(json.dumps(packed)), level=1)).decode(),
        "domain": "code",
    }


def _humaneval(name: str, row: Row) -> dict[str, Any]:
    """Statement: the head of a function, with its docstring, to complete."""
    prompt = _string(row, "prompt")
    keys = ("prompt", "entry_point", "test", "canonical_solution")
    solution = row.columns.get("canonical_solution")
    return {
        "id": f"{name}/{str(_column(row, 'task_id')).removeprefix('HumanEval/')}",
        "problem": f"Write this Python function in full.\n\n```python\n{prompt.strip()}\n```",
        "reference": None if solution is None else f"```python\n{prompt}{solution}```",
        "answer": json.dumps({key: row.columns[key] for key in keys if row.columns.get(key) is not None}),
        "domain": "code",
    }


def _mbpp(name: str, row: Row) -> dict[str, Any]:
    """Statement: the task and its tests, as in the paper of the set (arXiv 2108.07732), for the tests alone give the
    function's name.  Columns of the full set (`text`, `test_setup_code`) or of the sanitized one (`prompt`,
    `test_imports`).
    """
    text = _string(row, "text" if row.columns.get("text") is not None else "prompt")
    tests = _strings(row, "test_list", least=1)
    asserts = "\n".join(test.strip() for test in tests)
    keys = ("test_list", "test_setup_code", "test_imports")
    code = row.columns.get("code")
    return {
        "id": f"{name}/{_column(row, 'task_id')}",
        "problem": f"{text.strip()}\n\nYour code should pass these tests:\n```python\n{asserts}\n```",
        "reference": None if code is None else f"```python\n{code.strip()}\n```",
        "answer": json.dumps({key: row.columns[key] for key in keys if row.columns.get(key)}),
        "domain": "code",
    }


def _tests(row: Row, key: str) -> list[dict[str, Any]]:
    if row.columns.get(key) is None:
        return []
    text = _string(row, key)
    tests = _json(row, key, text if text.lstrip()[:1] in ("[", "") else _unpacked(row, key, text), list)
    if not all(isinstance(test, dict) and {"input", "output", "testtype"} <= test.keys() for test in tests):
        raise ValueError(f"{row.where}: {key} must list objects with input, output and testtype")
    return tests


def _unpacked(row: Row, key: str, text: str) -> str:
    try:
        return unpack_string(text)
    except ValueError as error:
        raise ValueError(f"{row.where}: {key} is neither JSON nor {error}") from error


def unpack_string(text: str) -> str:
    """The string in base64 of zlib of a pickle (LiveCodeBench's private tests).  Nothing is unpickled: the pickle is
    read for its one string.

    Raises:
      ValueError: it is anything else.
    """
    try:
        inflate = zlib.decompressobj()
        content = inflate.decompress(base64.b64decode(text, validate=True), MAX_TESTS)
        if not inflate.eof:
            raise ValueError(f"cut short, or more than {MAX_TESTS} bytes when decompressed")
        names = {"PROTO", "FRAME", "MEMOIZE", "BINPUT", "PUT", "STOP"}
        values = [value for opcode, value, _ in pickletools.genops(content) if opcode.name not in names]
        if len(values) != 1 or not isinstance(values[0], str | bytes):
            raise ValueError("a pickle of something else than one string")
        return values[0] if isinstance(values[0], str) else values[0].decode()
    except (ValueError, zlib.error) as error:
        raise ValueError(f"base64 of zlib of a pickled string, got {text!r:.60}: {error!s:.100}") from error


def _shards(count: int) -> tuple[str, ...]:
    # The set's own loader is a script, which `datasets` no longer runs.
    names = ["test.jsonl", *(f"test{i}.jsonl" for i in range(2, count + 1))]
    return tuple(f"hf:livecodebench/code_generation_lite/{name}" for name in names)


_MATH_ARENA = _math("problem", "answer", "problem_idx")
BENCHMARKS = {
    "aime25": Benchmark(
        ("hf:opencompass/AIME2025:AIME2025-I", "hf:opencompass/AIME2025:AIME2025-II"),
        "test",
        _math("question", "answer", "id"),
    ),
    "aime26": Benchmark(("hf:MathArena/aime_2026",), "train", _MATH_ARENA),
    "hmmt_nov25": Benchmark(("hf:MathArena/hmmt_nov_2025",), "train", _MATH_ARENA),
    "imo_answerbench": Benchmark(
        ("hf:Hwilner/imo-answerbench",), "train", _math("Problem", "Short Answer", "Problem ID")
    ),
    "gpqa_diamond": Benchmark(("hf:Idavidrein/gpqa:gpqa_diamond",), "train", _gpqa),
    "olympiadbench_physics": Benchmark(("hf:Hothan/OlympiadBench:OE_TO_physics_en_COMP",), "train", _olympiadbench),
    "livecodebench_v5": Benchmark(_shards(5), "test", _livecodebench),
    "livecodebench_v6": Benchmark(_shards(6), "test", _livecodebench),
    "humaneval": Benchmark(("hf:openai/openai_humaneval",), "test", _humaneval),
    "mbpp": Benchmark(("hf:google-research-datasets/mbpp:full",), "test", _mbpp),
}


def _column(row: Row, key: str) -> Any:
    if row.columns.get(key) is None:
        raise ValueError(f"{row.where}: no {key}; the row has {', '.join(map(str, row.columns)) or 'nothing'}")
    return row.columns[key]


def _strings(row: Row, key: str, least: int = 0) -> list[str]:
    values = _column(row, key)
    if not isinstance(values, list) or len(values) < least or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{row.where}: {key} must be a list of strings, got {values!r:.60}")
    return values


def _string(row: Row, key: str) -> str:
    value = _column(row, key)
    if not isinstance(value, str):
        raise ValueError(f"{row.where}: {key} must be a string, got {value!r:.60}")
    return value


def _json(row: Row, key: str, text: str, kind: type) -> Any:
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{row.where}: {key} is not JSON: {error}") from error
    if not isinstance(parsed, kind):
        raise ValueError(f"{row.where}: {key} must be a JSON {kind.__name__}, got {text!r:.60}")
    return parsed


def _identity(name: str, row: Row, key: str, text: str) -> str:
    """The row's own number in the set, or its text's hash where it has none."""
    number = row.columns.get(key)
    if number is None:
        number = hashlib.blake2b(_string(row, text).encode(), digest_size=6).hexdigest()
    return f"{name}/{number}"
