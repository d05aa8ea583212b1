"""The supervised update, against torch, numpy and the schedule of transformers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from exprl_jax import config, programs
from exprl_jax.learning.supervised import METRICS, sft_step
from exprl_jax.learning.update import learning_rate, make_optimizer
from exprl_jax.mesh import make_mesh, put_rows
from exprl_jax.model import weights
from exprl_jax.model.decoder import abstract_params
from exprl_jax.model.language_model import LanguageModel
from exprl_jax.model.sources import resolve_model
from exprl_jax.records import Packed, TrainState
from tests.oracles import learning_numpy as oracle
from tests.oracles import torch_models
from tests.oracles.tiny_decoder import QWEN3, execution, random_params

B, T, V, D = 8, 9, 7, 4
ADAMW = config.Optimizer(
    learning_rate=0.05, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip_norm=1.0, schedule="constant", warmup=0.0
)
COSINE = config.Optimizer(**{**vars(ADAMW), "schedule": "cosine", "warmup": 0.1})


def bigram(params, packed):
    """A policy whose next token depends on the last one; what it says of an example's first token is NaN."""
    before = jnp.roll(packed.tokens_BT, 1, axis=1)
    table = jax.nn.log_softmax(params["embed"] @ params["table"])
    first = packed.segment_BT != jnp.pad(packed.segment_BT, ((0, 0), (1, 0)))[:, :-1]
    entropy = -(jnp.exp(table) * table).sum(-1)[before]
    logp = table[before, packed.tokens_BT]
    return jnp.where(first, jnp.nan, logp), jnp.where(first, jnp.nan, entropy)


def batch(seed=0):
    """Rows of two examples, of very different numbers of counted tokens, and one row that is empty."""
    rng = np.random.default_rng(seed)
    segment, mask = np.zeros((B, T), np.int32), np.zeros((B, T), bool)
    for b in range(B - 1):
        first, second = rng.integers(2, 6), rng.integers(2, 4)
        segment[b, :first], segment[b, first : first + second] = 1, 2
        mask[b, max(1, first - 1 - b % 4) : first] = mask[b, first + 1 : first + second] = True
    return Packed(*map(jnp.asarray, (rng.integers(0, V, (B, T), dtype=np.int32), segment, mask)))


def fresh(how=ADAMW, steps=40):
    embed, table = jax.random.normal(jax.random.key(0), (V, D)), jax.random.normal(jax.random.key(1), (D, V))
    params = {"embed": embed, "table": table}
    return TrainState(jnp.int32(3), params, make_optimizer(how, steps).init(params), jnp.int32(0))


@functools.cache
def step(how=ADAMW, microbatch=B, logp_fn=bigram, steps=40):
    rate = learning_rate(how, steps)
    return jax.jit(
        functools.partial(
            sft_step, logp_fn=logp_fn, optimizer=make_optimizer(how, steps), microbatch=microbatch,
            rate=rate if callable(rate) else lambda made: rate,
        )
    )  # fmt: skip


def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **{"rtol": 2e-5, "atol": 1e-6} | tolerance), a, b)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# Against torch, through the real decoder.


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_loss_and_gradient_are_those_of_cross_entropy_on_responses(name, tmp_path):
    """Each example alone through transformers; prompts are labelled as to be ignored; one mean over all tokens."""
    model = torch_models.tiny_model(name)
    source = resolve_model(str(torch_models.save(model, tmp_path)))
    arch, how = weights.read_architecture(source), execution()
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: here, abstract_params(arch, how, "float32"))
    params = weights.load_params(source, arch, how, "float32", shardings)
    packed = batch().replace(tokens_BT=jnp.asarray(np.random.default_rng(1).integers(0, 97, (B, T), dtype=np.int32)))

    total, count = torch.zeros(()), 0
    for b in range(B):
        for number in range(1, int(packed.segment_BT[b].max()) + 1):
            own = np.asarray(packed.segment_BT[b]) == number
            tokens = torch.from_numpy(np.asarray(packed.tokens_BT[b])[own]).long()
            labels = torch.where(torch.from_numpy(np.asarray(packed.mask_BT[b])[own]), tokens, -100)
            logits = model(tokens[None]).logits[0, :-1]
            total = total + torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum")
            count += int((labels[1:] != -100).sum())
    loss = total / count
    loss.backward()

    logp_fn = model_logp(arch, how)
    optimizer = config.Optimizer(**{**vars(ADAMW), "clip_norm": 1e9})
    state = TrainState(jnp.int32(0), params, make_optimizer(optimizer, 4).init(params), jnp.int32(0))
    after, metrics = step(optimizer, 2, logp_fn)(state, packed)
    norm = torch.sqrt(sum((parameter.grad**2).sum() for parameter in model.parameters())).item()
    assert float(metrics["loss/total"]) == pytest.approx(loss.item(), rel=1e-5)
    assert float(metrics["grad/norm"]) == pytest.approx(norm, rel=1e-4)
    assert float(metrics["update/tokens"]) == count
    # Adam's first moment is 1 − b1 of the gradient.
    moment = after.opt_state[1][0].mu
    for ours, theirs in ((moment["embed"], model.model.embed_tokens), (moment["unembed"].T, model.lm_head)):
        expected = 0.1 * theirs.weight.grad.numpy()
        np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max())


