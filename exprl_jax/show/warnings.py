"""What is off with a problem's rollouts, one line each, with the keys that have a say in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from exprl_jax.config import Config
from exprl_jax.reward.verifiers.verdict import Verdict

Record = Mapping[str, Any]


def rollout_warnings(record: Record, max_tokens: int) -> list[str]:
    """Of rollouts by themselves: cut, empty, or without a verdict."""
    rollouts = record["rollouts"]
    told = []
    if overlong := _those(rollouts, lambda r: not r["ended"]):
        told.append(f"{overlong}: no end within max_tokens = {max_tokens}")
    if empty := _those(rollouts, lambda r: r["ended"] and not r["response"].strip()):
        told.append(f"{empty}: nothing but the end")
    if missing := _those(rollouts, lambda r: r["verdict"] == Verdict.missing):
        told.append(f"{missing}: no verdict; whether they are right is not known")
    if slow := _those(rollouts, lambda r: r["verdict"] == Verdict.timed_out):
        told.append(f"{slow}: the verifier ran into its time limit")
    if unread := _those(rollouts, lambda r: r["verdict"] in (Verdict.no_answer, Verdict.unparsable)):
        told.append(f"{unread}: no answer that the verifier can read")
    return told


def score_warnings(record: Record, config: Config) -> list[str]:
    """Of scores and advantages: not given, all equal, or not cut into segments."""
    rollouts, rule = record["rollouts"], config.advantage
    segments = [segment for rollout in rollouts for segment in rollout["segments"]]
    told = []
    counts = [len(rollout["segments"]) for rollout in rollouts]
    if record["route"] == "process" and max(counts, default=0) <= 1:
        told.append(f"no segments: segments.rule = {config.segments.rule!r} cuts no rollout of this group")
    most = config.segments.max_segments
    if record["route"] == "process" and 1 < most == max(counts, default=0):
        told.append(f"segments.max_segments = {most} is reached: what follows is merged into the last segment")
    unscored = _those(rollouts, lambda r: not r["ended"])
    if unscored and record["judge"] is not None and rule.overlong != "keep" and record["route"] != "verifier":
        told.append(f"{unscored}: not given to the judge, advantage.overlong = {rule.overlong!r}")
    asked = [segment for segment in segments if segment["asked"]]
    lost = [segment for segment in asked if segment["score"] is None]
    if lost:
        cut = sum(segment["cut"] for segment in lost)
        unread = sum(segment["judge"] is not None and not segment["cut"] for segment in lost)
        why = [
            f"{cut} cut at judge.max_tokens = {config.judge.max_tokens} or longer than judge.max_trace_tokens = "
            f"{config.judge.max_trace_tokens}"
        ] * (cut > 0)
        why += [f"{unread} answered without a score that can be read"] * (unread > 0)
        told.append(f"{len(lost)} of {len(asked)} scores were not given" + (f": {'; '.join(why)}" if why else ""))
    scores = [segment["score"] for segment in segments if segment["score"] is not None]
    if len(scores) > 1 and min(scores) == max(scores):
        told.append(f"all scores of the group are equal, {scores[0]:.3g}: nothing to prefer")
    elif scores and not record["live"]:
        told.append(f"no advantage in this group: {_why_dead(record['route'], scores, config)}")
    return told


def _why_dead(route: str, scores: Sequence[float], config: Config) -> str:
    if len(scores) < 2:
        return "it has a single score"
    if route == "process":
        return f"advantage.estimator = {config.advantage.estimator!r} comes to 0 everywhere"
    spread = float(np.std(scores, ddof=1))
    nearly_equal = route == "likelihood" or (route != "verifier" and config.judge.reads_digits)
    key = "min_logits_spread" if nearly_equal else "min_spread"
    return f"its scores spread by {spread:.2g}, advantage.{key} = {getattr(config.advantage, key):g}"


def _those(rollouts: Sequence[Record], are: Any) -> str:
    """Those of the rollouts, by number; empty for none."""
    numbers = [rollout["rollout"] for rollout in rollouts if are(rollout)]
    if not numbers:
        return ""
    if len(numbers) == len(rollouts) and len(numbers) > 1:
        return f"all {len(numbers)} rollouts"
    return f"rollout{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"
