"""The paper's held-out sets in the columns of their cards, mixtures of sources, and what may not be trained on."""

import base64
import json
import pickle
import zlib

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exprl_jax.data.benchmarks import BENCHMARKS, STARTER
from exprl_jax.data.problems import Problem, check_held_out, problem_hash, read_problems
from exprl_jax.reward.verifiers.code_tests import CallTest, StdoutTest, check_tests, parse_tests

few = settings(max_examples=60, deadline=None, derandomize=True)


def packed(value):
    """As LiveCodeBench packs its private tests."""
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


STDIN = [
    {"input": "1 2\n", "output": "3\n", "testtype": "stdin"},
    {"input": "2 2\n", "output": "4\n", "testtype": "stdin"},
]
CALLS = [
    {"input": "[1, 2]\n3", "output": "6", "testtype": "functional"},
    {"input": "[]\n0", "output": "0", "testtype": "functional"},
]
CODE = {
    "question_title": "A + B",
    "question_content": "Add two numbers.\n",
    "platform": "atcoder",
    "question_id": "abc301_a",
    "contest_id": "abc301",
    "contest_date": "2023-05-13T00:00:00",
    "starter_code": "",
    "difficulty": "easy",
    "public_test_cases": json.dumps(STDIN[:1]),
    "private_test_cases": packed(json.dumps(STDIN[1:])),
    "metadata": "{}",
}
CALLED = CODE | {
    "question_content": "Sum them.",
    "platform": "leetcode",
    "question_id": "3245",
    "starter_code": "class Solution:\n    def total(self, a, b):\n        ",
    "public_test_cases": json.dumps(CALLS[:1]),
    "private_test_cases": packed(json.dumps(CALLS[1:])),
    "metadata": json.dumps({"func_name": "total"}),
}
GPQA = {
    "Record ID": "recA",
    "Question": "Which metal is liquid?\n",
    "Correct Answer": "mercury\n",
    "Incorrect Answer 1": " iron",
    "Incorrect Answer 2": "gold",
    "Incorrect Answer 3": "tin",
    "Explanation": "It melts at −39 °C.",
    "Pre-Revision Question": "x",
    "Subdomain": "Chemistry",
    "High-level domain": "Chemistry",
    "Canary String": "…",
}
OLYMPIAD = {
    "id": 912,
    "question": "What is its speed?",
    "context": "A ball falls.",
    "solution": ["By energy,", "v = 3."],
    "final_answer": ["$3.1$"],
    "unit": "m/s",
    "error": "1e-1",
    "is_multiple_answer": False,
    "answer_type": "Numerical",
    "question_type": "Open-ended",
    "subfield": "Mechanics",
    "subject": "Physics",
    "language": "English",
    "modality": "Text-only",
    "difficulty": "Competition",
    "image_1": None,
}
IMO = {
    "Problem ID": "imo-bench-algebra-001",
    "Problem": "Find $f$.",
    "Short Answer": "$f(x)=x$",
    "Category": "Algebra",
    "Subcategory": "Functional Equation",
    "Source": "x",
}
HUMAN_EVAL = {
    "task_id": "HumanEval/7",
    "prompt": "from math import sqrt\n\n\ndef root(x: float) -> float:\n    '''Its root.'''\n",
    "entry_point": "root",
    "canonical_solution": "    return sqrt(x)\n",
    "test": "def check(candidate):\n    assert candidate(4.0) == 2.0\n",
}
MBPP = {
    "task_id": 2,
    "text": "Write a function to find the shared elements of two lists. ",
    "code": "def shared(a, b):\r\n    return sorted(set(a) & set(b))\r\n",
    "test_list": ["assert shared([3, 4], [4]) == [4]", " assert shared([], []) == []"],
    "test_setup_code": "",
    "challenge_test_list": [],
}
ARENA = {"problem_idx": 7, "problem": "Find $n$.", "answer": "42", "problem_type": ["Algebra"]}
ROWS = {
    "aime25": {"question": "Find $m$.", "answer": "70"},
    "aime26": ARENA | {"answer": 277},
    "hmmt_nov25": ARENA,
    "imo_answerbench": IMO,
    "gpqa_diamond": GPQA,
    "olympiadbench_physics": OLYMPIAD,
    "livecodebench_v5": CODE,
    "livecodebench_v6": CALLED,
    "humaneval": HUMAN_EVAL,
    "mbpp": MBPP,
}


