"""A language model of the config: its architecture, its tokenizer, and, when asked for, its parameters."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from exprl_jax.architecture import Architecture
from exprl_jax.config import Execution, Model
from exprl_jax.data.tokenizer import Tokenizer, load_tokenizer
from exprl_jax.files import read_json
from exprl_jax.mesh import Placement, laid_out
from exprl_jax.model.decoder import Params, Transformer
from exprl_jax.model.initial import fan_in_params
from exprl_jax.packaged import locate
from exprl_jax.run.checkpoint import MANIFEST, newest_step, restore_params
from exprl_jax.weights import folder as weights
from exprl_jax.weights.families import FAMILIES
from exprl_jax.weights.sources import ModelSource, resolve_model

# Architectures of `random:<family>`; the vocabulary is the byte tokenizer's.
RANDOM = "random:"
TINY = dict(
    width=64,
    ffn=128,
    layers=2,
    heads=4,
    kv_heads=2,
    head_size=16,
    rope_theta=10_000.0,
    rope_scaling=None,
    norm_eps=1e-6,
    tied=True,
    max_positions=4096,
)

# Published architectures, so that a dry run needs no network.  A real run reads the model's own config.json.
_QWEN3 = functools.partial(
    FAMILIES["qwen3"].architecture,
    "qwen3",
    vocab_size=151_936,
    kv_heads=8,
    head_size=128,
    rope_scaling=None,
    norm_eps=1e-6,
)
PUBLISHED = {
    "Qwen/Qwen3-4B-Instruct-2507": _QWEN3(
        width=2560, ffn=9728, layers=36, heads=32, rope_theta=5e6, tied=True, max_positions=262_144
    ),
    "Qwen/Qwen3-0.6B": _QWEN3(
        width=1024, ffn=3072, layers=28, heads=16, rope_theta=1e6, tied=True, max_positions=40_960
    ),
    "Qwen/Qwen3-8B": _QWEN3(
        width=4096, ffn=12_288, layers=36, heads=32, rope_theta=1e6, tied=False, max_positions=40_960
    ),
}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of one of our runs.

    Attributes:
      path: `checkpoints/N` of its workdir.
      saved: the execution and dtype of the parameters in it.
    """

    path: pathlib.Path
    saved: Model

    @property
    def description(self) -> ModelSource:
        """Where the run wrote down the model's architecture and tokenizer."""
        return ModelSource(str(self.path), self.path.parent.parent / "model")

    @property
    def files(self) -> list[pathlib.Path]:
        """The files that decide what the model is; the manifest has a sum of every other file of a checkpoint."""
        manifest = self.path / MANIFEST
        stored = [manifest] if manifest.is_file() else sorted(x for x in self.path.rglob("*") if x.is_file())
        return [*stored, *self.description.files]


@dataclasses.dataclass(frozen=True)
class Untrained:
    """A folder that says what a model is, for one with new parameters; weights that it may hold are not read."""

    description: ModelSource

    @property
    def files(self) -> list[pathlib.Path]:
        """The files that decide what the model is."""
        return [file for file in self.description.files if ".safetensors" not in file.name]


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A model that is known but not loaded.

    Attributes:
      config: where its weights come from and how it runs.
      source: its files; None for `random:<family>`.
    """

    config: Model
    arch: Architecture
    tokenizer: Tokenizer
    source: ModelSource | Checkpoint | Untrained | None

    @property
    def execution(self) -> Execution:
        return self.config.execution

    def on(self, mesh: Mesh) -> Transformer:
        """The model's forward on a mesh."""
        return Transformer(self.arch, self.execution, Placement(mesh))

    @property
    def parameter_bytes(self) -> int:
        """Of its parameters, in the dtype that they are held in."""
        return self.arch.parameters * jnp.dtype(self.config.param_dtype).itemsize


