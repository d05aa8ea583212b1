"""Weights in and out: bitwise round trips, sharded loading, strictness at the door."""

import json
import shutil
import struct

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from jax.sharding import NamedSharding, PartitionSpec
from oracles import torch_models

from exprl_jax.architecture import RopeScaling
from exprl_jax.config import Execution
from exprl_jax.model.decoder import Transformer
from exprl_jax.weights import folder as weights
from exprl_jax.weights.families import FAMILIES
from exprl_jax.weights.hf_layout import parse_config, render_config
from exprl_jax.weights.sources import resolve_model

UNROLLED = Execution(scan_layers=False, compute_dtype="float32", remat="none", kv_dtype="compute")
SCANNED = Execution(scan_layers=True, compute_dtype="float32", remat="none", kv_dtype="compute")


class FakeTokenizer:
    vocab_size, bos_id, pad_id, eos_ids = 90, None, 3, (5,)

    def save(self, folder):
        (folder / "tokenizer_config.json").write_text("{}")


class BrokenTokenizer(FakeTokenizer):
    def save(self, folder):
        raise ValueError("the tokenizer has no files")


def read(folder, execution, dtype="float32", shardings=None):
    source = resolve_model(str(folder))
    arch = weights.read_architecture(source)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = shardings or jax.tree.map(lambda _: one, Transformer(arch, execution).abstract_params(dtype))
    return arch, weights.load_params(source, arch, execution, dtype, shardings)


