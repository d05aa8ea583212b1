"""JSON lines: whole rows are read, broken ones are named, torn ones are cut off, and no question is answered twice."""

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exprl_jax import files
from exprl_jax.files import Ledger, read_jsonl, read_rows

FIELDS = {"id": str, "sample": int, "score": float | None}
ROW = {"id": "a", "sample": 0, "score": 0.5}


def write(path, *lines):
    path.write_bytes(
        b"".join(line if isinstance(line, bytes) else (json.dumps(line) + "\n").encode() for line in lines)
    )
    return path


def ledger(path):
    return Ledger(path, "sample", ("id", "sample"), FIELDS)


def test_no_file_has_no_rows(tmp_path):
    assert list(read_jsonl(tmp_path / "none.jsonl")) == []
    assert list(ledger(tmp_path / "none.jsonl").rows()) == [] and not (tmp_path / "none.jsonl").exists()


def test_only_a_newline_ends_a_line(tmp_path):
    text = "a\u2028b\x85c\rd"
    path = write(tmp_path / "r.jsonl", json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
    assert list(read_jsonl(path)) == [{"text": text}]


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"{\n",
        b"5\n",
        b"null\n",
        b"[1]\n",
        b'"text"\n',
        b'{"a": NaN}\n',
        b'{"a": -Infinity}\n',
        b'{"a": ' + b"9" * 5000 + b"}\n",
        b'{"a": "\\ud800"}\n',
        b'{"a": {"\\uDFFF": 1}}\n',
        b'{"a": "\\udc00\\ud800"}\n',  # a pair the wrong way round
        b'{"a": "\xed\xa0\x80"}\n',  # the same half, written out
        b'{"a": "\xff"}\n',
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
        b'{"a": ' * 100_000 + b"1" + b"}" * 100_000 + b"\n",
        b"\xef\xbb\xbf{}\n",
        b"\x00" * 64 + b"\n",  # what some file systems leave where power was cut
    ],
)
def test_a_broken_line_is_named(tmp_path, line):
    path = write(tmp_path / "r.jsonl", ROW, line, ROW | {"sample": 1})
    with pytest.raises(ValueError, match="r.jsonl, line 2: not a row"):
        list(read_jsonl(path))
    with pytest.raises(ValueError, match="r.jsonl, line 2: not a row"):
        ledger(path)
    assert len(path.read_bytes().split(b"\n")) == 4  # and nothing was deleted


def test_whole_surrogate_pairs_are_text_and_halves_may_be_asked_for(tmp_path):
    path = write(tmp_path / "r.jsonl", {"text": "\U0001f600"}, b'{"text": "\\\\ud800"}\n')
    assert [row["text"] for row in read_jsonl(path)] == ["\U0001f600", "\\ud800"]
    path = write(tmp_path / "half.jsonl", b'{"text": "\\ud800"}\n')
    assert [row["text"] for row in read_jsonl(path, surrogates=True)] == ["\ud800"]


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"id": 3}, "its id is 3, expected str"),
        ({"id": None}, "its id is None"),
        ({"id": ["a"]}, "its id is"),
        ({"sample": "0"}, "its sample is '0', expected int"),
        ({"sample": True}, "its sample is True"),
        ({"sample": 0.0}, "its sample is 0.0"),
        ({"score": 1}, "its score is 1, expected float | None"),
        ({"score": "high"}, "its score is 'high'"),
    ],
)
def test_a_row_of_other_types_is_named(tmp_path, change, problem):
    path = write(tmp_path / "r.jsonl", ROW, ROW | {"sample": 1} | change)
    with pytest.raises(ValueError) as caught:
        list(read_rows(path, FIELDS, "sample"))
    assert f"r.jsonl, row 2: not a sample ({problem}" in str(caught.value)


@pytest.mark.parametrize("name", FIELDS)
def test_a_row_without_a_field_is_named(tmp_path, name):
    path = write(tmp_path / "r.jsonl", {key: value for key, value in ROW.items() if key != name})
    with pytest.raises(ValueError, match=f"row 1: not a sample .it has no '{name}'"):
        ledger(path)


def test_what_is_answered_is_not_answered_again(tmp_path):
    path = write(tmp_path / "r.jsonl", ROW)
    opened = ledger(path)
    assert ("a", 0) in opened and ("a", 1) not in opened
    opened.add([ROW | {"score": 1.0}, ROW | {"sample": 1}])
    assert ("a", 1) in opened
    assert list(opened.rows()) == [ROW, ROW | {"sample": 1}] == list(ledger(path).rows())
    write(path, ROW, ROW | {"score": None})
    with pytest.raises(ValueError, match=r"row 2: answers \('a', 0\) a second time"):
        ledger(path)


def test_a_number_that_is_none_is_not_written(tmp_path):
    opened = ledger(tmp_path / "r.jsonl")
    with pytest.raises(ValueError, match="JSON compliant"):
        opened.add([ROW, ROW | {"sample": 1, "score": float("nan")}])
    assert not (tmp_path / "r.jsonl").exists() and ("a", 0) not in opened


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.lists(st.text(max_size=20), max_size=5), st.integers(0, 200), st.integers(1, 40))
def test_a_file_that_is_cut_anywhere_goes_on_after_its_last_whole_row(tmp_path_factory, texts, cut, chunk):
    path, chunks = tmp_path_factory.mktemp("torn") / "r.jsonl", files._CHUNK
    rows = [{"id": text, "sample": i, "score": None} for i, text in enumerate(texts)]
    whole = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(whole[: min(cut, len(whole))])
    kept = whole[: min(cut, len(whole))].count(b"\n")
    files._CHUNK = chunk
    try:
        opened = ledger(path)
    finally:
        files._CHUNK = chunks
    assert list(opened.rows()) == rows[:kept]
    opened.add(rows)
    assert path.read_bytes() == whole


def test_an_untorn_file_is_not_written_to(tmp_path):
    path = write(tmp_path / "r.jsonl", ROW)
    os.utime(path, ns=(1, 1))
    ledger(path)
    assert path.stat().st_mtime_ns == 1


def test_a_file_that_cannot_be_written_is_said_in_a_line(tmp_path):
    opened = ledger(tmp_path / "folder" / "r.jsonl")
    with pytest.raises(ValueError, match="r.jsonl could not be written .No such file or directory"):
        opened.add([ROW])
