"""Every supported family against transformers, through the files users have: load, compute, export."""

import jax
import numpy as np
import pytest
import transformers
from oracles import torch_models

from exprl_jax.config import Execution
from exprl_jax.model.decoder import Transformer
from exprl_jax.weights import folder as weights
from exprl_jax.weights.sources import resolve_model
from tests.oracles.tiny_decoder import forward_logits

TOKENS = np.random.default_rng(3).integers(0, 97, (2, 80), dtype=np.int32)


class FakeTokenizer:
    vocab_size, bos_id, pad_id, eos_ids = 90, None, 3, (3, 5)

    def save(self, folder):
        (folder / "tokenizer_config.json").write_text("{}")


def execution(scan_layers):
    return Execution(scan_layers=scan_layers, compute_dtype="float32", remat="none", kv_dtype="compute")


def load(spec, settings, dtype="float32"):
    source = resolve_model(str(spec))
    arch = weights.read_architecture(source)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = Transformer(arch, settings).abstract_params(dtype)
    params = weights.load_params(source, arch, settings, dtype, jax.tree.map(lambda _: one, abstract))
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), params)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)
    return arch, params


def our_logits(arch, settings, params):
    return np.asarray(jax.jit(lambda p: forward_logits(p, arch, settings, jax.numpy.asarray(TOKENS)))(params))


@pytest.fixture(scope="module", params=sorted(torch_models.FAMILIES))
def family(request, tmp_path_factory):
    """(name, torch model, its folder, its logits)."""
    model = torch_models.tiny_model(request.param)
    folder = torch_models.save(model, tmp_path_factory.mktemp(request.param))
    return request.param, model, folder, torch_models.logits(model, TOKENS)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_logits_are_those_of_transformers(family, scan_layers):
    _, _, folder, expected = family
    settings = execution(scan_layers)
    arch, params = load(folder, settings)
    assert arch.parameters == sum(x.size for x in jax.tree.leaves(params))
    np.testing.assert_allclose(our_logits(arch, settings, params), expected, atol=1e-4, rtol=0)
    # The logits are large enough for the bound to mean something.
    assert expected.std() > 0.5


def test_exported_folder_loads_in_transformers_with_equal_logits(family, tmp_path):
    _, model, folder, expected = family
    settings = execution(True)
    arch, params = load(folder, settings)
    weights.export_folder(params, arch, settings, tmp_path / "export", FakeTokenizer(), "float32")
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    np.testing.assert_array_equal(torch_models.logits(loaded.eval(), TOKENS), expected)
    assert loaded.config.eos_token_id == [3, 5] and loaded.config.pad_token_id == 3
    # transformers 5 may fill in or re-spell fields; what the architecture hangs on must come back as it was.
    assert weights.read_architecture(resolve_model(str(tmp_path / "export"))) == arch
    for key in ("rope_parameters", "head_dim", "tie_word_embeddings", "max_position_embeddings", "rms_norm_eps"):
        ours, theirs = getattr(loaded.config, key, None), getattr(model.config, key, None)
        if key == "head_dim" and theirs is None:  # qwen2 leaves it to the width
            theirs = model.config.hidden_size // model.config.num_attention_heads
        assert ours == theirs, key
