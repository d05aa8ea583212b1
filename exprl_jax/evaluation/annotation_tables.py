"""The output of an annotation: `results.json`, `annotations.csv`, a table, and against a base run a figure."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from exprl_jax.config import Annotate
from exprl_jax.evaluation import figures
from exprl_jax.evaluation.behaviour import ARCHETYPES, COUNTS, FIELDS, Change, compare, problem_means
from exprl_jax.files import write_atomically
from exprl_jax.text_tables import align, as_csv

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, Any]


def write_annotations(
    config: Annotate, folder: pathlib.Path, run_rows: Sequence[Row], base_rows: Sequence[Row]
) -> None:
    """Writes `results.json`, `annotations.csv`, `table.txt` and, against a base, `behaviour.png`; prints the table.

    Args:
      run_rows, base_rows: annotations as they are written; none of a base where there is no base.

    Raises:
      ValueError: an annotation has other fields than ours.
    """
    run, base = (
        problem_means([(row["id"], row["fields"]) for row in rows if row["fields"] is not None])
        for rows in (run_rows, base_rows)
    )
    # Without an annotation on either side there is nothing to compare, and the counts say so.
    changes = compare(run, base, config.seed) if run and base else []
    results = {
        "counts": {
            "rollouts": len(run_rows),
            "missing": sum(row["fields"] is None for row in run_rows),
            "problems": len(run),
            "base_rollouts": len(base_rows),
            "base_missing": sum(row["fields"] is None for row in base_rows),
            "base_problems": len(base),
            "tokens": sum(row["tokens"] for row in run_rows),
        },
        "means": dict(zip(FIELDS, np.mean(list(run.values()), axis=0).tolist(), strict=True)) if run else {},
        "changes": [dataclasses.asdict(change) for change in changes],
    }
    texts = {
        "results.json": json.dumps(results, indent=1, allow_nan=False) + "\n",
        "annotations.csv": annotations_csv(results["means"], changes),
        "table.txt": render_annotations(results, changes),
    }
    for name, text in texts.items():
        write_atomically(folder / name, text)
    if changes:
        figures.save_figure(changes_figure(changes), folder / "behaviour.png")
    print(texts["table.txt"])
    print("\n".join(f"  {folder / name}" for name in [*texts, *["behaviour.png"] * bool(changes)]), flush=True)


def annotations_csv(means: Mapping[str, float], changes: Sequence[Change]) -> str:
    """One row a field: the change against the base, or without a base the mean alone."""
    if not changes:
        return as_csv(["field", "run"], means.items())
    return as_csv([field.name for field in dataclasses.fields(Change)], map(dataclasses.astuple, changes))


def render_annotations(results: Mapping[str, Any], changes: Sequence[Change]) -> str:
    """The table of the terminal: means over problems of a rollout's 0 or 1, or of its count."""
    counts = results["counts"]
    notes = [
        f"{counts['rollouts']} rollouts of {counts['problems']} problems; {counts['missing']} without an annotation"
    ]
    rows = [["field", "run"], *([name, f"{mean:.2f}"] for name, mean in results["means"].items())]
    if changes:
        notes.append(
            f"base: {counts['base_rollouts']} rollouts; {counts['base_missing']} without an annotation; compared over "
            f"{changes[0].problems} problems"
        )
        rows = [["field", "base", "run", "change", "95 % interval", "gained", "lost", "same"]]
        for change in changes:
            measured = change.low is not None and change.high is not None
            interval = f"[{change.low:+.2f}, {change.high:+.2f}]" if measured else "–"
            values = [f"{change.base:.2f}", f"{change.run:.2f}", f"{change.difference:+.2f}", interval]
            rows.append([change.field, *values, change.gained, change.lost, change.unchanged])
    return "\n".join([align(rows, left=1), "", *notes]) + "\n"


def changes_figure(changes: Sequence[Change]) -> Figure:
    """Problems gained (to the right) and lost (to the left) by field, archetypes above behaviours."""
    figure = figures.new_figure(7.0, 5.4)
    archetypes = [change for change in changes if change.field in ARCHETYPES]
    habits = [change for change in changes if change.field not in ARCHETYPES]
    panels = figure.subplots(2, 1, sharex=True, height_ratios=[len(archetypes), len(habits)])
    most = max(1, *(max(change.gained, change.lost) for change in changes))
    parts = (("solution archetypes", archetypes), ("reasoning behaviours", habits))
    for panel, (title, part) in zip(panels, parts):
        rows, gained, lost = np.arange(len(part)), [c.gained for c in part], [-c.lost for c in part]
        panel.barh(rows, gained, color=figures.GOOD, label="problems gained")
        panel.barh(rows, lost, color=figures.BAD, hatch="///", label="problems lost", **figures.EDGES)
        for row, change in zip(rows, part):
            panel.text(change.gained + 0.01 * most, row, str(change.gained), va="center", fontsize=6)
            panel.text(-change.lost - 0.01 * most, row, str(change.lost), va="center", ha="right", fontsize=6)
        names = [f"{c.field} (count)" if c.field in COUNTS else c.field for c in part]
        figures.plain_axes(panel, grid="x", hidden=("top", "right", "left"))
        panel.set_yticks(rows, [name.replace("_", " ") for name in names], fontsize=7)
        panel.invert_yaxis()
        panel.axvline(0, color="black", linewidth=0.8)
        panel.set_xlim(-1.12 * most, 1.12 * most)
        panel.xaxis.set_major_formatter(lambda x, _: f"{abs(x):g}")
        panel.set_title(title, fontsize=9)
    panels[-1].set_xlabel(f"problems, of {changes[0].problems}", fontsize=8)
    figures.legend_below(figure, *panels[0].get_legend_handles_labels())
    return figure
