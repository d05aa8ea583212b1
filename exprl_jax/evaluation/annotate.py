"""Behaviour annotation: an annotator LLM describes fixed rollouts, and a run is compared with a base run (paper A.3).

Annotations are on disk (`annotations.jsonl`; those of base rollouts in `base_annotations.jsonl`) before more are asked
for, and are not asked for again.  An answer that is not the object that was asked for is missing, and counted.  One
process; its mesh may have any number of devices.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from exprl_jax.config import Annotate
from exprl_jax.data.problems import Problem
from exprl_jax.data.prompts import question_text
from exprl_jax.data.tokenizer import Message
from exprl_jax.evaluation.annotation_tables import write_annotations
from exprl_jax.evaluation.behaviour import annotation_messages, parse_annotation
from exprl_jax.evaluation.completions import Completer
from exprl_jax.evaluation.fixed_rollouts import FixedRollout, check_unchanged, read_rollouts
from exprl_jax.files import Ledger, read_rows
from exprl_jax.hosts import local_problems, say
from exprl_jax.mesh import make_mesh
from exprl_jax.resolve import to_dict
from exprl_jax.reward.answers import opened_thought
from exprl_jax.reward.endpoint import ChatClient
from exprl_jax.reward.judgements import MARKER, fill
from exprl_jax.reward.judges import check_judge_lengths
from exprl_jax.run.stopping import StopRequest
from exprl_jax.run.workdir import check_workdir, open_workdir
from exprl_jax.weights.language_model import LanguageModel, load_params, open_model
from exprl_jax.weights.run_models import check_models

ANNOTATIONS = "annotations.jsonl"
BASE_ANNOTATIONS = f"base_{ANNOTATIONS}"
_KEY = ("id", "rollout")
_FIELDS = {"id": str, "rollout": int, "fingerprint": str, "fields": dict | None, "text": str, "tokens": int}


class Answer(NamedTuple):
    """What the annotator wrote about a rollout: empty where it was not or could not be asked."""

    text: str
    tokens: int


Annotator = Callable[[Sequence[FixedRollout]], list[Answer]]


def annotate(config: Annotate, workdir_path: str) -> None:
    """Annotates in the folder's run, from where its files end, and reports.

    Raises:
      ValueError: anything about config, rollouts, model or folder that cannot work, in one line.
    """
    if jax.process_count() > 1:
        raise ValueError("task = 'annotate' runs in one process; start it without --coordinator and --distributed")
    check_workdir(workdir_path, to_dict(config))
    mesh = make_mesh(config.mesh)
    local_problems(mesh, config.wave)  # whether waves can be divided over the mesh
    rollouts = {ANNOTATIONS: read_rollouts(config.rollouts, config.data, references=False)}
    earlier = pathlib.Path(config.base).expanduser() / ANNOTATIONS
    if config.base and not earlier.is_file():
        rollouts[BASE_ANNOTATIONS] = read_rollouts(config.base, config.data, references=False)
    with contextlib.ExitStack() as stack:
        workdir = stack.enter_context(open_workdir(workdir_path, to_dict(config), folders=()))
        stop = stack.enter_context(StopRequest())
        ledgers = {name: Ledger(workdir.path / name, "annotation", _KEY, _FIELDS) for name in rollouts}
        waiting = {}
        for name, ledger in ledgers.items():
            check_unchanged(ledger, rollouts[name])
            waiting[name] = [rollout for rollout in rollouts[name] if rollout.key not in ledger]
        if unanswered := [rollout for of_file in waiting.values() for rollout in of_file]:
            model = open_annotator_model(config)
            check_models(workdir, [] if model is None else [model])
            annotator = open_annotator(config, model, mesh, stack, unanswered)
            if not all(_annotate_file(config, annotator, waiting[name], ledgers[name], stop) for name in ledgers):
                say("stopped; start again with the same command to go on")
                return
        base = []
        if config.base:
            theirs = workdir.path / BASE_ANNOTATIONS if BASE_ANNOTATIONS in ledgers else earlier
            base = list(read_rows(theirs, _FIELDS, "annotation"))
        write_annotations(config, workdir.path, list(ledgers[ANNOTATIONS].rows()), base)


def _annotate_file(
    config: Annotate, annotator: Annotator, rollouts: Sequence[FixedRollout], ledger: Ledger, stop: StopRequest
) -> bool:
    """Asks wave after wave; False where it was stopped before the end."""
    for start in range(0, len(rollouts), config.wave):
        if stop.agreed():
            return False
        wave = rollouts[start : start + config.wave]
        ledger.add(annotation_row(rollout, answer) for rollout, answer in zip(wave, annotator(wave), strict=True))
        say(f"{ledger.path.name}: {start + len(wave)}/{len(rollouts)} rollouts")
    return True


def annotation_row(rollout: FixedRollout, answer: Answer) -> dict[str, Any]:
    """An annotation as it is written; `fields` is null where there is none."""
    return {
        "id": rollout.problem.id,
        "rollout": rollout.number,
        "fingerprint": rollout.fingerprint,
        "fields": parse_annotation(answer.text),
        "text": answer.text,
        "tokens": answer.tokens,
    }


# ------------------------------------------------------------------------------------------------ annotators


def annotation_chat(problem: Problem) -> list[Message]:
    """The prompt for a problem's rollouts, with `MARKER` in the place of one."""
    return annotation_messages(question_text(problem.question), MARKER)


