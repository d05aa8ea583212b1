"""The one crossing from an experiment's `ConfigDict` to frozen, checked dataclasses.

A config file in `configs/` returns a `ml_collections.ConfigDict` whose `task` names one of the records at the end of
this file (`TASKS`), and whose shape is exactly that record: every key present, none unknown, every value of the declared
type.  Nothing in the package reads the ConfigDict itself, so the whole schema, with its meaning and its checks, stands
here.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from exprl_jax.model.config import Execution

Route = Literal["process", "outcome", "verifier"]


@dataclasses.dataclass(frozen=True)
class Source:
    """Where problems come from and how they are put to the policy.

    Attributes:
      source: JSONL or parquet paths and globs, `hf:<dataset id>[:<config>]`, `tfds:<name>` or a benchmark's name
        (`data.benchmarks`); several with commas between.
      split: for `hf:` and `tfds:` sources.
      worked_examples: JSONL of solved problems shown to the policy as earlier turns; empty for none.
      max_prompt_tokens: budget of a prompt; training drops longer ones and counts them.
    """

    source: str
    split: str
    worked_examples: str
    max_prompt_tokens: int


@dataclasses.dataclass(frozen=True)
class Data(Source):
    """Problems to train on.

    Attributes:
      held_out: sources, written as in `source`, whose problems must not be among these; empty for none.
      allow_held_out: train on them all the same.
    """

    held_out: str
    allow_held_out: bool


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
class Lora:
    """Training low-rank adapters of a frozen policy, instead of all its parameters.

    Attributes:
      rank: of the adapters; 0 trains the parameters themselves.
      alpha: adapters count alpha / rank times.
      targets: of `q,k,v,o,gate,up,down`, with commas between.
    """

    rank: int
    alpha: float
    targets: str

    @property
    def names(self) -> tuple[str, ...]:
        """The targets."""
        return tuple(self.targets.split(","))


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Sampling from the policy.

    Attributes:
      prompts: problems a step (P), over all hosts.
      group: rollouts a problem (G).
      max_tokens: response budget (R); a rollout that reaches it without EOS is overlong.
      temperature: of the policy; every log-probability in training is of logits / temperature.
      wave: problems sampled and judged at a time; bounds the KV cache.
      max_resample: times that a group without any advantage is sampled again, whatever its route.
    """

    prompts: int
    group: int
    max_tokens: int
    temperature: float
    wave: int
    max_resample: int


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
class Routes:
    """Where the reward of a problem comes from, by its kind: `choice` has answer choices, the others their domain.

    `process`: the judge scores every prefix or step of a rollout; advantages by `advantage.estimator`.
    `outcome`: the judge scores the whole rollout; advantages are group-normalised.
    `verifier`: 1 for a correct answer and 0 for any other; group-normalised (sparse GRPO).
    """

    math: Route
    choice: Route
    science: Route
    code: Route


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible chat-completions endpoint.

    Attributes:
      base_url: up to and including `/v1`.
      model: its name there.
      api_key_variable: environment variable that holds the key; empty for none.
      concurrency: requests under way at a time, of one process.
      seconds: time limit of one request.
      retries: of a request that failed in a way that may pass.
      max_missing: a batch with a larger fraction of failed requests ends the run.
    """

    base_url: str
    model: str
    api_key_variable: str
    concurrency: int
    seconds: float
    retries: int
    max_missing: float


@dataclasses.dataclass(frozen=True)
class Judge:
    """The judge and how its score is read.

    Attributes:
      backend: `local`, the `model` on this run's mesh, or `openai`, the `endpoint`.
      model: the judge; equal weights to the reference's are one set of buffers.
      endpoint: for `openai`.
      unit: what is scored on the route `process`: every `prefix` y_≤t (the paper), or every `step` on its own (the
        released code).
      readout: `text` generates an analysis and parses its last score line; `logits` reads the next-token
        distribution over the digits 1..5 after one forward pass.
      logits_value: for `logits`: the `expected` digit or the `argmax`.
      max_tokens: budget of a `text` judgement.
      max_context_tokens: budget of rubric + problem + reference; problems beyond it are dropped and counted.
      max_trace_tokens: budget of a trace in the judge's own tokens; a longer one gets no score.
    """

    backend: Literal["local", "openai"]
    model: Model
    endpoint: Endpoint
    unit: Literal["prefix", "step"]
    readout: Literal["text", "logits"]
    logits_value: Literal["expected", "argmax"]
    max_tokens: int
    max_context_tokens: int
    max_trace_tokens: int


@dataclasses.dataclass(frozen=True)
class Advantage:
    """From scores to advantages (paper §3; decisions where the released code differs are in the README).

    Attributes:
      estimator: on the route `process`: `delta_norm` (Eq. 2/5), `end_norm` (Eq. 4) or `group_norm` (Eq. 6).  The
        other routes have one score a rollout, normalised within its group.
      std_normalise: other routes: divide by the group's standard deviation.
      min_spread: other routes: a group whose standard deviation is below this gets advantage 0.
      overlong: rollouts that never ended: `zero_score` (every score 0), `mask` (no loss), `penalty`, or `keep`
        (scored like any other, as in the released sparse runs).
      overlong_penalty: the advantage of every token of an overlong rollout under `penalty`; negative.
      missing: a score the judge did not give: `drop_segment` leaves out the segments whose advantage needs it,
        `drop_rollout` the whole rollout.
    """

    estimator: Literal["delta_norm", "end_norm", "group_norm"]
    std_normalise: bool
    min_spread: float
    overlong: Literal["zero_score", "mask", "penalty", "keep"]
    overlong_penalty: float
    missing: Literal["drop_segment", "drop_rollout"]


@dataclasses.dataclass(frozen=True)
class Loss:
    """The clipped policy loss (method: PPO clip on token ratios, dual clip, k3 KL to the reference).

    Attributes:
      clip_low, clip_high: the ratio is clipped to [1 − clip_low, 1 + clip_high]; with clip_low 1 there is no lower
        clip, only a cap on the ratio of tokens with A > 0.
      dual_clip: bound c on the loss −c·A of tokens with A < 0, greater than 1; 0 for none.
      kl_coef: weight of the k3 estimate of KL(policy ‖ reference); 0 computes no reference log-probs.
      entropy_coef: weight of the entropy bonus.
      aggregate: `token_mean` over the update's whole batch, `sequence_mean` (mean over rows of their token means),
        `sequence_sum` (sum over tokens / rows) or `constant` (sum over tokens / (rows · max_tokens), Dr.GRPO).
    """

    clip_low: float
    clip_high: float
    dual_clip: float
    kl_coef: float
    entropy_coef: float
    aggregate: Literal["token_mean", "sequence_mean", "sequence_sum", "constant"]


@dataclasses.dataclass(frozen=True)
class Distillation:
    """On-policy self-distillation from the reference model, which is shown the reference solution.

    Attributes:
      kl: reverse KL(policy ‖ teacher) from the `sampled` tokens alone (released), or over the `full` vocabulary.
    """

    kl: Literal["sampled", "full"]


@dataclasses.dataclass(frozen=True)
class Updates:
    """How a batch of rollouts becomes optimizer updates.

    Attributes:
      per_batch: optimizer updates a batch; the batch's problems are divided among them.
      row_tokens: width of a packed row.
      microbatch: packed rows a gradient-accumulation step, over all devices.
      logp_chunk: rows × tokens whose [.., V] logits exist at once.
    """

    per_batch: int
    row_tokens: int
    microbatch: int
    logp_chunk: int


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW after a global-norm clip.

    Attributes:
      schedule: of the learning rate: `constant`, or `cosine` to 0 at the run's last update.
      warmup: fraction of the updates over which the rate first rises from 0.
    """

    learning_rate: float
    schedule: Literal["constant", "cosine"]
    warmup: float
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What is saved, and when.

    Attributes:
      every: RL steps between checkpoints; the last step is always saved.
      keep: newest checkpoints kept.
    """

    every: int
    keep: int


@dataclasses.dataclass(frozen=True)
class Log:
    """What people read of a step.

    Attributes:
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
class Code:
    """Running the programs of rollouts.

    Attributes:
      seconds: wall-clock limit of one test.
      memory_mb: of one program.
      allow_unsandboxed: run them even where the system offers no isolation.
    """

    seconds: float
    memory_mb: int
    allow_unsandboxed: bool


