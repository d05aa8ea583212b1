r"""Grades multiple choice: which option does a response name, and is it the right one?

Where the answer is looked for; the first that the response has decides:

1. the last of: a balanced `\boxed{...}`, as for mathematics; `<answer>...</answer>`; an `"answer": ...` of JSON;
2. the last final-answer line, `Final Answer: B`, `The correct answer is **B**`, `Option B is correct`, or a heading
   `Final answer` with the answer below it.  A line that supposes or asks (`if the answer is B`) is none;
3. the last line that is not empty, if it is a lone label, `B` or `(B)`, has a label in bold, `**B**`, or chooses one:
   `I would go with B`, `Thus, B.`; or if it is the only line, and a label
   with its option: `B) 81 years`.

What is there names an option by its label, by its whole text, or by both (`choice_statement`).  Spaces, dress and,
where nothing matches better, case do not matter.  What equals an option's text is that option, even where it looks like
the label of another; `(B)` is always a label.  A response that names two options, or none, or speaks of another in the
same breath, `Answer: B (but C is fine too)`, is unparsable; so is one that takes back, further down, what it named
(`Answer: B.  Wait, it is C.`).  One that ends within a box or a tag has no answer.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from typing import NamedTuple

from exprl_jax.data.problems import Problem
from exprl_jax.reward.verifiers.choice_statement import (
    HTML_TAG,
    Choices,
    Statement,
    bare,
    one_label,
    one_option,
    read_statement,
)
from exprl_jax.reward.verifiers.math import MAX_ANSWER, last_boxed
from exprl_jax.reward.verifiers.verdict import Verdict
from exprl_jax.reward.verifiers.verifier import Verifier

_MARK = re.compile(
    r"\b(?:(?:answer|(?:correct|right|best|final|chosen|selected) (?:option|choice))(?: (?:choice|option))?"
    r"(?: ?(?P<colon>[:=]| [-–—→](?= ))\*?"
    r"|(?: (?:is|must be|should be|would be|will be|has to be)|['’]s)\b"
    r"(?: (?:clearly|therefore|thus|then|indeed|definitely))* ?:?)"
    r"|(?P<short>ans[.:]))",
    re.IGNORECASE,
)
_HEADING = re.compile(r"(?:the )?(?:(?:final|correct) )?answer ?:?", re.IGNORECASE)
_PROSE = re.compile(r"[a-z]{2,}|an? [a-z]")
# Before `the answer is`, in one clause with it.
_SUPPOSED = re.compile(
    r"\b(?:if|suppos\w+|assum\w+|whether|why|would|could|might|may|previous|first|initial|earlier|some|perhaps|maybe)\b",
    re.IGNORECASE,
)
_OPPOSED = re.compile(
    r"\b(?:not|never|no|nobody|none|doubt|unlikely|wrong|incorrect|false|least|worst)\b|n['’]t\b", re.IGNORECASE
)
_CLAUSE_END = re.compile(r".*(?:[,;.:!?]|\b(?:but|so|and|then|therefore|hence|thus)\b)", re.IGNORECASE | re.DOTALL)
_TAKES_BACK = re.compile(
    r"^or\b|(?:^|[.!?;,] ?)(?:no|wait|actually|correction|sorry|oops|hmm|on second thought|scratch that|instead|rather"
    r"|i was wrong|just kidding)\b",
    re.IGNORECASE,
)
# So many lines without a mark are read, from the end: an answer further up is marked, or is none.
_LAST_LINES = 20
# What every line has that judges an option, or takes back an answer; most lines of a reasoning have none of it.
_MAY_JUDGE = re.compile(
    r"correct|right|true|best|accurate|valid|answer|solution|wrong|false|possible|inconsist|likely|least|worst|eliminat"
    r"|exclud|rule|reject|can(?:not|['’]t)|(?:is|are|was|were|be)(?: not\b|n['’]t)|neither|^or\b|\bno\b|wait|actually"
    r"|correction|sorry|oops|hmm|second thought|scratch that|instead|rather|kidding|only|\bone\b|\bout\b",
    re.IGNORECASE,
)
_TAG = re.compile(r"[<\[](?P<close>/?)(?:final[_ -]?)?answer[>\]]", re.IGNORECASE)
# Behind the last answer that is marked as such: another that does not end.
_BREAKS_OFF = re.compile(r"\\boxed\s*\{|[<\[](?:final[_ -]?)?answer[>\]]", re.IGNORECASE)
_DENIED_BEFORE = re.compile(r"(?:\b(?:not|never|cannot be)|n['’]t)[\s:$*\\(\[]*\Z")
_DENIED_BEHIND = re.compile(r"[)}\s$*\\\].]*(?:\?|(?:is|was)(?:n['’]t| not| (?:clearly )?(?:wrong|incorrect|false))\b)")
_JSON_KEY = re.compile(
    r"""["'](?:(?:final|correct|selected|chosen|my)[_ ]?(?:answer|choice|option)|answer|choice)["']\s*:\s*""",
    re.IGNORECASE,
)
_BOLD = re.compile(r"\*\*([^*]{1,40})\*\*|\\(?:textbf|mathbf|boldsymbol) ?\{([^{}]{1,40})\}")
_CHOOSES = re.compile(
    r"(?:so |thus |hence |therefore )?,? ?(?:i|we)(?:['’](?:d|ll)| would| will)?"
    r" (?:go(?:ing)? with|choose|pick|select|opt for) (?P<chosen>.{1,200})"
    r"|(?:so |thus |hence |therefore )?,? ?it(?: is|['’]s) (?P<it>.{1,200})"
    r"|(?:so|thus|hence|therefore),? (?P<label>\W{0,3}\w{1,3}\W{0,3})",
    re.IGNORECASE,
)
# Between two digits a comma or a slash belongs to a number.
_JOIN = re.compile(r" ?((?<!\d)[,/]|[,/](?!\d)|[;&]|\bor\b|\band\b) ?")
_LOGICAL_NOT = re.compile(r"(?<![\w}~])~(?=\w)")
_HTML = re.compile(HTML_TAG, re.IGNORECASE)
_BULLET = re.compile(r"\A[ \t]*(?:[-*+•>#]+[ \t]+)+")


