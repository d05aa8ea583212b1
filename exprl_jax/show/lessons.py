"""The first examples that a supervised run trains on, token by token: references, or a judge's lessons."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from exprl_jax import judge_training, sft
from exprl_jax.config import JudgeTraining, Sft
from exprl_jax.data.packing import Example
from exprl_jax.data.problems import batch_indices
from exprl_jax.data.tokenizer import Tokenizer
from exprl_jax.reward.lessons import lesson_prompt
from exprl_jax.rollout.call import describe_problem
from exprl_jax.show.questions import asked_model, split_question
from exprl_jax.show.rollouts import check_count, problem_record, prompted_model
from exprl_jax.supervised_run import SupervisedRun


def show_examples(config: Sft, count: int) -> Iterator[dict[str, Any]]:
    """The first examples of a run's first batch.

    Raises:
      ValueError: a batch has fewer examples, or anything that a run refuses.
    """
    check_count(count, config.batch, "config.batch")
    run = sft.open_run(config)
    tokenizer = run.policy.tokenizer
    for i in _first(run, count):
        (example,) = run.examples.branches[i].examples
        policy = prompted_model(config.policy.weights, tokenizer, example.prompt)
        record = problem_record("sft", run.examples.items[i], policy) | {
            "prompt_pieces": tokenizer.spell(example.prompt)
        }
        yield record | _target(tokenizer, example)


def show_lessons(config: JudgeTraining, count: int) -> Iterator[dict[str, Any]]:
    """The first lessons of a run's first batch; of one with several scores, the last.

    Raises:
      ValueError: a batch has fewer lessons, or anything that a run refuses.
    """
    check_count(count, config.batch, "config.batch")
    run = judge_training.open_run(config)
    tokenizer = run.policy.tokenizer
    for i in _first(run, count):
        lesson, branches, shares = (x[i] for x in run.examples)
        label = lesson.labels[-1]
        question = split_question(tokenizer, lesson_prompt(config.judge, tokenizer, lesson), label.trace)
        record = {"task": "judge", **describe_problem(lesson.problem), "choices": list(lesson.problem.choices)}
        record |= {"where": lesson.where, "score": label.score, "judgement": label.judgement}
        record["judge"] = asked_model(config.judge) | {"asks": lesson.unit, "question": question}
        record["share"] = round(float(shares[-1]), 6)
        yield record | _target(tokenizer, branches.examples[-1])


def _first(run: SupervisedRun, count: int) -> list[int]:
    """The first examples of the first batch."""
    indices, _ = batch_indices(len(run.examples.items), run.config.batch, run.config.seed, 0)
    return indices[:count].tolist()


def _target(tokenizer: Tokenizer, example: Example) -> dict[str, Any]:
    """What the model should write, as tokens."""
    nothing = not tokenizer.decode(example.response).strip()
    return {
        "target_pieces": tokenizer.spell(example.response),
        "target_tokens": len(example.response),
        "warnings": ["the target is nothing but its end"] if nothing else [],
    }
