"""Prefixes of fixed rollouts, continued by the policy and graded."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from exprl_jax.config import Calibrate
from exprl_jax.data.training import kinds_of, policy_prompts
from exprl_jax.evaluation.completions import Completer
from exprl_jax.evaluation.passes import Trace, decides
from exprl_jax.files import Ledger
from exprl_jax.hosts import local_problems, say
from exprl_jax.reward.verifiers.grading import Graders, check_answers, open_graders
from exprl_jax.reward.verifiers.verdict import Verdict
from exprl_jax.run.stopping import StopRequest
from exprl_jax.weights.language_model import LanguageModel, load_params

CONTINUATION_KEY = ("id", "rollout", "segment", "part")
CONTINUATION_FIELDS = {"id": str, "rollout": int, "segment": int, "part": int, "correct": int, "graded": int}


def continue_prefixes(
    config: Calibrate, policy: LanguageModel, mesh: Mesh, prefixes: Sequence[Trace], ledger: Ledger, stop: StopRequest
) -> bool:
    """Lets the policy go on after each prefix and grades what it arrives at; False where it was stopped.

    Rows are {id, rollout, segment, part, correct, graded}: counts of the part's continuations.

    Raises:
      ValueError: no prefix fits the policy's context.
    """
    sampling = config.prefixes.sampling
    local_problems(mesh, sampling.wave)  # whether waves can be divided over the mesh
    prompts = _prompts(config, policy, prefixes)
    by_name = {_name(trace): trace for trace in prefixes if _name(trace) in prompts}
    waiting = {
        part: [name for name, trace in by_name.items() if (*trace.rollout.key, trace.segment, part) not in ledger]
        for part in range(sampling.samples // sampling.group)
    }
    groups, done = sum(map(len, waiting.values())), 0
    if not groups:
        return True
    problems = list({trace.rollout.problem.id: trace.rollout.problem for trace in prefixes}.values())
    check_answers(problems)
    say(f"policy {config.policy.weights}; {len(by_name)} prefixes, {sampling.samples} continuations each")
    sizes = dict(wave=sampling.wave, max_tokens=sampling.max_tokens, slots=sampling.slots)
    params = load_params(policy, mesh, config.seed)
    completer = Completer(policy, mesh, params, prompts, **sizes, temperature=sampling.temperature, seed=config.seed)
    with open_graders(config.grader, config.code, kinds_of(problems)) as graders:
        for part, names in waiting.items():
            for start in range(0, len(names), sampling.wave):
                if stop.agreed():
                    return False
                wave = names[start : start + sampling.wave]
                completions = completer.complete(wave, sampling.group, step=part)
                texts = [[completion.text for completion in of_prefix] for of_prefix in completions]
                rows = _grade(graders, [by_name[name] for name in wave], texts)
                ledger.add(row | {"part": part} for row in rows)
                done += len(wave)
                say(f"continuations: {done}/{groups} groups of {sampling.group}")
    return True


def _prompts(config: Calibrate, policy: LanguageModel, prefixes: Sequence[Trace]) -> Mapping[str, list[int]]:
    """By name of the prefix: the problem's prompt, and the prefix after it token by token."""
    max_tokens, context = config.prefixes.sampling.max_tokens, policy.arch.max_positions
    problems = {trace.rollout.problem.id: trace.rollout.problem for trace in prefixes}
    bare = policy_prompts(config, policy.tokenizer, list(problems.values()))
    prompts = {_name(trace): [*bare[trace.rollout.problem.id], *trace.ids] for trace in prefixes}
    fitting = {name: ids for name, ids in prompts.items() if len(ids) + max_tokens <= context}
    if not fitting:
        raise ValueError(
            f"config.prefixes.sampling.max_tokens: got {max_tokens}, expected less: no prefix fits the policy's "
            f"context of {context} tokens with it"
        )
    if len(fitting) < len(prompts):
        say(f"left out {len(prompts) - len(fitting)} prefixes that leave no room for a continuation")
    return fitting


def _name(trace: Trace) -> str:
    return f"{trace.rollout.problem.id}#{trace.rollout.number}#{trace.segment}"


def _grade(graders: Graders, traces: Sequence[Trace], texts: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Counts of the correct and of the graded continuations of each trace."""
    pairs = [(t.rollout.problem, t.text + text) for t, of_trace in zip(traces, texts) for text in of_trace]
    verdicts, rows = iter(graders.submit(pairs).result()), []
    for trace, of_trace in zip(traces, texts, strict=True):
        of_trace = list(itertools.islice(verdicts, len(of_trace)))
        rows.append(
            {
                "id": trace.rollout.problem.id,
                "rollout": trace.rollout.number,
                "segment": trace.segment,
                "correct": sum(verdict == Verdict.correct for verdict in of_trace),
                "graded": sum(decides(trace.rollout.problem, verdict) for verdict in of_trace),
            }
        )
    return rows
