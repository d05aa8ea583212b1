"""A run's report of itself: `report.html` in its workdir, written anew at every checkpoint."""

from __future__ import annotations

from absl import logging

from exprl_jax.evaluation.report_page import read_workdirs, render
from exprl_jax.files import write_atomically
from exprl_jax.run.workdir import Workdir

# What the page may hold, less than one that is asked for: it is written again and again.
_ROLLOUTS, _BYTES = 400, 4_000_000


def keep_report(workdir: Workdir) -> None:
    """Writes the report; one that cannot be written is told of and costs the run nothing.  One process calls it."""
    try:
        contents, _ = read_workdirs([workdir.path], rollouts=_ROLLOUTS, rollout_bytes=_BYTES)
        write_atomically(workdir.report, render(contents))
    except (OSError, ValueError) as error:
        logging.error("%s is not of this step: %s", workdir.report, error)
