"""Behaviour annotation: strict reading, comparison by brute force, whole runs on a stub and a tiny model."""

from __future__ import annotations

import csv
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stub_endpoint import Answer, StubEndpoint
from tiny_runs import ROOT, config_dict, read_jsonl

from exprl_jax.evaluation.annotate import annotate
from exprl_jax.evaluation.behaviour import (
    ARCHETYPES,
    COUNTS,
    FIELDS,
    HABITS,
    annotation_messages,
    compare,
    parse_annotation,
    problem_means,
)
from exprl_jax.evaluation.pass_at_k import bootstrap
from exprl_jax.files import Ledger
from exprl_jax.resolve import resolve

GOOD = dict.fromkeys(FIELDS, 0) | {"verification": 1, "self_correction": 7}


# ------------------------------------------------------------------------------------------------ reading


def test_there_are_the_papers_numbers_of_fields():
    assert (len(ARCHETYPES), len(COUNTS) + len(HABITS), len(set(FIELDS))) == (12, 9, 21)
    assert set(COUNTS) == {"self_interruption", "self_correction"}


def test_the_prompt_defines_every_field_and_asks_for_what_is_read():
    system, user = annotation_messages("WHICH?", "MARK")
    for name in FIELDS:
        assert system.content.count(f"- {name}: ") == 1
    assert user.content.index("WHICH?") < user.content.index("MARK") and user.content.count("MARK") == 1
    form = user.content.splitlines()[-1].replace("<0 or 1>", "1").replace("<count>", "3")
    assert parse_annotation(form) == {name: 3 if name in COUNTS else 1 for name in FIELDS}
    for marker in ("", "WHICH"):
        with pytest.raises(ValueError, match="marker"):
            annotation_messages("WHICH?", marker)


@pytest.mark.parametrize(
    "form", ["{}", " \n{}\n", "```json\n{}\n```", "```\n{}```", "  ```JSON \r\n{}\r\n``` ", "<think>0?</think>{}"]
)
def test_an_object_is_read_alone_or_in_a_fence(form):
    for text in (json.dumps(GOOD), json.dumps(GOOD, indent=2), json.dumps(dict(reversed(GOOD.items())))):
        fields = parse_annotation(form.replace("{}", text))
        assert fields == GOOD and tuple(fields) == FIELDS


def without(name):
    return {key: value for key, value in GOOD.items() if key != name}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "null",
        "3",
        '"x"',
        "not json",
        json.dumps([GOOD]),
        json.dumps(GOOD)[:-1],
        "[" * 100_000,
        json.dumps(GOOD) + " done",
        "Here: " + json.dumps(GOOD),
        json.dumps(GOOD) * 2,
        "<think>\n" + json.dumps(GOOD),
        json.dumps(GOOD) + "\n</think>",
        "```json\n" + json.dumps(GOOD),
        "```python\n" + json.dumps(GOOD) + "\n```",
        "```\n" + json.dumps(GOOD) + "\n```\n```\n" + json.dumps(GOOD) + "\n```",
        json.dumps(without("counting")),
        json.dumps(GOOD | {"more": 0}),
        json.dumps(without("counting") | {"Counting": 0}),
        json.dumps(GOOD)[:-1] + ', "counting": 0}',
        *(json.dumps(GOOD | {"verification": bad}) for bad in (2, -1, True, 1.0, "1", None, [1], {"a": 1}, np.nan)),
        *(json.dumps(GOOD | {"self_correction": bad}) for bad in (-1, 1.5, True, "2", None)),
        json.dumps(GOOD).replace("7", "9" * 5000),
    ],
)
def test_anything_else_is_missing(text):
    assert parse_annotation(text) is None


@settings(max_examples=100, derandomize=True, deadline=None)
@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=5),
        lambda c: st.lists(c, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), c),
    )
)
def test_no_json_breaks_the_reading(value):
    assert parse_annotation(json.dumps(value)) is None


# ------------------------------------------------------------------------------------------------ statistics


def annotations(seed, problems, group):
    rng = np.random.default_rng(seed)
    return [
        (f"p{i}", {name: int(rng.integers(0, 4 if name in COUNTS else 2)) for name in FIELDS})
        for i in range(problems)
        for _ in range(group)
    ]


def test_gains_and_losses_by_brute_force():
    run, base = annotations(0, 9, 3), annotations(1, 11, 2)
    changes = compare(problem_means(run), problem_means(base), seed=5)
    assert [change.field for change in changes] == list(FIELDS)
    for change in changes:
        apart = []
        for i in range(9):
            ours, theirs = ([f[change.field] for name, f in side if name == f"p{i}"] for side in (run, base))
            apart.append(sum(ours) / len(ours) - sum(theirs) / len(theirs))
        assert change.problems == 9
        assert change.gained == sum(x > 1e-12 for x in apart) and change.lost == sum(x < -1e-12 for x in apart)
        assert change.unchanged == 9 - change.gained - change.lost
        assert change.difference == pytest.approx(np.mean(apart)) and change.difference == pytest.approx(
            change.run - change.base
        )
        low, high = bootstrap(np.array(apart)[:, None], 5)
        assert (change.low, change.high) == (pytest.approx(low[0]), pytest.approx(high[0]))
    assert any(change.gained for change in changes) and any(change.lost for change in changes)


def test_a_run_against_itself_changes_nothing_and_one_problem_has_no_interval():
    means = problem_means(annotations(0, 4, 3))
    assert all((c.unchanged, c.difference, c.low, c.high) == (4, 0, 0, 0) for c in compare(means, means, 0))
    one = {"p0": means["p0"]}
    assert all((c.problems, c.low, c.high) == (1, None, None) for c in compare(one, means, 0))
    with pytest.raises(ValueError, match="shares no annotated problem"):
        compare(means, {"other": means["p0"]}, 0)


