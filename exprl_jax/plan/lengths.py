"""A step at the lengths that its rollouts are likely to have: the calls of a plan, which stand at their budgets, with
other costs.

Responses are lognormal, cut at `rollout.max_tokens`.  What memory holds does not depend on them, nor do the programs;
what they compute and move does:

    waves    every row is decoded until the longest of its wave has ended
    slots    a row that ends makes room for the next one, until the fullest data shard has none left
    judge    a call reads until its longest text is read, and writes at its budget
    update   as many microbatches as the packed rows need

Prompts stay at their budgets.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import json
import math
import pathlib
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from exprl_jax.config import Config
from exprl_jax.data.packing import assign_rows
from exprl_jax.layout import packed_shape
from exprl_jax.mesh import DATA
from exprl_jax.plan.calls import planned_sizes
from exprl_jax.plan.costs import Cost, forward, seen_pairs
from exprl_jax.plan.memory import token_bytes, weight_bytes
from exprl_jax.plan.models import known_model
from exprl_jax.plan.records import Call, Planned
from exprl_jax.rollout.call import padded_width
from exprl_jax.rollout.sampler import CHUNK

# Of a run's last steps, whose rollouts are taken.
_STEPS = 8
_SEED = 0


class Lengths(NamedTuple):
    """Of responses.

    Attributes:
      mean: tokens, after the cut.
      spread: standard deviation of the logarithm before it.
      segments: of a response, on average.
    """

    mean: float
    spread: float
    segments: float


def parse_lengths(text: str, cap: int) -> Lengths:
    """From `mean,spread,segments`, or from the last steps of a run's metrics.jsonl: their mean length, and that spread
    with which as many rollouts reach the cap.

    Raises:
      ValueError: neither, or rollouts that no lognormal has.
    """
    if pathlib.Path(text).suffix == ".jsonl":
        return _measured(pathlib.Path(text), cap)
    try:
        mean, spread, segments = map(float, text.split(","))
    except ValueError:
        raise ValueError(
            f"--lengths: got {text!r}, expected mean,spread,segments, such as 9000,0.6,8, or a run's metrics.jsonl"
        ) from None
    if not (0 < mean < cap and 0 < spread <= 3 and segments >= 1):
        raise ValueError(
            f"--lengths: got {text!r}, expected a mean between 0 and rollout.max_tokens = {cap}, a spread of at most 3 "
            "and one segment or more"
        )
    return Lengths(mean, spread, segments)


def _measured(path: pathlib.Path, cap: int) -> Lengths:
    """Of a run's last steps."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise ValueError(f"--lengths: {path} cannot be read: {error}") from error
    rows = [row for row in rows if row.get("response/length_mean") is not None][-_STEPS:]
    if not rows:
        raise ValueError(f"--lengths: {path} has no step with rollouts")
    mean, overlong, segments = (
        statistics.fmean(row[key] for row in rows)
        for key in ("response/length_mean", "response/overlong", "segments/mean")
    )
    if not 0 < mean < cap:
        raise ValueError(
            f"--lengths: {path} has rollouts of {mean:.0f} tokens, expected less than rollout.max_tokens = {cap}"
        )
    spreads = np.geomspace(0.05, 3, 60)
    shares = [(quantiles(Lengths(mean, spread, segments), 1000, cap) >= cap).mean() for spread in spreads]
    return Lengths(mean, float(spreads[np.argmin(np.abs(np.array(shares) - overlong))]), max(segments, 1.0))


def quantiles(lengths: Lengths, rows: int, cap: int) -> np.ndarray:
    """The lengths of so many rows, ascending; their mean is as asked for."""
    normal = statistics.NormalDist()
    shape = np.exp(lengths.spread * np.array([normal.inv_cdf((i + 0.5) / rows) for i in range(rows)]))
    low, high = 0.0, float(cap) / shape.min()
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if np.minimum(middle * shape, cap).mean() > lengths.mean else (middle, high)
    return np.maximum(np.minimum(np.rint(high * shape), cap), 1).astype(np.int64)


