"""Our sampler against transformers' generate, and our update against a plain torch step, on the same SmolLM2 weights.

    pip install -r tests/requirements.txt
    python -m benchmarks.smoke

Both sides get the same prompts, the same fixed lengths (no early end) and every core; compilation is left out.  Each
pair runs back to back, and the figure is the median of the pairs' ratios, so that a drift of the machine cancels.  Two
limits stand beside it, for the work that our program does (one prefill a group), from what this machine does in the
same run: `roof`, the larger of FLOPs / (best large matrix product) and weight bytes / (best read); `kernel`, the same
with the best product of as many rows as are decoded.  Takes some ten minutes on two cores and 8 GB.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from configs.smoke import get_config
from exprl_jax import programs
from exprl_jax.config import Config
from exprl_jax.data.packing import Example, fill_rows
from exprl_jax.hosts import put_microbatches, put_rows
from exprl_jax.mesh import make_mesh
from exprl_jax.records import Context, Draw, Experience, Rows
from exprl_jax.resolve import resolve
from exprl_jax.weights.folder import export_folder
from exprl_jax.weights.language_model import LanguageModel, load_params, open_model

GROUP = 8
PROMPT, RESPONSE = 64, 64
PAIRS = 3


def main() -> None:
    """Prints the two tables."""
    config = resolve(get_config())
    model = open_model(config.policy)
    # No token ends a row, so that every row has exactly RESPONSE tokens.
    model = dataclasses.replace(model, tokenizer=dataclasses.replace(model.tokenizer, eos_ids=(-1,)))
    mesh = make_mesh(config.mesh)
    params = load_params(model, mesh, config.seed)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = open_model(config.policy).tokenizer
        export_folder(params, model.arch, model.execution, f"{folder}/model", tokenizer, "float32")
        peer = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32)
    flops, bandwidth = limits()
    print(f"{jax.__version__=} {torch.__version__=} {transformers.__version__=} {torch.get_num_threads()} threads")
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

    print(f"\nupdate, 16 rows of {PROMPT} + {RESPONSE} tokens, groups of {GROUP}; response tokens/s, median of {PAIRS}")
    print(f"{'rows':>5} {'ours':>8} {'torch':>9} {'ratio':>7} {'roof':>7} {'kernel':>7} {'of kernel':>10}")
    ours, theirs = updating(config, model, mesh, params, peer)
    tokens = 2 * PROMPT + 16 * RESPONSE
    roof, kernel = (
        16 * RESPONSE / (6 * model.arch.parameters * tokens / rate)
        for rate in (flops, product_rate(tokens, model.arch.width, model.arch.ffn))
    )
    report(16, 16 * RESPONSE, ours, theirs, roof, kernel)


def report(rows: int, tokens: int, ours: list[float], theirs: list[float], roof: float, kernel: float) -> None:
    """One line of a table from seconds."""
    ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    mine, other = tokens / statistics.median(ours), tokens / statistics.median(theirs)
    print(
        f"{rows:>5} {mine:>8.1f} {other:>9.1f} {ratio:>6.2f}x {roof:>7.0f} {kernel:>7.0f} {mine / kernel:>10.0%}",
        flush=True,
    )


def pairs(ours: Callable[[], object], theirs: Callable[[], object]) -> tuple[list[float], list[float]]:
    """Seconds of both, in turn, after one run of each that does not count."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(PAIRS + 1):
        for run, into in zip((ours, theirs), seconds):
            start = time.perf_counter()
            run()
            if turn:
                into.append(time.perf_counter() - start)
    return seconds


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

    return pairs(ours, theirs)


