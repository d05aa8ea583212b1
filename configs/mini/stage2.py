"""Stage II in the miniature: sparse GRPO from a Stage-I run.

    python -m exprl_jax.main --config=configs/mini/stage2.py --workdir=runs/mini-2
    python -m exprl_jax.main --config=configs/mini/stage2.py --workdir=runs/mini-base-2 \\
        --config.policy.weights=configs/mini/models/base

Rollouts a step, rate and clip are Stage I's.
"""

from configs.base import sparse
from configs.mini.settings import shared


def get_config():
    """Starts from runs/mini."""
    config = sparse(shared())
    config.policy.weights = "runs/mini"
    config.steps = 30
    config.checkpoint.update(every=10, keep=1)
    return config.lock()
