"""Supervised training of a judge on lessons: what it is asked in a run, and what it should answer.

    lessons → the judge's prompts, digits or judgements → packed rows → update → checkpoint, metrics

The trained model is an ordinary one: `judge.model.weights` of other configs takes the workdir or its `export/`.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from exprl_jax.config import JudgeTraining
from exprl_jax.data.tokenizer import Tokenizer
from exprl_jax.evaluation.calibration import SAYS_CORRECT, error_rates
from exprl_jax.evaluation.live_report import keep_report
from exprl_jax.hosts import gather_rows, local_problems, say
from exprl_jax.layout import check_layout
from exprl_jax.learning.supervised import JUDGE_VALIDATION
from exprl_jax.mesh import DATA, Placement, make_mesh
from exprl_jax.model.lora import attached
from exprl_jax.programs import build_judge
from exprl_jax.reward.judge import Judge, JudgePrompts
from exprl_jax.reward.judge_prompts import digit_token_ids
from exprl_jax.reward.judgements import Query
from exprl_jax.reward.judges import check_judge_lengths
from exprl_jax.reward.lessons import JudgeLesson, Taught, lesson_prompt, likert, read_lessons, teach
from exprl_jax.reward.statistics import correlation, midranks
from exprl_jax.rollout.call import padded_width
from exprl_jax.run.loop import run_task
from exprl_jax.supervised_run import Examples, SupervisedRun, hold_back, open_supervised, task_of
from exprl_jax.weights.language_model import LanguageModel, open_model


def train_judge(config: JudgeTraining, workdir_path: str, accept_lost_records: bool = False) -> None:
    """Runs the experiment in its folder, from where it stands to its last step.

    Raises:
      ValueError: anything about config, lessons, model or folder that cannot work, in one line.
      FloatingPointError: a metric is not finite (names step and metric).
    """
    run_task(config, lambda _: task_of(open_run(config)), workdir_path, keep_report, accept_lost_records)


def open_run(config: JudgeTraining) -> SupervisedRun:
    """Opens model and lessons.

    Raises:
      ValueError: anything about config, lessons or model that cannot work.
    """
    mesh = make_mesh(config.mesh)
    check_layout(config, mesh.shape[DATA])
    policy = open_model(config.policy)
    check_judge_lengths(config.judge, policy.arch)
    say(f"judge {config.policy.weights}")
    examples = _examples(config, policy.tokenizer, read_lessons(config.lessons), mesh)
    others = None
    if source := config.validation.source:
        others = _examples(config, policy.tokenizer, read_lessons(source), mesh)
    examples, held_back = hold_back(config, examples, others, lambda lesson: lesson.problem.problem)
    if not held_back.items:
        return open_supervised(config, mesh, policy, examples, held_back)
    ask = functools.partial(ask_about, open_judge(config, mesh, policy, held_back.items), held_back.items)
    return open_supervised(config, mesh, policy, examples, held_back, ask, tuple(JUDGE_VALIDATION))


# --- lessons in token ids --------------------------------------------------------------------------------------------


def _examples(config: JudgeTraining, tokenizer: Tokenizer, lessons: Sequence[JudgeLesson], mesh: Mesh) -> Examples:
    """The texts that the judge could be asked about and that fit into a row; says how many do not.

    Raises:
      ValueError: none is left.
    """
    judge, share = config.judge, Placement(mesh).shares_segments
    teaching = functools.partial(
        teach, judge, tokenizer, digit_ids=digit_token_ids(tokenizer) if judge.readout == "logits" else ()
    )
    limits = {"judge.max_context_tokens": judge.max_context_tokens, "judge.max_trace_tokens": judge.max_trace_tokens}
    if judge.readout == "text":
        limits["judge.max_tokens"] = judge.max_tokens
    if config.row_tokens:
        limits["row_tokens"] = config.row_tokens
    kept, dropped, prompts = [], collections.Counter(), {}
    for lesson in lessons:
        key = _prompt_key(lesson)
        if key not in prompts:  # one serves all texts about a problem
            prompts[key] = lesson_prompt(judge, tokenizer, lesson)
        prompt, labels = prompts[key], []
        for label, example in zip(lesson.labels, teaching(prompt=prompt, lesson=lesson).branches.examples):
            asked, answered = len(example.prompt), len(example.response)
            lengths = prompt.frame_tokens, asked - prompt.frame_tokens
            lengths = (*lengths, answered) if judge.readout == "text" else lengths
            tokens = dict(zip(limits, (*lengths, asked + answered)))
            beyond = [key for key, limit in limits.items() if tokens[key] > limit]
            labels += [] if beyond else [label]
            dropped.update(beyond[:1])
        kept += _cut_to_rows(config.row_tokens if share else 0, prompt, teaching, lesson, tuple(labels))
    counts = [f"{count} over config.{key} = {limits[key]}" for key, count in dropped.items()]
    say(f"{len(kept)} lessons; dropped {', '.join(counts) or 'none'}")
    if not kept:
        raise ValueError(f"config.lessons: no lesson is left of {len(lessons)}: {', '.join(counts)}; raise the budget")
    return Examples([x for x, _ in kept], [y.branches for _, y in kept], [y.shares for _, y in kept])


def _cut_to_rows(room, prompt, teaching, lesson, labels) -> Iterator[tuple[JudgeLesson, Taught]]:
    """A lesson of some labels, or several that have a part of them each, where a row has no room for all.

    Args:
      room: tokens of a row; 0 where it is as wide as need be, or labels share nothing, and each has its own.
    """
    if not labels:
        return
    part = dataclasses.replace(lesson, labels=labels)
    taught = teaching(prompt=prompt, lesson=part)
    if not room or len(labels) == 1 or taught.branches.tokens <= room:
        yield part, taught
        return
    middle = len(labels) // 2
    for half in (labels[:middle], labels[middle:]):
        yield from _cut_to_rows(room, prompt, teaching, lesson, half)


def _prompt_key(lesson: JudgeLesson) -> str:
    """What lessons of one prompt have in common."""
    return f"{lesson.unit}\0{lesson.problem.content}"


# --- asking the judge about what is held back ------------------------------------------------------------------------


def open_judge(config: JudgeTraining, mesh: Mesh, policy: LanguageModel, lessons: Sequence[JudgeLesson]) -> Judge:
    """The judge as runs ask it about some lessons' texts; without parameters, which are others at every validation."""
    prompts = {_prompt_key(lesson): lesson_prompt(config.judge, policy.tokenizer, lesson) for lesson in lessons}
    tails = [len(prompts[_prompt_key(lesson)].tail(label.trace)) for lesson in lessons for label in lesson.labels]
    return Judge(
        config=config.judge,
        tokenizer=policy.tokenizer,
        params=None,
        programs=build_judge(config.judge, mesh, policy),
        mesh=mesh,
        prompts=JudgePrompts(prompts, {}),
        context_width=padded_width(max(len(prompt.head) for prompt in prompts.values())),
        row_width=padded_width(max(tails)),
        problems=config.validation.wave,
        group=1,
    )


