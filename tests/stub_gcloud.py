"""Google Cloud in a folder, for the tests of tpu_scripts/: `gcloud`, and what the scripts call on its workers.

Each of these commands is this file under another name.  All record their words in calls.jsonl.  What gcloud answers
of the slice $STUB_NAME comes from scripts in the folder $STUB: a line of `queued` and of `nodes` each time it is asked
(the last line stays; `-`: there is none; `fails`: no answer; no script: the node is READY).  `tpu-vm ssh` runs its
command in a real shell, with a folder of workers/ as home; what it keeps on /mnt/exprl beside the runs is in shared/.
A line of `programs-<worker>` says what the program does when it is started there: a number to exit with, `run` until it
is killed, `lost`: killed together with the shell that waits for it, `leaves` a child behind, `reboots`: is lost with
the machine's mounts, or `stops` and a number to exit with: it runs until TERM has reached one worker, and saves until
there is a file `saved`.  A line of `breaks` says after how many bytes of its answer `tpu-vm ssh` loses its connection
and begins again.  A call that holds a line of `refuse` among its words fails.
"""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

COMMANDS = ("gcloud", "sudo", "mountpoint", "pkill", "python3")


def install(folder: pathlib.Path, name: str, scripts: dict[str, list[str]], workers: int = 2) -> dict[str, str]:
    """Makes the folder; returns what a shell's environment must have."""
    for command in COMMANDS:
        _executable(folder / "bin" / command)
    for script, lines in scripts.items():
        (folder / script).write_text("".join(f"{line}\n" for line in lines))
    (folder / "shared").mkdir()
    for worker in range(workers):
        (folder / "workers" / str(worker)).mkdir(parents=True)
    return {"STUB": str(folder), "STUB_NAME": name, "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}


def calls(folder: pathlib.Path) -> list[list[str]]:
    """What was called so far."""
    file = folder / "calls.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def end_programs(folder: pathlib.Path) -> None:
    """As when the machines go."""
    for file in folder.glob("program-*.pid"):
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            os.kill(int(file.read_text()), signal.SIGKILL)
        file.unlink(missing_ok=True)


def _executable(path: pathlib.Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable}\n{pathlib.Path(__file__).read_text()}")
    path.chmod(0o755)


def _next(folder: pathlib.Path, name: str) -> str:
    """The script's next line; the last one stays."""
    file = folder / name
    lines = file.read_text().splitlines() if file.exists() else []
    if len(lines) > 1:
        file.write_text("".join(f"{line}\n" for line in lines[1:]))
    return lines[0] if lines else ""


def _option(words: list[str], name: str) -> str:
    return next(word.partition("=")[2] for word in words if word.startswith(f"--{name}="))


def _gcloud(folder: pathlib.Path, words: list[str]) -> int:
    match words:
        case ["compute", "tpus", "queued-resources", "list", *_]:
            state = _next(folder, "queued")
            if state == "fails":
                return 1
            print("another\tACTIVE" + f"\n{os.environ['STUB_NAME']}\t{state}" * (state not in ("", "-")))
        case ["compute", "tpus", "tpu-vm", "list", *_]:
            state = _next(folder, "nodes") or "READY"
            print("another\tREADY" + f"\n{os.environ['STUB_NAME']}\t{state}" * (state != "-"))
        case ["compute", "tpus", "queued-resources", "delete", *_]:
            end_programs(folder)
            for home in list((folder / "workers").iterdir()):
                home.rename(folder / f"gone-{home.name}-{time.monotonic_ns()}")  # something may still write there
                home.mkdir()
        case ["compute", "tpus", "tpu-vm", "scp", source, *rest]:
            for home in (folder / "workers").iterdir():
                shutil.copy(source, home)
        case ["compute", "tpus", "tpu-vm", "ssh", *rest]:
            worker = _option(rest, "worker")
            homes = sorted((folder / "workers").glob("*" if worker == "all" else worker))
            text = _option(rest, "command").replace("/mnt/exprl/exprl_jax", f"{folder}/shared/exprl_jax")
            command = ["bash", "-c", text]
            if breaks := int(_next(folder, "breaks") or 0):  # the connection, and gcloud asks again
                held = os.environ | {"HOME": str(homes[0])}
                lost = subprocess.run(command, cwd=homes[0], env=held, capture_output=True)
                os.write(1, lost.stdout[:breaks])
            started = _started(folder)
            launches = command[2].endswith("&")
            shells = [
                subprocess.Popen(command, cwd=home, env=os.environ | {"HOME": str(home)}, start_new_session=launches)
                for home in homes
            ]
            status = max(shell.wait() for shell in shells)
            while launches and not status and _started(folder) < started + len(homes):
                time.sleep(0.01)  # what is launched has begun, so that what a test does next comes next
            for shell in shells if launches else []:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(shell.pid, signal.SIGHUP)  # the connection is closed
            return status
        case ["storage", "buckets", "describe", *_]:
            print(_next(folder, "bucket"))
        case ["filestore", "instances", "describe", *_]:
            print(_next(folder, "address"))
    return 0


def _python(folder: pathlib.Path, words: list[str]) -> int:
    """The image's Python, which can make a virtual environment, and that environment's."""
    match words:
        case ["-m", "uv", "venv", *_, path]:
            _executable(pathlib.Path(path) / "bin" / "python")
        case ["-m", "uv", "pip", "freeze", *_]:
            print("jax==0.10.2")
        case ["-m", "exprl_jax.main", *_]:
            home = pathlib.Path(os.environ["HOME"])
            does = _next(folder, f"programs-{home.name}")
            if does.startswith("stops"):
                signal.signal(signal.SIGTERM, lambda *_: (folder / "asked").touch())
            print(f"stub program on worker {home.name}", flush=True)
            if does == "leaves" and not os.fork():
                (folder / f"program-{home.name}-{os.getpid()}.pid").write_text(str(os.getpid()))
                does = "run"
            if does == "run":
                time.sleep(600)
            if does == "reboots":
                (home / "mounted").unlink()
            if does in ("lost", "reboots"):
                os.kill(os.getppid(), signal.SIGKILL)
            if does.startswith("stops"):
                while not ((folder / "asked").exists() and (folder / "saved").exists()):
                    time.sleep(0.01)
                if home.name == "0":
                    print("stopped after step 4 of 230; start again with the same command to go on", flush=True)
                does = does.removeprefix("stops")
            return int(does) if does.strip().isdecimal() else 0
    return 0


def _pkill(words: list[str]) -> int:
    """Only what runs on this worker, which has the machine to itself."""
    sent, _, pattern = words
    for pid in subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True).stdout.split():
        with contextlib.suppress(OSError):
            held = pathlib.Path("/proc", pid, "environ").read_bytes().split(b"\0")
            if f"HOME={os.environ['HOME']}".encode() in held:
                os.kill(int(pid), getattr(signal, f"SIG{sent[1:]}"))
    return 0


