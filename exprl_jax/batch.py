"""From a step's waves to its updates: one batch over all processes, packed into rows.

ScoredWave … ─ join_waves ─→ Batch [P, G, R] ─ pack_updates ─→ PackedUpdate … [M, B, T] ─ add_logp ─→ Experience
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from exprl_jax.config import Config
from exprl_jax.data.packing import Example, PackedRows, assign_rows, fill_rows
from exprl_jax.data.problems import Problem
from exprl_jax.hosts import gather_rows, put_microbatches
from exprl_jax.layout import packed_shape
from exprl_jax.learning.advantages import to_tokens
from exprl_jax.learning.losses import normaliser
from exprl_jax.learning.update import METRICS, over_updates
from exprl_jax.mesh import Placement
from exprl_jax.model import decoder
from exprl_jax.records import Experience, Rollouts
from exprl_jax.rl_run import RLRun
from exprl_jax.wave import ScoredWave


class Batch(NamedTuple):
    """A step's rollouts, the same on every process, in the batch's order.

    Attributes:
      prompts: token ids of each problem's, with the hint that its rollouts were sampled with, if any.
      mask_PGR: tokens that carry a loss, of those that were sampled.
      advantage_PGR: of each token; 0 where the mask is False.
    """

    prompts: Sequence[Sequence[int]]
    rollouts: Rollouts
    mask_PGR: np.ndarray
    advantage_PGR: np.ndarray


class PackedUpdate(NamedTuple):
    """One optimizer update's batch.

    Attributes:
      experience: its arrays on the mesh.
      packed: the same rows on the host, and where each rollout is in them.
      group_N, index_N: of each packed rollout, its problem among the update's, and its index in the group.
      has_advantage: some token that carries a loss has an advantage other than 0.
    """

    experience: Experience
    packed: PackedRows
    group_N: np.ndarray
    index_N: np.ndarray
    has_advantage: bool


def join_waves(run: RLRun, problems: Sequence[Problem], waves: Sequence[ScoredWave]) -> Batch:
    """Joins the processes' rollouts: rows are packed from all of them, so that every device has its fair share."""
    parts = [_by_token(run, scored) for scored in waves]
    index_P = np.concatenate([scored.index_P for scored in waves])
    batch = join_batch(run, problems, parts, index_P)
    return batch._replace(prompts=_hinted_prompts(run, waves, index_P, batch.prompts)) if run.hints else batch


def _hinted_prompts(
    run: RLRun, waves: Sequence[ScoredWave], index_P: np.ndarray, bare: Sequence[Sequence[int]]
) -> list[Sequence[int]]:
    """Each problem's prompt as its group was sampled from it, with a hint or without: of all processes' problems."""
    hinted = {name: prompt for scored in waves for name, prompt in scored.nudged.prompts.items()}
    mine = [hinted.get(problem.id, ()) for scored in waves for problem in scored.wave.problems]
    # Prompts are gathered as arrays of one width, for processes hold different problems; length 0 says: the bare one.
    tokens = np.zeros((len(mine), run.hints.limit), np.int32)
    for row, prompt in zip(tokens, mine):
        row[: len(prompt)] = prompt
    whole = gather_rows({"tokens": tokens, "length": np.array([len(prompt) for prompt in mine])}, index_P)
    return [row[:n].tolist() if n else prompt for row, n, prompt in zip(whole["tokens"], whole["length"], bare)]


def _by_token(run: RLRun, scored: ScoredWave) -> tuple[Rollouts, np.ndarray, np.ndarray]:
    """A wave's rollouts, the tokens that carry a loss, and each token's advantage: its segment's."""
    # A token's segment is the number of ends at or before it.  Columns past a rollout's last segment are no segments:
    # an end that no token reaches keeps them out of that count.
    ends_PGN = np.full(scored.advantages.advantage_PGN.shape, run.config.rollout.max_tokens)
    for i, group in enumerate(scored.wave.ends):
        for g, ends in enumerate(group):
            ends_PGN[i, g, : len(ends)] = ends
    rollouts, (advantage_PGN, counted_PGN, _) = scored.wave.rollouts, scored.advantages
    advantage_PGR, mask_PGR = to_tokens(advantage_PGN, counted_PGN, ends_PGN, rollouts.mask_PGR)
    return rollouts, mask_PGR, advantage_PGR


