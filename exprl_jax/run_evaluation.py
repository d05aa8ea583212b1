"""Evaluation inside a run: pass@k of the policy as it stands, on held-out problems and on some that are trained on.

    held-out, fixed training problems → waves → the run's sampler → its verifiers and judge → pass@k, unsolved

Waves have the shape of the run's own, P problems of G samples, so that nothing is compiled for them, and a sample's
random numbers depend on seed, step, problem and number alone.  They are no rollout's: the seed is another.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from exprl_jax.data.problems import Problem
from exprl_jax.data.training import check_same_problems, fixed_sample
from exprl_jax.evaluation.pass_at_k import pass_at_k
from exprl_jax.evaluation.waves import Bench, PendingWave, finish_wave, sample_waves, start_wave
from exprl_jax.hosts import say
from exprl_jax.model.decoder import Params
from exprl_jax.records import TrainState
from exprl_jax.reward.statistics import VERDICTS
from exprl_jax.reward.verifiers.verdict import Verdict
from exprl_jax.rl_run import RLRun
from exprl_jax.run.clock import Clock
from exprl_jax.run.evaluating import HELD_OUT, SETS, TRAINING, Evaluation, Measured, Row, names_of


def evaluation_of(run: RLRun) -> Evaluation | None:
    """The evaluation of a run as the loop sees it; None where it has none.  Every process must call this.

    Raises:
      ValueError: fewer problems than are to be drawn, or processes have read different ones.
    """
    config = run.config
    if not config.evaluate.every:
        return None
    drawn = fixed_sample(run.problems, config.evaluate.training_problems, config.seed)
    sets = {prefix: of_set for prefix, of_set in ((HELD_OUT, run.held_out), (TRAINING, drawn)) if of_set}
    problems = [problem for of_set in sets.values() for problem in of_set]
    check_same_problems(problems, "evaluate.source")
    say(
        f"evaluation on {len(run.held_out)} held-out and {len(drawn)} training problems every {config.evaluate.every} "
        f"steps, {config.evaluate.samples} samples each"
    )
    bench = Bench(
        run.sampler,
        run.prompts,
        run.policy.tokenizer.decode,
        run.judge,
        run.graders,
        group=config.rollout.group,
        temperature=config.evaluate.temperature,
        seed=int(np.random.SeedSequence([config.seed, zlib.crc32(b"evaluate")]).generate_state(1)[0]),
    )
    names = [name for prefix in sets for name in names_of(prefix, config.evaluate.ks)]
    return Evaluation(
        config.evaluate.every, config.steps, problems, names, functools.partial(measure, run, bench, sets)
    )


def measure(
    run: RLRun, bench: Bench, sets: Mapping[str, Sequence[Problem]], state: TrainState, step: int, clock: Clock
) -> Measured:
    """Samples, grades and sums up each of the sets."""
    config, row, rows = run.config.evaluate, {}, []
    with clock.phase("evaluate"):
        for prefix, problems in sets.items():
            table = draw(bench, run.model(state), problems, config.samples, step)
            row |= summarise(prefix, table, config.ks)
            rows += problem_rows(prefix, problems, table)
    run.graders.throughput.report()  # a step's rates are of its own rollouts
    return Measured(row, rows)


def draw(bench: Bench, params: Params, problems: Sequence[Problem], samples: int, step: int) -> dict[str, np.ndarray]:
    """Lengths, ends and verdicts (as their places in `VERDICTS`) of all samples, [problems, samples], the same on every
    process."""
    parts, index_of = samples // bench.group, {problem.id: i for i, problem in enumerate(problems)}
    waves = sample_waves(problems, np.ones((len(problems), parts), bool), bench.sampler.wave)
    table = {name: np.zeros((len(problems), samples), np.int64) for name in ("length_PG", "ended_PG", "verdict_PG")}

    def put(pending: PendingWave) -> None:
        drawn, wave = finish_wave(pending), pending.wave
        columns = slice(wave.part * bench.group, (wave.part + 1) * bench.group)
        for row in np.flatnonzero(wave.live_P):
            for name, x in table.items():
                x[index_of[wave.problems[row].id], columns] = drawn[name][row]

    pending = None  # the verifiers work on one wave while the next is sampled
    for wave in waves:
        started = start_wave(bench, params, wave, step, wave.part)
        if pending is not None:
            put(pending)
        pending = started
    put(pending)
    return table


def problem_rows(prefix: str, problems: Sequence[Problem], table: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Rows of `evaluations/step_N.jsonl`."""
    known, right = _graded(table)
    return [
        {
            "set": SETS[prefix],
            "id": problem.id,
            "problem": problem.problem,
            "graded": int(known[i].sum()),
            "correct": int(right[i].sum()),
        }
        for i, problem in enumerate(problems)
    ]


def _graded(table: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Which samples were graded, and which were found right."""
    missing, correct = (VERDICTS.index(verdict) for verdict in (Verdict.missing, Verdict.correct))
    return table["verdict_PG"] != missing, table["verdict_PG"] == correct


def summarise(prefix: str, table: Mapping[str, np.ndarray], ks: Sequence[int]) -> Row:
    """The metrics of one set, `run.evaluating.METRICS`.

    Problems none of whose samples was graded count in neither pass@k nor unsolved; pass@k is null where some other
    problem has fewer than k graded samples.

    Args:
      table: as of `draw`.
    """
    known, right = _graded(table)
    graded_P, correct_P = known.sum(1), right.sum(1)
    some_P = graded_P > 0
    row: Row = dict.fromkeys(names_of(prefix, ks))
    if some_P.any():
        graded_P, correct_P = graded_P[some_P], correct_P[some_P]
        curve = pass_at_k(graded_P, correct_P, int(graded_P.min())).mean(0)
        row |= {f"evaluate/{prefix}pass@{k}": float(curve[k - 1]) for k in ks if k <= len(curve)}
        row[f"evaluate/{prefix}unsolved"] = float((correct_P == 0).mean())
    row[f"evaluate/{prefix}missing"] = float(1 - known.mean())
    row[f"evaluate/{prefix}length_mean"] = float(table["length_PG"].mean())
    row[f"evaluate/{prefix}overlong"] = float((table["ended_PG"] == 0).mean())
    return row
