"""Samples of problems, drawn a wave at a time and graded while the next wave is drawn.

    problems ─ sample_waves ─→ SampleWave ─ start_wave ─→ PendingWave ─ finish_wave ─→ tokens, lengths, verdicts

The evaluation task and the evaluation inside a run draw with these.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from exprl_jax.data.problems import Problem
from exprl_jax.hosts import gather_rows, local_problems, owned_problems
from exprl_jax.model.decoder import Params
from exprl_jax.records import Rollouts
from exprl_jax.reward.judges import AnyJudge
from exprl_jax.reward.statistics import verdict_indices
from exprl_jax.reward.verifiers.grading import Graders, submit_owned
from exprl_jax.reward.verifiers.verdict import Verdict
from exprl_jax.rollout.call import Prompts, Sampler, texts_of


@dataclasses.dataclass(frozen=True)
class Bench:
    """What samples are drawn and graded with.

    Attributes:
      decode: token ids → text.
      judge: says yes or no to open-ended answers.
      group: samples of a problem drawn at a time.
      seed: of the samples.
    """

    sampler: Sampler
    prompts: Prompts
    decode: Callable[[list[int]], str]
    judge: AnyJudge
    graders: Graders
    group: int
    temperature: float
    seed: int


class SampleWave(NamedTuple):
    """Problems to draw a group of samples of, as many as a wave has.

    Attributes:
      live_P: problems to sample; the others fill up the wave.
      part: number of the group: its first sample is `part` times the size of groups.
    """

    problems: Sequence[Problem]
    live_P: np.ndarray
    part: int


class PendingWave(NamedTuple):
    """A wave that is sampled, while its verifiers are still at work.

    Attributes:
      index_P: of this process's problems in the wave; the other fields are of these alone.
      judge_verdicts: on open-ended answers; none for other problems.
      grading: waits for the verifiers' verdicts.
    """

    wave: SampleWave
    index_P: np.ndarray
    rollouts: Rollouts
    judge_verdicts: Sequence[Sequence[Verdict]]
    grading: Callable[[], list[list[Verdict]]]


def sample_waves(problems: Sequence[Problem], lacking: np.ndarray, size: int) -> list[SampleWave]:
    """Waves of one part each: the first part of all problems, then the second; the last wave of a part is filled up.

    Args:
      lacking: bool [P, parts], groups to sample.
    """
    waves = []
    for part in range(lacking.shape[1]):
        unsampled = [problem for problem, lacks in zip(problems, lacking[:, part], strict=True) if lacks]
        for start in range(0, len(unsampled), size):
            some = unsampled[start : start + size]
            filled = [*some, *[some[0]] * (size - len(some))]
            waves.append(SampleWave(filled, np.arange(size) < len(some), part))
    return waves


def start_wave(bench: Bench, params: Params, wave: SampleWave, step: int, attempt: int) -> PendingWave:
    """Samples a wave, gives it to the verifiers, and asks the judge about open-ended answers.

    Where processes share rows, one of them has them graded, and asks an endpoint; the others take its answers.

    Args:
      step, attempt: with seed, problem and index in the group, the identity of a sample's random numbers.
    """
    mesh, size = bench.sampler.mesh, bench.sampler.wave
    index_P = local_problems(mesh, size)
    problems, live_P = [wave.problems[i] for i in index_P], wave.live_P[index_P]
    rollouts, _ = bench.sampler(
        params,
        bench.prompts,
        problems,
        group=bench.group,
        temperature=bench.temperature,
        seed=bench.seed,
        step=step,
        attempt=attempt,
        live_P=live_P,
    )
    _, responses = texts_of(rollouts, bench.decode)
    owned_P = live_P & owned_problems(mesh, size)
    grading = submit_owned(bench.graders, problems, responses, owned_P)
    # A judge on the mesh is asked by all processes, for a program is the whole mesh's.
    asks_P = live_P if bench.judge.on_mesh else owned_P
    open_ended = [
        group if asks and problem.traits.by_judge else []
        for problem, group, asks in zip(problems, responses, asks_P, strict=True)
    ]
    return PendingWave(wave, index_P, rollouts, bench.judge.verify(problems, open_ended), grading)


def finish_wave(pending: PendingWave) -> dict[str, np.ndarray]:
    """Tokens, lengths, ends and verdicts of the whole wave, on every process."""
    graded = pending.grading()
    verdicts = [judged or of_group for judged, of_group in zip(pending.judge_verdicts, graded, strict=True)]
    table = {
        "tokens_PGR": pending.rollouts.tokens_PGR,
        "length_PG": pending.rollouts.mask_PGR.sum(-1),
        "ended_PG": pending.rollouts.ended_PG,
        "verdict_PG": verdict_indices(verdicts),
    }
    return gather_rows(table, pending.index_P)
