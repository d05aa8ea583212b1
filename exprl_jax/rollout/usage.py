"""How well the decode slots were used, as metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from exprl_jax.records import Usage

METRICS: Mapping[str, str] = {
    "rollout/occupancy": (
        "fraction of the tokens fed to decode slots that belong to a row; the others are padding after a row's end"
    ),
    "rollout/idle": "fraction of the tokens fed to slots of data shards that had no row left while others had",
    "rollout/expected_tokens": (
        "mean length that the step's rollouts were expected to have: that of their problems' last ones, or of the last "
        "eight steps'; null at the first step"
    ),
    "rollout/restarts": "rows that gave their pages back to older rows and began anew later",
    "rollout/pages": (
        "mean fraction of the rows' pages that was in use; null where rows have pages or slots of their own for their "
        "whole budget"
    ),
}
"""Every key of `usage_metrics` and what it is.  They depend on how a step is divided into waves, slots and shards."""


def usage_metrics(calls: Sequence[Usage], expected_P: np.ndarray | None = None) -> dict[str, float | None]:
    """Metrics of a step's sampling calls; null where nothing was sampled.

    Args:
      expected_P: tokens that a rollout of each problem was expected to have; None where nothing was known.
    """
    names = ("steps", "slots", "busy", "idle", "restarts")
    steps, slots, busy, idle, restarts = (
        np.array([getattr(call, name) for call in calls], np.float64) for name in names
    )
    fed, pages = float((steps * slots).sum()), [float(call.pages) for call in calls if call.pages is not None]
    return {
        "rollout/occupancy": float(busy.sum()) / fed if fed else None,
        "rollout/idle": float(idle.sum()) / fed if fed else None,
        "rollout/expected_tokens": None if expected_P is None else float(expected_P.mean()),
        "rollout/restarts": float(restarts.sum()),
        "rollout/pages": sum(pages) / float(steps.sum()) if pages and fed else None,
    }
