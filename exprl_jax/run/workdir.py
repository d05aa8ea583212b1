"""One run's folder: who may use it, and where everything in it lies.

    config.json       the resolved config; its presence is what makes a folder a workdir
    samples/          of an evaluation: <set>.jsonl; see `evaluation.evaluate`
    *.jsonl           scores and continuations of a calibration, annotations of an annotation; see `evaluation`
    checklists.jsonl  of a judge with a rubric per problem; see `reward.checklists`
    checkpoints/      see `checkpoint`
    model/            the policy's architecture and tokenizer, without which its checkpoints say nothing
    models.json       fingerprints of the models' files; see `weights.run_models`
    metrics.jsonl     one JSON object a step; see `metrics`
    rollouts/         step_N.jsonl, a sample of the rows of step N
    evaluations/      step_N.jsonl, how often each problem was solved; see `evaluating`
    report.html       the run as a page, as of its newest checkpoint
    tensorboard/      event files
    wandb/            what Weights & Biases keeps; trackers.json what it and Trackio were sent; see `trackers`
    export/           the trained policy as a Hugging Face folder
    lock              held by the training process as long as it lives

Starting in a workdir that already has a `config.json` resumes its run.  Of the config only the `NEUTRAL_KEYS` may
differ then, on which no number depends beyond the order of sums: how long a run is and what is kept of it (a larger
`steps` extends a finished run, if its learning rate is constant), and on which machines, in how large parts and within
which time limits it is computed, so that a run can move to another slice or be given less memory.  An evaluation may be
given more samples besides.  Everything else could change the numbers of the steps to come, and is refused, unless the
run has not taken its first step yet.

The folder is on a file system: local, NFS or a mounted bucket, shared by all processes of a multi-host run.  Bucket
URLs are refused, because `metrics.jsonl` needs append and rename.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import fnmatch
import json
import os
import pathlib
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from exprl_jax.files import write_atomically
from exprl_jax.resolve import differences

# Keys of the resolved config that may differ when a run resumes; `*` stands for any name.
NEUTRAL_KEYS = (
    # How long the run is, and what is kept and said of it.
    "steps",
    "checkpoint.*",
    "evaluate.every",
    "log.*",
    "probe.*",
    "watch.*",
    "validation.every",
    "label",
    # Where it is computed, and in how large parts.
    "mesh.*",
    "*.execution.remat",
    "rollout.wave",
    "rollout.slots",
    "rollout.expected_tokens",
    "sampling.wave",
    "*.sampling.wave",
    "wave",
    "validation.wave",
    "updates.microbatch",
    "updates.logp_chunk",
    "microbatch",
    "logp_chunk",
    # Within which limits others answer.
    "grader.seconds",
    "grader.workers",
    "code.seconds",
    "*.endpoint.concurrency",
    "*.endpoint.seconds",
    "*.endpoint.retries",
    "*.endpoint.max_missing",
    "*.workers.*",
)
# What a run writes as it goes, besides checkpoints: once there is any, the run has begun.
RECORDS = ("metrics.jsonl", "samples/*.jsonl", "scores.jsonl", "annotations.jsonl")
_SHOWN_DIFFERENCES = 8
_SHOWN_WITHIN_S = 60.0  # NFS remembers for as long that a file was not there


@dataclasses.dataclass(frozen=True)
class Workdir:
    """The paths of one run.

    Attributes:
      path: the folder itself, absolute.
      resumed: whether it already held this run when it was opened.
    """

    path: pathlib.Path
    resumed: bool

    @property
    def config(self) -> pathlib.Path:
        return self.path / "config.json"

    @property
    def checkpoints(self) -> pathlib.Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> pathlib.Path:
        return self.path / "metrics.jsonl"

    @property
    def rollouts(self) -> pathlib.Path:
        return self.path / "rollouts"

    @property
    def evaluations(self) -> pathlib.Path:
        return self.path / "evaluations"

    @property
    def report(self) -> pathlib.Path:
        return self.path / "report.html"

    @property
    def tensorboard(self) -> pathlib.Path:
        return self.path / "tensorboard"

    @property
    def model(self) -> pathlib.Path:
        return self.path / "model"

    @property
    def export(self) -> pathlib.Path:
        return self.path / "export"

    @property
    def adapter(self) -> pathlib.Path:
        return self.path / "adapter"


@contextlib.contextmanager
def open_workdir(
    path: str | os.PathLike[str],
    resolved_config: Mapping[str, Any],
    *,
    folders: Sequence[str] = ("checkpoints", "rollouts", "tensorboard"),
    needed_bytes: int = 0,
    process: int = 0,
    barrier: Callable[[], None] = lambda: None,
) -> Iterator[Workdir]:
    """Creates a run's folder or re-enters it, and keeps other training processes out while the context is open.

    Process 0 creates, locks and writes, and then passes the barrier, also when it fails; the others pass the barrier
    and only read.

    Args:
      path: the folder; created with its parents if it is not there.
      resolved_config: `config.to_dict` of the run.
      folders: made in it.
      needed_bytes: what the run will keep there in all; what its checkpoints already take up is deducted.
      process: index of this process in a multi-host run.
      barrier: returns once every process has called it.

    Raises:
      ValueError: the folder holds another config's run or something else, is in use by another process, cannot be
        written to, or its disk is too small.
    """
    folder = _folder(path)
    config = json.loads(json.dumps(resolved_config))  # as it will be read back: tuples become lists
    with contextlib.ExitStack() as stack:
        if process == 0:
            try:
                workdir = _enter(folder, config, folders, needed_bytes, stack)
            finally:
                barrier()
        else:
            barrier()
            limit = time.monotonic() + _SHOWN_WITHIN_S
            while not (seen := (folder / "config.json").exists()) and time.monotonic() < limit:
                time.sleep(1)
            if not seen:
                raise ValueError(
                    f"--workdir {folder}: process {process} sees no config.json; pass a folder that all hosts share"
                )
            workdir = Workdir(folder, resumed=True)
            theirs = _read_config(workdir.config)
            _refuse_other_config(folder, theirs, config)
            if different := differences(config, theirs):
                raise ValueError(
                    f"process {process} was started with another config than process 0 (its value != the value there): "
                    f"{_listed(different)}; give every process the same"
                )
        yield workdir


def check_workdir(path: str | os.PathLike[str], resolved_config: Mapping[str, Any]) -> None:
    """Says at once what `open_workdir` would only say after the models are loaded; reads, changes nothing.

    Raises:
      ValueError: the folder holds another config's run or something else, or is no folder.
    """
    folder = _folder(path)
    _refuse_other_content(folder)
    if (folder / "config.json").exists():
        config = json.loads(json.dumps(resolved_config))
        _refuse_other_config(folder, _read_config(folder / "config.json"), config)


def recorded_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The config of the run that a folder holds; empty where it holds none.

    Raises:
      ValueError: there is one, and it cannot be read.
    """
    file = pathlib.Path(path).expanduser().absolute() / "config.json"
    return _read_config(file) if file.exists() else {}


