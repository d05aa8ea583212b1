"""Between hosts and mesh: host arrays put on it and fetched from it, and what processes agree on and say."""

from __future__ import annotations

import hashlib
import socket
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from exprl_jax.mesh import DATA, microbatches_sharding, replicated, rows_sharding


def say(text: str) -> None:
    """A line on stderr, from one process."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


def barrier() -> None:
    """Returns once every process has called it."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("workdir")


def processes_here(counted: bool) -> int:
    """How many processes of the run are on this host and are counted; every process must call this."""
    if jax.process_count() == 1:
        return int(counted)
    host = hashlib.blake2b(socket.gethostname().encode(), digest_size=16).digest()
    mine = np.frombuffer(host + bytes([counted]), np.uint8)
    theirs = multihost_utils.process_allgather(mine)
    return int(theirs[(theirs[:, :-1] == mine[:-1]).all(-1), -1].sum())


def local_problems(mesh: Mesh, problems: int) -> np.ndarray:
    """Which of a batch's problems have their rows on this process's devices, ascending.

    Raises:
      ValueError: the problems cannot be divided over the `data` axis.
    """
    if problems % mesh.shape[DATA]:
        raise ValueError(
            f"a wave of {problems} problems, expected a multiple of the mesh's data axis {mesh.shape[DATA]}; set the "
            "config's wave or mesh.data"
        )
    indices = rows_sharding(mesh).addressable_devices_indices_map((problems,)).values()
    return np.unique(np.concatenate([np.arange(problems)[index] for index in indices]))


def owned_problems(mesh: Mesh, problems: int) -> np.ndarray:
    """Which of this process's problems (`local_problems`) no process before it has too, bool.

    Where the `model` axis spans processes, several hold the rows of one problem.  What depends on more than the rows, a
    wall clock or a network, is asked by one of them, and the others take its answer (`agree_rows`).
    """
    first: dict[int, int] = {}
    for device, index in rows_sharding(mesh).devices_indices_map((problems,)).items():
        for problem in range(problems)[index[0]]:
            first[problem] = min(device.process_index, first.get(problem, device.process_index))
    return np.array([first[problem] == jax.process_index() for problem in local_problems(mesh, problems)])


def agree_rows(table: dict[str, np.ndarray], index_P: np.ndarray) -> dict[str, np.ndarray]:
    """This process's rows as the first process that has them sees them; arguments as of `gather_rows`."""
    if jax.process_count() == 1:
        return table
    joined = gather_rows({"index_P": index_P, **table}, index_P)
    mine = np.searchsorted(joined.pop("index_P"), index_P)
    return {name: x[mine] for name, x in joined.items()}


def put_rows(mesh: Mesh, tree: Any, problems: int) -> Any:
    """Places host arrays, whose first dimension is this process's problems, as global batch arrays.

    Scalars are replicated; every process must pass the same.
    """

    def put(x):
        x = np.asarray(x)
        if x.ndim == 0:
            return jax.make_array_from_process_local_data(replicated(mesh), x, x.shape)
        return jax.make_array_from_process_local_data(rows_sharding(mesh), x, (problems, *x.shape[1:]))

    return jax.tree.map(put, tree)


def put_microbatches(mesh: Mesh, tree: Any) -> Any:
    """Places host arrays [M, B, ...] of a whole update, the same on every process, as global arrays; scalars
    everywhere."""

    def put(x):
        x = np.asarray(x)
        sharding = microbatches_sharding(mesh) if x.ndim else replicated(mesh)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, tree)


def fetch_rows(tree: Any) -> Any:
    """The inverse of `put_rows`: this process's problems, in order, as numpy."""

    def fetch(x):
        parts = {shard.index[0].start or 0: shard for shard in x.addressable_shards}
        return np.concatenate([np.asarray(parts[start].data) for start in sorted(parts)])

    return jax.tree.map(fetch, tree)


def fetch_whole(x: jax.Array) -> np.ndarray:
    """A global array as numpy, all of it on every process; every process must call this."""
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def gather_rows(table: dict[str, np.ndarray], index_P: np.ndarray) -> dict[str, np.ndarray]:
    """Joins every process's rows of host arrays into the whole batch, in the batch's order.

    Args:
      table: arrays whose first dimension is this process's problems.
      index_P: where those problems stand in the batch; processes that share devices' rows pass the same indices.
    """
    if jax.process_count() == 1:
        order = np.argsort(index_P)
        return {name: np.asarray(x)[order] for name, x in table.items()}
    joined = multihost_utils.process_allgather({"index": index_P, **table}, tiled=True)
    _, first = np.unique(joined.pop("index"), return_index=True)
    return {name: np.asarray(x)[first] for name, x in joined.items()}


def sum_over_processes(counts: Sequence[int]) -> list[int]:
    """The sums of some numbers over all processes; every process must call this at the same point."""
    if jax.process_count() == 1:
        return list(counts)
    return np.sum(multihost_utils.process_allgather(np.asarray(counts, np.int32)), axis=0).tolist()


def largest_over_processes(count: int) -> int:
    """The largest of a number over all processes; every process must call this at the same point."""
    if jax.process_count() == 1:
        return count
    return int(np.max(multihost_utils.process_allgather(np.int32(count))))
