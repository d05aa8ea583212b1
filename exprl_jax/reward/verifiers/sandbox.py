"""Runs programs that nobody has read: limited in time, memory, output and processes, and isolated where Linux can.

A program gets a process group, an empty folder and an environment of its own, and limits that it cannot raise.  With
namespaces (made by bubblewrap or by the worker itself) it also sees no network, no process but its own, and of the
file system only the interpreter and the system's libraries, read-only; none of it outlives its main process.
"""

from __future__ import annotations

import binascii
import contextlib
import dataclasses
import enum
import fcntl
import functools
import importlib.util
import json
import marshal
import math
import os
import platform
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

from exprl_jax.reward.verifiers import sandbox_worker

# Longer outputs are not answers.
MAX_OUTPUT = 16 << 20
# Interpreter and standard library start in about half of this.
MIN_MEMORY = 64 << 20
# Processes and threads of one program, and of what surrounds it.
PROCESSES = 16
# Besides the standard library, programs may import this where the training environment has it: solutions do.
LIBRARY = "numpy"
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache")
# BLAS would start a thread a core.
_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
_TICK_S = 0.05
_GRACE_S = 2.0


class Isolation(enum.Enum):
    """What stands between a program and the machine, the strongest first.

    bubblewrap: namespaces made by the tool `bwrap`.
    namespaces: the same namespaces made by the worker.
    limits: resource limits and a process group; the program can read what its user can read, and use the network.
    """

    bubblewrap = "bubblewrap"
    namespaces = "namespaces"
    limits = "limits"

    @property
    def real(self) -> bool:
        """Whether a program is kept from files, network and processes, and not just limited."""
        return self is not Isolation.limits

    @property
    def sentence(self) -> str:
        """What a run says of it at its start."""
        if not self.real:
            return "programs are limited, but NOT isolated: they can use the network and what their user can"
        return f"programs are isolated by {self.value}: no network, own processes, a read-only system, an empty folder"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one run.

    Attributes:
      ended: `finished` by itself without an exception; `timed_out` at the wall-clock limit; or `failed`: an exception,
        a signal, a limit, or more than MAX_OUTPUT bytes of output.
      output: what it wrote on stdout (a call: its result as JSON), as far as it was read.
    """

    ended: Literal["finished", "failed", "timed_out"]
    output: bytes


class Sandbox:
    """One way to run programs; holds nothing open, so threads may share it."""

    def __init__(self, isolation: Isolation, limit_s: float, memory_bytes: int):
        """Prepares command lines; starts nothing.

        Args:
          isolation: one for which `complaint` has none.
          limit_s: wall-clock seconds of one run, starting the interpreter included.
          memory_bytes: address space of one process, and resident memory of all processes of one run.

        Raises:
          ValueError: a limit that is not positive, or less memory than an interpreter needs.
        """
        if not 0 < limit_s < math.inf:
            raise ValueError(f"the sandbox got limit_s={limit_s}; expected a positive number of seconds")
        if memory_bytes < MIN_MEMORY:
            raise ValueError(f"the sandbox got memory_bytes={memory_bytes}; expected at least {MIN_MEMORY}")
        self.isolation = isolation
        self._limit_s = limit_s
        self._memory_bytes = memory_bytes
        self._libraries, visible = _visible_paths()
        self._prefix = _bubblewrap(visible) if isolation is Isolation.bubblewrap else []
        self._visible = visible if isolation is Isolation.namespaces else []

    def run(self, program: str, stdin: str) -> Outcome:
        """Runs a program as a script."""
        return self._run(program, "", stdin.encode("utf-8", "replace"), subprocess.DEVNULL)

    def call(self, program: str, function: str, arguments: Sequence[Any]) -> Outcome:
        """Calls a function of the program, or a method of its class `Solution`, with arguments that JSON can say."""
        return self._run(program, function, json.dumps(arguments).encode(), subprocess.DEVNULL)

    def _run(self, program: str, function: str, stdin: bytes, stderr: BinaryIO | int) -> Outcome:
        deadline = time.monotonic() + self._limit_s
        with (
            self._folder() as folder,
            _sealed_file(program.encode("utf-8", "replace")) as program_file,
            _sealed_file(stdin) as input_file,
            subprocess.Popen(
                self._command(program_file.fileno(), function),
                stdin=input_file,
                stdout=subprocess.PIPE,
                stderr=stderr,
                pass_fds=(program_file.fileno(),),
                env={**_ENVIRONMENT, "HOME": folder, "TMPDIR": folder},
                cwd="/" if self.isolation.real else folder,
                start_new_session=True,
                bufsize=0,
            ) as process,
        ):
            try:
                ended, output = self._follow(process, deadline)
            finally:
                self._end(process)
        return Outcome("failed" if ended == "finished" and process.returncode else ended, output)

    @contextlib.contextmanager
    def _folder(self) -> Iterator[str]:
        """The folder that a program may write to: with namespaces one in memory, which goes with them."""
        if self.isolation.real:
            yield sandbox_worker.SCRATCH
            return
        with tempfile.TemporaryDirectory(prefix="program_", ignore_cleanup_errors=True) as folder:
            if os.geteuid() == 0:
                os.chown(folder, sandbox_worker.NOBODY, sandbox_worker.NOBODY)
            yield folder

    def _command(self, program_fd: int, function: str) -> list[str]:
        # Before 5.14 Linux counted a user's processes over all namespaces.
        counted_apart = self.isolation.real and _kernel_version() >= (5, 14)
        # CPU time is a process's; several threads use it up before the wall clock does.
        limits = (self._memory_bytes, math.ceil(self._limit_s) + 1, PROCESSES + (0 if counted_apart else _in_use()))
        return [
            *self._prefix,
            *(_interpreter(), "-I", "-S", "-X", "utf8", "-c", _worker_text(), self.isolation.value, *map(str, limits)),
            *(str(program_fd), function, self._libraries, *self._visible),
        ]

    def _follow(
        self, process: subprocess.Popen[bytes], deadline: float
    ) -> tuple[Literal["finished", "failed", "timed_out"], bytes]:
        """Reads the output until the process ended (it is left unreaped) or did what it must not."""
        output, reading, pause, next_look = bytearray(), True, 0.0005, time.monotonic() + _TICK_S
        poll = select.poll()
        poll.register(process.stdout, select.POLLIN)
        while (now := time.monotonic()) < deadline:
            if now >= next_look:
                next_look = now + _TICK_S
                # A process has its own limit; this is for many processes.
                if _resident_bytes(process.pid) > self._memory_bytes:
                    return "failed", bytes(output)
            if not reading:
                if _exited(process.pid):
                    return "finished", bytes(output)
                time.sleep(pause)
                pause = min(2 * pause, _TICK_S)
            elif poll.poll(1000 * min(_TICK_S, deadline - now)):
                received = os.read(process.stdout.fileno(), 1 << 16)
                output += received
                reading = bool(received)
                if len(output) > MAX_OUTPUT:
                    return "failed", bytes(output)
            # It may have written and ended after the poll gave up, while this thread waited for its turn.
            elif _exited(process.pid) and not poll.poll(0):
                return "finished", bytes(output)  # and another process holds its stdout
        return "timed_out", bytes(output)

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """Kills what left the process group, and the group, whose number is its own until the leader is reaped."""
        if not self.isolation.real:
            # The worker kills what it can find; without namespaces nobody else can tell whose they are.
            os.kill(process.pid, signal.SIGTERM)
            deadline = time.monotonic() + _GRACE_S
            while not _exited(process.pid) and time.monotonic() < deadline:
                time.sleep(0.001)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@functools.cache
def complaint(isolation: Isolation) -> str:
    """Why programs cannot be run like this here, found by running one; the empty string where they can."""
    if isolation is Isolation.bubblewrap and not _bubblewrap([]):
        return "bwrap is not installed" if not shutil.which("bwrap") else "bwrap as root needs setpriv (util-linux)"
    if not hasattr(os, "memfd_create"):
        return f"{platform.system()} is not Linux"
    if os.geteuid() == 0 and isolation is not Isolation.namespaces:
        prefix = Path(os.path.realpath(sys.base_prefix))
        if not all(folder.stat().st_mode & 0o001 for folder in (prefix, *prefix.parents)):
            return f"run as root it hands programs to nobody, who cannot enter {prefix}"
    sandbox = Sandbox(isolation, limit_s=30.0, memory_bytes=1 << 30)
    with tempfile.TemporaryFile() as said:
        try:
            outcome = sandbox._run(_PROBE[isolation.real], "", b"", said)
        except OSError as error:
            return f"the process could not be started: {error}"
        if outcome == Outcome("finished", b"confined\n"):
            return ""
        said.seek(0)
        lines = said.read().decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else f"a trial program {outcome.ended} and printed {outcome.output[:80]!r}"


_PROBE_LIMITS = """
import threading
threads = [threading.Thread(target=int) for _ in range(4)]
for thread in threads:
    thread.start()
