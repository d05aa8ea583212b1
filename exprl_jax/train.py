"""Reinforcement learning: sample from the bare problem, score, update.  Stage I, sparse GRPO and Stage II.

    problems → prompts → sampler → segments → judge | verifier → advantages → update → checkpoint, metrics

Each problem's kind has its route (`config.Routes`): what scores its rollouts, and with which estimator.  Where no route
needs a reference solution the data are read without them.  `prepare` opens what a run needs; `take_step` is a step,
about one line a room.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from exprl_jax import programs as programs_room
from exprl_jax.config import Config, Data, Model, Route, Segments, to_dict
from exprl_jax.data.packing import Example, Filled, assign_rows, fill_rows
from exprl_jax.data.problems import (
    Kind,
    Problem,
    batch_indices,
    check_held_out,
    drop_overlong,
    read_problems,
)
from exprl_jax.data.prompts import PromptStyle, policy_prompt, worked_examples
from exprl_jax.distributed import processes_here
from exprl_jax.learning.advantages import Assigned, assign, to_tokens
from exprl_jax.learning.losses import normaliser
from exprl_jax.loop import Taken, Task, export, follow, say
from exprl_jax.mesh import (
    DATA,
    Placement,
    agree_rows,
    gather_rows,
    largest_over_processes,
    local_problems,
    make_mesh,
    owned_problems,
    put_microbatches,
    shard_parameters,
)
from exprl_jax.metrics import Clock
from exprl_jax.model import decoder
from exprl_jax.model.config import Architecture
from exprl_jax.model.language_model import LanguageModel, load, open_model
from exprl_jax.model.lora import adapt
from exprl_jax.probe import look
from exprl_jax.records import Experience, Rollouts, TrainState
from exprl_jax.reward.judge import Judgements, Query
from exprl_jax.reward.judges import AnyJudge, Opening
from exprl_jax.reward.segments import SegmentRule, Splitter
from exprl_jax.reward.statistics import VERDICTS, summarise
from exprl_jax.reward.verifiers.grading import Graders, Verdicts, check_answers
from exprl_jax.reward.verifiers.verdict import Verdict
from exprl_jax.rollout.waves import Prompts, Sampler, describe_problem, make_prompts, texts_of
from exprl_jax.workdir import check_workdir


@dataclasses.dataclass(frozen=True)
class Run:
    """What stays the same through a run.

    Attributes:
      problems: those whose prompts fit.
      kinds: of the problems, in a fixed order.
      frozen: parameters that never change, by the model they are of; equal models share one entry.
    """

    config: Config
    mesh: Mesh
    policy: LanguageModel
    judge: AnyJudge
    sampler: Sampler
    programs: programs_room.Programs
    problems: Sequence[Problem]
    kinds: Sequence[Kind]
    prompts: Prompts
    splitter: Splitter
    frozen: Mapping[Model, decoder.Params]

    @property
    def base(self) -> Any:
        """What the policy's adapters stand on; nothing where it has none."""
        return self.frozen[self.config.policy] if self.config.lora.rank else ()

    def model(self, state: TrainState) -> Any:
        """The policy as it stands."""
        return adapt(self.config.lora, self.base, state.params)

    def route(self, problem: Problem) -> Route:
        """What scores the problem's rollouts."""
        return route_of(self.config, problem)


@dataclasses.dataclass(frozen=True)
class Wave:
    """Rollouts of one wave, on the host, this process's problems only.

    Attributes:
      problems: in row order.
      ends: exclusive token ends of each rollout's segments, by problem and index within the group.
      responses: text of each rollout.
    """

    problems: Sequence[Problem]
    rollouts: Rollouts
    ends: Sequence[Sequence[np.ndarray]]
    responses: Sequence[Sequence[str]]


class Scored(NamedTuple):
    """A wave and what became of it.

    Attributes:
      verdicts: by problem and index within the group.
      resampled_P: times that the group was sampled again.
      sampled: tokens drawn for it, those of groups that were thrown away included.
    """

    wave: Wave
    judged: Judgements
    assigned: Assigned
    verdicts: Sequence[Sequence[Verdict]]
    resampled_P: np.ndarray
    sampled: int


def route_of(config: Config, problem: Problem) -> Route:
    """What scores the problem's rollouts."""
    return getattr(config.routes, problem.kind)