def join_batch(
    run: RLRun,
    problems: Sequence[Problem],
    parts: Sequence[tuple[Rollouts, np.ndarray, np.ndarray]],
    index_P: np.ndarray,
) -> Batch:
    """The batch of all processes.

    Args:
      parts: (rollouts, loss mask, advantages) of this process's problems of every wave.
      index_P: of those problems in the batch.
    """
    rollouts, mask_PGR, advantage_PGR = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    whole = gather_rows({**vars(rollouts), "loss_mask": mask_PGR, "advantage": advantage_PGR}, index_P)
    mask_PGR, advantage_PGR = whole.pop("loss_mask"), whole.pop("advantage")
    return Batch([run.prompts.ids[problem.id] for problem in problems], Rollouts(**whole), mask_PGR, advantage_PGR)


def pack_updates(run: RLRun, batch: Batch) -> list[PackedUpdate]:
    """The step's updates: every `per_batch`-th problem each, packed into rows of `updates.row_tokens`."""
    per_batch = run.config.updates.per_batch
    return [pack_update(run, batch, slice(u, None, per_batch)) for u in range(per_batch)]


def pack_update(run: RLRun, batch: Batch, chosen: slice, room_P: Sequence[int] = ()) -> PackedUpdate:
    """The update of some of the batch's problems.

    Args:
      room_P: slots to plan for each problem's prompt, if more than it takes.
    """
    config, placement = run.config, Placement(run.mesh)
    prompts, rollouts = batch.prompts[chosen], jax.tree.map(lambda x: x[chosen], batch.rollouts)
    mask_PGR, advantage_PGR = batch.mask_PGR[chosen], batch.advantage_PGR[chosen]
    # Weights are of the whole update, before it is divided into rows and microbatches: how it is packed may not matter.
    weight_PGR = normaliser(mask_PGR, config.loss.aggregate, config.rollout.max_tokens)
    length_PG = rollouts.mask_PGR.sum(-1)
    group_N, index_N = np.nonzero(length_PG)
    length_N = length_PG[group_N, index_N]
    # A prompt's last token is fed with the response, whose first token it predicts.
    room_P = np.array(room_P or [len(prompt) for prompt in prompts]) - 1
    # Where a row cannot share a prompt between rollouts (a TPU's kernel), each rollout is a group of its own.
    shared_N = group_N if placement.shares_segments else np.arange(len(group_N))
    row_N = assign_rows(room_P[group_N], length_N, shared_N, config.updates.row_tokens)
    examples = [Example(prompts[p], rollouts.tokens_PGR[p, g, :n]) for p, g, n in zip(group_N, index_N, length_N)]
    packed = fill_rows(examples, group_N, row_N, packed_shape(config), placement.shares_segments)

    def spread(x_PGR):
        return packed.spread([x_PGR[p, g, :n] for p, g, n in zip(group_N, index_N, length_N)], x_PGR.dtype)

    zeros = np.zeros(packed.packed.tokens_BT.shape, np.float32)
    experience = Experience(
        packed=packed.packed,
        mask_MBT=spread(mask_PGR),
        weight_MBT=spread(weight_PGR),
        advantage_MBT=spread(advantage_PGR),
        sampler_logp_MBT=spread(rollouts.logp_PGR),
        old_logp_MBT=zeros,
        ref_logp_MBT=zeros,
        used=packed.used,
    )
    has_advantage = bool((mask_PGR & (advantage_PGR != 0)).any())
    return PackedUpdate(put_microbatches(run.mesh, experience), packed, group_N, index_N, has_advantage)


def add_logp(run: RLRun, policy: decoder.Params, experience: Experience) -> Experience:
    """Adds the log-probs that the loss compares with: of the old policy where the batch is used more than once (else
    they are the update's own), and of the reference where the loss has a KL."""
    if run.config.updates.per_batch > 1:
        logp = run.programs.token_logp(policy, experience.packed, experience.used)
        experience = experience.replace(old_logp_MBT=logp)
    if run.config.loss.kl_coef > 0:
        logp = run.programs.token_logp(run.frozen[run.config.reference], experience.packed, experience.used)
        experience = experience.replace(ref_logp_MBT=logp)
    return experience


def mean_padding(updates: Sequence[PackedUpdate]) -> float:
    """The fraction of slots that hold no token, over a step's updates."""
    return sum(update.packed.padding for update in updates) / len(updates)


def update_metrics(config: Config, updates: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """A step's updates as one row; what the loss did not need was not measured, nor anything where none was made."""
    row = over_updates(updates) if updates else dict.fromkeys(METRICS)
    if config.loss.kl_coef == 0:
        row["loss/kl"] = None
    return row
