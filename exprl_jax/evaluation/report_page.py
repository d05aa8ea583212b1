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
from typing import Any, NoReturn

import numpy as np

from exprl_jax.evaluation.tables import read_results
from exprl_jax.learning import distillation, supervised, update
from exprl_jax.resolve import differences
from exprl_jax.reward import statistics
from exprl_jax.run.metrics import read_metrics

_TEMPLATE = pathlib.Path(__file__).with_name("report.html")

# What a run is, from the leaves of its config that say so; a config of another task has only some of them.
_ABOUT = {
    "task": ("task",),
    "estimator": ("advantage.estimator",),
    "judge's unit": ("judge.unit",),
    "policy": ("policy.weights",),
    "judge": ("judge.model.weights", "judge.weights"),
    "problems": ("data.source",),
    "prompts a step": ("rollout.prompts",),
    "rollouts a prompt": ("rollout.group",),
    "response budget": ("rollout.max_tokens",),
    "learning rate": ("optimizer.learning_rate",),
}

_PROBLEM = ("id", "domain", "kind", "problem", "reference", "answer", "prompt")
_SEGMENT = ("text", "score", "advantage", "judge")
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
    found = list(dict.fromkeys(folder.resolve() for folder in folders))
    for folder in found:
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder; expected the workdir of a run or of an evaluation")
    names = dict(zip(found, _names(found)))
    metrics = {folder: rows for folder in found if (rows := read_metrics(folder / "metrics.jsonl"))}
    results, left_out = {}, []
    for folder in found:
        try:
            if (folder / "results.json").exists():
                results[folder] = dataclasses.asdict(read_results(folder / "results.json"))
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
        }
        for folder, rows in metrics.items()
    ]
    evaluations = [
        {"name": names[folder], "folder": str(folder), "config": _config(folder), **read}
        for folder, read in results.items()
    ]
    return Contents(runs, evaluations), left_out


def render(contents: Contents) -> str:
    """The page: `report.html` with the contents in it and a policy that admits its own script and style alone."""
    template = _TEMPLATE.read_text(encoding="utf-8")
    style, script = (re.search(f"<{tag}>(.*?)</{tag}>", template, re.DOTALL)[1] for tag in ("style", "script"))
    policy = f"default-src 'none'; style-src {_source(style)}; script-src {_source(script)}; base-uri 'none'"
    data = {
        "runs": [_without_config(run) for run in contents.runs],
        "evaluations": [_without_config(each) for each in contents.evaluations],
        "about": _about(contents.runs),
        "differences": {"runs": _differing(contents.runs), "evaluations": _differing(contents.evaluations)},
        "metrics": _explained(contents.runs),
    }
    places = {"POLICY": policy, "DATA": _embedded(data)}
    return re.sub("{{(POLICY|DATA)}}", lambda place: places[place[1]], template)


def _explained(runs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What each metric is; one that means different things in these runs' tasks says all of them."""
    tables = {"rl": {**statistics.METRICS, **update.METRICS}, "sft": supervised.METRICS}
    tables["distill"] = {**update.METRICS, **distillation.METRICS}
    found: dict[str, list[str]] = {}
    tasks = [run["config"]["task"] for run in runs if "task" in (run["config"] or {})]
    for task in dict.fromkeys(each for each in tasks or ["rl"] if each in tables):
        for name, text in tables[task].items():
            if text not in found.setdefault(name, []):
                found[name].append(text)
    return {name: "; or ".join(texts) for name, texts in found.items()}


# ---------------------------------------------------------------------------------------------------- reading


def _names(folders: Sequence[pathlib.Path]) -> list[str]:
    """The shortest ends of their paths that tell all of them apart."""
    for parts in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return names


def _read_json(path: pathlib.Path, text: str) -> dict[str, Any]:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not a number")

    try:
        read = json.loads(text, parse_constant=refuse)
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(read, dict):
        raise ValueError(f"{path}: expected JSON objects, got {text[:60]!r}")
    return read


def _config(folder: pathlib.Path) -> dict[str, Any]:
    path = folder / "config.json"
    return _read_json(path, path.read_text(encoding="utf-8")) if path.exists() else {}


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
    last = [_embedded(_embedded_rollout(row)) for row in _read_rollouts(paths[steps[-1]])]
    affordable = min(most // max(len(last), 1), most_bytes // max(sum(map(len, last)), 1))
    kept = min(max(affordable, 2), len(steps))
    for step in (steps[i] for i in sorted(set(np.linspace(0, len(steps) - 1, kept).round().astype(int)))):
        count, size = 0, 0
        for row in _read_rollouts(paths[step]):
            problem = _embedded({key: row[key] for key in _PROBLEM if key in row})
            made = {"step": step} | _embedded_rollout(row)
            grown = size + len(_embedded(made)) + (len(problem) if problem not in problems else 0)
            if count + 1 > most // kept or grown > most_bytes // kept:
                left_out += 1
                continue
            count, size = count + 1, grown
            rows.append(made | {"problem": problems.setdefault(problem, len(problems))})
    return {"steps": steps, "rows": rows, "problems": [json.loads(each) for each in problems], "left_out": left_out}


def _read_rollouts(path: pathlib.Path) -> list[dict[str, Any]]:
    # Not splitlines: a rollout may hold U+2028, which ends a line there and does not in JSON.
    return [_read_json(path, line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _embedded_rollout(row: Mapping[str, Any]) -> dict[str, Any]:
    """A rollout without its problem, and without its response where that is its segments, one after another."""
    made = {key: row.get(key) for key in ("rollout", "length", "ended", "verdict")}
    segments = [{key: each.get(key) for key in _SEGMENT} for each in row.get("segments") or []]
    response = row.get("response")
    if "".join(each["text"] or "" for each in segments) != response:
        made["response"] = response
    return made | {"segments": segments}


# ---------------------------------------------------------------------------------------------------- writing


def _without_config(workdir: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in workdir.items() if key != "config"}


def _about(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the runs are, a row a property that any of them has."""
    planned = [_leaf(run["config"], "steps") for run in runs]
    taken = [run["steps"][-1] for run in runs]
    rows = [
        {
            "key": "steps",
            "values": [str(t) if p is None else f"{t} of {p}" for t, p in zip(taken, planned, strict=True)],
        }
    ]
    for key, paths in _ABOUT.items():
        values = [
            next((found for path in paths if (found := _leaf(run["config"], path)) is not None), None) for run in runs
        ]
        if any(value is not None for value in values):
            rows.append({"key": key, "values": [None if value is None else _shown(value) for value in values]})
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
            rows.append({"key": path, "values": [None if leaf is None else _shown(leaf) for leaf in leaves]})
    return rows


def _leaf(config: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path; None where the config has no such key."""
    value: Any = config
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return value


def _shown(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def _source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _embedded(value: Any) -> str:
    """JSON that cannot end the element it stands in: ASCII (so no U+2028), with `<`, `>` and `&` escaped."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).translate(_HTML)
