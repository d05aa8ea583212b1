"""Supervised training on the reference solutions: the imitation baseline.

    problems → prompts, references → packed rows → update → checkpoint, metrics

An example is the policy's prompt, as RL and evaluation use it, then the reference as plain text and an end of sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

from exprl_jax.config import Sft
from exprl_jax.data.packing import Branches, Example
from exprl_jax.data.problems import Problem, read_problems
from exprl_jax.data.tokenizer import Tokenizer
from exprl_jax.data.training import policy_prompts, read_training_problems, within_budget
from exprl_jax.evaluation.live_report import keep_report
from exprl_jax.hosts import say
from exprl_jax.layout import check_layout
from exprl_jax.mesh import DATA, make_mesh
from exprl_jax.run.loop import run_task
from exprl_jax.supervised_run import Examples, SupervisedRun, hold_back, open_supervised, task_of
from exprl_jax.weights.language_model import open_model


def sft(config: Sft, workdir_path: str, accept_lost_records: bool = False) -> None:
    """Runs the experiment in its folder, from where it stands to its last step.

    Raises:
      ValueError: anything about config, data, model or folder that cannot work, in one line.
      FloatingPointError: a metric is not finite (names step and metric).
    """
    run_task(config, lambda _: task_of(open_run(config)), workdir_path, keep_report, accept_lost_records)


def open_run(config: Sft) -> SupervisedRun:
    """Opens model and data.

    Raises:
      ValueError: anything about config, data or model that cannot work.
    """
    mesh = make_mesh(config.mesh)
    check_layout(config, mesh.shape[DATA])
    policy = open_model(config.policy)
    say(f"policy {config.policy.weights}")
    examples = _examples(config, policy.tokenizer, read_training_problems(config.data, references=True))
    others = None
    if source := config.validation.source:
        others = _examples(config, policy.tokenizer, read_problems(source, split=config.data.split))
    return open_supervised(config, mesh, policy, *hold_back(config, examples, others, lambda problem: problem.problem))


def _examples(config: Sft, tokenizer: Tokenizer, problems: list[Problem]) -> Examples:
    """The examples of the problems that are within the budgets; says how many are not.

    Raises:
      ValueError: none is left.
    """
    prompts = policy_prompts(config, tokenizer, problems)
    lengths = {name: len(prompt) for name, prompt in prompts.items()}
    problems = within_budget("data.max_prompt_tokens", config.data.max_prompt_tokens, problems, lengths)
    examples = {p.id: make_example(tokenizer, prompts[p.id], p) for p in problems}
    lengths = {name: len(example.prompt) + len(example.response) for name, example in examples.items()}
    if config.row_tokens:
        problems = within_budget("row_tokens", config.row_tokens, problems, lengths)
    return Examples(problems, [Branches([examples[p.id]], [0]) for p in problems], [[0.0]] * len(problems))


def make_example(tokenizer: Tokenizer, prompt: Sequence[int], problem: Problem) -> Example:
    """The problem's prompt, and what the policy should write: the reference, as plain text, and an end of sequence."""
    return Example(tuple(prompt), (*tokenizer.encode(problem.reference), tokenizer.eos_ids[0]))
