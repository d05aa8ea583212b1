"""Where rows of metrics go besides metrics.jsonl: TensorBoard's event files, and trackers whose packages are installed.

All get the same keys at the same steps, without those that are null.  TensorBoard's events are made again from
metrics.jsonl whenever a run resumes.  Weights & Biases and Trackio keep their own records: `trackers.json` holds under
which name they know the run, and the last step that each was sent, so that a resumed run goes on in the same curve and
sends no step twice.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import pathlib
import queue
import secrets
import shutil
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from exprl_jax.files import write_atomically
from exprl_jax.run.workdir import Workdir

Row = Mapping[str, Any]

_LIMIT_S = 60.0  # for the rows that are left at the end: many times what TensorFlow takes to load
_PROJECT = "exprl_jax"


def check_trackers(names: Sequence[str]) -> None:
    """Refuses trackers whose packages are not installed, before anything is loaded.

    Raises:
      ValueError: names the package, and what installs it.
    """
    for name in names:
        if name != "tensorboard" and importlib.util.find_spec(name) is None:
            raise ValueError(
                f"config.log.to: {name!r} needs a package that is not installed; run: python -m pip install {name}"
            )


class Trackers:
    """Sends rows to the trackers that a config names, in a thread of each tracker's own; process 0 alone has one.

    A tracker that fails is told of when the run ends: a run does not depend on its plots.
    """

    def __init__(self, names: Sequence[str], workdir: Workdir, rows: Sequence[Row]):
        """Starts them.

        Args:
          rows: of an earlier start; those that a tracker has not been sent are sent to it.

        Raises:
          ValueError: a tracker cannot start, for instance for want of a login.
        """
        self._feeds = {}
        for name in names:
            if name == "tensorboard":
                shutil.rmtree(workdir.tensorboard, ignore_errors=True)
                workdir.tensorboard.mkdir()
                tracker = _TensorBoard(workdir.tensorboard)
            else:
                tracker = {"wandb": _start_wandb, "trackio": _start_trackio}[name](workdir)
            self._feeds[name] = _Feed(name, tracker, rows)

    def put(self, row: Row) -> None:
        """A step's row, `step` among its keys."""
        for feed in self._feeds.values():
            feed.put(row)

    def close(self) -> dict[str, Exception]:
        """Waits until everything is sent; what prevented that, by tracker."""
        failures = {name: feed.close() for name, feed in self._feeds.items()}
        return {name: failure for name, failure in failures.items() if failure is not None}


class _Feed:
    """Rows on their way to one tracker.

    The earlier ones are written after the first new one has come: CLU's writer imports TensorFlow, which is five
    seconds of Python, and until then Python is busy with tracing the programs of the first step, and runs one thread at
    a time.
    """

    def __init__(self, name: str, tracker: Any, earlier: Sequence[Row]):
        """Args: tracker: has `write(row)` and `close()`."""
        self._tracker, self._earlier = tracker, earlier
        self._queue: queue.SimpleQueue[Row | None] = queue.SimpleQueue()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, row: Row) -> None:
        self._queue.put(row)

    def close(self) -> Exception | None:
        """Waits until everything is written; returns what prevented that."""
        self._queue.put(None)
        self._thread.join(_LIMIT_S)
        if self._thread.is_alive():
            return TimeoutError(f"rows were not written {_LIMIT_S:.0f} s after the end")
        return self._failure

    def _run(self) -> None:
        try:
            row = self._queue.get()
            for earlier in self._earlier:
                self._tracker.write(earlier)
            while row is not None:
                self._tracker.write(row)
                row = self._queue.get()
            self._tracker.close()
        except Exception as error:
            self._failure = error


def _values(row: Row) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "step" and value is not None}


class _TensorBoard:
    """TensorBoard's event files, written by CLU, which is opened for the first row."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder

    @functools.cached_property
    def _writer(self) -> Any:
        return _open_event_writer(self._folder)

    def write(self, row: Row) -> None:
        self._writer.write_scalars(row["step"], _values(row))
        self._writer.flush()

    def close(self) -> None:
        if "_writer" in vars(self):
            self._writer.close()


def _open_event_writer(folder: pathlib.Path) -> Any:
    # TensorFlow greets on stderr unless told not to before its import.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    import tensorflow as tf
    from clu import metric_writers

    tf.config.set_visible_devices([], "GPU")  # a TensorFlow with GPU support would take the memory that JAX needs
    return metric_writers.SummaryWriter(str(folder))


class _Logged:
    """A tracker that keeps its own records: `log` of each step that it has not been sent, and then `finish`."""

    def __init__(self, name: str, run: Any, record: _Record):
        self._name, self._run, self._record = name, run, record

    def write(self, row: Row) -> None:
        if row["step"] > self._record.last(self._name):
            self._run.log(_values(row), step=row["step"])
            self._record.sent(self._name, row["step"])

    def close(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self._run.finish()


class _Record:
    """`trackers.json`: the name under which trackers know the run, and the last step that each was sent."""

    def __init__(self, workdir: Workdir):
        self._path = workdir.path / "trackers.json"
        if not self._path.exists():
            self._write({"id": secrets.token_hex(4), "steps": {}})

    @property
    def id(self) -> str:
        return self._read()["id"]

    def last(self, name: str) -> int:
        return self._read()["steps"].get(name, -1)

    def sent(self, name: str, step: int) -> None:
        with _RECORD_LOCK:
            kept = self._read()
            self._write(kept | {"steps": kept["steps"] | {name: step}})

    def _read(self) -> dict[str, Any]:
        return json.loads(self._path.read_text(encoding="utf-8"))

    def _write(self, kept: Mapping[str, Any]) -> None:
        write_atomically(self._path, json.dumps(kept) + "\n")


_RECORD_LOCK = threading.Lock()  # each tracker writes from its own thread


def _start_wandb(workdir: Workdir) -> _Logged:
    import wandb

    record = _Record(workdir)
    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            id=record.id,
            name=workdir.path.name,
            resume="allow",
            dir=workdir.path,
            config=_config(workdir),
            settings=wandb.Settings(console="off"),
        )
    except wandb.Error as error:
        raise ValueError(
            f"config.log.to: wandb cannot start: {error}; log in with `wandb login`, or set WANDB_MODE=offline"
        ) from error
    return _Logged("wandb", run, record)


def _start_trackio(workdir: Workdir) -> _Logged:
    import trackio

    record = _Record(workdir)
    with contextlib.redirect_stdout(sys.stderr):
        run = trackio.init(
            project=_PROJECT,
            name=f"{workdir.path.name}-{record.id}",
            resume="allow",
            config=_config(workdir),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
    return _Logged("trackio", run, record)


def _config(workdir: Workdir) -> dict[str, Any]:
    return json.loads(workdir.config.read_text(encoding="utf-8"))
