"""The compiled programs of a config, with the arguments that a run gives them and how often a step calls each.

Arguments are shapes with shardings: nothing is allocated and no weights are needed.  Widths that a run measures from its
data stand at the config's budgets; a judge's rows are a little wider than that, by its closing instruction.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from exprl_jax.config import Config, Evaluate, Model, Rollout, Sampling, Sft
from exprl_jax.data.tokenizer import load_tokenizer
from exprl_jax.layout import check_layout, check_lengths, packed_shape
from exprl_jax.mesh import (
    DATA,
    MODEL,
    Placement,
    bytes_per_device,
    microbatches_sharding,
    replicated,
    rows_sharding,
    shard_parameters,
)
from exprl_jax.model.decoder import Transformer
from exprl_jax.model.lora import Adapted, adapt
from exprl_jax.model.paged import open_pages
from exprl_jax.plan.kernels import KERNELS, Kernel, paged
from exprl_jax.programs import (
    Programs,
    abstract_state,
    build,
    build_judge,
    build_sampler,
    build_sft,
    build_teacher,
    shard_state,
)
from exprl_jax.records import Context, Draw, Experience, Lesson, Packed, Rows, Teaching, TrainState
from exprl_jax.reward.judges import check_judge_lengths
from exprl_jax.reward.segments import segment_rule
from exprl_jax.rollout.call import padded_width
from exprl_jax.weights.language_model import PUBLISHED, LanguageModel, open_model

Run = Config | Sft | Evaluate
POLICY, ADAM, BATCH, KEYS = "policy", "Adam", "batch", "KV"
_SAMPLING = ("rollout.wave", "mesh.model", "policy.execution.kv_dtype")
_JUDGING = ("rollout.wave", "judge.max_context_tokens", "judge.max_trace_tokens", "judge.max_tokens", "mesh.model")
_TRAINING = ("updates.microbatch", "updates.row_tokens", "updates.logp_chunk", "policy.execution.remat", "mesh.model")
# An SFT run counts its updates from its data; here they are a constant of the learning rate's schedule, nothing more.
_SFT_UPDATES = 100


@dataclasses.dataclass(frozen=True)
class Result:
    """An argument that another program of the run computes, and lays out as it likes.

    Attributes:
      name: of that program's call.
    """

    name: str


@dataclasses.dataclass(frozen=True)
class Call:
    """One compiled program of a run.

    Attributes:
      name: of the program; with the model in brackets where it is compiled for several.
      phase: of a step, as the metrics name it; `start` for what runs once.
      program: the jitted function.
      arguments: trees of `jax.ShapeDtypeStruct` with shardings, or a `Result`, each with its owner; a `TrainState` is
        the policy's and Adam's, whatever owner stands there.
      inside: bytes a device of what the program allocates for an owner too, by owner.
      beside: bytes a device that lie there meanwhile and are no argument, by owner.
      steps: trips, at most, of the loop whose end depends on values; 0 where there is none.
      kernels: what the Pallas kernels in it cost, by a pattern of their names.
      each_step: calls in one step, at most.
      settings: config keys that make it smaller, those that help most first.
    """

    name: str
    phase: str
    program: Callable
    arguments: tuple[tuple[str, Any], ...]
    inside: Mapping[str, int]
    beside: Mapping[str, int]
    steps: int
    kernels: Mapping[str, Kernel]
    each_step: int
    settings: tuple[str, ...]


def programs_of(config: Run, mesh: Mesh) -> list[Call]:
    """Every program of a run, in the order in which it first calls them.

    Raises:
      ValueError: another task, or a config that does not fit the mesh or its models.
    """
    tasks = {"rl": _reinforced, "distill": _distilled, "sft": _supervised, "evaluate": _evaluated}
    if config.task not in tasks:
        raise ValueError(
            f"compile_check: got config.task = {config.task!r}, expected one of {', '.join(map(repr, tasks))}"
        )
    return tasks[config.task](config, mesh, _caller(residents(config, mesh)))


def _caller(held: Mapping[str, int]) -> Callable[..., Call]:
    """Makes calls of a run that holds so many bytes by owner."""

    def call(
        name, phase, program, arguments, *, each_step, settings, inside=None, beside=None, steps=0, attended=(0, 0)
    ):
        passed = {
            each for owner, tree in arguments if not isinstance(tree, Result) for each in owned_bytes(owner, tree)
        }
        made = {POLICY, ADAM} if phase == "start" else set()
        others = {owner: size for owner, size in held.items() if owner not in passed | made}
        kernels = KERNELS | {"ragged_paged_attention": paged(*attended)}
        return Call(
            name, phase, program, arguments, inside or {}, others | (beside or {}), steps, kernels, each_step, settings
        )

    return call


def _reinforced(config: Config, mesh: Mesh, call: Callable[..., Call]) -> list[Call]:
    updates, shape = config.updates.per_batch, packed_shape(config)
    programs, acting, base, state = _trained(config, mesh)
    calls = _begun(config, mesh, call, programs, acting)
    if config.has_local_judge:
        calls += _judging(config, mesh, call)

    experience = _experience(mesh, shape)
    # A step's updates lie ready together.
    waiting = {BATCH: (updates - 1) * tree_bytes(experience)}
    asked = tuple((BATCH, x) for x in (experience.packed, experience.used))
    scored = [("token_logp", *acting)] if updates > 1 else []
    if config.loss.kl_coef > 0:
        reference = _parameters(known_model(config.reference), mesh)
        scored.append(("token_logp (reference)", frozen_models(config)[config.reference], reference))
    calls += [
        call(
            name,
            "logp",
            programs.token_logp,
            ((owner, params), *asked),
            each_step=updates,
            settings=_TRAINING,
            beside=waiting,
            steps=shape[0],
        )
        for name, owner, params in scored
    ]
    train = call(
        "train_step",
        "train",
        programs.train_step,
        ((POLICY, state), base, (BATCH, experience)),
        each_step=updates,
        settings=_TRAINING,
        beside=waiting,
        steps=shape[0],
    )
    return [*calls, train]


def _distilled(config: Config, mesh: Mesh, call: Callable[..., Call]) -> list[Call]:
    shape = packed_shape(config)
    programs, acting, base, state = _trained(config, mesh)
    teaching = build_teacher(config, mesh, known_model(config.policy))
    teacher = frozen_models(config)[config.reference], _parameters(known_model(config.reference), mesh)
    experience = _experience(mesh, shape)
    shown = Teaching(experience.packed, experience.packed.tokens_BT)
    batch, how = ((BATCH, shown), (BATCH, experience)), dict(each_step=1, settings=_TRAINING, steps=shape[0])
    if config.distillation.kl == "full":
        arguments = (POLICY, state), base, teacher, *batch
        learning = [call("distill_step", "train", teaching.distill_step, arguments, **how)]
    else:
        arguments = (POLICY, state), base, batch[1]
        learning = [
            call("teacher_signal", "train", teaching.signal, (acting, teacher, *batch), **how),
            call("train_step", "train", programs.train_step, arguments, beside={BATCH: tree_bytes(shown)}, **how),
        ]
    return _begun(config, mesh, call, programs, acting) + learning


def _supervised(config: Sft, mesh: Mesh, call: Callable[..., Call]) -> list[Call]:
    check_layout(config, mesh.shape[DATA])
    policy, state = known_model(config.policy), _state(config, mesh)
    programs = build_sft(config, mesh, policy, _SFT_UPDATES)
    shape = packed_shape(config)
    packed, mask, _ = _slots(mesh, shape)
    lesson, weights = Lesson(packed, mask, used=_array(mesh, np.int32)), _parameters(policy, mesh)
    base = (frozen_models(config)[config.policy], weights) if config.lora.rank else (POLICY, ())
    settings = ("microbatch", "row_tokens", "logp_chunk", "policy.execution.remat", "mesh.model")
    return [
        call(
            "init_state",
            "start",
            programs.init_state,
            (("weights", weights),),
            each_step=0,
            settings=("mesh.data", "mesh.model"),
        ),
        call(
            "sft_step",
            "train",
            programs.sft_step,
            ((POLICY, state), base, (BATCH, lesson)),
            each_step=1,
            settings=settings,
            steps=shape[0],
        ),
    ]


def _trained(config: Config, mesh: Mesh) -> tuple[Programs, tuple[str, Any], tuple[str, Any], TrainState]:
    """(programs, what samples, what adapters stand on, the state), arguments with their owners.

    Raises:
      ValueError: the config does not fit the mesh or its models.
    """
    check_layout(config, mesh.shape[DATA])
    policy = known_model(config.policy)
    check_lengths(config, policy.arch)
    state = _state(config, mesh)
    base = (frozen_models(config)[config.policy], _parameters(policy, mesh)) if config.lora.rank else (POLICY, ())
    return build(config, mesh, policy), (base[0], adapt(config.lora, base[1], state.params)), base, state


def _begun(
    config: Config, mesh: Mesh, call: Callable[..., Call], programs: Programs, acting: tuple[str, Any]
) -> list[Call]:
    """The state's beginning, and the rollouts."""
    weights, waves = _parameters(known_model(config.policy), mesh), config.rollout.prompts // config.rollout.wave
    start = call(
        "init_state",
        "start",
        programs.init_state,
        (("weights", weights),),
        each_step=0,
        settings=("mesh.data", "mesh.model"),
    )
    return [start, *_sampling(config, config.rollout, mesh, call, acting, waves, _SAMPLING)]


