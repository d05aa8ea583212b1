"""A rubric per problem: the judge writes each problem's checklist once, and scores against it from then on.

    problem, reference ─ write_messages ─→ judge ─→ checklists.jsonl ─ checklist_messages ─→ judge ─→ share of items

A checklist is written when its problem is first scored.  One that cannot be read, or is too long for the judge's
budget, leaves the problem to its reference.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from exprl_jax import config as schema
from exprl_jax.data.problems import Problem
from exprl_jax.data.tokenizer import Message, SplitPrompt, Tokenizer
from exprl_jax.files import Ledger, read_rows
from exprl_jax.hosts import largest_over_processes
from exprl_jax.reward.checklist import parse_checklist
from exprl_jax.reward.endpoint_judge import EndpointJudge
from exprl_jax.reward.judge import Judge, JudgePrompts
from exprl_jax.reward.judge_prompts import CONTINUATION, checklist_messages, write_messages
from exprl_jax.reward.judgements import MARKER, Answer, Judgements, Pending, Query, fill, needed_reference
from exprl_jax.reward.rubric import Unit, open_rubric
from exprl_jax.reward.verifiers.verdict import Verdict

_KEY = ("problem", "judge", "prompt")
_FIELDS = {"problem": str, "judge": str, "prompt": str, "id": str, "text": str, "items": list}


def problem_key(problem: Problem) -> str:
    """Of all that a checklist is made from: problem, choices and reference."""
    content = json.dumps([problem.problem, problem.choices, needed_reference(problem)])
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def prompt_version(rubric: str) -> str:
    """A fingerprint of the words of a template that ask for a checklist."""
    chat = write_messages("p", (), "r", "math", "<nothing>", rubric)
    return hashlib.blake2b(json.dumps([m.content for m in chat]).encode(), digest_size=8).hexdigest()


class Checklists:
    """Checklists by problem: from the file that the config names, whoever wrote them, and from the run's own.

        {"problem": hash, "judge": fingerprint, "prompt": version, "id": ..., "text": ..., "items": ["...", ...]}

    `items` are what is scored against; an empty list says that the text is no checklist.  Every process of a run writes
    a file of its own, and reads those of all.
    """

    def __init__(self, source: str, judge: str, rubric: str = ""):
        """Reads the named file; writes nothing before `open`.

        Args:
          source: a JSONL file; empty for none.
          judge: a fingerprint of who writes.
          rubric: the template that asks for them; empty for the built-in one.

        Raises:
          ValueError: the file is not there, or a row of it is none.
        """
        self._judge, self._prompt = judge, prompt_version(rubric)
        self._items: dict[str, tuple[str, ...]] = {}
        self._ledger: Ledger | None = None
        path = pathlib.Path(source)
        if source and not path.is_file():
            raise ValueError(f"config.judge.checklists: {source} is not there; expected the checklists.jsonl of a run")
        for row in read_rows(path, _FIELDS, "checklist") if source else ():
            self._items.setdefault(row["problem"], _checked(path, row))

    def open(self, folder: pathlib.Path) -> None:
        """Reads what the run of a workdir has written, and writes there from now on."""
        for path in sorted(folder.glob("checklists*.jsonl")):
            for row in read_rows(path, _FIELDS, "checklist"):
                if (row["judge"], row["prompt"]) == (self._judge, self._prompt):
                    self._items.setdefault(row["problem"], _checked(path, row))
        number = f"-{jax.process_index()}" if jax.process_index() else ""
        self._ledger = Ledger(folder / f"checklists{number}.jsonl", "checklist", _KEY, _FIELDS)

    def known(self, problem: Problem) -> bool:
        """Whether its checklist was written, be it readable or not."""
        return problem_key(problem) in self._items

    def items(self, problem: Problem) -> tuple[str, ...]:
        """Of its checklist; none where it has not been written, or cannot be read."""
        return self._items.get(problem_key(problem), ())

    def add(self, written: Sequence[tuple[Problem, Answer]]) -> None:
        """Keeps what the judge wrote; a request that failed, or an answer that was cut, is none."""
        rows = []
        for problem, answer in written:
            if answer.text is None:
                continue
            items = () if answer.cut else parse_checklist(answer.text)
            self._items[problem_key(problem)] = items
            source = {"problem": problem_key(problem), "judge": self._judge, "prompt": self._prompt}
            rows.append(source | {"id": problem.id, "text": answer.text, "items": list(items)})
        if self._ledger is not None:
            self._ledger.add(rows)


def check_rubric(judge: schema.Judge) -> None:
    """Reads the files that a judge's prompts are made from.

    Raises:
      ValueError: one cannot be read, or is none.
    """
    open_rubric(judge.template)
    if judge.per_problem:
        Checklists(judge.checklists, "", judge.template)


def _checked(path: pathlib.Path, row: Mapping[str, Any]) -> tuple[str, ...]:
    if not all(isinstance(item, str) and item.strip() for item in row["items"]):
        raise ValueError(f"{path}: the checklist of problem {row['id']!r} has an item that is no text; mend its row")
    return tuple(row["items"])


class ChecklistPrompts:
    """The prompts of problems' checklists, and whether they are within the judge's budgets."""

    def __init__(
        self,
        config: schema.Judge,
        tokenizer: Tokenizer | None,
        unit: Callable[[Problem], Unit],
        widths: tuple[int, int] = (0, 0),
    ):
        """Args:
        tokenizer: a local judge's; None for an endpoint, whose server knows its own limits.
        widths: slots for a prompt's head and for its suffix.
        """
        self._config, self._tokenizer, self._unit, self._widths = config, tokenizer, unit, widths

    def write(self, problem: Problem) -> SplitPrompt | list[Message]:
        """Asks for the checklist; for an endpoint a chat without a hole."""
        asked = problem.problem, problem.choices, needed_reference(problem)
        chat = write_messages(*asked, problem.domain, MARKER, self._config.template)
        return fill(chat, "") if self._tokenizer is None else self._tokenizer.render_split(chat, MARKER, "")

    def score(self, problem: Problem, items: Sequence[str]) -> SplitPrompt | list[Message]:
        """Asks for a score against the checklist."""
        readout, unit = self._config.readout, self._unit(problem)
        asked = problem.problem, problem.choices, items, problem.domain, unit, readout
        chat = checklist_messages(*asked, MARKER, self._config.template)
        if self._tokenizer is None:
            return chat
        return self._tokenizer.render_split(chat, MARKER, CONTINUATION[readout])

    def by_item(self, problem: Problem) -> bool:
        """Whether the judge is asked item by item."""
        return open_rubric(self._config.template).by_item(self._unit(problem), self._config.readout)

    def fits(self, prompt: SplitPrompt | list[Message]) -> bool:
        """Whether the judge has room for it."""
        if self._tokenizer is None:
            return True
        head, suffix = self._widths
        within = prompt.frame_tokens <= self._config.max_context_tokens
        return within and len(prompt.head) <= head and len(prompt.suffix) <= suffix


class ChecklistJudge:
    """A judge that scores against checklists which it writes itself, with the interface of the others."""

    def __init__(self, inner: Judge | EndpointJudge, checklists: Checklists, prompts: ChecklistPrompts):
        """Args: inner: scores against references."""
        self.inner, self.checklists, self._prompts = inner, checklists, prompts
        self._made: dict[str, Any] = {}
        self._asked: dict[str, Problem] = {}
        self.on_mesh = inner.on_mesh

    def submit(
        self, problems: Sequence[Problem], queries: Sequence[Sequence[Query]], segments: int
    ) -> Pending[Judgements]:
        """Begins to score every query against its problem's checklist; those that are not there yet are waited for."""
        asked = [problem if of_problem else None for problem, of_problem in zip(problems, queries, strict=True)]
        self._asked |= {problem.id: problem for problem in asked if problem}
        self._write(asked)
        return self._with_checklists([problem for problem in asked if problem]).submit(problems, queries, segments)

    def score(self, problems: Sequence[Problem], queries: Sequence[Sequence[Query]], segments: int) -> Judgements:
        """The result of `submit`."""
        return self.submit(problems, queries, segments).result()

    def submit_verify(
        self, problems: Sequence[Problem], responses: Sequence[Sequence[str]]
    ) -> Pending[list[list[Verdict]]]:
        """As the judge without checklists."""
        return self.inner.submit_verify(problems, responses)

    def submit_answers(self, problems: Sequence[Problem], responses: Sequence[Sequence[str]]) -> Pending[list[Answer]]:
        """As the judge without checklists."""
        return self.inner.submit_answers(problems, responses)

    def verify(self, problems: Sequence[Problem], responses: Sequence[Sequence[str]]) -> list[list[Verdict]]:
        """As the judge without checklists."""
        return self.inner.verify(problems, responses)

    def report(self) -> dict[str, float]:
        """As the judge without checklists."""
        return self.inner.report()

    def falls_back(self, problem: Problem) -> bool:
        """Whether it is scored against its reference, for want of a checklist that can be read and fits."""
        return self._score_prompt(problem) is None

    def asking(self, problem: str) -> Judge | EndpointJudge:
        """The judge as it was asked about the traces of a problem, by its id."""
        return self._with_checklists([self._asked[problem]])

    def _write(self, problems: Sequence[Problem | None]) -> None:
        """Has the checklists of some problems written that are not known; a problem that stands twice has one."""
        missing: list[Problem | None] = []
        for problem in problems:
            again = problem is None or self.checklists.known(problem) or problem.id in {p.id for p in missing if p}
            missing.append(None if again else problem)
        # All processes ask, or none: a judge on the mesh is one program, and an endpoint's failures are counted
        # together.
        if not largest_over_processes(sum(problem is not None for problem in missing)):
            return
        answers = self.inner.write([None if problem is None else self._prompts.write(problem) for problem in missing])
        self.checklists.add([(missing[answer.problem], answer) for answer in answers])

    def _score_prompt(self, problem: Problem) -> SplitPrompt | list[Message] | None:
        """The prompt with the problem's checklist; None where it falls back to the reference."""
        items = self.checklists.items(problem)
        if not items:
            return None
        key = problem_key(problem)
        if key not in self._made:
            prompt = self._prompts.score(problem, items)
            self._made[key] = prompt if self._prompts.fits(prompt) else None
        return self._made[key]

    def _with_checklists(self, problems: Sequence[Problem]) -> Judge | EndpointJudge:
        """The judge that has the problems' checklists in the place of their references, where they have one."""
        made = {problem.id: self._score_prompt(problem) for problem in problems}
        own = {name: prompt for name, prompt in made.items() if prompt is not None}
        items = {p.id: len(self.checklists.items(p)) for p in problems if p.id in own and self._prompts.by_item(p)}
        if isinstance(self.inner, Judge):
            prompts = JudgePrompts({**self.inner.prompts.score, **own}, self.inner.prompts.verify)
            return dataclasses.replace(self.inner, prompts=prompts, items=items)
        return dataclasses.replace(self.inner, score_chats={**self.inner.score_chats, **own}, items=items)
