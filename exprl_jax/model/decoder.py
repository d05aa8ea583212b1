"""The decoder: one forward for sampling, judging and training (Llama-shaped; Qwen3, Qwen2.5, Llama, SmolLM2).

This is the only file that imports `flax.linen`, and only to name parameters and to scan and rematerialise layers;
the mathematics is in plain functions.  Keys and values are an argument and a result.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from exprl_jax.architecture import Architecture
from exprl_jax.config import Execution
from exprl_jax.mesh import ONE_DEVICE, Placement
from exprl_jax.model import attention, paged
from exprl_jax.model.cache import KV, empty_cache, empty_context, row_to_context
from exprl_jax.records import Context, Packed, Prefix, Rows

Params = dict[str, Any]
# What the names of a parameter's adapters end in.
LORA_A, LORA_B = "_lora_a", "_lora_b"


def rms_norm(x: Float[Array, "*B D"], scale: Float[Array, "D"], eps: float) -> Float[Array, "*B D"]:
    """x / rms(x) · scale, in float32; returns x's dtype (Zhang & Sennrich 2019)."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (normed * scale.astype(jnp.float32)).astype(x.dtype)


class Block(nn.Module):
    """One layer: attention, then a gated feed-forward, each on the normed residual.

    Attributes:
      look: what its queries attend to (`Look`).
    """

    arch: Architecture
    how: Execution
    place: Placement
    look: Look

    @nn.compact
    def __call__(self, carried, each, positions_PGT, view):
        """Args: `carried` = the residual and the look's memory; `each` = the layer's number and its part of the past;
        the rest as in `Decoder`."""
        arch, dtype = self.arch, jnp.dtype(self.how.compute_dtype)
        D, F, H, K, E = arch.width, arch.ffn, arch.heads, arch.kv_heads, arch.head_size
        normal, ones, zeros = nn.initializers.normal(0.02), nn.initializers.ones, nn.initializers.zeros

        def weight(name, init, *shape):
            return self.param(name, init, shape).astype(dtype)

        def product(x, name, *shape, inner=1):
            """x · weight over x's last `inner` dims, its adapters' part included where there are any."""
            y = jnp.tensordot(x, weight(name, normal, *shape), inner)
            if self.has_variable("params", name + LORA_A):
                a, b = (self.get_variable("params", name + part).astype(dtype) for part in (LORA_A, LORA_B))
                y += jnp.tensordot(jnp.tensordot(x, a, inner), b, 1)
            return y

        (x_PGTD, memory), place = carried, self.place
        h = place.whole_tokens(rms_norm(x_PGTD, self.param("attn_norm", ones, (D,)), arch.norm_eps))
        q, k, v = product(h, "q", D, H, E), product(h, "k", D, K, E), product(h, "v", D, K, E)
        if arch.qkv_bias:
            q += weight("q_bias", zeros, H, E)
            k += weight("k_bias", zeros, K, E)
            v += weight("v_bias", zeros, K, E)
        if arch.qk_norm:
            q = rms_norm(q, self.param("q_norm", ones, (E,)), arch.norm_eps)
            k = rms_norm(k, self.param("k_norm", ones, (E,)), arch.norm_eps)
        frequency = attention.rotary_frequencies(arch)
        q = attention.rotate(q, positions_PGT, frequency)
        k = attention.rotate(k, positions_PGT, frequency)
        a, memory, kept = self.look(q, k, v, memory, each, view)
        x_PGTD += place.by_tokens(product(a, "o", H, E, D, inner=2))

        h = place.whole_tokens(rms_norm(x_PGTD, self.param("ffn_norm", ones, (D,)), arch.norm_eps))
        gated = place.by_columns(jax.nn.silu(product(h, "gate", D, F)) * product(h, "up", D, F))
        x_PGTD += place.by_tokens(product(gated, "down", F, D))
        return (x_PGTD, memory), kept


