"""What a compiled TPU program moves between devices, and what its loops copy, read from the compiler's text.

    %cond (p: (s32[], …)) -> pred[] {
      ROOT %lt = pred[] compare(%i, %thirty_six), direction=LT       where i, an element of p, has come to 36 …
    }
    %body (p: (s32[], …)) -> (s32[], …) {
      %gather = bf16[512,64]{1,0:T(8,128)} all-gather(%part), replica_groups=[4,4]<=[16], dimensions={1}
      %next = s32[] add(%i, %one)                                    … by ones …
      ROOT %tuple = (s32[], …) tuple(%next, …)
    }
    ENTRY %main (…) -> … {
      %first = (s32[], …) tuple(%zero, …)                            … from 0: so the gather counts 36 times, and as
      %loop = (s32[], …) while(%first), condition=%cond, body=%body  often again as what stands around the loop runs
    }

Where values end a loop there are no such numbers, and the caller says how often it runs.  Each branch of a
conditional counts as if it were taken.  `compiled.memory_analysis()` has the memory; nothing but this text has the
rest.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
# [ROOT ]%name = <its arrays> opcode(<operands>)<attributes>
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*?)\)(.*)$")
_ARRAY = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](?:\{([^}]*)\})?")
_NAMES = re.compile(r"%([\w.\-]+)")
_SIZES = {"pred": 1, "s4": 0.5, "u4": 0.5, "token": 0, "opaque": 0}
# Bytes that a device receives for each byte that it has, of a group of n that passes them round a ring.
_RECEIVED = {
    "all-gather": lambda n: n - 1,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
    "collective-broadcast": lambda n: 1,
}
_MOVES = {"copy", "copy-start", "transpose", "concatenate", "dynamic-slice", "slice"}
# What a fusion that only moves is made of besides.
_RENAMES = {"parameter", "constant", "bitcast", "reshape", "convert", "tuple", "get-tuple-element", "pad", "broadcast"}


class HloArray(NamedTuple):
    """An array of the compiled program.

    Attributes:
      bytes: of its elements.
      in_hbm: and not in a core's fast memory, nor in a host's.
    """

    dtype: str
    dims: tuple[int, ...]
    bytes: float
    in_hbm: bool


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
      root: `ROOT` for the one whose result is the computation's.
      result: its arrays, as text.
      inner: what stands in the brackets, as text.
      rest: what follows them.
    """

    root: str | None
    name: str
    result: str
    opcode: str
    inner: str
    rest: str

    @property
    def arrays(self) -> list[HloArray]:
        """Of its result; those of a tuple in one row."""
        return [_array(*match.groups()) for match in _ARRAY.finditer(self.result)]

    @property
    def operands(self) -> list[str]:
        """Names of instructions of the same computation."""
        return _NAMES.findall(self.inner)

    @property
    def origin(self) -> str:
        """What in the program it comes from, as JAX names it."""
        match = re.search(r'op_name="([^"]*)"', self.rest)
        return match[1] if match else self.name

    def called(self, *keys: str) -> list[str]:
        """Computations that these attributes name."""
        lists = [re.search(rf"\b{key}=(\{{[^}}]*\}}|%[\w.\-]+)", self.rest) for key in keys]
        return [name for match in lists if match for name in _NAMES.findall(match[1])]


