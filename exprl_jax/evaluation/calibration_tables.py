"""What a calibration says: `results.json`, `calibration.csv`, a table, histograms and the prefix check as figures."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from exprl_jax.config import Calibrate
from exprl_jax.evaluation.calibration import agreement, auroc, error_rates, histogram, likelihood, spread
from exprl_jax.evaluation.fixed_rollouts import Rollout
from exprl_jax.files import write_atomically
from exprl_jax.reward.judge_prompts import DIGITS
from exprl_jax.reward.verifiers.verdict import Verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONDITIONS = ("correct", "none", "wrong")
_SHOWN = {"correct": "with reference", "none": "no reference", "wrong": "wrong reference"}
_RIGHT, _WRONG = "#0072B2", "#D55E00"  # of Okabe and Ito's palette
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Line:
    """A judge under one condition on the rollouts of one domain.  Rates are fractions; None where undefined.

    Attributes:
      order: `trace_last`, as in training, or `reference_last`, as in the released templates.
      domain: or `all`.
      rollouts: with a verdict that says something.
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
    rollouts: Sequence[Rollout],
    counts: Mapping[str, int],
    scores: Sequence[Row],
    continuations: Sequence[Row],
) -> None:
    """Writes the files of a calibration and prints its table.

    Args:
      rollouts: those with a verdict that says something.
      counts: of rollouts, for `results.json`.
      scores, continuations: the rows of the two ledgers.
    """
    correct = {_place(r.problem.id, r.number): r.verdict == Verdict.correct for r in rollouts}
    judges = list(config.judges)
    lines = calibration_lines(judges, rollouts, scores)
    whole = {judge: {c: _scores(scores, judge, c, "trace_last") for c in CONDITIONS} for judge in judges}
    histograms = [
        {"judge": judge, "condition": condition} | _counts(found, correct)
        for judge, of_judge in whole.items()
        for condition, found in of_judge.items()
    ]
    orders = []
    for judge in judges:
        ours, theirs = whole[judge]["correct"], _scores(scores, judge, "correct", "reference_last")
        both = [key for key in ours if key in theirs]
        found = agreement(np.array([ours[key] for key in both]), np.array([theirs[key] for key in both]))
        orders.append({"judge": judge} | dataclasses.asdict(found))
    results = {
        "weights": {
            name: how.model.weights if how.backend == "local" else how.endpoint.model
            for name, how in config.judges.items()
        },
        "readouts": {name: how.readout for name, how in config.judges.items()},
        "counts": dict(counts),
        "calibration": [dataclasses.asdict(line) for line in lines],
        "histograms": histograms,
        "orders": orders,
        "repeats": [{"judge": judge} | dataclasses.asdict(spread(repeated_scores(scores, judge))) for judge in judges],
        "prefixes": [
            {"judge": judge} | dataclasses.asdict(likelihood(*prefix_pairs(scores, continuations, judge)))
            for judge in judges
        ],
    }
    write_atomically(folder / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
    write_atomically(folder / "calibration.csv", calibration_csv(lines))
    text = render_calibration(results)
    write_atomically(folder / "table.txt", text)
    written = ["results.json", "calibration.csv", "table.txt", "histograms.png"]
    _save(histogram_figure(histograms), folder / "histograms.png")
    if continuations:
        _save(prefix_figure(scores, continuations, results["prefixes"]), folder / "prefix_check.png")
        written.append("prefix_check.png")
    print(text)
    print("\n".join(f"  {folder / name}" for name in written), flush=True)


def calibration_lines(judges: Sequence[str], rollouts: Sequence[Rollout], scores: Sequence[Row]) -> list[Line]:
    """A line a judge, condition and domain, all domains first; the released order after the conditions."""
    of = {_place(r.problem.id, r.number): r for r in rollouts}
    domains = {"all": set(of)} | {
        domain: {key for key, r in of.items() if r.problem.domain == domain}
        for domain in sorted({r.problem.domain for r in rollouts})
    }
    lines = []
    for judge in judges:
        for condition, order in [*((c, "trace_last") for c in CONDITIONS), ("correct", "reference_last")]:
            rows = [row for row in scores if _is_whole(row, judge, condition, order)]
            for domain, within in domains.items():
                asked = [row for row in rows if _place(row["id"], row["rollout"]) in within]
                lines.append(_line(judge, condition, order, domain, within, asked, of))
    return lines


def _line(judge, condition, order, domain, within, asked: Sequence[Row], of: Mapping[Any, Rollout]) -> Line:
    scored = [row for row in asked if row["score"] is not None]
    score_N = np.array([_likert(row["score"]) for row in scored])
    correct_N = np.array([of[_place(row["id"], row["rollout"])].verdict == Verdict.correct for row in scored], bool)
    rates = error_rates(score_N, correct_N)
    return Line(
        judge=judge,
        condition=condition,
        order=order,
        domain=domain,
        rollouts=len(within),
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
    """The scores, 1 to 5, of each rollout that the judge was asked about several times."""
    found: dict[tuple[str, int], list[float]] = {}
    for row in scores:
        if row["judge"] == judge and row["repeat"] and row["score"] is not None:
            found.setdefault(_place(row["id"], row["rollout"]), []).append(_likert(row["score"]))
    return list(found.values())


def prefix_pairs(scores: Sequence[Row], continuations: Sequence[Row], judge: str) -> tuple[np.ndarray, np.ndarray]:
    """Score, 1 to 5, and success of each prefix that has both, [N] each."""
    right: dict[Any, int] = {}
    graded: dict[Any, int] = {}
    for row in continuations:
        key = *_place(row["id"], row["rollout"]), row["segment"]
        right[key], graded[key] = right.get(key, 0) + row["correct"], graded.get(key, 0) + row["graded"]
    pairs = []
    for row in scores:
        key = *_place(row["id"], row["rollout"]), row["segment"]
        if row["judge"] == judge and row["score"] is not None and graded.get(key, 0):
            pairs.append((_likert(row["score"]), right[key] / graded[key]))
    score_N, success_N = np.array(pairs, np.float64).reshape(-1, 2).T
    return score_N, success_N


def calibration_csv(lines: Sequence[Line]) -> str:
    """One row a judge, condition and domain; empty fields for what is undefined."""
    held = io.StringIO()
    writer = csv.writer(held, lineterminator="\n")
    writer.writerow([field.name for field in dataclasses.fields(Line)])
    writer.writerows([["" if v is None else v for v in dataclasses.astuple(line)] for line in lines])
    return held.getvalue()


def render_calibration(results: Mapping[str, Any]) -> str:
    """The table of the terminal, in percent."""
    header = [
        "judge",
        "condition",
        "domain",
        "scored",
        "misplaced",
        "FPR",
        "FNR",
        "AUROC",
        "parsed",
        "tokens",
        "seconds",
    ]
    body = [
        [
            line["judge"],
            line["condition"] if line["order"] == "trace_last" else "reference last",
            line["domain"],
            f"{line['scored']}/{line['rollouts']}",
            *(
                _percent(line[name])
                for name in ("misplacement", "false_positive", "false_negative", "auroc", "parse_rate")
            ),
            f"{line['tokens']:,}",
            f"{line['seconds']:.1f}",
        ]
        for line in results["calibration"]
    ]
    parts = [_table(header, body, left=3)]
    counts = results["counts"]
    parts.append(
        "percent, but counts, tokens and seconds; misplaced = (FPR + FNR) / 2; left out: "
        f"{counts['left_out']} rollouts that no verifier judged (missing, timed out)\n"
    )
    parts.append(
        _table(
            ["reference last against trace last", "n", "equal", "within 1", "kappa"],
            [
                [o["judge"], str(o["n"]), _percent(o["exact"]), _percent(o["within_one"]), _number(o["kappa"])]
                for o in results["orders"]
            ],
            left=1,
        )
    )
    if any(each["rollouts"] for each in results["repeats"]):
        parts.append(
            _table(
                ["repeated judgements (std, 1 to 5)", "rollouts", "within", "between"],
                [
                    [r["judge"], str(r["rollouts"]), _number(r["within"]), _number(r["between"])]
                    for r in results["repeats"]
                ],
                left=1,
            )
        )
    if any(each["n"] for each in results["prefixes"]):
        parts.append(
            _table(
                ["success after a prefix, by score", "n", *map(str, DIGITS), "pearson", "spearman"],
                [
                    [
                        p["judge"],
                        str(p["n"]),
                        *map(_percent, p["success_5"]),
                        _number(p["pearson"]),
                        _number(p["spearman"]),
                    ]
                    for p in results["prefixes"]
                ],
                left=1,
            )
        )
    return "\n".join(parts)


def histogram_figure(histograms: Sequence[Mapping[str, Any]]) -> Figure:
    """Shares of scores 1 to 5 among correct and wrong rollouts: rows are judges, columns conditions (Fig. 11a)."""
    figure, judges = _figure(), list(dict.fromkeys(each["judge"] for each in histograms))
    figure.set_size_inches(7.0, 1.75 * len(judges) + 0.7)
    panels = figure.subplots(len(judges), len(CONDITIONS), squeeze=False, sharey=True)
    digits = np.array(DIGITS)
    for each in histograms:
        panel = panels[judges.index(each["judge"])][CONDITIONS.index(each["condition"])]
        for shift, name, colour, hatch in ((-0.2, "correct", _RIGHT, ""), (0.2, "wrong", _WRONG, "///")):
            total = sum(each[name])
            panel.bar(
                digits + shift,
                [100 * count / total if total else 0 for count in each[name]],
                0.4,
                color=colour,
                hatch=hatch,
                edgecolor="white",
                linewidth=0.3,
                label=f"{name} rollouts",
            )
        panel.axvline(3.5, color="0.5", linewidth=0.8, linestyle=":")
        panel.set_xticks(digits)
        panel.set_ylim(0, 104)
        panel.text(
            0.04,
            0.96,
            f"n = {sum(each['correct'])} / {sum(each['wrong'])}",
            transform=panel.transAxes,
            va="top",
            fontsize=7,
        )
        _plain_axes(panel)
    for column, condition in enumerate(CONDITIONS):
        panels[0][column].set_title(_SHOWN[condition], fontsize=9)
        panels[-1][column].set_xlabel("judge's score", fontsize=8)
    for row, judge in enumerate(judges):
        panels[row][0].set_ylabel(f"{_plain(judge)}\nrollouts (%)", fontsize=8)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=2,
        fontsize=8,
        frameon=False,
        title="dotted: the judge says correct from 4 on (expected digits shown at the nearest); n = correct / wrong",
        title_fontsize=7,
    )
    return figure


def prefix_figure(scores: Sequence[Row], continuations: Sequence[Row], prefixes: Sequence[Mapping[str, Any]]) -> Figure:
    """Success of continuations over the score of their prefix: a dot a prefix, a line through the means (Fig. 11b)."""
    figure, across = _figure(), min(3, len(prefixes))
    down = math.ceil(len(prefixes) / across)
    figure.set_size_inches(0.6 + 2.6 * across, 2.3 * down + 0.5)
    panels = figure.subplots(down, across, squeeze=False, sharey=True).ravel()
    for place, (panel, each) in enumerate(zip(panels, prefixes, strict=False)):
        score_N, success_N = prefix_pairs(scores, continuations, each["judge"])
        # Whole scores would hide one another: a fixed shift apart, by place.
        shifted_N = score_N + 0.24 * ((np.arange(len(score_N)) * 0.618034) % 1 - 0.5)
        colour = _COLOURS[place % len(_COLOURS)]
        panel.plot(
            shifted_N,
            100 * success_N,
            "o",
            color=colour,
            markersize=2.5,
            alpha=0.35,
            markeredgewidth=0,
            label="a prefix",
        )
        means = [(digit, 100 * mean) for digit, mean in zip(DIGITS, each["success_5"]) if mean is not None]
        panel.plot(
            *zip(*means),
            "-" + _MARKERS[place % len(_MARKERS)],
            color="black",
            linewidth=1.2,
            markersize=4.5,
            label="mean",
        ) if means else None
        panel.set_title(f"{_plain(each['judge'])} (r = {_number(each['pearson'])}, n = {each['n']})", fontsize=9)
        panel.set_xlim(0.6, 5.4)
        panel.set_ylim(-4, 104)
        panel.set_xticks(DIGITS)
        panel.set_xlabel("judge's score of the prefix", fontsize=8)
        if place % across == 0:
            panel.set_ylabel("continuations correct (%)", fontsize=8)
        _plain_axes(panel)
    for panel in panels[len(prefixes) :]:
        panel.remove()
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=7, frameon=False
    )
    return figure


