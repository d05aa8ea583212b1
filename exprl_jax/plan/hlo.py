"""What a compiled TPU program does, read from its text: loops, collectives by mesh axis, HBM traffic, copies, aliases.

A loop's body counts as often as it runs.  The compiler's text says how often only in the loop's own arithmetic (a
counter, from a constant, by a constant, to a constant); a loop whose end depends on values runs as often as the caller
says.  Each branch of a conditional counts as if it were taken.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jax.sharding import Mesh

from exprl_jax.plan.kernels import Kernel, Operand, kernel_cost

COLLECTIVES = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_SIZES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = ")
_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_NAMES = re.compile(r"%([\w.\-]+)")
# What takes no time of its own: names, and halves of what its other half is counted for.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "partition-id",
    "replica-id",
    "add-dependency",
    "opt-barrier",
    "domain",
    "async-start",
    "async-update",
}
_FREE_TARGETS = {"AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound"}
# Of a fusion that moves values and computes none.
_MOVES = {
    "parameter",
    "constant",
    "bitcast",
    "copy",
    "transpose",
    "reshape",
    "convert",
    "dynamic-slice",
    "slice",
    "tuple",
    "get-tuple-element",
    "concatenate",
    "pad",
    "broadcast",
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array in the compiled program.

    Attributes:
      layout: dims from the fastest-changing one up.
      tile: what the fastest-changing dims are padded to multiples of.
      space: 0 for HBM; 1 for VMEM, others for semaphores, scalars and host memory.
    """

    dtype: str
    dims: tuple[int, ...]
    layout: tuple[int, ...]
    tile: tuple[int, ...]
    space: int

    @property
    def bytes(self) -> float:
        """Of its elements."""
        return math.prod(self.dims) * self.size

    @property
    def held(self) -> float:
        """Bytes that it takes, padding of the tiled dims included."""
        dims = list(self.dims)
        for dim, tile in zip(self.layout, reversed(self.tile)):
            dims[dim] = -(-dims[dim] // tile) * tile
        return math.prod(dims) * self.size

    @property
    def hbm(self) -> float:
        """Bytes of HBM that reading or writing it moves."""
        return self.held if self.space == 0 else 0

    @property
    def size(self) -> float:
        """Bytes of an element."""
        if self.dtype in _SIZES:
            return _SIZES[self.dtype]
        return int(re.match(r"[a-z]+(\d+)", self.dtype)[1]) / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      shapes: of its result; several for a tuple, nested ones in one row.
      operands: names of instructions of the same computation.
      rest: what follows the operands, as text.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    inner: str
    rest: str
    root: bool

    def called(self, key: str) -> list[str]:
        """Computations that an attribute names."""
        found = re.search(rf"\b{key}=(\{{[^}}]*\}}|%[\w.\-]+)", self.rest)
        return _NAMES.findall(found[1]) if found else []

    @property
    def where(self) -> str:
        """The place in the program that it comes from, as JAX names it."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else self.name

    @property
    def target(self) -> str:
        """Of a custom call."""
        found = re.search(r'custom_call_target="([^"]*)"', self.rest)
        return found[1] if found else ""


class Computation(dict[str, Instruction]):
    """Instructions by name, in their order."""

    @functools.cached_property
    def root(self) -> Instruction:
        return next(each for each in self.values() if each.root)

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        return sorted((x for x in self.values() if x.opcode == "parameter"), key=lambda x: int(x.inner))


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program.

    Attributes:
      computations: by name.
      entry: the name of the one that is run.
      aliased: outputs that take the place of a donated argument.
    """

    computations: Mapping[str, Computation]
    entry: str
    aliased: int


@dataclasses.dataclass(frozen=True)
class Visit:
    """An instruction where it runs.

    Attributes:
      times: how often it runs in one call of the program.
      looped: inside a loop.
    """

    instruction: Instruction
    computation: str
    times: int
    looped: bool


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of the program.

    Attributes:
      axes: the mesh axes within which its groups lie, joined by `+`.
      received: bytes that each device receives from others, each time, as a ring would move them.
      times: how often it runs.
      where: what in the program it belongs to.
    """

    kind: str
    axes: str
    received: float
    times: int
    where: str


@dataclasses.dataclass(frozen=True)
class Copy:
    """A large array that a loop's body only moves.

    Attributes:
      bytes: of the array that is written.
    """

    opcode: str
    shape: str
    bytes: float
    times: int
    where: str


def read_module(text: str) -> Module:
    """Reads `compiled.as_text()`.

    Raises:
      ValueError: this is no module with an entry.
    """
    computations: dict[str, Computation] = {}
    current, entry = None, ""
    for line in text.splitlines():
        if (head := _COMPUTATION.match(line)) is not None:
            current = computations.setdefault(head[2], Computation())
            entry = head[2] if head[1] else entry
        elif current is not None and (start := _INSTRUCTION.match(line)) is not None:
            current[start[2]] = _instruction(start[2], line[start.end() :], bool(start[1]))
    if not entry:
        raise ValueError("the compiled program's text has no ENTRY computation")
    head = text.partition("\n")[0]
    aliased = re.search(r"input_output_alias=\{ (.*?) \}, ", head)
    return Module(computations, entry, aliased[1].count("alias)") if aliased else 0)


def visits(module: Module, steps: int) -> Iterator[Visit]:
    """Every instruction that runs, with how often; those of fusions are not listed one by one.

    Args:
      steps: trips of the loop whose end depends on values; 0 where there is none.

    Raises:
      ValueError: there is such a loop and `steps` is 0, or there is one inside another.
    """

    def walk(name: str, times: int, looped: bool, dynamic: bool) -> Iterator[Visit]:
        computation = module.computations[name]
        for each in computation.values():
            yield Visit(each, name, times, looped)
            if each.opcode == "while":
                trips = trip_count(module, computation, each)
                if trips is None and (dynamic or not steps):
                    why = "lies inside another such loop" if dynamic else "got no number of steps for it"
                    raise ValueError(f"the loop {each.where} ends where values say, and {why}")
                inner = times * (steps if trips is None else trips)
                yield from walk(each.called("body")[0], inner, True, dynamic or trips is None)
            elif each.opcode == "conditional":
                keys = ("branch_computations", "true_computation", "false_computation")
                for branch in (name for key in keys for name in each.called(key)):
                    yield from walk(branch, times, looped, dynamic)
            elif each.opcode == "call":
                yield from walk(each.called("to_apply")[0], times, looped, dynamic)
            elif each.opcode == "async-start":
                yield from walk(each.called("calls")[0], times, looped, dynamic)

    yield from walk(module.entry, 1, False, False)


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """How often a loop runs, at most: where its counter's step and end are constants, and from 0 where its start is not
    one.  None where the end depends on values."""
    condition = module.computations[loop.called("condition")[0]]
    body = module.computations[loop.called("body")[0]]
    carried = computation[loop.operands[0]]

    def start_of(element: int) -> int | None:
        return _constant(module, computation, carried.operands[element]) if carried.opcode == "tuple" else None

    compare, sides = _unfused(module, condition, condition.root)
    if compare.opcode != "compare":
        return None
    ends = []
    for name in sides:
        element = _element(condition, name)
        ends.append((element, _constant(module, condition, name)))
    (counter, _), (limit, end) = ends
    if end is None and limit is not None:
        end = start_of(limit)  # the limit is carried along unchanged, as its own loop invariant
    direction = re.search(r"direction=(\w+)", compare.rest)[1]
    if counter is None or end is None or direction not in ("LT", "LE", "NE") or body.root.opcode != "tuple":
        return None
    step = _step(module, body, counter)
    if not step:
        return None
    return max(-(-(end + (direction == "LE") - (start_of(counter) or 0)) // step), 0)


def collectives(module: Module, mesh: Mesh, steps: int) -> list[Collective]:
    """The program's collectives that move anything.  Start and end of one are one, as are the parts into which the
    compiler cuts one to run it under other work."""
    found, seen = [], set()
    for visit in visits(module, steps):
        for each, computation, scattered in _communicating(module, visit):
            channel = re.search(r"channel_id=(\d+)", each.rest)
            key = (visit.computation, channel[1] if channel else each.name)
            if key in seen:
                continue
            seen.add(key)
            kind = each.opcode.removesuffix("-start")
            groups = _groups(each, mesh.size)
            size = max(len(group) for group in groups)
            if size == 1:
                continue
            sent = sum(shape.bytes for name in each.operands for shape in computation[name].shapes)
            if scattered:
                kind = "reduce-scatter"
            share = {
                "all-gather": size - 1,
                "all-reduce": 2 * (size - 1) / size,
                "reduce-scatter": (size - 1) / size,
                "all-to-all": (size - 1) / size,
            }.get(kind, 1)
            found.append(Collective(kind, _axes(groups, mesh), sent * share, visit.times, each.where))
    return found


def traffic(module: Module, steps: int, kernels: Mapping[str, Kernel]) -> float:
    """Bytes a device that the program reads from and writes to HBM: operands and results of everything that runs, VMEM
    left out.  Of an array that is only sliced, updated or gathered from, the part counts; of a kernel, what `kernels`
    says."""
    total = 0.0
    for visit in visits(module, steps):
        total += visit.times * _moved(module, module.computations[visit.computation], visit.instruction, kernels)
    return total


def large_copies(module: Module, steps: int, at_least: float) -> list[Copy]:
    """Arrays of so many bytes or more that a loop's body copies, transposes or cuts out of others, HBM to HBM: a cache
    that is not updated in place is one of them."""
    found = []
    for visit in visits(module, steps):
        each, computation = visit.instruction, module.computations[visit.computation]
        if not visit.looped or not _moves(module, each):
            continue
        written = each.shapes[:1] if each.opcode.endswith("-start") else each.shapes
        sources = [shape for name in each.operands for shape in computation[name].shapes]
        for shape in written:
            if shape.hbm >= at_least and any(source.hbm >= at_least for source in sources):
                name = f"{shape.dtype}[{','.join(map(str, shape.dims))}]"
                found.append(Copy(each.opcode, name, shape.held, visit.times, each.where))
    return found


# ---------------------------------------------------------------------------------------------------- reading


def _instruction(name: str, text: str, root: bool) -> Instruction:
    kind, text = _cut(text) if text.startswith("(") else text.split(" ", 1)
    opcode, _, rest = text.strip().partition("(")
    inner, rest = _cut("(" + rest)
    inner = inner[1:-1]
    operands = tuple(_NAMES.findall(inner)) if opcode != "constant" else ()
    return Instruction(name, opcode, tuple(map(_shape, _ARRAY.finditer(kind))), operands, inner, rest, root)


def _cut(text: str) -> tuple[str, str]:
    """Splits after the bracket that closes the first."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[: i + 1], text[i + 1 :]
    raise ValueError(f"unbalanced brackets in the compiled program: {text[:80]!r}")


def _shape(found: re.Match) -> Shape:
    dims = tuple(int(size.lstrip("<=")) for size in found[2].split(",") if size)
    layout, _, tiling = (found[3] or "").partition(":")
    tile = re.match(r"T\(([\d,]+)\)", tiling)
    space = re.search(r"S\((\d+)\)", tiling)
    order = tuple(int(dim) for dim in layout.split(",") if dim)
    tiles = tuple(int(size) for size in tile[1].split(",")) if tile else ()
    return Shape(found[1], dims, order, tiles, int(space[1]) if space else 0)


def _unfused(module: Module, computation: Computation, each: Instruction) -> tuple[Instruction, tuple[str, ...]]:
    """An instruction and its operands in `computation`; of a fusion, its root and the fusion's operands behind it."""
    if each.opcode != "fusion":
        return each, each.operands
    fused = module.computations[each.called("calls")[0]]
    places = {parameter.name: each.operands[i] for i, parameter in enumerate(fused.parameters)}
    # A constant inside of the fusion has no name outside: it is found by its own, where names are unique in a module.
    return fused.root, tuple(places.get(name, name) for name in fused.root.operands)


def _constant(module: Module, computation: Computation, name: str) -> int | None:
    while (each := computation.get(name)) is not None and each.opcode in ("copy", "bitcast", "convert"):
        name = each.operands[0]
    if each is None:  # inside of a fusion
        each = next((inner[name] for inner in module.computations.values() if name in inner), None)
    if each is not None and each.opcode == "constant" and re.fullmatch(r"-?\d+", each.inner):
        return int(each.inner)
    return None


def _element(computation: Computation, name: str) -> int | None:
    """Which element of the carried tuple this is, if any."""
    while (each := computation.get(name)) is not None and each.opcode in ("copy", "bitcast"):
        name = each.operands[0]
    if each is None or each.opcode != "get-tuple-element" or computation[each.operands[0]].opcode != "parameter":
        return None
    return int(re.search(r"index=(\d+)", each.rest)[1])


def _step(module: Module, body: Computation, counter: int) -> int | None:
    """What the body adds to an element of the tuple that it carries."""
    name = body.root.operands[counter]
    while body[name].opcode in ("copy", "bitcast"):
        name = body[name].operands[0]
    added, sides = _unfused(module, body, body[name])
    if added.opcode != "add":
        return None
    for one, other in (sides, sides[::-1]):
        if _element(body, one) == counter:
            return _constant(module, body, other)
    return None


def _communicating(module: Module, visit: Visit) -> Iterator[tuple[Instruction, Computation, bool]]:
    """Collectives of a visited instruction, itself or inside of a fusion; and whether a fusion keeps only a device's part
    of a sum, which is how this compiler writes a reduce-scatter."""
    each, computation = visit.instruction, module.computations[visit.computation]
    if each.opcode.removesuffix("-start") in COLLECTIVES:
        yield each, computation, False
    elif each.opcode == "fusion":
        called = each.called("calls")[0]
        inner = module.computations[called]
        for part in inner.values():
            if part.opcode.removesuffix("-start") in COLLECTIVES:
                yield part, inner, called.startswith("all-reduce-scatter")
            elif part.opcode == "fusion":
                yield from _communicating(module, Visit(part, called, visit.times, visit.looped))


def _groups(each: Instruction, devices: int) -> Sequence[Sequence[int]]:
    """The groups of partitions among which a collective works; of a permutation, the pairs that exchange something.

    Partitions count along the mesh's flattened devices.

    Raises:
      ValueError: they are written in a form that this does not know.
    """
    if (found := re.search(r"source_target_pairs=\{(.*?)\}\}", each.rest)) is not None:
        pairs = [tuple(map(int, pair.split(","))) for pair in re.findall(r"(\d+,\d+)", found[1])]
        moved = [pair for pair in pairs if pair[0] != pair[1]]
        return moved or [(0,)]
    if (found := re.search(r"replica_groups=\{(\{.*?\})?\}(?:,|$)", each.rest)) is not None:
        groups = [[int(i) for i in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", found[1] or "")]
        return groups or [range(devices)]
    if (found := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", each.rest)) is not None:
        return _iota(found[2]).reshape(_numbers(found[1])).tolist()
    if (
        found := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?\)?)\))? \{(.*?)\}", each.rest)
    ) is not None:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        order = np.arange(devices) if not found[2] else _iota(found[2])
        return _mesh_groups({name: int(size) for name, size in sizes.items()}, order, found[3])
    raise ValueError(f"unknown groups of devices in the compiled program: {each.rest[:160]!r}")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _iota(text: str) -> np.ndarray:
    """`[2,8]T(1,0)`: 0, 1, … in that shape, transposed; or the numbers themselves, `0,4,1,5`."""
    if not text.startswith("["):
        return np.array(_numbers(text))
    dims, _, order = text.partition("T")
    dims = _numbers(dims.strip("[]"))
    numbers = np.arange(math.prod(dims)).reshape(dims)
    return (numbers.transpose(_numbers(order.strip("()"))) if order else numbers).ravel()


