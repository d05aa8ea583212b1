"""Bytes a device of what programs are given and allocate, by owner: sums over shapes with shardings."""

from __future__ import annotations

import collections
import functools
import types
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from exprl_jax.config import Asking
from exprl_jax.mesh import DATA, MODEL, bytes_per_device
from exprl_jax.model.branch_pages import spare_pages
from exprl_jax.model.lora import Adapted
from exprl_jax.model.paged import PagedCache
from exprl_jax.plan.arguments import parameter_shapes, state_shapes
from exprl_jax.plan.models import frozen_models, known_model
from exprl_jax.plan.records import ADAM, POLICY, Call, Planned, Result, RowShapes
from exprl_jax.records import TrainState
from exprl_jax.rollout.sampler import open_slots
from exprl_jax.weights.language_model import LanguageModel


def tree_bytes(tree: Any) -> int:
    """Bytes a device of a tree of shapes with shardings."""
    leaves = jax.tree.leaves(tree)
    return bytes_per_device(leaves, [leaf.sharding for leaf in leaves])


def owned_bytes(owner: str, tree: Any) -> dict[str, int]:
    """Bytes a device of an argument, by owner; a state is the policy's and Adam's, and adapters are the policy's,
    whatever owner stands there."""
    if isinstance(tree, Result):
        return {owner: tree.bytes}
    if isinstance(tree, TrainState):
        return {POLICY: tree_bytes(tree.params), ADAM: tree_bytes(tree) - tree_bytes(tree.params)}
    if isinstance(tree, Adapted):
        return {POLICY: tree_bytes(tree.adapters), owner: tree_bytes(tree.base)}
    return {owner: tree_bytes(tree)}


def owners_of(call: Call, results: Mapping[str, Any] = types.MappingProxyType({})) -> collections.Counter[str]:
    """Bytes a device of what a call is given and allocates, by owner.

    Args:
      results: of other programs, by name, as far as the compiler has laid them out.
    """
    owners = collections.Counter(call.inside)
    for owner, tree in call.arguments:
        owners.update(owned_bytes(owner, results.get(tree.name, tree) if isinstance(tree, Result) else tree))
    return owners


def residents(config: Planned, mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """Bytes a device that a run keeps throughout a step, by owner."""
    if config.task == "evaluate":
        return {POLICY: tree_bytes(parameter_shapes(known_model(config.policy), mesh))}
    if isinstance(config, Asking):  # one model after another is loaded, asked and let go
        return {}
    frozen = {role: tree_bytes(parameter_shapes(known_model(m), mesh)) for m, role in frozen_models(config).items()}
    return owned_bytes(POLICY, state_shapes(config, mesh)) | frozen


def keys_bytes(model: LanguageModel, mesh: Mesh, tree: Any) -> int:
    """Bytes a device of keys and values: problems over `data`, heads over `model` where they divide."""
    heads = mesh.shape[MODEL] if model.arch.kv_heads % mesh.shape[MODEL] == 0 else 1
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) // mesh.shape[DATA] // heads


def cache_bytes(
    model: LanguageModel, mesh: Mesh, prefix: Any, rows: RowShapes, tokens: int, trace: int, branches: int
) -> int:
    """Bytes a device of the keys and values, so many `tokens` at most, from which rows are continued.

    Args:
      trace: tokens of each of the rows' traces; 0 where they go on from none.
      branches: rows of a problem that go on from its traces.
    """
    transformer = model.on(mesh)
    if trace:
        start_PG = jax.ShapeDtypeStruct((*prefix.length_P.shape, rows.group), jnp.int32)
        spare = spare_pages(branches, tokens)
        cache = jax.eval_shape(functools.partial(transformer.open_traces, tokens=trace, spare=spare), prefix, start_PG)
    elif rows.turns(mesh.shape[DATA]) > 1:
        sizes = dict(slots=rows.slots, max_tokens=tokens, expected_tokens=rows.expected_tokens)
        cache = jax.eval_shape(functools.partial(open_slots, transformer, **sizes), prefix)
    else:
        start_PG = jax.ShapeDtypeStruct((*prefix.length_P.shape, rows.group), jnp.int32)
        open_cache = functools.partial(transformer.open_cache, slots=tokens, tokens=tokens)
        cache = jax.eval_shape(open_cache, prefix, start_PG)
    if isinstance(cache, PagedCache):
        return keys_bytes(model, mesh, cache.pool)
    # A scan over layers takes the cache as input and gives it as output: two copies, where a pool is written in place.
    return keys_bytes(model, mesh, cache) * (1 + model.execution.scan_layers)


def token_bytes(model: LanguageModel, mesh: Mesh | AbstractMesh) -> float:
    """Bytes a device of one token's keys and values, as rows are decoded from them."""
    size = 1 if model.execution.kv_dtype == "int8" else jnp.dtype(model.execution.compute_dtype).itemsize
    heads = mesh.shape[MODEL] if model.arch.kv_heads % mesh.shape[MODEL] == 0 else 1
    return 2 * model.arch.layers * model.arch.kv_heads * model.arch.head_size * size / heads


def weight_bytes(model: LanguageModel, mesh: Mesh) -> int:
    """Bytes a device of the weights as products take them: in the compute dtype, gathered along `data`."""
    return tree_bytes(parameter_shapes(model, AbstractMesh((1, mesh.shape[MODEL]), (DATA, MODEL)), cast=True))


def copy_bytes(model: LanguageModel, mesh: Mesh, whole: bool) -> int:
    """Bytes a device of the weights' copy that a loop of passes works with; 0 where it would be the weights themselves.

    Args:
      whole: it is gathered along `data`, so that no step of decoding gathers.
    """
    if model.config.param_dtype == model.execution.compute_dtype and (not whole or mesh.shape[DATA] == 1):
        return 0
    return weight_bytes(model, mesh) if whole else tree_bytes(parameter_shapes(model, mesh, cast=True))
