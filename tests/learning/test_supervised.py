"""The supervised update, against torch, numpy and the schedule of transformers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from exprl_jax import config, programs
from exprl_jax.data.packing import Example, assign_rows, fill_rows
from exprl_jax.hosts import put_microbatches
from exprl_jax.learning.supervised import METRICS, sft_step
from exprl_jax.learning.update import learning_rate, make_optimizer
from exprl_jax.mesh import make_mesh, replicated
from exprl_jax.model.decoder import Transformer
from exprl_jax.records import Lesson, TrainState
from exprl_jax.weights import folder as weights
from exprl_jax.weights.language_model import LanguageModel
from exprl_jax.weights.sources import resolve_model
from tests.oracles import learning_numpy as oracle
from tests.oracles import torch_models
from tests.oracles.tiny_decoder import QWEN3, make_execution, random_params

T, V, D = 9, 7, 4
ADAMW = config.Optimizer(
    learning_rate=0.05, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip_norm=1.0, schedule="constant", warmup=0.0
)
COSINE = config.Optimizer(**{**vars(ADAMW), "schedule": "cosine", "warmup": 0.1})


def bigram(params, part):
    """A policy whose next token depends on the last one; what it says of padding is NaN."""
    packed = part.packed
    table = jax.nn.log_softmax(params["embed"] @ params["table"])
    entropy = -(jnp.exp(table) * table).sum(-1)[packed.tokens_BT]
    logp = table[packed.tokens_BT, packed.target_BT]
    return (jnp.where(packed.segment_BT > 0, x, jnp.nan) for x in (logp, entropy))


def examples(seed=0, vocabulary=V):
    """Of very different numbers of counted tokens."""
    rng = np.random.default_rng(seed)
    sizes = [(rng.integers(1, 5), rng.integers(1, 5)) for _ in range(13)]
    return [Example(*(tuple(rng.integers(0, vocabulary, n).tolist()) for n in size)) for size in sizes]


def lesson(made=None, row_tokens=T, microbatch=8, apart=False, spare=0):
    """Packed examples; `apart` gives each a row of its own, `spare` microbatches stay empty."""
    made = examples() if made is None else made
    each = np.arange(len(made))
    own = [len(e.prompt) + len(e.response) - 1 for e in made]
    row = each if apart else assign_rows(np.zeros(len(made)), own, each, row_tokens)
    filled = fill_rows(
        made, each, row, (-(-(row.max() + 1) // microbatch) + spare, microbatch, row_tokens), share=False
    )
    mask = filled.spread([np.ones(len(e.response), bool) for e in made], bool)
    return jax.tree.map(jnp.asarray, Lesson(filled.packed, mask, np.zeros(mask.shape, np.float32), filled.used))


def fresh(settings=ADAMW, steps=40):
    embed, table = jax.random.normal(jax.random.key(0), (V, D)), jax.random.normal(jax.random.key(1), (D, V))
    params = {"embed": embed, "table": table}
    return TrainState(jnp.int32(3), params, make_optimizer(settings, steps).init(params), jnp.int32(0))


@functools.cache
def step(settings=ADAMW, logp_fn=bigram, steps=40):
    rate = learning_rate(settings, steps)
    return jax.jit(
        functools.partial(
            sft_step,
            logp_fn=logp_fn,
            optimizer=make_optimizer(settings, steps),
            keep_sharded=lambda tree: tree,
            rate=rate if callable(rate) else lambda made: rate,
        )
    )


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
    arch, settings = weights.read_architecture(source), make_execution()
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: here, Transformer(arch, settings).abstract_params("float32"))
    params = weights.load_params(source, arch, settings, "float32", shardings)
    made = examples(1, 97)
    total, count = torch.zeros(()), 0
    for prompt, response in made:
        tokens = torch.tensor([[*prompt, *response]])
        labels = torch.tensor([-100] * len(prompt) + list(response))
        logits = model(tokens).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum")
        count += len(response)
    loss = total / count
    loss.backward()

    logp_fn = model_logp(arch, settings)
    optimizer = config.Optimizer(**{**vars(ADAMW), "clip_norm": 1e9})
    state = TrainState(jnp.int32(0), params, make_optimizer(optimizer, 4).init(params), jnp.int32(0))
    after, metrics = step(optimizer, logp_fn)(state, lesson(made, 12, 2))
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
def model_logp(arch, settings, data=1, model=1):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[: data * model]).reshape(data, model), ("data", "model"))
    policy = LanguageModel(config.Model("unread", settings, "float32", ""), arch, tokenizer=None, source=None)
    return functools.partial(programs.lesson_logp_and_entropy, policy.on(mesh), chunk=24, digit_ids=())


def test_sharded_is_unsharded():
    settings, batch = make_execution(scan_layers=True, remat="full"), lesson(microbatch=4)
    params, optimizer = random_params(QWEN3, settings), make_optimizer(ADAMW, 40)
    state = TrainState(jnp.int32(0), params, optimizer.init(params), jnp.int32(0))
    expected, metrics = step(ADAMW, model_logp(QWEN3, settings))(state, batch)
    mesh = make_mesh(config.Mesh(data=4, model=2))
    given = jax.device_put(state, replicated(mesh)), put_microbatches(mesh, jax.tree.map(np.asarray, batch))
    result, sharded_metrics = step(ADAMW, model_logp(QWEN3, settings, 4, 2))(*given)
    assert_close(sharded_metrics, metrics, rtol=1e-4)
    # Adam's first step is ±rate where the gradient is near 0, so the moments are compared and not the parameters.
    assert_close(result.opt_state[1][0].mu, expected.opt_state[1][0].mu, rtol=1e-3, atol=1e-6)


# Against the equations.


def test_metrics_match_the_equations():
    state = fresh()
    _, metrics = step()(state, lesson(microbatch=2))
    assert set(metrics) == set(METRICS) and all(x.shape == () and x.dtype == jnp.float32 for x in metrics.values())
    embed, table = (np.asarray(state.params[name], np.float64) for name in ("embed", "table"))
    logp = np.array([oracle.log_softmax(row) for row in embed @ table])
    counted = [pair for e in examples() for pair in zip((e.prompt[-1], *e.response), e.response)]
    expected = {
        "loss/total": -np.mean([logp[pair] for pair in counted]),
        "policy/entropy": np.mean([-(np.exp(logp[a]) * logp[a]).sum() for a, _ in counted]),
        "update/tokens": len(counted),
        "update/skipped": 0,
        "update/learning_rate": 0.05,
    }
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize(
    "settings",
    [
        dict(microbatch=1),
        dict(microbatch=4),
        dict(apart=True, microbatch=2),
        dict(row_tokens=40, microbatch=2),
        dict(spare=1),
    ],
)
def test_how_examples_are_packed_changes_nothing(settings):
    """In how many microbatches, each in a row of its own, in wider rows, with a microbatch to spare."""
    state, metrics = step()(fresh(), lesson())
    cut_state, cut_metrics = step()(fresh(), lesson(**settings))
    assert_close(cut_metrics, metrics)
    assert_close(cut_state.params, state.params, atol=1e-5)


def test_unused_microbatches_are_not_computed():
    """The bigram says NaN of padding, and of a token that is none; there it would be counted."""
    batch = lesson(microbatch=2, spare=1)
    expected = step()(fresh(), batch)
    wrong = batch.replace(packed=batch.packed.replace(tokens_BT=batch.packed.tokens_BT.at[-1].set(3)))
    assert_same(step()(fresh(), wrong), expected)
    counted = wrong.replace(mask_MBT=wrong.mask_MBT.at[-1].set(True), used=wrong.used + 1)
    assert float(step()(fresh(), counted)[1]["update/skipped"]) == 1


# The schedule.


@pytest.mark.parametrize("steps, warmup", [(40, 0.1), (94, 0.1), (4, 0.0), (10, 0.5)])
def test_the_cosine_schedule_is_the_released_one(steps, warmup):
    settings = config.Optimizer(**{**vars(COSINE), "warmup": warmup})
    rate, rise = learning_rate(settings, steps), round(warmup * steps)
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
    settings = config.Optimizer(**{**vars(COSINE), "weight_decay": 0.0, "clip_norm": 1e9})
    state, batch, run = fresh(settings, 5).replace(step=jnp.int32(0)), lesson(), step(settings, bigram, 5)
    rates, moved = [], []
    for attempt in range(4):
        start = state
        if attempt == 2:
            bad = start.replace(params=start.params | {"table": start.params["table"].at[0].set(jnp.inf)})
            after, metrics = run(bad, batch)
            assert float(metrics["update/skipped"]) == 1
            assert_same(after.params, bad.params)
            state = start.replace(step=start.step + 1, skipped=after.skipped)
        else:
            state, metrics = run(start, batch)
            state = state.replace(step=state.step + 1)
            moved.append(np.abs(state.params["table"] - start.params["table"]).max())
        rates.append(float(metrics["update/learning_rate"]))
    expected = [0.05 * 0.5 * (1 + np.cos(np.pi * made / 5)) for made in (0, 1, 2, 2)]
    assert rates == pytest.approx(expected, rel=1e-5)
    assert int(state.skipped) == 1 and int(state.opt_state[1][0].count) == 3
    assert moved[0] == pytest.approx(0.05, rel=1e-3)  # Adam's first step is the rate itself


# What must not change anything.


def test_what_is_outside_the_mask_is_not_read():
    batch, run = lesson(microbatch=2), step()
    expected, mask, packed = run(fresh(), batch), batch.mask_MBT, batch.packed
    assert (~mask & (packed.segment_BT > 0)).any()

    def other(x):
        return jnp.where(mask, x, (x + 1) % V)

    changed = packed.replace(tokens_BT=other(packed.tokens_BT), target_BT=other(packed.target_BT))
    assert_same(run(fresh(), batch.replace(packed=changed)), expected)


def test_a_batch_without_counted_tokens_is_no_gradient():
    plain = config.Optimizer(**{**vars(ADAMW), "weight_decay": 0.0})
    batch, state = lesson(), fresh(plain)
    after, metrics = step(plain)(state, batch.replace(mask_MBT=jnp.zeros_like(batch.mask_MBT)))
    assert_same(after.params, state.params)
    assert float(metrics["loss/total"]) == float(metrics["grad/norm"]) == float(metrics["update/tokens"]) == 0


# A problem with a known optimum.


@pytest.mark.parametrize("sign, low, high", [(1, 0.95, 1.0), (-1, 0.0, 0.01)])
def test_the_policy_comes_to_write_the_responses(sign, low, high):
    """Responses are always token 2 after token 1; with the rate reversed the policy comes to avoid them."""
    settings = config.Optimizer(**{**vars(ADAMW), "learning_rate": sign * 0.05, "weight_decay": 0.0})
    batch, state, run = lesson([Example((*e.prompt, 1), (2,)) for e in examples()]), fresh(settings), step(settings)
    for _ in range(60):
        state, _ = run(state, batch)
    probability = jax.nn.softmax(state.params["embed"][1] @ state.params["table"])[2]
    assert low <= probability <= high
