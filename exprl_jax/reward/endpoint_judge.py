"""A judge behind an endpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from exprl_jax import config as schema
from exprl_jax.data.problems import Problem
from exprl_jax.data.tokenizer import Message
from exprl_jax.reward.endpoint import ChatClient
from exprl_jax.reward.judgements import Answer, Judgements, Pending, Query, fill, judgements_of, verdicts_of
from exprl_jax.reward.verifiers.verdict import Verdict


@dataclasses.dataclass(frozen=True)
class EndpointJudge:
    """A judge behind an endpoint; its prompts, and the reading of its answers, are the local judge's.

    For the read-out `logits` the answer's first token is read, which the server gives with its log-probabilities: no
    endpoint lets a judge's turn begin with `Score: ` as the local judge's does.

    Attributes:
      client: open for as long as the judge is at work.
      score_chats: by problem id, of the problems that will be scored; with a marker in the trace's place.
      verdict_chats: the same, of the problems whose responses will be verified.
      group: rollouts of a problem (G).
      items: of the checklist that a problem's traces are scored against item by item, by its id; none for others.
    """

    config: schema.Judge
    client: ChatClient
    score_chats: Mapping[str, Sequence[Message]]
    verdict_chats: Mapping[str, Sequence[Message]]
    group: int
    items: Mapping[str, int] = dataclasses.field(default_factory=dict)
    on_mesh: ClassVar[bool] = False

    def submit(
        self, problems: Sequence[Problem], queries: Sequence[Sequence[Query]], segments: int
    ) -> Pending[Judgements]:
        """Begins to score every query against its problem's reference, and returns at once.

        A request that failed is a score that was not given, and is not in `text`; `cut` is what the server says; a
        trace beyond the server's context is a failure.  `tokens` are the server's counts of whole prompts and answers.

        Args:
          problems: this process's problems of a wave.
          queries: of each problem; any number.
          segments: N of the result.

        Returns:
          `result` raises ValueError where more than the client's `max_missing` of the requests failed, or the server
          says that the configuration is at fault.
        """
        traces = [[query.trace for query in of_problem] for of_problem in queries]
        answers = self._submit(self.score_chats, problems, traces, "scores")
        items = [self.items.get(problem.id, 0) for problem in problems]
        return Pending(lambda: judgements_of(self.config, answers(), queries, self.group, segments, items))

    def write(self, chats: Sequence[Sequence[Message] | None]) -> list[Answer]:
        """What the judge writes after each chat, by its number; None where nothing is to be written.

        Raises:
          ValueError: as `submit`.
        """
        numbers = [number for number, chat in enumerate(chats) if chat is not None]
        requests = [chats[number] for number in numbers]
        replies = self.client.submit(requests, self.config.max_tokens, "checklists").result()
        return [
            Answer(number, 0, reply.text if reply.answered else None, None, reply.cut, 0)
            for number, reply in zip(numbers, replies, strict=True)
        ]

    def score(self, problems: Sequence[Problem], queries: Sequence[Sequence[Query]], segments: int) -> Judgements:
        """The result of `submit`."""
        return self.submit(problems, queries, segments).result()

    def submit_verify(
        self, problems: Sequence[Problem], responses: Sequence[Sequence[str]]
    ) -> Pending[list[list[Verdict]]]:
        """Begins to compare every response's final answer with its problem's, and returns at once.

        Args:
          problems: this process's problems of a wave.
          responses: to each problem, any number; none to problems that have other verifiers.

        Returns:
          `result` gives a verdict a response: `correct`, `wrong`, or `missing` where the request failed or the model
          did not say; it raises as that of `submit` does.
        """
        answers = self.submit_answers(problems, responses)
        return Pending(lambda: verdicts_of(answers.result(), responses))

    def submit_answers(self, problems: Sequence[Problem], responses: Sequence[Sequence[str]]) -> Pending[list[Answer]]:
        """What `submit_verify` makes its verdicts of."""
        return Pending(self._submit(self.verdict_chats, problems, responses, "verdicts"))

    def verify(self, problems: Sequence[Problem], responses: Sequence[Sequence[str]]) -> list[list[Verdict]]:
        """The result of `submit_verify`."""
        return self.submit_verify(problems, responses).result()

    def report(self) -> dict[str, float]:
        """What was asked of the endpoint so far in this process, and what it cost: `time/endpoint_requests`, ..."""
        return {f"time/endpoint_{name}": value for name, value in self.client.usage().items()}

    def _submit(
        self,
        chats: Mapping[str, Sequence[Message]],
        problems: Sequence[Problem],
        texts: Sequence[Sequence[str]],
        wanted: str,
    ) -> Callable[[], list[Answer]]:
        digits = self.config.readout == "logits"
        indices = [(i, j) for i, of_problem in enumerate(texts) for j in range(len(of_problem))]
        requests = [fill(chats[problems[i].id], texts[i][j]) for i, j in indices]
        pending = self.client.submit(requests, 1 if digits else self.config.max_tokens, wanted, digits=digits)

        def answers() -> list[Answer]:
            return [
                Answer(
                    problem=i,
                    query=j,
                    text=reply.text if reply.answered and not digits else None,
                    probability_5=reply.probability_5,
                    cut=reply.cut,
                    tokens=reply.prompt_tokens + reply.completion_tokens,
                    # A server's template may open a thought that neither prompt nor answer shows.
                    at_end=reply.cut,
                )
                for (i, j), reply in zip(indices, pending.result(), strict=True)
            ]

        return answers
