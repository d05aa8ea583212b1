"""Small real runs for the tests of the loop: configs/tiny.py with a learning signal on every step.

Untrained weights hardly ever end a rollout, so the tests give the overlong ones a penalty instead of a mask.
"""

import contextlib
import importlib
import json
import os
import pathlib
import sys
from collections.abc import Iterable
from types import ModuleType

import numpy as np
from ml_collections import ConfigDict
from safetensors.numpy import load_file

from exprl_jax.batch import Batch
from exprl_jax.config import Config
from exprl_jax.distill import distill
from exprl_jax.kinds import KINDS
from exprl_jax.records import Packed, Rollouts, TrainState
from exprl_jax.resolve import resolve
from exprl_jax.rl_run import RLRun, open_run
from exprl_jax.rollout import usage
from exprl_jax.run.clock import Clock
from exprl_jax.run.loop import StepResult
from exprl_jax.train import train

ROOT = pathlib.Path(__file__).resolve().parents[1]
LIVELY = {
    "advantage.overlong": "penalty",
    "advantage.overlong_penalty": -0.5,
    "advantage.min_logits_spread": 0.0,  # an untrained judge hardly tells its rollouts apart
    "optimizer.eps": 1e-4,  # Adam turns rounding noise of a gradient near zero into whole steps
    "data.source": str(ROOT / "configs/data/arithmetic.jsonl"),
    "grader.seconds": 20.0,
    # A group of short rollouts and its prompt fill a row.
    "data.max_prompt_tokens": 216,
    "updates.row_tokens": 320,
    "steps": 2,
}

# A budget in which some rollouts of untrained weights end, so that there is something to judge.
LONG = {"rollout.max_tokens": 96, "judge.max_trace_tokens": 400, "segments.max_segments": 12, "log.rollouts": 32}
CODE = json.dumps({"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"], "fn_name": None})
CHOICES = {"label": ["A", "B"], "text": ["iron", "water"]}
WHICH = dict(reference="Water flows.", domain="science", choices=CHOICES)
WHY = dict(reference="By Newton's law.", answer="gravity", domain="science")
PROBLEMS = [
    *(dict(id=f"m{i}", problem=f"{i} + 1?", reference=f"{i} + 1 = {i + 1}", answer=f"{i + 1}") for i in range(3)),
    dict(id="c0", problem="Which is wet?", answer="B", **WHICH),
    dict(id="c1", problem="Which is hard?", answer="A", **WHICH),
    dict(id="s0", problem="Why do apples fall?", **WHY),
    dict(id="s1", problem="Why are there tides?", **WHY),
    dict(id="p0", problem="Add two numbers.", reference="print(sum(...))", answer=CODE, domain="code"),
]
MIXED = LONG | {
    "routes.math": "process",
    "routes.choice": "process",
    "routes.science": "outcome",
    "routes.code": "verifier",
    "code.seconds": 5.0,
    "code.memory_mb": 512,
    "code.allow_unsandboxed": True,
}


def config_dict(name: str, arm: str | None = None, changes: dict | None = None) -> ConfigDict:
    """A committed config with some leaves changed, given by their dotted paths."""
    get_config = importlib.import_module(f"configs.{name}").get_config
    made = get_config() if arm is None else get_config(arm)
    for path, value in (changes or {}).items():
        *sections, leaf = path.split(".")
        section = made
        for key in sections:
            section = section[key]
        section[leaf] = value
    return made


def tiny(arm: str = "outcome", changes: dict | None = None) -> Config:
    """configs/tiny.py, lively, and changed."""
    return resolve(config_dict("tiny", arm, LIVELY | (changes or {})))


def sparse(changes: dict | None = None) -> Config:
    """Stage II: the verifier's word alone; no KL, so that the policy is the only model."""
    routes = {f"routes.{kind}": "verifier" for kind in KINDS}
    return tiny("outcome", routes | {"loss.kl_coef": 0.0, "advantage.std_normalise": False} | (changes or {}))


def flags(changes: dict) -> list[str]:
    """The same changes as command-line overrides."""
    return [f"--config.{path}={value}" for path, value in (LIVELY | changes).items()]


def run(config: Config, folder) -> pathlib.Path:
    """Trains in a folder and returns it."""
    {"rl": train, "distill": distill}[config.task](config, str(folder))
    return pathlib.Path(folder)


def opened(config: Config) -> RLRun:
    """What a run opens before its first step, its verifiers closed again: for tests that grade nothing."""
    with contextlib.ExitStack() as stack:
        return open_run(config, stack)


