"""From rollouts to updates, and what a run keeps and says of itself."""

from __future__ import annotations

import dataclasses
from typing import Literal

from exprl_jax.config.values import Count, CountOrNone, Fraction, GroupSize, NotNegative, Positive


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Sampling from the policy.

    Attributes:
      prompts: problems a step (P), over all hosts.
      group: rollouts a problem (G).
      max_tokens: longest response (R); a rollout that reaches it without EOS is overlong.
      temperature: the policy's; every log-probability in training is of logits / temperature.
      wave: problems sampled and judged at a time; without `slots` it bounds the KV cache.
      slots: rows that a data shard decodes at a time; a row that ends gives its slot to the next one of the wave, and
        the KV cache is bounded by slots.  A step's problems are dealt to data shards by the lengths of their last
        rollouts, the longest first.  0 decodes all rows of a wave together, until the longest has ended.
      expected_tokens: of a response; the slots share pages of KV for slots · expected_tokens.  Longer responses take
        pages that others do not need, and where none is left the youngest begin anew later, to the same tokens.  How
        many slots have a row at a time follows from these pages and from the lengths of the last steps: a row begins
        where there are pages for what it and all older ones are expected to need.  0 keeps pages for max_tokens of
        each slot.
      max_resample: how often a group without any advantage is sampled again, on any route.
      hints: longest hint, in tokens, with which a group without any success is then sampled once more; 0 for none.
        `reference`, frozen, writes it from the reference solution.  Only where every route is `verifier`, because a
        hint shows the policy what was made from a reference.
    """

    prompts: Count
    group: GroupSize
    max_tokens: Count
    temperature: NotNegative
    wave: Count
    slots: CountOrNone
    expected_tokens: CountOrNone
    max_resample: CountOrNone
    hints: CountOrNone


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
      row_tokens: width of a packed row; 0: chosen by the program from the prompts and `rollout.max_tokens`.
      microbatch: packed rows a gradient-accumulation step, over all devices; 0: chosen from lengths and memory.
      logp_chunk: rows × tokens whose [.., V] logits exist at once.
    """

    per_batch: Count
    row_tokens: CountOrNone
    microbatch: CountOrNone
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
class Validation:
    """Examples that are not trained on, by which a supervised run is watched.

    Attributes:
      every: updates between validations; the last update has one too; 0 for none.
      fraction: of the problems, drawn at random, whose examples are held back for it.
      source: examples for it, in place of a fraction, written as those that are trained on; empty for none.
    """

    every: CountOrNone
    fraction: Fraction
    source: str


@dataclasses.dataclass(frozen=True)
class JudgeValidation(Validation):
    """Lessons that are not trained on: the judge that is being trained is asked about their texts, as in a run.

    Attributes:
      wave: lessons that it is asked about at a time.
    """

    wave: Count


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What is saved, and when.

    Attributes:
      every: steps between checkpoints (of a supervised run: updates); the last step is always saved.
      keep: newest checkpoints kept.
      best: a metric by which the best checkpoint is kept beside them, its mean over the later half of the steps
        since the checkpoint before; empty for none.
      best_is: the `highest` or the `lowest` value.
    """

    every: Count
    keep: Count
    best: str
    best_is: Literal["highest", "lowest"]


@dataclasses.dataclass(frozen=True)
class RunEvaluation:
    """Evaluation inside a run: pass@k on held-out problems, and on some of those that are trained on.

    Attributes:
      every: RL steps between evaluations; there is one before the first step and one after the last too; 0 for none.
      source: held-out problems, written as in `data.source` (of `hf:` and `tfds:` the split `test`); empty for none.
      training_problems: on how many of the training problems the policy is evaluated too, drawn once by the seed; 0 for
        none.
      samples: samples a problem (n), a multiple of `rollout.group`: the run's sampling program draws them.
      k: values of k for which pass@k is measured besides 1, with commas between; empty for none.
      temperature: the policy's; 0 is greedy.
    """

    every: CountOrNone
    source: str
    training_problems: CountOrNone
    samples: GroupSize
    k: str
    temperature: NotNegative

    @property
    def ks(self) -> tuple[int, ...]:
        """The values of k, 1 among them, ascending."""
        return tuple(sorted({1, *(int(part) for part in self.k.split(",") if self.k)}))


TRACKERS = ("tensorboard", "wandb", "trackio")


@dataclasses.dataclass(frozen=True)
class Tracking:
    """Who is told of a run's metrics.

    Attributes:
      to: trackers that get the rows of metrics.jsonl, with commas between: `tensorboard`, and `wandb` and `trackio`
        where their packages are installed; empty for none.
    """

    to: str

    @property
    def trackers(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(self.to.split(",")) if self.to else ()


@dataclasses.dataclass(frozen=True)
class Log(Tracking):
    """What people read of a step.

    Attributes:
      rollouts: rollouts of a step that are written to `rollouts/step_N.jsonl`.
    """

    rollouts: CountOrNone


@dataclasses.dataclass(frozen=True)
class Probe:
    """The look at one sampled and judged batch before the first update.

    Attributes:
      strict: end the run where the probe has a warning.
    """

    strict: bool


@dataclasses.dataclass(frozen=True)
class Watch:
    """The comparison of a run's last steps with its first and best.

    Attributes:
      window: steps whose means are compared with those of the last half as many.
      strict: a warning of the watch ends the run.
    """

    window: Count
    strict: bool
