"""The paper's Stage II, 4B: sparse GRPO from a Stage-I checkpoint; references are not even read.

    python -m exprl_jax.main --config=configs/stage2.py --config.policy.weights=runs/outcome --workdir=runs/outcome-2
    python -m exprl_jax.main --config=configs/stage2.py:text --config.policy.weights=runs/outcome --workdir=runs/text-2

`--config.policy.weights` takes a workdir (its newest checkpoint), `<workdir>/checkpoints/<step>`, or any Hugging Face
folder or hub id, the base model's too.  Data: POPE and InT.  Synchronous and fully on-policy, where the released code
is asynchronous.  To expect, by the paper's Table 1 (pass@1 in percent on AIME25, AIME26, HMMT-Nov25, IMO-AnswerBench):
from Outcome 59.07 61.74 49.11 37.85; from Process 58.08 63.41 48.13 35.73.
"""

from configs.base import base, stage2


def get_config(arm: str = "released"):
    """Args: `released`, or `text` (as the paper words it: group-normalised advantages, batches of 32 prompts)."""
    config = stage2(base())
    config.policy.weights = "runs/outcome"
    if arm == "text":
        config.advantage.std_normalise = True
        config.rollout.prompts = 32
    elif arm != "released":
        raise ValueError(f"configs/stage2.py:{arm}: expected released or text")
    return config.lock()
