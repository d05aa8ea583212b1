"""The shape annotations of the numeric rooms are checked while tests run (conftest installs the hook)."""

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

from exprl_jax.learning.logprobs import token_logprobs
from exprl_jax.model.decoder import logits
from exprl_jax.rollout.sampling import draw_tokens


def test_dims_that_disagree_are_refused():
    hidden, table = jnp.zeros((2, 3, 4)), jnp.zeros((4, 5))
    token_logprobs(hidden, table, jnp.zeros((2, 3), int), 1.0, 8)
    with pytest.raises(jaxtyping.TypeCheckError):
        token_logprobs(hidden, table, jnp.zeros((2, 2), int), 1.0, 8)
    with pytest.raises(jaxtyping.TypeCheckError):
        logits(hidden, jnp.zeros((3, 5)))
    with pytest.raises(jaxtyping.TypeCheckError):
        draw_tokens(jax.random.split(jax.random.key(0), (2, 1)), jnp.zeros((2, 2, 5)), jnp.ones((2, 2)))
