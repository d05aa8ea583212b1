"""Compiles a run's programs for chips that are not there: memory by owner, whether it fits, collectives, time at best.

Memory and collectives are the compiler's.  Seconds are bounds, not measurements: what matrix units, HBM or links take
at their peak for what `plan.costs` counts and the collectives move, whichever is longest.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from exprl_jax.mesh import bytes_per_device, fit_mesh, laid_out, mesh_over
from exprl_jax.plan.calls import calls_of
from exprl_jax.plan.chips import Topology, axis_bandwidth
from exprl_jax.plan.hlo import collectives, copies_in_loops, read_module
from exprl_jax.plan.lengths import Lengths, at_lengths
from exprl_jax.plan.memory import owners_of
from exprl_jax.plan.records import Call, Planned, Result

TEMPORARIES, CODE = "temporaries", "code"
# A copy of so many bytes each time around a loop is worth a line in the report.
_LARGE = 64 * 1024**2


@dataclasses.dataclass(frozen=True)
class Usage:
    """What one program takes, a device.

    Attributes:
      name, phase, times, settings: of its call (`plan.records.Call`).
      owners: bytes by owner, at the program's peak and of what lies beside it; of a program that did not compile, those
        that are known without the compiler.
      needed: bytes that all of it takes; of a program that is too large, what its compiler says.
      limit: bytes of HBM.
      compiled: without that, `failure` says why if it was not for memory.
      donated, aliased: bytes of arguments that the caller gives up, and of results that take their place.
      moved: bytes received, and how often, by collective and mesh axes.
      copies: large arrays that a loop moves each time around, as text.
      flops, hbm: counted operations, and bytes exchanged with HBM, of one call.
      bounds: seconds that compute, HBM and links take at their peak, of one call.
      seconds: that tracing and compiling took.
    """

    name: str
    phase: str
    times: int
    settings: tuple[str, ...]
    owners: Mapping[str, int]
    needed: float
    limit: float
    compiled: bool = False
    failure: str = ""
    donated: int = 0
    aliased: int = 0
    moved: Mapping[str, tuple[float, int]] = dataclasses.field(default_factory=dict)
    copies: tuple[str, ...] = ()
    flops: float = 0.0
    hbm: float = 0.0
    bounds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0

    @property
    def fits(self) -> bool:
        return self.compiled and self.needed <= self.limit

    @property
    def bound(self) -> float:
        """Seconds of a step's calls, at least."""
        return self.times * max(self.bounds.values(), default=0.0)


@dataclasses.dataclass(frozen=True)
class Report:
    """A config on a topology.

    Attributes:
      data, model: the mesh.
      changes: of the config, for this topology.
      limit: bytes of HBM a device.
      lengths: that rollouts are taken to have; None for their budgets.
    """

    topology: str
    data: int
    model: int
    changes: str
    limit: float
    programs: tuple[Usage, ...]
    lengths: Lengths | None = None

    @property
    def fits(self) -> bool:
        """Every program compiled, and fits beside what the run keeps meanwhile."""
        return all(usage.fits for usage in self.programs)

    def seconds(self, phase: str | None = None) -> float:
        """Seconds of a step, or of one of its phases, at least."""
        return sum(usage.bound for usage in self.programs if phase in (None, usage.phase))


