"""Ending a run from outside: SIGTERM and the first Ctrl-C let the step finish and save; a second Ctrl-C interrupts."""

from __future__ import annotations

import signal
import sys
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


class StopRequest:
    """Whether any process of the run was asked to stop; a context in which the signals mean that."""

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        """Every process must enter at the same point."""
        _any_process(False)  # compiled now, so that no later step is the first to ask
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self) -> bool:
        """True on every process once it was asked of one; every process must call this at the same point."""
        return _any_process(self._asked)

    def _ask(self, number: int, _: object) -> None:
        if number == signal.SIGINT and self._asked:
            raise KeyboardInterrupt
        self._asked = True
        print(
            "stopping after what is under way, which is kept (Ctrl-C again to stop at once)",
            file=sys.stderr,
            flush=True,
        )


def _any_process(here: bool) -> bool:
    return here if jax.process_count() == 1 else bool(np.any(multihost_utils.process_allgather(np.bool_(here))))
