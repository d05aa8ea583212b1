import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from exprl_jax.learning.logprobs import reverse_kl, slices, token_logprobs
from exprl_jax.mesh import DATA, MODEL, ONE_DEVICE, Placement
from tests.oracles import learning_numpy as oracle

B, T, D, W, V = 6, 7, 5, 3, 64
TEMPERATURE = 0.8
CHUNKS = [1, 6, 13, 18, 1000]  # slices of 1, 1, 2, 3 and 7 tokens, with and without padding


def problem(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (B, T, D), dtype)
    table = jax.random.normal(keys[1], (D, V))
    targets = jax.random.randint(keys[2], (B, T), 0, V)
    return hidden, table, targets, np.asarray(jax.random.normal(keys[3], (B, T)))


@pytest.mark.parametrize("chunk", CHUNKS)
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


def test_slices_in_which_nothing_counts_are_not_computed():
    """12 of 42 tokens count, two slices of 6: what is no number elsewhere reaches neither result nor gradient."""
    hidden, table, targets, slope = problem()
    counted = np.zeros(B * T, bool)
    counted[np.random.default_rng(0).permutation(B * T)[:12]] = True
    counted = jnp.asarray(counted.reshape(B, T))

    def ours(hidden, table, counted_BT=counted):
        logp, entropy = token_logprobs(hidden, table, targets, TEMPERATURE, 6, counted_BT=counted_BT)
        return (jnp.where(counted, logp + entropy, 0.0) * slope).sum(), (logp, entropy)

    blank = jnp.where(counted[..., None], hidden, jnp.nan)
    gradient, results = jax.grad(ours, (0, 1), has_aux=True)(blank, table)
    expected, every = jax.grad(functools.partial(ours, counted_BT=None), (0, 1), has_aux=True)(hidden, table)
    for a, b in zip(results, every):
        np.testing.assert_allclose(a, np.where(counted, b, 0.0), rtol=1e-6)
    assert not np.asarray(gradient[0])[~counted].any()
    for a, b in zip(gradient, expected):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_gradients_of_both_results_match_autodiff(chunk):
    hidden, table, targets, slope = problem()
    entropy_slope = np.roll(slope, 1, axis=1) + 1

    def plain(hidden, table):
        logp = jax.nn.log_softmax(hidden @ table / TEMPERATURE)
        target = jnp.take_along_axis(logp, targets[..., None], -1)[..., 0]
        return (target * slope - (jnp.exp(logp) * logp).sum(-1) * entropy_slope).sum()

    def ours(hidden, table):
        logp, entropy = token_logprobs(hidden, table, targets, TEMPERATURE, chunk)
        return (logp * slope + entropy * entropy_slope).sum()

    assert_close(jax.grad(ours, (0, 1))(hidden, table), jax.grad(plain, (0, 1))(hidden, table))


def test_entropy_gradient_matches_differences():
    hidden, table, targets, slope = problem()

    def ours(hidden, table):
        return (token_logprobs(hidden, table, targets, TEMPERATURE, 13)[1] * slope).sum()

    def entropy(hidden, table):
        return (oracle.token_logprobs(hidden, table, np.asarray(targets), TEMPERATURE)[1] * slope).sum()

    expected = (oracle.slope(lambda h: entropy(h, table), hidden), oracle.slope(lambda t: entropy(hidden, t), table))
    assert_close(jax.grad(ours, (0, 1))(hidden, table), expected)


def test_an_entropy_that_no_loss_reads_costs_no_pass_over_the_vocabulary():
    hidden, table, targets, slope = problem()

    def loss(use, hidden):
        logp, entropy = token_logprobs(hidden, table, targets, TEMPERATURE, 12)
        return use((logp * slope).sum(), entropy.sum())

    def passes(use):
        program = jax.make_jaxpr(jax.jit(jax.grad(functools.partial(loss, use), has_aux=True)))(hidden)
        size = slices(1, B * T, 12)[1] * V
        return sum(v.aval.size == size for e in equations(program.jaxpr) for v in e.outvars)

    metric = passes(lambda logp, entropy: (logp, entropy))
    assert metric == passes(lambda logp, entropy: (logp, 0.0))
    assert metric == passes(lambda logp, entropy: (logp + jax.lax.stop_gradient(entropy), 0.0))
    assert metric < passes(lambda logp, entropy: (logp + entropy, 0.0))