def train(config: Config, workdir_path: str) -> None:
    """Runs the experiment in its folder, from where it stands to its last step.

    Raises:
      ValueError: anything about config, data, model or folder that cannot work, in one line.
      FloatingPointError: a metric is not finite (names step and metric).
    """
    check_workdir(workdir_path, to_dict(config))
    with contextlib.ExitStack() as held:
        run = prepare(config, held)
        grades = bool(owned_problems(run.mesh, config.rollout.wave).any())
        graders = held.enter_context(open_graders(config.grader, config.code, run.kinds, grades))
        follow(task_of(run, functools.partial(take_step, run, graders)), workdir_path)


def take_step(
    run: Run, graders: Graders, state: TrainState, step: int, clock: Clock, wait: Callable[[], None]
) -> Taken:
    """One RL step: all waves of a batch, then its updates."""
    config = run.config
    indices, epoch = batch_indices(len(run.problems), config.rollout.prompts, config.seed, step)
    # Verifiers work on one wave while the next is sampled.
    begun = [
        begin_wave(
            run,
            graders,
            run.model(state),
            [run.problems[i] for i in indices[place]],
            place,
            step,
            clock,
            0,
            np.ones(len(place), bool),
        )
        for place in local_places(run, config.rollout.prompts)
    ]
    scored = [finish_wave(run, graders, run.model(state), wave, step, clock) for wave in begun]
    table = [_table(run, wave.place, each) for wave, each in zip(begun, scored)]
    rows = gather_rows({k: np.concatenate([t[k] for t in table]) for k in table[0]}, _places(table))
    row = summarise(rows, config.advantage, run.kinds) | {"data/epoch": epoch}
    if step == 0:
        look(row, config)

    with clock.phase("pack"):
        batch = whole_batch(run, [run.problems[i] for i in indices], scored, [wave.place for wave in begun])
        ready = ready_updates(run, batch)
    with clock.phase("logp"):
        batches = jax.block_until_ready([with_logp(run, run.model(state), each.experience) for each in ready])
    wait()
    with clock.phase("train"):
        updates = []
        for experience in batches:
            state, update = run.programs.train_step(state, run.base, experience)
            updates.append(jax.device_get(update))
    sampled = int(rows["sampled_P"].sum())
    return Taken(
        state=state,
        row=row | learned(config, updates) | padding_of(ready) | graders.throughput.report() | run.judge.report(),
        tokens={"sample": sampled, "judge": int(rows["judge_tokens_P"].sum()), "train": int(rows["length_PG"].sum())},
        headline=row["reward/mean"],
        samples=_samples(run, scored, config.log.rollouts),
    )


def prepare(config: Config, held: contextlib.ExitStack) -> Run:
    """Opens models and data, and checks that they fit the config and one another.

    Args:
      held: closes what stays open through the run.
    """
    mesh = make_mesh(config.mesh)
    check_layout(config, mesh.shape[DATA])
    splitting = segment_rule(config)
    policy = open_model(config.policy)
    problems = read_training_problems(config.data, needs_references(config))
    check_answers(problems)
    kinds = kinds_of(problems)
    rl = config.task == "rl"
    opening = Opening(
        config.judge,
        scored=[p for p in problems if rl and route_of(config, p) != "verifier"],
        verified=[p for p in problems if rl and p.kind == "science"],
        unit=lambda p: config.judge.unit if route_of(config, p) == "process" else "outcome",
    )
    programs = programs_room.build(config, mesh, policy)
    check_lengths(config, policy.arch)
    ids = policy_prompts(config, policy, problems)
    lengths = {name: len(prompt) for name, prompt in ids.items()}
    problems = fitting("data.max_prompt_tokens", config.data.max_prompt_tokens, problems, lengths)
    problems = fitting("judge.max_context_tokens", config.judge.max_context_tokens, problems, opening.lengths(problems))
    if len(problems) < config.rollout.prompts:
        raise ValueError(
            f"config.rollout.prompts: got {config.rollout.prompts}, expected at most {len(problems)}, the problems that are left"
        )
    # In one order on every process: loading may run programs over the whole mesh.
    frozen = {}
    say(f"policy {config.policy.weights}")
    if needs_reference_model(config):
        reference = open_model(config.reference)
        if reference.arch != policy.arch or reference.execution != policy.execution:
            raise ValueError(
                "config.reference: expected the policy's architecture and execution; one program serves both"
            )
        frozen[config.reference] = load_frozen(reference, mesh, config.seed)
        say(f"reference {config.reference.weights}")
    if config.lora.rank and config.policy not in frozen:
        frozen[config.policy] = load_frozen(policy, mesh, config.seed)

    def load_judge(model: LanguageModel) -> decoder.Params:
        say(f"judge {model.how.weights}")
        if model.how not in frozen:
            frozen[model.how] = load_frozen(model, mesh, config.seed)
        return frozen[model.how]

    return Run(
        config=config,
        mesh=mesh,
        policy=policy,
        judge=opening.open(mesh, held, load_judge, problems, wave=config.rollout.wave, group=config.rollout.group),
        sampler=programs_room.build_sampler(
            policy, mesh, max_tokens=config.rollout.max_tokens, wave=config.rollout.wave
        ),
        programs=programs,
        problems=problems,
        kinds=kinds,
        prompts=make_prompts({p.id: ids[p.id] for p in problems}),
        splitter=Splitter(policy.tokenizer.token_bytes, splitting),
        frozen=frozen,
    )


