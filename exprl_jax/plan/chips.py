"""TPU generations by their public figures, and the topologies that a program can be compiled for without any.

Sources, all Google Cloud's pages of a generation: docs.cloud.google.com/tpu/docs/v5e, /v6e, /v5p and /v4.  HBM is what
this compiler gives a program, as its own message says when one asks for more; the pages' 16, 32, 95 and 32 GB are
before what the system reserves.

Interconnect: the pages give the sum over a chip's links and over both directions (v5e 400 GB/s on 4 ports, v6e 800
on 4, v5p 1,200 on 6); a link carries an equal part of half of that each way.  The older figures for v5e (1,600 Gbit/s)
and v5p (4,800 Gbit/s) are sums over links of one direction and come to the same; so do the pod's bisection bandwidths,
which count a cut's links in one direction (v5e 1.6 TB/s over 32 links, v6e 3.2 over 32, v4 24 over 512).
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from exprl_jax.mesh import DATA, MODEL

GIB = 1024**3
# libtpu is wanted as a compiler only: several processes may load it, and it need not look for chips or for other hosts.
_ALONE = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation.

    Attributes:
      hbm: bytes that a program may take on a device.
      flops: peak bfloat16 operations a second.
      hbm_bandwidth: bytes a second.
      link: bytes a second of one interconnect link in one direction.
      wraps_at: an axis of a slice closes to a ring where its length is a multiple of this (of a 3D slice: where all
        are).
      shapes: of the slices that there are.
      options: of JAX's topology description.
    """

    hbm: float
    flops: float
    hbm_bandwidth: float
    link: float
    wraps_at: int
    shapes: tuple[str, ...]
    options: tuple[tuple[str, Any], ...] = ()


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")
CHIPS = {
    "v4": Chip(30.75 * GIB, 275e12, 1200e9, 50e9, 4, _CUBES, (("chip_config_name", "megacore"),)),
    "v5e": Chip(15.75 * GIB, 197e12, 819e9, 50e9, 16, _FLAT),
    "v5p": Chip(95.74 * GIB, 459e12, 2765e9, 100e9, 4, _CUBES),
    "v6e": Chip(31.25 * GIB, 918e12, 1638e9, 100e9, 16, _FLAT),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of chips, to compile for.

    Attributes:
      shape: chips along each physical axis.
      devices: as JAX describes them.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]
    devices: tuple[Any, ...]


def topology(name: str) -> Topology:
    """A slice by its name, for instance `v5e:4x4`.

    Raises:
      ValueError: there is none of that name, or libtpu, which describes it, is not installed.
    """
    generation, _, shape = name.partition(":")
    if generation not in CHIPS or shape not in CHIPS[generation].shapes:
        known = "; ".join(f"{name}: {' '.join(chip.shapes)}" for name, chip in CHIPS.items())
        raise ValueError(f"--topology: got {name!r}, expected <generation>:<shape>, one of {known}")
    chip, options = CHIPS[generation], dict(CHIPS[generation].options)
    if shape == "1x1":
        options["chips_per_host_bounds"] = (1, 1, 1)
    for variable, value in _ALONE.items():
        os.environ.setdefault(variable, value)
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except RuntimeError as error:
        raise ValueError(
            f"--topology: {name} cannot be described here: {str(error).splitlines()[0]}; install jax[tpu], which "
            "brings libtpu"
        ) from error
    return Topology(name, chip, tuple(int(size) for size in shape.split("x")), tuple(described.devices))


def axis_bandwidth(where: Topology, mesh: Mesh) -> dict[str, float]:
    """Bytes a second that a device can receive within its group along each mesh axis, and along both, at most.

    A group that extends along a physical axis has one link of it at its end, or two where the axis is a ring that the
    group fills; the device in the corner is the slowest.  Axes of size 1 have no entry.
    """
    places = np.array([device.coords for device in mesh.devices.flat]).reshape(*mesh.devices.shape, -1)
    lengths = np.array((*where.shape, 1, 1, 1)[: places.shape[-1]])
    ring = lengths % where.chip.wraps_at == 0
    if len(where.shape) == 3:
        ring &= ring.all()
    bandwidths = {}
    for name, along in ((DATA, (0,)), (MODEL, (1,)), (f"{DATA}+{MODEL}", (0, 1))):
        others = [axis for axis in (0, 1) if axis not in along]
        groups = places.transpose(*others, *along, 2).reshape(
            *(mesh.devices.shape[axis] for axis in others), -1, places.shape[-1]
        )
        extents = groups.reshape(-1, *groups.shape[-2:])
        reached = np.array([[len(set(group[:, axis])) for axis in range(places.shape[-1])] for group in extents]).max(0)
        links = int(((reached > 1) * (1 + (ring & (reached == lengths)))).sum())
        if links:
            bandwidths[name] = links * where.chip.link
    return bandwidths
