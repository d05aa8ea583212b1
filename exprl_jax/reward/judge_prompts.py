"""What the judge is asked, and how its answer is read.

The words are a template's (`rubric`), the built-in one or a file that the config names.  Every built-in prompt that
rewards come from is in one order: rubric (the system turn), problem with its answer choices, reference solution, and
the trace last, so that one prefill serves all rollouts, and all prefixes, of a problem.  Two other prompts only measure
the judge: one without a reference, one with the reference after the trace.  The trace itself is never here: a marker
holds its place, and the trace's tokens are put there.

A score is a whole number from 1 to 5 (Likert) for partial progress relative to the reference.  Two read-outs:

  text    The judge writes an analysis and then a line `Score: 4`; `parse_score` reads what the judge wrote and nothing
          else, so a score line in a trace is out of its reach.
  logits  The judge's turn is begun with `Score: ` and the probabilities of the five digits that could follow are the
          answer.  The prompt is short, for small judges.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from exprl_jax.data.tokenizer import Message, Tokenizer
from exprl_jax.kinds import KINDS
from exprl_jax.reward.answers import bracketed, read_labelled
from exprl_jax.reward.rubric import DIGITS, Readout, Unit, Variant, open_rubric, stated_problem

# What the judge's turn is begun with.
CONTINUATION = {"text": "", "logits": "Score: "}

# What a rubric calls what is scored (its holes {unit} and {Unit}).
_UNITS = {"outcome": "attempt", "prefix": "attempt so far", "step": "step"}
# How to answer: what the read-outs read.
_FORM = {
    "text": (
        "Then end with one line that holds nothing but the score, a whole number from 1 to 5, in this form:\n"
        "Score: <1-5>"
    ),
    "logits": "Answer with the score only: one digit from 1 to 5.",
}
_FORM_OF_LIST = (
    "Write the list and nothing else, one item a line with its number before it, in this form:\n"
    "1. <the first thing to achieve>\n2. <the second>"
)
_FORM_BY_ITEM = (
    "Then end with one line for each item of the checklist, in its order, that holds nothing but the item's number "
    "and yes or no, in this form:\nItem <number>: <yes|no>"
)


def judge_messages(
    problem: str,
    choices: Sequence[tuple[str, str]],
    reference: str,
    domain: str,
    unit: Unit,
    readout: Readout,
    marker: str,
    rubric: str = "",
) -> list[Message]:
    """The judge's prompt with `marker` in place of the trace.

    Args:
      problem: the problem's text.
      choices: (label, text) of each answer choice; empty where the problem has none.
      reference: the reference solution.
      domain: selects the rubric's advice.
      unit: what is scored: a whole attempt (`outcome`), an attempt up to a segment's end (`prefix`) or one segment
        alone (`step`).
      readout: how the score is read; begin the judge's turn with `CONTINUATION[readout]`.
      marker: a string that the tokenizer's `render_split` recognises; it occurs exactly once in the result.
      rubric: the template's file; empty for the built-in one.

    Returns:
      A system and a user message, or the user's alone where the template has no system turn.

    Raises:
      ValueError: an unknown domain, unit or read-out, an empty reference, a problem that contains the marker, or a
        template that has no such prompt.
    """
    return _chat(problem, choices, _needed(problem, reference), domain, unit, readout, "", marker, rubric)


def reference_last_messages(
    problem: str,
    choices: Sequence[tuple[str, str]],
    reference: str,
    domain: str,
    unit: Unit,
    readout: Readout,
    marker: str,
    rubric: str = "",
) -> list[Message]:
    """`judge_messages` in the order of the released templates: problem, trace, and the reference after the trace.

    For measuring what our order changes; nothing after the problem is shared between the rollouts of a problem.
    """
    return _chat(problem, choices, _needed(problem, reference), domain, unit, readout, "reference_last", marker, rubric)


def blind_messages(
    problem: str,
    choices: Sequence[tuple[str, str]],
    domain: str,
    readout: Readout,
    marker: str,
    unit: Unit = "outcome",
    rubric: str = "",
) -> list[Message]:
    """Asks for the quality of an attempt without a reference solution, on the same scale and in the same form.

    For measuring what references are worth (paper Tables 5 and 6); no run is trained on it.
    """
    return _chat(problem, choices, "", domain, unit, readout, "blind", marker, rubric)


def checklist_messages(
    problem: str,
    choices: Sequence[tuple[str, str]],
    items: Sequence[str],
    domain: str,
    unit: Unit,
    readout: Readout,
    marker: str,
    rubric: str = "",
) -> list[Message]:
    """`judge_messages` with a checklist in the reference's place.

    `logits` is answered by a digit for the share, `text` as the template asks: item by item (`checklist.read_items`) or
    by a score line (`Rubric.by_item`).
    """
    listed = "\n".join(f"{number}. {item}" for number, item in enumerate(items, 1))
    return _chat(problem, choices, listed, domain, unit, readout, "checklist", marker, rubric)


def write_messages(
    problem: str, choices: Sequence[tuple[str, str]], reference: str, domain: str, marker: str, rubric: str = ""
) -> list[Message]:
    """Asks for a problem's checklist (`checklist.parse_checklist`); nothing goes where the marker stands."""
    return _chat(problem, choices, _needed(problem, reference), domain, "outcome", "text", "write", marker, rubric)


