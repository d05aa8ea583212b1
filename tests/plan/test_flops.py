"""Counted operations: against hand counts, against the compiler's where it can count, and the kernels' formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import PartitionSpec

from exprl_jax.plan.flops import matrix_flops
from exprl_jax.plan.kernels import KERNELS, Operand, kernel_cost, paged

M, K, N = 8, 16, 32
ONE = 2 * M * K * N


def counted(function, *arguments, steps=0, kernels=None):
    return matrix_flops(jax.jit(function).trace(*arguments).jaxpr, steps, kernels or {})


def arrays(*shapes):
    return [jnp.zeros(shape, jnp.float32) for shape in shapes]


def test_a_product_costs_two_operations_for_each_of_its_terms():
    assert counted(lambda a, b: jnp.tanh(a @ b), *arrays((M, K), (K, N))) == ONE
    assert counted(lambda a, b: jnp.einsum("pmk,pkn->pmn", a, b), *arrays((5, M, K), (5, K, N))) == 5 * ONE
    assert counted(lambda a, b: jnp.einsum("mxy,xyn->mn", a, b), *arrays((M, 2, 3), (2, 3, N))) == 2 * M * 6 * N


def test_a_scan_counts_as_often_as_it_runs():
    def twice_nested(a, b):
        def outer(c, _):
            return jax.lax.scan(lambda d, _: (jnp.sin(d @ b), None), c, None, length=3)[0], None

        return jax.lax.scan(outer, a, None, length=7)[0]

    assert counted(twice_nested, *arrays((M, K), (K, K))) == 21 * 2 * M * K * K


def test_a_loop_that_values_end_runs_as_often_as_the_caller_says():
    def decode(a, b):
        return jax.lax.while_loop(lambda c: c.sum() < 9.0, lambda c: c @ b, a)

    given = arrays((M, K), (K, K))
    assert counted(decode, *given, steps=11) == 11 * 2 * M * K * K
    with pytest.raises(ValueError, match="a loop ends where values say, and got no number of steps for it"):
        counted(decode, *given)

    def nested(a, b):
        return jax.lax.while_loop(lambda c: c.sum() < 9.0, lambda c: decode(c, b), a)

    with pytest.raises(ValueError, match="inside another such loop"):
        counted(nested, *given, steps=11)


def test_a_loop_to_a_constant_from_a_value_runs_at_most_so_often():
    def read(a, b, start):
        return jax.lax.fori_loop(start, 6, lambda i, c: c @ b, a)

    assert counted(read, *arrays((M, K), (K, K)), jnp.int32(2)) == 6 * 2 * M * K * K


def test_the_dearest_branch_counts():
    def either(a, b):
        return jax.lax.cond(a.sum() > 0, lambda: (a @ b) @ b, lambda: a @ b)

    assert counted(either, *arrays((M, K), (K, K))) == 2 * 2 * M * K * K


def test_recomputation_counts_where_it_runs():
    def loss(a, b, c):
        return jnp.sin(jnp.sin(a @ b) @ c).sum()

    given = arrays((M, K), (K, K), (K, K))
    one = 2 * M * K * K
    gradient = jax.grad(loss, argnums=(0, 1, 2))
    assert counted(gradient, *given) == (2 + 4) * one
    assert counted(jax.grad(jax.checkpoint(loss), argnums=(0, 1, 2)), *given) == (2 + 2 + 4) * one


def test_what_each_device_does_counts_for_all():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rows, whole = PartitionSpec("data"), PartitionSpec()
    mapped = jax.shard_map(lambda a, b: a @ b, mesh=mesh, in_specs=(rows, whole), out_specs=rows)
    # Rows are split over data, and each of the two devices along model does the same.
    assert counted(mapped, *arrays((M, K), (K, N))) == 2 * ONE


def test_the_compiler_counts_the_same_where_there_are_no_loops():
    def layer(x, q, k, up, down):
        scores = jax.nn.softmax(jnp.einsum("tde,sde->dts", x @ q, x @ k))
        return (jnp.einsum("dts,sde->tde", scores, x) @ up @ down).sum()

    given = arrays((256, 4, 128), (128, 128), (128, 128), (128, 512), (512, 128))
    gradient = jax.jit(jax.value_and_grad(layer, argnums=(1, 2, 3, 4)))
    # The loss is asked for too: the compiler leaves out what nobody asks for, and this counts it.
    theirs = gradient.lower(*given).compile().cost_analysis()["flops"]
    assert counted(gradient, *given) == pytest.approx(theirs, rel=0.02)


def test_an_unknown_kernel_or_product_is_refused():
    def kernel(x, o):
        o[...] = x[...]

    call = pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((8,), jnp.float32), name="odd_kernel")
    with pytest.raises(ValueError, match="no cost is known of the kernel 'odd_kernel'"):
        counted(call, *arrays((8,)), kernels=KERNELS)
    with pytest.raises(ValueError, match="conv_general_dilated"):
        counted(lambda x, w: jax.lax.conv(x, w, (1,), "SAME"), *arrays((1, 2, 8), (3, 2, 3)))


@pytest.mark.parametrize("queries, keys", [(256, 256), (128, 384)])
def test_splash_attention_counts_the_scores_that_a_causal_mask_leaves(queries, keys):
    heads, width, batch = 2, 128, 3
    seen = np.tril(np.ones((queries, keys)), keys - queries).sum()
    product = batch * heads * seen * 2 * width
    mask = splash_attention_mask.CausalMask((queries, keys), keys - queries)
    splash = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * heads), head_shards=1, q_seq_shards=1
    )
    q, k, v = arrays((batch, heads, queries, width), *[(batch, heads, keys, width)] * 2)
    forward = jax.vmap(splash)
    assert counted(forward, q, k, v, kernels=KERNELS) == pytest.approx(2 * product)
    gradient = jax.grad(lambda *x: forward(*x).sum(), argnums=(0, 1, 2))
    summed = 2 * batch * heads * queries * width  # the output times its gradient, a product outside of the kernels
    assert counted(gradient, q, k, v, kernels=KERNELS) == pytest.approx((2 + 3 + 4) * product + summed)


def test_paged_attention_reads_the_keys_and_values_that_it_attends_to():
    rows, heads, kv_heads, width, page = 6, 8, 2, 128, 16
    query = Operand((rows, heads, width), 2, True)
    pool = Operand((1000, page, 2 * kv_heads, width), 2, True)
    tables = Operand((rows,), 4, False), Operand((rows, 20), 4, False)
    kernels = {"ragged_paged": paged(30.0, 50.0)}
    cost = kernel_cost(kernels, "ragged_paged_attention_kernel", [*tables, query, pool])
    assert cost.flops == rows * 50 * heads * (2 * width + 2 * width)
    assert cost.bytes == rows * 50 * 2 * kv_heads * width * 2 + 2 * rows * heads * width * 2
    # 200 new tokens of each row: two blocks of queries, and each block reads the row's keys.
    many = Operand((200 * rows, heads, width), 2, True)
    cost = kernel_cost(kernels, "ragged_paged_attention_kernel", [*tables, many, pool])
    assert cost.flops == 200 * rows * 30 * heads * 4 * width
    assert cost.bytes == 2 * rows * 30 * 2 * kv_heads * width * 2 + 2 * 200 * rows * heads * width * 2
