"""Reinforcement learning: sample from the bare problem, score, update.  Stage I, sparse GRPO and Stage II.

    problems → prompts → sampler → segments → judge | verifier → advantages → loss, update → checkpoint, metrics
    └ rl_run ───────────┘└ wave ──────────────────────────────────────────┘└ batch ──────┘└ run.loop ──────────┘

A step is two verbs.  `collect` samples a batch of problems, wave by wave, and turns scores into advantages and rollouts
into packed rows; `learn` updates the policy with them.  Each problem's kind has its route (`reward.routes`): what
scores its rollouts, and with which estimator.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from exprl_jax.batch import PackedUpdate, add_logp, join_waves, mean_padding, pack_updates, update_metrics
from exprl_jax.config import Config
from exprl_jax.data.problems import batch_indices
from exprl_jax.evaluation.live_report import keep_report
from exprl_jax.records import Experience, TrainState
from exprl_jax.reward.probe import probe_batch
from exprl_jax.reward.statistics import summarise
from exprl_jax.rl_run import RLRun, open_run, task_of
from exprl_jax.rollout.usage import usage_metrics
from exprl_jax.rollout_log import gather_table, sample_rows
from exprl_jax.run.clock import Clock
from exprl_jax.run.loop import StepResult, Task, run_task
from exprl_jax.run_evaluation import evaluation_of
from exprl_jax.wave import finish_wave, start_wave, wave_requests


class Collected(NamedTuple):
    """A step's rollouts, scored and packed: what `learn` takes.

    Attributes:
      updates: one for each optimizer update of the step.
      experiences: the updates' arrays on the mesh, with the log-probs that the loss compares with.
      row: metrics of the rollouts and their scores.
      tokens: sampled, read by the judge, and trained on.
      samples: rows of `rollouts/step_N.jsonl`.
    """

    updates: Sequence[PackedUpdate]
    experiences: Sequence[Experience]
    row: Mapping[str, float | None]
    tokens: Mapping[str, int]
    samples: Sequence[Mapping[str, Any]]


def train(config: Config, workdir_path: str, accept_lost_records: bool = False) -> None:
    """Runs the experiment in its folder, from where it stands to its last step.

    Raises:
      ValueError: anything about config, data, model or folder that cannot work, in one line.
      FloatingPointError: a metric is not finite (names step and metric).
    """

    def open_task(stack: contextlib.ExitStack) -> Task:
        run = open_run(config, stack)
        return task_of(run, functools.partial(collect, run), functools.partial(learn, run), evaluation_of(run))

    run_task(config, open_task, workdir_path, keep_report, accept_lost_records)


def collect(run: RLRun, state: TrainState, step: int, clock: Clock) -> Collected:
    """Samples and scores a step's batch of problems, and packs it for its updates."""
    config, policy = run.config, run.model(state)
    indices, epoch = batch_indices(len(run.problems), config.rollout.prompts, config.seed, step)
    problems = [run.problems[i] for i in indices]
    expected_P = run.lengths.expected(problems)
    # Verifiers work on one wave while the next is sampled.
    pending = [start_wave(run, policy, request, clock) for request in wave_requests(run, problems, step)]
    waves = [finish_wave(run, policy, wave, clock) for wave in pending]
    table = gather_table(run, waves)
    row = summarise(table, config.advantage, run.kinds) | {"data/epoch": epoch}
    row |= usage_metrics([usage for scored in waves for usage in scored.wave.usage], expected_P)
    run.lengths.note(problems, table["length_PG"])
    if step == 0:
        probe_batch(row, config)

    with clock.phase("pack"):
        updates = pack_updates(run, join_waves(run, problems, waves))
    with clock.phase("logp"):
        experiences = jax.block_until_ready([add_logp(run, policy, update.experience) for update in updates])
    return Collected(
        updates=updates,
        experiences=experiences,
        row=row | run.graders.throughput.report() | run.judge.report(),
        tokens={name: int(table[key].sum()) for name, key in _TOKENS.items()},
        samples=sample_rows(run, waves, config.log.rollouts),
    )


def learn(run: RLRun, state: TrainState, collected: Collected, clock: Clock) -> StepResult:
    """Updates the policy with a step's rollouts; the state is donated.

    Where every advantage is 0 and the loss is nothing but advantages, there is no gradient: such an update is left out,
    or Adam would go on by its old momentum.
    """
    loss, metrics = run.config.loss, []
    regularised = loss.kl_coef > 0 or loss.entropy_coef > 0
    with clock.phase("train"):
        for update, experience in zip(collected.updates, collected.experiences, strict=True):
            if update.has_advantage or regularised:
                state, measured = run.programs.train_step(state, run.base, experience)
                metrics.append(jax.device_get(measured))
    row = {**collected.row, **update_metrics(run.config, metrics), "update/padding": mean_padding(collected.updates)}
    row["update/without_advantage"] = len(collected.updates) - len(metrics)
    return StepResult(state, row, collected.tokens, row["reward/mean"], collected.samples)


# The rooms that work on tokens, and the table's count of each.
_TOKENS = {"sample": "sampled_P", "judge": "judge_tokens_P", "train": "length_PG"}
