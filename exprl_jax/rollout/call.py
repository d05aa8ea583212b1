"""A wave: G rollouts of each of some problems, from their bare prompts.  Text on the host, sampling on the mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from exprl_jax.data.problems import Problem
from exprl_jax.hosts import fetch_rows, put_rows
from exprl_jax.model.decoder import Params
from exprl_jax.records import Context, Draw, Rollouts, Rows, Usage

# Widths are rounded up to this, so that a data set's next version rarely means other shapes.
_WIDTH = 16
# A row's identity has 32 bits for step and attempt: the attempt stands above the step (`config.resolve` checks both).
_ATTEMPT_BIT = 20


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts of a data set.

    Attributes:
      ids: token ids by problem id.
      width: context slots for the longest, its last token left out.
    """

    ids: Mapping[str, Sequence[int]]
    width: int

    def context(self, problems: Sequence[Problem]) -> tuple[Context, np.ndarray]:
        """The problems' contexts, and the last token of each prompt, with which its rows start."""
        prompts = [self.ids[problem.id] for problem in problems]
        last_P = np.array([prompt[-1] for prompt in prompts], np.int32)
        return pad_contexts([prompt[:-1] for prompt in prompts], self.width), last_P


def make_prompts(ids: Mapping[str, Sequence[int]]) -> Prompts:
    """Prompts with the width that they need."""
    return Prompts(ids, padded_width(max(len(prompt) for prompt in ids.values()) - 1))


@dataclasses.dataclass(frozen=True)
class Sampler:
    """What sampling needs besides parameters.

    Attributes:
      prefill, sample: see `programs.build_sampler`.
      wave: problems of a call, over all processes.
      max_tokens: of a response.
      expected_tokens: of a response of which nothing else is known; 0 where rows take no turns in decode slots.
    """

    prefill: Callable
    sample: Callable
    mesh: Mesh
    wave: int
    max_tokens: int
    expected_tokens: int = 0

    def __call__(
        self,
        params: Params,
        prompts: Prompts,
        problems: Sequence[Problem],
        *,
        group: int,
        temperature: float,
        seed: int,
        step: int,
        attempt: int,
        live_P: np.ndarray,
        expected_P: np.ndarray | None = None,
    ) -> tuple[Rollouts, Usage]:
        """G rollouts of each problem, and what the call did for them; a prompt is prefilled once.

        Args:
          problems: this process's problems of the wave.
          step, attempt: with seed, problem and index in the group, the identity of a rollout's random numbers.
          live_P: problems to sample; the rollouts of the others are empty.
          expected_P: tokens that a rollout of each is expected to have, where that is known.
        """
        P = len(problems)
        context, last_P = prompts.context(problems)
        rows = Rows(np.broadcast_to(last_P[:, None, None], (P, group, 1)).copy(), np.zeros((P, group), np.int32))
        draw = Draw(
            seed=np.uint32(seed),
            step=np.int32(step + (attempt << _ATTEMPT_BIT)),
            problem_P=np.array([problem.uid for problem in problems], np.uint32),
            temperature_PG=np.full((P, group), temperature, np.float32),
            budget_PG=np.repeat(np.where(live_P, np.int32(self.max_tokens), np.int32(0))[:, None], group, axis=1),
        )
        if self.expected_tokens:
            known_P = np.full(P, self.expected_tokens) if expected_P is None else np.ceil(expected_P)
            draw = draw.replace(expected_P=known_P.astype(np.int32))
        context, rows, draw = put_rows(self.mesh, (context, rows, draw), self.wave)
        rollouts, usage = self.sample(params, self.prefill(params, context), rows, draw)
        return fetch_rows(rollouts), jax.device_get(usage)


def describe_problem(problem: Problem) -> dict[str, str | None]:
    """A problem as records of rollouts hold it.  Long answers are left out (`kinds.ProblemKind`)."""
    return {
        "id": problem.id,
        "domain": problem.domain,
        "kind": problem.kind,
        "problem": problem.problem,
        "reference": problem.reference,
        "answer": problem.answer if problem.traits.keeps_answer else None,
    }


def pad_contexts(contexts: Sequence[Sequence[int]], width: int) -> Context:
    """Right-pads token lists to [P, width]; the padding is never attended to."""
    tokens = np.zeros((len(contexts), width), np.int32)
    for row, context in zip(tokens, contexts, strict=True):
        row[: len(context)] = context
    return Context(tokens, np.array([len(context) for context in contexts], np.int32))


def padded_width(tokens: int) -> int:
    """Slots for so many tokens, rounded up."""
    return -(-max(tokens, 1) // _WIDTH) * _WIDTH


def texts_of(rollouts: Rollouts, decode: Callable[[list[int]], str]) -> tuple[list[list[np.ndarray]], list[list[str]]]:
    """Token ids and text of each rollout, by problem and index within the group."""
    lengths_PG = rollouts.mask_PGR.sum(-1)
    ids = [[row[:n] for row, n in zip(group, ns)] for group, ns in zip(rollouts.tokens_PGR, lengths_PG)]
    return ids, [[decode(row.tolist()) for row in group] for group in ids]
