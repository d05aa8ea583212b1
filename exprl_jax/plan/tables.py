"""The plan's tables as text: memory by owner, collectives, time at best, and a row of what decides."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from exprl_jax.plan.chips import GIB
from exprl_jax.plan.compiled import CODE, TEMPORARIES, Report, Usage
from exprl_jax.plan.records import ADAM, BATCH, COPY, GRADIENT, KEYS, POLICY
from exprl_jax.text_tables import align, markdown

_OWNERS = (
    *("weights", POLICY, "judge", "annotator", ADAM, "frozen"),
    *(BATCH, KEYS, COPY, GRADIENT, TEMPORARIES, CODE, "total"),
)
PHASES = ("sample", "judge", "logp", "train")


def memory_rows(owners: Sequence[Mapping[str, int]]) -> list[list[str]]:
    """GiB by owner: a header, and a row for each program; an owner that a program does not meet is left empty."""
    names = sorted({name for sizes in owners for name in sizes}, key=_position)
    return [names, *([_gib(sizes[name]) if name in sizes else "" for name in names] for sizes in owners)]


def as_text(report: Report) -> str:
    """For the terminal."""
    header, *memory = memory_rows([usage.owners for usage in report.programs])
    fits = [["program", "compile s", "needs", "fits", *header, "donated"]]
    for usage, owners in zip(report.programs, memory):
        donated = f"{_gib(usage.aliased)} of {_gib(usage.donated)}" if usage.donated else ""
        needs, verdict = _gib(usage.needed) if usage.needed else "", "yes" if usage.fits else "NO"
        fits.append([usage.name, f"{usage.seconds:.0f}", needs, verdict, *owners, donated])
    moved = [
        [usage.name, *name.split(" "), f"{times:,}", _figure(size / 1e9)]
        for usage in report.programs
        for name, (size, times) in sorted(usage.moved.items())
    ]
    compiled = [usage for usage in report.programs if usage.compiled]
    time = [
        [
            *(usage.name, str(usage.times), _figure(usage.flops / 1e12), _figure(usage.hbm / 1e9)),
            *(_figure(usage.bounds[name]) for name in ("compute", "HBM", "ICI")),
            _figure(usage.bound),
        ]
        for usage in compiled
    ]
    phases = dict.fromkeys(usage.phase for usage in compiled if usage.times)
    time += [[f"= {phase}", *[""] * 6, _figure(report.seconds(phase))] for phase in phases]
    time.append(["= a step" + ("" if report.fits else ", but for the rest"), *[""] * 6, _figure(report.seconds())])
    parts = [
        _heading(report),
        f"memory a device, GiB of {_gib(report.limit)}\n{align(fits)}",
        "collectives a call, received by each device\n" + align([["program", "kind", "axes", "times", "GB"], *moved]),
        f"time at best: a bound, not a measurement; {_lengths(report)}\n"
        + align(
            [["program", "calls a step", "TFLOP", "HBM GB", "compute s", "HBM s", "ICI s", "s a step"], *time], left=1
        ),
        "\n".join(line for usage in report.programs for line in _problems(usage)),
    ]
    return "\n\n".join(part for part in parts if part)


def summary(reports: Iterable[Report]) -> str:
    """A row a topology, as Markdown: the figures that decide."""
    header = ["topology", "mesh", "settings", "HBM GiB", "largest GiB", "in", "fits"]
    rows = [header + [f"{phase} s" for phase in PHASES] + ["a step at best, s"]]
    for report in reports:
        fullest = max(report.programs, key=lambda usage: usage.needed)
        settings = [report.topology, f"{report.data} x {report.model}", report.changes]
        size = [_gib(report.limit), _gib(fullest.needed), fullest.name, "yes" if report.fits else "no"]
        seconds = [f"{report.seconds(phase):,.0f}" if report.fits else "" for phase in (*PHASES, None)]
        rows.append(settings + size + seconds)
    return markdown(rows)


def _heading(report: Report) -> str:
    changes = f", {report.changes}" if report.changes else ""
    fits = "fits" if report.fits else "does not fit"
    return f"{report.topology}, mesh data {report.data} x model {report.model}{changes}: {fits}"


def _lengths(report: Report) -> str:
    """Of what rollouts the times are."""
    if report.lengths is None:
        return "all rollouts at their budgets"
    mean, spread, segments = report.lengths
    return (
        f"rollouts of {mean:,.0f} tokens on average, lognormal with a spread of {spread:.2g}, in {segments:.2g} "
        "segments; prompts and judgements at their budgets"
    )


def _problems(usage: Usage) -> list[str]:
    """What to know of a program that does not fit or compile, and of each large copy in a loop."""
    lines = [f"{usage.name} copies in a loop: {copy}" for copy in usage.copies]
    if usage.failure:
        return [f"{usage.name} did not compile: {usage.failure}", *lines]
    if usage.needed > usage.limit:
        largest = sorted(usage.owners.items(), key=lambda owned: -owned[1])
        owners = ", ".join(f"{name} {_gib(size)}" for name, size in largest)
        lines += [
            f"{usage.name}: out of memory, needs {_gib(usage.needed)} of {_gib(usage.limit)} GiB a device ({owners})",
            f"  to change: {', '.join(usage.settings)}",
        ]
    return lines


def _gib(size: float) -> str:
    return _figure(size / GIB)


def _figure(number: float) -> str:
    """Three digits of what is small, hundredths of what is not."""
    return f"{number:.3g}" if abs(number) < 1 else f"{number:,.2f}"


def _position(owner: str) -> tuple[int, str]:
    return next(i for i, name in enumerate(_OWNERS) if owner.startswith(name)), owner
