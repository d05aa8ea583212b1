"""What a step costs: seconds by phase, compilations, and the line on stderr that says how far a run is."""

from __future__ import annotations

import collections
import contextlib
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import TextIO

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"


_FOUND_IN_CACHE = "/jax/compilation_cache/cache_hits"


class Clock:
    """Seconds and tokens by phase of a step.

    Wall-clock of the host: a phase has to end with a result on the host for its seconds to be the device's too.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = collections.defaultdict(float)
        self._start = time.perf_counter()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - start

    def report(self, tokens: Mapping[str, int]) -> dict[str, float]:
        """The phases since the last report, which then start from zero.

        Args:
          tokens: how many tokens a phase has worked on, for the phases that have a rate.

        Returns:
          `time/<phase>_seconds` of each, `time/<phase>_tokens_per_second` of those with tokens, and
          `time/step_seconds`, the time from report to report.
        """
        now = time.perf_counter()
        row = {f"time/{name}_seconds": seconds for name, seconds in self._seconds.items()}
        for name, count in tokens.items():
            row[f"time/{name}_tokens_per_second"] = count / self._seconds[name]
        row["time/step_seconds"] = now - self._start
        self._seconds.clear()
        self._start = now
        return row


class CompileLedger:
    """Counts XLA compilations while its context is open.

    Attributes:
      compiled: times each program was compiled, by its name: `jit(<function>)`.
      cached: times each was found in the persistent compilation cache instead.
      seconds: spent on both.
    """

    def __init__(self) -> None:
        self.compiled: collections.Counter[str] = collections.Counter()
        self.cached: collections.Counter[str] = collections.Counter()
        self.seconds = 0.0
        self._thread = threading.local()
        self._lock = threading.Lock()

    def __enter__(self) -> CompileLedger:
        jax.monitoring.register_event_listener(self._on_event)
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_listener(self._on_event)
        jax.monitoring.unregister_event_duration_listener(self._on_duration)

    def report(self) -> dict[str, float]:
        """`time/compilations`, `time/compilations_cached` and `time/compile_seconds` since the context was entered."""
        with self._lock:
            return {
                "time/compilations": self.compiled.total(),
                "time/compilations_cached": self.cached.total(),
                "time/compile_seconds": self.seconds,
            }

    def _on_event(self, event: str, **_: str | int) -> None:
        if event == _FOUND_IN_CACHE:
            self._thread.found = True  # the duration that this thread reports next includes the look-up

    def _on_duration(self, event: str, seconds: float, **about: str | int) -> None:
        if event == _COMPILED:
            name = str(about.get("fun_name", "?"))
            with self._lock:
                (self.cached if getattr(self._thread, "found", False) else self.compiled)[name] += 1
                self.seconds += seconds
            self._thread.found = False


class Progress:
    """One line on stderr: redrawn in place on a terminal, one a step elsewhere."""

    def __init__(self, total: int, done: int, shows: str, stream: TextIO | None = None):
        """Starts at `done` of `total` steps; ETA is from the mean of the last ten steps.

        Args:
          shows: what the number that it shows is called.
        """
        self._total = total
        self._shows = shows
        self._stream = sys.stderr if stream is None else stream
        self._redraws = self._stream.isatty()
        self._marks = collections.deque([(time.monotonic(), done)], maxlen=11)
        self._open_line = False
        self._note = ""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._open_line:
            print(file=self._stream, flush=True)

    def note(self, text: str) -> None:
        """What every later line ends with, until there is something newer; nothing new where the text is empty."""
        self._note = text or self._note

    def show(self, step: int, value: float | None, tokens_per_second: float) -> None:
        """Says that a step is done; value None means that it is not defined at this step."""
        if jax.process_index() != 0:
            return
        now = time.monotonic()
        then, before = self._marks[0]
        self._marks.append((now, step))
        left = (now - then) / max(step - before, 1) * (self._total - step)
        shown = "–" if value is None else f"{value:.3f}"
        line = (
            f"step {step}/{self._total}  {self._shows} {shown}  {tokens_per_second:.0f} tokens/s  ETA {_duration(left)}"
        )
        line += f"  {self._note}" if self._note else ""
        if self._redraws:
            filled = round(20 * step / self._total)
            line = f"\r\x1b[K[{'█' * filled}{'·' * (20 - filled)}] {line}"
        print(line, end="" if self._redraws else "\n", file=self._stream, flush=True)
        self._open_line = self._redraws


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
