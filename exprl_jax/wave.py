"""A wave's life: sampled, given to verifiers and judge, agreed on between processes, turned into advantages.

A wave is as many problems as are sampled and judged at a time; a step has `rollout.prompts / rollout.wave` of them.

    WaveRequest ─ sample ─→ Wave ─ verify, judge ─→ PendingWave ─ advantages ─→ ScoredWave
         ↑                                                                          │
         └──────────────── groups without any advantage, sampled again ─────────────┘
                           then, where a run has hints, groups without any success
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import jax
import numpy as np

from exprl_jax.data.problems import Problem
from exprl_jax.hosts import agree_rows, largest_over_processes, local_problems, owned_problems
from exprl_jax.layout import packed_shape
from exprl_jax.learning.advantages import SegmentAdvantages, assign_advantages
from exprl_jax.mesh import DATA
from exprl_jax.model import decoder
from exprl_jax.records import Rollouts, Usage
from exprl_jax.reward.judgements import Judgements, Pending, Query
from exprl_jax.reward.likelihood import answer_likelihoods, answer_row
from exprl_jax.reward.routes import ROUTES
from exprl_jax.reward.statistics import VERDICTS, verdict_indices
from exprl_jax.reward.verifiers.grading import submit_owned
from exprl_jax.reward.verifiers.verdict import Verdict
from exprl_jax.rl_run import RLRun
from exprl_jax.rollout.call import Prompts, texts_of
from exprl_jax.rollout.lengths import deal
from exprl_jax.run.clock import Clock


class WaveRequest(NamedTuple):
    """What to sample, of this process's problems only.

    Attributes:
      index_P: of the problems in the step's batch.
      step, attempt: with problem and index in the group, the identity of a rollout's random numbers.
      live_P: problems to sample; the rollouts of the others are empty.
      hinted: prompts with hints by problem id, for the attempt after the last of `rollout.max_resample`.
      expected_P: tokens that a rollout of each is expected to have; None where nothing is known.
    """

    problems: Sequence[Problem]
    index_P: np.ndarray
    step: int
    attempt: int
    live_P: np.ndarray
    hinted: Mapping[str, Sequence[int]] = MappingProxyType({})
    expected_P: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Wave:
    """Rollouts of one wave, on the host, this process's problems only.

    Attributes:
      problems: in row order.
      ends: exclusive token ends of each rollout's segments, by problem and index within the group.
      responses: text of each rollout.
      usage: of each call that sampled it, over all processes.
    """

    problems: Sequence[Problem]
    rollouts: Rollouts
    ends: Sequence[Sequence[np.ndarray]]
    responses: Sequence[Sequence[str]]
    usage: Sequence[Usage] = ()

    @property
    def count_PG(self) -> np.ndarray:
        """Segments of each rollout."""
        return np.array([[len(ends) for ends in group] for group in self.ends])


class PendingWave(NamedTuple):
    """A wave that is sampled, while its verifiers, and a judge beside the mesh, are still at work.

    Attributes:
      judgements: a judge's scores.
      truths: what is known of the progress of what the judge scores; in the place of scores.
      judge_verdicts: a judge's, on open-ended answers; none for other problems.
      grading: waits for the verifiers' verdicts, by problem; `missing` where another process has them graded.
      likelihoods: scores [P, G] of the problems' answers, and where there is one; None where no route asks for any.
    """

    request: WaveRequest
    wave: Wave
    judgements: Pending[Judgements]
    truths: Pending[Judgements]
    judge_verdicts: Pending[list[list[Verdict]]]
    grading: Callable[[], list[list[Verdict]]]
    likelihoods: tuple[np.ndarray, np.ndarray] | None


class Nudged(NamedTuple):
    """What hints have changed of a wave.

    Attributes:
      hinted_P: groups without any success that were sampled again with a hint.
      solved_P: those of them with a success then; they have taken the place of the first ones.
      prompts: that the groups of `solved_P` were sampled from, by problem id.
      bare: verdicts of the groups without hints, of which `solve/` is.
    """

    hinted_P: np.ndarray
    solved_P: np.ndarray
    prompts: Mapping[str, Sequence[int]]
    bare: Sequence[Sequence[Verdict]]


class ScoredWave(NamedTuple):
    """A wave with its scores and advantages.

    Attributes:
      index_P: of its problems in the step's batch.
      truths: what is known of the progress of what was judged.
      verdicts: by problem and index within the group.
      resampled_P: times that the group was sampled again.
      sampled: tokens drawn for it, those of groups that were thrown away and of hints included.
      nudged: what hints have changed, where the run has any.
    """

    index_P: np.ndarray
    wave: Wave
    judgements: Judgements
    truths: Judgements
    advantages: SegmentAdvantages
    verdicts: Sequence[Sequence[Verdict]]
    resampled_P: np.ndarray
    sampled: int
    nudged: Nudged | None = None


def wave_requests(run: RLRun, problems: Sequence[Problem], step: int) -> list[WaveRequest]:
    """The waves of a step's batch: of each, this process's problems.

    Where rows take turns in decode slots, every data shard of every wave gets problems of about the same expected
    length in sum, the longest first: none is to decode its last row while others have none left.
    """
    size, expected_P = run.config.rollout.wave, run.lengths.expected(problems)
    mine, order = local_problems(run.mesh, size), np.arange(len(problems))
    if run.config.rollout.slots and expected_P is not None:
        order = deal(expected_P, len(problems) // size * run.mesh.shape[DATA])
    requests = []
    for index in (wave[mine] for wave in order.reshape(-1, size)):
        expected = None if expected_P is None else expected_P[index]
        live_P = np.ones(len(index), bool)
        requests.append(WaveRequest([problems[i] for i in index], index, step, 0, live_P, expected_P=expected))
    return requests


def start_wave(run: RLRun, policy: decoder.Params, request: WaveRequest, clock: Clock) -> PendingWave:
    """Samples a wave, and gives it to the verifiers and the judge.

    A judge on the mesh answers here; an endpoint or a function while the next wave is sampled.
    """
    with clock.phase("sample"):
        wave = sample_wave(run, policy, request)
    owned_P = owned_problems(run.mesh, run.config.rollout.wave)
    grading = submit_owned(run.graders, wave.problems, wave.responses, owned_P)
    with clock.phase("judge"):
        # A judge on the mesh is asked by all processes, for a program is the whole mesh's.
        asks_P = owned_P | run.judge.on_mesh
        judgements = judge_wave(run, wave, asks_P)
        verdicts = verify_wave(run, wave, asks_P)
    truths = run.truth.submit(wave.problems, judge_queries(run, wave, owned_P), run.splitter.rule.max_segments)
    with clock.phase("logp"):
        likelihoods = weigh_answers(run, policy, wave, request.index_P)
    return PendingWave(request, wave, judgements, truths, verdicts, grading, likelihoods)


def finish_wave(run: RLRun, policy: decoder.Params, pending: PendingWave, clock: Clock) -> ScoredWave:
    """Advantages of a wave; groups without any are sampled again, up to `max_resample` times."""
    scored = score_wave(run, pending, clock)
    for attempt in range(1, run.config.rollout.max_resample + 1):
        dead_P = ~scored.advantages.live_P
        # Every process makes the same number of attempts: sampling is one program over the whole mesh.
        if not largest_over_processes(int(dead_P.sum())):
            break
        request = pending.request._replace(attempt=attempt, live_P=dead_P)
        again = score_wave(run, start_wave(run, policy, request, clock), clock)
        scored = replace_groups(scored, again, dead_P)
    return nudge(run, policy, pending, scored, clock) if run.hints else scored


def nudge(run: RLRun, policy: decoder.Params, pending: PendingWave, scored: ScoredWave, clock: Clock) -> ScoredWave:
    """Groups without any success, sampled once more with a hint in the prompt; those that then have one take the
    others' place, and are trained on as they were sampled: with the hint."""
    known_P, success_P = (_any_verdict(scored, which) for which in (lambda v: v != Verdict.missing, _is_correct))
    wanted_P = known_P & ~success_P & pending.request.live_P
    hinted_P, nudged = np.zeros_like(wanted_P), scored
    prompts: dict[str, Sequence[int]] = {}
    # Every process makes the same calls: sampling is one program over the whole mesh.
    if largest_over_processes(int(wanted_P.sum())):
        with clock.phase("sample"):
            hints = run.hints(scored.wave.problems, wanted_P)
        nudged = scored._replace(sampled=scored.sampled + hints.tokens)
        hinted_P = np.array([problem.id in hints.prompts for problem in scored.wave.problems], bool)
    solved_P = np.zeros_like(hinted_P)
    if largest_over_processes(int(hinted_P.sum())):
        attempt = run.config.rollout.max_resample + 1
        request = pending.request._replace(attempt=attempt, live_P=hinted_P, hinted=hints.prompts)
        again = score_wave(run, start_wave(run, policy, request, clock), clock)
        solved_P = hinted_P & _any_verdict(again, _is_correct)
        prompts = {p.id: hints.prompts[p.id] for p, solved in zip(scored.wave.problems, solved_P) if solved}
        nudged = replace_groups(nudged, again, solved_P)._replace(resampled_P=scored.resampled_P)
    return nudged._replace(nudged=Nudged(hinted_P, solved_P, prompts, scored.verdicts))


