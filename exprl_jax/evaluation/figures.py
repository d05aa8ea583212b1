"""What all figures share: a palette, an empty figure, plain axes, and a file that is written whole or not at all."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by colour-blind readers; its yellow is too pale for a line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
GOOD, BAD = COLOURS[:2]
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", ":")
EDGES = {"edgecolor": "white", "linewidth": 0.3}  # of bars


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, drawn without a display; matplotlib is imported only here."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plain_axes(axes: Axes, grid: Literal["x", "y", "both"] = "y", hidden: Sequence[str] = ("top", "right")) -> None:
    """A faint grid behind the data, small tick labels, and no lines on the hidden sides."""
    axes.grid(True, axis=grid, color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=7)
    axes.spines[list(hidden)].set_visible(False)


def legend_below(figure: Figure, handles: Sequence[Any], labels: Sequence[str], **style: Any) -> None:
    """One legend for all panels, below them."""
    usual = dict(loc="outside lower center", ncols=2, fontsize=8, frameon=False, title_fontsize=7)
    figure.legend(handles, labels, **usual | style)


def plain_text(text: str) -> str:
    """Text that matplotlib does not take for mathematics."""
    return text.replace("$", r"\$")


def save_figure(figure: Figure, path: pathlib.Path) -> None:
    """Writes a PNG; a kill leaves the old file or the new."""
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png")
    os.replace(partial, path)
