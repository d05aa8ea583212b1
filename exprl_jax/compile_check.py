"""Compiles a config's programs for TPU slices that are not there: what a pod would keep, move and take at best.

    python -m exprl_jax.compile_check --config=configs/stage1.py --topology=v5e:4x4
    python -m exprl_jax.compile_check --config=configs/stage1.py \
        --topology=v5e:4x4,v5e:8x8+mesh.data=8+mesh.model=8+rollout.wave=8

A topology may be followed by config keys that it changes.  Times are of rollouts at their budgets, or of such as
`--lengths` says: `mean,spread,segments`, or a run's metrics.jsonl.  Prints the tables of each topology, and last a row
of each as Markdown.  Needs `jax[tpu]` and no TPU; each of several topologies is compiled in a process of its own, for
at most `--seconds` (two hours).  Exit status 1 says that something does not fit or compile, on stderr in one line if
the config is at fault; 2 is for a wrong command line.
"""

from __future__ import annotations

import ast
import multiprocessing
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from exprl_jax.packaged import define_config

# For a process that was told to end, or has.
_END_SECONDS = 10.0


def main(argv: Sequence[str]) -> int:
    """Checks every topology, prints what it takes, and returns the exit status."""
    try:
        given = _parse(argv)
        specs = re.split(r",(?=\w+:)", given.topology)
        settings = {spec: _changed(given.config.copy_and_resolve_references(), spec).to_dict() for spec in specs}
    except (flags.Error, ValueError, AttributeError, KeyError, TypeError, OSError, ImportError, SyntaxError) as error:
        return _complain(error, 2)

    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # where there are chips, this leaves them alone
    from exprl_jax.plan.tables import summary

    reports, status = [], 0
    for spec in specs:
        try:
            alone = len(specs) == 1
            asked = settings[spec], spec, given.lengths
            report = _check(*asked) if alone else _check_apart(*asked, given.seconds)
            reports.append(report)
        except (ValueError, OSError) as error:
            status = _complain(f"{spec}: {error}", 1)
    if reports:
        print(summary(reports), flush=True)
    return status if all(report.fits for report in reports) else 1


def _parse(argv: Sequence[str]) -> Any:
    values = flags.FlagValues()
    meaning = "The experiment: a file in configs/, optionally with :arm."
    define_config("config", meaning, values, sys_argv=list(argv))
    flags.DEFINE_string("topology", None, "<generation>:<shape>[+key=value…], several with commas.", flag_values=values)
    meaning = "Of rollouts, for times: mean,spread,segments, or a run's metrics.jsonl; '' for their budgets."
    flags.DEFINE_string("lengths", "", meaning, flag_values=values)
    flags.DEFINE_float(
        "seconds", 7200.0, "Time limit of each of several topologies.", lower_bound=1.0, flag_values=values
    )
    rest = values(list(argv))[1:]
    if rest:
        raise ValueError(f"unexpected argument {rest[0]!r}; every option is --name=value")
    if values.config is None or not values.topology:
        raise ValueError(
            "--config and --topology are needed; for instance --config=configs/stage1.py --topology=v5e:4x4"
        )
    return values


def _changed(config: Any, spec: str) -> Any:
    """The config with the keys that a topology changes.

    Raises:
      ValueError: a key that there is not, or no value.
    """
    for change in spec.split("+")[1:]:
        key, equals, value = change.partition("=")
        if not equals:
            raise ValueError(f"--topology: got {change!r} in {spec!r}, expected key=value after each +")
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            pass  # a word, such as a model's name: it stays the text that it is
        try:
            config.update_from_flattened_dict({key: value})
        except (KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"--topology: {change!r} in {spec!r} does not fit the config: {error}") from error
    return config


def _check(settings: dict[str, Any], spec: str, lengths: str) -> Any:
    """Compiles for one topology, here, prints what it takes, and returns the report."""
    from exprl_jax.plan.chips import topology
    from exprl_jax.plan.compiled import compile_for
    from exprl_jax.plan.lengths import parse_lengths
    from exprl_jax.plan.tables import as_text
    from exprl_jax.resolve import resolve

    name, _, changes = spec.partition("+")
    config = resolve(settings)
    if lengths and config.task != "rl":
        raise ValueError(f"--lengths: of a run with config.task = 'rl', got {config.task!r}")
    shown = parse_lengths(lengths, config.rollout.max_tokens) if lengths else None
    report = compile_for(config, topology(name), changes.replace("+", ", "), shown)
    print(as_text(report), end="\n\n", flush=True)
    return report


def _check_apart(settings: dict[str, Any], spec: str, lengths: str, seconds: float) -> Any:
    """The same in a process of its own: a compiler keeps the memory that it took.

    Raises:
      ValueError: what the check says, or it took longer, or its process ended without a word.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_check, args=(sender, settings, spec, lengths), daemon=True)
    process.start()
    sender.close()  # so that the end of the process is the end of the pipe
    try:
        if not receiver.poll(seconds):
            raise ValueError(f"did not compile within --seconds={seconds:g}; give it more, or a smaller config")
        outcome = receiver.recv()
    except EOFError as error:
        process.join(_END_SECONDS)
        raise ValueError(f"its process ended with status {process.exitcode}, perhaps for want of memory") from error
    finally:
        process.kill()
        process.join(_END_SECONDS)
    if isinstance(outcome, str):
        raise ValueError(outcome)
    return outcome


def _send_check(sender: Any, settings: dict[str, Any], spec: str, lengths: str) -> None:
    """Sends the report of a check, or what was wrong as text."""
    try:
        sender.send(_check(settings, spec, lengths))
    except (ValueError, OSError) as error:
        sender.send(str(error))


def _complain(error: object, status: int) -> int:
    print(f"exprl_jax.compile_check: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv))
