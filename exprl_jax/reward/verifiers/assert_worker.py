"""Assert tests against a program in another sandbox: only data crosses, so that a program cannot forge a pass.

    sandbox of the tests, trusted           sandbox of the program
    assert candidate([3, 4]) == 7
             candidate is a Remote ── call, [[3, 4]] ──▶ def candidate(numbers): ...
                                 7 ◀── value, 7 ────────

The tests hold copies of plain data, compared by Python's own rules; what else a program makes stays with it, and the
tests hold a `Remote` that can be called, read and changed, but is equal to nothing.  What a program patches, reads,
prints or ends, it does in its own process.  Tests may pass data, remotes, and functions.

This is part of the worker's text (`sandbox_worker`): it imports nothing from the package.
"""

import ast
import builtins
import json
import operator
import os
import sys

# Exit status of tests that pass to a program what is no data: they say nothing of the program.
UNSUPPORTED = 3
# What stays data though JSON has no name for it, by the name under which it crosses.
_SEQUENCES = {kind.__name__: kind for kind in (tuple, set, frozenset)}
_TEXTS = {
    "Decimal": ("decimal", str, lambda kind, text: kind(text)),
    "Fraction": ("fractions", str, lambda kind, text: kind(text)),
    "datetime": ("datetime", lambda value: value.isoformat(), lambda kind, text: kind.fromisoformat(text)),
    "date": ("datetime", lambda value: value.isoformat(), lambda kind, text: kind.fromisoformat(text)),
}
_TYPES = {kind.__name__: kind for kind in (bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset)}
_ARRAY_KINDS = "biufc"


# What may be done to an object of the program; the tests allow only the first to be done to theirs.
_OPERATIONS = {
    "call": lambda function, /, *arguments, **keywords: function(*arguments, **keywords),
    "getattr": getattr,
    "setattr": setattr,
    "getitem": operator.getitem,
    "setitem": operator.setitem,
    "contains": operator.contains,
    "len": len,
    "iter": iter,
    "next": next,
    "str": str,
    "repr": repr,
}


class _NoDataError(Exception):
    """The tests have an object that the program cannot get."""


class Remote:
    """An object on the other side."""

    __slots__ = ("_channel", "_index", "_truth")

    def __init__(self, channel, index, truth):
        object.__setattr__(self, "_channel", channel)
        object.__setattr__(self, "_index", index)
        object.__setattr__(self, "_truth", truth)

    def __call__(self, /, *arguments, **keywords):
        return self._channel.request("call", self, *arguments, **keywords)

    def __getattr__(self, name):
        # Python and NumPy ask for such names to learn how to treat an object: the program must not say.
        if name.startswith("__"):
            raise AttributeError(name)
        return self._channel.request("getattr", self, name)

    def __setattr__(self, name, value):
        self._channel.request("setattr", self, name, value)

    def __getitem__(self, key):
        return self._channel.request("getitem", self, key)

    def __setitem__(self, key, value):
        self._channel.request("setitem", self, key, value)

    def __contains__(self, value):
        return self._channel.request("contains", self, value) is True

    def __len__(self):
        return self._channel.request("len", self)

    def __iter__(self):
        iterator = self._channel.request("iter", self)
        while True:
            try:
                yield self._channel.request("next", iterator)
            except StopIteration:
                return

    def __next__(self):
        return self._channel.request("next", self)

    def __str__(self):
        return self._channel.request("str", self)

    def __repr__(self):
        return self._channel.request("repr", self)

    def __bool__(self):
        return self._truth

    def _refuse(self, *_):
        raise TypeError("what the program made is no data, so it cannot be compared")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __hash__ = None