def open_model(config: Model, opened: LanguageModel | None = None) -> LanguageModel:
    """Finds the model's files (fetching them if need be) and reads architecture and tokenizer.

    Args:
      opened: a model that may have the same weights and date; its files are then not read again.  A tokenizer takes
        seconds.

    Raises:
      ValueError: nothing there, an unsupported architecture, or a tokenizer that does not fit.
    """
    if opened is not None and (opened.config.weights, opened.config.date) == (config.weights, config.date):
        return dataclasses.replace(opened, config=config)
    if config.weights.startswith(RANDOM):
        return _open_random(config, config.weights.removeprefix(RANDOM))
    if (checkpoint := find_checkpoint(config.weights)) is not None:
        return LanguageModel(config, *_read_description(checkpoint.description, config.date), checkpoint)
    source = resolve_model(config.weights)
    arch, tokenizer = _read_description(source, config.date)
    weights.check_tensors(source, arch)
    return LanguageModel(config, arch, tokenizer, source)


def _open_random(config: Model, name: str) -> LanguageModel:
    """A model with new parameters: of a family in a size for tests, or of a folder's sizes."""
    if name in FAMILIES:
        tokenizer = load_tokenizer("byte", config.date)
        arch = FAMILIES[name].architecture(name, vocab_size=tokenizer.vocab_size, **TINY)
        return LanguageModel(config, arch, tokenizer, None)
    folder = pathlib.Path(locate(name)).expanduser()
    if not name or not folder.is_dir():
        raise ValueError(
            f"model {config.weights!r}: expected one of {', '.join(RANDOM + known for known in FAMILIES)}, or "
            f"{RANDOM}<folder> with config.json and tokenizer in the folder"
        )
    description = resolve_model(str(folder))
    return LanguageModel(config, *_read_description(description, config.date), Untrained(description))


def _read_description(source: ModelSource, date: str) -> tuple[Architecture, Tokenizer]:
    arch, tokenizer = weights.read_architecture(source), load_tokenizer(source.path, date)
    weights.check_vocabulary(arch, tokenizer)
    # An embedding may have more rows than the tokenizer has ids; one of those sampled stands for no text.
    padding = (b"",) * (arch.vocab_size - tokenizer.vocab_size)
    return arch, dataclasses.replace(tokenizer, token_bytes=tokenizer.token_bytes + padding)


def pin_checkpoints(section: Any, recorded: Mapping[str, Any]) -> Any:
    """The config with every workdir that it names as a model replaced by one of its checkpoints: the one that
    `recorded` has there, for a run that goes on, else the newest.  A run must not change models midway.

    What cannot be opened is left as it is: only `open_model` knows whether the run has any use for it.

    Args:
      section: a config, or a part of one.
      recorded: the same part of the config of the run that is in the folder already; empty for a new run.
    """
    if isinstance(section, Model):
        return dataclasses.replace(section, weights=_pinned(section.weights, str(recorded.get("weights", ""))))
    changed = {}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        below = _part(recorded, field.name)
        if dataclasses.is_dataclass(value):
            changed[field.name] = pin_checkpoints(value, below)
        elif isinstance(value, dict):
            changed[field.name] = {name: pin_checkpoints(part, _part(below, name)) for name, part in value.items()}
    return dataclasses.replace(section, **changed)


