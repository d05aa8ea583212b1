"""Evaluations side by side: `python -m exprl_jax.evaluation.tables <workdir> [<workdir> ...] --output=<folder>`.

Reads the `results.json` of each evaluation, prints a table with one row a run, and writes into the folder

  table.txt              what was printed
  summary.csv            one row a run and set: every number of `Summary`
  pass_at_k.csv          one row a run, set and k
  pass_at_k_<set>.png    pass@k over k, one line a run, with 95 % bands (the form of the paper's Fig. 2 and 10)
  pass_at_k.png          the same, one panel a set, where there are several

A number that was not measured is a dash in the table, an empty field in CSV and a gap in a line.  What cannot work ends
with one line on stderr and exit status 1 (2 for a wrong command line).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import sys
import typing
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from exprl_jax.evaluation import figures
from exprl_jax.evaluation.pass_at_k import Summary
from exprl_jax.files import write_atomically
from exprl_jax.text_tables import align, as_csv, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESULTS = "results.json"
_COLUMNS = 150  # characters of a table's line
_WIDTH = 7.0  # inches, the text width of a two-column page


@dataclasses.dataclass(frozen=True)
class EvaluatedModel:
    """One evaluation: what `results.json` holds.

    Attributes:
      label: what tables and figures call it.
      weights: where the policy's parameters came from.
      sets: a summary of each problem set.
    """

    label: str
    weights: str
    sets: tuple[Summary, ...]

    def summary(self, name: str) -> Summary | None:
        """Of the set of that name, if the model was evaluated on it."""
        return next((summary for summary in self.sets if summary.name == name), None)


def write_results(path: pathlib.Path, model: EvaluatedModel) -> None:
    """Writes an evaluation as `results.json`."""
    write_atomically(path, json.dumps(dataclasses.asdict(model), indent=1, allow_nan=False) + "\n")


def read_results(path: pathlib.Path) -> EvaluatedModel:
    """Reads what `write_results` wrote; a NaN is a number that was not measured.

    Raises:
      ValueError: naming what is missing or not as expected.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}): expected the workdir of a finished evaluation"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(results, dict) or not isinstance(results.get("sets"), list) or not results["sets"]:
        raise ValueError(f"{path} has no sets: expected an object with label, weights and a list of sets")
    if not isinstance(results.get("label"), str) or not isinstance(results.get("weights"), str):
        raise ValueError(f"{path}: label and weights must be strings")
    sets = tuple(_summary(path, fields) for fields in results["sets"])
    names = [summary.name for summary in sets]
    if len(set(names)) != len(names):
        raise ValueError(f"{path} has a set twice: got {', '.join(names)}; expected one summary a set")
    return EvaluatedModel(results["label"], results["weights"], sets)


def _summary(path: pathlib.Path, fields: Any) -> Summary:
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: a set must be an object, got {fields!r:.60}")
    where, types = f"{path}: set {fields.get('name')!r:.40}", typing.get_type_hints(Summary)
    absent = [name for name in types if name not in fields]
    if absent:
        raise ValueError(f"{where} has no {', '.join(absent)}: expected what this version's evaluation writes")
    values = {}
    for name, expected in types.items():
        value, curve = fields[name], name in ("pass_at_k", "low", "high")
        items = value if curve and isinstance(value, list) else [value]
        allowed = {str: str, int: int}.get(expected, (int, float) if expected is float else (int, float, type(None)))
        if (curve and (not isinstance(value, list) or len(value) != fields["n"])) or not all(
            isinstance(item, allowed) and not isinstance(item, bool) for item in items
        ):
            raise ValueError(f"{where}: {name} must be {'a list of n ' * curve}{expected}, got {value!r:.60}")
        values[name] = tuple(value) if curve else value
    if values["n"] < 1:
        raise ValueError(f"{where}: n must be at least 1, got {values['n']}")
    if not values["name"] or "/" in values["name"]:
        raise ValueError(f"{where}: the name must be fit for a file's, without /")
    return Summary(**values)


def set_names(models: Sequence[EvaluatedModel]) -> list[str]:
    """The sets of all models, in the order in which they first appear."""
    return list(dict.fromkeys(summary.name for model in models for summary in model.sets))


# ------------------------------------------------------------------------------------------------ tables


