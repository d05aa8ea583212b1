"""Low-rank adapters: nothing at the start, the merged model afterwards, and PEFT's numbers from PEFT's files."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from configs import tiny
from exprl_jax import hosts, mesh, programs
from exprl_jax.config import Lora
from exprl_jax.data.tokenizer import load_tokenizer
from exprl_jax.model.decoder import LORA_A, LORA_B, Transformer
from exprl_jax.model.lora import adapt, attached, init_adapters
from exprl_jax.records import Context, Draw, Packed, Rows
from exprl_jax.resolve import resolve
from exprl_jax.weights import folder as weights
from exprl_jax.weights import hf_layout
from exprl_jax.weights.adapters import fetch_merged, save_adapters
from exprl_jax.weights.language_model import LanguageModel
from exprl_jax.weights.sources import resolve_model
from tests.oracles import torch_models
from tests.oracles.tiny_decoder import QWEN3, architecture, forward_logits, make_execution, random_params, stack_layers

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
# A scale of 2.5, neither 1 nor alpha nor 1 / rank.
LORA = Lora(rank=3, alpha=7.5, targets=",".join(TARGETS))
LAYOUTS = pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
B, T = 8, 12


def abstract_adapters(arch, execution, lora):
    return jax.eval_shape(lambda: init_adapters(arch, execution, lora, "float32", jax.random.key(0)))


def merged(adapted, execution, dtype):
    """The parameters of an ordinary model that computes the same, on the device."""

    def merge(weights, own):
        made = dict(weights)
        for name in weights:
            if name + LORA_A in own:
                a, b = (own[name + part].astype(jnp.float32) for part in (LORA_A, LORA_B))
                product = jax.vmap(_product)(a, b) if execution.scan_layers else _product(a, b)
                made[name] = weights[name].astype(jnp.float32) + adapted.scale * product
        return made

    whole = adapted.base | {layer: merge(adapted.base[layer], own) for layer, own in adapted.adapters.items()}
    return jax.tree.map(lambda x: x.astype(dtype), whole)


def _product(a, b):
    return jnp.tensordot(a, b, axes=1)


def random_adapters(arch, execution, lora=LORA, seed=1):
    """The same A and B in both layouts, of a size that changes every hidden state."""
    unrolled = abstract_adapters(arch, dataclasses.replace(execution, scan_layers=False), lora)
    random = np.random.default_rng(seed)
    drawn = jax.tree.map(lambda x: jnp.asarray(0.2 * random.standard_normal(x.shape), x.dtype), unrolled)
    return stack_layers(drawn, arch) if execution.scan_layers else drawn


def packed(vocabulary=QWEN3.vocab_size):
    """Two examples a row, the second half of the last slots padding."""
    random = np.random.default_rng(2)
    tokens, targets = random.integers(0, vocabulary, (2, B, T), dtype=np.int32)
    row = [1] * 5 + [2] * 4 + [0] * 3
    segment = np.broadcast_to(np.array(row, np.int32), (B, T))
    position = np.broadcast_to(np.array([0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0], np.int32), (B, T))
    return jax.tree.map(jnp.asarray, Packed(tokens, targets, segment, segment, position))


REAL_BT = np.asarray(packed().segment_BT > 0)


@functools.partial(jax.jit, static_argnums=(1, 2))
def states(params, arch, execution, rows):
    return Transformer(arch, execution).packed_hidden_states(attached(params), rows)


def by_layer(tree, arch, execution):
    """Each layer's part of a model's parameters or of its adapters."""
    if execution.scan_layers:
        return [jax.tree.map(lambda x: x[i], tree["layers"]) for i in range(arch.layers)]
    return [tree[f"layer_{i}"] for i in range(arch.layers)]


# ------------------------------------------------------------------------------------------------ at the start


@LAYOUTS
def test_a_is_uniform_and_b_zero(scan):
    """PEFT's own start: `kaiming_uniform_` with a = √5, which is within ±1/√in."""
    arch = dataclasses.replace(QWEN3, width=64, ffn=96)
    inputs = dict.fromkeys(TARGETS, 64) | {"o": 32, "down": 96}
    seen = []
    for layer in by_layer(
        init_adapters(arch, make_execution(scan), LORA, "float32", jax.random.key(0)), arch, make_execution(scan)
    ):
        assert set(layer) == {name + part for name in TARGETS for part in ("_lora_a", "_lora_b")}
        for name in TARGETS:
            a, bound = np.asarray(layer[f"{name}_lora_a"]), inputs[name] ** -0.5
            assert a.dtype == np.float32 and a.size == inputs[name] * LORA.rank
            assert 0.9 * bound < np.abs(a).max() <= bound
            assert a.std() == pytest.approx(bound / 3**0.5, rel=0.25) and abs(a.mean()) < 0.2 * bound
            assert not np.asarray(layer[f"{name}_lora_b"]).any()
            seen.append(a.ravel()[:5] / bound)
    assert len(np.unique(np.round(seen, 5))) == 5 * len(seen)  # no two targets or layers alike


