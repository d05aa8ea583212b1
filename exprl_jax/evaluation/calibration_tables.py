"""The output of a calibration: `results.json`, `calibration.csv`, a table, and histograms and the prefix check drawn.

Scores in files are normalised to 0..1, as in training; here they are on the judge's own scale, 1 to 5.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from exprl_jax.config import Calibrate
from exprl_jax.evaluation import figures
from exprl_jax.evaluation.calibration import agreement, error_rates, histogram, likelihood, spread
from exprl_jax.evaluation.fixed_rollouts import FixedRollout
from exprl_jax.evaluation.judge_comparison import TraceKey, against_truth, comparisons, render_comparisons, render_truth
from exprl_jax.evaluation.passes import CONDITIONS
from exprl_jax.files import write_atomically
from exprl_jax.reward.judge_prompts import DIGITS
from exprl_jax.reward.statistics import auroc
from exprl_jax.reward.verifiers.verdict import Verdict
from exprl_jax.text_tables import align, as_csv, hundredths, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TITLES = {"correct": "with reference", "none": "no reference", "wrong": "wrong reference"}
_PASSES = (*((condition, "trace_last") for condition in CONDITIONS), ("correct", "reference_last"))

Row = Mapping[str, Any]
Key = tuple[str, int]  # problem id and number of a rollout


@dataclasses.dataclass(frozen=True)
class JudgeAccuracy:
    """A judge under one condition on the rollouts of one domain.  Rates are fractions; None where undefined.

    Attributes:
      order: `trace_last`, as in training, or `reference_last`, as in the released templates.
      domain: or `all`.
      rollouts: with a verdict that decides.
      asked: those of them that were put to the judge; problems over its budget are not.
      scored, correct: rollouts with a score, and those of them that the verifier found correct.
      parse_rate: scored / asked.
      unanswered: asked in vain: the request failed, or the rollout is over the judge's budget.
      tokens: read and written; of a local judge a problem's prompt counts once a call, as it is read.
      seconds: waited, loading left out; compiling, which comes with the first calls, is in it.
    """

    judge: str
    condition: str
    order: str
    domain: str
    rollouts: int
    asked: int
    scored: int
    correct: int
    misplacement: float | None
    false_positive: float | None
    false_negative: float | None
    auroc: float | None
    parse_rate: float | None
    unanswered: int
    tokens: int
    seconds: float


def write_calibration(
    config: Calibrate,
    folder: pathlib.Path,
    rollouts: Sequence[FixedRollout],
    counts: Mapping[str, int],
    left_out: Mapping[str, str],
    scores: Sequence[Row],
    continuations: Sequence[Row],
    truths: Mapping[TraceKey, float],
) -> None:
    """Writes the files of a calibration and prints its table.

    Args:
      rollouts: those with a verdict that decides.
      counts: of rollouts, for `results.json`.
      left_out: judges that could not be asked, and why.
      scores: the rows of the ledger, and those of a stored judge.
      continuations: the rows of the ledger.
      truths: about the progress of rollouts and prefixes.
    """
    names = [name for name in config.names if name not in left_out]
    accuracies = judge_accuracies(names, rollouts, scores)
    stored = {config.stored: config.rollouts} if config.stored else {}
    results = {
        "weights": stored | {name: judge.source for name, judge in config.judges.items()},
        "readouts": {name: judge.readout for name, judge in config.judges.items()},
        "counts": dict(counts),
        "left_out": dict(left_out),
        "calibration": [dataclasses.asdict(accuracy) for accuracy in accuracies],
        "histograms": [],
        "orders": [],
        "repeats": [],
        "prefixes": [],
    }
    correct = {rollout.key: rollout.verdict == Verdict.correct for rollout in rollouts}
    results["compared"] = comparisons(names, scores)
    failed = {rollout.key for rollout in rollouts if rollout.verdict != Verdict.correct}
    results["truth"] = against_truth(names, scores, truths, failed)
    for judge in names:
        of_pass = {name: _whole_scores(scores, judge, *name) for name in _PASSES}
        ours, theirs = of_pass["correct", "trace_last"], of_pass["correct", "reference_last"]
        both = [key for key in ours if key in theirs]
        agreed = agreement(np.array([ours[key] for key in both]), np.array([theirs[key] for key in both]))
        of_judge = {"judge": judge}
        conditions = {row["condition"] for row in scores if row["judge"] == judge}
        for condition in (name for name in CONDITIONS if name in conditions):
            of_condition = of_judge | {"condition": condition}
            counted = _histograms(of_pass[condition, "trace_last"], correct)
            results["histograms"].append(of_condition | counted)
            pairs = prefix_pairs(scores, continuations, judge, condition)
            results["prefixes"].append(of_condition | dataclasses.asdict(likelihood(*pairs)))
        if config.reference_last:
            results["orders"].append(of_judge | dataclasses.asdict(agreed))
        results["repeats"].append(of_judge | dataclasses.asdict(spread(repeated_scores(scores, judge))))
    texts = {
        "results.json": json.dumps(results, indent=1, allow_nan=False) + "\n",
        "calibration.csv": calibration_csv(accuracies),
        "table.txt": render_calibration(results),
    }
    drawings = {"histograms.png": histogram_figure(results["histograms"])}
    if continuations:
        drawings["prefix_check.png"] = prefix_figure(scores, continuations, results["prefixes"])
    for name, text in texts.items():
        write_atomically(folder / name, text)
    for name, figure in drawings.items():
        figures.save_figure(figure, folder / name)
    print(texts["table.txt"])
    print("\n".join(f"  {folder / name}" for name in [*texts, *drawings]), flush=True)


# ------------------------------------------------------------------------------------------------ statistics


def judge_accuracies(
    judges: Sequence[str], rollouts: Sequence[FixedRollout], scores: Sequence[Row]
) -> list[JudgeAccuracy]:
    """One a judge, condition and domain, all domains first; the released order after the conditions.  What a judge was
    not asked has none."""
    domains = {"all": {rollout.key: rollout for rollout in rollouts}}
    for name in sorted({rollout.problem.domain for rollout in rollouts}):
        domains[name] = {rollout.key: rollout for rollout in rollouts if rollout.problem.domain == name}
    return [
        _accuracy(judge, condition, order, domain, of_domain, rows)
        for judge in judges
        for condition, order in _PASSES
        for rows in [_whole_rows(scores, judge, condition, order)]
        if rows
        for domain, of_domain in domains.items()
    ]


def _accuracy(
    judge: str, condition: str, order: str, domain: str, rollouts: Mapping[Key, FixedRollout], rows: Sequence[Row]
) -> JudgeAccuracy:
    asked = [row for row in rows if _key(row) in rollouts]
    scored = [row for row in asked if row["score"] is not None]
    score_N = np.array([_likert(row["score"]) for row in scored])
    correct_N = np.array([rollouts[_key(row)].verdict == Verdict.correct for row in scored], bool)
    rates = error_rates(score_N, correct_N)
    return JudgeAccuracy(
        judge=judge,
        condition=condition,
        order=order,
        domain=domain,
        rollouts=len(rollouts),
        asked=len(asked),
        scored=len(scored),
        correct=int(correct_N.sum()),
        misplacement=rates.misplacement,
        false_positive=rates.false_positive,
        false_negative=rates.false_negative,
        auroc=auroc(score_N, correct_N),
        parse_rate=len(scored) / len(asked) if asked else None,
        unanswered=sum(row["score"] is None and row["text"] is None for row in asked),
        tokens=round(sum(row["tokens"] for row in asked)),
        seconds=sum(row["seconds"] for row in asked),
    )


def repeated_scores(scores: Sequence[Row], judge: str) -> list[list[float]]:
    """The scores of each rollout that the judge was asked about several times."""
    of_rollout: dict[Key, list[float]] = {}
    for row in scores:
        if row["judge"] == judge and row["repeat"] and row["score"] is not None:
            of_rollout.setdefault(_key(row), []).append(_likert(row["score"]))
    return list(of_rollout.values())


def prefix_pairs(
    scores: Sequence[Row], continuations: Sequence[Row], judge: str, condition: str = "correct"
) -> tuple[np.ndarray, np.ndarray]:
    """Score and success of each prefix that has both, [N] each."""
    correct: dict[tuple[Key, int], int] = {}
    graded: dict[tuple[Key, int], int] = {}
    for row in continuations:
        prefix = _key(row), row["segment"]
        correct[prefix] = correct.get(prefix, 0) + row["correct"]
        graded[prefix] = graded.get(prefix, 0) + row["graded"]
    pairs = []
    for row in scores:
        prefix = _key(row), row["segment"]
        asked = (row["judge"], row["condition"]) == (judge, condition)
        if asked and row["score"] is not None and graded.get(prefix, 0):
            pairs.append((_likert(row["score"]), correct[prefix] / graded[prefix]))
    score_N, success_N = np.array(pairs, np.float64).reshape(-1, 2).T
    return score_N, success_N


def _whole_rows(scores: Sequence[Row], judge: str, condition: str, order: str) -> list[Row]:
    """Of whole rollouts that were asked about once."""
    wanted = {"judge": judge, "condition": condition, "order": order, "segment": None, "repeat": 0}
    return [row for row in scores if all(row[name] == value for name, value in wanted.items())]


def _whole_scores(scores: Sequence[Row], judge: str, condition: str, order: str) -> dict[Key, float]:
    rows = _whole_rows(scores, judge, condition, order)
    return {_key(row): _likert(row["score"]) for row in rows if row["score"] is not None}


def _histograms(score_of: Mapping[Key, float], correct: Mapping[Key, bool]) -> dict[str, list[int]]:
    return {
        name: histogram(np.array([s for key, s in score_of.items() if correct[key] == truth], np.float64)).tolist()
        for name, truth in (("correct", True), ("wrong", False))
    }


def _key(row: Row) -> Key:
    return row["id"], row["rollout"]


def _likert(score: float) -> float:
    return 1 + 4 * score


# ------------------------------------------------------------------------------------------------ tables


def calibration_csv(accuracies: Sequence[JudgeAccuracy]) -> str:
    """One row a judge, condition and domain; empty fields for what is undefined."""
    names = [field.name for field in dataclasses.fields(JudgeAccuracy)]
    return as_csv(names, map(dataclasses.astuple, accuracies))


def render_calibration(results: Mapping[str, Any]) -> str:
    """The table of the terminal, in percent."""
    header = ["judge", "condition", "domain", "scored", "misplaced", "FPR", "FNR", "AUROC", "parsed", "tokens"]
    rates = ("misplacement", "false_positive", "false_negative", "auroc", "parse_rate")
    rows = [
        [
            line["judge"],
            line["condition"] if line["order"] == "trace_last" else "reference last",
            line["domain"],
            f"{line['scored']}/{line['rollouts']}",
            *(percent(line[name]) for name in rates),
            f"{line['tokens']:,}",
            f"{line['seconds']:.1f}",
        ]
        for line in results["calibration"]
    ]
    parts = [
        align([[*header, "seconds"], *rows], left=3),
        "percent, but counts, tokens and seconds; misplaced = (FPR + FNR) / 2; left out: "
        f"{results['counts']['left_out']} rollouts that no verifier judged (missing, timed out)",
    ]
    header = ["reference last against trace last", "n", "equal", "within 1", "kappa"]
    rows = [
        [o["judge"], o["n"], percent(o["exact"]), percent(o["within_one"]), hundredths(o["kappa"])]
        for o in results["orders"]
    ]
    if rows:
        parts.append(align([header, *rows], left=1))
    parts += render_comparisons(results["compared"]) + render_truth(results["truth"])
    if any(r["rollouts"] for r in results["repeats"]):
        header = ["repeated judgements (std, 1 to 5)", "rollouts", "within", "between"]
        rows = [
            [r["judge"], r["rollouts"], hundredths(r["within"]), hundredths(r["between"])] for r in results["repeats"]
        ]
        parts.append(align([header, *rows], left=1))
    if any(p["n"] for p in results["prefixes"]):
        header = ["success after a prefix, by score", "reference", "n", *DIGITS, "pearson", "spearman"]
        rows = [
            [
                *(p["judge"], p["condition"], p["n"], *map(percent, p["success_5"])),
                *(hundredths(p["pearson"]), hundredths(p["spearman"])),
            ]
            for p in results["prefixes"]
        ]
        parts.append(align([header, *rows], left=2))
    return "\n\n".join(parts) + "\n"


# ------------------------------------------------------------------------------------------------ figures


def histogram_figure(histograms: Sequence[Mapping[str, Any]]) -> Figure:
    """Shares of scores 1 to 5 among correct and wrong rollouts: rows are judges, columns conditions (Fig. 11a)."""
    judges = list(dict.fromkeys(counts["judge"] for counts in histograms))
    conditions = [name for name in CONDITIONS if any(counts["condition"] == name for counts in histograms)]
    figure = figures.new_figure(7.0, 1.75 * len(judges) + 0.7)
    panels = figure.subplots(len(judges), len(conditions), squeeze=False, sharey=True)
    bars = ((-0.2, "correct", figures.GOOD, ""), (0.2, "wrong", figures.BAD, "///"))
    for counts in histograms:
        panel = panels[judges.index(counts["judge"])][conditions.index(counts["condition"])]
        for shift, name, colour, hatch in bars:
            share_5 = 100 * np.array(counts[name]) / max(sum(counts[name]), 1)
            style = figures.EDGES | dict(color=colour, hatch=hatch, label=f"{name} rollouts")
            panel.bar(np.array(DIGITS) + shift, share_5, 0.4, **style)
        panel.axvline(3.5, color="0.5", linewidth=0.8, linestyle=":")
        panel.set_xticks(DIGITS)
        panel.set_ylim(0, 104)
        sizes = f"n = {sum(counts['correct'])} / {sum(counts['wrong'])}"
        panel.text(0.04, 0.96, sizes, transform=panel.transAxes, va="top", fontsize=7)
        figures.plain_axes(panel)
    for column, condition in enumerate(conditions):
        panels[0][column].set_title(_TITLES[condition], fontsize=9)
        panels[-1][column].set_xlabel("judge's score", fontsize=8)
    for row, judge in enumerate(judges):
        panels[row][0].set_ylabel(f"{figures.plain_text(judge)}\nrollouts (%)", fontsize=8)
    note = "dotted: the judge says correct from 4 on (expected digits shown at the nearest); n = correct / wrong"
    figures.legend_below(figure, *panels[0][0].get_legend_handles_labels(), title=note)
    return figure


def prefix_figure(scores: Sequence[Row], continuations: Sequence[Row], prefixes: Sequence[Mapping[str, Any]]) -> Figure:
    """Success of continuations over the score of their prefix: a dot a prefix, a line through the means (Fig. 11b)."""
    across = min(3, len(prefixes))
    down = math.ceil(len(prefixes) / across)
    figure = figures.new_figure(0.6 + 2.6 * across, 2.3 * down + 0.5)
    panels = figure.subplots(down, across, squeeze=False, sharey=True).ravel()
    for number, (panel, prefix) in enumerate(zip(panels, prefixes, strict=False)):
        score_N, success_N = prefix_pairs(scores, continuations, prefix["judge"], prefix["condition"])
        # Whole scores would hide one another: a fixed shift apart, by the golden ratio.
        shifted_N = score_N + 0.24 * ((np.arange(len(score_N)) * 0.618034) % 1 - 0.5)
        colour = figures.COLOURS[number % len(figures.COLOURS)]
        style = dict(color=colour, markersize=2.5, alpha=0.35, markeredgewidth=0, label="a prefix")
        panel.plot(shifted_N, 100 * success_N, "o", **style)
        means = [(digit, 100 * mean) for digit, mean in zip(DIGITS, prefix["success_5"]) if mean is not None]
        if means:
            marker = figures.MARKERS[number % len(figures.MARKERS)]
            panel.plot(*zip(*means), "-" + marker, color="black", linewidth=1.2, markersize=4.5, label="mean")
        of = (
            prefix["judge"]
            if prefix["condition"] == "correct"
            else f"{prefix['judge']}, {_TITLES[prefix['condition']]}"
        )
        title = f"{figures.plain_text(of)} (r = {hundredths(prefix['pearson'])}, n = {prefix['n']})"
        panel.set_title(title, fontsize=9)
        panel.set_xlim(0.6, 5.4)
        panel.set_ylim(-4, 104)
        panel.set_xticks(DIGITS)
        panel.set_xlabel("judge's score of the prefix", fontsize=8)
        if number % across == 0:
            panel.set_ylabel("continuations correct (%)", fontsize=8)
        figures.plain_axes(panel)
    for panel in panels[len(prefixes) :]:
        panel.remove()
    figures.legend_below(figure, *panels[0].get_legend_handles_labels(), fontsize=7)
    return figure
