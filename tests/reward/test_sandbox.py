"""The sandbox against programs that mean harm: each attack works outside, where that can be shown, and fails inside.

Every test runs under every isolation that this machine has and says of the others why they are not here.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from exprl_jax.reward.verifiers import cgroups
from exprl_jax.reward.verifiers import sandbox as sandbox_module
from exprl_jax.reward.verifiers.sandbox import MAX_OUTPUT, MIN_MEMORY, PROCESSES, Isolation, Outcome, Sandbox, complaint

ROOT = Path(__file__).resolve().parents[2]
MEMORY = 512 << 20
# Names a process for the whole machine to see, from inside any namespace.
NAME_ITSELF = """
import ctypes, os, signal, sys, time
def name_itself(name):
    assert ctypes.CDLL(None).prctl(15, name.encode(), 0, 0, 0) == 0
"""


def here(isolation):
    if complaint(isolation):
        pytest.skip(f"no {isolation.value} on this machine: {complaint(isolation)}")
    return isolation


@pytest.fixture(params=list(Isolation), ids=lambda each: each.value)
def isolation(request):
    return here(request.param)


@pytest.fixture(params=[each for each in Isolation if each.real], ids=lambda each: each.value)
def real(request):
    return here(request.param)


def run(isolation, program, stdin="", limit_s=30.0, memory=MEMORY):
    return Sandbox(isolation, limit_s, memory).run(textwrap.dedent(program), stdin)


def run_freely(program):
    """The same program without any sandbox."""
    code = textwrap.dedent(program)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=True).stdout


def named(name):
    """Process ids, over all namespaces, of the processes of that name."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if path.read_text().strip() == name:
                pids.append(int(path.parent.name))
    return pids