def test_a_targets_start_hangs_on_neither_layout_nor_the_other_targets():
    few = dataclasses.replace(LORA, targets="down,v")
    every, stacked, some = (
        init_adapters(QWEN3, make_execution(scan), lora, "float32", jax.random.key(5))
        for scan, lora in ((False, LORA), (True, LORA), (False, few))
    )
    for ours, theirs, fewer in zip(
        by_layer(every, QWEN3, make_execution()),
        by_layer(stacked, QWEN3, make_execution(True)),
        by_layer(some, QWEN3, make_execution()),
    ):
        assert set(fewer) == {"down_lora_a", "down_lora_b", "v_lora_a", "v_lora_b"}
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])
        for name in fewer:
            np.testing.assert_array_equal(fewer[name], ours[name])


def model_of(arch, execution):
    made = dataclasses.replace(resolve(tiny.get_config()).policy, execution=execution)
    return LanguageModel(config=made, arch=arch, tokenizer=load_tokenizer("byte"), source=None)


def sampled(params, model, over):
    """Tokens and their log-probs through the run's own programs."""
    random = np.random.default_rng(4)
    sampler = programs.build_sampler(model, over, max_tokens=6, wave=8)
    context = Context(random.integers(0, QWEN3.vocab_size, (8, 5), dtype=np.int32), np.full(8, 5, np.int32))
    rows = Rows(random.integers(0, QWEN3.vocab_size, (8, 2, 1), dtype=np.int32), np.zeros((8, 2), np.int32))
    draw = Draw(
        np.uint32(1),
        np.int32(2),
        np.arange(8, dtype=np.uint32),
        np.full((8, 2), 0.9, np.float32),
        np.full((8, 2), 6, np.int32),
    )
    context, rows, draw = hosts.put_rows(over, (context, rows, draw), 8)
    return jax.device_get(sampler.sample(params, sampler.prefill(params, context), rows, draw)[0])


def make_mesh(data, model):
    """Of the first devices."""
    return jax.sharding.Mesh(np.array(jax.devices()[: data * model]).reshape(data, model), ("data", "model"))


@LAYOUTS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_start_is_the_base_exactly(scan, dtype):
    """To the last bit, operation by operation; compiled, two programs may add in another order."""
    execution = make_execution(scan, dtype=dtype)
    base = random_params(QWEN3, execution)
    start = adapt(LORA, base, init_adapters(QWEN3, execution, LORA, "float32", jax.random.key(0)))
    moved = adapt(LORA, base, random_adapters(QWEN3, execution))
    with jax.disable_jit():
        ours, theirs, others = (np.asarray(states(x, QWEN3, execution, packed())) for x in (start, base, moved))
    np.testing.assert_array_equal(ours, theirs)
    assert (ours != others)[REAL_BT].mean() > 0.9


