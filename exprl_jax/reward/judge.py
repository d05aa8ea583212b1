"""The judge at work: traces in, scores out.  Text on the host, forwards on the mesh."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from jax.sharding import Mesh

from exprl_jax import config as schema
from exprl_jax.data.problems import Problem
from exprl_jax.data.tokenizer import SplitPrompt, Tokenizer
from exprl_jax.hosts import fetch_rows, largest_over_processes, local_problems, put_rows
from exprl_jax.model.decoder import Params
from exprl_jax.records import Draw, Rows
from exprl_jax.reward.answers import opened_thought
from exprl_jax.reward.branching import (
    WRITTEN,
    BranchedTrace,
    branch_off,
    branch_tokens,
    fill_branch_rows,
    fill_traces,
    own_width,
)
from exprl_jax.reward.judge_prompts import CONTINUATION
from exprl_jax.reward.judgements import (
    MARKER,
    Answer,
    Judgements,
    Pending,
    Query,
    judgements_of,
    score_messages,
    verdict_messages,
    verdicts_of,
)
from exprl_jax.reward.rubric import Unit
from exprl_jax.reward.verifiers import open_ended
from exprl_jax.reward.verifiers.verdict import Verdict
from exprl_jax.rollout.call import pad_contexts, padded_width

# Where nothing is asked about a problem.
_NOTHING = SplitPrompt((), (), None)


@dataclasses.dataclass(frozen=True)
class JudgePrompts:
    """A problem's prompts, each with a hole for what is judged.

    Attributes:
      score: for a trace, against the reference.
      verify: for a response, against the final answer.
    """

    score: Mapping[str, SplitPrompt]
    verify: Mapping[str, SplitPrompt]

    def of(self, problem: str) -> list[SplitPrompt]:
        """All prompts of a problem, by its id."""
        return [prompts[problem] for prompts in (self.score, self.verify) if problem in prompts]


def score_prompt(judge_config: schema.Judge, tokenizer: Tokenizer, problem: Problem, unit: Unit) -> SplitPrompt:
    """The judge's prompt for a problem, with a hole for the trace.

    Raises:
      ValueError: the problem has no reference.
    """
    messages = score_messages(judge_config, problem, unit)
    return tokenizer.render_split(messages, MARKER, CONTINUATION[judge_config.readout])


def verify_prompt(judge_config: schema.Judge, tokenizer: Tokenizer, problem: Problem) -> SplitPrompt:
    """The judge's prompt for saying whether a response's answer is the problem's, with a hole for the response."""
    messages = verdict_messages(judge_config, problem)
    return tokenizer.render_split(messages, MARKER, open_ended.CONTINUATION[judge_config.readout])


class AnswersAtOnce:
    """A judge that has its answers when it has been asked: the mesh does one thing at a time."""

    def submit(
        self, problems: Sequence[Problem], queries: Sequence[Sequence[Query]], segments: int
    ) -> Pending[Judgements]:
        """`score`, in the form in which an endpoint is asked."""
        judgements = self.score(problems, queries, segments)
        return Pending(lambda: judgements)

    def submit_verify(
        self, problems: Sequence[Problem], responses: Sequence[Sequence[str]]
    ) -> Pending[list[list[Verdict]]]:
        """`verify`, in the form in which an endpoint is asked."""
        verdicts = self.verify(problems, responses)
        return Pending(lambda: verdicts)


