"""Log-probabilities of given tokens without the logits of a whole batch ever existing."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

_ROW = (0, 1, 2)  # the P, G and R axes of a slice


def token_logprobs(
    hidden_PGRD: Float[Array, "P G R D"],
    table_DV: Float[Array, "D V"],
    targets_PGR: Int[Array, "P G R"],
    temperature: float,
    chunk: int,
) -> tuple[Float32[Array, "P G R"], Float32[Array, "P G R"]]:
    """log π(target) and the entropy of π, where π = softmax(hidden · table / temperature).

    The response axis is cut into slices (`slices`), and only one slice's logits exist at a time.  The backward pass
    computes them again and turns them in one pass into the cotangent (onehot − π) · g: autodiff would need the
    maximum and the sum once more and a scatter.  Products take operands in the dtype of `hidden` and accumulate in
    float32; softmax and results are float32.

    The entropy is a metric: no gradient flows through it.

    Args:
      hidden_PGRD: final-norm output at the slots that predict the targets.
      table_DV: unembedding.
      targets_PGR: token ids; NaN comes out for ids outside the vocabulary.
      temperature: of the policy, greater than 0.
      chunk: rows × tokens whose logits may exist at once; at least one token of every row does.

    Returns:
      (logp_PGR, entropy_PGR) in nats.
    """
    if temperature <= 0:
        raise ValueError(f"token_logprobs: got temperature {temperature}, expected a number greater than 0")
    return _token_logprobs(hidden_PGRD, table_DV, targets_PGR, float(temperature), chunk)


def slices(rows: int, tokens: int, chunk: int) -> tuple[int, int]:
    """(number, length) of the slices of `tokens` whose rows × length stays within `chunk`, the length at least 1.

    The fewest slices that the chunk allows, then the shortest length that covers the tokens with them.  Their product
    exceeds `tokens` by less than one slot a slice, whatever the divisors of `tokens`; the excess is padding.
    """
    number = math.ceil(tokens / max(1, chunk // rows))
    return number, math.ceil(tokens / number)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _token_logprobs(hidden_PGRD, table_DV, targets_PGR, temperature, chunk):
    return _forward(hidden_PGRD, table_DV, targets_PGR, temperature, chunk)[0]


def _forward(hidden_PGRD, table_DV, targets_PGR, temperature, chunk):
    P, G, R, _ = hidden_PGRD.shape
    number, length = slices(P * G, R, chunk)
    table = table_DV.astype(hidden_PGRD.dtype)

    def score(_, piece):
        hidden, targets = piece
        logits = _logits(hidden, table, temperature)
        top = logits.max(-1)
        centred = logits - top[..., None]
        weight = jnp.exp(centred)
        total, moment = _sum_pair(weight, weight * centred)
        log_total = jnp.log(total)
        # From the logits, which exist as an array; `centred` never has to.
        target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return None, (target - top - log_total, log_total - moment / total, top + log_total)

    pieces = (_cut(hidden_PGRD, number, length), _cut(targets_PGR, number, length))
    _, (logp, entropy, log_normaliser) = jax.lax.scan(score, None, pieces)
    saved = (hidden_PGRD, table_DV, targets_PGR, log_normaliser)
    return (_join(logp, R), _join(entropy, R)), saved


def _backward(temperature, chunk, saved, cotangent):
    hidden_PGRD, table_DV, targets_PGR, log_normaliser = saved
    P, G, R, _ = hidden_PGRD.shape
    number, length = slices(P * G, R, chunk)
    table = table_DV.astype(hidden_PGRD.dtype)
    slope_PGR = cotangent[0] / temperature

    def pull(d_table, piece):
        hidden, targets, log_normaliser, slope = piece
        logits = _logits(hidden, table, temperature)
        hot = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 3) == targets[..., None]
        d_logits = (jnp.where(hot, 1.0, 0.0) - jnp.exp(logits - log_normaliser[..., None])) * slope[..., None]
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden = jax.lax.dot_general(d_logits, table, (((3,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        d_table += jax.lax.dot_general(hidden, d_logits, ((_ROW, _ROW), ((), ())), preferred_element_type=jnp.float32)
        return d_table, d_hidden.astype(hidden.dtype)

    pieces = (
        _cut(hidden_PGRD, number, length), _cut(targets_PGR, number, length), log_normaliser,
        _cut(slope_PGR, number, length),
    )  # fmt: skip
    d_table, d_hidden = jax.lax.scan(pull, jnp.zeros(table_DV.shape, jnp.float32), pieces)
    return _join(d_hidden, R), d_table.astype(table_DV.dtype), None


_token_logprobs.defvjp(_forward, _backward)


def _logits(hidden, table, temperature):
    product = jax.lax.dot_general(hidden, table, (((3,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    return product * (1.0 / temperature)  # every pass over the logits repeats this, and a division costs more


def _sum_pair(a, b):
    """Sums of both over the last axis, in one reduction: the exponentials that feed them are computed once."""
    zero = jnp.zeros((), a.dtype)
    return jax.lax.reduce((a, b), (zero, zero), lambda x, y: (x[0] + y[0], x[1] + y[1]), (a.ndim - 1,))


def _cut(x, number, length):
    """[P, G, R, ...] → [number, P, G, length, ...]; cut along R alone, so that a sharded P stays where it is."""
    padding = [(0, 0)] * x.ndim
    padding[2] = (0, number * length - x.shape[2])
    x = jnp.pad(x, padding).reshape(*x.shape[:2], number, length, *x.shape[3:])
    return jnp.moveaxis(x, 2, 0)


def _join(x, R):
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, :, :R]