def task_of(run: Run, step: Callable[..., Taken]) -> Task:
    """The run as the loop sees it."""
    config, policy = run.config, run.policy
    return Task(
        config=config,
        checkpoint=config.checkpoint,
        steps=config.steps,
        policy=policy,
        abstract=programs_room.abstract_state(config, policy.arch),
        shardings=programs_room.shard_state(config, run.mesh, policy),
        first_state=functools.partial(_first_state, run),
        problems=run.problems,
        take_step=step,
        export=functools.partial(export, config.lora, policy, run.base),
        shows="reward" if config.task == "rl" else "accuracy",
    )


def check_layout(config: Config, shards: int) -> None:
    """Checks that every device gets a whole part of every wave and of every microbatch.

    Raises:
      ValueError: names the keys to change.
    """
    if config.rollout.wave % shards:
        raise ValueError(f"config.rollout.wave: got {config.rollout.wave}, expected a multiple of mesh.data = {shards}")
    if config.updates.microbatch % shards:
        raise ValueError(
            f"config.updates.microbatch: got {config.updates.microbatch} rows, expected a multiple of mesh.data = {shards}, "
            "so that every device has a row in every microbatch"
        )


def check_lengths(config: Config, policy: Architecture) -> None:
    """Checks that prompt and response within their budgets are within the policy's context length.

    Raises:
      ValueError: names the budgets to lower.
    """
    tokens = config.data.max_prompt_tokens + config.rollout.max_tokens
    if tokens > policy.max_positions:
        raise ValueError(
            f"config.data.max_prompt_tokens + rollout.max_tokens: got {tokens} tokens, expected at most "
            f"{policy.max_positions}, the policy's context length"
        )


def segment_rule(config: Config) -> SegmentRule:
    """The config's rule; one segment a rollout where only whole rollouts are scored."""
    whole_only = "process" not in dataclasses.astuple(config.routes)
    return cutting_rule(dataclasses.replace(config.segments, max_segments=1) if whole_only else config.segments)


def cutting_rule(how: Segments) -> SegmentRule:
    """The rule that a config's words stand for.

    Raises:
      ValueError: they stand for none.
    """
    kind, _, argument = how.rule.partition(":")
    limit = how.max_segments
    if kind == "stride":
        if not argument.isdecimal():
            raise ValueError(f"config.segments.rule: got {how.rule!r}, expected stride:<tokens>")
        return SegmentRule("stride", limit, stride=int(argument))
    if kind == "regex":
        return SegmentRule("regex", limit, pattern=argument)
    if argument:
        raise ValueError(f"config.segments.rule: got {how.rule!r}; only stride: and regex: take an argument")
    return SegmentRule(kind, limit)


# ---------------------------------------------------------------------------------------------------- one wave


def local_places(run: Run, prompts: int) -> list[np.ndarray]:
    """Places in the batch of this process's problems, wave by wave."""
    wave = run.config.rollout.wave
    return [place[local_problems(run.mesh, wave)] for place in np.arange(prompts).reshape(-1, wave)]


class Begun(NamedTuple):
    """A wave that is sampled and judged, while its verifiers are still at work.

    Attributes:
      place: of its problems in the batch.
      live_P: problems that were sampled.
      owned_P: problems whose verifiers are at work in this process.
    """

    place: np.ndarray
    live_P: np.ndarray
    owned_P: np.ndarray
    attempt: int
    wave: Wave
    judged: Judgements
    opinions: Sequence[Sequence[Verdict]]
    grading: Verdicts


