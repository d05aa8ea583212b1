"""What benchmarks share: the model on both sides, runs in turn, this machine's limits, and what it is."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from jax.sharding import Mesh

from configs.smoke import get_config
from exprl_jax.config import Config
from exprl_jax.mesh import make_mesh
from exprl_jax.resolve import resolve
from exprl_jax.weights.folder import export_folder
from exprl_jax.weights.language_model import LanguageModel, load_params, open_model

SEED = 1


class Sides(NamedTuple):
    """The same weights in float32 on both sides: the policy of configs/smoke.py, and transformers' own model."""

    config: Config
    model: LanguageModel
    mesh: Mesh
    params: Any
    peer: torch.nn.Module


def open_sides(weights: str = "") -> Sides:
    """Args: `weights`, others than those of configs/smoke.py."""
    settings = get_config().copy_and_resolve_references().unlock()
    if weights:
        settings.policy.weights = weights
    config = resolve(settings)
    model = open_model(config.policy)
    mesh = make_mesh(config.mesh)
    params = load_params(model, mesh, config.seed)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        export_folder(params, model.arch, model.execution, f"{folder}/model", model.tokenizer, "float32")
        peer = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32)
    return Sides(config, model, mesh, params, peer)


def unending(sides: Sides) -> Sides:
    """No token ends a row, so that every row has exactly as many tokens as it may."""
    tokenizer = dataclasses.replace(sides.model.tokenizer, eos_ids=(-1,))
    return sides._replace(model=dataclasses.replace(sides.model, tokenizer=tokenizer))


def about() -> dict[str, Any]:
    """The machine and what ran on it."""
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "jax": jax.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "seed": SEED,
    }


def processor() -> str:
    """The processor's name, as Linux gives it, with family and model; the machine's architecture elsewhere."""
    path = pathlib.Path("/proc/cpuinfo")
    found: dict[str, str] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    if "model name" not in found:
        return platform.machine()
    return f"{found['model name']} (family {found['cpu family']}, model {found['model']})"


def write_json(path: str | None, machine: Mapping[str, Any], rows: Any) -> None:
    """Where a path is given."""
    if path:
        text = json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n"
        pathlib.Path(path).write_text(text, encoding="utf-8")


def pairs(ours: Callable[[], object], theirs: Callable[[], object], count: int) -> tuple[list[float], list[float]]:
    """Seconds of both, in turn, so many times after one run of each that does not count."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(count + 1):
        for run, into in zip((ours, theirs), seconds):
            start = time.perf_counter()
            run()
            if turn:
                into.append(time.perf_counter() - start)
    return seconds


def product_rate(rows: int, width: int, ffn: int) -> float:
    """FLOP/s of [rows, width] x [width, ffn] products over weights too many to stay in a cache, the best of either."""
    x, kernels = jnp.ones((rows, width)), [jnp.full((width, ffn), float(i)) for i in range(64)]
    t, others = torch.ones(rows, width), [torch.full((width, ffn), float(i)) for i in range(64)]
    products = jax.jit(lambda x, kernels: [x @ kernel for kernel in kernels])
    seconds = min(
        best(lambda: jax.block_until_ready(products(x, kernels))), best(lambda: [t @ other for other in others])
    )
    return 64 * 2 * rows * width * ffn / seconds


def limits() -> tuple[float, float]:
    """(FLOP/s of a large float32 matrix product, bytes/s read by a large sum), the best of either library."""
    n = 2048
    a, t = jnp.ones((n, n)), torch.ones(n, n)
    product = jax.jit(lambda a: a @ a)
    flops = 2 * n**3 / min(best(lambda: product(a).block_until_ready()), best(lambda: t @ t))
    size = 1 << 27
    b, s = jnp.ones(size), torch.ones(size)
    total = jax.jit(jnp.sum)
    return flops, 4 * size / min(best(lambda: total(b).block_until_ready()), best(lambda: s.sum()))


def best(run: Callable[[], object]) -> float:
    """Shortest of ten, after one that does not count."""
    run()
    return min(_timed(run) for _ in range(10))


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
