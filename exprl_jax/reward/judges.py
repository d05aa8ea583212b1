"""Opens the judge that a config names: a model on the mesh, an endpoint, or none where nothing is to be judged."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from jax.sharding import Mesh

from exprl_jax import config
from exprl_jax.data.problems import Problem
from exprl_jax.data.tokenizer import Tokenizer
from exprl_jax.model.config import Architecture
from exprl_jax.model.decoder import Params
from exprl_jax.model.language_model import LanguageModel, open_model
from exprl_jax.programs import build_judge
from exprl_jax.reward.endpoint import ChatClient, EndpointJudge, judge_prompt
from exprl_jax.reward.judge import Judge, JudgePrompts, NoJudge, score_prompt, verify_prompt
from exprl_jax.reward.judge_prompts import DIGITS, Unit, digit_token_ids
from exprl_jax.reward.verifiers import open_ended
from exprl_jax.rollout.waves import padded_width

AnyJudge = Judge | EndpointJudge | NoJudge


class Opening:
    """A judge whose prompts are made and whose parameters are not loaded.

    Attributes:
      local: a model on the mesh will be asked.
      lengths: tokens of the longest prompt of each problem, its hole and what follows left out; 0 where it has none.
    """

    def __init__(
        self,
        how: config.Judge,
        *,
        scored: Sequence[Problem],
        verified: Sequence[Problem],
        unit: Callable[[Problem], Unit],
    ):
        """Makes the prompts.

        Args:
          scored: problems whose traces are scored against the reference.
          verified: problems whose responses are compared with the answer.
          unit: what of a problem's rollouts is scored.

        Raises:
          ValueError: a problem to score has no reference, or the model cannot be opened or has too short a context.
        """
        self._how, self._scored, self._unit = how, scored, unit
        self._asked = {p.id for p in (*scored, *verified)}
        self.local = bool(self._asked) and how.backend == "local"
        self._prompts = JudgePrompts({}, {})
        if self.local:
            self._model = open_model(how.model)
            check_judge_lengths(how, self._model.arch)
            tokenizer = self._model.tokenizer
            if verified and how.readout == "logits":
                _check_digits(tokenizer)
            self._prompts = JudgePrompts(
                {p.id: score_prompt(how, tokenizer, p, unit(p)) for p in scored},
                {p.id: verify_prompt(how, tokenizer, p) for p in verified},
            )

    def lengths(self, problems: Sequence[Problem]) -> dict[str, int]:
        """Tokens of the longest prompt of each problem, less the hole and what follows; 0 where it has none."""
        return {p.id: max((len(prompt.head) for prompt in self._prompts.of(p.id)), default=0) for p in problems}

    def open(
        self,
        mesh: Mesh,
        held: contextlib.ExitStack,
        load: Callable[[LanguageModel], Params],
        problems: Sequence[Problem],
        *,
        wave: int,
        group: int,
    ) -> AnyJudge:
        """The judge.

        Args:
          held: closes what it holds open.
          load: a model's parameters on the mesh.
          problems: those that are left, by which the widths are made.
          wave, group: problems of a call, and queries of one problem in it.

        Raises:
          ValueError: the endpoint's key is not there.
        """
        how, kept = self._how, {p.id for p in problems}
        if not kept & self._asked:
            return NoJudge(group)
        if not self.local:
            prompts = {p.id: judge_prompt(p, self._unit(p)) for p in self._scored if p.id in kept}
            return EndpointJudge(held.enter_context(ChatClient(how.endpoint)), prompts, group, how.max_tokens)
        used = [prompt for p in problems for prompt in self._prompts.of(p.id)]
        return Judge(
            how=how,
            tokenizer=self._model.tokenizer,
            params=load(self._model),
            programs=build_judge(how, mesh, self._model),
            mesh=mesh,
            prompts=self._prompts,
            context_width=padded_width(max(len(prompt.head) for prompt in used)),
            row_width=padded_width(how.max_trace_tokens + max(len(prompt.suffix) for prompt in used)),
            problems=wave,
            group=group,
        )


def _check_digits(tokenizer: Tokenizer) -> None:
    """Scores and verdicts are read from the same five tokens, each after its own continuation."""
    begun = open_ended.CONTINUATION["logits"]
    ids = digit_token_ids(tokenizer)
    if any(list(tokenizer.encode(f"{begun}{digit}"))[-1] != i for digit, i in zip(DIGITS, ids)):
        raise ValueError(
            f"tokenizer {tokenizer.name} encodes digits after {begun!r} in another way than after a score's beginning; set "
            "judge.readout to 'text' for this model"
        )


def check_judge_lengths(how: config.Judge, arch: Architecture) -> None:
    """Checks that prompt, trace and answer within their budgets are within a local judge's context length.

    Raises:
      ValueError: names the budgets to lower.
    """
    answer = how.max_tokens if how.readout == "text" else 0
    tokens = how.max_context_tokens + how.max_trace_tokens + answer
    if tokens > arch.max_positions:
        raise ValueError(
            f"config.judge.max_context_tokens + max_trace_tokens + max_tokens: got {tokens} tokens, expected at most "
            f"{arch.max_positions}, the judge's context length"
        )
