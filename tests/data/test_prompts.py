"""The policy's prompt: a real \\boxed, no way in for references, short enough for the smoke run."""

import os
from pathlib import Path

import pytest

from exprl_jax.data.problems import Problem, Question, read_problems
from exprl_jax.data.prompts import SYSTEM, PromptStyle, WorkedExample, policy_messages, policy_prompt, worked_examples
from exprl_jax.data.tokenizer import Message, load_tokenizer

DATA = Path(__file__).parents[2] / "configs" / "data"
CANARY = "canary-8f1d"


def test_the_system_prompt_asks_for_a_backslash_and_a_b():
    assert "\\boxed{}" in SYSTEM and [ord(c) for c in SYSTEM[SYSTEM.index("boxed") - 1 :][:2]] == [92, 98]
    assert SYSTEM.isprintable() and "step by step" in SYSTEM
    tokenizer = load_tokenizer("byte")
    assert b"\\boxed{}" in bytes(i for i in policy_prompt(tokenizer, Question("x"), PromptStyle()) if i < 256)


def test_the_chat_is_system_examples_then_the_problem_with_its_choices():
    style = PromptStyle("Think.", (WorkedExample(Question("1+1?"), "\\boxed{2}"),))
    question = Question(" Which metal? ", (("A", "iron"), ("B", "gold")))
    assert policy_messages(question, style) == [
        Message("system", "Think."),
        Message("user", "1+1?"),
        Message("assistant", "\\boxed{2}"),
        Message("user", "Which metal?\n\nA. iron\nB. gold"),
    ]
    assert policy_messages(Question("2+2?"), PromptStyle())[-1] == ("user", "2+2?")


def test_no_reference_and_no_answer_reaches_a_prompt():
    tokenizer = load_tokenizer("byte")
    problem = Problem("1", "2+2?", f"reference {CANARY}", f"answer {CANARY}", "math", (("A", "4"),))
    examples = worked_examples([Problem("2", "1+1?", "It is \\boxed{2}.", CANARY, "math")])
    for style in (PromptStyle(), PromptStyle(examples=examples)):
        messages = policy_messages(problem.question, style)
        assert all(CANARY not in message.content for message in messages)
        assert CANARY not in tokenizer.decode(policy_prompt(tokenizer, problem.question, style))
    with pytest.raises(AttributeError):
        policy_messages(problem, PromptStyle())  # a whole Problem is not accepted at all


def test_a_problem_cannot_be_its_own_worked_example():
    style = PromptStyle(examples=(WorkedExample(Question("1+1?"), "2"),))
    with pytest.raises(ValueError, match="also a worked example"):
        policy_messages(Question("1+1? "), style)


def test_a_worked_example_needs_its_reference():
    with pytest.raises(ValueError, match="'x' was read without its reference"):
        worked_examples([Problem("x", "1+1?", None, "2", "math")])


@pytest.fixture(scope="module")
def committed():
    examples = worked_examples(read_problems(str(DATA / "arithmetic_examples.jsonl")))
    return read_problems(str(DATA / "arithmetic.jsonl")), PromptStyle(examples=examples)


def test_the_committed_problems_are_sound(committed):
    problems, style = committed
    assert len(problems) == 64 == len({p.problem for p in problems}) == len({p.uid for p in problems})
    assert 2 <= len(style.examples) <= 4
    for problem in problems:
        policy_messages(problem.question, style)
        *_, sum_line, last = problem.reference.split("\n")
        left, right = sum_line.split(" = ")
        a, sign, b = left.split()
        assert right == problem.answer == str(int(a) + int(b) if sign == "+" else int(a) - int(b))
        assert last.endswith(f"\\boxed{{{problem.answer}}}.")
        assert {a, b} <= set(problem.problem.replace(".", " ").split())


def test_the_committed_prompts_are_short(committed):
    path = os.environ.get("EXPRL_SMOLLM2_GGUF", "")
    if not path:
        pytest.skip("EXPRL_SMOLLM2_GGUF is not set to the path of SmolLM2-135M-Instruct.Q4_1.gguf")
    tokenizer = load_tokenizer(path)
    problems, style = committed
    assert max(len(policy_prompt(tokenizer, problem.question, style)) for problem in problems) <= 160
    assert max(len(tokenizer.encode(problem.reference)) for problem in problems) <= 40
