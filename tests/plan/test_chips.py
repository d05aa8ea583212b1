"""Topologies: what the compiler enforces on each generation, and what a mesh axis can receive."""

import jax
import jax.numpy as jnp
import pytest

from exprl_jax.mesh import mesh_over, replicated
from exprl_jax.plan.chips import CHIPS, GIB, axis_bandwidth, topology
from exprl_jax.plan.compiled import uncached


@pytest.mark.parametrize("generation, chips", [("v4", 8), ("v5e", 4), ("v5p", 8), ("v6e", 4)])
def test_the_limit_is_the_one_that_the_compiler_enforces(generation, chips):
    where = topology(f"{generation}:{'2x2x2' if chips == 8 else '2x2'}")
    assert len(where.devices) == chips  # one device a chip
    mesh = mesh_over(where.devices, 1, chips)
    large = jax.ShapeDtypeStruct((2**40,), jnp.int8, sharding=replicated(mesh))
    with uncached(), pytest.raises(jax.errors.JaxRuntimeError) as refused:
        jax.jit(lambda x: x + 1).lower(large).compile()
    assert f"exceeds available HBM ({CHIPS[generation].hbm / GIB:.2f}G)" in str(refused.value)


@pytest.mark.parametrize("name", ["v5e-16", "v5e:3x3", "h100:8", "v5e", "v5p:4x4"])
def test_an_unknown_topology_is_answered_with_those_that_there_are(name):
    with pytest.raises(ValueError, match="expected <generation>:<shape>, one of v4: 2x2x1") as refused:
        topology(name)
    assert repr(name) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("generation", CHIPS)
def test_every_shape_that_is_offered_can_be_described(generation):
    for shape in CHIPS[generation].shapes:
        where = topology(f"{generation}:{shape}")
        assert max(x.coords for x in where.devices)[: len(where.shape)] == [n - 1 for n in where.shape]


@pytest.mark.parametrize(
    "name, data, model, links",
    [
        ("v5e:1x1", 1, 1, {}),
        ("v5e:4x4", 4, 4, {"data": 1, "model": 1, "data+model": 2}),
        ("v5e:4x4", 16, 1, {"data": 2, "data+model": 2}),
        ("v5e:4x4", 2, 8, {"data": 1, "model": 2, "data+model": 2}),  # model takes one axis and half of the other
        ("v6e:16x16", 16, 16, {"data": 2, "model": 2, "data+model": 4}),  # rings
        ("v6e:8x16", 8, 16, {"data": 1, "model": 2, "data+model": 3}),
        ("v5p:2x2x2", 2, 4, {"data": 1, "model": 2, "data+model": 3}),
        ("v5p:2x4x4", 2, 16, {"data": 1, "model": 2, "data+model": 3}),  # no rings short of a cube of 4
        ("v5p:4x4x4", 4, 16, {"data": 2, "model": 4, "data+model": 6}),
    ],
)
def test_a_mesh_axis_has_the_links_of_the_physical_axes_that_it_lies_on(name, data, model, links):
    where = topology(name)
    bandwidth = axis_bandwidth(where, mesh_over(where.devices, data, model))
    assert bandwidth == {axis: count * where.chip.link for axis, count in links.items()}