class Channel:
    """One end of a conversation in which either side asks the other for one thing at a time, in lines of JSON."""

    def __init__(self, reads, writes):
        self._reads = os.fdopen(reads, encoding="ascii")
        self._writes = os.fdopen(writes, "w", encoding="ascii")
        self._objects = []
        self._operations = dict(_OPERATIONS)
        self.calls = 0

    def offer(self, operation, function):
        """Lets the other side ask for one more thing, of no object."""
        self._operations[operation] = lambda _, *arguments: function(*arguments)

    def trust_nobody(self):
        """Lets the other side call functions that it was given, and nothing else."""
        self._operations = {"call": _OPERATIONS["call"]}

    @property
    def trusting(self):
        return "getattr" in self._operations

    def request(self, operation, target, /, *arguments, **keywords):
        """Asks for an operation; returns what it returns, or raises what it raised."""
        self.calls += operation == "call"
        try:
            sent = [self._encode(argument) for argument in arguments]
            named = {name: self._encode(value) for name, value in keywords.items()}
        except _NoDataError:
            os._exit(UNSUPPORTED)
        of = None if target is None else self._encode(target)
        self._write({"do": operation, "of": of, "arguments": sent, "keywords": named})
        while "do" in (message := self._read()):
            self._answer(message)
        if "raised" in message:
            raise self._exception(*message["raised"])
        # Functions that change their arguments return nothing, as Python's own do.
        for argument, before, after in zip(arguments, sent, message.get("arguments", ())):
            if before != after:
                _overwrite(argument, self._decode(after))
        return self._decode(message["value"])

    def serve(self):
        """Answers requests until the other side ends, and this process with it."""
        while True:
            self._answer(self._read())

    def _answer(self, message):
        try:
            function = self._operations[message["do"]]
            target = None if message["of"] is None else self._decode(message["of"])
            arguments = [self._decode(value) for value in message["arguments"]]
            named = {name: self._decode(value) for name, value in message["keywords"].items()}
            value = function(target, *arguments, **named)
            reply = {"value": self._encode(value)}
            if value is None and self.trusting:
                reply["arguments"] = [self._encode(argument) for argument in arguments]
        except Exception as error:
            names = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins"]
            reply = {"raised": [names[0], str(error)]}
        self._write(reply)

    def _write(self, message):
        self._writes.write(json.dumps(message) + "\n")
        self._writes.flush()

    def _read(self):
        try:
            message = json.loads(self._reads.readline())
            if isinstance(message, dict):
                return message
        except (ValueError, RecursionError):
            pass
        # The other side ended, or talks nonsense: not even tests that catch every exception go on.
        os._exit(1)

    def _exception(self, name, text):
        kind = getattr(builtins, name, None)
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            return Exception(text)
        try:
            return kind(text)
        except TypeError:
            return Exception(text)

    def _encode(self, value):
        if value is None or isinstance(value, bool):
            return value
        for kind in (int, float, str):
            if isinstance(value, kind):
                return kind(value)
        if isinstance(value, list):
            return [self._encode(item) for item in value]
        if isinstance(value, dict):
            return {"dict": [[self._encode(key), self._encode(item)] for key, item in value.items()]}
        for name, kind in _SEQUENCES.items():
            if isinstance(value, kind):
                return {name: [self._encode(item) for item in value]}
        if isinstance(value, range):
            return {"range": [value.start, value.stop, value.step]}
        if isinstance(value, complex):
            return {"complex": [value.real, value.imag]}
        if isinstance(value, bytes | bytearray):
            return {type(value).__name__: value.decode("latin-1")}
        if isinstance(value, Remote):
            return {"yours": value._index}
        for name, (module, to_text, _) in _TEXTS.items():
            if module in sys.modules and isinstance(value, getattr(sys.modules[module], name)):
                return {name: to_text(value)}
        if "numpy" in sys.modules and isinstance(value, sys.modules["numpy"].generic):
            return self._encode(value.item())
        if "numpy" in sys.modules and isinstance(value, sys.modules["numpy"].ndarray):
            if value.dtype.kind in _ARRAY_KINDS:
                return {"array": [value.dtype.str, self._encode(value.tolist())]}
        if isinstance(value, type) and value in _TYPES.values():
            return {"type": value.__name__}
        if not self.trusting and not callable(value):
            raise _NoDataError(f"{type(value).__name__} is no data")
        self._objects.append(value)
        # Truth is settled here, as that of data is: by what the program did so far.
        return {"mine": [len(self._objects) - 1, bool(value)]}

    def _decode(self, value):
        if isinstance(value, list):
            return [self._decode(item) for item in value]
        if not isinstance(value, dict):
            return value
        ((name, content),) = value.items()
        if name in _SEQUENCES:
            return _SEQUENCES[name](self._decode(item) for item in content)
        if name == "dict":
            return {self._decode(key): self._decode(item) for key, item in content}
        if name in ("complex", "range"):
            return getattr(builtins, name)(*content)
        if name in ("bytes", "bytearray"):
            return getattr(builtins, name)(content, "latin-1")
        if name == "mine":
            index, truth = content
            return Remote(self, index, truth is True)
        if name == "type":
            return _TYPES[content]
        if name == "yours":
            return self._objects[content]
        if name == "array":
            kind, items = content
            if kind.lstrip("<>|=")[:1] not in _ARRAY_KINDS:
                raise TypeError(f"no array of {kind}")
            return __import__("numpy").array(self._decode(items), dtype=kind)
        module, _, from_text = _TEXTS[name]
        return from_text(getattr(__import__(module), name), content)


