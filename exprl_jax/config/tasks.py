"""What the program does: the record of each task, of which the others are sections."""

from __future__ import annotations

import dataclasses
from typing import Literal

from exprl_jax.config.data import Data, Sampling, Source
from exprl_jax.config.models import Lora, Mesh, Model
from exprl_jax.config.rewards import Advantage, Code, Grader, Judge, Routes, Segments, Truth
from exprl_jax.config.training import (
    Checkpoint,
    Distillation,
    JudgeValidation,
    Log,
    Loss,
    Optimizer,
    Probe,
    Rollout,
    RunEvaluation,
    Tracking,
    Updates,
    Validation,
    Watch,
)
from exprl_jax.config.values import Count, CountOrNone, GroupSize, NotNegative, Seed


@dataclasses.dataclass(frozen=True)
class Config:
    """Training on the policy's own rollouts: Stage I, sparse GRPO and Stage II (`rl`), self-distillation (`distill`).

    Self-distillation has no rewards: it does not use routes, judge, segments, advantage, the loss's clips and the
    probe, as `rl` does not use `distillation`.  They stand in one record so that arms differ from one base by a few
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
      truth: what the judge is measured by.
      rollout: sampling from the policy.
      segments: where a rollout is cut for a process judge.
      advantage: from scores to advantages.
      loss: the policy's loss.
      distillation: the loss of self-distillation.
      updates: how a batch of rollouts becomes optimizer updates.
      optimizer: AdamW, its schedule and its clip.
      checkpoint: what is saved, and when.
      evaluate: evaluation inside the run.
      log: what people read of a step.
      grader: the graders of math answers, and of `custom` problems.
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
    truth: Truth
    rollout: Rollout
    segments: Segments
    advantage: Advantage
    loss: Loss
    distillation: Distillation
    updates: Updates
    optimizer: Optimizer
    checkpoint: Checkpoint
    evaluate: RunEvaluation
    log: Log
    grader: Grader
    code: Code
    probe: Probe
    watch: Watch

    @property
    def reads_references(self) -> bool:
        """Whether the run has any use for reference solutions; Stage II and sparse GRPO have none without hints."""
        return self.task == "distill" or not self.routes.reference_free or self.rollout.hints > 0

    @property
    def has_reference_model(self) -> bool:
        """Whether the run has a frozen model beside the policy: for the loss's KL, as the teacher, or for hints."""
        return self.task == "distill" or self.loss.kl_coef > 0 or self.rollout.hints > 0

    @property
    def has_local_judge(self) -> bool:
        """Whether a model on the mesh scores any route.  Where none does, one may still verify open-ended science."""
        return self.task == "rl" and not self.routes.reference_free and self.judge.backend == "local"


@dataclasses.dataclass(frozen=True)
class Supervised:
    """Training on given answers, `sft` and `judge`: on examples of references, or on lessons for a judge.

    Attributes:
      seed: all randomness derives from it.
      epochs: passes over the data, where `steps` is 0.
      steps: updates; 0 for as many as `epochs` passes take.
      mesh: how devices are divided.
      lora: whether adapters are trained instead of all its parameters.
      batch: examples or lessons an update.
      microbatch: packed rows a gradient-accumulation step, over all devices; 0: chosen by the program from lengths
        and memory.
      row_tokens: width of a packed row; longer examples or lessons are dropped and counted.  0: chosen so that all fit.
      logp_chunk: rows × tokens whose [.., V] logits exist at once.
      validation: examples or lessons that are held back, and when they are looked at.
      optimizer: AdamW, its schedule and its clip.
      checkpoint: what is saved, and when.
      log: who is told of the metrics.
    """

    task: Literal["sft", "judge"]
    seed: Seed
    epochs: Count
    steps: CountOrNone
    mesh: Mesh
    lora: Lora
    batch: Count
    microbatch: CountOrNone
    row_tokens: CountOrNone
    logp_chunk: Count
    validation: Validation
    optimizer: Optimizer
    checkpoint: Checkpoint
    log: Tracking


@dataclasses.dataclass(frozen=True)
class Sft(Supervised):
    """Supervised training on the reference solutions.

    Attributes:
      task: `sft`.
      data: problems whose references are trained on.
      policy: the model that is trained.
    """

    task: Literal["sft"]
    data: Data
    policy: Model