def test_large_logits_stay_finite():
    hidden, table, targets, _ = problem()
    (logp, entropy), pull = jax.vjp(lambda h, t: token_logprobs(h, t, targets, 0.01, 6), 100 * hidden, table)
    assert jnp.isfinite(logp).all() and jnp.isfinite(entropy).all() and (entropy > -1e-6).all()
    assert all(jnp.isfinite(x).all() for x in pull((logp, entropy)))
    teacher = (-100 * hidden[..., :W], table[:W])
    kl, pull = jax.vjp(lambda h, t: reverse_kl(h, t, *teacher, 0.01, 6), 100 * hidden, table)
    assert jnp.isfinite(kl).all() and (kl > 0).all()
    assert all(jnp.isfinite(x).all() for x in pull(kl))


# KL over the whole vocabulary.


def teacher(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(1))
    return jax.random.normal(keys[0], (B, T, W), dtype), jax.random.normal(keys[1], (W, V))


@pytest.mark.parametrize("chunk", CHUNKS)
def test_reverse_kl_matches_the_full_softmax(chunk):
    hidden, table, _, slope = problem()
    kl = jax.jit(reverse_kl, static_argnums=(4, 5))(hidden, table, *teacher(), TEMPERATURE, chunk)
    assert kl.dtype == jnp.float32
    np.testing.assert_allclose(kl, oracle.reverse_kl(hidden, table, *teacher(), TEMPERATURE), rtol=1e-5, atol=1e-5)

    def plain(hidden, table):
        logp, teacher_logp = (
            jax.nn.log_softmax(h @ t / TEMPERATURE) for h, t in ((hidden, table), jax.lax.stop_gradient(teacher()))
        )
        return ((jnp.exp(logp) * (logp - teacher_logp)).sum(-1) * slope).sum()

    def ours(hidden, table):
        return (reverse_kl(hidden, table, *teacher(), TEMPERATURE, chunk) * slope).sum()

    assert_close(jax.grad(ours, (0, 1))(hidden, table), jax.grad(plain, (0, 1))(hidden, table))


def test_reverse_kl_gradient_matches_differences():
    hidden, table, _, slope = problem()

    def ours(hidden, table):
        return (reverse_kl(hidden, table, *teacher(), TEMPERATURE, 13) * slope).sum()

    def kl(hidden, table):
        return (oracle.reverse_kl(hidden, table, *teacher(), TEMPERATURE) * slope).sum()

    expected = (oracle.slope(lambda h: kl(h, table), hidden), oracle.slope(lambda t: kl(hidden, t), table))
    assert_close(jax.grad(ours, (0, 1))(hidden, table), expected)


def test_no_gradient_flows_to_the_teacher():
    hidden, table, _, _ = problem()
    gradient = jax.grad(lambda *t: reverse_kl(hidden, table, *t, TEMPERATURE, 6).sum(), (0, 1))(*teacher())
    assert all((x == 0).all() for x in gradient)
    # Nor where the teacher's head is the policy's own buffer.
    shared = jax.grad(lambda t: reverse_kl(hidden, t, hidden[::-1], t, TEMPERATURE, 6).sum())(table)
    assert_close(shared, jax.grad(lambda t: reverse_kl(hidden, t, hidden[::-1], table, TEMPERATURE, 6).sum())(table))


def test_reverse_kl_to_oneself_is_zero_with_zero_gradient():
    hidden, table, _, _ = problem()
    kl, pull = jax.vjp(lambda h, t: reverse_kl(h, t, hidden, table, TEMPERATURE, 6), hidden, table)
    assert (kl == 0).all() and all((x == 0).all() for x in pull(jnp.ones_like(kl)))


# Precision and memory.


@pytest.mark.parametrize("name", ["logp", "entropy", "kl"])
def test_bfloat16_products_float32_results(name):
    hidden, table, targets, slope = problem(jnp.bfloat16)
    frozen = teacher(jnp.bfloat16)

    def ours(hidden, table):
        logp, entropy = token_logprobs(hidden, table, targets, TEMPERATURE, 6)
        kl = reverse_kl(hidden, table, *frozen, TEMPERATURE, 6)
        return {"logp": logp, "entropy": entropy, "kl": kl}[name]

    def exact(hidden, table):
        rounded = [np.asarray(x.astype(jnp.bfloat16), np.float64) for x in frozen]
        logp, entropy = oracle.token_logprobs(hidden, table, np.asarray(targets), TEMPERATURE)
        return {"logp": logp, "entropy": entropy, "kl": oracle.reverse_kl(hidden, table, *rounded, TEMPERATURE)}[name]

    result, pull = jax.vjp(ours, hidden, table)
    assert result.dtype == jnp.float32
    # What the products take is rounded, and nothing after them.
    rounded = [np.asarray(x.astype(jnp.bfloat16), np.float64) for x in (hidden, table)]
    np.testing.assert_allclose(result, exact(*rounded), rtol=1e-5, atol=1e-5)
    gradient = pull(jnp.asarray(slope))
    assert [x.dtype for x in gradient] == [jnp.bfloat16, jnp.float32]
    expected = (
        oracle.slope(lambda h: (exact(h, rounded[1]) * slope).sum(), rounded[0]),
        oracle.slope(lambda t: (exact(rounded[0], t) * slope).sum(), rounded[1]),
    )
    for ours_, theirs in zip(gradient, expected):
        np.testing.assert_allclose(np.asarray(ours_, np.float64), theirs, rtol=0.02, atol=0.02 * np.abs(theirs).max())