@functools.cache
def model_logp(arch, how, data=1, model=1):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[: data * model]).reshape(data, model), ("data", "model"))
    policy = LanguageModel(config.Model("unread", how, "float32"), arch, tokenizer=None, source=None)
    return functools.partial(programs.packed_logp_and_entropy, mesh=mesh, policy=policy, chunk=5)


def test_sharded_is_unsharded():
    how = execution(scan_layers=True, remat="full")
    params, packed = random_params(QWEN3, how), batch()
    optimizer = make_optimizer(ADAMW, 40)
    state = TrainState(jnp.int32(0), params, optimizer.init(params), jnp.int32(0))
    expected, metrics = step(ADAMW, 8, model_logp(QWEN3, how))(state, packed)
    mesh = make_mesh(config.Mesh(data=4, model=2))
    everywhere = jax.device_put(state, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    rows = put_rows(mesh, jax.tree.map(np.asarray, packed), B)
    result, sharded_metrics = step(ADAMW, 4, model_logp(QWEN3, how, 4, 2))(everywhere, rows)
    assert_close(sharded_metrics, metrics, rtol=1e-4)
    # Adam's first step is ±rate where the gradient is near 0, so the moments are compared and not the parameters.
    assert_close(result.opt_state[1][0].mu, expected.opt_state[1][0].mu, rtol=1e-3, atol=1e-6)


# Against the equations.


def test_metrics_match_the_equations():
    packed, state = batch(), fresh()
    _, metrics = step(microbatch=2)(state, packed)
    assert set(metrics) == set(METRICS) and all(x.shape == () and x.dtype == jnp.float32 for x in metrics.values())
    embed, table = (np.asarray(state.params[name], np.float64) for name in ("embed", "table"))
    logp = np.array([oracle.log_softmax(row) for row in embed @ table])
    tokens = np.asarray(packed.tokens_BT)
    counted = [(tokens[b, t - 1], tokens[b, t]) for b, t in np.argwhere(np.asarray(packed.mask_BT))]
    expected = {
        "loss/total": -np.mean([logp[pair] for pair in counted]),
        "policy/entropy": np.mean([-(np.exp(logp[a]) * logp[a]).sum() for a, _ in counted]),
        "update/tokens": len(counted),
        "update/skipped": 0,
        "update/learning_rate": 0.05,
        "data/padding": 1 - np.count_nonzero(packed.segment_BT) / (B * T),
    }
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(value, rel=1e-5), name
    assert 0.2 < expected["data/padding"] < 0.8


@pytest.mark.parametrize("microbatch", [1, 2, 4])
def test_accumulated_is_the_whole_batch(microbatch):
    state, metrics = step()(fresh(), batch())
    cut_state, cut_metrics = step(microbatch=microbatch)(fresh(), batch())
    assert_close(cut_metrics, metrics)
    assert_close(cut_state.params, state.params, atol=1e-5)


def test_how_examples_are_packed_changes_nothing():
    """The same examples, each in a row of its own."""
    packed, parts = batch(), []
    for b in range(B):
        for number in range(1, int(packed.segment_BT[b].max()) + 1):
            own = np.flatnonzero(np.asarray(packed.segment_BT[b]) == number)
            row = jax.tree.map(lambda x: np.zeros(T, x.dtype), packed)
            for to, given in zip(jax.tree.leaves(row), jax.tree.leaves(packed)):
                to[: len(own)] = np.asarray(given)[b, own]
            parts.append(row.replace(segment_BT=np.minimum(row.segment_BT, 1)))
    apart = jax.tree.map(lambda *x: jnp.stack(x), *parts)
    assert len(parts) == 2 * (B - 1)
    state, metrics = step()(fresh(), packed)
    apart_state, apart_metrics = step(microbatch=2)(fresh(), apart)
    padding = metrics.pop("data/padding"), apart_metrics.pop("data/padding")
    assert padding[0] < padding[1]
    assert_close(apart_metrics, metrics)
    assert_close(apart_state.params, state.params, atol=1e-5)


# The schedule.


@pytest.mark.parametrize("steps, warmup", [(40, 0.1), (94, 0.1), (4, 0.0), (10, 0.5)])
def test_the_cosine_schedule_is_the_released_one(steps, warmup):
    how = config.Optimizer(**{**vars(COSINE), "warmup": warmup})
    rate, rise = learning_rate(how, steps), round(warmup * steps)
    torch_optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.05)
    theirs = transformers.get_cosine_schedule_with_warmup(torch_optimizer, rise, steps)
    for made in range(steps):
        by_formula = made / rise if made < rise else 0.5 * (1 + np.cos(np.pi * (made - rise) / (steps - rise)))
        assert float(rate(made)) == pytest.approx(0.05 * by_formula, abs=1e-8)
        assert float(rate(made)) == pytest.approx(theirs.get_last_lr()[0], abs=1e-8)
        torch_optimizer.step(), theirs.step()
    assert float(rate(steps)) == pytest.approx(0, abs=1e-9)


