"""Stage I in the miniature: from a policy that solves one puzzle in a thousand, in a few minutes on one CPU core.

    python -m exprl_jax.main --config=configs/mini/stage1.py --workdir=runs/mini
    python -m exprl_jax.main --config=configs/mini/stage1.py:sparse --workdir=runs/mini-sparse
    python -m exprl_jax.main --config=configs/mini/stage1.py:process --workdir=runs/mini-process

docs/mini.md says what the puzzles are and what came of each arm.
"""

from configs.base import process, sparse
from configs.mini.settings import shared

ARMS = {
    "outcome": lambda c: c,
    "process": lambda c: process(c, "delta_norm"),
    "end": lambda c: process(c, "end_norm"),
    "group": lambda c: process(c, "group_norm"),
    "sparse": sparse,
}


def get_config(arm: str = "outcome"):
    """Args: `outcome`, `process` (DeltaNorm), `end`, `group` (the other process estimators), or `sparse` (GRPO on
    final answers)."""
    if arm not in ARMS:
        raise ValueError(f"configs/mini/stage1.py:{arm}: expected {', '.join(ARMS)}")
    config = ARMS[arm](shared())
    config.rollout.update(group=8, wave=16)
    config.steps = 60
    config.checkpoint.update(every=10, keep=1)
    return config.lock()
