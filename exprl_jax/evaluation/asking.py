"""Fixed rollouts put to a judge: pass after pass, wave after wave, from where its ledger ends."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from exprl_jax import config as schema
from exprl_jax import programs as programs_room
from exprl_jax.config import Calibrate
from exprl_jax.data.problems import Problem
from exprl_jax.data.tokenizer import Message, SplitPrompt
from exprl_jax.evaluation.fixed_rollouts import Ledger, Rollout, renamed
from exprl_jax.hosts import say
from exprl_jax.model.decoder import Params
from exprl_jax.reward.answers import opened_thought
from exprl_jax.reward.endpoint import ChatClient
from exprl_jax.reward.endpoint_judge import EndpointJudge
from exprl_jax.reward.judge import Judge, JudgePrompts
from exprl_jax.reward.judge_prompts import (
    CONTINUATION,
    Unit,
    blind_messages,
    judge_messages,
    normalise,
    parse_score,
    reference_last_messages,
)
from exprl_jax.reward.judgements import MARKER, Query, fill, needed_reference
from exprl_jax.reward.judges import check_judge_lengths
from exprl_jax.reward.verifiers.verdict import Verdict
from exprl_jax.rollout.call import make_prompts, padded_width, texts_of
from exprl_jax.run.stopping import StopRequest
from exprl_jax.weights.language_model import load_params, open_model

SCORE_KEY = ("judge", "condition", "order", "repeat", "id", "rollout", "segment")


class Trace(NamedTuple):
    """Something to be judged: a whole rollout, or what ends with one of its segments.

    Attributes:
      segment: its number; None for a whole rollout.
      text: what the judge sees.
      ids: the policy's tokens up to the segment's end; empty for a whole rollout.
    """

    rollout: Rollout
    segment: int | None
    text: str
    ids: tuple[int, ...]


class Pass(NamedTuple):
    """One way in which a judge is asked about some traces.

    Attributes:
      condition: which reference it sees: `correct`, `none` or `wrong`.
      order: `trace_last`, as in training, or `reference_last`.
    """

    condition: str
    order: str
    unit: Unit
    traces: Sequence[Trace]

    def messages(self, problem: Problem, wrong: Mapping[str, str], readout: str) -> list[Message]:
        """The prompt for a problem, with the marker in the trace's place."""
        if self.condition == "none":
            return blind_messages(problem.problem, problem.choices, problem.domain, readout, MARKER)
        reference = wrong[problem.id] if self.condition == "wrong" else needed_reference(problem)
        make = judge_messages if self.order == "trace_last" else reference_last_messages
        return make(problem.problem, problem.choices, reference, problem.domain, self.unit, readout, MARKER)


def says_something(problem: Problem, verdict: Verdict) -> bool:
    """Whether a verdict is about the rollout: a program that is too slow is wrong, an answer that could not be compared
    in time is neither."""
    return verdict != Verdict.missing and (verdict != Verdict.timed_out or problem.kind == "code")


