"""Rollouts of a run's first batch, or of an evaluation's first wave, as records of all that became of each."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from exprl_jax.config import Config, Evaluate
from exprl_jax.data.problems import Problem, batch_indices
from exprl_jax.data.tokenizer import Tokenizer
from exprl_jax.evaluation import evaluate, waves
from exprl_jax.rl_run import RLRun, first_policy, open_run
from exprl_jax.rollout.call import describe_problem
from exprl_jax.rollout_log import scored_row
from exprl_jax.run.clock import Clock
from exprl_jax.show.listening import Listening
from exprl_jax.show.questions import asked_model, score_question, verdict_question, written
from exprl_jax.show.warnings import rollout_warnings, score_warnings
from exprl_jax.wave import ScoredWave, WaveRequest, finish_wave, prompt_of, start_wave, trace_of, wave_requests

# Of a rollout's row, what is said of the problem once for all its rollouts.
_OF_PROBLEM = ("id", "domain", "kind", "problem", "reference", "answer", "prompt")


def show_scored(config: Config, count: int) -> Iterator[dict[str, Any]]:
    """The first problems of a run's first batch: its rollouts, scores and advantages.

    Raises:
      ValueError: there are not so many problems in a batch, or anything that a run refuses.
    """
    check_count(count, config.rollout.prompts, "config.rollout.prompts")
    with contextlib.ExitStack() as stack:
        run = open_run(config, stack)
        policy, judge = first_policy(run), Listening(run.judge)
        heard = dataclasses.replace(run, judge=judge)
        for request in first_requests(run, count):
            scored = finish_wave(heard, policy, start_wave(heard, policy, request, Clock()), Clock())
            yield from (_scored(run, judge, scored, i) for i in np.flatnonzero(request.live_P))


def check_count(count: int, most: int, those: str) -> None:
    """Refuses to show more problems than there are.

    Raises:
      ValueError: says how many there are, and of what.
    """
    if count > most:
        raise ValueError(f"--show: got {count} problems, expected at most {most}, {those}")


def first_requests(run: RLRun, count: int) -> list[WaveRequest]:
    """The waves of the first step that hold its first problems, of which no others are sampled."""
    indices, _ = batch_indices(len(run.problems), run.config.rollout.prompts, run.config.seed, 0)
    requests = wave_requests(run, [run.problems[i] for i in indices], 0)
    return [r._replace(live_P=r.index_P < count) for r in requests if (r.index_P < count).any()]


def problem_record(task: str, problem: Problem, policy: dict[str, Any]) -> dict[str, Any]:
    """What a record says of its problem, and of what the policy sees of it."""
    return {"task": task, **describe_problem(problem), "choices": list(problem.choices), "policy": policy}


def prompted_model(weights: str, tokenizer: Tokenizer, ids: Sequence[int]) -> dict[str, Any]:
    """A model and the prompt that it sees."""
    return {"weights": weights, "prompt": written(tokenizer, ids), "prompt_tokens": len(ids)}


def without_problem(row: dict[str, Any]) -> dict[str, Any]:
    """A rollout's row without what is its problem's."""
    return {name: value for name, value in row.items() if name not in _OF_PROBLEM}


def _scored(run: RLRun, judge: Listening, scored: ScoredWave, i: int) -> dict[str, Any]:
    wave, problem, route = scored.wave, scored.wave.problems[i], run.route(scored.wave.problems[i])
    rollouts = [_rollout(run, scored, i, g) for g in range(run.config.rollout.group)]
    policy = prompted_model(run.config.policy.weights, run.policy.tokenizer, prompt_of(run, scored, i))
    record = problem_record("rl", problem, policy)
    record |= {"route": run.config.routes.of(problem.kind), "judge": None, "rollouts": rollouts}
    shown = record["shown"] = shown_rollout(rollouts)
    if route.judged and rollouts[shown]["segments"]:
        unit = run.config.judge.unit if route.per_segment else "outcome"
        last = len(rollouts[shown]["segments"]) - 1
        question = score_question(run.judge, problem.id, trace_of(run, wave, i, shown, last))
        record["judge"] = asked_model(run.config.judge) | {"asks": unit, "segment": last, "question": question}
    elif problem.traits.by_judge:
        question = verdict_question(run.judge, problem.id, rollouts[shown]["response"])
        record["judge"] = asked_model(run.config.judge) | {"asks": "verdict", "segment": None, "question": question}
    if record["judge"] is not None and problem.traits.by_judge:
        record["judge"]["said"] = [judge.said_of(problem.id, rollout["response"]) for rollout in rollouts]
    record["live"] = bool(scored.advantages.live_P[i])
    record["warnings"] = rollout_warnings(record, run.config.rollout.max_tokens)
    record["warnings"] += score_warnings(record, run.config)
    return record


def _rollout(run: RLRun, scored: ScoredWave, i: int, g: int) -> dict[str, Any]:
    """A rollout as the run logs it, without its problem."""
    row = without_problem(scored_row(run, scored, i, g))
    return row | {"segments": [_segment(run, scored, i, g, n, part) for n, part in enumerate(row["segments"])]}


def _segment(run: RLRun, scored: ScoredWave, i: int, g: int, n: int, row: dict[str, Any]) -> dict[str, Any]:
    """A segment as the run logs it, with where it lies and what the judge was asked and thought."""
    ends, ids = scored.wave.ends[i][g], scored.wave.rollouts.tokens_PGR[i, g]
    digits = scored.judgements.digits.get((i, g, n))
    return row | {
        "tokens": [int(ends[n - 1]) if n else 0, int(ends[n])],
        "last_token": run.policy.tokenizer.spell([int(ids[ends[n] - 1])])[0],
        "asked": bool(scored.judgements.asked_PGN[i, g, n]),
        "cut": bool(scored.judgements.cut_PGN[i, g, n]),
        "digits": None if digits is None else list(digits),
    }


def shown_rollout(rollouts: Sequence[dict[str, Any]]) -> int:
    """Which rollout is shown in full: the first that has a score, else the first."""
    scored = [r["rollout"] for r in rollouts if any(s["score"] is not None for s in r.get("segments", ()))]
    return min(scored, default=0)


def show_samples(config: Evaluate, count: int) -> Iterator[dict[str, Any]]:
    """The first problems of an evaluation's first set: a group of samples each, graded.

    Raises:
      ValueError: the set has fewer problems, or anything that an evaluation refuses.
    """
    sets = evaluate.read_sets(config)
    name, problems = next(iter(sets.items()))
    check_count(count, len(problems), f"those of {name!r}")
    with contextlib.ExitStack() as stack:
        parts = evaluate.open_parts(config, sets)
        run = evaluate.open_evaluation(config, sets, parts, stack)
        judge = Listening(run.bench.judge)
        heard = dataclasses.replace(run.bench, judge=judge)
        for wave in waves.sample_waves(problems[:count], np.ones((count, 1), bool), config.sampling.wave):
            table = waves.finish_wave(waves.start_wave(heard, run.params, wave, wave.part, 0))
            rows = evaluate.sample_rows(run, wave, table)
            for problem in wave.problems[: int(wave.live_P.sum())]:
                of_problem = [row for row in rows if row["id"] == problem.id]
                yield _sampled(run, judge, parts.policy.tokenizer, name, problem, of_problem)


def _sampled(
    run: evaluate.EvaluationRun,
    judge: Listening,
    tokenizer: Tokenizer,
    name: str,
    problem: Problem,
    rows: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    policy = prompted_model(run.config.policy.weights, tokenizer, run.bench.prompts.ids[problem.id])
    record = problem_record("evaluate", problem, policy) | {"set": name, "judge": None, "shown": 0}
    record["rollouts"] = [{"rollout": row.pop("sample")} | without_problem(row) for row in map(dict, rows)]
    if problem.traits.by_judge:
        question = verdict_question(run.bench.judge, problem.id, rows[0]["response"])
        record["judge"] = asked_model(run.config.judge) | {"asks": "verdict", "segment": None, "question": question}
        record["judge"]["said"] = [judge.said_of(problem.id, row["response"]) for row in rows]
    record["warnings"] = rollout_warnings(record, run.config.sampling.max_tokens)
    return record
