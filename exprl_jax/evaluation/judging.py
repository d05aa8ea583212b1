"""A judge of a calibration asked about fixed rollouts: pass after pass, wave after wave, from where its ledger ends.

    passes ─ prompts, budgets ─→ what has no answer yet ─ waves ─→ a backend: model, endpoint, function ─→ scores.jsonl

Scores are given as in training, by `Judge`, `EndpointJudge` and `FunctionJudge`; only the repeats are asked for in
another way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jax.sharding import Mesh

from exprl_jax import config as schema
from exprl_jax import programs
from exprl_jax.data.problems import Problem
from exprl_jax.data.tokenizer import Message, SplitPrompt
from exprl_jax.evaluation.completions import Completer
from exprl_jax.evaluation.passes import ScoringPass, Trace, draw_some
from exprl_jax.files import Ledger
from exprl_jax.hosts import say
from exprl_jax.model.decoder import Params
from exprl_jax.reward.answers import opened_thought
from exprl_jax.reward.checklists import ChecklistJudge, ChecklistPrompts, Checklists
from exprl_jax.reward.endpoint import ChatClient
from exprl_jax.reward.endpoint_judge import EndpointJudge
from exprl_jax.reward.function_judge import FunctionJudge
from exprl_jax.reward.functions import FunctionPool
from exprl_jax.reward.judge import Judge, JudgePrograms, JudgePrompts
from exprl_jax.reward.judge_prompts import CONTINUATION, normalise, parse_score
from exprl_jax.reward.judgements import MARKER, Query, fill
from exprl_jax.reward.judges import check_judge_lengths, judge_pool, open_checklists, with_checklists
from exprl_jax.rollout.call import padded_width
from exprl_jax.run.stopping import StopRequest
from exprl_jax.weights.language_model import LanguageModel, load_params, open_model

SCORE_KEY = ("judge", "condition", "order", "repeat", "id", "rollout", "segment")
SCORE_FIELDS = {
    **{"judge": str, "condition": str, "order": str, "repeat": int},
    **{"id": str, "rollout": int, "segment": int | None, "fingerprint": str},
    **{"score": int | float | None, "text": str | None, "tokens": int | float, "seconds": int | float},
}
AnyScorer = Judge | EndpointJudge | ChecklistJudge
Prompts = Mapping[str, SplitPrompt]  # by problem id


@dataclasses.dataclass(frozen=True)
class JudgeTask:
    """A judge and what it is asked within.

    Attributes:
      name: in tables and figures.
      model: of a judge on the mesh, whose parameters are not loaded; None for the others.
      scores: what it has answered.
    """

    name: str
    judge: schema.Judge
    model: LanguageModel | None
    config: schema.Calibrate
    scores: Ledger
    stop: StopRequest

    @property
    def repeats(self) -> list[int]:
        """Numbers of the answers at a temperature; 0 is the answer that training would get."""
        return list(range(1, self.config.repeats.count + 1))

    def question(self, scoring_pass: ScoringPass, trace: Trace, repeat: int) -> dict[str, Any]:
        """What identifies a question in the ledger."""
        return {
            "judge": self.name,
            "condition": scoring_pass.condition,
            "order": scoring_pass.order,
            "repeat": repeat,
            "id": trace.rollout.problem.id,
            "rollout": trace.rollout.number,
            "segment": trace.segment,
            "fingerprint": trace.rollout.fingerprint,
        }

    def with_checklists(self, scorer: Judge | EndpointJudge, scoring_pass: ScoringPass) -> AnyScorer:
        """The judge of a pass, with checklists where its rubric is per problem and it sees a reference.

        Raises:
          ValueError: checklists are missing that the judge cannot write.
        """
        if not self.judge.per_problem or scoring_pass.condition == "none":
            return scorer
        problems = {t.rollout.problem.id: scoring_pass.shown(t.rollout.problem) for t in scoring_pass.traces}
        checklists = self.checklists(list(problems.values()))
        if isinstance(scorer, Judge):
            return with_checklists(scorer, checklists, list(problems.values()), lambda _: scoring_pass.unit)
        return ChecklistJudge(scorer, checklists, ChecklistPrompts(self.judge, None, lambda _: scoring_pass.unit))

    def checklists(self, problems: Sequence[Problem]) -> Checklists:
        """Those of the judge that are there, and where it writes others."""
        checklists = open_checklists(self.judge, [] if self.model is None else [self.model], problems)
        checklists.open(self.scores.path.parent)
        return checklists

    def chat(self, scoring_pass: ScoringPass, problem: Problem) -> list[Message]:
        """What the judge was asked about a problem's traces, with `MARKER` in the trace's place."""
        shown = scoring_pass.shown(problem)
        if self.judge.per_problem and scoring_pass.condition != "none":
            if items := self.checklists([shown]).items(shown):
                return ChecklistPrompts(self.judge, None, lambda _: scoring_pass.unit).score(shown, items)
        return scoring_pass.chats(self.judge)[problem.id]

    def answered(self, scoring_pass: ScoringPass, trace: Trace, repeat: int) -> bool:
        """Whether the ledger has the answer."""
        return self.scores.key_of(self.question(scoring_pass, trace, repeat)) in self.scores


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


class TooShort(ValueError):
    """A judge's context, or its budget, is too short for what it would be asked."""


