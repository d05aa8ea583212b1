"""Runs programs that nobody has read: limited in time, memory, output and processes, and isolated by bubblewrap.

A program gets an empty folder, an environment and a user of its own, and limits that it cannot raise.  Isolated, it
sees no network, no process but its own, and of the file system only Python and the libraries that Python loads,
read-only; a filter of system calls (`system_calls`) closes what that leaves open, and none of it outlives its main
process.  docs/sandbox.md says what each mechanism holds back, and what is not held back.
"""

from __future__ import annotations

import binascii
import contextlib
import dataclasses
import enum
import fcntl
import functools
import importlib.util
import itertools
import json
import marshal
import math
import os
import platform
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, Literal, NamedTuple

from exprl_jax.reward.verifiers import assert_worker, cgroups, sandbox_worker
from exprl_jax.reward.verifiers.system_calls import filter_program

# Bytes of output that any program may write.
MAX_OUTPUT = 16 << 20
# Interpreter and standard library start in about half of this.
MIN_MEMORY = 64 << 20
# Processes and threads of one program, and of what surrounds it.
PROCESSES = 16
# Files and folders that a program may have at once: each takes memory beside its content.
MAX_FILES = 1024
# Besides the standard library, programs may import this where the training environment has it: solutions do.
LIBRARY = "numpy"
# Root's programs become users that nobody else is (systemd's range for users of one service), so that the limit on a
# user's processes is each program's own.
_USERS = range(61184, 65520)
# Modules of the standard library that load libraries of the system.  Those for terminals, windows, networks and old
# databases are left out, and with them their libraries.
_LOADING = "_bz2 _ctypes _decimal _hashlib _lzma _sqlite3 _uuid binascii cmath math pyexpat zlib".split()
_PYTHON_DATA = ("/etc/ld.so.cache", "/usr/share/zoneinfo")
# BLAS would start a thread a core.
_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
_COUNTED = ("VmRSS:", "VmSwap:", "VmPTE:")
_TICK_S = 0.05
_GRACE_S = 2.0
_runs = itertools.count(os.getpid())