def compile_for(config: Planned, topology: Topology, changes: str, lengths: Lengths | None = None) -> Report:
    """Compiles every program of the config for the topology.  One that does not fit does not stop the others.

    Args:
      lengths: that rollouts are taken to have; None for their budgets.

    Raises:
      ValueError: the config does not fit the topology.
    """
    data, model = fit_mesh(config.mesh, len(topology.devices))
    mesh = mesh_over(topology.devices, data, model)
    results: dict[str, Any] = {}
    with uncached():
        calls = calls_of(config, mesh)
        if lengths is not None:
            calls = at_lengths(calls, config, mesh, lengths)
        made = [_compile(call, topology, mesh, results) for call in calls]
    # A run keeps its programs loaded: the code of all of them lies beside each.
    code = sum(usage.owners.get(CODE, 0) for usage in made)
    programs = [
        dataclasses.replace(x, owners={**x.owners, CODE: code}, needed=x.needed + code) if x.compiled else x
        for x in made
    ]
    return Report(topology.name, data, model, changes, topology.chip.hbm, tuple(programs), lengths)


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """Keeps what is compiled out of the persistent compilation cache: what was compiled for chips that are not there
    can be written to it and not be read back (jax 0.10)."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, math.inf)
    try:
        yield
    finally:
        jax.config.update(name, before)


def needed_bytes(message: str) -> float | None:
    """Bytes of HBM that a program needs, of the compiler's words about one that does not fit; None if those say nothing
    about memory."""
    pattern = r"(?:HLO temporaries \(([\d.]+)([KMGT])\) exceeds|Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm)"
    match = re.search(pattern, message)
    if "RESOURCE_EXHAUSTED" not in message or match is None:
        return None
    number, unit = (part for part in match.groups() if part)
    return float(number) * 1024 ** (1 + "KMGT".index(unit))


def _compile(call: Call, topology: Topology, mesh: Mesh, results: dict[str, Any]) -> Usage:
    """Compiles one program, and adds its results to `results`: shapes, where the compiler lays them."""
    started, limit = time.perf_counter(), topology.chip.hbm
    owners = owners_of(call, results)
    with_others = owners.copy()
    with_others.update(call.beside)
    known = Usage(call.name, call.phase, call.times, call.settings, with_others, 0.0, limit)
    missing = [tree.name for _, tree in call.arguments if isinstance(tree, Result) and tree.name not in results]
    if missing:
        return dataclasses.replace(known, failure=f"needs the result of {missing[0]}, which did not compile")
    arguments = [results[tree.name] if isinstance(tree, Result) else tree for _, tree in call.arguments]
    traced = call.program.trace(*arguments)
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        needed = needed_bytes(str(error))
        if needed is not None:
            return dataclasses.replace(known, needed=needed)
        return dataclasses.replace(known, failure=" ".join(str(error).split())[:500])
    results[call.name] = laid_out(traced.out_info, compiled.output_shardings)
    seconds, memory = time.perf_counter() - started, compiled.memory_analysis()
    peak = int(memory.peak_memory_in_bytes)
    own = {**owners, TEMPORARIES: max(peak - owners.total(), 0), CODE: int(memory.generated_code_size_in_bytes)}
    module, moved = read_module(compiled.as_text()), {}
    for kind, axes, received, times in collectives(module, mesh, call.steps):
        size, count = moved.get(f"{kind} {axes}", (0.0, 0))
        moved[f"{kind} {axes}"] = size + received * times, count + times
    flops, hbm = call.cost.flops / mesh.size, call.cost.bytes
    flags = jax.tree.leaves(traced.args_info, is_leaf=lambda x: hasattr(x, "donated"))
    given = [leaf for leaf, flag in zip(jax.tree.leaves(arguments), flags, strict=True) if flag.donated]
    return dataclasses.replace(
        known,
        owners={name: own.get(name, 0) + call.beside.get(name, 0) for name in {**own, **call.beside}},
        needed=peak + sum(call.beside.values()),
        compiled=True,
        donated=bytes_per_device(given, [leaf.sharding for leaf in given]),
        aliased=int(memory.alias_size_in_bytes),
        moved=moved,
        copies=tuple(copies_in_loops(module, call.steps, _LARGE)),
        flops=flops,
        hbm=hbm,
        bounds=time_at_best(flops, hbm, moved, topology, mesh),
        seconds=seconds,
    )


def time_at_best(
    flops: float, hbm: float, moved: Mapping[str, tuple[float, int]], topology: Topology, mesh: Mesh
) -> dict[str, float]:
    """Seconds that one call takes at the peak of the matrix units, of HBM, and of the links of its busiest mesh
    axis."""
    speed, busy = axis_bandwidth(topology, mesh), collections.Counter()
    for name, (size, _) in moved.items():
        axes = name.split(" ")[1]
        busy[axes] += size / speed[axes]
    return {
        "compute": flops / topology.chip.flops,
        "HBM": hbm / topology.chip.hbm_bandwidth,
        "ICI": max(busy.values(), default=0.0),
    }
