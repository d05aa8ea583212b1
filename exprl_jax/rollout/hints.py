"""Hints for groups without any success (NuRL, arXiv 2509.25666): a frozen model writes one from the reference.

    problem, reference ─ frozen base ─→ hint ─→ policy's prompt: problem, "Hint: …"

This is the one way by which anything made from a reference reaches a policy's prompt, so a config has it only where
every reward is a verifier's (`resolve`): never in ExpRL's arms.  A hint in which the answer stands is not used.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from exprl_jax.data.problems import Problem
from exprl_jax.data.prompts import PromptStyle, hint_prompt, hinted_prompt
from exprl_jax.data.tokenizer import Tokenizer
from exprl_jax.model.decoder import Params
from exprl_jax.rollout.call import Prompts, Sampler, make_prompts, texts_of

# What stands around a hint in a prompt, in tokens, at most.
FRAME = 16
# Hints are not drawn with the random numbers of rollouts.
_APART = 0x48494E54


class Hinted(NamedTuple):
    """Prompts with hints.

    Attributes:
      prompts: token ids by problem id, of those problems that got a hint.
      tokens: drawn for hints.
    """

    prompts: Mapping[str, Sequence[int]]
    tokens: int


@dataclasses.dataclass(frozen=True)
class HintWriter:
    """Who writes hints, and for which prompts.

    Attributes:
      sampler: of one response a problem, as long as a hint may be.
      params: the frozen model's.
      asked: what it is asked, by problem id; of problems that are not `able`, anything.
      able: ids of the problems whose reference it has room to read.
      hints: longest hint.
      limit: longest prompt with a hint.
      temperature, seed: as the policy's.
    """

    sampler: Sampler
    params: Params
    tokenizer: Tokenizer
    style: PromptStyle
    asked: Prompts
    able: frozenset[str]
    hints: int
    limit: int
    temperature: float
    seed: int

    def __call__(self, problems: Sequence[Problem], wanted_P: np.ndarray) -> Hinted:
        """Hints for some of a wave's problems; every process must call this.  The same problem has the same hint
        always: its random numbers are of seed and problem alone."""
        live_P = np.array([p.id in self.able for p in problems], bool) & wanted_P
        drawn, _ = self.sampler(
            self.params,
            self.asked,
            problems,
            group=1,
            temperature=self.temperature,
            seed=(self.seed + _APART) % (1 << 32),
            step=0,
            attempt=0,
            live_P=live_P,
        )
        _, texts = texts_of(drawn, self.tokenizer.decode)
        prompts = {}
        for problem, (text,), live in zip(problems, texts, live_P):
            # Bytes that are no text may be more tokens now than were drawn.
            hint = self.tokenizer.decode(self.tokenizer.encode(text.strip())[: self.hints])
            if live and hint and not gives_answer(hint, problem.answer):
                prompt = hinted_prompt(self.tokenizer, problem.question, hint, self.style)
                if len(prompt) <= self.limit:
                    prompts[problem.id] = prompt
        return Hinted(prompts, int(drawn.mask_PGR.sum()))


def gives_answer(hint: str, answer: str) -> bool:
    """Whether the answer stands in the hint, as a word of its own, whatever its case and spaces."""
    plain, wanted = (" ".join(text.split()).casefold() for text in (hint, answer))
    return re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", plain) is not None


def make_hint_writer(
    sampler: Sampler,
    params: Params,
    tokenizer: Tokenizer,
    style: PromptStyle,
    problems: Sequence[Problem],
    bare: Prompts,
    *,
    hints: int,
    context: int,
    limit: int,
    temperature: float,
    seed: int,
) -> HintWriter:
    """A writer of hints for these problems.

    Args:
      bare: the policy's prompts.
      hints: longest hint.
      context: the frozen model's, for the question and its hint together.
      limit: longest prompt with a hint.
    """
    asked = {p.id: hint_prompt(tokenizer, p) for p in problems}
    able = frozenset(name for name, prompt in asked.items() if len(prompt) + hints <= context)
    asked = {name: prompt if name in able else bare.ids[name] for name, prompt in asked.items()}
    return HintWriter(
        sampler=sampler,
        params=params,
        tokenizer=tokenizer,
        style=style,
        asked=make_prompts(asked),
        able=able,
        hints=hints,
        limit=limit,
        temperature=temperature,
        seed=seed,
    )