def render_table(models: Sequence[EvaluatedModel]) -> str:
    """The table of the terminal, in percent: pass@1 and pass@16 with their 95 % intervals, and majority vote.

    Where a set has fewer than 16 samples a problem of some model, the largest k that all have stands for 16.  Sets that
    do not fit side by side follow below.  Under the table stands what keeps columns from being compared, and what was
    left out.
    """
    groups, notes = [], ["percent [95 % interval over problems]; set: problems × samples a problem"]
    for name in set_names(models):
        summaries = [model.summary(name) for model in models]
        measured = [summary for summary in summaries if summary]
        sizes = {summary.problems + summary.ungraded for summary in measured}
        samples = {summary.n for summary in measured}
        columns = [
            (f"pass@{k}", *(_interval(summary, k) if summary else "–" for summary in summaries))
            for k in sorted({1, min(16, *samples)})
        ]
        if any(summary.majority is not None for summary in measured):
            votes = (percent(summary.majority if summary else None) for summary in summaries)
            columns.append((f"maj@{_sizes(samples)}", *votes))
        groups.append(_under(f"{name}: {_sizes(sizes)} × {_sizes(samples)}", align(zip(*columns), left=0)))
        if len(sizes) > 1:
            notes.append(f"{name}: the runs have different numbers of problems and cannot be compared")
        for model, summary in zip(models, summaries, strict=True):
            if summary and summary.missing:
                notes.append(
                    f"{name}, {model.label}: {summary.missing} samples were not graded and are left out"
                    + (f", with them {summary.ungraded} whole problems" if summary.ungraded else "")
                )
    labels = [["run"], *([model.label] for model in models)]
    width = max(len(label) for (label,) in labels)
    margin = [line.ljust(width) for line in ("", *align(labels).split("\n"))]
    blocks = [margin]
    for group in groups:
        if len(blocks[-1][0]) > width and len(blocks[-1][0]) + 3 + len(group[0]) > _COLUMNS:
            blocks.append(margin)
        blocks[-1] = [f"{line}   {more}" for line, more in zip(blocks[-1], group, strict=True)]
    return "\n\n".join("\n".join(line.rstrip() for line in lines) for lines in [*blocks, notes]) + "\n"


def _under(heading: str, table: str) -> list[str]:
    """A heading and the lines of a table, which is flush right, of one width."""
    lines = table.split("\n")
    width = max(len(heading), len(lines[0]))
    return [heading.ljust(width), *(line.rjust(width) for line in lines)]


def summary_csv(models: Sequence[EvaluatedModel]) -> str:
    """One row a model and set: every number of a `Summary` that is not a curve, and pass@1 and pass@n."""
    left_out = ("name", "pass_at_k", "low", "high")
    names = [field.name for field in dataclasses.fields(Summary) if field.name not in left_out]
    rows = [
        [model.label, model.weights, summary.name]
        + [getattr(summary, name) for name in names]
        + [summary.pass_at_k[0], summary.pass_at_k[-1]]
        for model in models
        for summary in model.sets
    ]
    return as_csv(["run", "weights", "set", *names, "pass_at_1", "pass_at_n"], rows)


def curves_csv(models: Sequence[EvaluatedModel]) -> str:
    """One row a model, set and k."""
    rows = [
        [model.label, summary.name, k, *point]
        for model in models
        for summary in model.sets
        for k, point in enumerate(zip(summary.pass_at_k, summary.low, summary.high, strict=True), start=1)
    ]
    return as_csv(["run", "set", "k", "pass_at_k", "low", "high"], rows)


def _interval(summary: Summary, k: int) -> str:
    value, low, high = (curve[k - 1] for curve in (summary.pass_at_k, summary.low, summary.high))
    return percent(value) if low is None or high is None else f"{percent(value)} [{percent(low)}, {percent(high)}]"


def _sizes(sizes: set[int]) -> str:
    return "/".join(map(str, sorted(sizes)))


# ------------------------------------------------------------------------------------------------ figures


def pass_at_k_figure(models: Sequence[EvaluatedModel], names: Sequence[str]) -> Figure:
    """pass@k in percent over log₂ k, a panel a set, a line and 95 % band a model; a gap where nothing was measured."""
    across = min(len(names), 2 if len(names) in (2, 4) else 3)
    down = math.ceil(len(names) / across)
    width = _WIDTH if across > 1 else 0.6 * _WIDTH
    longest = max(len(model.label) for model in models)
    legend_rows = math.ceil(len(models) / max(1, min(len(models), int(12 * width / (longest + 6)))))
    figure = figures.new_figure(width, (2.3 if across > 1 else 2.7) * down + 0.18 * legend_rows + 0.2)
    panels = figure.subplots(down, across, squeeze=False).ravel()
    lines = {}
    for panel, name in zip(panels, names, strict=False):
        summaries = {i: summary for i, model in enumerate(models) if (summary := model.summary(name))}
        for i, summary in summaries.items():
            lines[i] = _draw_curve(panel, summary, i, alpha=min(0.15, 0.4 / len(models)))
        _label_panel(panel, name, list(summaries.values()))
    for number, panel in enumerate(panels):
        if number >= len(names):
            panel.remove()
        elif number % across == 0:
            panel.set_ylabel("pass@k (%)", fontsize=8)
    banded = any(bound is not None for model in models for s in model.sets if s.name in names for bound in s.low)
    figures.legend_below(
        figure,
        [lines[i] for i in sorted(lines)],
        [figures.plain_text(models[i].label) for i in sorted(lines)],
        ncols=math.ceil(len(lines) / legend_rows),
        title="bands: 95 % interval over problems" if banded else None,
    )
    return figure