def prompt_of(run: RLRun, scored: ScoredWave, i: int) -> Sequence[int]:
    """The prompt that the group of the wave's i-th problem was sampled from, in token ids."""
    name = scored.wave.problems[i].id
    hinted = scored.nudged.prompts if scored.nudged else {}
    return hinted.get(name, run.prompts.ids[name])


def _any_verdict(scored: ScoredWave, which: Callable[[Verdict], bool]) -> np.ndarray:
    """Problems of which some rollout has such a verdict."""
    return np.array([any(map(which, group)) for group in scored.verdicts], bool)


def _is_correct(verdict: Verdict) -> bool:
    return verdict == Verdict.correct


def sample_wave(run: RLRun, policy: decoder.Params, request: WaveRequest) -> Wave:
    """G rollouts of each problem from the bare prompt, or from that with a hint, with their text, cut where the judge
    is to score."""
    rollout, prompts = run.config.rollout, run.prompts
    if request.hinted:
        prompts = Prompts({**prompts.ids, **request.hinted}, prompts.width)
    rollouts, usage = run.sampler(
        policy,
        prompts,
        request.problems,
        group=rollout.group,
        temperature=rollout.temperature,
        seed=run.config.seed,
        step=request.step,
        attempt=request.attempt,
        live_P=request.live_P,
        expected_P=request.expected_P,
    )
    ids, responses = texts_of(rollouts, run.policy.tokenizer.decode)
    ends = [
        [run.splitter.segment_ends(row) if run.route(problem).per_segment else _whole(row) for row in group]
        for problem, group in zip(request.problems, ids)
    ]
    return Wave(request.problems, rollouts, ends, responses, [usage])


