r"""Grades multiple choice: which option does a response name, and is it the right one?

Where the answer is looked for; the first that the response has decides, whatever the others say:

1. the last balanced `\boxed{...}`, as for mathematics;
2. the last final-answer line: `Final Answer: B`, `Answer: (B)`, `The correct answer is **B**`, or a heading
   `Final answer` with the answer below it.  A line where prose follows (`the answer is consistent with ...`) is none;
3. the last line that is not empty, if it is a lone label, `B` or `(B)`, or has a label in bold, `**B**`.

What is found there names an option by its label, by its whole text, or by both.  Spaces, LaTeX dress and, where nothing
matches better, case do not matter.  What equals an option's text is that option, even where it looks like the label of
another; `(B)` is always a label.  A response that names two options, or none, is unparsable.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

from exprl_jax.data.problems import Problem
from exprl_jax.reward.verifiers.math import MAX_ANSWER, last_boxed
from exprl_jax.reward.verifiers.verdict import Verdict
from exprl_jax.reward.verifiers.verifier import Verifier

_Choices = tuple[tuple[str, str], ...]

_MARK = re.compile(
    r"\b(?:answer|(?:correct|right|best) (?:option|choice))(?: (?:choice|option))?"
    r"(?: ?(?P<colon>[:=–—]| -(?= ))\*?| (?:is|must be|should be|would be|will be)\b ?:?)",
    re.IGNORECASE,
)
_HEADING = re.compile(r"(?:the )?(?:(?:final|correct) )?answer ?:?", re.IGNORECASE)
_PROSE = re.compile(r"[a-z]{2,}|an? [a-z]")
_BOLD = re.compile(r"\*\*([^*]{1,40})\*\*|\\(?:textbf|mathbf|boldsymbol) ?\{([^{}]{1,40})\}")
_NOT = re.compile(r"\b(?:not|cannot|neither|wrong|incorrect|eliminated?|rule)\b|n['’]t\b", re.IGNORECASE)

# A label alone, or in brackets; and a label in front of something.
_LEAD = r"(?:the )?(?:(?:final|correct) )?(?:(?:answer|option|choice|letter)\b[ :]*(?:is\b)?[ :]*){0,2}"
_LABEL = re.compile(rf"(?i:{_LEAD})[(\[{{<*_\"]* ?([A-Za-z0-9]{{1,3}}) ?[)\]}}>*_\".,:;!]*")
_LABEL_FIRST = re.compile(rf"(?i:{_LEAD})[(\[{{]?([A-Za-z0-9]{{1,3}})(?:[)\]}}][.:,]?|[.:]| [-–—])(?: |$)")
_REASON = re.compile(r"[ ,;.(]*\b(?:because|since|as|which|due to|is|not)\b.*", re.DOTALL)
# Between two digits a comma or a slash belongs to a number.
_JOIN = re.compile(r" ?((?<!\d)[,/]|[,/](?!\d)|[;&]|\bor\b|\band\b) ?")
_WORD = re.compile(r"[A-Za-z]{3,}")

_DRESS = re.compile(
    r"\\(?:text|textbf|textit|textrm|textsf|mathrm|mathbf|mathsf|mathit|boldsymbol|mbox|emph)\s*\{([^{}]*)\}"
)
_SILENT = re.compile(r"\\[()\[\]]|\\(?:left|right|displaystyle)(?![A-Za-z])|\*\*|[$`]")
_SPACE = re.compile(r"\\(?:[,;:! ]|q?quad(?![A-Za-z]))|[~\s]+")
_SYMBOL = re.compile(r"\\[A-Za-z]+|\\%|[µ−–]")
_SYMBOLS = {
    r"\times": "×",
    r"\cdot": "·",
    r"\circ": "°",
    r"\degree": "°",
    r"\pm": "±",
    r"\infty": "∞",
    r"\to": "→",
    r"\rightarrow": "→",
    r"\leq": "≤",
    r"\le": "≤",
    r"\geq": "≥",
    r"\ge": "≥",
    r"\neq": "≠",
    r"\ne": "≠",
    r"\approx": "≈",
    r"\alpha": "α",
    r"\beta": "β",
    r"\gamma": "γ",
    r"\delta": "δ",
    r"\Delta": "Δ",
    r"\lambda": "λ",
    r"\mu": "μ",
    r"\nu": "ν",
    r"\pi": "π",
    r"\sigma": "σ",
    r"\theta": "θ",
    r"\omega": "ω",
    r"\Omega": "Ω",
    r"\%": "%",
    "µ": "μ",
    "−": "-",
    "–": "-",
    r"\dfrac": r"\frac",
    r"\tfrac": r"\frac",
}
_FRACTION = re.compile(r"\\frac\{(\w+)\}\{(\w+)\}")
_DEGREE = re.compile(r"\^(?:\{°\}|°)")
_POWER = re.compile(r"\^(-?\d+|[A-Za-z])")


def grade_choice(response: str, answer: str, choices: _Choices) -> Verdict:
    """Whether a response names the right option.

    Args:
      response: what the policy wrote.
      answer: the right option, as `correct_label` reads it.
      choices: (label, text) of each option.

    Returns:
      `correct` or `wrong` where exactly one option is named; `no_answer` where the response has an answer in none of
      the three places; `unparsable` where what stands there names no option, or several.

    Raises:
      ValueError: as `correct_label`.
    """
    label = correct_label(answer, choices)
    named = _answered(response, choices)
    if named is None:
        return Verdict.no_answer
    if len(named) != 1:
        return Verdict.unparsable
    return Verdict.correct if named == {label} else Verdict.wrong


def correct_label(answer: str, choices: _Choices) -> str:
    """The label of the right option.

    Args:
      answer: a label, or the whole text of an option; a label where it is both, as data sets write it.
      choices: (label, text) of each option.

    Raises:
      ValueError: two options share a label; or the answer is neither a label nor the text of exactly one option.
    """
    labels = [label for label, _ in choices]
    if len(set(labels)) != len(labels):
        raise ValueError(f"answer choices share a label: got {', '.join(labels)}; give each option its own")
    if answer.strip() in labels:
        return answer.strip()
    named = _named(answer, choices)
    if len(named) != 1:
        raise ValueError(
            f"the answer {answer!r:.60} is {'the text of several options' if named else 'not an option'}: expected one"
            f" of the labels {', '.join(labels)}, or the whole text of one option; mend the row's answer or choices"
        )
    return next(iter(named))


def _answered(response: str, choices: _Choices) -> set[str] | None:
    """The labels that a response names as its answer; None where it gives no answer."""
    box = last_boxed(response)
    if box is not None:
        return _named(box, choices)
    for said, is_prose in _answer_lines(response):
        named = _named(said, choices)
        if named or not is_prose:
            return named
    last = response.rstrip().rpartition("\n")[2]
    if len(last) > MAX_ANSWER:
        return None
    if not _NOT.search(last):
        bold = [_label(_bare(found[1] or found[2]), choices) for found in _BOLD.finditer(last)]
        if any(bold):
            return set().union(*bold)
    parts = [_label(part, choices) for part in _JOIN.split(_bare(last))[::2]]
    return set().union(*parts) if all(parts) else None


def _answer_lines(response: str) -> Iterator[tuple[str, bool]]:
    """What final-answer lines say, the last line first, and whether it begins like prose."""
    below = ""
    for line in reversed(response.splitlines()):
        plain = " ".join(line.replace("**", "").lstrip("# ").split())
        if not plain:
            continue
        if _HEADING.fullmatch(plain):
            yield below, False
        else:
            *_, mark = [None, *_MARK.finditer(plain)]
            if mark:
                said = plain[mark.end() :].strip()
                yield said, not mark["colon"] and bool(_PROSE.match(said))
        below = plain


def _named(text: str, choices: _Choices) -> set[str]:
    """The labels of the options that an answer names, by label, by text, or by both; empty if it cannot be read."""
    if len(text) > MAX_ANSWER + max((len(option) for _, option in choices), default=0):
        return set()
    bare = _bare(text)
    without_reason = _REASON.sub("", bare)
    named = _one(text.strip(), choices) or _one(bare, choices) or _one(without_reason, choices)
    if named:
        return named
    first, *others = _JOIN.split(without_reason)
    labelled = _labelled(first, choices)
    named = labelled | _one(first, choices)
    if not named:
        return set()
    for joint, part in zip(others[::2], others[1::2], strict=True):
        more = _one(part, choices) or _labelled(part, choices)
        # `B, the powerhouse` goes on about B; `B or E` and `2, 5` name what is no option.
        if not more and not labelled and (joint != "," or not _WORD.search(part)):
            return set()
        named |= more
    return named


def _one(bare: str, choices: _Choices) -> set[str]:
    """The options that one expression names: an option's text, a label, or a label and a text (or two labels)."""
    options, folded = _options(choices)
    key = _key(bare)
    named = options.get(bare) or options.get(key) or _label(bare, choices, fold=False)
    named = named or folded.get(key.casefold()) or _label(bare, choices)
    if not named and (first := _labelled(bare, choices)):
        rest = bare[_LABEL_FIRST.match(bare).end() :].strip()
        second = options.get(rest) or options.get(_key(rest)) or folded.get(_key(rest).casefold())
        second = second or _label(rest, choices, fold=False) or _labelled(rest, choices)
        if second:
            # Of two options with one text, a label names one.
            named = first if first <= second else first | second
    return set(named or ())