class Decoder(nn.Module):
    """Embedding, layers, final norm.  The unembedding is left to whoever needs logits, and of how many tokens."""

    arch: Architecture
    how: Execution
    place: Placement
    look: Look

    @nn.compact
    def __call__(self, tokens_PGT, positions_PGT, past: Any, memory: Any, view: Any) -> tuple[Array, Any, Any]:
        """Hidden states of some tokens.

        Args:
          tokens_PGT, positions_PGT: int32.
          past: what the look reads of each layer: a tuple by layer; where layers are scanned, arrays with L in front.
          memory: what the look carries from layer to layer.
          view: what is the same for all layers.

        Returns:
          hidden_PGTD after the final norm, the memory, and what the look keeps of each layer, arranged as `past` is.
        """
        arch, how = self.arch, self.how
        embed = self.param("embed", nn.initializers.normal(0.02), (arch.vocab_size, arch.width))
        if not arch.tied:
            self.param("unembed", nn.initializers.normal(0.02), (arch.width, arch.vocab_size))
        carried = self.place.by_tokens(embed[tokens_PGT].astype(how.compute_dtype)), memory

        block = Block
        if how.remat != "none":
            kept = (attention.KEPT,) if how.remat == "but_attention" else ()
            policy = jax.checkpoint_policies.save_only_these_names(*kept)
            block = nn.remat(Block, prevent_cse=not how.scan_layers, policy=policy)
        if how.scan_layers:
            scanned = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast),
                length=arch.layers,
            )
            each = jnp.arange(arch.layers), past
            carried, kept = scanned(arch, how, self.place, self.look, name="layers")(carried, each, positions_PGT, view)
        else:
            layers = []
            for i, each in enumerate(past):
                layer = block(arch, how, self.place, self.look, name=f"layer_{i}")
                carried, own = layer(carried, (i, each), positions_PGT, view)
                layers.append(own)
            kept = tuple(layers)
        x, memory = carried
        return rms_norm(x, self.param("final_norm", nn.initializers.ones, (arch.width,)), arch.norm_eps), memory, kept


class Look(Protocol):
    """What a layer's queries attend to; equal looks are equal values."""

    def __call__(self, q_PGTHE: Array, k_PGTKE: Array, v_PGTKE: Array, memory: Any, each: Any, view: Any) -> tuple:
        """(attention's result, memory, what is kept of this layer)."""


@dataclasses.dataclass(frozen=True)
class OnRows:
    """Rows on their context and their own slots.  `past` is (context KV, own KV), `view` (length_P, start_PG, slot)."""

    place: Placement

    def __call__(self, q, k, v, memory, each, view):
        (_, (context, cache)), (length_P, start_PG, slot) = each, view
        own = _write(cache, KV(jnp.swapaxes(k, 2, 3), jnp.swapaxes(v, 2, 3)), slot)
        return attention.attend(q, context, length_P, own, start_PG, slot, self.place), memory, own


@dataclasses.dataclass(frozen=True)
class OnPages:
    """Rows on pages.  `memory` is the cache, `view` the slot."""

    how: Execution
    place: Placement

    def __call__(self, q, k, v, memory, each, view):
        a, memory = paged.attend_pages(q, k, v, memory, each[0], view, self.how, self.place)
        return a, memory, ()


@dataclasses.dataclass(frozen=True)
class OnSegments:
    """Packed rows on themselves.  `view` is (segment_BT, shared_BT)."""

    place: Placement

    def __call__(self, q, k, v, memory, each, view):
        a = attention.attend_packed(q[:, 0], k[:, 0], v[:, 0], *view, self.place)
        return a[:, None], memory, ()


def _write(cache: KV, new: KV, slot) -> KV:
    if cache.k.shape[3] == 0:
        return new
    at = (0, 0, 0, slot, 0)
    return KV(jax.lax.dynamic_update_slice(cache.k, new.k, at), jax.lax.dynamic_update_slice(cache.v, new.v, at))


def _nothing(arch: Architecture, how: Execution) -> Any:
    """The past of a look that has none."""
    return () if how.scan_layers else ((),) * arch.layers


def _both(how: Execution, contexts: Any, caches: Any) -> Any:
    """The past of `OnRows`."""
    return (contexts, caches) if how.scan_layers else tuple(zip(contexts, caches, strict=True))


def init_params(arch: Architecture, how: Execution, dtype: str, key: jax.Array) -> Params:
    """Random parameters: kernels and embeddings normal with deviation 0.02, norms 1, biases 0."""
    zeros_111, zeros_11 = jnp.zeros((1, 1, 1), jnp.int32), jnp.zeros((1, 1), jnp.int32)
    decoder = Decoder(arch, how, ONE_DEVICE, OnSegments(ONE_DEVICE))
    params = decoder.init(key, zeros_111, zeros_111, _nothing(arch, how), (), (zeros_11, zeros_11))["params"]
    return jax.tree.map(lambda x: x.astype(dtype), params)


def abstract_params(arch: Architecture, how: Execution, dtype: str) -> Params:
    """Shapes and dtypes of the parameters; allocates nothing."""
    return jax.eval_shape(lambda: init_params(arch, how, dtype, jax.random.key(0)))


