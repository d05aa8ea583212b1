"""A record of one problem as a page for a terminal: sections, aligned tables, text within the width.

What only a judge, a teacher or a verifier sees has a bar at its left, wherever it stands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from exprl_jax.show.terminal import Paper, Span

Record = Mapping[str, Any]
_HIDDEN = "┃ "
_VERDICTS = {"correct": "good", "wrong": "bad"}
# Of a rollout, so many tokens that the teacher likes most and least.
_EXTREMES = 5


def page_lines(record: Record, number: int, count: int, paper: Paper) -> list[str]:
    """The page of a record.

    Args:
      number, count: which of how many problems it is of, from 1.
    """
    about = [record["id"], record["kind"], *([f"route {record['route']}"] if "route" in record else [])]
    lines = [paper.rule(f"problem {number} of {count}", " · ".join(about), "━")]
    if "policy" in record:
        lines += _policy(record, paper)
    else:
        lines += _section(paper, "problem") + _block(paper, record["problem"])
    if record["task"] != "sft":
        lines += _truth(record, paper)
    lines += _TASKS[record["task"]](record, paper)
    lines += [""]
    for warning in record["warnings"]:
        lines += paper.lines([Span(warning, "warning")], "! ", "warning")
    if not record["warnings"]:
        lines += [paper.styled(Span("nothing looks off", "good"))]
    return lines


# ------------------------------------------------------------------------------------------------ parts of a page


def _section(paper: Paper, title: str, note: str = "") -> list[str]:
    return ["", paper.rule(title, note)]


def _block(paper: Paper, text: str, indent: str = "  ", style: str = "") -> list[str]:
    """Text as it is; with `_HIDDEN` before it, in the judge's colour."""
    return paper.lines([Span(text.rstrip("\n"), style)], indent, style)


def _hidden(paper: Paper, text: str) -> list[str]:
    return _block(paper, text, _HIDDEN, "judge")


def _policy(record: Record, paper: Paper) -> list[str]:
    policy = record["policy"]
    note = f"{policy['weights']}, {policy['prompt_tokens']} tokens"
    if record["task"] == "sft":
        lines = _section(paper, "policy's prompt", f"{note}, no loss")
        return lines + _tokens(paper, record["prompt_pieces"])
    return _section(paper, "policy's prompt", note) + _block(paper, policy["prompt"])


def _truth(record: Record, paper: Paper) -> list[str]:
    """Reference and answer, and who sees them."""
    lines = []
    if record["reference"] is not None:
        reader = "teacher only" if record["task"] == "distill" else "judge only"
        lines += _section(paper, "reference solution", f"{reader}: the policy never sees it")
        lines += _hidden(paper, record["reference"])
    if record["answer"]:
        lines += _section(paper, "answer", "verifier only") + _hidden(paper, record["answer"])
    return lines


def _question(paper: Paper, title: str, question: Record | None, reference: str | None, note: str) -> list[str]:
    """A judge's prompt; the reference in it, if it is there, with its bar."""
    if question is None:
        return _section(paper, title, note) + _block(paper, "a function, which takes no prompt")
    size = ""
    if question["frame_tokens"] is not None:
        size = f", {question['frame_tokens']} tokens and {question['text_tokens']} judged"
    lines = _section(paper, title, note + size)
    hidden = (reference or "").strip()
    for part in ("before", "text", "after"):
        text = question[part]
        if part == "text":
            lines += _block(paper, text, "  ▸ ", "strong")
        elif hidden and hidden in text:
            start = text.index(hidden)
            lines += _block(paper, text[:start]) + _hidden(paper, hidden)
            lines += _block(paper, text[start + len(hidden) :].removeprefix("\n"))
        else:
            lines += _block(paper, text.removeprefix("\n"))
    return lines


def _digits(digits: Sequence[float] | None) -> list[Span]:
    """Five cells, the likeliest digit's in bold."""
    if digits is None:
        return [Span("")] * 5
    return [Span(f"{p:.3f}", "strong" if p == max(digits) else "") for p in digits]


def _quoted(piece: str) -> str:
    return f"'{piece}'".replace("\n", "\\n")


def _score(score: float | None) -> Span:
    return Span("none", "bad") if score is None else Span(f"{score:.3f}")


def _advantage(value: float | None) -> Span:
    if value is None:
        return Span("no loss", "faint")
    return Span(f"{value:+.3f}", "good" if value > 0 else "bad" if value < 0 else "")


def _verdict(verdict: str) -> Span:
    return Span(verdict, _VERDICTS.get(verdict, "warning"))


