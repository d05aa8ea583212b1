"""Calls on packed rows: what a trained policy starts with, reads and learns from, and what that costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from exprl_jax.config import Config, Supervised
from exprl_jax.layout import check_lengths
from exprl_jax.model.lora import adapt
from exprl_jax.plan.arguments import parameter_shapes, state_shapes
from exprl_jax.plan.costs import Cost, forward, seen_pairs, update
from exprl_jax.plan.memory import owned_bytes, tree_bytes, weight_bytes
from exprl_jax.plan.models import frozen_models, known_model
from exprl_jax.plan.records import GRADIENT, POLICY, Call
from exprl_jax.programs import Programs, SftPrograms
from exprl_jax.records import TrainState
from exprl_jax.weights.language_model import LanguageModel

_STARTING = ("mesh.data", "mesh.model")
TRAINING_KEYS = (
    "updates.microbatch",
    "updates.row_tokens",
    "updates.logp_chunk",
    "policy.execution.remat",
    "mesh.model",
)


class TrainedPolicy(NamedTuple):
    """What a run trains.

    Attributes:
      state: as its programs take it.
      weights: it starts from these; with adapters they are their base, which stays.
      base, acting: arguments with their owners: what adapters stand on, () for none; and what samples.
    """

    model: LanguageModel
    mesh: Mesh
    state: TrainState
    weights: tuple[str, Any]
    base: tuple[str, Any]
    acting: tuple[str, Any]


def trained_policy(config: Config | Supervised, mesh: Mesh) -> TrainedPolicy:
    """Raises ValueError where the model has fewer positions than the config's sequences need."""
    model = known_model(config.policy)
    if not isinstance(config, Supervised):
        check_lengths(config, model.arch)
    state = state_shapes(config, mesh)
    weights = frozen_models(config).get(config.policy, "weights"), parameter_shapes(model, mesh)
    base = weights if config.lora.rank else (POLICY, ())
    return TrainedPolicy(model, mesh, state, weights, base, (base[0], adapt(config.lora, base[1], state.params)))


def start_calls(policy: TrainedPolicy, programs: Programs | SftPrograms) -> list[Call]:
    """Run once, before the first step: the state is made from the weights, and checked."""
    made = owned_bytes(POLICY, policy.state)
    moved = tree_bytes(policy.weights[1]) + sum(made.values())
    params = POLICY, policy.state.params
    return [
        Call(
            "init_state", "start", programs.init_state, (policy.weights,), 0, Cost(bytes=moved), _STARTING, inside=made
        ),
        Call("all_finite", "start", programs.all_finite, (params,), 0, Cost(bytes=made[POLICY]), _STARTING),
    ]


def reading_cost(policy: TrainedPolicy, params: Any, shape: tuple[int, int, int], logits: bool = True) -> Cost:
    """Of one pass over packed rows, each counted as a single sequence, the most that it can be."""
    (M, B, T), model = shape, policy.model
    tokens, pairs = M * B * T, M * B * seen_pairs(T, T)
    passes = Cost(bytes=M * weight_bytes(model, policy.mesh))
    return forward(model.arch, params, tokens, pairs, tokens * logits) + passes


def update_call(
    policy: TrainedPolicy,
    program: Callable,
    name: str,
    shape: tuple[int, int, int],
    arguments: Sequence[tuple[str, Any]],
    teacher: Any = None,
) -> Call:
    """An optimizer update from microbatches.

    Args:
      arguments: after the state and its base.
      teacher: parameters of a model that is asked in it.
    """
    (M, B, T), model, state = shape, policy.model, policy.state
    gradient = tree_bytes(jax.tree.map(lambda x: x.update(dtype=jnp.float32), state.params))
    passes = 2 + (model.execution.remat != "none")
    tokens, pairs = M * B * T, M * B * seen_pairs(T, T)
    cost = update(model.arch, model.execution, policy.acting[1], tokens, pairs, teacher=teacher is not None)
    # The gradient's sum is read and written for each microbatch, and the state once.
    moved = M * (passes * weight_bytes(model, policy.mesh) + 2 * gradient) + 2 * tree_bytes(state)
    cost += Cost(bytes=moved) + (reading_cost(policy, teacher, shape, logits=False) if teacher is not None else Cost())
    given = (POLICY, state), policy.base, *arguments
    return Call(name, "train", program, given, 1, cost, TRAINING_KEYS, M, inside={GRADIENT: gradient})