def ask_about(judge: Judge, lessons: Sequence[JudgeLesson], params: Any) -> dict[str, float | None]:
    """What the judge, as it is now, says of the lessons' texts, against what it should: see `JUDGE_VALIDATION`."""
    judge, wave = dataclasses.replace(judge, params=attached(params)), judge.problems
    most = max(len(lesson.labels) for lesson in lessons)
    index_P, scores = local_problems(judge.mesh, wave), []
    for start in range(0, len(lessons), wave):
        # The last wave may be short: it is filled up with lessons about whose texts nothing is asked.
        here = [(lessons[min(start + i, len(lessons) - 1)], start + i < len(lessons)) for i in index_P.tolist()]
        problems = [dataclasses.replace(lesson.problem, id=_prompt_key(lesson)) for lesson, _ in here]
        queries = [
            [Query(0, n, label.trace) for n, label in enumerate(lesson.labels)] if asked else []
            for lesson, asked in here
        ]
        answers = gather_rows(judge.score(problems, queries, most).arrays, index_P)
        asked, valid = answers["asked_PGN"], answers["valid_PGN"]
        scores += np.where(valid, answers["score_PGN"], np.nan)[asked].tolist()
    given, wanted = np.array(scores), np.array([label.score for lesson in lessons for label in lesson.labels])
    there = ~np.isnan(given)
    given, wanted = given[there], wanted[there]
    rates = error_rates(likert(given), likert(wanted) >= SAYS_CORRECT)
    values = correlation(midranks(given), midranks(wanted)), rates.misplacement, float(there.mean())
    return dict(zip(JUDGE_VALIDATION, values, strict=True))