def judge_wave(run: RLRun, wave: Wave, asks_P: np.ndarray) -> Pending[Judgements]:
    """Asks for a score for each rollout, or for each of its prefixes or segments."""
    return run.judge.submit(wave.problems, judge_queries(run, wave, asks_P), run.splitter.rule.max_segments)


def judge_queries(run: RLRun, wave: Wave, asks_P: np.ndarray) -> list[list[Query]]:
    """What is to be scored of each problem.  Where overlong rollouts' scores follow from the config's rule (D3), they
    are not asked for.

    Args:
      asks_P: problems of which this process asks.
    """
    queries = []
    for i, problem in enumerate(wave.problems):
        of_problem = []
        for g, ends in enumerate(wave.ends[i]):
            wanted = wave.rollouts.ended_PG[i, g] or run.config.advantage.overlong == "keep"
            if asks_P[i] and wanted and run.route(problem).judged:
                of_problem += [
                    Query(g, n, trace_of(run, wave, i, g, n), bool(wave.rollouts.ended_PG[i, g]))
                    for n in range(len(ends))
                ]
        queries.append(of_problem)
    return queries


def verify_wave(run: RLRun, wave: Wave, asks_P: np.ndarray) -> Pending[list[list[Verdict]]]:
    """Asks for verdicts on open-ended answers, which only a judge can give; none for other problems, where nothing was
    sampled and where this process does not ask."""
    sampled_P = (wave.count_PG > 0).any(-1) & asks_P
    asked = [
        group if p.traits.by_judge and sampled else []
        for p, group, sampled in zip(wave.problems, wave.responses, sampled_P)
    ]
    return run.judge.submit_verify(wave.problems, asked)


