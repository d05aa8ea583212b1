"""One HTML file from the workdirs of runs and evaluations: curves, pass@k, and a browser of sampled rollouts.

Python reads and thins what the workdirs hold and embeds it as JSON; `report.html` beside this file draws it.  Rollouts
are untrusted text: the JSON holds no character that HTML gives a meaning to, the page writes it only as text nodes, and
its content security policy lets no script run but the page's own, by hash, and no request leave the page.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import itertools
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from exprl_jax.config import Watch
from exprl_jax.evaluation.tables import RESULTS, read_results
from exprl_jax.files import parse_row, read_jsonl
from exprl_jax.metric_tables import explanations
from exprl_jax.resolve import differences
from exprl_jax.run.metrics import read_metrics
from exprl_jax.run.watch import RunWatch

TEMPLATE = pathlib.Path(__file__).with_name("report.html")

# What a run is, from the leaves of its config that say so; a config of another task has only some of them.
_ABOUT = {
    "task": ("task",),
    "route of math": ("routes.math",),
    "process estimator": ("advantage.estimator",),
    "rollout estimator": ("advantage.rollout_estimator",),
    "judge's unit": ("judge.unit",),
    "policy": ("policy.weights",),
    "judge": ("judge.function", "judge.model.weights", "judge.weights"),
    "problems": ("data.source",),
    "prompts a step": ("rollout.prompts",),
    "rollouts a prompt": ("rollout.group",),
    "response budget": ("rollout.max_tokens",),
    "learning rate": ("optimizer.learning_rate",),
}

_PROBLEM = ("id", "domain", "kind", "problem", "reference", "answer", "prompt")
_SEGMENT = ("text", "score", "advantage", "judge")
_TOKENS = ("token_text", "token_logp", "token_entropy")  # what rollouts of an earlier version do not have
_SHOWN_TEXT = 160  # characters of a problem in the table of evaluated ones
_HTML = {ord(character): f"\\u{ord(character):04x}" for character in "<>&"}


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a report shows, as JSON values.

    Attributes:
      runs: of training workdirs: name, folder, steps taken, metrics as columns, rollouts.
      evaluations: of evaluation workdirs: name, folder, and their results.json.
    """

    runs: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]

    def summary(self) -> str:
        """What a person wants to hear when the file is written."""
        rollouts = sum(len(run["rollouts"]["rows"]) for run in self.runs)
        return f"{len(self.runs)} runs, {rollouts} rollouts, {len(self.evaluations)} evaluations"