def waited_for(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_isolation_is_found_where_the_kernel_gives_it():
    """So that a fault of the sandbox cannot skip the tests of it."""
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed: apt-get install bubblewrap")
    command = "bwrap --unshare-pid --unshare-net --unshare-ipc --ro-bind / / --proc /proc true"
    tried = subprocess.run(command.split(), capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"this machine refuses namespaces: {tried.stderr.strip()}")
    assert complaint(Isolation.bubblewrap) == ""


# --- what a program may do -------------------------------------------------------------------------------------------


def test_a_program_reads_its_input_and_its_output_is_kept(isolation):
    assert run(isolation, "print(int(input()) + int(input()))", "20\n22\n") == Outcome("finished", b"42\n")
    assert run(isolation, "print(open(0).read())", "ü\n") == Outcome("finished", "ü\n\n".encode())
    assert run(isolation, "print(open('/dev/stdin').read(), end='')", "x") == Outcome("finished", b"x")
    assert run(isolation, "import sys; sys.stdout.buffer.write(sys.stdin.buffer.read())", "a\r\nb").output == b"a\r\nb"
    assert run(isolation, "if __name__ == '__main__': print('main')").output == b"main\n"
    assert run(isolation, "print(input())").ended == "failed"


@pytest.mark.parametrize(
    "program, ended, output",
    [
        ("print(1)\nraise ValueError", "failed", b"1\n"),
        ("print(1)\nimport sys; sys.exit(3)", "finished", b"1\n"),
        ("print(1)\nexit()", "finished", b"1\n"),
        ("print(1)\nquit(2)", "finished", b"1\n"),
        ("print(1)\nraise SystemExit('done')", "finished", b"1\n"),
        ("print(1, flush=True)\nimport os; os._exit(0)", "finished", b"1\n"),
        ("print(1, flush=True)\nimport os; os._exit(3)", "failed", b"1\n"),
        (
            "import threading, time\nthreading.Thread(target=time.sleep, args=[99], daemon=True).start()\nprint(1)",
            "finished",
            b"1\n",
        ),
        ("print(1, flush=True)\nimport os, signal; os.kill(os.getpid(), signal.SIGKILL)", "failed", b"1\n"),
        ("print(1)\nimport os; os.close(1)", "failed", b""),
        ("print(", "failed", b""),
        ("import threading; threading.Timer(0.2, print, [1]).start()", "finished", b"1\n"),
        ("\0", "failed", b""),
        # The end of an orphan is not the program's.
        (
            "import os, time\nif os.fork() == 0:\n if os.fork() == 0: time.sleep(0.2)\n os._exit(3)\n"
            "os.wait(); time.sleep(0.6); print(1)",
            "finished",
            b"1\n",
        ),
        ("print('\ud800')", "finished", b"?\n"),
    ],
)
def test_how_a_program_ended(isolation, program, ended, output):
    assert run(isolation, program) == Outcome(ended, output)


def test_a_call_gets_its_arguments_and_only_its_result_comes_back(isolation):
    sandbox = Sandbox(isolation, 30.0, MEMORY)

    def call(program, arguments="[]"):
        return sandbox.call(program, "f", arguments)

    solution = "class Solution:\n    def f(self, a: List[int], b):\n        print('noise'); return (max(a), Counter(b))"
    assert call(solution, '[[1, 3], "aab"]') == Outcome("finished", b'[3, {"a": 2, "b": 1}]')
    assert call("print('noise')\ndef f(): return None") == Outcome("finished", b"null")
    guarded = "if __name__ == '__main__': print(input())\ndef f(x): return x"
    assert call(guarded, '["ü"]') == Outcome("finished", b'"\\u00fc"')
    for wrong in ("def g(): pass", "def f(x): return x", "def f(): return {1}", "def f(): raise KeyError"):
        assert call(wrong) == Outcome("failed", b""), wrong
    # A call that exits has no result; definitions that exit have defined what they defined.
    for leave in ("exit()", "quit(1)", "import sys; sys.exit('x')", "import os; os._exit(0)", "raise SystemExit"):
        assert call(f"def f():\n    {leave}").output == b"", leave
        assert call(f"def f(): return 7\n{leave}") == Outcome("finished", b"7"), leave
    waits = "import threading\nthreading.Thread(target=threading.Event().wait).start()\ndef f(): return 7"
    assert call(waits) == Outcome("finished", b"7")
    forks = "import os\nif os.fork() == 0: os._exit(0)\nos.wait()\ndef f(): return 7"
    assert call(forks) == Outcome("finished", b"7")
    falls_through = "import os, sys\nif os.fork() == 0: sys.exit()\nos.wait()\ndef f(): return 7"
    assert call(falls_through) == Outcome("finished", b"7")


def test_numpy_is_there_where_the_training_environment_has_it(isolation):
    pytest.importorskip("numpy")
    assert run(isolation, "import numpy; print(numpy.arange(4).sum())") == Outcome("finished", b"6\n")
    outcome = Sandbox(isolation, 30.0, MEMORY).call("import numpy as np\ndef f(): return np.arange(2)", "f", "[]")
    assert outcome == Outcome("finished", b"[0, 1]")


def test_the_usual_names_are_imported_and_those_of_the_program_win(isolation):
    used = "print(gcd(4, 6), heapq.nsmallest(1, [2, 1]), bisect.bisect([1], 1), deque([1]), pow(2, 3, 5))"
    assert run(isolation, used).output == b"2 [1] 1 deque([1]) 3\n"
    assert run(isolation, "def gcd(a, b): return 'mine'\nprint(gcd(4, 6))").output == b"mine\n"
    assert run(isolation, "print(quux)").ended == "failed"
    # Deep recursion is what programs of this kind do.
    assert run(isolation, "def f(n): return n and 1 + f(n - 1)\nprint(f(40000))").output == b"40000\n"


# --- limits ----------------------------------------------------------------------------------------------------------


def test_the_environment_and_the_folder_are_empty_and_its_own(isolation, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "s3cret")
    program = "import os, tempfile; print(sorted(os.environ), os.listdir('.'), os.getcwd() == tempfile.gettempdir())"
    outcome = run(isolation, program + "\nopen('left', 'w').write('x')")
    names, listed, own = outcome.output.decode().strip().rpartition("[]")
    allowed = {"HOME", "LANG", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "PATH", "PWD", "TMPDIR", "LC_CTYPE"}
    assert outcome.ended == "finished" and own == " True"
    assert set(names.strip(" []").replace("'", "").split(", ")) <= allowed
    # Nothing is left for the next program.
    assert run(isolation, program).output == outcome.output


def test_limits_are_in_force_and_cannot_be_raised(isolation):
    program = """
    import resource
    for name in ("AS", "CPU", "FSIZE", "NOFILE", "NPROC", "CORE"):
        which = getattr(resource, "RLIMIT_" + name)
        soft, hard = resource.getrlimit(which)
        assert soft == hard != resource.RLIM_INFINITY, name
        try:
            resource.setrlimit(which, (hard + 1, hard + 1))
        except ValueError:
            continue
        raise AssertionError(name)
    print(resource.getrlimit(resource.RLIMIT_AS)[0], resource.getrlimit(resource.RLIMIT_CPU)[0])
    """
    assert run(isolation, program, limit_s=20.0) == Outcome("finished", f"{MEMORY} 21\n".encode())


def test_it_is_nobody_without_powers(isolation):
    program = """
    words = dict(line.split(":", 1) for line in open("/proc/self/status"))
    print(int(words["CapPrm"], 16), int(words["CapEff"], 16), "0" in words["Uid"].split(), "0" in words["Gid"].split())
    print(int(words["NoNewPrivs"]))
    """
    assert run(isolation, program) == Outcome("finished", b"0 0 False False\n1\n")


def test_a_memory_bomb_fails(isolation):
    assert run(isolation, "x = bytearray(10**10)").ended == "failed"
    assert run(isolation, "x = []\nwhile True: x.append(bytearray(10**6))").ended == "failed"
    assert run(isolation, "x = bytearray(10**8); print(len(x))") == Outcome("finished", b"100000000\n")


def test_a_memory_bomb_of_many_processes_fails(isolation):
    program = """
    import os, time
    for _ in range(6):
        if not os.fork():
            x = bytearray(b"x" * (100 << 20))
            time.sleep(100)
    time.sleep(100)
    """
    assert run(isolation, program, memory=300 << 20, limit_s=60.0).ended == "failed"


def test_a_memory_bomb_behind_a_closed_output_fails(isolation):
    program = """
    import os, time
    os.close(1)
    os.close(2)
    for _ in range(6):
        if not os.fork():
            x = bytearray(b"x" * (100 << 20))
            time.sleep(100)
    os._exit(0) if os.fork() == 0 else time.sleep(100)
    """
    assert run(isolation, program, memory=300 << 20, limit_s=60.0).ended == "failed"


def test_a_fork_bomb_stays_small_and_ends(isolation):
    name = f"bomb{os.getpid()}"
    counted = (
        NAME_ITSELF
        + f"name_itself('{name}')"
        + textwrap.dedent("""
    children = 0
    try:
        while children < 300:
            if not os.fork():
                time.sleep(100)
            children += 1
    except OSError:
        print(children)
    """)
    )
    outcome = run(isolation, counted)
    # Without namespaces the count is the user's, who may be doing other things.
    assert outcome.ended == "finished" and 0 < int(outcome.output) < (PROCESSES if isolation.real else 200)
    assert waited_for(lambda: not named(name))
    bomb = (
        NAME_ITSELF
        + f"name_itself('{name}')"
        + textwrap.dedent("""
    while True:
        try:
            os.fork()
        except OSError:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
    """)
    )
    assert run(isolation, bomb, limit_s=2.0).ended == "timed_out"
    assert waited_for(lambda: not named(name))


def test_endless_output_is_cut(isolation):
    outcome = run(isolation, "while True: print('x' * 10**6)")
    assert outcome.ended == "failed" and MAX_OUTPUT < len(outcome.output) < 2 * MAX_OUTPUT
    noise = "import sys, os\nfor _ in range(30): sys.stderr.write('x' * 10**6)\nprint(1)"
    assert run(isolation, noise) == Outcome("finished", b"1\n")


def test_a_large_file_fails_and_the_folder_is_small(isolation):
    assert run(isolation, "open('x', 'wb').write(bytes(10**7))").ended == "failed"
    assert run(isolation, "open('x', 'wb').write(bytes(10**5)); print(1)").ended == "finished"
    if isolation.real:
        many = "for i in range(100):\n with open(str(i), 'wb') as file: file.write(bytes(10**6))"
        assert run(isolation, many).ended == "failed"
        files = "import time\nfor i in range({}): open(str(i), 'w').close()\ntime.sleep(0.3)"
        assert run(isolation, files.format(sandbox_module.MAX_FILES // 2)).ended == "finished"
        assert run(isolation, files.format(sandbox_module.MAX_FILES + 1)).ended == "failed"


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(1000)",
        "import signal\nfor n in (1, 2, 3, 15, 24): signal.signal(n, signal.SIG_IGN)\nwhile True: pass",
        "import os, time; os.close(0); os.close(1); os.close(2); time.sleep(1000)",
        "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)",
        "import os, time\nif os.getpid() != os.getsid(0): os.setsid() if os.fork() == 0 else None\ntime.sleep(1000)",
        "9 ** 9 ** 9 ** 9",
    ],
)
def test_the_wall_clock_ends_everything(isolation, program):
    assert run(isolation, program, limit_s=1.0) == Outcome("timed_out", b"")


DAEMON = (
    NAME_ITSELF
    + """
name = sys.stdin.readline().strip()
started, start = os.pipe()
if not os.fork():
    os.setsid()
    if not os.fork():
        for number in (1, 2, 15, 24):
            signal.signal(number, signal.SIG_IGN)
        name_itself(name)
        os.write(start, b"1")
        time.sleep(1000)
    os._exit(0)
os.read(started, 1)
print("started", flush=True)
"""
)


def test_a_daemon_dies_with_the_program(isolation):
    name = f"daemon{os.getpid()}"
    assert run(isolation, DAEMON, f"{name}\n") == Outcome("finished", b"started\n")
    assert waited_for(lambda: not named(name))
    assert run(isolation, DAEMON + "time.sleep(1000)", f"{name}\n", limit_s=4.0) == Outcome("timed_out", b"started\n")
    assert waited_for(lambda: not named(name))


def test_a_daemon_outlives_a_program_that_is_only_killed():
    """What the test above would see if nobody looked for daemons."""
    name = f"outlives{os.getpid()}"
    # Its output goes nowhere: the daemon would hold a pipe open.
    subprocess.run([sys.executable, "-c", DAEMON], input=f"{name}\n".encode(), stdout=subprocess.DEVNULL, check=True)
    (pid,) = named(name)
    os.kill(pid, signal.SIGKILL)
    assert waited_for(lambda: not named(name))


def test_a_program_that_kills_its_keeper_has_failed():
    """Its daemon escapes: without namespaces nobody is left who could know it.  That is why limits are no isolation."""
    here(Isolation.limits)
    if os.geteuid() == 0:
        pytest.skip("the keeper of a program that root started is root's, and cannot be killed by it")
    name = f"escapes{os.getpid()}"
    program = DAEMON + "os.kill(os.getppid(), signal.SIGKILL)"
    try:
        assert run(Isolation.limits, program, f"{name}\n") == Outcome("failed", b"started\n")
    finally:
        for pid in named(name):
            os.kill(pid, signal.SIGKILL)


def test_programs_die_with_the_run_that_started_them(isolation):
    name = f"orphan{os.getpid()}"
    program = NAME_ITSELF + f"name_itself('{name}'); time.sleep(1000)"
    code = (
        "from exprl_jax.reward.verifiers.sandbox import Isolation, Sandbox; "
        f"Sandbox(Isolation.{isolation.value}, 1000.0, {MEMORY}).run({program!r}, '')"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    try:
        assert waited_for(lambda: named(name))
    finally:
        owner.kill()
        owner.wait()
    assert waited_for(lambda: not named(name))


# --- isolation -------------------------------------------------------------------------------------------------------


def test_it_cannot_read_the_environment_of_others(real):
    secret = f"s3cret-{os.getpid()}"
    look = """
    import os
    for name in os.listdir("/proc"):
        try:
            with open(f"/proc/{name}/environ", "rb") as file:
                print(file.read())
        except OSError:
            pass
    print("looked")
    """
    holder = subprocess.Popen(["sleep", "100"], env={"TOKEN": secret})
    try:
        assert secret.encode() in run_freely(look)
        outcome = run(real, look)
        assert outcome.ended == "finished" and b"looked" in outcome.output and secret.encode() not in outcome.output
        parent = run(real, "import os; print(open(f'/proc/{os.getppid()}/environ', 'rb').read())").output
        for variable in Path("/proc/self/environ").read_bytes().split(b"\0"):
            assert variable.startswith((b"PATH=", b"LANG=")) or not variable or variable not in parent
    finally:
        holder.kill()
        holder.wait()


def test_it_cannot_kill_its_parent_or_everything(real):
    bystander = subprocess.Popen(["sleep", "100"])
    try:
        kill = (
            "import os, signal\nfor pid in (os.getppid(), {}, -1):\n"
            " try: os.kill(pid, signal.SIGKILL)\n except OSError: pass\n"
        )
        assert run(real, kill.format(bystander.pid) + "print('alive')") == Outcome("finished", b"alive\n")
        assert run(real, kill.format(os.getpid()) + "import time; time.sleep(9)", limit_s=1.0).ended == "timed_out"
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_it_cannot_open_a_connection(real):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind(f"\0sandbox-{os.getpid()}")
        local.listen()
        server.settimeout(0.2)
        connect = f"""
        import socket
        for kind, address in ((socket.AF_INET, {server.getsockname()!r}), (socket.AF_UNIX, {local.getsockname()!r})):
            try:
                with socket.socket(kind) as client:
                    client.settimeout(5)
                    client.connect(address)
                print("connected")
            except OSError:
                print("refused")
        """
        assert run_freely(connect) == b"connected\nconnected\n"
        server.accept()[0].close()
        assert run(real, connect) == Outcome("finished", b"refused\nrefused\n")
        with pytest.raises(TimeoutError):
            server.accept()


WRITE = """
import os, sys
for place in sys.stdin.read().split():
    try:
        with open(os.path.join(place, "written"), "w") as file:
            file.write("x")
        print("wrote", place)
    except OSError:
        pass
"""


def test_it_cannot_write_outside_its_folder(real, tmp_path):
    tmp_path.chmod(0o777)
    places = ["/", "/usr", "/usr/lib", "/etc", "/dev", "/dev/shm", "/tmp", "/var/tmp", "/root", "/home", "/proc/self"]
    places += [sys.base_prefix, str(Path(os.__file__).parent), "/proc/sys/kernel", str(Path.home()), str(tmp_path)]
    command = [sys.executable, "-c", WRITE]
    assert subprocess.check_output(command, input=str(tmp_path), text=True) == f"wrote {tmp_path}\n"
    (tmp_path / "written").unlink()
    assert run(real, WRITE, " ".join(places)) == Outcome("finished", b"")
    assert not list(tmp_path.iterdir())


def test_it_cannot_read_the_users_files(real, tmp_path):
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid() and folder != Path("/") and folder != Path("/tmp"):
            folder.chmod(0o755)
    (tmp_path / "notes").write_text("private")
    read = f"import os; print(os.path.exists({str(tmp_path / 'notes')!r}))"
    assert run_freely(read) == b"True\n"
    assert run(real, read) == Outcome("finished", b"False\n")
    home = run(real, f"import os; print(*os.listdir({str(Path.home())!r}))")
    assert home.ended == "failed" or home.output.decode().split() == _leads_to_the_interpreter(Path.home())


def _leads_to_the_interpreter(folder):
    return sorted({path.relative_to(folder).parts[0] for path in visible_paths() if path.is_relative_to(folder)})


def visible_paths():
    python = sandbox_module._python()
    return [Path(path) for path in (*python.folders, *python.files, *(path for path, _ in python.links))]


def test_it_sees_of_the_file_system_what_it_needs(real):
    visible = visible_paths()
    seen = set(run(real, "import os; print(*os.listdir('/'))").output.decode().split())
    assert seen == {path.parts[1] for path in visible} | {"dev", "proc", "program"}
    for folder in {parent for path in visible for parent in path.parents if parent != Path("/")}:
        below = {path.relative_to(folder).parts[0] for path in visible if path.is_relative_to(folder)}
        inside = run(real, f"import os; print(*os.listdir({str(folder)!r}))").output.decode()
        is_standard = any(folder.is_relative_to(path) for path in map(Path, sandbox_module._python().folders))
        assert is_standard or set(inside.split()) == below, folder


def test_it_cannot_reach_the_shared_memory_of_others(real):
    libc, key = ctypes.CDLL(None), 0x5A000000 + os.getpid()
    segment = libc.shmget(key, 4096, 0o1000 | 0o666)
    assert segment >= 0
    try:
        look = f"import ctypes; print(ctypes.CDLL(None).shmget({key}, 4096, 0) >= 0)"
        assert run_freely(look) == b"True\n"
        assert run(real, look) == Outcome("finished", b"False\n")
    finally:
        libc.shmctl(segment, 0, None)


def test_it_cannot_make_namespaces_of_its_own(real):
    """In which it would be root, and could mount memory that no limit counts."""
    program = """
    import ctypes, os
    libc = ctypes.CDLL(None, use_errno=True)
    for flag in (0x80, 0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        assert libc.unshare(flag) == -1
        child = libc.syscall(56 if os.uname().machine == "x86_64" else 220, flag | 17, 0, 0, 0, 0)
        if child == 0:
            os._exit(0)
        assert child == -1, hex(flag)
    print(libc.mount(b"x", b"/program", b"tmpfs", 0, None), ctypes.get_errno())
    """
    assert run(real, program) == Outcome("finished", b"-1 1\n")


def test_it_cannot_write_to_its_input(real):
    program = "import os\ntry: os.write(os.open('/proc/self/fd/0', os.O_RDWR), b'x')\nexcept OSError: print('no')"
    assert run(real, program, "input") == Outcome("finished", b"no\n")


# --- memory that belongs to nobody -----------------------------------------------------------------------------------

# What each holds outside of any resident set; it prints how much it got, in pieces of 8 MB.
HIDDEN_MEMORY = {
    "System V segments": """
        libc = ctypes.CDLL(None)
        libc.shmat.restype = ctypes.c_void_p
        def take():
            segment = libc.shmget(0, SIZE, 0o1600)
            address = libc.shmat(segment, None, 0) if segment >= 0 else None
            if address in (None, ctypes.c_void_p(-1).value):
                return False
            ctypes.memset(address, 1, SIZE)
            libc.shmdt(ctypes.c_void_p(address))
            CLEAN.append(lambda: libc.shmctl(segment, 0, None))
            return True
        """,
    "files in memory": """
        def take():
            file = os.memfd_create("x")
            CLEAN.append(lambda: os.close(file))
            return os.write(file, bytes(1 << 20)) > 0
        """,
    "shared pages without a mapping": """
        def take():
            memory = mmap.mmap(-1, SIZE)
            memory[:] = bytes(SIZE)
            memory.madvise(mmap.MADV_DONTNEED)
            CLEAN.append(memory.close)
            return True
        """,
    "shared pages of a device": """
        def take():
            with open("/dev/zero", "r+b") as device:
                memory = mmap.mmap(device.fileno(), SIZE)
            memory[:] = bytes(SIZE)
            CLEAN.append(memory.close)
            return True
        """,
    "buffers of sockets": """
        import socket
        def take():
            pair = socket.socketpair()
            pair[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SIZE)
            CLEAN.append(pair[0].close)
            return True
        """,
    "locks": """
        import fcntl, tempfile
        def take():
            file = tempfile.TemporaryFile()
            fcntl.lockf(file, fcntl.LOCK_EX, 1, 7)
            CLEAN.append(file.close)
            return True
        """,
    "message queues": """
        libc = ctypes.CDLL(None)
        def take():
            queue = libc.msgget(0, 0o1600)
            CLEAN.append(lambda: libc.msgctl(queue, 0, None))
            return queue >= 0
        """,
    "semaphores": """
        libc = ctypes.CDLL(None)
        def take():
            semaphores = libc.semget(0, 100, 0o1600)
            CLEAN.append(lambda: libc.semctl(semaphores, 0, 0))
            return semaphores >= 0
        """,
    "rings": """
        libc = ctypes.CDLL(None)
        def take():
            ring = libc.syscall(425, 8, ctypes.create_string_buffer(120))
            return ring >= 0
        """,
    "rules about files": """
        libc = ctypes.CDLL(None)
        def take():
            return libc.syscall(444, (ctypes.c_uint64 * 3)(1, 0, 0), 8, 0) >= 0
        """,
    "watches": """
        libc = ctypes.CDLL(None)
        def take():
            return libc.inotify_add_watch(libc.inotify_init(), b"/proc/self/stat", 2) >= 0
        """,
}
TAKE = """
import ctypes, mmap, os
SIZE, CLEAN = 8 << 20, []
{}
try:
    took = take()
except OSError:
    took = False
for clean in CLEAN:
    clean()
print("took" if took else "refused")
"""


@pytest.mark.parametrize("what", HIDDEN_MEMORY)
def test_it_cannot_take_memory_that_nobody_counts(real, what):
    program = TAKE.format(textwrap.dedent(HIDDEN_MEMORY[what]))
    if run_freely(program) != b"took\n":
        pytest.skip(f"this machine has no {what}")
    assert run(real, program) == Outcome("finished", b"refused\n")


def test_page_tables_count(real):
    """Pages far from each other need two pages of tables each."""
    program = """
    import ctypes, time
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    for i in range(50_000):
        # Reading one maps the one page of zeros, which is in nobody's resident set.
        ctypes.string_at(libc.mmap((1 << 40) + (i << 30), 4096, 1, 0x32, -1, 0), 1)
    time.sleep(0.5)
    print("mapped")
    """
    assert run(real, program, memory=300 << 20) == Outcome("failed", b"")
    assert run(real, program, memory=600 << 20) == Outcome("finished", b"mapped\n")


def test_what_it_writes_counts_as_memory(real):
    program = """
    import os, time
    for name in "abcdefghijkl":
        with open(name, "wb") as file:
            file.write(bytes(10**6))
    x = b"x" * (70 << 20)
    time.sleep(0.5)
    print("done")
    """
    assert run(real, program, memory=300 << 20) == Outcome("finished", b"done\n")
    assert run(real, program, memory=90 << 20).ended == "failed"


# --- calls of the system ---------------------------------------------------------------------------------------------


def test_it_has_sockets_within_itself_only(real):
    program = """
    import socket
    made = []
    for family in range(64):
        for kind in (1, 2, 3, 5):
            try:
                socket.socket(family, kind).close()
                made.append(family)
                break
            except OSError:
                pass
    print(made)
    """
    made = run_freely(program).decode()
    assert {socket.AF_UNIX, socket.AF_INET, socket.AF_NETLINK} <= set(map(int, made.strip("[]\n").split(", ")))
    assert run(real, program) == Outcome("finished", f"[{int(socket.AF_UNIX)}]\n".encode())
    pair = "import socket\na, b = socket.socketpair()\na.send(b'x')\nprint(b.recv(1))"
    assert run(real, pair) == Outcome("finished", b"b'x'\n")
    loop = "import asyncio\nasync def f(): await asyncio.sleep(0.01); return 7\nprint(asyncio.run(f()))"
    assert run(real, loop) == Outcome("finished", b"7\n")


def test_a_family_cannot_hide_in_the_upper_half_of_a_register(real):
    number = {"x86_64": 41, "aarch64": 198}[os.uname().machine]
    program = f"""
    import ctypes
    libc = ctypes.CDLL(None)
    for family in (2, 16, 40):
        for upper in (0, 1, 0xffffffff):
            print(libc.syscall({number}, ctypes.c_ulong(upper << 32 | family), ctypes.c_ulong(1), ctypes.c_ulong(0)))
    """
    assert b"-1" not in run_freely(program).splitlines()[0:2]
    assert run(real, program) == Outcome("finished", b"-1\n" * 9)


def test_it_cannot_call_as_a_32_bit_program(real):
    if os.uname().machine != "x86_64":
        pytest.skip("only x86_64 has another entrance")
    program = """
    import ctypes, mmap
    # mov eax, 359 (socket); mov ebx, 2; mov ecx, 1; xor edx, edx; int 0x80; ret; rbx is saved around it
    code = bytes.fromhex("53 b867010000 bb02000000 b901000000 31d2 cd80 5b c3")
    memory = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=7)
    memory.write(code)
    call = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
    print(call(), flush=True)
    """
    outside = run_freely(program)
    if int(outside) < 0:
        pytest.skip("this kernel runs no 32-bit programs")
    assert run(real, program) == Outcome("failed", b"")


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("ptrace", "0, 0, 0, 0"),
        ("process_vm_readv", "os.getpid(), None, 0, None, 0, 0"),
        ("unshare", "0"),
        ("setns", "os.open('/proc/self/ns/net', 0), 0"),
        ("userfaultfd", "1"),
        ("add_key", "b'user', b'a', b'b', 1, -3"),
        ("keyctl", "0, -3, 1"),
        ("bpf", "0, ctypes.create_string_buffer(128), 128"),
        ("perf_event_open", "ctypes.create_string_buffer(128), 0, -1, -1, 0"),
        ("io_setup", "1, ctypes.byref(ctypes.c_ulong())"),
        ("kcmp", "os.getpid(), os.getpid(), 0, 0, 0"),
        ("mount", "b'x', b'/program', b'tmpfs', 0, None"),
        ("clone3", "ctypes.create_string_buffer(88), 88"),
    ],
)
def test_calls_that_serve_attacks_are_refused(real, name, arguments):
    """By the filter: errno is not that of a kernel that looked at the arguments."""
    import pyseccomp

    number = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name)
    program = f"""
    import ctypes, errno, os
    libc = ctypes.CDLL(None, use_errno=True)
    print(libc.syscall({number}, {arguments}), errno.errorcode[ctypes.get_errno()])
    """
    expected = b"-1 ENOSYS\n" if name == "clone3" else b"-1 EPERM\n"
    assert run(real, program) == Outcome("finished", expected)


