"""The first examples that a supervised run trains on, token by token: references, or a judge's lessons."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from exprl_jax import judge_training, sft
from exprl_jax.config import JudgeTraining, Sft
from exprl_jax.data.packing import Example
from exprl_jax.data.problems import batch_indices
from exprl_jax.data.tokenizer import Tokenizer
from exprl_jax.reward.lessons import JudgeLesson, lesson_prompt
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
        yield record | _target(tokenizer, example) | {"warnings": _empty(tokenizer, [example])}


def show_lessons(config: JudgeTraining, count: int) -> Iterator[dict[str, Any]]:
    """The first lessons of a run's first batch, with what is learned of each of their texts; the prompt is the last's.

    Raises:
      ValueError: a batch has fewer lessons, or anything that a run refuses.
    """
    check_count(count, config.batch, "config.batch")
    run = judge_training.open_run(config)
    tokenizer = run.policy.tokenizer
    for i in _first(run, count):
        lesson, branches, shares = (x[i] for x in run.examples)
        question = split_question(tokenizer, lesson_prompt(config.judge, tokenizer, lesson), lesson.labels[-1].trace)
        record = {"task": "judge", **describe_problem(lesson.problem), "choices": list(lesson.problem.choices)}
        record |= {"where": lesson.where}
        record["judge"] = asked_model(config.judge) | {"asks": lesson.unit, "question": question}
        record["labels"] = [
            {"text": text, "score": label.score, "judgement": label.judgement, "share": round(float(share), 6)}
            | _target(tokenizer, example)
            for text, label, share, example in zip(
                _parts(lesson), lesson.labels, shares, branches.examples, strict=True
            )
        ]
        yield record | {"warnings": _empty(tokenizer, branches.examples)}


def _parts(lesson: JudgeLesson) -> list[str]:
    """Each text of a lesson; of beginnings, what each adds to the one before it."""
    texts = [label.trace for label in lesson.labels]
    if lesson.unit != "prefix":
        return texts
    return [text[len(before) :] for before, text in zip(["", *texts[:-1]], texts, strict=True)]


def _first(run: SupervisedRun, count: int) -> list[int]:
    """The first examples of the first batch."""
    indices, _ = batch_indices(len(run.examples.items), run.config.batch, run.config.seed, 0)
    return indices[:count].tolist()


def _target(tokenizer: Tokenizer, example: Example) -> dict[str, Any]:
    """What the model should write, as tokens."""
    return {"target_pieces": tokenizer.spell(example.response), "target_tokens": len(example.response)}


def _empty(tokenizer: Tokenizer, examples: Sequence[Example]) -> list[str]:
    """A warning where nothing is learned but the end."""
    nothing = any(not tokenizer.decode(example.response).strip() for example in examples)
    return ["the target is nothing but its end"] if nothing else []