@dataclasses.dataclass(frozen=True)
class Probe:
    """The look at one sampled and judged batch before the first update.

    Attributes:
      strict: a warning of the probe ends the run.
    """

    strict: bool


@dataclasses.dataclass(frozen=True)
class Config:
    """Training on the policy's own rollouts: Stage I, sparse GRPO and Stage II (`rl`), self-distillation (`distill`).

    Self-distillation has no rewards: routes, judge, segments, advantage, the loss's clips and the probe say nothing to it,
    as `distillation` says nothing to `rl`.  They stand in one record so that arms differ from one base by a few keys.

    Attributes:
      seed: all randomness derives from it.
      steps: RL steps (batches).
      reference: the KL reference's, or the teacher's, weights; usually the policy's own start.
    """

    task: Literal["rl", "distill"]
    seed: int
    steps: int
    data: Data
    mesh: Mesh
    policy: Model
    lora: Lora
    reference: Model
    routes: Routes
    judge: Judge
    rollout: Rollout
    segments: Segments
    advantage: Advantage
    loss: Loss
    distillation: Distillation
    updates: Updates
    optimizer: Optimizer
    checkpoint: Checkpoint
    log: Log
    grader: Grader
    code: Code
    probe: Probe


@dataclasses.dataclass(frozen=True)
class Sft:
    """Supervised training on the reference solutions.

    Attributes:
      batch: examples an update.
      microbatch: packed rows a gradient-accumulation step, over all devices.
      row_tokens: width of a packed row; longer examples are dropped and counted.
      logp_chunk: rows × tokens whose [.., V] logits exist at once.
    """

    task: Literal["sft"]
    seed: int
    epochs: int
    data: Data
    mesh: Mesh
    policy: Model
    lora: Lora
    batch: int
    microbatch: int
    row_tokens: int
    logp_chunk: int
    optimizer: Optimizer
    checkpoint: Checkpoint


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Samples for an evaluation.

    Attributes:
      samples: a problem (n).
      group: samples of a problem drawn at a time, a divisor of `samples`.
      wave: problems sampled at a time.
      max_tokens: response budget.
      temperature: of the policy; 0 is greedy.
    """

    samples: int
    group: int
    wave: int
    max_tokens: int
    temperature: float


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """pass@k of a model on problem sets.

    Attributes:
      label: what plots and tables call the model.
      data: each part of `source` is a set of its own.
      policy: any model, a run's workdir among them.
      judge: says yes or no to open-ended answers.
    """

    task: Literal["evaluate"]
    seed: int
    label: str
    data: Source
    mesh: Mesh
    policy: Model
    sampling: Sampling
    judge: Judge
    grader: Grader
    code: Code


@dataclasses.dataclass(frozen=True)
class Repeats:
    """Asking a `text` judge about the same rollout several times.

    Attributes:
      rollouts: that are asked about, drawn at random; 0 for none.
      count: times each.
      temperature: of the judge; more than 0.
    """

    rollouts: int
    count: int
    temperature: float


@dataclasses.dataclass(frozen=True)
class Prefixes:
    """Prefix scores against the success of continuations (paper Fig. 11b).

    Attributes:
      rollouts: that are cut into prefixes, drawn at random; 0 for none.
      segments: where they are cut.
      sampling: of the continuations, `samples` a prefix.
    """

    rollouts: int
    segments: Segments
    sampling: Sampling


@dataclasses.dataclass(frozen=True)
class Calibrate:
    """Judges against verifiers on fixed rollouts.

    Attributes:
      rollouts: JSONL files or globs with commas between, of a run (`rollouts/`) or an evaluation (`samples/`).
      data: the problems of the rollouts; an empty `source` where the files hold references and no choices.
      judges: by the name that tables and figures give them.
      wave, group: problems of a call to a judge, and rollouts of a problem in it.
      policy: writes the continuations of prefixes.
    """

    task: Literal["calibrate"]
    seed: int
    rollouts: str
    data: Source
    mesh: Mesh
    judges: dict[str, Judge]
    wave: int
    group: int
    repeats: Repeats
    prefixes: Prefixes
    policy: Model
    grader: Grader
    code: Code


@dataclasses.dataclass(frozen=True)
class Annotate:
    """Solution archetypes and reasoning behaviours in fixed rollouts.

    Attributes:
      rollouts: as in `Calibrate`.
      base: workdir of another annotation, to which this one is compared; empty for none.
      data: the problems of the rollouts; an empty `source` where the files hold all that is needed.
      annotator: its `text` is read as JSON.
      wave: rollouts of a call.
    """

    task: Literal["annotate"]
    seed: int
    rollouts: str
    base: str
    data: Source
    mesh: Mesh
    annotator: Judge
    wave: int


TASKS = {
    "rl": Config,
    "distill": Config,
    "sft": Sft,
    "evaluate": Evaluate,
    "calibrate": Calibrate,
    "annotate": Annotate,
}
AnyConfig = Config | Sft | Evaluate | Calibrate | Annotate


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
