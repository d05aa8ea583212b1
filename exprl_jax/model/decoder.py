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
from exprl_jax.mesh import ONE_DEVICE, Placement, shard_parameters
from exprl_jax.model import attention, branch_pages, page_attention, paged
from exprl_jax.model.cache import KV, empty_cache, empty_context, row_to_context
from exprl_jax.records import BranchRows, Context, Packed, Prefix, Rows

Params = dict[str, Any]
# What the names of a parameter's adapters end in.
LORA_A, LORA_B = "_lora_a", "_lora_b"


def rms_norm(x: Float[Array, "*B D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "*B D"]:
    """x / rms(x) · scale, in float32; returns x's dtype (Zhang & Sennrich 2019)."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (normed * scale.astype(jnp.float32)).astype(x.dtype)


class Block(nn.Module):
    """One layer: attention, then a gated feed-forward, each on the normed residual."""

    arch: Architecture
    execution: Execution
    placement: Placement
    attention: Attention

    @nn.compact
    def __call__(self, carry, layer_input, positions_PGT, view):
        """One layer on some tokens.

        Args:
          carry: the residual, and the attention's memory.
          layer_input: the layer's number, and its part of the past.
          positions_PGT, view: as in `Decoder`.
        """
        arch, dtype = self.arch, jnp.dtype(self.execution.compute_dtype)
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

        (x_PGTD, memory), placement = carry, self.placement
        h = placement.whole_tokens(rms_norm(x_PGTD, self.param("attn_norm", ones, (D,)), arch.norm_eps))
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
        a, memory, kept = self.attention(q, k, v, memory, layer_input, view)
        x_PGTD += placement.by_tokens(product(a, "o", H, E, D, inner=2))

        h = placement.whole_tokens(rms_norm(x_PGTD, self.param("ffn_norm", ones, (D,)), arch.norm_eps))
        gated = placement.by_columns(jax.nn.silu(product(h, "gate", D, F)) * product(h, "up", D, F))
        x_PGTD += placement.by_tokens(product(gated, "down", F, D))
        return (x_PGTD, memory), kept


class Decoder(nn.Module):
    """Embedding, layers, final norm.  The unembedding is left to whoever needs logits, and of how many tokens."""

    arch: Architecture
    execution: Execution
    placement: Placement
    attention: Attention

    @nn.compact
    def __call__(self, tokens_PGT, positions_PGT, past: Any, memory: Any, view: Any) -> tuple[Array, Any, Any]:
        """Hidden states of some tokens.

        Args:
          tokens_PGT, positions_PGT: int32.
          past: what the attention reads of each layer: a tuple by layer, or, where layers are scanned, arrays with L in
            front.
          memory: what the attention carries from layer to layer.
          view: what is the same for all layers.

        Returns:
          hidden_PGTD after the final norm, the memory, and what the attention keeps of each layer, arranged as `past`
          is.
        """
        arch, execution = self.arch, self.execution
        embed = self.param("embed", nn.initializers.normal(0.02), (arch.vocab_size, arch.width))
        if not arch.tied:
            self.param("unembed", nn.initializers.normal(0.02), (arch.width, arch.vocab_size))
        carry = self.placement.by_tokens(embed[tokens_PGT].astype(execution.compute_dtype)), memory

        block = Block
        if execution.remat != "none":
            names = (attention.KEPT,) if execution.remat == "but_attention" else ()
            policy = jax.checkpoint_policies.save_only_these_names(*names)
            block = nn.remat(Block, prevent_cse=not execution.scan_layers, policy=policy)
        static = (arch, execution, self.placement, self.attention)
        if execution.scan_layers:
            scanned = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast),
                length=arch.layers,
            )
            carry, kept = scanned(*static, name="layers")(carry, (jnp.arange(arch.layers), past), positions_PGT, view)
        else:
            layers = []
            for i, layer_past in enumerate(past):
                carry, own = block(*static, name=f"layer_{i}")(carry, (i, layer_past), positions_PGT, view)
                layers.append(own)
            kept = tuple(layers)
        x, memory = carry
        return rms_norm(x, self.param("final_norm", nn.initializers.ones, (arch.width,)), arch.norm_eps), memory, kept


class Attention(Protocol):
    """What a layer's queries attend to; equal attentions are equal values."""

    def __call__(
        self, q_PGTHE: Array, k_PGTKE: Array, v_PGTKE: Array, memory: Any, layer_input: Any, view: Any
    ) -> tuple:
        """(attention's result, memory, what is kept of this layer)."""


@dataclasses.dataclass(frozen=True)
class RowAttention:
    """Rows on their context and their own slots.  `past` is (context KV, own KV), `view` (length_P, start_PG, slot,
    problem_P); with the last, the context's number among its shard's, contexts are read by any of the P."""

    placement: Placement

    def __call__(self, q, k, v, memory, layer_input, view):
        (_, (context, cache)), (length_P, start_PG, slot, problem_P) = layer_input, view
        new = KV(jnp.swapaxes(k, 2, 3), jnp.swapaxes(v, 2, 3))
        if problem_P is None:
            own = _write(cache, new, slot)
        else:
            data, heads = self.placement.data, self.placement.axis_of(k.shape[3])
            contexts, rows = (data, heads), (data, None, heads)
            context = self.placement.split(_take, (contexts, (data,)), contexts)(context, problem_P)
            own = self.placement.split(_write_each, (rows, rows, (data,)), rows)(cache, new, slot)
        return attention.attend(q, context, length_P, own, start_PG, slot, self.placement), memory, own


@dataclasses.dataclass(frozen=True)
class PagedAttention:
    """Rows on pages.  `memory` is the cache, `view` the slot."""

    execution: Execution
    placement: Placement

    def __call__(self, q, k, v, memory, layer_input, view):
        layer, _ = layer_input
        a, memory = page_attention.attend_pages(q, k, v, memory, layer, view, self.execution, self.placement)
        return a, memory, ()


@dataclasses.dataclass(frozen=True)
class BranchAttention:
    """Rows off which sequences branch, on their context.  `past` is context KV, `view` (length_P, segment_PGT,
    position_PGT)."""

    placement: Placement

    def __call__(self, q, k, v, memory, layer_input, view):
        (_, context), (length_P, *where) = layer_input, view
        own = KV(jnp.swapaxes(k, 2, 3), jnp.swapaxes(v, 2, 3))
        return attention.attend_branches(q, context, length_P, own, *where, self.placement), memory, ()


@dataclasses.dataclass(frozen=True)
class PackedAttention:
    """Packed rows on themselves.  `view` is (segment_BT, shared_BT, position_BT, turns)."""

    placement: Placement

    def __call__(self, q, k, v, memory, layer_input, view):
        a = attention.attend_packed(q[:, 0], k[:, 0], v[:, 0], *view, self.placement)
        return a[:, None], memory, ()


def _write(cache: KV, new: KV, slot) -> KV:
    if cache.k.shape[3] == 0:
        return new
    start = (0, 0, 0, slot, 0)
    return KV(jax.lax.dynamic_update_slice(cache.k, new.k, start), jax.lax.dynamic_update_slice(cache.v, new.v, start))


def _take(context: KV, problem_P) -> KV:
    return jax.tree.map(lambda x: x[problem_P], context)


def _write_each(cache: KV, new: KV, slot_PG) -> KV:
    """Of each row at its own slot."""
    write = jax.vmap(jax.vmap(lambda x, y, slot: jax.lax.dynamic_update_slice(x, y, (0, slot, 0))))
    return KV(write(cache.k, new.k, slot_PG), write(cache.v, new.v, slot_PG))


@dataclasses.dataclass(frozen=True)
class Transformer:
    """A decoder as it runs: what it is, how it runs, and where its arrays lie.  Static and hashable: `jit` sees one
    value.

    Parameters are an argument of every method, so that policy, judge, reference and teacher are one value with up to
    four trees of parameters.
    """

    arch: Architecture
    execution: Execution
    placement: Placement = ONE_DEVICE

    def init_params(self, key: jax.Array, dtype: str) -> Params:
        """Random parameters: kernels and embeddings normal with deviation 0.02, norms 1, biases 0."""
        zeros_111, zeros_11 = jnp.zeros((1, 1, 1), jnp.int32), jnp.zeros((1, 1), jnp.int32)
        decoder = Decoder(self.arch, self.execution, ONE_DEVICE, PackedAttention(ONE_DEVICE))
        view = self._packed_view((zeros_11,) * 3, ONE_DEVICE)
        params = decoder.init(key, zeros_111, zeros_111, self._no_past(), (), view)["params"]
        return jax.tree.map(lambda x: x.astype(dtype), params)

    def abstract_params(self, dtype: str) -> Params:
        """Shapes and dtypes of the parameters; allocates nothing."""
        return jax.eval_shape(lambda: self.init_params(jax.random.key(0), dtype))

    def cast_kernels(self, params: Params) -> Params:
        """What enters matrix products, cast to the compute dtype before a loop rather than at every use inside it.

        Norm scales stay as they are, for norms are float32 in any case: with this or without, a forward is the same.
        """

        def cast(path, x):
            return x if path[-1].key.endswith("norm") else x.astype(self.execution.compute_dtype)

        return jax.tree_util.tree_map_with_path(cast, params)

    def decoding_params(self, params: Params) -> Params:
        """A copy in the compute dtype and in the layout of decoding, made once: no step of a loop casts or gathers."""
        params = self.cast_kernels(params)
        if self.placement.mesh is None:
            return params
        return self.placement.whole_along_data(params, self.shard(params))

    def keep_sharded(self, tree: Any) -> Any:
        """Keeps a tree of parameters, or of their gradients, sharded as parameters are."""
        if self.placement.mesh is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, self.shard(tree))

    def prefill(self, params: Params, context: Context) -> Prefix:
        """Computes the keys and values of each context once, for all its rows."""
        P, C = context.tokens_PC.shape
        none_P = jnp.zeros((P,), jnp.int32)
        past = self._both(empty_context(self.arch, self.execution, P), empty_cache(self.arch, self.execution, P, 1, 0))
        positions_P1C = jnp.broadcast_to(jnp.arange(C), (P, 1, C))
        view = none_P, none_P[:, None], 0, None
        _, _, own = self._apply(
            params, RowAttention(self.placement), context.tokens_PC[:, None], positions_P1C, past, (), view
        )
        return Prefix(row_to_context(own), context.length_P)

    def hidden_states(self, params: Params, prefix: Prefix, rows: Rows) -> Float[Array, "P G T D"]:
        """The final hidden state of every row token, in one pass (scoring)."""
        P, G, T = rows.tokens_PGT.shape
        past = self._both(prefix.layers, empty_cache(self.arch, self.execution, P, G, 0))
        positions_PGT = _positions(prefix.length_P, rows.start_PG, 0, T)
        view = prefix.length_P, rows.start_PG, 0, None
        return self._apply(params, RowAttention(self.placement), rows.tokens_PGT, positions_PGT, past, (), view)[0]

    def branch_hidden_states(self, params: Params, prefix: Prefix, rows: BranchRows) -> Float[Array, "P G T D"]:
        """The final hidden state of every slot of rows off which sequences branch, each as if it stood alone."""
        positions_PGT = prefix.length_P[:, None, None] + rows.position_PGT
        view = prefix.length_P, rows.segment_PGT, rows.position_PGT
        on = BranchAttention(self.placement)
        return self._apply(params, on, rows.tokens_PGT, positions_PGT, prefix.layers, (), view)[0]

    def packed_hidden_states(self, params: Params, packed: Packed) -> Float[Array, "B T D"]:
        """The final hidden state of every token of packed rows, each sequence as if it stood alone."""
        tokens, positions = packed.tokens_BT[:, None], packed.position_BT[:, None]
        view = self._packed_view((packed.segment_BT, packed.shared_BT, packed.position_BT), self.placement)
        hidden = self._apply(params, PackedAttention(self.placement), tokens, positions, self._no_past(), (), view)[0]
        return hidden[:, 0]

    def open_cache(self, prefix: Prefix, start_PG: Int[Array, "P G"], slots: int, tokens: int) -> Any:
        """Room for rows, their contexts at hand: on TPU and for int8 pages for so many `tokens` of each, which need
        none for padding, else slots."""
        if paged.is_paged(self.execution, self.placement):
            return paged.open_pages(self.arch, self.execution, self.placement, prefix, start_PG, tokens)
        return empty_cache(self.arch, self.execution, *start_PG.shape, slots)

    def open_traces(self, prefix: Prefix, start_PG: Int[Array, "P G"], tokens: int, spare: int) -> paged.PagedCache:
        """Pages for so many `tokens` of each trace, and `spare` ones of each problem for rows that go on from them."""
        return paged.open_pages(self.arch, self.execution, self.placement, prefix, start_PG, tokens, spare)

    def branch(
        self, cache: paged.PagedCache, begin_PG: Int[Array, "P G"], start_PG: Int[Array, "P G"], tokens: int
    ) -> paged.PagedCache:
        """Pages of rows that go on from beginnings of traces (`model.branch_pages`)."""
        return branch_pages.branch(cache, begin_PG, start_PG, tokens, self.placement, self.arch.kv_heads)

    def open_slots(self, prefix: Prefix, slots: int, tokens: int, pages: int) -> Any:
        """Room for rows that take turns in decode slots, their contexts at hand.

        Args:
          slots: of a data shard.
          tokens: a row's own, at most.
          pages: of a data shard, for its rows to share; 0 keeps `tokens` for each slot.
        """
        if pages:
            return paged.open_pool(self.arch, self.execution, self.placement, prefix, slots, tokens, pages)
        return empty_cache(self.arch, self.execution, slots * self.placement.shards, 1, tokens)

    def continue_rows(
        self,
        params: Params,
        prefix: Prefix,
        cache: Any,
        tokens_PGT: Int[Array, "P G T"],
        start_PG: Int[Array, "P G"],
        slot: Int[Array, ""] | Int[Array, "P G"] | int,
        problem_P: Int[Array, " P"] | None = None,
    ) -> tuple[Float[Array, "P G T D"], Any]:
        """Feeds T more tokens a row at cache slots slot … slot + T − 1; returns their hidden states and the cache.

        Args:
          prefix: of each of the P; with `problem_P`, its lengths are, and its keys and values are of all problems.  Its
            lengths may be of each row, [P, G], on pages.
          slot: of all rows, or of each.
          problem_P: which of its shard's contexts is read by each of the P, where that is not the index itself.
        """
        positions_PGT = _positions(prefix.length_P, start_PG, slot, tokens_PGT.shape[2])
        if isinstance(cache, paged.PagedCache):
            on_pages = PagedAttention(self.execution, self.placement)
            hidden, cache, _ = self._apply(params, on_pages, tokens_PGT, positions_PGT, self._no_past(), cache, slot)
            return hidden, cache
        past, view = self._both(prefix.layers, cache), (prefix.length_P, start_PG, slot, problem_P)
        hidden, _, cache = self._apply(params, RowAttention(self.placement), tokens_PGT, positions_PGT, past, (), view)
        return hidden, cache

    def unembedding(self, params: Params) -> Float[Array, "D V"]:
        """The matrix from hidden states to logits."""
        return params["embed"].T if self.arch.tied else params["unembed"]

    def shard(self, tree: Any) -> Any:
        """Shardings on the placement's mesh of a tree of parameters, or of any tree that mirrors it."""
        return shard_parameters(tree, self.arch, self.execution, self.placement.mesh)

    def _apply(self, params: Params, on: Any, *arguments: Any) -> Any:
        return Decoder(self.arch, self.execution, self.placement, on).apply({"params": params}, *arguments)

    def _packed_view(self, where: tuple[Array, Array, Array], placement: Placement) -> Any:
        """The view of `PackedAttention`."""
        dtype, size = self.execution.compute_dtype, self.arch.head_size
        return *where, attention.packed_turns(*where, dtype, size, placement)

    def _no_past(self) -> Any:
        """The past of an attention that has none."""
        return () if self.execution.scan_layers else ((),) * self.arch.layers

    def _both(self, contexts: Any, caches: Any) -> Any:
        """The past of `RowAttention`."""
        return (contexts, caches) if self.execution.scan_layers else tuple(zip(contexts, caches, strict=True))


def _positions(length_P: Array, start_PG: Array, slot: Any, tokens: int) -> Array:
    """Of each row's tokens, counted on after its context's; 0 for padding before its start."""
    own = jnp.asarray(slot)[..., None] + jnp.arange(tokens) - start_PG[..., None]
    length_PG = length_P if length_P.ndim == 2 else length_P[:, None]
    return jnp.maximum(length_PG[..., None] + own, 0)


def logits(hidden: Float[Array, "*B D"], table_DV: Float[Array, "D V"]) -> Float[Array, "*B V"]:
    """Next-token logits in float32."""
    return jnp.einsum("...d,dv->...v", hidden, table_DV.astype(hidden.dtype), preferred_element_type=jnp.float32)
