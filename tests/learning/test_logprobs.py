import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from exprl_jax.learning.logprobs import slices, token_logprobs
from tests.oracles import learning_numpy as oracle

P, G, R, D, V = 2, 3, 7, 5, 64
TEMPERATURE = 0.8


def problem(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (P, G, R, D), dtype)
    table = jax.random.normal(keys[1], (D, V))
    targets = jax.random.randint(keys[2], (P, G, R), 0, V)
    return hidden, table, targets, jax.random.normal(keys[3], (P, G, R))


@pytest.mark.parametrize("chunk", [1, 6, 13, 18, 1000])  # slices of 1, 1, 2, 3 and 7 tokens, with and without padding
def test_matches_the_full_softmax(chunk):
    hidden, table, targets, slope = problem()
    logp, entropy = jax.jit(token_logprobs, static_argnums=(3, 4))(hidden, table, targets, TEMPERATURE, chunk)
    expected = oracle.token_logprobs(hidden, table, np.asarray(targets), TEMPERATURE)
    np.testing.assert_allclose(logp, expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(entropy, expected[1], rtol=1e-5, atol=1e-5)

    def plain(hidden, table):
        logp = jax.nn.log_softmax(hidden @ table / TEMPERATURE)
        return (jnp.take_along_axis(logp, targets[..., None], -1)[..., 0] * slope).sum()

    def ours(hidden, table):
        return (token_logprobs(hidden, table, targets, TEMPERATURE, chunk)[0] * slope).sum()

    for a, b in zip(jax.grad(ours, (0, 1))(hidden, table), jax.grad(plain, (0, 1))(hidden, table)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_large_logits_stay_finite():
    hidden, table, targets, _ = problem()
    (logp, entropy), pull = jax.vjp(lambda h, t: token_logprobs(h, t, targets, 0.01, 6), 100 * hidden, table)
    assert jnp.isfinite(logp).all() and jnp.isfinite(entropy).all() and (entropy > -1e-6).all()
    assert all(jnp.isfinite(x).all() for x in pull((logp, entropy)))


def test_entropy_carries_no_gradient():
    hidden, table, targets, _ = problem()
    gradient = jax.grad(lambda h: token_logprobs(h, table, targets, TEMPERATURE, 6)[1].sum())(hidden)
    assert (gradient == 0).all()


def test_bfloat16_products_float32_results():
    hidden, table, targets, _ = problem(jnp.bfloat16)
    (logp, entropy), pull = jax.vjp(lambda h, t: token_logprobs(h, t, targets, TEMPERATURE, 6), hidden, table)
    assert logp.dtype == entropy.dtype == jnp.float32
    assert [x.dtype for x in pull((logp, entropy))] == [jnp.bfloat16, jnp.float32]
    products = [e for e in equations(jax.make_jaxpr(lambda h: token_logprobs(h, table, targets, 1.0, 6))(hidden).jaxpr)
                if e.primitive.name == "dot_general"]  # fmt: skip
    assert products
    for product in products:
        assert all(v.aval.dtype == jnp.bfloat16 for v in product.invars)
        assert product.outvars[0].aval.dtype == jnp.float32


def test_logits_exist_for_one_slice_at_a_time():
    hidden, table, targets, slope = problem()
    chunk = 12
    _, length = slices(P * G, R, chunk)

    def loss(hidden, table):
        return (token_logprobs(hidden, table, targets, TEMPERATURE, chunk)[0] * slope).sum()

    assert P * G * length * V > D * V  # so that the bound below is one on logits, not on the table
    for function in (loss, jax.value_and_grad(loss, (0, 1))):
        sizes = [v.aval.size for e in equations(jax.make_jaxpr(function)(hidden, table).jaxpr) for v in e.outvars]
        assert max(sizes) == P * G * length * V


def test_a_product_over_all_tokens_would_be_seen():
    hidden, table, _, _ = problem()
    program = jax.make_jaxpr(jax.checkpoint(lambda h, t: (h @ t).sum()))(hidden, table)
    assert max(v.aval.size for e in equations(program.jaxpr) for v in e.outvars) == P * G * R * V


def test_slices_cover_the_tokens_within_the_chunk():
    for rows in (1, 6, 16):
        for tokens in (1, 7, 64, 97, 200):
            for chunk in (1, 16, 100, 1024, 10**6):
                number, length = slices(rows, tokens, chunk)
                assert length == 1 or rows * length <= chunk
                assert tokens <= number * length < tokens + number


def test_slices_of_a_divisible_length_have_no_padding():
    assert slices(16, 64, 256) == (4, 16)


def test_refuses_temperature_zero():
    hidden, table, targets, _ = problem()
    with pytest.raises(ValueError, match="greater than 0"):
        token_logprobs(hidden, table, targets, 0.0, 6)


def equations(jaxpr):
    """Every equation of a program, those of its loops and calls included."""
    for equation in jaxpr.eqns:
        yield equation
        for parameter in equation.params.values():
            for inner in parameter if isinstance(parameter, (tuple, list)) else (parameter,):
                if isinstance(inner, core.ClosedJaxpr):
                    yield from equations(inner.jaxpr)
                elif isinstance(inner, core.Jaxpr):
                    yield from equations(inner)
