"""GGUF files: what their metadata and tensors come to, damaged ones, and the real SmolLM2."""

import dataclasses
import struct

import gguf
import jax
import numpy as np
import pytest
from oracles import torch_models

from exprl_jax.architecture import RopeScaling
from exprl_jax.config import Execution
from exprl_jax.gguf_reader import read_gguf
from exprl_jax.model.decoder import Transformer
from exprl_jax.weights import folder as weights
from exprl_jax.weights import gguf_file
from exprl_jax.weights.sources import PACKAGES, default_cache_dir, resolve_model
from tests.oracles.tiny_decoder import forward_logits

EXECUTION = Execution(scan_layers=True, compute_dtype="float32", remat="none", kv_dtype="compute")
TOKENS = np.random.default_rng(3).integers(0, 97, (2, 40), dtype=np.int32)
NAMES = {theirs: ours for ours, theirs in (gguf_file._LAYER_NAMES | gguf_file._OUTER_NAMES).items()}


def write(path, model, tied=None, quantise=None, metadata=(), drop=(), extra=()):
    """Writes a torch model the way llama.cpp's converter does; `tied` leaves the unembedding out."""
    config, kind = model.config, model.config.model_type
    writer = gguf.GGUFWriter(path, kind)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pairs = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
    }
    for key, value in {**pairs, **{k: v for k, v in dict(metadata).items() if isinstance(v, int)}}.items():
        if key not in drop:
            writer.add_uint32(f"{kind}.{key}", value)
    if head_size * config.num_attention_heads != config.hidden_size:
        writer.add_uint32(f"{kind}.attention.key_length", head_size)
    writer.add_float32(f"{kind}.rope.freq_base", config.rope_parameters["rope_theta"])
    writer.add_float32(f"{kind}.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    if config.rope_parameters["rope_type"] == "linear":
        writer.add_string(f"{kind}.rope.scaling.type", "linear")
        writer.add_float32(f"{kind}.rope.scaling.factor", config.rope_parameters["factor"])
    for key, value in dict(metadata).items():
        if isinstance(value, str):
            writer.add_string(f"{kind}.{key}", value)
    writer.add_array("tokenizer.ggml.tokens", ["<a>", "é", ""])
    writer.add_array("tokenizer.ggml.token_type", [3, 1, 1])
    writer.add_bool("tokenizer.ggml.add_bos_token", False)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and (config.tie_word_embeddings if tied is None else tied):
            continue
        values = tensor.float().numpy()
        stem, _, suffix = name.rpartition(".")
        if stem.startswith("model.layers."):
            layer, inner = stem.removeprefix("model.layers.").split(".", 1)
            if kind == "llama" and inner in ("self_attn.q_proj", "self_attn.k_proj"):
                heads = config.num_attention_heads if "q_proj" in inner else config.num_key_value_heads
                halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
                values = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
            theirs = f"blk.{layer}.{NAMES[inner]}.{suffix}"
        else:
            theirs = f"{NAMES[stem]}.{suffix}"
        if quantise is not None and values.ndim == 2:
            raw = gguf.quants.quantize(values, quantise)
            writer.add_tensor(theirs, raw, raw_dtype=quantise)
        else:
            writer.add_tensor(theirs, values)
    for name in extra:
        writer.add_tensor(name, np.ones(3, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load(path, execution=EXECUTION, shardings=None):
    source = resolve_model(str(path))
    arch = weights.read_architecture(source)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = shardings or jax.tree.map(lambda _: one, Transformer(arch, execution).abstract_params("float32"))
    return arch, weights.load_params(source, arch, execution, "float32", shardings)


def test_a_mistral_file_is_a_llama_file(tmp_path):
    """llama.cpp's converter has no architecture for Mistral: its files say llama, and their rows lie as Llama's do."""
    model = torch_models.tiny_model("mistral")
    folder = torch_models.save(model, tmp_path / "folder")
    model.config.model_type = "llama"
    arch, params = load(write(tmp_path / "m.gguf", model))
    expected = weights.read_architecture(resolve_model(str(folder)))
    assert dataclasses.replace(arch, family="mistral") == expected
    ours = jax.jit(lambda p: forward_logits(p, arch, EXECUTION, jax.numpy.asarray(TOKENS)))(params)
    np.testing.assert_allclose(np.asarray(ours), torch_models.logits(model, TOKENS), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama", "llama_linear_rope", "smollm2", "qwen2", "qwen2_tied", "qwen3"])
def test_logits_are_those_of_transformers(family, tmp_path):
    model = torch_models.tiny_model(family)
    arch, params = load(write(tmp_path / "m.gguf", model))
    folder = torch_models.save(model, tmp_path / "folder")
    assert arch == weights.read_architecture(resolve_model(str(folder)))
    ours = jax.jit(lambda p: forward_logits(p, arch, EXECUTION, jax.numpy.asarray(TOKENS)))(params)
    np.testing.assert_allclose(np.asarray(ours), torch_models.logits(model, TOKENS), atol=1e-4, rtol=0)


# Widths of 40 and 56 are no whole blocks of 32; this one is, in every matrix.
QUANTISABLE = {"hidden_size": 64, "intermediate_size": 96}


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_1"])
def test_a_quantised_file_loads_as_the_gguf_package_reads_it(kind, tmp_path, monkeypatch):
    monkeypatch.setitem(
        torch_models.FAMILIES, "wide", ("llama", torch_models.FAMILIES["llama_linear_rope"][1] | QUANTISABLE)
    )
    model = torch_models.tiny_model("wide")
    path = write(tmp_path / "m.gguf", model, quantise=getattr(gguf.GGMLQuantizationType, kind))
    arch, whole = load(path)
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    # 96 / 4 and 64 / 4 columns end inside a block of 32.
    spec = jax.sharding.PartitionSpec
    shardings = jax.tree.map(
        lambda _: jax.sharding.NamedSharding(mesh, spec()), Transformer(arch, EXECUTION).abstract_params("float32")
    )
    shardings["embed"] = jax.sharding.NamedSharding(mesh, spec(None, "model"))
    shardings["layers"]["down"] = jax.sharding.NamedSharding(mesh, spec(None, "model", "data"))
    shardings["layers"]["q"] = jax.sharding.NamedSharding(mesh, spec(None, "model", "data", None))
    shardings["layers"]["o"] = jax.sharding.NamedSharding(mesh, spec(None, "data", "model", None))
    _, sharded = load(path, shardings=shardings)
    jax.tree.map(np.testing.assert_array_equal, sharded, whole)
    stored = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
    np.testing.assert_array_equal(whole["layers"]["down"][1], stored["blk.1.ffn_down.weight"].T)
    np.testing.assert_array_equal(whole["embed"], stored["token_embd.weight"])
    exact = model.state_dict()["model.layers.1.self_attn.k_proj.weight"].numpy().T.reshape(64, 2, 16)
    np.testing.assert_allclose(whole["layers"]["k"][1], exact, atol=0.06 if kind == "Q4_1" else 0.005)


def test_metadata_are_read_as_written(tmp_path):
    file = read_gguf(write(tmp_path / "m.gguf", torch_models.tiny_model("llama_linear_rope")))
    assert file.metadata["tokenizer.ggml.tokens"] == ["<a>", "é", ""]
    assert file.metadata["tokenizer.ggml.token_type"] == [3, 1, 1]
    assert file.metadata["tokenizer.ggml.add_bos_token"] is False
    arch = gguf_file.parse_metadata(file, "m")
    assert arch.rope_scaling == RopeScaling("linear", 3.0)
    assert (arch.rope_theta, arch.norm_eps) == (900.0, 1e-5)


def test_unsupported_and_incomplete_files_are_named(tmp_path):
    model = torch_models.tiny_model("llama")
    cases = [
        (dict(metadata={"rope.scaling.type": "yarn"}), "rope scaling 'yarn'"),
        (dict(metadata={"expert_count": 4}), "mixture of experts"),
        (dict(metadata={"rope.dimension_count": 4}), "on a part of each head"),
        (dict(drop=("block_count",)), "lack llama.block_count"),
        (dict(extra=("rope_freqs.weight",)), "rope_freqs.weight"),
        (dict(extra=("blk.0.attn_q.bias",)), "1 extra: model.layers.0.self_attn.q_proj.bias"),
        (dict(metadata={"block_count": 3}), "9 missing: model.layers.2.input_layernorm.weight"),
    ]
    for number, (fault, named) in enumerate(cases):
        path = write(tmp_path / f"{number}.gguf", model, **fault)
        with pytest.raises(ValueError) as caught:
            load(path)
        assert named in str(caught.value)
        assert "\n" not in str(caught.value)


TENSOR = ("a", (2, 32), 0)


def header(path, architecture="llama", tensor=None, split=1):
    """A GGUF file of version 3 by hand: one pair or two, and at most one tensor (name, shape, kind) without data."""

    def string(text):
        return struct.pack("<Q", len(text)) + text.encode()

    pairs = string("general.architecture") + struct.pack("<I", 8) + string(architecture)
    pairs += string("split.count") + struct.pack("<IH", 2, split)
    entry = b""
    if tensor is not None:
        name, shape, kind = tensor
        entry = string(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *reversed(shape))
        entry += struct.pack("<IQ", kind, 0)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensor is not None, 2) + pairs + entry + bytes(4096))
    return path


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (dict(architecture="bert"), "general.architecture 'bert'"),
        (dict(split=2), "is one of 2 parts; merge them"),
        (dict(tensor=("a", (2, 32), 99)), "not a readable GGUF file ..*99.* is not a valid GGMLQuantizationType"),
        (dict(tensor=("a", (2, 40), 8)), "not a readable GGUF file .*row size .40. is not a multiple of"),
        (dict(tensor=("a", (64, 64), 0)), "not a readable GGUF file .it ends at byte"),
        (dict(), "lack llama.embedding_length"),
    ],
)
def test_odd_headers(fault, reason, tmp_path):
    with pytest.raises(ValueError, match=reason) as caught:
        load(header(tmp_path / "m.gguf", **{"tensor": TENSOR} | fault))
    assert "\n" not in str(caught.value)


