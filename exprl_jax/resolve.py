"""From a config file's `ConfigDict` to checked records: the one crossing."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from exprl_jax.config import TASKS, Annotate, AnyConfig, Calibrate, Config, Evaluate, Judge, Lora, Mesh, Model


def resolve(config: Mapping[str, Any]) -> AnyConfig:
    """Turns a `ConfigDict` (or nested mapping) into the checked record of its task.

    Raises:
      ValueError: an unknown key (with the nearest name), a missing key, a value of the wrong type or out of range,
        or values that contradict each other.
    """
    given = dict(config.items())
    if "task" not in given:
        raise ValueError("config key config.task is missing; add it to the config file")
    if given["task"] not in TASKS:
        raise ValueError(f"config.task: got {given['task']!r}, expected one of {', '.join(map(repr, TASKS))}")
    resolved = _build(TASKS[given["task"]], given, "config")
    _check_parts(resolved, "config")
    if isinstance(resolved, Config):
        _check_rl(resolved)
    elif isinstance(resolved, Evaluate):
        sampling = resolved.sampling
        _require(
            sampling.samples % sampling.group == 0,
            "config.sampling.group",
            sampling.group,
            f"a divisor of sampling.samples = {sampling.samples}",
        )
    elif isinstance(resolved, Calibrate):
        _check_calibrate(resolved)
    elif isinstance(resolved, Annotate):
        readout = resolved.annotator.readout
        _require(readout == "text", "config.annotator.readout", readout, "'text': an annotation is written")
    return resolved


def to_dict(config: AnyConfig) -> dict[str, Any]:
    """The plain nested dict that `resolve` maps back to an equal `Config`; what `config.json` holds."""
    return dataclasses.asdict(config)


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], path: str = "") -> list[str]:
    """The leaves on which two resolved config dicts differ, as `path: ours != theirs`."""
    found = []
    for key in sorted({*ours, *theirs}):
        name = f"{path}.{key}" if path else key
        a, b = ours.get(key, "(absent)"), theirs.get(key, "(absent)")
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, name)
        elif a != b:
            found.append(f"{name}: {a!r} != {b!r}")
    return found


def _build(cls: type, values: Mapping[str, Any], path: str) -> Any:
    if not isinstance(values, Mapping) and not hasattr(values, "items"):
        raise ValueError(f"{path}: expected a section with keys {_names(cls)}, got {values!r}")
    hints, given = typing.get_type_hints(cls), dict(values.items())
    for key in given:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            hint = f"; did you mean {path}.{near[0]}?" if near else f"; its keys are {_names(cls)}"
            raise ValueError(f"unknown config key {path}.{key}{hint}")
    missing = [key for key in hints if key not in given]
    if missing:
        raise ValueError(f"config key {path}.{missing[0]} is missing; add it to the config file")
    return cls(**{key: _value(hints[key], given[key], f"{path}.{key}") for key in hints})


def _value(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, path)
    if typing.get_origin(hint) is dict:
        if not hasattr(value, "items") or not dict(value.items()):
            raise ValueError(f"{path}: expected a section with at least one named entry, got {value!r}")
        return {name: _value(typing.get_args(hint)[1], each, f"{path}.{name}") for name, each in value.items()}
    if typing.get_origin(hint) is Literal:
        options = typing.get_args(hint)
        if value not in options:
            raise ValueError(f"{path}: got {value!r}, expected one of {', '.join(map(repr, options))}")
        return value
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{path}: got {value!r} of type {type(value).__name__}, expected {_type_name(hint)}")
    return value


def _names(cls: type) -> str:
    return ", ".join(field.name for field in dataclasses.fields(cls))


def _type_name(hint: Any) -> str:
    return str(hint) if isinstance(hint, types.UnionType) else hint.__name__


_POSITIVE = {
    "alpha",
    "steps",
    "epochs",
    "batch",
    "row_tokens",
    "max_prompt_tokens",
    "model",
    "prompts",
    "group",
    "wave",
    "max_tokens",
    "max_segments",
    "max_context_tokens",
    "max_trace_tokens",
    "per_batch",
    "microbatch",
    "logp_chunk",
    "every",
    "keep",
    "workers",
    "seconds",
    "clip_norm",
    "eps",
    "memory_mb",
    "samples",
    "concurrency",
    "count",
}


_NOT_NEGATIVE = {
    "seed",
    "rank",
    "min_spread",
    "kl_coef",
    "entropy_coef",
    "clip_low",
    "clip_high",
    "rollouts",
    "learning_rate",
    "weight_decay",
    "temperature",
    "max_resample",
    "retries",
}


_FRACTIONS = {"b1": "[0, 1)", "b2": "[0, 1)", "warmup": "[0, 1)", "max_missing": "[0, 1)"}


def _require(ok: bool, path: str, value: Any, expected: str) -> None:
    if not ok:
        raise ValueError(f"{path}: got {value!r}, expected {expected}")


def _check_parts(section: Any, path: str) -> None:
    """What holds of a leaf wherever it stands."""
    for field in dataclasses.fields(section):
        value, name = getattr(section, field.name), f"{path}.{field.name}"
        if dataclasses.is_dataclass(value):
            _check_parts(value, name)
        elif isinstance(value, dict):
            for key, each in value.items():
                _check_parts(each, f"{name}.{key}")
        elif isinstance(value, str):
            continue
        elif field.name in _POSITIVE:
            _require(value > 0, name, value, "a positive number")
        elif field.name in _NOT_NEGATIVE:
            _require(value >= 0, name, value, "zero or more")
        elif field.name in _FRACTIONS:
            _require(0 <= value < 1, name, value, f"a number in {_FRACTIONS[field.name]}")
    if isinstance(section, Model):
        models = "a model: folder, workdir, .gguf, pip:, hub id or random:"
        _require(bool(section.weights), f"{path}.weights", section.weights, models)
    if isinstance(section, Mesh):
        counted = section.data > 0 or section.data == -1
        _require(counted, f"{path}.data", section.data, "a positive number, or -1 for all devices")
    if isinstance(section, Lora):
        known = {"q", "k", "v", "o", "gate", "up", "down"}
        some = len(section.names) == len(set(section.names)) and set(section.names) <= known
        _require(
            some, f"{path}.targets", section.targets, "some of q,k,v,o,gate,up,down, each once, with commas between"
        )
    if isinstance(section, Judge) and section.backend == "openai":
        _require(section.readout == "text", f"{path}.readout", section.readout, "'text' with judge.backend = 'openai'")
        url = section.endpoint.base_url
        _require(
            url.startswith(("http://", "https://")), f"{path}.endpoint.base_url", url, "an http:// or https:// URL"
        )
        _require(
            bool(section.endpoint.model), f"{path}.endpoint.model", section.endpoint.model, "the model's name there"
        )


def _check_calibrate(c: Calibrate) -> None:
    sampling, repeats = c.prefixes.sampling, c.repeats
    _require(
        sampling.samples % sampling.group == 0,
        "config.prefixes.sampling.group",
        sampling.group,
        f"a divisor of prefixes.sampling.samples = {sampling.samples}",
    )
    if c.prefixes.rollouts:
        for name, judge in c.judges.items():
            _require(
                judge.unit == "prefix",
                f"config.judges.{name}.unit",
                judge.unit,
                "'prefix', which the prefix check asks of",
            )
    if not repeats.rollouts:
        return
    _require(repeats.count > 1, "config.repeats.count", repeats.count, "at least 2, or repeats.rollouts = 0")
    _require(repeats.temperature > 0, "config.repeats.temperature", repeats.temperature, "a positive number")


def _check_rl(c: Config) -> None:
    def require(ok: bool, path: str, value: Any, expected: str) -> None:
        _require(ok, f"config.{path}", value, expected)

    require(c.rollout.temperature > 0, "rollout.temperature", c.rollout.temperature, "a positive number")
    # Steps and attempts share 32 bits of a row's identity (`rollout.waves`).
    require(c.steps < 1 << 20, "steps", c.steps, f"less than {1 << 20}")
    require(c.rollout.max_resample < 1 << 10, "rollout.max_resample", c.rollout.max_resample, f"less than {1 << 10}")
    require(c.loss.clip_low <= 1, "loss.clip_low", c.loss.clip_low, "at most 1")
    require(
        c.loss.dual_clip == 0 or c.loss.dual_clip > 1, "loss.dual_clip", c.loss.dual_clip, "more than 1, or 0 for none"
    )

    waves = c.rollout.prompts / c.rollout.wave
    require(waves.is_integer(), "rollout.wave", c.rollout.wave, f"a divisor of rollout.prompts = {c.rollout.prompts}")
    share = c.rollout.prompts / c.updates.per_batch
    require(
        share.is_integer(),
        "updates.per_batch",
        c.updates.per_batch,
        f"a divisor of rollout.prompts = {c.rollout.prompts}",
    )
    longest = c.data.max_prompt_tokens + c.rollout.max_tokens
    require(
        c.updates.row_tokens >= longest,
        "updates.row_tokens",
        c.updates.row_tokens,
        f"at least {longest}, data.max_prompt_tokens + rollout.max_tokens: a rollout is packed whole",
    )
    if c.task == "rl" and set(dataclasses.astuple(c.routes)) != {"process"}:
        require(
            c.rollout.group > 1,
            "rollout.group",
            c.rollout.group,
            "at least 2: the routes outcome and verifier compare within a group",
        )
    if c.task == "distill":
        require(
            c.updates.per_batch == 1, "updates.per_batch", c.updates.per_batch, "1 with task = 'distill': on-policy"
        )
        require(c.rollout.max_resample == 0, "rollout.max_resample", c.rollout.max_resample, "0 with task = 'distill'")
        for name in ("kl_coef", "entropy_coef"):
            value = getattr(c.loss, name)
            require(value == 0, f"loss.{name}", value, "0 with task = 'distill', whose loss is the KL to its teacher")
    if c.advantage.overlong == "penalty":
        require(
            c.advantage.overlong_penalty < 0, "advantage.overlong_penalty", c.advantage.overlong_penalty, "negative"
        )