def test_updates_follow_the_schedule():
    """The rate in the metrics is the one that the update used; a skipped update does not count."""
    how = config.Optimizer(**{**vars(COSINE), "weight_decay": 0.0, "clip_norm": 1e9})
    state, packed, run = fresh(how, 5).replace(step=jnp.int32(0)), batch(), step(how, 4, bigram, 5)
    rates, moved = [], []
    for attempt in range(4):
        start = state
        if attempt == 2:
            bad = start.replace(params=start.params | {"table": start.params["table"].at[0].set(jnp.inf)})
            after, metrics = run(bad, packed)
            assert float(metrics["update/skipped"]) == 1
            assert_same(after.params, bad.params)
            state = start.replace(step=start.step + 1, skipped=after.skipped)
        else:
            state, metrics = run(start, packed)
            state = state.replace(step=state.step + 1)
            moved.append(np.abs(state.params["table"] - start.params["table"]).max())
        rates.append(float(metrics["update/learning_rate"]))
    expected = [0.05 * 0.5 * (1 + np.cos(np.pi * made / 5)) for made in (0, 1, 2, 2)]
    assert rates == pytest.approx(expected, rel=1e-5)
    assert int(state.skipped) == 1 and int(state.opt_state[1][0].count) == 3
    assert moved[0] == pytest.approx(0.05, rel=1e-3)  # Adam's first step is the rate itself


# What must not change anything.


def test_what_is_outside_the_mask_is_not_read():
    packed, run = batch(), step(microbatch=2)
    expected = run(fresh(), packed)
    segment, mask = np.asarray(packed.segment_BT), np.asarray(packed.mask_BT)
    # A token is read if it is counted or predicts one that is.
    read = mask | np.roll(mask, -1, axis=1)
    tokens = np.where(read, packed.tokens_BT, (np.asarray(packed.tokens_BT) + 1) % V)
    assert (tokens != packed.tokens_BT)[segment > 0].any()
    assert_same(run(fresh(), packed.replace(tokens_BT=jnp.asarray(tokens))), expected)


def test_a_batch_without_counted_tokens_is_no_gradient():
    plain = config.Optimizer(**{**vars(ADAMW), "weight_decay": 0.0})
    packed, state = batch(), fresh(plain)
    after, metrics = step(plain, 4)(state, packed.replace(mask_BT=jnp.zeros((B, T), bool)))
    assert_same(after.params, state.params)
    assert float(metrics["loss/total"]) == float(metrics["grad/norm"]) == float(metrics["update/tokens"]) == 0


# A problem with a known optimum.


@pytest.mark.parametrize("sign, low, high", [(1, 0.95, 1.0), (-1, 0.0, 0.01)])
def test_the_policy_comes_to_write_the_responses(sign, low, high):
    """Responses are always token 2 after token 1; with the rate reversed the policy comes to avoid them."""
    how = config.Optimizer(**{**vars(ADAMW), "learning_rate": sign * 0.05, "weight_decay": 0.0})
    packed = batch()
    following = jnp.roll(packed.mask_BT, -1, axis=1)
    tokens = jnp.where(packed.mask_BT, 2, jnp.where(following, 1, packed.tokens_BT))
    state, run = fresh(how), step(how, 4)
    for _ in range(60):
        state, _ = run(state, packed.replace(tokens_BT=tokens))
    probability = jax.nn.softmax(state.params["embed"][1] @ state.params["table"])[2]
    assert low <= probability <= high
