"""Which passes a calibration makes, judges whose scores are stored, and judges that are left out."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from calibration_runs import REFERENCES, calibration, lines, results, stub_judge, write_rollouts
from scipy.stats import spearmanr
from stub_endpoint import Answer, StubEndpoint
from tiny_runs import config_dict, read_jsonl

from exprl_jax.evaluation.calibrate import calibrate

CORRECT = {"references": "correct", "reference_last": False}
PREFIXES = {"prefixes.rollouts": 3, "prefixes.continued": False, "prefixes.segments.rule": "line"}
PREFIXES |= {"reference_last": False}


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    """No proxy between a test and its server."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def always(score):
    return lambda seen, before: Answer(f"Score: {score}")


@pytest.mark.parametrize("references", ["correct", "wrong, none", "none"])
def test_only_the_passes_that_are_asked_for_are_made(tmp_path, references):
    """`none` alone needs no reference solutions."""
    rollouts = write_rollouts(tmp_path / "r.jsonl", reference=references != "none")
    changes = CORRECT | {"references": references} | ({"data.source": ""} if references == "none" else {})
    with StubEndpoint(always(4)) as stub:
        calibrate(calibration(rollouts, changes, stub_judge(stub)), str(tmp_path / "run"))
        asked = [seen.content for seen in stub.seen]
    named = {name.strip() for name in references.split(",")}
    assert len(asked) == 12 * len(named)
    assert {line["condition"] for line in lines(tmp_path / "run")} == named
    assert {h["condition"] for h in results(tmp_path / "run")["histograms"]} == named
    assert results(tmp_path / "run")["orders"] == []
    assert sum("Reference solution:" in content for content in asked) == 12 * len(named - {"none"})
    assert (tmp_path / "run/histograms.png").exists()


def test_prefixes_are_asked_about_under_the_same_conditions(tmp_path):
    """Three of the rollouts, cut at their two inner line ends: with the reference, without, and with another's."""
    rollouts = write_rollouts(tmp_path / "r.jsonl")
    with StubEndpoint(always(2)) as stub:
        calibrate(calibration(rollouts, PREFIXES, stub_judge(stub)), str(tmp_path / "run"))
        asked = [seen.content for seen in stub.seen if "Attempt so far:" in seen.content]
    scores = [row for row in read_jsonl(tmp_path / "run/scores.jsonl") if row["segment"] is not None]
    assert len(asked) == len(scores) and {row["condition"] for row in scores} == {"correct", "none", "wrong"}
    counts = {name: sum(row["condition"] == name for row in scores) for name in ("correct", "none", "wrong")}
    assert len(set(counts.values())) == 1 and counts["correct"] >= 2 * 3
    right = wrong = blind = 0
    for content in asked:
        number = int(re.search(r"Attempt (\d)\.\d\.", content)[1])
        given = content.partition("Attempt so far:")[0]
        right += REFERENCES[number] in given
        blind += "Reference solution:" not in given
        wrong += "Reference solution:" in given and REFERENCES[number] not in given
        assert "That is the end of the attempt so far." in content
    assert right == blind == wrong == counts["correct"]
    assert {(p["condition"], p["n"]) for p in results(tmp_path / "run")["prefixes"]} == {(c, 0) for c in counts}
    assert not (tmp_path / "run/continuations.jsonl").exists()


