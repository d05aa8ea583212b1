"""A run's life: its folder, its state, its steps, its checkpoints and its end.  What a step does is the task's own."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax

from exprl_jax.config import Checkpoint, Config, Supervised, Watch
from exprl_jax.data.problems import Problem
from exprl_jax.data.training import check_position, check_same_problems, fingerprint
from exprl_jax.hosts import barrier, say
from exprl_jax.mesh import laid_out
from exprl_jax.records import TrainState
from exprl_jax.resolve import to_dict
from exprl_jax.run.checkpoint import Checkpoints
from exprl_jax.run.clock import Clock, CompileLedger, Progress
from exprl_jax.run.evaluating import Evaluation, headline
from exprl_jax.run.metrics import Metrics, read_metrics, truncate_after, write_evaluation, write_rollouts
from exprl_jax.run.stopping import StopRequest
from exprl_jax.run.trackers import check_trackers
from exprl_jax.run.watch import RunWatch, check_moved
from exprl_jax.run.workdir import Workdir, check_workdir, open_workdir

# Steps in a row, all of whose updates were skipped, after which a run ends.
_MOST_SKIPPED = 10
_ALL_SKIPPED = (
    "step {step}: every update of the last {count} steps was skipped, because loss, gradient, update or parameters "
    "were not finite; lower optimizer.learning_rate, or start from other weights; the run stops, its earlier "
    "checkpoints stand"
)


class Memory(Protocol):
    """What a task knows from its steps besides its state and its records."""

    def state(self) -> dict[str, Any]:
        """As JSON: a checkpoint holds it."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state`."""


