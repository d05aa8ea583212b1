"""The run's record: rows, events, rollouts, times; what a kill leaves of them."""

import io
import json
import math
import os
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from exprl_jax.run import clock as clock_room
from exprl_jax.run import trackers as trackers_room
from exprl_jax.run.clock import Clock, CompileLedger, Progress
from exprl_jax.run.metrics import Metrics, read_metrics, truncate_after, write_rollouts
from exprl_jax.run.workdir import Workdir, open_workdir


@pytest.fixture
def workdir(tmp_path):
    with open_workdir(tmp_path / "run", {"seed": 0}) as opened:
        yield opened


def events_of(workdir: Workdir) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    rows_read = EventAccumulator(str(workdir.tensorboard))
    rows_read.Reload()
    return {
        tag: [(e.step, float(make_ndarray(e.tensor_proto))) for e in rows_read.Tensors(tag)]
        for tag in rows_read.Tags()["tensors"]
    }


def test_rows_reach_the_file_and_tensorboard_and_events_are_rebuilt_on_resume(workdir):
    with Metrics(workdir, ("tensorboard",)) as metrics:
        metrics.write(1, {"reward/mean": jnp.float32(0.5), "judge/auc": None, "rollout/count": np.int64(8)})
        # on disk at once, whatever TensorFlow is doing
        assert read_metrics(workdir.metrics) == [{"step": 1, "reward/mean": 0.5, "judge/auc": None, "rollout/count": 8}]
        metrics.write(2, {"reward/mean": 0.75, "judge/auc": 0.9, "rollout/count": 8})
        metrics.write(3, {"reward/mean": 0.25, "judge/auc": None, "rollout/count": 8})
    assert events_of(workdir) == {
        "reward/mean": [(1, 0.5), (2, 0.75), (3, 0.25)],
        "judge/auc": [(2, pytest.approx(0.9))],
        "rollout/count": [(1, 8.0), (2, 8.0), (3, 8.0)],
    }
    truncate_after(workdir, 1)
    with Metrics(workdir, ("tensorboard",)) as metrics:
        metrics.write(2, {"reward/mean": 0.125})
    assert events_of(workdir)["reward/mean"] == [(1, 0.5), (2, 0.125)]


# In a process of its own, without a filter for warnings: what a user sees.
QUIET = """
import sys
from exprl_jax.run.metrics import Metrics
from exprl_jax.run.workdir import open_workdir
with open_workdir(sys.argv[1], {}) as workdir:
    with Metrics(workdir, ("tensorboard",)) as metrics:
        metrics.write(1, {"a": 1.0})
"""


def test_tensorflow_is_not_heard_on_stderr(tmp_path):
    done = subprocess.run([sys.executable, "-c", QUIET, str(tmp_path)], capture_output=True, text=True, timeout=180)
    assert (done.returncode, done.stderr) == (0, "")


def test_opening_does_not_wait_for_the_event_writer(workdir, monkeypatch):
    may_open, open_writer = threading.Event(), trackers_room._open_event_writer
    monkeypatch.setattr(trackers_room, "_open_event_writer", lambda folder: may_open.wait(60) and open_writer(folder))
    with Metrics(workdir, ("tensorboard",)) as metrics:
        metrics.write(1, {"a": 1.0})
        assert not list(workdir.tensorboard.iterdir())
        may_open.set()
    assert events_of(workdir) == {"a": [(1, 1.0)]}


def test_tensorflow_is_not_loaded_before_the_first_new_row(workdir, monkeypatch):
    """Until then Python traces the first step's programs, and would have to share its time."""
    opened = threading.Event()
    open_writer = trackers_room._open_event_writer
    monkeypatch.setattr(trackers_room, "_open_event_writer", lambda folder: opened.set() or open_writer(folder))
    for resumed in (False, True):
        opened.clear()
        with Metrics(workdir, ("tensorboard",)) as metrics:
            assert not opened.wait(0.2)
            metrics.write(2 if resumed else 1, {"a": 1.0})
            assert opened.wait(60)
    assert events_of(workdir) == {"a": [(1, 1.0), (2, 1.0)]}


