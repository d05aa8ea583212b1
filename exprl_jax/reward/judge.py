"""The judge at work: traces in, scores out.  Text on the host, forwards on the mesh."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from jax.sharding import Mesh

from exprl_jax import config as schema
from exprl_jax.data.problems import Problem
from exprl_jax.data.tokenizer import SplitPrompt, Tokenizer
from exprl_jax.hosts import fetch_rows, largest_over_processes, put_rows
from exprl_jax.model.decoder import Params
from exprl_jax.records import Draw, Rows
from exprl_jax.reward.judge_prompts import CONTINUATION, Unit, judge_messages, normalise, parse_score
from exprl_jax.reward.verifiers import open_ended
from exprl_jax.reward.verifiers.open_ended import parse_verdict, verdict_from_digits, verify_messages
from exprl_jax.reward.verifiers.verdict import Verdict
from exprl_jax.rollout.call import pad_contexts

# Stands for the trace in a prompt; nobody can guess it, so no problem contains it.
_MARKER = f"trace{secrets.token_hex(16)}"


# Where nothing is asked about a problem.
_NOTHING = SplitPrompt((), (), None)


class Query(NamedTuple):
    """One thing to score: rollout `g`'s trace up to (or of) segment `n`."""

    g: int
    n: int
    trace: str


class Judgements(NamedTuple):
    """What the judge said of this process's problems.

    Attributes:
      score_PGN: float64, normalised to [0, 1]; 0 where not valid.
      valid_PGN: bool, a score was given.
      asked_PGN: bool, a score was wanted.
      cut_PGN: bool, the answer (`text`) reached its budget, or the trace did not fit; not valid then unless parsed.
      text: what the judge wrote, by (problem, g, n); empty for `logits`.
      tokens: trace tokens read and answer tokens written.
    """

    score_PGN: np.ndarray
    valid_PGN: np.ndarray
    asked_PGN: np.ndarray
    cut_PGN: np.ndarray
    text: Mapping[tuple[int, int, int], str]
    tokens: int

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by name."""
        return {name: getattr(self, name) for name in ("score_PGN", "valid_PGN", "asked_PGN", "cut_PGN")}


class _Answer(NamedTuple):
    """The judge's answer about one text: what it wrote (`text`), or the digits' probabilities (`logits`)."""

    problem: int
    query: int
    text: str
    probability_5: np.ndarray
    cut: bool
    tokens: int


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
    messages = judge_messages(
        problem.problem, problem.choices, needed_reference(problem), problem.domain, unit, judge_config.readout, _MARKER
    )
    return tokenizer.render_split(messages, _MARKER, CONTINUATION[judge_config.readout])


def verify_prompt(judge_config: schema.Judge, tokenizer: Tokenizer, problem: Problem) -> SplitPrompt:
    """The judge's prompt for saying whether a response's answer is the problem's, with a hole for the response."""
    messages = verify_messages(problem.problem, problem.answer, judge_config.readout, _MARKER)
    return tokenizer.render_split(messages, _MARKER, open_ended.CONTINUATION[judge_config.readout])


def needed_reference(problem: Problem) -> str:
    """The problem's reference solution.

    Raises:
      ValueError: it has none.
    """
    if problem.reference is None:
        raise ValueError(f"problem {problem.id!r} has no reference solution, which the judge scores against")
    return problem.reference