def test_every_product_takes_bfloat16_and_gives_float32():
    hidden, table, targets, slope = problem(jnp.bfloat16)

    def loss(hidden, table):
        logp, entropy = token_logprobs(hidden, table, targets, TEMPERATURE, 6)
        return ((logp + entropy + reverse_kl(hidden, table, *teacher(jnp.bfloat16), TEMPERATURE, 6)) * slope).sum()

    program = jax.make_jaxpr(jax.grad(loss, (0, 1)))(hidden, table)
    products = [e for e in equations(program.jaxpr) if e.primitive.name == "dot_general"]
    assert len(products) == 10  # forward 1 + 2; backward 3 + 4
    for product in products:
        assert all(v.aval.dtype == jnp.bfloat16 for v in product.invars)
        assert product.outvars[0].aval.dtype == jnp.float32


def test_logits_exist_for_one_slice_at_a_time():
    hidden, table, targets, slope = problem()
    chunk = 12
    of_all, of_rows = slices(1, B * T, chunk)[1], B * slices(B, T, chunk)[1]

    def logp_and_entropy(hidden, table):
        return (sum(token_logprobs(hidden, table, targets, TEMPERATURE, chunk)) * slope).sum()

    def kl(hidden, table):
        return (reverse_kl(hidden, table, *teacher(), TEMPERATURE, chunk) * slope).sum()

    assert min(of_all, of_rows) > D  # so that the bound below is one on logits, not on the table
    for loss, tokens in ((logp_and_entropy, of_all), (kl, of_rows)):
        for function in (loss, jax.value_and_grad(loss, (0, 1))):
            sizes = [v.aval.size for e in equations(jax.make_jaxpr(function)(hidden, table).jaxpr) for v in e.outvars]
            assert max(sizes) == tokens * V


def test_a_product_over_all_tokens_would_be_seen():
    hidden, table, _, _ = problem()
    program = jax.make_jaxpr(jax.checkpoint(lambda h, t: (h @ t).sum()))(hidden, table)
    assert max(v.aval.size for e in equations(program.jaxpr) for v in e.outvars) == B * T * V


# Rows and vocabulary sharded.

MESHES = [(2, 4), (1, 8), (8, 1)]
ROWS = 8


def make_placement(data, model):
    return Placement(Mesh(np.array(jax.devices()).reshape(data, model), (DATA, MODEL)))


def sharded_problem(vocabulary, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(2), 7)
    hidden, shown = jax.random.normal(keys[0], (ROWS, T, D), dtype), jax.random.normal(keys[1], (ROWS, T, W), dtype)
    table, teacher_table = jax.random.normal(keys[2], (D, vocabulary)), jax.random.normal(keys[3], (W, vocabulary))
    targets = jax.random.randint(keys[4], (ROWS, T), 0, vocabulary)
    return (hidden, table), (shown, teacher_table), targets, jax.random.normal(keys[5], (3, ROWS, T))


def every_result(policy, teacher, targets, slope_3BT, chunk, over):
    """A scalar that reads log-probs, entropies and KLs, each with slopes of its own; and those."""
    logp, entropy = token_logprobs(*policy, targets, TEMPERATURE, chunk, over)
    results = jnp.stack([logp, entropy, reverse_kl(*policy, *teacher, TEMPERATURE, chunk, over)])
    return (results * slope_3BT).sum(), results