def test_a_quantisation_that_cannot_be_undone(tmp_path):
    with pytest.raises(ValueError, match="model m: tensor a is quantised as I8, which the gguf package cannot undo"):
        gguf_file.open_tensors(read_gguf(header(tmp_path / "m.gguf", tensor=("a", (2, 32), 24))), "m")


def test_a_file_without_an_embedding(tmp_path):
    file = read_gguf(write(tmp_path / "m.gguf", torch_models.tiny_model("llama")))
    others = tuple(tensor for tensor in file.tensors if tensor.name != "token_embd.weight")
    with pytest.raises(ValueError, match="lacks token_embd.weight"):
        gguf_file.parse_metadata(file._replace(tensors=others), "m")


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("attention.head_count", [4, 2], "attention.head_count that differs between layers"),
        ("block_count", "big", "llama.block_count is 'big', expected a positive whole number"),
        ("block_count", 0, "llama.block_count is 0"),
        ("block_count", 10**12, "1000000000000 layers, but only 21 tensors"),
        ("embedding_length", 40.0, "llama.embedding_length is 40.0, expected a positive whole number"),
        ("attention.head_count_kv", 3, "4 attention heads with 3 key-value heads"),
        ("attention.key_length", 5, "heads of size 5"),
        ("attention.layer_norm_rms_epsilon", float("nan"), "layer_norm_rms_epsilon is nan"),
        ("rope.freq_base", -1.0, "rope.freq_base is -1.0"),
        ("rope.scaling.type", 7, "rope scaling 7"),
    ],
)
def test_nonsense_in_the_metadata_is_named(key, value, reason, tmp_path, monkeypatch):
    path = write(tmp_path / "m.gguf", torch_models.tiny_model("llama"))
    file = read_gguf(path)
    changed = file._replace(metadata=file.metadata | {f"llama.{key}": value})
    monkeypatch.setattr(weights, "read_gguf", lambda path: changed)
    with pytest.raises(ValueError, match=reason) as caught:
        load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_files(tmp_path):
    path = write(tmp_path / "m.gguf", torch_models.tiny_model("llama"))
    whole = path.read_bytes()
    types = whole.index(b"tokenizer.ggml.token_type") + 25 + 4 + 4  # key, kind, kind of the items; then their number
    for content, reason in [
        (b"", "empty file"),
        (b"GGUF", "it ends at byte 4"),
        (b"GGML" + whole[4:], "magic invalid"),
        (b"GGUF" + bytes([9, 0, 0, 0]) + whole[8:], "version 9"),
        (whole[:100], "it ends at byte 100"),
        (whole[:-400], "it ends at byte"),
        (whole[:types] + struct.pack("<Q", 2**50) + whole[types + 8 :], "it ends at byte|file"),
        (whole.replace(b"general.architecture", b"\xffeneral.architecture"), "can't decode"),
    ]:
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=f"m.gguf is not a readable GGUF file .*{reason}.*fetch it again"
        ) as caught:
            load(path)
        assert "\n" not in str(caught.value)


