"""Evaluation: n samples a problem of any model on any problem sets, graded by the one grader, as pass@k with intervals.

    problems ─ groups without samples ─→ waves ─ sampler ─→ verifiers | judge ─→ samples/<set>.jsonl ─→ pass@k

Samples are drawn a wave of problems and a group of samples at a time, and are on disk before the next but one are
drawn.  A sample's random numbers depend on seed, problem, number and the size of groups alone: an evaluation which was
killed goes on where its files end and arrives at the same numbers, and one that is finished may be given more samples.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import pathlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from exprl_jax import programs
from exprl_jax.config import Evaluate
from exprl_jax.data.problem_sources import split_sources
from exprl_jax.data.problems import Problem, read_problems
from exprl_jax.data.training import check_same_problems, fingerprint, kinds_of, policy_prompts
from exprl_jax.evaluation.pass_at_k import summarise
from exprl_jax.evaluation.tables import RESULTS, EvaluatedModel, render_table, write_results, write_tables
from exprl_jax.files import Ledger, read_rows, write_atomically
from exprl_jax.hosts import agree_rows, barrier, gather_rows, local_problems, owned_problems, say
from exprl_jax.layout import check_layout
from exprl_jax.mesh import DATA, make_mesh
from exprl_jax.model.decoder import Params
from exprl_jax.records import Rollouts
from exprl_jax.resolve import to_dict
from exprl_jax.reward.judges import AnyJudge, JudgeBuilder
from exprl_jax.reward.statistics import VERDICTS, verdict_indices
from exprl_jax.reward.verifiers.grading import Graders, check_answers, open_graders, submit_owned
from exprl_jax.reward.verifiers.verdict import Verdict
from exprl_jax.rollout.call import Prompts, Sampler, describe_problem, make_prompts, texts_of
from exprl_jax.run.stopping import StopRequest
from exprl_jax.run.workdir import check_workdir, open_workdir
from exprl_jax.weights.language_model import LanguageModel, load_params, open_model
from exprl_jax.weights.run_models import check_models

_PROGRESS_S = 10.0
_SAMPLE_KEY = ("id", "sample")
_SAMPLE_FIELDS = {"id": str, "sample": int, "response": str, "length": int, "ended": bool, "verdict": str}


@dataclasses.dataclass(frozen=True)
class EvaluationRun:
    """What stays the same through an evaluation."""

    config: Evaluate
    mesh: Mesh
    policy: LanguageModel
    params: Params
    prompts: Prompts
    sampler: Sampler
    judge: AnyJudge
    graders: Graders


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


def evaluate(config: Evaluate, workdir_path: str) -> None:
    """Runs the evaluation in its folder, from where its samples end.

    Raises:
      ValueError: anything about config, data, model or folder that cannot work, in one line.
    """
    check_workdir(workdir_path, to_dict(config))
    sets = read_sets(config)
    with contextlib.ExitStack() as stack:
        folder, run = open_evaluation(config, sets, workdir_path, stack)
        stop = stack.enter_context(StopRequest())
        if jax.process_index() == 0:
            _check_problems_of(folder / "problems.json", sets)
        for name, problems in sets.items():
            if not sample_set(run, name, problems, folder / "samples" / f"{name}.jsonl", stop):
                say("stopped; start again with the same command to go on")
                return
        if jax.process_index() == 0:
            _report(config, folder, sets)


# ------------------------------------------------------------------------------------------------ opening


def read_sets(config: Evaluate) -> dict[str, list[Problem]]:
    """The problem sets by name, without reference solutions.

    Raises:
      ValueError: two sets of one name, an id that stands for two problems, or a problem that its verifier cannot grade.
    """
    sets: dict[str, list[Problem]] = {}
    by_id: dict[str, Problem] = {}
    for source in split_sources(config.data.source):
        name = set_name(source)
        if name in sets:
            raise ValueError(f"config.data.source: two sets are called {name!r}; rename a file or evaluate them apart")
        sets[name] = read_problems(source, split=config.data.split, references=False)
        check_answers(sets[name])
        for problem in sets[name]:
            if by_id.setdefault(problem.id, problem) != problem:
                raise ValueError(
                    f"config.data.source: {problem.id!r} is another problem in {name!r} than in a set before it; "
                    "rename it, or evaluate the sets apart"
                )
    return sets


def set_name(source: str) -> str:
    """What a set is called in files and tables: a benchmark's name, a file's stem, a data set's id."""
    kind, _, rest = source.partition(":")
    if kind in ("hf", "tfds"):
        name = rest
    else:
        name = pathlib.Path(source).stem if source.endswith((".jsonl", ".parquet")) and not rest else kind
    return re.sub(r"[^\w.-]+", "_", name).strip("_")