def begun_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """`recorded_config` of a run that has begun, so that it must go on by it; empty where there is none."""
    return recorded_config(path) if has_begun(pathlib.Path(path).expanduser().absolute()) else {}


def _enter(
    folder: pathlib.Path, config: dict[str, Any], folders: Sequence[str], needed_bytes: int, stack: contextlib.ExitStack
) -> Workdir:
    try:
        _refuse_other_content(folder)
        if (folder / "config.json").exists():
            _refuse_other_config(folder, _read_config(folder / "config.json"), config)
        _check_space(folder, needed_bytes)
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(_lock(folder))
        workdir = Workdir(folder, resumed=(folder / "config.json").exists())
        for leftover in folder.glob(".*.writing-*"):  # of an export or a description that was killed
            shutil.rmtree(leftover)
        if workdir.resumed:  # read again: until the lock was held another process could write it
            _refuse_other_config(folder, _read_config(workdir.config), config)
        # Before the folders: without it they are no workdir to another process that looks now.
        if not workdir.resumed or _read_config(workdir.config) != config:
            write_atomically(workdir.config, json.dumps(config, indent=2) + "\n")
        for name in folders:
            (folder / name).mkdir(exist_ok=True)
    except OSError as error:
        raise ValueError(f"--workdir {folder}: cannot write there ({error.strerror}); choose another") from error
    return workdir