def write(path, *rows):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(name, path, *rows, references=False):
    return read_problems(f"{name}:{write(path, *rows)}", references=references)


def test_every_benchmark_has_a_row_here():
    assert set(ROWS) == set(BENCHMARKS)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("name", "identity", "text", "answer", "kind"),
    [
        ("aime25", "aime25/aa8fc87983bf", "Find $m$.", "70", "math"),
        ("aime26", "aime26/7", "Find $n$.", "277", "math"),
        ("hmmt_nov25", "hmmt_nov25/7", "Find $n$.", "42", "math"),
        ("imo_answerbench", "imo_answerbench/imo-bench-algebra-001", "Find $f$.", "$f(x)=x$", "math"),
        ("gpqa_diamond", "gpqa_diamond/recA", "Which metal is liquid?", "B", "choice"),
        (
            "olympiadbench_physics",
            "olympiadbench_physics/912",
            "A ball falls.\n\nWhat is its speed?",
            "$3.1$ (unit: m/s, allowed absolute error: 1e-1)",
            "science",
        ),
    ],
)
def test_a_row_becomes_a_problem(tmp_path, suffix, name, identity, text, answer, kind):
    (problem,) = read(name, tmp_path / f"set.{suffix}", ROWS[name])
    assert (problem.id, problem.problem, problem.answer, problem.kind) == (identity, text, answer, kind)
    assert problem.reference is None


def test_references_are_read_where_a_set_has_them_and_asked_for_in_vain_elsewhere(tmp_path):
    assert read("gpqa_diamond", tmp_path / "g.jsonl", GPQA, references=True)[0].reference == "It melts at −39 °C."
    assert (
        read("olympiadbench_physics", tmp_path / "o.jsonl", OLYMPIAD, references=True)[0].reference
        == "By energy,\n\nv = 3."
    )
    for name in ("aime25", "aime26", "imo_answerbench", "livecodebench_v5"):
        with pytest.raises(ValueError, match="b.jsonl line 1: no reference; the row has id, problem, answer, domain"):
            read(name, tmp_path / "b.jsonl", ROWS[name], references=True)
    with pytest.raises(ValueError, match="no reference"):
        read("gpqa_diamond", tmp_path / "g.jsonl", GPQA | {"Explanation": None}, references=True)


def test_options_are_shuffled_by_the_problem_and_by_nothing_else(tmp_path):
    rows = [GPQA | {"Question": f"Question {i}?", "Record ID": f"rec{i}"} for i in range(200)]
    problems = read("gpqa_diamond", tmp_path / "g.jsonl", *rows)
    again = read("gpqa_diamond", tmp_path / "h.jsonl", *rows[::-1])[::-1]
    assert problems == again
    for problem in problems:
        assert dict(problem.choices)[problem.answer] == "mercury"
        assert [label for label, _ in problem.choices] == list("ABCD")
        assert {text for _, text in problem.choices} == {"mercury", "iron", "gold", "tin"}
    right = [sum(problem.answer == label for problem in problems) for label in "ABCD"]
    assert min(right) > 30 and sum(right) == 200
    # Rollouts of recorded evaluations name these letters: they may never move.
    assert "".join(problem.answer for problem in problems[:12]) == "BACCBCDCBCCD"


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_programs_are_tested_by_public_and_private_tests(tmp_path, suffix):
    plain, called = read("livecodebench_v6", tmp_path / f"l.{suffix}", CODE, CALLED)
    assert parse_tests(plain.answer).cases == (StdoutTest("1 2\n", "3\n"), StdoutTest("2 2\n", "4\n"))
    assert parse_tests(called.answer).cases == (CallTest("total", ([1, 2], 3), 6), CallTest("total", ([], 0), 0))
    assert plain.id == "livecodebench/atcoder/2023-05-13/abc301_a" and called.kind == plain.kind == "code"
    assert plain.problem == "Add two numbers."
    assert called.problem == f"Sum them.{STARTER}```python\n{CALLED['starter_code']}\n```"
    # The same problem is the same problem in both versions.
    assert read("livecodebench_v5", tmp_path / f"k.{suffix}", CODE) == [plain]