def _evaluated(config: Evaluate, mesh: Mesh, call: Callable[..., Call]) -> list[Call]:
    """A step is a wave.  Whether a judge is needed too, for open-ended answers, only the data says."""
    check_layout(config, mesh.shape[DATA])
    acting = POLICY, _parameters(known_model(config.policy), mesh)
    settings = ("sampling.wave", "sampling.group", "mesh.model", "policy.execution.kv_dtype")
    return _sampling(config, config.sampling, mesh, call, acting, 1, settings)


def _sampling(
    config: Config | Evaluate,
    how: Rollout | Sampling,
    mesh: Mesh,
    call: Callable[..., Call],
    acting: tuple[str, Any],
    waves: int,
    settings: tuple[str, ...],
) -> list[Call]:
    policy, wave, group, answer = known_model(config.policy), how.wave, how.group, how.max_tokens
    prompt = padded_width(config.data.max_prompt_tokens - 1)
    prompts = _context(mesh, wave, prompt)
    sampler = build_sampler(policy, mesh, max_tokens=answer, wave=wave)
    prefix = jax.eval_shape(sampler.prefill, acting[1], prompts)
    return [
        call("prefill", "sample", sampler.prefill, (acting, (BATCH, prompts)), each_step=waves, settings=settings),
        call(
            "sample",
            "sample",
            sampler.sample,
            (
                acting,
                (KEYS, Result("prefill")),
                (BATCH, _rows(mesh, wave, group, 1)),
                (BATCH, _draw(mesh, wave, group)),
            ),
            # Over a response a row attends to half of it on average.
            each_step=waves,
            settings=settings,
            steps=answer,
            attended=(0, prompt + answer / 2),
            inside={KEYS: _pool_bytes(policy, mesh, prefix, group, answer)},
        ),
    ]


