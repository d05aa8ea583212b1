"""What only devices and models can check of a config: whole parts for every device, and room in the context."""

from __future__ import annotations

from exprl_jax.architecture import Architecture
from exprl_jax.config import Annotate, AnyConfig, Asking, Config, Evaluate, JudgeTraining, Labelling, Supervised


def check_layout(config: AnyConfig, shards: int) -> None:
    """Checks that every device gets a whole part of every wave and of every microbatch.

    Args:
      shards: devices along the mesh's `data` axis.

    Raises:
      ValueError: names the key to change.
    """
    if isinstance(config, Supervised):
        sizes = {"microbatch": config.microbatch}
        if isinstance(config, JudgeTraining) and config.validation.every:
            sizes["validation.wave"] = config.validation.wave
    elif isinstance(config, Evaluate):
        sizes = {"sampling.wave": config.sampling.wave}
    elif isinstance(config, Annotate | Labelling):
        sizes = {"wave": config.wave}
    elif isinstance(config, Asking):
        sizes = {"wave": config.wave}
        if config.prefixes.rollouts:
            sizes["prefixes.sampling.wave"] = config.prefixes.sampling.wave
    else:
        sizes = {"rollout.wave": config.rollout.wave, "updates.microbatch": config.updates.microbatch}
        if config.has_local_judge:
            sizes["judge.wave"] = config.judge.wave
    for key, size in sizes.items():
        if size % shards:
            part = "problem of every wave" if key.endswith("wave") else "row of every microbatch"
            raise ValueError(
                f"config.{key}: got {size}, expected a multiple of mesh.data = {shards}, so that every device has a "
                f"{part}"
            )

    if not isinstance(config, Evaluate | Asking):
        _check_microbatch(config, shards)


def _check_microbatch(config: Config | Supervised, shards: int) -> None:
    """Rows beyond those that an update can fill, and that every device needs, would only take memory."""
    if isinstance(config, Supervised):
        key, rows, size = "microbatch", config.batch, config.microbatch
    else:
        rows = config.rollout.prompts // config.updates.per_batch * config.rollout.group
        key, size = "updates.microbatch", config.updates.microbatch
    if size >= rows + shards:
        raise ValueError(
            f"config.{key}: got {size} rows, expected less than {rows + shards}: an update has at most {rows} "
            f"sequences, on {shards} devices along mesh.data"
        )


def check_lengths(config: Config, policy: Architecture) -> None:
    """Checks that prompt and response within their budgets are within the policy's context length.

    Raises:
      ValueError: names the budgets to lower.
    """
    tokens = config.data.max_prompt_tokens + config.rollout.max_tokens
    if tokens > policy.max_positions:
        raise ValueError(
            f"config.data.max_prompt_tokens + rollout.max_tokens: got {tokens} tokens, expected at most "
            f"{policy.max_positions}, the policy's context length"
        )


def packed_shape(config: Config | Supervised) -> tuple[int, int, int]:
    """[M, B, T] of an update's arrays: a row for every sequence would be enough."""
    if isinstance(config, Supervised):
        return -(-config.batch // config.microbatch), config.microbatch, config.row_tokens
    rows = config.rollout.prompts // config.updates.per_batch * config.rollout.group
    return -(-rows // config.updates.microbatch), config.updates.microbatch, config.updates.row_tokens
