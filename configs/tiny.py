"""Random weights and bytes: every arm in well under a minute, for tests and Colab.  Learns nothing.

    python -m exprl_jax.main --config=configs/tiny.py --workdir=runs/tiny
    python -m exprl_jax.main --config=configs/tiny.py:process --workdir=runs/tiny-process

and so on for the other arms.  Any machine, any number of devices that divides 8.
"""

from configs.base import base, distill, model, sparse, stage2, supervised

ARMS = {
    "outcome": lambda c: c,
    "process": lambda c: _routed(c, math="process"),
    "mixed": lambda c: _routed(c, math="process", choice="process", science="outcome", code="verifier"),
    "text": lambda c: c,
    "sparse": sparse,
    "stage2": stage2,
    "distill": distill,
    "sft": lambda c: c,
    "lora": lambda c: c,
}


def get_config(arm: str = "outcome"):
    """Args: one of `ARMS`: `text` has generated judgements, `mixed` all kinds of problems in one batch, `stage2` goes
    on from runs/tiny."""
    if arm not in ARMS:
        raise ValueError(f"configs/tiny.py:{arm}: expected {', '.join(ARMS)}")
    config = ARMS[arm](base())
    tiny = dict(param_dtype="float32", compute_dtype="float32", scan_layers=False, remat="none")
    config.policy, config.reference, config.judge.model = (model("random:qwen3", **tiny) for _ in range(3))
    config.steps = 4
    config.data.update(source="configs/data/arithmetic.jsonl", max_prompt_tokens=512, held_out="")
    config.mesh = dict(data=-1, model=1)
    config.rollout.update(prompts=8, group=4, max_tokens=24, wave=8)
    config.judge.update(readout="logits", max_tokens=16, max_context_tokens=2048, max_trace_tokens=96)
    config.segments = dict(rule="stride:8", max_segments=3)
    config.updates = dict(per_batch=1, row_tokens=640, microbatch=8, logp_chunk=256)
    config.optimizer.learning_rate = 1e-4
    # Random weights hardly ever end a rollout.
    config.advantage.update(overlong="penalty", overlong_penalty=-0.5)
    config.checkpoint = dict(every=1, keep=2, best="", best_is="highest")
    config.log.rollouts = 4
    config.grader.workers = 1
    if arm == "text":
        config.judge.readout = "text"
    elif arm == "mixed":
        config.data.source = "configs/data/mixed.jsonl"
        config.judge.model.weights = "random:llama"
    elif arm == "stage2":
        config.policy.weights = "runs/tiny"
    elif arm == "lora":
        config.lora.rank = 4
        config.optimizer.learning_rate = 1e-3
    elif arm == "sft":
        config = supervised(config)
        config.update(batch=8, microbatch=8, row_tokens=512, logp_chunk=512)
        config.optimizer.learning_rate = 1e-3
        config.checkpoint.every = 4
    return config.lock()


def _routed(config, **routes):
    config.routes.update(routes)
    return config
