"""Rows that take turns in decode slots are the rows of the plain sampler, bit for bit, whatever pages they have had."""

import functools
import heapq

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from exprl_jax import config, hosts, mesh
from exprl_jax.mesh import ONE_DEVICE, Placement
from exprl_jax.model import page_attention, paged
from exprl_jax.model.decoder import Transformer
from exprl_jax.records import Context, Draw, Rows
from exprl_jax.rollout.sampler import sample
from tests.oracles import pages_numpy
from tests.oracles.tiny_decoder import QWEN3, TpuWay, random_params
from tests.oracles.tiny_decoder import make_execution as execution

# XLA has another kernel for products of one row, and for such narrow ones of 16 or more: with rows between, nothing
# but slots, order and pages differs.
P, G, C, R, V = 4, 3, 5, 20, QWEN3.vocab_size
ENDS, PAD, PAGE = (3, 7, 11, 20, 41), 0, 4
RANDOM = np.random.default_rng(4)
CONTEXT = Context(RANDOM.integers(0, V, (P, C), dtype=np.int32), np.array([3, 4, 0, 5], np.int32))
ROWS = Rows(np.repeat(RANDOM.integers(0, V, (P, 1, 1), dtype=np.int32), G, 1), np.zeros((P, G), np.int32))
BUDGET_PG = np.full((P, G), R, np.int32)


@pytest.fixture(autouse=True)
def small_pages(monkeypatch):
    monkeypatch.setattr(paged, "PAGE", PAGE)


@functools.partial(jax.jit, static_argnames=("how", "place", "slots", "expected"))
def run(params, context, rows, draw, how=execution(), place=ONE_DEVICE, slots=0, expected=0):
    transformer = Transformer(QWEN3, how, place)
    prefix, sizes = transformer.prefill(params, context), dict(slots=slots, expected_tokens=expected)
    return sample(transformer, params, prefix, rows, draw, max_tokens=R, eos_ids=ENDS, pad_id=PAD, **sizes)


def batch(budget_PG=BUDGET_PG, problems=np.arange(P)):
    temperature_PG = np.full((P, G), 0.8, np.float32)
    draw = Draw(np.uint32(1), np.int32(2), problems.astype(np.uint32), temperature_PG, budget_PG)
    return jax.tree.map(lambda x: x[problems], (CONTEXT, ROWS)) + (
        draw.replace(temperature_PG=temperature_PG, budget_PG=budget_PG[problems]),
    )


def sampled(given=None, how=execution(), **sizes):
    return jax.tree.map(np.asarray, run(random_params(QWEN3, how), *(given or batch()), how=how, **sizes))


@functools.cache
def plain():
    """All rows at a time; of every length, so that slots come free at different steps."""
    rollouts, _ = sampled()
    lengths = rollouts.mask_PGR.sum(-1)
    assert len(np.unique(lengths)) > 5 and lengths.min() == 1 and lengths.max() == R
    return rollouts


def close_to_plain(rollouts):
    """With the plain sampler's log-probs and entropies, from which its own differ by rounding alone."""
    expected = {name: getattr(plain(), name) for name in ("logp_PGR", "entropy_PGR")}
    for name, numbers in expected.items():
        np.testing.assert_allclose(getattr(rollouts, name), numbers, atol=1e-5, err_msg=name)
    return rollouts.replace(**expected)


def assert_bitwise(got, expected):
    for name in ("tokens_PGR", "mask_PGR", "logp_PGR", "entropy_PGR", "ended_PG"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name), err_msg=name)


def schedule(lengths, slots):
    """Steps until the last of these rows has ended, each begun in order when a slot is free."""
    free = [0] * slots
    for length in lengths:
        heapq.heappush(free, heapq.heappop(free) + length)
    return max(free)


def test_one_row_at_a_time_by_the_plain_sampler_gives_the_same():
    """The brute force: nothing beside a row but rows that are not sampled."""
    for p, g in np.ndindex(P, G):
        alone = np.zeros((P, G), np.int32)
        alone[p, g] = R
        rollouts, _ = sampled(batch(alone))
        assert_bitwise(jax.tree.map(lambda x: x[p, g], rollouts), jax.tree.map(lambda x: x[p, g], plain()))


@pytest.mark.parametrize("slots", [1, 2, 5, 11])
def test_the_number_of_slots_changes_nothing(slots):
    rollouts, usage = sampled(slots=slots)
    if slots == 1:  # another kernel of products
        rollouts = close_to_plain(rollouts)
    assert_bitwise(rollouts, plain())
    lengths = plain().mask_PGR.sum(-1).ravel()
    assert (usage.steps, usage.slots, usage.busy) == (schedule(lengths, slots), slots, lengths.sum())
    assert usage.restarts == 0 and usage.pages is None


