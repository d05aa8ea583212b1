"""Where a whole step of training goes: seconds by phase, and the share in which the accelerator waits for the host.

    python -m benchmarks.step --output=runs/step.json
    python -m benchmarks.step --config=configs/smoke.py:process

Runs the config for a few steps in a folder of its own and reads its metrics; the first step, which compiles, is left
out.  Figures are medians over steps.  `host` is what packing and grading kept the step waiting, and what no phase
covers: tables, rollout files, checkpoints, Python between programs.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from benchmarks.common import processor, write_json
from exprl_jax.run.metrics import read_metrics

ROOT = pathlib.Path(__file__).parents[1]
DEVICE, HOST = ("sample", "judge", "logp", "train"), ("pack", "grade")
STEPS = 5


def main() -> None:
    """Prints the table, and writes the JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", help="a JSON file for the figures")
    parser.add_argument("--config", default="configs/smoke.py")
    parser.add_argument("--steps", type=int, default=STEPS)
    asked, changes = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "exprl_jax.main", f"--config={asked.config}", f"--workdir={folder}/run"]
        subprocess.run([*command, f"--config.steps={asked.steps}", *changes], cwd=ROOT, check=True)
        rows = read_metrics(f"{folder}/run/metrics.jsonl")[1:]
    figures = phases(rows)
    machine = {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "config": " ".join([asked.config, *changes]),
        "steps": len(rows),
    }
    print("\n".join(f"{key} {value}" for key, value in machine.items()))
    print("\n| phase | seconds | share |\n|---|---|---|")
    for name, seconds in figures.items():
        print(f"| {name} | {seconds:.2f} | {seconds / figures['step']:.0%} |")
    write_json(asked.output, machine, figures)


def phases(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Median seconds of each phase, of the host and of the step, over rows of metrics.

    Raises:
      ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("no step after the first, which compiles: ask for more steps")

    def seconds(row, name):
        return row.get(f"time/{name}_seconds") or 0.0

    names = [name for name in (*DEVICE, *HOST) if any(seconds(row, name) for row in rows)]
    figures = {name: statistics.median(seconds(row, name) for row in rows) for name in names}
    waits = [seconds(row, "step") - sum(seconds(row, name) for name in DEVICE) for row in rows]
    return figures | {"host": statistics.median(waits), "step": statistics.median(seconds(row, "step") for row in rows)}


if __name__ == "__main__":
    main()