def _draw_curve(panel: Axes, summary: Summary, number: int, alpha: float) -> Any:
    """A model's line, in its own colour, marker and dashes, and its band; returns the line."""
    k = range(1, summary.n + 1)
    middle, low, high = (
        [math.nan if value is None else 100 * value for value in curve]
        for curve in (summary.pass_at_k, summary.low, summary.high)
    )
    colour = figures.COLOURS[number % len(figures.COLOURS)]
    panel.fill_between(k, low, high, color=colour, alpha=alpha, linewidth=0)
    for edge in (low, high):
        panel.plot(k, edge, color=colour, alpha=0.4, linewidth=0.5)
    measured = [i for i, bound in enumerate(low) if not math.isnan(bound)]
    if len(measured) == 1:  # a band of no width
        panel.vlines(measured[0] + 1, low[measured[0]], high[measured[0]], color=colour, linewidth=1.0)
    (line,) = panel.plot(
        k,
        middle,
        figures.DASHES[number // len(figures.COLOURS) % len(figures.DASHES)],
        color=colour,
        linewidth=1.3,
        marker=figures.MARKERS[number % len(figures.MARKERS)],
        markersize=3.5,
        markevery=[(1 << i) - 1 for i in range(summary.n.bit_length())],  # k = 1, 2, 4, …
    )
    return line


def _label_panel(panel: Axes, name: str, summaries: Sequence[Summary]) -> None:
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

    largest = max(summary.n for summary in summaries)
    panel.set_xscale("log", base=2)
    panel.set_xlim(*((1 / 1.12, largest * 1.12) if largest > 1 else (0.7, 1.4)))
    panel.xaxis.set_major_locator(FixedLocator([1 << i for i in range(largest.bit_length())]))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter("{x:.0f}")
    bottom, top = panel.get_ylim()
    panel.set_ylim(max(bottom, -3), min(top, 103))
    ticks = MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(bottom, top)
    panel.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if 0 <= tick <= 100]))
    sizes = {summary.problems for summary in summaries}
    panel.set_title(f"{figures.plain_text(name)} ({_sizes(sizes)} problem{'s' * (sizes != {1})})", fontsize=9)
    figures.plain_axes(panel, grid="both")
    panel.set_xlabel("k", fontsize=8)


def write_tables(models: Sequence[EvaluatedModel], folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes tables and figures of evaluations into a folder; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    names = set_names(models)
    texts = {"table.txt": render_table(models), "summary.csv": summary_csv(models), "pass_at_k.csv": curves_csv(models)}
    for name, text in texts.items():
        write_atomically(folder / name, text)
    panels = {f"pass_at_k_{name}.png": [name] for name in names}
    if len(names) > 1:
        panels["pass_at_k.png"] = names
    for name, panel_names in panels.items():
        figures.save_figure(pass_at_k_figure(models, panel_names), folder / name)
    return [folder / name for name in [*texts, *panels]]


# ------------------------------------------------------------------------------------------------ the command


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"exprl_jax.evaluation.tables: {message}; for instance: {self.prog} runs/eval --output=tables\n")


def main(arguments: Sequence[str]) -> int:
    """Compares evaluations and returns the exit status."""
    parser = _Parser(prog="python -m exprl_jax.evaluation.tables", description="Compares evaluations side by side.")
    parser.add_argument("workdirs", metavar="workdir", nargs="+", type=pathlib.Path, help="of an evaluation")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="the folder to write into")
    options = parser.parse_args(arguments)
    try:
        models = [read_results(workdir / RESULTS) for workdir in options.workdirs]
        files = write_tables(with_unique_labels(options.workdirs, models), options.output)
    except (ValueError, OSError) as error:
        print(f"exprl_jax.evaluation.tables: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 1
    print((options.output / "table.txt").read_text(encoding="utf-8"))
    print("\n".join(map(str, files)))
    return 0


def with_unique_labels(workdirs: Sequence[pathlib.Path], models: Sequence[EvaluatedModel]) -> list[EvaluatedModel]:
    """Models that share a label get their workdirs' names after it.

    Raises:
      ValueError: two still have one label.
    """
    labels = [model.label for model in models]
    unique = [
        dataclasses.replace(model, label=model.label + f" ({workdir.resolve().name})" * (labels.count(model.label) > 1))
        for workdir, model in zip(workdirs, models, strict=True)
    ]
    if len({model.label for model in unique}) != len(unique):
        raise ValueError(
            f"two runs are called alike: got {', '.join(model.label for model in unique)}; name each workdir once"
        )
    return unique


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
