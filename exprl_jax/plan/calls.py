"""What a run calls: its compiled programs, the shapes and shardings it gives them, and how often a step calls each.

The one description that `--dry_run` adds up and `compile_check` compiles.  Arguments are shapes with shardings: nothing
is allocated, no weights are needed, and the mesh may be abstract.  Widths that a run measures from its data stand at
the config's budgets.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from exprl_jax.config import (
    Annotate,
    AnyConfig,
    Asking,
    Calibrate,
    Config,
    Evaluate,
    Judge,
    JudgeTraining,
    Labelling,
    Model,
    Supervised,
)
from exprl_jax.data.problems import Problem
from exprl_jax.data.tokenizer import load_tokenizer
from exprl_jax.kinds import KINDS
from exprl_jax.layout import check_layout, check_lengths, packed_shape
from exprl_jax.mesh import DATA, MODEL, bytes_per_device, laid_out, microbatches_sharding, replicated, rows_sharding
from exprl_jax.model.lora import Adapted, adapt
from exprl_jax.model.paged import PagedCache
from exprl_jax.plan.costs import Cost, forward, seen_pairs, update
from exprl_jax.programs import (
    Programs,
    SftPrograms,
    abstract_state,
    build,
    build_judge,
    build_sampler,
    build_sft,
    build_teacher,
    shard_state,
)
from exprl_jax.records import BranchRows, Context, Draw, Experience, Lesson, Packed, Rows, Teaching, TrainState
from exprl_jax.reward.branching import branch_tokens
from exprl_jax.reward.checklists import ChecklistPrompts
from exprl_jax.reward.judge import score_prompt, verify_prompt
from exprl_jax.reward.judge_prompts import Unit
from exprl_jax.reward.judges import check_judge_lengths
from exprl_jax.reward.routes import ROUTES
from exprl_jax.reward.segments import segment_rule
from exprl_jax.rollout.call import padded_width
from exprl_jax.rollout.sampler import CHUNK, open_slots
from exprl_jax.sizes import TRAINING, Lengths, choose_sizes, sizes_of
from exprl_jax.weights.language_model import PUBLISHED, LanguageModel, open_model

Planned = AnyConfig
POLICY, ADAM, BATCH, KEYS, COPY, GRADIENT = "policy", "Adam", "batch", "KV", "working copy", "gradient"
_STARTING = ("mesh.data", "mesh.model")
_SAMPLING = ("rollout.wave", "rollout.slots", "rollout.expected_tokens", "mesh.model", "policy.execution.kv_dtype")
_EVALUATING = ("sampling.wave", "sampling.group", "mesh.model", "policy.execution.kv_dtype")
_JUDGING = ("rollout.wave", "judge.max_context_tokens", "judge.max_trace_tokens", "judge.max_tokens", "mesh.model")
_TRAINING = ("updates.microbatch", "updates.row_tokens", "updates.logp_chunk", "policy.execution.remat", "mesh.model")
# A key that begins with a point is of the model that is trained.
_SUPERVISING = ("microbatch", "row_tokens", "logp_chunk", ".execution.remat", "mesh.model")
_ANNOTATING = (
    *("wave", "annotator.max_trace_tokens", "annotator.max_context_tokens", "annotator.max_tokens"),
    *("mesh.model", "annotator.model.execution.kv_dtype"),
)
# An SFT run counts its updates from its data; here they are a constant of the learning rate's schedule, nothing more.
_SFT_UPDATES = 100


class Result(NamedTuple):
    """An argument that another program of the run computes, and that the compiler lays out as it likes.

    Attributes:
      name: of that program's call.
      bytes: a device's, divided as keys and values can be.
    """

    name: str
    bytes: int


@dataclasses.dataclass(frozen=True)
class Call:
    """One compiled program of a run.

    Attributes:
      name: of the program; with the model in brackets where it is compiled for several.
      phase: of a step, as the metrics name it; `start` for what runs once.
      program: the jitted function.
      arguments: (owner, tree of `jax.ShapeDtypeStruct` with shardings, or a `Result`) of each; a `TrainState` is the
        policy's and Adam's, whatever owner stands there.
      times: calls in one step, at most.
      cost: of one call, for rollouts, traces and judgements that reach their budgets.
      settings: config keys that make it smaller, those that help most first.
      steps: trips, at most, of the loop whose end depends on values; 0 where there is none.
      inside: bytes a device that the program is known to allocate beside its arguments, by owner.
      beside: bytes a device that lie there meanwhile and are no argument, by owner.
    """

    name: str
    phase: str
    program: Callable
    arguments: tuple[tuple[str, Any], ...]
    times: int
    cost: Cost
    settings: tuple[str, ...]
    steps: int = 0
    inside: Mapping[str, int] = dataclasses.field(default_factory=dict)
    beside: Mapping[str, int] = dataclasses.field(default_factory=dict)


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


def residents(config: Planned, mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """Bytes a device that a run keeps throughout a step, by owner."""
    if config.task == "evaluate":
        return {POLICY: tree_bytes(_parameters(known_model(config.policy), mesh))}
    if isinstance(config, Asking):  # one model after another is loaded, asked and let go
        return {}
    frozen = {role: tree_bytes(_parameters(known_model(m), mesh)) for m, role in frozen_models(config).items()}
    return owned_bytes(POLICY, _state(config, mesh)) | frozen


def frozen_models(config: Config | Supervised) -> dict[Model, str]:
    """The models that a training run keeps beside the policy, and what they serve as; equal models are one copy.
    Whether open-ended science in the data has a judge besides, only the data says."""
    roles: dict[Model, list[str]] = {}
    if not isinstance(config, Supervised) and config.has_reference_model:
        roles.setdefault(config.reference, []).append("teacher" if config.task == "distill" else "reference")
    if not isinstance(config, Supervised) and config.has_local_judge:
        roles.setdefault(config.judge.model, []).append("judge")
    if config.lora.rank:
        roles.setdefault(config.policy, []).append("base")
    return {model: "frozen " + " + ".join(names) for model, names in roles.items()}


@functools.cache
def known_model(model: Model) -> LanguageModel:
    """A model as the programs see it.  Of a published one the tokenizer is not at hand without a network; the byte
    tokenizer's ids of end, padding and digits stand for its own: they are constants in the programs, nothing more."""
    if model.weights in PUBLISHED:
        return LanguageModel(model, PUBLISHED[model.weights], load_tokenizer("byte"), None)
    return open_model(model)