@pytest.mark.parametrize("scan, dtype, error", [(False, "float32", 1e-5), (True, "bfloat16", 0.02)])
def test_the_start_samples_as_the_base_does(scan, dtype, error):
    execution, over = make_execution(scan, dtype=dtype), make_mesh(1, 1)
    base, model = random_params(QWEN3, execution), model_of(QWEN3, execution)
    start = adapt(LORA, base, init_adapters(QWEN3, execution, LORA, "float32", jax.random.key(0)))
    ours, theirs = sampled(start, model, over), sampled(base, model, over)
    np.testing.assert_array_equal(ours.tokens_PGR, theirs.tokens_PGR)
    np.testing.assert_allclose(ours.logp_PGR, theirs.logp_PGR, atol=error)


def test_without_a_rank_parameters_are_themselves():
    params = random_params(QWEN3, make_execution())
    assert adapt(dataclasses.replace(LORA, rank=0), (), params) is params and attached(params) is params


# ------------------------------------------------------------------------------------------------ what adapters compute


def by_hand(base, adapters, arch, execution, lora=LORA):
    """W + alpha / rank · A·B of every target in float64, and the rest as it is."""
    made = {name: np.asarray(x) for name, x in base.items() if not name.startswith("layer")}
    for i, (own, ab) in enumerate(zip(by_layer(base, arch, execution), by_layer(adapters, arch, execution))):
        layer = {name: np.asarray(x, np.float64) for name, x in own.items()}
        for name in lora.names:
            a, b = (np.asarray(ab[name + part], np.float64) for part in ("_lora_a", "_lora_b"))
            flat = a.reshape(-1, lora.rank) @ b.reshape(lora.rank, -1)
            layer[name] = layer[name] + (lora.alpha / lora.rank) * flat.reshape(layer[name].shape)
        made[f"layer_{i}"] = {name: x.astype(np.float32) for name, x in layer.items()}
    return stack_layers(made, arch) if execution.scan_layers else made


@pytest.mark.parametrize(
    "family, scan, lora",
    [
        ("qwen3", False, LORA),
        ("qwen2", True, LORA),
        ("llama", True, Lora(rank=2, alpha=1.0, targets="o,q,down")),
        ("llama", False, Lora(rank=2, alpha=6.0, targets="gate")),
    ],
)
def test_adapted_is_merged_is_the_sum_by_hand(family, scan, lora):
    """Of all targets and of some, with scales on either side of 1."""
    arch, execution = architecture(family), make_execution(scan)
    base = random_params(arch, execution)
    own = random_adapters(arch, execution, lora)
    adapted = adapt(lora, base, own)
    whole, expected = merged(adapted, execution, "float32"), by_hand(base, own, arch, execution, lora)
    assert jax.tree.structure(whole) == jax.tree.structure(base)
    for (path, a), b, start in zip(
        jax.tree_util.tree_leaves_with_path(whole), jax.tree.leaves(expected), jax.tree.leaves(base), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-6, err_msg=jax.tree_util.keystr(path))
        assert (np.asarray(a) != np.asarray(start)).any() == (path[-1].key in lora.names), path
    got = states(adapted, arch, execution, packed())[REAL_BT]
    np.testing.assert_allclose(got, states(whole, arch, execution, packed())[REAL_BT], atol=1e-5)
    assert np.abs(got - states(base, arch, execution, packed())[REAL_BT]).mean() > 0.05


@LAYOUTS
def test_merging_a_bfloat16_base_rounds_the_sum_once(scan):
    execution = make_execution(scan, dtype="bfloat16")
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_params(QWEN3, execution))
    own = random_adapters(QWEN3, execution)
    whole = merged(adapt(LORA, base, own), execution, "bfloat16")
    expected = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), by_hand(base, own, QWEN3, execution))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(expected), strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=2**-8, atol=1e-6)


# ------------------------------------------------------------------------------------------------ gradients


def gradient_of(compute, params):
    weight = np.random.default_rng(3).standard_normal((B, T, QWEN3.width)).astype(np.float32) * REAL_BT[..., None]
    return jax.jit(jax.grad(lambda params: (weight * jnp.sin(compute(params))).sum()))(params)


