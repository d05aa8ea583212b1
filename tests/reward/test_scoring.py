"""The scoring pass: the five digits' probabilities of the plain forward, on any mesh."""

import functools

import jax
import numpy as np
import pytest

from exprl_jax import config, hosts, mesh
from exprl_jax.mesh import ONE_DEVICE, Placement
from exprl_jax.model.decoder import Transformer
from exprl_jax.records import Context, Rows
from exprl_jax.reward.scoring import score
from tests.oracles.tiny_decoder import QWEN3, TpuWay, forward_logits, make_execution, random_params

P, J, C, T, V = 8, 3, 5, 4, QWEN3.vocab_size
DIGITS = (7, 50, 3, 21, 60)
RANDOM = np.random.default_rng(11)
CONTEXT = Context(RANDOM.integers(0, V, (P, C), dtype=np.int32), RANDOM.integers(0, C + 1, P, dtype=np.int32))
ROWS = Rows(RANDOM.integers(0, V, (P, J, T), dtype=np.int32), RANDOM.integers(0, T, (P, J), dtype=np.int32))


@functools.partial(jax.jit, static_argnames=("execution", "placement"))
def scores(params, context, rows, execution=make_execution(), placement=ONE_DEVICE):
    prefix = Transformer(QWEN3, execution, placement).prefill(params, context)
    return score(Transformer(QWEN3, execution, placement), params, prefix, rows, digit_ids=DIGITS)


@functools.cache
def unsharded():
    return np.asarray(scores(random_params(QWEN3, make_execution()), CONTEXT, ROWS))


def test_scores_are_the_softmax_of_the_plain_forward_over_five_digits():
    whole, last = np.zeros((P, J, C + T), np.int32), np.zeros((P, J), int)
    for p, j in np.ndindex(P, J):
        sequence = [*CONTEXT.tokens_PC[p, : CONTEXT.length_P[p]], *ROWS.tokens_PGT[p, j, ROWS.start_PG[p, j] :]]
        whole[p, j, : len(sequence)], last[p, j] = sequence, len(sequence) - 1
    plain = jax.jit(lambda params, tokens: forward_logits(params, QWEN3, make_execution(), tokens))
    logits = np.asarray(plain(random_params(QWEN3, make_execution()), whole.reshape(P * J, -1)))
    digits = logits[np.arange(P * J), last.ravel()][:, DIGITS].astype(np.float64)
    expected = np.exp(digits) / np.exp(digits).sum(-1, keepdims=True)
    assert expected.std() > 0.1
    np.testing.assert_allclose(unsharded().reshape(P * J, 5), expected, atol=1e-5)


def test_permuted_queries_permute_the_scores():
    order = np.array([2, 0, 1])
    rows = jax.tree.map(lambda x: x[:, order], ROWS)
    got = scores(random_params(QWEN3, make_execution()), CONTEXT, rows)
    np.testing.assert_allclose(got, unsharded()[:, order], atol=1e-6)


@pytest.mark.parametrize(
    "way, data, model, scan",
    [(Placement, 1, 8, True), (Placement, 2, 4, False), (Placement, 8, 1, True), (TpuWay, 4, 2, True)],
)
def test_the_mesh_the_layout_and_splash_change_nothing(way, data, model, scan):
    execution, over = make_execution(scan), mesh.make_mesh(config.Mesh(data, model))
    params = random_params(QWEN3, execution)
    params = jax.device_put(params, mesh.shard_parameters(params, QWEN3, execution, over))
    got = scores(params, *hosts.put_rows(over, (CONTEXT, ROWS), P), execution=execution, placement=way(over))
    assert got.sharding.shard_shape(got.shape)[0] == P // data
    np.testing.assert_allclose(np.asarray(got), unsharded(), atol=1e-5)
