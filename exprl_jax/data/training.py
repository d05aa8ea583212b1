"""The problems that a run trains on: read, checked against what is held out, put to the policy, and within budget."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.experimental import multihost_utils

from exprl_jax.config import Config, Data
from exprl_jax.data.problems import Problem, check_held_out, drop_overlong, read_problems, show_first
from exprl_jax.data.prompts import PromptStyle, policy_prompt, worked_examples
from exprl_jax.data.tokenizer import Tokenizer
from exprl_jax.hosts import say


def read_training_problems(data: Data, references: bool) -> list[Problem]:
    """The problems, with references only where something is to be learned from them.

    Raises:
      ValueError: nothing there, or a problem that is held out.
    """
    problems = read_problems(data.source, split=data.split, references=references, columns=data.columns)
    show_first(problems, "config.data.source")
    if data.held_out and not data.allow_held_out:
        check_held_out(problems, read_problems(data.held_out, split="test", references=False, columns=data.columns))
    return problems


def kinds_of(problems: Sequence[Problem]) -> list[str]:
    """The kinds among them, in a fixed order."""
    return sorted({problem.kind for problem in problems})


def prompt_style(config: Any) -> PromptStyle:
    """What the config's prompts contain besides the problem."""
    examples = read_problems(config.data.worked_examples) if config.data.worked_examples else []
    return PromptStyle(examples=worked_examples(examples))


def policy_prompts(config: Any, tokenizer: Tokenizer, problems: Sequence[Problem]) -> dict[str, list[int]]:
    """The bare prompt of each problem, by its id (D11)."""
    style = prompt_style(config)
    return {p.id: policy_prompt(tokenizer, p.question, style) for p in problems}


def within_budget(key: str, limit: int, problems: Sequence[Problem], lengths: Mapping[str, int]) -> list[Problem]:
    """The problems within a budget; says how many are not.

    Raises:
      ValueError: none is left.
    """
    try:
        kept, dropped = drop_overlong(problems, [lengths[p.id] for p in problems], limit)
    except ValueError as error:
        raise ValueError(f"config.{key}: {error}") from error
    say(f"{len(kept)} problems; dropped {dropped} over config.{key} = {limit}")
    return kept


def check_budget(key: str, budget: int, lengths: Mapping[str, int]) -> None:
    """Refuses to evaluate on problems that are over a budget: an evaluation leaves none out.

    Args:
      lengths: tokens of each problem's prompt, by its id.

    Raises:
      ValueError: names the longest.
    """
    longest = max(lengths, key=lambda name: lengths[name], default="")
    if lengths and lengths[longest] > budget:
        raise ValueError(
            f"config.{key}: got {budget}, expected at least {lengths[longest]}, the prompt of problem {longest!r}; an "
            "evaluation leaves no problem out"
        )


def read_held_out(config: Config, problems: Sequence[Problem]) -> list[Problem]:
    """The held-out problems that a run is evaluated on, without references; none where it is not.

    Args:
      problems: trained on.

    Raises:
      ValueError: one of them is trained on, or its id is another training problem's.
    """
    if not config.evaluate.every or not config.evaluate.source:
        return []
    held_out = read_problems(config.evaluate.source, split="test", references=False, columns=config.data.columns)
    if not config.data.allow_held_out:
        check_held_out(problems, held_out)
    trained = {problem.id: problem.question for problem in problems}
    for problem in held_out:
        if trained.get(problem.id, problem.question) != problem.question:
            raise ValueError(
                f"config.evaluate.source: {problem.id!r} is another problem there than in config.data.source; rename it"
            )
    return held_out


def fixed_sample(problems: Sequence[Problem], count: int, seed: int) -> list[Problem]:
    """Some of the problems, the same in every run of this seed, whatever their order and whichever others there are.

    Raises:
      ValueError: there are not so many.
    """
    if count > len(problems):
        raise ValueError(
            f"config.evaluate.training_problems: got {count}, expected at most {len(problems)}, the problems that are "
            "left"
        )
    rank = {p.id: hashlib.blake2b(f"{seed}\0{p.id}".encode()).digest() for p in problems}
    return sorted(problems, key=lambda problem: rank[problem.id])[:count]


def fingerprint(problems: Sequence[Problem]) -> str:
    """Of the problems and their order in the source: what a position in the data refers to."""
    texts = "\0".join(problem.content for problem in problems)
    return hashlib.blake2b(texts.encode(), digest_size=16).hexdigest()


def check_position(position: Mapping[str, Any], problems: Sequence[Problem]) -> None:
    """Refuses to go on in other data than a checkpoint was made with.

    Raises:
      ValueError: the problems have changed.
    """
    if position["problems"] != fingerprint(problems):
        raise ValueError(
            f"config.data.source: its problems are not those of the run's first {position['next_batch']} steps; "
            "restore the data, or choose another --workdir"
        )


def check_same_problems(problems: Sequence[Problem], key: str = "data.source") -> None:
    """Refuses to start where processes have read different problems: each would sample and grade rows of its own data.

    Every process must call this.

    Raises:
      ValueError: in every process; names those that differ from process 0.
    """
    mine = np.frombuffer(bytes.fromhex(fingerprint(problems)), np.uint8)
    theirs = np.atleast_2d(multihost_utils.process_allgather(mine))
    if other := np.flatnonzero((theirs != theirs[0]).any(-1)).tolist():
        raise ValueError(
            f"config.{key}: processes {', '.join(map(str, other))} have read other problems than process 0; give "
            "all hosts the same files"
        )