def test_the_events_of_a_finished_run_are_made_again_and_of_none_there_are_none(workdir):
    with Metrics(workdir, ("tensorboard",)) as metrics:
        pass
    assert not list(workdir.tensorboard.iterdir())
    with Metrics(workdir, ("tensorboard",)) as metrics:
        metrics.write(1, {"a": 1.0})
    with Metrics(workdir, ("tensorboard",)):
        pass
    assert events_of(workdir) == {"a": [(1, 1.0)]}


def test_an_event_writer_that_hangs_is_told_and_does_not_hold_up_the_end(workdir, monkeypatch, caplog):
    never = threading.Event()
    monkeypatch.setattr(trackers_room, "_LIMIT_S", 0.2)
    monkeypatch.setattr(trackers_room, "_open_event_writer", lambda folder: never.wait(60))
    with Metrics(workdir, ("tensorboard",)) as metrics:
        metrics.write(1, {"a": 1.0})
    assert "tensorboard lacks rows of" in caplog.text and "rows were not written 0 s after the end" in caplog.text
    never.set()


def test_a_failure_of_the_event_writer_is_told_and_does_not_end_the_run(workdir, monkeypatch, caplog):
    def broken(folder):
        raise ImportError("no TensorFlow")

    monkeypatch.setattr(trackers_room, "_open_event_writer", broken)
    with Metrics(workdir, ("tensorboard",)) as metrics:
        metrics.write(1, {"a": 1.0})
    assert "metrics.jsonl: no TensorFlow" in caplog.text
    assert read_metrics(workdir.metrics) == [{"step": 1, "a": 1.0}]


def test_a_full_disk_is_one_line(workdir):
    with Metrics(workdir, ("tensorboard",)) as metrics:
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, metrics._file)
        os.close(full)
        with pytest.raises(ValueError, match=r"^metrics of step 1 could not be written .*No space left on device"):
            metrics.write(1, {"a": 1.0})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_not_finite_stops_the_run_and_is_named(workdir, bad):
    with Metrics(workdir, ("tensorboard",)) as metrics:
        with pytest.raises(FloatingPointError, match=r"^step 7: loss/kl = (nan|-?inf); "):
            metrics.write(7, {"reward/mean": 1.0, "loss/kl": jnp.float32(bad)})
    assert read_metrics(workdir.metrics) == []


def test_steps_go_forward(workdir):
    with Metrics(workdir, ("tensorboard",)) as metrics:
        metrics.write(2, {})
        with pytest.raises(ValueError, match="expected a step after 2"):
            metrics.write(2, {})
    with Metrics(workdir, ("tensorboard",)) as metrics, pytest.raises(ValueError, match="expected a step after 2"):
        metrics.write(1, {})


@pytest.mark.parametrize("torn", [b"", b'{"st', b'{"step": 5, "a": 1.0}', b"\xff\xfe"])
@pytest.mark.parametrize("resume", [0, 2, 4, 9])
def test_a_resume_keeps_rows_and_rollouts_up_to_its_checkpoint(workdir, resume, torn):
    with Metrics(workdir, ("tensorboard",)) as metrics:
        for step in range(1, 5):
            metrics.write(step, {"a": step / 3})
            write_rollouts(workdir, step, [{"response": "é\n"}])
    whole = workdir.metrics.read_bytes().splitlines(keepends=True)
    with open(workdir.metrics, "ab") as file:
        file.write(torn)
    (workdir.rollouts / "step_000001.jsonl.tmp").write_text("half")
    (workdir.rollouts / "notes.txt").write_text("mine")
    if torn:
        with pytest.raises(ValueError, match="torn"):
            Metrics(workdir, ("tensorboard",))
    truncate_after(workdir, resume)
    assert workdir.metrics.read_bytes() == b"".join(whole[:resume])
    kept = [f"step_{step:06d}.jsonl" for step in range(1, min(resume, 4) + 1)]
    assert sorted(p.name for p in workdir.rollouts.iterdir()) == sorted(["notes.txt", *kept])


