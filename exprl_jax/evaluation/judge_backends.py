"""What answers a calibration's questions: a model on the mesh, an endpoint, or a function.

Each makes what scores a pass, as in training, and what asks about whole rollouts several times.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from jax.sharding import Mesh

from exprl_jax.evaluation.completions import Completer
from exprl_jax.evaluation.judge_task import AnyScorer, JudgeTask, Prompts, whole_prompt
from exprl_jax.evaluation.passes import ScoringPass, Trace
from exprl_jax.model.decoder import Params
from exprl_jax.reward.answers import opened_thought
from exprl_jax.reward.endpoint import ChatClient
from exprl_jax.reward.endpoint_judge import EndpointJudge
from exprl_jax.reward.function_judge import FunctionJudge
from exprl_jax.reward.functions import FunctionPool
from exprl_jax.reward.judge import Judge, JudgePrograms, JudgePrompts
from exprl_jax.reward.judge_prompts import parse_score
from exprl_jax.reward.judgements import fill
from exprl_jax.rollout.call import padded_width


class RepeatAnswer(NamedTuple):
    """A judge's answer at a temperature.

    Attributes:
      digit: the score that it gives; None where it gives none.
      text: what the judge wrote; None where the request failed.
      tokens: read and written; what several answers have in common is divided among them.
    """

    digit: int | None
    text: str | None
    cut: bool
    tokens: float


# Answers to each of some traces, as many as there are numbers, which are those of the repeats.
Repeater = Callable[[Sequence[Trace], Sequence[int]], list[list[RepeatAnswer]]]


@dataclasses.dataclass(frozen=True)
class EndpointBackend:
    """A judge behind an endpoint; `client` is open."""

    task: JudgeTask
    client: ChatClient

    def scorer(self, index: int, passes: Sequence[ScoringPass]) -> tuple[AnyScorer, Mapping[str, int]]:
        """For one of the passes; of an endpoint, which counts whole prompts, no tokens are shared."""
        judge, config = self.task.judge, self.task.config
        scorer = EndpointJudge(judge, self.client, passes[index].chats(judge), {}, config.group)
        return self.task.with_checklists(scorer, passes[index]), {}

    def repeat_calls(self) -> tuple[int, list[list[int]]]:
        """Rollouts of a call, and numbers of the answers of each: one answer to many rollouts, kept before the next."""
        return self.task.config.wave * self.task.config.group, [[number] for number in self.task.repeats]

    def repeater(self, first: ScoringPass, traces: Sequence[Trace]) -> Repeater:
        """Asks as the first pass does; the n-th answers have the seed `config.seed` + n."""
        judge, config = self.task.judge, self.task.config
        chats = first._replace(traces=traces).chats(judge)

        def repeat(wave: Sequence[Trace], numbers: Sequence[int]) -> list[list[RepeatAnswer]]:
            (number,) = numbers
            requests = [fill(chats[trace.rollout.problem.id], trace.text) for trace in wave]
            sampling = {"temperature": config.repeats.temperature, "seed": config.seed + number}
            replies = self.client.submit(requests, judge.max_tokens, "repeated scores", sampling=sampling).result()
            answers = []
            for reply in replies:
                digit, text = parse_score(reply.text, at_end=reply.cut), reply.text if reply.answered else None
                answers.append([RepeatAnswer(digit, text, reply.cut, reply.prompt_tokens + reply.completion_tokens)])
            return answers

        return repeat


@dataclasses.dataclass(frozen=True)
class FunctionBackend:
    """A judge that is a function; `pool` is open.  It is asked once about each trace."""

    task: JudgeTask
    pool: FunctionPool

    def scorer(self, index: int, passes: Sequence[ScoringPass]) -> tuple[FunctionJudge, Mapping[str, int]]:
        """For one of the passes, whose references the function is given; it counts no tokens."""
        of_pass = passes[index]
        ids = {trace.rollout.problem.id for trace in of_pass.traces}
        references = {name: of_pass.references.get(name) for name in ids}
        units = dict.fromkeys(ids, of_pass.unit)
        return FunctionJudge(self.task.judge, self.pool, units, references, self.task.config.group), {}


@dataclasses.dataclass(frozen=True)
class ModelBackend:
    """A judge on the mesh.

    Attributes:
      prompts: of each pass.
    """

    task: JudgeTask
    mesh: Mesh
    params: Params
    programs: JudgePrograms
    prompts: Sequence[Prompts]

    def scorer(self, index: int, passes: Sequence[ScoringPass]) -> tuple[AnyScorer, Mapping[str, int]]:
        """For one of the passes; a problem's head is read once for all its traces in a call."""
        task, config = self.task, self.task.config
        # Passes of one order share their widths, so that they compile once.
        alike = [
            of_other[trace.rollout.problem.id]
            for other, of_other in zip(passes, self.prompts, strict=True)
            if other.order == passes[index].order
            for trace in other.traces
        ]
        scorer = Judge(
            config=task.judge,
            tokenizer=task.model.tokenizer,
            params=self.params,
            programs=self.programs,
            mesh=self.mesh,
            prompts=JudgePrompts(self.prompts[index], {}),
            context_width=padded_width(max(len(prompt.head) for prompt in alike)),
            row_width=padded_width(task.judge.max_trace_tokens + max(len(prompt.suffix) for prompt in alike)),
            problems=config.wave,
            group=config.group,
        )
        scorer = task.with_checklists(scorer, passes[index])
        return scorer, {name: len(prompt.head) for name, prompt in self.prompts[index].items()}

    def repeat_calls(self) -> tuple[int, list[list[int]]]:
        """Rollouts of a call, and numbers of the answers of each: all of a rollout, whose prompt is read once."""
        return self.task.config.wave, [self.task.repeats]

    def repeater(self, first: ScoringPass, traces: Sequence[Trace]) -> Repeater:
        """Asks as the first pass does."""
        task, config, prompts = self.task, self.task.config, self.prompts[0]
        ids = {_repeat_name(trace): whole_prompt(task, prompts, trace) for trace in traces}
        sizes = dict(wave=config.wave, max_tokens=task.judge.max_tokens)
        chance = dict(temperature=config.repeats.temperature, seed=config.seed)
        completer = Completer(task.model, self.mesh, self.params, ids, **sizes, **chance)

        def repeat(wave: Sequence[Trace], numbers: Sequence[int]) -> list[list[RepeatAnswer]]:
            names, answers = [_repeat_name(trace) for trace in wave], []
            for trace, name, of_trace in zip(wave, names, completer.complete(names, len(numbers)), strict=True):
                # An answer goes on where the prompt has opened a thought.
                opened = opened_thought(task.model.tokenizer.decode(prompts[trace.rollout.problem.id].suffix))
                read = len(ids[name]) / len(numbers)
                answers.append(
                    [RepeatAnswer(parse_score(opened + c.text), c.text, not c.ended, read + c.tokens) for c in of_trace]
                )
            return answers

        return repeat


def _repeat_name(trace: Trace) -> str:
    """From which the random numbers of a rollout's repeats are derived."""
    return f"{trace.rollout.problem.id}#{trace.rollout.number}"