def test_a_program_may_do_what_solutions_do(real):
    """Threads, pools, big integers, SQL in memory, time zones, hashes, regular expressions, compression."""
    program = """
    import bz2, concurrent.futures, ctypes, decimal, hashlib, lzma, multiprocessing, re, sqlite3, subprocess, sys, zlib
    import uuid, zoneinfo
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(int, range(100))) == 4950
    process = multiprocessing.Process(target=print, args=[1])
    process.start(); process.join()
    assert subprocess.check_output([sys.executable, "-c", "print(2)"]) == b"2\\n"
    assert sqlite3.connect(":memory:").execute("select 3").fetchone() == (3,)
    assert str(decimal.Decimal(1) / 7).startswith("0.142857")
    assert zlib.decompress(zlib.compress(b"x")) == bz2.decompress(bz2.compress(b"x")) == b"x"
    assert lzma.decompress(lzma.compress(b"x")) == b"x" and len(hashlib.sha256(b"x").hexdigest()) == 64
    assert "Europe/Berlin" in zoneinfo.available_timezones() or not zoneinfo.available_timezones()
    print(len(str(2 ** 40_000)), uuid.uuid4().version)
    """
    assert run(real, program) == Outcome("finished", b"1\n12042 4\n")


# --- what is in force ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/usr/src", "/usr/share/doc", "/bin/sh", "/usr/bin/ls", "/etc/passwd", "/sys", "/dev/shm", "/tmp", "/var"]
)
def test_what_python_does_not_need_is_not_there(real, path):
    """A folder above the interpreter's own holds the way to it, and nothing else."""
    ways = {
        Path(prefix).relative_to(path).parts[0]
        for prefix in (sys.prefix, sys.base_prefix)
        if Path(prefix).is_relative_to(path)
    }
    program = f"import os; print(sorted(os.listdir({path!r})) if os.path.exists({path!r}) else [])"
    assert run(real, program) == Outcome("finished", f"{sorted(ways)}\n".encode())


