"""Stage II, 8B: sparse GRPO from a Stage-I checkpoint.

    python -m exprl_jax.main --config=configs/paper/stage2_8b.py --workdir=runs/stage2_8b

As configs/stage2.py, where more is said; --config.policy.weights names the Stage-I workdir.
"""

from configs.base import base, large, stage2


def get_config():
    """The released settings."""
    config = large(base())
    config.data = base().data
    config = stage2(config)
    config.policy.weights = "runs/outcome_8b"
    return config.lock()