def test_tests_may_be_plain_json_or_public_only(tmp_path):
    (problem,) = read("livecodebench_v5", tmp_path / "l.jsonl", CODE | {"private_test_cases": json.dumps(STDIN[1:])})
    assert len(parse_tests(problem.answer).cases) == 2
    (problem,) = read("livecodebench_v5", tmp_path / "l.jsonl", CODE | {"private_test_cases": None})
    assert len(parse_tests(problem.answer).cases) == 1


def test_assert_tests_become_an_answer_and_a_solution_a_reference(tmp_path):
    path = tmp_path / "set.jsonl"
    (problem,) = read("humaneval", path, HUMAN_EVAL, references=True)
    assert (problem.id, problem.kind) == ("humaneval/7", "code")
    assert problem.problem == f"Write this Python function in full.\n\n```python\n{HUMAN_EVAL['prompt'].strip()}\n```"
    assert problem.reference == f"```python\n{HUMAN_EVAL['prompt']}    return sqrt(x)\n```"
    (case,) = parse_tests(problem.answer).cases
    assert case.entry_point == "root" and case.solved and case.setup.endswith("    return sqrt(x)\n")
    (problem,) = read("mbpp", path, MBPP, references=True)
    assert (problem.id, problem.kind) == ("mbpp/2", "code")
    assert problem.problem == (
        "Write a function to find the shared elements of two lists.\n\nYour code should pass these tests:\n```python\n"
        "assert shared([3, 4], [4]) == [4]\nassert shared([], []) == []\n```"
    )
    assert problem.reference == "```python\ndef shared(a, b):\r\n    return sorted(set(a) & set(b))\n```"
    (case,) = parse_tests(problem.answer).cases
    assert (case.setup.strip(), case.entry_point, case.solved) == ("", "", False)
    sanitized = {"task_id": 3, "prompt": "Write f.", "test_imports": ["import math"], "test_list": ["assert f(1) == 1"]}
    (problem,) = read("mbpp", path, sanitized)
    assert (
        problem.problem.startswith("Write f.\n\nYour code")
        and "import math" in parse_tests(problem.answer).cases[0].setup
    )
    for name, row in (("humaneval", HUMAN_EVAL), ("mbpp", MBPP)):
        for problem in read(name, path, row):
            check_tests(problem.answer)


class Hostile:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was run')",))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"private_test_cases": packed(Hostile())},
            "private_test_cases is neither JSON nor .* pickle of something else",
        ),
        ({"private_test_cases": packed(["a", "b"])}, "something else than one string"),
        ({"private_test_cases": packed("x")[:-8]}, "neither JSON nor"),
        ({"private_test_cases": "no base64!"}, "neither JSON nor"),
        ({"private_test_cases": base64.b64encode(zlib.compress(b"junk")).decode()}, "neither JSON nor"),
        ({"private_test_cases": packed("{}")}, "private_test_cases must be a JSON list"),
        ({"private_test_cases": packed("[")}, "private_test_cases is not JSON"),
        ({"private_test_cases": packed('[{"input": "1"}]')}, "private_test_cases must list objects with input, output"),
        ({"private_test_cases": packed(json.dumps(CALLS))}, "all stdin, or all functional .* got functional, stdin"),
        ({"public_test_cases": "[]", "private_test_cases": "[]"}, "got no tests"),
        ({"public_test_cases": json.dumps(CALLS), "private_test_cases": None}, "functional with a func_name"),
        ({"metadata": None, "public_test_cases": json.dumps(CALLS), "private_test_cases": None}, "no metadata"),
        ({"question_content": None}, "no question_content; the row has question_title"),
        ({"contest_date": None}, "no contest_date"),
    ],
)
def test_bad_programs_are_named(tmp_path, changes, match):
    with pytest.raises(ValueError, match=f"l.jsonl line 1: {match}|l.jsonl line 1: .*{match}") as caught:
        read("livecodebench_v6", tmp_path / "l.jsonl", CODE | changes)
    assert "\n" not in str(caught.value)