def open_judge_model(judge: schema.Judge) -> LanguageModel | None:
    """Finds a local judge's files; None for other judges.

    Raises:
      ValueError: the model cannot be opened.
      TooShort: it has too short a context.
    """
    if judge.backend != "local":
        return None
    model = open_model(judge.model)
    try:
        check_judge_lengths(judge, model.arch)
    except ValueError as error:
        raise TooShort(str(error)) from error
    return model


def ask_judge(task: JudgeTask, mesh: Mesh, passes: Sequence[ScoringPass]) -> bool:
    """Asks what is not in the ledger; False where it was stopped before the end.

    Args:
      passes: the first is as in training.

    Raises:
      TooShort: no prompt is within a local judge's budget.
      ValueError: too many requests to an endpoint failed, or a function is at fault.
    """
    if task.judge.backend == "function":  # which has no prompt whose order could matter
        passes = [scoring_pass for scoring_pass in passes if scoring_pass.order == "trace_last"]
    prompts = [] if task.model is None else [_split_prompts(task, scoring_pass) for scoring_pass in passes]
    passes = _within_budget(task, passes, prompts)
    unanswered = [p._replace(traces=[t for t in p.traces if not task.answered(p, t, 0)]) for p in passes]
    repeated = _draw_repeated(task, passes[0]) if passes else []
    if prompts:
        repeated = [trace for trace in repeated if _whole_prompt(task, prompts[0], trace)]
    if not repeated and not any(scoring_pass.traces for scoring_pass in unanswered):
        return True
    with contextlib.ExitStack() as stack:
        if task.judge.backend == "function":
            say(f"{task.name}: judge {task.judge.function}")
            backend = FunctionBackend(task, stack.enter_context(judge_pool(task.judge)))
        elif task.model is None:
            backend = EndpointBackend(task, stack.enter_context(ChatClient(task.judge.endpoint)))
        else:
            say(f"{task.name}: judge {task.judge.model.weights}")
            params = load_params(task.model, mesh, task.config.seed)
            backend = ModelBackend(task, mesh, params, programs.build_judge(task.judge, mesh, task.model), prompts)
        for index, scoring_pass in enumerate(unanswered):
            if not scoring_pass.traces:
                continue
            if not _score_pass(task, scoring_pass, *backend.scorer(index, passes)):
                return False
        return not repeated or _score_repeats(task, passes[0], repeated, backend)


def _split_prompts(task: JudgeTask, scoring_pass: ScoringPass) -> Prompts:
    render, continuation = task.model.tokenizer.render_split, CONTINUATION[task.judge.readout]
    chats = scoring_pass.chats(task.judge)
    return {name: render(chat, MARKER, continuation) for name, chat in chats.items()}


def _within_budget(task: JudgeTask, passes: Sequence[ScoringPass], prompts: Sequence[Prompts]) -> Sequence[ScoringPass]:
    """The passes without problems that are over a local judge's budget in any of them: passes stay comparable.

    Raises:
      TooShort: none is left.
    """
    longest: dict[str, int] = {}
    for of_pass in prompts:
        for name, prompt in of_pass.items():
            longest[name] = max(longest.get(name, 0), prompt.frame_tokens)
    key, budget = f"judges.{task.name}.max_context_tokens", task.judge.max_context_tokens
    long = {name for name, tokens in longest.items() if tokens > budget}
    if not long:
        return passes
    if len(long) == len(longest):
        raise TooShort(f"config.{key}: got {budget}, expected at least {min(longest.values())}, the shortest prompt")
    say(f"{task.name}: left out {len(long)} problems over {key}")
    return [p._replace(traces=[t for t in p.traces if t.rollout.problem.id not in long]) for p in passes]