@pytest.mark.parametrize("slots", [P * G, 99])
def test_a_slot_for_every_row_is_the_plain_sampler(slots):
    rollouts, usage = sampled(slots=slots)
    assert_bitwise(rollouts, plain())
    assert (usage.slots, usage.steps) == (P * G, plain().mask_PGR.sum(-1).max())


def test_order_and_rows_that_are_not_sampled_change_nothing():
    order, budget_PG = np.array([2, 0, 3, 1]), np.where(np.arange(P * G).reshape(P, G) % 4 == 1, 0, R).astype(np.int32)
    budget_PG[3, 2] = 1
    expected, _ = sampled(batch(budget_PG))
    assert not expected.mask_PGR[budget_PG == 0].any() and expected.mask_PGR[3, 2].sum() == 1
    rollouts, usage = sampled(batch(budget_PG, order), slots=2)
    assert_bitwise(rollouts, jax.tree.map(lambda x: x[order], expected))
    assert usage.steps == schedule(expected.mask_PGR[order].sum(-1).ravel(), 2)
    rollouts, usage = sampled(batch(np.zeros((P, G), np.int32)), slots=2)
    assert not rollouts.mask_PGR.any() and usage.steps == 0


class Paged(Placement):
    """A placement of its own, so that its program is."""


@pytest.fixture
def pages_everywhere(monkeypatch):
    monkeypatch.setattr(paged, "is_paged", lambda how, place: True)


def test_pages_on_demand_change_nothing(pages_everywhere):
    """Against pages that every row has from the start; the smallest pool is one row's."""
    expected, _ = sampled(place=Paged(None))
    np.testing.assert_array_equal(expected.tokens_PGR, plain().tokens_PGR)
    restarts, pages = [], []
    for tokens in (0, 12, 4, 1):
        rollouts, usage = sampled(place=Paged(None), slots=5, expected=tokens)
        assert_bitwise(rollouts, expected)
        assert usage.busy >= plain().mask_PGR.sum() and 0 < usage.pages <= usage.steps
        assert (usage.busy == plain().mask_PGR.sum()) == (usage.restarts == 0)
        restarts.append(usage.restarts)
        pages.append(usage.pages / usage.steps)
    assert restarts[0] == 0 < restarts[2] and pages[0] < pages[2]


def test_what_is_expected_of_each_problem_changes_when_rows_begin_and_nothing_else():
    context, rows, draw = batch()
    restarts = []
    for expected_P in ((20, 20, 20, 20), (1, 1, 1, 1), (20, 1, 7, 99)):
        given = context, rows, draw.replace(expected_P=np.array(expected_P, np.int32))
        rollouts, usage = sampled(given, slots=5, expected=8)
        np.testing.assert_array_equal(rollouts.tokens_PGR, plain().tokens_PGR)
        restarts.append(int(usage.restarts))
    assert restarts[0] == 0 < restarts[1]


def test_a_pool_smaller_than_the_slots_budgets_has_pages_on_every_platform():
    rollouts, usage = sampled(slots=3, expected=6)
    np.testing.assert_array_equal(rollouts.tokens_PGR, plain().tokens_PGR)
    close_to_plain(rollouts)
    assert usage.restarts > 0


def test_int8_pages_in_slots_are_those_of_all_rows():
    how = execution(kv_dtype="int8")
    (expected, _), (rollouts, usage) = sampled(how=how), sampled(how=how, slots=3, expected=8)
    assert_bitwise(rollouts, expected)
    assert usage.restarts > 0


def test_the_tpus_way(monkeypatch):
    """Splash for the contexts, and a stand-in for the kernel that reads the pages, which checks what it is handed."""
    monkeypatch.setattr(page_attention, "ragged_paged_attention", pages_numpy.called_back)
    rollouts, _ = sampled(place=TpuWay(None), slots=4, expected=8)
    np.testing.assert_array_equal(rollouts.tokens_PGR, plain().tokens_PGR)
    close_to_plain(rollouts)


