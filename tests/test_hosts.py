"""The crossings between host and mesh; what processes agree on is in test_processes.py."""

import jax
import numpy as np
import pytest

from exprl_jax.config import Mesh
from exprl_jax.hosts import fetch_rows, gather_rows, local_problems, put_rows
from exprl_jax.mesh import make_mesh, replicated
from exprl_jax.records import Context, Draw


@pytest.mark.parametrize("data, model", [(1, 8), (2, 4), (8, 1)])
def test_rows_come_back_as_they_went(data, model):
    mesh, random = make_mesh(Mesh(data, model)), np.random.default_rng(0)
    context = Context(random.integers(0, 9, (8, 3), dtype=np.int32), np.arange(8, dtype=np.int32))
    temperature_PG, budget_PG = random.random((8, 2)).astype(np.float32), np.ones((8, 2), np.int32)
    draw = Draw(np.uint32(7), np.int32(3), np.arange(8, dtype=np.uint32), temperature_PG, budget_PG)
    placed_context, placed_draw = put_rows(mesh, (context, draw), 8)
    assert placed_context.tokens_PC.addressable_shards[0].data.shape == (8 // data, 3)
    assert placed_draw.seed.sharding == replicated(mesh) and placed_draw.seed == 7
    for got, expected in zip(jax.tree.leaves(fetch_rows(placed_context)), jax.tree.leaves(context), strict=True):
        np.testing.assert_array_equal(got, expected)
        assert got.dtype == expected.dtype
    np.testing.assert_array_equal(fetch_rows(placed_draw.temperature_PG), draw.temperature_PG)
    np.testing.assert_array_equal(local_problems(mesh, 16), np.arange(16))


def test_problems_that_do_not_divide_over_the_mesh_are_an_error():
    with pytest.raises(ValueError, match="a wave of 6 problems, expected a multiple of the mesh's data axis 8"):
        local_problems(make_mesh(Mesh(8, 1)), 6)


def test_one_process_gathers_what_it_has():
    table = {"length_PG": np.ones((4, 2))}
    np.testing.assert_array_equal(gather_rows(table, np.arange(4))["length_PG"], table["length_PG"])


def test_one_process_gathers_in_the_batchs_order():
    got = gather_rows({"x_P": np.array([20, 0, 30, 10])}, np.array([2, 0, 3, 1]))
    np.testing.assert_array_equal(got["x_P"], [0, 10, 20, 30])
