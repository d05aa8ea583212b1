"""Reading problems from every source, refusing bad ones by name, and visiting them in a fixed order."""

import dataclasses
import gzip
import json

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from data_sets import write_hf_disk, write_hf_folder, write_jsonl, write_parquet, write_tfds
from hypothesis import given, settings
from hypothesis import strategies as st

from exprl_jax.data import problem_sources
from exprl_jax.data.problem_sources import split_sources
from exprl_jax.data.problems import Problem, batch_indices, drop_overlong, order, read_problems

PLAIN = [
    {"id": "a", "problem": "1+1?", "reference": "1+1 is \\boxed{2}.", "answer": "2", "domain": "math"},
    {"id": "b", "problem": "Größe π?", "reference": "Read\n\noff.", "answer": "3", "domain": "science"},
]
EXPECTED = [
    Problem("a", "1+1?", "1+1 is \\boxed{2}.", "2", "math"),
    Problem("b", "Größe π?", "Read\n\noff.", "3", "science"),
]


def released_row(index, ability="math", **extra):
    """A row of the released schema; what a row does not have is null, as concatenating data sets leaves it."""
    fields = {"choices": None, "answerKey": None, "task": None}
    return {
        "data_source": "InT",
        "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": f"Q{index}"}],
        "ability": ability,
        "reward_model": {"style": "rule", "ground_truth": f"A{index}"},
        "extra_info": fields
        | {"question": f"Q{index}", "solution": f"S{index}", "answer": f"A{index}", "index": index, "split": "train"}
        | extra,
    }


RELEASED = [
    released_row(0),
    released_row(1, "Science", choices={"label": ["A", "B"], "text": ["iron", "gold"]}, answerKey="B"),
    released_row(2, "Code"),
    released_row(3, "Physics"),
]


