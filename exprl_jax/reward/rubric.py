"""Rubrics: template files that a judge's prompts are made from; the built-in one is `rubric.txt` beside this module.

    a comment, up to the first section

    [system]                              whose turn, and for what: all units and read-outs here
    You grade attempts at a {task}. ...   1: ... 2: ... 3: ... 4: ... 5: ...
    [user text]                           a section that names more counts before one that names less
    Problem: {problem}  Reference: {reference}  {Unit}: {trace}  {form}

A template is cut into fixed text and holes once, when it is read, and a prompt is their concatenation: what fills a
hole is never looked at again, so braces, section lines and score lines in a problem or a reference are only text.  The
trace itself is never here: a marker holds its place.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, get_args

from exprl_jax.config import Judge
from exprl_jax.data.tokenizer import Message
from exprl_jax.packaged import locate

Unit = Literal["outcome", "prefix", "step"]
Readout = Literal["text", "logits"]
# What besides a score against the reference is asked: `blind` and `reference_last` measure the judge; `write` and
# `checklist` are of a rubric per problem.
Variant = Literal["", "blind", "reference_last", "write", "checklist"]

DIGITS = (1, 2, 3, 4, 5)
HOLES = ("task", "advice", "unit", "Unit", "problem", "reference", "checklist", "trace", "form", "form_by_item")
# Of each variant: what a judge compares with.
_GIVEN = {"": "reference", "blind": "", "reference_last": "reference", "write": "reference", "checklist": "checklist"}
_ROLES = ("system", "user")
_CONDITIONS = (*get_args(Unit), *get_args(Readout), *filter(None, get_args(Variant)))
_HEADING = re.compile(r"\[([a-z_]+(?: [a-z_]+)*)\]\s*")
_BRACES = re.compile(r"\{\{|\}\}|\{([^{}\n]*)\}|[{}]")


class Hole(str):
    """The name of a hole, among the texts of a section."""


@dataclasses.dataclass(frozen=True)
class Section:
    """A turn of the chat.

    Attributes:
      conditions: units, read-outs and variants that it is for; none of a sort means all.
      line: of its heading in the file, from 1.
      parts: texts and holes, in order.
    """

    role: str
    conditions: frozenset[str]
    line: int
    parts: tuple[str, ...]

    def holes(self, name: str) -> int:
        """How often a hole occurs."""
        return sum(isinstance(part, Hole) and part == name for part in self.parts)

    def fill(self, values: Mapping[str, str]) -> str:
        """Its text; each hole's name has a value."""
        return "".join(values[part] if isinstance(part, Hole) else part for part in self.parts)

    @property
    def fixed(self) -> str:
        """Its own words."""
        return "\n".join(part for part in self.parts if not isinstance(part, Hole))


@dataclasses.dataclass(frozen=True)
class Rubric:
    """A template.

    Attributes:
      name: its file, for errors.
    """

    name: str
    sections: tuple[Section, ...]

    def chat(
        self, unit: Unit, readout: Readout, variant: Variant, values: Mapping[str, str], marker: str
    ) -> list[Message]:
        """The messages of a prompt, with `marker` in the trace's place.

        Args:
          values: of the holes, but for the trace's.

        Raises:
          ValueError: the template has no sections for it, or the marker is empty or part of a value.
        """
        sections = self.turns(unit, readout, variant)
        messages = [Message(section.role, section.fill({**values, "trace": marker})) for section in sections]
        if not marker or sum(message.content.count(marker) for message in messages) != 1:
            stated = values["problem"][:60]
            raise ValueError(f"the trace's marker {marker!r} is empty or part of the problem {stated!r}; use another")
        return messages

    def turns(self, unit: Unit, readout: Readout, variant: Variant) -> list[Section]:
        """The sections of a prompt, system before user; there may be no system turn.

        Raises:
          ValueError: there is no user turn, two fit equally well, a hole or the digits' meaning is missing.
        """
        chosen = [section for role in _ROLES if (section := self._choose(role, unit, readout, variant))]
        if not chosen or chosen[-1].role != "user":
            words = " ".join(filter(None, (readout, unit, variant)))
            raise ValueError(f"judge.rubric: {self.name} has no section for [user {words}]; expected one")
        *_, user = chosen
        where = f"judge.rubric: {self.name}, line {user.line}: [{_title(user)}]"
        if user.holes("trace") != 1 or sum(section.holes("trace") for section in chosen) != 1:
            raise ValueError(f"{where}: expected the hole {{trace}} once, in the user's turn and nowhere else")
        given = _GIVEN[variant]
        for name in ("reference", "checklist"):
            if name != given and any(section.holes(name) for section in chosen):
                kind = f"that is {variant}" if variant == "blind" else f"that shows the {given}"
                raise ValueError(f"{where}: expected no hole {{{name}}} in a prompt {kind}")
        by_item = any(section.holes("form_by_item") for section in chosen)
        if by_item and (variant, readout) != ("checklist", "text"):
            raise ValueError(f"{where}: expected no hole {{form_by_item}} but in [user text checklist]")
        if by_item and any(section.holes("form") for section in chosen):
            raise ValueError(f"{where}: expected one of the holes {{form}} and {{form_by_item}}, got both")
        for name in filter(None, ("problem", given, "" if by_item else "form")):
            if not any(section.holes(name) for section in chosen):
                raise ValueError(f"{where}: the hole {{{name}}} is missing; expected it in the system or user turn")
        if variant == "write" or by_item:
            return chosen  # which are not answered by a digit
        fixed = "\n".join(section.fixed for section in chosen)
        if missing := [digit for digit in DIGITS if not re.search(rf"(?<![\w.]){digit}:", fixed)]:
            raise ValueError(
                f"{where}: it does not say what the score {missing[0]} means; expected '1: ...' to '5: ...' in the "
                "system or user turn"
            )
        return chosen

    def by_item(self, unit: Unit, readout: Readout) -> bool:
        """Whether a judge goes through a checklist item by item; else it gives one number.

        Raises:
          ValueError: as `turns`.
        """
        return any(section.holes("form_by_item") for section in self.turns(unit, readout, "checklist"))

    def _choose(self, role: str, unit: Unit, readout: Readout, variant: Variant) -> Section | None:
        """The section of a turn that names most of what is wanted, and nothing else; None without any."""
        wanted = {unit, readout, variant}
        # In another order the system's turn is the same.
        own = bool(variant) and (variant != "reference_last" or role == "user")
        fitting = [
            section
            for section in self.sections
            if section.role == role and section.conditions <= wanted and (not own or variant in section.conditions)
        ]
        if not fitting:
            return None
        most = max(len(section.conditions) for section in fitting)
        first, *others = [section for section in fitting if len(section.conditions) == most]
        if others:
            raise ValueError(
                f"judge.rubric: {self.name}, line {others[0].line}: [{_title(others[0])}] and [{_title(first)}] of "
                f"line {first.line} fit {readout} {unit} equally well; name more in one of them"
            )
        return first

    def check(self) -> None:
        """Checks every prompt that the template has a user turn for.

        Raises:
          ValueError: as `chat`; or there is none at all.
        """
        asked = [
            wanted
            for wanted in itertools.product(get_args(Unit), get_args(Readout), get_args(Variant))
            if self._choose("user", *wanted)
        ]
        if not asked:
            raise ValueError(f"judge.rubric: {self.name} has no section; expected a line [user], and a text below it")
        for wanted in asked:
            self.turns(*wanted)


