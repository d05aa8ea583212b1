"""Checkpoints: saved in the background, read back only if every byte is what was written.

    checkpoints/N/state, position, config    written by Orbax: into a temporary folder, then renamed
    checkpoints/N/manifest.json              size and CRC-32 of every file above
    checkpoints/N.corrupt/                   set aside by a restore (N.corrupt1, … if N is damaged again); never deleted

Orbax notices a truncated or missing array file, but restores a flipped byte in one without a word (its array chunks
carry no checksum), hence the manifest.  It is written right after Orbax's rename.  A checkpoint of a run that was
killed between the two has none: it is complete, and is read with Orbax's own checks alone, which is logged.  Whether a
folder N is the checkpoint of step N is told by the position in it, so that a renamed copy is not taken for another.

What a restore does, newest first: a checkpoint that is not as it was written is reported in one log line, renamed to
`N.corrupt`, and the one before is tried.  If there never was a checkpoint the run starts from scratch; if there were
and none can be read, that is an error, because a silent restart would overwrite the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging as std_logging
import os
import pathlib
import re
import shutil
import sys
import threading
import types
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from exprl_jax.files import sync_folder, write_atomically
from exprl_jax.run.distributed import meet

MANIFEST = "manifest.json"
_BLOCK = 1 << 22
_SAVE_LIMIT_S = 3600.0


class Restored(NamedTuple):
    """What a checkpoint holds.

    Attributes:
      state: a pytree like the `TrainState` that was saved, placed as asked.
      position: where the data stood, as it was passed to `save`.
      step: RL steps taken.
    """

    state: Any
    position: dict[str, Any]
    step: int


class Checkpoints:
    """The checkpoints of one run; a context that ends when the last save is on disk.

    Every process of a multi-host run makes the same calls; process 0 alone checks, renames and removes.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int, config: Mapping[str, Any]):
        """Opens a folder, removing what a kill in the middle of a save has left.

        Args:
          folder: where checkpoints lie; must exist and be shared by all processes.
          keep: newest checkpoints kept; one more is on disk while a save is under way.
          config: the resolved config, saved with every checkpoint.
        """
        self._folder = pathlib.Path(folder).absolute()
        self._config = dict(config)
        self._first_process = jax.process_index() == 0
        if self._first_process:
            _remove_unfinished(self._folder)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("unfinished checkpoints removed")
        self._best: int | None = None
        policies = checkpoint_managers.preservation_policy
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), _Preserve(lambda: self._best)]),
            create=False,
            async_options=ocp.AsyncOptions(barrier_sync_fn=_meet_unless_failed),
        )
        self._manager = self._open()
        self._recording: threading.Thread | None = None
        self._saving: int | None = None
        self._failure: BaseException | None = None
        self._given_up = False

    def _open(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self._folder,
            options=self._options,
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "position": ocp.JsonCheckpointHandler(),
                "config": ocp.JsonCheckpointHandler(),
            },
        )

    def __enter__(self) -> Checkpoints:
        logging.get_absl_logger().addFilter(_raised_anyway)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        try:
            self.wait()
        except ValueError as failure:
            if error is None:
                raise
            logging.error("%s", failure)  # the error that ends the run is not hidden by this one
        finally:
            if not self._given_up:
                self._manager.close()
            logging.get_absl_logger().removeFilter(_raised_anyway)

    def latest(self) -> int | None:
        """The newest step saved or being saved, readable or not; None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, position: Mapping[str, Any], best: int | None = None) -> None:
        """Starts saving, and returns once the state's buffers may be donated.

        They have been copied by then, or (on CPU) are referenced, in which case JAX answers a donation with a copy.  A
        save still under way is waited for first.

        Args:
          step: RL steps taken; must be later than every step saved.
          state: a pytree of arrays, a `TrainState`.
          position: where the data stands; JSON.
          best: a step, this one or one before, whose checkpoint is kept besides the newest.

        Raises:
          ValueError: this save or the one before could not be written, for instance because the disk is full.
        """
        self.wait()
        last = self.latest()
        if last is not None and step <= last:
            raise ValueError(f"checkpoint of step {step}: expected a step after {last}, the newest in {self._folder}")
        self._saving, self._best = step, best
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            position=ocp.args.JsonSave(dict(position)),
            config=ocp.args.JsonSave(self._config),
        )
        try:
            self._manager.save(step, args=args, force=True)
        except Exception as error:
            self._failure = error
            self.wait()
        self._recording = threading.Thread(
            target=self._record, args=(step,), name=f"record checkpoint {step}", daemon=True
        )
        self._recording.start()

    def wait(self) -> None:
        """Blocks until nothing is being saved.

        Raises:
          ValueError: the save could not be written; the checkpoints before it still stand.
        """
        if self._recording is not None:
            self._recording.join(_SAVE_LIMIT_S)
            if self._recording.is_alive():  # a file system that answers nothing: the thread dies with the process
                self._given_up = True
                raise ValueError(
                    f"checkpoint of step {self._saving} is not in {self._folder} after {_SAVE_LIMIT_S / 60:.0f} "
                    "minutes; look at its file system, and start again: the checkpoints before it stand"
                )
            self._recording = None
        if self._failure is not None:
            error, self._failure = self._failure, None
            # Closing and opening wait for all processes, of which the others do not know of this.  Their saves wait for
            # ours before the checkpoint counts, so it does not; what is left of it goes at the next start.
            self._given_up = jax.process_count() > 1
            if not self._given_up:
                with contextlib.suppress(type(error)):  # a manager whose save failed raises that again for ever
                    self._manager.close()
                _remove_unfinished(self._folder)
                self._manager = self._open()
            raise ValueError(
                f"checkpoint of step {self._saving} could not be written to {self._folder}: {_one_line(error)}; "
                "free some disk space and start again: the checkpoints before it stand"
            ) from error

    def restore(self, abstract_state: Any) -> Restored | None:
        """The newest checkpoint that is as it was written; None if this run never had one.

        Args:
          abstract_state: `jax.ShapeDtypeStruct`s with the shardings to restore to; any mesh will do.

        Raises:
          ValueError: there are checkpoints but none can be read, or an intact one has other shapes than asked for.
        """
        self.wait()
        while (chosen := self._choose()) is not None:
            step, recorded = chosen
            args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), position=ocp.args.JsonRestore())
            try:
                items = self._manager.restore(step, args=args)
                return Restored(items["state"], items["position"], step)
            except Exception as error:
                # Bytes known to be right do not become wrong by setting them aside; and in a multi-host run one
                # process that fails alone cannot decide for the others.
                if recorded or jax.process_count() > 1:
                    raise ValueError(
                        f"checkpoint of step {step} in {self._folder} does not restore into this run's state: "
                        f"{_one_line(error)}; choose another --workdir"
                    ) from error
                self._set_aside(step, _one_line(error))
                self._manager.reload()
        if self._agree(bool(list(self._folder.glob("*.corrupt*")))):
            raise ValueError(
                f"none of the checkpoints in {self._folder} can be read (they are set aside there as *.corrupt); "
                "choose another --workdir, or delete that folder's content to start this run over"
            )
        return None

    def _choose(self) -> tuple[int, bool] | None:
        """The newest step whose files are as recorded (or not recorded), and whether they are recorded."""
        choice = (-1, 0)
        if self._first_process:
            for step in sorted(_steps(self._folder), reverse=True):
                reason = _damage(self._folder / str(step))
                if reason is None:
                    recorded = (self._folder / str(step) / MANIFEST).exists()
                    if not recorded:
                        logging.warning("checkpoint of step %d has no %s: its bytes are not checked", step, MANIFEST)
                    choice = (step, int(recorded))
                    break
                self._set_aside(step, reason)
        step, recorded = map(int, self._agree(np.asarray(choice, np.int32)))
        self._manager.reload()
        return (step, bool(recorded)) if step >= 0 else None

    def _set_aside(self, step: int, reason: str) -> None:
        logging.warning("checkpoint of step %d is damaged (%s): set aside as %d.corrupt", step, reason, step)
        earlier = len(list(self._folder.glob(f"{step}.corrupt*")))
        os.rename(self._folder / str(step), self._folder / f"{step}.corrupt{earlier or ''}")
        sync_folder(self._folder)

    def _record(self, step: int) -> None:
        try:
            self._manager.wait_until_finished()
            if self._first_process:
                files = _fingerprints(self._folder / str(step))
                write_atomically(self._folder / str(step) / MANIFEST, json.dumps(files, indent=0, sort_keys=True))
        except Exception as error:
            self._failure = error  # raised by the next `wait`

    def _agree(self, value: Any) -> Any:
        return multihost_utils.broadcast_one_to_all(value) if jax.process_count() > 1 else value


@dataclasses.dataclass(frozen=True)
class _Preserve(checkpoint_managers.PreservationPolicy):
    """Keeps the checkpoint of one step.

    Attributes:
      step: says which, at the time of asking.
    """

    step: Callable[[], int | None]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        return [checkpoint.step == self.step() for checkpoint in checkpoints]


def newest_step(folder: pathlib.Path) -> int | None:
    """The newest complete checkpoint in a folder of checkpoints; None if there is none."""
    return max(_steps(folder), default=None) if folder.is_dir() else None


def restore_params(checkpoint: pathlib.Path, abstract_params: Any) -> Any:
    """The parameters of one checkpoint and nothing else of its state: what another run starts from.

    Args:
      checkpoint: `checkpoints/N` of a workdir.
      abstract_params: `jax.ShapeDtypeStruct`s with the shardings to restore to.

    Every process must call this; the first reads the files an extra time, to check them.

    Raises:
      ValueError: its files are not as they were written, or hold other parameters.
    """
    reason = _damage(checkpoint) if jax.process_index() == 0 else None
    if reason is not None:
        raise ValueError(f"checkpoint {checkpoint} is damaged ({reason}); name another one of its run")
    wanted = {"params": abstract_params}
    args = ocp.args.PyTreeRestore(
        item=wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
    )
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            return checkpointer.restore(checkpoint / "state", args=args)["params"]
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(f"checkpoint {checkpoint} does not hold such parameters: {_one_line(error)}") from error


def _steps(folder: pathlib.Path) -> list[int]:
    """Those of the folders that a save has named; `09` and digits of other scripts are somebody else's."""
    return [int(entry.name) for entry in folder.iterdir() if re.fullmatch("0|[1-9][0-9]*", entry.name)]


