"""Supervised training of a judge on lessons: what it is asked in a run, and what it should answer.

    lessons → the judge's prompts, digits or judgements → packed rows → update → checkpoint, metrics

The trained model is an ordinary one: `judge.model.weights` of other configs takes the workdir or its `export/`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from exprl_jax.config import JudgeTraining
from exprl_jax.data.tokenizer import SplitPrompt, Tokenizer
from exprl_jax.hosts import say
from exprl_jax.layout import check_layout
from exprl_jax.mesh import DATA, make_mesh
from exprl_jax.resolve import to_dict
from exprl_jax.reward.judge_prompts import digit_token_ids
from exprl_jax.reward.judges import check_judge_lengths
from exprl_jax.reward.lessons import JudgeLesson, Taught, lesson_prompt, read_lessons, teach
from exprl_jax.run.loop import run_task
from exprl_jax.run.trackers import check_trackers
from exprl_jax.run.workdir import check_workdir
from exprl_jax.supervised_run import SupervisedRun, open_supervised, task_of
from exprl_jax.weights.language_model import open_model


def train_judge(config: JudgeTraining, workdir_path: str, accept_lost_records: bool = False) -> None:
    """Runs the experiment in its folder, from where it stands to its last step.

    Raises:
      ValueError: anything about config, lessons, model or folder that cannot work, in one line.
      FloatingPointError: a metric is not finite (names step and metric).
    """
    check_workdir(workdir_path, to_dict(config))
    check_trackers(config.log.trackers)
    run_task(task_of(open_run(config)), workdir_path, accept_lost_records)


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
    lessons = read_lessons(config.lessons)
    lessons, taught = _within_budgets(config, policy.tokenizer, lessons)
    share_N = np.array([x.share for x in taught], np.float32)
    return open_supervised(config, mesh, policy, lessons, [x.example for x in taught], share_N)


def _within_budgets(
    config: JudgeTraining, tokenizer: Tokenizer, lessons: Sequence[JudgeLesson]
) -> tuple[list[JudgeLesson], list[Taught]]:
    """The lessons that the judge could be asked and that fit into a row, in token ids; says how many do not.

    Raises:
      ValueError: none is left.
    """
    judge, prompts = config.judge, {}
    digit_ids = digit_token_ids(tokenizer) if judge.readout == "logits" else ()
    limits = {"judge.max_context_tokens": judge.max_context_tokens, "judge.max_trace_tokens": judge.max_trace_tokens}
    if config.row_tokens:
        limits["row_tokens"] = config.row_tokens
    if judge.readout == "text":
        limits["judge.max_tokens"] = judge.max_tokens
    kept, taught, dropped = [], [], dict.fromkeys(limits, 0)
    for lesson in lessons:
        asked = lesson.problem.content, lesson.unit
        if asked not in prompts:  # one prompt serves all traces of a problem
            prompts[asked] = lesson_prompt(judge, tokenizer, lesson)
        made = teach(judge, tokenizer, prompts[asked], digit_ids, lesson)
        lengths = _lengths(prompts[asked], made)
        beyond = [key for key, limit in limits.items() if lengths[key] > limit]
        if beyond:
            dropped[beyond[0]] += 1
        else:
            kept.append(lesson)
            taught.append(made)
    counts = [f"{count} over config.{key} = {limits[key]}" for key, count in dropped.items() if count]
    say(f"{len(kept)} lessons; dropped {', '.join(counts) or 'none'}")
    if not kept:
        raise ValueError(f"config.lessons: no lesson is left of {len(lessons)}: {', '.join(counts)}; raise the budget")
    return kept, taught


def _lengths(prompt: SplitPrompt, taught: Taught) -> dict[str, int]:
    """What each budget counts of a lesson, in tokens."""
    asked, answered = len(taught.example.prompt), len(taught.example.response)
    return {
        "judge.max_context_tokens": prompt.frame_tokens,
        "judge.max_trace_tokens": asked - prompt.frame_tokens,
        "judge.max_tokens": answered,
        "row_tokens": asked + answered,
    }
