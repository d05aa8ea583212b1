"""Rollouts of very different lengths: rows that take turns in decode slots, against waves that wait for their longest
row, and against transformers' generate and its continuous batching.

    pip install -r tests/requirements.txt
    python -m benchmarks.rollouts --output=runs/rollouts.md

SmolLM2-135M in float32, prompts of 64 tokens, groups of 8; some minutes on two cores.  Lengths are forced by a
schedule, lognormal, the longest at least three times the mean: ours by each row's budget, generate's by a processor
that allows the end of text there and nowhere else, continuous batching's by each request's budget.  All decode so many
rows at a time: slots and continuous batching refill, the others go in waves of whole groups.  A tokens/s counts the
tokens of responses alone; prefills are in the time, compilation is not.  Slots and waves run in turn, the peers once
between them, and a ratio is the median over the turns.  `host` is the part of the time in which our program prepares
and fetches.  The limit beside them is the time of as many tokens in full slots at this machine's best product of so
many rows, or its best read.  `--output` also writes the same as JSON beside the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import torch
import transformers

from benchmarks.common import limits, processor, product_rate
from configs.smoke import get_config
from exprl_jax import programs
from exprl_jax.hosts import fetch_rows, put_rows
from exprl_jax.mesh import make_mesh
from exprl_jax.records import Context, Draw, Rows, Usage
from exprl_jax.resolve import resolve
from exprl_jax.weights.folder import export_folder
from exprl_jax.weights.language_model import LanguageModel, load_params, open_model

GROUP, PROMPT, SPREAD, SEED, TEMPERATURE = 8, 64, 0.6, 2, 0.8
# Tokens of a page of the continuous batching.
_PAGE = 32


def main() -> None:
    """Prints the table, and writes it where it is asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=12, help="groups of 8 rows")
    parser.add_argument("--slots", type=int, default=16, help="rows decoded at a time, a multiple of 8")
    parser.add_argument("--mean", type=int, default=16, help="mean length of a response")
    parser.add_argument("--turns", type=int, default=2, help="of slots and waves")
    parser.add_argument("--model", default="", help="other weights, for a trial")
    parser.add_argument("--output", default="", help="where to write the table; its JSON lies beside it")
    asked = parser.parse_args()
    config = resolve(get_config())
    if asked.model:
        config = dataclasses.replace(config, policy=dataclasses.replace(config.policy, weights=asked.model))
    model = open_model(config.policy)
    tokenizer = model.tokenizer
    # No token ends a row: its budget does.
    model = dataclasses.replace(model, tokenizer=dataclasses.replace(tokenizer, eos_ids=(-1,)))
    mesh = make_mesh(config.mesh)
    params = load_params(model, mesh, config.seed)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        export_folder(params, model.arch, model.execution, f"{folder}/model", tokenizer, "float32")
        peer = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32)

    length_PG = long_tailed(asked.problems, asked.mean)
    tokens_PT = np.random.default_rng(SEED + 1).integers(0, tokenizer.vocab_size, (asked.problems, PROMPT), np.int32)
    wave = asked.slots // GROUP
    slots = Ours(model, mesh, params, tokens_PT, length_PG, asked.problems, asked.slots)
    waves = Ours(model, mesh, params, tokens_PT, length_PG, wave, 0)
    peers = {
        "generate": lambda: generate(peer, tokens_PT, length_PG, wave),
        "generate_batch": lambda: generate_batch(peer, tokens_PT, length_PG, asked.slots),
    }
    seconds: dict[str, list[float]] = {"slots": [], "waves": []} | {name: [] for name in peers}
    slots.compile()
    waves.compile()

    def note(name: str, run: Callable[[], None]) -> None:
        start = time.perf_counter()
        run()
        seconds[name].append(time.perf_counter() - start)
        print(f"{name} {seconds[name][-1]:.1f} s", flush=True)

    for turn in range(asked.turns):
        note("slots", slots)
        note("waves", waves)
        if turn == 0:
            for name, run in peers.items():
                note(name, run)
    flops, bandwidth = limits()
    rate = product_rate(asked.slots, model.arch.width, model.arch.ffn)
    report = {
        "machine": processor(),
        "threads": torch.get_num_threads(),
        "versions": {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "model": config.policy.weights,
        "seed": SEED,
        "rows": int(length_PG.size),
        "rows at a time": asked.slots,
        "tokens": int(length_PG.sum()),
        "mean": float(length_PG.mean()),
        "longest": int(length_PG.max()),
        "busy": {"slots": slots.busy, "waves": waves.busy},
        "host": {"slots": slots.host, "waves": waves.host},
        "seconds": seconds,
        "limit": least_seconds(model, length_PG, asked.slots, flops, rate, bandwidth),
    }
    print(table := as_table(report))
    if asked.output:
        path = pathlib.Path(asked.output)
        path.write_text(table, encoding="utf-8")
        path.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def long_tailed(problems: int, mean: int) -> np.ndarray:
    """Lengths [P, G], lognormal, of about this mean.

    Raises:
      ValueError: too few rows for a tail.
    """
    drawn = np.random.default_rng(SEED).lognormal(0.0, SPREAD, (problems, GROUP))
    length_PG = np.maximum(np.rint(drawn * mean / drawn.mean()), 1).astype(np.int32)
    if length_PG.max() < 3 * length_PG.mean():
        raise ValueError(f"the longest of {length_PG.size} rows is {length_PG.max()}: ask for more --problems")
    return length_PG


class Ours:
    """Our sampler on all problems, so many of them at a time.

    Attributes:
      busy: of the tokens fed to slots, the part that was a row's, in the last run.
      host: of the last run's time, the part outside the device's programs.
    """

    def __init__(
        self,
        model: LanguageModel,
        mesh: Any,
        params: Any,
        tokens_PT: np.ndarray,
        length_PG: np.ndarray,
        wave: int,
        slots: int,
    ):
        """Args:
        wave: problems at a time.
        slots: as of `build_sampler`.
        """
        self._params, self._mesh, self._wave, self._length_PG = params, mesh, wave, length_PG
        longest = int(length_PG.max())
        self._bound = programs.build_sampler(model, mesh, max_tokens=longest, wave=wave, slots=slots)
        self._given = []
        for first in range(0, len(tokens_PT), wave):
            part = slice(first, first + wave)
            last = np.repeat(tokens_PT[part, None, -1:], GROUP, axis=1)
            context = Context(tokens_PT[part, :-1], np.full(wave, PROMPT - 1, np.int32))
            identity, temperature = np.arange(first, first + wave, dtype=np.uint32), np.full((wave, GROUP), TEMPERATURE)
            draw = Draw(np.uint32(SEED), np.int32(0), identity, temperature.astype(np.float32), length_PG[part])
            self._given.append((context, Rows(last, np.zeros((wave, GROUP), np.int32)), draw))
        self.busy, self.host = 0.0, 0.0

    def compile(self) -> None:
        """Compiles, and samples a token of each row."""
        context, rows, draw = self._given[0]
        self._call((context, rows, draw.replace(budget_PG=np.ones_like(draw.budget_PG))))

    def _call(self, given: Any) -> tuple[np.ndarray, Usage, float]:
        """Lengths, usage, and seconds on the device."""
        context, rows, draw = put_rows(self._mesh, given, self._wave)
        start = time.perf_counter()
        prefix = self._bound.prefill(self._params, context)
        rollouts, usage = jax.block_until_ready(self._bound.sample(self._params, prefix, rows, draw))
        seconds = time.perf_counter() - start
        return fetch_rows(rollouts).mask_PGR.sum(-1), jax.device_get(usage), seconds

    def __call__(self) -> None:
        """All rows, of the lengths that they are to have."""
        start = time.perf_counter()
        length, usage, seconds = zip(*map(self._call, self._given))
        self.host = 1 - sum(seconds) / (time.perf_counter() - start)
        fed = sum(int(call.steps) * int(call.slots) for call in usage)
        self.busy = sum(int(call.busy) for call in usage) / fed
        np.testing.assert_array_equal(np.concatenate(length), self._length_PG)


class Schedule(transformers.LogitsProcessor):
    """The end of text after each row's tokens, and never before."""

    def __init__(self, length_B: np.ndarray, eos: int):
        self._length_B, self._eos = torch.from_numpy(length_B.astype(np.int64)), eos

    def __call__(self, tokens_BT: torch.LongTensor, score_BV: torch.FloatTensor) -> torch.FloatTensor:
        """Its length counts the end itself."""
        ends = tokens_BT.shape[1] - PROMPT + 1 >= self._length_B
        score_BV = score_BV.clone()
        score_BV[:, self._eos] = -torch.inf
        score_BV[ends] = -torch.inf
        score_BV[ends, self._eos] = 0.0
        return score_BV


@torch.no_grad()
def generate(peer: Any, tokens_PT: np.ndarray, length_PG: np.ndarray, wave: int) -> None:
    """transformers' generate on the same rows, `wave` groups at a time."""
    eos = 0  # any token may be it: the schedule forbids it before the end
    for first in range(0, len(tokens_PT), wave):
        part = slice(first, first + wave)
        inputs = torch.from_numpy(np.repeat(tokens_PT[part], GROUP, axis=0).astype(np.int64))
        out = peer.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=0,
            top_p=1.0,
            max_new_tokens=int(length_PG[part].max()),
            eos_token_id=eos,
            pad_token_id=eos,
            logits_processor=transformers.LogitsProcessorList([Schedule(length_PG[part].ravel(), eos)]),
        )
        assert out.shape[1] == PROMPT + length_PG[part].max()