class Isolation(enum.Enum):
    """What stands between a program and the machine.

    bubblewrap: namespaces made by the tool `bwrap`, and a filter of system calls.
    limits: resource limits and a process group; the program can read what its user can read, and use the network.
    """

    bubblewrap = "bubblewrap"
    limits = "limits"

    @property
    def real(self) -> bool:
        """Whether a program is kept from files, network and processes, and not just limited."""
        return self is not Isolation.limits

    @property
    def sentence(self) -> str:
        """What a run says at its start: each mechanism that is in force, by name."""
        if not self.real:
            return (
                "programs are limited (resource limits, memory counted every 50 ms), but NOT isolated: they can use the"
                " network and what their user can, and can forge the result of assert tests"
            )
        root = os.geteuid() == 0
        namespaces = ("mount", "process", "network", "IPC", "host name", "cgroup") + (() if root else ("user",))
        parent = cgroups.find_parent()
        memory = (
            f"memory and processes counted by cgroup v2 below {parent.folder}"
            if parent.folder
            else f"memory counted every 50 ms ({parent.reason})"
        )
        return (
            f"programs are isolated: {_version()} ({', '.join(namespaces)} namespaces; Python and its libraries,"
            f" read-only; one small folder), a user {'of their own' if root else 'without powers'}, seccomp (sockets,"
            f" shared memory, namespaces, tracing), resource limits, {memory}"
        )


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one run.

    Attributes:
      ended: `finished` by itself without an exception; `timed_out` at the wall-clock limit; `unsupported`: the tests
        pass to the program what cannot leave their process; or `failed`: an exception, a signal, a limit, too much
        output, or the end of the grader.
      output: what it wrote on stdout (a call: its result as JSON), as far as it was read.
    """

    ended: Literal["finished", "failed", "timed_out", "unsupported"]
    output: bytes = b""


class Sandbox:
    """One way to run programs; holds nothing open, so threads may share it."""

    def __init__(self, isolation: Isolation, limit_s: float, memory_bytes: int, stopped: threading.Event | None = None):
        """Prepares command lines; starts nothing.

        Args:
          isolation: one for which `complaint` has none.
          limit_s: wall-clock seconds of one run, starting the interpreter included.
          memory_bytes: address space of one process, and memory of all processes of one run.
          stopped: once set, whatever runs is ended and has failed.

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
        self._stopped = stopped or threading.Event()
        self._group = cgroups.find_parent().folder if isolation.real else None

    def run(self, program: str, stdin: str, max_output: int = MAX_OUTPUT) -> Outcome:
        """Runs a program as a script."""
        return self._run(["script"], program, stdin, subprocess.DEVNULL, max_output)

    def call(self, program: str, function: str, arguments: str, max_output: int = MAX_OUTPUT) -> Outcome:
        """Calls a function of the program, or a method of its class `Solution`, with arguments in a JSON list."""
        return self._run(["call", function], program, arguments, subprocess.DEVNULL, max_output)

    def check(self, beginning: str, program: str, setup: str, tests: str, entry_point: str, solved: bool) -> Outcome:
        """Runs assert tests in one sandbox against a program in another (see `assert_worker`).

        Args:
          beginning: Python text that runs before the program and in its process, such as a problem's own imports.
          program: what is tested.
          setup: Python text that runs before the tests and in their process.
          tests: Python text that raises an exception where the program is wrong.
          entry_point: an expression for what tests call `candidate`; or "", for tests that name what they test.
          solved: the setup defines what the tests may compare with under the names of `entry_point`; otherwise these
            are the program's in the tests too.
        """
        deadline = time.monotonic() + self._limit_s
        requests, answer = os.pipe()
        replies, reply = os.pipe()
        ends = (requests, answer, replies, reply)
        with contextlib.ExitStack() as stack, contextlib.ExitStack() as ours:
            for end in ends:
                ours.callback(os.close, end)
            theirs = json.dumps([beginning, program])
            asserts = json.dumps([setup, tests, entry_point, sorted(usual_names()), solved])
            server = self._process(["serve", str(requests), str(reply)], theirs, "", fds=(requests, reply))
            checker = self._process(["check", str(replies), str(answer)], asserts, "", fds=(replies, answer))
            server, checker = stack.enter_context(server), stack.enter_context(checker)
            # So that each side reads an end where the other ended.
            ours.close()
            outcome, status = self._follow(checker, [checker.pid, server.pid], deadline, MAX_OUTPUT)
            return Outcome("unsupported") if status == assert_worker.UNSUPPORTED else outcome

    def _run(self, task: Sequence[str], program: str, stdin: str, stderr: BinaryIO | int, max_output: int) -> Outcome:
        deadline = time.monotonic() + self._limit_s
        with self._process(task, program, stdin, stderr=stderr) as process:
            return self._follow(process, [process.pid], deadline, max_output)[0]

    @contextlib.contextmanager
    def _process(
        self,
        task: Sequence[str],
        program: str,
        stdin: str,
        fds: Sequence[int] = (),
        stderr: BinaryIO | int = subprocess.DEVNULL,
    ) -> Iterator[subprocess.Popen[bytes]]:
        """A process that does what `sandbox_worker` calls its task; on leaving, it is ended with all that it left."""
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(self._folder())
            program_file = stack.enter_context(_sealed_file(program.encode("utf-8", "replace")))
            stdin_file = stack.enter_context(_sealed_file(stdin.encode("utf-8", "replace")))
            fds = [program_file.fileno(), *fds]
            command = self._command(program_file.fileno(), task)
            if self.isolation.real:
                filter_file = stack.enter_context(_sealed_file(filter_program()))
                fds.append(filter_file.fileno())
                command = [*_bubblewrap(), str(filter_file.fileno()), "--", *command]
            if self._group:
                group = stack.enter_context(cgroups.group(self._group, self._memory_bytes, 2 * PROCESSES))
                command = cgroups.enter(group, command)
            process = stack.enter_context(
                subprocess.Popen(
                    command,
                    stdin=stdin_file,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    pass_fds=fds,
                    env={**_ENVIRONMENT, "HOME": folder, "TMPDIR": folder},
                    cwd="/" if self.isolation.real else folder,
                    start_new_session=True,
                    bufsize=0,
                )
            )
            stack.callback(self._end, process)
            yield process

    @contextlib.contextmanager
    def _folder(self) -> Iterator[str]:
        """The folder that a program may write to: isolated, one in memory, which goes with the program."""
        if self.isolation.real:
            yield sandbox_worker.SCRATCH
            return
        with tempfile.TemporaryDirectory(prefix="program_", ignore_cleanup_errors=True) as folder:
            os.chmod(folder, 0o777)
            yield folder

    def _command(self, program_fd: int, task: Sequence[str]) -> list[str]:
        keep = "" if self.isolation.real else "keep"
        user = str(_USERS[next(_runs) % len(_USERS)]) if os.geteuid() == 0 else ""
        # A user's processes are counted together, but in a user namespace apart.
        in_use = 0 if user or self.isolation.real else _in_use()
        # CPU time is a process's; several threads use it up before the wall clock does.
        limits = (self._memory_bytes, math.ceil(self._limit_s) + 1, PROCESSES + in_use)
        interpreter = [_interpreter(), "-I", "-S", "-X", "utf8", "-c", _worker_text(task[0] in ("serve", "check"))]
        return [*interpreter, keep, user, *map(str, limits), str(program_fd), _python().libraries, *task]

    def _follow(
        self, process: subprocess.Popen[bytes], watched: Sequence[int], deadline: float, max_output: int
    ) -> tuple[Outcome, int | None]:
        """Reads the output until the process ended (it is left unreaped), or what is watched did what it must not.

        Returns:
          What became of it, and its exit status if it ended by itself.
        """
        output, reading, pause, next_look = bytearray(), True, 0.0005, time.monotonic() + _TICK_S
        poll = select.poll()
        poll.register(process.stdout, select.POLLIN)
        while (now := time.monotonic()) < deadline:
            if self._stopped.is_set():
                return Outcome("failed", bytes(output)), None
            if now >= next_look:
                next_look = now + _TICK_S
                # A process has its own limit; this is for many processes, and for files in memory.
                if not self._group and any(_exceeds(_usage(pid), self._memory_bytes) for pid in watched):
                    return Outcome("failed", bytes(output)), None
            if not reading:
                if (status := _exit_status(process.pid)) is not None:
                    return Outcome("failed" if status else "finished", bytes(output)), status
                time.sleep(pause)
                pause = min(2 * pause, _TICK_S)
            elif poll.poll(1000 * min(_TICK_S, deadline - now)):
                received = os.read(process.stdout.fileno(), 1 << 16)
                output += received
                reading = bool(received)
                if len(output) > max_output:
                    return Outcome("failed", bytes(output)), None
            # It may have written and ended after the poll gave up, while this thread waited for its turn; where it
            # wrote nothing more, another process holds its stdout.
            elif (status := _exit_status(process.pid)) is not None and not poll.poll(0):
                return Outcome("failed" if status else "finished", bytes(output)), status
        return Outcome("timed_out", bytes(output)), None

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """Kills what left the process group, and the group, whose number is its own until the leader is reaped."""
        if not self.isolation.real:
            # The worker kills what it can find; without namespaces nobody else can tell whose they are.
            os.kill(process.pid, signal.SIGTERM)
            deadline = time.monotonic() + _GRACE_S
            while _exit_status(process.pid) is None and time.monotonic() < deadline:
                time.sleep(0.001)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@functools.cache
