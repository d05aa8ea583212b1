"""The paper's Stage I: Qwen3-4B-Instruct-2507 as policy, KL reference and judge, 16,384-token rollouts, text scores.

    python -m exprl_jax.main --config=configs/stage1.py --workdir=runs/outcome            ExpRL-Outcome, 36 x 10
    python -m exprl_jax.main --config=configs/stage1.py:process --workdir=runs/process    ExpRL-Process, 36 x 16
    python -m exprl_jax.main --config=configs/stage1.py --dry_run                         what it would take

Every other arm of the paper is a file in configs/paper/.  Data: POPE and InT in the released parquet schema; say where
with --config.data.source.  Hardware: 16 v5e chips (2 x 8), by the TPU's ahead-of-time compiler (docs/pods.md: at most
12.7 of 15.75 GiB a chip, while judging); not yet run at this size.  To expect, by the paper's Table 2
(Stage I alone, pass@1 in percent on AIME25, AIME26, HMMT-Nov25, IMO-AnswerBench): base 46.46 51.45 40.60 31.37; Outcome
50.52 57.45 44.19 33.56; Process 51.77 57.51 45.24 32.02.
"""

from configs.base import base, process


def get_config(arm: str = "outcome"):
    """Args: `outcome` or `process` (prefixes of the rollout, DeltaNorm, fully on-policy)."""
    arms = {"outcome": base, "process": lambda: process(base(), "delta_norm")}
    if arm not in arms:
        raise ValueError(f"configs/stage1.py:{arm}: expected outcome or process")
    return arms[arm]().lock()
