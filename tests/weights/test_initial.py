"""A model from scratch: sizes of the first weights, hidden states and logits; the same weights on every mesh."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from oracles import torch_models

from exprl_jax.config import Execution, Model
from exprl_jax.data.tokenizer import load_tokenizer
from exprl_jax.mesh import mesh_over
from exprl_jax.model.decoder import logits
from exprl_jax.records import Packed
from exprl_jax.weights import folder as weights
from exprl_jax.weights.language_model import load_params, open_model

SIZES = dict(hidden_size=128, intermediate_size=320, num_hidden_layers=3, head_dim=16, vocab_size=264)
SIZES |= dict(num_attention_heads=4, num_key_value_heads=4)
# By hand, from docs/data.md: 128 wide, 4 heads of 16, 320 in the feed-forward, 3 layers.
DEVIATIONS = {
    "embed": 1 / math.sqrt(128),
    "unembed": 1 / math.sqrt(128),
    **dict.fromkeys(("q", "k", "v", "gate", "up"), 1 / math.sqrt(128)),
    "o": 1 / math.sqrt(4 * 16 * 2 * 3),
    "down": 1 / math.sqrt(320 * 2 * 3),
}


def model(weights, scan=False, dtype="float32"):
    execution = Execution(scan_layers=scan, compute_dtype="float32", remat="none", kv_dtype="compute")
    return Model(str(weights), execution, dtype, "2025-02-03")


def description(folder, kind="qwen3", **sizes):
    """A folder that says what a model is, without weights."""
    _, shape = torch_models.FAMILIES[kind]
    transformers.AutoConfig.for_model(kind, **shape | SIZES | sizes).save_pretrained(folder)
    load_tokenizer("byte").save(folder)
    return folder


def first_weights(folder, devices=(1, 1), seed=3, scan=False, dtype="float32"):
    opened = open_model(model(f"random:{folder}", scan, dtype))
    mesh = mesh_over(jax.devices()[: math.prod(devices)], *devices)
    return opened, mesh, load_params(opened, mesh, seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return description(tmp_path_factory.mktemp("new"), "qwen3", tie_word_embeddings=False)


def test_every_matrix_has_the_deviation_of_the_docs(folder):
    _, _, params = first_weights(folder)
    drawn = {(layer, key): x for layer, own in params.items() if isinstance(own, dict) for key, x in own.items()}
    drawn |= {("", key): x for key, x in params.items() if not isinstance(x, dict)}
    assert {key for _, key in drawn} > set(DEVIATIONS)
    for (layer, key), x in drawn.items():
        x = np.asarray(x, np.float64)
        if key in DEVIATIONS:  # five standard errors of each
            expected = DEVIATIONS[key]
            assert abs(x.std() / expected - 1) < 5 / math.sqrt(2 * x.size), (layer, key, x.std(), expected)
            assert abs(x.mean()) < 5 * expected / math.sqrt(x.size), (layer, key)
        else:
            np.testing.assert_array_equal(x, 0 if key.endswith("bias") else 1)
    # No two matrices are the same numbers, in one layer or in two.
    flat = [np.asarray(x).ravel()[:20] / DEVIATIONS[key] for (_, key), x in drawn.items() if key in DEVIATIONS]
    assert len({tuple(np.round(x, 3)) for x in flat}) == len(flat)


def test_biases_start_at_zero(tmp_path):
    _, _, params = first_weights(description(tmp_path, "qwen2"))
    for name in ("q_bias", "k_bias", "v_bias"):
        assert not np.asarray(params["layer_1"][name]).any()


@pytest.mark.parametrize("tied", [False, True])
def test_the_first_logits_are_of_size_one(tied, tmp_path):
    """Of any depth: so the first loss is about ln V + 1/2, not that of a confident guess."""
    folder = description(tmp_path / "new", tie_word_embeddings=tied, num_hidden_layers=6)
    opened, mesh, params = first_weights(folder)
    tokens = np.random.default_rng(0).integers(0, 256, (2, 64), np.int32)
    position = np.tile(np.arange(64, dtype=np.int32), (2, 1))
    ones = np.ones_like(tokens)
    transformer = opened.on(mesh)

    def forward(params):
        packed = Packed(*map(jnp.asarray, (tokens, tokens, ones, ones, position)))
        hidden = transformer.packed_hidden_states(params, packed)
        return logits(hidden, transformer.unembedding(params))

    made = np.asarray(jax.jit(forward)(params), np.float64)
    loss = np.log(np.exp(made[:, :-1]).sum(-1)) - np.take_along_axis(made[:, :-1], tokens[:, 1:, None], -1)[..., 0]
    assert 0.8 < made.std() < 1.25
    assert abs(loss.mean() - math.log(264) - 0.5) < 0.25


def test_layers_add_as_much_to_the_residual_however_many_they_are(tmp_path):
    """`final_norm` hides the residual's size, so it is read off before: variances of 2 and of 8 layers differ little,
    where each without its √(2L) would add as much again."""
    sizes = []
    for layers in (2, 8):
        folder = description(tmp_path / str(layers), num_hidden_layers=layers)
        _, _, params = first_weights(folder)
        x = np.random.default_rng(1).normal(size=(256, 128))
        total = 0
        for i in range(layers):
            own = {key: np.asarray(value, np.float64) for key, value in params[f"layer_{i}"].items()}
            gate, up = x @ own["gate"], x @ own["up"]
            total += ((gate / (1 + np.exp(-gate)) * up) @ own["down"]).var()
        sizes.append(total)
    assert abs(sizes[0] / sizes[1] - 1) < 0.2, sizes


def test_the_weights_depend_on_seed_and_architecture_alone(folder):
    _, _, plain = first_weights(folder)

    def same(ours, theirs, rtol=1e-6):
        """Beyond rounding: another program may contract a product another way."""
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol), ours, theirs)

    _, _, sharded = first_weights(folder, devices=(2, 4))
    assert len(sharded["layer_0"]["gate"].sharding.device_set) == 8
    assert sharded["layer_0"]["gate"].addressable_shards[0].data.size == plain["layer_0"]["gate"].size // 8
    same(plain, sharded)
    _, _, scanned = first_weights(folder, devices=(2, 4), scan=True)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *[plain[f"layer_{i}"] for i in range(3)])
    same(stacked, scanned["layers"])
    same(plain["embed"], scanned["embed"])
    _, _, narrow = first_weights(folder, dtype="bfloat16")
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(narrow))
    same(plain, jax.tree.map(lambda x: x.astype(jnp.float32), narrow), rtol=2**-8)
    _, _, other = first_weights(folder, seed=4)
    assert (np.asarray(other["layer_0"]["q"]) != np.asarray(plain["layer_0"]["q"])).all()


def test_an_export_of_new_weights_is_an_ordinary_folder(folder, tmp_path):
    opened, _, params = first_weights(folder)
    weights.export_folder(params, opened.arch, opened.execution, tmp_path / "out", opened.tokenizer, "float32")
    again = open_model(model(tmp_path / "out"))
    assert (again.arch, again.tokenizer.vocab_size) == (opened.arch, opened.tokenizer.vocab_size)
    read = load_params(again, mesh_over(jax.devices()[:1], 1, 1), 0)
    jax.tree.map(np.testing.assert_array_equal, params, read)
    # Named with `random:`, what lies in it of weights decides nothing.
    names = [file.name for file in open_model(model(f"random:{tmp_path}/out")).source.files]
    assert {"config.json", "tokenizer.json", "generation_config.json"} <= set(names)
    assert "model.safetensors" in [file.name for file in again.source.files] and "model.safetensors" not in names


def test_folders_that_cannot_start_are_named(folder, tmp_path):
    def refused(name):
        with pytest.raises(ValueError) as error:
            open_model(model(name))
        assert "\n" not in str(error.value)
        return str(error.value)

    # A real model whose weights are missing does not become a random one.
    assert refused(folder).endswith(f"for new, random weights name random:{folder}")
    expected = "random:mistral, or random:<folder> with config.json and tokenizer in the folder"
    assert refused(f"random:{tmp_path}/nowhere").endswith(expected) and refused("random:").endswith(expected)
    assert "holds no config.json" in refused(f"random:{tmp_path}")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((folder / "config.json").read_text())
    assert "no usable tokenizer" in refused(f"random:{bare}")
    load_tokenizer("byte").save(bare)
    (bare / "config.json").write_text((folder / "config.json").read_text().replace("264", "100"))
    assert "the tokenizer has 261 tokens, the model's embedding only 100" in refused(f"random:{bare}")