def complaint(isolation: Isolation) -> str:
    """Why programs cannot be run like this here, found by running one; the empty string where they can."""
    if not hasattr(os, "memfd_create"):
        return f"{platform.system()} is not Linux"
    if isolation.real:
        if not shutil.which("bwrap"):
            return "bwrap is not installed (apt-get install bubblewrap)"
        try:
            filter_program()
        except ValueError as error:
            return str(error)
    elif os.geteuid() == 0:
        prefix = Path(os.path.realpath(sys.base_prefix))
        if not all(folder.stat().st_mode & 0o001 for folder in (prefix, *prefix.parents)):
            return f"run as root it hands programs to another user, who cannot enter {prefix}"
    sandbox = Sandbox(isolation, limit_s=30.0, memory_bytes=1 << 30)
    with tempfile.TemporaryFile() as errors:
        try:
            outcome = sandbox._run(["script"], _PROBE[isolation], "", errors, MAX_OUTPUT)
        except OSError as error:
            return f"the process could not be started: {error}"
        if outcome == Outcome("finished", b"confined\n"):
            return ""
        errors.seek(0)
        lines = errors.read().decode("utf-8", "replace").strip().splitlines()
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
try:
    os.memfd_create("x")
except PermissionError:
    pass
else:
    raise AssertionError("it makes files in memory")