def test_site_packages_are_hidden_but_for_numpy(real):
    installed = {Path(module.__file__).parents[1] for module in (pytest, __import__("jax"), __import__("numpy"))}
    installed |= {Path(path) for path in sys.path if path.endswith("-packages")}
    installed |= {Path(os.__file__).parent / "site-packages", Path("/usr/lib/python3/dist-packages")}
    for folder in installed:
        listed = run(real, f"import os; print(*os.listdir({str(folder)!r}))")
        assert listed.ended == "failed" or set(listed.output.decode().split()) <= {"numpy", "numpy.libs"}, folder
    for name in ("jax", "pytest", "exprl_jax", "pip", "torch", "pyseccomp"):
        assert run(real, f"import {name}").ended == "failed"


def test_the_host_has_no_name(real):
    assert run(real, "import os; print(os.uname().nodename)") == Outcome("finished", b"program\n")


def test_it_inherits_nothing_but_its_input_and_outputs(real):
    with open(os.devnull) as file:
        os.set_inheritable(file.fileno(), True)
        listed = run(real, "import os; print(sorted(map(int, os.listdir('/proc/self/fd')))[:-1])")
    assert listed == Outcome("finished", b"[0, 1, 2]\n")


def test_programs_of_one_run_do_not_share_a_limit(real):
    """Sixteen threads each, at once: the kernel counts a user's."""
    program = """
    import threading, time
    threads = [threading.Thread(target=time.sleep, args=[0.5]) for _ in range(10)]
    for thread in threads: thread.start()
    print(len(threads))
    """
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        outcomes = list(pool.map(lambda _: run(real, program), range(6)))
    assert outcomes == [Outcome("finished", b"10\n")] * 6


