"""Behaviour annotation: an annotator LLM describes fixed rollouts, and a run is compared with a base run (paper A.3).

Annotations are on disk (`annotations.jsonl`; those of base rollouts in `base_annotations.jsonl`) before more are asked
for, and are not asked for again.  An answer that is not the object that was asked for is missing, and counted.  One
process; its mesh may have any number of devices.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from exprl_jax import programs as programs_room
from exprl_jax.config import Annotate
from exprl_jax.data.problems import Problem
from exprl_jax.data.prompts import question_text
from exprl_jax.data.tokenizer import Message
from exprl_jax.evaluation.behaviour import (
    ARCHETYPES,
    COUNTS,
    FIELDS,
    Change,
    annotation_messages,
    compare,
    parse_annotation,
    problem_means,
)
from exprl_jax.evaluation.fixed_rollouts import Ledger, Rollout, read_rollouts, renamed
from exprl_jax.files import read_jsonl, write_atomically
from exprl_jax.hosts import local_problems, say
from exprl_jax.mesh import make_mesh
from exprl_jax.resolve import to_dict
from exprl_jax.reward.answers import opened_thought
from exprl_jax.reward.endpoint import ChatClient
from exprl_jax.reward.judgements import MARKER, fill
from exprl_jax.reward.judges import check_judge_lengths
from exprl_jax.rollout.call import make_prompts, texts_of
from exprl_jax.run.stopping import StopRequest
from exprl_jax.run.workdir import check_workdir, open_workdir
from exprl_jax.weights.language_model import load_params, open_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ANNOTATIONS = "annotations.jsonl"
_KEY = ("id", "rollout")
_GAINED, _LOST = "#0072B2", "#D55E00"  # of Okabe and Ito's palette

Row = Mapping[str, Any]


class Answer(NamedTuple):
    """What the annotator wrote about a rollout: empty where it was not or could not be asked."""

    text: str
    tokens: int


Asker = Callable[[Sequence[Rollout]], list[Answer]]


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
    earlier = pathlib.Path(config.base).expanduser() / ANNOTATIONS if config.base else pathlib.Path()
    if config.base and not earlier.is_file():
        rollouts[f"base_{ANNOTATIONS}"] = read_rollouts(config.base, config.data, references=False)
    with contextlib.ExitStack() as held:
        workdir = held.enter_context(open_workdir(workdir_path, to_dict(config), folders=()))
        stop = held.enter_context(StopRequest())
        ledgers = {name: Ledger(workdir.path / name, _KEY) for name in rollouts}
        waiting = {}
        for name, ledger in ledgers.items():
            ledger.check_unchanged(rollouts[name])
            waiting[name] = [r for r in rollouts[name] if (r.problem.id, r.number) not in ledger]
        left = [rollout for of_file in waiting.values() for rollout in of_file]
        if left:
            ask = open_annotator(config, mesh, held, left)
            for name, of_file in waiting.items():
                for start in range(0, len(of_file), config.wave):
                    if stop.agreed():
                        say("stopped; start again with the same command to go on")
                        return
                    wave = of_file[start : start + config.wave]
                    ledgers[name].add(
                        annotation_row(rollout, answer) for rollout, answer in zip(wave, ask(wave), strict=True)
                    )
                    say(f"{name}: {start + len(wave)}/{len(of_file)} rollouts")
        ours = list(ledgers[ANNOTATIONS].rows.values())
        if not config.base:
            theirs = []
        elif earlier.is_file():
            theirs = list(read_jsonl(earlier))
        else:
            theirs = list(ledgers[f"base_{ANNOTATIONS}"].rows.values())
        write_annotations(config, workdir.path, ours, theirs)


def annotation_row(rollout: Rollout, answer: Answer) -> dict[str, Any]:
    """An annotation as it is written; `fields` is null where there is none."""
    return {
        "id": rollout.problem.id,
        "rollout": rollout.number,
        "fingerprint": rollout.fingerprint,
        "fields": parse_annotation(answer.text),
        "text": answer.text,
        "tokens": answer.tokens,
    }


# ---------------------------------------------------------------------------------------------------- asking


def messages_of(problem: Problem) -> list[Message]:
    """The prompt for a problem's rollouts, with the marker in their place."""
    return annotation_messages(question_text(problem.question), MARKER)


