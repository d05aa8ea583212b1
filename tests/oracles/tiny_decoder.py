"""Decoders small enough for a test, with weights large enough that every part of them shows in the logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from exprl_jax.architecture import Architecture
from exprl_jax.config import Execution
from exprl_jax.mesh import Placement
from exprl_jax.model.cache import empty_context
from exprl_jax.model.decoder import Transformer, logits
from exprl_jax.records import Prefix, Rows
from exprl_jax.weights import families

FAMILIES = tuple(families.FAMILIES)

QWEN3 = families.FAMILIES["qwen3"].architecture(
    "qwen3",
    vocab_size=61,
    width=16,
    ffn=24,
    layers=2,
    heads=4,
    kv_heads=2,
    head_size=8,
    rope_theta=10_000.0,
    rope_scaling=None,
    norm_eps=1e-6,
    tied=False,
    max_positions=128,
)


@dataclasses.dataclass(frozen=True)
class TpuWay(Placement):
    """Forwards go the TPU's way on devices that are none; splash is interpreted there."""

    @property
    def on_tpu(self) -> bool:
        return True


@dataclasses.dataclass(frozen=True)
class GpuWay(Placement):
    """Forwards go the way of GPUs with cuDNN on devices that are none; XLA stands behind the same call there."""

    def has_cudnn(self, dtype, head_size) -> bool:
        return True


def architecture(family: str) -> Architecture:
    """Qwen2 is the tied one."""
    sizes = dataclasses.asdict(QWEN3) | {"tied": family == "qwen2"}
    for name in ("family", "qkv_bias", "qk_norm"):
        del sizes[name]
    return families.FAMILIES[family].architecture(family, **sizes)


def make_execution(
    scan_layers: bool = False, remat: str = "none", dtype: str = "float32", kv_dtype: str = "compute"
) -> Execution:
    return Execution(scan_layers=scan_layers, compute_dtype=dtype, remat=remat, kv_dtype=kv_dtype)


def random_params(arch: Architecture, execution: Execution, seed: int = 0):
    """The same weights in both layouts; norms and biases random too, logits of deviation about 2."""
    unrolled = Transformer(arch, dataclasses.replace(execution, scan_layers=False)).abstract_params("float32")
    random = np.random.default_rng(seed)

    def draw(path, leaf):
        name, noise = path[-1].key, random.standard_normal(leaf.shape).astype(np.float32)
        if name.endswith("norm"):
            return 1 + 0.3 * noise
        if name == "embed":
            return 2 / arch.width**0.5 * noise
        if name.endswith("bias"):
            return 0.5 * noise
        inputs = leaf.shape[0] * (leaf.shape[1] if name == "o" else 1)
        return 2 / inputs**0.5 * noise

    params = jax.tree.map(jnp.asarray, jax.tree_util.tree_map_with_path(draw, unrolled))
    return stack_layers(params, arch) if execution.scan_layers else params


def stack_layers(params, arch: Architecture):
    """From a subtree a layer to the scanned layout."""
    layers = [params[f"layer_{i}"] for i in range(arch.layers)]
    rest = {name: x for name, x in params.items() if not name.startswith("layer_")}
    return rest | {"layers": jax.tree.map(lambda *x: jnp.stack(x), *layers)}


def forward_logits(params, arch: Architecture, execution: Execution, tokens_BT):
    """Logits [B, T, V] at every position of whole sequences without padding."""
    transformer, (B, _) = Transformer(arch, execution), tokens_BT.shape
    prefix = Prefix(empty_context(arch, execution, B), jnp.zeros((B,), jnp.int32))
    hidden = transformer.hidden_states(params, prefix, Rows(tokens_BT[:, None], jnp.zeros((B, 1), jnp.int32)))
    return logits(hidden[:, 0], transformer.unembedding(params))