"""
_PROBE_ISOLATION = """
import os
assert sum(name.isdigit() for name in os.listdir("/proc")) < 8, "it sees other processes"
assert [line.split(":")[0].strip() for line in open("/proc/net/dev")][2:] == ["lo"], "it sees a network"
assert not os.access("/", os.W_OK) and not os.access("/usr", os.W_OK), "it can write to the system"
assert os.listdir(".") == [] and os.access(".", os.W_OK), "it has no empty folder"
"""
_PROBE = {True: _PROBE_LIMITS + _PROBE_ISOLATION + "print('confined')", False: _PROBE_LIMITS + "print('confined')"}


@functools.cache
def _interpreter() -> str:
    """The interpreter that a virtual environment is based on."""
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


@functools.cache
def _worker_text() -> str:
    """A program that is the worker, compiled once."""
    path = Path(sandbox_worker.__file__)
    code = binascii.b2a_base64(marshal.dumps(compile(path.read_bytes(), path.name, "exec")), newline=False).decode()
    return f"import binascii, marshal; exec(marshal.loads(binascii.a2b_base64({code!r})))"


@functools.cache
def _kernel_version() -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", platform.release())
    return (int(found[1]), int(found[2])) if found else (0, 0)


@functools.cache
def _visible_paths() -> tuple[str, list[str]]:
    """The folder of the library ("" where it is not installed), and what of the file system a program may read."""
    found = importlib.util.find_spec(LIBRARY)
    libraries, paths = "", [*_SYSTEM, os.path.realpath(sys.base_prefix)]
    if found is not None and found.origin is not None:
        folder = Path(found.origin).parent
        libraries = str(folder.parent)
        # Wheels keep the shared libraries beside the package.
        paths += [str(folder), f"{folder}.libs"]
    visible: list[str] = []
    for path in paths:
        if os.path.exists(path) and not any(Path(path).is_relative_to(other) for other in visible):
            visible.append(path)
    return libraries, visible


def _bubblewrap(visible: Sequence[str]) -> list[str]:
    """The command line before the program's own; empty where a tool is missing."""
    bwrap, setpriv = shutil.which("bwrap"), shutil.which("setpriv")
    if bwrap is None or (os.geteuid() == 0 and setpriv is None):
        return []
    command = [bwrap, "--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--cap-drop", "ALL"]
    nobody = str(sandbox_worker.NOBODY)
    command += ["--uid", nobody, "--gid", nobody]
    for path in visible:
        command += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]
    for path in sandbox_worker.DEVICES:
        command += ["--dev-bind", path, path]
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        command += ["--symlink", f"/proc/self/fd/{number}", f"/dev/{name}"]
    command += ["--proc", "/proc", "--perms", "1777", "--size", str(sandbox_worker.SCRATCH_BYTES)]
    command += ["--tmpfs", sandbox_worker.SCRATCH, "--chdir", sandbox_worker.SCRATCH, "--remount-ro", "/", "--"]
    if os.geteuid() == 0:
        # Root is above the limit on processes.
        return [setpriv, "--reuid", nobody, "--regid", nobody, "--clear-groups", "--", *command]
    return command


