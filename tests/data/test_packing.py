import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import seen_by

from configs.base import base
from exprl_jax.data.packing import Example, assign_rows, fill_branches, fill_rows

CHECKED = settings(derandomize=True, max_examples=60, deadline=None)
# Groups: (prompt's tokens, tokens of each response).
GROUPS = st.lists(st.tuples(st.integers(1, 6), st.lists(st.integers(1, 6), min_size=1, max_size=4)), max_size=6)
NO_ROWS = np.zeros(0, np.int64)


def examples_of(groups):
    """(examples, group of each); every token says where it is from, prompts are their group's."""
    examples, group_N = [], []
    for g, (prompt, responses) in enumerate(groups):
        shown = tuple(1000 * (g + 1) + i for i in range(prompt))
        for response in responses:
            examples.append(Example(shown, tuple(10**6 + 100 * len(examples) + i for i in range(response))))
            group_N.append(g)
    return examples, np.array(group_N, np.int64)


def lengths_of(examples, share):
    """What a run gives `assign_rows`: (tokens shared, own tokens) of each example; the last token is never fed."""
    shared = [len(e.prompt) - 1 if share else 0 for e in examples]
    return shared, [len(e.prompt) + len(e.response) - 1 - s for e, s in zip(examples, shared)]


def rows_by_the_rule(shared, own, group, width, grouped):
    """First fit, longest first, of the heaviest group first or of all, in words: rows are lists of examples."""
    rows, row_of = [], {}

    def filled(row):
        return sum(own[j] for j in row) + sum({group[j]: shared[j] for j in row}.values())

    def weight(g):
        mine = [i for i in range(len(own)) if group[i] == g]
        return sum(own[i] for i in mine) + shared[mine[0]]

    for i in sorted(
        range(len(own)), key=lambda i: ((-weight(group[i]), group[i]) if grouped else (), -own[i] - shared[i], i)
    ):
        has_group = [row for row in rows if any(group[j] == group[i] for j in row)]
        candidates = [row for row in has_group if filled([*row, i]) <= width]
        candidates = candidates or [row for row in rows if row not in has_group and filled([*row, i]) <= width]
        if not candidates:
            rows.append([])
        row = (candidates or rows[-1:])[0]
        row.append(i)
        row_of[i] = rows.index(row)
    return [row_of[i] for i in range(len(own))]


@CHECKED
@given(GROUPS, st.booleans(), st.integers(12, 30))
def test_longest_first_into_the_first_row_with_room(groups, share, width):
    examples, group_N = examples_of(groups)
    shared, own = lengths_of(examples, share)
    got = assign_rows(shared, own, group_N, width)
    by_group, by_length = (rows_by_the_rule(shared, own, group_N.tolist(), width, grouped) for grouped in (True, False))
    assert got.tolist() == (by_group if max(by_group, default=0) <= max(by_length, default=0) else by_length)
    for row in set(got.tolist()):
        here = np.flatnonzero(got == row)
        assert sum(own[i] for i in here) + sum({group_N[i]: shared[i] for i in here}.values()) <= width


def test_known_packing():
    def apart(lengths, width):
        return assign_rows([0] * len(lengths), lengths, range(len(lengths)), width).tolist()

    # 7 with 3, 6 with 4 in the order of the rule; ties go to the earlier example.
    assert apart([3, 7, 4, 6, 3], 10) == [0, 0, 1, 1, 2]
    # The last has room in both rows; the second would be filled by it, the first is first.
    assert apart([7, 5, 4, 1], 10) == [0, 1, 1, 0]
    assert apart([], 10) == []
    # A group's second row pays for its prompt again; the lighter group fills what is left.
    assert assign_rows([4, 4, 4, 1], [3, 3, 3, 4], [0, 0, 0, 1], 10).tolist() == [0, 0, 1, 2]
    assert assign_rows([4, 4, 4, 1], [3, 3, 3, 2], [0, 0, 0, 1], 10).tolist() == [0, 0, 1, 1]


def sight(packed, m, b, slot):
    """The slots that one sees, in order: earlier ones of its segment and of the shared one."""
    segment, shared = packed.segment_BT[m, b], packed.shared_BT[m, b]
    return [s for s in range(slot + 1) if segment[s] in (segment[slot], shared[slot])]


