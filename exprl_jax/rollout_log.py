"""What is recorded of a step's rollouts: the arrays that metrics are made of, and rows for people to read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from exprl_jax.hosts import gather_rows
from exprl_jax.reward.checklists import ChecklistJudge
from exprl_jax.reward.statistics import verdict_indices
from exprl_jax.reward.verifiers.verdict import Verdict
from exprl_jax.rl_run import RLRun
from exprl_jax.rollout.call import describe_problem
from exprl_jax.wave import ScoredWave, Wave, prompt_of


def gather_table(run: RLRun, waves: Sequence[ScoredWave]) -> dict[str, np.ndarray]:
    """What `reward.statistics.summarise` reads, of all processes' problems in the batch's order."""
    parts = [_wave_table(run, wave) for wave in waves]
    table = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return gather_rows(table, np.concatenate([wave.index_P for wave in waves]))


def _wave_table(run: RLRun, scored: ScoredWave) -> dict[str, np.ndarray]:
    wave, judgements, advantages, nudged = scored.wave, scored.judgements, scored.advantages, scored.nudged
    # Counts of the whole wave stand in its first problem's row, so that sums over problems are right.
    others = [0] * (len(wave.problems) - 1)
    table = {
        "kind_P": np.array([run.kinds.index(problem.kind) for problem in wave.problems]),
        "length_PG": wave.rollouts.mask_PGR.sum(-1),
        "ended_PG": wave.rollouts.ended_PG,
        "verdict_PG": verdict_indices(nudged.bare if nudged else scored.verdicts),
        "count_PG": wave.count_PG,
        "score_PGN": judgements.score_PGN.astype(np.float32),
        "valid_PGN": judgements.valid_PGN,
        "asked_PGN": judgements.asked_PGN,
        "cut_PGN": judgements.cut_PGN,
        "truth_PGN": scored.truths.score_PGN.astype(np.float32),
        "known_PGN": scored.truths.valid_PGN,
        "judge_tokens_P": np.array([judgements.tokens, *others]),
        "sampled_P": np.array([scored.sampled, *others]),
        "resampled_P": scored.resampled_P,
        "hinted_P": nudged.hinted_P if nudged else np.zeros(len(wave.problems), bool),
        "nudged_P": nudged.solved_P if nudged else np.zeros(len(wave.problems), bool),
        "advantage_PGN": advantages.advantage_PGN,
        "counted_PGN": advantages.counted_PGN,
        "live_P": advantages.live_P,
    }
    if isinstance(run.judge, ChecklistJudge):
        scored = [run.route(problem).judged for problem in wave.problems]
        falls_back = [run.judge.falls_back(problem) for problem in wave.problems]
        table["fallback_P"] = np.where(scored, falls_back, False)
    return table


def sample_rows(run: RLRun, waves: Sequence[ScoredWave], count: int) -> list[dict[str, Any]]:
    """Some of this process's rollouts: one of every problem, then the next of every problem."""
    numbered = [(scored, i) for scored in waves for i in range(len(scored.wave.problems))]
    numbered.sort(key=lambda which: which[0].index_P[which[1]])
    order = [(scored, i, g) for g in range(run.config.rollout.group) for scored, i in numbered]
    return [scored_row(run, scored, i, g) for scored, i, g in order[:count]]


def scored_row(run: RLRun, scored: ScoredWave, i: int, g: int) -> dict[str, Any]:
    """Rollout g of the wave's i-th problem, with what its segments came to."""
    row = rollout_row(run, scored.wave, i, g, scored.verdicts[i][g])
    prompt = run.policy.tokenizer.decode(prompt_of(run, scored, i))
    return row | {"prompt": prompt, "segments": _segments(run, scored, i, g)}


def rollout_row(run: RLRun, wave: Wave, i: int, g: int, verdict: Verdict) -> dict[str, Any]:
    """Rollout g of the wave's i-th problem."""
    problem = wave.problems[i]
    return describe_problem(problem) | {
        "rollout": g,
        "prompt": run.policy.tokenizer.decode(run.prompts.ids[problem.id]),
        "response": wave.responses[i][g],
        "length": int(wave.rollouts.mask_PGR[i, g].sum()),
        "ended": bool(wave.rollouts.ended_PG[i, g]),
        "verdict": str(verdict),
    }


def _segments(run: RLRun, scored: ScoredWave, i: int, g: int) -> list[dict[str, Any]]:
    judgements, advantages = scored.judgements, scored.advantages
    ends = scored.wave.ends[i][g]
    return [
        {
            "text": text,
            "score": float(judgements.score_PGN[i, g, n]) if judgements.valid_PGN[i, g, n] else None,
            "advantage": float(advantages.advantage_PGN[i, g, n]) if advantages.counted_PGN[i, g, n] else None,
            "judge": judgements.text.get((i, g, n)),
            "truth": float(scored.truths.score_PGN[i, g, n]) if scored.truths.valid_PGN[i, g, n] else None,
        }
        | token_row(run, scored.wave, i, g, slice(ends[n - 1] if n else 0, ends[n]))
        for n, text in enumerate(segment_texts(run, scored.wave, i, g))
    ]


def token_row(run: RLRun, wave: Wave, i: int, g: int, part: slice) -> dict[str, Any]:
    """Some tokens of a rollout as people read them, their log-probs under the policy as it sampled them, and the
    entropies of what they were drawn from (nats, at its temperature)."""
    of_row = (wave.rollouts.tokens_PGR, wave.rollouts.logp_PGR, wave.rollouts.entropy_PGR)
    ids, logp, entropy = (x[i, g, part].tolist() for x in of_row)
    return {
        "token_text": run.policy.tokenizer.spell(ids),
        "token_logp": [round(value, 4) for value in logp],
        "token_entropy": [round(value, 4) for value in entropy],
    }


def segment_texts(run: RLRun, wave: Wave, i: int, g: int) -> list[str]:
    """The text of each segment of a rollout."""
    ids, ends = wave.rollouts.tokens_PGR[i, g], wave.ends[i][g]
    return [run.policy.tokenizer.decode(ids[start:end].tolist()) for start, end in zip([0, *ends[:-1]], ends)]