def rubric_path(name: str) -> pathlib.Path:
    """Where the template lies that a config names."""
    return pathlib.Path(locate(name)) if name else pathlib.Path(__file__).with_name("rubric.txt")


def rubric_files(judge: Judge) -> dict[str, Sequence[pathlib.Path]]:
    """The files that a judge's prompts are made from and that its config names, by key and name."""
    files = {f"judge.rubric {judge.template}": [rubric_path(judge.template)]} if judge.template else {}
    if judge.per_problem and judge.checklists:
        files[f"judge.checklists {judge.checklists}"] = [pathlib.Path(judge.checklists)]
    return files


def open_rubric(name: str) -> Rubric:
    """The template that a config names: a file, or '' for the built-in one.

    Raises:
      ValueError: it cannot be read, or is no rubric; names file and line, and what is expected.
    """
    try:
        text = rubric_path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ValueError(f"judge.rubric: {name} cannot be read ({reason}); expected a template file") from error
    return parse_rubric(text, name or "rubric.txt")


@functools.lru_cache
def parse_rubric(text: str, name: str) -> Rubric:
    """A template's text, cut into its sections and holes, and checked.

    Raises:
      ValueError: an unknown section, condition or hole, or what `Rubric.check` refuses.
    """
    sections: list[Section] = []
    for heading, line, body in _split(text):
        role, *conditions = heading.split()
        where = f"judge.rubric: {name}, line {line}"
        if role not in _ROLES:
            raise ValueError(f"{where}: unknown section [{heading}]; expected [system ...] or [user ...]")
        for condition in conditions:
            if condition not in _CONDITIONS:
                raise ValueError(f"{where}: [{heading}]: got {condition!r}, expected some of {', '.join(_CONDITIONS)}")
        section = Section(role, frozenset(conditions), line, tuple(_parts(body, name, line + 1)))
        for other in sections:
            if (other.role, other.conditions) == (section.role, section.conditions):
                raise ValueError(f"{where}: [{heading}] is there already, in line {other.line}; remove one")
        sections.append(section)
    rubric = Rubric(name, tuple(sections))
    rubric.check()
    return rubric


def _split(text: str) -> Iterator[tuple[str, int, str]]:
    """Heading, its line, and the text below it, of every section; what precedes the first is a comment."""
    # Lines end at newlines alone, as in an editor.
    lines = text.replace("\r\n", "\n").split("\n")
    starts = [i for i, line in enumerate(lines) if _HEADING.fullmatch(line)]
    for start, end in zip(starts, [*starts[1:], len(lines)]):
        yield lines[start].strip()[1:-1], start + 1, "\n".join(lines[start + 1 : end])


def _parts(body: str, name: str, first_line: int) -> Iterator[str]:
    """Texts and holes of a section, outer blank lines left out."""
    text, position = "", 0
    kept = body.rstrip()
    kept = kept[len(kept) - len(kept.lstrip("\n")) :]
    line = first_line + body[: body.find(kept)].count("\n")
    for brace in _BRACES.finditer(kept):
        text, position = text + kept[position : brace.start()], brace.end()
        if brace.group() in ("{{", "}}"):
            text += brace.group()[0]
            continue
        if brace[1] not in HOLES:
            here = line + kept[: brace.start()].count("\n")
            raise ValueError(
                f"judge.rubric: {name}, line {here}: got {brace.group()}, expected one of the holes "
                f"{' '.join(f'{{{hole}}}' for hole in HOLES)}, or {{{{ and }}}} for braces"
            )
        if text:
            yield text
        yield Hole(brace[1])
        text = ""
    if text + kept[position:]:
        yield text + kept[position:]


def _title(section: Section) -> str:
    return " ".join([section.role, *sorted(section.conditions, key=_CONDITIONS.index)])


def stated_problem(problem: str, choices: Sequence[tuple[str, str]]) -> str:
    """A problem as a judge reads it, its answer choices below it."""
    return "\n".join([problem.strip(), *(f"{label}. {text}" for label, text in choices)])