def test_tests_that_inflate_without_end_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("exprl_jax.data.benchmarks.MAX_TESTS", 1000)
    with pytest.raises(ValueError, match="more than 1000 bytes when decompressed"):
        read("livecodebench_v6", tmp_path / "l.jsonl", CODE | {"private_test_cases": packed("[" + " " * 2000 + "]")})


@pytest.mark.parametrize(
    ("name", "changes", "match"),
    [
        ("aime25", {"answer": None}, "no answer; the row has question, answer"),
        ("aime26", {"problem": 3}, "problem must be a non-empty string"),
        ("imo_answerbench", {"Short Answer": None}, "no Short Answer"),
        ("gpqa_diamond", {"Incorrect Answer 3": None}, "no Incorrect Answer 3"),
        ("gpqa_diamond", {"Question": 1}, "Question must be a string, got 1"),
        ("olympiadbench_physics", {"final_answer": "3"}, "final_answer must be a list of strings, got '3'"),
        ("olympiadbench_physics", {"final_answer": None}, "no final_answer"),
        ("olympiadbench_physics", {"image_1": "bytes"}, "has an image: expected rows of a text-only config"),
        ("humaneval", {"prompt": None}, "no prompt; the row has task_id"),
        ("humaneval", {"task_id": None}, "no task_id"),
        ("mbpp", {"text": None}, "no prompt; the row has task_id"),
        ("mbpp", {"test_list": "assert f(1)"}, "test_list must be a list of strings, got 'assert"),
        ("mbpp", {"test_list": []}, "test_list must be a list of strings"),
    ],
)
def test_bad_rows_are_named(tmp_path, name, changes, match):
    with pytest.raises(ValueError, match=f"b.jsonl line 1.*{match}") as caught:
        read(name, tmp_path / "b.jsonl", ROWS[name] | changes)
    assert "\n" not in str(caught.value)


def test_what_a_row_may_lack(tmp_path):
    bare = {key: OLYMPIAD[key] for key in ("question", "final_answer")} | {"final_answer": ["1", "2"]}
    (problem,) = read("olympiadbench_physics", tmp_path / "o.jsonl", bare)
    assert (problem.problem, problem.answer) == ("What is its speed?", "1; 2")
    assert problem.id.startswith("olympiadbench_physics/") and len(problem.id.split("/")[1]) == 12