@dataclasses.dataclass(frozen=True)
class JudgeTraining(Supervised):
    """Training a judge on lessons: texts, each with the score or the judgement that it should get.

    Attributes:
      task: `judge`.
      lessons: JSONL or parquet paths and globs, `hf:` or `tfds:` data sets, with commas between; a row has
        `problem`, `reference` (null for a judge without), `trace`, `unit` (`outcome`, `prefix` or `step`), and a
        `score` in [0, 1], a `judgement` or both; or, in place of `trace` and these two, `segments`, each with them.
      judge: the judge as runs will ask it; its `model` is trained.  Lessons beyond its budgets are dropped and
        counted.
    """

    task: Literal["judge"]
    lessons: str
    judge: Judge
    validation: JudgeValidation

    @property
    def policy(self) -> Model:
        """The model that is trained, under the name that it has in every other training run."""
        return self.judge.model


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
      grader: the graders of math answers, and of `custom` problems.
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
      continued: the policy goes on after each prefix, `sampling.samples` times; False where only a truth, or another
        judge, is to be compared with.
      segments: where they are cut; with `stored` as the run cut them that wrote the rollouts.
      sampling: how continuations are sampled, `samples` a prefix.
    """

    rollouts: CountOrNone
    continued: bool
    segments: Segments
    sampling: Sampling


@dataclasses.dataclass(frozen=True)
class Asking:
    """Asking models about fixed rollouts: `calibrate`, `annotate` and `label`.

    Attributes:
      seed: all randomness derives from it.
      rollouts: JSONL files or globs with commas between, of a run (`rollouts/`) or an evaluation (`samples/`).
      data: the problems of the rollouts; an empty `source` where the files hold all that is needed.
      mesh: how devices are divided.
    """

    task: Literal["calibrate", "annotate", "label"]
    seed: Seed
    rollouts: str
    data: Source
    mesh: Mesh


@dataclasses.dataclass(frozen=True)
class Calibrate(Asking):
    """Judges against verifiers on fixed rollouts.

    Attributes:
      task: `calibrate`.
      data: the problems of the rollouts; an empty `source` where the files hold references and no choices.
      judges: the judges, by the names that tables and figures give them; a local one whose context is too short is
        left out and named.
      stored: a name for the judge of the run that wrote the rollouts, whose scores the files hold: it is compared with
        the others and asked nothing; empty for none.
      references: what the judges see, of whole rollouts and of prefixes: some of `correct`, `none` and `wrong`
        (another problem's), with commas between.
      reference_last: whole rollouts also with the reference after the trace, as in the released templates.
      truth: what the judges are measured by, besides verdicts; `column:<name>` may also be a field of the rollouts'
        rows: a number in [0, 1] for each whole rollout.
      wave: problems of a call to a judge.
      group: rollouts of a problem in that call.
      repeats: asking a judge about the same rollout several times.
      prefixes: prefix scores against the success of continuations.
      policy: writes the continuations of prefixes.
      grader: the graders of math answers, and of `custom` problems.
      code: running the programs of rollouts.
    """

    task: Literal["calibrate"]
    judges: dict[str, Judge]
    stored: str
    references: str
    reference_last: bool
    truth: Truth
    wave: Count
    group: GroupSize
    repeats: Repeats
    prefixes: Prefixes
    policy: Model
    grader: Grader
    code: Code

    @property
    def conditions(self) -> list[str]:
        """Which references the judges see."""
        return list(filter(None, map(str.strip, self.references.split(","))))

    @property
    def shows_references(self) -> bool:
        """Whether any judge sees one."""
        return self.reference_last or self.conditions != ["none"]

    @property
    def names(self) -> list[str]:
        """Of all judges, in the order of tables and figures."""
        return [*filter(None, [self.stored]), *self.judges]


@dataclasses.dataclass(frozen=True)
class Annotate(Asking):
    """Solution archetypes and reasoning behaviours in fixed rollouts.

    Attributes:
      task: `annotate`.
      base: workdir of another annotation, to which this one is compared; empty for none.
      annotator: the model that annotates; its `text` is read as JSON.
      wave: rollouts of a call to it.
    """

    task: Literal["annotate"]
    base: str
    annotator: Judge
    wave: Count


@dataclasses.dataclass(frozen=True)
class Labelling(Asking):
    """Lessons for a judge, out of fixed rollouts and what another judge says of them.

    Attributes:
      task: `label`.
      data: the problems of the rollouts; an empty `source` where the files hold references and no choices.
      count: rollouts that are made lessons of, drawn at random; 0 for all.
      unit: what is judged: a whole rollout (`outcome`), each beginning of one (`prefix`), or each `step`.
      segments: where a rollout is cut for the latter two.
      policy: whose tokens the rollouts are cut between, as in its run; nothing but its tokenizer is read.
      judge: says what the texts are worth; any backend.
      wave: problems of a call to the judge.
      group: rollouts of a problem in that call.
    """

    task: Literal["label"]
    count: CountOrNone
    unit: Literal["outcome", "prefix", "step"]
    segments: Segments
    policy: Model
    judge: Judge
    wave: Count
    group: GroupSize


TASKS = {
    "rl": Config,
    "distill": Config,
    "sft": Sft,
    "judge": JudgeTraining,
    "evaluate": Evaluate,
    "calibrate": Calibrate,
    "annotate": Annotate,
    "label": Labelling,
}
AnyConfig = Config | Supervised | Evaluate | Asking
