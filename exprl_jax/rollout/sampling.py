"""Drawing one token a row from its logits."""

from __future__ import annotations

import zlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from exprl_jax.records import Draw


def fold_in_name(key: Key[Array, ""], name: str) -> Key[Array, ""]:
    """A key of its own for each purpose, so that a new purpose does not disturb the others."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def row_keys(draw: Draw) -> Key[Array, "P G"]:
    """One key a row: a function of seed, step, problem and index within the group, of nothing else."""
    step_key = jax.random.fold_in(fold_in_name(jax.random.key(draw.seed), "rollout"), draw.step)
    group = jnp.arange(draw.temperature_PG.shape[1])
    of_problem = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(step_key, draw.problem_P)
    return jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(None, 0)), in_axes=(0, None))(of_problem, group)


# Tokens a block in the two-level search of `draw_tokens`; about the square root of a vocabulary.
BLOCK = 256


def draw_tokens(
    key_PG: Key[Array, "P G"], logits_PGV: Float[Array, "P G V"], temperature_PG: Float[Array, "P G"]
) -> tuple[Int[Array, "P G"], Float[Array, "P G"], Float[Array, "P G"]]:
    """Samples from softmax(logits / temperature); returns the token, its log-probability there, and the entropy (nats).

    Inverts the cumulative distribution at one uniform number a row, first over blocks of tokens, then within a block:
    one pass of exponentials where Gumbel noise would need V random numbers and logarithms a row.  Where the
    temperature is 0, takes the argmax and returns its log-probability, and the entropy, at temperature 1.
    """
    P, G, V = logits_PGV.shape
    greedy_PG = temperature_PG == 0
    scaled = logits_PGV / jnp.where(greedy_PG, 1.0, temperature_PG)[..., None]
    top_PG = jnp.max(scaled, axis=-1)
    centred = scaled - top_PG[..., None]
    mass = jnp.exp(centred)
    # H = log Σ m − Σ m·log m / Σ m; a token without mass adds nothing, though the log of its mass be −∞.
    moment_PG = jnp.sum(jnp.where(mass > 0, mass * centred, 0.0), axis=-1)
    mass = jnp.pad(mass, ((0, 0), (0, 0), (0, -V % BLOCK))).reshape(P, G, -1, BLOCK)
    block_mass = jnp.sum(mass, axis=-1)
    total_PG = jnp.sum(block_mass, axis=-1)

    goal_PG = jax.vmap(jax.vmap(jax.random.uniform))(key_PG) * total_PG
    block_PG, below_PG = _search(block_mass, goal_PG)
    within = jnp.take_along_axis(mass, block_PG[..., None, None], axis=2)[:, :, 0]
    offset_PG, _ = _search(within, goal_PG - below_PG)
    sampled_PG = block_PG * BLOCK + offset_PG

    token_PG = jnp.where(greedy_PG, jnp.argmax(scaled, axis=-1), sampled_PG).astype(jnp.int32)
    chosen_PG = jnp.take_along_axis(scaled, token_PG[..., None], axis=-1)[..., 0]
    log_total_PG = jnp.log(total_PG)
    return token_PG, chosen_PG - top_PG - log_total_PG, log_total_PG - moment_PG / total_PG


def _search(mass: Float[Array, "P G N"], goal_PG) -> tuple[Int[Array, "P G"], Float[Array, "P G"]]:
    """The first index with mass whose cumulative mass exceeds the goal, and the mass below it.

    Rounding can put the goal at or beyond the total; the last index that has any mass is taken then.  A parallel
    cumulative sum may also step, by a rounding, at an index without mass, so mass is asked for by name.
    """
    through = jnp.cumsum(mass, axis=-1)
    reached = (through > goal_PG[..., None]) & (mass > 0)
    last_PG = jnp.max(jnp.where(mass > 0, jnp.arange(mass.shape[-1]), 0), axis=-1)
    index_PG = jnp.where(jnp.any(reached, axis=-1), jnp.argmax(reached, axis=-1), last_PG)
    index = index_PG[..., None]
    below = jnp.take_along_axis(through, index, axis=-1) - jnp.take_along_axis(mass, index, axis=-1)
    return index_PG, below[..., 0]
