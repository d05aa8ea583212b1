"""Table and figures from the runs of configs/mini/table.py: what is there is shown, what is not is left out."""

from __future__ import annotations

import json
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from configs.mini.plan import QUICK, STAGE_1, VARIANTS
from exprl_jax.evaluation.curves import write_curves
from exprl_jax.evaluation.report_page import read_workdirs
from exprl_jax.evaluation.tables import EvaluatedModel, read_results
from exprl_jax.files import read_jsonl, write_atomically
from exprl_jax.text_tables import as_csv, markdown

COLUMNS = (
    "policy",
    "seeds",
    "rollouts",
    "held-out pass@1",
    "pass@16",
    "unsolved in training set",
    "at the end",
    "minutes",
)
VARIANT_COLUMNS = ("variant", "seeds", "best held-out pass@1 (step)", "at the last step", "collapse", "at the end")
_POINT = ("step", "solve/accuracy", "solve/none", "segments/mean", "evaluate/pass@1", "evaluate/pass@16")
BEGIN, END = "<!-- table -->", "<!-- end -->"
_LAST = 10  # steps that what is said of a run's end is the mean of
_WINDOW = 5  # steps that an accuracy is the mean of where a collapse is looked for
Row = Mapping[str, Any]


class Run(NamedTuple):
    """What a job of training left.

    Attributes:
      rows: its metrics; empty for the base.
      curve: the same with the evaluation before the first step.
      evaluated: its policy on the held-out set and on the training set.
      rollouts: drawn while training, those of the Stage I before it left out.
    """

    rows: Sequence[Row]
    curve: Sequence[Row]
    evaluated: EvaluatedModel
    rollouts: int


def read(root: pathlib.Path, name: str) -> Run | None:
    """A job with its evaluation; None where it has none."""
    results = root / f"{name}-eval" / "results.json"
    if not results.exists():
        return None
    metrics = root / name / "metrics.jsonl"
    curve = list(read_jsonl(metrics)) if metrics.exists() else []
    rows = [row for row in curve if row["step"]]
    rollouts = 0
    if rows and "reward/mean" in rows[0]:
        rollout = json.loads((root / name / "config.json").read_text())["rollout"]
        rollouts = len(rows) * rollout["prompts"] * rollout["group"]
    return Run(rows, curve, read_results(results), rollouts)


def read_all(root: pathlib.Path, difficulty: str) -> dict[str, dict[int, Run]]:
    """Runs by label and seed, in the order of the table; the base has the seed 0."""
    names = {"base": f"{difficulty}/base"}
    found: dict[str, dict[int, Run]] = {}
    if (base := read(root, names["base"])) is not None:
        found["base"] = {0: base}
    seeds = sorted({int(p.name.removesuffix("-eval").split("-")[1]) for p in (root / difficulty).glob("*-*-eval")})
    arms = {arm: label for arm, (label, *_) in STAGE_1.items()}
    labels = {f"{arm}-{{}}": label for arm, label in arms.items()}
    labels |= {f"{arm}-{{}}-stage2": f"Stage II from {label}" for arm, label in ({"base": "base"} | arms).items()}
    for pattern, label in labels.items():
        runs = {seed: read(root, f"{difficulty}/{pattern.format(seed)}") for seed in seeds}
        if kept := {seed: run for seed, run in runs.items() if run is not None}:
            found[label] = kept
    return found


def table_rows(runs: Mapping[str, Mapping[int, Run]]) -> list[list[str]]:
    """The table without its header: percentages as means over seeds, with each seed's value where there are several;
    with a 95 % interval over problems where there is one."""
    made = []
    for label, by_seed in runs.items():
        several = list(by_seed.values())
        held, train = ([run.evaluated.sets[i] for run in several] for i in (0, 1))
        end = _end([run.rows for run in several])
        minutes = statistics.fmean(sum(row["time/step_seconds"] for row in run.rows) for run in several) / 60
        made.append(
            [
                label,
                str(len(several)) if several[0].rows else "–",
                str(several[0].rollouts) if several[0].rollouts else "–",
                _share([(x.pass_at_k[0], x.low[0], x.high[0]) for x in held]),
                _share([(x.pass_at_k[15], x.low[15], x.high[15]) for x in held]),
                _share([(1 - x.pass_at_k[15], 1 - x.high[15], 1 - x.low[15]) for x in train]),
                end or "–",
                f"{minutes:.1f}" if several[0].rows else "–",
            ]
        )
    return made


def curve_rows(runs: Mapping[str, Mapping[int, Run]]) -> list[list[str]]:
    """Held-out pass@1 / unsolved problems in percent by step of Stage I, a line for each run, with a header; nothing
    where no run was evaluated on its way."""
    lines: dict[str, dict[int, str]] = {}
    for label in (label for label, *_ in STAGE_1.values()):
        for seed, run in runs.get(label, {}).items():
            measured = [row for row in run.curve if row.get("evaluate/pass@1") is not None]
            cells = {
                row["step"]: f"{100 * row['evaluate/pass@1']:.1f} / {100 * row['evaluate/unsolved']:.0f}"
                for row in measured
            }
            if cells:
                lines[f"{label}, seed {seed}"] = cells
    steps = sorted({step for cells in lines.values() for step in cells})
    return [
        ["", *map(str, steps)],
        *([name, *(cells.get(step, "") for step in steps)] for name, cells in lines.items()),
    ]