def _remove_unfinished(folder: pathlib.Path) -> None:
    for entry in folder.iterdir():
        if re.search(r"\.orbax-checkpoint-tmp", entry.name):
            logging.warning("removing %s: a save that did not finish", entry)
            shutil.rmtree(entry)


def _fingerprints(folder: pathlib.Path) -> dict[str, list[int]]:
    """[bytes, CRC-32] of every file; zlib's CRC runs outside the interpreter lock."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / MANIFEST and not path.name.endswith(".tmp"):
            crc = 0
            with open(path, "rb") as file:
                while block := file.read(_BLOCK):
                    crc = zlib.crc32(block, crc)
            files[path.relative_to(folder).as_posix()] = [path.stat().st_size, crc]
    return files


def _damage(folder: pathlib.Path) -> str | None:
    """What is wrong with the checkpoint in a folder, in words; None if nothing is."""
    return _difference(folder) or _misplaced(folder)


def _misplaced(folder: pathlib.Path) -> str | None:
    """Whether a folder N holds the checkpoint of another step."""
    try:
        position = json.loads((folder / "position" / "metadata").read_text(encoding="utf-8"))
        step = position["next_batch"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        return f"its position is not what was written: {_one_line(error)}"
    return None if step == int(folder.name) else f"it is the checkpoint of step {step}"


def _difference(folder: pathlib.Path) -> str | None:
    """What is not as recorded, in words; None if all is or nothing was recorded."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
        expected = {name: [int(size), int(crc)] for name, (size, crc) in recorded.items()}
    except (IsADirectoryError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        return f"{MANIFEST} is not what was written: {_one_line(error)}"
    files = _fingerprints(folder)
    for name in sorted({*expected, *files}):
        if name not in files:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} was not part of it"
        if files[name][0] != expected[name][0]:
            return f"{name} has {files[name][0]} bytes, expected {expected[name][0]}"
        if files[name] != expected[name]:
            return f"{name} has the right size but other content"
    return None


def _meet_unless_failed(*, key: str, timeout_ms: int) -> None:
    """Orbax's barrier between processes.

    When a process could not write its part, Orbax first goes to one more barrier (in a `finally`), where the others do
    not come, for they wait at an earlier one: for 20 minutes nobody would hear of the failure.
    """
    if (failure := sys.exc_info()[1]) is not None:
        raise failure
    meet(key, timeout_ms)


def _raised_anyway(record: std_logging.LogRecord) -> bool:
    """Drops the traceback that every Orbax thread logs for an error which reaches us as an exception as well."""
    return not (record.levelno == std_logging.ERROR and "orbax" in pathlib.Path(record.pathname).parts)


def _one_line(error: BaseException) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else f"{text[:100]} … {text[-180:]}"  # TensorStore's reason comes last