class StepResult(NamedTuple):
    """What a step leaves behind.

    Attributes:
      state: after the step's updates; the loop counts the step itself.
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
    """What the loop has to know of a task.  A step is two verbs, between which a save that holds the state must end.

    Attributes:
      steps: of the whole run.
      parameter_bytes: of an export.
      abstract: the state's shapes and dtypes.
      shardings: where each of its arrays lies.
      first_state: makes the state before the first step.
      problems: what a position in the data refers to.
      collect: (state, step, clock) → a batch to learn from, of the task's own type; `step` counts from 0.
      learn: (state, batch, clock) → StepResult; donates the state.
      updates: optimizer updates of a step, at most.
      all_finite: parameters → whether every one is a finite number; of the whole mesh, so every process calls it.
      record_models: writes down what the models are, or checks that they are what is written down; every process calls
        it.
      export: writes a model from parameters to a workdir; every process calls it.
      evaluation: of the policy, inside the run; None where there is none.
      headline: what the number that progress shows is called.
      watch: how the run is watched for a collapse; None where there is nothing to watch.
      memory: what its steps have taught it; None where it learns nothing by the way.
    """

    config: Config | Supervised
    steps: int
    parameter_bytes: int
    abstract: TrainState
    shardings: TrainState
    first_state: Callable[[], TrainState]
    problems: Sequence[Problem]
    collect: Callable[[TrainState, int, Clock], Any]
    learn: Callable[[TrainState, Any, Clock], StepResult]
    updates: int
    all_finite: Callable[[Any], Any]
    record_models: Callable[[Workdir], None]
    export: Callable[[Any, Workdir], None]
    evaluation: Evaluation | None
    headline: str
    watch: Watch | None
    memory: Memory | None = None


class Best(NamedTuple):
    """The best checkpoint so far, by `checkpoint.best`."""

    step: int
    value: float


def run_task(
    config: Config | Supervised,
    open_task: Callable[[contextlib.ExitStack], Task],
    workdir_path: str,
    keep_report: Callable[[Workdir], None],
    accept_lost_records: bool = False,
) -> None:
    """Takes a run from where its folder stands to its last step, and exports the policy.

    Args:
      open_task: opens models and data, and puts on the stack what is to be closed at the run's end.  Called when folder
        and trackers are known to be usable: models load for minutes.
      keep_report: writes a workdir's report (`evaluation.live_report`); called at every checkpoint, in one process.
      accept_lost_records: go on although checkpoints or metrics of steps that were taken are gone.

    Raises:
      ValueError: anything about config, data, model or folder that cannot work, in one line.
      FloatingPointError: a metric is not finite (names step and metric).
    """
    check_workdir(workdir_path, to_dict(config))
    check_trackers(config.log.trackers)
    with contextlib.ExitStack() as stack:
        _run_opened(open_task(stack), workdir_path, keep_report, accept_lost_records)


def _run_opened(
    task: Task, workdir_path: str, keep_report: Callable[[Workdir], None], accept_lost_records: bool
) -> None:
    """Raises as `run_task` does, for what only the opened run can tell: other data, lost records, too small a disk."""
    config, checkpoint, trackers = to_dict(task.config), task.config.checkpoint, task.config.log.trackers
    abstract = laid_out(task.abstract, task.shardings)
    state_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract))
    kept = checkpoint.keep + 1 + bool(checkpoint.best)  # one more while a save is under way
    needed = kept * state_bytes + task.parameter_bytes
    with (
        open_workdir(
            workdir_path, config, needed_bytes=needed, process=jax.process_index(), barrier=barrier
        ) as workdir,
        Checkpoints(workdir.checkpoints, checkpoint.keep, config) as checkpoints,
        CompileLedger() as ledger,
        StopRequest() as stop,
    ):
        check_same_problems(task.problems)
        task.record_models(workdir)
        state, done, best = _restore_or_start(task, checkpoints, abstract)
        _refuse_dead(task, state, done)
        barrier()  # every process sees the records as they are before they are cut to the checkpoint
        if not accept_lost_records:
            check_records(workdir, checkpoint.every, done)
        barrier()
        truncate_after(workdir, done)
        barrier()  # every process watches the same rows
        rows = read_metrics(workdir.metrics)
        watch = RunWatch(task.watch, [row for row in rows if row["step"] > 0]) if task.watch else None
        with Metrics(workdir, trackers) as metrics, Progress(task.steps, done, task.headline) as progress:
            clock, skipped, idle, unsaved = Clock(), int(state.skipped), 0, []
            problems = fingerprint(task.problems)
            if task.evaluation is not None and not rows:
                row = _evaluate(task, workdir, state, 0, clock, progress)
                metrics.write(0, row | clock.report({}) | ledger.report())
            for step in range(done, task.steps):
                batch = task.collect(state, step, clock)
                # A save that still holds the state would keep it from being donated: there would be two of it.
                checkpoints.wait()
                result = task.learn(state, batch, clock)
                state = result.state.replace(step=result.state.step + 1)
                before, skipped = skipped, int(state.skipped)
                row = {**result.row, "update/skipped_total": skipped}
                row |= _evaluate(task, workdir, state, step + 1, clock, progress)
                row |= clock.report(result.tokens) | ledger.report()
                if result.samples:
                    write_rollouts(workdir, step + 1, result.samples)
                metrics.write(step + 1, row)
                idle = idle + 1 if skipped - before == task.updates else 0
                if idle == min(_MOST_SKIPPED, task.steps):
                    raise FloatingPointError(_ALL_SKIPPED.format(step=step + 1, count=idle))
                if step == first_moving(task, done):
                    check_moved(step + 1, row)
                if watch is not None:
                    watch.see(step + 1, row)
                unsaved.append(row)
                progress.show(step + 1, result.headline, result.tokens["train"] / row["time/step_seconds"])
                stopping = stop.agreed()
                if stopping or (step + 1) % checkpoint.every == 0 or step + 1 == task.steps:
                    best, unsaved = better_of(best, checkpoint, step + 1, unsaved), []
                    position = {"next_batch": step + 1, "problems": problems}
                    position["best"] = None if best is None else best._asdict()
                    if task.memory is not None:
                        position["memory"] = task.memory.state()
                    checkpoints.save(step + 1, state, position, None if best is None else best.step)
                    if jax.process_index() == 0:
                        keep_report(workdir)
                if stopping:
                    break
        checkpoints.wait()
        if int(state.step) < task.steps:
            say(f"stopped after step {int(state.step)} of {task.steps}; start again with the same command to go on")
            return
        _refuse_dead(task, state, task.steps)
        task.export(state.params, workdir)
        _print_summary(task, workdir, best, [] if watch is None else watch.told)


def _evaluate(
    task: Task, workdir: Workdir, state: TrainState, step: int, clock: Clock, progress: Progress
) -> dict[str, float | None]:
    """What an evaluation adds to a step's metrics; nothing where the run has none."""
    if task.evaluation is None:
        return {}
    measured = task.evaluation.at(state, step, clock)
    if measured.problems:
        write_evaluation(workdir, step, measured.problems)
    progress.note(headline(step, measured.row))
    return measured.row