def _part(recorded: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = recorded.get(name)
    return part if isinstance(part, Mapping) else {}


def _pinned(weights: str, before: str) -> str:
    """A model's name, or the checkpoint that it stands for; `before` is what stands there in the run's record."""
    path, workdir = _workdir_of(weights)
    if before == weights or (path == workdir and pathlib.Path(before).parent == workdir / "checkpoints"):
        return before
    try:
        recorded = _recorded_run(workdir)
    except ValueError:  # a damaged config: `open_model` says so if the run has any use for the model
        return weights
    if recorded is None:
        return weights
    if path != workdir:
        return str(path)
    step = newest_step(workdir / "checkpoints")
    return weights if step is None else str(workdir / "checkpoints" / str(step))


def _workdir_of(weights: str) -> tuple[pathlib.Path, pathlib.Path]:
    """What a model's name means as a path, and the folder that is a workdir if the name is of a run."""
    path = pathlib.Path(weights).expanduser().absolute()
    return path, path.parent.parent if path.parent.name == "checkpoints" else path


def _recorded_run(workdir: pathlib.Path) -> dict[str, Any] | None:
    """The config of the training run that a folder holds, if it holds one.

    Raises:
      ValueError: its config cannot be read.
    """
    if not (workdir / "checkpoints").is_dir() or not (workdir / "config.json").is_file():
        return None
    recorded = read_json(workdir / "config.json")
    trained = "judge" if recorded.get("task") == "judge" else "policy"
    return recorded if "task" in recorded and trained in recorded else None


def find_checkpoint(weights: str) -> Checkpoint | None:
    """The checkpoint that a workdir (its newest), or `<workdir>/checkpoints/<step>`, stands for; None for other models.

    Raises:
      ValueError: a workdir without a checkpoint, a step that it does not have, or the run of another version of this
        program.
    """
    path, workdir = _workdir_of(weights)
    recorded = _recorded_run(workdir)
    if recorded is None:
        return None
    if _part(recorded, "lora").get("rank"):
        raise ValueError(
            f"model {weights}: its run trained adapters, which stand on another model; name {workdir}/export"
        )
    if workdir == path:
        step = newest_step(workdir / "checkpoints")
        if step is None:
            raise ValueError(
                f"model {weights}: a workdir without a checkpoint; wait for its run's first, or name another"
            )
        path = workdir / "checkpoints" / str(step)
    elif not path.is_dir():
        raise ValueError(
            f"model {weights}: its workdir has no such checkpoint; its newest is {newest_step(path.parent)}"
        )
    try:
        model = recorded["judge"]["model"] if recorded["task"] == "judge" else recorded["policy"]
        saved = Model(**model | {"execution": Execution(**model["execution"])} | {"date": model.get("date", "")})
    except (TypeError, KeyError) as error:
        raise ValueError(
            f"model {weights}: {workdir}/config.json is of another version of this program ({error}); name "
            f"{workdir}/export, or restore the file"
        ) from error
    return Checkpoint(path, saved)


def load_params(model: LanguageModel, mesh: Mesh, seed: int) -> Params:
    """The model's parameters on the mesh; `random:` ones depend on the seed alone.  No device has more than its part
    at any time."""
    dtype, transformer = model.config.param_dtype, model.on(mesh)
    shardings = transformer.shard(transformer.abstract_params(dtype))
    if model.source is None:
        initialise = jax.jit(lambda: transformer.init_params(jax.random.key(seed), dtype), out_shardings=shardings)
        return initialise()
    if isinstance(model.source, Untrained):
        initialise = jax.jit(lambda: fan_in_params(transformer, jax.random.key(seed), dtype), out_shardings=shardings)
        return initialise()
    if isinstance(model.source, Checkpoint):
        return _load_checkpoint(model, model.source, shardings, mesh)
    return weights.load_params(model.source, model.arch, model.execution, dtype, shardings)


def _load_checkpoint(model: LanguageModel, checkpoint: Checkpoint, shardings: Any, mesh: Mesh) -> Params:
    """Restores what the run saved as it saved it; the model's own dtype and arrangement of layers are made of that."""
    start, execution, layers = checkpoint.saved, model.execution, model.arch.layers
    as_saved = Transformer(model.arch, start.execution, Placement(mesh))
    saved = as_saved.abstract_params(start.param_dtype)
    params = restore_params(checkpoint.path, laid_out(saved, as_saved.shard(saved)))
    if start.execution.scan_layers == execution.scan_layers and start.param_dtype == model.config.param_dtype:
        return params

    def rearrange(params):
        params = jax.tree.map(lambda x: x.astype(model.config.param_dtype), params)
        if start.execution.scan_layers and not execution.scan_layers:
            stacked = params.pop("layers")
            params |= {f"layer_{i}": jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(layers)}
        elif execution.scan_layers and not start.execution.scan_layers:
            params["layers"] = jax.tree.map(lambda *x: jnp.stack(x), *[params.pop(f"layer_{i}") for i in range(layers)])
        return params

    return jax.jit(rearrange, out_shardings=shardings)(params)