def generate_batch(peer: Any, tokens_PT: np.ndarray, length_PG: np.ndarray, slots: int) -> None:
    """The same rows by transformers' continuous batching, so many at a time."""
    sampling = transformers.GenerationConfig(
        do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=1.0, eos_token_id=-1, pad_token_id=0
    )
    # Pages for the prompts and the longest responses of as many rows; no more requests than that in a batch.
    room = slots * (PROMPT + int(length_PG.max()))
    batching = transformers.ContinuousBatchingConfig(
        page_size=_PAGE, num_blocks=-(-room // _PAGE) + slots, max_batch_tokens=4 * PROMPT, max_requests_per_batch=slots
    )
    done: dict[str, int] = {}
    with peer.continuous_batching_context_manager(
        generation_config=sampling, continuous_batching_config=batching, timeout=5
    ) as manager:
        for p, g in np.ndindex(length_PG.shape):
            manager.add_request(tokens_PT[p].tolist(), f"{p} {g}", max_new_tokens=int(length_PG[p, g]), eos_token_id=-1)
        while len(done) < length_PG.size:
            if not manager.is_running():
                raise RuntimeError("transformers' continuous batching stopped before all requests had ended")
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                done[result.request_id] = len(result.generated_tokens)
    lengths = [done[f"{p} {g}"] for p, g in np.ndindex(length_PG.shape)]
    np.testing.assert_array_equal(np.reshape(lengths, length_PG.shape), length_PG)


def least_seconds(
    model: LanguageModel, length_PG: np.ndarray, slots: int, flops: float, rate: float, bandwidth: float
) -> float:
    """Of one prefill a group, and of all tokens in full slots."""
    per_token, size = 2 * model.arch.parameters, 4 * model.arch.parameters
    prefill = max(per_token * len(length_PG) * PROMPT / flops, size / bandwidth)
    return prefill + length_PG.sum() / slots * max(per_token * slots / rate, size / bandwidth)


def as_table(report: Mapping[str, Any]) -> str:
    """Tokens/s of each, and how many times as fast the slots are."""
    seconds, tokens = report["seconds"], report["tokens"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        f"{report['machine']}, {report['threads']} threads; {versions}; {report['model']}, seed {report['seed']}.",
        f"{report['rows']} rows, {report['rows at a time']} at a time, {tokens} tokens, mean {report['mean']:.0f}, "
        f"longest {report['longest']}; medians of {len(seconds['slots'])} turns.",
        "",
        "| sampling | tokens/s | slots busy | host | slots are faster | of the limit |",
        "|---|---|---|---|---|---|",
    ]
    for name, of_name in seconds.items():
        shares = [f"{report[key][name]:.1%}" if name in report[key] else "" for key in ("busy", "host")]
        ratio = statistics.median(b / a for a, b in zip(seconds["slots"], of_name))
        took = statistics.median(of_name)
        limit = report["limit"] / took
        lines.append(f"| {name} | {tokens / took:.1f} | {' | '.join(shares)} | {ratio:.2f} × | {limit:.0%} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
