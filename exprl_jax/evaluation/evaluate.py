"""Evaluation: n samples a problem of any model on any problem sets, graded by the one grader, as pass@k with intervals.

Samples are drawn a wave of problems and a group of samples at a time, and are on disk (`samples/<set>.jsonl`) before the
next but one are drawn.  A sample's random numbers depend on seed, problem, number and the size of groups alone, so that
an evaluation which was killed goes on where its files end and arrives at the same numbers.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import pathlib
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from exprl_jax import programs as programs_room
from exprl_jax.config import Evaluate
from exprl_jax.data.problem_sources import split_sources
from exprl_jax.data.problems import Problem, read_problems
from exprl_jax.data.training import check_same_problems, fingerprint, kinds_of, policy_prompts
from exprl_jax.evaluation.pass_at_k import summarise
from exprl_jax.evaluation.tables import Run, render_table, write_results, write_tables
from exprl_jax.files import append_jsonl, read_jsonl, write_atomically
from exprl_jax.hosts import barrier, gather_rows, local_problems, say
from exprl_jax.layout import check_layout
from exprl_jax.mesh import DATA, make_mesh
from exprl_jax.records import Rollouts
from exprl_jax.resolve import to_dict
from exprl_jax.reward.judges import AnyJudge, JudgeBuilder
from exprl_jax.reward.statistics import VERDICTS
from exprl_jax.reward.verifiers.grading import Graders, Verdicts, check_answers, open_graders
from exprl_jax.reward.verifiers.verdict import Verdict
from exprl_jax.rollout.call import describe_problem, make_prompts, texts_of
from exprl_jax.run.stopping import StopRequest
from exprl_jax.run.workdir import check_workdir, open_workdir
from exprl_jax.weights.language_model import LanguageModel, load_params, open_model

_SAY_EVERY_S = 10.0


def evaluate(config: Evaluate, workdir_path: str) -> None:
    """Runs the evaluation in its folder, from where its samples end.

    Raises:
      ValueError: anything about config, data, model or folder that cannot work, in one line.
    """
    check_workdir(workdir_path, to_dict(config))
    sets = read_sets(config)
    problems = [problem for of_set in sets.values() for problem in of_set]
    check_same_problems(problems)
    policy, mesh, how = open_model(config.policy), make_mesh(config.mesh), config.sampling
    prompts = checked_prompts(config, policy, problems)
    opening = JudgeBuilder(
        config.judge, scored=[], verified=[p for p in problems if p.kind == "science"], unit=_no_unit
    )
    with contextlib.ExitStack() as held:
        check_layout(config, mesh.shape[DATA])
        opened = open_workdir(
            workdir_path, to_dict(config), folders=("samples",), process=jax.process_index(), barrier=barrier
        )
        workdir = held.enter_context(opened)
        say(f"policy {config.policy.weights}; {len(problems)} problems in {len(sets)} sets, {how.samples} samples each")
        graders = held.enter_context(open_graders(config.grader, config.code, kinds_of(problems)))
        params = load_params(policy, mesh, config.seed)
        # Judge and policy may be one model; then they are one set of buffers.
        judge = opening.open(
            mesh,
            held,
            lambda model: params if model.config == config.policy else load_params(model, mesh, config.seed),
            programs_room.build_judge,
            problems,
            wave=how.wave,
            group=how.group,
        )
        sampler = programs_room.build_sampler(policy, mesh, max_tokens=how.max_tokens, wave=how.wave)
        stop, waiting_s = held.enter_context(StopRequest()), 0.0
        if jax.process_index() == 0:
            _check_same_problems(workdir.path / "problems.json", sets)
        for name, of_set in sets.items():
            path = workdir.path / "samples" / f"{name}.jsonl"
            waiting = unfinished(path, of_set, how.samples, how.group)
            groups, done, start, said = sum(map(len, waiting.values())), 0, time.monotonic(), -_SAY_EVERY_S
            begun = collections.deque()  # the verifiers work on one wave while the next is sampled
            for wave, part in [*_waves(waiting, how.wave), ([], 0)]:
                if stop.agreed():
                    say("stopped; start again with the same command to go on")
                    return
                if wave:
                    mine = local_problems(mesh, how.wave)
                    problems, live_P = [wave[i][0] for i in mine], np.array([wave[i][1] for i in mine])
                    rollouts = sampler(
                        params,
                        prompts,
                        problems,
                        group=how.group,
                        temperature=how.temperature,
                        seed=config.seed,
                        step=part,
                        attempt=0,
                        live_P=live_P,
                    )
                    begun.append((wave, part, begin_grading(policy, graders, judge, problems, live_P, rollouts, mine)))
                if not begun or wave and len(begun) == 1:
                    continue
                before, its_part, grading = begun.popleft()
                waited = time.monotonic()
                rows = finish_grading(grading)
                waiting_s += time.monotonic() - waited
                if jax.process_index() == 0:
                    sampled = [i for i, (_, live) in enumerate(before) if live]
                    made = [sample_rows(before[i][0], its_part, how.group, policy, rows, i) for i in sampled]
                    append_jsonl(path, [row for of_problem in made for row in of_problem])
                done += sum(live for _, live in before)
                seconds = time.monotonic() - start
                if seconds - said >= _SAY_EVERY_S or done == groups:
                    said = seconds
                    say(f"{name}: {done}/{groups} groups of {how.group}  {done * how.group / seconds:.1f} samples/s")
        busy = graders.throughput.report()
        if busy["time/graded_rows"]:
            say(
                f"graded {busy['time/graded_rows']} samples in {busy['time/grading_seconds']:.1f} s beside the sampling, which "
                f"waited {waiting_s:.1f} s for it"
            )
        if jax.process_index() == 0:
            _report(config, workdir.path, sets)


def read_sets(config: Evaluate) -> dict[str, list[Problem]]:
    """The problem sets by name, without reference solutions.

    Raises:
      ValueError: two sets of one name, an id that stands for two problems, or a problem that its verifier cannot grade.
    """
    sets, known = {}, {}
    for source in split_sources(config.data.source):
        name = set_name(source)
        if name in sets:
            raise ValueError(f"config.data.source: two sets are called {name!r}; rename a file or evaluate them apart")
        sets[name] = read_problems(source, split=config.data.split, references=False)
        check_answers(sets[name])
        for problem in sets[name]:
            if known.setdefault(problem.id, problem) != problem:
                raise ValueError(
                    f"config.data.source: {problem.id!r} is another problem in {name!r} than in a set before it; rename it, or "
                    "evaluate the sets apart"
                )
    return sets


def _check_same_problems(path: pathlib.Path, sets: Mapping[str, Sequence[Problem]]) -> None:
    """Samples of other problems must not be added to.

    Raises:
      ValueError: the sets are not those that the samples there are of.
    """
    prints = {name: fingerprint(problems) for name, problems in sets.items()}
    if not path.exists():
        write_atomically(path, json.dumps(prints, indent=1) + "\n")
    elif json.loads(path.read_text(encoding="utf-8")) != prints:
        raise ValueError(
            f"{path.parent}: its samples are of other problems than config.data.source has now; choose another --workdir"
        )


def set_name(source: str) -> str:
    """What a set is called in files and tables: a benchmark's name, a file's stem, a data set's id."""
    kind, _, rest = source.partition(":")
    if kind in ("hf", "tfds"):
        name = rest
    else:
        name = pathlib.Path(source).stem if source.endswith((".jsonl", ".parquet")) and not rest else kind
    return re.sub(r"[^\w.-]+", "_", name).strip("_")


