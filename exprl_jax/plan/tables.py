"""The compile check's tables: on the terminal, and as a page of docs/."""

from __future__ import annotations

from collections.abc import Sequence

from exprl_jax.plan.chips import GIB
from exprl_jax.plan.measure import CODE, TEMPORARIES, Program, Proof

Table = tuple[str, list[str], list[list[str]]]
BEGIN, END = "<!-- compile_check: begin -->", "<!-- compile_check: end -->"


def tables_of(proof: Proof) -> list[Table]:
    """(title, header, rows): memory, collectives, time at best."""
    made = [each for each in proof.programs if each.compiled]
    owners = sorted({name for each in made for name in each.owners if name != TEMPORARIES}, key=_place)
    memory = [
        [
            each.name,
            f"{each.seconds:.0f}",
            _gib(each.peak),
            _gib(each.total),
            "yes" if each.exhausted is None else "NO",
            *(_gib(each.owners[name]) if name in each.owners else "" for name in owners),
            _gib(each.owners[TEMPORARIES]),
            f"{_gib(each.aliased)} of {_gib(each.donated)}" if each.donated else "",
        ]
        if each.compiled
        else [each.name, f"{each.seconds:.0f}", *[""] * 2, "NO", *[""] * (len(owners) + 2)]
        for each in proof.programs
    ]
    header = ["program", "compile s", "peak", "with the rest", "fits", *owners, "temporaries", "donated"]
    collectives = [
        [each.name, *name.split(" "), f"{times:,}", _figure(size / 1e9)]
        for each in made
        for name, (size, times) in sorted(each.moved.items())
    ]
    time = [
        [
            each.name,
            str(each.each_step),
            _figure(each.flops / 1e12),
            _figure(each.hbm / 1e9),
            *(_figure(each.bounds[name]) for name in ("compute", "HBM", "ICI")),
            _figure(each.bound * each.each_step),
        ]
        for each in made
    ]
    phases = dict.fromkeys(each.phase for each in made if each.each_step)
    time += [[f"= {phase}", *[""] * 6, _figure(proof.seconds(phase))] for phase in phases]
    time.append(
        ["= a step" if proof.fits else "= a step, without what did not compile", *[""] * 6, _figure(proof.seconds())]
    )
    limit = _gib(proof.limit)
    return [
        (f"memory a device, GiB of {limit}", header, memory),
        ("collectives a call, received by each device", ["program", "kind", "mesh axes", "times", "GB"], collectives),
        (
            "time at best: a bound, not a measurement; all rollouts at their budgets",
            ["program", "calls a step", "TFLOP", "HBM GB", "compute s", "HBM s", "ICI s", "s a step"],
            time,
        ),
    ]


def problems_of(proof: Proof) -> list[str]:
    """A line or more for each program that does not fit or compile, and for each large copy in a loop."""
    lines = []
    for each in proof.programs:
        if each.exhausted is not None:
            lines += _exhausted(each)
        if each.failure:
            lines.append(f"{each.name} did not compile: {each.failure}")
        lines += [f"{each.name} copies in a loop: {copy}" for copy in each.copies]
    return lines


def heading(proof: Proof) -> str:
    """One line that says what this is of."""
    changes = f", {proof.changes}" if proof.changes else ""
    fits = "fits" if proof.fits else "does not fit"
    return f"{proof.topology}, mesh data {proof.data} x model {proof.model}{changes}: {fits}"


def as_text(proof: Proof) -> str:
    """For the terminal."""
    parts = [heading(proof)]
    for title, header, rows in tables_of(proof):
        widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in (header, *rows)]
        parts.append("\n".join([title, *lines]))
    return "\n\n".join([*parts, *["\n".join(problems_of(proof))][: bool(problems_of(proof))]])


def as_markdown(proof: Proof) -> str:
    """For a page."""
    parts = [f"## {heading(proof)}"]
    for title, header, rows in tables_of(proof):
        lines = [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
        parts.append("\n".join([f"{title[0].upper()}{title[1:]}:", "", *lines]))
    if problems := problems_of(proof):
        parts.append("\n".join(f"- {line.strip()}" for line in problems))
    return "\n\n".join(parts)


def summary(proofs: Sequence[Proof]) -> str:
    """One row a topology, as markdown: the figures that decide."""
    header = ["topology", "mesh", "settings", "HBM limit GiB", "largest GiB", "in", "fits", "a step at best, s"]
    rows = []
    for proof in proofs:
        fullest = max(proof.programs, key=lambda each: each.exhausted.needed if each.exhausted else each.total)
        size = fullest.exhausted.needed if fullest.exhausted else fullest.total
        step = _figure(proof.seconds()) if proof.fits else ""
        rows.append(
            [
                proof.topology,
                f"{proof.data} x {proof.model}",
                proof.changes,
                _gib(proof.limit),
                _gib(size),
                fullest.name,
                "yes" if proof.fits else "no",
                step,
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def rewritten(page: str, command: str, proofs: Sequence[Proof]) -> str:
    """The page with what stands between the markers replaced; the markers come last where there are none."""
    body = "\n\n".join([f"Made by `{command}`.", summary(proofs), *map(as_markdown, proofs)])
    before, found, after = page.partition(BEGIN)
    after = after.partition(END)[2] if found else "\n"
    before = before if found else page.rstrip("\n") + "\n\n" if page else ""
    return f"{before}{BEGIN}\n\n{body}\n\n{END}{after}"


def _exhausted(each: Program) -> list[str]:
    out = each.exhausted
    said = f"{each.name}: out of memory, needs {_gib(out.needed)} of {_gib(out.limit)} GiB a device"
    if each.compiled:
        said += f" ({_gib(each.peak)} of its own and {_gib(each.total - each.peak)} that lie beside it)"
    lines = [said, *(f"  {buffer}" for buffer in out.buffers)]
    if not out.buffers:
        lines.append("  its buffers are not known: it does not fit the generation with the most memory either")
    return [*lines, f"  to change: {', '.join(out.settings)}"]


def _gib(size: float) -> str:
    return _figure(size / GIB)


def _figure(number: float) -> str:
    """Three digits of what is small, hundredths of what is not."""
    return f"{number:.3g}" if abs(number) < 1 else f"{number:,.2f}"


def _place(owner: str) -> tuple[int, str]:
    order = ["weights", "policy", "Adam", "frozen", "batch", "KV", CODE]
    return next((i for i, name in enumerate(order) if owner.startswith(name)), len(order)), owner