def begin_wave(
    run: Run,
    graders: Graders,
    params: decoder.Params,
    problems: Sequence[Problem],
    place: np.ndarray,
    step: int,
    clock: Clock,
    attempt: int,
    live_P: np.ndarray,
) -> Begun:
    """Samples a wave, gives it to the verifiers, and asks the judge meanwhile."""
    with clock.phase("sample"):
        wave = sample_wave(run, params, problems, step, attempt, live_P)
    owned_P = owned_problems(run.mesh, run.config.rollout.wave)
    owned = [(p, group) for p, group, mine in zip(problems, wave.responses, owned_P) if mine]
    grading = graders.submit([(p, text) for p, group in owned for text in group])
    with clock.phase("judge"):
        # A judge on the mesh is asked by all, for a program is the whole mesh's.
        asks_P = owned_P | run.judge.on_mesh
        judged = judge_wave(run, wave, asks_P)
        opinions = verify_wave(run, wave, asks_P)
    return Begun(place, live_P, owned_P, attempt, wave, judged, opinions, grading)


def finish_wave(run: Run, graders: Graders, params: decoder.Params, begun: Begun, step: int, clock: Clock) -> Scored:
    """Advantages of a wave; groups without any are sampled again, up to `max_resample` times."""
    scored = _score(run, begun, clock)
    for attempt in range(1, run.config.rollout.max_resample + 1):
        dead_P = ~scored.assigned.live_P
        # Every process makes the same number of attempts: sampling is one program over the whole mesh.
        if not largest_over_processes(int(dead_P.sum())):
            break
        again = begin_wave(run, graders, params, begun.wave.problems, begun.place, step, clock, attempt, dead_P)
        scored = _replace(scored, _score(run, again, clock), dead_P)
    return scored


def _score(run: Run, begun: Begun, clock: Clock) -> Scored:
    wave, G = begun.wave, run.config.rollout.group
    with clock.phase("grade"):
        graded = iter(begun.grading.result())
    found = [[next(graded) for _ in range(G)] if mine else [Verdict.missing] * G for mine in begun.owned_P]
    verdicts = [said or of_problem for said, of_problem in zip(begun.opinions, found)]
    judged, verdicts = _agreed(begun.place, begun.judged, verdicts)
    judged = with_verdicts(run, wave, judged, verdicts)
    process_P = np.array([run.route(problem) == "process" for problem in wave.problems])
    overlong_PG = ~wave.rollouts.ended_PG
    assigned = assign(judged.score_PGN, judged.valid_PGN, counts(wave), overlong_PG, process_P, run.config.advantage)
    resampled_P = (begun.live_P & (begun.attempt > 0)).astype(np.int32)
    return Scored(wave, judged, assigned, verdicts, resampled_P, int(wave.rollouts.mask_PGR.sum()))


def _agreed(
    place: np.ndarray, judged: Judgements, verdicts: Sequence[Sequence[Verdict]]
) -> tuple[Judgements, Sequence[Sequence[Verdict]]]:
    """The same scores and verdicts of a problem on every process that holds it: rewards must not differ by a clock."""
    verdict_PG = np.array([[VERDICTS.index(v) for v in group] for group in verdicts])
    arrays = agree_rows(dict(zip(Judgements._fields[:4], judged[:4])) | {"verdict_PG": verdict_PG}, place)
    verdicts = [[VERDICTS[v] for v in group] for group in arrays.pop("verdict_PG")]
    return judged._replace(**arrays), verdicts


def _replace(old: Scored, new: Scored, dead_P: np.ndarray) -> Scored:
    """`old` with the groups of `dead_P` from `new`."""

    def arrays(a, b):
        return np.where(dead_P.reshape(-1, *[1] * (np.ndim(a) - 1)), b, a)

    def lists(a, b):
        return [y if dead else x for x, y, dead in zip(a, b, dead_P)]

    text = {at: said for at, said in old.judged.text.items() if not dead_P[at[0]]} | dict(new.judged.text)
    judged = Judgements(*map(arrays, old.judged[:4], new.judged[:4]), text, old.judged.tokens + new.judged.tokens)
    return Scored(
        wave=Wave(
            problems=old.wave.problems,
            rollouts=jax.tree.map(arrays, old.wave.rollouts, new.wave.rollouts),
            ends=lists(old.wave.ends, new.wave.ends),
            responses=lists(old.wave.responses, new.wave.responses),
        ),
        judged=judged,
        assigned=Assigned(*map(arrays, old.assigned, new.assigned)),
        verdicts=lists(old.verdicts, new.verdicts),
        resampled_P=old.resampled_P + new.resampled_P,
        sampled=old.sampled + new.sampled,
    )


