"""What a run calls: its compiled programs, the shapes and shardings it gives them, and how often a step calls each.

The one description that `--dry_run` adds up and `compile_check` compiles.  Arguments are shapes with shardings: nothing
is allocated, no weights are needed, and the mesh may be abstract.  Widths that a run measures from its data stand at
the config's budgets.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from exprl_jax.config import Annotate, Calibrate, Config, Evaluate, Judge, JudgeTraining, Labelling, Supervised
from exprl_jax.layout import check_layout, packed_shape
from exprl_jax.mesh import DATA
from exprl_jax.plan.arguments import (
    SFT_UPDATES,
    array,
    experience_shapes,
    frozen_parameters,
    packed_shapes,
    parameter_shapes,
)
from exprl_jax.plan.memory import owners_of, residents, tree_bytes
from exprl_jax.plan.models import continues, known_model
from exprl_jax.plan.records import BATCH, POLICY, Call, Planned, RowShapes
from exprl_jax.plan.rows import completion_calls, judge_suffix, judging_calls, row_calls, sampling_calls
from exprl_jax.plan.updates import TRAINING_KEYS, reading_cost, start_calls, trained_policy, update_call
from exprl_jax.programs import build, build_judge, build_sft, build_teacher
from exprl_jax.records import Lesson, Teaching
from exprl_jax.reward.judge_prompts import Unit
from exprl_jax.reward.judges import check_judge_lengths
from exprl_jax.reward.segments import segment_rule
from exprl_jax.rollout.call import padded_width
from exprl_jax.sizes import TRAINING, Lengths, choose_sizes, sizes_of

# A key that begins with a point is of the model that is trained.
_SUPERVISING = ("microbatch", "row_tokens", "logp_chunk", ".execution.remat", "mesh.model")
_ANNOTATING = (
    *("wave", "annotator.max_trace_tokens", "annotator.max_context_tokens", "annotator.max_tokens"),
    *("mesh.model", "annotator.model.execution.kv_dtype"),
)


def calls_of(config: Planned, mesh: Mesh | AbstractMesh) -> list[Call]:
    """Every program of a run, in the order in which it first calls them.

    Raises:
      ValueError: a config that does not fit the mesh or its models.
    """
    tasks = {"rl": _reinforced, "distill": _distilled, "sft": _supervised, "judge": _supervised, "evaluate": _evaluated}
    tasks |= {"calibrate": _calibrated, "annotate": _annotated, "label": _labelled}
    config = planned_sizes(config, mesh)
    check_layout(config, mesh.shape[DATA])
    calls, resident = tasks[config.task](config, mesh), residents(config, mesh)

    def with_residents(call: Call) -> Call:
        own = owners_of(call)
        others = {owner: size for owner, size in resident.items() if owner not in own}
        return dataclasses.replace(call, beside=others | call.beside)

    return [with_residents(call) for call in calls]


def planned_sizes(config: Planned, mesh: Mesh | AbstractMesh) -> Planned:
    """The config with the sizes that a run would choose for prompts at their full budget and with memory to spare.

    Raises:
      ValueError: only the data say; a plan reads none.
    """
    if not isinstance(config, TRAINING) or all(sizes_of(config)):
        return config
    if isinstance(config, Supervised):
        raise ValueError(
            "config.row_tokens, config.microbatch: got 0, which a run chooses from its data; a plan reads none: give "
            "numbers"
        )
    rollout, longest = config.rollout, config.data.max_prompt_tokens + config.rollout.max_tokens
    lengths = Lengths(longest, longest, rollout.prompts // config.updates.per_batch * rollout.group)
    platform = mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else jax.default_backend()
    return choose_sizes(config, lengths, known_model(config.policy).arch, mesh.shape[DATA], None, platform)


def _reinforced(config: Config, mesh: Mesh) -> list[Call]:
    policy, rule = trained_policy(config, mesh), segment_rule(config)
    programs, shape, updates = build(config, mesh, policy.model), packed_shape(config), config.updates.per_batch
    calls = [*start_calls(policy, programs), *sampling_calls(config, mesh, policy.acting)]
    if config.has_local_judge:
        calls += judging_calls(config, mesh, rule.max_segments)
    experience = experience_shapes(mesh, shape)
    # A step's updates are packed together, and lie there until their turn comes.
    waiting = {BATCH: (updates - 1) * tree_bytes(experience)}
    scored = [("token_logp", policy.acting)] if updates > 1 else []
    if "likelihood" in config.routes.all:
        scored.append(("token_logp (answers)", policy.acting))
    if config.loss.kl_coef > 0:
        scored.append(("token_logp (reference)", frozen_parameters(config, mesh, config.reference)))
    for name, params in scored:
        arguments = params, (BATCH, experience.packed), (BATCH, experience.used)
        cost = reading_cost(policy, params[1], shape)
        calls.append(
            Call(name, "logp", programs.token_logp, arguments, updates, cost, TRAINING_KEYS, shape[0], beside=waiting)
        )
    learn = update_call(policy, programs.train_step, "train_step", shape, [(BATCH, experience)])
    return [*calls, dataclasses.replace(learn, times=updates, beside=waiting)]


def _distilled(config: Config, mesh: Mesh) -> list[Call]:
    policy, shape = trained_policy(config, mesh), packed_shape(config)
    programs, teaching = build(config, mesh, policy.model), build_teacher(config, mesh, policy.model)
    teacher, experience = frozen_parameters(config, mesh, config.reference), experience_shapes(mesh, shape)
    shown = BATCH, Teaching(experience.packed, experience.packed.tokens_BT)
    calls = [*start_calls(policy, programs), *sampling_calls(config, mesh, policy.acting)]
    if config.distillation.kl == "full":
        arguments = [teacher, shown, (BATCH, experience)]
        learn = update_call(policy, teaching.distill_step, "distill_step", shape, arguments, teacher=teacher[1])
        return [*calls, learn]
    arguments = policy.acting, teacher, shown, (BATCH, experience)
    cost = reading_cost(policy, teacher[1], shape) + reading_cost(policy, policy.acting[1], shape)
    signal = Call("teacher_signal", "train", teaching.signal, arguments, 1, cost, TRAINING_KEYS, shape[0])
    learn = update_call(policy, programs.train_step, "train_step", shape, [(BATCH, experience)])
    return [*calls, signal, dataclasses.replace(learn, beside={BATCH: tree_bytes(shown[1])})]


def _supervised(config: Supervised, mesh: Mesh) -> list[Call]:
    policy, shape = trained_policy(config, mesh), packed_shape(config)
    programs = build_sft(config, mesh, policy.model, SFT_UPDATES)
    lesson = Lesson(*packed_shapes(mesh, shape), used=array(mesh, jnp.int32))
    learn = update_call(policy, programs.sft_step, "sft_step", shape, [(BATCH, lesson)])
    model = "judge.model" if isinstance(config, JudgeTraining) else "policy"
    settings = tuple(f"{model}{key}" if key.startswith(".") else key for key in _SUPERVISING)
    calls = [*start_calls(policy, programs), dataclasses.replace(learn, settings=settings)]
    if config.validation.every:
        # How many batches are held back, only the data says.
        arguments = (POLICY, policy.state.params), policy.base, (BATCH, lesson)
        cost = reading_cost(policy, policy.acting[1], shape)
        calls.append(Call("validate", "validate", programs.validate, arguments, 1, cost, settings, shape[0]))
    return calls


def _evaluated(config: Evaluate, mesh: Mesh) -> list[Call]:
    """A step is a wave.  Whether a judge is needed too, for open-ended answers, only the data says."""
    acting = POLICY, parameter_shapes(known_model(config.policy), mesh)
    return sampling_calls(config, mesh, acting)


def _calibrated(config: Calibrate, mesh: Mesh) -> list[Call]:
    """A step is a wave of each pass."""
    calls = []
    for name, judge in config.judges.items():
        if judge.backend == "local":
            calls += _calibrating(config, mesh, name, judge)
    if continues(config):
        model, sampling = known_model(config.policy), config.prefixes.sampling
        # A prefix is of a rollout, which is taken to be as long as what is written after it may be.
        most = min(config.data.max_prompt_tokens + sampling.max_tokens, model.arch.max_positions - sampling.max_tokens)
        settings = tuple(f"prefixes.sampling.{key}" for key in ("wave", "slots", "group", "max_tokens"))
        given = model, sampling.wave, sampling.group, most, sampling.max_tokens
        acting = POLICY, parameter_shapes(model, mesh)
        calls += completion_calls(mesh, acting, *given, "continuations", (*settings, "mesh.model"), sampling.slots)
    return calls


def _calibrating(config: Calibrate, mesh: Mesh, name: str, judge: Judge) -> list[Call]:
    """What a judge is asked with: a problem's reference before its traces; after each of them; some traces several
    times."""
    model, answer = known_model(judge.model), judge.max_tokens if judge.readout == "text" else 0
    check_judge_lengths(judge, model.arch)
    built, params = build_judge(judge, mesh, model), (f"judge {name}", parameter_shapes(model, mesh))
    settings = *("wave", "group"), *(f"judges.{name}.max_{what}_tokens" for what in ("trace", "context")), "mesh.model"
    units: set[Unit] = {"outcome", "prefix"} if config.prefixes.rollouts else {"outcome"}
    behind = {"": judge_suffix(judge, model, units)}
    if config.reference_last:
        behind[", reference last"] = judge.max_context_tokens
    calls = []
    for order, suffix in behind.items():
        width = padded_width(judge.max_trace_tokens + suffix)
        rows = RowShapes(config.wave, config.group, padded_width(judge.max_context_tokens), width, answer)
        programs = {f"judge_prefill ({name}{order})": built.prefill, f"judge ({name}{order})": built.judge}
        calls += row_calls(model, mesh, params, rows, programs, "judge", (1, 1), settings)
    if config.repeats.rollouts and answer:
        most = judge.max_context_tokens + judge.max_trace_tokens
        given = model, config.wave, config.repeats.count, most, answer
        calls += completion_calls(mesh, params, *given, f"{name}, repeats", ("repeats.count", *settings))
    return calls


def _labelled(config: Labelling, mesh: Mesh) -> list[Call]:
    """A step is a wave; how often its rows are asked about depends on how rollouts are cut."""
    judge = config.judge
    if judge.backend != "local":
        return []
    model, answer = known_model(judge.model), judge.max_tokens if judge.readout == "text" else 0
    check_judge_lengths(judge, model.arch)
    built, params = build_judge(judge, mesh, model), ("judge", parameter_shapes(model, mesh))
    width = padded_width(judge.max_trace_tokens + judge_suffix(judge, model, {config.unit}))
    rows = RowShapes(config.wave, config.group, padded_width(judge.max_context_tokens), width, answer)
    programs = {"judge_prefill": built.prefill, "judge": built.judge}
    settings = "wave", "group", "judge.max_trace_tokens", "judge.max_context_tokens", "mesh.model"
    times = 1, 1 if config.unit == "outcome" else config.segments.max_segments
    return row_calls(model, mesh, params, rows, programs, "judge", times, settings)


def _annotated(config: Annotate, mesh: Mesh) -> list[Call]:
    """A step is a wave."""
    budget = config.annotator
    if budget.backend != "local":
        return []
    model = known_model(budget.model)
    check_judge_lengths(budget, model.arch)
    most = budget.max_context_tokens + budget.max_trace_tokens
    params = "annotator", parameter_shapes(model, mesh)
    return completion_calls(mesh, params, model, config.wave, 1, most, budget.max_tokens, "annotator", _ANNOTATING)
