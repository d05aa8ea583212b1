"""One GRPO update against a plain torch step of the same loss, on the same SmolLM2 weights in float32.

    pip install -r tests/requirements.txt
    python -m benchmarks.train_step --output=runs/train_step.json

Two shapes: `smoke`, 2 groups of 8 with prompts and responses of 64 tokens, one microbatch on either side; and `users`,
6 groups of 8 with prompts of 200 and responses of 37, a group a microbatch on either side.  Rollouts of a group share
their prompt in our packed rows; torch computes it for each.  Both first losses must agree.  Compilation is left out;
the two run in turn, and the ratio is the median of the pairs'.  `limit` is what a step would take if it did nothing but
its products, each at this machine's rate of products of as many rows; attention's are not counted.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from typing import Any, NamedTuple

import jax
import numpy as np
import torch

from benchmarks import common
from exprl_jax import programs
from exprl_jax.data.packing import Example, fill_rows
from exprl_jax.hosts import put_microbatches
from exprl_jax.records import Experience


class Shape(NamedTuple):
    """Of an update: groups, rollouts a group, tokens; groups a microbatch, and the width of a packed row."""

    groups: int
    group: int
    prompt: int
    response: int
    at_once: int
    row_tokens: int

    @property
    def responses(self) -> int:
        """Tokens of all."""
        return self.groups * self.group * self.response


SHAPES = {"smoke": Shape(2, 8, 64, 64, 2, 575), "users": Shape(6, 8, 200, 37, 1, 640)}


def main() -> None:
    """Prints the table, and writes the JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", help="a JSON file for the figures")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="some of these, with commas between")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--weights", default="", help="another model than that of configs/smoke.py")
    asked = parser.parse_args()
    sides, machine = common.open_sides(asked.weights), common.about()
    machine |= {"model": sides.config.policy.weights, "pairs": asked.pairs}
    print("\n".join(f"{key} {value}" for key, value in machine.items()))
    print("\n| update | ours, tokens/s | torch | ratio | limit | of limit | torch of its own | GFLOP/s of products |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for name in asked.shapes.split(","):
        rows.append(row := {"shape": name} | measure(sides, SHAPES[name], asked.pairs))
        print(
            f"| {name} | {row['ours']:.1f} | {row['torch']:.1f} | {row['ratio']:.2f}× | {row['limit']:.1f} | "
            f"{row['of_limit']:.0%} | {row['torch_of_limit']:.0%} | {row['products_per_second'] / 1e9:.0f} |",
            flush=True,
        )
    common.write_json(asked.output, machine, rows)


def measure(sides: common.Sides, shape: Shape, count: int) -> dict[str, Any]:
    """Response tokens a second of both, and of the limit."""
    ours, theirs = updating(sides, shape, count)
    arch, rows = sides.model.arch, shape.groups * shape.group
    tokens = shape.groups * (shape.prompt - 1) + shape.responses  # of packed rows, without padding
    repeated = rows * (shape.prompt + shape.response)
    rate = common.product_rate(tokens // shape.groups * shape.at_once, arch.width, arch.ffn)
    seconds, torch_seconds = (work(arch, n, shape.responses) / rate for n in (tokens, repeated))
    mine, other = statistics.median(ours), statistics.median(theirs)
    return {
        "ours": shape.responses / mine,
        "torch": shape.responses / other,
        "ratio": statistics.median(b / a for a, b in zip(ours, theirs, strict=True)),
        "limit": shape.responses / seconds,
        "of_limit": seconds / mine,
        "torch_of_limit": torch_seconds / other,
        "products_per_second": rate,
        "seconds": ours,
        "torch_seconds": theirs,
    }


def work(arch: Any, tokens: int, responses: int) -> float:
    """Operations of an update's products with weights: of the layers for all tokens, of the head for responses."""
    head = arch.width * arch.vocab_size
    layers = arch.parameters - head * (1 if arch.tied else 2)
    return 6 * (layers * tokens + head * responses)


def updating(sides: common.Sides, shape: Shape, count: int) -> tuple[list[float], list[float]]:
    """Seconds of our train step and of the same loss in plain torch; the two first losses must agree."""
    config, model, mesh, params, peer = sides
    P, G, PROMPT, RESPONSE, at_once, row_tokens = shape
    rollout = dataclasses.replace(config.rollout, prompts=P, wave=P, group=G, max_tokens=RESPONSE)
    updates = dataclasses.replace(config.updates, row_tokens=row_tokens, microbatch=at_once)
    config = dataclasses.replace(config, rollout=rollout, updates=updates)
    bound = programs.build(config, mesh, model)
    random, ids = np.random.default_rng(common.SEED), min(49_000, model.arch.vocab_size)
    prompt = random.integers(0, ids, (P, PROMPT)).astype(np.int32)
    response = random.integers(0, ids, (P, G, RESPONSE)).astype(np.int32)
    advantage = np.broadcast_to(random.normal(size=(P, G, 1)), response.shape).astype(np.float32)
    reference = (-11 + random.normal(size=response.shape)).astype(np.float32)
    group_N = np.repeat(np.arange(P), G)
    examples = [Example(prompt[p], response[p, g]) for p in range(P) for g in range(G)]
    filled = fill_rows(examples, group_N, group_N, (P // at_once, at_once, row_tokens), share=True)
    ones = np.ones(response.shape, np.float32)
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

    tokens = torch.from_numpy(np.concatenate([np.repeat(prompt, G, axis=0), response.reshape(-1, RESPONSE)], 1)).long()
    A, ref = torch.from_numpy(advantage.reshape(-1, RESPONSE)), torch.from_numpy(reference.reshape(-1, RESPONSE))
    how, loss = config.optimizer, config.loss
    adam = torch.optim.AdamW(
        peer.parameters(), lr=how.learning_rate, betas=(how.b1, how.b2), eps=how.eps, weight_decay=how.weight_decay
    )
    peer.train()
    torch_losses = []

    def theirs():
        adam.zero_grad(set_to_none=True)
        parts = zip(*(x.split(at_once * G) for x in (tokens, A, ref)), strict=True)
        torch_losses.append(sum(learn(*part) for part in parts))
        torch.nn.utils.clip_grad_norm_(peer.parameters(), how.clip_norm)
        adam.step()

    def learn(tokens, A, ref):
        """A microbatch's part of the loss, its gradient added to what there is."""
        logits = peer(tokens, logits_to_keep=RESPONSE + 1, use_cache=False).logits[:, :-1] / config.rollout.temperature
        logp = torch.log_softmax(logits, -1).gather(-1, tokens[:, PROMPT:, None])[..., 0]
        ratio = torch.exp((logp - logp.detach()).clamp(-20, 20))
        clipped = ratio.clamp(1 - loss.clip_low, 1 + loss.clip_high)
        policy = torch.maximum(-A * ratio, -A * clipped)
        policy = torch.where(A < 0, torch.minimum(policy, -A * loss.dual_clip), policy)
        d = (ref - logp).clamp(-20, 20)
        kl = (torch.exp(d) - d - 1).clamp(-10, 10)
        total = (policy + loss.kl_coef * kl).sum() / shape.responses
        total.backward()
        return float(total.detach())

    seconds = common.pairs(ours, theirs, count)
    np.testing.assert_allclose(losses[0], torch_losses[0], rtol=1e-4)
    return seconds


if __name__ == "__main__":
    main()
