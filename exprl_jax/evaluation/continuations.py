"""Prefixes of fixed rollouts, continued by the policy and graded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from exprl_jax import programs as programs_room
from exprl_jax.config import Calibrate
from exprl_jax.data.training import kinds_of, policy_prompts
from exprl_jax.evaluation.asking import Trace, says_something
from exprl_jax.evaluation.fixed_rollouts import Ledger, renamed
from exprl_jax.hosts import local_problems, say
from exprl_jax.reward.verifiers.grading import Graders, check_answers, open_graders
from exprl_jax.reward.verifiers.verdict import Verdict
from exprl_jax.rollout.call import make_prompts, texts_of
from exprl_jax.run.stopping import StopRequest
from exprl_jax.weights.language_model import load_params, open_model


def continue_prefixes(
    config: Calibrate, mesh: Mesh, prefixes: Sequence[Trace], ledger: Ledger, stop: StopRequest
) -> bool:
    """Lets the policy go on after each prefix and grades what it arrives at; False where it was stopped.

    A prefix is put after the prompt token by token.  Rows are {id, rollout, segment, part, correct, graded}: of the
    part's continuations.

    Raises:
      ValueError: no prefix fits the policy's context.
    """
    how, policy = config.prefixes.sampling, open_model(config.policy)
    problems = {trace.rollout.problem.id: trace.rollout.problem for trace in prefixes}
    bare = policy_prompts(config, policy.tokenizer, list(problems.values()))
    room = policy.arch.max_positions - how.max_tokens
    made = {trace: [*bare[trace.rollout.problem.id], *trace.ids] for trace in prefixes}
    kept = {trace: ids for trace, ids in made.items() if len(ids) <= room}
    if not kept:
        raise ValueError(
            f"config.prefixes.sampling.max_tokens: got {how.max_tokens}, expected less: no prefix fits the policy's "
            f"context of {policy.arch.max_positions} tokens with it"
        )
    if len(kept) < len(made):
        say(f"left out {len(made) - len(kept)} prefixes that leave no room for a continuation")
    waiting = [
        (part, trace)
        for part in range(how.samples // how.group)
        for trace in kept
        if (trace.rollout.problem.id, trace.rollout.number, trace.segment, part) not in ledger
    ]
    if not waiting:
        return True
    check_answers(list(problems.values()))
    named = {t: renamed(t.rollout.problem, f"{t.rollout.problem.id}#{t.rollout.number}#{t.segment}") for t in kept}
    prompts = make_prompts({named[trace].id: ids for trace, ids in kept.items()})
    say(f"policy {config.policy.weights}; {len(kept)} prefixes, {how.samples} continuations each")
    params = load_params(policy, mesh, config.seed)
    sampler = programs_room.build_sampler(policy, mesh, max_tokens=how.max_tokens, wave=how.wave)
    local_problems(mesh, how.wave)
    with open_graders(config.grader, config.code, kinds_of(list(problems.values()))) as graders:
        done = 0
        for part, wave in _parts(waiting, how.wave):
            if stop.agreed():
                return False
            filled = [*wave, *[wave[0]] * (how.wave - len(wave))]
            rollouts = sampler(
                params,
                prompts,
                [named[trace] for trace in filled],
                group=how.group,
                temperature=how.temperature,
                seed=config.seed,
                step=part,
                attempt=0,
                live_P=np.arange(how.wave) < len(wave),
            )
            _, texts = texts_of(rollouts, policy.tokenizer.decode)
            ledger.add(_graded(graders, part, wave, texts))
            done += len(wave)
            say(f"continuations: {done}/{len(waiting)} groups of {how.group}")
    return True


def _parts(waiting: Sequence[tuple[int, Trace]], size: int) -> Iterator[tuple[int, list[Trace]]]:
    """Waves, each of one part."""
    for part in sorted({part for part, _ in waiting}):
        of_part = [trace for other, trace in waiting if other == part]
        for start in range(0, len(of_part), size):
            yield part, of_part[start : start + size]


def _graded(graders: Graders, part: int, wave: Sequence[Trace], texts: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    rows = [[(t.rollout.problem, t.text + text) for text in of_trace] for t, of_trace in zip(wave, texts)]
    verdicts = iter(graders.submit([row for of_trace in rows for row in of_trace]).result())
    found = []
    for trace, of_trace in zip(wave, rows, strict=True):
        said = [next(verdicts) for _ in of_trace]
        found.append(
            {
                "id": trace.rollout.problem.id,
                "rollout": trace.rollout.number,
                "segment": trace.segment,
                "part": part,
                "correct": sum(verdict == Verdict.correct for verdict in said),
                "graded": sum(says_something(trace.rollout.problem, verdict) for verdict in said),
            }
        )
    return found