def _ended(rollout: Record) -> Span:
    return Span("ended") if rollout["ended"] else Span("overlong", "bad")


def _tokens(paper: Paper, pieces: Sequence[str], styles: Sequence[str] | None = None) -> list[str]:
    """Tokens, with a bar between them where there are no colours; a newline is shown and obeyed.

    Args:
      styles: of the tokens; two in turn where there are none.
    """
    if styles is None:
        styles = [("even", "odd")[n % 2] for n in range(len(pieces))]
    spans = []
    for n, (piece, style) in enumerate(zip(pieces, styles, strict=True), 1):
        bar = "|" if n < len(pieces) and not paper.colour else ""
        shown = piece.replace("\n", "↵\n")
        spans.append(Span(f"{shown[:-1]}{bar}\n" if shown.endswith("\n") else f"{shown}{bar}", style))
    return paper.lines(spans)


# ------------------------------------------------------------------------------------------------ tasks


def _scored(record: Record, paper: Paper) -> list[str]:
    shown = record["rollouts"][record["shown"]]
    lines = _rollout_head(record, paper)
    for number, segment in enumerate(shown["segments"]):
        start, end = segment["tokens"]
        head = [Span(f"▪ {number}", "title"), Span(f"  tokens {start}:{end}  score "), _score(segment["score"])]
        head += [Span("  advantage "), _advantage(segment["advantage"])]
        lines += ["  " + "".join(map(paper.styled, head)), *_block(paper, segment["text"], "    ")]
    judge = record["judge"]
    if judge is not None:
        of = "" if judge["segment"] is None else f" about segment {judge['segment']}"
        note = f"{judge['backend']} {judge['model']}, {judge['readout']}, {judge['asks']}"
        lines += _question(paper, f"judge's prompt{of}", judge["question"], record["reference"], note)
        lines += _answers(shown["segments"], judge, paper) + _said(record, paper)
    return lines + _segment_table(shown["segments"], paper) + _group(record, paper)


def _rollout_head(record: Record, paper: Paper) -> list[str]:
    shown = record["rollouts"][record["shown"]]
    ended = "ended" if shown["ended"] else "overlong"
    title = f"rollout {shown['rollout']} of 0–{len(record['rollouts']) - 1}"
    return _section(paper, title, f"{shown['length']} tokens, {ended}, {shown['verdict']}")


def _answers(segments: Sequence[Record], judge: Record, paper: Paper) -> list[str]:
    """What the judge wrote; digits stand in the table of segments."""
    lines = []
    for number, segment in enumerate(segments):
        if segment["judge"] is not None:
            lines += _section(paper, f"judge's words about segment {number}", "cut" if segment["cut"] else "")
            lines += _block(paper, segment["judge"] or "(nothing)")
    return lines


def _said(record: Record, paper: Paper) -> list[str]:
    """What the judge said of the shown rollout's answer, where it was asked whether that is right."""
    said = record["judge"].get("said")
    if said is None:
        return []
    of_shown = said[record["shown"]]
    if of_shown is None:
        return _section(paper, "judge's verdict", "not asked, or the response is over max_trace_tokens")
    lines = _section(paper, "judge's verdict", "cut" if of_shown["cut"] else "")
    if of_shown["text"] is not None:
        return lines + _block(paper, of_shown["text"] or "(nothing)")
    if of_shown["no_yes"] is not None:
        no, yes = of_shown["no_yes"]
        return lines + _block(paper, f"P(no) {no:.3f}  P(yes) {yes:.3f}")
    return lines + _block(paper, "none" if of_shown["score"] is None else f"score {of_shown['score']:.3g}")


def _segment_table(segments: Sequence[Record], paper: Paper) -> list[str]:
    """Where segments end, to the token, and what came of each."""
    digits = any(segment["digits"] is not None for segment in segments)
    header = ["segment", "tokens", "score", "advantage", *(f"P({d})" for d in range(1, 6) if digits), "last token"]
    rows = [[Span(cell) for cell in header]]
    for number, segment in enumerate(segments):
        row = [Span(str(number)), Span("{}:{}".format(*segment["tokens"])), _score(segment["score"])]
        row += [_advantage(segment["advantage"]), *(_digits(segment["digits"]) if digits else [])]
        rows.append([*row, Span(_quoted(segment["last_token"]))])
    return _section(paper, "segments") + paper.table(rows)


