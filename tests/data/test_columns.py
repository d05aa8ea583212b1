"""Data sets whose columns have other names, answers in GSM8K's form, and what is said of the first row."""

import datasets
import pytest
from data_sets import write_hf_disk, write_jsonl, write_parquet, write_tfds
from tiny_runs import config_dict

from exprl_jax.data.columns import box_marked, marked_answer
from exprl_jax.data.problems import Problem, read_problems, show_first
from exprl_jax.resolve import resolve

THEIRS = [
    {"question": "1+1?", "solution": "It is 2.", "final": 2, "topic": "sums"},
    {"question": "2+2?", "solution": "It is 4.", "final": 4, "topic": "sums"},
]
COLUMNS = "question:problem, solution:reference,final:answer"


@pytest.mark.parametrize(
    "write, name",
    [(write_jsonl, "p.jsonl"), (write_parquet, "p.parquet"), (write_hf_disk, "disk"), (write_tfds, "set")],
)
def test_columns_are_read_under_their_names_from_every_source(write, name, tmp_path, capsys):
    datasets.disable_progress_bars()
    problems = read_problems(write(tmp_path / name, THEIRS), columns=COLUMNS)
    assert sorted((p.problem, p.reference, p.answer) for p in problems) == [
        ("1+1?", "It is 2.", "2"),
        ("2+2?", "It is 4.", "4"),
    ]
    assert "column 'topic' is read by functions alone" in capsys.readouterr().err


def test_names_that_are_left_out_stay_and_one_may_take_anothers_place(tmp_path, capsys):
    rows = [{"id": "a", "problem": "sums", "question": "1+1?", "reference": "2", "answer": "wrong", "final": "2"}]
    source = write_jsonl(tmp_path / "p.jsonl", rows)
    (problem,) = read_problems(source, columns="question:problem,final:answer")
    assert problem == Problem("a", "1+1?", "2", "2", "math")
    output = capsys.readouterr().err
    assert f"{source} line 1: column 'answer' is not read; config.data.columns reads 'final' in its place" in output
    # In turn: what was the answer is the reference.
    (problem,) = read_problems(source, columns="question:problem,final:answer,answer:reference")
    assert (problem.reference, problem.answer) == ("wrong", "2")


def test_columns_do_not_concern_a_benchmark(tmp_path):
    aime = write_jsonl(tmp_path / "a.jsonl", [{"question": "7?", "answer": 7}])
    source = f"aime25:{aime},{write_jsonl(tmp_path / 'p.jsonl', THEIRS)}"
    read = read_problems(source, references=False, columns=COLUMNS)
    assert [p.answer for p in read] == ["7", "2", "4"]


@pytest.mark.parametrize(
    "columns, message",
    [
        ("questoin:problem", "line 1: no column 'questoin', which config.data.columns reads as 'problem'"),
        ("questoin:problem", "; the columns are question, solution, final, topic; did you mean 'question'?"),
        (COLUMNS + ",level:domain", "line 1 and all after it: no column 'level'"),
    ],
)
def test_a_column_that_is_not_there_is_named_with_those_that_are(columns, message, tmp_path):
    for references in (True, False):
        with pytest.raises(ValueError) as error:
            read_problems(write_jsonl(tmp_path / "p.jsonl", THEIRS), columns=columns, references=references)
        assert message in str(error.value) and "\n" not in str(error.value)


def test_some_rows_may_lack_choices(tmp_path):
    rows = [THEIRS[0], THEIRS[1] | {"options": {"label": ["A", "B"], "text": ["4", "5"]}, "final": "A"}]
    problems = read_problems(write_jsonl(tmp_path / "p.jsonl", rows), columns=COLUMNS + ",options:choices")
    assert [p.kind for p in problems] == ["math", "choice"]


def test_a_config_takes_columns():
    assert resolve(config_dict("tiny", "outcome", {"data.columns": "question:problem"})).data.columns


