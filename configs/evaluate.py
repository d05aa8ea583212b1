"""pass@k of any model on the benchmarks: 128 samples a problem at temperature 0.8, as in the paper.

    python -m exprl_jax.main --config=configs/evaluate.py --config.policy.weights=runs/outcome --config.label=Outcome \\
        --workdir=runs/outcome-eval
    python -m exprl_jax.main --config=configs/evaluate.py:smoke --workdir=runs/smoke-eval    SmolLM2-135M, 16 samples
    python -m exprl_jax.main --config=configs/evaluate.py:tiny --workdir=runs/tiny-eval      random weights, seconds
    python -m exprl_jax.evaluation.tables runs/base-eval runs/outcome-eval --output=runs/compared

Kill it and start it again: it goes on where its samples end.  Start it with a larger `--config.sampling.samples`, and
it draws those that are missing.  `--config.data.source` names the sets, each a benchmark (`data/benchmarks.py`), a file
or a hub id.
"""

from configs import smoke, tiny
from configs.base import base, evaluation, large


def get_config(arm: str = "4b"):
    """Args: `4b`, `8b` (science and code too), `smoke` or `tiny`."""
    if arm == "4b":
        config = evaluation(base())
    elif arm == "8b":
        config = evaluation(large(base()))
        config.data.source += ",livecodebench_v5"
    elif arm in ("smoke", "tiny"):
        rl = {"smoke": smoke, "tiny": tiny}[arm].get_config()
        config = evaluation(rl)
        config.policy.param_dtype = "float32"
        config.label = arm
        config.data.source = "configs/data/arithmetic.jsonl"
        config.sampling.update(samples=16, group=8 if arm == "smoke" else 4, wave=8)
    else:
        raise ValueError(f"configs/evaluate.py:{arm}: expected 4b, 8b, smoke or tiny")
    return config.lock()
