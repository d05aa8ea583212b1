"""What `--help` prints: tasks and config keys, with the meaning that the docstrings of the config's records give them.

--help                  the options, the tasks and all keys
--help=judge            a section, and what lies in it
--help=rollout.group    one key
--help=sft              the keys of one task
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import shutil
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from exprl_jax.config import TASKS

_USAGE = """\
python -m exprl_jax.main --config=FILE[:ARM] --workdir=FOLDER [--config.KEY=VALUE ...]

for instance
  python -m exprl_jax.main --config=configs/smoke.py --workdir=runs/smoke
  python -m exprl_jax.main --config=configs/smoke.py:process --workdir=runs/longer --config.steps=20
"""
_NAME = "<name>"  # of an entry of a section whose entries are named by the config
_WIDEST = 120


class Key(NamedTuple):
    """A key of the config: a section, or a leaf.

    Attributes:
      path: from the config's root, with dots between.
      hint: the type of its value; of a section, its record.
      meaning: one sentence or more.
    """

    path: str
    hint: Any
    meaning: str


def meanings(record: type) -> dict[str, str]:
    """What the `Attributes:` of a record's docstring, and of those that it extends, say of each field."""
    told: dict[str, str] = {}
    for cls in reversed(record.__mro__):
        _, _, listed = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")
        for entry in re.split(r"\n(?=  \w)", "\n" + textwrap.indent(inspect.cleandoc("\n" + listed), "  ")):
            names, colon, text = entry.strip().partition(": ")
            if colon:
                told |= dict.fromkeys(re.split(r", *", names), " ".join(text.split()))
    return told


def keys(record: type, path: str = "") -> Iterator[Key]:
    """All keys of a record, a section before what lies in it."""
    told, hints = meanings(record), typing.get_type_hints(record)
    for field in dataclasses.fields(record):
        key = Key(f"{path}{field.name}", hints[field.name], told.get(field.name, ""))
        yield key
        if dataclasses.is_dataclass(key.hint):
            yield from keys(key.hint, f"{key.path}.")
        elif typing.get_origin(key.hint) is dict:
            named = typing.get_args(key.hint)[1]
            yield Key(f"{key.path}.{_NAME}", named, _summary(named))
            yield from keys(named, f"{key.path}.{_NAME}.")


def describe(topic: str, options: Mapping[str, str]) -> str:
    """The help on a section, a key or a task; on everything for the empty topic.

    Args:
      options: the meaning of each option of the command line but --help.

    Raises:
      ValueError: there is no such section, key or task; names the nearest.
    """
    if not topic:
        return _everything(options)
    of_task = _of_task(TASKS[topic], {}) if topic in TASKS else []
    heads: dict[Any, dict[Key, list[str]]] = {}  # by type: keys of one name and type, and the tasks of each
    for task, record in TASKS.items():
        for key in keys(record):
            if _matches(key.path, topic):
                heads.setdefault(key.hint, {}).setdefault(key, []).append(task)
    if not heads and not of_task:
        raise ValueError(f"--help={topic}: no such section, key or task{_nearest(topic)}")
    lines = [line for head in [of_task, *map(_of_keys, heads.values())] if head for line in ["", *head]][1:]
    if others := [path for path in _paths() if path.endswith(f".{topic}")]:
        lines += ["", *_wrapped(f"other keys of that name: {', '.join(others)}")]
    return "\n".join(lines)


def _everything(options: Mapping[str, str]) -> str:
    records = _records()
    lines = [
        _USAGE,
        "options",
        *_table([*options.items(), ("help", "This page; --help=judge shows one section.")], "--"),
    ]
    lines += ["", "tasks, by the config's key `task`"]
    lines += _table([(", ".join(names), _summary(record)) for record, names in records.items()])
    seen: dict[type, str] = {}
    for record, names in records.items():
        lines += ["", f"keys of {' and '.join(names)}, each set by --config.KEY=VALUE", *_of_task(record, seen)]
    return "\n".join(lines)