def _group(record: Record, paper: Paper) -> list[str]:
    """A row a rollout: its scores and advantages, segment by segment."""
    rows = [[Span(cell) for cell in ("", "rollout", "tokens", "", "verdict", "scores", "advantages")]]
    for rollout in record["rollouts"]:
        scores = [segment["score"] for segment in rollout["segments"]]
        advantages = [segment["advantage"] for segment in rollout["segments"]]
        best = max((advantage or 0.0 for advantage in advantages), default=0.0)
        rows.append(
            [
                Span("▸" if rollout["rollout"] == record["shown"] else " ", "title"),
                Span(str(rollout["rollout"])),
                Span(str(rollout["length"])),
                _ended(rollout),
                _verdict(rollout["verdict"]),
                Span(" ".join("none" if score is None else f"{score:.2f}" for score in scores)),
                Span(" ".join("–" if a is None else f"{a:+.2f}" for a in advantages), "good" if best > 0 else ""),
            ]
        )
    last = [r["segments"][-1]["score"] for r in record["rollouts"] if r["segments"]]
    given = [score for score in last if score is not None]
    note = f"{len(given)} of {len(record['rollouts'])} scored"
    if given:
        note += f", last scores {np.mean(given):.3f} ± {np.std(given):.3f}"
    return _section(paper, "group", note) + paper.table(rows)


def _sampled(record: Record, paper: Paper) -> list[str]:
    lines = _rollout_head(record, paper) + _block(paper, record["rollouts"][record["shown"]]["response"] or "(empty)")
    if (judge := record["judge"]) is not None:
        note = f"{judge['backend']} {judge['model']}, {judge['readout']}"
        lines += _question(paper, "judge's prompt", judge["question"], record["reference"], note)
        lines += _said(record, paper)
    correct = sum(rollout["verdict"] == "correct" for rollout in record["rollouts"])
    lines += _section(paper, "samples", f"{correct} of {len(record['rollouts'])} correct")
    return lines + paper.table(_sample_rows(record))


def _sample_rows(record: Record) -> list[list[Span]]:
    rows = [[Span(cell) for cell in ("", "sample", "tokens", "", "verdict", "ends with")]]
    for rollout in record["rollouts"]:
        mark = Span("▸" if rollout["rollout"] == record["shown"] else " ", "title")
        row = [mark, Span(str(rollout["rollout"])), Span(str(rollout["length"])), _ended(rollout)]
        rows.append([*row, _verdict(rollout["verdict"]), Span(rollout["response"].strip()[-40:])])
    return rows


def _taught(record: Record, paper: Paper) -> list[str]:
    teacher, shown = record["teacher"], record["rollouts"][record["shown"]]
    lines = _section(paper, "teacher's prompt", f"{teacher['weights']}, {teacher['prompt_tokens']} tokens")
    hidden = record["reference"].strip()
    before, _, after = teacher["prompt"].partition(hidden)
    lines += _block(paper, before) + _hidden(paper, hidden) + _block(paper, after.removeprefix("\n"))
    lines += _rollout_head(record, paper)
    ratio = shown["logratio"]
    tints = ["good" if r > 0.1 else "bad" if r < -0.1 else "" for r in ratio]
    lines += _tokens(paper, shown["pieces"], tints)
    order = np.argsort(ratio, kind="stable")
    rows = [[Span(cell) for cell in ("token", "log-ratio", "text")]]
    for n in [*order[: -_EXTREMES - 1 : -1], *order[: min(_EXTREMES, max(len(ratio) - _EXTREMES, 0))][::-1]]:
        rows.append([Span(str(n)), _advantage(ratio[n]), Span(_quoted(shown["pieces"][n]))])
    note = "log teacher − log policy, nats"
    lines += _section(paper, "teacher's log-ratio, most and least", note) + paper.table(rows)
    rows = [[Span(cell) for cell in ("", "rollout", "tokens", "", "verdict", "mean log-ratio", "least", "most")]]
    for rollout in record["rollouts"]:
        ratio = rollout["logratio"]
        mark = Span("▸" if rollout["rollout"] == record["shown"] else " ", "title")
        row = [mark, Span(str(rollout["rollout"])), Span(str(rollout["length"])), _ended(rollout)]
        cells = [_advantage(float(of(ratio))) for of in (np.mean, np.min, np.max)] if ratio else [Span("–")] * 3
        rows.append([*row, _verdict(rollout["verdict"]), *cells])
    return lines + _section(paper, "group") + paper.table(rows)


def _supervised(record: Record, paper: Paper) -> list[str]:
    note = f"{record['target_tokens']} tokens, each with a loss"
    return _section(paper, "target", note) + _tokens(paper, record["target_pieces"])