@dataclasses.dataclass(frozen=True)
class Judge:
    """A judge model on the mesh, bound to the problems it will see.

    Attributes:
      context_width, row_width: slots for the longest prompt head, and for a trace with the closing instruction.
      problems: a wave's problems, over all processes.
      group: queries of one problem scored together (J).
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
    on_mesh: ClassVar[bool] = True

    def score(self, problems: Sequence[Problem], queries: Sequence[Sequence[Query]], segments: int) -> Judgements:
        """Scores every query against its problem's reference; one prefill a problem serves all of them.

        Args:
          problems: this process's problems of a wave.
          queries: of each problem; any number.
          segments: N of the result.
        """
        shape = (len(problems), self.group, segments)
        score, cut = np.zeros(shape), np.zeros(shape, bool)
        valid, asked, text, tokens = cut.copy(), cut.copy(), {}, 0
        prompts = _prompts_of(self.prompts.score, problems, queries)
        traces = [[query.trace for query in of_problem] for of_problem in queries]
        for i, of_problem in enumerate(queries):
            for query in of_problem:
                asked[i, query.g, query.n] = cut[i, query.g, query.n] = True
        for answer in self._ask(prompts, traces):
            query = queries[answer.problem][answer.query]
            at = answer.problem, query.g, query.n
            tokens, cut[at] = tokens + answer.tokens, answer.cut
            if self.config.readout == "logits":
                score[at], valid[at] = normalise(self._likert(answer.probability_5)), True
                continue
            text[at] = answer.text
            if (digit := parse_score(answer.text)) is not None:
                score[at], valid[at] = normalise(digit), True
        return Judgements(score, valid, asked, cut, text, tokens)

    def verify(self, problems: Sequence[Problem], responses: Sequence[Sequence[str]]) -> list[list[Verdict]]:
        """Whether each response to an open-ended question arrives at its answer; `missing` where the judge does not
        say.

        Args:
          problems: this process's problems of a wave.
          responses: of each problem, any number; none for problems that have other verifiers.
        """
        prompts = _prompts_of(self.prompts.verify, problems, responses)
        verdicts = [[Verdict.missing] * len(of_problem) for of_problem in responses]
        for answer in self._ask(prompts, responses):
            verdict = (
                verdict_from_digits(answer.probability_5)
                if self.config.readout == "logits"
                else parse_verdict(answer.text)
            )
            verdicts[answer.problem][answer.query] = verdict
        return verdicts

    def report(self) -> dict[str, float]:
        """Metrics of its own: none."""
        return {}

    def _ask(self, prompts: Sequence[SplitPrompt], texts: Sequence[Sequence[str]]) -> Iterator[_Answer]:
        """The judge's answer to each text in its problem's prompt; none to a text that does not fit."""
        waiting: list[list[tuple[int, list[int]]]] = []
        for prompt, of_problem in zip(prompts, texts, strict=True):
            tails = [(j, prompt.tail(text)) for j, text in enumerate(of_problem)]
            waiting.append([(j, tail) for j, tail in tails if len(tail) <= self.row_width])
        # Every process makes the same number of calls: a call is one program over the whole mesh.
        calls = largest_over_processes(max(-(-len(of_problem) // self.group) for of_problem in waiting))
        if not calls:
            return
        contexts = pad_contexts([prompt.head for prompt in prompts], self.context_width)
        prefix = self.programs.prefill(self.params, put_rows(self.mesh, contexts, self.problems))
        for call in range(calls):
            batch = [of_problem[call * self.group : (call + 1) * self.group] for of_problem in waiting]
            rows = self._rows(batch)
            if self.config.readout == "logits":
                probability_PJ5 = fetch_rows(self.programs.judge(self.params, prefix, rows))
                for i, of_problem in enumerate(batch):
                    for row, (j, tail) in enumerate(of_problem):
                        yield _Answer(i, j, "", probability_PJ5[i, row], False, len(tail))
                continue
            answers = fetch_rows(self.programs.judge(self.params, prefix, rows, self._greedy(batch)))
            for i, of_problem in enumerate(batch):
                for row, (j, tail) in enumerate(of_problem):
                    written = answers.mask_PGR[i, row]
                    text = self.tokenizer.decode(answers.tokens_PGR[i, row][written].tolist())
                    ended = bool(answers.ended_PG[i, row])
                    yield _Answer(i, j, text, np.zeros(0), not ended, len(tail) + int(written.sum()))

    def _rows(self, batch: Sequence[Sequence[tuple[int, list[int]]]]) -> Rows:
        tokens = np.full((len(batch), self.group, self.row_width), self.tokenizer.pad_id, np.int32)
        start = np.full((len(batch), self.group), self.row_width - 1, np.int32)
        for i, of_problem in enumerate(batch):
            for row, (_, tail) in enumerate(of_problem):
                start[i, row] = self.row_width - len(tail)
                tokens[i, row, start[i, row] :] = tail
        return put_rows(self.mesh, Rows(tokens, start), self.problems)

    def _greedy(self, batch: Sequence[Sequence[Any]]) -> Draw:
        """Greedy decoding of the rows that hold a query: the loop does not wait for the others."""
        mine = len(batch)
        live = np.arange(self.group) < np.array([len(of_problem) for of_problem in batch])[:, None]
        temperature = np.zeros((mine, self.group), np.float32)
        draw = Draw(np.uint32(0), np.int32(0), np.zeros(mine, np.uint32), temperature, live)
        return put_rows(self.mesh, draw, self.problems)

    def _likert(self, probability_5: np.ndarray) -> float:
        digits = np.arange(1, 6)
        if self.config.logits_value == "argmax":
            return digits[probability_5.argmax()]
        return probability_5.astype(np.float64) @ digits


class NoJudge:
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
    """

    prefill: Callable
    judge: Callable