@dataclasses.dataclass(frozen=True)
class Judge(AnswersAtOnce):
    """A judge model on the mesh, bound to the problems it will see.

    Attributes:
      context_width, row_width: slots for the longest prompt head, and for a trace with the closing instruction.
      problems: those that are asked about at a time, over all processes; a wave is some times as many.
      group: queries of one problem scored together (J).
      items: of the checklist that a problem's traces are scored against item by item, by its id; none for others.
    """

    config: schema.Judge
    tokenizer: Tokenizer
    params: Params
    programs: JudgePrograms
    mesh: Mesh
    prompts: JudgePrompts
    context_width: int
    row_width: int
    problems: int
    group: int
    items: Mapping[str, int] = dataclasses.field(default_factory=dict)
    on_mesh: ClassVar[bool] = True

    def score(self, problems: Sequence[Problem], queries: Sequence[Sequence[Query]], segments: int) -> Judgements:
        """Scores every query against its problem's reference; one prefill a problem serves all of them.

        Args:
          problems: this process's problems of a wave.
          queries: of each problem; any number.
          segments: N of the result.
        """
        prompts = _prompts_of(self.prompts.score, problems, queries)
        items = [self.items.get(problem.id, 0) for problem in problems]
        if segments > 1 and self.config.unit == "prefix" and self.programs.branches is not None:
            together = functools.partial(self._ask_branches, segments=segments)
            answers = self._some_at_a_time(together, prompts, queries)
        else:
            answers = self._ask(prompts, [[query.trace for query in of_problem] for of_problem in queries])
        return judgements_of(self.config, answers, queries, self.group, segments, items)

    def write(self, prompts: Sequence[SplitPrompt | None]) -> list[Answer]:
        """What the judge writes after each prompt with nothing in its hole; `text` alone.

        Args:
          prompts: as many as this process has problems in a wave, with None where nothing is to be written.
        """
        return list(self._ask([p or _NOTHING for p in prompts], [[] if p is None else [""] for p in prompts]))

    def verify(self, problems: Sequence[Problem], responses: Sequence[Sequence[str]]) -> list[list[Verdict]]:
        """Whether each response to an open-ended question arrives at its answer; `missing` where the judge does not
        say.

        Args:
          problems: this process's problems of a wave.
          responses: of each problem, any number; none for problems that have other verifiers.
        """
        return verdicts_of(self.submit_answers(problems, responses).result(), responses)

    def submit_answers(self, problems: Sequence[Problem], responses: Sequence[Sequence[str]]) -> Pending[list[Answer]]:
        """What `verify` makes its verdicts of."""
        answers = list(self._ask(_prompts_of(self.prompts.verify, problems, responses), responses))
        return Pending(lambda: answers)

    def report(self) -> dict[str, float]:
        """Metrics of its own: none."""
        return {}

    def _ask(self, prompts: Sequence[SplitPrompt], texts: Sequence[Sequence[str]]) -> Iterator[Answer]:
        """The judge's answer to each text in its problem's prompt; none to a text that does not fit."""
        yield from self._some_at_a_time(self._ask_some, prompts, texts)

    def _some_at_a_time(
        self, ask: Callable[..., Iterator[Answer]], prompts: Sequence[SplitPrompt], asked: Sequence[Sequence[Any]]
    ) -> Iterator[Answer]:
        """The answers that `ask` gives about as many of this process's problems at a time as it has rows for."""
        mine = len(local_problems(self.mesh, self.problems))
        for start in range(0, len(prompts), mine):
            for answer in ask(prompts[start : start + mine], asked[start : start + mine]):
                yield answer._replace(problem=answer.problem + start)

    def _ask_some(self, prompts: Sequence[SplitPrompt], texts: Sequence[Sequence[str]]) -> Iterator[Answer]:
        waiting: list[list[tuple[int, list[int]]]] = []
        for prompt, of_problem in zip(prompts, texts, strict=True):
            tails = [prompt.tail_within(text, self.config.max_trace_tokens) for text in of_problem]
            waiting.append([(j, tail) for j, tail in enumerate(tails) if tail is not None])
        # Every process makes the same number of calls: a call is one program over the whole mesh.
        calls = largest_over_processes(max(-(-len(of_problem) // self.group) for of_problem in waiting))
        if not calls:
            return
        # An answer goes on where the prompt has opened a thought.
        opened = [opened_thought(self.tokenizer.decode(prompt.suffix)) for prompt in prompts]
        prefix = self._prefill(prompts)
        for call in range(calls):
            batch = [of_problem[call * self.group : (call + 1) * self.group] for of_problem in waiting]
            rows = self._rows(batch)
            if self.config.readout == "logits":
                probability_PJ5 = fetch_rows(self.programs.judge(self.params, prefix, rows))
                for i, of_problem in enumerate(batch):
                    for row, (j, tail) in enumerate(of_problem):
                        yield Answer(i, j, None, probability_PJ5[i, row], False, len(tail))
                continue
            live = np.arange(self.group) < np.array([len(of_problem) for of_problem in batch])[:, None]
            answers = fetch_rows(self.programs.judge(self.params, prefix, rows, self._greedy(live)))
            for i, of_problem in enumerate(batch):
                for row, (j, tail) in enumerate(of_problem):
                    written = answers.mask_PGR[i, row]
                    text = self.tokenizer.decode(answers.tokens_PGR[i, row][written].tolist())
                    ended = bool(answers.ended_PG[i, row])
                    yield Answer(i, j, opened[i] + text, None, not ended, len(tail) + int(written.sum()))

    def _ask_branches(
        self, prompts: Sequence[SplitPrompt], queries: Sequence[Sequence[Query]], segments: int
    ) -> Iterator[Answer]:
        """The same for prefixes of rollouts, all of a rollout's in one row where they fit.

        Args:
          segments: most prefixes of a rollout.
        """
        written = self.config.readout == "text"
        width = padded_width(branch_tokens(self.config.max_trace_tokens, self._suffix, segments))
        own, most = (own_width(self._suffix), min(segments, WRITTEN)) if written else (width, segments)
        waiting: list[list[BranchedTrace]] = []
        for prompt, of_problem in zip(prompts, queries, strict=True):
            texts: dict[int, list[tuple[int, Sequence[int]]]] = {}
            for j, query in enumerate(of_problem):
                ids = prompt.encode(query.trace)
                if len(ids) <= self.config.max_trace_tokens:
                    texts.setdefault(query.g, []).append((j, ids))
            rows = (branch_off(of_rollout, prompt.suffix, width, most, own) for of_rollout in texts.values())
            waiting.append([row for of_rollout in rows for row in of_rollout])
        calls = largest_over_processes(max(-(-len(of_problem) // self.group) for of_problem in waiting))
        if not calls:
            return
        prefix = self._prefill(prompts)
        for call in range(calls):
            batch = [of_problem[call * self.group : (call + 1) * self.group] for of_problem in waiting]
            if written:
                yield from self._write_branches(prompts, prefix, batch, most)
                continue
            rows = fill_branch_rows(batch, self.group, width, segments, self.tokenizer.pad_id)
            rows = put_rows(self.mesh, rows, self.problems)
            probability_PGN5 = fetch_rows(self.programs.branches(self.params, prefix, rows))
            for i, of_problem in enumerate(batch):
                for g, row in enumerate(of_problem):
                    for n, (j, _, own) in enumerate(row.branches):
                        tokens = len(own) if n else len(row.trace) + len(own)
                        yield Answer(i, j, None, probability_PGN5[i, g, n], False, tokens)

    def _write_branches(
        self, prompts: Sequence[SplitPrompt], prefix: Any, batch: Sequence[Sequence[BranchedTrace]], most: int
    ) -> Iterator[Answer]:
        """What the judge writes about prefixes of up to `group` rollouts of each problem."""
        widths = padded_width(self.config.max_trace_tokens), own_width(self._suffix)
        rows, traces, asked_PQ = fill_traces(batch, self.group, most, *widths, self.tokenizer.pad_id)
        rows, traces = put_rows(self.mesh, (rows, traces), self.problems)
        rollouts = fetch_rows(self.programs.branches(self.params, prefix, rows, self._greedy(asked_PQ), traces))
        for i, of_problem in enumerate(batch):
            opened = opened_thought(self.tokenizer.decode(prompts[i].suffix))
            for g, row in enumerate(of_problem):
                for n, (j, _, own) in enumerate(row.branches):
                    q = g * most + n
                    written = rollouts.mask_PGR[i, q]
                    text = self.tokenizer.decode(rollouts.tokens_PGR[i, q][written].tolist())
                    read = len(own) if n else len(row.trace) + len(own)
                    cut = not bool(rollouts.ended_PG[i, q])
                    yield Answer(i, j, opened + text, None, cut, read + int(written.sum()))

    @property
    def _suffix(self) -> int:
        """Tokens of the longest closing instruction."""
        return max((len(prompt.suffix) for prompt in self.prompts.score.values()), default=0)

    def _prefill(self, prompts: Sequence[SplitPrompt]) -> Any:
        contexts = pad_contexts([prompt.head for prompt in prompts], self.context_width)
        return self.programs.prefill(self.params, put_rows(self.mesh, contexts, self.problems))

    def _rows(self, batch: Sequence[Sequence[tuple[int, list[int]]]]) -> Rows:
        tokens = np.full((len(batch), self.group, self.row_width), self.tokenizer.pad_id, np.int32)
        start = np.full((len(batch), self.group), self.row_width - 1, np.int32)
        for i, of_problem in enumerate(batch):
            for row, (_, tail) in enumerate(of_problem):
                start[i, row] = self.row_width - len(tail)
                tokens[i, row, start[i, row] :] = tail
        return put_rows(self.mesh, Rows(tokens, start), self.problems)

    def _greedy(self, live: np.ndarray) -> Draw:
        """Greedy decoding of the rows [P, J] that hold a query: the loop does not wait for the others."""
        temperature = np.zeros(live.shape, np.float32)
        budget = np.where(live, np.int32(self.config.max_tokens), np.int32(0))
        draw = Draw(np.uint32(0), np.int32(0), np.zeros(len(live), np.uint32), temperature, budget)
        return put_rows(self.mesh, draw, self.problems)


class NoJudge(AnswersAtOnce):
    """Stands where a run's rewards need no judge, and is asked nothing."""

    on_mesh = False

    def __init__(self, group: int):
        """Args: group: rollouts a problem."""
        self._group = group

    def score(self, problems: Sequence[Problem], queries: Sequence[Sequence[Query]], segments: int) -> Judgements:
        """No scores; no query may be given."""
        _refuse(queries)
        nothing = np.zeros((len(problems), self._group, segments), bool)
        return Judgements(nothing.astype(np.float64), nothing, nothing, nothing, {}, 0)

    def verify(self, problems: Sequence[Problem], responses: Sequence[Sequence[str]]) -> list[list[Verdict]]:
        """No verdicts; no response may be given."""
        _refuse(responses)
        return [[] for _ in problems]

    def report(self) -> dict[str, float]:
        """Metrics of its own: none."""
        return {}


def _refuse(asked: Sequence[Sequence[Any]]) -> None:
    if any(asked):
        raise ValueError("this run has no judge, and one was asked")


def _prompts_of(
    prompts: Mapping[str, SplitPrompt], problems: Sequence[Problem], asked: Sequence[Sequence[Any]]
) -> list[SplitPrompt]:
    """The prompt of each problem; an empty one where nothing is asked, for there may be none."""
    return [prompts[p.id] if of_problem else _NOTHING for p, of_problem in zip(problems, asked, strict=True)]


@dataclasses.dataclass(frozen=True)
class JudgePrograms:
    """What a judge model is asked with.  P is a wave's problems.

    Attributes:
      prefill: judge params, Context → Prefix.
      judge: judge params, Prefix, Rows → probabilities [P, J, 5] (`logits`); with a Draw more → Rollouts (`text`).
      branches: all prefixes of a rollout at once.  judge params, Prefix, BranchRows → probabilities [P, J, N, 5]
        (`logits`), or judge params, Prefix, Rows, Draw, Traces → Rollouts (`text`).  None where rows cannot branch: the
        TPU's kernel of `logits` knows only segments.
    """

    prefill: Callable
    judge: Callable
    branches: Callable | None = None