def _lesson(record: Record, paper: Paper) -> list[str]:
    judge = record["judge"]
    note = f"{judge['model']}, {judge['readout']}, {judge['asks']}, no loss"
    labels, last = record["labels"], len(record["labels"]) - 1
    of = f" about part {last}" if last else ""
    lines = _question(paper, f"judge's prompt{of}", judge["question"], record["reference"], note)
    for number, label in enumerate(labels):
        of = f" of part {number}" if last else ""
        share = label["share"]
        between = f": {1 - share:.2f} of it, and {share:.2f} of the next digit" * (share > 0)
        note = f"{label['target_tokens']} tokens with a loss, score {label['score']:.3g}{between}"
        lines += _section(paper, f"answer to learn{of}", note) + _tokens(paper, label["target_pieces"])
    if last:
        rows = [[Span(cell) for cell in ("part", "score", "ends with")]]
        for number, label in enumerate(labels):
            rows.append([Span(str(number)), _score(label["score"]), Span(label["text"].strip()[-40:])])
        lines += _section(paper, "lesson's parts") + paper.table(rows)
    return lines


def _calibrated(record: Record, paper: Paper) -> list[str]:
    lines = _fixed_rollout(record, paper)
    for judge in record["judges"]:
        note = f"{judge['backend']} {judge['model']}, {judge['readout']}"
        answers = judge["answers"]
        if not answers:
            lines += _section(paper, f"judge {judge['name']}", f"{note}: not asked")
            continue
        first = answers[0]
        lines += _question(
            paper, f"judge {judge['name']}: prompt, {first['pass']}", first["question"], record["reference"], note
        )
        for answer in answers:
            if answer["text"] is not None:
                lines += _section(paper, f"{judge['name']}: words, {_pass(answer)}", "cut" if answer["cut"] else "")
                lines += _block(paper, answer["text"] or "(nothing)")
        digits = any(answer["digits"] is not None for answer in answers)
        rows = [[Span(cell) for cell in ("pass", "score", *(f"P({d})" for d in range(1, 6) if digits))]]
        for answer in answers:
            rows.append([Span(_pass(answer)), _score(answer["score"]), *(_digits(answer["digits"]) if digits else [])])
        lines += _section(paper, f"judge {judge['name']}: scores") + paper.table(rows)
    return lines


def _pass(answer: Record) -> str:
    name = answer["pass"] if answer["segment"] is None else f"{answer['pass']} {answer['segment']}"
    return f"{name}, repeat {answer['repeat']}" if answer["repeat"] else name


def _fixed_rollout(record: Record, paper: Paper) -> list[str]:
    lines = _section(paper, f"rollout {record['rollout']}", f"as it was written, {record['verdict']}")
    return lines + _block(paper, record["response"] or "(empty)")


def _labelled(record: Record, paper: Paper) -> list[str]:
    judge, segments = record["judge"], record["segments"]
    note = f"{judge['backend']} {judge['model']}, {judge['readout']}, {judge['asks']}"
    lines = _fixed_rollout(record, paper)
    of = f" about part {judge['segment']}"
    lines += _question(paper, f"judge's prompt{of}", judge["question"], record["reference"], note)
    lines += _answers(segments, judge, paper)
    digits = any(segment["digits"] is not None for segment in segments)
    rows = [[Span(cell) for cell in ("part", "score", *(f"P({d})" for d in range(1, 6) if digits), "ends with")]]
    for number, segment in enumerate(segments):
        row = [Span(str(number)), _score(segment["score"]), *(_digits(segment["digits"]) if digits else [])]
        rows.append([*row, Span(segment["text"].strip()[-40:])])
    return lines + _section(paper, "labels") + paper.table(rows)


def _annotated(record: Record, paper: Paper) -> list[str]:
    annotator = record["annotator"]
    note = f"{annotator['backend']} {annotator['model']}"
    lines = _fixed_rollout(record, paper)
    lines += _question(paper, "annotator's prompt", annotator["question"], record["reference"], note)
    lines += _section(paper, "annotator's words", f"{annotator['tokens']} tokens read and written")
    lines += _block(paper, annotator["text"] or "(nothing)")
    if (fields := annotator["fields"]) is not None:
        named = ", ".join(f"{name} {value}" for name, value in fields.items() if value) or "none of them"
        lines += _section(paper, "fields that hold") + _block(paper, named)
    return lines


_TASKS = {
    "rl": _scored,
    "distill": _taught,
    "sft": _supervised,
    "judge": _lesson,
    "evaluate": _sampled,
    "calibrate": _calibrated,
    "annotate": _annotated,
    "label": _labelled,
}