def test_each_mechanism_in_force_is_named(real):
    sentence = real.sentence
    version = subprocess.run(["bwrap", "--version"], capture_output=True, text=True).stdout.strip()
    for mechanism in (version, "network", "IPC", "process", "mount", "seccomp", "resource limits", "memory counted"):
        assert mechanism in sentence
    assert ("user namespaces" in sentence) is (os.geteuid() != 0)
    parent = cgroups.find_parent()
    assert (str(parent.folder) if parent.folder else parent.reason) in sentence and "\n" not in sentence


def test_control_groups_are_looked_for(tmp_path, monkeypatch):
    parent = cgroups.find_parent()
    assert (parent.folder is None) == bool(parent.reason)
    # A folder that is no control group limits nothing, and is refused.
    assert not cgroups._works(tmp_path)


def test_control_groups_count_all_memory(real):
    """The page cache of files in memory too, where the kernel lets this user make a group."""
    parent = cgroups.find_parent()
    if parent.folder is None:
        pytest.skip(parent.reason)
    program = """
    import os, time
    for _ in range(4):
        if not os.fork():
            x = bytearray(b"x" * (60 << 20))
            time.sleep(100)
    time.sleep(100)
    """
    assert run(real, program, memory=200 << 20, limit_s=20.0).ended == "failed"
    assert not list(parent.folder.glob(f"exprl_jax-{os.getpid()}-*"))


