"""Log-probabilities, entropies and divergences of policies without the logits of a whole batch ever existing."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Float32, Int

from exprl_jax.mesh import ONE_DEVICE, Placement

_ROW = (0, 1)  # the B and T axes of a slice


def token_logprobs(
    hidden_BTD: Float[Array, "B T D"],
    table_DV: Float[Array, "D V"],
    targets_BT: Int[Array, "B T"],
    temperature: float,
    chunk: int,
    placement: Placement = ONE_DEVICE,
    counted_BT: Bool[Array, "B T"] | None = None,
) -> tuple[Float32[Array, "B T"], Float32[Array, "B T"]]:
    """log π(target) and the entropy of π, where π = softmax(hidden · table / temperature).

    The tokens, on each device those that count first, are cut into slices (`slices`).  Only one slice's logits exist at
    a time, and none of a slice in which no token counts: prompts and padding, half of many rows, cost nothing here.
    The backward pass computes them again and turns them in one pass into the cotangent (onehot − π) · g: autodiff would
    need the maximum and the sum once more and a scatter.  Products take operands in the dtype of `hidden` and
    accumulate in float32; softmax and results are float32.

    Gradients flow through both results.  Where no loss reads the entropy its cotangent is symbolically zero, and the
    backward pass does no work over the vocabulary for it.

    Args:
      hidden_BTD: final-norm output at the slots that predict the targets.
      table_DV: unembedding.
      targets_BT: token ids; NaN comes out for ids outside the vocabulary.
      temperature: of the policy, greater than 0.
      chunk: tokens whose logits may exist at once; at least one's on each device does.
      counted_BT: tokens whose results are wanted; None for all.

    Returns:
      (logp_BT, entropy_BT) in nats; 0 where a token does not count.
    """
    if temperature <= 0:
        raise ValueError(f"token_logprobs: got temperature {temperature}, expected a number greater than 0")
    counted = jnp.ones(targets_BT.shape, bool) if counted_BT is None else counted_BT
    logp_BT, entropy_BT = _token_logprobs(
        hidden_BTD, table_DV, targets_BT, counted, float(temperature), chunk, placement
    )
    unknown = counted & ((targets_BT < 0) | (targets_BT >= table_DV.shape[1]))
    return jnp.where(unknown, jnp.nan, logp_BT), entropy_BT


def top_tokens(hidden_BTD: Float[Array, "B T D"], table_DV: Float[Array, "D V"], chunk: int) -> Int[Array, "B T"]:
    """The most likely token at each slot, sliced as in `token_logprobs`; the first where several are."""
    table = table_DV.astype(hidden_BTD.dtype)

    def top(_, hidden):
        logits = jnp.einsum("btd,dv->btv", hidden, table, preferred_element_type=jnp.float32)
        return None, jnp.argmax(logits, axis=-1).astype(jnp.int32)

    cut, join = _cutting(hidden_BTD, chunk)
    return join(jax.lax.scan(top, None, cut(hidden_BTD))[1])


def reverse_kl(
    hidden_BTD: Float[Array, "B T D"],
    table_DV: Float[Array, "D V"],
    teacher_hidden_BTW: Float[Array, "B T W"],
    teacher_table_WV: Float[Array, "W V"],
    temperature: float,
    chunk: int,
    placement: Placement = ONE_DEVICE,
) -> Float32[Array, "B T"]:
    """KL(π ‖ π_teacher) over the whole vocabulary, for the next token after each slot.

    Σ_v π(v) · (log π(v) − log π_teacher(v)) with π = softmax(hidden · table / temperature), and the teacher's likewise
    from its own hidden states and table, of its own width W, over the same vocabulary.  The teacher is data: no
    gradient flows to it.  Sliced as in `token_logprobs`, but with the logits of both policies at once.

    Args:
      hidden_BTD: the policy's final-norm output.
      table_DV: the policy's unembedding.
      teacher_hidden_BTW: the teacher's final-norm output at the slots that predict the same tokens.
      teacher_table_WV: the teacher's unembedding.
      temperature: of both policies, greater than 0.
      chunk: rows × tokens whose logits, of each policy, may exist at once; at least one token of every row does.

    Returns:
      kl_BT in nats; where the policies agree, 0 but for the rounding of float32, which can make it negative.
    """
    if temperature <= 0:
        raise ValueError(f"reverse_kl: got temperature {temperature}, expected a number greater than 0")
    return _reverse_kl(hidden_BTD, table_DV, teacher_hidden_BTW, teacher_table_WV, float(temperature), chunk, placement)


def slices(rows: int, tokens: int, chunk: int) -> tuple[int, int]:
    """(number, length) of the slices of `tokens` whose rows × length stays within `chunk`, the length at least 1.

    The fewest slices that the chunk allows, then the shortest length that covers the tokens with them.  Their product
    exceeds `tokens` by less than one slot a slice, whatever the divisors of `tokens`; the excess is padding.
    """
    number = math.ceil(tokens / max(1, chunk // rows))
    return number, math.ceil(tokens / number)


@dataclasses.dataclass(frozen=True)
class _Part:
    """What one device has of the logits.

    Attributes:
      chunk: rows × tokens of the device whose logits may exist at once.
      rows, vocabulary: mesh axes that rows and vocabulary are sharded over; None for whole.
    """

    temperature: float
    chunk: int
    rows: str | None
    vocabulary: str | None

    def logits(self, hidden, table):
        product = jax.lax.dot_general(hidden, table, (((2,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        return product * (1.0 / self.temperature)  # every pass over the logits repeats this, and a division costs more

    def top(self, logits):
        top = logits.max(-1)
        return top if self.vocabulary is None else jax.lax.pmax(top, self.vocabulary)

    def hot(self, shape, targets):
        """Where a logit is its target's; nowhere, if another device has that."""
        # Of a target below this device's part the difference is negative, of one beyond it too large: neither is met.
        first = 0 if self.vocabulary is None else jax.lax.axis_index(self.vocabulary) * shape[-1]
        return jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1) == (targets - first)[..., None]

    def sums(self, *terms):
        """The sums over the vocabulary, in one reduction: exponentials that feed several are computed once."""
        zeros = tuple(jnp.zeros((), x.dtype) for x in terms)
        sums = jax.lax.reduce(terms, zeros, lambda x, y: tuple(map(jnp.add, x, y)), (terms[0].ndim - 1,))
        return sums if self.vocabulary is None else jax.lax.psum(sums, self.vocabulary)

    def pull(self, d_logits, hidden, table, d_table):
        """(d_table plus this slice's part, the slice's d_hidden) of the product in `logits`."""
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden = jax.lax.dot_general(d_logits, table, (((2,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        if self.vocabulary is not None:
            d_hidden = jax.lax.psum(d_hidden, self.vocabulary)
        d_table += jax.lax.dot_general(hidden, d_logits, ((_ROW, _ROW), ((), ())), preferred_element_type=jnp.float32)
        return d_table, d_hidden.astype(hidden.dtype)

    def over_rows(self, d_table):
        """Sums the devices' parts once, after the last slice."""
        return d_table if self.rows is None else jax.lax.psum(d_table, self.rows)


def _split(placement, temperature, chunk, table_DV):
    """(part, axes of rows, axes of a table) on the placement's devices."""
    rows, vocabulary = placement.data, placement.axis_of(table_DV.shape[1])
    shards = placement.mesh.shape[rows] if rows else 1
    return _Part(temperature, max(1, chunk // shards), rows, vocabulary), (rows,), (None, vocabulary)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _token_logprobs(hidden_BTD, table_DV, targets_BT, counted_BT, temperature, chunk, placement):
    return _forward(hidden_BTD, table_DV, targets_BT, counted_BT, temperature, chunk, placement)[0]


def _forward(hidden_BTD, table_DV, targets_BT, counted_BT, temperature, chunk, placement):
    part, rows, table = _split(placement, temperature, chunk, table_DV)
    score = placement.split(functools.partial(_score, part), (rows, table, rows, rows), (rows, rows, rows))
    logp, entropy, log_normaliser = score(hidden_BTD, table_DV.astype(hidden_BTD.dtype), targets_BT, counted_BT)
    return (logp, entropy), (hidden_BTD, table_DV, targets_BT, counted_BT, log_normaliser, entropy)


def _score(part, hidden_BTD, table_DV, targets_BT, counted_BT):
    def score(hidden, targets):
        logits = part.logits(hidden, table_DV)
        top = part.top(logits)
        centred = logits - top[..., None]
        weight = jnp.exp(centred)
        chosen = jnp.where(part.hot(logits.shape, targets), logits, 0.0)
        total, moment, target = part.sums(weight, weight * centred, chosen)
        log_total = jnp.log(total)
        return target - top - log_total, log_total - moment / total, top + log_total

    def nothing(_, targets):
        return (jnp.zeros(targets.shape, jnp.float32),) * 3

    def of_slice(_, piece):
        live, *arrays = piece
        return None, jax.lax.cond(live, score, nothing, *arrays)

    cut, join, live = _counted_first(counted_BT, part.chunk)
    _, results = jax.lax.scan(of_slice, None, (live, cut(hidden_BTD), cut(targets_BT)))
    return tuple(jnp.where(counted_BT, join(x), 0.0) for x in results)


def _forward_of_primals(hidden, table, targets, counted, temperature, chunk, placement):
    """`_forward` as `symbolic_zeros` wants it: every array comes with a note of whether it is differentiated."""
    return _forward(hidden.value, table.value, targets.value, counted.value, temperature, chunk, placement)


def _backward(temperature, chunk, placement, saved, cotangent):
    hidden_BTD, table_DV, targets_BT, counted_BT, log_normaliser, entropy = saved
    part, rows, table = _split(placement, temperature, chunk, table_DV)
    slopes = tuple(x / temperature for x in cotangent if not isinstance(x, SymbolicZero))
    read = tuple(not isinstance(x, SymbolicZero) for x in cotangent)  # known while tracing
    takes = (rows, table, *[rows] * (4 + len(slopes)))
    pull = placement.split(functools.partial(_pull_score, part, read), takes, (rows, table))
    d_hidden, d_table = pull(
        hidden_BTD, table_DV.astype(hidden_BTD.dtype), targets_BT, counted_BT, log_normaliser, entropy, *slopes
    )
    return d_hidden, d_table.astype(table_DV.dtype), None, None


def _pull_score(part, read, hidden_BTD, table_DV, targets_BT, counted_BT, log_normaliser_BT, entropy_BT, *slopes):
    def pull(d_table, hidden, targets, log_normaliser, entropy, *slopes):
        logp = part.logits(hidden, table_DV) - log_normaliser[..., None]
        pi, d_logits = jnp.exp(logp), 0.0
        # With z the logits and H the entropy:  d log π(target) / dz = 1[target] − π,  dH / dz = −π · (log π + H).
        if read[0]:
            d_logits += (jnp.where(part.hot(logp.shape, targets), 1.0, 0.0) - pi) * slopes[0][..., None]
        if read[1]:  # the last slope, which is the first too where the log-prob has none
            d_logits -= pi * (logp + entropy[..., None]) * slopes[-1][..., None]
        return part.pull(d_logits, hidden, table_DV, d_table)

    def nothing(d_table, hidden, *_):
        return d_table, jnp.zeros_like(hidden)

    def of_slice(d_table, piece):
        live, *arrays = piece
        return jax.lax.cond(live, pull, nothing, d_table, *arrays)

    cut, join, live = _counted_first(counted_BT, part.chunk)
    # What does not count shares a slice with what does: it has no slope.
    slopes = (jnp.where(counted_BT, x, 0.0) for x in slopes)
    pieces = tuple(map(cut, (hidden_BTD, targets_BT, log_normaliser_BT, entropy_BT, *slopes)))
    d_table, d_hidden = jax.lax.scan(of_slice, jnp.zeros(table_DV.shape, jnp.float32), (live, *pieces))
    return join(d_hidden), part.over_rows(d_table)


_token_logprobs.defvjp(_forward_of_primals, _backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _reverse_kl(hidden_BTD, table_DV, teacher_hidden_BTW, teacher_table_WV, temperature, chunk, placement):
    return _kl_forward(hidden_BTD, table_DV, teacher_hidden_BTW, teacher_table_WV, temperature, chunk, placement)[0]


def _kl_forward(hidden_BTD, table_DV, teacher_hidden_BTW, teacher_table_WV, temperature, chunk, placement):
    part, rows, table = _split(placement, temperature, chunk, table_DV)
    compare = placement.split(functools.partial(_compare, part), (rows, table, rows, table), (rows, rows, rows))
    arrays = (hidden_BTD, table_DV, teacher_hidden_BTW, teacher_table_WV)
    kl, *log_normalisers = compare(*_in_dtype_of_states(arrays))
    return kl, (arrays, kl, log_normalisers)


def _compare(part, hidden_BTD, table_DV, teacher_hidden_BTW, teacher_table_WV):
    def compare(_, piece):
        hidden, teacher_hidden = piece
        logits, teacher_logits = part.logits(hidden, table_DV), part.logits(teacher_hidden, teacher_table_WV)
        top, teacher_top = part.top(logits), part.top(teacher_logits)
        # Both from their own maximum: a common offset of the logits must not be left to cancel in the sum.
        centred, teacher_centred = logits - top[..., None], teacher_logits - teacher_top[..., None]
        weight = jnp.exp(centred)
        total, moment, teacher_total = part.sums(weight, weight * (centred - teacher_centred), jnp.exp(teacher_centred))
        log_total, teacher_log_total = jnp.log(total), jnp.log(teacher_total)
        kl = moment / total + (teacher_log_total - log_total)
        return None, (kl, top + log_total, teacher_top + teacher_log_total)

    cut, join = _cutting(hidden_BTD, part.chunk)
    _, results = jax.lax.scan(compare, None, (cut(hidden_BTD), cut(teacher_hidden_BTW)))
    return tuple(map(join, results))


def _kl_backward(temperature, chunk, placement, saved, cotangent):
    arrays, kl, log_normalisers = saved
    part, rows, table = _split(placement, temperature, chunk, arrays[1])
    pull = placement.split(functools.partial(_pull_kl, part), (rows, table, rows, table, *[rows] * 4), (rows, table))
    d_hidden, d_table = pull(*_in_dtype_of_states(arrays), kl, *log_normalisers, cotangent / temperature)
    return d_hidden, d_table.astype(arrays[1].dtype), None, None


def _pull_kl(part, hidden_BTD, table_DV, teacher_hidden_BTW, teacher_table_WV, *of_slots):
    def pull(d_table, piece):
        hidden, teacher_hidden, kl, log_normaliser, teacher_log_normaliser, slope = piece
        logp = part.logits(hidden, table_DV) - log_normaliser[..., None]
        teacher_logp = part.logits(teacher_hidden, teacher_table_WV) - teacher_log_normaliser[..., None]
        # d KL / dz = π · (log π − log π_teacher − KL)
        d_logits = jnp.exp(logp) * (logp - teacher_logp - kl[..., None]) * slope[..., None]
        return part.pull(d_logits, hidden, table_DV, d_table)

    cut, join = _cutting(hidden_BTD, part.chunk)
    pieces = tuple(map(cut, (hidden_BTD, teacher_hidden_BTW, *of_slots)))
    d_table, d_hidden = jax.lax.scan(pull, jnp.zeros(table_DV.shape, jnp.float32), pieces)
    return join(d_hidden), part.over_rows(d_table)


_reverse_kl.defvjp(_kl_forward, _kl_backward)


def _in_dtype_of_states(arrays):
    hidden, table, teacher_hidden, teacher_table = arrays
    return hidden, table.astype(hidden.dtype), teacher_hidden, teacher_table.astype(teacher_hidden.dtype)


def _counted_first(counted_BT, chunk):
    """(cut, join, live): [B, T, ...] → [number, 1, length, ...] and back, tokens that count before those that do not;
    and in which of the slices there are any that do."""
    (B, T), counted = counted_BT.shape, counted_BT.reshape(-1)
    number, length = slices(1, B * T, chunk)
    order = jnp.argsort(~counted, stable=True)
    place = jnp.argsort(order)

    def cut(x):
        x = x.reshape(B * T, *x.shape[2:])[order]
        x = jnp.pad(x, ((0, number * length - B * T),) + ((0, 0),) * (x.ndim - 1))
        return x.reshape(number, 1, length, *x.shape[1:])

    def join(x):
        return x.reshape(number * length, *x.shape[3:])[place].reshape(B, T, *x.shape[3:])

    return cut, join, jnp.arange(number) * length < counted.sum()


def _cutting(hidden_BTD, chunk):
    """(cut, join): [B, T, ...] → [number, B, length, ...] and back; cut along T alone."""
    B, T, _ = hidden_BTD.shape
    number, length = slices(B, T, chunk)

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, number * length - T)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, number, length, *x.shape[2:]), 1, 0)

    def join(x):
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(B, -1, *x.shape[3:])[:, :T]

    return cut, join