@pytest.mark.parametrize("vocabulary", [64, 63])  # of which `model` divides one
@pytest.mark.parametrize("data, model", MESHES)
def test_sharded_is_unsharded(data, model, vocabulary):
    """With 4, 2 and 1 slices a device; the last target of the vocabulary is the last device's."""
    policy, teacher, targets, slope = sharded_problem(vocabulary)
    targets = targets.at[0, :2].set(jnp.array([0, vocabulary - 1]))
    run = jax.jit(jax.value_and_grad(every_result, has_aux=True), static_argnums=(4, 5))
    (_, expected), gradient = run(policy, teacher, targets, slope, 10**6, ONE_DEVICE)
    for chunk in (2 * ROWS, 5 * ROWS, 10**6):
        (_, results), sharded_gradient = run(policy, teacher, targets, slope, chunk, make_placement(data, model))
        np.testing.assert_allclose(results, expected, rtol=1e-5, atol=1e-5)
        assert_close(sharded_gradient, gradient)


@pytest.mark.parametrize("data, model", [(0, 0), *MESHES])
def test_a_target_outside_the_vocabulary_is_not_a_number(data, model):
    policy, _, targets, slope = sharded_problem(V)
    over = make_placement(data, model) if data else ONE_DEVICE
    outside = jnp.zeros((ROWS, T), bool).at[0, 0].set(True).at[3, 4].set(True).at[7, 6].set(True)
    unknown = targets.at[0, 0].set(-1).at[3, 4].set(V).at[7, 6].set(V + 5)

    def loss(policy, targets):
        logp, entropy = token_logprobs(*policy, targets, TEMPERATURE, 16, over)
        return jnp.where(outside, 0.0, logp * slope[0]).sum(), (logp, entropy)

    run = jax.jit(jax.grad(loss, has_aux=True))
    gradient, (logp, entropy) = run(policy, unknown)
    expected, (known_logp, known_entropy) = run(policy, targets)
    np.testing.assert_array_equal(np.isnan(logp), outside)
    np.testing.assert_array_equal(logp[~outside], known_logp[~outside])
    np.testing.assert_array_equal(entropy, known_entropy)
    assert_close(gradient, expected)  # where no loss reads them they have none


def collectives(text):
    """(kind, shapes of the result, whether it is in a loop, or a branch in it) of every collective of a compiled
    program."""
    inner = r"(?:body|true_computation|false_computation)=%?([\w.\-]+)"
    bodies, found, computation = set(re.findall(inner, text)), [], ""
    for branches in re.findall(r"branch_computations=\{([^}]*)\}", text):
        bodies |= {name.strip(" %") for name in branches.split(",")}
    for line in text.splitlines():
        head = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        computation = head[1] if head else computation
        op = re.search(
            r"= (.+?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", line
        )
        if op:
            shapes = [tuple(map(int, filter(None, dims.split(",")))) for dims in re.findall(r"\w+\[([\d,]*)\]", op[1])]
            found.append((op[2], shapes, computation in bodies))
    return found


@pytest.mark.parametrize("data, model", [(2, 4), (8, 1)])
def test_devices_exchange_no_logits_and_the_tables_gradient_once(data, model):
    """The table lies as a parameter does; in the loop over slices go per-token numbers and hidden states alone."""
    vocabulary, over = 1024, make_placement(data, model)
    (hidden, table), _, targets, slope = sharded_problem(vocabulary)

    def loss(hidden, table, targets):
        logp, entropy = token_logprobs(hidden, table, targets, TEMPERATURE, 2 * ROWS, over)
        return (logp * slope[0] + entropy * slope[1]).sum()

    rows, of_table = NamedSharding(over.mesh, Spec(DATA)), NamedSharding(over.mesh, Spec(None, MODEL))
    given = [jax.device_put(x, layout) for x, layout in ((hidden, rows), (table, of_table), (targets, rows))]
    gradient = jax.jit(jax.grad(loss, (0, 1)), out_shardings=(rows, of_table))
    text = gradient.lower(*given).compile().as_text()
    assert text.count(" while(") == 2  # forward and backward
    found, tokens = collectives(text), ROWS // data * 2
    assert {kind for kind, _, _ in found} == {"all-reduce"}
    of_gradient = [inside for _, shapes, inside in found for shape in shapes if shape == (D, vocabulary // model)]
    assert of_gradient == [False]
    others = [shape for _, shapes, _ in found for shape in shapes if shape != (D, vocabulary // model)]
    assert all(np.prod(shape) <= tokens * D for shape in others)
    # The maximum; sum, moment and target; the cotangent of the hidden states.
    assert sum(inside for _, _, inside in found) >= (3 if model > 1 else 0)


# Slices and doors.


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
    with pytest.raises(ValueError, match="greater than 0"):
        reverse_kl(hidden, table, *teacher(), 0.0, 6)


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=4e-5), a, b)


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
