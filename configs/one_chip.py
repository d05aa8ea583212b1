"""ExpRL on one chip: adapters on a frozen Qwen3-4B-Instruct-2507, which judges and is the KL reference too.

    python -m exprl_jax.main --config=configs/one_chip.py --workdir=runs/one_chip
    python -m exprl_jax.main --config=configs/one_chip.py:small --workdir=runs/one_chip-small

`small` is Qwen3-0.6B, which judges badly (paper, Table 5).

One v5e chip (16 GB) or more, by the ahead-of-time compiler (docs/pods.md); not yet run.  Rollouts are an eighth of the
paper's length and judgements a quarter.  `export/` in the workdir is the merged model, `adapter/` is for PEFT.
"""

from configs.base import base

SMALL = "Qwen/Qwen3-0.6B"


def get_config(arm: str = "large"):
    """Args: `large` (4B) or `small` (0.6B)."""
    if arm not in ("large", "small"):
        raise ValueError(f"configs/one_chip.py:{arm}: expected large or small")
    config = base()
    for model in (config.policy, config.reference, config.judge.model):
        model.param_dtype = "bfloat16"
        if arm == "small":
            model.weights = SMALL
    config.lora.rank = 16
    config.optimizer.learning_rate = 1e-5
    config.mesh.update(data=1, model=1)
    config.data.max_prompt_tokens = 1024
    config.rollout.update(prompts=16, group=8, max_tokens=2048, wave=1)
    config.judge.update(max_tokens=512, max_context_tokens=4096, max_trace_tokens=2304)
    config.updates.update(row_tokens=4096, microbatch=1, logp_chunk=1024)
    return config.lock()