def _chat(
    problem: str,
    choices: Sequence[tuple[str, str]],
    given: str,
    domain: str,
    unit: Unit,
    readout: Readout,
    variant: Variant,
    marker: str,
    rubric: str,
) -> list[Message]:
    _check_kinds(domain, unit, readout)
    values = {
        "task": KINDS[domain].task,
        "advice": KINDS[domain].advice,
        "unit": _UNITS[unit],
        "Unit": _UNITS[unit].capitalize(),
        "problem": stated_problem(problem, choices),
        "reference": given.strip(),
        "checklist": given.strip(),
        "form": _FORM_OF_LIST if variant == "write" else _FORM[readout],
        "form_by_item": _FORM_BY_ITEM,
    }
    return open_rubric(rubric).chat(unit, readout, variant, values, marker)


def _check_kinds(domain: str, unit: str, readout: str) -> None:
    domains = [name for name, kind in KINDS.items() if kind.domains]
    options = (("domain", domain, domains), ("unit", unit, get_args(Unit)), ("readout", readout, get_args(Readout)))
    for name, value, known in options:
        if value not in known:
            raise ValueError(f"unknown judge {name} {value!r}; expected one of {', '.join(known)}")


def _needed(problem: str, reference: str) -> str:
    if not reference.strip():
        raise ValueError(f"the problem {problem[:60]!r} has no reference solution, and the judge scores against one")
    return reference


# --- reading the answer ----------------------------------------------------------------------------------------------

_OUT_OF = ("/5", " out of 5", " of 5")
_VALUES = {
    value: digit
    for digit in DIGITS
    for value in (
        *(rating for tail in ("", *_OUT_OF) for rating in bracketed(f"{digit}{tail}")),
        # Beside a bracket there are no blanks.
        *(f"{rating}{tail.lstrip()}" for tail in _OUT_OF for rating in bracketed(str(digit))[1:]),
    )
}


def render_score(likert: int) -> str:
    """The line that `parse_score` reads and that the judge is asked for."""
    return f"Score: {likert}"


def parse_score(text: str, *, at_end: bool = False) -> int | None:
    """The score on the last score line of what the judge wrote after its thoughts; None where there is none to trust.

        value       ::=  rating | open rating close | open digit close of
        rating      ::=  digit | digit of
        of          ::=  "/5" | "out of 5" | "of 5"
        digit       ::=  "1" | "2" | "3" | "4" | "5"
        open close  ::=  "[" "]" | "(" ")" | "<" ">" | "{" "}" | "\\boxed{" "}", and so with text, textbf and mathbf

    What a score line is, and when it hides the lines before it, says `answers.read_labelled`, of the label `score`.
    `Score: 7`, `4.5`, `4 or 5`, `4/10` and `4 because ...` are no scores.

    Args:
      at_end: a score counts only where nothing follows it.
    """
    return read_labelled(text, "score", _VALUES, at_end=at_end)


def normalise(likert: Any) -> Any:
    """s = (likert − 1) / 4, from 1..5 to 0..1; a number or an array."""
    return (likert - 1) / 4


def digit_token_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids of the tokens `1` to `5` where they follow the logits read-out's continuation.

    Raises:
      ValueError: a digit is not exactly one token more than the continuation.
    """
    continuation = CONTINUATION["logits"]
    stem = list(tokenizer.encode(continuation))
    ids = []
    for digit in DIGITS:
        whole = list(tokenizer.encode(f"{continuation}{digit}"))
        if whole[:-1] != stem:
            raise ValueError(
                f"tokenizer {tokenizer.name} does not encode {continuation + str(digit)!r} as {continuation!r} and one "
                f"token more, got {whole} after {stem}; set the judge's read-out to 'text' for this model"
            )
        ids.append(whole[-1])
    return tuple(ids)
