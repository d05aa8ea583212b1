"""Benchmarks of updates and steps: what they make of figures, and that they run."""

import json
import subprocess
import sys

import pytest
from tiny_runs import ROOT, environment

from benchmarks.step import phases


def test_the_host_has_what_no_device_phase_has():
    """By hand; medians, of the host's seconds too, are over steps."""
    rows = [
        {"time/sample_seconds": 4.0, "time/train_seconds": 2.0, "time/pack_seconds": 0.5, "time/step_seconds": 7.0},
        {"time/sample_seconds": 6.0, "time/train_seconds": 1.0, "time/pack_seconds": 0.5, "time/step_seconds": 10.0},
        {"time/sample_seconds": 5.0, "time/train_seconds": 3.0, "time/pack_seconds": 0.1, "time/step_seconds": 8.5},
    ]
    assert phases(rows) == {"sample": 5.0, "train": 2.0, "pack": 0.5, "host": 1.0, "step": 8.5}
    with pytest.raises(ValueError, match="ask for more steps"):
        phases([])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, options, rows",
    [
        ("train_step", ["--weights=random:llama", "--shapes=users", "--pairs=1"], 1),
        ("scaling", ["--tiny"], 10),
        ("step", ["--config=configs/tiny.py", "--steps=2"], None),
    ],
)
def test_a_benchmark_runs_and_writes_its_figures(name, options, rows, tmp_path):
    """The update's first loss is torch's, or it would not end."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *options, f"--output={tmp_path / 'out.json'}"]
    done = subprocess.run(command, cwd=ROOT, env=environment(1), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["machine"]["jax"]
    if rows:
        assert len(written["rows"]) == rows
    else:
        assert 0 < written["rows"]["train"] < written["rows"]["step"]
