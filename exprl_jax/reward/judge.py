"""The judge at work: traces in, scores out.  Text on the host, forwards on the mesh."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from exprl_jax import config
from exprl_jax.data.problems import Problem
from exprl_jax.data.tokenizer import SplitPrompt, Tokenizer
from exprl_jax.mesh import fetch_rows, put_rows
from exprl_jax.model.decoder import Params
from exprl_jax.programs import Programs
from exprl_jax.records import Context, Draw, Rows
from exprl_jax.reward.judge_prompts import CONTINUATION, judge_messages, normalise, parse_score

# Stands for the trace in a prompt; nobody can guess it, so no problem contains it.
_MARKER = f"trace{secrets.token_hex(16)}"


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


def split_prompt(how: config.Judge, tokenizer: Tokenizer, problem: Problem) -> SplitPrompt:
    """The judge's prompt for a problem, with a hole for the trace.

    Raises:
      ValueError: the problem has no reference.
    """
    if problem.reference is None:
        raise ValueError(f"problem {problem.id!r} has no reference solution, which the judge scores against")
    messages = judge_messages(
        problem.problem, problem.choices, problem.reference, problem.domain, how.unit, how.readout, _MARKER
    )
    return tokenizer.render_split(messages, _MARKER, CONTINUATION[how.readout])


@dataclasses.dataclass(frozen=True)
class Judge:
    """A judge bound to a mesh and to the problems it will see.

    Attributes:
      prompts: by problem id.
      context_width, row_width: slots for the longest prompt head, and for a trace with the closing instruction.
      problems: a wave's problems, over all processes.
      group: queries of one problem scored together (J).
    """

    how: config.Judge
    tokenizer: Tokenizer
    params: Params
    programs: Programs
    mesh: Mesh
    prompts: Mapping[str, SplitPrompt]
    context_width: int
    row_width: int
    problems: int
    group: int

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
        waiting: list[list[tuple[Query, list[int]]]] = []
        for i, (problem, of_problem) in enumerate(zip(problems, queries, strict=True)):
            tails = [(query, self.prompts[problem.id].tail(query.trace)) for query in of_problem]
            for query, tail in tails:
                asked[i, query.g, query.n] = True
                cut[i, query.g, query.n] = len(tail) > self.row_width
            waiting.append([(query, tail) for query, tail in tails if len(tail) <= self.row_width])

        # Every process makes the same number of calls: a call is one program over the whole mesh.
        calls = _largest(max(-(-len(of_problem) // self.group) for of_problem in waiting))
        prefix = self.programs.judge_prefill(self.params, self._context(problems)) if calls else None
        for call in range(calls):
            batch = [of_problem[call * self.group : (call + 1) * self.group] for of_problem in waiting]
            rows = self._rows(batch)
            tokens += sum(len(tail) for of_problem in batch for _, tail in of_problem)
            if self.how.readout == "logits":
                likert = self._likert(fetch_rows(self.programs.judge(self.params, prefix, rows)))
                for i, of_problem in enumerate(batch):
                    for j, (query, _) in enumerate(of_problem):
                        score[i, query.g, query.n] = normalise(likert[i, j])
                        valid[i, query.g, query.n] = True
                continue
            answers = fetch_rows(self.programs.judge(self.params, prefix, rows, self._greedy(batch)))
            for i, of_problem in enumerate(batch):
                for j, (query, _) in enumerate(of_problem):
                    at, written = (i, query.g, query.n), answers.mask_PGR[i, j]
                    text[at] = self.tokenizer.decode(answers.tokens_PGR[i, j][written].tolist())
                    tokens += int(written.sum())
                    cut[at] = not answers.ended_PG[i, j]
                    if (digit := parse_score(text[at])) is not None:
                        score[at], valid[at] = normalise(digit), True
        return Judgements(score, valid, asked, cut, text, tokens)

    def _context(self, problems: Sequence[Problem]) -> Context:
        heads = [self.prompts[problem.id].head for problem in problems]
        return put_rows(self.mesh, pad_contexts(heads, self.context_width), self.problems)

    def _rows(self, batch: Sequence[Sequence[tuple[Query, list[int]]]]) -> Rows:
        tokens = np.full((len(batch), self.group, self.row_width), self.tokenizer.pad_id, np.int32)
        start = np.full((len(batch), self.group), self.row_width - 1, np.int32)
        for i, of_problem in enumerate(batch):
            for j, (_, tail) in enumerate(of_problem):
                start[i, j] = self.row_width - len(tail)
                tokens[i, j, start[i, j] :] = tail
        return put_rows(self.mesh, Rows(tokens, start), self.problems)

    def _greedy(self, batch: Sequence[Sequence[Any]]) -> Draw:
        """Greedy decoding of the rows that hold a query: the loop does not wait for the others."""
        mine = len(batch)
        live = np.arange(self.group) < np.array([len(of_problem) for of_problem in batch])[:, None]
        temperature = np.zeros((mine, self.group), np.float32)
        draw = Draw(np.uint32(0), np.int32(0), np.zeros(mine, np.uint32), temperature, live)
        return put_rows(self.mesh, draw, self.problems)

    def _likert(self, probability_PJ5: np.ndarray) -> np.ndarray:
        digits = np.arange(1, 6)
        if self.how.logits_value == "argmax":
            return digits[probability_PJ5.argmax(-1)]
        return probability_PJ5.astype(np.float64) @ digits


def pad_contexts(contexts: Sequence[Sequence[int]], width: int) -> Context:
    """Right-pads token lists to [P, width]; the padding is never attended to."""
    tokens = np.zeros((len(contexts), width), np.int32)
    for row, context in zip(tokens, contexts, strict=True):
        row[: len(context)] = context
    return Context(tokens, np.array([len(context) for context in contexts], np.int32))


def _largest(count: int) -> int:
    if jax.process_count() == 1:
        return count
    return int(np.max(multihost_utils.process_allgather(np.int32(count))))