def _overwrite(mine, theirs):
    """Gives a list, dict or set of this side what the other side made of it."""
    if type(mine) is not type(theirs):
        return
    if isinstance(mine, list | bytearray):
        mine[:] = theirs
    elif isinstance(mine, dict | set):
        mine.clear()
        mine.update(theirs)


def _entry_names(entry_point):
    return {node.id for node in ast.walk(ast.parse(entry_point)) if isinstance(node, ast.Name)}


def program_names(setup, tests, entry_point, usual):
    """Which names of the tests are the program's.

    Those of `entry_point`, and those that setup and tests use and do not define.  Python's own names and the usual ones
    stay Python's, unless nothing else is left to be tested: then the one of them that is called.

    Args:
      setup: Python text; what it defines is the tests' own.
      tests: Python text.
      entry_point: an expression, or "".
      usual: names of which the tests need not say where they come from.

    Returns:
      (names of the program's, names of Python's that the tests do not import).

    Raises:
      ValueError: several names could be the program's, or none.
    """
    nodes = [node for text in (setup, tests) for node in ast.walk(ast.parse(text))]
    defined, read = set(), set()
    for node in nodes:
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else defined).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.arg):
            defined.add(node.arg)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            defined |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ExceptHandler) and node.name:
            defined.add(node.name)
    bases = {node.value.id for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)}
    called = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    entry = _entry_names(entry_point)
    free = {name for name in read - defined if not name.startswith("__")}
    pythons = free & set(dir(builtins))
    python = free & bases & sys.stdlib_module_names | (free - pythons) & set(usual)
    program = free - pythons - python
    if entry or program:
        return program | entry, python - entry
    for names in (python & called - bases, pythons & called):
        if len(names) > 1:
            raise ValueError(f"it is unclear which of {', '.join(sorted(names))} is tested; give it as entry_point")
        if names:
            return names, python - names
    raise ValueError("the tests call nothing that could be the program's")


def serve(channel, program, define, find):
    """The program's side: defines what it defines, and lets the tests use it.

    Args:
      program: JSON of two programs, the problem's own beginning and the response's.
      define: makes a module of programs.
      find: a module's function of some name.
    """
    module = define(*json.loads(program))

    def names(*wanted):
        there = {}
        for name in wanted:
            try:
                there[name] = find(module, name)
            except AttributeError:
                continue
        return there

    channel.offer("names", names)
    channel.serve()


def check(channel, program, offer_prelude):
    """The tests' side: ends this process, with status zero only where every test passed.

    Args:
      program: JSON of what `program_names` takes, and of whether the setup has a solution of its own.
      offer_prelude: adds those of the usual names that are among some names to a namespace.
    """
    try:
        _check(channel, *json.loads(program), offer_prelude)
    except BaseException:
        os._exit(1)
    # Tests that asked nothing of the program cannot say that it is right.
    os._exit(0 if channel.calls else 1)


def _check(channel, setup, tests, entry_point, usual, solved, offer_prelude):
    channel.trust_nobody()
    wanted, python = program_names(setup, tests, entry_point, usual)
    namespace = {"__name__": "tests"}
    offer_prelude(python, namespace)
    namespace.update({name: __import__(name) for name in python & sys.stdlib_module_names - namespace.keys()})
    theirs = channel.request("names", None, *sorted(wanted))
    namespace.update(theirs)
    exec(compile(setup, "setup.py", "exec", dont_inherit=True), namespace)
    if not solved:
        # The setup may have the head of a function; the program has it whole.
        namespace.update((name, theirs[name]) for name in theirs.keys() & _entry_names(entry_point))
    if entry_point:
        namespace["candidate"] = eval(entry_point, theirs)
    exec(compile(tests, "tests.py", "exec", dont_inherit=True), namespace)