@pytest.fixture(autouse=True)
def quiet_caches(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf_cache"))
    datasets.disable_progress_bars()


WRITERS = {
    "problems.jsonl": write_jsonl,
    "problems.parquet": write_parquet,
    "folder": write_hf_folder,
    "disk": write_hf_disk,
    "tfds": write_tfds,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_source_gives_the_same_problems(tmp_path, name):
    problems = read_problems(WRITERS[name](tmp_path / name, PLAIN))
    assert sorted(problems, key=lambda problem: problem.id) == EXPECTED


@pytest.mark.parametrize("name", ["problems.jsonl", "problems.parquet", "folder"])
def test_released_rows(tmp_path, name):
    problems = read_problems(WRITERS[name](tmp_path / name, RELEASED))
    assert [(p.problem, p.reference, p.answer, p.domain) for p in problems] == [
        ("Q0", "S0", "A0", "math"),
        ("Q1", "S1", "A1", "science"),
        ("Q2", "S2", "A2", "code"),
        ("Q3", "S3", "A3", "science"),
    ]
    assert [p.choices for p in problems] == [(), (("A", "iron"), ("B", "gold")), (), ()]
    assert len({p.id for p in problems}) == 4 and all(p.id.startswith(f"InT/{i}-") for i, p in enumerate(problems))


def test_choices_may_be_pairs_and_null_filled_structs_are_none(tmp_path):
    pairs = [{"label": "A", "text": "iron"}, {"label": "B", "text": "gold"}]
    rows = [
        released_row(0, choices=pairs),
        released_row(1, choices={"label": None, "text": None}),
        released_row(2, choices=[]),
        PLAIN[0] | {"choices": {"label": ["A"], "text": ["x"]}},
    ]
    problems = read_problems(write_jsonl(tmp_path / "p.jsonl", rows))
    assert [p.choices for p in problems] == [(("A", "iron"), ("B", "gold")), (), (), (("A", "x"),)]


def test_several_files_and_globs(tmp_path):
    one, two = write_jsonl(tmp_path / "1.jsonl", PLAIN[:1]), write_parquet(tmp_path / "2.parquet", PLAIN[1:])
    assert read_problems(f"{two}, {one}") == EXPECTED[::-1]
    assert read_problems(f"{tmp_path}/[12].*") == EXPECTED


def test_two_released_files_may_number_their_rows_alike(tmp_path):
    one = write_jsonl(tmp_path / "1.jsonl", [released_row(0, question="x")])
    two = write_jsonl(tmp_path / "2.jsonl", [released_row(0, question="y")])
    assert len({p.id for p in read_problems(f"{one},{two}")}) == 2


def test_identity_follows_the_text_not_the_place(tmp_path):
    rows = [{key: value for key, value in row.items() if key != "id"} for row in PLAIN]
    forward = read_problems(write_jsonl(tmp_path / "1.jsonl", rows))
    backward = read_problems(write_jsonl(tmp_path / "2.jsonl", rows[::-1]))
    assert forward == backward[::-1]
    assert forward[0].uid != forward[1].uid
    # Random keys of recorded runs are derived from these numbers: they may never change.
    assert EXPECTED[0].uid == 1431053258 and 0 <= EXPECTED[1].uid < 2**32
    assert forward[0].id == "b0754841d3f4"


def test_references_can_be_left_out(tmp_path):
    rows = [PLAIN[0], {key: value for key, value in PLAIN[1].items() if key != "reference"}]
    source = write_jsonl(tmp_path / "p.jsonl", rows)
    assert [p.reference for p in read_problems(source, references=False)] == [None, None]
    with pytest.raises(ValueError, match="p.jsonl line 2: no reference; the row has id, problem, answer, domain"):
        read_problems(source)
    released = write_jsonl(tmp_path / "r.jsonl", [released_row(0, solution=None)])
    assert read_problems(released, references=False)[0].reference is None
    with pytest.raises(ValueError, match="r.jsonl line 1: no extra_info.solution"):
        read_problems(released)


def test_a_question_has_no_reference_and_no_answer():
    question = EXPECTED[0].question
    assert question == ("1+1?", ()) and question._fields == ("text", "choices")
    with pytest.raises(dataclasses.FrozenInstanceError):
        EXPECTED[0].answer = "3"


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([{"problem": "x", "reference": "y"}], "line 1: no answer; the row has problem, reference"),
        ([PLAIN[0], PLAIN[1] | {"problem": 3}], "line 2: problem must be a non-empty string, got 3"),
        ([PLAIN[0] | {"reference": "  "}], "line 1: reference must be a non-empty string"),
        ([PLAIN[0] | {"answer": 2.5}], "line 1: answer must be a non-empty string, got 2.5"),
        (
            [PLAIN[0] | {"domain": "poetry"}],
            "line 1: domain must be one of math, science, physics, custom, code, got 'poetry'",
        ),
        ([PLAIN[0] | {"domain": 1}], "line 1: domain must be one of"),
        ([PLAIN[0] | {"choices": "AB"}], "line 1: choices must be"),
        ([PLAIN[0] | {"choices": {"label": ["A"], "text": ["x", "y"]}}], "line 1: choices must be"),
        ([PLAIN[0] | {"choices": [{"label": "A"}]}], "line 1: choices must be"),
        ([PLAIN[0], PLAIN[1] | {"id": "a"}], "line 2: problem id 'a' is already that of .*line 1"),
        ([PLAIN[0] | {"id": None}, PLAIN[0] | {"id": None}], "line 2: problem id 'b0754841d3f4' is already that of"),
        ([released_row(0) | {"reward_model": None}], "line 1: reward_model must be a struct"),
        ([released_row(0) | {"extra_info": "x"}], "line 1: extra_info must be a struct"),
        ([released_row(0, question=None)], "line 1: no extra_info.question"),
        ([released_row(0, ability="law")], "line 1: ability must be one of"),
    ],
)
def test_bad_rows_are_named(tmp_path, rows, match):
    with pytest.raises(ValueError, match=match) as caught:
        read_problems(write_jsonl(tmp_path / "p.jsonl", rows))
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(PLAIN[0]).encode())
    (problem,) = read_problems(str(tmp_path / "p.jsonl"))
    assert problem.problem == PLAIN[0]["problem"]