def _figure() -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _plain_axes(panel: Any) -> None:
    panel.grid(True, axis="y", color="0.9", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.tick_params(labelsize=7)
    panel.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: pathlib.Path) -> None:
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png")
    os.replace(partial, path)


def _scores(scores: Sequence[Row], judge: str, condition: str, order: str) -> dict[tuple[str, int], float]:
    rows = [row for row in scores if _is_whole(row, judge, condition, order) and row["score"] is not None]
    return {_place(row["id"], row["rollout"]): _likert(row["score"]) for row in rows}


def _is_whole(row: Row, judge: str, condition: str, order: str) -> bool:
    asked = row["judge"] == judge and row["condition"] == condition and row["order"] == order
    return asked and row["segment"] is None and not row["repeat"]


def _counts(found: Mapping[Any, float], correct: Mapping[Any, bool]) -> dict[str, list[int]]:
    return {
        name: histogram(np.array([score for key, score in found.items() if correct[key] == truth], np.float64)).tolist()
        for name, truth in (("correct", True), ("wrong", False))
    }


def _place(identity: str, number: int) -> tuple[str, int]:
    return identity, number


def _likert(score: float) -> float:
    """From 0..1, as files have it, to 1..5."""
    return 1 + 4 * score


def _table(header: Sequence[str], body: Sequence[Sequence[str]], left: int) -> str:
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
    lines = [
        "  ".join(text.ljust(w) if i < left else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths)))
        for row in [header, *body]
    ]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _plain(text: str) -> str:
    """Text that matplotlib does not take for mathematics."""
    return text.replace("$", r"\$")