def _sealed_file(content: bytes) -> BinaryIO:
    """A file in memory that nobody can write to any more."""
    file = os.fdopen(os.memfd_create("sealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "w+b")
    file.write(content)
    file.seek(0)
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
    return file


def _exited(pid: int) -> bool:
    """Whether a child ended; it stays unreaped, and its number its own."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _read(path: str) -> list[str]:
    """The words of a file of /proc; none where the process is gone."""
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read().split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _resident_bytes(pid: int) -> int:
    """Memory of a process and its descendants."""
    pages, waiting = 0, [pid]
    while waiting:
        pid = waiting.pop()
        pages += int((_read(f"/proc/{pid}/statm") or [0, 0])[1])
        try:
            tasks = os.listdir(f"/proc/{pid}/task")
        except (FileNotFoundError, ProcessLookupError):
            continue
        for task in tasks:
            waiting += map(int, _read(f"/proc/{pid}/task/{task}/children"))
    return pages * os.sysconf("SC_PAGE_SIZE")


def _in_use() -> int:
    """Threads of the user that programs run as."""
    uid = os.getuid() or sandbox_worker.NOBODY
    threads = 0
    for entry in os.scandir("/proc"):
        words = _read(f"/proc/{entry.name}/status") if entry.name.isdigit() else []
        if words and int(words[words.index("Uid:") + 1]) == uid:
            threads += int(words[words.index("Threads:") + 1])
    return threads
