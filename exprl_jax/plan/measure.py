"""Compiles a run's programs for a topology and writes down what each takes: memory, collectives, operations, time at best.

Seconds here are bounds, not measurements: what matrix units, HBM or links take at their peak, whichever is longest, for
rollouts that all reach their budget.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from exprl_jax.mesh import fit_mesh, mesh_over
from exprl_jax.plan.calls import Call, Result, Run, owned_bytes, programs_of, tree_bytes
from exprl_jax.plan.chips import GIB, Topology, axis_bandwidth, roomiest
from exprl_jax.plan.flops import matrix_flops
from exprl_jax.plan.hlo import Module, collectives, large_copies, read_module, traffic, visits

TEMPORARIES, CODE = "activations and temporaries", "code"
# A copy of so many bytes each time around a loop is worth a line in the report.
_LARGE = 64 * 1024**2


@dataclasses.dataclass(frozen=True)
class Exhausted:
    """A program that does not fit.

    Attributes:
      needed, limit: bytes of HBM a device; `needed` is what the compiler says, or what this program and all that lies
        beside it come to.
      buffers: the largest arrays of the program, as text: size, shape, and what in the program they belong to.
      settings: config keys that make it smaller.
    """

    needed: float
    limit: float
    buffers: tuple[str, ...]
    settings: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Program:
    """What one program takes, a device.

    Attributes:
      each_step: calls in one step, at most.
      compiled: it compiled; without that only `exhausted` or `failure` says anything.
      seconds: that tracing and compiling took.
      code: bytes of its machine code, which lie in HBM once it is loaded.
      peak: bytes of HBM at most, arguments included.
      owners: where the peak's bytes are, and what lies beside it, by owner.
      total: peak and what lies beside it, the code of all programs of the run with it.
      donated, aliased: bytes of arguments that the caller gives up, and of results that take their place.
      moved: bytes received, and how often, by collective and mesh axes.
      copies: large arrays that a loop moves each time around, as text.
      flops: of matrix products and kernels, one call.
      hbm: bytes read and written, one call.
      bounds: seconds that each of compute, HBM and ICI takes at its peak.
      failure: why it could not be compiled, other than for memory.
    """

    name: str
    phase: str
    each_step: int
    compiled: bool
    seconds: float
    exhausted: Exhausted | None = None
    failure: str = ""
    code: int = 0
    peak: int = 0
    owners: Mapping[str, int] = dataclasses.field(default_factory=dict)
    total: int = 0
    donated: int = 0
    aliased: int = 0
    moved: Mapping[str, tuple[float, int]] = dataclasses.field(default_factory=dict)
    copies: tuple[str, ...] = ()
    flops: float = 0.0
    hbm: float = 0.0
    bounds: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def bound(self) -> float:
        """Seconds of one call, at least."""
        return max(self.bounds.values(), default=0.0)


@dataclasses.dataclass(frozen=True)
class Proof:
    """A config on a topology.

    Attributes:
      changes: of the config, for this topology.
      limit: bytes of HBM a device.
    """

    topology: str
    data: int
    model: int
    changes: str
    limit: float
    programs: tuple[Program, ...]

    @property
    def fits(self) -> bool:
        """Every program compiled, and fits beside what the run holds meanwhile."""
        return all(each.compiled and each.exhausted is None for each in self.programs)

    def seconds(self, phase: str | None = None) -> float:
        """Seconds of a step, or of one of its phases, at least."""
        return sum(each.bound * each.each_step for each in self.programs if phase in (None, each.phase))


def prove(config: Run, where: Topology, changes: str) -> Proof:
    """Compiles every program of the config for the topology.  One that does not fit does not stop the others.

    Raises:
      ValueError: the config does not fit the topology, or is not of a task that this knows.
    """
    data, model = fit_mesh(config.mesh, len(where.devices))
    mesh = mesh_over(where.devices, data, model)
    results: dict[str, Any] = {}
    calls = programs_of(config, mesh)
    with uncached():
        measured = [_measure(call, config, where, mesh, results) for call in calls]
    code = sum(program.code for program, _ in measured)
    programs = [_loaded(call, *found, code, where.chip.hbm) for call, found in zip(calls, measured)]
    return Proof(where.name, data, model, changes, where.chip.hbm, tuple(programs))


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """Keeps what is compiled out of the persistent compilation cache: what was compiled for chips that are not there can
    be written to it and not be read back (jax 0.10)."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, math.inf)
    try:
        yield
    finally:
        jax.config.update(name, before)


