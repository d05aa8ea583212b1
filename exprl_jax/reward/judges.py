"""Opens the judge that a config names: a model on the mesh, an endpoint, or none where nothing is to be judged."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from jax.sharding import Mesh

from exprl_jax import config
from exprl_jax.architecture import Architecture
from exprl_jax.data.problems import Problem
from exprl_jax.data.tokenizer import Tokenizer
from exprl_jax.model.decoder import Params
from exprl_jax.reward.endpoint import ChatClient
from exprl_jax.reward.endpoint_judge import EndpointJudge
from exprl_jax.reward.judge import Judge, JudgePrograms, JudgePrompts, NoJudge, score_prompt, verify_prompt
from exprl_jax.reward.judge_prompts import DIGITS, digit_token_ids
from exprl_jax.reward.judgements import score_messages, verdict_messages
from exprl_jax.reward.rubric import Unit, open_rubric, rubric_files
from exprl_jax.reward.verifiers import open_ended
from exprl_jax.rollout.call import padded_width
from exprl_jax.weights.language_model import LanguageModel, open_model

AnyJudge = Judge | EndpointJudge | NoJudge


class JudgeBuilder:
    """A judge whose prompts are made and whose parameters are not loaded.

    Attributes:
      models: the model on the mesh that will be asked, if there is one.
      files: that the prompts are made from, by what names them in the config (`weights.run_models`).
    """

    def __init__(
        self,
        judge_config: config.Judge,
        *,
        scored: Sequence[Problem],
        verified: Sequence[Problem],
        unit: Callable[[Problem], Unit],
        opened: LanguageModel | None = None,
    ):
        """Makes the prompts.

        Args:
          scored: problems whose traces are scored against the reference.
          verified: problems whose responses are compared with the answer.
          unit: what of a problem's rollouts is scored.
          opened: a model that may have the judge's weights (`open_model`).

        Raises:
          ValueError: a problem to score has no reference, the rubric has no prompt for it, or the model cannot be
            opened or has too short a context.
        """
        self._config, self._scored, self._verified, self._unit = judge_config, scored, verified, unit
        self._asked = {p.id for p in (*scored, *verified)}
        self.files = rubric_files(judge_config) if scored else {}
        for unit_scored in sorted({unit(p) for p in scored}):
            open_rubric(judge_config.rubric).turns(unit_scored, judge_config.readout, "")
        self.models: list[LanguageModel] = []
        self._prompts = JudgePrompts({}, {})
        if self._asked and judge_config.backend == "local":
            self._model = open_model(judge_config.model, opened)
            self.models.append(self._model)
            check_judge_lengths(judge_config, self._model.arch)
            tokenizer = self._model.tokenizer
            if verified and judge_config.readout == "logits":
                _check_digits(tokenizer)
            self._prompts = JudgePrompts(
                {p.id: score_prompt(judge_config, tokenizer, p, unit(p)) for p in scored},
                {p.id: verify_prompt(judge_config, tokenizer, p) for p in verified},
            )

    def lengths(self, problems: Sequence[Problem]) -> dict[str, int]:
        """Tokens of the longest prompt of each problem without what is judged; 0 where a local judge is not asked."""
        return {p.id: max((prompt.frame_tokens for prompt in self._prompts.of(p.id)), default=0) for p in problems}

    def open(
        self,
        mesh: Mesh,
        stack: contextlib.ExitStack,
        load: Callable[[LanguageModel], Params],
        build: Callable[[config.Judge, Mesh, LanguageModel], JudgePrograms],
        problems: Sequence[Problem],
        *,
        wave: int,
        group: int,
    ) -> AnyJudge:
        """The judge.

        Args:
          stack: closes what it holds open.
          load: a model's parameters on the mesh.
          build: the programs of a judge on the mesh (`programs.build_judge`).
          problems: those that are left, by which the widths are made.
          wave, group: problems of a call, and queries of one problem in it.

        Raises:
          ValueError: the endpoint's key is not there.
        """
        judge_config, kept = self._config, {p.id for p in problems}
        if not kept & self._asked:
            return NoJudge(group)
        if not self.models:
            return EndpointJudge(
                config=judge_config,
                client=stack.enter_context(ChatClient(judge_config.endpoint)),
                score_chats={
                    p.id: score_messages(judge_config, p, self._unit(p)) for p in self._scored if p.id in kept
                },
                verdict_chats={p.id: verdict_messages(judge_config, p) for p in self._verified if p.id in kept},
                group=group,
            )
        used = [prompt for p in problems for prompt in self._prompts.of(p.id)]
        return Judge(
            config=judge_config,
            tokenizer=self._model.tokenizer,
            params=load(self._model),
            programs=build(judge_config, mesh, self._model),
            mesh=mesh,
            prompts=self._prompts,
            context_width=padded_width(max(len(prompt.head) for prompt in used)),
            row_width=padded_width(judge_config.max_trace_tokens + max(len(prompt.suffix) for prompt in used)),
            problems=wave,
            group=group,
        )


def _check_digits(tokenizer: Tokenizer) -> None:
    """Scores and verdicts are read from the same five tokens, each after its own continuation."""
    start = open_ended.CONTINUATION["logits"]
    ids = digit_token_ids(tokenizer)
    if any(list(tokenizer.encode(f"{start}{digit}"))[-1] != i for digit, i in zip(DIGITS, ids)):
        raise ValueError(
            f"tokenizer {tokenizer.name} encodes digits after {start!r} in another way than after a score's beginning; "
            "set judge.readout to 'text' for this model"
        )


def check_judge_lengths(judge_config: config.Judge, arch: Architecture) -> None:
    """Checks that prompt, trace and answer within their budgets are within a local judge's context length.

    The budgets are of all tokens that a judge reads and writes: what widths are rounded up by holds none.

    Raises:
      ValueError: names the budgets to lower.
    """
    answer = judge_config.max_tokens if judge_config.readout == "text" else 0
    tokens = judge_config.max_context_tokens + judge_config.max_trace_tokens + answer
    if tokens > arch.max_positions:
        raise ValueError(
            f"config.judge.max_context_tokens + max_trace_tokens + max_tokens: got {tokens} tokens, expected at most "
            f"{arch.max_positions}, the judge's context length"
        )