@pytest.mark.parametrize(
    "columns, message",
    [
        ("question", "expected theirs:ours with commas between"),
        ("question:problem,,a:answer", "expected theirs:ours with commas between"),
        ("question:statement", "expected 'statement' to be one of id, problem, reference, answer, domain, choices"),
        ("a:answer,b:answer", "expected 'answer' once"),
        ("a:answer,a:reference", "expected 'a' once"),
    ],
)
def test_columns_that_mean_nothing_are_refused(columns, message):
    with pytest.raises(ValueError) as error:
        resolve(config_dict("tiny", "outcome", {"data.columns": columns}))
    assert str(error.value).startswith(f"config.data.columns: got {columns!r}, ") and message in str(error.value)


# --- Answers in GSM8K's form.

GSM8K = {
    "question": "Natalia sold 48 clips, then half as many. How many in all?",
    "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nIn all 48+24 = <<48+24=72>>72 clips.\n#### 72",
}
WORKED = GSM8K["answer"].removesuffix("#### 72")


def test_gsm8k_is_read_as_it_is(tmp_path):
    source = write_jsonl(tmp_path / "p.jsonl", [GSM8K])
    (problem,) = read_problems(source, columns="question:problem,answer:reference")
    assert (problem.answer, problem.reference) == ("72", WORKED + "\\boxed{72}")
    # Evaluations and Stage II need the answer alone, under either name.
    for columns in ("question:problem,answer:reference", "question:problem"):
        (problem,) = read_problems(source, columns=columns, references=False)
        assert (problem.answer, problem.reference) == ("72", None)


@pytest.mark.parametrize(
    "text, answer",
    [
        ("so 7\n#### 7", "7"),
        ("so 7\n  ####  1,000 dollars \n\n", "1,000 dollars"),
        ("#### 7", "7"),
        ("####7", "7"),
        ("so 7", None),
        ("#### 7\nand so on", None),
        ("costs #### 7", None),
        ("so\n####", None),
        ("so\n##### Seven", None),
        ("so\n### 7", None),
    ],
)
def test_a_marked_answer_is_the_last_line_behind_four_hashes(text, answer):
    assert marked_answer(text) == answer
    assert (box_marked(text) == text) == (answer is None)


def test_a_marked_line_becomes_a_box_and_the_rest_stays():
    assert box_marked("a\n\nb\n#### 7") == "a\n\nb\n\\boxed{7}"
    assert box_marked("#### 7\n") == "\\boxed{7}"


def test_an_answer_of_its_own_goes_first(tmp_path):
    rows = [{"problem": "?", "reference": "so\n#### 7", "answer": "8"}]
    (problem,) = read_problems(write_jsonl(tmp_path / "p.jsonl", rows))
    assert (problem.answer, problem.reference) == ("8", "so\n\\boxed{7}")


def test_a_row_without_any_answer_says_what_was_looked_for(tmp_path):
    source = write_jsonl(tmp_path / "p.jsonl", [{"problem": "?", "reference": "It is 7."}])
    with pytest.raises(
        ValueError, match="line 1: no answer; .*, and its reference does not end in a line '#### <answer>'"
    ):
        read_problems(source)


# --- What is said of the first row.


def test_the_first_problem_is_shown_a_line_a_field(capsys):
    choices = (("A", "iron"), ("B", "gold"))
    show_first([Problem("q1", "Which\n\nshines?", "x" * 500, "B", "science", choices)] * 3, "config.data.source")
    assert capsys.readouterr().err.splitlines() == [
        "config.data.source: 3 problems; what was read of the first:",
        "  id        q1",
        "  problem   Which shines?",
        "  choices   A: iron; B: gold",
        f"  reference {'x' * 100} … (500 characters)",
        "  answer    B",
        "  domain    science",
    ]
    show_first([Problem("q1", "?", None, "B", "math")], "set")
    assert "reference" not in capsys.readouterr().err