def tensors(folder):
    """{name: tensor} of all safetensors files of a folder, read by the safetensors library."""
    arrays = {}
    for path in folder.glob("*.safetensors"):
        arrays |= safetensors.torch.load_file(path)
    return arrays


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A float32 Qwen3, the family with most kinds of tensor."""
    return torch_models.save(torch_models.tiny_model("qwen3"), tmp_path_factory.mktemp("qwen3"))


@pytest.fixture
def copy(folder, tmp_path):
    """A copy to damage."""
    return shutil.copytree(folder, tmp_path / "copy")


def edit_tensors(folder, edit):
    path = folder / "model.safetensors"
    content = safetensors.torch.load_file(path)
    edit(content)
    safetensors.torch.save_file(content, path, metadata={"format": "pt"})


# --- Round trips.


@pytest.mark.parametrize("execution", [UNROLLED, SCANNED], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen3", "qwen2_tied"])
@pytest.mark.parametrize("shards", ["one", "several"])
def test_round_trip_is_bitwise(family, dtype, execution, shards, tmp_path):
    model = torch_models.tiny_model(family)
    size = "5GB" if shards == "one" else "20KB"
    source = torch_models.save(model, tmp_path / "in", dtype, max_shard_size=size)
    assert (source / "model.safetensors").exists() == (shards == "one")
    arch, params = read(source, execution, dtype)
    limit = 5_000_000_000 if shards == "one" else 20_000
    weights.export_folder(params, arch, execution, tmp_path / "out", FakeTokenizer(), dtype, shard_bytes=limit)
    before, after = tensors(source), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert tensor.shape == after[name].shape
        bits = torch.int16 if dtype == "bfloat16" else torch.int32
        assert torch.equal(tensor.view(bits), after[name].view(bits)), name
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert (files == ["model.safetensors"]) == (shards == "one")
    if shards == "several":
        index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
        assert sorted(set(index["weight_map"].values())) == files
        assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in after.values())
        for path in (tmp_path / "out").glob("*.safetensors"):
            held = safetensors.torch.load_file(path)
            assert {name for name, file in index["weight_map"].items() if file == path.name} == held.keys()
            # A file exceeds the limit only for a tensor that is itself larger.
            assert len(held) == 1 or sum(t.numel() * t.element_size() for t in held.values()) <= limit


def test_bfloat16_parameters_are_the_rounded_float32_ones(folder):
    _, wide = read(folder, SCANNED)
    _, narrow = read(folder, SCANNED, "bfloat16")
    expected = jax.tree.map(lambda x: torch.from_numpy(np.array(x)).bfloat16().float().numpy(), wide)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x, np.float32), y), narrow, expected)


def test_float16_files_load(tmp_path):
    source = torch_models.save(torch_models.tiny_model("llama"), tmp_path, "float16")
    _, params = read(source, UNROLLED)
    expected = tensors(source)["model.layers.1.mlp.down_proj.weight"].float().numpy().T
    np.testing.assert_array_equal(params["layer_1"]["down"], expected)


# --- Sharded.


def mesh_shardings(arch, execution, mesh, shard_layers=False):
    """Every axis that divides is sharded, over both mesh axes in turn: more than any real rule does."""

    def spec(path, leaf):
        names, free = [], list(mesh.axis_names)
        for axis, size in enumerate(leaf.shape):
            stacked = path[0].key == "layers" and axis == 0 and not shard_layers
            fits = [name for name in free if size % mesh.shape[name] == 0 and not stacked]
            names.append(fits[0] if fits else None)
            free = [name for name in free if name not in fits[:1]]
        return NamedSharding(mesh, PartitionSpec(*names))

    return jax.tree.map_with_path(spec, Transformer(arch, execution).abstract_params("float32"))


@pytest.mark.parametrize("shape", [(1, 8), (2, 4), (4, 2), (8, 1)])
@pytest.mark.parametrize(
    ("execution", "shard_layers"),
    [(UNROLLED, False), (SCANNED, False), (SCANNED, True)],
    ids=["unrolled", "scanned", "scanned, layers sharded"],
)
def test_sharded_load_is_the_unsharded_load(folder, shape, execution, shard_layers):
    mesh = jax.make_mesh(shape, ("data", "model"))
    arch, whole = read(folder, execution)
    shardings = mesh_shardings(arch, execution, mesh, shard_layers)
    assert sum(not sharding.is_fully_replicated for sharding in jax.tree.leaves(shardings)) > 4
    _, sharded = read(folder, execution, shardings=shardings)
    jax.tree.map(np.testing.assert_array_equal, sharded, whole)
    assert jax.tree.map(lambda x: x.sharding, sharded) == shardings


@pytest.mark.parametrize("axis_type", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
@pytest.mark.parametrize("execution", [UNROLLED, SCANNED], ids=["unrolled", "scanned"])
def test_sharded_parameters_export_as_they_came(folder, execution, axis_type, tmp_path):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type, axis_type))
    arch = weights.read_architecture(resolve_model(str(folder)))
    _, sharded = read(folder, execution, shardings=mesh_shardings(arch, execution, mesh))
    weights.export_folder(sharded, arch, execution, tmp_path / "out", FakeTokenizer(), "float32")
    assert all(torch.equal(t, tensors(folder)[name]) for name, t in tensors(tmp_path / "out").items())


def test_a_device_reads_only_its_own_part(folder, monkeypatch):
    """Counts the elements asked of the files when each of 8 devices holds an eighth of the columns."""
    asked = []

    class Spy:
        def __init__(self, array):
            self.array, self.shape = array, array.shape

        def __getitem__(self, index):
            part = self.array[index]
            asked.append(part.size)
            return part

    opened = weights._open_folder
    monkeypatch.setattr(weights, "_open_folder", lambda source: {k: Spy(v) for k, v in opened(source).items()})
    mesh = jax.make_mesh((8,), ("data",))
    arch = weights.read_architecture(resolve_model(str(folder)))
    by_width = {"q": 0, "k": 0, "v": 0, "o": 2, "gate": 0, "up": 0, "down": 1, "embed": 1, "unembed": 0}

    def spec(path, leaf):
        axis = by_width.get(path[-1].key, 0)
        return NamedSharding(mesh, PartitionSpec(*([None] * axis), "data"))

    abstract = Transformer(arch, UNROLLED).abstract_params("float32")
    for layer in ("layer_0", "layer_1"):
        del abstract[layer]["q_norm"], abstract[layer]["k_norm"]  # 12 long: not divisible
    shardings = jax.tree.map_with_path(spec, abstract)
    for layer in ("layer_0", "layer_1"):
        shardings[layer] |= {key: NamedSharding(mesh, PartitionSpec()) for key in ("q_norm", "k_norm")}
    read(folder, UNROLLED, shardings=shardings)
    # Each element once, and not eight times.
    assert sum(asked) == arch.parameters


# --- Strictness.


def test_missing_extra_and_misshaped_tensors_are_named_together(copy):
    def damage(content):
        del content["model.layers.1.self_attn.q_norm.weight"], content["lm_head.weight"]
        content["model.layers.0.mlp.extra.weight"] = torch.zeros(3)
        content["model.norm.weight"] = torch.zeros(41)

    edit_tensors(copy, damage)
    with pytest.raises(ValueError, match="2 missing: .*1 extra: .*1 mis-shaped: ") as caught:
        read(copy, SCANNED)
    message = str(caught.value)
    for part in ("layers.1.self_attn.q_norm", "lm_head.weight", "mlp.extra", "model.norm.weight [41] instead of [40]"):
        assert part in message
    assert "\n" not in message


def test_many_missing_tensors_are_counted(copy):
    edit_tensors(copy, lambda content: [content.pop(name) for name in list(content) if "layers.1" in name])
    with pytest.raises(ValueError, match="11 missing: .* and 6 more"):
        read(copy, SCANNED)


def test_rotary_buffers_of_old_checkpoints_are_ignored(copy):
    edit_tensors(copy, lambda content: content.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}))
    read(copy, UNROLLED)


def test_a_tied_model_may_store_its_unembedding_but_no_other(tmp_path):
    source = torch_models.save(torch_models.tiny_model("qwen2_tied"), tmp_path)
    embed = tensors(source)["model.embed_tokens.weight"]
    edit_tensors(source, lambda content: content.update({"lm_head.weight": embed.clone()}))
    _, params = read(source, SCANNED)
    assert "unembed" not in params
    edit_tensors(source, lambda content: content["lm_head.weight"].view(-1)[-1].add_(1))
    with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight.*tie_word_embeddings"):
        read(source, SCANNED)


def test_damaged_folders(copy):
    path = copy / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="model.safetensors is not a readable safetensors file .*fetch it again"):
        read(copy, SCANNED)
    path.write_bytes(whole[:40])
    with pytest.raises(ValueError, match="not a readable safetensors file .*fetch it again"):
        read(copy, SCANNED)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="not a readable safetensors file .*fetch it again"):
        read(copy, SCANNED)
    path.unlink()
    with pytest.raises(ValueError, match="holds neither model.safetensors nor model.safetensors.index.json"):
        read(copy, SCANNED)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="1 files of model.safetensors.index.json are absent: model-00001"):
        read(copy, SCANNED)
    (copy / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        read(copy, SCANNED)
    (copy / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        read(copy, SCANNED)
    (copy / "config.json").write_text('{"a":' * 100_000)
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        read(copy, SCANNED)
    (copy / "config.json").write_bytes(b'{"model_type": "\xff"}')
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        read(copy, SCANNED)
    (copy / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a list, expected a JSON object"):
        read(copy, SCANNED)


DAMAGED = {
    "a list": "[]",
    "text": '"tensors"',
    "no object": '{"model.norm.weight": 5}',
    "no dtype": '{"model.norm.weight": {"shape": [1], "data_offsets": [0, 4]}}',
    "no such dtype": '{"model.norm.weight": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}',
    "a shape of text": '{"model.norm.weight": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}}',
    "another size": '{"model.norm.weight": {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]}}',
    "offsets reversed": '{"model.norm.weight": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
    "beyond the end": '{"model.norm.weight": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}',
    "a shape that overflows": '{"a": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 0]}}',
    "deep": '{"a":' * 100_000,
}


@pytest.mark.parametrize("header", DAMAGED.values(), ids=DAMAGED)
@pytest.mark.parametrize("length", [None, 2**62])
def test_damaged_headers(copy, header, length):
    size = len(header) if length is None else length
    (copy / "model.safetensors").write_bytes(struct.pack("<Q", size) + header.encode() + bytes(4))
    with pytest.raises(ValueError, match="model.safetensors is not a readable safetensors file .*fetch it") as caught:
        read(copy, SCANNED)
    assert "\n" not in str(caught.value)


def test_other_dtypes_are_refused(copy):
    edit_tensors(copy, lambda content: content.update({"model.norm.weight": torch.zeros(40, dtype=torch.int8)}))
    with pytest.raises(ValueError, match="model.norm.weight in model.safetensors has dtype I8; expected F32, F16"):
        read(copy, SCANNED)


# --- config.json.

LLAMA = {
    "model_type": "llama",
    "vocab_size": 10,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("fields", "theta", "scaling"),
    [
        ({}, 10000.0, None),
        ({"rope_theta": 7.0, "rope_scaling": None}, 7.0, None),
        ({"rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2}}, 7.0, RopeScaling("linear", 2.0)),
        (
            {"rope_theta": 7.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            7.0,
            RopeScaling("llama3", 8.0, 1.0, 4.0, 32),
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, 7.0, None),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 7.0, **LLAMA3}},
            7.0,
            RopeScaling("llama3", 8.0, 1.0, 4.0, 32),
        ),
    ],
)
def test_rotary_fields_of_transformers_4_and_5(fields, theta, scaling):
    arch = parse_config(LLAMA | fields, "x")
    assert (arch.rope_theta, arch.rope_scaling) == (theta, scaling)
    assert (arch.kv_heads, arch.head_size, arch.tied) == (2, 4, False)
    assert parse_config(render_config(arch, "float32", bos_id=2, eos_ids=(1,), pad_id=0), "x") == arch


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model_type": "qwen3_moe"}, "model_type 'qwen3_moe'"),
        ({"model_type": None}, "model_type None"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"use_sliding_window": True}, "use_sliding_window True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"num_experts": 8}, "num_experts 8"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope scaling 'yarn'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, "rope scaling 'dynamic'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ between layers"),
        ({"rope_scaling": {"type": "linear"}}, "rope scaling 'linear' without 'factor'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"num_key_value_heads": 3, "num_attention_heads": 4}, "4 attention heads with 3 key-value heads"),
        ({"head_dim": 5}, "heads of size 5"),
        ({"num_attention_heads": 16}, "heads of size 0"),
        ({"model_type": ["llama"]}, "model_type ['llama']"),
        ({"model_type": {}}, "model_type {}"),
        ({"layer_types": 5}, "layer_types 5"),
        ({"layer_types": [["full_attention"]]}, "layer_types [['full"),
        ({"rope_scaling": ["linear", 2.0]}, "rotary positions ['linear', 2.0]"),
        ({"rope_parameters": "default"}, "rotary positions 'default'"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, "rope scaling ['linear']"),
        ({"model_type": "mistral", "num_key_value_heads": 1, "sliding_window": 32}, "sliding_window 32"),
        ({"model_type": "mistral", "num_key_value_heads": 1}, "lacks sliding_window"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"model_type": "qwen3", "num_key_value_heads": 1}, "lacks head_dim"),
        ({"model_type": "qwen2"}, "lacks num_key_value_heads"),
    ],
)
def test_unsupported_architectures_are_named(fields, named):
    with pytest.raises(ValueError) as caught:
        parse_config(LLAMA | fields, "some/model")
    assert named in str(caught.value) and "some/model" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", [key for key in LLAMA if key not in ("model_type", "rms_norm_eps")])
@pytest.mark.parametrize("value", ["big", "8", 8.0, 8.5, True, 0, -8, [8], {}, float("nan"), float("inf")], ids=repr)
def test_sizes_are_positive_whole_numbers(key, value):
    with pytest.raises(ValueError) as caught:
        parse_config(LLAMA | {key: value}, "some/model")
    assert f"model some/model: config.json: {key} is {value!r}, expected a positive whole number" == str(caught.value)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5', expected a positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps is -1e-05"),
        ({"head_dim": "wide"}, "head_dim is 'wide'"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"rope_theta": "1e4"}, "rope_theta is '1e4'"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor is '2'"),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": []}}, "low_freq_factor is []"),
        ({"partial_rotary_factor": "half"}, "partial_rotary_factor is 'half'"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', expected true or false"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
    ],
)
def test_nonsense_is_named(fields, named):
    with pytest.raises(ValueError) as caught:
        parse_config(LLAMA | fields, "some/model")
    assert str(caught.value).startswith(f"model some/model: config.json: {named}")


def test_more_layers_than_there_are_tensors_are_not_counted_up_to(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**15, "layer_types": None}))
    with pytest.raises(ValueError, match="1000000000000000 layers, but only .. tensors"):
        read(copy, SCANNED)


# --- Vocabulary.


def test_vocabulary_and_tokenizer_must_agree():
    arch = parse_config(LLAMA | {"vocab_size": 90}, "x")
    weights.check_vocabulary(arch, FakeTokenizer())
    with pytest.raises(ValueError, match="the tokenizer has 90 tokens, the model's embedding only 89"):
        weights.check_vocabulary(parse_config(LLAMA | {"vocab_size": 89}, "x"), FakeTokenizer())

    class Outside(FakeTokenizer):
        eos_ids = (5, 90)

    with pytest.raises(ValueError, match=r"ids \[90\] lie outside"):
        weights.check_vocabulary(arch, Outside())


# --- Export doors.


def test_a_failed_export_leaves_nothing_and_keeps_the_earlier_one(folder, tmp_path):
    arch, params = read(folder, UNROLLED)
    with pytest.raises(ValueError, match="no files"):
        weights.export_folder(params, arch, UNROLLED, tmp_path / "a", BrokenTokenizer(), "float32")
    assert list(tmp_path.iterdir()) == []
    weights.export_folder(params, arch, UNROLLED, tmp_path / "a", FakeTokenizer(), "float32")
    with pytest.raises(ValueError, match="no files"):
        weights.export_folder(params, arch, UNROLLED, tmp_path / "a", BrokenTokenizer(), "bfloat16")
    assert tensors(tmp_path / "a")["model.norm.weight"].dtype == torch.float32
    weights.export_folder(params, arch, UNROLLED, tmp_path / "a", FakeTokenizer(), "bfloat16")
    assert tensors(tmp_path / "a")["model.norm.weight"].dtype == torch.bfloat16
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_export_replaces_only_model_folders(folder, tmp_path):
    arch, params = read(folder, UNROLLED)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.txt").write_text("years of work")
    with pytest.raises(ValueError, match="would replace something that is not a model folder"):
        weights.export_folder(params, arch, UNROLLED, tmp_path / "thesis", FakeTokenizer(), "float32")
    assert (tmp_path / "thesis/chapter.txt").exists()


def test_export_asks_for_room_first(folder, tmp_path, monkeypatch):
    arch, params = read(folder, UNROLLED)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match="no disk space for the export"):
        weights.export_folder(params, arch, UNROLLED, tmp_path / "a", FakeTokenizer(), "float32")
    assert list(tmp_path.iterdir()) == []


def test_export_reports_a_full_disk(folder, tmp_path, monkeypatch):
    arch, params = read(folder, UNROLLED)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "_write_stream", full)
    with pytest.raises(ValueError, match="no space left on the disk for the export"):
        weights.export_folder(params, arch, UNROLLED, tmp_path / "a", FakeTokenizer(), "float32")
    assert list(tmp_path.iterdir()) == []


def test_parameter_count_of_architecture():
    sizes = dict(vocab_size=11, width=8, ffn=12, layers=3, heads=4, kv_heads=2, head_size=6, rope_theta=1e4)
    for name, family in FAMILIES.items():
        for tied in (False, True):
            arch = family.architecture(name, tied=tied, rope_scaling=None, norm_eps=1e-6, max_positions=9, **sizes)
            leaves = jax.tree.leaves(Transformer(arch, SCANNED).abstract_params("float32"))
            assert arch.parameters == sum(leaf.size for leaf in leaves)
