"""Judges of a calibration compared: with one another, and with a truth about progress.

Where nearly every rollout fails, verdicts say nothing about a judge: what matters is whether it ranks the failed ones,
and the prefixes, by how far they have come.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from exprl_jax.evaluation.calibration import agreement
from exprl_jax.reward.statistics import spearman
from exprl_jax.text_tables import align, hundredths, percent

Row = Mapping[str, Any]
TraceKey = tuple[str, int, int | None]  # problem id, number of the rollout, segment of a prefix


def scores_of(scores: Sequence[Row], judge: str, condition: str) -> dict[TraceKey, float]:
    """A judge's scores in [0, 1], of what it was asked once about with the trace last; those that it did not give are
    left out."""
    wanted = {"judge": judge, "condition": condition, "order": "trace_last", "repeat": 0}
    return {
        (row["id"], row["rollout"], row["segment"]): row["score"]
        for row in scores
        if row["score"] is not None and all(row[name] == value for name, value in wanted.items())
    }


def comparisons(judges: Sequence[str], scores: Sequence[Row]) -> list[dict[str, Any]]:
    """Every two judges on what both have scored with the right reference: whole rollouts, and prefixes.

    Each is {judges, of, n, exact, within_one, kappa, spearman}; see `calibration.Agreement`.
    """
    rows = []
    for pair in itertools.combinations(judges, 2):
        ours, theirs = (scores_of(scores, judge, "correct") for judge in pair)
        for of, whole in (("rollouts", True), ("prefixes", False)):
            both = [trace for trace in ours if trace in theirs and (trace[2] is None) == whole]
            a_N, b_N = (np.array([of_judge[trace] for trace in both]) for of_judge in (ours, theirs))
            agreed = dataclasses.asdict(agreement(1 + 4 * a_N, 1 + 4 * b_N))
            if both:
                rows.append({"judges": list(pair), "of": of} | agreed | {"spearman": spearman(a_N, b_N)})
    return rows


def against_truth(
    judges: Sequence[str], scores: Sequence[Row], truths: Mapping[TraceKey, float], failed: Collection[tuple[str, int]]
) -> list[dict[str, Any]]:
    """Rank correlation of each judge with the truth, under each condition that it was asked under.

    Each is {judge, condition, of, n, spearman}, of `failed` rollouts, all `rollouts`, and `prefixes`.

    Args:
      failed: problem id and number of the rollouts that the verifier found wrong.
    """
    rows = []
    for judge in judges:
        for condition in ("correct", "none", "wrong"):
            given = scores_of(scores, judge, condition)
            both = [trace for trace in given if trace in truths]
            of = {
                "failed": [trace for trace in both if trace[2] is None and trace[:2] in failed],
                "rollouts": [trace for trace in both if trace[2] is None],
                "prefixes": [trace for trace in both if trace[2] is not None],
            }
            for name, some in of.items():
                if some:
                    pairs_N2 = np.array([(given[trace], truths[trace]) for trace in some])
                    row = {"judge": judge, "condition": condition, "of": name, "n": len(some)}
                    rows.append(row | {"spearman": spearman(*pairs_N2.T)})
    return rows


def render_truth(measured: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table of the terminal; none without a truth."""
    if not measured:
        return []
    header = ["against the truth about progress", "reference", "of", "n", "spearman"]
    rows = [[row["judge"], row["condition"], row["of"], row["n"], hundredths(row["spearman"])] for row in measured]
    return [align([header, *rows], left=3)]


def render_comparisons(compared: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table of the terminal; none where there is nothing to compare."""
    if not compared:
        return []
    header = ["judges compared", "of", "n", "equal", "within 1", "kappa", "spearman"]
    rows = [
        [
            *(" and ".join(row["judges"]), row["of"], row["n"], percent(row["exact"]), percent(row["within_one"])),
            *(hundredths(row["kappa"]), hundredths(row["spearman"])),
        ]
        for row in compared
    ]
    return [align([header, *rows], left=2)]
