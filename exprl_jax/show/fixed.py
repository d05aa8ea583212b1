"""Rollouts that other runs have left behind, and what a calibration's judges or an annotation's model say of them."""

from __future__ import annotations

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from exprl_jax.config import Annotate, Calibrate, Labelling
from exprl_jax.data.tokenizer import Message, Tokenizer
from exprl_jax.evaluation.annotate import annotation_chat, annotation_row, open_annotator, open_annotator_model
from exprl_jax.evaluation.fixed_rollouts import FixedRollout, read_rollouts
from exprl_jax.evaluation.judge_task import SCORE_FIELDS, SCORE_KEY, JudgeTask, open_judge_model
from exprl_jax.evaluation.judging import ask_judge
from exprl_jax.evaluation.label import ask_waves, cut_rollouts, open_judge, open_scores
from exprl_jax.evaluation.passes import ScoringPass, decides, draw_some, prefixes_of, scoring_passes
from exprl_jax.files import Ledger
from exprl_jax.mesh import make_mesh
from exprl_jax.reward.checklists import ChecklistJudge
from exprl_jax.reward.judge_prompts import CONTINUATION
from exprl_jax.reward.judgements import MARKER
from exprl_jax.reward.judges import JudgeBuilder
from exprl_jax.rollout.call import describe_problem
from exprl_jax.run.stopping import StopRequest
from exprl_jax.show.questions import asked_model, chat_question, score_question, split_question
from exprl_jax.show.rollouts import check_count
from exprl_jax.weights.language_model import open_model


def show_calibration(config: Calibrate, count: int) -> Iterator[dict[str, Any]]:
    """The first rollouts, one a problem, put to every judge in every pass; what the policy would write after prefixes
    is left out.

    Raises:
      ValueError: there are not so many problems, or anything that a calibration refuses.
    """
    rollouts = read_rollouts(config.rollouts, config.data, references=config.shows_references)
    judged = [rollout for rollout in rollouts if decides(rollout.problem, rollout.verdict)]
    chosen = _first_of_each(judged, count, "rollouts with a verdict")
    policy = open_model(config.policy) if config.prefixes.rollouts else None
    prefixes = [] if policy is None else prefixes_of(config, policy.tokenizer, chosen)
    # Wrong references are those of other problems, of all that a calibration has.
    passes = [_only(chosen, scoring_pass) for scoring_pass in scoring_passes(config, judged, prefixes)]
    mesh = make_mesh(config.mesh)
    with tempfile.TemporaryDirectory() as folder, StopRequest() as stop:
        scores = Ledger(pathlib.Path(folder) / "scores.jsonl", "score", SCORE_KEY, SCORE_FIELDS)
        tasks = [
            JudgeTask(name, judge, open_judge_model(judge), config, scores, stop)
            for name, judge in config.judges.items()
        ]
        if not all(ask_judge(task, mesh, passes) for task in tasks):
            return
        rows = list(scores.rows())
        for rollout in chosen:
            answers = [row for row in rows if (row["id"], row["rollout"]) == rollout.key]
            record = _fixed_record("calibrate", rollout)
            record["judges"] = [_judged(task, passes, rollout, answers) for task in tasks]
            yield record | {"warnings": _calibration_warnings(record)}


def show_annotations(config: Annotate, count: int) -> Iterator[dict[str, Any]]:
    """The first rollouts, one a problem, and what the annotator writes of each.

    Raises:
      ValueError: there are not so many problems, or anything that an annotation refuses.
    """
    rollouts = read_rollouts(config.rollouts, config.data, references=False)
    chosen = _first_of_each(rollouts, count, "rollouts")
    model, mesh = open_annotator_model(config), make_mesh(config.mesh)
    with contextlib.ExitStack() as stack:
        annotator = open_annotator(config, model, mesh, stack, chosen)
        for start in range(0, count, config.wave):
            wave = chosen[start : start + config.wave]
            for rollout, answer in zip(wave, annotator(wave), strict=True):
                row = annotation_row(rollout, answer)
                tokenizer = None if model is None else model.tokenizer
                question = _question(tokenizer, annotation_chat(rollout.problem), rollout.response)
                record = _fixed_record("annotate", rollout)
                record["annotator"] = asked_model(config.annotator) | {"question": question}
                record["annotator"] |= {"text": row["text"], "fields": row["fields"], "tokens": row["tokens"]}
                yield record | {"warnings": _annotation_warnings(config, record)}


