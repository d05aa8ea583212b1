"""The one crossing from an experiment's `ConfigDict` to frozen, checked dataclasses.

A config file in `configs/` returns a `ml_collections.ConfigDict` whose shape is exactly `Config` below: every key
present, none unknown, every value of the declared type.  Nothing in the package reads the ConfigDict itself, so the
whole schema, with its meaning and its checks, stands here.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from typing import Any, Literal, Mapping

from exprl_jax.model.config import Execution


@dataclasses.dataclass(frozen=True)
class Data:
    """Where problems come from and how they are put to the policy.

    Attributes:
      source: a JSONL or parquet path (comma-separated paths and globs too), `hf:<dataset id>[:<config>]` or `tfds:<name>`.
      split: for `hf:` and `tfds:` sources.
      worked_examples: JSONL of solved problems shown to the policy as earlier turns; empty for none.
      max_prompt_tokens: longer prompts are dropped and counted.
    """

    source: str
    split: str
    worked_examples: str
    max_prompt_tokens: int


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each axis; `data` −1 takes all that `model` leaves.

    Attributes:
      data: batch rows and parameter shards (FSDP).
      model: heads, feed-forward and vocabulary shards (tensor parallelism).
    """

    data: int
    model: int


@dataclasses.dataclass(frozen=True)
class Model:
    """A language model: where its weights come from and how it runs.

    Attributes:
      weights: a Hugging Face folder, a `.gguf` file, `pip:<package>==<version>`, a hub id, or `random:<name>`
        (a named tiny architecture with byte tokenizer).
      execution: see `model.config.Execution`.
      param_dtype: dtype the parameters are held in.
    """

    weights: str
    execution: Execution
    param_dtype: Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Sampling from the policy.

    Attributes:
      prompts: problems a step (P), over all hosts.
      group: rollouts a problem (G).
      max_tokens: response budget (R); a rollout that reaches it without EOS is overlong.
      temperature: of the policy; every log-probability in training is of logits / temperature.
      wave: problems sampled and judged at a time; bounds the KV cache.
    """

    prompts: int
    group: int
    max_tokens: int
    temperature: float
    wave: int


@dataclasses.dataclass(frozen=True)
class Segments:
    """How a rollout is cut into the prefixes that a process judge scores.

    Attributes:
      rule: `heading` (line-start `###`), `paragraph`, `line`, `stride:<tokens>` or `regex:<pattern>`.
      max_segments: later segments are merged into the last.
    """

    rule: str
    max_segments: int


@dataclasses.dataclass(frozen=True)
class Judge:
    """The judge and how its score is read.

    Attributes:
      model: the judge; equal weights to the reference's are one set of buffers.
      unit: what is scored: `outcome` the whole rollout, `prefix` every prefix y_≤t (the paper's process judge),
        `step` every segment on its own (the released code's).
      readout: `text` generates an analysis and parses its last score line; `logits` reads the next-token
        distribution over the digits 1..5 after one forward pass.
      logits_value: for `logits`: the `expected` digit or the `argmax`.
      max_tokens: budget of a `text` judgement.
      max_context_tokens: budget of rubric + problem + reference; problems beyond it are dropped and counted.
      max_trace_tokens: budget of a trace in the judge's own tokens; a longer one gets no score.
    """

    model: Model
    unit: Literal["outcome", "prefix", "step"]
    readout: Literal["text", "logits"]
    logits_value: Literal["expected", "argmax"]
    max_tokens: int
    max_context_tokens: int
    max_trace_tokens: int


@dataclasses.dataclass(frozen=True)
class Advantage:
    """From scores to advantages (paper §3; decisions where the released code differs are in the README).

    Attributes:
      estimator: `grpo` (one score a rollout, group-normalised), `delta_norm` (Eq. 2/5), `end_norm` (Eq. 4),
        `group_norm` (Eq. 6).
      std_normalise: `grpo` only: divide by the group's standard deviation.
      min_spread: `grpo` only: a group whose standard deviation is below this gets advantage 0.
      overlong: rollouts that never ended: `zero_score` (every score 0), `mask` (no loss) or `penalty`.
      overlong_penalty: the advantage of every token of an overlong rollout under `penalty`; negative.
      missing: a score the judge did not give: `drop_segment` leaves out the segments whose advantage needs it,
        `drop_rollout` the whole rollout.
    """

    estimator: Literal["grpo", "delta_norm", "end_norm", "group_norm"]
    std_normalise: bool
    min_spread: float
    overlong: Literal["zero_score", "mask", "penalty"]
    overlong_penalty: float
    missing: Literal["drop_segment", "drop_rollout"]


@dataclasses.dataclass(frozen=True)
class Loss:
    """The clipped policy loss (method: PPO clip on token ratios, dual clip, k3 KL to the reference).

    Attributes:
      clip_low, clip_high: the ratio is clipped to [1 − clip_low, 1 + clip_high].
      dual_clip: bound c on the loss −c·A of tokens with A < 0; greater than 1.
      kl_coef: weight of the k3 estimate of KL(policy ‖ reference); 0 computes no reference log-probs.
      aggregate: `token_mean` over the update's whole batch, `sequence_mean` (mean over rows of their token means) or
        `constant` (sum over tokens / (rows · max_tokens), Dr.GRPO).
    """

    clip_low: float
    clip_high: float
    dual_clip: float
    kl_coef: float
    aggregate: Literal["token_mean", "sequence_mean", "constant"]


@dataclasses.dataclass(frozen=True)
class Updates:
    """How a batch of rollouts becomes optimizer updates.

    Attributes:
      per_batch: optimizer updates a batch; the batch's problems are divided among them.
      microbatch: rows a gradient-accumulation step, over all devices.
      logp_chunk: rows × tokens whose [.., V] logits exist at once.
    """

    per_batch: int
    microbatch: int
    logp_chunk: int


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW with a constant learning rate after a global-norm clip."""

    learning_rate: float
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Attributes:
      every: RL steps between checkpoints; the last step is always saved.
      keep: newest checkpoints kept.
    """

    every: int
    keep: int


@dataclasses.dataclass(frozen=True)
class Log:
    """Attributes:
      rollouts: rows a step written to `rollouts/step_N.jsonl`.
    """

    rollouts: int


@dataclasses.dataclass(frozen=True)
class Grader:
    """The answer grader (math-verify) in worker processes.

    Attributes:
      seconds: wall-clock limit for one answer.
      workers: processes a host.
    """

    seconds: float
    workers: int


@dataclasses.dataclass(frozen=True)
class Probe:
    """The look at one sampled and judged batch before the first update.

    Attributes:
      strict: a warning of the probe ends the run.
    """

    strict: bool


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment.

    Attributes:
      seed: all randomness derives from it.
      steps: RL steps (batches).
      reference: the KL reference's weights; usually the policy's own start.
    """

    seed: int
    steps: int
    data: Data
    mesh: Mesh
    policy: Model
    reference: Model
    judge: Judge
    rollout: Rollout
    segments: Segments
    advantage: Advantage
    loss: Loss
    updates: Updates
    optimizer: Optimizer
    checkpoint: Checkpoint
    log: Log
    grader: Grader
    probe: Probe


def resolve(config: Mapping[str, Any]) -> Config:
    """Turns a `ConfigDict` (or nested mapping) into a checked `Config`.

    Raises:
      ValueError: an unknown key (with the nearest name), a missing key, a value of the wrong type or out of range,
        or values that contradict each other.
    """
    resolved = _build(Config, config, "config")
    _check(resolved)
    return resolved


def to_dict(config: Config) -> dict[str, Any]:
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


def _check(c: Config) -> None:
    def require(ok: bool, path: str, value: Any, expected: str) -> None:
        if not ok:
            raise ValueError(f"config.{path}: got {value!r}, expected {expected}")

    positive = {
        "steps": c.steps, "data.max_prompt_tokens": c.data.max_prompt_tokens, "mesh.model": c.mesh.model,
        "rollout.prompts": c.rollout.prompts, "rollout.group": c.rollout.group, "rollout.wave": c.rollout.wave,
        "rollout.max_tokens": c.rollout.max_tokens, "segments.max_segments": c.segments.max_segments,
        "judge.max_tokens": c.judge.max_tokens, "judge.max_context_tokens": c.judge.max_context_tokens,
        "judge.max_trace_tokens": c.judge.max_trace_tokens,
        "updates.per_batch": c.updates.per_batch, "updates.microbatch": c.updates.microbatch,
        "updates.logp_chunk": c.updates.logp_chunk, "checkpoint.every": c.checkpoint.every,
        "checkpoint.keep": c.checkpoint.keep, "grader.workers": c.grader.workers, "grader.seconds": c.grader.seconds,
        "rollout.temperature": c.rollout.temperature, "optimizer.clip_norm": c.optimizer.clip_norm,
        "optimizer.eps": c.optimizer.eps,
    }  # fmt: skip
    for path, value in positive.items():
        require(value > 0, path, value, "a positive number")
    not_negative = {
        "seed": c.seed, "advantage.min_spread": c.advantage.min_spread, "loss.kl_coef": c.loss.kl_coef,
        "loss.clip_low": c.loss.clip_low, "loss.clip_high": c.loss.clip_high, "log.rollouts": c.log.rollouts,
        "optimizer.learning_rate": c.optimizer.learning_rate, "optimizer.weight_decay": c.optimizer.weight_decay,
    }  # fmt: skip
    for path, value in not_negative.items():
        require(value >= 0, path, value, "zero or more")
    for name, value in (("b1", c.optimizer.b1), ("b2", c.optimizer.b2)):
        require(0 <= value < 1, f"optimizer.{name}", value, "a number in [0, 1)")
    require(c.loss.clip_low < 1, "loss.clip_low", c.loss.clip_low, "less than 1")
    require(c.loss.dual_clip > 1, "loss.dual_clip", c.loss.dual_clip, "more than 1")
    require(c.mesh.data > 0 or c.mesh.data == -1, "mesh.data", c.mesh.data, "a positive number, or -1 for all devices")
    for name, model in (("policy", c.policy), ("reference", c.reference), ("judge.model", c.judge.model)):
        require(bool(model.weights), f"{name}.weights", model.weights, "a model: folder, .gguf, pip:, hub id or random:")

    waves = c.rollout.prompts / c.rollout.wave
    require(waves.is_integer(), "rollout.wave", c.rollout.wave, f"a divisor of rollout.prompts = {c.rollout.prompts}")
    share = c.rollout.prompts / c.updates.per_batch
    require(
        share.is_integer(), "updates.per_batch", c.updates.per_batch, f"a divisor of rollout.prompts = {c.rollout.prompts}"
    )
    rows = int(share) * c.rollout.group
    require(
        rows % c.updates.microbatch == 0, "updates.microbatch", c.updates.microbatch,
        f"a divisor of the {rows} rows of one update (rollout.prompts / updates.per_batch · rollout.group)",
    )  # fmt: skip
    if c.advantage.estimator == "grpo":
        require(c.rollout.group > 1, "rollout.group", c.rollout.group, "at least 2: grpo compares within a group")
        require(c.judge.unit == "outcome", "judge.unit", c.judge.unit, "'outcome' with advantage.estimator = 'grpo'")
    else:
        require(
            c.judge.unit != "outcome", "judge.unit", c.judge.unit,
            f"'prefix' or 'step' with advantage.estimator = {c.advantage.estimator!r}",
        )  # fmt: skip
    if c.advantage.overlong == "penalty":
        require(c.advantage.overlong_penalty < 0, "advantage.overlong_penalty", c.advantage.overlong_penalty, "negative")
