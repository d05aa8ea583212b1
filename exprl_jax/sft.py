"""Supervised training on the reference solutions: the imitation baseline.

    problems → prompts, references → packed rows → update → checkpoint, metrics

An example is the policy's prompt, as RL and evaluation use it, then the reference as plain text and an end of sequence.
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
from exprl_jax.config import Sft
from exprl_jax.data.packing import Example, PackedRows, assign_rows, fill_rows
from exprl_jax.data.problems import Problem, batch_indices
from exprl_jax.data.tokenizer import Tokenizer
from exprl_jax.data.training import policy_prompts, read_training_problems, within_budget
from exprl_jax.hosts import put_microbatches, say
from exprl_jax.layout import check_layout, packed_shape
from exprl_jax.learning.update import over_updates
from exprl_jax.mesh import DATA, make_mesh
from exprl_jax.records import Lesson, TrainState
from exprl_jax.resolve import to_dict
from exprl_jax.run.clock import Clock
from exprl_jax.run.loop import StepResult, Task, run_task
from exprl_jax.run.workdir import check_workdir
from exprl_jax.weights.adapters import export_policy
from exprl_jax.weights.language_model import LanguageModel, load_params, open_model
from exprl_jax.weights.run_models import record_models


@dataclasses.dataclass(frozen=True)
class SftRun:
    """What stays the same through a run.

    Attributes:
      problems: those whose examples fit.
      examples: of the problems, in their order.
      base: what the policy's adapters stand on; nothing where it has none.
      steps: batches of all epochs.
    """

    config: Sft
    mesh: Mesh
    policy: LanguageModel
    programs: programs_room.SftPrograms
    problems: Sequence[Problem]
    examples: Sequence[Example]
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


def sft(config: Sft, workdir_path: str, accept_lost_records: bool = False) -> None:
    """Runs the experiment in its folder, from where it stands to its last step.

    Raises:
      ValueError: anything about config, data, model or folder that cannot work, in one line.
      FloatingPointError: a metric is not finite (names step and metric).
    """
    check_workdir(workdir_path, to_dict(config))
    run_task(task_of(open_run(config)), workdir_path, accept_lost_records)


def collect(run: SftRun, state: TrainState, step: int, clock: Clock) -> Collected:
    """Packs a step's batch of examples."""
    config = run.config
    indices, epoch = batch_indices(len(run.examples), config.batch, config.seed, step)
    with clock.phase("pack"):
        packed = pack(config, [run.examples[i] for i in indices])
        mask = packed.spread([np.ones(len(run.examples[i].response), bool) for i in indices], bool)
        lesson = put_microbatches(run.mesh, Lesson(packed.packed, mask, packed.used))
    return Collected(lesson, packed.padding, int((packed.packed.segment_BT > 0).sum()), epoch)


def learn(run: SftRun, state: TrainState, collected: Collected, clock: Clock) -> StepResult:
    """One update; the state is donated."""
    with clock.phase("train"):
        state, update = run.programs.sft_step(state, run.base, collected.lesson)
        row = over_updates([jax.device_get(update)])
    row |= {"update/padding": collected.padding, "data/epoch": collected.epoch}
    return StepResult(state, row, {"train": collected.tokens}, row["loss/total"], [])


def pack(config: Sft, examples: Sequence[Example]) -> PackedRows:
    """A batch in rows of `row_tokens`; there is room for a row an example."""
    own, group_N = [len(example.prompt) - 1 + len(example.response) for example in examples], np.arange(len(examples))
    row_N = assign_rows(np.zeros(len(examples)), own, group_N, config.row_tokens)
    return fill_rows(examples, group_N, row_N, packed_shape(config), share=False)


def open_run(config: Sft) -> SftRun:
    """Opens model and data.

    Raises:
      ValueError: anything about config, data or model that cannot work.
    """
    mesh = make_mesh(config.mesh)
    check_layout(config, mesh.shape[DATA])
    policy = open_model(config.policy)
    say(f"policy {config.policy.weights}")
    problems = read_training_problems(config.data, references=True)
    prompts = policy_prompts(config, policy.tokenizer, problems)
    lengths = {name: len(prompt) for name, prompt in prompts.items()}
    problems = within_budget("data.max_prompt_tokens", config.data.max_prompt_tokens, problems, lengths)
    examples = {p.id: make_example(policy.tokenizer, prompts[p.id], p) for p in problems}
    lengths = {name: len(example.prompt) + len(example.response) for name, example in examples.items()}
    problems = within_budget("row_tokens", config.row_tokens, problems, lengths)
    longest = max(lengths[p.id] for p in problems)
    if longest > policy.arch.max_positions:
        raise ValueError(
            f"config.row_tokens: got {config.row_tokens}, which lets in an example of {longest} tokens; expected at "
            f"most {policy.arch.max_positions}, the policy's context length"
        )
    if len(problems) < config.batch:
        raise ValueError(f"config.batch: got {config.batch}, expected at most {len(problems)}, the examples left")
    kept = [examples[p.id] for p in problems]
    steps = config.epochs * (len(kept) // config.batch)
    say(f"{steps} updates of {config.batch} examples in rows of {config.row_tokens} tokens")
    return SftRun(
        config=config,
        mesh=mesh,
        policy=policy,
        programs=programs_room.build_sft(config, mesh, policy, steps),
        problems=problems,
        examples=kept,
        base=load_params(policy, mesh, config.seed) if config.lora.rank else (),
        steps=steps,
    )


def make_example(tokenizer: Tokenizer, prompt: Sequence[int], problem: Problem) -> Example:
    """The problem's prompt, and what the policy should write: the reference, as plain text, and an end of sequence."""
    return Example(tuple(prompt), (*tokenizer.encode(problem.reference), tokenizer.eos_ids[0]))


def task_of(run: SftRun) -> Task:
    """The run as the loop sees it."""
    return Task(
        config=run.config,
        checkpoint=run.config.checkpoint,
        steps=run.steps,
        parameter_bytes=run.policy.parameter_bytes,
        abstract=run.programs.abstract,
        shardings=run.programs.shardings,
        first_state=functools.partial(first_state, run),
        problems=run.problems,
        collect=functools.partial(collect, run),
        learn=functools.partial(learn, run),
        updates=1,
        all_finite=run.programs.all_finite,
        record_models=functools.partial(record_models, policy=run.policy, models=[run.policy]),
        export=functools.partial(export_policy, run.config.lora, run.policy, run.base),
        headline="loss",
        watch=None,
    )


def first_state(run: SftRun) -> TrainState:
    """The state before the first step."""
    return run.programs.init_state(run.base or load_params(run.policy, run.mesh, run.config.seed))