@pytest.mark.parametrize("scan, remat", [(False, "none"), (True, "full")])
def test_gradients_are_those_of_the_merged_model(scan, remat):
    """By the chain rule through W + scale · A·B; every A and B of every target and layer has one."""
    execution = make_execution(scan, remat)
    base, own = random_params(QWEN3, execution), random_adapters(QWEN3, execution)
    got = gradient_of(
        lambda own: Transformer(QWEN3, execution).packed_hidden_states(attached(adapt(LORA, base, own)), packed()), own
    )
    expected = gradient_of(
        lambda own: Transformer(QWEN3, execution).packed_hidden_states(
            merged(adapt(LORA, base, own), execution, "float32"), packed()
        ),
        own,
    )
    assert jax.tree.structure(got) == jax.tree.structure(own)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        assert np.abs(b).max() > 1e-3, path
        np.testing.assert_allclose(a, b, atol=1e-4 * max(1, np.abs(b).max()), err_msg=jax.tree_util.keystr(path))


def test_at_the_start_only_b_has_a_gradient():
    execution = make_execution()
    base, own = random_params(QWEN3, execution), init_adapters(QWEN3, execution, LORA, "float32", jax.random.key(0))
    got = gradient_of(
        lambda own: Transformer(QWEN3, execution).packed_hidden_states(attached(adapt(LORA, base, own)), packed()), own
    )
    for path, x in jax.tree_util.tree_leaves_with_path(got):
        assert np.asarray(x).any() == path[-1].key.endswith("_lora_b"), path


# ------------------------------------------------------------------------------------------------ on a mesh

WIDE = dataclasses.replace(QWEN3, vocab_size=64, ffn=32, heads=8, kv_heads=4)


@LAYOUTS
def test_adapters_lie_as_their_targets_do(scan):
    """A as W along what W takes in, B as W along what it gives; the rank is whole."""
    execution, over = make_execution(scan), make_mesh(2, 4)
    of_params = mesh.shard_parameters(Transformer(WIDE, execution).abstract_params("float32"), WIDE, execution, over)
    own = abstract_adapters(WIDE, execution, LORA)
    shardings = mesh.shard_parameters(own, WIDE, execution, over)
    stacked = int(scan)
    for layer in ["layers"] if scan else ["layer_0", "layer_1"]:
        for name in TARGETS:
            a, b = (shardings[layer][name + part].spec for part in ("_lora_a", "_lora_b"))
            assert a[-1] is None and b[stacked] is None
            assert (*a[:-1], *b[stacked + 1 :]) == tuple(of_params[layer][name].spec), name


@functools.cache
def on_mesh(data, model):
    """What the run's programs make of adapters: rollouts, log-probs with their gradient, the merged model."""
    execution, over = make_execution(True), make_mesh(data, model)
    policy = model_of(WIDE, execution)
    base, own = random_params(WIDE, execution), random_adapters(WIDE, execution)
    base, own = (jax.device_put(x, mesh.shard_parameters(x, WIDE, execution, over)) for x in (base, own))
    assert own["layers"]["o_lora_a"].is_fully_replicated == (over.size == 1)

    def objective(own):
        params = adapt(LORA, base, own)
        rows = packed()
        every = jnp.ones(rows.segment_BT.shape, bool)
        return programs.packed_logp_and_entropy(policy.on(over), params, rows, every, temperature=0.9, chunk=32)[
            0
        ].mean()

    adapted = adapt(LORA, base, own)
    out = sampled(adapted, policy, over)
    learned = jax.jit(jax.value_and_grad(objective))(own)
    stored = [fetch_merged(adapted, policy.execution, entry) for entry in hf_layout.stored_leaves(policy.arch)]
    return (*jax.device_get((learned, out.logp_PGR)), stored), out.tokens_PGR