def largest_buffers(module: Module, steps: int, count: int) -> tuple[str, ...]:
    """The largest arrays that a program makes in HBM, largest first: size, shape, and where in the program."""
    found: dict[tuple[str, tuple[int, ...]], tuple[float, str]] = {}
    for visit in visits(module, steps):
        each = visit.instruction
        if each.opcode in ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"):
            continue
        for shape in each.shapes:
            found.setdefault((shape.dtype, shape.dims), (shape.hbm, each.where))
    ranked = sorted(((size, *key, place) for key, (size, place) in found.items()), key=lambda x: -x[0])
    return tuple(
        f"{size / GIB:.2f} GiB {dtype}[{','.join(map(str, dims))}] {place}"
        for size, dtype, dims, place in ranked[:count]
    )


def needed_bytes(message: str) -> float | None:
    """Bytes of HBM that a program needs, of the compiler's words about one that does not fit; None if those say nothing
    about memory."""
    found = re.search(
        r"HLO temporaries \(([\d.]+)([KMGT])\) exceeds|Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", message
    )
    if "RESOURCE_EXHAUSTED" not in message or found is None:
        return None
    number, unit = (found[1], found[2]) if found[1] else (found[3], found[4])
    return float(number) * 1024 ** (1 + "KMGT".index(unit))


def _loaded(call: Call, program: Program, buffers: tuple[str, ...], code: int, limit: float) -> Program:
    """A program beside the code of all programs: a run keeps them loaded."""
    if not program.compiled:
        return program
    total, exhausted = program.total + code, None
    if total > limit:
        exhausted = Exhausted(total, limit, buffers, call.settings)
    return dataclasses.replace(program, owners={**program.owners, CODE: code}, total=total, exhausted=exhausted)


def _measure(
    call: Call, config: Run, where: Topology, mesh: Mesh, results: dict[str, Any]
) -> tuple[Program, tuple[str, ...]]:
    """(what the program takes, the largest arrays that it makes)."""
    begun = time.perf_counter()

    def program(**found):
        return Program(call.name, call.phase, call.each_step, seconds=time.perf_counter() - begun, **found)

    missing = [tree.name for _, tree in call.arguments if isinstance(tree, Result) and tree.name not in results]
    if missing:
        return program(compiled=False, failure=f"needs the result of {missing[0]}, which did not compile"), ()
    try:
        traced, compiled, results[call.name] = _compile(call, results)
    except jax.errors.JaxRuntimeError as error:
        needed = needed_bytes(str(error))
        if needed is None:
            return program(compiled=False, failure=" ".join(str(error).split())[:500]), ()
        buffers = _buffers_elsewhere(call.name, config, where)
        return program(compiled=False, exhausted=Exhausted(needed, where.chip.hbm, buffers, call.settings)), ()
    seconds = time.perf_counter() - begun

    module, memory = read_module(compiled.as_text()), compiled.memory_analysis()
    owners: dict[str, int] = {}
    for owner, tree in call.arguments:
        tree = results[tree.name] if isinstance(tree, Result) else tree
        for name, size in owned_bytes(owner, tree).items():
            owners[name] = owners.get(name, 0) + size
    for name, size in call.inside.items():
        owners[name] = owners.get(name, 0) + size
    peak = int(memory.peak_memory_in_bytes)
    owners[TEMPORARIES] = max(peak - sum(owners.values()), 0)
    for name, size in call.beside.items():
        owners[name] = owners.get(name, 0) + size
    total = peak + sum(call.beside.values())

    moved: dict[str, tuple[float, int]] = {}
    for each in collectives(module, mesh, call.steps):
        size, times = moved.get(f"{each.kind} {each.axes}", (0.0, 0))
        moved[f"{each.kind} {each.axes}"] = (size + each.received * each.times, times + each.times)
    flops = matrix_flops(traced.jaxpr, call.steps, call.kernels) / mesh.size
    hbm = traffic(module, call.steps, call.kernels)
    found = Program(
        call.name,
        call.phase,
        call.each_step,
        True,
        seconds,
        code=int(memory.generated_code_size_in_bytes),
        peak=peak,
        owners=owners,
        total=total,
        donated=tree_bytes([x for x, given in _donated(call, traced) if given]),
        aliased=int(memory.alias_size_in_bytes),
        moved=moved,
        copies=tuple(f"{c.opcode} {c.shape} {c.times}x {c.where}" for c in large_copies(module, call.steps, _LARGE)),
        flops=flops,
        hbm=hbm,
        bounds=roofline(flops, hbm, moved, where, mesh),
    )
    return found, largest_buffers(module, call.steps, 5)