def read_variants(root: pathlib.Path, difficulty: str) -> dict[str, dict[int, Sequence[Row]]]:
    """Metrics by label and seed of DeltaNorm, of its `VARIANTS`, and of what it is compared with."""
    names = {"process": "DeltaNorm"} | {f"process_{name}": label for name, (label, _) in VARIANTS.items()}
    names |= {name: STAGE_1[name][0] for name in ("end", "group", "outcome")}
    found: dict[str, dict[int, Sequence[Row]]] = {}
    for name, label in names.items():
        for folder in sorted((root / difficulty).glob(f"{name}-*/metrics.jsonl")):
            seed = folder.parent.name.removeprefix(f"{name}-")
            if seed.isdecimal() and (folder.parent / "export").exists():
                found.setdefault(label, {})[int(seed)] = list(read_jsonl(folder))
    return found


def variant_rows(variants: Mapping[str, Mapping[int, Sequence[Row]]]) -> list[list[str]]:
    """The variants' table without its header: each seed's value."""
    made = []
    for label, by_seed in variants.items():
        curves = [[(r["step"], r.get("evaluate/pass@1")) for r in rows] for rows in by_seed.values()]
        curves = [[(step, 100 * value) for step, value in curve if value is not None] for curve in curves]
        best = [max(curve, key=lambda point: point[1]) for curve in curves]
        trained = [[row for row in rows if row["step"]] for rows in by_seed.values()]
        steps = [collapse([row["solve/accuracy"] for row in rows]) for rows in trained]
        made.append(
            [
                label,
                ", ".join(map(str, by_seed)),
                ", ".join(f"{value:.1f} ({step})" for step, value in best),
                ", ".join(f"{curve[-1][1]:.1f}" for curve in curves),
                ", ".join("–" if step is None else f"step {step}" for step in steps),
                _end(trained),
            ]
        )
    return made


def collapse(accuracies: Sequence[float]) -> int | None:
    """The first step from which a run's accuracy, as the mean over five steps, is less than half of its highest before;
    None where that does not come, or where there was never a tenth to lose."""
    means = [statistics.fmean(accuracies[i : i + _WINDOW]) for i in range(len(accuracies) - _WINDOW + 1)]
    highest = 0.0
    for i, mean in enumerate(means):
        highest = max(highest, mean)
        if highest >= 0.1 and mean < highest / 2:
            return i + 1
    return None


def write(root: pathlib.Path, output: pathlib.Path, page: pathlib.Path, difficulties: Sequence[str]) -> None:
    """Writes curves.csv, curves_<difficulty>.png of `QUICK`'s arms, and a page's table, between `BEGIN` and `END`.

    Raises:
      ValueError: the page has no such lines.
    """
    output.mkdir(parents=True, exist_ok=True)
    parts, points = [], []
    for difficulty in difficulties:
        runs = read_all(root, difficulty)
        if runs:
            parts.append(f"**{difficulty}**\n\n{markdown([COLUMNS, *table_rows(runs)])}\n")
        if len(by_step := curve_rows(runs)) > 1:
            told = "held-out pass@1 / unsolved problems of 16 samples, in percent, by step"
            parts.append(f"**{difficulty}: {told}**\n\n{markdown(by_step)}\n")
        for label, by_seed in runs.items():
            for seed, run in by_seed.items():
                at = difficulty, label, seed
                points += [[*at, *(row.get(name) for name in _POINT)] for row in run.rows if "solve/none" in row]
        if len(variants := read_variants(root, difficulty)) > 1 and "DeltaNorm" in variants:
            table = markdown([VARIANT_COLUMNS, *variant_rows(variants)])
            parts.append(f"**{difficulty}: variants of DeltaNorm, and what becomes of them**\n\n{table}\n")
            for label in [label for label, _ in VARIANTS.values() if label in variants]:
                for seed, rows in variants[label].items():
                    at = difficulty, label, seed
                    points += [[*at, *(row.get(name) for name in _POINT)] for row in rows if row["step"]]
        folders = [path.parent for path in sorted((root / difficulty).glob("*/metrics.jsonl"))]
        drawn = [folder for folder in folders if folder.name.rpartition("-")[0] in QUICK]
        curves = read_workdirs(drawn)[0].runs if drawn else []
        if curves := [run for run in curves if "evaluate/pass@1" in run["series"]]:
            write_curves(curves, output / f"curves_{difficulty}.png")
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{page}: expected a line {BEGIN} and after it a line {END}, between which the table goes")
    write_atomically(page, "\n".join([f"{before}{begin}\n", *parts, f"{end}{after}"]))
    header = ["difficulty", "run", "seed", *_POINT]
    write_atomically(output / "curves.csv", as_csv(header, points))


def _end(runs: Sequence[Sequence[Row]]) -> str:
    """The last steps of runs of RL, as means over their seeds; nothing of other runs."""
    if not runs[0] or "reward/mean" not in runs[0][0]:
        return ""
    names = ("solve/accuracy", "policy/entropy", "response/length_mean", "segments/mean")
    accuracy, entropy, length, segments = (
        statistics.fmean(_mean(rows[-_LAST:], name) or 0.0 for rows in runs) for name in names
    )
    end = f"accuracy {100 * accuracy:.0f}, entropy {entropy:.3f}, length {length:.0f}"
    return end + (f", segments {segments:.1f}" if segments > 1 else "")


def _mean(rows: Sequence[Row], name: str) -> float | None:
    values = [row[name] for row in rows if row.get(name) is not None]
    return statistics.fmean(values) if values else None


def _share(measured: Sequence[tuple[float | None, float | None, float | None]]) -> str:
    """(value, low, high) of each seed in percent."""
    values = [100 * value for value, _, _ in measured if value is not None]
    if not values:
        return "–"
    if len(values) > 1:
        return f"{statistics.fmean(values):.1f} ({', '.join(f'{value:.1f}' for value in values)})"
    _, low, high = measured[0]
    return f"{values[0]:.1f}" + ("" if low is None or high is None else f" [{100 * low:.1f}, {100 * high:.1f}]")
