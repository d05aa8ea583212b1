"""Calls that continue or read rows on their contexts: sampling, judging, and answers to whole prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from exprl_jax.config import Config, Evaluate, Judge
from exprl_jax.data.problems import Problem
from exprl_jax.kinds import KINDS
from exprl_jax.mesh import DATA
from exprl_jax.plan.arguments import array, draw_shapes, frozen_parameters
from exprl_jax.plan.costs import Cost, forward, seen_pairs
from exprl_jax.plan.memory import cache_bytes, copy_bytes, keys_bytes, token_bytes, weight_bytes
from exprl_jax.plan.models import known_model
from exprl_jax.plan.records import BATCH, COPY, KEYS, Call, Result, RowShapes
from exprl_jax.programs import build_judge, build_sampler
from exprl_jax.records import BranchRows, Context, Rows, Traces
from exprl_jax.reward.branching import WRITTEN, branch_tokens, own_width
from exprl_jax.reward.checklists import ChecklistPrompts
from exprl_jax.reward.judge import score_prompt, verify_prompt
from exprl_jax.reward.judge_prompts import Unit
from exprl_jax.reward.judges import check_judge_lengths
from exprl_jax.reward.routes import ROUTES
from exprl_jax.rollout.call import padded_width
from exprl_jax.rollout.sampler import CHUNK
from exprl_jax.weights.language_model import LanguageModel

_SAMPLING = ("rollout.wave", "rollout.slots", "rollout.expected_tokens", "mesh.model", "policy.execution.kv_dtype")
_EVALUATING = ("sampling.wave", "sampling.slots", "sampling.group", "mesh.model", "policy.execution.kv_dtype")
_JUDGING = (
    *("judge.wave", "rollout.wave", "judge.max_context_tokens", "judge.max_trace_tokens", "judge.max_tokens"),
    "mesh.model",
)


def sampling_calls(config: Config | Evaluate, mesh: Mesh, acting: tuple[str, Any]) -> list[Call]:
    model, evaluates = known_model(config.policy), isinstance(config, Evaluate)
    rollout = config.sampling if evaluates else config.rollout
    waves, settings = (1, _EVALUATING) if evaluates else (rollout.prompts // rollout.wave, _SAMPLING)
    # A prompt's last token is the first of its rows.
    context = padded_width(config.data.max_prompt_tokens - 1)
    queue = dict(slots=rollout.slots, expected_tokens=0 if evaluates else rollout.expected_tokens)
    rows = RowShapes(rollout.wave, rollout.group, context, 1, rollout.max_tokens, **queue)
    sampler = build_sampler(model, mesh, max_tokens=rollout.max_tokens, wave=rollout.wave, **queue)
    programs = {"prefill": sampler.prefill, "sample": sampler.sample}
    return row_calls(model, mesh, acting, rows, programs, "sample", (waves, waves), settings)


def judging_calls(config: Config, mesh: Mesh, prefixes: int) -> list[Call]:
    judge, rollout = config.judge, config.rollout
    model, answer = known_model(judge.model), judge.max_tokens if judge.readout == "text" else 0
    check_judge_lengths(judge, model.arch)
    units: set[Unit] = {judge.unit if ROUTES[name].per_segment else "outcome" for name in config.routes.all}
    context = padded_width(judge.max_context_tokens)
    suffix = judge_suffix(judge, model, units)
    built, wave = build_judge(judge, mesh, model), judge.wave or rollout.wave
    waves = rollout.prompts // wave
    params = frozen_parameters(config, mesh, judge.model)
    rows = RowShapes(wave, rollout.group, context, padded_width(judge.max_trace_tokens + suffix), answer)
    if prefixes > 1 and judge.unit == "prefix" and built.branches is not None:
        # All prefixes of a rollout are scored in its row, or go on from its trace.
        width = judge.max_trace_tokens if answer else branch_tokens(judge.max_trace_tokens, suffix, prefixes)
        rows = rows._replace(width=padded_width(width), own=own_width(suffix))
        programs = {"judge_prefill": built.prefill, "judge_branches": built.branches}
        most = min(prefixes, WRITTEN) if answer else prefixes
        times = waves, waves * -(-prefixes // most)
        return row_calls(model, mesh, params, rows, programs, "judge", times, _JUDGING, most)
    # A rollout has at most so many prefixes to score, and a call takes one of each rollout.
    times, programs = (waves, waves * prefixes), {"judge_prefill": built.prefill, "judge": built.judge}
    return row_calls(model, mesh, params, rows, programs, "judge", times, _JUDGING)


def judge_suffix(judge: Judge, model: LanguageModel, units: set[Unit]) -> int:
    """Tokens that follow a trace in the longest of the judge's prompts: the closing instruction, the template's end and
    how the answer begins; in bytes, which are more, of a published model, whose tokenizer is not at hand."""
    problems = [Problem("", "?", "?", "?", domain) for domain, kind in KINDS.items() if kind.domains]
    prompts = [score_prompt(judge, model.tokenizer, problem, unit) for problem in problems for unit in units]
    prompts += [verify_prompt(judge, model.tokenizer, problem) for problem in problems]
    for unit in units if judge.per_problem else ():
        checklists = ChecklistPrompts(judge, model.tokenizer, lambda _, unit=unit: unit)
        prompts += [checklists.score(problem, ("?", "?")) for problem in problems]
        prompts += [checklists.write(problem) for problem in problems]
    return max(len(prompt.suffix) for prompt in prompts)


def completion_calls(
    mesh: Mesh,
    params: tuple[str, Any],
    model: LanguageModel,
    wave: int,
    group: int,
    prompt: int,
    answer: int,
    of: str,
    settings: tuple[str, ...],
    slots: int = 0,
) -> list[Call]:
    """Programs of `evaluation.completions`: answers to whole prompts of at most so many tokens."""
    sampler = build_sampler(model, mesh, max_tokens=answer, wave=wave, slots=slots)
    rows = RowShapes(wave, group, padded_width(prompt - 1), 1, answer, slots)
    programs = {f"prefill ({of})": sampler.prefill, f"sample ({of})": sampler.sample}
    return row_calls(model, mesh, params, rows, programs, "sample", (1, 1), settings)


def row_calls(
    model: LanguageModel,
    mesh: Mesh,
    params: tuple[str, Any],
    rows: RowShapes,
    programs: Mapping[str, Callable],
    phase: str,
    times: tuple[int, int],
    settings: tuple[str, ...],
    branches: int = 0,
) -> list[Call]:
    """The program that reads contexts once, and the one that continues each of their rows.

    Args:
      programs: the two, by name.
      times: calls of each in a step.
      branches: off each row, or rows that go on from each and write; 0 where rows have none.
    """
    (prefill, reads), (proceed, continues) = programs.items()
    (P, G, C, T, answer, *_), shards = rows, mesh.shape[DATA]
    turns = rows.turns(shards)
    context = Context(array(mesh, jnp.int32, P, C), array(mesh, jnp.int32, P))
    row, start = array(mesh, jnp.int32, P, G, T), array(mesh, jnp.int32, P, G)
    queries = [BranchRows(row, row, row, array(mesh, jnp.int32, P, G, branches)) if branches else Rows(row, start)]
    # Rows that write, of each problem; where they go on from traces, they are not those that are read.
    Q, trace = (G * branches, T) if branches and answer else (G, 0)
    if trace:
        begin = array(mesh, jnp.int32, P, Q)
        asked = Rows(array(mesh, jnp.int32, P, Q, rows.own), begin)
        queries = [asked, draw_shapes(mesh, P, Q, turns=False), Traces(Rows(row, start), begin)]
    elif answer:
        queries.append(draw_shapes(mesh, P, G, turns=rows.slots > 0))
    prefix = jax.eval_shape(reads, params[1], context)
    keys, weights = keys_bytes(model, mesh, prefix.layers), weight_bytes(model, mesh)
    token = token_bytes(model, mesh) if answer else keys / (P * C / shards)

    def passes(queries: int, keys: int, times: int, logits: int, turns: int = 1, group: int = Q) -> Cost:
        """Of every row's last `queries` tokens; what the rows see is read so many times, and the weights as often in
        each of the rows' turns."""
        pairs = seen_pairs(queries, keys)
        moved = times * (turns * weights + P * group / shards * pairs / max(queries, 1) * token)
        operations = forward(model.arch, params[1], P * group * queries, P * group * pairs, P * group * logits)
        return operations + Cost(bytes=moved)

    contexts = forward(model.arch, params[1], P * C, P * seen_pairs(C, C)) + Cost(bytes=weights + keys)
    # Of a row that is continued, the loop itself feeds the last token.
    read = (rows.own if trace else T) - bool(answer)
    seen = C + trace + read
    cost = passes(read, seen, -(-read // CHUNK), 0) + passes(answer, seen + answer, answer, answer, turns)
    if trace:
        cost += passes(trace, C + trace, -(-trace // CHUNK), 0, group=G)
    inside = {COPY: copy_bytes(model, mesh, whole=bool(answer))}
    if answer:
        inside[KEYS] = cache_bytes(model, mesh, prefix, rows, read + answer, trace, Q)
    arguments = params, (KEYS, Result(prefill, keys)), *((BATCH, query) for query in queries)
    return [
        Call(prefill, phase, reads, (params, (BATCH, context)), times[0], contexts, settings, inside={KEYS: keys}),
        Call(proceed, phase, continues, arguments, times[1], cost, settings, turns * answer, inside),
    ]
