"""What a run says about itself: metrics.jsonl, what trackers get of it, and rollout samples.

`metrics.jsonl` is the record: one JSON object a step, `{"step": N, "<group>/<name>": number or null, …}`.  null means
*not defined at this step* (a mean over nothing, for instance); there are no sentinel numbers and no NaN, because a
metric that is not finite ends the run.  TensorBoard's events and other trackers' records (`run.trackers`) are made from
it.

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
import re
import types
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import logging

from exprl_jax.files import write_atomically
from exprl_jax.run.trackers import Trackers
from exprl_jax.run.workdir import Workdir

Number = int | float | None


class Metrics:
    """Writes rows to metrics.jsonl and to trackers; a context that ends when both have them.

    Every process of a multi-host run makes the same calls; process 0 alone writes.
    """

    def __init__(self, workdir: Workdir, trackers: Sequence[str]):
        """Opens a workdir's record, to go on after its last row; `truncate_after` comes before.

        Args:
          trackers: names, of `config.training.TRACKERS`.

        Raises:
          ValueError: a line torn by a kill is still there, or a tracker cannot start.
        """
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        rows, torn = _whole_rows(workdir.metrics)
        if torn:
            raise ValueError(f"{workdir.metrics}: its last line is torn; call truncate_after before writing more")
        self._workdir = workdir
        self._last = rows[-1]["step"] if rows else -1
        self._trackers = Trackers(trackers, workdir, rows)
        self._file = os.open(workdir.metrics, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        if self._writes:
            os.close(self._file)
            for name, failure in self._trackers.close().items():
                logging.error("%s lacks rows of %s: %s", name, self._workdir.metrics, failure)

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
        self._trackers.put(line)


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
    """Removes what a run wrote after its last checkpoint: rows and files of later steps, and a torn last line.

    Args:
      step: of the checkpoint that the run resumes from; 0 if there is none.
    """
    if jax.process_index() != 0:
        return
    rows, torn = _whole_rows(workdir.metrics)
    kept = [row for row in rows if row["step"] <= step]
    if torn or len(kept) < len(rows):
        write_atomically(workdir.metrics, "".join(json.dumps(row, allow_nan=False) + "\n" for row in kept))
    for path in [*workdir.rollouts.glob("step_*"), *workdir.evaluations.glob("step_*")]:
        match = re.fullmatch(r"step_(\d+)\.jsonl(\.tmp)?", path.name)
        if match and (int(match[1]) > step or match[2]):
            path.unlink()


def write_rollouts(workdir: Workdir, step: int, rows: Sequence[Mapping[str, Any]]) -> pathlib.Path:
    """Writes a sample of a step's rollouts, one JSON object a row, to `rollouts/step_N.jsonl` (N in six digits)."""
    return _write_step(workdir.rollouts, step, rows)


def write_evaluation(workdir: Workdir, step: int, rows: Sequence[Mapping[str, Any]]) -> pathlib.Path:
    """Writes an evaluation's problems, one JSON object each, to `evaluations/step_N.jsonl` (N in six digits)."""
    return _write_step(workdir.evaluations, step, rows)


def _write_step(folder: pathlib.Path, step: int, rows: Sequence[Mapping[str, Any]]) -> pathlib.Path:
    path = folder / f"step_{step:06d}.jsonl"
    if jax.process_index() == 0:
        folder.mkdir(exist_ok=True)
        write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


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