def owned_bytes(owner: str, tree: Any) -> dict[str, int]:
    """Bytes a device of an argument, by owner; a state is the policy's and Adam's, and adapters are the policy's,
    whatever owner stands there."""
    if isinstance(tree, Result):
        return {owner: tree.bytes}
    if isinstance(tree, TrainState):
        return {POLICY: tree_bytes(tree.params), ADAM: tree_bytes(tree) - tree_bytes(tree.params)}
    if isinstance(tree, Adapted):
        return {POLICY: tree_bytes(tree.adapters), owner: tree_bytes(tree.base)}
    return {owner: tree_bytes(tree)}


def owners_of(call: Call, results: Mapping[str, Any] = types.MappingProxyType({})) -> collections.Counter[str]:
    """Bytes a device of what a call is given and allocates, by owner.

    Args:
      results: of other programs, by name, as far as the compiler has laid them out.
    """
    owners = collections.Counter(call.inside)
    for owner, tree in call.arguments:
        owners.update(owned_bytes(owner, results.get(tree.name, tree) if isinstance(tree, Result) else tree))
    return owners


def tree_bytes(tree: Any) -> int:
    """Bytes a device of a tree of shapes with shardings."""
    leaves = jax.tree.leaves(tree)
    return bytes_per_device(leaves, [leaf.sharding for leaf in leaves])


# ---------------------------------------------------------------------------------------------------------- the tasks