def _mesh_groups(sizes: dict[str, int], order: np.ndarray, text: str) -> Sequence[Sequence[int]]:
    """Groups along axes of the compiler's own mesh; `'a':(2)4` is the part of size 4 of `a` that 2 others come before."""
    names, shape, chosen = list(sizes), [], []
    wanted = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", text)
    for name in names:
        parts = [(int(pre), int(size)) for axis, pre, size in wanted if axis == name and size]
        whole = any(axis == name and not size for axis, _, size in wanted)
        done = 1
        for pre, size in sorted(parts):
            shape.append(pre // done)
            chosen.append(len(shape))
            shape.append(size)
            done = pre * size
        if whole:
            chosen.append(len(shape))
        shape.append(sizes[name] // done)
    kept = [axis for axis in range(len(shape)) if axis not in chosen]
    members = math.prod(shape[axis] for axis in chosen)
    return order.reshape(shape).transpose((*kept, *chosen)).reshape(-1, members).tolist()


def _axes(groups: Sequence[Sequence[int]], mesh: Mesh) -> str:
    """The mesh axes along which members of a group differ."""
    places = np.stack(np.unravel_index(np.arange(mesh.size), mesh.devices.shape), axis=-1)
    varies = np.zeros(places.shape[1], bool)
    for group in groups:
        members = places[list(group)]
        varies |= (members != members[0]).any(0)
    return "+".join(name for name, along in zip(mesh.axis_names, varies) if along)


# ---------------------------------------------------------------------------------------------------- moving


def _moves(module: Module, each: Instruction) -> bool:
    if each.opcode in ("copy", "copy-start", "transpose", "concatenate", "dynamic-slice", "slice"):
        return True
    if each.opcode != "fusion":
        return False
    fused = module.computations[each.called("calls")[0]]
    return all(part.opcode in _MOVES for part in fused.values())


def _moved(module: Module, computation: Computation, each: Instruction, kernels: Mapping[str, Kernel]) -> float:
    """HBM bytes of one run of an instruction."""
    if each.opcode in _FREE or each.opcode.endswith("-done") or each.target in _FREE_TARGETS:
        return 0
    operands = [computation[name].shapes for name in each.operands]
    if each.target == "tpu_custom_call":
        flat = [shape for shapes in operands for shape in shapes]
        given = [Operand(shape.dims, shape.size, "f" in shape.dtype) for shape in flat]
        return kernel_cost(kernels, each.name, given).bytes
    if each.opcode == "slice-start":
        return sum(shape.hbm for shape in each.shapes[1:2]) + _part(operands[0][0], each.shapes[1])
    if each.opcode.endswith("-start"):  # its result holds the operand too
        return sum(shape.hbm for shape in each.shapes)
    if each.opcode in ("dynamic-slice", "slice", "gather"):
        return each.shapes[0].hbm + _part(operands[0][0], each.shapes[0])
    if each.opcode == "dynamic-update-slice":
        return 2 * _part(each.shapes[0], operands[1][0])
    if each.opcode == "fusion":
        return _fused(module, each, operands)
    return sum(shape.hbm for shapes in (*operands, each.shapes) for shape in shapes)


def _part(whole: Shape, part: Shape) -> float:
    """Bytes of HBM of a part of `whole`."""
    return part.held if whole.space == 0 else 0


def _fused(module: Module, each: Instruction, operands: Sequence[tuple[Shape, ...]]) -> float:
    fused = module.computations[each.called("calls")[0]]
    total = 0.0
    for parameter, shapes in zip(fused.parameters, operands):
        read = 0.0
        for part, first in _uses(module, fused, parameter.name):
            if first and part.opcode in ("dynamic-slice", "slice", "gather"):
                read += _part(shapes[0], part.shapes[0])
            elif not (first and part.opcode in ("dynamic-update-slice", "scatter")):
                read = math.inf
        total += min(read, sum(shape.hbm for shape in shapes))
    roots = [fused[name] for name in fused.root.operands] if fused.root.opcode == "tuple" else [fused.root]
    for root, shape in zip(roots, each.shapes):
        while root.opcode == "bitcast":
            root = fused[root.operands[0]]
        if root.opcode == "dynamic-update-slice":
            total += _part(shape, fused[root.operands[1]].shapes[0])
        elif root.opcode == "scatter":
            total += 2 * _part(shape, fused[root.operands[2]].shapes[0])
        else:
            total += shape.hbm
    return total


def _uses(module: Module, fused: Computation, name: str) -> Iterator[tuple[Instruction, bool]]:
    """What reads a value of a fusion, through renamings and fusions inside of it, and whether as its first operand."""
    for part in fused.values():
        for place, operand in enumerate(part.operands):
            if operand != name:
                continue
            if part.opcode == "bitcast":
                yield from _uses(module, fused, part.name)
            elif part.opcode == "fusion":
                inner = module.computations[part.called("calls")[0]]
                yield from _uses(module, inner, inner.parameters[place].name)
            else:
                yield part, place == 0
