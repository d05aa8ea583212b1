"""What a run's programs are given: shapes with shardings, laid out as the run lays out its arrays.

Nothing is allocated, no weights are needed, and the mesh may be abstract.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from exprl_jax.config import Config, Model, Supervised
from exprl_jax.mesh import laid_out, microbatches_sharding, replicated, rows_sharding
from exprl_jax.plan.models import frozen_models, known_model
from exprl_jax.programs import abstract_state, build_sft, shard_state
from exprl_jax.records import Draw, Experience, Packed, TrainState
from exprl_jax.weights.language_model import LanguageModel

# An SFT run counts its updates from its data; here they are a constant of the learning rate's schedule, nothing more.
SFT_UPDATES = 100


def parameter_shapes(model: LanguageModel, mesh: Mesh, cast: bool = False) -> Any:
    """A model's parameters; `cast`: their copy in the compute dtype, as products take them."""
    transformer = model.on(mesh)
    abstract = transformer.abstract_params(model.config.param_dtype)
    if cast:
        abstract = jax.eval_shape(transformer.cast_kernels, abstract)
    return laid_out(abstract, transformer.shard(abstract))


def frozen_parameters(config: Config, mesh: Mesh, model: Model) -> tuple[str, Any]:
    """The parameters of a model that is kept beside the policy, behind their owner."""
    return frozen_models(config)[model], parameter_shapes(known_model(model), mesh)


def state_shapes(config: Config | Supervised, mesh: Mesh) -> TrainState:
    """What a run trains, with Adam's moments."""
    policy = known_model(config.policy)
    if isinstance(config, Supervised):
        programs = build_sft(config, mesh, policy, SFT_UPDATES)
        return laid_out(programs.abstract, programs.shardings)
    return laid_out(abstract_state(config, policy.arch), shard_state(config, mesh, policy))


def array(mesh: Mesh, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    """A batch array, as `hosts.put_rows` lays it out."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=rows_sharding(mesh) if shape else replicated(mesh))


def draw_shapes(mesh: Mesh, problems: int, group: int, turns: bool) -> Draw:
    """How rows are sampled; where they take `turns` in decode slots, with what is expected of them."""
    return Draw(
        seed=array(mesh, jnp.uint32),
        step=array(mesh, jnp.int32),
        problem_P=array(mesh, jnp.uint32, problems),
        temperature_PG=array(mesh, jnp.float32, problems, group),
        budget_PG=array(mesh, jnp.int32, problems, group),
        expected_P=array(mesh, jnp.int32, problems) if turns else None,
    )


def packed_shapes(mesh: Mesh, shape: tuple[int, int, int]) -> tuple[Packed, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Packed rows of an update's batch [M, B, T], a mask and a number of each slot, as `hosts.put_microbatches`
    lays them out."""
    token, mask, number = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=microbatches_sharding(mesh))
        for dtype in (jnp.int32, jnp.bool_, jnp.float32)
    )
    return Packed(token, token, token, token, token), mask, number


def experience_shapes(mesh: Mesh, shape: tuple[int, int, int]) -> Experience:
    packed, mask, number = packed_shapes(mesh, shape)
    return Experience(packed, mask, number, number, number, number, number, used=array(mesh, jnp.int32))
