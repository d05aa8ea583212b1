"""Decoding against the memory bandwidth, and the update against the arithmetic, of one GPU, with random weights.

    pip install -r requirements-gpu.txt
    python -m benchmarks.gpu --output=runs/gpu.md

Shapes of Qwen3-0.6B and Qwen3-4B in bfloat16.  Decoding: groups of 16 after prompts of 512 tokens; the bound is the
parameters once a step and the keys and values that the step's rows have by then, read at the best rate that the same
run copies memory with.  Update: packed rows of 2k, 8k and 16k tokens, full rematerialisation; MFU is 6 · parameters
FLOPs a token, plus attention's, over the best rate of a large bfloat16 product in the same run.  `--tiny` checks the
program in a minute on any machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from configs.base import base
from exprl_jax import programs
from exprl_jax.architecture import Architecture
from exprl_jax.config import Execution, Mesh, Model
from exprl_jax.data.packing import Example, fill_rows
from exprl_jax.data.tokenizer import load_tokenizer
from exprl_jax.hosts import put_microbatches, put_rows
from exprl_jax.mesh import make_mesh
from exprl_jax.records import Context, Draw, Experience, Rows
from exprl_jax.resolve import resolve
from exprl_jax.weights.families import FAMILIES
from exprl_jax.weights.language_model import PUBLISHED, TINY, LanguageModel, load_params

GROUP, PROMPT, RUNS = 16, 512, 3


def main() -> None:
    """Prints the tables, and writes them where asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", help="a Markdown file for the tables")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and short rows: does it run?")
    asked = parser.parse_args()
    if asked.tiny:
        shapes = {"tiny": FAMILIES["qwen3"].architecture("qwen3", vocab_size=512, **TINY)}
        problems, new, widths = (1,), 8, (1024,)
    else:
        shapes = {name: PUBLISHED[f"Qwen/{name}"] for name in ("Qwen3-0.6B", "Qwen3-4B-Instruct-2507")}
        problems, new, widths = (1, 4, 8), 512, (2048, 8192, 16_384)
    flops, bandwidth = limits(256 if asked.tiny else 8192)
    device = jax.devices()[0]
    lines = [
        f"{device.device_kind}, jax {jax.__version__}: best product {flops / 1e12:.1f} TFLOP/s, best copy "
        f"{bandwidth / 1e9:.0f} GB/s",
        "",
        "| decode | rows | tokens/s | bound | of bound |",
        "|---|---|---|---|---|",
    ]
    lines += [decoding(name, arch, count, new, bandwidth) for name, arch in shapes.items() for count in problems]
    lines += ["", "| update | row tokens | tokens/s | MFU |", "|---|---|---|---|"]
    lines += [updating(name, arch, width, flops) for name, arch in shapes.items() for width in widths]
    print("\n".join(lines))
    if asked.output:
        pathlib.Path(asked.output).write_text("\n".join(["# Measured on one GPU", "", *lines, ""]), encoding="utf-8")


def random_model(arch: Architecture) -> LanguageModel:
    """The shape with random bfloat16 weights; no token ends a row."""
    how = Model("random:qwen3", Execution(True, "bfloat16", "full", "compute"), "bfloat16", "2026-01-01")
    return LanguageModel(how, arch, dataclasses.replace(load_tokenizer("byte"), eos_ids=(-1,)), None)


def decoding(name: str, arch: Architecture, problems: int, new: int, bandwidth: float) -> str:
    """A line of the first table."""
    model, mesh = random_model(arch), make_mesh(Mesh(1, 1))
    params = load_params(model, mesh, 0)
    sampler = programs.build_sampler(model, mesh, max_tokens=new, wave=problems)
    random = np.random.default_rng(0)
    context = Context(
        random.integers(0, arch.vocab_size, (problems, PROMPT), np.int32), np.full(problems, PROMPT, np.int32)
    )
    rows = Rows(np.zeros((problems, GROUP, 1), np.int32), np.zeros((problems, GROUP), np.int32))
    draw = Draw(
        np.uint32(0),
        np.int32(0),
        np.arange(problems, dtype=np.uint32),
        np.full((problems, GROUP), 0.8, np.float32),
        np.full((problems, GROUP), new, np.int32),
    )
    context, rows, draw = put_rows(mesh, (context, rows, draw), problems)
    prefix = sampler.prefill(params, context)
    seconds = typical(lambda: sampler.sample(params, prefix, rows, draw))
    token = 2 * arch.layers * arch.kv_heads * arch.head_size * 2
    # A context is read once for its group; a row has half its tokens on average.
    least = new * (2 * arch.parameters + token * problems * (PROMPT + GROUP * new / 2)) / bandwidth
    count = problems * GROUP * new
    return f"| {name} | {problems * GROUP} | {count / seconds:,.0f} | {count / least:,.0f} | {least / seconds:.0%} |"


def updating(name: str, arch: Architecture, width: int, flops: float) -> str:
    """A line of the second table."""
    settings = base()
    settings.mesh.update(data=1, model=1)
    settings.rollout.update(prompts=2, group=2, wave=2, max_tokens=width // 2)
    settings.data.max_prompt_tokens = width // 2
    settings.updates.update(per_batch=1, row_tokens=width, microbatch=1, logp_chunk=min(width, 4096))
    config, model = resolve(settings), random_model(arch)
    config = dataclasses.replace(config, policy=model.config)
    mesh = make_mesh(config.mesh)
    bound = programs.build(config, mesh, model)
    random = np.random.default_rng(0)
    examples = [Example([1, 2], random.integers(0, arch.vocab_size, width - 1, np.int32)) for _ in range(4)]
    filled = fill_rows(examples, range(4), np.arange(4), (4, 1, width), share=False)
    mask = filled.spread([np.ones(width - 1, bool)] * 4, bool)
    normal = random.normal(size=mask.shape).astype(np.float32)
    experience = put_microbatches(
        mesh, Experience(filled.packed, mask, mask / mask.sum(dtype=np.float32), normal, *[normal * 0] * 3, filled.used)
    )
    holder = [bound.init_state(load_params(model, mesh, 0))]

    def update():
        holder[0], _ = bound.train_step(holder[0], (), experience)
        return holder[0]

    seconds, tokens = typical(update), 4 * width
    attention = 12 * arch.layers * arch.heads * arch.head_size * width / 2
    mfu = tokens * (6 * arch.parameters + attention) / seconds / flops
    return f"| {name} | {width} | {tokens / seconds:,.0f} | {mfu:.0%} |"


def limits(n: int) -> tuple[float, float]:
    """(FLOP/s of a large bfloat16 product, bytes/s read and written by a large copy)."""
    a = jnp.ones((n, n), jnp.bfloat16)
    product = jax.jit(lambda a: a @ a)
    b = jnp.ones(n * n * 4, jnp.bfloat16)
    copy = jax.jit(lambda b: b + 1)
    return 2 * n**3 / typical(lambda: product(a), 10), 4 * b.size / typical(lambda: copy(b), 10)


def typical(run: Callable[[], object], runs: int = RUNS) -> float:
    """Median seconds, after one run that does not count."""
    seconds = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


if __name__ == "__main__":
    main()