def open_evaluation(
    config: Evaluate, sets: Mapping[str, Sequence[Problem]], workdir_path: str, stack: contextlib.ExitStack
) -> tuple[pathlib.Path, EvaluationRun]:
    """The folder, and what the evaluation needs, checked against one another.

    Args:
      stack: closes what stays open.

    Raises:
      ValueError: anything about config, data, model or folder that cannot work, in one line.
    """
    problems = [problem for of_set in sets.values() for problem in of_set]
    check_same_problems(problems)
    policy, mesh, sampling = open_model(config.policy), make_mesh(config.mesh), config.sampling
    prompts = checked_prompts(config, policy, problems)
    builder = checked_judge(config, problems, policy)
    check_layout(config, mesh.shape[DATA])
    workdir = stack.enter_context(
        open_workdir(workdir_path, to_dict(config), folders=("samples",), process=jax.process_index(), barrier=barrier)
    )
    check_models(workdir, [policy, *builder.models])
    say(
        f"policy {config.policy.weights}; {len(problems)} problems in {len(sets)} sets, {sampling.samples} samples each"
    )
    grades = bool(owned_problems(mesh, sampling.wave).any())
    graders = stack.enter_context(open_graders(config.grader, config.code, kinds_of(problems), grades))
    params = load_params(policy, mesh, config.seed)
    judge = builder.open(
        mesh,
        stack,
        # Judge and policy may be one model; then they are one set of buffers.
        lambda model: params if model.config == config.policy else load_params(model, mesh, config.seed),
        programs.build_judge,
        problems,
        wave=sampling.wave,
        group=sampling.group,
    )
    sampler = programs.build_sampler(policy, mesh, max_tokens=sampling.max_tokens, wave=sampling.wave)
    return workdir.path, EvaluationRun(config, mesh, policy, params, prompts, sampler, judge, graders)


def checked_prompts(config: Evaluate, policy: LanguageModel, problems: Sequence[Problem]) -> Prompts:
    """The policy's prompts.

    Raises:
      ValueError: one is over the budget (an evaluation leaves no problem out), or budgets are over the model's context.
    """
    ids = policy_prompts(config, policy.tokenizer, problems)
    _check_budget("data.max_prompt_tokens", config.data.max_prompt_tokens, {name: len(ids[name]) for name in ids})
    tokens = config.data.max_prompt_tokens + config.sampling.max_tokens
    if tokens > policy.arch.max_positions:
        raise ValueError(
            f"config.data.max_prompt_tokens + sampling.max_tokens: got {tokens} tokens, expected at most "
            f"{policy.arch.max_positions}, the policy's context length"
        )
    return make_prompts(ids)


def checked_judge(config: Evaluate, problems: Sequence[Problem], opened: LanguageModel | None = None) -> JudgeBuilder:
    """The judge that says yes or no to open-ended answers; nothing is loaded.

    Raises:
      ValueError: a prompt is over the judge's budget, or its budgets are over its context.
    """
    open_ended = [problem for problem in problems if problem.traits.by_judge]
    builder = JudgeBuilder(config.judge, scored=[], verified=open_ended, unit=lambda _: "outcome", opened=opened)
    _check_budget("judge.max_context_tokens", config.judge.max_context_tokens, builder.lengths(open_ended))
    return builder


def _check_budget(key: str, budget: int, tokens: Mapping[str, int]) -> None:
    longest = max(tokens, key=lambda name: tokens[name], default="")
    if tokens and tokens[longest] > budget:
        raise ValueError(
            f"config.{key}: got {budget}, expected at least {tokens[longest]}, the prompt of problem {longest!r}; an "
            "evaluation leaves no problem out"
        )


def _check_problems_of(path: pathlib.Path, sets: Mapping[str, Sequence[Problem]]) -> None:
    """Samples of other problems must not be added to.

    Raises:
      ValueError: the sets are not those that the samples there are of.
    """
    fingerprints = {name: fingerprint(problems) for name, problems in sets.items()}
    if not path.exists():
        write_atomically(path, json.dumps(fingerprints, indent=1) + "\n")
    elif json.loads(path.read_text(encoding="utf-8")) != fingerprints:
        raise ValueError(
            f"{path.parent}: its samples are of other problems than config.data.source has now; choose another "
            "--workdir"
        )


# ------------------------------------------------------------------------------------------------ sampling


