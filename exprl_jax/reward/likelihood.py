r"""The policy's own likelihood of a problem's answer after a rollout: a reward without judge and verifier.

After RLPR (arXiv 2506.18254): the answer that the policy gave is replaced by the reference answer, and the reward is
the mean over the answer's tokens of the probability that the policy gives each.  VeriFree (2505.21493) takes their
product, which falls with the answer's length.

    what the policy wrote        … so x = 7, \boxed{7}.
    context                      … so x = 7, \boxed{          up to the last box
    answer                       8}                           the box's end too, or 1 were a good start of 12

A rollout without a box is followed by `The final answer is \boxed{`.  The context's text is encoded again, the answer
apart from it, so that an answer has the same tokens after every rollout.  Only this pass is given answers: what it
returns is one number a rollout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from exprl_jax.data.packing import Example, assign_rows, fill_rows
from exprl_jax.data.tokenizer import Tokenizer
from exprl_jax.hosts import fetch_whole, gather_rows, largest_over_processes, put_microbatches
from exprl_jax.mesh import Placement
from exprl_jax.records import Packed
from exprl_jax.reward.verifiers.math_answers.box import unboxed

_BOX = "\\boxed{"
_LEAD = "\n\nThe final answer is "


class AnswerRow(NamedTuple):
    """A problem's answer after one of its rollouts, in token ids.

    Attributes:
      prompt: the policy's, of the problem.
      context: what of the rollout comes before the answer.
      answer: whose probability is asked for.
    """

    prompt: Sequence[int]
    context: Sequence[int]
    answer: Sequence[int]

    @property
    def tokens(self) -> list[int]:
        """All of them."""
        return [*self.prompt, *self.context, *self.answer]


def answer_row(tokenizer: Tokenizer, prompt: Sequence[int], response: str, answer: str) -> AnswerRow:
    """The row that asks for the likelihood of an answer after a response."""
    start = response.rfind(_BOX)
    before = response[:start] if start >= 0 else response + _LEAD
    return AnswerRow(prompt, tokenizer.encode(before + _BOX), tokenizer.encode(unboxed(answer).strip() + "}"))


def answer_likelihoods(
    rows: Sequence[Sequence[AnswerRow | None]],
    index_P: np.ndarray,
    logp_of: Callable[[Packed, Any], Any],
    mesh: Mesh,
    shape: tuple[int, int, int],
    most_tokens: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean probability of each answer's tokens.

    Every process must call this: the rows of all are packed together, and each pass is the whole mesh's.

    Args:
      rows: of this process's problems [P, G]; None where nothing is asked.
      index_P: of those problems in the step's batch.
      logp_of: packed rows and how many microbatches of them are used → log-probs of their targets, [M, B, T].
      shape: [M, B, T] of a pass.
      most_tokens: longer rows are not asked about.

    Returns:
      (score_PG, valid_PG): float64 in [0, 1], 0 where not valid; False where nothing was asked or a row was too long.
    """
    table = _table(rows, min(most_tokens, shape[2])) | {"index_P": index_P}
    whole = gather_rows(table, index_P)
    length_PG, answer_PG = whole["length_PG"], whole["answer_PG"]
    score_PG, valid_PG = np.zeros(length_PG.shape), length_PG > 0
    group_N, index_N = np.nonzero(valid_PG)
    if not len(group_N):
        return np.zeros(table["length_PG"].shape), table["length_PG"] > 0
    examples, answers = [], answer_PG[group_N, index_N]
    for p, g in zip(group_N, index_N):
        tokens, prompt = whole["tokens_PGW"][p, g, : length_PG[p, g]], whole["prompt_P"][p]
        examples.append(Example(tokens[:prompt], tokens[prompt:]))
    shares, rows_of_pass = Placement(mesh).shares_segments, shape[0] * shape[1]
    shared_N = group_N if shares else np.arange(len(group_N))
    room_N = np.array([len(example.prompt) - 1 for example in examples])
    row_N = assign_rows(room_N, [len(example.response) for example in examples], shared_N, shape[2])
    for first in range(0, int(row_N.max()) + 1, rows_of_pass):
        (chosen,) = np.nonzero((row_N >= first) & (row_N < first + rows_of_pass))
        packed = fill_rows(
            [examples[i] for i in chosen], [group_N[i] for i in chosen], row_N[chosen] - first, shape, shares
        )
        logp_MBT = fetch_whole(logp_of(*put_microbatches(mesh, (packed.packed, packed.used))))
        logp_rows = logp_MBT.reshape(rows_of_pass, shape[2])
        for i, row, slot in zip(chosen, packed.row_N, packed.first_N):
            end = slot + len(examples[i].response)
            score_PG[group_N[i], index_N[i]] = np.exp(logp_rows[row, end - answers[i] : end].astype(np.float64)).mean()
    mine = np.searchsorted(whole["index_P"], index_P)
    return score_PG[mine], valid_PG[mine]


def _table(rows: Sequence[Sequence[AnswerRow | None]], most_tokens: int) -> dict[str, np.ndarray]:
    """Arrays that all processes can join: tokens_PGW, their number, and how many are prompt and answer."""
    fitting = [
        [None if row is None or len(row.tokens) > most_tokens else row for row in of_problem] for of_problem in rows
    ]
    shape = len(rows), max(map(len, rows))
    width = largest_over_processes(max((len(row.tokens) for some in fitting for row in some if row), default=0))
    tokens_PGW, prompt_P = np.zeros((*shape, width), np.int32), np.zeros(shape[0], np.int64)
    length_PG, answer_PG = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for p, of_problem in enumerate(fitting):
        for g, row in enumerate(of_problem):
            if row is not None:
                length_PG[p, g], answer_PG[p, g], prompt_P[p] = len(row.tokens), len(row.answer), len(row.prompt)
                tokens_PGW[p, g, : length_PG[p, g]] = row.tokens
    return {"tokens_PGW": tokens_PGW, "length_PG": length_PG, "answer_PG": answer_PG, "prompt_P": prompt_P}