def test_a_stop_ends_what_runs(isolation):
    stopped = threading.Event()
    threading.Timer(1.0, stopped.set).start()
    start = time.monotonic()
    outcome = Sandbox(isolation, 1000.0, MEMORY, stopped).run("print(1, flush=True)\nwhile True: pass", "")
    assert outcome == Outcome("failed", b"1\n") and time.monotonic() - start < 10


# --- doors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit_s", [0.0, -1.0, float("nan"), float("inf")])
def test_a_limit_must_be_a_time(limit_s):
    with pytest.raises(ValueError, match="limit_s"):
        Sandbox(Isolation.limits, limit_s, MEMORY)


def test_an_interpreter_needs_memory(isolation):
    with pytest.raises(ValueError, match="memory_bytes"):
        Sandbox(isolation, 1.0, MIN_MEMORY - 1)
    assert run(isolation, "print(1)", memory=MIN_MEMORY) == Outcome("finished", b"1\n")


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert "bwrap is not installed" in complaint.__wrapped__(Isolation.bubblewrap)
    assert [each.real for each in Isolation] == [True, False]
    assert "NOT isolated" in Isolation.limits.sentence


def test_nothing_stays_open(isolation):
    run(isolation, "print(1)")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        run(isolation, "print(1)")
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_written_while_the_grader_waits_for_its_turn_is_read(isolation, monkeypatch):
    """The poll gives up; the program writes and ends; only then is it asked whether it ended."""
    exit_status = sandbox_module._exit_status

    def late(pid):
        time.sleep(0.5)
        return exit_status(pid)

    monkeypatch.setattr(sandbox_module, "_exit_status", late)
    outcome = run(isolation, "import time; time.sleep(0.3); print('here')")
    assert outcome == Outcome("finished", b"here\n")
