"""Rows that go on from beginnings of traces are rows of whole prompts, whose traces were read once."""

import functools

import jax
import numpy as np
import pytest

from exprl_jax import hosts, mesh
from exprl_jax.mesh import ONE_DEVICE, Placement
from exprl_jax.model import page_attention, paged
from exprl_jax.model.decoder import Transformer
from exprl_jax.records import Context, Draw, Rows, Traces
from exprl_jax.rollout import sampler
from exprl_jax.rollout.sampler import sample
from tests.oracles import pages_numpy
from tests.oracles.tiny_decoder import QWEN3, TpuWay, random_params
from tests.oracles.tiny_decoder import make_execution as execution

# Two traces of each of two problems, three rows of each; pages of four tokens, traces read three tokens at a time.
P, G, N, R, V, PAGE, CHUNK = 2, 2, 3, 8, QWEN3.vocab_size, 4, 3
ENDS, PAD, OWN = (3, 7, 11, 20), 0, 3
RANDOM = np.random.default_rng(7)
CONTEXT = Context(RANDOM.integers(0, V, (P, 9), dtype=np.int32), np.array([9, 2], np.int32))
TRACES = [[RANDOM.integers(0, V, n) for n in of_problem] for of_problem in ((10, 3), (7, 1))]
# A whole trace, none of it, a beginning that ends with a page or within one; the last is not asked.
BEGIN_PQ = np.array([[10, 0, 7, 3, 1, 2], [2, 7, 6, 1, 0, 0]], np.int32)
OWNS = [[RANDOM.integers(0, V, 1 + (p + q) % OWN) for q in range(G * N)] for p in range(P)]
TEMPERATURE_PQ = np.where(np.arange(P * G * N).reshape(P, -1) % 3 == 0, 0, 0.9).astype(np.float32)
BUDGET_PQ = np.where(np.arange(P * G * N).reshape(P, -1) == P * G * N - 1, 0, R).astype(np.int32)
DRAW = Draw(np.uint32(1), np.int32(2), np.arange(P, dtype=np.uint32), TEMPERATURE_PQ, BUDGET_PQ)


@pytest.fixture(autouse=True)
def small_pages(monkeypatch):
    monkeypatch.setattr(paged, "PAGE", PAGE)
    monkeypatch.setattr(sampler, "CHUNK", CHUNK)


def padded(texts, width):
    rows = Rows(
        np.full((len(texts), len(texts[0]), width), PAD, np.int32), np.zeros((len(texts), len(texts[0])), np.int32)
    )
    for i, g in np.ndindex(rows.start_PG.shape):
        rows.start_PG[i, g] = width - len(texts[i][g])
        rows.tokens_PGT[i, g, rows.start_PG[i, g] :] = texts[i][g]
    return rows


BRANCHES = padded(OWNS, OWN), Traces(padded(TRACES, 10), BEGIN_PQ)
WHOLE = padded(
    [[[*TRACES[p][q // N][: BEGIN_PQ[p, q]], *OWNS[p][q]] for q in range(G * N)] for p in range(P)], 10 + OWN
)


@functools.partial(jax.jit, static_argnames=("how", "place"))
def run(params, context, rows, draw, traces, how=execution(), place=ONE_DEVICE):
    transformer = Transformer(QWEN3, how, place)
    prefix = transformer.prefill(params, context)
    sizes = dict(max_tokens=R, eos_ids=ENDS, pad_id=PAD, traces=traces)
    return sample(transformer, params, prefix, rows, draw, **sizes)[0]


@functools.cache
def alone():
    """Every prompt read whole."""
    return jax.tree.map(np.asarray, run(random_params(QWEN3, execution()), CONTEXT, WHOLE, DRAW, None))


def assert_as_alone(got):
    assert len(np.unique(alone().mask_PGR.sum(-1))) > 2 and not alone().mask_PGR[-1, -1].any()
    for name in ("tokens_PGR", "mask_PGR", "ended_PG"):
        np.testing.assert_array_equal(getattr(got, name), getattr(alone(), name), err_msg=name)
    np.testing.assert_allclose(got.logp_PGR, alone().logp_PGR, atol=1e-5)


def test_rows_from_beginnings_of_traces_are_those_of_whole_prompts():
    """Greedy and sampled; seen to fail where a row sees a token too many, and where the tail is not copied."""
    rows, traces = BRANCHES
    assert_as_alone(run(random_params(QWEN3, execution()), CONTEXT, rows, DRAW, traces))


def test_on_a_mesh_with_scanned_layers():
    how, over = execution(True), mesh.mesh_over(jax.devices()[:4], 2, 2)
    params = random_params(QWEN3, how)
    params = jax.device_put(params, mesh.shard_parameters(params, QWEN3, how, over))
    context, rows, draw, traces = hosts.put_rows(over, (CONTEXT, BRANCHES[0], DRAW, BRANCHES[1]), P)
    out = run(params, context, rows, draw, traces, how=how, place=Placement(over))
    assert_as_alone(hosts.fetch_rows(jax.device_put(out, mesh.rows_sharding(over))))


def test_the_tpus_way(monkeypatch):
    """A stand-in for the kernel that reads the pages, which checks what it is handed."""
    monkeypatch.setattr(page_attention, "ragged_paged_attention", pages_numpy.called_back)
    rows, traces = BRANCHES
    out = run(random_params(QWEN3, execution()), CONTEXT, rows, DRAW, traces, place=TpuWay(None))
    assert_as_alone(jax.tree.map(np.asarray, out))
