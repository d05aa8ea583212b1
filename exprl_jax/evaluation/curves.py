"""The curves of evaluations inside runs as one picture: pass@1 and unsolved problems over steps, runs side by side."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from exprl_jax.evaluation import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANELS = {
    "evaluate/pass@1": "held-out pass@1",
    "evaluate/training_pass@1": "pass@1 on training problems",
    "evaluate/unsolved": "unsolved held-out problems",
    "evaluate/training_unsolved": "unsolved training problems",
}


def points_of(run: Mapping[str, Any], key: str) -> tuple[list[int], list[float]]:
    """The steps at which a run has a metric, and its values there.

    Args:
      run: `steps`, and `series` of as many values or nulls by metric, as of `report_page.Contents`.
    """
    pairs = [(step, y) for step, y in zip(run["steps"], run["series"].get(key, ())) if y is not None]
    return [step for step, _ in pairs], [y for _, y in pairs]


def curves_figure(runs: Sequence[Mapping[str, Any]]) -> Figure:
    """A panel for each of the metrics that some run has, a line for each run.

    Runs whose names differ in a number at the end alone, `grpo-1` and `grpo-2`, have one colour.

    Args:
      runs: as of `report_page.Contents`.

    Raises:
      ValueError: no run has any.
    """
    panels = [key for key in _PANELS if any(points_of(run, key)[0] for run in runs)]
    if not panels:
        raise ValueError("no curves: none of these runs was evaluated on its way; set evaluate.every")
    rows, columns = -(-len(panels) // 2), min(2, len(panels))
    figure = figures.new_figure(3.6 * columns, 2.5 * rows + 0.25 * (1 + len(runs) // 2))
    grid = figure.subplots(rows, columns, squeeze=False).flat
    lines: dict[int, Any] = {}
    styles = _styles([run["name"] for run in runs])
    for axes, key in zip(grid, panels):
        for number, run in enumerate(runs):
            steps, values = points_of(run, key)
            if steps:
                (lines[number],) = axes.plot(
                    steps, [100 * value for value in values], **styles[number], markersize=3.5, linewidth=1.4
                )
        axes.set_title(f"{_PANELS[key]}, %", fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        figures.plain_axes(axes, grid="both")
    for axes in grid:  # a place without a panel
        axes.set_axis_off()
    names = [figures.plain_text(runs[number]["name"]) for number in sorted(lines)]
    figures.legend_below(figure, [lines[number] for number in sorted(lines)], names, ncols=min(4, len(names)))
    return figure


def _styles(names: Sequence[str]) -> list[dict[str, str]]:
    """Colour by the names without a number at their end, dashes and marker by the place among those of one colour; more
    than there are colours go on with other dashes."""
    stems = [re.sub(r"-\d+$", "", name) for name in names]
    order, made = list(dict.fromkeys(stems)), []
    for i, stem in enumerate(stems):
        again, colour = divmod(order.index(stem), len(figures.COLOURS))
        place = stems[:i].count(stem)
        made.append(
            {
                "color": figures.COLOURS[colour],
                "linestyle": figures.DASHES[(place + again) % len(figures.DASHES)],
                "marker": figures.MARKERS[(colour + place) % len(figures.MARKERS)],
            }
        )
    return made


def write_curves(runs: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Writes the picture as a PNG.

    Raises:
      ValueError: there is nothing to draw, or the file cannot be written.
    """
    figure = curves_figure(runs)
    try:
        figures.save_figure(figure, path)
    except OSError as error:
        raise ValueError(f"{path} could not be written ({error.strerror})") from error
