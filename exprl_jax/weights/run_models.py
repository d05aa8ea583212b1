"""What a run writes down of its models and functions, so that none can become another under it.

    model/         the policy's architecture and tokenizer: a Hugging Face folder without weights
    models.json    a fingerprint of the files of every model that the run has opened, by the model's name in the config;
                   and of other files that the config names: a function of the user's, a judge's rubric

A fingerprint is of what the files hold, not of their names' dates.  Files up to 64 MB are read whole.  Of a larger one
the first 16 MB (a header, and the vocabulary of a GGUF file) and 4 kB of every MB after them, so that no tensor of that
size is left out: a second for 8 GB.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping

import jax

from exprl_jax.files import read_json, write_atomically
from exprl_jax.hosts import barrier
from exprl_jax.run.workdir import Workdir, has_begun
from exprl_jax.weights import folder as weights
from exprl_jax.weights.language_model import LanguageModel

_WHOLE = 64 << 20
_START = 16 << 20
_EVERY, _PIECE = 1 << 20, 4 << 10


Files = Mapping[str, Iterable[pathlib.Path]]  # by what names them in the config


def record_models(
    workdir: Workdir, *, policy: LanguageModel, models: Iterable[LanguageModel], files: Files | None = None
) -> None:
    """`check_models`, and writes down what the policy is, unless that is done already."""
    check_models(workdir, models, files)
    if jax.process_index() != 0 or workdir.model.exists():
        return
    scratch = workdir.model.with_name(f".{workdir.model.name}.writing-{os.getpid()}")
    scratch.mkdir()
    weights.write_description(scratch, policy.arch, policy.tokenizer, policy.config.param_dtype)
    os.replace(scratch, workdir.model)


def check_models(workdir: Workdir, models: Iterable[LanguageModel], files: Files | None = None) -> None:
    """Writes down the models and files of a new run; compares them with what is written down in one that goes on.

    Every process must call this.  It may be called again, with models that are opened later.

    Args:
      files: others that the config names, such as a function's, by what names them.

    Raises:
      ValueError: a model's files, or one of the others, are not those that the run began with.
    """
    path = workdir.path / "models.json"
    mine = {model.config.weights: fingerprint(model.source.files) for model in models if model.source is not None}
    mine |= {name: fingerprint(paths) for name, paths in (files or {}).items()}
    try:
        if jax.process_index() == 0:
            known = read_json(path) if path.exists() else {}
            # Before its first step a run may still take other models, as it may take another config.
            recorded = mine | known if has_begun(workdir.path) else known | mine
            if recorded != known or not path.exists():
                write_atomically(path, json.dumps(recorded, indent=1, sort_keys=True) + "\n")
    finally:
        barrier()
    recorded = read_json(path)
    for name, digest in mine.items():
        if recorded.get(name) != digest:
            what = name if name in (files or {}) else f"model {name}"
            raise ValueError(
                f"--workdir {workdir.path}: {what} is not what the run began with: its files hold something else; put "
                "the earlier files back, or choose another --workdir"
            )


def fingerprint(files: Iterable[pathlib.Path]) -> str:
    """One of all the files, by name, size and content."""
    total = hashlib.sha256()
    for path in files:
        size, digest = path.stat().st_size, hashlib.sha256()
        with path.open("rb") as file:
            if size <= _WHOLE:
                digest = hashlib.file_digest(file, "sha256")
            else:
                digest.update(file.read(_START))
                for start in (*range(_START, size - _PIECE, _EVERY), size - _PIECE):
                    file.seek(start)
                    digest.update(file.read(_PIECE))
        total.update(f"{path.name} {size} {digest.hexdigest()}\n".encode())
    return total.hexdigest()