def grade_choice(response: str, answer: str, choices: Choices) -> Verdict:
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


def correct_label(answer: str, choices: Choices) -> str:
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
    statement = read_statement(answer, choices)
    named = statement.mentioned if len(statement.mentioned) > 1 else _settled(statement)
    if len(named) != 1:
        raise ValueError(
            f"the answer {answer!r:.60} is {'the text of several options' if named else 'not an option'}: expected one"
            f" of the labels {', '.join(labels)}, or the whole text of one option; mend the row's answer or choices"
        )
    return next(iter(named))


class _Container(NamedTuple):
    """An answer that is marked as such, None for one that cannot be read; where its mark begins and ends."""

    content: str | None
    start: int
    end: int


def _answered(response: str, choices: Choices) -> frozenset[str] | None:
    """The labels that a response names as its answer, empty if it is unclear; None where it gives no answer."""
    container = _last_container(response)
    if _BREAKS_OFF.search(response, container.end if container else 0):
        return None
    if container is None:
        stated = _stated(response, choices)
        last = None if stated.marked else _last_line(response, choices)
        if stated.named is None or last is None:
            return last if stated.named is None else stated.named
        return last & stated.named
    named = frozenset() if container.content is None else _contained(container.content, choices)
    if _DENIED_BEFORE.search(response, max(0, container.start - 40), container.start) or _DENIED_BEHIND.match(
        response, container.end
    ):
        return frozenset()
    below = _stated(response[container.end :], choices)
    taken_back = (below.named or frozenset()) - named or below.taken_back - named or below.denied & named
    return frozenset() if taken_back else named


def _last_container(response: str) -> _Container | None:
    containers = []
    opened: re.Match[str] | None = None
    for tag in _TAG.finditer(response):
        if tag["close"] and opened is not None:
            containers.append(_Container(response[opened.end() : tag.start()], opened.start(), tag.end()))
        opened = None if tag["close"] else tag
    start = response.rfind("\\boxed")
    box = last_boxed(response)
    if box is not None and last_boxed(response[start:]) is not None:
        containers.append(_Container(box, start, start + len("\\boxed{}") + len(box)))
    *_, key = [None, *_JSON_KEY.finditer(response)]
    if key and (end := response.find("}", key.end())) >= 0:
        containers.append(_Container(_json_text(response, key.end()), key.start(), end))
    return max(containers, key=lambda container: container.end, default=None)


def _json_text(response: str, at: int) -> str | None:
    """The text of the JSON or Python string, number, or list of one of them at a position; None for another value."""
    try:
        value, _ = json.JSONDecoder().raw_decode(response, at)
    except (ValueError, RecursionError):
        quoted = re.compile(r"'(?:[^'\\\n]|\\.)*'").match(response, at)
        try:
            value = ast.literal_eval(quoted[0]) if quoted else None
        except (ValueError, SyntaxError):
            return None
    if isinstance(value, list) and len(value) == 1:
        (value,) = value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) else None


def _contained(content: str, choices: Choices) -> frozenset[str]:
    """What a box, a tag or a value of JSON names."""
    inner = _last_container(content)
    if inner is not None and inner.content != content:
        return frozenset() if inner.content is None else _contained(inner.content, choices)
    if len(content) > MAX_ANSWER + max((len(text) for _, text in choices), default=0):
        return frozenset()
    *_, mark = [None, *_MARK.finditer(content)]
    return _settled(_read(content[mark.end() :] if mark else content, choices))


def _settled(statement: Statement) -> frozenset[str]:
    """What is named; nothing where the statement is unclear, or denies what it names."""
    return frozenset() if statement.unclear or statement.named & statement.denied else statement.named


