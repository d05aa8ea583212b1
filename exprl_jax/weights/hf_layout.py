"""The Hugging Face side of a decoder: what `config.json` says, and how its tensors lie beside ours."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from exprl_jax.architecture import Architecture, RopeScaling, positive
from exprl_jax.weights.families import FAMILIES

# Keys of config.json that ask for something our decoder does not do, in any family.  Qwen2 always has its bias on q, k
# and v, and says nothing about it; elsewhere `attention_bias` means q, k, v *and* o.
_UNSUPPORTED = ("attention_bias", "mlp_bias", "use_sliding_window", "quantization_config", "num_experts")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """How one parameter of ours lies in a checkpoint tensor.

    A stored axis may be several of ours: `split` lists, for each stored axis, the axes it falls into; `order` lists
    which of those each of *our* axes is.  The query kernel:

        stored              [H·E, D]
        split               ((H, E), (D,))      axes 0, 1, 2
        order               (2, 0, 1)           ours are D, H, E

    A part of ours is rows or columns of the stored tensor, cut at whole blocks of inner axes: heads 1 and 2 of E = 8
    are rows 8 to 24.  A slice along E itself asks for all rows of a head, and takes its part from them.

    Attributes:
      name: the tensor's name; a layer's leaves have `{}` for the layer.
      split: sizes, a tuple a stored axis.
      order: permutation from the split stored axes to ours.
    """

    name: str
    split: tuple[tuple[int, ...], ...]
    order: tuple[int, ...]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return tuple(math.prod(axes) for axes in self.split)

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's own shape."""
        axes = tuple(itertools.chain(*self.split))
        return tuple(axes[i] for i in self.order)

    def at_layer(self, layer: int) -> Leaf:
        return dataclasses.replace(self, name=self.name.format(layer))

    def read(self, tensor: Any, index: Sequence[slice]) -> np.ndarray:
        """The part `index` (step 1, in our axes) of the parameter.

        Args:
          tensor: anything with the stored shape that gives a NumPy array for a tuple of slices; only the rows and
            columns that the part needs are asked for.
          index: a slice for each of our axes.
        """
        inner = list(index)
        for ours, axis in enumerate(self.order):
            inner[axis] = index[ours]
        outer, shape, rest, axis = [], [], [], 0
        for axes in self.split:
            start, stop, _ = inner[axis].indices(axes[0])
            block = math.prod(axes[1:])
            outer.append(slice(start * block, stop * block))
            shape += [stop - start, *axes[1:]]
            rest += [slice(None), *inner[axis + 1 : axis + len(axes)]]
            axis += len(axes)
        return tensor[tuple(outer)].reshape(shape)[tuple(rest)].transpose(self.order)

    def store(self, array: np.ndarray) -> np.ndarray:
        """The whole parameter as the checkpoint stores it."""
        return array.transpose(np.argsort(self.order)).reshape(self.stored_shape)


def outer_leaves(arch: Architecture) -> dict[str, Leaf]:
    """The parameters outside the layers."""
    V, D = arch.vocab_size, arch.width
    leaves = {
        "embed": Leaf("model.embed_tokens.weight", ((V,), (D,)), (0, 1)),
        "final_norm": Leaf("model.norm.weight", ((D,),), (0,)),
    }
    if not arch.tied:
        leaves["unembed"] = Leaf("lm_head.weight", ((V,), (D,)), (1, 0))
    return leaves


def layer_leaves(arch: Architecture) -> dict[str, Leaf]:
    """The parameters of one layer; checkpoints store kernels [out, in], we keep [in, out]."""
    D, F, H, K, E = arch.width, arch.ffn, arch.heads, arch.kv_heads, arch.head_size
    leaves = {
        "attn_norm": Leaf("input_layernorm.weight", ((D,),), (0,)),
        "q": Leaf("self_attn.q_proj.weight", ((H, E), (D,)), (2, 0, 1)),
        "k": Leaf("self_attn.k_proj.weight", ((K, E), (D,)), (2, 0, 1)),
        "v": Leaf("self_attn.v_proj.weight", ((K, E), (D,)), (2, 0, 1)),
        "o": Leaf("self_attn.o_proj.weight", ((D,), (H, E)), (1, 2, 0)),
        "ffn_norm": Leaf("post_attention_layernorm.weight", ((D,),), (0,)),
        "gate": Leaf("mlp.gate_proj.weight", ((F,), (D,)), (1, 0)),
        "up": Leaf("mlp.up_proj.weight", ((F,), (D,)), (1, 0)),
        "down": Leaf("mlp.down_proj.weight", ((D,), (F,)), (1, 0)),
    }
    if arch.qkv_bias:
        leaves |= {
            "q_bias": Leaf("self_attn.q_proj.bias", ((H, E),), (0, 1)),
            "k_bias": Leaf("self_attn.k_proj.bias", ((K, E),), (0, 1)),
            "v_bias": Leaf("self_attn.v_proj.bias", ((K, E),), (0, 1)),
        }
    if arch.qk_norm:
        leaves |= {
            "q_norm": Leaf("self_attn.q_norm.weight", ((E,),), (0,)),
            "k_norm": Leaf("self_attn.k_norm.weight", ((E,),), (0,)),
        }
    return {key: dataclasses.replace(leaf, name="model.layers.{}." + leaf.name) for key, leaf in leaves.items()}