def _reinforced(config: Config, mesh: Mesh) -> list[Call]:
    policy, rule = _policy(config, mesh), segment_rule(config)
    programs, shape, updates = build(config, mesh, policy.model), packed_shape(config), config.updates.per_batch
    calls = [*_start(policy, programs), *_sampling(config, mesh, policy.acting)]
    if config.has_local_judge:
        calls += _judging(config, mesh, rule.max_segments)
    experience = _experience(mesh, shape)
    # A step's updates are packed together, and lie there until their turn comes.
    waiting = {BATCH: (updates - 1) * tree_bytes(experience)}
    scored = [("token_logp", policy.acting)] if updates > 1 else []
    if "likelihood" in config.routes.all:
        scored.append(("token_logp (answers)", policy.acting))
    if config.loss.kl_coef > 0:
        scored.append(("token_logp (reference)", _frozen(config, mesh, config.reference)))
    for name, params in scored:
        arguments = params, (BATCH, experience.packed), (BATCH, experience.used)
        cost = _reading(policy, params[1], shape)
        calls.append(
            Call(name, "logp", programs.token_logp, arguments, updates, cost, _TRAINING, shape[0], beside=waiting)
        )
    learn = _update(policy, programs.train_step, "train_step", shape, [(BATCH, experience)])
    return [*calls, dataclasses.replace(learn, times=updates, beside=waiting)]


def _distilled(config: Config, mesh: Mesh) -> list[Call]:
    policy, shape = _policy(config, mesh), packed_shape(config)
    programs, teaching = build(config, mesh, policy.model), build_teacher(config, mesh, policy.model)
    teacher, experience = _frozen(config, mesh, config.reference), _experience(mesh, shape)
    shown = BATCH, Teaching(experience.packed, experience.packed.tokens_BT)
    calls = [*_start(policy, programs), *_sampling(config, mesh, policy.acting)]
    if config.distillation.kl == "full":
        arguments = [teacher, shown, (BATCH, experience)]
        return [*calls, _update(policy, teaching.distill_step, "distill_step", shape, arguments, teacher=teacher[1])]
    arguments = policy.acting, teacher, shown, (BATCH, experience)
    cost = _reading(policy, teacher[1], shape) + _reading(policy, policy.acting[1], shape)
    signal = Call("teacher_signal", "train", teaching.signal, arguments, 1, cost, _TRAINING, shape[0])
    learn = _update(policy, programs.train_step, "train_step", shape, [(BATCH, experience)])
    return [*calls, signal, dataclasses.replace(learn, beside={BATCH: tree_bytes(shown[1])})]


def _supervised(config: Supervised, mesh: Mesh) -> list[Call]:
    policy, shape = _policy(config, mesh), packed_shape(config)
    programs = build_sft(config, mesh, policy.model, _SFT_UPDATES)
    lesson = Lesson(*_slots(mesh, shape), used=_array(mesh, jnp.int32))
    learn = _update(policy, programs.sft_step, "sft_step", shape, [(BATCH, lesson)])
    model = "judge.model" if isinstance(config, JudgeTraining) else "policy"
    settings = tuple(f"{model}{key}" if key.startswith(".") else key for key in _SUPERVISING)
    calls = [*_start(policy, programs), dataclasses.replace(learn, settings=settings)]
    if config.validation.every:
        # How many batches are held back, only the data says.
        arguments = (POLICY, policy.state.params), policy.base, (BATCH, lesson)
        cost = _reading(policy, policy.acting[1], shape)
        calls.append(Call("validate", "validate", programs.validate, arguments, 1, cost, settings, shape[0]))
    return calls


def _evaluated(config: Evaluate, mesh: Mesh) -> list[Call]:
    """A step is a wave.  Whether a judge is needed too, for open-ended answers, only the data says."""
    acting = POLICY, _parameters(known_model(config.policy), mesh)
    return _sampling(config, mesh, acting)