def _label(bare: str, choices: _Choices, fold: bool = True) -> set[str]:
    found = _LABEL.fullmatch(bare)
    return _labels_of(found[1], choices, fold) if found else set()


def _labelled(bare: str, choices: _Choices) -> set[str]:
    """The label in front of an expression."""
    found = _LABEL_FIRST.match(bare)
    return _labels_of(found[1], choices, True) if found else set()


def _labels_of(name: str, choices: _Choices, fold: bool) -> set[str]:
    exact = {label for label, _ in choices if label == name}
    return exact or {label for label, _ in choices if fold and label.casefold() == name.casefold()}


@functools.lru_cache(maxsize=1024)
def _options(choices: _Choices) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """The labels of the options with a text, by the text and its key, and by its key in lower case."""
    exact: dict[str, set[str]] = {}
    folded: dict[str, set[str]] = {}
    for label, text in choices:
        for name in {text.strip(), _key(_bare(text))}:
            exact.setdefault(name, set()).add(label)
        folded.setdefault(_key(_bare(text)).casefold(), set()).add(label)
    return exact, folded


def _bare(text: str) -> str:
    r"""Text without LaTeX's and Markdown's dress, `\text{...}`, dollars and stars, and with single spaces."""
    text, dressed = _SILENT.sub("", text), None
    while text != dressed:
        dressed, text = text, _DRESS.sub(r"\1", text)
    return _SPACE.sub(" ", text).strip()


def _key(bare: str) -> str:
    """What two spellings of one option have in common."""
    key = _SYMBOL.sub(lambda found: _SYMBOLS.get(found[0], found[0]), bare)
    key = _FRACTION.sub(r"\1/\2", _DEGREE.sub("°", "".join(key.split())))
    return _POWER.sub(r"^{\1}", key).rstrip(".") or key


def vote(problem: Problem, response: str) -> str | None:
    """The label that a response names: the one that would be accepted as its answer; None without one."""
    labels = (label for label, _ in problem.choices)
    return next((x for x in labels if grade_choice(response, x, problem.choices) == Verdict.correct), None)


VERIFIER = Verifier(
    open=None,
    row=lambda problem, response: grade_choice(response, problem.answer, problem.choices),
    check=lambda problem: correct_label(problem.answer, problem.choices),
    vote=vote,
)
