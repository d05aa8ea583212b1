"""On-policy self-distillation: the frozen start of the policy, shown the reference solution, is its teacher.

    problems → prompts → sampler → teacher's log-probs → update → checkpoint, metrics

The policy samples from the bare problem, as everywhere.  The teacher scores the same tokens after a prompt that holds
problem and reference, and the policy is moved towards it by the reverse KL(policy ‖ teacher) of each token: from the
sampled tokens alone, with the advantage log π_teacher − log π of an on-policy update (the released baseline), or over
the full vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from exprl_jax import programs as programs_room
from exprl_jax.batch import Batch, PackedUpdate, join_batch, mean_padding, pack_update, update_metrics
from exprl_jax.config import Config
from exprl_jax.data.packing import Example, fill_rows
from exprl_jax.data.problems import Problem, batch_indices
from exprl_jax.data.prompts import teacher_prompt
from exprl_jax.data.training import kinds_of, within_budget
from exprl_jax.evaluation.live_report import keep_report
from exprl_jax.hosts import gather_rows, owned_problems, put_microbatches
from exprl_jax.layout import packed_shape
from exprl_jax.learning.update import over_updates
from exprl_jax.mesh import Placement
from exprl_jax.records import Teaching, TrainState
from exprl_jax.reward.statistics import rollout_statistics, verdict_indices
from exprl_jax.reward.verifiers.grading import submit_owned
from exprl_jax.reward.verifiers.verdict import Verdict
from exprl_jax.rl_run import RLRun, check_enough, open_run, settle_run_sizes, task_of
from exprl_jax.rollout.call import Prompts, make_prompts
from exprl_jax.rollout.usage import usage_metrics
from exprl_jax.rollout_log import rollout_row, token_row
from exprl_jax.run.clock import Clock
from exprl_jax.run.loop import StepResult, Task, run_task
from exprl_jax.run_evaluation import evaluation_of
from exprl_jax.wave import Wave, WaveRequest, sample_wave, wave_requests


@dataclasses.dataclass(frozen=True)
class DistillRun:
    """A run and its teacher.

    Attributes:
      prompts: the teacher's.
    """

    run: RLRun
    programs: programs_room.TeacherPrograms
    prompts: Prompts


class Collected(NamedTuple):
    """A step's rollouts, packed for policy and teacher: what `learn` takes.

    Attributes:
      problems: of the batch.
      gradings: of each wave, what waits for its verdicts, by problem.
      epoch: fraction of the data that batches have gone through.
      expected_P: tokens that a rollout of each problem was expected to have; None where nothing was known.
    """

    problems: Sequence[Problem]
    requests: Sequence[WaveRequest]
    waves: Sequence[Wave]
    gradings: Sequence[Callable[[], list[list[Verdict]]]]
    update: PackedUpdate
    teaching: Teaching
    epoch: float
    expected_P: np.ndarray | None


def distill(config: Config, workdir_path: str, accept_lost_records: bool = False) -> None:
    """Runs the experiment in its folder, from where it stands to its last step.

    Raises:
      ValueError: anything about config, data, model or folder that cannot work, in one line.
      FloatingPointError: a metric is not finite (names step and metric).
    """

    def open_task(stack: contextlib.ExitStack) -> Task:
        distilled = open_distill_run(config, stack)
        verbs = functools.partial(collect, distilled), functools.partial(learn, distilled)
        return task_of(distilled.run, *verbs, evaluation_of(distilled.run))

    run_task(config, open_task, workdir_path, keep_report, accept_lost_records)


def open_distill_run(config: Config, stack: contextlib.ExitStack) -> DistillRun:
    """Opens what the run needs, and the teacher's prompts.

    Problems whose reference leaves no room for a response within the teacher's context are dropped and counted.

    Raises:
      ValueError: too few problems are left, or anything that `open_run` refuses.
    """
    run = open_run(config, stack)
    prompts = {problem.id: teacher_prompt(run.policy.tokenizer, problem) for problem in run.problems}
    room = run.policy.arch.max_positions
    if config.updates.row_tokens:
        room = min(room, config.updates.row_tokens)
    room -= config.rollout.max_tokens
    lengths = {name: len(prompt) for name, prompt in prompts.items()}
    # The room is the smaller of the model's context and the row's, less a response.
    problems = within_budget("updates.row_tokens less rollout.max_tokens", room, run.problems, lengths)
    check_enough(problems, config.rollout.prompts)
    longer = [max(lengths[p.id], len(run.prompts.ids[p.id])) for p in problems]
    config = settle_run_sizes(config, run.mesh, run.models, longer)
    run = dataclasses.replace(run, config=config, problems=problems, kinds=kinds_of(problems))
    prompts = {problem.id: prompts[problem.id] for problem in problems}
    return DistillRun(run, programs_room.build_teacher(config, run.mesh, run.policy), make_prompts(prompts))


def collect(distilled: DistillRun, state: TrainState, step: int, clock: Clock) -> Collected:
    """Samples a step's batch of problems, and packs it for the policy and for its teacher."""
    run, config = distilled.run, distilled.run.config
    indices, epoch = batch_indices(len(run.problems), config.rollout.prompts, config.seed, step)
    problems, policy = [run.problems[i] for i in indices], run.model(state)
    expected_P = run.lengths.expected(problems)
    requests, waves, gradings = wave_requests(run, problems, step), [], []
    for request in requests:
        with clock.phase("sample"):
            waves.append(sample_wave(run, policy, request))
        owned_P = owned_problems(run.mesh, config.rollout.wave)
        gradings.append(submit_owned(run.graders, request.problems, waves[-1].responses, owned_P))
    with clock.phase("pack"):
        index_P = np.concatenate([request.index_P for request in requests])
        update, teaching = pack(distilled, problems, waves, index_P)
    return Collected(problems, requests, waves, gradings, update, teaching, epoch, expected_P)


