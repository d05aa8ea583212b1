"""From a config file's `ConfigDict` to checked records: the one crossing.

Types and ranges are those of the records' fields (`config`); what follows them here is what sections mean together.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from exprl_jax.config import (
    COLUMNS,
    TASKS,
    TRACKERS,
    Annotate,
    AnyConfig,
    Asking,
    Calibrate,
    Config,
    Grader,
    Judge,
    JudgeTraining,
    Lora,
    Mesh,
    Model,
    RunEvaluation,
    Sampling,
    Source,
    Tracking,
    Truth,
    Validation,
    column_pairs,
)
from exprl_jax.config.values import LARGEST, SMALLEST


def resolve(config: Mapping[str, Any]) -> AnyConfig:
    """Turns a `ConfigDict` (or nested mapping) into the checked record of its task.

    Raises:
      ValueError: an unknown key (with the nearest name), a missing key, a value of the wrong type or out of range,
        or values that contradict each other.
    """
    values = dict(config.items())
    if "task" not in values:
        raise ValueError("config key config.task is missing; add it to the config file")
    if not isinstance(values["task"], str) or values["task"] not in TASKS:
        raise ValueError(f"config.task: got {values['task']!r}, expected one of {', '.join(map(repr, TASKS))}")
    resolved = _build(TASKS[values["task"]], values, "config")
    if isinstance(resolved, Config):
        _check_rl(resolved)
    elif isinstance(resolved, Calibrate):
        _check_calibrate(resolved)
    elif isinstance(resolved, JudgeTraining):
        backend = resolved.judge.backend
        _require(backend == "local", "config.judge.backend", backend, "'local': the judge's model is trained here")
        expected = "'' or a template file: lessons have scores against references, not against checklists"
        _require(not resolved.judge.per_problem, "config.judge.rubric", resolved.judge.rubric, expected)
    if isinstance(resolved, Asking | JudgeTraining):
        for path, judge in _asked(resolved).items():
            _require(judge.wave == 0, f"{path}.wave", judge.wave, "0: the task has a wave of its own")
    if isinstance(resolved, Annotate):
        backend, readout = resolved.annotator.backend, resolved.annotator.readout
        _require(backend != "function", "config.annotator.backend", backend, "'local' or 'openai': a model annotates")
        _require(readout == "text", "config.annotator.readout", readout, "'text': an annotation is written")
    return resolved


def _asked(config: Asking | JudgeTraining) -> dict[str, Judge]:
    """The judges that are asked about fixed rollouts or lessons, by their paths."""
    if isinstance(config, Calibrate):
        return {f"config.judges.{name}": judge for name, judge in config.judges.items()}
    return {"config.annotator": config.annotator} if isinstance(config, Annotate) else {"config.judge": config.judge}


def to_dict(config: AnyConfig) -> dict[str, Any]:
    """The plain nested dict that `resolve` maps back to an equal `Config`; what `config.json` holds."""
    return dataclasses.asdict(config)


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], path: str = "") -> list[str]:
    """The leaves on which two resolved config dicts differ, as `path: ours != theirs`."""
    different = []
    for key in sorted({*ours, *theirs}):
        name = f"{path}.{key}" if path else key
        a, b = ours.get(key, "(absent)"), theirs.get(key, "(absent)")
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            different += differences(a, b, name)
        elif a != b:
            different.append(f"{name}: {a!r} != {b!r}")
    return different


def _build(cls: type, values: Mapping[str, Any], path: str) -> Any:
    if not isinstance(values, Mapping) and not hasattr(values, "items"):
        raise ValueError(f"{path}: expected a section with keys {_names(cls)}, got {values!r}")
    hints, values = typing.get_type_hints(cls, include_extras=True), dict(values.items())
    for key in values:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            hint = f"; did you mean {path}.{near[0]}?" if near else f"; its keys are {_names(cls)}"
            raise ValueError(f"unknown config key {path}.{key}{hint}")
    missing = [key for key in hints if key not in values]
    if missing:
        raise ValueError(f"config key {path}.{missing[0]} is missing; add it to the config file")
    section = cls(**{key: _value(hints[key], values[key], f"{path}.{key}") for key in hints})
    _check_section(section, path)
    return section


def _value(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, path)
    if typing.get_origin(hint) is dict:
        if not hasattr(value, "items"):
            raise ValueError(f"{path}: expected a section with named entries, got {value!r}")
        return {name: _value(typing.get_args(hint)[1], entry, f"{path}.{name}") for name, entry in value.items()}
    if typing.get_origin(hint) is Literal:
        options = typing.get_args(hint)
        if value not in options:
            raise ValueError(f"{path}: got {value!r}, expected one of {', '.join(map(repr, options))}")
        return value
    if typing.get_origin(hint) is Annotated:
        kind, within = typing.get_args(hint)
        value = _value(kind, value, path)
        _require(within.holds(value), path, value, within.expected)
        return value
    if hint is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{path}: got {value!r} of type {type(value).__name__}, expected {hint.__name__}")
    if hint is float:
        held = value == 0 or SMALLEST <= abs(value) <= LARGEST
        expected = f"a finite number, zero or in size from {SMALLEST:.2g} to {LARGEST:.2g} (float32)"
        _require(math.isfinite(value) and held, path, value, expected)
    return value


def _names(cls: type) -> str:
    return ", ".join(field.name for field in dataclasses.fields(cls))


def _require(ok: bool, path: str, value: Any, expected: str) -> None:
    if not ok:
        raise ValueError(f"{path}: got {value!r}, expected {expected}")


def _check_columns(source: Source, path: str) -> None:
    pairs = column_pairs(source.columns)
    example = "theirs:ours with commas between, such as 'question:problem,solution:reference'"
    _require(all(theirs and ours for theirs, ours in pairs), path, source.columns, example)
    for theirs, ours in pairs:
        _require(ours in COLUMNS, path, source.columns, f"{ours!r} to be one of {', '.join(COLUMNS)}")
    for side in zip(*pairs):
        double = [name for name in side if side.count(name) > 1]
        _require(not double, path, source.columns, f"{''.join(map(repr, double[:1]))} once")


def _check_section(section: Any, path: str) -> None:
    """What holds of a section wherever it stands."""
    if isinstance(section, Model):
        models = "a model: folder, workdir, .gguf, pip:, hub id or random:"
        _require(bool(section.weights), f"{path}.weights", section.weights, models)
    if isinstance(section, Mesh):
        _require(section.data != 0, f"{path}.data", section.data, "a positive number, or -1 for all devices")
    if isinstance(section, Source):
        _check_columns(section, f"{path}.columns")
    if isinstance(section, Sampling):
        divides = section.samples % section.group == 0
        _require(divides, f"{path}.group", section.group, f"a divisor of {path}.samples = {section.samples}")
    if isinstance(section, Lora):
        known, names = {"q", "k", "v", "o", "gate", "up", "down"}, section.names
        expected = "some of q,k,v,o,gate,up,down, each once, with commas between"
        _require(len(names) == len(set(names)) and set(names) <= known, f"{path}.targets", section.targets, expected)
    if isinstance(section, Tracking):
        names = section.trackers
        ok = len(names) == len(set(names)) and set(names) <= set(TRACKERS)
        _require(
            ok, f"{path}.to", section.to, f"some of {','.join(TRACKERS)}, each once, with commas between; '' for none"
        )
    if isinstance(section, RunEvaluation):
        expected = f"positive numbers, at most samples = {section.samples}, with commas between; '' for 1 alone"
        ok = not section.k or all(part.isascii() and part.isdigit() for part in section.k.split(","))
        _require(ok and 1 <= section.ks[0] and section.ks[-1] <= section.samples, f"{path}.k", section.k, expected)
    if isinstance(section, Truth):
        _check_truth(section.source, f"{path}.source")
    if isinstance(section, Judge):
        expected = "'per_problem' alone, or a template file after the colon"
        _require(section.rubric != "per_problem:", f"{path}.rubric", section.rubric, expected)
        unused = section.per_problem or not section.checklists
        _require(unused, f"{path}.checklists", section.checklists, f"'' unless {path}.rubric is 'per_problem'")
        if section.backend == "function":
            expected = "'' with backend = 'function': a function is asked by no words"
            _require(not section.rubric, f"{path}.rubric", section.rubric, expected)
        if section.per_problem and section.backend == "local" and section.readout == "logits":
            expected = f"a JSONL file: with readout = 'logits' {path} writes nothing, so another judge must write them"
            _require(bool(section.checklists), f"{path}.checklists", section.checklists, expected)
    if isinstance(section, Validation):
        given = bool(section.source) + (section.fraction > 0)
        _require(given < 2, f"{path}.source", section.source, f"'' beside {path}.fraction = {section.fraction}")
        expected = "a positive number where examples are held back, and 0 where none are"
        _require(bool(given) == (section.every > 0), f"{path}.every", section.every, expected)
    if isinstance(section, Judge) and section.backend == "openai":
        endpoint = section.endpoint
        is_url = endpoint.base_url.startswith(("http://", "https://"))
        _require(is_url, f"{path}.endpoint.base_url", endpoint.base_url, "an http:// or https:// URL")
        _require(bool(endpoint.model), f"{path}.endpoint.model", endpoint.model, "the model's name there")
    if isinstance(section, Grader) and section.function:
        _require_function(section.function, f"{path}.function")
    if isinstance(section, Judge) and section.backend == "function":
        _require_function(section.function, f"{path}.function")


def _check_truth(source: str, path: str) -> None:
    if not source or (source.startswith("column:") and source != "column:"):
        return
    where, _, name = source.rpartition(":")
    ok = where.endswith(".py") or all(map(str.isidentifier, where.split(".")))
    expected = "'', 'column:<name>', 'package.module:name' or 'path/to/file.py:name'"
    _require(ok and name.isidentifier(), path, source, expected)


def _require_function(value: str, path: str) -> None:
    where, _, name = value.rpartition(":")
    ok = where.endswith(".py") or all(map(str.isidentifier, where.split(".")))
    _require(ok and name.isidentifier(), path, value, "'package.module:name' or 'path/to/file.py:name'")


def _check_calibrate(c: Calibrate) -> None:
    if not c.names:
        raise ValueError(f"config.judges: expected a section with at least one named entry, got {c.judges!r}")
    _require(c.stored not in c.judges, "config.stored", c.stored, "a name that is not in config.judges")
    known = ("correct", "none", "wrong")
    expected = f"some of {', '.join(known)}, each once, with commas between"
    right = c.conditions and set(c.conditions) <= set(known) and len(set(c.conditions)) == len(c.conditions)
    _require(bool(right), "config.references", c.references, expected)
    for name, judge in c.judges.items():
        if judge.per_problem:
            expected = f"False with config.judges.{name}.rubric = 'per_problem', which shows no reference"
            _require(not c.reference_last, "config.reference_last", True, expected)
            expected = f"0 with config.judges.{name}.rubric = 'per_problem'"
            _require(not c.repeats.rollouts, "config.repeats.rollouts", c.repeats.rollouts, expected)
    if "correct" not in c.conditions:
        _require(not c.reference_last, "config.reference_last", True, "False without 'correct' in config.references")
        expected = "0 without 'correct' in config.references"
        _require(not c.repeats.rollouts, "config.repeats.rollouts", c.repeats.rollouts, expected)
    if c.prefixes.rollouts:
        for name, judge in c.judges.items():
            expected = "'prefix', which the prefix check asks of"
            _require(judge.unit == "prefix", f"config.judges.{name}.unit", judge.unit, expected)
    if c.repeats.rollouts:
        count, temperature = c.repeats.count, c.repeats.temperature
        _require(count > 1, "config.repeats.count", count, "at least 2, or repeats.rollouts = 0")
        _require(temperature > 0, "config.repeats.temperature", temperature, "a positive number")


def _check_rl(c: Config) -> None:
    def require(ok: bool, path: str, expected: str) -> None:
        value = c
        for name in path.split("."):
            value = getattr(value, name)
        _require(ok, f"config.{path}", value, expected)

    prompts, whole_batch = c.rollout.prompts, f"a divisor of rollout.prompts = {c.rollout.prompts}"
    require(c.rollout.temperature > 0, "rollout.temperature", "a positive number")
    # Steps and attempts share 32 bits of a row's identity (`rollout.call`).
    require(c.steps < 1 << 20, "steps", f"less than {1 << 20}")
    require(c.rollout.max_resample < 1 << 10, "rollout.max_resample", f"less than {1 << 10}")
    if c.rollout.hints:
        # What is made from a reference reaches the policy: nothing that a judge's reward may be earned with.
        judged = sorted(c.routes.all - {"verifier"})
        expected = f"0 with the route {judged[0]!r}: hints are for the route 'verifier' alone" if judged else ""
        require(not judged, "rollout.hints", expected)
        require(c.task == "rl", "rollout.hints", "0 with task = 'distill', whose teacher has the reference")
    require(c.loss.clip_low <= 1, "loss.clip_low", "at most 1")
    require(c.loss.dual_clip == 0 or c.loss.dual_clip > 1, "loss.dual_clip", "more than 1, or 0 for none")
    require(prompts % c.rollout.wave == 0, "rollout.wave", whole_batch)
    divides = c.judge.wave == 0 or c.rollout.wave % c.judge.wave == 0
    require(divides, "judge.wave", f"a divisor of rollout.wave = {c.rollout.wave}, or 0 for as many")
    expected, most = c.rollout.expected_tokens, f"at most rollout.max_tokens = {c.rollout.max_tokens}"
    require(expected <= c.rollout.max_tokens, "rollout.expected_tokens", most)
    require(expected == 0 or c.rollout.slots > 0, "rollout.expected_tokens", "0 with rollout.slots = 0")
    require(prompts % c.updates.per_batch == 0, "updates.per_batch", whole_batch)
    longest = c.data.max_prompt_tokens + c.rollout.max_tokens
    require(
        c.updates.row_tokens >= longest or c.updates.row_tokens == 0,
        "updates.row_tokens",
        f"at least {longest}, data.max_prompt_tokens + rollout.max_tokens: a rollout is packed whole; or 0, for a "
        "width by the data",
    )
    if c.task == "rl" and c.routes.all != {"process"}:
        expected = "at least 2: the routes outcome and verifier compare within a group"
        require(c.rollout.group > 1, "rollout.group", expected)
    if c.task == "distill":
        require(c.updates.per_batch == 1, "updates.per_batch", "1 with task = 'distill': on-policy")
        require(c.rollout.max_resample == 0, "rollout.max_resample", "0 with task = 'distill'")
        for name in ("kl_coef", "entropy_coef"):
            require(getattr(c.loss, name) == 0, f"loss.{name}", "0 with task = 'distill', whose loss is the KL")
    if c.evaluate.every:
        something = "held-out problems, or evaluate.training_problems = 1 or more"
        require(bool(c.evaluate.source) or c.evaluate.training_problems > 0, "evaluate.source", something)
        whole_groups = f"a multiple of rollout.group = {c.rollout.group}"
        require(c.evaluate.samples % c.rollout.group == 0, "evaluate.samples", whole_groups)
        groups = c.evaluate.samples // c.rollout.group
        require(groups < 1 << 10, "evaluate.samples", f"less than {1 << 10} times rollout.group")
    elif c.checkpoint.best.startswith("evaluate/"):
        require(False, "checkpoint.best", "a metric that is measured; set evaluate.every above 0")
    if c.advantage.overlong == "penalty":
        require(c.advantage.overlong_penalty < 0, "advantage.overlong_penalty", "negative")
    if c.advantage.std_normalise:
        expected = "False with advantage.rollout_estimator = " + repr(c.advantage.rollout_estimator)
        require(c.advantage.rollout_estimator == "grpo", "advantage.std_normalise", expected)