class _Stated(NamedTuple):
    """What the final-answer lines of a text say.

    Attributes:
      named: by the last of them; None where there is none.
      marked: it says that it is the answer, as `Answer: B` does, and not only that it is correct.
      denied: by lines below it.
      taken_back: mentioned by lines below it that begin like `Wait`.
    """

    named: frozenset[str] | None
    marked: bool
    denied: frozenset[str]
    taken_back: frozenset[str]


def _stated(text: str, choices: Choices) -> _Stated:
    denied: frozenset[str] = frozenset()
    taken_back: frozenset[str] = frozenset()
    named, marked = None, False
    lines = _lines(text, choices)
    for kind, statement in lines:
        if kind == "taken back":
            taken_back |= statement.mentioned - statement.denied
        if kind in ("denied", "taken back", "judged"):
            denied |= statement.mentioned if kind == "denied" else statement.denied
        if kind == "answer":
            named, marked = _settled(statement), True
            break
        if kind == "judged" and (statement.named or statement.unclear):
            named = frozenset() if statement.unclear else statement.named
            # Verdicts on several options stand below each other.
            for above, other in lines:
                if above != "judged":
                    break
                named, denied = named | other.named, denied | other.denied
            break
    if named is not None and (named & denied or taken_back - named):
        named = frozenset()
    return _Stated(named, marked, denied, taken_back)


def _lines(response: str, choices: Choices) -> Iterator[tuple[str, Statement]]:
    """What lines say, the last first, and as what: `answer`, `denied` (`I doubt that the answer is`), `judged` (`B is
    correct`), `taken back` (`Wait, it is`), or `other`."""
    below, read = "", 0
    for line in reversed(response.splitlines()):
        plain = _plain(line)
        if not plain:
            continue
        if _HEADING.fullmatch(plain):
            yield "answer", _read(below, choices)
        elif marks := [*_MARK.finditer(plain)]:
            text, clause = plain[marks[-1].end() :].strip(), _CLAUSE_END.sub("", plain[: marks[-1].start()])
            statement = _read(text, choices)
            is_prose = not marks[-1]["colon"] and not marks[-1]["short"] and bool(_PROSE.match(text))
            if _OPPOSED.search(clause):
                yield "denied", statement
            elif _SUPPOSED.search(clause) or (
                is_prose and not (statement.named | statement.denied or statement.unclear)
            ):
                yield "other", statement
            else:
                others = statement.mentioned - statement.named - statement.denied
                yield (
                    "answer",
                    statement._replace(
                        unclear=statement.unclear or bool(statement.named and others and not statement.judges)
                    ),
                )
        elif read == _LAST_LINES or not _MAY_JUDGE.search(plain):
            yield "other", Statement()
        else:
            read += 1
            statement = _read(plain, choices)
            takes_back = statement.mentioned and _TAKES_BACK.search(plain)
            yield "judged" if statement.judges else "taken back" if takes_back else "other", statement
        below = plain


def _plain(line: str) -> str:
    """A line without the marks of a list, a quotation, a heading, or of bold text."""
    line = _BULLET.sub("", line.replace("**", "").replace("__", "").replace("`", "").replace("\uff1a", ":"), count=1)
    # Before a word `~` is a sign of logic; between two it is LaTeX's space.
    return " ".join(_LOGICAL_NOT.sub("¬", _HTML.sub("", line)).split())


def _read(text: str, choices: Choices) -> Statement:
    if len(text) > MAX_ANSWER + max((len(option) for _, option in choices), default=0):
        return Statement()
    return read_statement(text, choices)


def _last_line(response: str, choices: Choices) -> frozenset[str] | None:
    above, _, last = response.rstrip().rpartition("\n")
    if len(last) > MAX_ANSWER:
        return None
    if _BULLET.match(last) and _BULLET.match(above.rstrip().rpartition("\n")[2]):
        return None
    plain = _plain(last)
    parts = [one_label(part, choices) for part in _JOIN.split(bare(plain))[::2]]
    if all(parts):
        return frozenset().union(*parts)
    alone = one_option(plain, choices) if not above.strip() else set()
    if alone and one_label(plain.partition(" ")[0], choices):
        return frozenset(alone)
    if chooses := _CHOOSES.fullmatch(plain):
        if chooses["label"]:
            return frozenset(one_label(chooses["label"], choices)) or None
        return _settled(read_statement(chooses["chosen"] or chooses["it"], choices)) or None
    statement = read_statement(plain, choices)
    if statement.unclear or statement.denied:
        return None
    bold = [one_label(match[1] or match[2], choices) for match in _BOLD.finditer(last)]
    return frozenset().union(*bold) if any(bold) else None


def vote(problem: Problem, response: str) -> str | None:
    """The label that a response names: the one that would be accepted as its answer; None without one."""
    named = _answered(response, problem.choices)
    return next(iter(named)) if named is not None and len(named) == 1 else None


VERIFIER = Verifier(
    open=None,
    row=lambda problem, response: grade_choice(response, problem.answer, problem.choices),
    check=lambda problem: correct_label(problem.answer, problem.choices),
    vote=vote,
)