def test_truncating_a_run_that_has_written_nothing(workdir):
    truncate_after(workdir, 0)
    assert read_metrics(workdir.metrics) == []


@pytest.mark.parametrize("line", ["garbage", "[1]", '{"a": 1}', '{"step": 1}'])
def test_a_damaged_row_that_no_kill_explains_is_named(workdir, line):
    workdir.metrics.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: expected a row of metrics"):
        read_metrics(workdir.metrics)


def test_rollouts_are_read_back(workdir):
    rows = [{"prompt": "1 + 1 =", "response": "zwei \u2028 ✓", "scores": [0.5, None]}, {"prompt": "x"}]
    path = write_rollouts(workdir, 12, rows)
    assert path.name == "step_000012.jsonl"
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]] == rows


def test_the_clock_adds_up_phases_and_starts_over():
    clock = Clock()
    for _ in range(2):
        with clock.phase("sample"):
            time.sleep(0.02)
    with clock.phase("judge"):
        pass
    row = clock.report({"sample": 100})
    assert set(row) == {
        "time/sample_seconds",
        "time/judge_seconds",
        "time/sample_tokens_per_second",
        "time/step_seconds",
    }
    assert 0.04 <= row["time/sample_seconds"] <= row["time/step_seconds"]
    assert row["time/sample_tokens_per_second"] == pytest.approx(100 / row["time/sample_seconds"])
    assert set(clock.report({})) == {"time/step_seconds"}


def test_the_ledger_counts_each_compilation_once_and_cache_hits_apart(tmp_path):
    def doubled_for_the_ledger(x):
        return x * 2 + 1

    old = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    from jax.experimental.compilation_cache import compilation_cache

    with CompileLedger() as ledger:
        try:
            jax.config.update("jax_compilation_cache_dir", str(tmp_path))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
            compilation_cache.reset_cache()
            program = jax.jit(doubled_for_the_ledger)
            for _ in range(3):
                program(np.ones(3, np.float32))
            assert ledger.compiled["jit(doubled_for_the_ledger)"] == 1, ledger.compiled
            program(np.ones(4, np.float32))
            assert ledger.compiled["jit(doubled_for_the_ledger)"] == 2
            assert ledger.cached["jit(doubled_for_the_ledger)"] == 0
            jax.clear_caches()
            program(np.ones(3, np.float32))
            assert ledger.compiled["jit(doubled_for_the_ledger)"] == 2
            assert ledger.cached["jit(doubled_for_the_ledger)"] == 1
        finally:
            jax.config.update("jax_compilation_cache_dir", old[0])
            jax.config.update("jax_persistent_cache_min_compile_time_secs", old[1])
            compilation_cache.reset_cache()
    row = ledger.report()
    assert row["time/compilations"] == 2 and row["time/compilations_cached"] == 1 and row["time/compile_seconds"] > 0
    jax.jit(lambda x: x - 41)(np.ones(5, np.float32))
    assert ledger.report() == row  # it no longer listens


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_a_line_a_step_in_a_log_and_one_line_on_a_terminal():
    log, terminal = io.StringIO(), _Terminal()
    for stream in (log, terminal):
        with Progress(4, 2, "reward", stream) as progress:
            progress.show(3, 0.12345, 99.6)
            progress.show(4, None, 100.0)
    first, second = log.getvalue().splitlines()
    assert first.startswith("step 3/4  reward 0.123  100 tokens/s  ETA ")
    assert second == "step 4/4  reward –  100 tokens/s  ETA 0:00"
    assert terminal.getvalue().count("\n") == 1 and terminal.getvalue().count("\r") == 2


def test_eta_follows_the_last_steps(monkeypatch):
    now = 0.0
    monkeypatch.setattr(clock_room.time, "monotonic", lambda: now)
    log = io.StringIO()
    progress = Progress(5000, 1000, "reward", log)
    for step in range(1001, 1021):
        now += 100 if step == 1001 else 2  # the first compiles
        progress.show(step, 0.0, 1.0)
    assert log.getvalue().splitlines()[-1].endswith("ETA 2:12:40")
