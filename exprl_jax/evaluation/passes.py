"""What a calibration asks its judges: whole rollouts under several conditions, and prefixes of some of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from exprl_jax.config import Calibrate, Judge
from exprl_jax.data.problems import Problem
from exprl_jax.data.tokenizer import Message, Tokenizer
from exprl_jax.evaluation.calibration import derangement
from exprl_jax.evaluation.fixed_rollouts import FixedRollout
from exprl_jax.reward.judge_prompts import blind_messages, judge_messages, reference_last_messages
from exprl_jax.reward.judgements import MARKER, needed_reference
from exprl_jax.reward.rubric import Unit
from exprl_jax.reward.segments import Splitter, parse_rule
from exprl_jax.reward.verifiers.verdict import Verdict

CONDITIONS = ("correct", "none", "wrong")


class Trace(NamedTuple):
    """Something to be judged: a whole rollout, or its prefix that ends with one of its segments.

    Attributes:
      segment: the last one's number; None for a whole rollout.
      text: what the judge sees.
      ids: the policy's tokens of a prefix; empty for a whole rollout.
    """

    rollout: FixedRollout
    segment: int | None
    text: str
    ids: tuple[int, ...]


class ScoringPass(NamedTuple):
    """One way in which a judge is asked about some traces.

    Attributes:
      condition: which reference it sees: `correct`, `none` or `wrong`.
      order: `trace_last`, as in training, or `reference_last`.
      references: by problem id; empty where it sees none.
    """

    condition: str
    order: str
    unit: Unit
    references: Mapping[str, str]
    traces: Sequence[Trace]

    @property
    def name(self) -> str:
        """For people."""
        if self.unit != "outcome":
            return f"prefixes, {self.condition}"
        return self.condition if self.order == "trace_last" else self.order

    def chats(self, judge: Judge) -> dict[str, list[Message]]:
        """A judge's prompt for each of its problems, by id, with `MARKER` in the trace's place."""
        problems = {trace.rollout.problem.id: trace.rollout.problem for trace in self.traces}
        return {name: self._chat(problem, judge) for name, problem in problems.items()}

    def shown(self, problem: Problem) -> Problem:
        """A problem with the reference that the judge sees of it."""
        return dataclasses.replace(problem, reference=self.references.get(problem.id))

    def _chat(self, problem: Problem, judge: Judge) -> list[Message]:
        asked, readout, rubric = (problem.problem, problem.choices), judge.readout, judge.template
        if self.condition == "none":
            return blind_messages(*asked, problem.domain, readout, MARKER, self.unit, rubric)
        make = judge_messages if self.order == "trace_last" else reference_last_messages
        return make(*asked, self.references[problem.id], problem.domain, self.unit, readout, MARKER, rubric)


def scoring_passes(config: Calibrate, rollouts: Sequence[FixedRollout], prefixes: Sequence[Trace]) -> list[ScoringPass]:
    """The passes that the config asks for; the first of whole rollouts is as in training, if that is one of them.

    Raises:
      ValueError: a problem has no reference, or a domain has too few different problems for wrong ones.
    """
    problems = {rollout.problem.id: rollout.problem for rollout in rollouts}
    references: dict[str, Mapping[str, str]] = {}
    for name in config.conditions:
        if name == "correct":
            references[name] = {identity: needed_reference(problem) for identity, problem in problems.items()}
        else:
            references[name] = wrong_references(list(problems.values()), config.seed) if name == "wrong" else {}
    whole = [Trace(rollout, None, rollout.response, ()) for rollout in rollouts]
    asked = sorted(references, key=CONDITIONS.index)
    passes = [ScoringPass(name, "trace_last", "outcome", references[name], whole) for name in asked]
    if config.reference_last:
        passes.append(ScoringPass("correct", "reference_last", "outcome", references["correct"], whole))
    if prefixes:
        passes += [ScoringPass(name, "trace_last", "prefix", references[name], prefixes) for name in asked]
    return passes


def wrong_references(problems: Sequence[Problem], seed: int) -> dict[str, str]:
    """Another problem's reference for each problem, by id, from the problems of its own domain.

    Raises:
      ValueError: a problem has no reference, or a domain has too few different problems.
    """
    distinct = {problem.id: problem for problem in problems}
    wrong = {}
    for domain in sorted({problem.domain for problem in distinct.values()}):
        of_domain = [distinct[name] for name in sorted(distinct) if distinct[name].domain == domain]
        texts = [(problem.problem, needed_reference(problem)) for problem in of_domain]
        for problem, other in zip(of_domain, derangement(texts, seed), strict=True):
            wrong[problem.id] = needed_reference(of_domain[other])
    return wrong


def cut_prefixes(config: Calibrate, tokenizer: Tokenizer, rollouts: Sequence[FixedRollout]) -> list[Trace]:
    """What precedes each cut of some rollouts; nothing precedes the first segment, and after the last nothing follows.

    Where prefixes are continued, problems that only a judge can verify are left out: their answers are not graded here.

    Raises:
      ValueError: the rule cuts none of them.
    """
    prefixes = config.prefixes
    gradable = [rollout for rollout in rollouts if not (prefixes.continued and rollout.problem.traits.by_judge)]
    drawn = draw_some(gradable, prefixes.rollouts, config.seed)
    traces = prefixes_of(config, tokenizer, drawn)
    if not traces:
        cut = "of several segments in the rollouts' files" if config.stored else "that does"
        raise ValueError(
            f"config.prefixes.segments.rule: {prefixes.segments.rule!r} cuts none of the rollouts; expected a rule "
            f"{cut}"
        )
    return traces


def prefixes_of(config: Calibrate, tokenizer: Tokenizer, rollouts: Sequence[FixedRollout]) -> list[Trace]:
    """What precedes each cut of each rollout; none of one that is not cut."""
    splitter = Splitter(tokenizer.token_bytes, parse_rule(config.prefixes.segments))
    traces = []
    for rollout in rollouts:
        if config.stored:
            traces += [t._replace(ids=tuple(tokenizer.encode(t.text))) for t in stored_prefixes(rollout)]
            continue
        ids = tokenizer.encode(rollout.response)
        for segment, end in enumerate(splitter.segment_ends(ids)[:-1].tolist()):
            traces.append(Trace(rollout, segment, tokenizer.decode(ids[:end]), tuple(ids[:end])))
    return traces


def stored_prefixes(rollout: FixedRollout) -> list[Trace]:
    """A rollout's prefixes as the run cut them that wrote it, without token ids."""
    texts = [segment.text for segment in rollout.segments]
    return [Trace(rollout, n, "".join(texts[: n + 1]), ()) for n in range(len(texts) - 1)]


