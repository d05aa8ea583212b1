"""What all of the miniature's runs share."""

from ml_collections import ConfigDict

from configs.base import base, model, supervised

DATA = "configs/mini/data/"
BASE, JUDGE = "configs/mini/models/base", "configs/mini/models/judge"
STEPS = {"hard": 10, "mild": 6}
RATE = 3e-4  # of all RL
ONE_CORE = dict(param_dtype="float32", compute_dtype="float32", scan_layers=False, remat="none")


def problems(difficulty: str, name: str) -> str:
    """A problem set: `train`, `train_forward`, `tune` or `held_out`."""
    return f"{DATA}k{STEPS[difficulty]}_{name}.jsonl"


def shared() -> ConfigDict:
    """The base policy on the training problems of ten operations: 16 × 8 rollouts a step."""
    config = base()
    config.policy, config.reference, config.judge.model = (model(BASE, **ONE_CORE) for _ in range(3))
    config.mesh = dict(data=-1, model=1)
    config.data.update(
        source=problems("hard", "train"),
        max_prompt_tokens=32,
        held_out=f"{problems('hard', 'held_out')},{problems('hard', 'tune')}",
    )
    config.rollout.update(prompts=16, group=8, wave=16, max_tokens=72, temperature=1.0)
    config.judge.update(backend="function", function="configs/mini/exact.py:score")
    config.judge.workers.update(count=1, batch=256)
    # Of a judge on the mesh.
    config.judge.update(max_context_tokens=128, max_trace_tokens=80, max_tokens=200)
    config.segments.max_segments = 12
    config.updates = dict(per_batch=1, row_tokens=256, microbatch=8, logp_chunk=4096)
    config.loss.kl_coef = 0.0
    config.optimizer.update(learning_rate=RATE, weight_decay=0.0)
    config.evaluate.update(every=10, source=problems("hard", "held_out"), samples=16, k="16", temperature=1.0)
    config.grader.update(seconds=5.0, workers=1)
    return config


def imitation(source: str, start: str, *, epochs: int, batch: int, learning_rate: float) -> ConfigDict:
    """Supervised training of a model on a file of rows."""
    config = supervised(shared())
    config.data.source = source
    config.policy.weights = start
    config.update(epochs=epochs, batch=batch, microbatch=4, row_tokens=192)
    config.optimizer.update(learning_rate=learning_rate, b2=0.99)
    config.checkpoint.update(every=100, keep=1, best="")
    return config
