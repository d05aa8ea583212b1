"""The exact judge, wrong about a part of the attempts: how good must a judge be?

Of an attempt that is misplaced the score is that of another number of leading right steps, each equally likely; which
ones are misplaced is decided by the text alone, so that a judge says the same of the same attempt.  For Outcome.

    python -m exprl_jax.main --config=configs/mini/stage1.py --workdir=runs/mini-noisy \\
        --config.judge.function=configs/mini/noise.py:misplaced_20
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from configs.mini.exact import score
from configs.mini.task import parse_statement

if TYPE_CHECKING:
    from exprl_jax.reward.attempt import Attempt


def misplaced_10(attempts: Sequence[Attempt]) -> list[float]:
    """One in ten is misplaced."""
    return misplaced(attempts, 0.1)


def misplaced_20(attempts: Sequence[Attempt]) -> list[float]:
    """One in five."""
    return misplaced(attempts, 0.2)


def misplaced_50(attempts: Sequence[Attempt]) -> list[float]:
    """Every other one."""
    return misplaced(attempts, 0.5)


def misplaced(attempts: Sequence[Attempt], share: float) -> list[float]:
    """Exact scores, but for that share of the attempts."""
    scores = score(attempts)
    for i, attempt in enumerate(attempts):
        key = hashlib.blake2b(f"{attempt.problem}\0{attempt.trace}".encode("utf-8", "replace"), digest_size=8).digest()
        rng = np.random.default_rng(int.from_bytes(key, "little"))
        if rng.random() < share:
            steps = len(parse_statement(attempt.problem).letters)
            others = [right / steps for right in range(steps + 1) if abs(right / steps - scores[i]) > 1e-9]
            scores[i] = float(rng.choice(others))
    return scores
