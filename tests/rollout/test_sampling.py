"""Drawing tokens: from the right distribution, with the right log-probability, whatever rounding does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from exprl_jax.records import Draw
from exprl_jax.rollout.sampling import BLOCK, _search, draw_tokens, fold_in_name, row_keys

V = BLOCK + 44  # two blocks, the second one partly padding
LOGITS = np.random.default_rng(0).standard_normal(V).astype(np.float32)


def draws(logits, temperature, rows=(100, 200), seed=0):
    keys = jax.random.split(jax.random.key(seed), rows)
    logits = jnp.broadcast_to(logits, (*rows, len(logits)))
    drawn = jax.jit(draw_tokens)(keys, logits, jnp.full(rows, temperature, jnp.float32))
    return [np.asarray(x).ravel() for x in drawn]


def probabilities(logits, temperature):
    mass = np.exp(np.asarray(logits, np.float64) / temperature)
    return mass / mass.sum()


def entropy_of(probability):
    some = probability[probability > 0]
    return -(some * np.log(some)).sum()


@pytest.mark.parametrize("temperature", [0.8, 1.3])
def test_draws_from_softmax_and_records_its_logarithm_and_entropy(temperature):
    tokens, logp, entropy = draws(LOGITS, temperature)
    expected = probabilities(LOGITS, temperature)
    np.testing.assert_allclose(logp, np.log(expected)[tokens], atol=1e-5)
    np.testing.assert_allclose(entropy, entropy_of(expected), atol=1e-5)
    counts = np.bincount(tokens, minlength=V)
    common = expected * len(tokens) > 5
    chi2 = ((counts - expected * len(tokens)) ** 2 / (expected * len(tokens)))[common].sum()
    # Mean and variance of chi-square are f and 2f; a search that is off by one comes out a thousand deviations away.
    freedom = common.sum() - 1
    assert common.sum() > 200 and abs(chi2 - freedom) < 5 * np.sqrt(2 * freedom)


def test_rows_of_any_temperature_and_greedy_ones_share_a_batch():
    temperature = jnp.asarray([[0.0, 0.8, 0.0, 2.0]], jnp.float32)
    logits = np.random.default_rng(1).standard_normal((1, 4, V)).astype(np.float32)
    token, logp, entropy = draw_tokens(jax.random.split(jax.random.key(3), (1, 4)), jnp.asarray(logits), temperature)
    for g, t in enumerate([1.0, 0.8, 1.0, 2.0]):
        expected = probabilities(logits[0, g], t)
        np.testing.assert_allclose(logp[0, g], np.log(expected)[token[0, g]], atol=1e-5)
        np.testing.assert_allclose(entropy[0, g], entropy_of(expected), atol=1e-5)
    assert [int(token[0, g]) for g in (0, 2)] == [logits[0, g].argmax() for g in (0, 2)]


@pytest.mark.parametrize("vocabulary", [1, 3, BLOCK, V])
def test_tokens_without_mass_are_never_drawn(vocabulary):
    allowed = np.random.default_rng(2).random(vocabulary) < 0.3
    allowed[0] = True
    logits = np.where(allowed, LOGITS[:vocabulary], -np.inf)
    tokens, logp, entropy = draws(logits, 1.0, rows=(20, 200))
    np.testing.assert_allclose(entropy, entropy_of(probabilities(logits, 1.0)), atol=1e-5)
    assert tokens.max() < vocabulary and allowed[tokens].all() and np.isfinite(logp).all()
    assert len(np.unique(tokens)) == allowed.sum()


@pytest.mark.parametrize("tree", [False, True])
def test_search_takes_an_index_with_mass_at_every_goal(tree, monkeypatch):
    """Also where rounding puts the goal beyond the total, or the cumulative mass steps at an index without any, as a
    sum by a tree does (accelerators)."""
    if tree:
        monkeypatch.setattr(jnp, "cumsum", lambda x, axis: jax.lax.associative_scan(jnp.add, x, axis=x.ndim - 1))
    mass = np.random.default_rng(4).random((30, BLOCK)).astype(np.float32) ** 3
    mass[:, 1::2] = 0
    through = np.asarray(jnp.cumsum(mass, axis=-1))
    assert (through[:, 1::2] != through[:, ::2]).any() == tree
    zero, up, down = np.zeros((30, 1)), np.float32(np.inf), np.float32(-np.inf)
    beyond = through[:, -1:] * 2
    goals = np.concatenate([zero, through, np.nextafter(through, up), np.nextafter(through, down), beyond], axis=1)
    goals = np.maximum(goals, 0).astype(np.float32)
    search = jax.vmap(lambda m, goal: _search(m[None, None], goal[None, None]), in_axes=(None, 0))
    index, below = (np.asarray(x)[:, :, 0, 0] for x in jax.jit(jax.vmap(search))(mass, goals))
    assert (np.take_along_axis(mass, index, 1) > 0).all()
    assert (index[:, 0] == 0).all() and (index[:, -1] == BLOCK - 2).all()
    exact = np.concatenate([zero, np.cumsum(mass.astype(np.float64), axis=1)], axis=1)
    low, high = (np.take_along_axis(exact, index + i, 1) for i in (0, 1))
    np.testing.assert_allclose(below, low, atol=5e-5)
    inside = goals < exact[:, -1:]
    assert ((low - 5e-5 <= goals) & (goals <= high + 5e-5))[inside].all()


def test_a_rows_key_is_of_its_identity_alone():
    def keys(seed=1, step=2, problems=(5, 6), group=3):
        ones = np.ones((len(problems), group))
        draw = Draw(np.uint32(seed), np.int32(step), np.array(problems, np.uint32), ones, ones.astype(np.int32))
        return np.asarray(jax.random.key_data(row_keys(draw)))

    base = keys()
    assert len(np.unique(base.reshape(-1, 2), axis=0)) == 6
    np.testing.assert_array_equal(keys(problems=(7, 6, 5))[[2, 1]], base)
    np.testing.assert_array_equal(keys(group=9)[:, :3], base)
    for other in (keys(seed=2), keys(step=3), keys(problems=(7, 2**32 - 1))):
        assert not (other[:, :, None, None] == base[None, None]).all(-1).any()


def test_names_give_keys_of_their_own():
    key = jax.random.key(0)
    a, b = (jax.random.key_data(fold_in_name(key, name)) for name in ("rollout", "order"))
    assert (np.asarray(a) != np.asarray(b)).any()