def sample_wave(
    run: Run, params: decoder.Params, problems: Sequence[Problem], step: int, attempt: int, live_P: np.ndarray
) -> Wave:
    """G rollouts of each problem from the bare prompt, with their text, cut where the judge is to score."""
    how = run.config.rollout
    rollouts = run.sampler(
        params,
        run.prompts,
        problems,
        group=how.group,
        temperature=how.temperature,
        seed=run.config.seed,
        step=step,
        attempt=attempt,
        live_P=live_P,
    )
    ids, responses = texts_of(rollouts, run.policy.tokenizer.decode)
    ends = [
        [run.splitter.segment_ends(row) if run.route(problem) == "process" else whole(row) for row in group]
        for problem, group in zip(problems, ids)
    ]
    return Wave(problems, rollouts, ends, responses)


def whole(row: np.ndarray) -> np.ndarray:
    """The ends of the one segment of a rollout that is not cut; none where nothing was sampled."""
    return np.array([len(row)] if len(row) else [], np.int64)


def judge_wave(run: Run, wave: Wave, asks_P: np.ndarray) -> Judgements:
    """A score for each rollout, or for each of its prefixes or segments.  Where overlong rollouts' scores follow from
    the config's rule (D3), they are not asked for.

    Args:
      asks_P: problems of which this process asks.
    """
    queries = []
    for i, problem in enumerate(wave.problems):
        of_problem = []
        for g, ends in enumerate(wave.ends[i]):
            wanted = wave.rollouts.ended_PG[i, g] or run.config.advantage.overlong == "keep"
            if asks_P[i] and wanted and run.route(problem) != "verifier":
                of_problem += [Query(g, n, _trace(run, wave, i, g, n)) for n in range(len(ends))]
        queries.append(of_problem)
    return run.judge.score(wave.problems, queries, run.splitter.rule.max_segments)


def verify_wave(run: Run, wave: Wave, asks_P: np.ndarray) -> list[list[Verdict]]:
    """Verdicts on open-ended answers, which only a judge can give; none for other problems, where nothing was sampled and
    where this process does not ask."""
    sampled_P = (counts(wave) > 0).any(-1) & asks_P
    asked = [
        group if p.kind == "science" and s else [] for p, group, s in zip(wave.problems, wave.responses, sampled_P)
    ]
    return run.judge.verify(wave.problems, asked)


def with_verdicts(run: Run, wave: Wave, judged: Judgements, verdicts: Sequence[Sequence[Verdict]]) -> Judgements:
    """The rewards of the route `verifier`: 1 for correct, 0 for anything else, none where the verifier failed."""
    sparse_P11 = np.array([run.route(problem) == "verifier" for problem in wave.problems])[:, None, None]
    first_N = np.arange(judged.score_PGN.shape[-1]) == 0
    correct_PG, known_PG = (
        np.array([[(v == which) == wanted for v in group] for group in verdicts])
        for which, wanted in ((Verdict.correct, True), (Verdict.missing, False))
    )
    sampled_PG = counts(wave) > 0
    return judged._replace(
        score_PGN=np.where(sparse_P11, (correct_PG[..., None] & first_N).astype(np.float64), judged.score_PGN),
        valid_PGN=np.where(sparse_P11, (known_PG & sampled_PG)[..., None] & first_N, judged.valid_PGN),
    )


def _trace(run: Run, wave: Wave, i: int, g: int, n: int) -> str:
    ends = wave.ends[i][g]
    step = run.config.judge.unit == "step" and run.route(wave.problems[i]) == "process"
    start = ends[n - 1] if step and n > 0 else 0
    return run.policy.tokenizer.decode(wave.rollouts.tokens_PGR[i, g, start : ends[n]].tolist())


# ---------------------------------------------------------------------------------------------------- one update


class Batch(NamedTuple):
    """A step's rollouts, the same on every process, in the batch's order.

    Attributes:
      prompts: token ids of each problem's.
      mask_PGR: tokens that carry a loss, of those that were sampled.
    """

    prompts: Sequence[Sequence[int]]
    rollouts: Rollouts
    mask_PGR: np.ndarray
    advantage_PGR: np.ndarray


