"""What is read from a compiled program: small programs compiled for 16 TPU chips, whose loops, collectives and copies
are known by hand."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from exprl_jax.mesh import mesh_over
from exprl_jax.plan.chips import topology
from exprl_jax.plan.compiled import uncached
from exprl_jax.plan.hlo import (
    Instruction,
    collectives,
    copies_in_loops,
    device_groups,
    mesh_axes,
    read_module,
    trip_count,
    visits,
)

ROWS, WIDTH, LAYERS, MB = 4, 256, 5, 1e6


@functools.cache
def mesh(data=4, model=4):
    return mesh_over(topology("v5e:4x4").devices, data, model)


def shape(*dims, axes=(), dtype=jnp.bfloat16, over=None):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(over or mesh(), PartitionSpec(*axes)))


def module(function, *arguments, **options):
    with uncached():
        return read_module(jax.jit(function, **options).lower(*arguments).compile().as_text())


def summed(moves):
    total = collections.Counter()
    for collective in moves:
        total[collective.kind, collective.axes] += collective.received * collective.times
    return dict(total)


def looped(body, dims, over, times=LAYERS):
    """A program that runs a collective of each device's own [ROWS, WIDTH] so often."""
    everywhere = PartitionSpec(over.axis_names)

    def run(x):
        return jax.lax.scan(lambda c, _: (jnp.sin(body(c)), None), x, None, length=times)[0]

    mapped = jax.shard_map(run, mesh=over, in_specs=everywhere, out_specs=everywhere, check_vma=False)
    return module(mapped, shape(ROWS * over.size, *dims, axes=(over.axis_names,), dtype=jnp.float32, over=over))


OWN = ROWS * WIDTH * 4


@pytest.mark.parametrize("axes, size", [(("data",), 2), (("model",), 8), (("data", "model"), 16)])
@pytest.mark.parametrize(
    "kind, body, share",
    [
        ("all-reduce", lambda x, axes: jax.lax.psum(x, axes), lambda n: 2 * (n - 1) / n),
        ("all-gather", lambda x, axes: jax.lax.all_gather(x, axes).max(0), lambda n: n - 1),
        ("all-to-all", lambda x, axes: jax.lax.all_to_all(x, axes, 1, 1, tiled=True), lambda n: (n - 1) / n),
    ],
)
def test_collectives_have_their_kind_axis_bytes_and_trips(kind, body, share, axes, size):
    over = mesh(2, 8)
    moves = collectives(looped(lambda x: body(x, axes), (WIDTH,), over), over, 0)
    assert summed(moves) == {(kind, "+".join(axes)): LAYERS * OWN * share(size)}
    assert sum(collective.times for collective in moves) == LAYERS


def test_a_permutation_belongs_to_the_axis_along_which_it_goes():
    ring = [(i, (i + 1) % 4) for i in range(4)]
    moves = collectives(looped(lambda x: jax.lax.ppermute(x, "model", ring), (WIDTH,), mesh()), mesh(), 0)
    assert summed(moves) == {("collective-permute", "model"): LAYERS * OWN}


def test_sharded_weights_are_gathered_in_every_layer_and_their_gradients_scattered():
    """FSDP: each layer's weights come from the 15 others, forward and again for the gradient, whose parts go back.  The
    compiler makes rings of permutations of them, under the products, which hand a little more round than they must."""
    width, over = 1024, mesh(16, 1)

    def loss(weights, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0].astype(jnp.float32).sum()

    weights = shape(LAYERS, width, width, axes=(None, "data"), over=over)
    x = shape(64, 256, width, axes=("data",), over=over)
    step = module(jax.grad(loss), weights, x, out_shardings=weights.sharding)
    moves = summed(collectives(step, over, 0))
    least = 3 * LAYERS * width * width * 2 * 15 / 16
    assert {axes for _, axes in moves} == {"data"} and least <= sum(moves.values()) <= 1.2 * least


def decode(cache, weights, tokens):
    """Ends when a value says so, and within 100 steps."""

    def more(carry):
        return (carry[0] < 100) & (carry[1].sum() < 1e9)

    def advance(carry):
        step, x, cache = carry
        x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]
        return step + 1, x, jax.lax.dynamic_update_slice(cache, x[:, None], (0, step, 0))

    return jax.lax.while_loop(more, advance, (0, tokens, cache))


def decode_shapes():
    return shape(16, 4096, 4096), shape(4, 4096, 4096), shape(16, 4096)


@functools.cache
def decoding():
    return module(decode, *decode_shapes(), donate_argnums=0)


