"""The one table of shardings, and where a forward's arrays lie."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as Spec

from exprl_jax import config, mesh
from exprl_jax.model.decoder import Transformer
from exprl_jax.records import TrainState
from tests.oracles.tiny_decoder import FAMILIES, QWEN3, TpuWay, architecture, make_execution, random_params

WIDE = dataclasses.replace(QWEN3, vocab_size=64, width=16, ffn=32, heads=8, kv_heads=4)


def make(data, model):
    return mesh.make_mesh(config.Mesh(data, model))


def specs(arch, execution, over):
    shardings = mesh.shard_parameters(Transformer(arch, execution).abstract_params("float32"), arch, execution, over)
    return jax.tree.map(lambda s: s.spec, shardings, is_leaf=lambda x: isinstance(x, jax.sharding.NamedSharding))


def test_the_table_on_two_by_four():
    norm, heads = Spec(None), Spec("data", "model", None)
    layer = dict(
        attn_norm=norm,
        q=heads,
        k=heads,
        v=heads,
        o=Spec("model", None, "data"),
        q_norm=norm,
        k_norm=norm,
        ffn_norm=norm,
        gate=Spec("data", "model"),
        up=Spec("data", "model"),
        down=Spec("model", "data"),
    )
    rest = dict(embed=Spec("model", "data"), unembed=Spec("data", "model"), final_norm=norm)
    assert specs(WIDE, make_execution(), make(2, 4)) == rest | {"layer_0": layer, "layer_1": layer}
    stacked = {name: Spec(None, *spec) for name, spec in layer.items()}
    assert specs(WIDE, make_execution(True), make(2, 4)) == rest | {"layers": stacked}


def test_dims_that_do_not_divide_are_replicated():
    odd = dataclasses.replace(WIDE, vocab_size=61, heads=6, kv_heads=2, width=15)
    got = specs(odd, make_execution(), make(2, 4))
    assert got["embed"] == Spec(None, None) and got["unembed"] == Spec(None, None)
    assert got["layer_0"]["q"] == got["layer_0"]["k"] == Spec(None, None, None)
    assert got["layer_0"]["gate"] == Spec(None, "model")


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_rules_cover_parameters_gradients_and_moments(family, scan):
    arch, execution, over = architecture(family), make_execution(scan), make(2, 4)
    params = Transformer(arch, execution).abstract_params("float32")
    zero = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(zero, params, jax.eval_shape(optax.adamw(1.0).init, params), zero)
    shardings = mesh.shard_parameters(state, arch, execution, over)
    of_params = mesh.shard_parameters(params, arch, execution, over)
    assert shardings.params == of_params and shardings.opt_state[0].mu == of_params == shardings.opt_state[0].nu
    assert shardings.step == shardings.skipped == shardings.opt_state[0].count == mesh.replicated(over)


def test_a_parameter_without_a_rule_and_a_rule_without_a_parameter_are_errors():
    execution, over = make_execution(), make(2, 4)
    params = Transformer(QWEN3, execution).abstract_params("float32")
    params["layer_1"]["router"] = jax.ShapeDtypeStruct((16, 4), jnp.float32)
    with pytest.raises(ValueError, match=re.escape("no parameter rule matches ['layer_1']['router'] of shape (16, 4)")):
        mesh.shard_parameters(params, QWEN3, execution, over)
    params = Transformer(QWEN3, execution).abstract_params("float32")
    del params["unembed"]
    with pytest.raises(ValueError, match="parameter rule 'unembed' matches no parameter of this qwen3 model"):
        mesh.shard_parameters(params, QWEN3, execution, over)


def test_bytes_per_device_are_those_that_lie_there():
    execution, over = make_execution(), make(2, 4)
    abstract = Transformer(QWEN3, execution).abstract_params("float32")
    shardings = mesh.shard_parameters(abstract, QWEN3, execution, over)
    params = jax.device_put(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract), shardings)
    lying = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(params))
    assert mesh.bytes_per_device(abstract, shardings) == lying < sum(x.nbytes for x in jax.tree.leaves(params))


def test_mesh_sizes():
    assert mesh.fit_mesh(config.Mesh(-1, 2)) == mesh.fit_mesh(config.Mesh(4, 2)) == (4, 2)
    assert mesh.fit_mesh(config.Mesh(-1, 8), devices=32) == (4, 8)
    assert mesh.fit_mesh(config.Mesh(16, 8)) == (16, 8)  # a dry run for other machines than this one
    assert make(4, 2).shape == {"data": 4, "model": 2}
    for execution in (config.Mesh(3, 2), config.Mesh(-1, 3)):
        with pytest.raises(ValueError, match="expected a product of 8"):
            mesh.make_mesh(execution)


# ----------------------------------------------------------------------------------------- where a forward's arrays lie


def spec_of(function, *arrays):
    """How the result lies, without trailing dims that are whole; its values are the argument's."""
    out = jax.jit(function)(*arrays)
    np.testing.assert_array_equal(out, arrays[0])
    axes = [*out.sharding.spec, *[None] * (out.ndim - len(out.sharding.spec))]
    return tuple(axis[0] if isinstance(axis, tuple) and len(axis) == 1 else axis for axis in axes)