def cast_kernels(params: Params, how: Execution) -> Params:
    """What enters matrix products, cast to the compute dtype before a loop rather than at every use inside it.

    Norm scales stay as they are, for norms are float32 in any case: with this or without, a forward is the same.
    """

    def cast(path, x):
        return x if path[-1].key.endswith("norm") else x.astype(how.compute_dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def prefill(
    params: Params, arch: Architecture, how: Execution, context: Context, place: Placement = ONE_DEVICE
) -> Prefix:
    """Computes the keys and values of each context once, for all its rows."""
    P, C = context.tokens_PC.shape
    none_P = jnp.zeros((P,), jnp.int32)
    past = _both(how, empty_context(arch, how, P), empty_cache(arch, how, P, 1, 0))
    positions_P1C = jnp.broadcast_to(jnp.arange(C), (P, 1, C))
    decoder = Decoder(arch, how, place, OnRows(place))
    _, _, own = decoder.apply(
        {"params": params}, context.tokens_PC[:, None], positions_P1C, past, (), (none_P, none_P[:, None], 0)
    )
    return Prefix(row_to_context(own), context.length_P)


def hidden_states(
    params: Params, arch: Architecture, how: Execution, prefix: Prefix, rows: Rows, place: Placement = ONE_DEVICE
) -> Float[Array, "P G T D"]:
    """The final hidden state of every row token, in one pass (scoring)."""
    P, G, T = rows.tokens_PGT.shape
    past = _both(how, prefix.layers, empty_cache(arch, how, P, G, 0))
    positions_PGT = _positions(prefix.length_P, rows.start_PG, 0, T)
    decoder = Decoder(arch, how, place, OnRows(place))
    view = prefix.length_P, rows.start_PG, 0
    return decoder.apply({"params": params}, rows.tokens_PGT, positions_PGT, past, (), view)[0]


def packed_hidden_states(
    params: Params, arch: Architecture, how: Execution, packed: Packed, place: Placement = ONE_DEVICE
) -> Float[Array, "B T D"]:
    """The final hidden state of every token of packed rows, each sequence as if it stood alone."""
    tokens, positions = packed.tokens_BT[:, None], packed.position_BT[:, None]
    decoder = Decoder(arch, how, place, OnSegments(place))
    view = packed.segment_BT, packed.shared_BT
    return decoder.apply({"params": params}, tokens, positions, _nothing(arch, how), (), view)[0][:, 0]


def open_cache(
    arch: Architecture,
    how: Execution,
    prefix: Prefix,
    start_PG: Int[Array, "P G"],
    slots: int,
    tokens: int,
    place: Placement = ONE_DEVICE,
) -> Any:
    """Room for rows, their contexts at hand: on TPU and for int8 pages for so many `tokens` of each, which need none
    for padding, else slots."""
    if paged.is_paged(how, place):
        return paged.open_pages(arch, how, place, prefix, start_PG, tokens)
    return empty_cache(arch, how, *start_PG.shape, slots)


def continue_rows(
    params: Params,
    arch: Architecture,
    how: Execution,
    prefix: Prefix,
    cache: Any,
    tokens_PGT: Int[Array, "P G T"],
    start_PG: Int[Array, "P G"],
    slot: Int[Array, ""] | int,
    place: Placement = ONE_DEVICE,
) -> tuple[Float[Array, "P G T D"], Any]:
    """Feeds T more tokens a row at cache slots slot … slot + T − 1; returns their hidden states and the cache."""
    variables, positions_PGT = {"params": params}, _positions(prefix.length_P, start_PG, slot, tokens_PGT.shape[2])
    if isinstance(cache, paged.PagedCache):
        decoder = Decoder(arch, how, place, OnPages(how, place))
        return decoder.apply(variables, tokens_PGT, positions_PGT, _nothing(arch, how), cache, slot)[:2]
    past, view = _both(how, prefix.layers, cache), (prefix.length_P, start_PG, slot)
    hidden, _, cache = Decoder(arch, how, place, OnRows(place)).apply(
        variables, tokens_PGT, positions_PGT, past, (), view
    )
    return hidden, cache


def _positions(length_P: Array, start_PG: Array, slot: Any, tokens: int) -> Array:
    """Of each row's tokens, counted on after its context's; 0 for padding before its start."""
    own = slot + jnp.arange(tokens) - start_PG[..., None]
    return jnp.maximum(length_P[:, None, None] + own, 0)


def unembedding(params: Params, arch: Architecture) -> Float[Array, "D V"]:
    """The matrix from hidden states to logits."""
    return params["embed"].T if arch.tied else params["unembed"]


def logits(hidden: Float[Array, "*B D"], table_DV: Float[Array, "D V"]) -> Float[Array, "*B V"]:
    """Next-token logits in float32."""
    return jnp.einsum("...d,dv->...v", hidden, table_DV.astype(hidden.dtype), preferred_element_type=jnp.float32)


def forward_logits(
    params: Params, arch: Architecture, how: Execution, tokens_BT: Int[Array, "B T"]
) -> Float[Array, "B T V"]:
    """Logits at every position of whole sequences without padding (export checks and oracles)."""
    B, T = tokens_BT.shape
    prefix = Prefix(empty_context(arch, how, B), jnp.zeros((B,), jnp.int32))
    rows = Rows(tokens_BT[:, None], jnp.zeros((B, 1), jnp.int32))
    return logits(hidden_states(params, arch, how, prefix, rows)[:, 0], unembedding(params, arch))