def test_a_loop_that_values_end_takes_the_callers_word():
    loops = {}
    for visit in visits(decoding(), 100):
        if visit.instruction.opcode == "while":
            within = decoding().computations[visit.computation]
            loops[trip_count(decoding(), within, visit.instruction)] = visit.times
    assert loops == {None: 1, 4: 100}  # the decoding loop once, the layers' in each of its steps
    with pytest.raises(
        ValueError, match=r"the loop jit\(decode\)/while ends where values say, and got no number of steps"
    ):
        list(visits(decoding(), 0))


def test_a_loop_to_a_constant_from_a_value_runs_at_most_so_often():
    def read(x, start):
        return jax.lax.fori_loop(start, 6, lambda i, c: jnp.tanh(c @ c), x)

    program = module(read, shape(512, 512), shape(dtype=jnp.int32))
    (loop,) = [visit for visit in visits(program, 0) if visit.instruction.opcode == "while"]
    assert trip_count(program, program.computations[loop.computation], loop.instruction) == 6


def test_a_cache_updated_in_place_is_no_copy_and_one_passed_through_a_scan_is():
    assert copies_in_loops(decoding(), 100, 64 * MB) == []

    def scanned(cache, tokens):
        def advance(carry):
            step, x, cache = carry

            def layer(x, part):
                part = jax.lax.dynamic_update_slice(part, x[:, None], (0, step, 0))
                return x + jnp.tanh(jnp.einsum("bsd,bd->bs", part, x) @ part[0]), part

            x, cache = jax.lax.scan(layer, x, cache)
            return step + 1, x, cache

        return jax.lax.while_loop(lambda c: c[1].sum() < 1e9, advance, (0, tokens, cache))

    program = module(scanned, shape(4, 16, 4096, 1024), shape(16, 1024), donate_argnums=0)
    (copy,) = copies_in_loops(program, 100, 64 * MB)
    assert "bf16[16,4096,1024] 400x jit(scanned)/while/body" in copy
    assert copies_in_loops(program, 100, 256 * MB) == []


GROUPS = [
    ("replica_groups={{0,1,2,3},{4,5,6,7}}, ", [[0, 1, 2, 3], [4, 5, 6, 7]], "model"),
    ("replica_groups={}, ", [range(8)], "data+model"),
    ("replica_groups=[2,4]<=[8], ", [[0, 1, 2, 3], [4, 5, 6, 7]], "model"),
    ("replica_groups=[4,2]<=[2,4]T(1,0), ", [[0, 4], [1, 5], [2, 6], [3, 7]], "data"),
    ("replica_groups=[4,2]<=[2,2,2]T(0,2,1), ", [[0, 2], [1, 3], [4, 6], [5, 7]], "model"),
    ("replica_groups=mesh['a'=2,'b'=4] {'b'}, ", [[0, 1, 2, 3], [4, 5, 6, 7]], "model"),
    ("replica_groups=mesh['a'=2,'b'=1,'c'=4] {'a'}, ", [[0, 4], [1, 5], [2, 6], [3, 7]], "data"),
    ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}, ", [[0, 1], [2, 3], [4, 5], [6, 7]], "model"),
    ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}, ", [[0, 2], [1, 3], [4, 6], [5, 7]], "model"),
    ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}, ", [[0, 4], [1, 5], [2, 6], [3, 7]], "data"),
    (
        "replica_groups=mesh['a'=4,'b'=2], device_ids=(0,4,1,5,2,6,3,7) {'b'}, ",
        [[0, 4], [1, 5], [2, 6], [3, 7]],
        "data",
    ),
    ("source_target_pairs={{0,1},{1,0},{7,7}}, ", [(0, 1), (1, 0)], "model"),
    ("source_target_pairs={{0,0},{1,4}}, ", [(1, 4)], "data+model"),
]


def collective(rest):
    return Instruction(None, "x", "bf16[8]", "all-reduce", "%y", f", channel_id=1, {rest}use_global_device_ids=true")


@pytest.mark.parametrize("rest, groups, axes", GROUPS)
def test_every_way_of_writing_groups_of_devices(rest, groups, axes):
    moves = device_groups(collective(rest), 8)
    assert [list(group) for group in moves] == [list(group) for group in groups]
    devices = np.array(jax.devices()[:8]).reshape(2, 4)
    assert mesh_axes(moves, jax.sharding.Mesh(devices, ("data", "model"))) == axes


def test_unknown_groups_are_refused():
    with pytest.raises(ValueError, match="unknown groups of devices"):
        device_groups(collective("replica_groups=odd, "), 8)


def test_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        read_module("HloModule empty\n")
