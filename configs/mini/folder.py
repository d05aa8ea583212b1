"""The folders of small models that the repository holds: what a run exports, in bfloat16."""

from __future__ import annotations

import json
import pathlib
import shutil

import ml_dtypes
from safetensors.numpy import load_file, save_file

from exprl_jax.files import read_json


def keep(export: pathlib.Path, folder: pathlib.Path) -> None:
    """Copies an exported model, its weights rounded to bfloat16.

    Args:
      export: of a run, `<workdir>/export`.
      folder: what stands there is replaced.
    """
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(export, folder)
    for path in folder.glob("*.safetensors"):
        tensors = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    described = read_json(folder / "config.json") | {"torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
