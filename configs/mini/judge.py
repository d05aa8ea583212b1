"""The miniature's learned judge, taught in three stages.

    python -m configs.mini.make judge

This writes the lessons, runs the arms one after another, and keeps the result in configs/mini/models/judge.  `listed`
and `short` compare everything, in tables of ten steps and of two to ten; `judge` stops at the first fault and counts.
docs/mini.md says why there are three.
"""

from typing import NamedTuple

from configs.base import lessons
from configs.mini.settings import BASE, shared


class Stage(NamedTuple):
    """A stage of the judge's training.

    Attributes:
      rows: lessons; each is seen once.
      seed: of the lessons.
      listed: they compare everything.
      shortest: steps of the shortest puzzle.
      start: a model, or the stage before.
      row_tokens: width of a packed row.
      learning_rate: the highest.
    """

    rows: int
    seed: int
    listed: bool
    shortest: int
    start: str
    row_tokens: int
    learning_rate: float

    @property
    def weights(self) -> str:
        """What its training starts from."""
        return workdir(self.start) if self.start in STAGES else self.start


STAGES = {
    "listed": Stage(9_600, 5, True, 10, BASE, 344, 3e-3),
    "short": Stage(12_800, 6, True, 2, "listed", 344, 3e-3),
    "judge": Stage(9_600, 5, False, 10, "short", 512, 2e-3),
}


def workdir(arm: str) -> str:
    """Of a stage's run."""
    return f"runs/mini-judge-{arm}"


def get_config(arm: str = "judge"):
    """Args: `judge`, `listed` or `short`."""
    if arm not in STAGES:
        raise ValueError(f"configs/mini/judge.py:{arm}: expected judge, listed or short")
    stage, config = STAGES[arm], shared()
    config.judge.backend = "local"
    made = lessons(config)
    made.judge.model = config.judge.model
    made.judge.model.weights = stage.weights
    made.lessons = f"{workdir(arm)}.jsonl"
    made.update(epochs=1, batch=32, microbatch=4, row_tokens=stage.row_tokens, logp_chunk=4096)
    made.optimizer.update(learning_rate=stage.learning_rate, b2=0.99)
    made.checkpoint.update(every=50, keep=1, best="")
    return made.lock()