def sample_set(
    run: EvaluationRun, name: str, problems: Sequence[Problem], path: pathlib.Path, stop: StopRequest
) -> bool:
    """Draws and grades the samples of a set that are not there yet; False where it was stopped before the end.

    Raises:
      ValueError: the samples' file is damaged; names the line.
    """
    sampling = run.config.sampling
    # One process reads and writes the file; the others are told which samples it lacks.
    ledger = Ledger(path, "sample", _SAMPLE_KEY, _SAMPLE_FIELDS) if jax.process_index() == 0 else None
    waves = sample_waves(problems, _unsampled(run, problems, ledger), sampling.wave)
    groups, done, waited_s = sum(int(wave.live_P.sum()) for wave in waves), 0, 0.0
    start, told = time.monotonic(), -math.inf
    pending: PendingWave | None = None  # the verifiers work on one wave while the next is sampled
    for wave in [*waves, None]:
        stopped = stop.agreed()
        started = start_wave(run, wave) if wave and not stopped else None
        if pending:
            waiting = time.monotonic()
            table = finish_wave(pending)
            waited_s += time.monotonic() - waiting
            if ledger is not None:
                ledger.add(sample_rows(run, pending.wave, table))
            done += int(pending.wave.live_P.sum())
            seconds = time.monotonic() - start
            if seconds - told >= _PROGRESS_S or done == groups:
                told = seconds
                rate = done * sampling.group / seconds
                say(f"{name}: {done}/{groups} groups of {sampling.group}  {rate:.1f} samples/s")
        if stopped:
            return False
        pending = started
    work = run.graders.throughput.report()
    if work["time/graded_rows"]:
        say(
            f"{name}: graded {work['time/graded_rows']} samples in {work['time/grading_seconds']:.1f} s beside the "
            f"sampling, which waited {waited_s:.1f} s for it"
        )
    return True


def _unsampled(run: EvaluationRun, problems: Sequence[Problem], ledger: Ledger | None) -> np.ndarray:
    """Which groups of samples lack one, bool [P, parts], the same on every process; process 0 has the ledger."""
    group = run.config.sampling.group
    lacking = np.zeros((len(problems), run.config.sampling.samples // group), bool)
    if ledger is not None:
        for i, part in np.ndindex(*lacking.shape):
            numbers = range(part * group, (part + 1) * group)
            lacking[i, part] = not all((problems[i].id, number) in ledger for number in numbers)
    return agree_rows({"lacking": lacking}, np.arange(len(problems)))["lacking"]


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


def start_wave(run: EvaluationRun, wave: SampleWave) -> PendingWave:
    """Samples a wave, gives it to the verifiers, and asks the judge about open-ended answers.

    Where processes share rows, one of them has them graded, and asks an endpoint; the others take its answers.
    """
    sampling = run.config.sampling
    index_P = local_problems(run.mesh, sampling.wave)
    problems, live_P = [wave.problems[i] for i in index_P], wave.live_P[index_P]
    rollouts = run.sampler(
        run.params,
        run.prompts,
        problems,
        group=sampling.group,
        temperature=sampling.temperature,
        seed=run.config.seed,
        step=wave.part,
        attempt=0,
        live_P=live_P,
    )
    _, responses = texts_of(rollouts, run.policy.tokenizer.decode)
    owned_P = live_P & owned_problems(run.mesh, sampling.wave)
    grading = submit_owned(run.graders, problems, responses, owned_P)
    # A judge on the mesh is asked by all processes, for a program is the whole mesh's.
    asks_P = live_P if run.judge.on_mesh else owned_P
    open_ended = [
        group if asks and problem.traits.by_judge else []
        for problem, group, asks in zip(problems, responses, asks_P, strict=True)
    ]
    return PendingWave(wave, index_P, rollouts, run.judge.verify(problems, open_ended), grading)


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


def sample_rows(run: EvaluationRun, wave: SampleWave, table: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """A wave's samples, as they are written."""
    group, decode = run.config.sampling.group, run.policy.tokenizer.decode
    return [
        describe_problem(wave.problems[i])
        | {
            "sample": wave.part * group + g,
            "response": decode(table["tokens_PGR"][i, g, : table["length_PG"][i, g]].tolist()),
            "length": int(table["length_PG"][i, g]),
            "ended": bool(table["ended_PG"][i, g]),
            "verdict": str(VERDICTS[table["verdict_PG"][i, g]]),
        }
        for i in np.flatnonzero(wave.live_P)
        for g in range(group)
    ]


def _report(config: Evaluate, folder: pathlib.Path, sets: Mapping[str, Sequence[Problem]]) -> None:
    summaries = []
    for name, problems in sets.items():
        samples = read_rows(folder / "samples" / f"{name}.jsonl", _SAMPLE_FIELDS, "sample")
        summaries.append(summarise(name, problems, samples, seed=config.seed))
    model = EvaluatedModel(config.label, config.policy.weights, tuple(summaries))
    write_results(folder / RESULTS, model)
    files = write_tables([model], folder)
    print(render_table([model]))
    print("\n".join(f"  {file}" for file in [folder / RESULTS, *files]), flush=True)