def stored_rollouts(path, score=lambda i, g, n: ((3 * i + 5 * g + n) % 7) / 6):
    """Rollouts as a run writes them: its lines, each a segment, with its judge's score."""
    write_rollouts(path)
    rows = read_jsonl(path)
    for k, row in enumerate(rows):
        texts = row["response"].splitlines(keepends=True)
        row["segments"] = [
            {"text": text, "score": score(k // 3, k % 3, n), "advantage": 0.0, "judge": None}
            for n, text in enumerate(texts)
        ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path), rows


def test_stored_scores_are_compared_without_asking_anybody(tmp_path, capsys):
    path, rows = stored_rollouts(tmp_path / "r.jsonl")
    config = calibration(path, {"stored": "the run's", **CORRECT}, judges={})
    calibrate(config, str(tmp_path / "run"))
    (line,) = lines(tmp_path / "run", domain="all")
    scored = [(row["segments"][-1]["score"], row["verdict"] == "correct") for row in rows]
    assert (line["judge"], line["rollouts"], line["scored"]) == ("the run's", 12, 12)
    assert line["false_positive"] == pytest.approx(np.mean([1 + 4 * s >= 4 for s, right in scored if not right]))
    assert results(tmp_path / "run")["compared"] == [] and "the run's" in capsys.readouterr().out


def test_a_stored_judge_and_another_are_compared_on_rollouts_and_prefixes(tmp_path):
    """Against scipy's rank correlation of the scores that both have given, prefixes cut where the run cut them."""
    path, rows = stored_rollouts(tmp_path / "r.jsonl")
    other = {}

    def answer(seen, before):
        number, g = map(int, re.search(r"Attempt (\d)\.(\d)\.", seen.content).groups())
        trace = re.search(r"Attempt(?: so far)?:\n(.*)\n\nThat is the end", seen.content, re.DOTALL)[1]
        n = trace.count("\n") - trace.endswith("\n")
        other[number, g, n] = 1 + (number + 2 * g + n) % 5
        return Answer(f"Score: {other[number, g, n]}")

    changes = PREFIXES | {"stored": "run", "references": "correct", "prefixes.rollouts": 12}
    with StubEndpoint(answer) as stub:
        calibrate(calibration(path, changes, stub_judge(stub)), str(tmp_path / "run"))
    compared = {row["of"]: row for row in results(tmp_path / "run")["compared"]}
    assert compared["rollouts"]["judges"] == ["run", "stub"]
    for of, last in (("rollouts", True), ("prefixes", False)):
        pairs = [
            (1 + 4 * segment["score"], other[k // 3, k % 3, n])
            for k, row in enumerate(rows)
            for n, segment in enumerate(row["segments"])
            if (n == len(row["segments"]) - 1) == last
        ]
        assert compared[of]["n"] == len(pairs) and len(pairs) >= 12
        assert compared[of]["spearman"] == pytest.approx(spearmanr(*zip(*pairs)).statistic)
        near = [abs(int(a + 0.5) - b) <= 1 for a, b in pairs]
        assert compared[of]["within_one"] == pytest.approx(np.mean(near))


def progress_of(number, g, n):
    """A truth from nowhere."""
    return ((5 * number + 2 * g + 3 * n) % 11) / 10


def test_judges_are_ranked_by_a_truth_over_failed_rollouts_and_prefixes(tmp_path):
    """A function as the truth and a stored judge, against scipy; wrong rollouts alone count as failed."""
    path, rows = stored_rollouts(tmp_path / "r.jsonl")
    (tmp_path / "truth.py").write_text(
        "import re\n\ndef progress(attempts):\n    return [of(a) for a in attempts]\n\n"
        "def of(a):\n    number, g = map(int, re.search(r'Attempt (\\d).(\\d)', a.trace).groups())\n"
        "    n = a.segment if a.unit == 'prefix' else 3\n"
        "    return ((5 * number + 2 * g + 3 * n) % 11) / 10\n"
    )
    changes = {"stored": "run", **CORRECT, "truth.source": f"{tmp_path}/truth.py:progress"}
    calibrate(calibration(path, changes, judges={}), str(tmp_path / "run"))
    row_of = {row["of"]: row for row in results(tmp_path / "run")["truth"]}
    traces = [
        (n, row["verdict"], row["segments"][n]["score"], progress_of(k // 3, k % 3, n))
        for k, row in enumerate(rows)
        for n in range(4)
    ]
    assert all(len(row["segments"]) == 4 for row in rows)
    of = {
        "failed": [t for t in traces if t[0] == 3 and t[1] == "wrong"],
        "rollouts": [t for t in traces if t[0] == 3],
        "prefixes": [t for t in traces if t[0] < 3],
    }
    assert set(row_of) == set(of)
    for name, some in of.items():
        assert (row_of[name]["judge"], row_of[name]["condition"], row_of[name]["n"]) == ("run", "correct", len(some))
        expected = spearmanr([t[2] for t in some], [t[3] for t in some]).statistic
        assert row_of[name]["spearman"] == pytest.approx(expected)
    assert "against the truth" in (tmp_path / "run/table.txt").read_text()


@pytest.mark.parametrize("label, taken", [(lambda k: k / 11, True), (lambda k: 1.5, False)])
def test_a_number_of_the_rows_is_the_truth_of_whole_rollouts(tmp_path, label, taken):
    path, rows = stored_rollouts(tmp_path / "r.jsonl")
    rows = [row | {"progress": label(k)} for k, row in enumerate(rows)]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = calibration(path, {"stored": "run", **CORRECT, "truth.source": "column:progress"}, judges={})
    if not taken:
        with pytest.raises(ValueError, match="config.truth.source: 'progress' of rollout 0 .*expected a number in"):
            calibrate(config, str(tmp_path / "run"))
        return
    calibrate(config, str(tmp_path / "run"))
    row_of = {row["of"]: row for row in results(tmp_path / "run")["truth"]}
    scores = [row["segments"][-1]["score"] for row in rows]
    assert row_of["rollouts"]["spearman"] == pytest.approx(spearmanr(scores, range(12)).statistic)
    assert "prefixes" not in row_of


def test_what_is_no_judges_score_is_not_taken_for_one(tmp_path):
    """By the config of the run that wrote the rows: a verifier's reward, and a score of a single step."""
    (tmp_path / "rollouts").mkdir()
    path, _ = stored_rollouts(tmp_path / "rollouts/step_1.jsonl")
    for route, unit, taken in (("process", "prefix", True), ("verifier", "prefix", False), ("process", "step", False)):
        run = {"routes": {"math": route}, "judge": {"unit": unit}}
        (tmp_path / "config.json").write_text(json.dumps(run))
        config = calibration(path, {"stored": "run", **CORRECT}, judges={})
        if taken:
            calibrate(config, str(tmp_path / f"{route}-{unit}"))
            continue
        with pytest.raises(ValueError, match="config.stored: got 'run', expected '': no rollout .* holds a judge's"):
            calibrate(config, str(tmp_path / f"{route}-{unit}"))


@pytest.mark.parametrize("change", [{"text": None}, {"score": 1.5}, {"score": True}, {"judge": 3}, 7])
def test_a_segment_that_is_none_is_refused(tmp_path, change):
    path, rows = stored_rollouts(tmp_path / "r.jsonl")
    rows[0]["segments"][0] = rows[0]["segments"][0] | change if isinstance(change, dict) else change
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="row 1: not a rollout .a segment is .*expected its text, a score in"):
        calibrate(calibration(path, {"stored": "run"}, judges={}), str(tmp_path / "run"))


def test_a_judge_whose_context_is_too_short_is_named_and_the_others_are_asked(tmp_path, capsys):
    rollouts = write_rollouts(tmp_path / "r.jsonl")
    with StubEndpoint(always(5)) as stub:
        local = config_dict("calibrate", "tiny").judges
        judges = stub_judge(stub) | {"long": local.text.copy_and_resolve_references().unlock(), "small": local.logits}
        judges["long"].max_tokens, judges["small"] = 4096, judges["small"].copy_and_resolve_references().unlock()
        judges["small"].max_context_tokens = 10
        calibrate(calibration(rollouts, CORRECT, judges), str(tmp_path / "run"))
    left_out = results(tmp_path / "run")["left_out"]
    assert list(left_out) == ["long", "small"]
    assert re.match("config.judges.long.max_context_tokens .*the judge's context length$", left_out["long"])
    assert left_out["small"].startswith("config.judges.small.max_context_tokens: got 10, expected at least")
    assert {line["judge"] for line in lines(tmp_path / "run")} == {"stub"}
    output = capsys.readouterr()
    assert all(f"{name}: left out: {reason}" in output.out + output.err for name, reason in left_out.items())


def test_a_rubric_per_problem_is_calibrated_with_a_list_from_each_reference(tmp_path):
    """The right reference's list is fulfilled and another's is not; without a reference there is no list."""
    rollouts, written = write_rollouts(tmp_path / "r.jsonl"), []

    def answer(seen, before):
        question = seen.content
        if "Write the list" in question:
            number = next(i for i, reference in enumerate(REFERENCES) if f"solution:\n{reference}\n" in question)
            written.append(number)
            return Answer(f"1. counts\n2. says {number}")
        if "Checklist:" not in question:
            return Answer("Score: 3")
        right = f"2. says {re.search(r'Attempt ([0-9])[.]', question)[1]}\n" in question
        return Answer(f"Item 1: yes\nItem 2: {'yes' if right else 'no'}")

    with StubEndpoint(answer) as stub:
        judges = stub_judge(stub)
        judges["stub"].rubric = "per_problem"
        config = calibration(rollouts, {"reference_last": False}, judges)
        for _ in range(2):
            calibrate(config, str(tmp_path / "run"))
    scores = {}
    for row in read_jsonl(tmp_path / "run/scores.jsonl"):
        scores.setdefault(row["condition"], set()).add(row["score"])
    assert scores == {"correct": {1.0}, "none": {0.5}, "wrong": {0.5}}
    assert sorted(written) == sorted([0, 1, 2, 3] * 2)  # as the right one and as another's
    assert len(read_jsonl(tmp_path / "run/checklists.jsonl")) == 8


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"judges.text.rubric": "per_problem"},
            "config.reference_last: got True, expected False with config.judges.text.rubric = 'per_problem'",
        ),
        (
            {"judges.text.rubric": "per_problem", "reference_last": False, "repeats.rollouts": 2},
            "config.repeats.rollouts: got 2, expected 0 with config.judges.text.rubric = 'per_problem'",
        ),
        ({"references": ""}, "config.references: got '', expected some of correct, none, wrong, each once"),
        ({"references": "correct,right"}, "config.references: got 'correct,right', expected some of"),
        ({"references": "none,none"}, "config.references: got 'none,none', expected some of"),
        ({"references": "none"}, "config.reference_last: got True, expected False without 'correct'"),
        (
            {"references": "none", "reference_last": False, "repeats.rollouts": 1},
            "config.repeats.rollouts: got 1, expected 0 without 'correct'",
        ),
        ({"stored": "text"}, "config.stored: got 'text', expected a name that is not in config.judges"),
        ({"judges": {}}, "config.judges: expected a section with at least one named entry"),
    ],
)
def test_passes_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        calibration("x", changes)
