"""Compiles a config's programs for TPU slices that are not there: what a pod would hold, move and take at best.

    python -m exprl_jax.compile_check --config=configs/stage1.py --topology=v5e:4x4
    python -m exprl_jax.compile_check --config=configs/stage1.py --document=docs/pods.md \
        --topology=v5e:4x4,v5e:8x8+mesh.data=8+mesh.model=8+rollout.wave=8

Of training runs and evaluations.  A topology may be followed by config keys that it changes.  Needs `jax[tpu]` and no
TPU; each of several topologies is compiled in a process of its own.  Exit status 1 says that something does not fit or
compile, on stderr in one line if the config is at fault; 2 is for a wrong command line.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from absl import flags

from exprl_jax.packaged import define_config


def main(argv: Sequence[str]) -> int:
    """Checks every topology, prints and writes what was found, and returns the exit status."""
    try:
        given = _parse(argv)
        specs = re.split(r",(?=\w+:)", given.topology)
        settings = {spec: _changed(given.config.copy_and_resolve_references(), spec) for spec in specs}
    except (flags.Error, ValueError, AttributeError, KeyError, TypeError, OSError, ImportError, SyntaxError) as error:
        return _complain(error, 2)

    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # where there are chips, this leaves them alone
    from exprl_jax.files import write_atomically
    from exprl_jax.plan.tables import rewritten

    proofs, status = [], 0
    for spec in specs:
        try:
            proofs.append(_prove(settings[spec].to_dict(), spec) if len(specs) == 1 else _prove_apart(argv, spec))
        except (ValueError, OSError) as error:
            status = _complain(error, 1)
    if not proofs:
        return status
    try:
        if given.output:
            written = {"config": given.config.to_dict(), "proofs": [dataclasses.asdict(proof) for proof in proofs]}
            write_atomically(pathlib.Path(given.output), json.dumps(written, indent=1) + "\n")
        if given.document:
            page = pathlib.Path(given.document)
            before = page.read_text(encoding="utf-8") if page.exists() else ""
            command = f"python -m exprl_jax.compile_check {' '.join(argv[1:])}"
            write_atomically(page, rewritten(before, command, proofs))
    except (ValueError, OSError) as error:
        return _complain(error, 1)
    return status if all(proof.fits for proof in proofs) else 1


def _parse(argv: Sequence[str]) -> Any:
    values = flags.FlagValues()
    meaning = "The experiment: a file in configs/, optionally with :arm."
    define_config("config", meaning, values, sys_argv=list(argv))
    flags.DEFINE_string("topology", None, "<generation>:<shape>[+key=value…], several with commas.", flag_values=values)
    flags.DEFINE_string("output", "", "A JSON file for all that was found.", flag_values=values)
    flags.DEFINE_string("document", "", "A page whose part between markers is rewritten.", flag_values=values)
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
        key, found, value = change.partition("=")
        if not found:
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


def _prove(settings: dict[str, Any], spec: str) -> Any:
    """Compiles for one topology, here, and prints what was found."""
    from exprl_jax.plan.chips import topology
    from exprl_jax.plan.measure import prove
    from exprl_jax.plan.tables import as_text
    from exprl_jax.resolve import resolve

    name, _, changes = spec.partition("+")
    where = topology(name)
    proof = prove(resolve(settings), where, changes.replace("+", ", "))
    print(as_text(proof), flush=True)
    return proof


def _prove_apart(argv: Sequence[str], spec: str) -> Any:
    """Compiles for one topology in a process of its own: a compiler keeps the memory that it took."""
    from exprl_jax.plan.measure import proof_from

    ours = ("--topology", "--output", "--document")
    kept = [option for option in argv[1:] if option.partition("=")[0] not in ours]
    with tempfile.TemporaryDirectory() as folder:
        output = pathlib.Path(folder) / "proof.json"
        command = [sys.executable, "-m", "exprl_jax.compile_check", *kept, f"--topology={spec}", f"--output={output}"]
        done = subprocess.run(command)
        if not output.exists():
            raise ValueError(f"{spec} was not checked; its process ended with status {done.returncode}")
        print(flush=True)
        return proof_from(json.loads(output.read_text(encoding="utf-8"))["proofs"][0])


def _complain(error: object, status: int) -> int:
    print(f"exprl_jax.compile_check: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv))