def _records() -> dict[type, list[str]]:
    """The records of the tasks, each with the tasks that it belongs to."""
    records: dict[type, list[str]] = {}
    for name, record in TASKS.items():
        records.setdefault(record, []).append(name)
    return records


def _of_task(record: type, seen: dict[type, str]) -> list[str]:
    """The keys of a task; the keys of a section that was listed before are not listed again.

    Args:
      seen: where each section was listed; this adds to it.
    """
    shown, hidden = [], ""
    for key in keys(record):
        if hidden and key.path.startswith(hidden):
            continue
        where = seen.get(key.hint) if dataclasses.is_dataclass(key.hint) else None
        if where is None:
            shown.append(key)
            if dataclasses.is_dataclass(key.hint):
                seen[key.hint] = key.path
        else:
            hidden = f"{key.path}."
            shown.append(key._replace(meaning=f"{key.meaning} Its keys are those of `{where}`."))
    return _listed(shown)


def _of_keys(tasks_of: Mapping[Key, Sequence[str]]) -> list[str]:
    """Keys of one path and type, each with its tasks; and of a section what lies in it."""
    lines = [
        line for key, tasks in tasks_of.items() for line in _wrapped(f"{key.path} ({', '.join(tasks)}): {_full(key)}")
    ]
    key = next(iter(tasks_of))
    if dataclasses.is_dataclass(key.hint):
        lines += _listed(list(keys(key.hint, f"{key.path}.")))
    elif typing.get_origin(key.hint) is dict:
        lines += _listed(list(keys(typing.get_args(key.hint)[1], f"{key.path}.{_NAME}.")))
    return lines


def _listed(rows: Sequence[Key]) -> list[str]:
    return _table([(key.path, _full(key)) for key in rows])


def _table(rows: Sequence[tuple[str, str]], before: str = "") -> list[str]:
    """Names, and beside them their meanings."""
    width = max((len(name) for name, _ in rows), default=0) + len(before)
    lines = []
    for name, text in rows:
        lines += _wrapped(text, f"  {before + name:{width}}  ", " " * (width + 4))
    return lines


def _full(key: Key) -> str:
    """Meaning, and what may be set: the type, and the choices that the meaning does not name."""
    meaning = key.meaning or (_summary(key.hint) if dataclasses.is_dataclass(key.hint) else "")
    if dataclasses.is_dataclass(key.hint) or typing.get_origin(key.hint) is dict:
        return meaning
    if typing.get_origin(key.hint) is Literal:
        choices = [str(choice) for choice in typing.get_args(key.hint)]
        if all(f"`{choice}`" in meaning for choice in choices):
            return meaning
        return f"{meaning} One of {', '.join(f'`{choice}`' for choice in choices)}."
    return f"{meaning} ({'text' if key.hint is str else key.hint.__name__})"


def _summary(record: type) -> str:
    """The first line of a record's docstring."""
    return inspect.cleandoc(record.__doc__ or "").splitlines()[0]


def _wrapped(text: str, first: str = "", others: str = "  ") -> list[str]:
    width = min(_WIDEST, shutil.get_terminal_size((_WIDEST, 0)).columns)
    room = max(width, len(first) + 30)
    return textwrap.wrap(text, room, initial_indent=first, subsequent_indent=others, break_on_hyphens=False)


def _matches(path: str, topic: str) -> bool:
    """Whether a topic is a key; any name does for the entries that a config names."""
    ours, theirs = path.split("."), topic.split(".")
    return len(ours) == len(theirs) and all(a in (b, _NAME) for a, b in zip(ours, theirs))


def _paths() -> list[str]:
    """Every key of any task, each once."""
    return list(dict.fromkeys(key.path for record in _records() for key in keys(record)))


def _nearest(topic: str) -> str:
    same = [path for path in _paths() if path.endswith(f".{topic}")]
    near = same or difflib.get_close_matches(topic, [*_paths(), *TASKS], n=1)
    return f"; did you mean {' or '.join(near)}?" if near else "; --help lists all"
