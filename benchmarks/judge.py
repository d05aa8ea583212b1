"""Scoring the prefixes of a trace in one row against a pass for each, for a judge on the mesh that reads digits.

    python -m benchmarks.judge --output=runs/judge.json

SmolLM2-135M in float32 (the weights of configs/smoke.py), one rollout, cut into T equal prefixes; some four minutes on
two cores.  Both sides are `Judge.score` itself, prefill and host included; compilation is left out.
Each pair runs back to back, and a figure is the median of the pairs' ratios, so that a drift of the machine cancels.
The scores of the two sides are compared besides.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import statistics
import sys
import time
from typing import Any

import jax
import numpy as np

from benchmarks.common import SEED, processor, write_json
from configs import smoke
from exprl_jax.data.problems import Problem
from exprl_jax.mesh import make_mesh
from exprl_jax.programs import build_judge
from exprl_jax.resolve import resolve
from exprl_jax.reward.judge import Judge, JudgePrompts, score_prompt
from exprl_jax.reward.judgements import Query
from exprl_jax.rollout.call import padded_width
from exprl_jax.weights.language_model import load_params, open_model

COUNTS = 1, 4, 8, 16


def main() -> None:
    """Prints the table, and writes the JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", help="a JSON file for the figures")
    parser.add_argument("--trace", type=int, default=512, help="tokens of the rollout")
    parser.add_argument("--pairs", type=int, default=2, help="measurements of both sides")
    parser.add_argument("--weights", default="", help="another model than that of configs/smoke.py")
    asked = parser.parse_args()
    judge, tokens = open_judge(asked.weights, asked.trace)
    rows = []
    for count in COUNTS:
        rows.append(measure(judge, tokens, count, asked.pairs))
        print(f"{count} prefixes: {rows[-1]}", file=sys.stderr, flush=True)
    whole = rows[0]["packed_seconds"]
    for row in rows:
        row["packed_over_one_score"] = row["packed_seconds"] / whole
    about = {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "jax": jax.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "model": judge.config.model.weights,
        "seed": SEED,
        "trace_tokens": asked.trace,
        "pairs": asked.pairs,
    }
    print("\n".join(f"{key} {value}" for key, value in about.items()))
    print("\n| T | separate passes, s | one row, s | separate / one row | one row / one score | largest difference |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['prefixes']} | {row['separate_seconds']:.2f} | {row['packed_seconds']:.2f} | {row['ratio']:.2f} | "
            f"{row['packed_over_one_score']:.2f} | {row['difference']:.1e} |"
        )
    write_json(asked.output, about, rows)


def open_judge(weights: str, trace: int) -> tuple[Judge, list[int]]:
    """The judge, and the ids of a rollout of so many tokens."""
    settings = smoke.get_config("process").copy_and_resolve_references().unlock()
    if weights:
        settings.judge.model.weights = weights
    settings.judge.update(max_trace_tokens=trace, max_context_tokens=1024)
    config = resolve(settings).judge
    mesh, model = make_mesh(resolve(settings).mesh), open_model(config.model)
    problem = Problem("p", "What is 12 + 30 + 7?", "12 + 30 = 42, and 42 + 7 = 49.", "49", "math")
    prompt = score_prompt(config, model.tokenizer, problem, "prefix")
    judge = Judge(
        config=config,
        tokenizer=model.tokenizer,
        params=load_params(model, mesh, SEED),
        programs=build_judge(config, mesh, model),
        mesh=mesh,
        prompts=JudgePrompts({"p": prompt}, {}),
        context_width=padded_width(len(prompt.head)),
        row_width=padded_width(trace + len(prompt.suffix)),
        problems=1,
        group=1,
    )
    random = np.random.default_rng(SEED)
    words = "so we add the two numbers and get a sum which is then carried over to the next step of it".split()
    return judge, list(prompt.encode(" " + " ".join(random.choice(words, 8 * trace))))[:trace]


def measure(judge: Judge, tokens: list[int], count: int, pairs: int) -> dict[str, Any]:
    """Seconds of both sides for so many prefixes of the rollout, and how far their scores are apart."""
    problem = Problem("p", "", None, "", "math")
    ends = [len(tokens) * (n + 1) // count for n in range(count)]
    # A little short, for a text may come back as some more tokens than it was cut from.
    queries = [Query(0, n, judge.tokenizer.decode(tokens[: max(1, end - 8)])) for n, end in enumerate(ends)]
    apart = dataclasses.replace(judge, programs=dataclasses.replace(judge.programs, branches=None))
    sides = {"separate": apart, "packed": judge}
    # Compiles; separate passes have one program, whatever their number.
    apart.score([problem], [queries[:1]], count)
    judge.score([problem], [queries], count)
    scores: dict[str, Any] = {}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(pairs):
        for name, side in sides.items():
            start = time.perf_counter()
            scores[name] = side.score([problem], [queries], count)
            seconds[name].append(time.perf_counter() - start)
    assert scores["packed"].valid_PGN.all() and scores["separate"].valid_PGN.all()
    difference = np.abs(scores["packed"].score_PGN - scores["separate"].score_PGN).max()
    return {
        "prefixes": count,
        "separate_seconds": statistics.median(seconds["separate"]),
        "packed_seconds": statistics.median(seconds["packed"]),
        "ratio": statistics.median(a / b for a, b in zip(seconds["separate"], seconds["packed"])),
        "difference": float(difference),
    }


if __name__ == "__main__":
    main()