def open_annotator(config: Annotate, mesh: Mesh, held: contextlib.ExitStack, rollouts: Sequence[Rollout]) -> Asker:
    """The annotator, for up to a wave of these rollouts at a time.

    Raises:
      ValueError: the model cannot be opened or has too short a context, or the endpoint's key is not there.
    """
    if config.annotator.backend == "openai":
        return endpoint_annotator(config, held.enter_context(ChatClient(config.annotator.endpoint)))
    return local_annotator(config, mesh, rollouts)


def endpoint_annotator(config: Annotate, client: ChatClient) -> Asker:
    """Asks an endpoint; a failed request is no answer.

    The asker raises ValueError where more than `max_missing` of a wave's requests failed.
    """

    def ask(wave: Sequence[Rollout]) -> list[Answer]:
        chats = [fill(messages_of(rollout.problem), rollout.response) for rollout in wave]
        replies = client.submit(chats, config.annotator.max_tokens, "annotations").result()
        return [Answer(reply.text, reply.prompt_tokens + reply.completion_tokens) for reply in replies]

    return ask


def local_annotator(config: Annotate, mesh: Mesh, rollouts: Sequence[Rollout]) -> Asker:
    """Asks a model on the mesh, greedily, the whole prompt being the context; rollouts over budget get no answer."""
    how = config.annotator
    model = open_model(how.model)
    check_judge_lengths(how, model.arch)
    ids = {}
    for rollout in rollouts:
        prompt = model.tokenizer.render_split(messages_of(rollout.problem), MARKER)
        tail = prompt.tail(rollout.response)
        trace = len(tail) - len(prompt.suffix)
        if len(prompt.head) <= how.max_context_tokens and trace <= how.max_trace_tokens:
            ids[_named(rollout).id] = [*prompt.head, *tail]
    if not ids:
        return lambda wave: [Answer("", 0)] * len(wave)
    prompts = make_prompts(ids)
    if prompts.width + 1 + how.max_tokens > model.arch.max_positions:
        raise ValueError(
            f"config.annotator.max_tokens: a prompt of {prompts.width + 1} tokens and an answer of {how.max_tokens} "
            f"are over the annotator's context length {model.arch.max_positions}; lower max_trace_tokens or max_tokens"
        )
    say(f"annotator {how.model.weights}")
    params = load_params(model, mesh, config.seed)
    sampler = programs_room.build_sampler(model, mesh, max_tokens=how.max_tokens, wave=config.wave)

    def ask(wave: Sequence[Rollout]) -> list[Answer]:
        asked = [_named(rollout) for rollout in wave]
        known = [problem for problem in asked if problem.id in ids]
        if not known:
            return [Answer("", 0)] * len(wave)
        filled = [*known, *[known[0]] * (config.wave - len(known))]
        written = sampler(
            params,
            prompts,
            filled,
            group=1,
            temperature=0.0,
            seed=config.seed,
            step=0,
            attempt=0,
            live_P=np.arange(config.wave) < len(known),
        )
        _, texts = texts_of(written, model.tokenizer.decode)
        answers = {}
        for problem, (text,), mask in zip(known, texts, written.mask_PGR):
            opened = opened_thought(model.tokenizer.decode(ids[problem.id]))
            answers[problem.id] = Answer(opened + text, len(ids[problem.id]) + int(mask.sum()))
        return [answers.get(problem.id, Answer("", 0)) for problem in asked]

    return ask


def _named(rollout: Rollout) -> Problem:
    # Base rollouts have the same numbers, and other texts.
    return renamed(rollout.problem, f"{rollout.problem.id}#{rollout.number}#{rollout.fingerprint}")


# ---------------------------------------------------------------------------------------------------- reporting


