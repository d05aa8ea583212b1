"""The process that calls a function of the user's: `python -m exprl_jax.reward.function_worker <function> <limit>`.

The function is `package.module:name` or `path/to/file.py:name`, the limit seconds of a call.  Requests are JSON lines
on stdin, `{"problems": [...], "attempts": [...]}` (`functions.request_of`); each is answered by one line on stdout,
`{"values": [...]}`, or `{"fault": "...", "problem": id}` where the function raised.  The first line is
`{"ready": true, "files": [...]}`, with the files that hold the function, or `{"error": "..."}`.

What the function prints goes to stderr.  The process ends when stdin closes, and, whatever it is doing and whoever
still lives, soon after a call's time limit.  JAX is not imported here.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from exprl_jax.packaged import locate
from exprl_jax.reward.attempt import Attempt

# The parent kills at the limit; this is for a worker whose parent was killed first.
_GRACE_S = 1.0


def load_function(name: str) -> tuple[Callable, list[str]]:
    """The function, and the files that it was read from.

    Raises:
      ValueError: there is none; one line.
    """
    where, _, attribute = name.rpartition(":")
    try:
        module = _load_file(where) if where.endswith(".py") else importlib.import_module(where)
    except BaseException as error:
        raise ValueError(f"{name}: {_described(error)}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        there = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise ValueError(f"{name}: {where} has no function {attribute!r}; it has {', '.join(there) or 'none'}")
    return function, sorted(_files(module, function))


def _load_file(name: str) -> ModuleType:
    path = Path(locate(name)).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no such file in {Path.cwd()}")
    path = path.resolve()
    # Its neighbours can be imported, but shadow nothing; nor does the file itself, whatever it is called.
    sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(f"function_of_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _files(module: ModuleType, function: Callable) -> set[str]:
    """The files of the named module and of the function itself, which another may define."""
    files = {getattr(module, "__file__", None)}
    try:
        files.add(inspect.getsourcefile(inspect.unwrap(function)))
    except TypeError:
        files.add(inspect.getsourcefile(type(function)) if type(function).__module__ != "builtins" else None)
    return {str(Path(file).resolve()) for file in files if file is not None}


def _described(error: BaseException) -> str:
    """An exception in one line, with the innermost line of a file of the user's."""
    message = " ".join(f"{type(error).__name__}: {error}".split())
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_ours(frame.filename)]
    return message + (f" ({Path(frames[-1].filename).name} line {frames[-1].lineno})" if frames else "")


def _is_ours(filename: str) -> bool:
    return (
        filename == __file__
        or filename.startswith("<frozen")
        or Path(filename).parent == Path(importlib.__file__).parent
    )


def attempts_of(request: Mapping[str, Any]) -> list[Attempt]:
    """The attempts of a request, each with its problem."""
    problems = [p | {"choices": tuple(map(tuple, p["choices"]))} for p in request["problems"]]
    return [Attempt(**problems[attempt.pop("of")], **attempt) for attempt in map(dict, request["attempts"])]


def answer(function: Callable, attempts: Sequence[Attempt]) -> dict[str, Any]:
    """What the function makes of the attempts; where it raises, the attempt on which it does when called with each
    alone."""
    try:
        return {"values": _values(function, attempts)}
    except BaseException as error:
        whole = _described(error)
    for attempt in attempts if len(attempts) > 1 else ():
        try:
            _values(function, [attempt])
        except BaseException as error:
            return {"fault": _described(error), "problem": attempt.id}
    return {"fault": whole, "problem": attempts[0].id}


def _values(function: Callable, attempts: Sequence[Attempt]) -> list[Any]:
    values = function(list(attempts))
    if isinstance(values, str | bytes | Mapping) or not hasattr(values, "__iter__"):
        raise TypeError(f"it returned {values!r:.60}, expected a list with a value for each attempt")
    values = [value.item() if hasattr(value, "item") else value for value in values]  # of numpy, of torch
    if len(values) != len(attempts):
        raise ValueError(f"it returned {len(values)} values for {len(attempts)} attempts, expected one for each")
    for value in values:
        if not isinstance(value, bool | int | float | str | None):
            raise TypeError(f"it returned {value!r:.60} for an attempt")
    return values


def main() -> None:
    """Answers requests until stdin closes."""
    name, limit_s = sys.argv[1], float(sys.argv[2])
    # Requests and replies have descriptors of their own, out of the reach of what the function reads and prints.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    def reply(fields: Mapping[str, Any]) -> None:
        replies.write(json.dumps(fields) + "\n")
        replies.flush()

    try:
        function, files = load_function(name)
    except ValueError as error:
        reply({"error": str(error)})
        return
    # The kernel's own response to the alarm, which asks nothing of the interpreter.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    reply({"ready": True, "files": files})
    for line in requests:
        signal.setitimer(signal.ITIMER_REAL, limit_s + _GRACE_S)
        made = answer(function, attempts_of(json.loads(line)))
        signal.setitimer(signal.ITIMER_REAL, 0)
        reply(made)


if __name__ == "__main__":
    main()
