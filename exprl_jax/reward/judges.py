"""Opens the judge that a config names: a model, an endpoint, a function, or none where nothing is to be judged."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence

from jax.sharding import Mesh

from exprl_jax import config
from exprl_jax.architecture import Architecture
from exprl_jax.data.problems import Problem
from exprl_jax.data.tokenizer import SplitPrompt, Tokenizer
from exprl_jax.data.training import within_budget
from exprl_jax.mesh import DATA
from exprl_jax.model.decoder import Params
from exprl_jax.reward.checklists import ChecklistJudge, ChecklistPrompts, Checklists
from exprl_jax.reward.endpoint import ChatClient
from exprl_jax.reward.endpoint_judge import EndpointJudge
from exprl_jax.reward.function_judge import FunctionJudge
from exprl_jax.reward.functions import FunctionPool, function_files
from exprl_jax.reward.judge import Judge, JudgePrograms, JudgePrompts, NoJudge, score_prompt, verify_prompt
from exprl_jax.reward.judge_prompts import DIGITS, digit_token_ids
from exprl_jax.reward.judgements import needed_reference, score_messages, verdict_messages
from exprl_jax.reward.rubric import Unit, open_rubric, rubric_files
from exprl_jax.reward.verifiers import open_ended
from exprl_jax.rollout.call import padded_width
from exprl_jax.weights.language_model import LanguageModel, open_model
from exprl_jax.weights.run_models import fingerprint

AnyJudge = Judge | EndpointJudge | FunctionJudge | NoJudge | ChecklistJudge


class JudgeBuilder:
    """A judge whose prompts are made and whose parameters are not loaded.

    Attributes:
      models: the model on the mesh that will be asked, if there is one.
      files: that the config names besides, by what names them (`weights.run_models`).
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
          ValueError: a problem to score has no reference, the rubric has no prompt for it, the model cannot be opened
            or has too short a context, or the function cannot be loaded.
        """
        self._config, self._scored, self._verified, self._unit = judge_config, scored, verified, unit
        self._asked = {p.id for p in (*scored, *verified)}
        # A rubric is of scores alone.
        by_words = judge_config.backend != "function"
        self.files = judge_files(judge_config) if scored or (self._asked and not by_words) else {}
        for unit_scored in sorted({unit(p) for p in scored}) if by_words else ():
            check_turns(judge_config, unit_scored)
        self.models: list[LanguageModel] = []
        self._prompts = JudgePrompts({}, {})
        self._written: dict[str, SplitPrompt] = {}
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
        self._checklists = None
        if scored and judge_config.per_problem:
            self._checklists = open_checklists(judge_config, self.models, scored)
            if self.models and judge_config.readout == "text":
                prompts = ChecklistPrompts(judge_config, self._model.tokenizer, unit)
                self._written = {p.id: prompts.write(p) for p in scored}

    def within_context(self, problems: Sequence[Problem]) -> list[Problem]:
        """The problems whose prompts are within the judge's budget; says how many are not.  Where no model on the mesh
        is asked there is none, and nothing is said.

        Raises:
          ValueError: none is left.
        """
        if not self.models:
            return list(problems)
        budget = self._config.max_context_tokens
        return within_budget("judge.max_context_tokens", budget, problems, self.lengths(problems))

    def lengths(self, problems: Sequence[Problem]) -> dict[str, int]:
        """Tokens of the longest prompt of each problem without what is judged; 0 where a local judge is not asked."""
        return {p.id: max((prompt.frame_tokens for prompt in self._of(p.id)), default=0) for p in problems}

    def _of(self, name: str) -> list[SplitPrompt]:
        """All prompts of a problem that are known before the run."""
        return [*self._prompts.of(name), *([self._written[name]] if name in self._written else [])]

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
        if judge_config.backend == "function":
            return FunctionJudge(
                config=judge_config,
                pool=stack.enter_context(judge_pool(judge_config)),
                units={p.id: self._unit(p) for p in self._scored if p.id in kept},
                references={p.id: needed_reference(p) for p in self._scored if p.id in kept},
                group=group,
            )
        if judge_config.backend == "openai":
            judge = EndpointJudge(
                config=judge_config,
                client=stack.enter_context(ChatClient(judge_config.endpoint)),
                score_chats={
                    p.id: score_messages(judge_config, p, self._unit(p)) for p in self._scored if p.id in kept
                },
                verdict_chats={p.id: verdict_messages(judge_config, p) for p in self._verified if p.id in kept},
                group=group,
            )
            if self._checklists is None:
                return judge
            return ChecklistJudge(judge, self._checklists, ChecklistPrompts(judge_config, None, self._unit))
        used = [prompt for p in problems for prompt in self._of(p.id)]
        judge = Judge(
            config=judge_config,
            tokenizer=self._model.tokenizer,
            params=load(self._model),
            programs=build(judge_config, mesh, self._model),
            mesh=mesh,
            prompts=self._prompts,
            context_width=padded_width(max(len(prompt.head) for prompt in used)),
            row_width=padded_width(judge_config.max_trace_tokens + max(len(prompt.suffix) for prompt in used)),
            problems=_at_a_time(judge_config, mesh, wave),
            group=group,
        )
        if self._checklists is None:
            return judge
        return with_checklists(judge, self._checklists, [p for p in self._scored if p.id in kept], self._unit)


def check_turns(judge_config: config.Judge, unit: Unit) -> None:
    """Checks that the rubric has the words for what a judge asks about that unit.

    Raises:
      ValueError: names the section that is missing.
    """
    rubric = open_rubric(judge_config.template)
    rubric.turns(unit, judge_config.readout, "")
    if judge_config.per_problem:
        rubric.turns("outcome", "text", "write")
        rubric.turns(unit, judge_config.readout, "checklist")


def _at_a_time(judge_config: config.Judge, mesh: Mesh, wave: int) -> int:
    """Problems of a call to a judge on the mesh.

    Raises:
      ValueError: a wave, or the mesh, is not divided by them.
    """
    size, shards = judge_config.wave or wave, mesh.shape[DATA]
    if wave % size or size % shards:
        raise ValueError(
            f"config.judge.wave: got {size}, expected a divisor of the {wave} problems that are sampled at a time, and "
            f"a multiple of mesh.data = {shards}"
        )
    return size


def open_checklists(
    judge_config: config.Judge, models: Sequence[LanguageModel], scored: Sequence[Problem]
) -> Checklists:
    """The checklists of a judge's problems, as far as they are there.

    Args:
      models: the judge's on the mesh; none of an endpoint.

    Raises:
      ValueError: the file cannot be read, or lacks some that a judge which writes nothing needs.
    """
    by = [fingerprint(m.source.files) if m.source else m.config.weights for m in models]
    who = by[0] if by else judge_config.endpoint.model
    checklists = Checklists(judge_config.checklists, who, judge_config.template)
    if models and judge_config.readout == "logits":
        missing = [problem.id for problem in scored if not checklists.known(problem)]
        if missing:
            raise ValueError(
                f"config.judge.checklists: {judge_config.checklists} has none of {len(missing)} of {len(scored)} "
                f"problems, {missing[0]!r} for instance, and a local judge with readout = 'logits' writes none; let "
                "one with readout = 'text' write them first"
            )
    return checklists


def with_checklists(
    judge: Judge, checklists: Checklists, scored: Sequence[Problem], unit: Callable[[Problem], Unit]
) -> ChecklistJudge:
    """A judge on the mesh with slots for checklists that are as long as its answers may be."""
    judge_config = judge.config
    prompts = ChecklistPrompts(judge_config, judge.tokenizer, unit)
    # Known ones as they are; of those to come the frame, and the longest list.
    frames = [prompts.score(problem, checklists.items(problem)) for problem in scored]
    to_come = 0 if judge_config.readout == "logits" else judge_config.max_tokens
    longest = min(max(len(prompt.head) for prompt in frames) + to_come, judge_config.max_context_tokens)
    asking = [prompts.write(problem) for problem in scored]
    head = padded_width(max(judge.context_width, longest, *(len(prompt.head) for prompt in asking)))
    suffix = max(len(prompt.suffix) for prompt in (*frames, *asking))
    row = padded_width(max(judge.row_width, judge_config.max_trace_tokens + suffix))
    wide = dataclasses.replace(judge, context_width=head, row_width=row)
    widths = head, row - judge_config.max_trace_tokens
    return ChecklistJudge(wide, checklists, ChecklistPrompts(judge_config, judge.tokenizer, unit, widths))


def judge_files(judge_config: config.Judge) -> Mapping[str, Sequence[pathlib.Path]]:
    """The files of a judge's function, or of its rubric, by what names them in the config.

    Raises:
      ValueError: the function cannot be loaded.
    """
    if judge_config.backend != "function":
        return rubric_files(judge_config)
    return {f"function {judge_config.function}": function_files("judge.function", judge_config.function)}


def judge_pool(judge_config: config.Judge) -> FunctionPool:
    """The processes that call a judge's function."""
    workers = judge_config.workers
    return FunctionPool("judge.function", judge_config.function, workers=workers.count, seconds=workers.seconds)


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