def slot_steps(lengths: Sequence[int], slots: int) -> int:
    """Steps until the last of these rows has ended, each begun in order when a slot is free."""
    free = [0] * slots
    for length in lengths:
        heapq.heappush(free, heapq.heappop(free) + int(length))
    return max(free)


def at_lengths(calls: Sequence[Call], config: Planned, mesh: Mesh | AbstractMesh, lengths: Lengths) -> list[Call]:
    """The calls of a step with such rollouts; steps, operations and bytes of one call are the mean over the step's.

    Raises:
      ValueError: another task, whose lengths only its data say.
    """
    if not isinstance(config, Config) or config.task != "rl":
        raise ValueError(f"--lengths: of a run with config.task = 'rl', got {config.task!r}")
    config = planned_sizes(config, mesh)
    rollout = config.rollout
    drawn = quantiles(lengths, rollout.prompts * rollout.group, rollout.max_tokens)
    # In any order: which row is long is not known before.
    drawn = np.random.default_rng(_SEED).permutation(drawn)
    waves = drawn.reshape(rollout.prompts // rollout.wave, mesh.shape[DATA], -1)
    judged = drawn.reshape(rollout.prompts // (config.judge.wave or rollout.wave), mesh.shape[DATA], -1)
    used = _used_share(config, drawn)
    changed = []
    for call in calls:
        if call.name == "sample":
            call = _sampled(call, config, mesh, waves)
        elif call.name == "judge" and config.judge.readout == "text":
            call = _judged(call, config, mesh, judged, lengths.segments)
        elif call.name == "judge_branches" and config.judge.readout == "text":
            call = _branched(call, config, mesh, judged, lengths.segments)
        elif call.name == "judge":
            prefixes = call.times // len(judged)
            call = dataclasses.replace(call, times=len(judged) * min(prefixes, math.ceil(lengths.segments)))
        elif call.phase in ("logp", "train"):
            cost = Cost(call.cost.products * used, call.cost.attention * used, call.cost.bytes * used)
            call = dataclasses.replace(call, cost=cost, steps=math.ceil(call.steps * used))
        changed.append(call)
    return changed


def _used_share(config: Config, drawn: np.ndarray) -> float:
    """The part of an update's microbatches that packed rows of such responses fill, prompts apart."""
    prompt, (M, B, T) = config.data.max_prompt_tokens - 1, packed_shape(config)
    of_update = drawn[: len(drawn) // config.updates.per_batch]
    rows = assign_rows(np.full(len(of_update), prompt), of_update, np.arange(len(of_update)), T).max() + 1
    return min(1.0, math.ceil(rows / B) / M)


def _sampled(call: Call, config: Config, mesh: Mesh | AbstractMesh, waves: np.ndarray) -> Call:
    """Args: waves: lengths [waves, shards, rows of a shard]."""
    model, slots = known_model(config.policy), config.rollout.slots
    context = padded_width(config.data.max_prompt_tokens - 1)
    params, costs, steps = call.arguments[0][1], [], []
    for wave in waves:
        if 0 < slots < wave.shape[1]:
            taken = max(slot_steps(shard, slots) for shard in wave)
            seen, decoded = [sum(seen_pairs(n, context + n) for n in shard) for shard in wave], slots * len(wave)
        else:
            # Rows that have ended are fed padding until the longest has.
            taken, decoded = int(wave.max()), wave.size
            seen = [wave.shape[1] * seen_pairs(taken, context + taken)] * len(wave)
        steps.append(taken)
        costs.append(forward(model.arch, params, decoded * taken, sum(seen), decoded * taken))
        costs[-1] += Cost(bytes=taken * weight_bytes(model, mesh) + max(seen) * token_bytes(model, mesh))
    return _mean_call(call, costs, steps, len(waves))


def _judged(call: Call, config: Config, mesh: Mesh | AbstractMesh, waves: np.ndarray, segments: float) -> Call:
    """A `text` judge that reads each text whole, in calls of a group of each problem's."""
    judge, rollout = config.judge, config.rollout
    model, params, suffix = known_model(judge.model), call.arguments[0][1], _suffix(call, config)
    context, answer = padded_width(judge.max_context_tokens), judge.max_tokens
    pieces = 1 if call.times == len(waves) else max(1, round(segments))
    weights, token, costs, steps = weight_bytes(model, mesh), token_bytes(model, mesh), [], []
    for wave in waves:
        shards, rows = wave.shape
        texts = np.minimum(wave, judge.max_trace_tokens).reshape(shards, rows // rollout.group, rollout.group)
        # Each rollout's prefixes one after another, cut into calls of a group.
        ends = np.arange(1, pieces + 1) / pieces
        queries = np.ceil(texts[..., None] * ends).astype(np.int64).reshape(*texts.shape[:2], pieces, rollout.group)
        for number in range(pieces):
            read = queries[:, :, number].reshape(shards, rows) + suffix - 1
            chunks = -(-int(read.max()) // CHUNK)
            fed = chunks * CHUNK
            # A chunk's queries see all that was read by its end.
            moved = max(
                sum(context + min(int(n), end * CHUNK) for n in shard for end in range(1, chunks + 1)) for shard in read
            )
            pairs = sum(seen_pairs(int(n), context + int(n)) for n in read.ravel())
            written = [sum(seen_pairs(answer, context + int(n) + answer) for n in shard) for shard in read]
            cost = forward(model.arch, params, wave.size * (fed + answer), pairs + sum(written), wave.size * answer)
            costs.append(cost + Cost(bytes=(chunks + answer) * weights + (moved + max(written)) * token))
            steps.append(answer)
    return _mean_call(call, costs, steps, len(waves) * pieces)


def _branched(call: Call, config: Config, mesh: Mesh | AbstractMesh, waves: np.ndarray, segments: float) -> Call:
    """A `text` judge whose rows go on from the traces, those of all prefixes in one call."""
    judge, model, params = config.judge, known_model(config.judge.model), call.arguments[0][1]
    context, answer = padded_width(judge.max_context_tokens), judge.max_tokens
    _, Q, own = call.arguments[2][1].tokens_PGT.shape
    weights, token, costs = weight_bytes(model, mesh), token_bytes(model, mesh), []
    pieces, most = max(1, round(segments)), Q // config.rollout.group
    calls = -(-pieces // most)
    # Rows that ask nothing are fed all the same; they see the context alone.
    all_ends = np.array([*(np.arange(1, pieces + 1) / pieces), *[0.0] * (calls * most - pieces)])
    for wave, ends in itertools.product(waves, all_ends.reshape(calls, most)):
        traces = np.minimum(wave, judge.max_trace_tokens)
        chunks = -(-int(traces.max()) // CHUNK)
        moved = max(
            sum(context + min(int(n), end * CHUNK) for n in shard for end in range(1, chunks + 1)) for shard in traces
        )
        pairs = sum(seen_pairs(int(n), context + int(n)) for n in traces.ravel())
        begins = traces[..., None] * ends
        written = seen_pairs(own - 1 + answer, context + own - 1 + answer) + begins * (own - 1 + answer)
        # What a row has of its own is read at once, then a token at a time.
        alone = written - (own - 2) * (context + begins + (own - 1) / 2)
        cost = forward(model.arch, params, traces.size * (chunks * CHUNK), pairs)
        rows = begins.size
        cost += forward(model.arch, params, rows * (own - 1 + answer), float(written.sum()), rows * answer)
        read = (chunks + 1 + answer) * weights + (moved + float(alone.sum((1, 2)).max())) * token
        costs.append(cost + Cost(bytes=read))
    return _mean_call(call, costs, [answer] * len(costs), len(costs))


def _suffix(call: Call, config: Config) -> int:
    """Tokens of the closing instruction in a judge's rows."""
    rows = call.arguments[2][1]
    return rows.tokens_PGT.shape[2] - config.judge.max_trace_tokens


def _mean_call(call: Call, costs: Sequence[Cost], steps: Sequence[int], times: int) -> Call:
    """So many calls, each of their mean."""
    total = sum(costs, Cost())
    cost = Cost(total.products / times, total.attention / times, total.bytes / times)
    return dataclasses.replace(call, cost=cost, steps=math.ceil(sum(steps) / times), times=times)
