"""Rollouts of a self-distillation's first batch, with what the teacher is shown and how it weighs every token."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from exprl_jax.config import Config
from exprl_jax.distill import DistillRun, open_distill_run, pack
from exprl_jax.hosts import owned_problems
from exprl_jax.reward.verifiers.grading import submit_owned
from exprl_jax.reward.verifiers.verdict import Verdict
from exprl_jax.rl_run import first_policy
from exprl_jax.rollout_log import rollout_row
from exprl_jax.show.rollouts import check_count, first_requests, problem_record, prompted_model, without_problem
from exprl_jax.show.warnings import rollout_warnings
from exprl_jax.wave import Wave, WaveRequest, sample_wave


def show_distilled(config: Config, count: int) -> Iterator[dict[str, Any]]:
    """The first problems of a run's first batch: its rollouts, and the teacher's log-ratio of their tokens.

    Raises:
      ValueError: there are not so many problems in a batch, or anything that a run refuses.
    """
    check_count(count, config.rollout.prompts, "config.rollout.prompts")
    with contextlib.ExitStack() as stack:
        distilled = open_distill_run(config, stack)
        run = distilled.run
        policy = first_policy(run)
        for request in first_requests(run, count):
            wave = sample_wave(run, policy, request)
            owned_P = owned_problems(run.mesh, config.rollout.wave) & request.live_P
            verdicts = submit_owned(run.graders, wave.problems, wave.responses, owned_P)()
            gaps = logratios(distilled, policy, request, wave)
            yield from (_taught(distilled, wave, i, verdicts[i], gaps[i]) for i in np.flatnonzero(request.live_P))


def logratios(distilled: DistillRun, policy: Any, request: WaveRequest, wave: Wave) -> list[list[np.ndarray]]:
    """log π_teacher − log π of each token, nats, by problem and index in the group; what an update takes for its
    advantages where `distillation.kl` is `sampled`."""
    run, teacher = distilled.run, distilled.run.frozen[distilled.run.config.reference]
    update, teaching = pack(distilled, wave.problems, [wave], np.arange(len(wave.problems)))
    gap_MBT, _ = jax.device_get(distilled.programs.signal(policy, teacher, teaching, update.experience))
    rows, packed = gap_MBT.reshape(-1, gap_MBT.shape[-1]), update.packed
    lengths = wave.rollouts.mask_PGR.sum(-1)
    gaps = [[np.zeros(0, np.float32)] * run.config.rollout.group for _ in wave.problems]
    for i, g, row, first in zip(update.group_N, update.index_N, packed.row_N, packed.first_N, strict=True):
        gaps[i][g] = rows[row, first : first + lengths[i, g]]
    return gaps


def _taught(
    distilled: DistillRun, wave: Wave, i: int, verdicts: list[Verdict], gaps: list[np.ndarray]
) -> dict[str, Any]:
    run, problem = distilled.run, wave.problems[i]
    tokenizer = run.policy.tokenizer
    policy = prompted_model(run.config.policy.weights, tokenizer, run.prompts.ids[problem.id])
    record = problem_record("distill", problem, policy)
    record["teacher"] = prompted_model(run.config.reference.weights, tokenizer, distilled.prompts.ids[problem.id])
    record["judge"], record["shown"] = None, 0
    record["rollouts"] = [
        without_problem(rollout_row(run, wave, i, g, verdicts[g]))
        | {
            "pieces": tokenizer.spell(wave.rollouts.tokens_PGR[i, g, : len(gaps[g])].tolist()),
            "logratio": [round(float(gap), 6) for gap in gaps[g]],
        }
        for g in range(run.config.rollout.group)
    ]
    record["warnings"] = rollout_warnings(record, run.config.rollout.max_tokens) + _ratio_warnings(record)
    return record


def _ratio_warnings(record: dict[str, Any]) -> list[str]:
    ratios = [abs(ratio) for rollout in record["rollouts"] for ratio in rollout["logratio"]]
    if ratios and max(ratios) < 1e-3:
        return [f"the teacher agrees with the policy on every token, to {max(ratios):.1g} nats: nothing to learn from"]
    return []