def test_sets_come_from_the_hub_under_their_names_and_splits(tmp_path, monkeypatch):
    asked = []

    def load_dataset(*name, split):
        asked.append((*name, split))
        columns = next(ROWS[key] for key, set_ in BENCHMARKS.items() if f"hf:{':'.join(name)}" in set_.hub)
        text = "question" if name[0].startswith("opencompass") else None
        return [columns | ({text: f"{columns[text]} {name[1]}"} if text else {})]

    def hf_hub_download(data_set, file, *, repo_type):
        asked.append((data_set, file, repo_type))
        return write(tmp_path / file, CODE | {"question_id": file})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    sizes = {name: len(read_problems(name, references=False, split="ignored")) for name in BENCHMARKS}
    assert sizes == dict.fromkeys(BENCHMARKS, 1) | {"aime25": 2, "livecodebench_v5": 5, "livecodebench_v6": 6}
    shards = [f"test{i}.jsonl" for i in ("", 2, 3, 4, 5, 6)]
    assert asked == [
        ("opencompass/AIME2025", "AIME2025-I", "test"),
        ("opencompass/AIME2025", "AIME2025-II", "test"),
        ("MathArena/aime_2026", "train"),
        ("MathArena/hmmt_nov_2025", "train"),
        ("Hwilner/imo-answerbench", "train"),
        ("Idavidrein/gpqa", "gpqa_diamond", "train"),
        ("Hothan/OlympiadBench", "OE_TO_physics_en_COMP", "train"),
        *(("livecodebench/code_generation_lite", shard, "dataset") for shard in shards[:5] + shards),
        ("openai/openai_humaneval", "test"),
        ("google-research-datasets/mbpp", "full", "test"),
    ]


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    def offline(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("cannot find the requested files\nlong story")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(
        ValueError, match="cannot load 'test.jsonl' of the data set 'livecodebench/.*: cannot find .*network"
    ) as e:
        read_problems("livecodebench_v5", references=False)
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="names no file of a data set: expected hf:<owner>/<data set>/<file>"):
        read_problems("hf:owner/rows.jsonl")


def test_mixtures_of_sources_are_read_in_order(tmp_path):
    plain = {"problem": "1+1?", "answer": "2", "reference": "2."}
    released = {
        "data_source": "sciknow",
        "ability": "Science",
        "reward_model": {"style": "rule", "ground_truth": "B"},
        "extra_info": {
            "index": 0,
            "question": "Which?",
            "solution": "s",
            "answerKey": "B",
            "choices": {"label": ["A", "B"], "text": ["iron", "gold"]},
        },
    }
    source = ",".join(
        [
            write(tmp_path / "a.parquet", released),
            f" aime25:{write(tmp_path / 'b.jsonl', ROWS['aime25'])}",
            f"{tmp_path}/c*.jsonl",
            f"gpqa_diamond:{write(tmp_path / 'd.parquet', GPQA)}",
        ]
    )
    write(tmp_path / "c1.jsonl", plain)
    problems = read_problems(source, references=False)
    assert [(problem.problem, problem.kind) for problem in problems] == [
        ("Which?", "choice"),
        ("Find $m$.", "math"),
        ("1+1?", "math"),
        ("Which metal is liquid?", "choice"),
    ]
    with pytest.raises(ValueError, match="b.jsonl line 1: no reference"):
        read_problems(source)