def test_two_columns_of_one_name_are_refused(tmp_path):
    texts = [pyarrow.array([text]) for text in ("a", "b", "1", "r")]
    table = pyarrow.table(texts, names=["problem", "problem", "answer", "reference"])
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
    with pytest.raises(ValueError, match="p.parquet has the column 'problem' twice; remove or rename one"):
        read_problems(str(tmp_path / "p.parquet"))


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("p.jsonl", b"", "p.jsonl is empty"),
        ("p.jsonl", b"\n\n", "holds no problems"),
        ("p.jsonl", json.dumps(PLAIN[0]).encode() + b'\n{"a": ', "p.jsonl line 2 is not JSON"),
        ("p.jsonl", b"\xff\xfe\n", r"p.jsonl line 1 is not UTF-8 \(invalid start byte at byte 0\)"),
        ("p.jsonl", b'{"problem": "a", "problem": "b"}', "line 1 is not JSON: an object has the name 'problem' twice"),
        ("p.jsonl", b'{"problem": "a", "meta": {"k": 1, "k": 2}}', "has the name 'k' twice"),
        ("p.jsonl", gzip.compress(b"{}"), "p.jsonl is compressed; expected JSON lines: gunzip it"),
        ("p.jsonl", b"[1, 2]\n", "p.jsonl line 1 must be a JSON object"),
        ("p.parquet", b"not parquet", "p.parquet is not a parquet file"),
        ("p.parquet", b"PAR1 truncated PAR1", "p.parquet is not a parquet file"),
        ("p.csv", b"a,b\n", "expected a .jsonl or .parquet file, got .csv"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=match) as caught:
        read_problems(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_parquet_rows_are_named(tmp_path):
    source = write_parquet(tmp_path / "p.parquet", [PLAIN[0], PLAIN[1] | {"answer": None}])
    with pytest.raises(ValueError, match="p.parquet row 1: no answer"):
        read_problems(source)
    with pytest.raises(ValueError, match="holds no problems"):
        read_problems(write_parquet(tmp_path / "none.parquet", []))


@pytest.mark.parametrize("source", ["/no/such.jsonl", "no*where.parquet", "", ",", "hf:", "tfds:", "hf:/no/such"])
def test_sources_that_are_not_there_are_named(source):
    with pytest.raises(ValueError, match="expected|cannot load"):
        read_problems(source)


def test_missing_splits_and_data_sets_are_named(tmp_path):
    for name in ("folder", "disk", "tfds"):
        source = WRITERS[name](tmp_path / name, PLAIN)
        with pytest.raises(ValueError, match="cannot load split 'test' of the.* data set") as caught:
            read_problems(source, split="test")
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="cannot load split 'train' of the TFDS data set 'no_such_set'"):
        read_problems("tfds:no_such_set")