def _draw_repeated(task: JudgeTask, first: ScoringPass) -> list[Trace]:
    """Whole rollouts to ask about several times, as the first pass does, which lack an answer."""
    repeats = task.config.repeats
    if not repeats.rollouts or task.judge.backend == "function" or task.judge.readout == "logits":  # no chance there
        return []
    drawn = draw_some(first.traces, repeats.rollouts, task.config.seed)
    return [trace for trace in drawn if not all(task.answered(first, trace, number) for number in task.repeats)]


def _whole_prompt(task: JudgeTask, prompts: Prompts, trace: Trace) -> list[int]:
    """All that a judge model reads of a rollout; nothing where it is over the budget."""
    prompt = prompts[trace.rollout.problem.id]
    tail = prompt.tail_within(trace.text, task.judge.max_trace_tokens)
    return [] if tail is None else [*prompt.head, *tail]


# ------------------------------------------------------------------------------------------------ backends
# Each makes what scores a pass, as in training, and what asks about whole rollouts several times.

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
        ids = {_repeat_name(trace): _whole_prompt(task, prompts, trace) for trace in traces}
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


# ------------------------------------------------------------------------------------------------ waves


def _score_pass(
    task: JudgeTask, scoring_pass: ScoringPass, scorer: AnyScorer, shared_tokens: Mapping[str, int]
) -> bool:
    """Scores wave after wave of a pass, as in training.

    Args:
      shared_tokens: that are read once for all traces of a problem in a call, by its id.
    """
    wave_size = task.config.wave
    waves = problem_waves(scoring_pass.traces, wave_size, task.config.group)
    for number, wave in enumerate(waves, 1):
        if task.stop.agreed():
            return False
        start = time.monotonic()
        problems = [scoring_pass.shown(traces[0].rollout.problem) for traces in wave]
        queries = [[Query(g, 0, trace.text) for g, trace in enumerate(traces)] for traces in wave]
        empty = wave_size - len(wave)
        judgements = scorer.score([*problems, *[problems[0]] * empty], [*queries, *[[]] * empty], 1)
        asked, seconds = sum(map(len, wave)), time.monotonic() - start
        tokens = judgements.tokens + sum(shared_tokens.get(problem.id, 0) for problem in problems)
        rows = []
        for i, g, trace in ((i, g, trace) for i, traces in enumerate(wave) for g, trace in enumerate(traces)):
            score = float(judgements.score_PGN[i, g, 0]) if judgements.valid_PGN[i, g, 0] else None
            text, cut = judgements.text.get((i, g, 0)), bool(judgements.cut_PGN[i, g, 0])
            answer = {"score": score, "text": text, "cut": cut, "tokens": tokens / asked, "seconds": seconds / asked}
            digits = {"digits": list(of_trace)} if (of_trace := judgements.digits.get((i, g, 0))) else {}
            rows.append(task.question(scoring_pass, trace, 0) | answer | digits)
        task.scores.add(rows)
        say(f"{task.name}, {scoring_pass.name}: {number}/{len(waves)} calls  {asked / seconds:.1f} scores/s")
    return True


def problem_waves(traces: Sequence[Trace], wave: int, group: int) -> list[list[list[Trace]]]:
    """Calls: up to `wave` problems with up to `group` traces each; a problem with more comes several times."""
    of_problem: dict[str, list[Trace]] = {}
    for trace in traces:
        of_problem.setdefault(trace.rollout.problem.id, []).append(trace)
    parts = [some[start : start + group] for some in of_problem.values() for start in range(0, len(some), group)]
    return [parts[start : start + wave] for start in range(0, len(parts), wave)]


def _score_repeats(
    task: JudgeTask, first: ScoringPass, traces: Sequence[Trace], backend: EndpointBackend | ModelBackend
) -> bool:
    """Asks about whole rollouts several times, as the first pass does."""
    size, calls = backend.repeat_calls()
    repeat = backend.repeater(first, traces)
    for start in range(0, len(traces), size):
        for numbers in calls:
            some = traces[start : start + size]
            wave = [trace for trace in some if not all(task.answered(first, trace, number) for number in numbers)]
            if not wave:
                continue
            if task.stop.agreed():
                return False
            started = time.monotonic()
            answers = repeat(wave, numbers)
            seconds = (time.monotonic() - started) / (len(wave) * len(numbers))
            rows = []
            for trace, of_trace in zip(wave, answers, strict=True):
                for number, answer in zip(numbers, of_trace, strict=True):
                    score = None if answer.digit is None else normalise(answer.digit)
                    row = {"score": score, "text": answer.text, "cut": answer.cut}
                    row |= {"tokens": answer.tokens, "seconds": seconds}
                    rows.append(task.question(first, trace, number) | row)
            task.scores.add(rows)
        say(f"{task.name}, repeats: {min(start + size, len(traces))}/{len(traces)} rollouts")
    return True