def weigh_answers(
    run: RLRun, policy: decoder.Params, wave: Wave, index_P: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
    """The policy's likelihood of each problem's answer after each of its rollouts, where the route is that."""
    if not any(ROUTES[run.config.routes.of(kind)].answer_likelihood for kind in run.kinds):
        return None
    tokenizer = run.policy.tokenizer
    rows = [
        [
            answer_row(tokenizer, run.prompts.ids[problem.id], response, problem.answer)
            if run.route(problem).answer_likelihood and len(ends)
            else None
            for response, ends in zip(responses, group, strict=True)
        ]
        for problem, responses, group in zip(wave.problems, wave.responses, wave.ends, strict=True)
    ]
    logp_of = functools.partial(run.programs.token_logp, policy)
    return answer_likelihoods(rows, index_P, logp_of, run.mesh, packed_shape(run.config), run.policy.arch.max_positions)


def score_wave(run: RLRun, pending: PendingWave, clock: Clock) -> ScoredWave:
    """Waits for the verifiers, agrees with the other processes, and turns scores into advantages."""
    wave = pending.wave
    with clock.phase("judge"):
        judgements, judge_verdicts = pending.judgements.result(), pending.judge_verdicts.result()
        truths = pending.truths.result()
    with clock.phase("grade"):
        of_verifiers = pending.grading()
    # A judge's list is empty but for open-ended answers, where the verifiers' says `missing` of every rollout.
    verdicts = [judged or graded for judged, graded in zip(judge_verdicts, of_verifiers)]
    judgements, verdicts = _agree(pending.request.index_P, judgements, verdicts)
    truths = truths._replace(**agree_rows(truths.arrays, pending.request.index_P))
    judgements = add_verdict_rewards(run, wave, judgements, verdicts)
    judgements = add_likelihoods(run, wave, judgements, pending.likelihoods)
    routes = [run.route(problem) for problem in wave.problems]
    advantages = assign_advantages(
        judgements.score_PGN,
        judgements.valid_PGN,
        wave.count_PG,
        overlong_PG=~wave.rollouts.ended_PG,
        process_P=np.array([route.per_segment for route in routes]),
        logits_P=np.array(
            [route.answer_likelihood or route.judged and run.config.judge.reads_digits for route in routes]
        ),
        rules=run.config.advantage,
    )
    # Of this attempt alone: `replace_groups` adds the attempts up.
    resampled_P = (pending.request.live_P & (pending.request.attempt > 0)).astype(np.int32)
    sampled = int(wave.rollouts.mask_PGR.sum())
    return ScoredWave(pending.request.index_P, wave, judgements, truths, advantages, verdicts, resampled_P, sampled)


def add_verdict_rewards(
    run: RLRun, wave: Wave, judgements: Judgements, verdicts: Sequence[Sequence[Verdict]]
) -> Judgements:
    """Puts the rewards of routes that take them from verdicts in the place of scores; none where the verifier
    failed."""
    score_PGN, valid_PGN = judgements.score_PGN.copy(), judgements.valid_PGN.copy()
    sampled_PG = wave.count_PG > 0
    for i, (problem, group) in enumerate(zip(wave.problems, verdicts, strict=True)):
        if (reward_of := run.route(problem).verdict_reward) is None:
            continue
        rewards = [reward_of(verdict) for verdict in group]
        score_PGN[i], valid_PGN[i] = 0.0, False
        score_PGN[i, :, 0] = [0.0 if reward is None else reward for reward in rewards]
        valid_PGN[i, :, 0] = sampled_PG[i] & [reward is not None for reward in rewards]
    return judgements._replace(score_PGN=score_PGN, valid_PGN=valid_PGN)


def add_likelihoods(
    run: RLRun, wave: Wave, judgements: Judgements, likelihoods: tuple[np.ndarray, np.ndarray] | None
) -> Judgements:
    """Puts the likelihoods of answers in the place of scores, on the routes that take their rewards from them."""
    if likelihoods is None:
        return judgements
    score_PGN, valid_PGN = judgements.score_PGN.copy(), judgements.valid_PGN.copy()
    for i, problem in enumerate(wave.problems):
        if run.route(problem).answer_likelihood:
            score_PGN[i, :, 0], valid_PGN[i, :, 0] = likelihoods[0][i], likelihoods[1][i]
    return judgements._replace(score_PGN=score_PGN, valid_PGN=valid_PGN)


def replace_groups(old: ScoredWave, new: ScoredWave, replaced_P: np.ndarray) -> ScoredWave:
    """`old` with some of its groups from `new`; tokens and attempts of both are counted."""

    def arrays(a, b):
        return np.where(replaced_P.reshape(-1, *[1] * (np.ndim(a) - 1)), b, a)

    def lists(a, b):
        return [y if replaced else x for x, y, replaced in zip(a, b, replaced_P)]

    def answers(a, b):
        # Keys begin with the problem: those of a group go with it, also where the new one has fewer answers.
        kept = {key: answer for key, answer in a.items() if not replaced_P[key[0]]}
        return kept | {key: answer for key, answer in b.items() if replaced_P[key[0]]}

    judgements = jax.tree.map(arrays, old.judgements.arrays, new.judgements.arrays)
    return ScoredWave(
        index_P=old.index_P,
        wave=Wave(
            problems=old.wave.problems,
            rollouts=jax.tree.map(arrays, old.wave.rollouts, new.wave.rollouts),
            ends=lists(old.wave.ends, new.wave.ends),
            responses=lists(old.wave.responses, new.wave.responses),
            usage=[*old.wave.usage, *new.wave.usage],
        ),
        judgements=Judgements(
            **judgements,
            text=answers(old.judgements.text, new.judgements.text),
            tokens=old.judgements.tokens + new.judgements.tokens,
            digits=answers(old.judgements.digits, new.judgements.digits),
        ),
        truths=old.truths._replace(**jax.tree.map(arrays, old.truths.arrays, new.truths.arrays)),
        advantages=SegmentAdvantages(*map(arrays, old.advantages, new.advantages)),
        verdicts=lists(old.verdicts, new.verdicts),
        resampled_P=old.resampled_P + new.resampled_P,
        sampled=old.sampled + new.sampled,
    )


def _agree(
    index_P: np.ndarray, judgements: Judgements, verdicts: Sequence[Sequence[Verdict]]
) -> tuple[Judgements, Sequence[Sequence[Verdict]]]:
    """The same scores and verdicts of a problem on every process that holds it: rewards must not differ by a clock."""
    verdict_PG = verdict_indices(verdicts)
    arrays = agree_rows(judgements.arrays | {"verdict_PG": verdict_PG}, index_P)
    verdicts = [[VERDICTS[v] for v in group] for group in arrays.pop("verdict_PG")]
    return judgements._replace(**arrays), verdicts


def trace_of(run: RLRun, wave: Wave, i: int, g: int, n: int) -> str:
    """What the judge reads of rollout (i, g) for its n-th score: the prefix y_≤n, or segment n alone (D1)."""
    ends = wave.ends[i][g]
    alone = run.config.judge.unit == "step" and run.route(wave.problems[i]).per_segment
    start = ends[n - 1] if alone and n > 0 else 0
    return run.policy.tokenizer.decode(wave.rollouts.tokens_PGR[i, g, start : ends[n]].tolist())


def _whole(row: np.ndarray) -> np.ndarray:
    """The ends of the one segment of a rollout that is not cut; none where nothing was sampled."""
    return np.array([len(row)] if len(row) else [], np.int64)