def asked_models(config: Asking) -> dict[str, Model]:
    """The models that are asked on the mesh, by what they serve as."""
    if isinstance(config, Labelling):
        return {"judge": config.judge.model} if config.judge.backend == "local" else {}
    if isinstance(config, Annotate):
        return {"annotator": config.annotator.model} if config.annotator.backend == "local" else {}
    judges = {f"judge {name}": judge.model for name, judge in config.judges.items() if judge.backend == "local"}
    return judges | ({POLICY: config.policy} if _continues(config) else {})


def _continues(config: Calibrate) -> bool:
    """Whether the policy goes on from prefixes; where they are only judged, its tokenizer is all that is read."""
    return config.prefixes.rollouts > 0 and config.prefixes.continued


def _calibrated(config: Calibrate, mesh: Mesh) -> list[Call]:
    """A step is a wave of each pass."""
    calls = []
    for name, judge in config.judges.items():
        if judge.backend == "local":
            calls += _calibrating(config, mesh, name, judge)
    if _continues(config):
        model, sampling = known_model(config.policy), config.prefixes.sampling
        # A prefix is of a rollout, which is taken to be as long as what is written after it may be.
        most = min(config.data.max_prompt_tokens + sampling.max_tokens, model.arch.max_positions - sampling.max_tokens)
        settings = tuple(f"prefixes.sampling.{key}" for key in ("wave", "group", "max_tokens"))
        given = model, sampling.wave, sampling.group, most, sampling.max_tokens
        acting = POLICY, _parameters(model, mesh)
        calls += _completing(mesh, acting, *given, "continuations", (*settings, "mesh.model"))
    return calls


def _calibrating(config: Calibrate, mesh: Mesh, name: str, judge: Judge) -> list[Call]:
    """What a judge is asked with: a problem's reference before its traces; after each of them; some traces several
    times."""
    model, answer = known_model(judge.model), judge.max_tokens if judge.readout == "text" else 0
    check_judge_lengths(judge, model.arch)
    built, params = build_judge(judge, mesh, model), (f"judge {name}", _parameters(model, mesh))
    settings = *("wave", "group"), *(f"judges.{name}.max_{what}_tokens" for what in ("trace", "context")), "mesh.model"
    units: set[Unit] = {"outcome", "prefix"} if config.prefixes.rollouts else {"outcome"}
    behind = {"": _judge_suffix(judge, model, units)}
    if config.reference_last:
        behind[", reference last"] = judge.max_context_tokens
    calls = []
    for order, suffix in behind.items():
        width = padded_width(judge.max_trace_tokens + suffix)
        rows = _Rows(config.wave, config.group, padded_width(judge.max_context_tokens), width, answer)
        programs = {f"judge_prefill ({name}{order})": built.prefill, f"judge ({name}{order})": built.judge}
        calls += _asking(model, mesh, params, rows, programs, "judge", (1, 1), settings)
    if config.repeats.rollouts and answer:
        most = judge.max_context_tokens + judge.max_trace_tokens
        given = model, config.wave, config.repeats.count, most, answer
        calls += _completing(mesh, params, *given, f"{name}, repeats", ("repeats.count", *settings))
    return calls


def _labelled(config: Labelling, mesh: Mesh) -> list[Call]:
    """A step is a wave; how often its rows are asked about depends on how rollouts are cut."""
    judge = config.judge
    if judge.backend != "local":
        return []
    model, answer = known_model(judge.model), judge.max_tokens if judge.readout == "text" else 0
    check_judge_lengths(judge, model.arch)
    built, params = build_judge(judge, mesh, model), ("judge", _parameters(model, mesh))
    width = padded_width(judge.max_trace_tokens + _judge_suffix(judge, model, {config.unit}))
    rows = _Rows(config.wave, config.group, padded_width(judge.max_context_tokens), width, answer)
    programs = {"judge_prefill": built.prefill, "judge": built.judge}
    settings = "wave", "group", "judge.max_trace_tokens", "judge.max_context_tokens", "mesh.model"
    times = 1, 1 if config.unit == "outcome" else config.segments.max_segments
    return _asking(model, mesh, params, rows, programs, "judge", times, settings)


