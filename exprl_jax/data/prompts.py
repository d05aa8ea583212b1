"""The policy's prompt: one function for supervised training, RL, distillation and evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from exprl_jax.data.problems import Problem, Question
from exprl_jax.data.tokenizer import Message, Tokenizer

SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."


@dataclasses.dataclass(frozen=True)
class WorkedExample:
    """A worked example: a problem that is not trained on, and its solution as an assistant should write it."""

    question: Question
    solution: str


@dataclasses.dataclass(frozen=True)
class PromptStyle:
    """What a policy prompt contains besides the problem.

    Attributes:
      system: the system message.
      examples: earlier turns of the same chat.
    """

    system: str = SYSTEM
    examples: tuple[WorkedExample, ...] = ()


def worked_examples(problems: Sequence[Problem]) -> tuple[WorkedExample, ...]:
    """Problems with their references as worked examples.  Never give it problems that a policy trains on.

    Raises:
      ValueError: a problem was read without its reference.
    """
    for problem in problems:
        if problem.reference is None:
            raise ValueError(f"problem {problem.id!r} was read without its reference: it cannot be a worked example")
    return tuple(WorkedExample(problem.question, problem.reference) for problem in problems)


def policy_messages(question: Question, style: PromptStyle) -> list[Message]:
    """The chat that asks a policy to solve a problem.

    It takes a `Question`, which has no reference and no answer, so neither can reach a policy.

    Raises:
      ValueError: the problem is one of the worked examples, whose solutions the prompt shows.
    """
    messages = [Message("system", style.system)]
    for example in style.examples:
        if example.question.text.strip() == question.text.strip():
            raise ValueError(f"a problem is also a worked example, remove it from one: {question.text!r:.60}")
        messages += [Message("user", question_text(example.question)), Message("assistant", example.solution)]
    return [*messages, Message("user", question_text(question))]


def policy_prompt(tokenizer: Tokenizer, question: Question, style: PromptStyle) -> list[int]:
    """The token ids of `policy_messages`, up to where the policy begins to write."""
    return tokenizer.render(policy_messages(question, style))


def teacher_prompt(tokenizer: Tokenizer, problem: Problem) -> list[int]:
    """The token ids of the prompt of a teacher that is shown the reference: one user turn, as in the released
    self-distillation baseline, in our words.

    Raises:
      ValueError: the problem was read without its reference.
    """
    return _prompt_with_reference(
        tokenizer,
        problem,
        "which its teacher must be shown",
        "Understand why it works. Then solve the problem yourself, in your own way.",
    )


def hint_prompt(tokenizer: Tokenizer, problem: Problem) -> list[int]:
    """The token ids of the prompt of a frozen model that writes a hint: it is shown the reference.

    Raises:
      ValueError: the problem was read without its reference.
    """
    return _prompt_with_reference(
        tokenizer,
        problem,
        "from which its hint is made",
        "A student cannot solve this problem. Write a hint of one or two sentences: name the fact or the idea on which "
        "the solution rests. Do not give the answer, and do no step of the solution.",
    )


def _prompt_with_reference(tokenizer: Tokenizer, problem: Problem, need: str, request: str) -> list[int]:
    """One user turn: problem, reference, what is asked for; `need` says what the reference is for."""
    if problem.reference is None:
        raise ValueError(f"problem {problem.id!r} has no reference solution, {need}")
    content = (
        f"Problem:\n{question_text(problem.question)}\n\nHere is a solution that is known to be correct:\n"
        f"{problem.reference.strip()}\n\n{request}"
    )
    return tokenizer.render([Message("user", content)])


def hinted_prompt(tokenizer: Tokenizer, question: Question, hint: str, style: PromptStyle) -> list[int]:
    """The token ids of the policy's prompt with a hint below the problem; see `rollout.hints` for who may have one."""
    return policy_prompt(tokenizer, Question(f"{question_text(question)}\n\nHint: {hint}"), style)


def question_text(question: Question) -> str:
    """The problem's text, with its choices below it, one a line, as policy, judge and teacher see them."""
    choices = "".join(f"\n{label}. {text}" for label, text in question.choices)
    return question.text.strip() + ("\n" + choices if choices else "")
