"""The schema of every experiment: what each config key is called, what type it has and what it means.

A config file in `configs/` returns a `ml_collections.ConfigDict` whose `task` names one of the records of
`config.tasks` (`TASKS`), and whose shape is exactly that record: every key present, none unknown, every value of the
declared type.  `resolve` turns the one into the other and checks it; nothing else in the package reads a ConfigDict.
"""

from exprl_jax.config.data import COLUMNS, Data, Sampling, Source, column_pairs
from exprl_jax.config.models import Execution, Lora, Mesh, Model
from exprl_jax.config.rewards import (
    Advantage,
    Code,
    Endpoint,
    Grader,
    Judge,
    JudgeWorkers,
    Route,
    Routes,
    Segments,
    Truth,
)
from exprl_jax.config.tasks import (
    TASKS,
    Annotate,
    AnyConfig,
    Asking,
    Calibrate,
    Config,
    Evaluate,
    JudgeTraining,
    Labelling,
    Prefixes,
    Repeats,
    Sft,
    Supervised,
)
from exprl_jax.config.training import (
    TRACKERS,
    Checkpoint,
    Distillation,
    JudgeValidation,
    Log,
    Loss,
    Optimizer,
    Probe,
    Rollout,
    RunEvaluation,
    Tracking,
    Updates,
    Validation,
    Watch,
)
from exprl_jax.config.values import (
    Count,
    CountOrNone,
    Fraction,
    GroupSize,
    JsonObject,
    NotNegative,
    Number,
    Positive,
    Range,
    Seconds,
    Seed,
    Workers,
)
