"""A supervised run, whatever its examples are made from: references (`sft`) or a judge's lessons (`judge_training`).

examples → packed rows → update → checkpoint, metrics
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from exprl_jax import programs as programs_room
from exprl_jax.config import JudgeTraining, Supervised
from exprl_jax.data.packing import Branches, pack_branches
from exprl_jax.data.problems import batch_indices, order, problem_hash
from exprl_jax.hosts import put_microbatches, say
from exprl_jax.layout import packed_shape
from exprl_jax.learning.supervised import VALIDATION
from exprl_jax.learning.update import over_updates
from exprl_jax.mesh import Placement
from exprl_jax.model.lora import adapt
from exprl_jax.records import Lesson, TrainState
from exprl_jax.reward.rubric import rubric_files
from exprl_jax.run.clock import Clock
from exprl_jax.run.loop import StepResult, Task
from exprl_jax.sizes import Lengths, held_bytes, settle_sizes
from exprl_jax.weights.adapters import export_policy
from exprl_jax.weights.language_model import LanguageModel, load_params
from exprl_jax.weights.run_models import record_models

# An epoch that no run reaches: its order draws what is held back.
_HOLDING_BACK = (1 << 32) - 1


class Examples(NamedTuple):
    """What is learned from, or looked at.

    Attributes:
      items: what the examples are made from, in their order.
      branches: the examples of each item.
      shares: of each example of each item, how far it lies towards the digit after its own; 0 but for a judge's scores.
    """

    items: Sequence[Any]
    branches: Sequence[Branches]
    shares: Sequence[Sequence[float]]

    def take(self, indices: Sequence[int]) -> Examples:
        """Some of them."""
        return Examples(*([x[i] for i in indices] for x in self))


@dataclasses.dataclass(frozen=True)
class SupervisedRun:
    """What stays the same through a run.

    Attributes:
      policy: the model that is trained.
      examples: those that are trained on.
      held_back: those that are not, by which the run is watched; empty for none.
      ask: (what the model is now) → more metrics of a validation, those of `asked`.
      base: what the model's adapters stand on; nothing where it has none.
      shape: [M, B, T] of a batch's rows.
      steps: of the whole run.
    """

    config: Supervised
    mesh: Mesh
    policy: LanguageModel
    programs: programs_room.SftPrograms
    examples: Examples
    held_back: Examples
    ask: Callable[[Any], dict[str, float | None]]
    asked: Sequence[str]
    base: Any
    shape: tuple[int, int, int]
    steps: int


class Collected(NamedTuple):
    """A step's examples, packed: what `learn` takes.

    Attributes:
      lesson: the packed examples on the mesh.
      padding: fraction of their slots that hold no token.
      tokens: that they hold.
      epoch: fraction of the data that batches have gone through.
      validates: the held-back examples are looked at after the update.
    """

    lesson: Lesson
    padding: float
    tokens: int
    epoch: float
    validates: bool


def hold_back(
    config: Supervised, examples: Examples, others: Examples | None, text: Callable[[Any], str]
) -> tuple[Examples, Examples]:
    """The examples that are trained on, and those that are held back: `others`, or those of a fraction of the problems.

    Args:
      others: the examples of `validation.source`; None for none.
      text: of an item's problem; items of one problem are never divided.

    Raises:
      ValueError: a problem is in both.
    """
    problems, fraction = [text(item) for item in examples.items], config.validation.fraction
    key_N = [problem_hash(problem) for problem in problems]
    if others is not None:
        known = {problem_hash(text(item)) for item in others.items}
        if shared := [problem for problem, key in zip(problems, key_N) if key in known]:
            raise ValueError(
                f"config.validation.source: {len(shared)} of {len(problems)} training examples are of problems that it "
                f"holds, the first of {shared[0]!r:.60}; remove them from one of the two"
            )
        return examples, others
    distinct = list(dict.fromkeys(key_N))
    count = min(max(1, round(fraction * len(distinct))), len(distinct) - 1) if fraction else 0
    held = {distinct[i] for i in order(len(distinct), config.seed, _HOLDING_BACK)[:count]}
    trained = [i for i, key in enumerate(key_N) if key not in held]
    return examples.take(trained), examples.take([i for i, key in enumerate(key_N) if key in held])


def open_supervised(
    config: Supervised,
    mesh: Mesh,
    policy: LanguageModel,
    examples: Examples,
    held_back: Examples,
    ask: Callable[[Any], dict[str, float | None]] = lambda _: {},
    asked: Sequence[str] = (),
) -> SupervisedRun:
    """The run of some examples that fit into rows.

    Args:
      policy: the model that is trained.
      examples: those that are trained on.
      held_back: those that are not; empty for none.
      ask: (parameters, with their adapters) → more metrics of a validation.
      asked: the keys of these metrics.

    Raises:
      ValueError: one is beyond the model's context, or they make no batch.
    """
    every = (*examples.branches, *held_back.branches)
    longest = max(len(x.prompt) + len(x.response) for branches in every for x in branches.examples)
    if longest > policy.arch.max_positions:
        raise ValueError(
            f"config.row_tokens: got {config.row_tokens}, which lets in an example of {longest} tokens; expected at "
            f"most {policy.arch.max_positions}, the model's context length: then longer examples are dropped"
        )
    count = len(examples.items)
    if count < config.batch:
        raise ValueError(f"config.batch: got {config.batch}, expected at most {count}, the examples left")
    steps = config.steps or config.epochs * (count // config.batch)
    programs = programs_room.build_sft(config, mesh, policy, steps)
    held = held_bytes(programs.abstract, programs.shardings)
    held += policy.parameter_bytes // mesh.size if config.lora.rank else 0
    share = Placement(mesh).shares_segments
    lengths_N = [tokens for branches in every for tokens in packed_lengths(branches, share)]
    lengths = Lengths(max(lengths_N), np.mean(lengths_N), config.batch)
    config = settle_sizes(config, lengths, policy.arch, mesh, held)
    say(f"{steps} updates of {config.batch} examples in rows of {config.row_tokens} tokens")
    if held_back.items:
        say(f"{len(held_back.items)} examples are held back, and looked at every {config.validation.every} updates")
    microbatches, *rows = packed_shape(config)
    if not share:
        microbatches *= max(len(branches.examples) for branches in every)  # each may need a row of its own
    return SupervisedRun(
        config=config,
        mesh=mesh,
        policy=policy,
        programs=programs,
        examples=examples,
        held_back=held_back,
        ask=ask,
        asked=asked,
        base=load_params(policy, mesh, config.seed) if config.lora.rank else (),
        shape=(microbatches, *rows),
        steps=steps,
    )


def packed_lengths(branches: Branches, share: bool) -> list[int]:
    """Tokens of what must lie in one row: all examples that share their beginning, or each by itself."""
    apart = [len(example.prompt) + len(example.response) for example in branches.examples]
    return [branches.tokens] if share else apart


def collect(run: SupervisedRun, state: TrainState, step: int, clock: Clock) -> Collected:
    """Packs a step's batch of examples."""
    config, made = run.config, step + 1
    indices, epoch = batch_indices(len(run.examples.items), config.batch, config.seed, step)
    with clock.phase("pack"):
        lesson, padding, tokens = pack(run, run.examples.take(indices))
    validates = bool(run.held_back.items) and (made % config.validation.every == 0 or made == run.steps)
    return Collected(lesson, padding, tokens, epoch, validates)