def _started(folder: pathlib.Path) -> int:
    return sum("exprl_jax.main" in call for call in calls(folder))


def main(name: str, words: list[str]) -> int:
    folder = pathlib.Path(os.environ["STUB"])
    home = pathlib.Path(os.environ["HOME"]).relative_to(folder).name if name != "gcloud" else ""
    standing = folder / f"program-{home}-{os.getpid()}.pid"
    if "exprl_jax.main" in words:
        standing.write_text(str(os.getpid()))
    with open(folder / "calls.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps([f"{home}:{name}" if home else name, *words]) + "\n")
    try:
        return _do(folder, name, words)
    finally:
        standing.unlink(missing_ok=True)


def _do(folder: pathlib.Path, name: str, words: list[str]) -> int:
    refused = (folder / "refuse").read_text().splitlines() if (folder / "refuse").exists() else []
    if any(each in words for each in refused):
        print(f"{name}: refused", file=sys.stderr)
        return 1
    if name == "gcloud":
        return _gcloud(folder, words)
    if name.startswith("python"):
        return _python(folder, words)
    if name == "pkill":
        return _pkill(words)
    mounted = pathlib.Path(os.environ["HOME"], "mounted")
    if "mount" in words:
        mounted.touch()
    return not mounted.exists() if name == "mountpoint" else 0


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[0]).name, sys.argv[1:]))
