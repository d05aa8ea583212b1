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
import csv
import dataclasses
import io
import json
import math
import os
import pathlib
import sys
import typing
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from exprl_jax.evaluation.pass_at_k import Summary
from exprl_jax.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = "results.json"
# Okabe and Ito's palette, told apart by colour-blind readers; its yellow is too pale for a line.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", "--", ":")
_COLUMNS = 150  # characters of a table's line
_WIDTH = 7.0  # inches, the text width of a two-column page


@dataclasses.dataclass(frozen=True)
class Run:
    """One evaluation: what `results.json` holds.

    Attributes:
      label: what tables and figures call it.
      weights: where the policy's parameters came from.
      sets: a summary of each problem set.
    """

    label: str
    weights: str
    sets: tuple[Summary, ...]


def write_results(path: pathlib.Path, run: Run) -> None:
    """Writes a run as `results.json`."""
    write_atomically(path, json.dumps(dataclasses.asdict(run), indent=1, allow_nan=False) + "\n")


def read_results(path: pathlib.Path) -> Run:
    """Reads what `write_results` wrote; a NaN is a number that was not measured.

    Raises:
      ValueError: naming what is missing or not as expected.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}): expected the workdir of a finished evaluation"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("sets"), list) or not found["sets"]:
        raise ValueError(f"{path} has no sets: expected an object with label, weights and a list of sets")
    if not isinstance(found.get("label"), str) or not isinstance(found.get("weights"), str):
        raise ValueError(f"{path}: label and weights must be strings")
    sets = tuple(_summary(path, fields) for fields in found["sets"])
    names = [summary.name for summary in sets]
    if len(set(names)) != len(names):
        raise ValueError(f"{path} has a set twice: got {', '.join(names)}; expected one summary a set")
    return Run(found["label"], found["weights"], sets)


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


def set_names(runs: Sequence[Run]) -> list[str]:
    """The sets of all runs, in the order in which they first appear."""
    return list(dict.fromkeys(summary.name for run in runs for summary in run.sets))


def render_table(runs: Sequence[Run]) -> str:
    """The table of the terminal, in percent: pass@1 and pass@16 with their 95 % intervals, and majority vote.

    Where a set has fewer than 16 samples a problem in some run, the largest k that all runs have stands for 16.  Sets
    that do not fit side by side follow below.  Under the table stands what keeps columns from being compared, and what
    was left out.
    """
    labels = ("run", *(run.label for run in runs))
    groups, notes = [], ["percent [95 % interval over problems]; set: problems × samples a problem"]
    for name in set_names(runs):
        found = [_find(run, name) for run in runs]
        present = [summary for summary in found if summary]
        sizes = {summary.problems + summary.ungraded for summary in present}
        samples = {summary.n for summary in present}
        columns = [
            (f"pass@{k}", *(_interval(summary, k) if summary else "–" for summary in found))
            for k in sorted({1, min(16, *samples)})
        ]
        if any(summary.majority is not None for summary in present):
            columns.append(
                (f"maj@{_sizes(samples)}", *(_percent(summary.majority if summary else None) for summary in found))
            )
        groups.append(_beside(f"{name}: {_sizes(sizes)} × {_sizes(samples)}", columns))
        if len(sizes) > 1:
            notes.append(f"{name}: the runs have different numbers of problems and cannot be compared")
        for run, summary in zip(runs, found, strict=True):
            if summary and summary.missing:
                notes.append(
                    f"{name}, {run.label}: {summary.missing} samples were not graded and are left out"
                    + (f", with them {summary.ungraded} whole problems" if summary.ungraded else "")
                )
    margin = _beside("", [labels], left=True)
    blocks = [list(margin)]
    for group in groups:
        if len(blocks[-1][0]) > len(margin[0]) and len(blocks[-1][0]) + 3 + len(group[0]) > _COLUMNS:
            blocks.append(list(margin))
        blocks[-1] = [f"{line}   {more}" for line, more in zip(blocks[-1], group, strict=True)]
    return "\n\n".join("\n".join(line.rstrip() for line in lines) for lines in [*blocks, notes]) + "\n"


def _beside(heading: str, columns: Sequence[Sequence[str]], left: bool = False) -> list[str]:
    """Columns side by side below a heading, as lines of one width."""
    widths = [max(map(len, column)) for column in columns]
    rows = zip(*columns, strict=True)
    lines = [
        "  ".join(text.ljust(w) if left else text.rjust(w) for text, w in zip(row, widths, strict=True)) for row in rows
    ]
    width = max(len(heading), len(lines[0]))
    return [heading.ljust(width), *(line.ljust(width) if left else line.rjust(width) for line in lines)]


def summary_csv(runs: Sequence[Run]) -> str:
    """One row a run and set: every number of a `Summary` that is not a curve, and pass@1 and pass@n."""
    names = [
        field.name for field in dataclasses.fields(Summary) if field.name not in ("name", "pass_at_k", "low", "high")
    ]
    rows = [
        [run.label, run.weights, summary.name]
        + [_field(getattr(summary, name)) for name in names]
        + [_field(summary.pass_at_k[0]), _field(summary.pass_at_k[-1])]
        for run in runs
        for summary in run.sets
    ]
    return _csv(["run", "weights", "set", *names, "pass_at_1", "pass_at_n"], rows)


def curves_csv(runs: Sequence[Run]) -> str:
    """One row a run, set and k."""
    rows = [
        [run.label, summary.name, k, *map(_field, point)]
        for run in runs
        for summary in run.sets
        for k, point in enumerate(zip(summary.pass_at_k, summary.low, summary.high, strict=True), start=1)
    ]
    return _csv(["run", "set", "k", "pass_at_k", "low", "high"], rows)


def pass_at_k_figure(runs: Sequence[Run], names: Sequence[str]) -> Figure:
    """pass@k in percent over log₂ k, one panel a set, one line and 95 % band a run; what was not measured is a gap."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

    across = min(len(names), 2 if len(names) in (2, 4) else 3)
    down = math.ceil(len(names) / across)
    width = _WIDTH if across > 1 else 0.6 * _WIDTH
    legend_columns = max(1, min(len(runs), int(12 * width / (max(len(run.label) for run in runs) + 6))))
    legend_rows = math.ceil(len(runs) / legend_columns)
    size = (width, (2.3 if across > 1 else 2.7) * down + 0.18 * legend_rows + 0.2)
    figure = Figure(figsize=size, dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(down, across, squeeze=False).ravel()
    lines, banded = {}, False
    for panel, name in zip(panels, names, strict=False):
        shown = [summary for summary in (_find(run, name) for run in runs) if summary]
        largest = max(summary.n for summary in shown)
        for place, run in enumerate(runs):
            summary = _find(run, name)
            if summary is None:
                continue
            k = range(1, summary.n + 1)
            middle, low, high = (
                [math.nan if value is None else 100 * value for value in curve]
                for curve in (summary.pass_at_k, summary.low, summary.high)
            )
            colour = _COLOURS[place % len(_COLOURS)]
            panel.fill_between(k, low, high, color=colour, alpha=min(0.15, 0.4 / len(runs)), linewidth=0)
            for edge in (low, high):
                panel.plot(k, edge, color=colour, alpha=0.4, linewidth=0.5)
            measured = [i for i, bound in enumerate(low) if not math.isnan(bound)]
            if len(measured) == 1:  # a band of no width
                panel.vlines(measured[0] + 1, low[measured[0]], high[measured[0]], color=colour, linewidth=1.0)
            banded = banded or bool(measured)
            (lines[place],) = panel.plot(
                k,
                middle,
                _DASHES[place // len(_COLOURS) % len(_DASHES)],
                color=colour,
                linewidth=1.3,
                marker=_MARKERS[place % len(_MARKERS)],
                markersize=3.5,
                markevery=_powers(summary.n),
            )
        panel.set_xscale("log", base=2)
        panel.set_xlim(1 / 1.12, largest * 1.12) if largest > 1 else panel.set_xlim(0.7, 1.4)
        panel.xaxis.set_major_locator(FixedLocator([1 << i for i in range(largest.bit_length())]))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_formatter("{x:.0f}")
        bottom, top = panel.get_ylim()
        panel.set_ylim(max(bottom, -3), min(top, 103))
        ticks = MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(bottom, top)
        panel.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if 0 <= tick <= 100]))
        sizes = {summary.problems for summary in shown}
        panel.set_title(f"{_plain(name)} ({_sizes(sizes)} problem{'s' * (sizes != {1})})", fontsize=9)
        panel.grid(True, color="0.9", linewidth=0.6)
        panel.tick_params(labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_xlabel("k", fontsize=8)
    for number, panel in enumerate(panels):
        if number >= len(names):
            panel.remove()
        elif number % across == 0:
            panel.set_ylabel("pass@k (%)", fontsize=8)
    order = sorted(lines)
    figure.legend(
        [lines[place] for place in order],
        [_plain(runs[place].label) for place in order],
        loc="outside lower center",
        ncols=math.ceil(len(order) / legend_rows),
        fontsize=8,
        frameon=False,
        title="bands: 95 % interval over problems" if banded else None,
        title_fontsize=7,
    )
    return figure


def write_tables(runs: Sequence[Run], folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes tables and figures of runs into a folder; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    names = set_names(runs)
    texts = {"table.txt": render_table(runs), "summary.csv": summary_csv(runs), "pass_at_k.csv": curves_csv(runs)}
    for name, text in texts.items():
        write_atomically(folder / name, text)
    panels = {f"pass_at_k_{name}.png": [name] for name in names}
    if len(names) > 1:
        panels["pass_at_k.png"] = names
    for name, shown in panels.items():
        partial = folder / f".{name}.partial"
        pass_at_k_figure(runs, shown).savefig(partial, format="png")
        os.replace(partial, folder / name)
    return [folder / name for name in [*texts, *panels]]


def _find(run: Run, name: str) -> Summary | None:
    return next((summary for summary in run.sets if summary.name == name), None)


def _plain(text: str) -> str:
    """Text that matplotlib does not take for mathematics."""
    return text.replace("$", r"\$")


def _powers(n: int) -> list[int]:
    """Where markers stand: k = 1, 2, 4, ..."""
    return [(1 << i) - 1 for i in range(n.bit_length())]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _interval(summary: Summary, k: int) -> str:
    value, low, high = (curve[k - 1] for curve in (summary.pass_at_k, summary.low, summary.high))
    return _percent(value) if low is None or high is None else f"{_percent(value)} [{_percent(low)}, {_percent(high)}]"


def _sizes(sizes: set[int]) -> str:
    return "/".join(map(str, sorted(sizes)))


def _field(value: float | int | None) -> float | int | str:
    return "" if value is None else value


def _csv(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    held = io.StringIO()
    writer = csv.writer(held, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return held.getvalue()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"exprl_jax.evaluation.tables: {message}; for instance: {self.prog} runs/eval --output=tables\n")


def main(arguments: Sequence[str]) -> int:
    """Compares evaluations and returns the exit status."""
    parser = _Parser(prog="python -m exprl_jax.evaluation.tables", description="Compares evaluations side by side.")
    parser.add_argument("workdirs", metavar="workdir", nargs="+", type=pathlib.Path, help="of an evaluation")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="the folder to write into")
    given = parser.parse_args(arguments)
    try:
        runs = _told_apart(given.workdirs, [read_results(workdir / RESULTS) for workdir in given.workdirs])
        files = write_tables(runs, given.output)
    except (ValueError, OSError) as error:
        print(f"exprl_jax.evaluation.tables: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 1
    print((given.output / "table.txt").read_text(encoding="utf-8"))
    print("\n".join(map(str, files)))
    return 0


def _told_apart(workdirs: Sequence[pathlib.Path], runs: Sequence[Run]) -> list[Run]:
    """Runs that share a label get their workdirs' names after it."""
    labels = [run.label for run in runs]
    apart = [
        dataclasses.replace(run, label=run.label + f" ({workdir.resolve().name})" * (labels.count(run.label) > 1))
        for workdir, run in zip(workdirs, runs, strict=True)
    ]
    if len({run.label for run in apart}) != len(apart):
        raise ValueError(
            f"two runs are called alike: got {', '.join(run.label for run in apart)}; name each workdir once"
        )
    return apart


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
