"""Our sampler against transformers' generate, on the same SmolLM2 weights.

    pip install -r tests/requirements.txt
    python -m benchmarks.smoke

Both sides get the same prompts, the same fixed lengths (no early end) and every core; compilation is left out.  Each
pair runs back to back, and the figure is the median of the pairs' ratios, so that a drift of the machine cancels.  Two
limits stand beside it, for the work that our program does (one prefill a group), from what this machine does in the
same run: `roof`, the larger of FLOPs / (best large matrix product) and weight bytes / (best read); `kernel`, the same
with the best product of as many rows as are decoded.  Takes some five minutes on two cores and 8 GB; the update has a
benchmark of its own, `benchmarks.train_step`.
"""

from __future__ import annotations

import statistics

import jax
import numpy as np
import torch

from benchmarks import common
from benchmarks.common import limits, product_rate
from exprl_jax import programs
from exprl_jax.hosts import put_rows
from exprl_jax.records import Context, Draw, Rows
from exprl_jax.weights.language_model import LanguageModel

GROUP = 8
PROMPT, RESPONSE = 64, 64
PAIRS = 3


def main() -> None:
    """Prints the table."""
    sides = common.unending(common.open_sides())
    _, model, mesh, params, peer = sides
    flops, bandwidth = limits()
    print("\n".join(f"{key} {value}" for key, value in common.about().items()))
    print(f"best matrix product {flops / 1e9:.0f} GFLOP/s, best copy {bandwidth / 1e9:.1f} GB/s\n")

    print(f"sampling, {PROMPT} + {RESPONSE} tokens, groups of {GROUP}, temperature 0.8; tokens/s, median of {PAIRS}")
    print(f"{'rows':>5} {'ours':>8} {'generate':>9} {'ratio':>7} {'roof':>7} {'kernel':>7} {'of kernel':>10}")
    for problems in (1, 4, 8):
        ours, theirs = sampling(model, mesh, params, peer, problems)
        rows = problems * GROUP
        roof, kernel = (
            rows * RESPONSE / sampling_seconds(model, problems, flops, decoding, bandwidth)
            for decoding in (flops, product_rate(rows, model.arch.width, model.arch.ffn))
        )
        report(rows, rows * RESPONSE, ours, theirs, roof, kernel)


def report(rows: int, tokens: int, ours: list[float], theirs: list[float], roof: float, kernel: float) -> None:
    """One line of a table from seconds."""
    ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    mine, other = tokens / statistics.median(ours), tokens / statistics.median(theirs)
    print(
        f"{rows:>5} {mine:>8.1f} {other:>9.1f} {ratio:>6.2f}x {roof:>7.0f} {kernel:>7.0f} {mine / kernel:>10.0%}",
        flush=True,
    )


def sampling(model: LanguageModel, mesh, params, peer, problems: int):
    """Seconds of our prefill + sample and of transformers' generate."""
    bound = programs.build_sampler(model, mesh, max_tokens=RESPONSE, wave=problems)
    tokens_PT = np.random.default_rng(0).integers(0, 49_000, (problems, PROMPT))
    context = Context(tokens_PT[:, :-1].astype(np.int32), np.full(problems, PROMPT - 1, np.int32))
    last = np.repeat(tokens_PT[:, None, -1:], GROUP, axis=1).astype(np.int32)
    draw = Draw(
        np.uint32(0),
        np.int32(0),
        np.arange(problems, dtype=np.uint32),
        np.full((problems, GROUP), 0.8, np.float32),
        np.full((problems, GROUP), RESPONSE, np.int32),
    )
    rows = Rows(last, np.zeros((problems, GROUP), np.int32))
    context, rows, draw = put_rows(mesh, (context, rows, draw), problems)
    inputs = torch.from_numpy(np.repeat(tokens_PT, GROUP, axis=0))

    def ours():
        rollouts, _ = jax.block_until_ready(bound.sample(params, bound.prefill(params, context), rows, draw))
        assert bool(rollouts.mask_PGR.all())

    def theirs():
        with torch.no_grad():
            out = peer.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                do_sample=True,
                temperature=0.8,
                top_k=0,
                top_p=1.0,
                min_new_tokens=RESPONSE,
                max_new_tokens=RESPONSE,
                pad_token_id=0,
            )
        assert out.shape == (problems * GROUP, PROMPT + RESPONSE)

    return common.pairs(ours, theirs, PAIRS)


def sampling_seconds(model: LanguageModel, problems: int, flops: float, decoding: float, bandwidth: float) -> float:
    """The least time for one prefill a group and RESPONSE decode steps."""
    per_token, size = 2 * model.arch.parameters, 4 * model.arch.parameters
    prefill = max(per_token * problems * PROMPT / flops, size / bandwidth)
    return prefill + RESPONSE * max(per_token * problems * GROUP / decoding, size / bandwidth)


if __name__ == "__main__":
    main()
