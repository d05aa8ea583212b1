"""What is expected of rollouts follows from those before, and problems are dealt by it."""

import json

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from exprl_jax.data.problems import Problem
from exprl_jax.rollout.lengths import STEPS, LengthRecord, deal

A, B, C = (Problem(name, "?", None, "1", "math") for name in "abc")


def test_a_problem_is_expected_to_be_as_it_was_and_a_new_one_as_the_last_steps():
    record = LengthRecord()
    assert record.expected([A, B]) is None
    record.note([A, B], np.array([[2, 4], [10, 10]]))
    np.testing.assert_array_equal(record.expected([C, B, A]), [6.5, 10, 3])
    record.note([A], np.array([[1, 2]]))
    np.testing.assert_array_equal(record.expected([C, B, A]), [(6.5 + 1.5) / 2, 10, 1.5])
    for _ in range(STEPS):
        record.note([A], np.array([[7, 7]]))
    np.testing.assert_array_equal(record.expected([C, B]), [7, 10])


def test_a_record_goes_on_where_a_checkpoint_left_it():
    record, other = LengthRecord(), LengthRecord()
    record.note([A, B], np.array([[1, 2, 2], [5, 6, 9]]))
    other.restore(json.loads(json.dumps(record.state())))
    for each in (record, other):
        each.note([B], np.array([[1, 1, 2]]))
    np.testing.assert_array_equal(other.expected([A, B, C]), record.expected([A, B, C]))
    assert other.state() == record.state()


def test_problems_are_dealt_the_longest_first():
    lengths = np.array([3, 9, 5, 7, 2, 8, 4, 6])
    np.testing.assert_array_equal(lengths[deal(lengths, 2)], [9, 6, 5, 2, 8, 7, 4, 3])
    np.testing.assert_array_equal(lengths[deal(lengths, 1)], np.sort(lengths)[::-1])
    np.testing.assert_array_equal(deal(np.full(6, 4.0), 3), np.arange(6))


@given(st.sampled_from([1, 2, 4]), st.integers(1, 5), st.randoms(use_true_random=False))
def test_every_problem_is_dealt_once_and_no_queue_gets_much_more(queues, rounds, random):
    lengths = np.array([random.uniform(1, 100) for _ in range(queues * rounds)])
    order = deal(lengths, queues)
    assert sorted(order) == list(range(len(lengths)))
    dealt = lengths[order].reshape(queues, rounds)
    assert (np.diff(dealt) <= 0).all() or np.ptp(lengths) == 0
    # The sums of two queues differ by no more than the longest and the shortest problem.
    assert np.ptp(dealt.sum(-1)) <= np.ptp(lengths) + 1e-9