def chosen(rollouts: Sequence[Rollout], count: int, seed: int) -> list[Rollout]:
    """Some rollouts at random, in their order."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed])))
    return [rollouts[i] for i in sorted(rng.permutation(len(rollouts))[:count].tolist())]


class Asking:
    """A judge of the config, with nothing loaded until something is to be asked."""

    def __init__(self, config: Calibrate, name: str, how: schema.Judge, mesh: Mesh):
        """Finds a local judge's files.

        Raises:
          ValueError: the model cannot be opened or has too short a context, or an endpoint is to repeat itself.
        """
        self._config, self._name, self._how, self._mesh = config, name, how, mesh
        if how.backend == "local":
            self._model = open_model(how.model)
            check_judge_lengths(how, self._model.arch)

    def ask(self, passes: Sequence[Pass], wrong: Mapping[str, str], scores: Ledger, stop: StopRequest) -> bool:
        """Asks what is not in the ledger; False where it was stopped before the end."""
        passes = [each._replace(unit=self._how.unit) if each.unit == "prefix" else each for each in passes]
        messages = [{t.rollout.problem.id: t.rollout.problem for t in each.traces} for each in passes]
        messages = [
            {name: each.messages(problem, wrong, self._how.readout) for name, problem in of_pass.items()}
            for each, of_pass in zip(passes, messages, strict=True)
        ]
        with contextlib.ExitStack() as held:
            if self._how.backend == "local":
                return self._ask_model(passes, messages, scores, stop)
            client = held.enter_context(ChatClient(self._how.endpoint))
            for each, of_pass in zip(passes, messages, strict=True):
                judge = EndpointJudge(self._how, client, of_pass, {}, self._config.group)
                if not self._run(each, self._waiting(each, each.traces, scores), judge, {}, scores, stop):
                    return False
            return self._repeat_endpoint(client, self._unrepeated(passes[0].traces, scores), messages[0], scores, stop)

    def _ask_model(self, passes, messages, scores, stop) -> bool:
        how, config, tokenizer = self._how, self._config, self._model.tokenizer
        prompts = [
            {name: tokenizer.render_split(chat, MARKER, CONTINUATION[how.readout]) for name, chat in of_pass.items()}
            for of_pass in messages
        ]
        # A problem that is over the budget in one pass is left out of all, so that passes stay comparable.
        length = [(name, len(p.head) + len(p.suffix)) for of_pass in prompts for name, p in of_pass.items()]
        long = {name for name, tokens in length if tokens > how.max_context_tokens}
        if len(long) == len({name for name, _ in length}):
            raise ValueError(
                f"config.judges.{self._name}.max_context_tokens: got {how.max_context_tokens}, expected at least "
                f"{min(max(tokens for other, tokens in length if other == name) for name in long)}, the shortest prompt"
            )
        if long:
            say(f"{self._name}: left out {len(long)} problems over judges.{self._name}.max_context_tokens")
        kept = [[t for t in each.traces if t.rollout.problem.id not in long] for each in passes]
        waiting = [self._waiting(each, traces, scores) for each, traces in zip(passes, kept, strict=True)]
        repeated = self._repeated(kept[0], prompts[0], scores)
        if not any(waiting) and not repeated:
            return True
        say(f"{self._name}: judge {how.model.weights}")
        params = load_params(self._model, self._mesh, config.seed)
        programs = programs_room.build_judge(how, self._mesh, self._model)
        for each, traces, of_pass in zip(passes, waiting, prompts, strict=True):
            # Passes of one order share their widths, so that they compile once.
            alike = [
                p for other, ps in zip(passes, prompts, strict=True) if other.order == each.order for p in ps.items()
            ]
            fitting = [prompt for name, prompt in alike if name not in long]
            judge = Judge(
                config=how,
                tokenizer=tokenizer,
                params=params,
                programs=programs,
                mesh=self._mesh,
                prompts=JudgePrompts(of_pass, {}),
                context_width=padded_width(max(len(prompt.head) for prompt in fitting)),
                row_width=padded_width(how.max_trace_tokens + max(len(prompt.suffix) for prompt in fitting)),
                problems=config.wave,
                group=config.group,
            )
            if not self._run(each, traces, judge, {name: len(p.head) for name, p in of_pass.items()}, scores, stop):
                return False
        return self._repeat(repeated, params, scores, stop) if repeated else True

    def _waiting(self, each: Pass, traces: Sequence[Trace], scores: Ledger) -> list[Trace]:
        return [trace for trace in traces if scores.key_of(self._row(each, trace, 0)) not in scores]

    def _row(self, each: Pass, trace: Trace, repeat: int) -> dict[str, Any]:
        return {
            "judge": self._name,
            "condition": each.condition,
            "order": each.order,
            "repeat": repeat,
            "id": trace.rollout.problem.id,
            "rollout": trace.rollout.number,
            "segment": trace.segment,
            "fingerprint": trace.rollout.fingerprint,
        }

    def _has(self, each: Pass, trace: Trace, repeat: int, scores: Ledger) -> bool:
        return scores.key_of(self._row(each, trace, repeat)) in scores

    def _run(self, each: Pass, traces: Sequence[Trace], judge, heads: Mapping[str, int], scores: Ledger, stop) -> bool:
        """Wave after wave of one pass; `heads` are tokens that a local judge reads once for a problem."""
        waves = list(_waves(traces, self._config.wave, self._config.group))
        for number, wave in enumerate(waves, 1):
            if stop.agreed():
                return False
            start = time.monotonic()
            problems = [of_problem[0].rollout.problem for of_problem in wave]
            queries = [[Query(g, 0, trace.text) for g, trace in enumerate(of_problem)] for of_problem in wave]
            filling = self._config.wave - len(wave)
            said = judge.score([*problems, *[problems[0]] * filling], [*queries, *[[]] * filling], 1)
            asked = sum(map(len, wave))
            tokens = said.tokens + sum(heads.get(problem.id, 0) for problem in problems)
            seconds = time.monotonic() - start
            rows = []
            for i, of_problem in enumerate(wave):
                for g, trace in enumerate(of_problem):
                    at = i, g, 0
                    score = float(said.score_PGN[at]) if said.valid_PGN[at] else None
                    rows.append(
                        self._row(each, trace, 0)
                        | {"score": score, "text": said.text.get(at), "cut": bool(said.cut_PGN[at])}
                        | {"tokens": tokens / asked, "seconds": seconds / asked}
                    )
            scores.add(rows)
            say(f"{self._name}, {_name(each)}: {number}/{len(waves)} calls  {asked / seconds:.1f} scores/s")
        return True

    # ------------------------------------------------------------------------------------------------ repeats

    def _repeated(
        self, traces: Sequence[Trace], prompts: Mapping[str, SplitPrompt], scores: Ledger
    ) -> list[tuple[Trace, list[int]]]:
        """Rollouts to ask about several times, each with its whole prompt; none for `logits`, which holds no chance."""
        found = []
        for trace in self._unrepeated(traces, scores):
            prompt = prompts[trace.rollout.problem.id]
            tail = prompt.tail(trace.text)
            if len(tail) <= self._how.max_trace_tokens + len(prompt.suffix):
                found.append((trace, [*prompt.head, *tail]))
        return found

    def _unrepeated(self, traces: Sequence[Trace], scores: Ledger) -> list[Trace]:
        """Of the rollouts to ask about several times, those that lack an answer; none for `logits`."""
        repeats = self._config.repeats
        if not repeats.rollouts or self._how.readout == "logits":
            return []
        whole = {trace.rollout: trace for trace in traces}
        found = [whole[rollout] for rollout in chosen(list(whole), repeats.rollouts, self._config.seed)]
        places = range(1, repeats.count + 1)
        return [t for t in found if any(scores.key_of(self._row(_REPEATS, t, k)) not in scores for k in places)]

    def _repeat_endpoint(
        self,
        client: ChatClient,
        traces: Sequence[Trace],
        chats: Mapping[str, Sequence[Message]],
        scores: Ledger,
        stop: StopRequest,
    ) -> bool:
        """The n-th answers to all rollouts have the seed `config.seed` + n."""
        config, size = self._config, self._config.wave * self._config.group
        for start in range(0, len(traces), size):
            for repeat in range(1, config.repeats.count + 1):
                if stop.agreed():
                    return False
                begun = time.monotonic()
                wave = [t for t in traces[start : start + size] if not self._has(_REPEATS, t, repeat, scores)]
                if not wave:
                    continue
                sampling = {"temperature": config.repeats.temperature, "seed": config.seed + repeat}
                requests = [fill(chats[trace.rollout.problem.id], trace.text) for trace in wave]
                pending = client.submit(requests, self._how.max_tokens, "repeated scores", sampling=sampling)
                replies = pending.result()
                seconds = (time.monotonic() - begun) / len(wave)
                rows = []
                for trace, reply in zip(wave, replies, strict=True):
                    digit = parse_score(reply.text, at_end=reply.cut)
                    rows.append(
                        self._row(_REPEATS, trace, repeat)
                        | {"score": None if digit is None else normalise(digit)}
                        | {"text": reply.text if reply.answered else None, "cut": reply.cut, "seconds": seconds}
                        | {"tokens": reply.prompt_tokens + reply.completion_tokens}
                    )
                scores.add(rows)
        return True

    def _repeat(self, repeated: Sequence[tuple[Trace, list[int]]], params: Params, scores: Ledger, stop) -> bool:
        config, how = self._config, self._how
        sampler = programs_room.build_sampler(self._model, self._mesh, max_tokens=how.max_tokens, wave=config.wave)
        count = config.repeats.count
        problems = [renamed(t.rollout.problem, f"{t.rollout.problem.id}#{t.rollout.number}") for t, _ in repeated]
        prompts = make_prompts({p.id: ids for p, (_, ids) in zip(problems, repeated, strict=True)})
        for start in range(0, len(repeated), config.wave):
            if stop.agreed():
                return False
            begun = time.monotonic()
            wave = list(zip(problems, repeated, strict=True))[start : start + config.wave]
            filling = [wave[0]] * (config.wave - len(wave))
            live_P = np.arange(config.wave) < len(wave)
            answers = sampler(
                params,
                prompts,
                [problem for problem, _ in [*wave, *filling]],
                group=count,
                temperature=config.repeats.temperature,
                seed=config.seed,
                step=0,
                attempt=0,
                live_P=live_P,
            )
            _, texts = texts_of(answers, self._model.tokenizer.decode)
            seconds = (time.monotonic() - begun) / (len(wave) * count)
            rows = []
            for i, (_, (trace, ids)) in enumerate(wave):
                opened = opened_thought(self._model.tokenizer.decode(ids))
                for g, text in enumerate(texts[i]):
                    digit = parse_score(opened + text)
                    tokens = len(ids) / count + int(answers.mask_PGR[i, g].sum())
                    rows.append(
                        self._row(_REPEATS, trace, g + 1)
                        | {"score": None if digit is None else normalise(digit), "text": text}
                        | {"cut": not bool(answers.ended_PG[i, g]), "tokens": tokens, "seconds": seconds}
                    )
            scores.add(rows)
            say(f"{self._name}, repeats: {start + len(wave)}/{len(repeated)} rollouts, {count} times each")
        return True


_REPEATS = Pass("correct", "trace_last", "outcome", ())


def _name(each: Pass) -> str:
    if each.unit != "outcome":
        return "prefixes"
    return each.condition if each.order == "trace_last" else each.order


def _waves(traces: Sequence[Trace], wave: int, group: int) -> Iterator[list[list[Trace]]]:
    """Calls: up to `wave` problems with up to `group` traces each; a problem with more comes several times."""
    of: dict[str, list[Trace]] = {}
    for trace in traces:
        of.setdefault(trace.rollout.problem.id, []).append(trace)
    parts = [each[start : start + group] for each in of.values() for start in range(0, len(each), group)]
    for start in range(0, len(parts), wave):
        yield parts[start : start + wave]
