"""Several processes as one run: how they find one another, and that none is left waiting when another cannot go on.

Every process runs the same program, and most of its steps wait for all of them.  What may end one of them alone:

- An error (a full disk, a fault in a parser).  It is announced through the coordinator, which every process asks once a
  second; the others then end with a line that repeats it, within seconds.
- A kill, a crash, a machine that is gone.  Nobody announces anything: JAX ends the others once the process has not been
  heard of for the heartbeat's seconds, or at once where a connection breaks.
- A stop that was asked of it (SIGTERM, as a preempted host gets): see `stopping`; all stop after the same step.

Processes that do not all come together at the start are ended by JAX too: after five minutes, with status 134 and the
stack of its C++, which no exception goes before.

A run that has ended in one of the first two ways goes on from its newest checkpoint when all are started again.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax
from jax._src.distributed import global_state as _joined  # the key-value store of the processes has no public name
from jax.experimental import multihost_utils

_ENDED = "exprl_jax/ended"
_ASK_EVERY_S = 1.0
_GRACE_S = 3.0  # what is wrong in all processes alike, each says itself


def connect(coordinator: str, processes: int, process: int, heartbeat_s: int) -> None:
    """Joins a run of so many processes; returns once all are there.  JAX ends the process if they do not come.

    Args:
      coordinator: host:port of process 0.
      heartbeat_s: a process that has not been heard of for so many seconds is taken for dead.

    Raises:
      ValueError: there is no such process, or process 0 cannot listen at that port.
    """
    try:
        _initialize(heartbeat_s, coordinator_address=coordinator, num_processes=processes, process_id=process)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"--coordinator {coordinator}: {error}") from error


def connect_detected(heartbeat_s: int) -> None:
    """Joins the run that the environment describes: a Cloud TPU slice, Slurm, Open MPI or whatever else JAX detects.
    JAX ends the process if the others do not come.

    Raises:
      ValueError: it describes none, or process 0 cannot listen at its port.
    """
    try:
        _initialize(heartbeat_s)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"--distributed=auto: JAX finds no Cloud TPU slice, Slurm step or MPI job that it can join here ({error}); "
            "start it by their launcher, or pass --coordinator, --processes and --process"
        ) from error


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """While this is open, an exception that ends one process ends all; and none leaves before all are done.

    Nothing happens where this process was not connected with others.
    """
    if not jax.distributed.is_initialized():
        yield
        return
    leaving = threading.Event()
    listener = threading.Thread(target=_listen, args=(leaving,), name="other processes", daemon=True)
    listener.start()
    try:
        yield
        # Process 0 still writes the export when the others have nothing left to do.
        multihost_utils.sync_global_devices("done")
        leaving.set()
    except BaseException as error:
        leaving.set()
        message = " ".join(f"{error}".split()) or type(error).__name__
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the coordinator itself may be gone
            _joined.client.key_value_set(f"{_ENDED}/{_joined.process_id}", message)
        raise
    finally:
        listener.join()


def meet(key: str, timeout_ms: int) -> None:
    """Returns once every process is here; from any thread, and without a program on the devices.

    Args:
      key: of the place; the same in every process.

    Raises:
      JaxRuntimeError: some process did not come in time.
    """
    if jax.distributed.is_initialized():
        _joined.client.wait_at_barrier(key, timeout_ms)


def _listen(leaving: threading.Event) -> None:
    while not leaving.wait(_ASK_EVERY_S):
        try:
            announced = _joined.client.key_value_dir_get(_ENDED)
        except jax.errors.JaxRuntimeError:
            return  # without a coordinator JAX itself ends the process
        if announced:
            key, message = announced[0]
            if not leaving.wait(_GRACE_S):
                _end(f"ended with process {key.rpartition('/')[2]}: {message}")


def _end(message: str) -> None:
    """Ends the process from a thread, wherever its main thread is waiting."""
    print(f"exprl_jax: {message}", file=sys.stderr, flush=True)
    try:
        jax.distributed.shutdown()  # waits for the others, so that no connection breaks before they have heard
    finally:
        os._exit(1)


def _initialize(heartbeat_s: int, **where: Any) -> None:
    # JAX's own answer to SIGTERM is to take note of it: a process that is still loading could not be ended.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(heartbeat_timeout_seconds=heartbeat_s, shutdown_timeout_seconds=heartbeat_s, **where)
