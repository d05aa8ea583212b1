"""Configs and data that come with the package, found from any working directory.

`configs/` lies beside `exprl_jax/`, in a clone and in `site-packages` alike.  A path that begins with `configs/` is a
file of the working directory if there is one, and the package's own otherwise: `--config=configs/tiny.py` works from
anywhere, and so do the problems that this config names as `configs/data/arithmetic.jsonl`.
"""

from __future__ import annotations

import glob
import os
import pathlib
from typing import Any

from absl import flags
from ml_collections import config_flags

_ROOT = pathlib.Path(__file__).resolve().parents[1]


def locate(path: str) -> str:
    """The path, or the package's where it is (or matches) a file under `configs/` that is not here."""
    ours = str(_ROOT / path)
    if pathlib.PurePath(path).parts[:1] != ("configs",) or _matches(path) or not _matches(ours):
        return path
    return ours


def _matches(path: str) -> bool:
    return os.path.exists(path) or bool(glob.glob(path, recursive=True))


class _Located(flags.ArgumentParser):
    """What a config flag parses its value with, given the package's file where there is none here."""

    def __init__(self, parser: flags.ArgumentParser):
        self._parser = parser

    def parse(self, path: str) -> Any:
        file, colon, arm = path.partition(":")
        return self._parser.parse(locate(file) + colon + arm)


def define_config(
    name: str, meaning: str, flag_values: flags.FlagValues = flags.FLAGS, **options: Any
) -> flags.FlagHolder:
    """`config_flags.DEFINE_config_file` for a flag that also takes the package's own configs."""
    holder = config_flags.DEFINE_config_file(name, None, meaning, flag_values=flag_values, **options)
    flag_values[name].parser = _Located(flag_values[name].parser)
    return holder
