"""The device mesh, the one table of parameter rules, and every PartitionSpec in the package.

Two axes: `data` shards batch rows and, as FSDP does, each parameter; `model` shards heads, feed-forward and
vocabulary.  Batch arrays are sharded along their first dimension, the problems.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from exprl_jax import config
from exprl_jax.architecture import Architecture
from exprl_jax.config import Execution

DATA, MODEL = "data", "model"
Axes = tuple[str | None, ...]


def fit_mesh(mesh_config: config.Mesh, devices: int | None = None) -> tuple[int, int]:
    """The sizes of `data` and `model`; `devices` None takes the config's word, or this machine's count for data −1.

    Raises:
      ValueError: the axes' product is not the number of devices.
    """
    if mesh_config.data != -1 and devices is None:
        return mesh_config.data, mesh_config.model
    devices = jax.device_count() if devices is None else devices
    data = devices // mesh_config.model if mesh_config.data == -1 else mesh_config.data
    if data * mesh_config.model != devices:
        raise ValueError(
            f"config.mesh: got data {mesh_config.data} x model {mesh_config.model}, expected a product of {devices}, "
            "the number of devices; use data=-1 to take all that model leaves"
        )
    return data, mesh_config.model


def make_mesh(mesh_config: config.Mesh) -> Mesh:
    """A `data` × `model` mesh over all devices of all processes.

    Raises:
      ValueError: the axes' product is not the number of devices.
    """
    return mesh_over(jax.devices(), *fit_mesh(mesh_config, jax.device_count()))


def mesh_over(devices: Sequence[Any], data: int, model: int) -> Mesh:
    """A `data` × `model` mesh, along the devices' physical axes where they fit (2 × 8 of a 4 × 4 slice splits one)."""
    placed = mesh_utils.create_device_mesh((data, model), devices, allow_split_physical_axes=True)
    return Mesh(placed, (DATA, MODEL))


def parameter_rules(arch: Architecture) -> tuple[tuple[str, PartitionSpec], ...]:
    """(pattern of a parameter's name, its dims' axes), first match wins; stacked layers get a leading None."""
    rules = [
        (r"embed", PartitionSpec(MODEL, DATA)),
        (r"final_norm|attn_norm|ffn_norm", PartitionSpec(None)),
        (r"q|k|v", PartitionSpec(DATA, MODEL, None)),
        (r"o", PartitionSpec(MODEL, None, DATA)),
        (r"gate|up", PartitionSpec(DATA, MODEL)),
        (r"down", PartitionSpec(MODEL, DATA)),
    ]
    if not arch.tied:
        rules.append((r"unembed", PartitionSpec(DATA, MODEL)))
    if arch.qkv_bias:
        rules.append((r"q_bias|k_bias|v_bias", PartitionSpec(MODEL, None)))
    if arch.qk_norm:
        rules.append((r"q_norm|k_norm", PartitionSpec(None)))
    return tuple(rules)


# Of adapters (`model.lora`): as their target on its side, whole along the rank.
_ADAPTER_RULES = (
    (r"(q|k|v|gate|up)_lora_a", PartitionSpec(DATA, None)),
    (r"(q|k|v)_lora_b", PartitionSpec(None, MODEL, None)),
    (r"(gate|up)_lora_b", PartitionSpec(None, MODEL)),
    (r"o_lora_a", PartitionSpec(MODEL, None, None)),
    (r"down_lora_a", PartitionSpec(MODEL, None)),
    (r"(o|down)_lora_b", PartitionSpec(None, DATA)),
)


def shard_parameters(tree: Any, arch: Architecture, execution: Execution, mesh: Mesh) -> Any:
    """Shardings for a tree of parameters, or for any tree that mirrors it (gradients, Adam's moments, a TrainState),
    with adapters or of adapters alone.

    A leaf is matched by the last key of its path; scalars are replicated.  An axis that does not divide its dimension
    (3 heads over 2 devices) is left out: that dimension is replicated.

    Raises:
      ValueError: a leaf that no rule matches, or a rule that matches no leaf (names it).
    """
    own, used = parameter_rules(arch), set()
    rules = (*own, *_ADAPTER_RULES)

    def sharding_of(path, leaf):
        if leaf.ndim == 0:
            return NamedSharding(mesh, PartitionSpec())
        keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        for pattern, spec in rules:
            if keys and re.fullmatch(pattern, keys[-1]):
                used.add(pattern)
                stacked = (None,) if "layers" in keys and execution.scan_layers else ()
                return NamedSharding(mesh, _fit((*stacked, *spec), leaf.shape, mesh))
        raise ValueError(f"no parameter rule matches {jax.tree_util.keystr(path)} of shape {leaf.shape}")

    shardings = jax.tree_util.tree_map_with_path(sharding_of, tree)
    unused = [pattern for pattern, _ in own if pattern not in used]
    if unused and used - {pattern for pattern, _ in _ADAPTER_RULES}:
        raise ValueError(f"parameter rule {unused[0]!r} matches no parameter of this {arch.family} model")
    return shardings