"""
_PROBE = {
    Isolation.bubblewrap: _PROBE_LIMITS + _PROBE_ISOLATION + "print('confined')",
    Isolation.limits: _PROBE_LIMITS + "print('confined')",
}


@functools.cache
def _interpreter() -> str:
    """The interpreter that a virtual environment is based on."""
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


@functools.cache
def _worker_text(asserts: bool) -> str:
    """A program that is the worker, compiled once; where it is to import `assert_worker`, with that."""

    def run(module: ModuleType, namespace: str) -> str:
        path = Path(module.__file__)
        code = marshal.dumps(compile(path.read_bytes(), path.name, "exec"))
        text = binascii.b2a_base64(code, newline=False).decode()
        return f"exec(marshal.loads(binascii.a2b_base64({text!r})){namespace}); "

    imported = "sys.modules['assert_worker'] = type(sys)('assert_worker'); " if asserts else ""
    if asserts:
        imported += run(assert_worker, ", sys.modules['assert_worker'].__dict__")
    return f"import binascii, marshal, sys; {imported}{run(sandbox_worker, '')}"


def usual_names() -> set[str]:
    """What programs and tests may use without importing it, besides modules."""
    return {name for names in sandbox_worker.PRELUDE.values() for name in names.split()}


class _Python(NamedTuple):
    """What of the file system a program may read.

    Attributes:
      folders: whole.
      hidden: folders in these that stay empty, but for LIBRARY.
      files: the interpreter, and libraries and data of the system.
      links: symbolic links to these, and where they lead.
      libraries: the folder that holds LIBRARY; "" where that is not installed.
    """

    folders: tuple[str, ...]
    hidden: tuple[str, ...]
    files: tuple[str, ...]
    links: tuple[tuple[str, str], ...]
    libraries: str


# What Python loads is what it has mapped when it has imported what loads.  To end a thread it loads libgcc.
_PROBE_MAPS = """
import contextlib, ctypes, sys
sys.path += sys.argv[1:2]
for name in sys.argv[2:]:
    with contextlib.suppress(ImportError):
        __import__(name)
with contextlib.suppress(OSError):
    ctypes.CDLL("libgcc_s.so.1")