def show_labels(config: Labelling, count: int) -> Iterator[dict[str, Any]]:
    """The first rollouts that lessons are made of, one a problem, and what the judge says of each of their texts.

    Raises:
      ValueError: there are not so many problems, or anything that a labelling refuses.
    """
    rollouts = read_rollouts(config.rollouts, config.data, references=True)
    drawn = draw_some(rollouts, config.count or len(rollouts), config.seed)
    cut = cut_rollouts(config, _first_of_each(drawn, count, "rollouts"))
    problems, mesh = [x.rollout.problem for x in cut], make_mesh(config.mesh)
    builder = JudgeBuilder(config.judge, scored=problems, verified=[], unit=lambda _: config.unit)
    kept = {p.id for p in builder.within_context(problems)}
    cut = [x for x in cut if x.rollout.problem.id in kept]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        judge = open_judge(config, builder, [x.rollout.problem for x in cut], mesh, stack)
        if isinstance(judge, ChecklistJudge):
            judge.checklists.open(pathlib.Path(folder))
        scores = open_scores(pathlib.Path(folder))
        if not ask_waves(config, judge, cut, scores, stack.enter_context(StopRequest())):
            return
        answers = {(row["id"], row["rollout"]): row for row in scores.rows()}
        for x in cut:
            row, last = answers[x.rollout.key], len(x.parts) - 1
            question = score_question(judge, x.rollout.problem.id, x.traces(config.unit)[-1])
            record = _fixed_record("label", x.rollout)
            record["judge"] = asked_model(config.judge) | {"asks": config.unit, "segment": last, "question": question}
            answered = zip(x.parts, row["scores"], row["judgements"], row["digits"], strict=True)
            record["segments"] = [
                {"text": part, "score": score, "judge": words, "digits": digits, "cut": False}
                for part, score, words, digits in answered
            ]
            lost = sum(score is None for score in row["scores"])
            yield record | {"warnings": [f"{lost} of {last + 1} scores were not given"] if lost else []}


def _first_of_each(rollouts: Sequence[FixedRollout], count: int, what: str) -> list[FixedRollout]:
    """The first rollout of each of the first problems.

    Raises:
      ValueError: there are fewer problems.
    """
    first: dict[str, FixedRollout] = {}
    for rollout in rollouts:
        first.setdefault(rollout.problem.id, rollout)
    check_count(count, len(first), f"those of the {what}")
    return list(first.values())[:count]


def _only(chosen: Sequence[FixedRollout], scoring_pass: ScoringPass) -> ScoringPass:
    keys = {rollout.key for rollout in chosen}
    return scoring_pass._replace(traces=[t for t in scoring_pass.traces if t.rollout.key in keys])


def _fixed_record(task: str, rollout: FixedRollout) -> dict[str, Any]:
    return {
        "task": task,
        **describe_problem(rollout.problem),
        "choices": list(rollout.problem.choices),
        "rollout": rollout.number,
        "response": rollout.response,
        "verdict": str(rollout.verdict),
    }


def _question(
    tokenizer: Tokenizer | None, chat: Sequence[Message], text: str, continuation: str = ""
) -> dict[str, Any]:
    if tokenizer is None:
        return chat_question(chat, text)
    return split_question(tokenizer, tokenizer.render_split(chat, MARKER, continuation), text)


def _judged(
    task: JudgeTask, passes: Sequence[ScoringPass], rollout: FixedRollout, rows: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """A judge's answers about a rollout: each with its pass, and what was asked."""
    asked = []
    mine = {task.scores.key_of(row): row for row in rows if row["judge"] == task.name}
    for scoring_pass in passes:
        for trace in scoring_pass.traces:
            for repeat in (0, *task.repeats):
                row = mine.pop(task.scores.key_of(task.question(scoring_pass, trace, repeat)), None)
                if trace.rollout.key != rollout.key or row is None:
                    continue
                answer = {name: row.get(name) for name in ("segment", "repeat", "score", "text", "cut", "digits")}
                chat = task.chat(scoring_pass, rollout.problem)
                tokenizer = None if task.model is None else task.model.tokenizer
                question = _question(tokenizer, chat, trace.text, CONTINUATION[task.judge.readout])
                if task.judge.backend == "function":  # which takes no prompt
                    question = None
                asked.append({"pass": scoring_pass.name, **answer, "question": question})
    return {"name": task.name} | asked_model(task.judge) | {"answers": asked}


def _calibration_warnings(record: dict[str, Any]) -> list[str]:
    told = []
    for judge in record["judges"]:
        answers = judge["answers"]
        if not answers:
            told.append(f"{judge['name']}: not asked; the prompt is over judges.{judge['name']}.max_context_tokens")
        elif lost := [answer["pass"] for answer in answers if answer["score"] is None]:
            told.append(f"{judge['name']}: {len(lost)} of {len(answers)} answers without a score ({', '.join(lost)})")
    return told


def _annotation_warnings(config: Annotate, record: dict[str, Any]) -> list[str]:
    budget, annotator = config.annotator, record["annotator"]
    if annotator["fields"] is not None:
        return []
    if not annotator["text"]:
        return [
            "not asked, or no answer: the prompt is over annotator.max_context_tokens = "
            f"{budget.max_context_tokens}, the rollout over max_trace_tokens = {budget.max_trace_tokens}, or the "
            "request failed"
        ]
    return [f"not the JSON object that was asked for (annotator.max_tokens = {budget.max_tokens})"]