def stored_scores(name: str, rollouts: Sequence[FixedRollout]) -> list[dict[str, Any]]:
    """What the judge of the run that wrote the rollouts said of them, as rows of a calibration's scores.

    A rollout that was not judged, for its rewards come from a verifier or it never ended, has none.

    Raises:
      ValueError: none of them was judged.
    """
    rows = []
    for rollout in rollouts:
        last = len(rollout.segments) - 1
        for n, segment in enumerate(rollout.segments):
            if segment.score is not None:
                row = {"judge": name, "condition": "correct", "order": "trace_last", "repeat": 0}
                row |= {"id": rollout.problem.id, "rollout": rollout.number, "segment": None if n == last else n}
                rows.append(row | {"score": segment.score, "text": segment.judge, "tokens": 0, "seconds": 0.0})
    if not rows:
        raise ValueError(
            f"config.stored: got {name!r}, expected '': no rollout of config.rollouts holds a judge's score; name "
            "files of a run whose judge scores (rollouts/*.jsonl), or leave it empty"
        )
    return rows


def draw_some(items: Sequence, count: int, seed: int) -> list:
    """Some items at random, in their order."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed])))
    return [items[i] for i in sorted(rng.permutation(len(items))[:count].tolist())]


def decides(problem: Problem, verdict: Verdict) -> bool:
    """Whether a verdict is about the rollout: a program that is too slow is wrong, an answer that could not be compared
    in time is neither."""
    return verdict != Verdict.missing and (verdict != Verdict.timed_out or problem.traits.slow_is_wrong)