def _annotated(config: Annotate, mesh: Mesh) -> list[Call]:
    """A step is a wave."""
    budget = config.annotator
    if budget.backend != "local":
        return []
    model = known_model(budget.model)
    check_judge_lengths(budget, model.arch)
    most = budget.max_context_tokens + budget.max_trace_tokens
    params = "annotator", _parameters(model, mesh)
    return _completing(mesh, params, model, config.wave, 1, most, budget.max_tokens, "annotator", _ANNOTATING)


def _completing(
    mesh: Mesh,
    params: tuple[str, Any],
    model: LanguageModel,
    wave: int,
    group: int,
    prompt: int,
    answer: int,
    of: str,
    settings: tuple[str, ...],
) -> list[Call]:
    """Programs of `evaluation.completions`: answers to whole prompts of at most so many tokens."""
    sampler = build_sampler(model, mesh, max_tokens=answer, wave=wave)
    rows = _Rows(wave, group, padded_width(prompt - 1), 1, answer)
    programs = {f"prefill ({of})": sampler.prefill, f"sample ({of})": sampler.sample}
    return _asking(model, mesh, params, rows, programs, "sample", (1, 1), settings)


class _Policy(NamedTuple):
    """What a run trains.

    Attributes:
      state: as its programs take it.
      weights: it starts from these; with adapters they are their base, which stays.
      base, acting: arguments with their owners: what adapters stand on, () for none; and what samples.
    """

    model: LanguageModel
    mesh: Mesh
    state: TrainState
    weights: tuple[str, Any]
    base: tuple[str, Any]
    acting: tuple[str, Any]


def _policy(config: Config | Supervised, mesh: Mesh) -> _Policy:
    model = known_model(config.policy)
    if not isinstance(config, Supervised):
        check_lengths(config, model.arch)
    state = _state(config, mesh)
    weights = frozen_models(config).get(config.policy, "weights"), _parameters(model, mesh)
    base = weights if config.lora.rank else (POLICY, ())
    return _Policy(model, mesh, state, weights, base, (base[0], adapt(config.lora, base[1], state.params)))


def _start(policy: _Policy, programs: Programs | SftPrograms) -> list[Call]:
    made = owned_bytes(POLICY, policy.state)
    moved = tree_bytes(policy.weights[1]) + sum(made.values())
    params = POLICY, policy.state.params
    return [
        Call(
            "init_state", "start", programs.init_state, (policy.weights,), 0, Cost(bytes=moved), _STARTING, inside=made
        ),
        Call("all_finite", "start", programs.all_finite, (params,), 0, Cost(bytes=made[POLICY]), _STARTING),
    ]


def _reading(policy: _Policy, params: Any, shape: tuple[int, int, int], logits: bool = True) -> Cost:
    """Of one pass over packed rows, each counted as a single sequence, the most that it can be."""
    (M, B, T), model = shape, policy.model
    tokens, pairs = M * B * T, M * B * seen_pairs(T, T)
    passes = Cost(bytes=M * _weight_bytes(model, policy.mesh))
    return forward(model.arch, params, tokens, pairs, tokens * logits) + passes


def _update(
    policy: _Policy,
    program: Callable,
    name: str,
    shape: tuple[int, int, int],
    arguments: Sequence[tuple[str, Any]],
    teacher: Any = None,
) -> Call:
    """An optimizer update from microbatches.

    Args:
      arguments: after the state and its base.
      teacher: parameters of a model that is asked in it.
    """
    (M, B, T), model, state = shape, policy.model, policy.state
    gradient = tree_bytes(jax.tree.map(lambda x: x.update(dtype=jnp.float32), state.params))
    passes = 2 + (model.execution.remat != "none")
    tokens, pairs = M * B * T, M * B * seen_pairs(T, T)
    cost = update(model.arch, model.execution, policy.acting[1], tokens, pairs, teacher=teacher is not None)
    # The gradient's sum is read and written for each microbatch, and the state once.
    moved = M * (passes * _weight_bytes(model, policy.mesh) + 2 * gradient) + 2 * tree_bytes(state)
    cost += Cost(bytes=moved) + (_reading(policy, teacher, shape, logits=False) if teacher is not None else Cost())
    given = (POLICY, state), policy.base, *arguments
    return Call(name, "train", program, given, 1, cost, _TRAINING, M, inside={GRADIENT: gradient})