def roofline(
    flops: float, hbm: float, moved: Mapping[str, tuple[float, int]], where: Topology, mesh: Mesh
) -> dict[str, float]:
    """Seconds that one call takes at the peak of the matrix units, of HBM, and of the links of its busiest mesh axis."""
    speed, busy = axis_bandwidth(where, mesh), {}
    for name, (size, _) in moved.items():
        axes = name.split(" ")[1]
        busy[axes] = busy.get(axes, 0.0) + size / speed[axes]
    return {
        "compute": flops / where.chip.flops,
        "HBM": hbm / where.chip.hbm_bandwidth,
        "ICI": max(busy.values(), default=0.0),
    }


def _compile(call: Call, results: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """The program traced and compiled, and its results as shapes where the compiler lays them."""
    arguments = [results[tree.name] if isinstance(tree, Result) else tree for _, tree in call.arguments]
    traced = call.program.trace(*arguments)
    compiled = traced.lower().compile()
    made = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        traced.out_info,
        compiled.output_shardings,
    )
    return traced, compiled, made


def _donated(call: Call, traced: Any) -> list[tuple[Any, bool]]:
    leaves = jax.tree.leaves([tree for _, tree in call.arguments if not isinstance(tree, Result)])
    flags = jax.tree.leaves(traced.args_info, is_leaf=lambda x: hasattr(x, "donated"))
    if len(flags) != len(leaves):  # programs that take another's result give nothing up
        return []
    return [(leaf, flag.donated) for leaf, flag in zip(leaves, flags)]


def _buffers_elsewhere(name: str, config: Run, where: Topology) -> tuple[str, ...]:
    """The largest buffers of a program that the compiler refused: it does not name them, so the program is compiled for
    as many chips of the generation with the most memory.  Empty where it does not fit there either."""
    there = roomiest(len(where.devices))
    results: dict[str, Any] = {}
    mesh = mesh_over(there.devices, *fit_mesh(config.mesh, len(there.devices)))
    calls = {call.name: call for call in programs_of(config, mesh)}
    wanted = [tree.name for _, tree in calls[name].arguments if isinstance(tree, Result)]
    try:
        for each in (*wanted, name):
            _, compiled, results[each] = _compile(calls[each], results)
    except jax.errors.JaxRuntimeError:
        return ()
    return largest_buffers(read_module(compiled.as_text()), calls[name].steps, 5)


def proof_from(written: Mapping[str, Any]) -> Proof:
    """The inverse of `dataclasses.asdict`, through JSON."""
    programs = []
    for each in written["programs"]:
        out = each["exhausted"]
        out = out and Exhausted(out["needed"], out["limit"], tuple(out["buffers"]), tuple(out["settings"]))
        moved = {name: tuple(value) for name, value in each["moved"].items()}
        programs.append(Program(**each | {"exhausted": out, "moved": moved, "copies": tuple(each["copies"])}))
    return Proof(**{**written, "programs": tuple(programs)})