# ------------------------------------------------------------------------------------------------ whole runs


def write_rollouts(path, name, problems=3, group=2):
    rows = [
        problem
        | {"kind": "math", "reference": None, "rollout": g, "response": f"{name} {i}.{g}.", "verdict": "missing"}
        for i, problem in enumerate(read_jsonl(ROOT / "configs/data/arithmetic.jsonl")[:problems])
        for g in range(group)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def annotation(rollouts, base="", stub=None):
    made = config_dict("annotate", "tiny").copy_and_resolve_references().unlock()
    made.rollouts, made.base = rollouts, base
    made.data.source = ""
    made.annotator.max_tokens = 8
    if stub is not None:
        made.annotator.backend = "openai"
        made.annotator.endpoint.update(
            base_url=stub.base_url, model="stub", api_key_variable="", concurrency=2, retries=0
        )
    return resolve(made)


def synthetic(seen, before):
    """Verification in every rollout of the run; counting in rollout 0 of the base; nonsense once."""
    name, i, g = re.search(r"Solution:\n(\w+) (\d)\.(\d)\.", seen.content).groups()
    if (name, i, g) == ("run", "2", "1"):
        return Answer("Nothing.")
    shown = {
        "verification": int(name == "run"),
        "counting": int(name == "base" and g == "0"),
        "self_correction": 3 * int(i),
    }
    return Answer("```json\n" + json.dumps(dict.fromkeys(FIELDS, 0) | shown) + "\n```")


class Interrupted(Exception):
    pass


def test_a_run_is_compared_with_base_rollouts_and_goes_on_after_a_kill(tmp_path, monkeypatch):
    run, base = write_rollouts(tmp_path / "run.jsonl", "run"), write_rollouts(tmp_path / "base.jsonl", "base")
    folder = tmp_path / "work"
    with StubEndpoint(synthetic) as stub:
        config = annotation(run, base, stub)
        add = Ledger.add

        def interrupted(ledger, rows):
            add(ledger, rows)
            raise Interrupted

        monkeypatch.setattr(Ledger, "add", interrupted)
        with pytest.raises(Interrupted):
            annotate(config, str(folder))
        monkeypatch.setattr(Ledger, "add", add)
        path = folder / "annotations.jsonl"
        path.write_bytes(path.read_bytes()[:-9])  # a torn line
        annotate(config, str(folder))
        assert len(stub.seen) == 12 + 1
        annotate(config, str(folder))
        assert len(stub.seen) == 12 + 1
        annotate(annotation(run, str(folder), stub), str(tmp_path / "self"))
    results = json.loads((folder / "results.json").read_text())
    assert (
        results["counts"]["rollouts"] == 6
        and results["counts"]["missing"] == 1
        and results["counts"]["base_missing"] == 0
    )
    assert results["counts"]["problems"] == results["counts"]["base_problems"] == 3
    changes = {change["field"]: change for change in results["changes"]}
    wanted = {"verification": (1, 0, 3, 0, 0), "counting": (0, 0.5, 0, 3, 0), "self_correction": (3, 3, 0, 0, 3)}
    for name, expected in wanted.items():
        assert tuple(changes[name][key] for key in ("run", "base", "gained", "lost", "unchanged")) == expected
    assert (changes["verification"]["low"], changes["verification"]["high"]) == (1, 1)
    assert len(read_jsonl(folder / "annotations.jsonl")) == len(read_jsonl(folder / "base_annotations.jsonl")) == 6
    with open(folder / "annotations.csv") as file:
        assert {row["field"]: float(row["difference"]) for row in csv.DictReader(file)}["counting"] == -0.5
    assert (folder / "behaviour.png").read_bytes()[:4] == b"\x89PNG"
    # Against its own annotations, taken from the other's workdir, nothing changes.
    itself = json.loads((tmp_path / "self" / "results.json").read_text())
    assert all(change["unchanged"] == 3 for change in itself["changes"])
    with pytest.raises(ValueError, match="is not the one that it was"):
        write_rollouts(tmp_path / "run.jsonl", "other")
        annotate(config, str(folder))


def test_too_many_failed_requests_end_the_run(tmp_path):
    with (
        StubEndpoint(lambda *_: Answer(status=400)) as stub,
        pytest.raises(ValueError, match="6 of 6 annotations are missing"),
    ):
        annotate(annotation(write_rollouts(tmp_path / "r.jsonl", "run"), stub=stub), str(tmp_path / "work"))


@pytest.mark.slow
def test_a_local_annotator_is_asked_greedily_and_what_is_too_long_is_missing(tmp_path):
    path = tmp_path / "r.jsonl"
    rows = read_jsonl(write_rollouts(path, "run", problems=1))
    rows[1]["response"] = "x" * 200  # over the budget of 96 bytes
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    annotate(annotation(str(path)), str(tmp_path / "work"))
    first, long = read_jsonl(tmp_path / "work" / "annotations.jsonl")
    assert (first["fields"], long["fields"], long["text"], long["tokens"]) == (None, None, "", 0)
    system, user = annotation_messages(rows[0]["problem"], "MARK")
    assert first["tokens"] > len(system.content) + len(user.content)
    assert json.loads((tmp_path / "work" / "results.json").read_text())["counts"]["missing"] == 2


def test_an_annotation_that_is_read_from_digits_is_refused():
    made = config_dict("annotate", "tiny").copy_and_resolve_references().unlock()
    made.annotator.readout = "logits"
    with pytest.raises(ValueError, match="config.annotator.readout: got 'logits', expected 'text'"):
        resolve(made)