@CHECKED
@given(GROUPS, st.booleans(), st.integers(12, 30), st.integers(1, 3), st.integers(0, 2))
def test_every_example_comes_out_whole(groups, share, width, B, spare):
    examples, group_N = examples_of(groups)
    shared, own = lengths_of(examples, share)
    row_N = assign_rows(shared, own, group_N, width)
    M = -(-(row_N.max(initial=-1) + 1) // B) + spare
    filled = fill_rows(examples, group_N, row_N, (M, B, width), share)
    packed = filled.packed
    assert {(x.dtype, x.shape) for x in vars(packed).values()} == {(np.dtype(np.int32), (M, B, width))}

    owned = np.zeros((M, B, width), int)
    for example, group, row, first in zip(examples, group_N, row_N, filled.first_N):
        m, b = divmod(int(row), B)
        whole = [*example.prompt, *example.response]
        for i, token in enumerate(example.response):
            # What a response's token is predicted from is the example up to it, at its positions, and nothing else.
            slot, n = first + i, len(example.prompt) + i
            assert packed.target_BT[m, b, slot] == token
            sees = sight(packed, m, b, slot)
            assert packed.tokens_BT[m, b, sees].tolist() == whole[:n]
            assert packed.position_BT[m, b, sees].tolist() == list(range(n))
            owned[m, b, slot] += 1
    assert owned.max(initial=0) <= 1  # no two examples at one slot

    # Tokens fed: every example's but its last; a shared prompt once a row.
    fed = collections.Counter(packed.tokens_BT[packed.segment_BT > 0].tolist())
    expected = collections.Counter()
    prompts = set()
    for example, group, row in zip(examples, group_N, row_N):
        expected.update(example.response[:-1])
        expected.update(example.prompt[-1:])
        if not share or (group, row) not in prompts:
            expected.update(example.prompt[:-1])
        prompts.add((group, row))
    assert fed == expected

    real = packed.segment_BT > 0
    assert (real == (np.arange(width) < real.sum(-1)[..., None])).all()  # no holes
    for name in ("tokens", "target", "shared", "position"):
        assert not getattr(packed, f"{name}_BT")[~real].any()
    used = -(-(row_N.max(initial=-1) + 1) // B)
    assert filled.used == used and filled.used.dtype == np.int32 and not real[used:].any()
    assert filled.padding == pytest.approx(1 - real[:used].mean() if used else 0)


def test_layout():
    """A shared prompt is a segment without its last token; what follows sees it and counts on."""
    examples = [Example((1, 2, 3), (4, 5)), Example((1, 2, 3), (6,)), Example((7,), (8, 9))]
    apart, together = (fill_rows(examples, [0, 0, 1], np.array([0, 0, 1]), (2, 1, 9), share) for share in (False, True))
    packed = apart.packed
    np.testing.assert_array_equal(packed.tokens_BT[:, 0], [[1, 2, 3, 4, 1, 2, 3, 0, 0], [7, 8, 0, 0, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(packed.target_BT[:, 0], [[0, 0, 4, 5, 0, 0, 6, 0, 0], [8, 9, 0, 0, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(packed.segment_BT[0, 0], [1, 1, 1, 1, 2, 2, 2, 0, 0])
    np.testing.assert_array_equal(packed.shared_BT, packed.segment_BT)
    np.testing.assert_array_equal(packed.position_BT[0, 0], [0, 1, 2, 3, 0, 1, 2, 0, 0])
    assert apart.first_N.tolist() == [2, 6, 0] and apart.used == 2 and apart.padding == 9 / 18
    packed = together.packed
    np.testing.assert_array_equal(packed.tokens_BT[:, 0], [[1, 2, 3, 4, 3, 0, 0, 0, 0], [7, 8, 0, 0, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(packed.target_BT[0, 0], [0, 0, 4, 5, 6, 0, 0, 0, 0])
    np.testing.assert_array_equal(packed.segment_BT[0, 0], [1, 1, 2, 2, 3, 0, 0, 0, 0])
    np.testing.assert_array_equal(packed.shared_BT[0, 0], [1, 1, 1, 1, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(packed.position_BT[0, 0], [0, 1, 2, 3, 2, 0, 0, 0, 0])
    assert together.first_N.tolist() == [2, 4, 0] and together.used == 2 and together.padding == 11 / 18


def test_values_stand_where_their_tokens_are_predicted():
    examples, group_N = examples_of([(3, [2, 4]), (1, [3])])
    filled = fill_rows(examples, group_N, np.array([0, 0, 1]), (2, 1, 12), True)
    values = [np.array(e.response, np.float32) for e in examples]
    spread = filled.spread(values, np.float32)
    assert spread.shape == filled.packed.target_BT.shape and spread.dtype == np.float32
    np.testing.assert_array_equal(spread, filled.packed.target_BT)


def test_nothing_to_pack():
    filled = fill_rows([], [], NO_ROWS, (2, 1, 6), True)
    assert filled.used == 0 and filled.padding == 0 and not filled.packed.segment_BT.any()


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="example of 7 tokens into rows of 6"):
        assign_rows([0, 2], [3, 5], [0, 1], 6)
    examples, group_N = examples_of([(2, [1]), (3, [2]), (1, [1])])
    row_N = assign_rows([0, 0, 0], [2, 4, 1], group_N, 5)
    with pytest.raises(ValueError, match="3 examples need 2 rows of 5 tokens, got 1"):
        fill_rows(examples, group_N, row_N, (1, 1, 5), True)
    for empty in (Example((), (1, 2)), Example((1, 2), ())):
        with pytest.raises(ValueError, match="without a prompt or without a response"):
            fill_rows([empty], [0], np.zeros(1, np.int64), (1, 1, 6), True)


# ------------------------------------------------------------------------------------------------ padding of an update


def padding(seed, group, median, share):
    """(padding, rows) of one of the updates of configs/base.py's batch: long-tailed responses, cut at the budget."""
    config, random = base(), np.random.default_rng(seed)
    prompts, budget = config.rollout.prompts // config.updates.per_batch, config.rollout.max_tokens
    width, microbatch = config.updates.row_tokens, config.updates.microbatch
    prompt_P = random.lognormal(np.log(160), 0.5, prompts).astype(int).clip(1, width - budget)
    length_N = random.lognormal(np.log(median), 0.8, prompts * group).astype(int).clip(2, budget)
    group_N = np.repeat(np.arange(prompts), group)
    shared_N = prompt_P[group_N]
    row_N = assign_rows(shared_N, length_N, group_N if share else np.arange(length_N.size), width)
    slots = -(-(row_N.max() + 1) // microbatch) * microbatch * width
    prompts = shared_N[np.unique(np.stack([group_N, row_N]), axis=1, return_index=True)[1]] if share else shared_N
    return 1 - (length_N.sum() + prompts.sum()) / slots, row_N.max() + 1


@pytest.mark.parametrize("group", [10, 16])
@pytest.mark.parametrize("median", [3000, 4000, 9000])
def test_at_most_a_tenth_of_an_updates_slots_is_padding(group, median):
    """On average; at the last median more than a fifth of the rollouts is cut at the budget."""
    paddings = [padding(seed, group, median, share=False) for seed in range(8)]
    assert 0 <= np.mean([apart for apart, _ in paddings]) <= 0.10
    for seed, (_, rows) in enumerate(paddings):
        # Keeping a group together costs some rows where responses are long, and saves some where they are short.
        assert padding(seed, group, median, share=True)[1] <= 1.06 * rows, seed


def test_branches():
    """Three questions about the beginnings of one text, and one that shares nothing: each sees its own prompt."""
    text, ask = (1, 2, 3, 4, 5), (8, 9)
    examples = [Example((*text[:n], *ask), (70 + n,)) for n in (2, 5, 4)] + [Example((6, 9), (71, 72))]
    filled = fill_branches(examples, [0, 0, 0, 1], np.zeros(4, np.int64), (1, 1, 16), [2, 5, 4, 0])
    packed = filled.packed
    np.testing.assert_array_equal(packed.tokens_BT[0, 0], [1, 2, 3, 4, 5, 8, 9, 8, 9, 8, 9, 6, 9, 71, 0, 0])
    np.testing.assert_array_equal(packed.segment_BT[0, 0], [1, 1, 1, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 5, 0, 0])
    np.testing.assert_array_equal(packed.shared_BT[0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 5, 5, 5, 0, 0])
    np.testing.assert_array_equal(packed.position_BT[0, 0], [0, 1, 2, 3, 4, 2, 3, 5, 6, 4, 5, 0, 1, 2, 0, 0])
    np.testing.assert_array_equal(packed.target_BT[0, 0], [0, 0, 0, 0, 0, 0, 72, 0, 75, 0, 74, 0, 71, 72, 0, 0])
    assert filled.first_N.tolist() == [6, 8, 10, 12]
    for example, first in zip(examples, filled.first_N):
        assert seen_by(packed, 0, int(first)) == list(example.prompt)


def test_a_group_in_two_rows_shares_what_is_longest_in_each():
    text = (1, 2, 3, 4, 5)
    examples = [Example((*text[:n], 9), (70 + n,)) for n in (5, 2, 3)]
    filled = fill_branches(examples, [0, 0, 0], np.array([0, 1, 1]), (1, 2, 8), [5, 2, 3])
    np.testing.assert_array_equal(filled.packed.tokens_BT[0], [[1, 2, 3, 4, 5, 9, 0, 0], [1, 2, 3, 9, 9, 0, 0, 0]])
    for example, row, first in zip(examples, filled.row_N, filled.first_N):
        assert seen_by(filled.packed, int(row), int(first)) == list(example.prompt)