def open_annotator_model(config: Annotate) -> LanguageModel | None:
    """Finds a local annotator's files; None for an endpoint.

    Raises:
      ValueError: the model cannot be opened.
    """
    return None if config.annotator.backend == "openai" else open_model(config.annotator.model)


def open_annotator(
    config: Annotate,
    model: LanguageModel | None,
    mesh: Mesh,
    stack: contextlib.ExitStack,
    rollouts: Sequence[FixedRollout],
) -> Annotator:
    """The annotator, for up to a wave of these rollouts at a time.

    Args:
      model: of `open_annotator_model`.
      stack: closes what stays open.

    Raises:
      ValueError: the model has too short a context, or the endpoint's key is not there.
    """
    if model is None:
        return endpoint_annotator(config, stack.enter_context(ChatClient(config.annotator.endpoint)))
    return local_annotator(config, model, mesh, rollouts)


def endpoint_annotator(config: Annotate, client: ChatClient) -> Annotator:
    """Asks an endpoint; a failed request is no answer.

    The annotator raises ValueError where more than `max_missing` of a wave's requests failed.
    """

    def ask(wave: Sequence[FixedRollout]) -> list[Answer]:
        chats = [fill(annotation_chat(rollout.problem), rollout.response) for rollout in wave]
        replies = client.submit(chats, config.annotator.max_tokens, "annotations").result()
        return [Answer(reply.text, reply.prompt_tokens + reply.completion_tokens) for reply in replies]

    return ask


def local_annotator(config: Annotate, model: LanguageModel, mesh: Mesh, rollouts: Sequence[FixedRollout]) -> Annotator:
    """Asks a model on the mesh, greedily, the whole prompt being the context; rollouts over budget get no answer."""
    budget = config.annotator
    check_judge_lengths(budget, model.arch)
    prompts, opened = {}, {}
    for rollout in rollouts:
        prompt = model.tokenizer.render_split(annotation_chat(rollout.problem), MARKER)
        tail = prompt.tail_within(rollout.response, budget.max_trace_tokens)
        if prompt.frame_tokens <= budget.max_context_tokens and tail is not None:
            prompts[_name(rollout)] = [*prompt.head, *tail]
            # An answer goes on where the prompt has opened a thought.
            opened[_name(rollout)] = opened_thought(model.tokenizer.decode(prompt.suffix))
    if not prompts:
        return lambda wave: [Answer("", 0)] * len(wave)
    say(f"annotator {budget.model.weights}")
    params = load_params(model, mesh, config.seed)
    sampling = dict(wave=config.wave, max_tokens=budget.max_tokens, temperature=0.0, seed=config.seed)
    completer = Completer(model, mesh, params, prompts, **sampling)

    def ask(wave: Sequence[FixedRollout]) -> list[Answer]:
        names = [_name(rollout) for rollout in wave]
        within = [name for name in names if name in prompts]
        completions = completer.complete(within, group=1) if within else []
        answers = {
            name: Answer(opened[name] + completion.text, len(prompts[name]) + completion.tokens)
            for name, (completion,) in zip(within, completions, strict=True)
        }
        return [answers.get(name, Answer("", 0)) for name in names]

    return ask


def _name(rollout: FixedRollout) -> str:
    # Base rollouts have the same numbers, and other texts.
    return f"{rollout.problem.id}#{rollout.number}#{rollout.fingerprint}"
