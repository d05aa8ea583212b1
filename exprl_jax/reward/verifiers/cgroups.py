"""Control groups (v2): the kernel's own count of all memory and all processes of one program.

A group needs a parent in which this process may make folders, whose children get the `memory` and `pids` controllers,
and from which the kernel lets a process of ours move: root has one on a machine with systemd, and another user inside
`systemd-run --user --scope`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

_CONTROLLERS = {"memory", "pids"}
_numbers = itertools.count()


class Parent(NamedTuple):
    """Where groups can be made.

    Attributes:
      folder: of the parent group; None where there is none.
      reason: why there is none.
    """

    folder: Path | None
    reason: str = ""


@functools.cache
def find_parent() -> Parent:
    """The nearest group, from this process's own upwards, in which a trial process could be run."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
        groups = Path("/proc/self/cgroup").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        return Parent(None, f"/proc cannot be read: {error}")
    mount = re.search(r"^\S+ \S+ \S+ \S+ (\S+) .* - cgroup2 ", mounts, re.MULTILINE)
    own = re.search(r"^0::/(.*)$", groups, re.MULTILINE)
    if mount is None or own is None:
        return Parent(None, "no cgroup v2 is mounted")
    top = Path(mount[1])
    if not _CONTROLLERS <= set(_words(top / "cgroup.controllers")):
        return Parent(None, "cgroup v2 has no memory and pids controllers here")
    folder = top / own[1]
    for parent in (folder, *folder.parents):
        if not parent.is_relative_to(top):
            break
        if _CONTROLLERS <= set(_words(parent / "cgroup.subtree_control")) and _works(parent):
            return Parent(parent)
    return Parent(None, f"no group above {folder} lets this user make one with limits on memory and processes")


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").split()
    except OSError:
        return []


def _works(parent: Path) -> bool:
    try:
        with group(parent, memory_bytes=64 << 20, processes=16) as folder:
            return subprocess.run(enter(folder, ["true"]), stderr=subprocess.DEVNULL, timeout=10).returncode == 0
    except OSError:
        return False


@contextlib.contextmanager
def group(parent: Path, memory_bytes: int, processes: int) -> Iterator[Path]:
    """A new group; on leaving, whatever is still in it is killed, and the group removed.

    Raises:
      OSError: the group cannot be made, limited, or removed.
    """
    folder = parent / f"exprl_jax-{os.getpid()}-{next(_numbers)}"
    folder.mkdir()
    try:
        limits = {"memory.max": memory_bytes, "memory.swap.max": 0, "memory.oom.group": 1, "pids.max": processes}
        for name, value in limits.items():
            # Kernels without swap have no limit on it.
            if name != "memory.swap.max" or (folder / name).exists():
                (folder / name).write_text(str(value), encoding="ascii")
        yield folder
    finally:
        (folder / "cgroup.kill").write_text("1", encoding="ascii")
        deadline = time.monotonic() + 5.0
        while "populated 1" in (folder / "cgroup.events").read_text(encoding="ascii") and time.monotonic() < deadline:
            time.sleep(0.001)
        folder.rmdir()


def enter(folder: Path, command: Sequence[str]) -> list[str]:
    """A command line that moves its own process into a group before it becomes the command: no child can be missed."""
    return ["/bin/sh", "-c", 'echo $$ >"$0/cgroup.procs" && exec "$@"', str(folder), *command]
