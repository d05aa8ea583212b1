"""Supervised training of a judge: texts, and the scores or the judgements that they should get (docs/judges.md).

    python -m exprl_jax.main --config=configs/judge.py --workdir=runs/judge --config.lessons=lessons.jsonl
    python -m exprl_jax.main --config=configs/judge.py:smoke --workdir=runs/smoke-judge
    python -m exprl_jax.main --config=configs/judge.py:tiny --workdir=runs/tiny-judge

Any run takes the result as its judge, with --config.judge.model.weights=runs/judge.  Everything else of the section
`judge` (read-out, unit, budgets) must be the same there as here.
"""

from configs import smoke, tiny
from configs.base import base, lessons


def get_config(arm: str = "600m"):
    """Args: `600m` (Qwen3-0.6B for the runs of the paper's sizes), `text` (the same, writing judgements), `smoke` or
    `tiny`."""
    if arm in ("600m", "text"):
        made = lessons(base())
        made.judge.readout = "text" if arm == "text" else "logits"
    elif arm in ("smoke", "tiny"):
        config = {"smoke": smoke, "tiny": tiny}[arm].get_config().copy_and_resolve_references()
        made = lessons(config.unlock())
        made.judge.model = config.judge.model
        made.lessons = "configs/data/lessons.jsonl"
        made.update(epochs=1, batch=8, microbatch=8, row_tokens={"smoke": 512, "tiny": 1024}[arm], logp_chunk=512)
        made.validation.update(every=4, fraction=0.1, wave=8)
        made.checkpoint.every = 4
        made.optimizer.learning_rate = {"smoke": 2e-5, "tiny": 1e-3}[arm]
    else:
        raise ValueError(f"configs/judge.py:{arm}: expected 600m, text, smoke or tiny")
    return made.lock()
