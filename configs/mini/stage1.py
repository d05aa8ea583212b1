"""Stage I in the miniature: from a policy that solves one puzzle in a thousand, in a few minutes on one CPU core.

    python -m exprl_jax.main --config=configs/mini/stage1.py --workdir=runs/mini
    python -m exprl_jax.main --config=configs/mini/stage1.py:sparse --workdir=runs/mini-sparse
    python -m exprl_jax.main --config=configs/mini/stage1.py:process --workdir=runs/mini-process
    python -m exprl_jax.main --config=configs/mini/stage1.py:learned --workdir=runs/mini-learned

docs/mini.md says what the puzzles are and what came of each arm.
"""

from ml_collections import ConfigDict

from configs.base import distill, process, sparse
from configs.mini.settings import JUDGE, RATE, shared


def learned(config: ConfigDict) -> ConfigDict:
    """ExpRL-Outcome with scores of a model on the mesh, and all of them logged for configs/mini/judged.py."""
    config.judge.backend = "local"
    config.judge.model.weights = JUDGE
    config.log.rollouts = 128
    return config


def likelihood(config: ConfigDict) -> ConfigDict:
    """The policy's own likelihood of the answer in the judge's place."""
    config.routes.math = "likelihood"
    return config


def taught(config: ConfigDict) -> ConfigDict:
    """On-policy self-distillation; the teacher's prompt is in words that the base has never read."""
    config = distill(config)
    config.updates.row_tokens = 512
    config.optimizer.learning_rate = RATE
    return config


ARMS = {
    "outcome": lambda c: c,
    "process": lambda c: process(c, "delta_norm"),
    "end": lambda c: process(c, "end_norm"),
    "group": lambda c: process(c, "group_norm"),
    "sparse": sparse,
    "learned": learned,
    "likelihood": likelihood,
    "distill": taught,
}


def get_config(arm: str = "outcome"):
    """Args: `outcome`, `process` (DeltaNorm), `end`, `group` (the other process estimators), `sparse` (GRPO on final
    answers), `learned` (Outcome with the learned judge in the exact one's place), `likelihood` or `distill`
    (self-distillation)."""
    if arm not in ARMS:
        raise ValueError(f"configs/mini/stage1.py:{arm}: expected {', '.join(ARMS)}")
    config = ARMS[arm](shared())
    config.rollout.update(prompts=16, group=8, wave=16)
    config.steps = 60
    config.checkpoint.update(every=10, keep=1)
    return config.lock()