def _folder(path: str | os.PathLike[str]) -> pathlib.Path:
    if "://" in str(path):
        raise ValueError(f"--workdir {path}: expected a folder, got a URL; mount the bucket and pass the mount's path")
    return pathlib.Path(path).expanduser().absolute()


def _refuse_other_content(folder: pathlib.Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--workdir {folder}: expected a folder, got a file; choose another --workdir")
    # A kill during the first start leaves the lock and a part of the config, which is still an empty workdir.
    strange = sorted(set(_names(folder)) - {"lock", "config.json.tmp"})
    if strange and "config.json" not in strange:
        raise ValueError(
            f"--workdir {folder}: not empty and not a workdir (it holds {strange[0]} but no config.json); "
            "choose another --workdir"
        )


def _names(folder: pathlib.Path) -> list[str]:
    return os.listdir(folder) if folder.exists() else []


def _read_config(path: pathlib.Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); choose another --workdir") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(config).__name__}; choose another --workdir")
    return config


def _refuse_other_config(folder: pathlib.Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    steps = _steps_taken(folder)
    # 0 stands for as many as the epochs of a supervised run have.
    if ours.get("steps") and ours["steps"] < steps:
        raise ValueError(
            f"--workdir {folder}: its run has taken {steps} steps, expected config.steps of at least that, got "
            f"{ours['steps']}"
        )
    different = [line for line in differences(ours, theirs) if not _may_change(line.partition(":")[0], ours, theirs)]
    if different and has_begun(folder):
        raise ValueError(
            f"--workdir {folder} holds a run of another config (this start's value != the value there): "
            f"{_listed(different)}; choose another --workdir"
        )


def has_begun(folder: pathlib.Path) -> bool:
    """Whether the run of a folder has taken a step, or written a record of one."""
    return _steps_taken(folder) > 0 or any(file.stat().st_size for name in RECORDS for file in folder.glob(name))


def _listed(lines: Sequence[str]) -> str:
    more = f" and {len(lines) - _SHOWN_DIFFERENCES} more" if len(lines) > _SHOWN_DIFFERENCES else ""
    return "; ".join(lines[:_SHOWN_DIFFERENCES]) + more


def _may_change(key: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Whether no number depends on a key; a rate that goes to 0 at the last step depends on how many there are."""
    if key == "steps" and "optimizer" in ours:
        rate = ours["optimizer"]
        return rate["schedule"] == "constant" and rate["warmup"] == 0
    if key == "sampling.samples":  # an evaluation may be given more: each sample is the same however many there are
        return ours["sampling"]["samples"] > theirs["sampling"]["samples"]
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in NEUTRAL_KEYS)


def _steps_taken(folder: pathlib.Path) -> int:
    """Of the newest checkpoint, readable or not."""
    return max((int(name) for name in _names(folder / "checkpoints") if name.isdecimal()), default=0)


def _check_space(folder: pathlib.Path, needed_bytes: int) -> None:
    standing = folder
    while not standing.exists():
        standing = standing.parent
    kept = (folder / "checkpoints", folder / "export")
    kept_bytes = sum(file.stat().st_size for part in kept for file in part.rglob("*") if file.is_file())
    free = shutil.disk_usage(standing).free
    if free + kept_bytes < needed_bytes:
        raise ValueError(
            f"--workdir {folder}: the run needs {needed_bytes / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free; "
            "free some, keep fewer checkpoints (checkpoint.keep) or choose another --workdir"
        )


@contextlib.contextmanager
def _lock(folder: pathlib.Path) -> Iterator[None]:
    # A POSIX record lock, not flock: it belongs to the process, so a forked grader that outlives a killed trainer does
    # not keep the workdir locked.  The kernel drops it however the process ends.
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            holder = os.read(descriptor, 200).decode("utf-8", "replace").strip() or "another process"
            raise ValueError(
                f"--workdir {folder} is in use by {holder}; wait for it, end it, or choose another --workdir"
            ) from error
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        os.close(descriptor)
