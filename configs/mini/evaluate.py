"""pass@1 and pass@16 of a policy on the miniature's held-out puzzles: 128 of ten operations and 128 of six.

    python -m exprl_jax.main --config=configs/mini/evaluate.py --workdir=runs/mini-base-eval
    python -m exprl_jax.main --config=configs/mini/evaluate.py --workdir=runs/mini-eval \\
        --config.policy.weights=runs/mini
    python -m exprl_jax.main --config=configs/mini/evaluate.py:tune --workdir=runs/mini-tune

Whatever is chosen by looking at samples is chosen on `tune`.
"""

from configs.base import evaluation
from configs.mini.settings import STEPS, problems, shared


def get_config(arm: str = "held_out"):
    """Args: `held_out`, `tune` or `train`."""
    if arm not in ("held_out", "tune", "train"):
        raise ValueError(f"configs/mini/evaluate.py:{arm}: expected held_out, tune or train")
    config = evaluation(shared())
    config.policy.param_dtype = "float32"
    config.data.source = ",".join(problems(difficulty, arm) for difficulty in STEPS)
    config.sampling.update(samples=16, group=16, wave=16, max_tokens=72, temperature=1.0)
    return config.lock()