print(*{line.split(maxsplit=5)[5].strip() for line in open("/proc/self/maps") if "/" in line}, sep="\\n")
"""


@functools.cache
def _python() -> _Python:
    library = importlib.util.find_spec(LIBRARY)
    libraries, of_library = "", []
    if library is not None and library.origin is not None:
        folder = Path(library.origin).parent
        libraries = str(folder.parent)
        # Wheels keep the shared libraries beside the package.
        of_library = [path for path in (str(folder), f"{folder}.libs") if os.path.isdir(path)]
    bases = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    standard = sorted({os.path.realpath(sysconfig.get_path(name, vars=bases)) for name in ("stdlib", "platstdlib")})
    hidden = [str(path) for folder in standard for path in Path(folder).glob("*-packages")]
    command = [_interpreter(), "-I", "-S", "-c", _PROBE_MAPS, libraries, *_LOADING, LIBRARY]
    mapped = subprocess.run(command, env=_ENVIRONMENT, capture_output=True, text=True, check=True).stdout.splitlines()
    files = sorted({_interpreter(), *(path for path in mapped if ".so" in path and os.path.isfile(path))})
    files = [path for path in files if not any(Path(path).is_relative_to(folder) for folder in standard + of_library)]
    # Libraries are asked for by names without the last digits of their versions, and at /lib for /usr/lib.
    links = [(path, os.readlink(path)) for path in ("/lib", "/lib64") if os.path.islink(path)]
    for folder in sorted({*map(os.path.dirname, files), *map(os.path.realpath, ("/lib", "/lib64"))}):
        names = [entry.path for entry in os.scandir(folder) if entry.is_symlink()] if os.path.isdir(folder) else []
        links += [(name, os.path.realpath(name)) for name in names if os.path.realpath(name) in files]
    files += [path for path in _PYTHON_DATA if os.path.exists(path)]
    return _Python((*standard, *of_library), tuple(hidden), tuple(files), tuple(links), libraries)


@functools.cache
def _version() -> str:
    return subprocess.run(["bwrap", "--version"], capture_output=True, text=True, check=True).stdout.strip()


@functools.cache
def _bubblewrap() -> tuple[str, ...]:
    """The command line of bubblewrap, before the descriptor of the filter of system calls."""
    command = ["bwrap", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    command += ["--hostname", "program", "--die-with-parent", "--cap-drop", "ALL"]
    if os.geteuid() == 0:
        # Root mounts what only root may read; the worker then becomes another user, for good.
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user", "--uid", "65534", "--gid", "65534"]
    python = _python()
    inside = [folder for folder in python.folders if any(Path(folder).is_relative_to(path) for path in python.hidden)]
    roots = [(path, target) for path, target in python.links if Path(path).parent == Path("/")]
    others = [(path, target) for path, target in python.links if (path, target) not in roots]
    paths = [*python.folders, *python.files, *(path for path, _ in others), *sandbox_worker.DEVICES]
    parents = {parent for path in paths for parent in Path(path).parents if parent != Path("/")}
    for parent in sorted(parents):
        # By itself bubblewrap makes some of them for their owner only.
        if not any(parent.is_relative_to(folder) for folder in python.folders):
            command += ["--dir", str(parent)]
    for path, target in roots:
        command += ["--symlink", target, path]
    for folder in python.folders:
        command += [] if folder in inside else ["--ro-bind", folder, folder]
    for folder in python.hidden:
        command += ["--tmpfs", folder]
    for path in (*inside, *python.files):
        command += ["--ro-bind", path, path]
    for path, target in others:
        command += ["--symlink", target, path]
    for folder in python.hidden:
        command += ["--remount-ro", folder]
    for path in sandbox_worker.DEVICES:
        command += ["--dev-bind", path, path]
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        command += ["--symlink", f"/proc/self/fd/{number}", f"/dev/{name}"]
    command += ["--proc", "/proc", "--perms", "1777"]
    if "--size" in subprocess.run(["bwrap", "--help"], capture_output=True, text=True).stdout:
        # Before version 0.7 only `_usage` keeps the folder small.
        command += ["--size", str(sandbox_worker.SCRATCH_BYTES)]
    command += ["--tmpfs", sandbox_worker.SCRATCH, "--chdir", sandbox_worker.SCRATCH, "--remount-ro", "/", "--seccomp"]
    return tuple(command)


def _sealed_file(content: bytes) -> BinaryIO:
    """A file in memory that nobody can write to any more."""
    file = os.fdopen(os.memfd_create("sealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "w+b")
    file.write(content)
    file.seek(0)
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
    return file


def _exit_status(pid: int) -> int | None:
    """With which status a child ended, None where it did not; it stays unreaped, and its number its own."""
    ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    return None if ended is None else ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


def _read(path: str) -> list[str]:
    """The words of a file of /proc; none where the process is gone."""
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read().split()
    except (FileNotFoundError, ProcessLookupError):
        return []


class _Usage(NamedTuple):
    """Of a process and its descendants: bytes of memory with page tables and files in memory, and number of files."""

    memory: int
    files: int


def _usage(pid: int) -> _Usage:
    memory, files, waiting = 0, 0, [pid]
    while waiting:
        pid = waiting.pop()
        words = _read(f"/proc/{pid}/status")
        memory += sum(int(words[words.index(name) + 1]) << 10 for name in _COUNTED if name in words)
        try:
            tasks = os.listdir(f"/proc/{pid}/task")
        except (FileNotFoundError, ProcessLookupError):
            continue
        for task in tasks:
            waiting += map(int, _read(f"/proc/{pid}/task/{task}/children"))
        if not files:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                # There once bubblewrap has made it, and only in its namespace.
                system = os.statvfs(f"/proc/{pid}/root{sandbox_worker.SCRATCH}")
                files = system.f_files - system.f_ffree
                memory += (system.f_blocks - system.f_bfree) * system.f_frsize
    return _Usage(memory, files)


def _exceeds(usage: _Usage, memory_bytes: int) -> bool:
    return usage.memory > memory_bytes or usage.files > MAX_FILES


def _in_use() -> int:
    """Threads of this user."""
    threads = 0
    for entry in os.scandir("/proc"):
        words = _read(f"/proc/{entry.name}/status") if entry.name.isdigit() else []
        if words and int(words[words.index("Uid:") + 1]) == os.getuid():
            threads += int(words[words.index("Threads:") + 1])
    return threads