@pytest.mark.parametrize("data, model, scan, expected", [(1, 1, False, 0), (2, 1, False, 0), (4, 2, True, 6)])
def test_the_mesh_changes_nothing(data, model, scan, expected):
    """Each data shard has slots, a queue and pages of its own."""
    how, over = execution(scan), mesh.mesh_over(jax.devices()[: data * model], data, model)
    params = random_params(QWEN3, how)
    params = jax.device_put(params, mesh.shard_parameters(params, QWEN3, how, over))
    given = hosts.put_rows(over, batch(), P)
    out, usage = run(params, *given, how=how, place=Placement(over), slots=2, expected=expected)
    assert len(jnp.asarray(out.tokens_PGR).sharding.device_set) == data * model
    out = hosts.fetch_rows(jax.device_put(out, mesh.rows_sharding(over)))
    if model > 1 or expected:  # sums over devices, and over pages, are in another order
        out = close_to_plain(out)
    assert_bitwise(out, plain())
    assert usage.slots == 2 * data
    if not expected:
        lengths = plain().mask_PGR.sum(-1).reshape(data, -1)
        ends = [schedule(of_shard, 2) for of_shard in lengths]
        assert usage.steps == max(ends) and usage.idle == 2 * sum(max(ends) - end for end in ends)


def test_eight_shards_have_eight_queues():
    twice = jax.tree.map(lambda x: np.concatenate([x, x]) if x.ndim else x, batch())
    over = mesh.make_mesh(config.Mesh(8, 1))
    params = random_params(QWEN3, execution())
    params = jax.device_put(params, mesh.shard_parameters(params, QWEN3, execution(), over))
    out, usage = run(params, *hosts.put_rows(over, twice, 2 * P), place=Placement(over), slots=2)
    out = hosts.fetch_rows(jax.device_put(out, mesh.rows_sharding(over)))
    assert_bitwise(out, jax.tree.map(lambda x: np.concatenate([x, x]), plain()))
    assert usage.slots == 16 and usage.busy == 2 * plain().mask_PGR.sum()


def test_rows_of_several_tokens_do_not_queue():
    context, rows, draw = batch()
    longer = Rows(np.repeat(rows.tokens_PGT, 2, axis=2), rows.start_PG)
    with pytest.raises(ValueError, match="rows of 2 tokens cannot wait for slots: expected 1"):
        sampled((context, longer, draw), slots=2)


# ------------------------------------------------------------------------------------------------ pages alone


def test_the_oldest_keep_their_pages_and_the_youngest_yield():
    """Three slots of one layer, eight pages of four tokens, contexts of four tokens; by hand."""
    pool = jnp.zeros((1 + 4, PAGE, 2, 1))
    pages = paged.Pages(jnp.zeros((3, 1, 6), jnp.int32), None, None, None, jnp.array([0, 0, 1, 2]))
    hand = functools.partial(paged.hand_out_pages, layers=1, problems=1, problem_A=jnp.zeros(3, jnp.int32))
    length, old = jnp.full(3, 4), jnp.zeros(3, bool)

    def owners(count, busy, fresh, start, expected=(1, 1, 1)):
        numbers = (jnp.array(x) for x in (count, busy, fresh, start, expected))
        kept, _, after = hand(pool, pages, length_A=length, **dict(zip(NAMES, numbers, strict=True)))
        return kept.tolist(), after.owner_N.tolist(), after.table_PGn[:, 0].tolist()

    # The first wants a third page and none is free: the one that began last gives up its own, page 4 of the pool.
    kept, owner, table = owners([8, 2, 2], [True] * 3, old, [0, 1, 2])
    assert kept == [True, True, False] and owner == [0, 0, 1, 0] and table[0][3] == 1 + 3
    # Two want one, the middle is the youngest: it goes, and its page is enough for one of them alone, the older.
    kept, owner, _ = owners([8, 2, 4], [True] * 3, old, [1, 2, 0])
    assert kept == [False, False, True] and owner.count(2) == 2 and owner.count(0) == owner.count(1) == 0
    # Who has ended frees its pages before anyone must yield; a row that begins owns nothing of the one before it.
    kept, owner, _ = owners([8, 2, 0], [True, True, True], [False, False, True], [0, 1, 9])
    assert kept == [True, True, False] and owner.count(0) == 3
    kept, owner, _ = owners([6, 2, 0], [True, True, True], [False, False, True], [0, 1, 9])
    assert kept == [True] * 3 and owner == [0, 0, 1, 2]
    # A row begins only where every older one may get what it is expected to need; what a slot without a row expects is
    # nothing.
    beginning = [6, 2, 0], [True, True, True], [False, False, True], [0, 1, 9]
    kept, owner, _ = owners(*beginning, expected=(3, 1, 1))
    assert kept == [True, True, False] and owner == [0, 0, 1, 3]
    assert owners(*beginning, expected=(2, 1, 2))[0] == [True, True, False]
    assert owners([6, 0, 0], [True, False, True], [False, False, True], [0, 1, 9], expected=(2, 9, 2))[0][2]


NAMES = ("count_A", "busy_A", "fresh_A", "start_A", "expected_A")