def read_workdirs(
    folders: Sequence[pathlib.Path], rollouts: int = 2000, rollout_bytes: int = 20_000_000
) -> tuple[Contents, list[str]]:
    """Reads workdirs of either sort, in the order given.

    Args:
      folders: a folder with metrics.jsonl is a run, one with results.json is an evaluation.
      rollouts: the most that the report may hold, over all runs.
      rollout_bytes: the most that they may take in it.

    Returns:
      (contents, one line for each folder that is neither or whose results cannot be read).

    Raises:
      ValueError: a folder does not exist, or a run's file is not what its name says.
    """
    folders = list(dict.fromkeys(folder.resolve() for folder in folders))
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder; expected the workdir of a run or of an evaluation")
    names = dict(zip(folders, _short_names(folders)))
    metrics = {folder: rows for folder in folders if (rows := read_metrics(folder / "metrics.jsonl"))}
    results, left_out = {}, []
    for folder in folders:
        try:
            if (folder / RESULTS).exists():
                results[folder] = dataclasses.asdict(read_results(folder / RESULTS))
            elif folder not in metrics:
                left_out.append(f"{folder}: holds neither a run's metrics.jsonl nor an evaluation's results.json")
        except ValueError as error:  # of another program, or damaged: no reason to do without the others
            left_out.append(str(error))
    share = max(sum((folder / "rollouts").is_dir() for folder in metrics), 1)
    runs = [
        {
            "name": names[folder],
            "folder": str(folder),
            "config": _config(folder),
            "steps": [row["step"] for row in rows],
            "series": _columns(rows),
            "rollouts": _rollouts(folder / "rollouts", rollouts // share, rollout_bytes // share),
            "evaluated": _evaluated(folder / "evaluations"),
            "warnings": _warnings(folder, rows),
        }
        for folder, rows in metrics.items()
    ]
    evaluations = [
        {"name": names[folder], "folder": str(folder), "config": _config(folder), **of_models}
        for folder, of_models in results.items()
    ]
    return Contents(runs, evaluations), left_out


def render(contents: Contents) -> str:
    """The page: `report.html` with the contents in it and a policy that admits its own script and style alone."""
    template = TEMPLATE.read_text(encoding="utf-8")
    style, script = (re.search(f"<{tag}>(.*?)</{tag}>", template, re.DOTALL)[1] for tag in ("style", "script"))
    policy = f"default-src 'none'; style-src {_source(style)}; script-src {_source(script)}; base-uri 'none'"
    data = {
        "runs": [_without_config(run) for run in contents.runs],
        "evaluations": [_without_config(evaluation) for evaluation in contents.evaluations],
        "about": _about(contents.runs),
        "differences": {"runs": _differing(contents.runs), "evaluations": _differing(contents.evaluations)},
        "metrics": _explained(contents.runs),
    }
    parts = {"POLICY": policy, "DATA": _embedded(data)}
    return re.sub("{{(POLICY|DATA)}}", lambda match: parts[match[1]], template)


def _explained(runs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What each metric is; one that means different things in these runs' tasks says all of them."""
    texts: dict[str, dict[str, None]] = {}
    for task in dict.fromkeys(str(run["config"].get("task", "rl")) for run in runs):
        for key, text in explanations(task).items():
            texts.setdefault(key, {})[text] = None
    return {key: "; or ".join(of_key) for key, of_key in texts.items()}


# ---------------------------------------------------------------------------------------------------- reading


def _short_names(folders: Sequence[pathlib.Path]) -> list[str]:
    """The shortest ends of their paths that tell all of them apart."""
    for parts in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return names


def _config(folder: pathlib.Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        return parse_row(path.read_text(encoding="utf-8"), surrogates=True) if path.exists() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from error


def _warnings(folder: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the run's watch has told of: a function of its metrics, so it is worked out from them again."""
    window = _leaf(_config(folder), "watch.window")
    if not isinstance(window, int):
        return []
    watch = RunWatch(Watch(window=window, strict=False), [])
    return [f"step {row['step']}: {line}" for row in rows if row["step"] > 0 for line in watch.new(row)]


def _evaluated(folder: pathlib.Path, most: int = 2000) -> dict[str, Any]:
    """How each problem fared in the evaluations inside a run.

    Returns:
      steps: of the evaluations; problems: of each its set, id, the beginning of its text, and at each step the share of
      graded samples that were right (null where none was graded), the first `most` problems; left_out: how many more.
    """
    paths = {int(path.stem.removeprefix("step_")): path for path in folder.glob("step_[0-9]*.jsonl")}
    steps, problems = sorted(paths), {}
    for column, step in enumerate(steps):
        for row in read_jsonl(paths[step], surrogates=True):
            about = {"set": row["set"], "id": row["id"], "problem": row["problem"][:_SHOWN_TEXT]}
            rates = problems.setdefault((row["set"], row["id"]), about | {"rates": [None] * len(steps)})["rates"]
            rates[column] = row["correct"] / row["graded"] if row["graded"] else None
    return {"steps": steps, "problems": list(problems.values())[:most], "left_out": max(0, len(problems) - most)}


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """Metrics by name, null where a row has null or does not have the key; keys that are null throughout are kept."""
    keys = sorted({key for row in rows for key in row} - {"step"})
    return {key: [row.get(key) for row in rows] for key in keys}


def _rollouts(folder: pathlib.Path, most: int, most_bytes: int) -> dict[str, Any]:
    """Rollouts of steps spread evenly from the first to the last, as many steps as the budget takes whole.

    Returns:
      steps: all steps that were logged; rows: the rollouts embedded, by step; problems: what they answer, each once;
      left_out: rollouts of the embedded steps that were too many or too large.
    """
    paths = {int(path.stem.removeprefix("step_")): path for path in sorted(folder.glob("step_[0-9]*.jsonl"))}
    steps = sorted(paths)
    problems: dict[str, int] = {}
    rows, left_out = [], 0
    if not steps:
        return {"steps": steps, "rows": rows, "problems": [], "left_out": left_out}

    # How many steps: as if all were like the last.  Those that turn out larger lose rollouts, so that the budget holds.
    last = [_embedded(_embedded_rollout(row)) for row in read_jsonl(paths[steps[-1]], surrogates=True)]
    affordable = min(most // max(len(last), 1), most_bytes // max(sum(map(len, last)), 1))
    kept = min(max(affordable, 2), len(steps))
    for step in (steps[i] for i in sorted(set(np.linspace(0, len(steps) - 1, kept).round().astype(int)))):
        count, size = 0, 0
        for row in read_jsonl(paths[step], surrogates=True):
            problem = _embedded({key: row[key] for key in _PROBLEM if key in row})
            rollout = {"step": step} | _embedded_rollout(row)
            size_with = size + len(_embedded(rollout)) + (len(problem) if problem not in problems else 0)
            if count + 1 > most // kept or size_with > most_bytes // kept:
                left_out += 1
                continue
            count, size = count + 1, size_with
            rows.append(rollout | {"problem": problems.setdefault(problem, len(problems))})
    return {"steps": steps, "rows": rows, "problems": list(map(json.loads, problems)), "left_out": left_out}


def _embedded_rollout(row: Mapping[str, Any]) -> dict[str, Any]:
    """A rollout without its problem, and without its response where that is its segments, one after another."""
    rollout = {key: row.get(key) for key in ("rollout", "length", "ended", "verdict")}
    segments = [
        {key: segment.get(key) for key in _SEGMENT} | {key: segment[key] for key in _TOKENS if key in segment}
        for segment in row.get("segments") or []
    ]
    response = row.get("response")
    if "".join(segment["text"] or "" for segment in segments) != response:
        rollout["response"] = response
    return rollout | {"segments": segments}


# ---------------------------------------------------------------------------------------------------- writing


def _without_config(workdir: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in workdir.items() if key != "config"}


def _about(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the runs are, a row a property that any of them has."""
    planned = [_leaf(run["config"], "steps") for run in runs]
    steps = [f"{run['steps'][-1]}" + (f" of {of}" if of else "") for run, of in zip(runs, planned)]
    rows = [{"key": "steps", "values": steps}]
    for key, paths in _ABOUT.items():
        leaves = [[_leaf(run["config"], path) for path in paths] for run in runs]
        values = [next((leaf for leaf in of_run if leaf not in (None, "")), None) for of_run in leaves]
        if any(value is not None for value in values):
            rows.append({"key": key, "values": list(map(_shown, values))})
    return rows


def _differing(workdirs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The config leaves on which any two workdirs differ, with every workdir's value.

    A section that one of them lacks altogether belongs to another task: the others' leaves in it are compared.
    """
    configs = [workdir["config"] for workdir in workdirs]
    lines = [line for ours, theirs in itertools.combinations(configs, 2) for line in differences(ours, theirs)]
    rows = []
    for path in sorted({line.partition(": ")[0] for line in lines}):
        leaves = [_leaf(config, path) for config in configs]
        if not any(isinstance(leaf, Mapping) for leaf in leaves):
            rows.append({"key": path, "values": list(map(_shown, leaves))})
    return rows


def _leaf(config: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path; None where the config has no such key."""
    value: Any = config
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return value


def _shown(value: Any) -> str | None:
    """As text; None of what a config does not have."""
    return value if value is None or (isinstance(value, str) and value) else json.dumps(value, ensure_ascii=False)


def _source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _embedded(value: Any) -> str:
    """JSON that cannot end the element it stands in: ASCII (so no U+2028), with `<`, `>` and `&` escaped."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).translate(_HTML)
