"""From a step's rollouts to its packed updates: every number of every slot, against the batch."""

import jax
import numpy as np
import pytest
from tiny_runs import opened, random_batch, seen_by, tiny

from exprl_jax.batch import join_batch, pack_update, pack_updates
from exprl_jax.layout import packed_shape
from exprl_jax.learning.losses import normaliser
from exprl_jax.mesh import Placement


@pytest.fixture(scope="module")
def run():
    return opened(
        tiny("outcome", {"updates.per_batch": 2, "updates.row_tokens": 900, "loss.aggregate": "sequence_mean"})
    )


@pytest.mark.parametrize("share", [True, False])
def test_what_stands_in_packed_rows_are_the_rollouts(share, run, monkeypatch):
    """Every number of every slot, against the batch; prompts shared or repeated, in two updates."""
    monkeypatch.setattr(Placement, "shares_segments", property(lambda self: share))
    batch, packed = random_batch(run), []
    updates = pack_updates(run, batch)
    assert len(updates) == 2
    for u, update in enumerate(updates):
        e, filled = jax.device_get(update.experience), update.packed
        assert e.mask_MBT.shape == packed_shape(run.config) == (2, 8, 900)
        weight_PGR = normaliser(batch.mask_PGR[u::2], "sequence_mean", run.config.rollout.max_tokens)
        free = np.ones((16, 900), bool)
        for p, g, row, first in zip(update.group_N, update.index_N, filled.row_N, filled.first_N, strict=True):
            own = 2 * p + u
            n = int(batch.rollouts.mask_PGR[own, g].sum())
            slots, response = slice(first, first + n), batch.rollouts.tokens_PGR[own, g, :n]
            expected = {
                "mask_MBT": batch.mask_PGR[own, g],
                "weight_MBT": weight_PGR[p, g],
                "advantage_MBT": batch.advantage_PGR[own, g],
                "sampler_logp_MBT": batch.rollouts.logp_PGR[own, g],
            }
            for name, x in expected.items():
                np.testing.assert_array_equal(getattr(e, name).reshape(16, 900)[row, slots], x[:n], err_msg=name)
            np.testing.assert_array_equal(e.packed.target_BT.reshape(16, 900)[row, slots], response)
            for k in {0, n // 2, n - 1}:
                assert seen_by(e.packed, row, first + k) == [*batch.prompts[own], *response[:k]]
            assert free[row, slots].all()
            free[row, slots] = False
            packed.append((own, g))
        for name in ("mask_MBT", "weight_MBT", "advantage_MBT", "sampler_logp_MBT", "old_logp_MBT", "ref_logp_MBT"):
            assert not getattr(e, name).reshape(16, 900)[free].any(), name
        assert e.used == -(-(filled.row_N.max() + 1) // 8) >= 1
        assert e.weight_MBT.sum() == pytest.approx(1)
    # Rollouts without a token are left out, every other one is there once.
    assert sorted(packed) == [tuple(at) for at in np.argwhere(batch.rollouts.mask_PGR.any(-1))]
    assert len(packed) < 32
    slots = sum(int((update.packed.packed.segment_BT > 0).sum()) for update in updates)
    alone = sum(len(batch.prompts[p]) - 1 for p, _ in packed) + batch.rollouts.mask_PGR.sum()
    assert slots < alone if share else slots == alone


@pytest.mark.parametrize("share", [True, False])
def test_rows_have_room_for_longer_prompts_where_asked(share, run, monkeypatch):
    """As for a teacher's, which are packed into the same rows."""
    monkeypatch.setattr(Placement, "shares_segments", property(lambda self: share))
    batch = random_batch(run)
    room_P = [len(prompt) + 150 * (p % 3) for p, prompt in enumerate(batch.prompts)]
    plain, roomy = (pack_update(run, batch, slice(None), room) for room in ((), room_P))
    assert roomy.packed.row_N.max() > plain.packed.row_N.max()
    lengths = batch.rollouts.mask_PGR.sum(-1)
    for update, room in ((plain, [len(prompt) for prompt in batch.prompts]), (roomy, room_P)):
        for row in range(update.packed.row_N.max() + 1):
            here = np.flatnonzero(update.packed.row_N == row)
            groups = update.group_N[here]
            contexts = sum(room[p] - 1 for p in (set(groups) if share else groups))
            assert 0 < contexts + sum(lengths[update.group_N[n], update.index_N[n]] for n in here) <= 900


def test_the_joined_batch_is_in_the_batches_order(run):
    """Of one process, whose waves come in that order."""
    batch = random_batch(run)
    whole = batch.rollouts, batch.mask_PGR, batch.advantage_PGR
    parts = [jax.tree.map(lambda x, index=index: x[index], whole) for index in np.arange(8).reshape(2, 4)]
    joined = join_batch(run, run.problems[:8], parts, np.arange(8))
    assert joined.prompts == batch.prompts
    jax.tree.map(np.testing.assert_array_equal, (joined.rollouts, joined.mask_PGR, joined.advantage_PGR), whole)
