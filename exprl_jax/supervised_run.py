"""A supervised run, whatever its examples are made from: references (`sft`) or a judge's lessons (`judge_training`).

examples → packed rows → update → checkpoint, metrics
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from exprl_jax import programs as programs_room
from exprl_jax.config import JudgeTraining, Supervised
from exprl_jax.data.packing import Example, PackedRows, assign_rows, fill_rows
from exprl_jax.data.problems import batch_indices
from exprl_jax.hosts import put_microbatches, say
from exprl_jax.layout import packed_shape
from exprl_jax.learning.update import over_updates
from exprl_jax.records import Lesson, TrainState
from exprl_jax.reward.rubric import rubric_files
from exprl_jax.run.clock import Clock
from exprl_jax.run.loop import StepResult, Task
from exprl_jax.sizes import Lengths, held_bytes, settle_sizes
from exprl_jax.weights.adapters import export_policy
from exprl_jax.weights.language_model import LanguageModel, load_params
from exprl_jax.weights.run_models import record_models


@dataclasses.dataclass(frozen=True)
class SupervisedRun:
    """What stays the same through a run.

    Attributes:
      policy: the model that is trained.
      items: what examples are made from, those that fit.
      examples: of the items, in their order.
      share_N: of each example, how far it lies towards the digit after its own; 0 but for a judge's scores.
      base: what the model's adapters stand on; nothing where it has none.
      steps: batches of all epochs.
    """

    config: Supervised
    mesh: Mesh
    policy: LanguageModel
    programs: programs_room.SftPrograms
    items: Sequence[Any]
    examples: Sequence[Example]
    share_N: np.ndarray
    base: Any
    steps: int


class Collected(NamedTuple):
    """A step's examples, packed: what `learn` takes.

    Attributes:
      lesson: the packed examples on the mesh.
      padding: fraction of their slots that hold no token.
      tokens: that they hold.
      epoch: fraction of the data that batches have gone through.
    """

    lesson: Lesson
    padding: float
    tokens: int
    epoch: float


def open_supervised(
    config: Supervised,
    mesh: Mesh,
    policy: LanguageModel,
    items: Sequence[Any],
    examples: Sequence[Example],
    share_N: np.ndarray,
) -> SupervisedRun:
    """The run of some examples that fit into rows.

    Raises:
      ValueError: one is beyond the model's context, or they make no batch.
    """
    lengths_N = [len(example.prompt) + len(example.response) for example in examples]
    longest = max(lengths_N)
    if longest > policy.arch.max_positions:
        raise ValueError(
            f"config.row_tokens: got {config.row_tokens}, which lets in an example of {longest} tokens; expected at "
            f"most {policy.arch.max_positions}, the model's context length, over which examples are dropped"
        )
    if len(examples) < config.batch:
        raise ValueError(f"config.batch: got {config.batch}, expected at most {len(examples)}, the examples left")
    steps = config.epochs * (len(examples) // config.batch)
    programs = programs_room.build_sft(config, mesh, policy, steps)
    held = held_bytes(programs.abstract, programs.shardings)
    held += policy.parameter_bytes // mesh.size if config.lora.rank else 0
    config = settle_sizes(config, Lengths(longest, np.mean(lengths_N), config.batch), policy.arch, mesh, held)
    say(f"{steps} updates of {config.batch} examples in rows of {config.row_tokens} tokens")
    return SupervisedRun(
        config=config,
        mesh=mesh,
        policy=policy,
        programs=programs,
        items=items,
        examples=examples,
        share_N=share_N,
        base=load_params(policy, mesh, config.seed) if config.lora.rank else (),
        steps=steps,
    )


def collect(run: SupervisedRun, state: TrainState, step: int, clock: Clock) -> Collected:
    """Packs a step's batch of examples."""
    config = run.config
    indices, epoch = batch_indices(len(run.examples), config.batch, config.seed, step)
    with clock.phase("pack"):
        examples = [run.examples[i] for i in indices]
        packed = pack(config, examples)
        mask = packed.spread([np.ones(len(example.response), bool) for example in examples], bool)
        share = packed.spread([run.share_N[i : i + 1] for i in indices], np.float32)
        lesson = put_microbatches(run.mesh, Lesson(packed.packed, mask, share, packed.used))
    return Collected(lesson, packed.padding, int((packed.packed.segment_BT > 0).sum()), epoch)


def learn(run: SupervisedRun, state: TrainState, collected: Collected, clock: Clock) -> StepResult:
    """One update; the state is donated."""
    with clock.phase("train"):
        state, update = run.programs.sft_step(state, run.base, collected.lesson)
        row = over_updates([jax.device_get(update)])
    row |= {"update/padding": collected.padding, "data/epoch": collected.epoch}
    return StepResult(state, row, {"train": collected.tokens}, row["loss/total"], [])


def pack(config: Supervised, examples: Sequence[Example]) -> PackedRows:
    """A batch in rows of `row_tokens`; there is room for a row an example."""
    own, group_N = [len(example.prompt) - 1 + len(example.response) for example in examples], np.arange(len(examples))
    row_N = assign_rows(np.zeros(len(examples)), own, group_N, config.row_tokens)
    return fill_rows(examples, group_N, row_N, packed_shape(config), share=False)


def task_of(run: SupervisedRun) -> Task:
    """The run as the loop sees it."""
    return Task(
        config=run.config,
        checkpoint=run.config.checkpoint,
        steps=run.steps,
        parameter_bytes=run.policy.parameter_bytes,
        abstract=run.programs.abstract,
        shardings=run.programs.shardings,
        first_state=functools.partial(first_state, run),
        problems=run.items,
        collect=functools.partial(collect, run),
        learn=functools.partial(learn, run),
        updates=1,
        all_finite=run.programs.all_finite,
        record_models=functools.partial(
            record_models,
            policy=run.policy,
            models=[run.policy],
            files=rubric_files(run.config.judge) if isinstance(run.config, JudgeTraining) else {},
        ),
        export=functools.partial(export_policy, run.config.lora, run.policy, run.base),
        trackers=run.config.log.trackers,
        evaluation=None,
        headline="loss",
        watch=None,
    )


def first_state(run: SupervisedRun) -> TrainState:
    """The state before the first step."""
    return run.programs.init_state(run.base or load_params(run.policy, run.mesh, run.config.seed))
