"""What a run says about itself: metrics.jsonl, TensorBoard events, rollout samples, and a line on stderr.

`metrics.jsonl` is the record: one JSON object a step, `{"step": N, "<group>/<name>": number or null, …}`.  null means
*not defined at this step* (a mean over nothing, for instance); there are no sentinel numbers and no NaN, because a
metric that is not finite ends the run.  TensorBoard's events are rebuilt from it whenever a run resumes.

Keys under `time/` hold everything that depends on the clock or on the state of compilation caches.  The rest of a row
is a pure function of seed and config, so that an interrupted run ends with the same rows as an uninterrupted one.  For
that a row is on disk before its step's checkpoint is saved, and a resume at step k first cuts off what is later than k
(`truncate_after`).
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import queue
import re
import shutil
import threading
import types
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import logging

from exprl_jax.files import write_atomically
from exprl_jax.run.workdir import Workdir

Number = int | float | None

_LIMIT_S = 60.0  # for the events that are left at the end: many times what TensorFlow takes to load


class Metrics:
    """Writes rows to metrics.jsonl and to TensorBoard; a context that ends when both are on disk.

    Every process of a multi-host run makes the same calls; process 0 alone writes.
    """

    def __init__(self, workdir: Workdir):
        """Opens a workdir's record, to go on after its last row; `truncate_after` comes before.

        Raises:
          ValueError: a line torn by a kill is still there.
        """
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        rows, torn = _whole_rows(workdir.metrics)
        if torn:
            raise ValueError(f"{workdir.metrics}: its last line is torn; call truncate_after before writing more")
        self._workdir = workdir
        self._last = rows[-1]["step"] if rows else -1
        self._file = os.open(workdir.metrics, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._events = _Events(workdir.tensorboard, rows)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        if self._writes:
            os.close(self._file)
            failure = self._events.close()
            if failure is not None:
                logging.error("TensorBoard events in %s are incomplete: %s", self._workdir.tensorboard, failure)

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """Appends one step's row; it is on disk when this returns.

        Args:
          step: later than every step written.
          row: Python, NumPy or JAX scalars by name; None for what is not defined at this step.

        Raises:
          FloatingPointError: a value is NaN or infinite; the row is not written.
          ValueError: the step is not later than the last, or the row could not be written (disk full).
        """
        numbers = {name: _number(value) for name, value in row.items()}
        check_finite(step, numbers)
        if not self._writes:
            return
        if step <= self._last:
            raise ValueError(f"metrics of step {step}: expected a step after {self._last}, the last written")
        line = {"step": step, **numbers}
        left = (json.dumps(line, allow_nan=False) + "\n").encode()
        try:
            while left:  # a disk that fills up takes a part first
                left = left[os.write(self._file, left) :]
            os.fsync(self._file)
        except OSError as error:
            raise ValueError(
                f"metrics of step {step} could not be written to {self._workdir.metrics} ({error.strerror}); "
                "free some disk space and start again"
            ) from error
        self._last = step
        self._events.put(line)


def check_finite(step: int, row: Mapping[str, Number]) -> None:
    """Ends the run at the first number that is none.

    Raises:
      FloatingPointError: names the step and every metric that is NaN or infinite.
    """
    bad = [f"{name} = {value}" for name, value in row.items() if value is not None and not math.isfinite(value)]
    if bad:
        raise FloatingPointError(f"step {step}: {', '.join(bad)}; the run stops, its earlier checkpoints stand")


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl in order; a last line torn by a kill is left out; no file is no rows.

    Raises:
      ValueError: a line other than the last is not a row, or steps do not increase.
    """
    rows, _ = _whole_rows(pathlib.Path(path))
    return rows


def truncate_after(workdir: Workdir, step: int) -> None:
    """Removes what a run wrote after its last checkpoint: rows and rollouts of later steps, and a torn last line.

    Args:
      step: of the checkpoint that the run resumes from; 0 if there is none.
    """
    if jax.process_index() != 0:
        return
    rows, torn = _whole_rows(workdir.metrics)
    kept = [row for row in rows if row["step"] <= step]
    if torn or len(kept) < len(rows):
        write_atomically(workdir.metrics, "".join(json.dumps(row, allow_nan=False) + "\n" for row in kept))
    for path in workdir.rollouts.glob("step_*"):
        match = re.fullmatch(r"step_(\d+)\.jsonl(\.tmp)?", path.name)
        if match and (int(match[1]) > step or match[2]):
            path.unlink()


def write_rollouts(workdir: Workdir, step: int, rows: Sequence[Mapping[str, Any]]) -> pathlib.Path:
    """Writes a sample of a step's rollouts, one JSON object a row, to `rollouts/step_N.jsonl` (N in six digits)."""
    path = workdir.rollouts / f"step_{step:06d}.jsonl"
    if jax.process_index() == 0:
        write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


class _Events:
    """TensorBoard's event files, written by CLU in a thread of their own.

    CLU's writer imports TensorFlow, which is five seconds of Python.  The thread waits with that for the first new row:
    before it, Python is busy with tracing the programs of the first step, and runs one thread at a time; after it, the
    devices are busy and Python is not.
    """

    def __init__(self, folder: pathlib.Path, rows: Sequence[Mapping[str, Any]]):
        """Starts on an empty folder.

        Args:
          rows: of an earlier start; their events are made again.
        """
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        self._folder = folder
        self._earlier = rows
        self._queue: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="tensorboard events", daemon=True)
        self._thread.start()

    def put(self, row: Mapping[str, Any]) -> None:
        self._queue.put(row)

    def close(self) -> Exception | None:
        """Waits until everything is written; returns what prevented that."""
        self._queue.put(None)
        self._thread.join(_LIMIT_S)
        if self._thread.is_alive():
            return TimeoutError(f"they were not written {_LIMIT_S:.0f} s after the end")
        return self._failure

    def _run(self) -> None:
        try:
            row = self._queue.get()
            if row is None and not self._earlier:
                return
            writer = _open_event_writer(self._folder)
            for earlier in self._earlier:
                _write_scalars(writer, earlier)
            while row is not None:
                _write_scalars(writer, row)
                writer.flush()
                row = self._queue.get()
            writer.close()
        except Exception as error:
            self._failure = error  # told when the run ends: it does not depend on its plots


def _write_scalars(writer: Any, row: Mapping[str, Any]) -> None:
    writer.write_scalars(row["step"], {k: v for k, v in row.items() if k != "step" and v is not None})


def _open_event_writer(folder: pathlib.Path) -> Any:
    # TensorFlow greets on stderr unless told not to before its import.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    import tensorflow as tf
    from clu import metric_writers

    tf.config.set_visible_devices([], "GPU")  # a TensorFlow with GPU support would take the memory that JAX needs
    return metric_writers.SummaryWriter(str(folder))


def _number(value: Any) -> Number:
    if value is None or type(value) in (int, float):
        return value
    return value.item()


def _whole_rows(path: pathlib.Path) -> tuple[list[dict[str, Any]], bool]:
    """The rows, and whether a torn last line follows them."""
    if not path.exists():
        return [], False
    lines = path.read_bytes().split(b"\n")
    torn = lines.pop() != b""  # every whole line ends in a newline
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            step = row["step"]
            if rows and step <= rows[-1]["step"]:
                raise ValueError(f"step {step} follows step {rows[-1]['step']}")
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, line {number}: expected a row of metrics, got {line[:60]!r}: {error}") from error
        rows.append(row)
    return rows, torn
