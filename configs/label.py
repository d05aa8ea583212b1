"""Lessons for a judge out of rollouts: a stronger judge, or a function, says what each is worth (docs/judges.md).

    python -m exprl_jax.main --config=configs/label.py --workdir=runs/labels \\
        --config.rollouts='runs/outcome/rollouts/*.jsonl'
    python -m exprl_jax.main --config=configs/judge.py --workdir=runs/judge --config.lessons=runs/labels/lessons.jsonl
    python -m exprl_jax.main --config=configs/label.py:smoke --workdir=runs/smoke-labels     after configs/smoke.py
    python -m exprl_jax.main --config=configs/label.py:tiny --workdir=runs/tiny-labels       after configs/tiny.py

Kill it and start it again: it goes on.
"""

from ml_collections import ConfigDict

from configs import smoke, tiny
from configs.base import QWEN3_8B, base


def get_config(arm: str = "8b"):
    """Args: `8b` (whole rollouts by Qwen3-8B), `prefix` (their beginnings), `smoke` or `tiny`."""
    if arm in ("8b", "prefix"):
        config, rollouts = base(), "runs/outcome/rollouts/*.jsonl"
    elif arm in ("smoke", "tiny"):
        config, rollouts = {"smoke": smoke, "tiny": tiny}[arm].get_config(), f"runs/{arm}/rollouts/*.jsonl"
    else:
        raise ValueError(f"configs/label.py:{arm}: expected 8b, prefix, smoke or tiny")
    shared = {name: config[name].to_dict() for name in ("data", "mesh", "judge", "segments", "policy")}
    unit = "outcome" if arm == "8b" else "prefix"
    made = ConfigDict(
        dict(task="label", seed=config.seed, rollouts=rollouts, count=0, unit=unit, wave=8, group=4, **shared)
    )
    del made.data.held_out, made.data.allow_held_out
    if arm in ("8b", "prefix"):
        made.judge.model.weights = QWEN3_8B
        made.wave, made.group = 4, 8
    else:
        made.judge.max_context_tokens = {"smoke": 512, "tiny": 2048}[arm]
    return made.lock()
