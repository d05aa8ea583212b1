"""Row width and microbatch where the config leaves them to the program (0): from lengths, and from memory.

Both are chosen once, when a run opens its data, printed, and recorded with its config: a run that goes on has the same
rows, whatever the rule of a later version says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from exprl_jax.architecture import Architecture
from exprl_jax.config import AnyConfig, Config, Execution, Supervised
from exprl_jax.hosts import say
from exprl_jax.mesh import DATA, bytes_per_device, fit_mesh
from exprl_jax.records import TrainState

TRAINING = Config | Supervised
C = TypeVar("C", bound=TRAINING)

# A row holds this many of the longest sequences, as long as it stays within so many tokens: more fit together with
# fewer slots left over, while attention, which grows with the square, is still the smaller part.
_SEQUENCES, _WIDE = 4, 1024
# Widths are multiples of what kernels divide a row into.
_MULTIPLE = 128
# Tokens of a microbatch a device, at which products are no longer slow for being small.
_TOKENS = {"cpu": 1024}
_ACCELERATOR_TOKENS = 16_384
# Of the memory that is free; the rest is for what the compiler adds.
_SHARE = 0.7


@dataclasses.dataclass(frozen=True)
class Lengths:
    """What an update packs.

    Attributes:
      longest: tokens of the longest sequence, its prompt included.
      mean: of all sequences; their upper bound where they are still to be sampled.
      sequences: of an update, at most.
    """

    longest: int
    mean: float
    sequences: int


def sizes_of(config: Config) -> tuple[int, int]:
    """(row_tokens, microbatch) of a training config; 0 is what the program chooses."""
    section = config.updates if isinstance(config, Config) else config
    return section.row_tokens, section.microbatch


def with_sizes(config: C, row_tokens: int, microbatch: int) -> C:
    """The config with these two."""
    sizes = dict(row_tokens=row_tokens, microbatch=microbatch)
    if isinstance(config, Config):
        return dataclasses.replace(config, updates=dataclasses.replace(config.updates, **sizes))
    return dataclasses.replace(config, **sizes)


def choose_sizes(config: C, lengths: Lengths, arch: Architecture, shards: int, free: int | None, platform: str) -> C:
    """The config with numbers where row width or microbatch are 0.

    Args:
      shards: devices along the mesh's `data` axis.
      free: bytes of a device that an update may use; None where nobody knows.
      platform: of the devices: `cpu`, `gpu` or `tpu`.
    """
    row_tokens, microbatch = sizes_of(config)
    if row_tokens and microbatch:
        return config
    row_tokens = row_tokens or row_width(lengths)
    if not microbatch:
        tokens = _TOKENS.get(platform, _ACCELERATOR_TOKENS)
        if free is not None:
            section = config.updates if isinstance(config, Config) else config
            fixed, per_token = update_bytes(arch, config.policy.execution, section.logp_chunk)
            tokens = min(tokens, max(0, int((_SHARE * free - fixed) / per_token)))
        microbatch = shards * rows_at_once(lengths, row_tokens, shards, tokens)
    return with_sizes(config, row_tokens, microbatch)


def settle_sizes(config: C, lengths: Lengths, arch: Architecture, mesh: Mesh, held: int) -> C:
    """`choose_sizes` for the devices at hand; says what was chosen.

    Args:
      held: bytes of a device that the run keeps during an update: state, gradient and frozen models.
    """
    settled = choose_sizes(config, lengths, arch, mesh.shape[DATA], _free_bytes(held), mesh.devices.flat[0].platform)
    section = "config.updates" if isinstance(config, Config) else "config"
    names = zip(("row_tokens", "microbatch"), sizes_of(config), sizes_of(settled))
    if chosen := [f"{section}.{name} = {now}" for name, was, now in names if was != now]:
        say(f"{', '.join(chosen)}: for sequences of up to {lengths.longest} tokens, {lengths.sequences} an update")
    return settled


def row_width(lengths: Lengths) -> int:
    """Of the longest sequence, or of up to four of them within 1,024 tokens; a multiple of 128."""
    times = max(1, min(_SEQUENCES, lengths.sequences, _WIDE // lengths.longest))
    return -(-times * lengths.longest // _MULTIPLE) * _MULTIPLE


def rows_at_once(lengths: Lengths, row_tokens: int, shards: int, tokens: int) -> int:
    """Rows of a microbatch on each device, at least one: as many as have so many tokens, and at most a quarter of an
    update's, because the last microbatch is computed whole, however few of its rows hold anything."""
    quarter = lengths.sequences * lengths.mean / row_tokens / shards / 4
    return max(1, min(tokens // row_tokens, int(quarter)))


def update_bytes(arch: Architecture, execution: Execution, logp_chunk: int) -> tuple[int, int]:
    """Bytes on a device that an update takes beside the state and its gradient: (whatever the rows, a token).

    A token leaves what the backward pass reads again: all of a layer's results (`remat` none), its input (`full`), or
    that and its attention (`but_attention`); twice the results of one layer are alive while it is gone through.  Logits
    are three float32 arrays [logp_chunk, V].  Attention is made in chunks, and what it takes does not count.
    """
    size = jnp.dtype(execution.compute_dtype).itemsize
    D, heads, kv = arch.width, arch.heads * arch.head_size, arch.kv_heads * arch.head_size
    layer = size * (6 * D + 2 * heads + 2 * kv + 3 * arch.ffn)
    kept = {"none": layer, "full": size * D, "but_attention": size * (D + heads)}[execution.remat]
    return 12 * logp_chunk * arch.vocab_size, arch.layers * kept + 2 * layer


def held_bytes(abstract: TrainState, shardings: TrainState) -> int:
    """Bytes on a device of the state and of a float32 gradient."""
    wide = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), abstract.params)
    return bytes_per_device(abstract, shardings) + bytes_per_device(wide, shardings.params)


def _free_bytes(held: int) -> int | None:
    """Bytes of this process's devices that are left beside what a run holds; None where the platform does not say.  The
    least of all processes', so that they choose the same."""
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in jax.local_devices()]
    least = min((limit for limit in limits if limit is not None), default=-1)
    if jax.process_count() > 1:
        least = int(multihost_utils.process_allgather(np.int64(least)).min())
    return None if least < 0 else max(0, least - held)


def recorded_sizes(config: AnyConfig, recorded: Mapping[str, Any]) -> AnyConfig:
    """The config of a run that goes on: where it leaves a size to the program, that which was chosen before.

    A microbatch that this mesh cannot divide is chosen anew; no number depends on it beyond the order of sums.

    Args:
      recorded: the run's config as its folder has it; empty for a new run.
    """
    if not isinstance(config, TRAINING):
        return config
    before = recorded.get("updates", recorded) if isinstance(config, Config) else recorded
    row_tokens, microbatch = sizes_of(config)
    if not microbatch and before.get("microbatch"):
        shards, _ = fit_mesh(config.mesh, jax.device_count())
        microbatch = 0 if before["microbatch"] % shards else before["microbatch"]
    return with_sizes(config, row_tokens or before.get("row_tokens", 0), microbatch)