class Ready(NamedTuple):
    """An update's batch.

    Attributes:
      packing: where each of its rollouts with a token is, and what else to know of each:
      group_N, index_N: its problem among the update's, and its index in the group.
    """

    experience: Experience
    packing: Filled
    group_N: np.ndarray
    index_N: np.ndarray


def whole_batch(run: Run, problems: Sequence[Problem], scored: Sequence[Scored], places: Sequence[np.ndarray]) -> Batch:
    """Joins the processes' rollouts: rows are packed from all of them, so that every device has its fair share."""
    parts = []
    for each in scored:
        ends = np.full(each.assigned.advantage_PGN.shape, run.config.rollout.max_tokens)
        for i, of_problem in enumerate(each.wave.ends):
            for g, of_rollout in enumerate(of_problem):
                ends[i, g, : len(of_rollout)] = of_rollout
        rollouts = each.wave.rollouts
        advantage, mask = to_tokens(each.assigned.advantage_PGN, each.assigned.counted_PGN, ends, rollouts.mask_PGR)
        parts.append((rollouts, mask, advantage))
    return join_batch(run, problems, parts, places)


def join_batch(
    run: Run,
    problems: Sequence[Problem],
    parts: Sequence[tuple[Rollouts, np.ndarray, np.ndarray]],
    places: Sequence[np.ndarray],
) -> Batch:
    """Args: parts: (rollouts, loss mask, advantages) of this process's part of every wave; places: in the batch."""
    rollouts, mask, advantage = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    own = dict(vars(rollouts)) | {"loss_mask": mask, "advantage": advantage}
    whole = gather_rows(own, np.concatenate(places))
    mask, advantage = whole.pop("loss_mask"), whole.pop("advantage")
    return Batch([run.prompts.ids[problem.id] for problem in problems], Rollouts(**whole), mask, advantage)


def ready_updates(run: Run, batch: Batch) -> list[Ready]:
    """The step's updates: every `per_batch`-th problem each, packed into rows of `updates.row_tokens`."""
    updates = run.config.updates
    return [ready_update(run, batch, slice(u, None, updates.per_batch)) for u in range(updates.per_batch)]


def ready_update(run: Run, batch: Batch, mine: slice, room_P: Sequence[int] = ()) -> Ready:
    """The update of some of the batch's problems.

    Args:
      room_P: slots to plan for each problem's prompt, if more than it takes.
    """
    config, place = run.config, Placement(run.mesh)
    prompts, rollouts = batch.prompts[mine], jax.tree.map(lambda x: x[mine], batch.rollouts)
    mask_PGR, advantage_PGR = batch.mask_PGR[mine], batch.advantage_PGR[mine]
    weight_PGR = normaliser(mask_PGR, config.loss.aggregate, config.rollout.max_tokens)
    length_PG = rollouts.mask_PGR.sum(-1)
    group_N, index_N = np.nonzero(length_PG)
    length_N = length_PG[group_N, index_N]
    room_P = np.array(room_P or [len(prompt) for prompt in prompts]) - 1
    row_N = assign_rows(
        room_P[group_N],
        length_N,
        group_N if place.shares_segments else np.arange(len(group_N)),
        config.updates.row_tokens,
    )
    examples = [Example(prompts[p], rollouts.tokens_PGR[p, g, :n]) for p, g, n in zip(group_N, index_N, length_N)]
    filled = fill_rows(examples, group_N, row_N, packed_shape(config), place.shares_segments)

    def spread(x_PGR):
        return filled.spread([x_PGR[p, g, :n] for p, g, n in zip(group_N, index_N, length_N)], x_PGR.dtype)

    zeros = np.zeros(filled.packed.tokens_BT.shape, np.float32)
    made = Experience(
        packed=filled.packed,
        mask_MBT=spread(mask_PGR),
        weight_MBT=spread(weight_PGR),
        advantage_MBT=spread(advantage_PGR),
        sampler_logp_MBT=spread(rollouts.logp_PGR),
        old_logp_MBT=zeros,
        ref_logp_MBT=zeros,
        used=filled.used,
    )
    return Ready(put_microbatches(run.mesh, made), filled, group_N, index_N)


