"""The graders against hand-labelled pairs: docs/grader.md lists every disagreement, and no other may appear."""

from __future__ import annotations

import collections

import pytest

from benchmarks import grader as agreement
from exprl_jax.reward.verifiers.choice import correct_label
from exprl_jax.reward.verifiers.math import MathGrader

LABELS = {"correct", "wrong", "no_answer", "unparsable"}


@pytest.fixture(scope="module")
def pairs():
    return agreement.read_pairs()


@pytest.fixture(scope="module")
def verdicts(pairs):
    with MathGrader(workers=2, limit_s=30.0) as grader:
        return agreement.grade(pairs, grader)


def test_the_document_is_what_the_graders_say(pairs, verdicts):
    """A new disagreement, a mended one, or a new pair: run `python -m benchmarks.grader` and look at the difference."""
    document = agreement.DOCUMENT.read_text(encoding="utf-8")
    assert document.endswith("\n" + agreement.report(pairs, verdicts))
    assert f"{len(pairs):,} pairs of response and reference" in document


@pytest.mark.parametrize("kind", ["math", "choice"])
def test_the_graders_agree_with_the_labels(pairs, verdicts, kind):
    own = [(pair["label"], verdict) for pair, verdict in zip(pairs, verdicts, strict=True) if pair["kind"] == kind]
    assert sum(label == verdict for label, verdict in own) >= 0.97 * len(own)
    assert not [pair for pair in own if pair[1] == "correct" != pair[0]]


@pytest.mark.parametrize("path", agreement.PAIRS, ids=lambda path: path.stem)
def test_right_math_answers_of_every_file_are_called_right(pairs, verdicts, path):
    right = [
        verdict
        for pair, verdict in zip(pairs, verdicts, strict=True)
        if (pair["file"], pair["kind"], pair["label"]) == (path.stem, "math", "correct")
    ]
    assert len(right) > 100 and right.count("correct") >= 0.99 * len(right)


def test_the_pairs_are_well_formed_and_cover_both_sides(pairs):
    assert len(pairs) >= 2000
    for pair in pairs:
        assert pair["label"] in LABELS and pair["kind"] in ("math", "choice"), pair
        if pair["kind"] == "choice":
            assert correct_label(pair["answer"], tuple(map(tuple, pair["choices"])))
    counted = collections.Counter((pair["kind"], pair["label"]) for pair in pairs)
    assert all(counted[kind, label] >= 5 for kind in ("math", "choice") for label in LABELS), counted


def test_a_disagreement_is_listed_and_counted(pairs):
    two = [{**pairs[0], "label": "correct", "why": "planted"}, {**pairs[0], "label": "wrong"}]
    text = agreement.report(two, ["correct", "correct"])
    assert "| **math** | 2 | 1 | 50.0 % | 1 |" in text and text.endswith("| wrong | correct |  |\n")
    assert "planted" not in text