# Instructions by name, in their order.
Computation = Mapping[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program: its computations by name, and the name of the one that is run."""

    computations: Mapping[str, Computation]
    entry: str


class Visit(NamedTuple):
    """An instruction where it runs.

    Attributes:
      times: how often, in one call of the program.
    """

    instruction: Instruction
    computation: str
    times: int
    in_loop: bool


class Collective(NamedTuple):
    """One collective operation of the program.

    Attributes:
      axes: the mesh axes within which its groups lie, joined by `+`.
      received: bytes that each device receives from others, each time, as a ring would move them.
      times: how often it runs.
    """

    kind: str
    axes: str
    received: float
    times: int


def read_module(text: str) -> Module:
    """Reads `compiled.as_text()`.

    Raises:
      ValueError: this is no module with an entry.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    current, entry = {}, ""
    for line in text.splitlines():
        if (head := _COMPUTATION.match(line)) is not None:
            current = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif (match := _INSTRUCTION.match(line)) is not None:
            current[match[2]] = Instruction(*match.groups())
    if not entry:
        raise ValueError("the compiled program's text has no ENTRY computation")
    return Module(computations, entry)


def visits(module: Module, steps: int) -> Iterator[Visit]:
    """Every instruction that runs, with how often; those of fusions are not listed one by one.

    Args:
      steps: trips of the loop that values end; 0 where there is none.

    Raises:
      ValueError: there is such a loop and `steps` is 0, or there is one inside another.
    """

    def walk(name: str, times: int, in_loop: bool, by_values: bool) -> Iterator[Visit]:
        for instruction in module.computations[name].values():
            yield Visit(instruction, name, times, in_loop)
            if instruction.opcode == "while":
                trips = trip_count(module, module.computations[name], instruction)
                if trips is None and (by_values or not steps):
                    why = "lies inside another such loop" if by_values else "got no number of steps for it"
                    raise ValueError(f"the loop {instruction.origin} ends where values say, and {why}")
                (body,) = instruction.called("body")
                yield from walk(body, times * (steps if trips is None else trips), True, by_values or trips is None)
            elif instruction.opcode in ("conditional", "call", "async-start"):
                branches = "branch_computations", "true_computation", "false_computation"
                for called in instruction.called(*branches, "to_apply", "calls"):
                    yield from walk(called, times, in_loop, by_values)

    yield from walk(module.entry, 1, False, False)


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """How often a loop of this computation runs, at most: from where its counter starts, or 0 where that is a value, to
    its end by its step.  None where values end it.

    JAX's own loops count by ones.  Those that the compiler makes of a product with a gathered matrix, to move a part
    while it multiplies another, may take two parts at a time.
    """
    (condition,), (body,) = loop.called("condition"), loop.called("body")
    compare, inner, given = _root(module, module.computations[condition], None)
    if compare.opcode != "compare" or "direction=LT" not in compare.rest:
        return None
    counter, end = (_symbol(module, inner, name, given) for name in compare.operands)
    carried = computation[loop.operands[0]]

    def start_of(element: int) -> int | None:
        symbol = _symbol(module, computation, carried.operands[element], None) if carried.opcode == "tuple" else None
        return symbol.number if symbol and symbol.element is None else None

    if counter is None or end is None or counter.element is None:
        return None
    last = end.number if end.element is None else start_of(end.element)  # carried along, as the loop's own invariant
    (root,) = (part for part in module.computations[body].values() if part.root)
    if last is None or root.opcode != "tuple":
        return None
    step = _symbol(module, module.computations[body], root.operands[counter.element], None)
    if step is None or step.element != counter.element or step.number < 1:
        return None
    return max(-(-(last - (start_of(counter.element) or 0)) // step.number), 0)


class _Symbol(NamedTuple):
    """An integer of a loop: an element of the tuple that it carries, or 0 where that is None, plus a number."""

    element: int | None
    number: int


def _root(module: Module, computation: Computation, given: Any) -> tuple[Instruction, Computation, Any]:
    """(root, where it stands, the symbols of the parameters there), of a fusion the one inside."""
    (root,) = (part for part in computation.values() if part.root)
    if root.opcode != "fusion":
        return root, computation, given
    return _root(
        module,
        module.computations[root.called("calls")[0]],
        [_symbol(module, computation, name, given) for name in root.operands],
    )


def _symbol(module: Module, computation: Computation, name: str, given: Any) -> _Symbol | None:
    """What an instruction computes; None where it is anything else.

    Args:
      given: of a fusion's parameters; None in the computation of a loop.
    """
    part = computation[name]
    if part.opcode == "constant":
        return _Symbol(None, int(part.inner)) if re.fullmatch(r"-?\d+", part.inner) else None
    if part.opcode == "get-tuple-element" and computation[part.operands[0]].opcode == "parameter":
        return _Symbol(int(re.search(r"index=(\d+)", part.rest)[1]), 0)
    if part.opcode == "parameter":
        return given[int(part.inner)] if given else None
    if part.opcode in ("copy", "bitcast", "convert"):
        return _symbol(module, computation, part.operands[0], given)
    if part.opcode == "fusion":
        inside = [_symbol(module, computation, operand, given) for operand in part.operands]
        root, inner, inside = _root(module, module.computations[part.called("calls")[0]], inside)
        return _symbol(module, inner, root.name, inside)
    if part.opcode == "add":
        sides = [_symbol(module, computation, operand, given) for operand in part.operands]
        if None not in sides and None in (elements := [side.element for side in sides]):
            return _Symbol(next((x for x in elements if x is not None), None), sum(side.number for side in sides))
    return None


def collectives(module: Module, mesh: Mesh, steps: int) -> list[Collective]:
    """The program's collectives that move anything.  Start and end of one are one, as are the parts into which the
    compiler cuts one to run it under other work: they share a channel."""
    moving, seen = [], set()
    for visit in visits(module, steps):
        for instruction, computation, kind in _communicating(module, visit.instruction, visit.computation):
            channel = re.search(r"channel_id=(\d+)", instruction.rest)
            key = visit.computation, channel[1] if channel else instruction.name
            groups = device_groups(instruction, mesh.size)
            size = max(len(group) for group in groups)
            if key in seen or size == 1:
                continue
            seen.add(key)
            # `_RECEIVED` counts in what is read: the result has another size where the operation gathers or scatters.
            own = sum(array.bytes for name in instruction.operands for array in computation[name].arrays)
            moving.append(Collective(kind, mesh_axes(groups, mesh), own * _RECEIVED[kind](size), visit.times))
    return moving


def copies_in_loops(module: Module, steps: int, at_least: float) -> list[str]:
    """Arrays of so many bytes or more that a loop's body copies, transposes or cuts out of others, HBM to HBM, as text.
    A cache that is not updated in place is one of them."""
    copies = []
    for visit in visits(module, steps):
        instruction, computation = visit.instruction, module.computations[visit.computation]
        if not visit.in_loop or not _only_moves(module, instruction):
            continue
        # The result of a start holds what it reads besides what it writes.
        written = instruction.arrays[:1] if instruction.opcode == "copy-start" else instruction.arrays
        read = [array for name in instruction.operands for array in computation[name].arrays]
        large = [[x for x in arrays if x.in_hbm and x.bytes >= at_least] for arrays in (written, read)]
        for array in large[0] if large[1] else ():
            shape = f"{array.dtype}[{','.join(map(str, array.dims))}]"
            copies.append(f"{instruction.opcode} {shape} {visit.times}x {instruction.origin}")
    return copies


def _only_moves(module: Module, instruction: Instruction) -> bool:
    if instruction.opcode != "fusion":
        return instruction.opcode in _MOVES
    fused = module.computations[instruction.called("calls")[0]].values()
    return {part.opcode for part in fused} <= _MOVES | _RENAMES


def _array(dtype: str, dims: str, layout: str | None) -> HloArray:
    """`bf16[512,64]{1,0:T(8,128)S(1)}`: the number after S is the memory, none for HBM."""
    sizes = tuple(int(size) for size in dims.split(",") if size)
    element = _SIZES[dtype] if dtype in _SIZES else int(re.search(r"\d+", dtype)[0]) / 8
    return HloArray(dtype, sizes, math.prod(sizes) * element, "S(" not in (layout or ""))


def _communicating(
    module: Module, instruction: Instruction, name: str
) -> Iterator[tuple[Instruction, Computation, str]]:
    """(collective, its computation, kind) of an instruction: itself, or what a fusion holds.  A fusion that keeps a
    device's part of a sum is how this compiler writes a reduce-scatter."""
    kind = instruction.opcode.removesuffix("-start")
    if kind in _RECEIVED:
        scatters = name.startswith("all-reduce-scatter")
        yield instruction, module.computations[name], "reduce-scatter" if scatters else kind
    elif kind == "fusion":
        (inner,) = instruction.called("calls")
        for part in module.computations[inner].values():
            yield from _communicating(module, part, inner)


# ------------------------------------------------------------------------------------------------------------- groups


def device_groups(instruction: Instruction, devices: int) -> Sequence[Sequence[int]]:
    """The groups of partitions among which a collective works; of a permutation, the pairs that exchange something.
    Partitions count along the mesh's flattened devices.

        {{0,1},{2,3}}                        one by one; {} is all in one group
        [2,4]<=[8]                           0 … 7 in two rows, a group a row
        [4,2]<=[2,4]T(1,0)                   0 … 7 in two rows, transposed, then cut into four rows
        mesh['a'=2,'b'=4] {'b'}              0 … 7 as an array [2, 4]; a group goes along b
        mesh['a'=2,'b'=4] {'b':(2)2}         b as [2, 2]: a group goes along the part that 2 others come before
        mesh[…], device_ids=([2,4]T(1,0)) …  the array's numbers, written as above

    Raises:
      ValueError: they are written in a form that this does not know.
    """
    text = instruction.rest
    if (match := re.search(r"source_target_pairs=\{(.*?)\}\}", text)) is not None:
        pairs = [tuple(map(int, pair.split(","))) for pair in re.findall(r"\d+,\d+", match[1])]
        return [pair for pair in pairs if pair[0] != pair[1]] or [(0,)]
    if (match := re.search(r"replica_groups=\{(\{.*?\})?\}(?:,|$)", text)) is not None:
        groups = [[int(i) for i in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", match[1] or "")]
        return groups or [range(devices)]
    if (match := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text)) is not None:
        return _counted(match[2]).reshape(_numbers(match[1])).tolist()
    pattern = r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?\)?)\))? \{(.*?)\}"
    if (match := re.search(pattern, text)) is not None:
        order = _counted(match[2]) if match[2] else np.arange(devices)
        return _along_axes(order, match[1], match[3])
    raise ValueError(f"unknown groups of devices in the compiled program: {text[:160]!r}")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _counted(text: str) -> np.ndarray:
    """`[2,8]T(1,0)`: 0, 1, … in that shape, transposed; or the numbers themselves, `0,4,1,5`."""
    if not text.startswith("["):
        return np.array(_numbers(text))
    dims, _, order = text.partition("T")
    dims = _numbers(dims.strip("[]"))
    numbers = np.arange(math.prod(dims)).reshape(dims)
    return (numbers.transpose(_numbers(order.strip("()"))) if order else numbers).ravel()


