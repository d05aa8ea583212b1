"""The runs behind docs/mini.md's table: which commands, in which folders, and what each waits for."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

from configs.mini.settings import BASE, STEPS, problems

_NOISE = "--config.judge.function=configs/mini/noise.py:misplaced_"
# Label, config and overrides of each arm of Stage I.
STAGE_1 = {
    "sparse": ("sparse GRPO", "stage1.py:sparse", ()),
    "sft": ("SFT, answer first", "sft.py:answer_first", ()),
    "sft_forward": ("SFT, forward", "sft.py:forward", ()),
    "outcome": ("ExpRL-Outcome", "stage1.py:outcome", ()),
    "process": ("ExpRL-Process, Delta", "stage1.py:process", ()),
    "end": ("ExpRL-Process, End", "stage1.py:end", ()),
    "group": ("ExpRL-Process, Group", "stage1.py:group", ()),
    "learned": ("Outcome, learned judge", "stage1.py:learned", ()),
    "likelihood": ("the answer's likelihood, no judge", "stage1.py:likelihood", ()),
    "distill": ("self-distillation", "stage1.py:distill", ()),
    "noisy_10": ("Outcome, 10 % of scores misplaced", "stage1.py:outcome", (f"{_NOISE}10",)),
    "noisy_20": ("Outcome, 20 % of scores misplaced", "stage1.py:outcome", (f"{_NOISE}20",)),
    "noisy_50": ("Outcome, 50 % of scores misplaced", "stage1.py:outcome", (f"{_NOISE}50",)),
}
QUICK = ("sparse", "outcome", "process")
NO_STAGE_2 = ("learned", "noisy_10", "noisy_20", "noisy_50")
# One change each to the arm `process`: what makes DeltaNorm collapse, and what keeps it?
VARIANTS = {
    "first": ("A₁ less the group's mean of first scores", ("--config.advantage.estimator=delta_group",)),
    "heading": ("heading counted to the segment that it opens", (r"--config.segments.rule=regex:(?=\n### )",)),
    "flat": ("score 1 while all is right, else 0", ("--config.judge.function=configs/mini/exact.py:right_so_far",)),
    "released": ("one segment: advantage s₁, as released", ("--config.advantage.one_segment=score",)),
    "penalty": (
        "overlong: advantage −0.5",
        ("--config.advantage.overlong=penalty", "--config.advantage.overlong_penalty=-0.5"),
    ),
    "mask": ("overlong: no loss", ("--config.advantage.overlong=mask",)),
    "kl": ("KL 0.01 to the base", ("--config.loss.kl_coef=0.01",)),
    "heading_flat": (
        "heading to the segment that it opens, flat score",
        (r"--config.segments.rule=regex:(?=\n### )", "--config.judge.function=configs/mini/exact.py:right_so_far"),
    ),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """A command of the table.

    Attributes:
      name: of its folder.
      config: within configs/mini.
      overrides: of the config.
      starts_from: a job whose policy it takes, or a model; empty for the config's own.
      done: the file that tells that it has ended.
      seconds: what it takes on one quiet core, for the time that is left.
    """

    name: str
    config: str
    overrides: tuple[str, ...]
    starts_from: str
    done: str
    seconds: float

    def weights(self, root: pathlib.Path) -> str:
        """The model that it starts from, once the job before it has ended: a run's best checkpoint by its own training
        batches, or its only one."""
        checkpoints = root / self.starts_from / "checkpoints"
        if not checkpoints.is_dir():
            return self.starts_from
        return str(checkpoints / str(min(int(path.name) for path in checkpoints.iterdir() if path.name.isdigit())))

    def command(self, root: pathlib.Path) -> list[str]:
        """What follows `python`."""
        started = [f"--config.policy.weights={self.weights(root)}"] if self.starts_from else []
        workdir = f"--workdir={root / self.name}"
        return ["-m", "exprl_jax.main", f"--config=configs/mini/{self.config}", *self.overrides, *started, workdir]


def jobs(seeds: Sequence[int], arms: Sequence[str], difficulty: str, *, second: bool) -> list[Job]:
    """The jobs of a table, in an order in which each comes after what it waits for.

    Args:
      arms: of `STAGE_1`.
      difficulty: `hard` or `mild`.
      second: Stage II from each arm, and from the base.
    """
    rl = _reinforced(difficulty)
    sets = (f"--config.data.source={problems(difficulty, 'held_out')},{problems(difficulty, 'train')}",)
    share = STEPS[difficulty] / STEPS["hard"]
    made = [_evaluation(f"{difficulty}/base", BASE, sets, share)]
    for seed in seeds:
        for arm in arms:
            name, (_, config, changes) = f"{difficulty}/{arm}-{seed}", STAGE_1[arm]
            overrides = (f"--config.seed={seed}", *changes)
            if config.startswith("sft"):
                source = problems(difficulty, "train" if arm == "sft" else "train_forward")
                made.append(Job(name, config, (*overrides, f"--config.data.source={source}"), "", "export", 60 * share))
            else:
                made.append(Job(name, config, (*overrides, *rl), "", "export", 120 * share))
            made.append(_evaluation(name, name, sets, share))
        for arm in ("base", *(arm for arm in arms if arm not in NO_STAGE_2)) if second else ():
            start, name = BASE if arm == "base" else f"{difficulty}/{arm}-{seed}", f"{difficulty}/{arm}-{seed}-stage2"
            made.append(Job(name, "stage2.py", (f"--config.seed={seed}", *rl), start, "export", 70 * share))
            made.append(_evaluation(name, name, sets, share))
    return made


def variants(seeds: Sequence[int], difficulty: str) -> list[Job]:
    """The jobs of `VARIANTS`; what is shown of them is in their own metrics."""
    _, config, _ = STAGE_1["process"]
    return [
        Job(
            f"{difficulty}/process_{name}-{seed}",
            config,
            (f"--config.seed={seed}", *changes, *_reinforced(difficulty)),
            "",
            "export",
            120 * STEPS[difficulty] / STEPS["hard"],
        )
        for seed in seeds
        for name, (_, changes) in VARIANTS.items()
    ]


def _reinforced(difficulty: str) -> tuple[str, ...]:
    """Problem sets of a run of RL."""
    held_out = problems(difficulty, "held_out")
    return (
        f"--config.data.source={problems(difficulty, 'train')}",
        f"--config.data.held_out={held_out},{problems(difficulty, 'tune')}",
        f"--config.evaluate.source={held_out}",
    )


def _evaluation(name: str, start: str, sets: tuple[str, ...], share: float) -> Job:
    return Job(f"{name}-eval", "evaluate.py", (*sets, f"--config.label={name}"), start, "results.json", 25 * share)