def write_annotations(config: Annotate, folder: pathlib.Path, ours: Sequence[Row], theirs: Sequence[Row]) -> None:
    """Writes `results.json`, `annotations.csv`, `table.txt` and, against a base, `behaviour.png`; prints the table."""
    run, base = (problem_means(_parsed(rows)) for rows in (ours, theirs))
    # Without an annotation on either side there is nothing to compare, and the counts say so.
    changes = compare(run, base, config.seed) if run and base else []
    results = {
        "counts": {
            "rollouts": len(ours),
            "missing": sum(row["fields"] is None for row in ours),
            "problems": len(run),
            "base_rollouts": len(theirs),
            "base_missing": sum(row["fields"] is None for row in theirs),
            "base_problems": len(base),
            "tokens": sum(row["tokens"] for row in ours),
        },
        "means": dict(zip(FIELDS, np.mean(list(run.values()), axis=0).tolist(), strict=True)) if run else {},
        "changes": [dataclasses.asdict(change) for change in changes],
    }
    text = render_annotations(results, changes)
    write_atomically(folder / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
    write_atomically(folder / "annotations.csv", annotations_csv(results["means"], changes))
    write_atomically(folder / "table.txt", text)
    written = ["results.json", "annotations.csv", "table.txt"]
    if changes:
        partial = folder / ".behaviour.png.partial"
        changes_figure(changes).savefig(partial, format="png")
        os.replace(partial, folder / "behaviour.png")
        written.append("behaviour.png")
    print(text)
    print("\n".join(f"  {folder / name}" for name in written), flush=True)


def _parsed(rows: Iterable[Row]) -> list[tuple[str, Mapping[str, int]]]:
    return [(row["id"], row["fields"]) for row in rows if row["fields"] is not None]


def annotations_csv(means: Mapping[str, float], changes: Sequence[Change]) -> str:
    """One row a field: the change against the base, or without a base the mean alone."""
    held = io.StringIO()
    writer = csv.writer(held, lineterminator="\n")
    if changes:
        writer.writerow([field.name for field in dataclasses.fields(Change)])
        writer.writerows([["" if v is None else v for v in dataclasses.astuple(change)] for change in changes])
    else:
        writer.writerow(["field", "run"])
        writer.writerows(means.items())
    return held.getvalue()


def render_annotations(results: Mapping[str, Any], changes: Sequence[Change]) -> str:
    """The table of the terminal: means over problems of a rollout's 0 or 1, or of its count."""
    counts, notes = results["counts"], []
    notes.append(
        f"{counts['rollouts']} rollouts of {counts['problems']} problems; {counts['missing']} without an annotation"
    )
    if changes:
        notes.append(
            f"base: {counts['base_rollouts']} rollouts; {counts['base_missing']} without an annotation; compared over "
            f"{changes[0].problems} problems"
        )
        header = ["field", "base", "run", "change", "95 % interval", "gained", "lost", "same"]
        body = [
            [
                change.field,
                f"{change.base:.2f}",
                f"{change.run:.2f}",
                f"{change.difference:+.2f}",
                "–" if change.low is None or change.high is None else f"[{change.low:+.2f}, {change.high:+.2f}]",
                str(change.gained),
                str(change.lost),
                str(change.unchanged),
            ]
            for change in changes
        ]
    else:
        header, body = ["field", "run"], [[name, f"{mean:.2f}"] for name, mean in results["means"].items()]
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
    lines = [
        "  ".join(text.rjust(w) if i else text.ljust(w) for i, (text, w) in enumerate(zip(row, widths))).rstrip()
        for row in [header, *body]
    ]
    return "\n".join([*lines, "", *notes]) + "\n"


def changes_figure(changes: Sequence[Change]) -> Figure:
    """Problems gained (to the right) and lost (to the left) by field, archetypes above behaviours."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 5.4), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    kinds = [[c for c in changes if c.field in ARCHETYPES], [c for c in changes if c.field not in ARCHETYPES]]
    panels = figure.subplots(2, 1, sharex=True, height_ratios=[len(kind) for kind in kinds])
    most = max(1, *(max(change.gained, change.lost) for change in changes))
    for panel, kind, title in zip(panels, kinds, ("solution archetypes", "reasoning behaviours"), strict=True):
        places = np.arange(len(kind))
        panel.barh(places, [change.gained for change in kind], color=_GAINED, label="problems gained")
        panel.barh(
            places,
            [-change.lost for change in kind],
            color=_LOST,
            hatch="///",
            edgecolor="white",
            linewidth=0.3,
            label="problems lost",
        )
        for place, change in zip(places, kind):
            panel.text(change.gained + 0.01 * most, place, str(change.gained), va="center", fontsize=6)
            panel.text(-change.lost - 0.01 * most, place, str(change.lost), va="center", ha="right", fontsize=6)
        names = [f"{c.field} (count)" if c.field in COUNTS else c.field for c in kind]
        panel.set_yticks(places, [name.replace("_", " ") for name in names], fontsize=7)
        panel.invert_yaxis()
        panel.axvline(0, color="black", linewidth=0.8)
        panel.set_xlim(-1.12 * most, 1.12 * most)
        panel.xaxis.set_major_formatter(lambda x, _: f"{abs(x):g}")
        panel.tick_params(axis="x", labelsize=7)
        panel.grid(True, axis="x", color="0.9", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.set_title(title, fontsize=9)
    panels[-1].set_xlabel(f"problems, of {changes[0].problems}", fontsize=8)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8, frameon=False
    )
    return figure