def checked_prompts(config: Evaluate, policy: LanguageModel, problems: Sequence[Problem]):
    """The policy's prompts.

    Raises:
      ValueError: one is over the budget (nothing is left out of an evaluation), or budgets are over the model's context.
    """
    ids = policy_prompts(config, policy.tokenizer, problems)
    longest = max(ids, key=lambda name: len(ids[name]))
    if len(ids[longest]) > config.data.max_prompt_tokens:
        raise ValueError(
            f"config.data.max_prompt_tokens: got {config.data.max_prompt_tokens}, expected at least {len(ids[longest])}, the "
            f"prompt of problem {longest!r}; an evaluation leaves no problem out"
        )
    tokens = config.data.max_prompt_tokens + config.sampling.max_tokens
    if tokens > policy.arch.max_positions:
        raise ValueError(
            f"config.data.max_prompt_tokens + sampling.max_tokens: got {tokens} tokens, expected at most "
            f"{policy.arch.max_positions}, the policy's context length"
        )
    return make_prompts(ids)


def unfinished(path: pathlib.Path, problems: Sequence[Problem], samples: int, group: int) -> dict[int, list[Problem]]:
    """The problems that lack a group of samples, by the group's number; rows of groups cut short are dropped.

    Raises:
      ValueError: a row that is none.
    """
    kept, seen = [], {}
    for row in read_jsonl(path):
        seen.setdefault((row["id"], row["sample"] // group), []).append(row)
    whole = {key: rows for key, rows in seen.items() if len(rows) == group}
    for rows in whole.values():
        kept += rows
    if path.exists() and jax.process_index() == 0:
        partial = path.with_name(path.name + ".tmp")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(partial, path)
    barrier()
    return {part: [p for p in problems if (p.id, part) not in whole] for part in range(samples // group)}


def _waves(waiting: Mapping[int, Sequence[Problem]], size: int) -> Iterator[tuple[list[tuple[Problem, bool]], int]]:
    """(problem, whether to sample it) of each wave, and the number of its group; the last wave is filled up."""
    for part, problems in waiting.items():
        for start in range(0, len(problems), size):
            wave = [(problem, True) for problem in problems[start : start + size]]
            yield wave + [(wave[0][0], False)] * (size - len(wave)), part


class Grading(NamedTuple):
    """A wave that is sampled, while its verifiers are still at work; this process's problems.

    Attributes:
      place: of its problems in the wave.
      opinions: a judge's verdicts on open-ended answers, none for other problems.
    """

    place: np.ndarray
    rollouts: Rollouts
    opinions: Sequence[Sequence[Verdict]]
    verdicts: Verdicts


def begin_grading(
    policy: LanguageModel,
    graders: Graders,
    judge: AnyJudge,
    problems: Sequence[Problem],
    live_P: np.ndarray,
    rollouts: Rollouts,
    place: np.ndarray,
) -> Grading:
    """Gives a wave to the verifiers, and asks the judge about open-ended answers."""
    _, responses = texts_of(rollouts, policy.tokenizer.decode)
    verdicts = graders.submit([(p, text) for p, group in zip(problems, responses) for text in group])
    asked = [group if p.kind == "science" and live else [] for p, group, live in zip(problems, responses, live_P)]
    return Grading(place, rollouts, judge.verify(problems, asked), verdicts)


def finish_grading(grading: Grading) -> dict[str, np.ndarray]:
    """Tokens, lengths, ends and verdicts of the whole wave, on every process."""
    place, rollouts, opinions, verdicts = grading
    flat, G = verdicts.result(), rollouts.ended_PG.shape[1]
    found = [opinions[i] or flat[i * G : (i + 1) * G] for i in range(len(place))]
    table = {
        "tokens_PGR": rollouts.tokens_PGR,
        "length_PG": rollouts.mask_PGR.sum(-1),
        "ended_PG": rollouts.ended_PG,
        "verdict_PG": np.array([[VERDICTS.index(verdict) for verdict in group] for group in found]),
    }
    return gather_rows(table, place)


def sample_rows(
    problem: Problem, part: int, group: int, policy: LanguageModel, rows: Mapping[str, np.ndarray], i: int
) -> list[dict[str, Any]]:
    """One problem's samples, as they are written."""
    return [
        describe_problem(problem)
        | {
            "sample": part * group + g,
            "response": policy.tokenizer.decode(rows["tokens_PGR"][i, g, : rows["length_PG"][i, g]].tolist()),
            "length": int(rows["length_PG"][i, g]),
            "ended": bool(rows["ended_PG"][i, g]),
            "verdict": str(VERDICTS[rows["verdict_PG"][i, g]]),
        }
        for g in range(group)
    ]


def _report(config: Evaluate, folder: pathlib.Path, sets: Mapping[str, Sequence[Problem]]) -> None:
    summaries = tuple(
        summarise(name, problems, read_jsonl(folder / "samples" / f"{name}.jsonl"), seed=config.seed)
        for name, problems in sets.items()
    )
    run = Run(config.label, config.policy.weights, summaries)
    write_results(folder / "results.json", run)
    files = write_tables([run], folder)
    print(render_table([run]))
    print("\n".join(f"  {file}" for file in [folder / "results.json", *files]), flush=True)


def _no_unit(problem: Problem) -> str:
    raise ValueError(f"problem {problem.id!r}: an evaluation has no use for a judge's score")