def test_released_rows_of_every_domain_are_read(tmp_path):
    """The mixed-domain files: concatenated, so every row has every key, with null for what it lacks."""
    keys = (
        "index",
        "split",
        "question",
        "solution",
        "answer",
        "choices",
        "answerKey",
        "domain",
        "level",
        "task",
        "subtask",
        "source",
        "type",
        "solution_code_only",
    )

    def released(ability, truth, **extra):
        return {
            "data_source": f"set-{ability}",
            "prompt": [{"role": "user", "content": "q"}],
            "ability": ability,
            "reward_model": {"style": "rule", "ground_truth": truth},
            "extra_info": dict.fromkeys(keys) | {"index": 0, "split": "train", "solution": f"why {truth}"} | extra,
        }

    tests = packed(json.dumps({"inputs": ["1\n"], "outputs": ["2\n"], "fn_name": None}))
    problems = read_problems(
        write(
            tmp_path / "mixed.parquet",
            released("math", "4", question="2+2?", answer="4"),
            released(
                "science", "B", question="Which?", answerKey="B", choices={"label": ["A", "B"], "text": ["a", "b"]}
            ),
            released("Science", "9.8 m/s²", question="How fast?", answer="9.8 m/s²", type="open-ended", task="physics"),
            released("Physics", "3 J", question="How much?", answer="3 J"),
            released("Code", tests, question="Add one.", solution_code_only="print(int(input()) + 1)"),
        )
    )
    assert [problem.kind for problem in problems] == ["math", "choice", "science", "science", "code"]
    assert problems[1].choices == (("A", "a"), ("B", "b")) and problems[1].answer == "B"
    assert problems[2].answer == "9.8 m/s²" and problems[0].reference == "why 4"
    assert parse_tests(problems[4].answer).cases == (StdoutTest("1\n", "2\n"),)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Find $x$.", "find  X"),
        ("a \\, b", "ab"),
        ("$$\\dfrac{1}{2}$$", "\\(\\frac12\\)"),
        ("\\left( 1, 2 \\right)", "(1, 2)"),
        ("the “best” one", 'the "best" one'),
        ("``so''", "so"),
        ("Alice’s", "Alice's"),
        ("10–20", "10-20"),
        ("x:\ny", "x y"),
        ("x^{10}", "x^10"),
        (f"Sum.{STARTER}```python\nclass A: ...\n```", "Sum."),
        ("A\u00a0b", "a b"),
        ("ﬁnd", "find"),
    ],
)
def test_statements_typeset_otherwise_are_the_same(one, other):
    assert problem_hash(one) == problem_hash(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1+2", "1-2"),
        ("1.5", "15"),
        ("1,5", "15"),
        ("5!", "5"),
        ("f'(x)", "f(x)"),
        ("f''(x)", "f(x)"),
        ("a<b", "a>b"),
        ("3:4", "34"),
        ("x^2", "x_2"),
        ("|x|", "x"),
        ("\\sin x", "\\cos x"),
        ("", "a"),
    ],
)
def test_statements_that_differ_are_not(one, other):
    assert problem_hash(one) != problem_hash(other)


@few
@given(st.text(max_size=40), st.text(" \n\t~$", max_size=5))
def test_a_hash_ignores_space_wherever_it_stands(text, space):
    assert problem_hash(text + space) == problem_hash(space + text)


def test_a_hash_never_changes():
    assert problem_hash("Find $x$.") == "2544442b9c2419f61a7fd7579d6f7c77"


def held(name, text, *choices):
    return Problem(name, text, None, "A", "science", tuple(zip("ABCD", choices, strict=False)))


def test_held_out_problems_are_refused_as_training_data():
    evaluation = [held("aime25/1", "Find $x$."), held("aime25/2", "Find $y$.")]
    check_held_out([held("a", "Find z.")], evaluation)
    check_held_out([], evaluation)
    check_held_out(evaluation, [])
    with pytest.raises(
        ValueError, match="2 of 3 .*'a' is 'aime25/2'; 'c' is 'aime25/1': .* data.allow_held_out"
    ) as caught:
        check_held_out([held("a", "find y"), held("b", "Find z."), held("c", "FIND  x.")], evaluation)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="4 of 4 .*'2' is 'aime25/1'; …: remove"):
        check_held_out([held(str(i), "Find x") for i in range(4)], evaluation)


def test_one_stem_with_other_choices_is_another_problem():
    stem = "Which of these is true?"
    evaluation = [held("g/1", stem, "iron", "gold"), held("g/2", stem, "tin", "lead")]
    check_held_out([held("a", stem, "iron", "lead")], evaluation)
    with pytest.raises(ValueError, match="1 of 1 .*'a' is 'g/2'"):
        check_held_out([held("a", stem, "Lead", "tin")], evaluation)
    with pytest.raises(ValueError, match="'a' is 'g/1'"):  # without its choices
        check_held_out([held("a", stem)], evaluation)


def test_livecodebench_v5_may_not_train_what_v6_evaluates(tmp_path):
    """However the training file writes the statement: with the starter code below it or without."""
    evaluation = read("livecodebench_v6", tmp_path / "l.jsonl", CODE, CALLED)
    training = [Problem("x", "Sum them.", "r", "{}", "code"), Problem("y", "Another.", "r", "{}", "code")]
    with pytest.raises(ValueError, match="1 of 2 .*'x' is 'livecodebench/leetcode/2023-05-13/3245'"):
        check_held_out(training, evaluation)