def _restore_or_start(
    task: Task, checkpoints: Checkpoints, abstract: TrainState
) -> tuple[TrainState, int, Best | None]:
    """The state as it was left, or a new one; the steps that it has taken, and its best checkpoint."""
    restored = checkpoints.restore(abstract)
    if restored is None:
        return task.first_state(), 0, None
    check_position(restored.position, task.problems)
    say(f"resuming after step {restored.step} of {task.steps}")
    best = restored.position.get("best")
    if task.memory is not None and "memory" in restored.position:
        task.memory.restore(restored.position["memory"])
    return restored.state, restored.step, None if best is None else Best(**best)


def better_of(best: Best | None, config: Checkpoint, step: int, rows: Sequence[Mapping[str, Any]]) -> Best | None:
    """The better of the best checkpoint so far and the one that is about to be saved; the earlier where they tie.

    Args:
      rows: metrics of the steps since the checkpoint before; the later half of what they have of `config.best` is the
        new one's value, as a mean: all of it would credit a policy that has just collapsed with what it was before.

    Raises:
      ValueError: the run has no such metric (names the nearest).
    """
    if not config.best:
        return None
    if config.best not in rows[-1]:
        near = difflib.get_close_matches(config.best, rows[-1], n=3, cutoff=0.3)
        hint = ", for instance " + ", ".join(near) if near else ""
        raise ValueError(
            f"config.checkpoint.best: got {config.best!r}, expected a metric of this run{hint}; '' for none"
        )
    values = [row[config.best] for row in rows if row[config.best] is not None]
    if not values:
        return best
    late = values[len(values) // 2 :]
    new = Best(step, sum(late) / len(late))
    if best is None:
        return new
    gain = new.value - best.value if config.best_is == "highest" else best.value - new.value
    return new if gain > 0 else best


def check_records(workdir: Workdir, every: int, done: int) -> None:
    """Refuses to start over, or to go on with half a record, where somebody has deleted a part of the workdir.

    A step's metrics are written only when the checkpoint before it is on disk, so metrics of more than `every` steps
    are those of a run that had one; and a checkpoint has the metrics of all its steps beside it.

    Raises:
      ValueError: names what is gone.
    """
    rows = read_metrics(workdir.metrics)
    last = rows[-1]["step"] if rows else 0
    if done == 0 and last > every:
        lost = f"its metrics go to step {last}, but it has no checkpoint"
    elif done > last:
        lost = f"its newest checkpoint is of step {done}, but its metrics go to step {last}"
    else:
        return
    raise ValueError(
        f"--workdir {workdir.path}: {lost}; put back what was deleted, choose another --workdir, or pass "
        "--accept_lost_records to go on without it"
    )


def _refuse_dead(task: Task, state: TrainState, step: int) -> None:
    """Ends a run whose parameters hold no numbers: it could only sample noise and skip its updates.

    Raises:
      FloatingPointError: a parameter is infinite or NaN.
    """
    if not bool(task.all_finite(state.params)):
        where = f"after step {step}" if step else "before the first step: the weights of config.policy"
        raise FloatingPointError(
            f"parameters that are infinite or NaN {where}; start from other weights, or from an earlier checkpoint"
        )


def first_moving(task: Task, done: int) -> int:
    """The first step from `done` on whose update should move parameters: a warm-up begins with a rate of 0."""
    warms_up = int(task.config.optimizer.warmup * task.steps * task.updates) > 0
    return max(done, 1) if warms_up and task.updates == 1 else done


def _print_summary(task: Task, workdir: Workdir, best: Best | None, warnings: Sequence[str]) -> None:
    if jax.process_index() == 0:
        metric = task.config.checkpoint.best
        known = "" if best is None else f"  best         step {best.step}, {metric} {best.value:.4g}\n"
        events = f"  TensorBoard  {workdir.tensorboard}\n" if "tensorboard" in task.config.log.trackers else ""
        told = "".join(f"  watch        {warning}\n" for warning in warnings)
        rollouts = f"  rollouts     {workdir.rollouts}\n" if any(workdir.rollouts.iterdir()) else ""
        print(
            f"done\n{told}  checkpoints  {workdir.checkpoints}\n{known}  metrics      {workdir.metrics}\n"
            f"{events}{rollouts}  report       {workdir.report}\n"
            f"  export       {workdir.export}",
            flush=True,
        )
