"""Counted operations and bytes: of every call against the products in its traced program, and against hand counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import AbstractMesh
from tiny_runs import config_dict

from exprl_jax.model.blocks import BLOCK
from exprl_jax.plan import costs, rows, updates
from exprl_jax.plan.calls import calls_of
from exprl_jax.plan.costs import seen_pairs
from exprl_jax.plan.records import Result
from exprl_jax.resolve import resolve
from exprl_jax.sizes import TRAINING, sizes_of
from tests.oracles.jaxpr_products import count_products, kernels_of

MODELS = ("policy", "reference", "judge.model")
REMATERIALISED = {f"{model}.execution.remat": "full" for model in MODELS}
SCANNED = REMATERIALISED | {f"{model}.execution.scan_layers": True for model in MODELS}
BUT_ATTENTION = {f"{model}.execution.remat": "but_attention" for model in MODELS}


def calls_on(config, data=1, model=1):
    return {call.name: call for call in calls_of(config, AbstractMesh((data, model), ("data", "model")))}


def tiny(arm, changes=None):
    return resolve(config_dict("tiny", arm, changes))


@pytest.mark.parametrize("queries, keys", [(1, 1), (1, 9), (5, 5), (4, 11)])
def test_the_last_query_sees_every_key_and_each_before_it_one_less(queries, keys):
    assert seen_pairs(queries, keys) == np.tril(np.ones((queries, keys)), keys - queries).sum()


@pytest.mark.parametrize(
    "config, loops",
    [
        (tiny("outcome", {"updates.per_batch": 2}), {}),
        (tiny("text", REMATERIALISED), {"judge": [1, 16]}),  # a row of traces is one chunk
        (tiny("text", SCANNED), {"judge": [1, 16]}),
        (tiny("outcome", BUT_ATTENTION), {}),
        (tiny("lora"), {}),
        (tiny("distill", {"distillation.kl": "full"}), {}),
        (tiny("distill", {"distillation.kl": "sampled"}), {"teacher_signal": [4, 4]}),
        (tiny("sft"), {}),
        (resolve(config_dict("evaluate", "tiny")), {}),
    ],
)
def test_every_calls_operations_are_those_of_its_program(config, loops, monkeypatch):
    """On one device without TPU kernels: attention there has a score for every query and key, seen or not, where each
    block of a row sees each; going back scores are made again, once."""
    monkeypatch.setattr(costs, "BACKWARD", 5)
    for room in (rows, updates):
        monkeypatch.setattr(room, "seen_pairs", lambda queries, keys: queries * keys)
    turns = sizes_of(config)[0] // BLOCK if isinstance(config, TRAINING) else 0
    results = {}
    for name, call in calls_on(config).items():
        arguments = [results[tree.name] if isinstance(tree, Result) else tree for _, tree in call.arguments]
        traced = call.program.trace(*arguments)
        results[name] = traced.out_info
        trips = loops.get(name, [call.steps] if call.steps else [])
        products, attention = count_products(traced.jaxpr, trips, turns)
        # A judge's digits are five columns of the vocabulary; of adapters' tables the program makes a gradient too,
        # that nothing reads, and none of the first layer's input.
        exact = 0.05 if getattr(config, "lora", None) and config.lora.rank and call.phase == "train" else 1e-4
        assert call.cost.products == pytest.approx(products, rel=exact), name
        if config.policy.execution.remat != "but_attention" or call.phase != "train":  # which keeps what kernels need
            # A row that is read attends to the slots of its answer too, masked.
            assert call.cost.attention == pytest.approx(attention, rel=0.01 if name == "judge" else 0), name
        assert call.cost.bytes > 0


def test_the_splash_kernels_products_are_those_that_are_counted():
    """By the kernels' own code: scores and values forward; for dq scores, dp and dq; for dk and dv those two as
    well."""
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((256, 256))] * 2)
    splash = splash_attention_kernel.make_splash_mha(mask, head_shards=1, q_seq_shards=1)
    q = k = v = jnp.zeros((2, 256, 128))
    traced = jax.jit(jax.grad(lambda *x: splash(*x).sum(), argnums=(0, 1, 2))).trace(q, k, v)
    forward, *backward = sorted(kernels_of(traced.jaxpr).values())
    assert (forward, sum(backward)) == (costs.FORWARD, costs.BACKWARD)


def test_a_decode_step_reads_the_weights_and_the_keys_and_values_that_it_attends_to():
    """By hand, of the paper's 4B on 2 x 8: 36 layers of 8 key and value heads of 128, one of them a device."""
    config = resolve(config_dict("stage1", "outcome"))
    rows, context, answer = 4 * 10 / 2, 4096, 16_384
    weights = (4_022_468_096 * 2 + (36 * (2 * 2560 + 2 * 128) + 2560) * (2 * 7 + 4 * 1)) / 8  # norms: whole
    token = 36 * 2 * 128 * 2
    keys = sum(context + step for step in range(1, answer + 1)) * rows * token
    sample = calls_on(config, 2, 8)["sample"]
    assert sample.cost.bytes == pytest.approx(answer * weights + keys, rel=1e-3)
    int8 = resolve(config_dict("stage1", "outcome", {f"{model}.execution.kv_dtype": "int8" for model in MODELS}))
    assert calls_on(int8, 2, 8)["sample"].cost.bytes == pytest.approx(answer * weights + keys / 2, rel=1e-3)


def test_a_judge_reads_the_weights_once_for_each_chunk_of_a_trace_and_once_for_each_token_it_writes():
    """By hand, as above: a row of 16,864 holds 16,640 tokens of a trace and at most 218 of closing instruction; but for
    its last token it is read in 17 chunks of 1,024, then come 2,048 tokens of judgement."""
    rows, context, read, chunks, answer, token = 4 * 10 / 2, 20_480, 16_863, 17, 2048, 36 * 2 * 128 * 2
    weights = (4_022_468_096 * 2 + (36 * (2 * 2560 + 2 * 128) + 2560) * (2 * 7 + 4 * 1)) / 8
    mean = context + (read + 1) / 2  # keys that a token of a trace sees
    keys = chunks * mean + sum(context + read + step for step in range(1, answer + 1))
    judge = calls_on(resolve(config_dict("stage1", "outcome")), 2, 8)["judge"]
    assert judge.cost.bytes == pytest.approx((chunks + answer) * weights + keys * rows * token, rel=1e-3)


def test_an_update_reads_weights_for_each_pass_and_moves_gradient_and_state():
    """Of four microbatches, float32: two passes and a third that makes the layers again; sums read and written; a state
    of parameters and two moments read and written."""
    parameters = 90_816 * 4
    plain, again = (calls_on(tiny("outcome", changes))["train_step"].cost.bytes for changes in ({}, REMATERIALISED))
    assert again - plain == 4 * parameters
    assert plain == pytest.approx(4 * (2 + 2) * parameters + 2 * 3 * parameters, rel=1e-3)
