"""A model's completions of prompts that are given as token ids, a wave at a time; for tasks of one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from exprl_jax import programs
from exprl_jax.data.problems import Problem
from exprl_jax.model.decoder import Params
from exprl_jax.rollout.call import make_prompts, texts_of
from exprl_jax.weights.language_model import LanguageModel


class Completion(NamedTuple):
    """What a model wrote after a prompt: text, number of tokens, and whether it ended within its budget."""

    text: str
    tokens: int
    ended: bool


class Completer:
    """A model that completes prompts, each known by a name, from which its random numbers are derived."""

    def __init__(
        self,
        model: LanguageModel,
        mesh: Mesh,
        params: Params,
        prompts: Mapping[str, Sequence[int]],
        *,
        wave: int,
        max_tokens: int,
        temperature: float,
        seed: int,
        slots: int = 0,
    ):
        """Compiles nothing yet.

        Args:
          prompts: token ids by name.
          slots: of a data shard, in which rows take turns; 0 for one of every row.
        """
        self._params, self._decode, self._prompts = params, model.tokenizer.decode, make_prompts(prompts)
        self._sampler = programs.build_sampler(model, mesh, max_tokens=max_tokens, wave=wave, slots=slots)
        self._temperature, self._seed = temperature, seed

    def complete(self, names: Sequence[str], group: int, step: int = 0) -> list[list[Completion]]:
        """`group` completions of each prompt, by name.

        Args:
          names: at most a wave of them; the first also fills up the wave, where nothing is sampled.
          step: others give other completions.
        """
        size = self._sampler.wave
        # Of a problem the sampler reads the identity alone.
        problems = [Problem(name, "", None, "", "math") for name in [*names, *[names[0]] * (size - len(names))]]
        rollouts, _ = self._sampler(
            self._params,
            self._prompts,
            problems,
            group=group,
            temperature=self._temperature,
            seed=self._seed,
            step=step,
            attempt=0,
            live_P=np.arange(size) < len(names),
        )
        ids, texts = texts_of(rollouts, self._decode)
        return [
            [Completion(texts[i][g], len(ids[i][g]), bool(rollouts.ended_PG[i, g])) for g in range(group)]
            for i in range(len(names))
        ]
