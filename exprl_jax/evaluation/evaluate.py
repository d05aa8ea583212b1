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
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from exprl_jax import programs
from exprl_jax.config import Evaluate
from exprl_jax.data.problem_sources import split_sources
from exprl_jax.data.problems import Problem, read_problems, show_first
from exprl_jax.data.training import check_budget, check_same_problems, fingerprint, kinds_of, policy_prompts
from exprl_jax.evaluation.pass_at_k import summarise
from exprl_jax.evaluation.tables import RESULTS, EvaluatedModel, render_table, write_results, write_tables
from exprl_jax.evaluation.waves import Bench, PendingWave, SampleWave, finish_wave, sample_waves, start_wave
from exprl_jax.files import Ledger, read_rows, write_atomically
from exprl_jax.hosts import agree_rows, barrier, owned_problems, say
from exprl_jax.layout import check_layout
from exprl_jax.mesh import DATA, make_mesh
from exprl_jax.model.decoder import Params
from exprl_jax.resolve import to_dict
from exprl_jax.reward.judges import JudgeBuilder
from exprl_jax.reward.statistics import VERDICTS
from exprl_jax.reward.verifiers.grading import check_answers, open_graders, verifier_files
from exprl_jax.rollout.call import Prompts, describe_problem, make_prompts
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
    params: Params
    bench: Bench


def evaluate(config: Evaluate, workdir_path: str) -> None:
    """Runs the evaluation in its folder, from where its samples end.

    Raises:
      ValueError: anything about config, data, model or folder that cannot work, in one line.
    """
    check_workdir(workdir_path, to_dict(config))
    sets = read_sets(config)
    parts = open_parts(config, sets)
    with contextlib.ExitStack() as stack:
        workdir = stack.enter_context(
            open_workdir(
                workdir_path, to_dict(config), folders=("samples",), process=jax.process_index(), barrier=barrier
            )
        )
        check_models(workdir, [parts.policy, *parts.judge.models], parts.files)
        folder, run = workdir.path, open_evaluation(config, sets, parts, stack)
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
        sets[name] = read_problems(source, split=config.data.split, references=False, columns=config.data.columns)
        show_first(sets[name], name)
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


class Parts(NamedTuple):
    """What an evaluation is made of, checked against one another; no weights are loaded.

    Attributes:
      files: of the functions of the user's that it calls, by their names in the config.
    """

    policy: LanguageModel
    mesh: Mesh
    prompts: Prompts
    judge: JudgeBuilder
    files: Mapping[str, Sequence[pathlib.Path]]


def open_parts(config: Evaluate, sets: Mapping[str, Sequence[Problem]]) -> Parts:
    """Opens what the evaluation needs.

    Raises:
      ValueError: anything about config, data or model that cannot work, in one line.
    """
    problems = [problem for of_set in sets.values() for problem in of_set]
    check_same_problems(problems)
    policy, mesh = open_model(config.policy), make_mesh(config.mesh)
    prompts = checked_prompts(config, policy, problems)
    builder = checked_judge(config, problems, policy)
    check_layout(config, mesh.shape[DATA])
    files = {**builder.files, **verifier_files(config.grader, kinds_of(problems))}
    return Parts(policy, mesh, prompts, builder, files)


def open_evaluation(
    config: Evaluate, sets: Mapping[str, Sequence[Problem]], parts: Parts, stack: contextlib.ExitStack
) -> EvaluationRun:
    """The evaluation, its weights loaded.

    Args:
      stack: closes what stays open.

    Raises:
      ValueError: what only shows when weights or an endpoint are opened.
    """
    policy, mesh, prompts, builder, _ = parts
    problems = [problem for of_set in sets.values() for problem in of_set]
    sampling = config.sampling
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
    sampler = programs.build_sampler(
        policy, mesh, max_tokens=sampling.max_tokens, wave=sampling.wave, slots=sampling.slots
    )
    bench = Bench(
        sampler,
        prompts,
        policy.tokenizer.decode,
        judge,
        graders,
        group=sampling.group,
        temperature=sampling.temperature,
        seed=config.seed,
    )
    return EvaluationRun(config, params, bench)


def checked_prompts(config: Evaluate, policy: LanguageModel, problems: Sequence[Problem]) -> Prompts:
    """The policy's prompts.

    Raises:
      ValueError: one is over the budget (an evaluation leaves no problem out), or budgets are over the model's context.
    """
    ids = policy_prompts(config, policy.tokenizer, problems)
    lengths = {name: len(prompt) for name, prompt in ids.items()}
    check_budget("data.max_prompt_tokens", config.data.max_prompt_tokens, lengths)
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
    check_budget("judge.max_context_tokens", config.judge.max_context_tokens, builder.lengths(open_ended))
    return builder


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
        started = start_wave(run.bench, run.params, wave, wave.part, 0) if wave and not stopped else None
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
    work = run.bench.graders.throughput.report()
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


def sample_rows(run: EvaluationRun, wave: SampleWave, table: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """A wave's samples, as they are written."""
    group, decode = run.bench.group, run.bench.decode
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