def test_a_hub_data_set_without_network_is_one_clear_line(monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("Couldn't reach 'x/y' on the Hub\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match="data set 'x/y': Couldn't reach 'x/y' on the Hub; check .* network"):
        read_problems("hf:x/y")


@settings(max_examples=50, deadline=None, derandomize=True)
@given(size=st.integers(1, 60), seed=st.integers(0, 2**40), epoch=st.integers(0, 50), data=st.data())
def test_an_epoch_visits_problems_once_in_an_order_of_its_own(size, seed, epoch, data):
    assert sorted(order(size, seed, epoch)) == list(range(size))
    batch = data.draw(st.integers(1, size))
    steps = size // batch
    drawn = [batch_indices(size, batch, seed, epoch * steps + i) for i in range(steps)]
    assert {of for _, of in drawn} == {epoch}
    visited = np.concatenate([indices for indices, _ in drawn])
    assert len(visited) == steps * batch == len(set(visited.tolist()))
    np.testing.assert_array_equal(visited, order(size, seed, epoch)[: steps * batch])


def test_the_order_depends_on_seed_and_epoch_and_never_changes():
    orders = {tuple(order(20, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    # Philox words are promised to stay the same; a resumed run relies on it.
    assert order(10, 0, 0).tolist() == [0, 8, 9, 3, 7, 5, 1, 2, 6, 4]
    assert order(10, 7, 3).tolist() == [7, 1, 9, 6, 0, 4, 2, 8, 3, 5]


@pytest.mark.parametrize("batch", [0, -1, 11])
def test_a_batch_must_fit_the_problems(batch):
    with pytest.raises(ValueError, match="1 ≤ batch ≤ 10"):
        batch_indices(10, batch, 0, 0)


def test_overlong_prompts_are_dropped_and_counted():
    assert drop_overlong(EXPECTED, [5, 9], 8) == (EXPECTED[:1], 1)
    assert drop_overlong(EXPECTED, [5, 9], 9) == (EXPECTED, 0)
    with pytest.raises(ValueError, match="all 2 prompts are longer than 4 tokens .the shortest has 5."):
        drop_overlong(EXPECTED, [5, 9], 4)


def test_answers_and_ids_may_be_written_as_whole_numbers(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(PLAIN[0] | {"answer": 2, "id": 17}) + "\n")
    (problem,) = read_problems(str(path))
    assert (problem.answer, problem.id) == ("2", "17")


def lines(path, *rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


GOOD = dict(problem="1 + 1?", reference="2.", answer="2")


@pytest.mark.parametrize(
    "row, words",
    [
        (dict(GOOD, answer="\ud800"), "line 2: answer holds .* at character 0, half of a surrogate pair"),
        (dict(GOOD, problem="a \udfff b"), "line 2: problem holds .* at character 2"),
        (dict(GOOD, reference="x\ud83d"), "line 2: reference holds"),
        (dict(GOOD, choices={"label": ["A", "B"], "text": ["\ud800", "b"]}), "line 2: choices holds"),
        ('{"problem": ' + "[" * 100_000 + "]" * 100_000 + "}\n", "line 2 is nested too deeply"),
        ("[" * 100_000 + "\n", "line 2 is "),
    ],
)
def test_a_row_that_is_no_text_is_named(row, words, tmp_path):
    source = lines(tmp_path / "a.jsonl", GOOD, row)
    with pytest.raises(ValueError, match=words) as caught:
        read_problems(source)
    str(caught.value).encode()


@pytest.mark.parametrize("name", ["a,b.jsonl", "a, b.jsonl", ",.jsonl", "x,y,z.jsonl"])
def test_a_path_may_hold_commas(name, tmp_path):
    other = lines(tmp_path / "other.jsonl", dict(GOOD, problem="other?"))
    source = lines(tmp_path / name, GOOD)
    assert split_sources(source) == [source]
    assert split_sources(f"{source},{other}") == [source, other] and split_sources(f"{other} , {source}") == [
        other,
        source,
    ]
    assert len(read_problems(f"{other},{source}")) == 2


def test_columns_that_are_not_read_are_named(tmp_path, capsys):
    source = lines(tmp_path / "a.jsonl", GOOD, dict(GOOD, problem="2 + 2?", refrence="4", level=3))
    read_problems(source, references=False)
    assert capsys.readouterr().err.splitlines() == [
        f"{source} line 2: column 'refrence' is read by functions alone; did you mean 'reference'?",
        f"{source} line 2: column 'level' is read by functions alone",
    ]


def test_parquet_is_read_in_batches(tmp_path, monkeypatch):
    """One read of a row group fails where a nested column has over 2 GB; here the batch is what is small."""
    monkeypatch.setattr(problem_sources, "_PARQUET_ROWS", 2)
    monkeypatch.setattr("pyarrow.parquet.ParquetFile.read", None)
    rows = [dict(GOOD, problem=f"{i}?", choices={"label": ["A"], "text": [str(i)]}) for i in range(5)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    problems = read_problems(str(tmp_path / "a.parquet"))
    assert [(p.problem, p.choices) for p in problems] == [(f"{i}?", (("A", str(i)),)) for i in range(5)]