def pack(
    distilled: DistillRun, problems: Sequence[Problem], waves: Sequence[Wave], index_P: np.ndarray
) -> tuple[PackedUpdate, Teaching]:
    """Rollouts in rows for the policy, and in the same rows for its teacher.

    Args:
      index_P: of this process's problems of the waves among the problems.
    """
    run = distilled.run
    parts = [(w.rollouts, w.rollouts.mask_PGR, np.zeros_like(w.rollouts.logp_PGR)) for w in waves]
    batch = join_batch(run, problems, parts, index_P)
    teacher_prompts = [distilled.prompts.ids[problem.id] for problem in problems]
    # A response stands in the same row for both, so a row has room for the longer of the two prompts.
    room_P = [max(map(len, pair)) for pair in zip(batch.prompts, teacher_prompts)]
    update = pack_update(run, batch, slice(None), room_P)
    return update, put_microbatches(run.mesh, teach(run, batch, update, teacher_prompts))


def learn(distilled: DistillRun, state: TrainState, collected: Collected, clock: Clock) -> StepResult:
    """Moves the policy towards its teacher; the state is donated."""
    run, config = distilled.run, distilled.run.config
    experience, teacher = collected.update.experience, run.frozen[config.reference]
    with clock.phase("train"):
        if config.distillation.kl == "full":
            state, update = distilled.programs.distill_step(state, run.base, teacher, collected.teaching, experience)
            row = over_updates([jax.device_get(update)])
        else:
            signal, kl = distilled.programs.signal(run.model(state), teacher, collected.teaching, experience)
            state, update = run.programs.train_step(state, run.base, experience.replace(advantage_MBT=signal))
            row = update_metrics(config, [jax.device_get(update)]) | {"distill/kl": float(kl)}
    with clock.phase("grade"):
        verdicts = [group for grading in collected.gradings for group in grading()]
    table = _gather_table(collected, verdicts)
    tokens = int(table["length_PG"].sum())
    row |= usage_metrics([usage for wave in collected.waves for usage in wave.usage], collected.expected_P)
    run.lengths.note(collected.problems, table["length_PG"])
    row |= rollout_statistics(table) | {"update/padding": mean_padding([collected.update])}
    row |= run.graders.throughput.report() | {"data/epoch": collected.epoch}
    samples = _sample_rows(run, collected, verdicts)
    return StepResult(state, row, {"sample": tokens, "train": tokens}, row["solve/accuracy"], samples)


def teach(run: RLRun, batch: Batch, update: PackedUpdate, teacher_prompts: Sequence[Sequence[int]]) -> Teaching:
    """The same responses after the prompts that the teacher is shown, in the same rows."""
    packed, share = update.packed, Placement(run.mesh).shares_segments
    responses = [
        batch.rollouts.tokens_PGR[p, g][batch.rollouts.mask_PGR[p, g]] for p, g in zip(update.group_N, update.index_N)
    ]
    examples = [Example(teacher_prompts[p], response) for p, response in zip(update.group_N, responses)]
    teachers = fill_rows(examples, update.group_N, packed.row_N, packed_shape(run.config), share)
    slots = [first + np.arange(len(response)) for first, response in zip(teachers.first_N, responses)]
    return Teaching(teachers.packed, packed.spread(slots, np.int32))


def _gather_table(collected: Collected, verdicts: Sequence[Sequence[Verdict]]) -> dict[str, np.ndarray]:
    """What `reward.statistics.rollout_statistics` reads, of all processes' problems; verdicts are of those that own
    them."""
    rollouts = jax.tree.map(lambda *x: np.concatenate(x), *(wave.rollouts for wave in collected.waves))
    verdict_PG = verdict_indices(verdicts)
    table = {"length_PG": rollouts.mask_PGR.sum(-1), "ended_PG": rollouts.ended_PG, "verdict_PG": verdict_PG}
    return gather_rows(table, np.concatenate([request.index_P for request in collected.requests]))


def _sample_rows(run: RLRun, collected: Collected, verdicts: Sequence[Sequence[Verdict]]) -> list[dict[str, Any]]:
    """Some of this process's rollouts; they have no segments and no scores."""
    G = run.config.rollout.group
    numbered = [(wave, i) for wave in collected.waves for i in range(len(wave.problems))]
    in_order = np.argsort(np.concatenate([request.index_P for request in collected.requests]))
    order = [(*numbered[row], g, verdicts[row][g]) for g in range(G) for row in in_order]
    return [
        rollout_row(run, wave, i, g, verdict)
        | {
            "segments": [
                {"text": wave.responses[i][g], "score": None, "advantage": None, "judge": None}
                | token_row(run, wave, i, g, slice(int(wave.rollouts.mask_PGR[i, g].sum())))
            ]
        }
        for wave, i, g, verdict in order[: run.config.log.rollouts]
    ]