# ----------------------------------------------------------------------------------------------- rows on their contexts


class _Rows(NamedTuple):
    """What a sampler or a judge is given.

    Attributes:
      problems, group: contexts, and rows of each.
      context, width: slots of a context, and of a row before its answer.
      answer: tokens that are sampled after them; 0 where a row is only read.
      slots, expected_tokens: as `rollout.sampler.sample` takes them.
    """

    problems: int
    group: int
    context: int
    width: int
    answer: int
    slots: int = 0
    expected_tokens: int = 0

    def turns(self, shards: int) -> int:
        """How often a decode slot is taken, at most: as often as the rows of a shard fill all slots."""
        rows = self.problems * self.group // shards
        return -(-rows // self.slots) if self.slots else 1


def _sampling(config: Config | Evaluate, mesh: Mesh, acting: tuple[str, Any]) -> list[Call]:
    model, evaluates = known_model(config.policy), isinstance(config, Evaluate)
    rollout = config.sampling if evaluates else config.rollout
    waves, settings = (1, _EVALUATING) if evaluates else (rollout.prompts // rollout.wave, _SAMPLING)
    # A prompt's last token is the first of its rows.
    context, queue = padded_width(config.data.max_prompt_tokens - 1), {}
    if not evaluates:
        queue = dict(slots=rollout.slots, expected_tokens=rollout.expected_tokens)
    rows = _Rows(rollout.wave, rollout.group, context, 1, rollout.max_tokens, **queue)
    sampler = build_sampler(model, mesh, max_tokens=rollout.max_tokens, wave=rollout.wave, **queue)
    programs = {"prefill": sampler.prefill, "sample": sampler.sample}
    return _asking(model, mesh, acting, rows, programs, "sample", (waves, waves), settings)


def _judging(config: Config, mesh: Mesh, prefixes: int) -> list[Call]:
    judge, rollout = config.judge, config.rollout
    model, answer = known_model(judge.model), judge.max_tokens if judge.readout == "text" else 0
    check_judge_lengths(judge, model.arch)
    units: set[Unit] = {judge.unit if ROUTES[name].per_segment else "outcome" for name in config.routes.all}
    context = padded_width(judge.max_context_tokens)
    suffix = _judge_suffix(judge, model, units)
    built, waves = build_judge(judge, mesh, model), rollout.prompts // rollout.wave
    params = _frozen(config, mesh, judge.model)
    rows = _Rows(rollout.wave, rollout.group, context, padded_width(judge.max_trace_tokens + suffix), answer)
    if prefixes > 1 and judge.unit == "prefix" and built.branches is not None:
        # All prefixes of a rollout are scored in its row.
        rows = rows._replace(width=padded_width(branch_tokens(judge.max_trace_tokens, suffix, prefixes)))
        programs = {"judge_prefill": built.prefill, "judge_branches": built.branches}
        return _asking(model, mesh, params, rows, programs, "judge", (waves, waves), _JUDGING, prefixes)
    # A rollout has at most so many prefixes to score, and a call takes one of each rollout.
    times, programs = (waves, waves * prefixes), {"judge_prefill": built.prefill, "judge": built.judge}
    return _asking(model, mesh, params, rows, programs, "judge", times, _JUDGING)


def _judge_suffix(judge: Judge, model: LanguageModel, units: set[Unit]) -> int:
    """Tokens that follow a trace in the longest of the judge's prompts: the closing instruction, the template's end and
    how the answer begins; in bytes, which are more, of a published model, whose tokenizer is not at hand."""
    problems = [Problem("", "?", "?", "?", domain) for domain, kind in KINDS.items() if kind.domains]
    prompts = [score_prompt(judge, model.tokenizer, problem, unit) for problem in problems for unit in units]
    prompts += [verify_prompt(judge, model.tokenizer, problem) for problem in problems]
    for unit in units if judge.per_problem else ():
        checklists = ChecklistPrompts(judge, model.tokenizer, lambda _, unit=unit: unit)
        prompts += [checklists.score(problem, ("?", "?")) for problem in problems]
        prompts += [checklists.write(problem) for problem in problems]
    return max(len(prompt.suffix) for prompt in prompts)


def _asking(
    model: LanguageModel,
    mesh: Mesh,
    params: tuple[str, Any],
    rows: _Rows,
    programs: Mapping[str, Callable],
    phase: str,
    times: tuple[int, int],
    settings: tuple[str, ...],
    branches: int = 0,
) -> list[Call]:
    """The program that reads contexts once, and the one that continues each of their rows.

    Args:
      programs: the two, by name.
      times: calls of each in a step.
      branches: off each row; 0 where rows have none.
    """
    (prefill, reads), (proceed, continues) = programs.items()
    (P, G, C, T, answer, *_), shards = rows, mesh.shape[DATA]
    turns = rows.turns(shards)
    context = Context(_array(mesh, jnp.int32, P, C), _array(mesh, jnp.int32, P))
    row, start = _array(mesh, jnp.int32, P, G, T), _array(mesh, jnp.int32, P, G)
    queries = [BranchRows(row, row, row, _array(mesh, jnp.int32, P, G, branches)) if branches else Rows(row, start)]
    if answer:
        queries.append(_draw(mesh, P, G))
    prefix = jax.eval_shape(reads, params[1], context)
    keys, weights = _keys_bytes(model, mesh, prefix.layers), _weight_bytes(model, mesh)
    token = keys / (P * C / shards) * (0.5 if model.execution.kv_dtype == "int8" and answer else 1)

    def passes(queries: int, keys: int, times: int, logits: int, turns: int = 1) -> Cost:
        """Of every row's last `queries` tokens; what the rows see is read so many times, and the weights as often in
        each of the rows' turns."""
        pairs = seen_pairs(queries, keys)
        moved = times * (turns * weights + P * G / shards * pairs / max(queries, 1) * token)
        return forward(model.arch, params[1], P * G * queries, P * G * pairs, P * G * logits) + Cost(bytes=moved)

    contexts = forward(model.arch, params[1], P * C, P * seen_pairs(C, C)) + Cost(bytes=weights + keys)
    # Of a row that is continued, the loop itself feeds the last token.
    read = T - bool(answer)
    cost = passes(read, C + read, -(-read // CHUNK), 0) + passes(answer, C + read + answer, answer, answer, turns)
    inside = {COPY: _copy_bytes(model, mesh, whole=bool(answer))}
    if answer:
        inside[KEYS] = _cache_bytes(model, mesh, prefix, rows, read + answer)
    arguments = params, (KEYS, Result(prefill, keys)), *((BATCH, query) for query in queries)
    return [
        Call(prefill, phase, reads, (params, (BATCH, context)), times[0], contexts, settings, inside={KEYS: keys}),
        Call(proceed, phase, continues, arguments, times[1], cost, settings, turns * answer, inside),
    ]


def _keys_bytes(model: LanguageModel, mesh: Mesh, tree: Any) -> int:
    """Bytes a device of keys and values: problems over `data`, heads over `model` where they divide."""
    heads = mesh.shape[MODEL] if model.arch.kv_heads % mesh.shape[MODEL] == 0 else 1
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) // mesh.shape[DATA] // heads


def _cache_bytes(model: LanguageModel, mesh: Mesh, prefix: Any, rows: _Rows, tokens: int) -> int:
    """Bytes a device of the keys and values, so many `tokens` at most, from which rows are continued."""
    transformer = model.on(mesh)
    if rows.turns(mesh.shape[DATA]) > 1:
        sizes = dict(slots=rows.slots, max_tokens=tokens, expected_tokens=rows.expected_tokens)
        cache = jax.eval_shape(functools.partial(open_slots, transformer, **sizes), prefix)
    else:
        start_PG = jax.ShapeDtypeStruct((*prefix.length_P.shape, rows.group), jnp.int32)
        open_cache = functools.partial(transformer.open_cache, slots=tokens, tokens=tokens)
        cache = jax.eval_shape(open_cache, prefix, start_PG)
    if isinstance(cache, PagedCache):
        return _keys_bytes(model, mesh, cache.pool)
    # A scan over layers takes the cache as input and gives it as output: two copies, where a pool is written in place.
    return _keys_bytes(model, mesh, cache) * (1 + model.execution.scan_layers)


def _weight_bytes(model: LanguageModel, mesh: Mesh) -> int:
    """Bytes a device of the weights as products take them: in the compute dtype, gathered along `data`."""
    return tree_bytes(_parameters(model, AbstractMesh((1, mesh.shape[MODEL]), (DATA, MODEL)), cast=True))


def _copy_bytes(model: LanguageModel, mesh: Mesh, whole: bool) -> int:
    """Bytes a device of the weights' copy that a loop of passes works with; 0 where it would be the weights themselves.

    Args:
      whole: it is gathered along `data`, so that no step of decoding gathers.
    """
    if model.config.param_dtype == model.execution.compute_dtype and (not whole or mesh.shape[DATA] == 1):
        return 0
    return _weight_bytes(model, mesh) if whole else tree_bytes(_parameters(model, mesh, cast=True))


# ----------------------------------------------------------------------------------------------- arguments, as they lie


def _parameters(model: LanguageModel, mesh: Mesh, cast: bool = False) -> Any:
    transformer = model.on(mesh)
    abstract = transformer.abstract_params(model.config.param_dtype)
    if cast:
        abstract = jax.eval_shape(transformer.cast_kernels, abstract)
    return laid_out(abstract, transformer.shard(abstract))


def _frozen(config: Config, mesh: Mesh, model: Model) -> tuple[str, Any]:
    return frozen_models(config)[model], _parameters(known_model(model), mesh)


def _state(config: Config | Supervised, mesh: Mesh) -> TrainState:
    policy = known_model(config.policy)
    if isinstance(config, Supervised):
        programs = build_sft(config, mesh, policy, _SFT_UPDATES)
        return laid_out(programs.abstract, programs.shardings)
    return laid_out(abstract_state(config, policy.arch), shard_state(config, mesh, policy))


def _array(mesh: Mesh, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    """A batch array, as `hosts.put_rows` lays it out."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=rows_sharding(mesh) if shape else replicated(mesh))


def _draw(mesh: Mesh, problems: int, group: int) -> Draw:
    return Draw(
        seed=_array(mesh, jnp.uint32),
        step=_array(mesh, jnp.int32),
        problem_P=_array(mesh, jnp.uint32, problems),
        temperature_PG=_array(mesh, jnp.float32, problems, group),
        budget_PG=_array(mesh, jnp.int32, problems, group),
    )


def _slots(mesh: Mesh, shape: tuple[int, int, int]) -> tuple[Packed, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Packed rows of an update's batch [M, B, T], a mask and a number of each slot, as `hosts.put_microbatches`
    lays them out."""
    token, mask, number = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=microbatches_sharding(mesh))
        for dtype in (jnp.int32, jnp.bool_, jnp.float32)
    )
    return Packed(token, token, token, token, token), mask, number


def _experience(mesh: Mesh, shape: tuple[int, int, int]) -> Experience:
    packed, mask, number = _slots(mesh, shape)
    return Experience(packed, mask, number, number, number, number, number, used=_array(mesh, jnp.int32))