def packed_shape(config: Config) -> tuple[int, int, int]:
    """[M, B, T] of an update's arrays: a row for every rollout would be enough."""
    rows = config.rollout.prompts // config.updates.per_batch * config.rollout.group
    return -(-rows // config.updates.microbatch), config.updates.microbatch, config.updates.row_tokens


def with_logp(run: Run, params: decoder.Params, experience: Experience) -> Experience:
    """Adds the log-probs that the loss compares with: of the old policy where the batch is used more than once (else
    they are the update's own), and of the reference where the loss has a KL."""
    if run.config.updates.per_batch > 1:
        logp = run.programs.token_logp(params, experience.packed, experience.used)
        experience = experience.replace(old_logp_MBT=logp)
    if run.config.loss.kl_coef > 0:
        logp = run.programs.token_logp(run.frozen[run.config.reference], experience.packed, experience.used)
        experience = experience.replace(ref_logp_MBT=logp)
    return experience


def padding_of(ready: Sequence[Ready]) -> dict[str, float]:
    """The metric of how well an update's rows are filled, over a step's updates."""
    return {"update/padding": sum(each.packing.padding for each in ready) / len(ready)}


def learned(config: Config, updates: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """A step's updates as one row; what the loss did not need was not measured."""
    row = over_updates(updates)
    if config.loss.kl_coef == 0:
        row["loss/kl"] = None
    return row


def over_updates(updates: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """One row from a step's updates: means, but maxima of maxima and sums of counts; null if all were skipped."""
    joined = {}
    for name in updates[0]:
        values = [float(update[name]) for update in updates]
        # What is not finite in a skipped update was counted there; anywhere else it ends the run.
        values = [v for v, update in zip(values, updates) if np.isfinite(v) or not update["update/skipped"]]
        if not values:
            joined[name] = None
            continue
        if name.endswith("_max"):
            joined[name] = max(values)
        elif name in ("update/skipped", "update/tokens"):
            joined[name] = sum(values)
        else:
            joined[name] = sum(values) / len(values)
    return joined


# ---------------------------------------------------------------------------------------------------- parts


def read_training_problems(data: Data, references: bool) -> list[Problem]:
    """The problems, with references only where something is to be learned from them.

    Raises:
      ValueError: nothing there, or a problem that is held out.
    """
    problems = read_problems(data.source, split=data.split, references=references)
    if data.held_out and not data.allow_held_out:
        check_held_out(problems, read_problems(data.held_out, split="test", references=False))
    return problems


def needs_references(config: Config) -> bool:
    """Whether the run has any use for reference solutions; Stage II and sparse GRPO have none."""
    return config.task == "distill" or set(dataclasses.astuple(config.routes)) != {"verifier"}


def needs_reference_model(config: Config) -> bool:
    """Whether the run has a frozen model beside the policy: for the loss's KL, or as the teacher."""
    return config.task == "distill" or config.loss.kl_coef > 0


def has_local_judge(config: Config) -> bool:
    """Whether any route is scored by a model on the mesh; open-ended science in the data has one verify it besides."""
    judged = config.task == "rl" and set(dataclasses.astuple(config.routes)) != {"verifier"}
    return judged and config.judge.backend == "local"


def kinds_of(problems: Sequence[Problem]) -> list[Kind]:
    """The kinds among them, in a fixed order."""
    return sorted({problem.kind for problem in problems})


def policy_prompts(config: Any, policy: LanguageModel, problems: Sequence[Problem]) -> dict[str, list[int]]:
    """The bare prompt of each problem, by its id (D11)."""
    examples = read_problems(config.data.worked_examples) if config.data.worked_examples else []
    style = PromptStyle(examples=worked_examples(examples))
    return {p.id: policy_prompt(policy.tokenizer, p.question, style) for p in problems}


def fitting(key: str, limit: int, problems: Sequence[Problem], lengths: Mapping[str, int]) -> list[Problem]:
    """The problems within a budget; says how many are not.

    Raises:
      ValueError: none is left.
    """
    try:
        kept, dropped = drop_overlong(problems, [lengths[p.id] for p in problems], limit)
    except ValueError as error:
        raise ValueError(f"config.{key}: {error}") from error
    say(f"{len(kept)} problems; dropped {dropped} over config.{key} = {limit}")
    return kept


def open_graders(grader: Any, code: Any, kinds: Sequence[Kind], grades: bool = True) -> Graders:
    """The verifiers of these kinds; says what isolates the programs of rollouts, where there are any.

    Every process must call this: those of a host share its `grader.workers`, and each has one at least.

    Args:
      grades: whether this process grades any rows.
    """
    sharing = processes_here(grades)
    workers = max(1, grader.workers // sharing) if grades else 1
    graders = Graders(dataclasses.replace(grader, workers=workers), code, kinds)
    if graders.isolation:
        say(graders.isolation)
    return graders


def load_frozen(model: LanguageModel, mesh: Mesh, seed: int) -> decoder.Params:
    """A model's parameters on the mesh."""
    return load(model, parameter_shardings(model, mesh), seed)


def parameter_shardings(model: LanguageModel, mesh: Mesh) -> Any:
    """Where each of the model's parameters lies."""
    abstract = decoder.abstract_params(model.arch, model.execution, model.how.param_dtype)
    return shard_parameters(abstract, model.arch, model.execution, mesh)


def _first_state(run: Run) -> TrainState:
    """The state before the first step; a frozen copy of the policy's start is read once, not twice."""
    params = run.frozen.get(run.config.policy)
    if params is None:
        params = load_frozen(run.policy, run.mesh, run.config.seed)
    return run.programs.init_state(params)


def counts(wave: Wave) -> np.ndarray:
    """Segments of each rollout, [P, G]."""
    return np.array([[len(ends) for ends in group] for group in wave.ends])


def _table(run: Run, place: np.ndarray, scored: Scored) -> dict[str, np.ndarray]:
    wave, judged, assigned = scored.wave, scored.judged, scored.assigned
    others = [0] * (len(place) - 1)
    return {
        "place_P": place,
        "kind_P": np.array([run.kinds.index(problem.kind) for problem in wave.problems]),
        "length_PG": wave.rollouts.mask_PGR.sum(-1),
        "ended_PG": wave.rollouts.ended_PG,
        "verdict_PG": np.array([[VERDICTS.index(v) for v in group] for group in scored.verdicts]),
        "count_PG": counts(wave),
        "score_PGN": judged.score_PGN.astype(np.float32),
        "valid_PGN": judged.valid_PGN,
        "asked_PGN": judged.asked_PGN,
        "cut_PGN": judged.cut_PGN,
        "judge_tokens_P": np.array([judged.tokens, *others]),
        "sampled_P": np.array([scored.sampled, *others]),
        "resampled_P": scored.resampled_P,
        "advantage_PGN": assigned.advantage_PGN,
        "counted_PGN": assigned.counted_PGN,
        "live_P": assigned.live_P,
    }


def _places(table: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
    return np.concatenate([part["place_P"] for part in table])


def _samples(run: Run, scored: Sequence[Scored], count: int) -> list[dict[str, Any]]:
    """Some of this process's rows, as people read them: a rollout of every problem, then the next of every problem."""
    samples = []
    for g in range(run.config.rollout.group):
        for wave, judged, assigned, verdicts, *_ in scored:
            for i, problem in enumerate(wave.problems):
                if len(samples) == count:
                    return samples
                segments = [
                    {
                        "text": text,
                        "score": float(judged.score_PGN[i, g, n]) if judged.valid_PGN[i, g, n] else None,
                        "advantage": float(assigned.advantage_PGN[i, g, n]) if assigned.counted_PGN[i, g, n] else None,
                        "judge": judged.text.get((i, g, n)),
                    }
                    for n, text in enumerate(segment_texts(run, wave, i, g))
                ]
                samples.append(sample_row(run, wave, i, g, verdicts[i][g]) | {"segments": segments})
    return samples


def segment_texts(run: Run, wave: Wave, i: int, g: int) -> list[str]:
    """The text of each segment of a rollout."""
    ids, ends = wave.rollouts.tokens_PGR[i, g], wave.ends[i][g]
    return [run.policy.tokenizer.decode(ids[start:end].tolist()) for start, end in zip([0, *ends[:-1]], ends)]


def sample_row(run: Run, wave: Wave, i: int, g: int, verdict: Verdict) -> dict[str, Any]:
    """A rollout as people read it."""
    problem = wave.problems[i]
    return describe_problem(problem) | {
        "rollout": g,
        "prompt": run.policy.tokenizer.decode(run.prompts.ids[problem.id]),
        "response": wave.responses[i][g],
        "length": int(wave.rollouts.mask_PGR[i, g].sum()),
        "ended": bool(wave.rollouts.ended_PG[i, g]),
        "verdict": str(verdict),
    }
