"""Supervised training on the reference solutions: the imitation baseline.

    problems → prompts, references → packed rows → update → checkpoint, metrics

An example is the policy's prompt, as RL and evaluation use it, then the reference as plain text and an end of sequence.
`prepare` opens what a run needs; `take_step` is a step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from exprl_jax import programs as programs_room
from exprl_jax.config import Sft, to_dict
from exprl_jax.data.packing import Example, Filled, assign_rows, fill_rows
from exprl_jax.data.problems import Problem, batch_indices
from exprl_jax.data.tokenizer import Tokenizer
from exprl_jax.loop import Taken, Task, export, follow, say
from exprl_jax.mesh import DATA, make_mesh, put_microbatches
from exprl_jax.metrics import Clock
from exprl_jax.model.language_model import LanguageModel, open_model
from exprl_jax.records import Lesson, TrainState
from exprl_jax.train import fitting, load_frozen, over_updates, policy_prompts, read_training_problems
from exprl_jax.workdir import check_workdir


@dataclasses.dataclass(frozen=True)
class Run:
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


def sft(config: Sft, workdir_path: str) -> None:
    """Runs the experiment in its folder, from where it stands to its last step.

    Raises:
      ValueError: anything about config, data, model or folder that cannot work, in one line.
      FloatingPointError: a metric is not finite (names step and metric).
    """
    check_workdir(workdir_path, to_dict(config))
    follow(task_of(prepare(config)), workdir_path)


def take_step(run: Run, state: TrainState, step: int, clock: Clock, wait: Callable[[], None]) -> Taken:
    """One update."""
    config = run.config
    indices, epoch = batch_indices(len(run.examples), config.batch, config.seed, step)
    with clock.phase("pack"):
        filled = pack(config, [run.examples[i] for i in indices])
        mask = filled.spread([np.ones(len(run.examples[i].response), bool) for i in indices], bool)
        lesson = put_microbatches(run.mesh, Lesson(filled.packed, mask, filled.used))
        tokens = int((filled.packed.segment_BT > 0).sum())
    wait()
    with clock.phase("train"):
        state, update = run.programs.sft_step(state, run.base, lesson)
        row = over_updates([jax.device_get(update)]) | {"update/padding": filled.padding, "data/epoch": epoch}
    return Taken(state, row, {"train": tokens}, row["loss/total"], [])


def pack(config: Sft, examples: Sequence[Example]) -> Filled:
    """A batch in rows of `row_tokens`; there is room for a row an example."""
    own, group_N = [len(example.prompt) - 1 + len(example.response) for example in examples], np.arange(len(examples))
    row_N = assign_rows(np.zeros(len(examples)), own, group_N, config.row_tokens)
    return fill_rows(examples, group_N, row_N, packed_shape(config), share=False)


def packed_shape(config: Sft) -> tuple[int, int, int]:
    """[M, B, T] of an update's arrays: a row for every example would be enough."""
    return -(-config.batch // config.microbatch), config.microbatch, config.row_tokens


def check_layout(config: Sft, shards: int) -> None:
    """Checks that every device gets a whole part of every microbatch.

    Raises:
      ValueError: names the key to change.
    """
    if config.microbatch % shards:
        raise ValueError(
            f"config.microbatch: got {config.microbatch} rows, expected a multiple of mesh.data = {shards}, so that "
            "every device has a row in every microbatch"
        )


def prepare(config: Sft) -> Run:
    """Opens model and data.

    Raises:
      ValueError: anything about config, data or model that cannot work.
    """
    mesh = make_mesh(config.mesh)
    check_layout(config, mesh.shape[DATA])
    policy = open_model(config.policy)
    say(f"policy {config.policy.weights}")
    problems = read_training_problems(config.data, references=True)
    prompts = policy_prompts(config, policy, problems)
    lengths = {name: len(prompt) for name, prompt in prompts.items()}
    problems = fitting("data.max_prompt_tokens", config.data.max_prompt_tokens, problems, lengths)
    examples = {p.id: make_example(policy.tokenizer, prompts[p.id], p) for p in problems}
    lengths = {name: len(example.prompt) + len(example.response) for name, example in examples.items()}
    problems = fitting("row_tokens", config.row_tokens, problems, lengths)
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
    return Run(
        config=config,
        mesh=mesh,
        policy=policy,
        programs=programs_room.build_sft(config, mesh, policy, steps),
        problems=problems,
        examples=kept,
        base=load_frozen(policy, mesh, config.seed) if config.lora.rank else (),
        steps=steps,
    )


def make_example(tokenizer: Tokenizer, prompt: Sequence[int], problem: Problem) -> Example:
    """The problem's prompt, and what the policy should write: the reference, as plain text, and an end of sequence."""
    return Example(tuple(prompt), (*tokenizer.encode(problem.reference), tokenizer.eos_ids[0]))


def task_of(run: Run) -> Task:
    """The run as the loop sees it."""
    return Task(
        config=run.config,
        checkpoint=run.config.checkpoint,
        steps=run.steps,
        policy=run.policy,
        abstract=run.programs.abstract,
        shardings=run.programs.shardings,
        first_state=functools.partial(first_state, run),
        problems=run.problems,
        take_step=functools.partial(take_step, run),
        export=functools.partial(export, run.config.lora, run.policy, run.base),
        shows="loss",
    )


def first_state(run: Run) -> TrainState:
    """The state before the first step."""
    return run.programs.init_state(run.base or load_frozen(run.policy, run.mesh, run.config.seed))
