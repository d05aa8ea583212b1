"""A judge of a calibration asked about fixed rollouts: pass after pass, wave after wave, from where its ledger ends.

    passes ─ prompts, budgets ─→ what has no answer yet ─ waves ─→ a backend: model, endpoint, function ─→ scores.jsonl

Scores are given as in training, by `Judge`, `EndpointJudge` and `FunctionJudge`; only the repeats are asked for in
another way.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence

from jax.sharding import Mesh

from exprl_jax import programs
from exprl_jax.evaluation.judge_backends import EndpointBackend, FunctionBackend, ModelBackend
from exprl_jax.evaluation.judge_task import AnyScorer, JudgeTask, Prompts, TooShort, whole_prompt
from exprl_jax.evaluation.passes import ScoringPass, Trace, draw_some
from exprl_jax.hosts import say
from exprl_jax.reward.endpoint import ChatClient
from exprl_jax.reward.judge_prompts import CONTINUATION, normalise
from exprl_jax.reward.judgements import MARKER, Query
from exprl_jax.reward.judges import judge_pool
from exprl_jax.weights.language_model import load_params


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
        repeated = [trace for trace in repeated if whole_prompt(task, prompts[0], trace)]
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