def stored_leaves(arch: Architecture) -> Iterator[tuple[Leaf, str, int | None]]:
    """Every tensor of a checkpoint: its leaf (full name), our key for it and its layer, None outside the layers."""
    for key, leaf in outer_leaves(arch).items():
        yield leaf, key, None
    for layer in range(arch.layers):
        for key, leaf in layer_leaves(arch).items():
            yield leaf.at_layer(layer), key, layer


def parse_config(config: Mapping[str, Any], name: str) -> Architecture:
    """Reads the contents of a `config.json`, in the spelling of transformers 4 or 5.

    Raises:
      ValueError: the config asks for something our decoder does not do, lacks a field or has nonsense in it; names the
        field and `name`.
    """

    def refuse(what: str) -> ValueError:
        return ValueError(
            f"model {name}: unsupported architecture: {what}; supported: {', '.join(FAMILIES)}, with full attention, "
            f"SiLU and default, linear or llama3 rotary positions"
        )

    def need(key: str, kind: type = int) -> Any:
        if config.get(key) is None:
            raise ValueError(f"model {name}: config.json lacks {key}; expected the config of a {model_type} model")
        return positive(config[key], kind, f"model {name}: config.json: {key}")

    def optional(key: str, default: int) -> int:
        return default if config.get(key) is None else need(key)

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise refuse(f"model_type {model_type!r}")
    family = FAMILIES[model_type]
    if config.get("hidden_act", "silu") != "silu":
        raise refuse(f"hidden_act {config['hidden_act']!r}")
    for key in (*_UNSUPPORTED, *family.settings):
        if config.get(key):
            raise refuse(f"{key} {config[key]!r}")
    layer_types = config.get("layer_types") or []
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise refuse(f"layer_types {layer_types!r}")
    for key in family.required:
        if key not in config:
            raise ValueError(f"model {name}: config.json lacks {key}; expected the config of a {model_type} model")
    tied = config.get("tie_word_embeddings") or False
    if not isinstance(tied, bool):
        raise ValueError(f"model {name}: config.json: tie_word_embeddings is {tied!r}, expected true or false")
    heads, width = need("num_attention_heads"), need("hidden_size")
    theta, scaling = _rope(config, name, refuse)
    arch = family.architecture(
        model_type,
        vocab_size=need("vocab_size"),
        width=width,
        ffn=need("intermediate_size"),
        layers=need("num_hidden_layers"),
        heads=heads,
        kv_heads=optional("num_key_value_heads", heads),
        head_size=optional("head_dim", width // heads),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=need("rms_norm_eps", float),
        tied=tied,
        max_positions=need("max_position_embeddings"),
    )
    if arch.fault:
        raise refuse(arch.fault)
    return arch


def _rope(
    config: Mapping[str, Any], name: str, refuse: Callable[[str], ValueError]
) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary frequencies.

    transformers 5 writes `rope_parameters` with theta inside; transformers 4 wrote `rope_theta` beside `rope_scaling`,
    whose kind was first spelt `type`.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise refuse(f"rotary positions {rope!r}")
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise refuse("rope_parameters that differ between layers")
    values = {"rope_theta": config.get("rope_theta"), "partial_rotary_factor": config.get("partial_rotary_factor")}
    values |= {key: value for key, value in rope.items() if value is not None}
    kind = values.get("rope_type", values.get("type", "default"))

    def number(key: str, default: float | None = None) -> float:
        if values.get(key) is None and default is not None:
            return default
        if values.get(key) is None:
            raise refuse(f"rope scaling {kind!r} without {key!r}")
        return float(positive(values[key], float, f"model {name}: config.json: {key}"))

    if number("partial_rotary_factor", 1.0) != 1.0:
        raise refuse("partial_rotary_factor other than 1")
    theta = number("rope_theta", 10_000.0)
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", number("factor"))
    if kind == "llama3":
        low, high = number("low_freq_factor"), number("high_freq_factor")
        positions = int(number("original_max_position_embeddings"))
        return theta, RopeScaling("llama3", number("factor"), low, high, positions)
    raise refuse(f"rope scaling {kind!r}")


def render_config(
    arch: Architecture, dtype: str, *, bos_id: int | None, eos_ids: Sequence[int], pad_id: int
) -> dict[str, Any]:
    """The `config.json` of a model, in the transformers 4 spelling, which transformers 5 reads too."""
    scaling = None
    if arch.rope_scaling is not None:
        scaling = {"rope_type": arch.rope_scaling.kind, "factor": arch.rope_scaling.factor}
        if arch.rope_scaling.kind == "llama3":
            scaling |= {
                "low_freq_factor": arch.rope_scaling.low_freq_factor,
                "high_freq_factor": arch.rope_scaling.high_freq_factor,
                "original_max_position_embeddings": arch.rope_scaling.original_positions,
            }
    return {
        "architectures": [FAMILIES[arch.family].class_name],
        "model_type": arch.family,
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.width,
        "intermediate_size": arch.ffn,
        "num_hidden_layers": arch.layers,
        "num_attention_heads": arch.heads,
        "num_key_value_heads": arch.kv_heads,
        "head_dim": arch.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": arch.norm_eps,
        "rope_theta": arch.rope_theta,
        "rope_scaling": scaling,
        "max_position_embeddings": arch.max_positions,
        "tie_word_embeddings": arch.tied,
        "attention_dropout": 0.0,
        "use_cache": True,
        "torch_dtype": dtype,
        "bos_token_id": bos_id,
        "eos_token_id": eos_ids[0] if len(eos_ids) == 1 else list(eos_ids),
        "pad_token_id": pad_id,
        **FAMILIES[arch.family].settings,
    }