def _judging(config: Config, mesh: Mesh, call: Callable[..., Call]) -> list[Call]:
    how, role = config.judge, frozen_models(config)[config.judge.model]
    judge, wave, group = known_model(how.model), config.rollout.wave, config.rollout.group
    check_judge_lengths(how, judge.arch)
    asking, params, waves = build_judge(how, mesh, judge), _parameters(judge, mesh), config.rollout.prompts // wave
    context, trace = _context(mesh, wave, padded_width(how.max_context_tokens)), padded_width(how.max_trace_tokens)
    writes = how.readout == "text"
    queries = (BATCH, _rows(mesh, wave, group, trace)), *([(BATCH, _draw(mesh, wave, group))] if writes else [])
    slots, seen = trace - 1 + how.max_tokens if writes else trace, context.tokens_PC.shape[1]
    prefix = jax.eval_shape(asking.prefill, params, context)
    return [
        call(
            "judge_prefill",
            "judge",
            asking.prefill,
            ((role, params), (BATCH, context)),
            each_step=waves,
            settings=_JUDGING,
        ),
        call(
            "judge",
            "judge",
            asking.judge,
            ((role, params), (KEYS, Result("judge_prefill")), *queries),
            # A rollout has at most so many prefixes to score, and a call takes one of each rollout.
            each_step=waves * segment_rule(config).max_segments,
            settings=_JUDGING,
            steps=how.max_tokens if writes else 0,
            attended=(seen + trace / 2, seen + trace + how.max_tokens / 2),
            inside={KEYS: _pool_bytes(judge, mesh, prefix, group, slots)} if writes else {},
        ),
    ]


def known_model(how: Model) -> LanguageModel:
    """A model as the programs see it.  Of a published one the tokenizer is not at hand without a network; the byte
    tokenizer's ids of end, padding and digits stand for its own: they are constants in the programs, nothing more."""
    if how.weights in PUBLISHED:
        return LanguageModel(how, PUBLISHED[how.weights], load_tokenizer("byte"), None)
    return open_model(how)


