"""Makes lessons for a judge out of rollouts: another judge, a larger model or a function, says what each is worth.

    rollouts ─ cut ─→ texts ─ waves ─→ a judge, as in training ─→ scores.jsonl ─→ lessons.jsonl

What was asked is on disk in `scores.jsonl` before more is asked, and is not asked again; `lessons.jsonl` is written
anew from it at the end.  One process; its mesh may have any number of devices.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from exprl_jax.config import Labelling
from exprl_jax.data.problems import Problem
from exprl_jax.evaluation.fixed_rollouts import FixedRollout, check_unchanged, read_rollouts
from exprl_jax.evaluation.passes import draw_some
from exprl_jax.files import Ledger, write_atomically
from exprl_jax.hosts import local_problems, say
from exprl_jax.mesh import make_mesh
from exprl_jax.programs import build_judge
from exprl_jax.resolve import to_dict
from exprl_jax.reward.checklists import ChecklistJudge
from exprl_jax.reward.judge_prompts import parse_score
from exprl_jax.reward.judgements import Query
from exprl_jax.reward.judges import AnyJudge, JudgeBuilder
from exprl_jax.reward.segments import Splitter, parse_rule
from exprl_jax.run.stopping import StopRequest
from exprl_jax.run.workdir import check_workdir, open_workdir
from exprl_jax.weights.language_model import load_params, open_model
from exprl_jax.weights.run_models import check_models

_KEY = ("id", "rollout")
_FIELDS = {"id": str, "rollout": int, "fingerprint": str, "scores": list, "judgements": list}


class CutRollout(NamedTuple):
    """A rollout and where it is cut.

    Attributes:
      parts: their texts, which are the response's together; one where the whole is judged.
    """

    rollout: FixedRollout
    parts: Sequence[str]

    def traces(self, unit: str) -> list[str]:
        """What the judge is asked about."""
        return ["".join(self.parts[: n + 1]) if unit != "step" else part for n, part in enumerate(self.parts)]


def label(config: Labelling, workdir_path: str) -> None:
    """Asks the judge about every text that has no answer yet, and writes `lessons.jsonl`.

    Raises:
      ValueError: anything about config, rollouts, judge or folder that cannot work, in one line.
    """
    if jax.process_count() > 1:
        raise ValueError("task = 'label' runs in one process; start it without --coordinator and --distributed")
    check_workdir(workdir_path, to_dict(config))
    mesh = make_mesh(config.mesh)
    local_problems(mesh, config.wave)  # whether waves can be divided over the mesh
    rollouts = read_rollouts(config.rollouts, config.data, references=True)
    cut = cut_rollouts(config, draw_some(rollouts, config.count or len(rollouts), config.seed))
    problems = list({x.rollout.problem.id: x.rollout.problem for x in cut}.values())
    say(f"{len(cut)} rollouts of {len(problems)} problems in {sum(len(x.parts) for x in cut)} parts")
    builder = JudgeBuilder(config.judge, scored=problems, verified=[], unit=lambda _: config.unit)
    kept = builder.within_context(problems)
    ids = {problem.id for problem in kept}
    cut = [x for x in cut if x.rollout.problem.id in ids]
    with contextlib.ExitStack() as stack:
        workdir = stack.enter_context(open_workdir(workdir_path, to_dict(config), folders=()))
        check_models(workdir, builder.models, builder.files)
        scores = open_scores(workdir.path)
        check_unchanged(scores, [x.rollout for x in cut])
        stop = stack.enter_context(StopRequest())
        waiting = [x for x in cut if x.rollout.key not in scores]
        if waiting:
            judge = open_judge(config, builder, kept, mesh, stack)
            if isinstance(judge, ChecklistJudge):
                judge.checklists.open(workdir.path)
            if not ask_waves(config, judge, waiting, scores, stop):
                say("stopped; start again with the same command to go on")
                return
        answers = {(row["id"], row["rollout"]): row for row in scores.rows()}
        lessons = [row for x in cut if (row := lesson_row(config, x, answers[x.rollout.key])) is not None]
        path = workdir.path / "lessons.jsonl"
        write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lessons))
    _print_summary(path, lessons, len(cut))


def open_scores(folder: pathlib.Path) -> Ledger:
    """What the judge has answered, in a folder."""
    return Ledger(folder / "scores.jsonl", "score", _KEY, _FIELDS)


def open_judge(
    config: Labelling, builder: JudgeBuilder, problems: Sequence[Problem], mesh: Mesh, stack: contextlib.ExitStack
) -> AnyJudge:
    """The judge of some problems, its parameters loaded."""
    sizes = {"wave": config.wave, "group": config.group}
    return builder.open(mesh, stack, lambda m: load_params(m, mesh, config.seed), build_judge, problems, **sizes)


def cut_rollouts(config: Labelling, rollouts: Sequence[FixedRollout]) -> list[CutRollout]:
    """The rollouts, cut as a run cuts them where the unit is a part of one."""
    if config.unit == "outcome":
        return [CutRollout(rollout, [rollout.response]) for rollout in rollouts]
    tokenizer = open_model(config.policy).tokenizer
    splitter = Splitter(tokenizer.token_bytes, parse_rule(config.segments))
    cut = []
    for rollout in rollouts:
        ids = tokenizer.encode(rollout.response)
        prefixes = [tokenizer.decode(ids[:end]) for end in splitter.segment_ends(ids).tolist()]
        # A cut within a character is none: its text is not the response's.
        ends = [len(text) for text in prefixes if rollout.response.startswith(text)]
        ends = list(dict.fromkeys([*ends, len(rollout.response)]))
        starts = [0, *ends[:-1]]
        cut.append(CutRollout(rollout, [rollout.response[a:b] for a, b in zip(starts, ends)]))
    return cut


def ask_waves(
    config: Labelling, judge: AnyJudge, waiting: Sequence[CutRollout], scores: Ledger, stop: StopRequest
) -> bool:
    """Asks wave after wave; False where it was stopped before the end."""
    waves = list(_waves(waiting, config.wave, config.group))
    for number, wave in enumerate(waves, 1):
        if stop.agreed():
            return False
        start = time.monotonic()
        problems: list[Problem] = [some[0].rollout.problem for some in wave]
        queries = [
            [Query(g, n, trace) for g, x in enumerate(some) for n, trace in enumerate(x.traces(config.unit))]
            for some in wave
        ]
        empty, segments = config.wave - len(wave), max(len(x.parts) for some in wave for x in some)
        given = judge.score([*problems, *[problems[0]] * empty], [*queries, *[[]] * empty], segments)
        rows = []
        for i, some in enumerate(wave):
            for g, x in enumerate(some):
                score_N = np.where(given.valid_PGN[i, g], given.score_PGN[i, g], np.nan)[: len(x.parts)].tolist()
                rows.append(
                    {"id": x.rollout.problem.id, "rollout": x.rollout.number, "fingerprint": x.rollout.fingerprint}
                    | {"scores": [None if score != score else score for score in score_N]}
                    | {"judgements": [given.text.get((i, g, n)) for n in range(len(x.parts))]}
                    | {"digits": [given.digits.get((i, g, n)) for n in range(len(x.parts))]}
                )
        scores.add(rows)
        asked, seconds = sum(map(len, queries)), time.monotonic() - start
        say(f"{number}/{len(waves)} calls  {asked / seconds:.1f} scores/s")
    return True


def _waves(waiting: Sequence[CutRollout], wave: int, group: int) -> Iterator[list[list[CutRollout]]]:
    """Calls: up to `wave` problems with up to `group` rollouts each; a problem with more comes several times."""
    of_problem: dict[str, list[CutRollout]] = {}
    for x in waiting:
        of_problem.setdefault(x.rollout.problem.id, []).append(x)
    parts = [some[start : start + group] for some in of_problem.values() for start in range(0, len(some), group)]
    for start in range(0, len(parts), wave):
        yield parts[start : start + wave]


def lesson_row(config: Labelling, cut: CutRollout, answer: Mapping[str, Any]) -> dict[str, Any] | None:
    """The rollout as a line of `lessons.jsonl`; None where the judge gave it no score.

    A judgement is kept where it can be taught: its last score line is the score.
    """
    problem, number = cut.rollout.problem, cut.rollout.number
    labels = []
    for score, text in zip(answer["scores"], answer["judgements"], strict=True):
        kept = text if score is not None and text is not None and parse_score(text) is not None else None
        labels.append({"score": score, "judgement": kept})
    if all(x["score"] is None for x in labels):
        return None
    row = {"id": problem.id, "rollout": number, "problem": problem.problem, "reference": problem.reference}
    row |= {"domain": problem.domain, "unit": config.unit}
    if problem.choices:
        names, texts = zip(*problem.choices)
        row["choices"] = {"label": names, "text": texts}
    if config.unit == "outcome":
        return row | {"trace": cut.rollout.response} | labels[0]
    return row | {"segments": [{"text": part} | x for part, x in zip(cut.parts, labels, strict=True)]}


def _print_summary(path: Any, lessons: Sequence[Mapping[str, Any]], rollouts: int) -> None:
    labels = [x for row in lessons for x in row.get("segments", [row]) if x["score"] is not None]
    digits = np.bincount(np.rint(4 * np.array([x["score"] for x in labels])).astype(int), minlength=5).tolist()
    counts = ", ".join(f"{digit}: {count}" for digit, count in enumerate(digits, 1))
    print(
        f"done\n  lessons  {path}\n  rollouts {len(lessons)} of {rollouts} with a score; {len(labels)} scores, by the "
        f"nearest digit {counts}",
        flush=True,
    )