def test_residuals_are_sharded_by_tokens_where_those_divide():
    placement, x = mesh.Placement(make(2, 4)), np.arange(8 * 3 * 8 * 4, dtype=np.float32).reshape(8, 3, 8, 4)
    assert spec_of(placement.by_tokens, x) == ("data", None, "model", None)
    assert spec_of(placement.by_tokens, x[:, :, :6]) == ("data", None, None, None)
    assert spec_of(placement.by_tokens, x[:, :, :1]) == ("data", None, None, None)
    assert spec_of(lambda x: placement.whole_tokens(placement.by_tokens(x)), x) == ("data", None, None, None)
    assert spec_of(placement.by_columns, x) == ("data", None, None, "model")
    one = mesh.ONE_DEVICE
    assert all(f(x) is x for f in (one.by_tokens, one.whole_tokens, one.by_columns)) and one.data is None


def test_gathering_tokens_changes_no_gradient():
    placement, x = mesh.Placement(make(2, 4)), np.random.default_rng(0).standard_normal((4, 1, 8, 4)).astype(np.float32)
    got = jax.jit(jax.grad(lambda x: (jnp.sin(placement.whole_tokens(placement.by_tokens(x))) ** 2).sum()))(x)
    np.testing.assert_allclose(got, 2 * np.sin(x) * np.cos(x), atol=1e-6)


def test_a_mapped_forward_does_not_see_data():
    placement = mesh.Placement(make(4, 2), mapped=True)
    mapped = jax.vmap(lambda x: placement.by_tokens(x[None])[0], spmd_axis_name="data")
    x = np.ones((8, 1, 4, 2), np.float32)
    assert placement.data is None and spec_of(mapped, x) == ("data", None, "model", None)


@pytest.mark.parametrize("scan", [False, True])
def test_parameters_for_decoding_are_whole_along_data_only(scan):
    execution, placement = make_execution(scan), mesh.Placement(make(2, 4))
    params = random_params(WIDE, execution)
    shardings = mesh.shard_parameters(params, WIDE, execution, placement.mesh)
    model = Transformer(WIDE, execution, placement)
    decoding = jax.jit(model.decoding_params)(jax.device_put(params, shardings))
    for got, x, sharding in zip(*map(jax.tree.leaves, (decoding, params, shardings)), strict=True):
        np.testing.assert_array_equal(got, x)
        parts = [4 if axis == "model" else 1 for axis in [*sharding.spec, *[None] * (x.ndim - len(sharding.spec))]]
        assert got.sharding.shard_shape(x.shape) == tuple(n // part for n, part in zip(x.shape, parts))
    kept = jax.jit(model.keep_sharded)(params)
    for got, sharding in zip(*map(jax.tree.leaves, (kept, shardings)), strict=True):
        assert got.sharding.is_equivalent_to(sharding, got.ndim)


def test_split_functions_see_their_part():
    placement, x = mesh.Placement(make(2, 4)), np.arange(8 * 3 * 4).reshape(8, 3, 4)

    def part(x, y):
        return x - x.min(), jnp.full((1,), x.size + y.size)

    takes, gives = ((("data", None, "model"), ("data",)), (("data", None, "model"), ("data",)))
    out, size = jax.jit(placement.split(part, takes, gives))(x, np.zeros((2, 5)))
    least = x.reshape(2, 4, 3, 4).min((1, 2))  # of each device's part
    np.testing.assert_array_equal(out, x - np.repeat(least, 4, axis=0)[:, None])
    assert size.tolist() == [4 * 3 + 5] * 2
    assert mesh.ONE_DEVICE.split(part, takes, gives) is part


def test_which_way_forwards_go():
    assert mesh.Placement(make(2, 4)).platform == "cpu" and mesh.ONE_DEVICE.platform is None
    for placement in (mesh.ONE_DEVICE, mesh.Placement(make(2, 4))):
        assert not placement.on_tpu and placement.shares_segments
    assert TpuWay(None).on_tpu and not TpuWay(None).shares_segments
    assert [mesh.Placement(make(2, 4)).axis_of(n) for n in (8, 6)] == ["model", None]
    assert mesh.ONE_DEVICE.axis_of(8) is None
