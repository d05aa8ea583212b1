"""A run's life: its folder, its state, its steps, its checkpoints and its end.  What a step does is the task's own."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from exprl_jax.checkpoint import Checkpoints
from exprl_jax.config import Checkpoint, Lora, to_dict
from exprl_jax.data.problems import Problem
from exprl_jax.metrics import Clock, CompileLedger, Metrics, Progress, truncate_after, write_rollouts
from exprl_jax.model.language_model import LanguageModel, save_description
from exprl_jax.model.lora import adapt, fetch_merged, save_adapters
from exprl_jax.model.weights import export_folder, fetch_tensor, whole_array
from exprl_jax.records import TrainState
from exprl_jax.stopping import StopRequest
from exprl_jax.workdir import Workdir, open_workdir


class Taken(NamedTuple):
    """What a step leaves behind.

    Attributes:
      state: after the step; its `step` is still the old one.
      row: metrics.
      tokens: that each phase of the clock has worked on, `train` among them.
      headline: the number that progress shows, or None where it is not defined.
      samples: rows of `rollouts/step_N.jsonl`.
    """

    state: TrainState
    row: Mapping[str, float | None]
    tokens: Mapping[str, int]
    headline: float | None
    samples: Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Task:
    """What the loop has to know of a task.

    Attributes:
      steps: of the whole run.
      policy: what is trained and exported.
      abstract: the state's shapes and dtypes.
      shardings: where each of its arrays lies.
      first_state: makes the state before the first step.
      problems: what a position in the data refers to.
      take_step: (state, step, clock, checkpoints' wait) → Taken; `step` counts from 0.  The wait must be called before
        the state is donated.
      export: writes a model from parameters to a workdir; every process calls it.
      shows: what the headline is.
    """

    config: Any
    checkpoint: Checkpoint
    steps: int
    policy: LanguageModel
    abstract: TrainState
    shardings: TrainState
    first_state: Callable[[], TrainState]
    problems: Sequence[Problem]
    take_step: Callable[[TrainState, int, Clock, Callable[[], None]], Taken]
    export: Callable[[Any, Workdir], None]
    shows: str


def follow(task: Task, workdir_path: str) -> None:
    """Takes a run from where its folder stands to its last step, and exports the policy.

    Raises:
      ValueError: the folder is another run's, the data have changed, the disk is too small.
      FloatingPointError: a metric is not finite (names step and metric).
    """
    abstract = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), task.abstract, task.shardings
    )
    state_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract))
    export_bytes = task.policy.arch.parameters * np.dtype(task.policy.how.param_dtype).itemsize
    needed = (task.checkpoint.keep + 1) * state_bytes + export_bytes
    config = to_dict(task.config)
    with (
        open_workdir(
            workdir_path, config, needed_bytes=needed, process=jax.process_index(), barrier=barrier
        ) as workdir,
        Checkpoints(workdir.checkpoints, task.checkpoint.keep, config) as checkpoints,
        CompileLedger() as ledger,
        StopRequest() as stop,
    ):
        check_same_problems(task.problems)
        if jax.process_index() == 0:
            save_description(task.policy, workdir.model)
        # -------------------------------------------------------------- the state, new or as it was left
        restored = checkpoints.restore(abstract)
        state = task.first_state() if restored is None else restored.state
        done = 0 if restored is None else restored.step
        if restored is not None:
            check_position(restored.position, task.problems)
        truncate_after(workdir, done)
        if restored is not None:
            say(f"resuming after step {done} of {task.steps}")

        # -------------------------------------------------------------- the loop
        with Metrics(workdir) as metrics, Progress(task.steps, done, task.shows) as progress:
            clock = Clock()
            for step in range(done, task.steps):
                # A save that still holds the state would keep it from being donated: a second copy of it.
                taken = task.take_step(state, step, clock, checkpoints.wait)
                state = taken.state.replace(step=taken.state.step + 1)
                row = dict(taken.row) | {"update/skipped_total": int(state.skipped)}
                row |= clock.report(taken.tokens) | ledger.report()
                if taken.samples:
                    write_rollouts(workdir, step + 1, taken.samples)
                metrics.write(step + 1, row)
                progress.show(step + 1, taken.headline, taken.tokens["train"] / row["time/step_seconds"])
                stopping = stop.agreed()
                if stopping or (step + 1) % task.checkpoint.every == 0 or step + 1 == task.steps:
                    position = {"next_batch": step + 1, "problems": fingerprint(task.problems)}
                    checkpoints.save(step + 1, state, position)
                if stopping:
                    break
        checkpoints.wait()
        if int(state.step) < task.steps:
            say(f"stopped after step {int(state.step)} of {task.steps}; start again with the same command to go on")
            return
        task.export(state.params, workdir)
        _summary(workdir)


def export(lora: Lora, policy: LanguageModel, base: Any, params: Any, workdir: Workdir) -> None:
    """Writes the trained policy as a Hugging Face folder; adapters merged into their base, and beside it for PEFT."""
    how, dtype = policy.execution, policy.how.param_dtype
    if lora.rank:
        adapters = jax.tree.map(whole_array, params)
        if jax.process_index() == 0:
            save_adapters(workdir.adapter, adapters, policy.arch, how, lora, policy.how.weights)
    export_folder(
        adapt(lora, base, params),
        policy.arch,
        how,
        workdir.export,
        policy.tokenizer,
        dtype,
        fetch=fetch_merged if lora.rank else fetch_tensor,
    )


def fingerprint(problems: Sequence[Problem]) -> str:
    """Of the problems and their order in the source: what a position in the data refers to."""
    texts = "\0".join(f"{p.id}\0{p.problem}\0{p.choices}\0{p.reference}\0{p.answer}" for p in problems)
    return hashlib.blake2b(texts.encode(), digest_size=16).hexdigest()


def check_position(position: Mapping[str, Any], problems: Sequence[Problem]) -> None:
    """Refuses to go on in other data than a checkpoint was made with.

    Raises:
      ValueError: the problems have changed.
    """
    if position["problems"] != fingerprint(problems):
        raise ValueError(
            f"config.data.source: its problems are not those of the run's first {position['next_batch']} steps; restore "
            "the data, or choose another --workdir"
        )


def check_same_problems(problems: Sequence[Problem]) -> None:
    """Refuses to start where processes have read different problems: each would sample and grade rows of its own data.

    Every process must call this.

    Raises:
      ValueError: in every process; names those that differ from process 0.
    """
    mine = np.frombuffer(bytes.fromhex(fingerprint(problems)), np.uint8)
    theirs = np.atleast_2d(multihost_utils.process_allgather(mine))
    if other := np.flatnonzero((theirs != theirs[0]).any(-1)).tolist():
        raise ValueError(
            f"config.data.source: processes {', '.join(map(str, other))} have read other problems than process 0; give all "
            "hosts the same files"
        )


def say(text: str) -> None:
    """A line on stderr, from one process."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


def barrier() -> None:
    """Returns once every process has called it."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("workdir")


def _summary(workdir: Workdir) -> None:
    if jax.process_index() == 0:
        print(
            f"done\n  checkpoints  {workdir.checkpoints}\n  metrics      {workdir.metrics}\n"
            f"  TensorBoard  {workdir.tensorboard}\n  rollouts     {workdir.rollouts}\n  export       {workdir.export}",
            flush=True,
        )
