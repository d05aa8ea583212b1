"""Tiny random models of every supported family, in transformers: what the decoder and the weights are compared with."""

from __future__ import annotations

import pathlib

import numpy as np
import torch
import transformers

_COMMON = {
    "vocab_size": 97,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "attention_dropout": 0.0,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_PLAIN = {"rope_type": "default", "rope_theta": 5000.0}

# Heads differ from kv heads everywhere; in Qwen3, heads · head size differs from the width.
FAMILIES = {
    "qwen3": ("qwen3", dict(num_attention_heads=6, num_key_value_heads=2, head_dim=12, rope_parameters=_PLAIN)),
    "qwen3_tied": (
        "qwen3",
        dict(
            num_attention_heads=3, num_key_value_heads=1, head_dim=8, tie_word_embeddings=True, rope_parameters=_PLAIN
        ),
    ),
    "qwen2": ("qwen2", dict(num_attention_heads=4, num_key_value_heads=2, rope_parameters=_PLAIN)),
    "qwen2_tied": (
        "qwen2",
        dict(num_attention_heads=5, num_key_value_heads=1, tie_word_embeddings=True, rope_parameters=_PLAIN),
    ),
    "llama": ("llama", dict(num_attention_heads=4, num_key_value_heads=4, rope_parameters=_PLAIN)),
    "llama_llama3_rope": ("llama", dict(num_attention_heads=4, num_key_value_heads=2, rope_parameters=_LLAMA3)),
    "llama_linear_rope": (
        "llama",
        dict(
            num_attention_heads=4,
            num_key_value_heads=2,
            rope_parameters={"rope_type": "linear", "rope_theta": 900.0, "factor": 3.0},
        ),
    ),
    "mistral": (
        "mistral",
        dict(num_attention_heads=4, num_key_value_heads=2, head_dim=14, sliding_window=None, rope_parameters=_PLAIN),
    ),
    "smollm2": (
        "llama",
        dict(num_attention_heads=5, num_key_value_heads=1, tie_word_embeddings=True, rope_parameters=_PLAIN),
    ),
}


def tiny_model(name: str) -> transformers.PreTrainedModel:
    """A model of `FAMILIES` in which no parameter, norms and biases included, keeps its neutral value."""
    kind, sizes = FAMILIES[name]
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **{**_COMMON, **sizes}), attn_implementation="eager"
    )
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if key.endswith("norm.weight") else 0.15 * noise)
    return model.eval()


def save(model: transformers.PreTrainedModel, folder: pathlib.Path, dtype: str = "float32", **options) -> pathlib.Path:
    model.to(getattr(torch, dtype)).save_pretrained(folder, **options)
    return folder


def logits(model: transformers.PreTrainedModel, tokens_BT: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens_BT).long()).logits.float().numpy()