def _along_axes(order: np.ndarray, axes: str, wanted: str) -> Sequence[Sequence[int]]:
    """Groups along `wanted` axes of the compiler's own mesh, whose sizes `axes` has."""
    # Every axis as three, most of them of size 1: what comes before the part of it that a group goes along, that part,
    # and what comes behind.
    #     'a'=2, 'b'=4 {'b':(2)2}     a: [2, 1, 1]   b: [2, 2, 1]     groups along b's middle, 2 devices each
    shape, chosen = [], []
    for name, size in re.findall(r"'([^']+)'=(\d+)", axes):
        match = re.search(rf"'{name}'(?::\((\d+)\)(\d+))?", wanted)
        before, part = (int(match[1] or 1), int(match[2] or size)) if match else (int(size), 1)
        chosen += [len(shape) + 1]
        shape += [before, part, int(size) // (before * part)]
    members = math.prod(shape[axis] for axis in chosen)
    return np.moveaxis(order.reshape(shape), chosen, range(-len(chosen), 0)).reshape(-1, members).tolist()


def mesh_axes(groups: Sequence[Sequence[int]], mesh: Mesh) -> str:
    """The mesh axes along which members of a group differ."""
    places = np.stack(np.unravel_index(np.arange(mesh.size), mesh.devices.shape), axis=-1)
    varies = np.zeros(places.shape[1], bool)
    for group in groups:
        members = places[list(group)]
        varies |= (members != members[0]).any(0)
    return "+".join(name for name, along in zip(mesh.axis_names, varies) if along)
