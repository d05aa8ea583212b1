"""The schema of every experiment: what each config key is called, what type it has and what it means.

A config file in `configs/` returns a `ml_collections.ConfigDict` whose `task` names one of the records at the end of
this file (`TASKS`), and whose shape is exactly that record: every key present, none unknown, every value of the
declared type.  `resolve` turns the one into the other and checks it; nothing else in the package reads a ConfigDict.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from typing import Annotated, Literal, NamedTuple

from exprl_jax.kinds import KINDS

Route = Literal["process", "outcome", "verifier"]


class Range(NamedTuple):
    """What numbers a key takes; `resolve` checks it.

    Attributes:
      least, most: both are allowed.
      expected: the same in words.
    """

    least: float
    most: float
    expected: str

    def holds(self, value: float) -> bool:
        """Whether a number is in it."""
        return self.least <= value <= self.most


class JsonObject(NamedTuple):
    """JSON texts that a key takes; `resolve` checks it.

    Attributes:
      without: keys that the object must not have.
    """

    without: tuple[str, ...]

    @property
    def expected(self) -> str:
        """The same in words."""
        return f"a JSON object without the keys {', '.join(self.without)}"

    def holds(self, text: str) -> bool:
        """Whether a text is one of them."""
        try:
            value = json.loads(text)
            json.dumps(value, allow_nan=False)
        except (ValueError, RecursionError):
            return False
        return isinstance(value, dict) and not value.keys() & set(self.without)


_TINIEST, _BELOW_ONE, _INT32 = 5e-324, 1 - 2**-53, 2**31 - 1
Count = Annotated[int, Range(1, _INT32, "a positive number below 2^31")]
CountOrNone = Annotated[int, Range(0, _INT32, "zero or more, below 2^31")]
GroupSize = Annotated[int, Range(1, 1 << 16, "a positive number, at most 65536")]
Workers = Annotated[int, Range(1, 1024, "a positive number of processes, at most 1024")]
Seed = Annotated[int, Range(0, 2**32 - 1, "zero or more, below 2^32")]
Positive = Annotated[float, Range(_TINIEST, math.inf, "a positive number")]
NotNegative = Annotated[float, Range(0, math.inf, "zero or more")]
Fraction = Annotated[float, Range(0, _BELOW_ONE, "a number in [0, 1)")]
Number = Annotated[float, Range(-math.inf, math.inf, "a number")]


@dataclasses.dataclass(frozen=True)
class Source:
    """Where problems come from and how they are put to the policy.

    Attributes:
      source: JSONL or parquet paths and globs, `hf:<dataset id>[:<config>]`, `tfds:<name>` or a benchmark's name
        (`data.benchmarks`); several with commas between.
      split: the split that is read of `hf:` and `tfds:` sources.
      worked_examples: JSONL of solved problems shown to the policy as earlier turns; empty for none.
      max_prompt_tokens: longest prompt; training drops longer ones and counts them.
    """

    source: str
    split: str
    worked_examples: str
    max_prompt_tokens: Count


@dataclasses.dataclass(frozen=True)
class Data(Source):
    """Problems to train on.

    Attributes:
      held_out: sources, written as in `source`, whose problems must not be among these; empty for none.
      allow_held_out: train on such problems all the same.
    """

    held_out: str
    allow_held_out: bool


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each axis.

    Attributes:
      data: parts of the batch and of each parameter (FSDP); −1 for all devices that `model` leaves.
      model: parts of the heads, the feed-forward and the vocabulary (tensor parallelism).
    """

    data: Annotated[int, Range(-1, _INT32, "a positive number, or -1 for all devices")]
    model: Count


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a decoder runs; changes speed and memory, never (beyond rounding) the result.

    Attributes:
      scan_layers: True stacks the layers' parameters in one array each and scans over them (one layer is compiled,
        for accelerators); False keeps a subtree a layer (no copy of a layer's weights a step, for CPUs).
      compute_dtype: dtype of matrix products; norms, softmax and log-probabilities are float32 in any case.
      remat: what the backward pass computes again instead of keeping it: `none`; a `full` layer from its input;
        `but_attention`, a layer with the result of its attention kept.
      kv_dtype: dtype of the keys and values that rows are decoded with: `compute`, as `compute_dtype`, or `int8`.
    """

    scan_layers: bool
    compute_dtype: Literal["float32", "bfloat16"]
    remat: Literal["none", "full", "but_attention"]
    kv_dtype: Literal["compute", "int8"]


@dataclasses.dataclass(frozen=True)
class Model:
    """A language model: where its weights come from and how it runs.

    Attributes:
      weights: a Hugging Face folder, a `.gguf` file, `pip:<package>==<version>`, a hub id, a run's workdir or one of
        its checkpoints, or `random:<family>` (a tiny architecture with a byte tokenizer).
      execution: how it runs.
      param_dtype: dtype the parameters are held in.
      date: the day, YYYY-MM-DD, that a chat template is told when it asks for today's; a fixed one, so that prompts are
        the same tomorrow, on every host and in every stage.
    """

    weights: str
    execution: Execution
    param_dtype: Literal["float32", "bfloat16"]
    date: str


@dataclasses.dataclass(frozen=True)
class Lora:
    """Training low-rank adapters of a frozen policy, instead of all its parameters.

    Attributes:
      rank: rank of the adapters; 0 trains the parameters themselves.
      alpha: the adapters' product is scaled by alpha / rank.
      targets: the matrices that get adapters: some of `q,k,v,o,gate,up,down`, with commas between.
    """

    rank: CountOrNone
    alpha: Positive
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
      max_tokens: longest response (R); a rollout that reaches it without EOS is overlong.
      temperature: the policy's; every log-probability in training is of logits / temperature.
      wave: problems sampled and judged at a time; bounds the KV cache.
      max_resample: how often a group without any advantage is sampled again, on any route.
    """

    prompts: Count
    group: GroupSize
    max_tokens: Count
    temperature: NotNegative
    wave: Count
    max_resample: CountOrNone


@dataclasses.dataclass(frozen=True)
class Segments:
    """How a rollout is cut into the prefixes that a process judge scores.

    Attributes:
      rule: where segments end: `heading` (line-start `###`), `paragraph`, `line`, `stride:<tokens>` or
        `regex:<pattern>`.
      max_segments: most segments of a rollout; later ones are merged into the last.
    """

    rule: str
    max_segments: Count


class _RouteByKind:
    """Where the reward of a problem comes from, by its kind: `choice` has answer choices, the others their domain.

    `process`: the judge scores every prefix or step of a rollout; advantages by `advantage.estimator`.
    `outcome`: the judge scores the whole rollout; advantages by `advantage.rollout_estimator`.
    `verifier`: 1 for a correct answer and 0 for any other; advantages likewise (sparse GRPO).
    """

    def of(self, kind: str) -> Route:
        """What scores the rollouts of a kind of problem."""
        return getattr(self, kind)

    @property
    def all(self) -> set[Route]:
        """The routes that are in use."""
        return set(dataclasses.astuple(self))


_ROUTE_MEANINGS = "".join(f"\n  {name}: route of {kind.plural}." for name, kind in KINDS.items())
# One key for each kind of problem that there is.
Routes = dataclasses.make_dataclass(
    "Routes",
    [(name, Route) for name in KINDS],
    bases=(_RouteByKind,),
    frozen=True,
    namespace={"__doc__": f"{inspect.cleandoc(_RouteByKind.__doc__)}\n\nAttributes:{_ROUTE_MEANINGS}\n"},
)


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible chat-completions endpoint.

    Attributes:
      base_url: its URL, up to and including `/v1`.
      model: the model's name there.
      api_key_variable: the environment variable that holds the key; empty for none.
      concurrency: most requests of one process at a time.
      seconds: time limit of one attempt at a request; (retries + 1) times as much ends the request, waits included.
      retries: how often a request is sent again after a failure that may pass.
      max_missing: a batch with a larger fraction of failed requests ends the run.
      budget_key: the name under which the server takes the budget of an answer; OpenAI's newer models take
        `max_completion_tokens` alone.
      extra_body: a JSON object that is sent with every request besides; null leaves a key out, as
        `{"temperature": null}` does for servers that refuse one.
    """

    base_url: str
    model: str
    api_key_variable: str
    concurrency: Count
    seconds: Positive
    retries: CountOrNone
    max_missing: Fraction
    budget_key: Literal["max_tokens", "max_completion_tokens"]
    extra_body: Annotated[
        str, JsonObject(without=("max_completion_tokens", "max_tokens", "messages", "model", "n", "stream"))
    ]


@dataclasses.dataclass(frozen=True)
class Judge:
    """The judge and how its score is read.

    Attributes:
      backend: `local`, the `model` on this run's mesh, or `openai`, the `endpoint`.
      model: the judge; equal weights to the reference's are one set of buffers.
      endpoint: where an `openai` judge is.
      unit: what is scored on the route `process`: every `prefix` y_≤t (the paper), or every `step` on its own (the
        released code).
      readout: `text` generates an analysis and parses its last score line; `logits` reads the next-token
        distribution over the digits 1..5 after one forward pass.
      logits_value: the score of `logits`: the `expected` digit or the `argmax`.
      max_tokens: longest `text` judgement.
      max_context_tokens: longest prompt without the trace: rubric, problem, reference, closing instruction and chat
        template; problems beyond it are dropped and counted.
      max_trace_tokens: longest trace, in the judge's own tokens; a longer one gets no score.
    """

    backend: Literal["local", "openai"]
    model: Model
    endpoint: Endpoint
    unit: Literal["prefix", "step"]
    readout: Literal["text", "logits"]
    logits_value: Literal["expected", "argmax"]
    max_tokens: Count
    max_context_tokens: Count
    max_trace_tokens: Count


@dataclasses.dataclass(frozen=True)
class Advantage:
    """From scores to advantages (paper §3; docs/method.md says where the released code differs).

    Attributes:
      estimator: advantages on the route `process`: `delta_norm` (Eq. 2/5), `end_norm` (Eq. 4) or `group_norm` (Eq. 6).
      rollout_estimator: advantages on the other routes, which have one score a rollout: `grpo` (less the group's mean),
        `rloo` (less the mean of the group's others) or `maxrl` (less the group's mean, divided by it).
      std_normalise: `grpo` divides by the group's standard deviation.
      min_spread: of `rollout_estimator`: a group whose standard deviation is below this gets advantage 0.
      min_logits_spread: the same where the scores are a judge's by `logits`: they are never quite equal, and
        `std_normalise` would make advantages of 1 out of differences of 0.0001.
      overlong: what happens to rollouts that never ended: `zero_score` (every score 0), `mask` (no loss), `penalty`, or
        `keep` (scored like any other, as in the released sparse runs).
      overlong_penalty: the advantage of every token of an overlong rollout under `penalty`; negative.
      missing: what follows from a score that the judge did not give: `drop_segment` leaves out the segments
        whose advantage needs it, `drop_rollout` the whole rollout.
    """

    estimator: Literal["delta_norm", "end_norm", "group_norm"]
    rollout_estimator: Literal["grpo", "rloo", "maxrl"]
    std_normalise: bool
    min_spread: NotNegative
    min_logits_spread: NotNegative
    overlong: Literal["zero_score", "mask", "penalty", "keep"]
    overlong_penalty: Number
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

    clip_low: NotNegative
    clip_high: NotNegative
    dual_clip: NotNegative
    kl_coef: NotNegative
    entropy_coef: NotNegative
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

    per_batch: Count
    row_tokens: Count
    microbatch: Count
    logp_chunk: Count


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW after a global-norm clip.

    Attributes:
      learning_rate: the highest that the schedule reaches.
      schedule: of the learning rate: `constant`, or `cosine` to 0 at the run's last update.
      warmup: fraction of the updates over which the rate first rises from 0.
      b1: decay of Adam's mean of gradients.
      b2: decay of Adam's mean of squared gradients.
      eps: added to the root of that mean.
      weight_decay: AdamW's; it is multiplied by the learning rate.
      clip_norm: a gradient with a larger global norm is scaled down to it.
    """

    learning_rate: NotNegative
    schedule: Literal["constant", "cosine"]
    warmup: Fraction
    b1: Fraction
    b2: Fraction
    eps: Positive
    weight_decay: NotNegative
    clip_norm: Positive


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What is saved, and when.

    Attributes:
      every: RL steps between checkpoints; the last step is always saved.
      keep: newest checkpoints kept.
      best: a metric by which the best checkpoint is kept beside them, its mean over the steps since the checkpoint
        before; empty for none.
      best_is: the `highest` or the `lowest` value.
    """

    every: Count
    keep: Count
    best: str
    best_is: Literal["highest", "lowest"]


@dataclasses.dataclass(frozen=True)
class Log:
    """What people read of a step.

    Attributes:
      rollouts: rollouts of a step that are written to `rollouts/step_N.jsonl`.
    """

    rollouts: CountOrNone


@dataclasses.dataclass(frozen=True)
class Grader:
    """The answer grader (SymPy and pint) in worker processes.

    Attributes:
      seconds: wall-clock limit for one answer.
      workers: grader processes a host.
    """

    seconds: Positive
    workers: Workers


@dataclasses.dataclass(frozen=True)
class Code:
    """Running the programs of rollouts.

    Attributes:
      seconds: wall-clock limit of one test.
      memory_mb: memory limit of one program, in MB.
      allow_unsandboxed: run programs even where the system offers no isolation.
    """

    seconds: Positive
    memory_mb: Count
    allow_unsandboxed: bool


@dataclasses.dataclass(frozen=True)
class Probe:
    """The look at one sampled and judged batch before the first update.

    Attributes:
      strict: end the run where the probe has a warning.
    """

    strict: bool


@dataclasses.dataclass(frozen=True)
class Watch:
    """The comparison of a run's last steps with its first.

    Attributes:
      window: steps whose means are compared.
      strict: a warning of the watch ends the run.
    """

    window: Count
    strict: bool


@dataclasses.dataclass(frozen=True)
class Config:
    """Training on the policy's own rollouts: Stage I, sparse GRPO and Stage II (`rl`), self-distillation (`distill`).

    Self-distillation has no rewards: routes, judge, segments, advantage, the loss's clips and the probe say nothing to
    it, as `distillation` says nothing to `rl`.  They stand in one record so that arms differ from one base by a few
    keys.

    Attributes:
      task: `rl`, with rewards, or `distill`, with a teacher.
      seed: all randomness derives from it.
      steps: RL steps (batches).
      data: problems to train on.
      mesh: how devices are divided.
      policy: the model that is trained.
      lora: whether adapters are trained instead of all its parameters.
      reference: the KL reference's, or the teacher's, weights; usually the policy's own start.
      routes: where the reward of each kind of problem comes from.
      judge: what scores rollouts, and how its score is read.
      rollout: sampling from the policy.
      segments: where a rollout is cut for a process judge.
      advantage: from scores to advantages.
      loss: the policy's loss.
      distillation: the loss of self-distillation.
      updates: how a batch of rollouts becomes optimizer updates.
      optimizer: AdamW, its schedule and its clip.
      checkpoint: what is saved, and when.
      log: what people read of a step.
      grader: the grader of math answers.
      code: running the programs of rollouts.
      probe: the check of the first batch, before the first update.
      watch: the comparison of later steps with the first ones.
    """

    task: Literal["rl", "distill"]
    seed: Seed
    steps: Count
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
    watch: Watch

    @property
    def reads_references(self) -> bool:
        """Whether the run has any use for reference solutions; Stage II and sparse GRPO have none."""
        return self.task == "distill" or self.routes.all != {"verifier"}

    @property
    def has_reference_model(self) -> bool:
        """Whether the run has a frozen model beside the policy: for the loss's KL, or as the teacher."""
        return self.task == "distill" or self.loss.kl_coef > 0

    @property
    def has_local_judge(self) -> bool:
        """Whether any route is scored by a model on the mesh; open-ended science in the data has one verify it
        besides."""
        return self.task == "rl" and self.routes.all != {"verifier"} and self.judge.backend == "local"


@dataclasses.dataclass(frozen=True)
class Sft:
    """Supervised training on the reference solutions.

    Attributes:
      task: `sft`.
      seed: all randomness derives from it.
      epochs: passes over the data.
      data: problems whose references are trained on.
      mesh: how devices are divided.
      policy: the model that is trained.
      lora: whether adapters are trained instead of all its parameters.
      batch: examples an update.
      microbatch: packed rows a gradient-accumulation step, over all devices.
      row_tokens: width of a packed row; longer examples are dropped and counted.
      logp_chunk: rows × tokens whose [.., V] logits exist at once.
      optimizer: AdamW, its schedule and its clip.
      checkpoint: what is saved, and when.
    """

    task: Literal["sft"]
    seed: Seed
    epochs: Count
    data: Data
    mesh: Mesh
    policy: Model
    lora: Lora
    batch: Count
    microbatch: Count
    row_tokens: Count
    logp_chunk: Count
    optimizer: Optimizer
    checkpoint: Checkpoint


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Samples for an evaluation.

    Attributes:
      samples: samples a problem (n).
      group: samples of a problem drawn at a time, a divisor of `samples`.
      wave: problems sampled at a time.
      max_tokens: longest response.
      temperature: the policy's; 0 is greedy.
    """

    samples: GroupSize
    group: GroupSize
    wave: Count
    max_tokens: Count
    temperature: NotNegative


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """pass@k of a model on problem sets.

    Attributes:
      task: `evaluate`.
      seed: all randomness derives from it.
      label: what plots and tables call the model.
      data: each part of `source` is a set of its own.
      mesh: how devices are divided.
      policy: any model, a run's workdir among them.
      sampling: how many samples a problem, and how they are drawn.
      judge: says yes or no to open-ended answers.
      grader: the grader of math answers.
      code: running the programs of samples.
    """

    task: Literal["evaluate"]
    seed: Seed
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
      rollouts: how many rollouts are asked about, drawn at random; 0 for none.
      count: how often the judge is asked about each.
      temperature: the judge's; more than 0.
    """

    rollouts: CountOrNone
    count: GroupSize
    temperature: NotNegative


@dataclasses.dataclass(frozen=True)
class Prefixes:
    """Prefix scores against the success of continuations (paper Fig. 11b).

    Attributes:
      rollouts: how many rollouts are cut into prefixes, drawn at random; 0 for none.
      segments: where they are cut.
      sampling: how continuations are sampled, `samples` a prefix.
    """

    rollouts: CountOrNone
    segments: Segments
    sampling: Sampling


@dataclasses.dataclass(frozen=True)
class Calibrate:
    """Judges against verifiers on fixed rollouts.

    Attributes:
      task: `calibrate`.
      seed: all randomness derives from it.
      rollouts: JSONL files or globs with commas between, of a run (`rollouts/`) or an evaluation (`samples/`).
      data: the problems of the rollouts; an empty `source` where the files hold references and no choices.
      mesh: how devices are divided.
      judges: the judges, by the names that tables and figures give them.
      wave: problems of a call to a judge.
      group: rollouts of a problem in that call.
      repeats: asking a judge about the same rollout several times.
      prefixes: prefix scores against the success of continuations.
      policy: writes the continuations of prefixes.
      grader: the grader of math answers.
      code: running the programs of rollouts.
    """

    task: Literal["calibrate"]
    seed: Seed
    rollouts: str
    data: Source
    mesh: Mesh
    judges: dict[str, Judge]
    wave: Count
    group: GroupSize
    repeats: Repeats
    prefixes: Prefixes
    policy: Model
    grader: Grader
    code: Code


@dataclasses.dataclass(frozen=True)
class Annotate:
    """Solution archetypes and reasoning behaviours in fixed rollouts.

    Attributes:
      task: `annotate`.
      seed: all randomness derives from it.
      rollouts: JSONL files or globs with commas between, of a run (`rollouts/`) or an evaluation (`samples/`).
      base: workdir of another annotation, to which this one is compared; empty for none.
      data: the problems of the rollouts; an empty `source` where the files hold all that is needed.
      mesh: how devices are divided.
      annotator: the model that annotates; its `text` is read as JSON.
      wave: rollouts of a call to it.
    """

    task: Literal["annotate"]
    seed: Seed
    rollouts: str
    base: str
    data: Source
    mesh: Mesh
    annotator: Judge
    wave: Count


TASKS = {
    "rl": Config,
    "distill": Config,
    "sft": Sft,
    "evaluate": Evaluate,
    "calibrate": Calibrate,
    "annotate": Annotate,
}
AnyConfig = Config | Sft | Evaluate | Calibrate | Annotate
