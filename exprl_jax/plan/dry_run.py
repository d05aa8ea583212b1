"""What a run would be, without running it: resolved config, derived numbers, sharding table, memory by program."""

from __future__ import annotations

import collections
import json
from typing import Any

import jax
from jax.sharding import AbstractMesh

from exprl_jax.config import Annotate, Asking, Evaluate, JudgeTraining, Labelling, Model, Supervised
from exprl_jax.layout import packed_shape
from exprl_jax.mesh import DATA, MODEL, fit_mesh
from exprl_jax.plan.calls import calls_of, planned_sizes
from exprl_jax.plan.memory import owners_of
from exprl_jax.plan.models import asked_models, frozen_models, known_model
from exprl_jax.plan.records import POLICY, Call, Planned
from exprl_jax.plan.tables import memory_rows
from exprl_jax.records import TrainState
from exprl_jax.resolve import to_dict
from exprl_jax.text_tables import align

_MEMORY = (
    "GiB a device while a program runs, at full budgets: arguments, caches, copies of weights and gradients. "
    "Activations, logits and what the compiler adds come on top, and a TPU's caches are pages: for a TPU, ask "
    "exprl_jax.compile_check"
)


def describe(config: Planned) -> str:
    """The report of `--dry_run`.  Allocates nothing and needs no devices: a mesh of another machine will do.

    Budgets stand in for what a run measures from its data (prompt widths), so sizes are upper bounds.

    Raises:
      ValueError: as a run would, for what can be known without its data.
    """
    data, tensor = fit_mesh(config.mesh)
    mesh = AbstractMesh((data, tensor), (DATA, MODEL))
    config, calls = planned_sizes(config, mesh), calls_of(config, mesh)
    fixed = isinstance(config, Asking)
    models = asked_models(config) if fixed else {POLICY: config.policy}
    distinct = dict.fromkeys(models.values())
    derived = {
        "mesh": f"data {data} x model {tensor} = {data * tensor} devices",
        **{f"{role} parameters": f"{known_model(model).arch.parameters:,}" for role, model in models.items()},
        **(_asked(config) if fixed else _derived(config)),
    }
    return "\n\n".join(
        [
            "== resolved config\n" + json.dumps(to_dict(config), indent=2),
            "== derived\n" + align(derived.items()),
            *(_parameters(model, [role for role in models if models[role] == model], calls) for model in distinct),
            f"== memory: {_MEMORY}\n{align(_memory(calls))}",
        ]
    )


def _asked(config: Asking) -> dict[str, Any]:
    """Of what asks models about fixed rollouts."""
    if isinstance(config, Annotate):
        at_once = {"rollouts a call": config.wave}
        asked = {"annotator": config.annotator}
    else:
        at_once = {"rows a call": config.wave * config.group}
        labelling = isinstance(config, Labelling)
        asked = {"judge": config.judge} if labelling else {f"judge {n}": judge for n, judge in config.judges.items()}
    elsewhere = [role for role, judge in asked.items() if judge.backend != "local"]
    return at_once | ({"not on this mesh": ", ".join(elsewhere)} if elsewhere else {})


def _derived(config: Planned) -> dict[str, Any]:
    if isinstance(config, Evaluate):
        sampling = config.sampling
        return {
            "rollouts a problem": sampling.samples,
            "calls a wave of problems": sampling.samples // sampling.group,
            "rows a wave": sampling.wave * sampling.group,
            "sequence": f"{config.data.max_prompt_tokens} + {sampling.max_tokens} tokens",
            "judge": f"not planned for; if the data hold open-ended science, {config.judge.source} verifies it",
        }
    microbatches, rows, tokens = packed_shape(config)
    weights = sorted({model.weights for model in frozen_models(config)})
    derived = {
        "microbatch": f"{rows} rows of {tokens} tokens, at most {microbatches} an update",
        "frozen copies": f"{len(frozen_models(config))} ({', '.join(weights) or 'none'})",
    }
    if isinstance(config, Supervised):
        return {
            "lessons an update" if isinstance(config, JudgeTraining) else "examples an update": config.batch
        } | derived
    rollout, updates = config.rollout, config.updates.per_batch
    derived = {
        "rollouts a step": rollout.prompts * rollout.group,
        "waves a step": rollout.prompts // rollout.wave,
        "rows a wave": rollout.wave * rollout.group,
        "decode slots": f"{rollout.slots} a data shard" if rollout.slots else "one for every row of a wave",
        "updates a step": updates,
        "rows an update": rollout.prompts // updates * rollout.group,
        "optimizer updates in all": config.steps * updates,
        "sequence": f"{config.data.max_prompt_tokens} + {rollout.max_tokens} tokens",
    } | derived
    if config.rollout.hints:
        derived["hints"] = f"not planned for; {config.reference.weights} writes them with programs of its own"
    if config.task == "rl" and config.judge.backend == "local" and not config.has_local_judge:
        # Which kinds of problems there are, a plan without data cannot know.
        judge = config.judge.model.weights
        derived["judge"] = f"not planned for; if the data hold open-ended science, {judge} verifies it"
    return derived


def _parameters(model: Model, roles: list[str], calls: list[Call]) -> str:
    """What is trained, or of an evaluation what samples, or a model that is asked, array by array."""
    arguments = [(owner, tree) for call in calls for owner, tree in call.arguments]
    states = [tree.params for _, tree in arguments if isinstance(tree, TrainState)]
    tree = next(iter(states), None) or next(tree for owner, tree in arguments if owner == roles[0])
    rows = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name, sharding = "/".join(key.key for key in path), leaf.sharding
        if not name.startswith("layer_") or name.startswith("layer_0/"):  # all layers alike
            rows.append((name, leaf.shape, leaf.dtype.name, sharding.spec, sharding.shard_shape(leaf.shape)))
    layers = "" if model.execution.scan_layers else " (layer_0 for all layers)"
    of = "" if roles == [POLICY] else f" of {', '.join(roles)}"
    return f"== parameters{of}: shape, dtype, axes, shape on a device{layers}\n{align(rows)}"


def _memory(calls: list[Call]) -> list[list[str]]:
    """A row a program: calls in a step, counted operations, and bytes by owner with their sum."""
    if not calls:
        return [["no program runs on this mesh"]]
    owners = []
    for call in calls:
        sizes = collections.Counter(call.beside)
        sizes.update(owners_of(call))
        owners.append({**sizes, "total": sizes.total()})
    header, *rows = memory_rows(owners)
    first = [["program", "calls a step", "TFLOP"]]
    first += [[call.name, str(call.times), f"{call.cost.flops / 1e12:.3g}"] for call in calls]
    return [a + b for a, b in zip(first, [header, *rows])]