def frozen_models(config: Config | Sft) -> dict[Model, str]:
    """The models that a training run holds beside the policy, and what they serve as; equal models are one copy."""
    roles: dict[Model, list[str]] = {}
    if config.task != "sft" and config.has_reference_model:
        roles.setdefault(config.reference, []).append("teacher" if config.task == "distill" else "reference")
    if config.task != "sft" and config.has_local_judge:
        roles.setdefault(config.judge.model, []).append("judge")
    if config.lora.rank:
        roles.setdefault(config.policy, []).append("base")
    return {model: "frozen " + " + ".join(names) for model, names in roles.items()}


def residents(config: Run, mesh: Mesh) -> dict[str, int]:
    """Bytes a device that a run holds throughout a step, by owner."""
    if config.task == "evaluate":
        return {POLICY: tree_bytes(_parameters(known_model(config.policy), mesh))}
    state = _state(config, mesh)
    frozen = {role: tree_bytes(_parameters(known_model(how), mesh)) for how, role in frozen_models(config).items()}
    return owned_bytes(POLICY, state) | frozen


def owned_bytes(owner: str, tree: Any) -> dict[str, int]:
    """Bytes a device of an argument, by owner; a state is the policy's and Adam's, and adapters are the policy's, whatever
    owner stands there."""
    if isinstance(tree, TrainState):
        return {POLICY: tree_bytes(tree.params), ADAM: tree_bytes(tree) - tree_bytes(tree.params)}
    if isinstance(tree, Adapted):
        return {POLICY: tree_bytes(tree.adapters), owner: tree_bytes(tree.base)}
    return {owner: tree_bytes(tree)}


def tree_bytes(tree: Any) -> int:
    """Bytes a device of a tree of shapes with shardings."""
    leaves = jax.tree.leaves(tree)
    return bytes_per_device(leaves, [leaf.sharding for leaf in leaves])


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, shardings)


def _parameters(model: LanguageModel, mesh: Mesh) -> Any:
    abstract = Transformer(model.arch, model.execution).abstract_params(model.config.param_dtype)
    return _placed(abstract, shard_parameters(abstract, model.arch, model.execution, mesh))


def _state(config: Config | Sft, mesh: Mesh) -> TrainState:
    policy = known_model(config.policy)
    if config.task == "sft":
        programs = build_sft(config, mesh, policy, _SFT_UPDATES)
        return _placed(programs.abstract, programs.shardings)
    return _placed(abstract_state(config, policy.arch), shard_state(config, mesh, policy))


def _array(mesh: Mesh, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    """A batch array, as `mesh.put_rows` places it."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=rows_sharding(mesh) if shape else replicated(mesh))


def _context(mesh: Mesh, problems: int, width: int) -> Context:
    return Context(_array(mesh, np.int32, problems, width), _array(mesh, np.int32, problems))


def _rows(mesh: Mesh, problems: int, group: int, width: int) -> Rows:
    return Rows(_array(mesh, np.int32, problems, group, width), _array(mesh, np.int32, problems, group))


def _draw(mesh: Mesh, problems: int, group: int) -> Draw:
    return Draw(
        seed=_array(mesh, np.uint32),
        step=_array(mesh, np.int32),
        problem_P=_array(mesh, np.uint32, problems),
        temperature_PG=_array(mesh, np.float32, problems, group),
        live_PG=_array(mesh, np.bool_, problems, group),
    )


def _experience(mesh: Mesh, shape: tuple[int, int, int]) -> Experience:
    packed, mask, number = _slots(mesh, shape)
    return Experience(packed, mask, number, number, number, number, number, used=_array(mesh, np.int32))


def _slots(mesh: Mesh, shape: tuple[int, int, int]) -> tuple[Packed, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Packed rows of an update's batch [M, B, T], a mask and a number of each slot, as `mesh.put_microbatches` places them."""
    token, mask, number = (
        jax.ShapeDtypeStruct(shape, kind, sharding=microbatches_sharding(mesh))
        for kind in (np.int32, np.bool_, np.float32)
    )
    return Packed(token, token, token, token, token), mask, number


def _pool_bytes(model: LanguageModel, mesh: Mesh, prefix: Any, group: int, slots: int) -> int:
    """Of the pages from which rows are decoded: problems over `data`, heads over `model` where they divide."""
    start_PG = jax.ShapeDtypeStruct((*prefix.length_P.shape, group), np.int32)

    def opened(prefix, start_PG):
        return open_pages(model.arch, model.execution, Placement(mesh), prefix, start_PG, slots).pool

    pool = jax.eval_shape(opened, prefix, start_PG)
    heads = mesh.shape[MODEL] if model.arch.kv_heads % mesh.shape[MODEL] == 0 else 1
    return pool.size * pool.dtype.itemsize // mesh.shape[DATA] // heads