def take_step(task: ModuleType, run, state: TrainState, step: int) -> tuple[TrainState, StepResult]:
    """A step of a task's room, as the loop takes it: the state after it, and its result."""
    clock = Clock()
    result = task.learn(run, state, task.collect(run, state, step, clock), clock)
    return result.state.replace(step=result.state.step + 1), result


def random_batch(run: RLRun, seed: int = 0) -> Batch:
    """A step's rollouts from nowhere, of every length; a tenth of their tokens and one rollout carry no loss."""
    rng, rollout = np.random.default_rng(seed), run.config.rollout
    shape = (rollout.prompts, rollout.group, rollout.max_tokens)
    length_PG = rng.integers(0, rollout.max_tokens + 1, shape[:2])
    length_PG[0, :3] = 0, 1, rollout.max_tokens
    mask = np.arange(rollout.max_tokens) < length_PG[..., None]
    tokens, logp = rng.integers(0, 256, shape, np.int32), rng.normal(-2, 1, shape).astype(np.float32)
    logp = np.where(mask, logp, 0).astype(np.float32)
    rollouts = Rollouts(np.where(mask, tokens, 0), mask, logp, -logp, length_PG > 3)
    counted = mask & (rng.random(shape) > 0.1)
    counted[0, 2] = False
    prompts = [run.prompts.ids[problem.id] for problem in run.problems[: rollout.prompts]]
    return Batch(prompts, rollouts, counted, np.where(mask, rng.normal(size=shape), 0).astype(np.float32))


def seen_by(packed: Packed, row: int, slot: int) -> list[int]:
    """The tokens that a slot attends to, itself included, in the order of their positions."""
    tokens, segment, shared, position = (
        np.asarray(x).reshape(-1, x.shape[-1])[row]
        for x in (packed.tokens_BT, packed.segment_BT, packed.shared_BT, packed.position_BT)
    )
    own, slots = segment == segment[slot], np.arange(len(segment))
    visible = (own & (slots <= slot)) | ((segment == shared[slot]) & (position < position[own].min()))
    order = np.argsort(position[visible], kind="stable")
    assert (position[visible][order] == np.arange(len(order))).all()
    return tokens[visible][order].tolist()


def write_problems(path: pathlib.Path, rows: Iterable[dict]) -> str:
    """A data set of these rows; returns its source."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read_jsonl(path) -> list[dict]:
    """The lines of a file."""
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


# They depend on mesh, wave and slots.
DIVIDED = usage.METRICS


def rows(folder, clock: bool = False) -> list[dict]:
    """A run's metrics rows; what depends on the clock, or on how a step is divided, is left out unless asked for."""
    lines = (pathlib.Path(folder) / "metrics.jsonl").read_text().splitlines()
    left_out = () if clock else ("time/", *DIVIDED)
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(left_out)} for line in lines]


def parameters(folder) -> dict[str, np.ndarray]:
    """The exported policy, tensor by tensor; float32, as it was trained."""
    return load_file(pathlib.Path(folder) / "export" / "model.safetensors")


def command(folder, changes: dict, *more: str) -> list[str]:
    """The same run as a command."""
    config = f"--config={ROOT / 'configs/tiny.py'}"
    return [sys.executable, "-m", "exprl_jax.main", config, f"--workdir={folder}", *flags(changes), *more]


def environment(devices: int) -> dict[str, str]:
    """For a process with so many CPU devices, which finds what others have compiled."""
    count = f"--xla_force_host_platform_device_count={devices}"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {count}"}


def assert_same_parameters(ours, theirs) -> None:
    """Bitwise."""
    ours, theirs = parameters(ours), parameters(theirs)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def assert_same_rows(ours, theirs, tolerance=1e-5) -> None:
    """All metrics of all steps, within tolerance · max(1, |expected|).

    A correlation divides by the rewards' standard deviation, so rounding of the rewards counts by its inverse there:
    an untrained judge hardly tells its rollouts apart.  `update/moved` is a count over the number of weights, about
    1e5 here: a sum in another order moves single weights over the edge of a rounding.
    """
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for a, b in zip(ours, theirs):
        assert a.keys() == b.keys()
        for name in a:
            undefined = a[name] is None or b[name] is None
            scale = 1 if undefined else max(1, abs(b[name]))
            if name.endswith("_correlation") and not undefined:
                scale /= min(1, b["reward/std"])
            if name == "update/moved":
                scale = 10
            same = a[name] is b[name] if undefined else abs(a[name] - b[name]) <= tolerance * scale
            assert same, f"step {a['step']}: {name} is {a[name]}, expected {b[name]}"