def test_a_file_is_read_once_for_weights_and_tokenizer_and_again_when_replaced(tmp_path):
    path = write(tmp_path / "m.gguf", torch_models.tiny_model("llama"))
    first = read_gguf(path)
    assert read_gguf(str(path)) is first
    write(tmp_path / "m.gguf", torch_models.tiny_model("llama"), metadata={"vocab_size": 3})
    assert read_gguf(path).metadata["llama.vocab_size"] == 3


@pytest.mark.slow
def test_real_smollm2_continues_a_sentence_sensibly():
    (pin,) = PACKAGES
    path = default_cache_dir() / pin.replace("==", "-") / PACKAGES[pin].member.rpartition("/")[2]
    if not path.exists():
        pytest.skip(f"{path.name} is not in the cache; resolve_model('pip:{pin}') fetches it")
    source = resolve_model(f"pip:{pin}")
    assert source.path == path
    arch, params = load(path)
    assert arch.parameters == 134_515_008
    vocabulary = read_gguf(path).metadata["tokenizer.ggml.tokens"]
    assert len(vocabulary) == arch.vocab_size
    ids = [vocabulary.index(token) for token in ("The", "Ġcapital", "Ġof", "ĠFrance", "Ġis")]
    logits = jax.jit(lambda p, tokens: forward_logits(p, arch, EXECUTION, tokens))(params, np.array([ids], np.int32))[0]
    logp = np.asarray(jax.nn.log_softmax(logits))
    assert vocabulary[logp[-1].argmax()] == "ĠParis"
    # " of France" after "The capital": a uniform guess would cost 10.8 nats a token.
    assert -np.mean([logp[i - 1, ids[i]] for i in (2, 3, 4)]) < 4