def learn(run: SupervisedRun, state: TrainState, collected: Collected, clock: Clock) -> StepResult:
    """One update, and a validation where it is time for one; the state is donated."""
    with clock.phase("train"):
        state, update = run.programs.sft_step(state, run.base, collected.lesson)
        row = over_updates([jax.device_get(update)])
    row |= {"update/padding": collected.padding, "data/epoch": collected.epoch}
    if collected.validates:
        with clock.phase("validate"):
            row |= validate(run, state)
    elif run.held_back.items:
        row |= dict.fromkeys((*VALIDATION, *run.asked))
    return StepResult(state, row, {"train": collected.tokens}, row["loss/total"], [])


def validate(run: SupervisedRun, state: TrainState) -> dict[str, float | None]:
    """What the model makes of the held-back examples: metrics of `supervised.VALIDATION`, and what `ask` adds."""
    count, sums = len(run.held_back.items), []
    for start in range(0, count, run.config.batch):
        lesson, *_ = pack(run, run.held_back.take(range(start, min(start + run.config.batch, count))))
        sums.append(run.programs.validate(state.params, run.base, lesson))
    loss, right, tokens = (sum(float(x[name]) for x in jax.device_get(sums)) for name in ("loss", "right", "tokens"))
    row = dict(zip(VALIDATION, (loss / tokens, right / tokens), strict=True))
    return row | run.ask(adapt(run.config.lora, run.base, state.params))


def pack(run: SupervisedRun, batch: Examples) -> tuple[Lesson, float, int]:
    """A batch in rows of `row_tokens` on the mesh, the fraction of their slots that is padding, and their tokens."""
    packed = pack_branches(batch.branches, run.shape, Placement(run.mesh).shares_segments)
    responses = [example.response for branches in batch.branches for example in branches.examples]
    shares = [share for of_item in batch.shares for share in of_item]
    mask = packed.spread([np.ones(len(response), bool) for response in responses], bool)
    share = packed.spread([np.array([share]) for share in shares], np.float32)
    lesson = put_microbatches(run.mesh, Lesson(packed.packed, mask, share, packed.used))
    return lesson, packed.padding, int((packed.packed.segment_BT > 0).sum())


def task_of(run: SupervisedRun) -> Task:
    """The run as the loop sees it."""
    return Task(
        config=run.config,
        steps=run.steps,
        parameter_bytes=run.policy.parameter_bytes,
        abstract=run.programs.abstract,
        shardings=run.programs.shardings,
        first_state=functools.partial(first_state, run),
        problems=(*run.examples.items, *run.held_back.items),
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
        evaluation=None,
        headline="loss",
        watch=None,
    )


def first_state(run: SupervisedRun) -> TrainState:
    """The state before the first step."""
    return run.programs.init_state(run.base or load_params(run.policy, run.mesh, run.config.seed))
