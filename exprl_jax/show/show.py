"""`--show=N`: what a run would do with its first N problems, for people to read.  Nothing is trained or written.

config ─ the run's own rooms ─→ records: rollouts, teachers, lessons, fixed ─ page, or JSON ─→ stdout
"""

from __future__ import annotations

import json
import sys
from typing import Any

import jax

from exprl_jax.show.fixed import show_annotations, show_calibration, show_labels
from exprl_jax.show.lessons import show_examples, show_lessons
from exprl_jax.show.page import page_lines
from exprl_jax.show.rollouts import show_samples, show_scored
from exprl_jax.show.teachers import show_distilled
from exprl_jax.show.terminal import paper_of
from exprl_jax.weights.language_model import pin_checkpoints

RECORDS = {
    "rl": show_scored,
    "distill": show_distilled,
    "sft": show_examples,
    "judge": show_lessons,
    "evaluate": show_samples,
    "calibrate": show_calibration,
    "annotate": show_annotations,
    "label": show_labels,
}


def show(config: Any, count: int, as_json: bool) -> None:
    """Prints a page a problem, or, as JSON, a line a problem.

    Raises:
      ValueError: there are not so many problems, or anything that a run refuses.
    """
    if jax.process_count() > 1:
        raise ValueError("--show runs in one process; start it without --coordinator and --distributed")
    stream, config = sys.stdout, pin_checkpoints(config, {})
    for index, record in enumerate(RECORDS[config.task](config, count), 1):
        if as_json:
            print(json.dumps(record, allow_nan=False), flush=True)
            continue
        text = "\n".join(page_lines(record, index, count, paper_of(stream)))
        encoding = stream.encoding or "utf-8"
        print(text.encode(encoding, "replace").decode(encoding), end="\n\n", flush=True)