def _fit(spec: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    return PartitionSpec(
        *(axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(spec, shape, strict=True))
    )


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Of every batch array: problems over `data`."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def microbatches_sharding(mesh: Mesh) -> NamedSharding:
    """Of packed arrays [M, B, ...]: the rows of every microbatch over `data`."""
    return NamedSharding(mesh, PartitionSpec(None, DATA))


def replicated(mesh: Mesh) -> NamedSharding:
    """Of scalars and of what every device needs whole."""
    return NamedSharding(mesh, PartitionSpec())


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the arrays of a forward lie, and with it which kernels there are.

    Attributes:
      mesh: of the run; None for arrays on one device.
      mapped: the forward stands inside a `vmap` over problems with `spmd_axis_name=DATA`, where that axis is not seen.
    """

    mesh: Mesh | None
    mapped: bool = False

    @property
    def platform(self) -> str | None:
        """Of the mesh's devices, as JAX calls it; None where there are no devices, as on a plan's abstract mesh."""
        abstract = self.mesh is None or isinstance(self.mesh, AbstractMesh)
        return None if abstract else self.mesh.devices.flat[0].platform

    @property
    def on_tpu(self) -> bool:
        """Whether forwards go the TPU's way: Pallas TPU kernels, and rows decoded from pages."""
        return self.platform == "tpu"

    def has_cudnn(self, dtype: Any, head_size: int) -> bool:
        """Whether cuDNN has flash attention for such heads: on NVIDIA's GPUs from Ampere on, in half precision."""
        if self.platform != "gpu":
            return False
        device = self.mesh.devices.flat[0]
        ampere = "cuda" in device.client.platform_version and float(device.compute_capability) >= 8
        return ampere and np.dtype(dtype).itemsize == 2 and head_size % 8 == 0 and head_size <= 128

    @property
    def shares_segments(self) -> bool:
        """Whether packed rows may have segments that others see: the TPU's kernel tells segments apart, and no more."""
        return not self.on_tpu

    @property
    def data(self) -> str | None:
        """The axis that problems are sharded over, as a forward sees it."""
        return None if self.mesh is None or self.mapped else DATA

    @property
    def shards(self) -> int:
        """Parts that the problems are divided into."""
        return 1 if self.mesh is None else self.mesh.shape[DATA]

    def axis_of(self, size: int) -> str | None:
        """`model`, if it divides a dimension of this size."""
        return MODEL if self.mesh is not None and size % self.mesh.shape[MODEL] == 0 else None

    def by_tokens(self, x_PGTD: jax.Array) -> jax.Array:
        """Keeps the residual between blocks sharded by problems and, where they divide, by tokens over `model`: norms
        and sums are not repeated on every device of that axis, and its copies kept for the backward pass are parts."""
        return x_PGTD if self.mesh is None else jax.lax.with_sharding_constraint(x_PGTD, self._by_tokens(x_PGTD))

    def whole_tokens(self, x_PGTD: jax.Array) -> jax.Array:
        """Gathers what `by_tokens` sharded, for products with weights whose columns are sharded; the cotangent, a sum
        over their devices, is scattered again."""
        if self.mesh is None:
            return x_PGTD
        return _constrain_apart(x_PGTD, NamedSharding(self.mesh, PartitionSpec(self.data)), self._by_tokens(x_PGTD))

    def by_columns(self, x_PGTF: jax.Array) -> jax.Array:
        """Keeps products with such weights sharded along their last dimension."""
        if self.mesh is None:
            return x_PGTF
        spec = PartitionSpec(self.data, None, None, self.axis_of(x_PGTF.shape[3]))
        return jax.lax.with_sharding_constraint(x_PGTF, NamedSharding(self.mesh, spec))

    def _by_tokens(self, x_PGTD: jax.Array) -> NamedSharding:
        tokens = self.axis_of(x_PGTD.shape[2]) if x_PGTD.shape[2] > 1 else None
        return NamedSharding(self.mesh, PartitionSpec(self.data, None, tokens))

    def whole_along_data(self, params: Any, shardings: Any) -> Any:
        """Parameters in the layout in which tokens are sampled: whole along `data`, so that no decode step gathers.

        Args:
          shardings: of the parameters, as `shard_parameters` gives them.
        """

        def gather(x, sharding):
            spec = PartitionSpec(*(None if axis == DATA else axis for axis in sharding.spec))
            return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

        return jax.tree.map(gather, params, shardings)

    def split(self, function: Callable, takes: Sequence[Axes], gives: Any) -> Callable:
        """The function of each device's part, with explicit collectives (`jax.shard_map`).

        Args:
          takes: axes of each argument's dims; trailing dims that are not named are whole.
          gives: the same of the result, or a tuple of such.
        """
        if self.mesh is None:
            return function
        several = isinstance(gives[0], tuple) if gives else False
        specs = tuple(PartitionSpec(*axes) for axes in gives) if several else PartitionSpec(*gives)
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=tuple(PartitionSpec(*axes) for axes in takes),
            out_specs=specs,
            check_vma=False,
        )


ONE_DEVICE = Placement(None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _constrain_apart(x: jax.Array, forward: NamedSharding, backward: NamedSharding) -> jax.Array:
    """A sharding constraint whose cotangent has another one."""
    return jax.lax.with_sharding_constraint(x, forward)


_constrain_apart.defvjp(
    lambda x, forward, backward: (_constrain_apart(x, forward, backward), None),
    lambda forward, backward, _, cotangent: (jax.lax.with_sharding_constraint(cotangent, backward),),
)


def bytes_per_device(abstract: Any, shardings: Any) -> int:
    """Bytes that a tree of arrays takes on each device."""
    sizes = jax.tree.map(lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize, abstract, shardings)
    return sum(jax.tree.leaves(sizes))


def laid_out(abstract: Any, shardings: Any) -> Any:
    """Shapes and dtypes of a tree of arrays, each with its sharding."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