def updating(config: Config, model: LanguageModel, mesh, params, peer):
    """Seconds of our train step and of the same loss in plain torch; the two first losses must agree."""
    problems = 2
    rollout = dataclasses.replace(config.rollout, prompts=problems, wave=problems, group=GROUP, max_tokens=RESPONSE)
    row_tokens = PROMPT - 1 + GROUP * RESPONSE  # a group's rollouts behind their prompt
    updates = dataclasses.replace(config.updates, row_tokens=row_tokens, microbatch=problems)
    config = dataclasses.replace(config, rollout=rollout, updates=updates)
    bound = programs.build(config, mesh, model)
    random = np.random.default_rng(1)
    prompt = random.integers(0, 49_000, (problems, PROMPT)).astype(np.int32)
    response = random.integers(0, 49_000, (problems, GROUP, RESPONSE)).astype(np.int32)
    shape = response.shape
    advantage = np.broadcast_to(random.normal(size=(problems, GROUP, 1)), shape).astype(np.float32)
    reference = (-11 + random.normal(size=shape)).astype(np.float32)
    group_N = np.repeat(np.arange(problems), GROUP)
    examples = [Example(prompt[p], response[p, g]) for p in range(problems) for g in range(GROUP)]
    filled = fill_rows(examples, group_N, group_N, (1, problems, row_tokens), share=True)
    ones = np.ones(shape, np.float32)
    mask, weight, advantage_BT, reference_BT = (
        filled.spread(x.reshape(-1, RESPONSE), x.dtype) for x in (ones > 0, ones / ones.size, advantage, reference)
    )
    nothing = np.zeros_like(weight)
    experience = put_microbatches(
        mesh, Experience(filled.packed, mask, weight, advantage_BT, nothing, nothing, reference_BT, filled.used)
    )
    holder, losses = [bound.init_state(params)], []

    def ours():
        holder[0], metrics = bound.train_step(holder[0], (), experience)
        losses.append(float(metrics["loss/total"]))
        jax.block_until_ready(holder[0])

    tokens = torch.from_numpy(
        np.concatenate([np.repeat(prompt, GROUP, axis=0), response.reshape(-1, RESPONSE)], 1)
    ).long()
    A, ref = torch.from_numpy(advantage.reshape(-1, RESPONSE)), torch.from_numpy(reference.reshape(-1, RESPONSE))
    how, loss = config.optimizer, config.loss
    adam = torch.optim.AdamW(
        peer.parameters(), lr=how.learning_rate, betas=(how.b1, how.b2), eps=how.eps, weight_decay=how.weight_decay
    )
    peer.train()
    torch_losses = []

    def theirs():
        adam.zero_grad(set_to_none=True)
        logits = peer(tokens, logits_to_keep=RESPONSE + 1, use_cache=False).logits[:, :-1] / config.rollout.temperature
        logp = torch.log_softmax(logits, -1).gather(-1, tokens[:, PROMPT:, None])[..., 0]
        ratio = torch.exp((logp - logp.detach()).clamp(-20, 20))
        clipped = ratio.clamp(1 - loss.clip_low, 1 + loss.clip_high)
        policy = torch.maximum(-A * ratio, -A * clipped)
        policy = torch.where(A < 0, torch.minimum(policy, -A * loss.dual_clip), policy)
        d = (ref - logp).clamp(-20, 20)
        kl = (torch.exp(d) - d - 1).clamp(-10, 10)
        total = (policy + loss.kl_coef * kl).mean()
        total.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), how.clip_norm)
        adam.step()
        torch_losses.append(float(total.detach()))

    seconds = pairs(ours, theirs)
    np.testing.assert_allclose(losses[0], torch_losses[0], rtol=1e-4)
    return seconds


def sampling_seconds(model: LanguageModel, problems: int, flops: float, decoding: float, bandwidth: float) -> float:
    """The least time for one prefill a group and RESPONSE decode steps."""
    per_token, size = 2 * model.arch.parameters, 4 * model.arch.parameters
    prefill = max(per_token * problems * PROMPT / flops, size / bandwidth)
    return prefill + RESPONSE * max(per_token * problems * GROUP / decoding, size / bandwidth)


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


if __name__ == "__main__":
    main()