@pytest.mark.parametrize("data, model", [(2, 4), (1, 8)])
def test_the_mesh_changes_nothing(data, model):
    (ours, our_tokens), (theirs, their_tokens) = on_mesh(data, model), on_mesh(1, 1)
    np.testing.assert_array_equal(our_tokens, their_tokens)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


# ------------------------------------------------------------------------------------------------ PEFT

TOKENS = np.random.default_rng(3).integers(0, 97, (2, 40), dtype=np.int32)


class FakeTokenizer:
    vocab_size, bos_id, pad_id, eos_ids = 90, None, 3, (3, 5)

    def save(self, folder):
        (folder / "tokenizer_config.json").write_text("{}")


def load(folder, execution):
    source = resolve_model(str(folder))
    arch = weights.read_architecture(source)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    where = jax.tree.map(lambda _: one, Transformer(arch, execution).abstract_params("float32"))
    return arch, weights.load_params(source, arch, execution, "float32", where)


def test_the_files_hold_torchs_arrangement(tmp_path):
    """[out, in], heads before head size on either side, under PEFT's names."""
    execution, lora = make_execution(True), dataclasses.replace(LORA, targets="o,q")
    own = random_adapters(QWEN3, execution, lora)
    save_adapters(tmp_path / "adapter", jax.device_get(own), QWEN3, execution, lora, "some/base")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * QWEN3.layers
    for i, layer in enumerate(by_layer(own, QWEN3, execution)):
        stem = f"base_model.model.model.layers.{i}.self_attn"
        for name in ("q", "o"):
            a, b = (np.asarray(layer[name + part]) for part in ("_lora_a", "_lora_b"))
            np.testing.assert_array_equal(tensors[f"{stem}.{name}_proj.lora_A.weight"].T, a.reshape(-1, lora.rank))
            np.testing.assert_array_equal(tensors[f"{stem}.{name}_proj.lora_B.weight"].T, b.reshape(lora.rank, -1))
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "some/base" and settings["target_modules"] == ["o_proj", "q_proj"]
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"], settings["bias"]) == (3, 7.5, 0.0, "none")
    assert (settings["peft_type"], settings["task_type"]) == ("LORA", "CAUSAL_LM")


# Of PEFT about transformers, neither of them ours.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "family, scan, targets",
    [
        ("qwen3", False, TARGETS),
        ("qwen3_tied", True, TARGETS),
        ("qwen2", True, TARGETS),
        ("llama", False, ("o", "q", "down")),
    ],
)
def test_peft_computes_the_same_from_our_files(family, scan, targets, tmp_path):
    """Logits with the adapters attached, and merged by either side: in transformers and here."""
    peft = pytest.importorskip("peft")
    model = torch_models.tiny_model(family)
    plain = torch_models.logits(model, TOKENS)
    execution, lora = make_execution(scan), dataclasses.replace(LORA, targets=",".join(targets))
    arch, base = load(torch_models.save(model, tmp_path / "base"), execution)
    own = random_adapters(arch, execution, lora)
    adapted = adapt(lora, base, own)
    save_adapters(tmp_path / "adapter", jax.device_get(own), arch, execution, lora, str(tmp_path / "base"))
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()

    ours = jax.jit(lambda params: forward_logits(attached(params), arch, execution, jnp.asarray(TOKENS)))(adapted)
    np.testing.assert_allclose(ours, torch_models.logits(theirs, TOKENS), atol=1e-4, rtol=0)
    assert np.abs(ours - plain).mean() > 0.1
    weights.export_folder(adapted, arch, execution, tmp_path / "export", FakeTokenizer(), "float32", fetch=fetch_merged)
    exported, united = load_file(tmp_path / "export" / "model.safetensors"), theirs.merge_and_unload().state_dict()
    assert exported.keys() == united.keys() - ({"lm_head.weight"} if arch.tied else set())
    for name, tensor in exported.items():
        np.testing.assert_allclose(tensor, united[name].numpy(), atol=1e-6, err_msg=name)
