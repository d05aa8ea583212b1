"""Every `jax.jit` of a training run.  Each program has one shape and compiles once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from exprl_jax.architecture import Architecture
from exprl_jax.config import Config, Judge, JudgeTraining, Lora, Model, Supervised
from exprl_jax.learning.distillation import distill_step
from exprl_jax.learning.logprobs import token_logprobs, top_tokens
from exprl_jax.learning.supervised import is_right, sft_step, towards_next_digit, validate
from exprl_jax.learning.update import all_finite, learning_rate, make_optimizer, train_step
from exprl_jax.mesh import Placement, microbatches_sharding, replicated, rows_sharding
from exprl_jax.model.decoder import Params, Transformer, logits
from exprl_jax.model.lora import adapt, attached, init_adapters
from exprl_jax.records import Array, Lesson, Packed, TrainState
from exprl_jax.reward.judge import JudgePrograms
from exprl_jax.reward.judge_prompts import digit_token_ids
from exprl_jax.reward.scoring import score, score_branches
from exprl_jax.rollout.call import Sampler
from exprl_jax.rollout.sampler import sample
from exprl_jax.rollout.sampling import fold_in_name
from exprl_jax.weights.language_model import LanguageModel


@dataclasses.dataclass(frozen=True)
class Programs:
    """What trains a policy.

    Attributes:
      init_state: params → TrainState; the parameters are copied, so a frozen model's buffers stay its own.  With
        adapters the state is theirs alone.
      token_logp: params, Packed [M, B, T], used → log π of each slot's target, [M, B, T].
      train_step: TrainState (donated), the base of its adapters (() for none), Experience → TrainState, metrics.
      all_finite: params → whether no parameter is infinite or NaN.
    """

    init_state: Callable
    token_logp: Callable
    train_step: Callable
    all_finite: Callable


@dataclasses.dataclass(frozen=True)
class TeacherPrograms:
    """What a policy learns from a teacher with.

    Attributes:
      signal: policy params, teacher params, Teaching, Experience → log π_teacher − log π of each slot's target, and the
        estimate of the KL that its mean is   (`sampled`).
      distill_step: TrainState (donated), base, teacher params, Teaching, Experience → TrainState, metrics   (`full`).
    """

    signal: Callable
    distill_step: Callable


@dataclasses.dataclass(frozen=True)
class SftPrograms:
    """What trains a model on examples.

    Attributes:
      abstract, shardings: shapes and dtypes of the state, and where each of its arrays lies.
      init_state: params → TrainState.
      sft_step: TrainState (donated), base, Lesson → TrainState, metrics.
      validate: params, base, Lesson → sums over its tokens (`supervised.validate`).
      all_finite: params → whether no parameter is infinite or NaN.
    """

    abstract: TrainState
    shardings: TrainState
    init_state: Callable
    sft_step: Callable
    validate: Callable
    all_finite: Callable


def build(config: Config, mesh: Mesh, policy: LanguageModel) -> Programs:
    """Binds a config's static choices to the programs; compiles nothing yet."""
    optimizer, logp = _optimizer(config), _policy_logp(config, mesh, policy)

    def updating(state, base, experience):
        return train_step(
            state,
            experience,
            logp_fn=lambda params, packed, counted: logp(adapt(config.lora, base, params), packed, counted),
            optimizer=optimizer,
            loss=config.loss,
            on_policy=config.updates.per_batch == 1,
            keep_sharded=policy.on(mesh).keep_sharded,
        )

    # A donated state is overwritten in place only where the new one has its shardings: one table for both.
    state_shardings = shard_state(config, mesh, policy)
    return Programs(
        init_state=_jit("init_state", _init_state(config, policy, optimizer), state_shardings),
        token_logp=_jit("token_logp", functools.partial(every_logp, logp_fn=logp), microbatches_sharding(mesh)),
        train_step=_jit("train_step", updating, (state_shardings, replicated(mesh)), donate_argnums=0),
        all_finite=_jit("all_finite", all_finite, replicated(mesh)),
    )


def build_sampler(
    model: LanguageModel, mesh: Mesh, *, max_tokens: int, wave: int, slots: int = 0, expected_tokens: int = 0
) -> Sampler:
    """The programs `prefill` (params, Context → Prefix) and `sample` (params, Prefix, Rows, Draw → Rollouts, Usage).

    Args:
      wave: problems of a call.
      slots, expected_tokens: as `rollout.sampler.sample` takes them.
    """
    sampling = _sample(model, mesh, max_tokens, slots=slots, expected_tokens=expected_tokens)
    sampling = _jit("sample", sampling, (rows_sharding(mesh), replicated(mesh)))
    expected = (expected_tokens or max_tokens) if slots else 0
    return Sampler(_jit("prefill", _prefill(model, mesh)), sampling, mesh, wave, max_tokens, expected)


def build_hint_sampler(model: LanguageModel, mesh: Mesh, *, hints: int, wave: int) -> Sampler:
    """`build_sampler` of the frozen model that writes hints: it alone is shown references."""
    sampling = _jit("hint_sample", _sample(model, mesh, hints), (rows_sharding(mesh), replicated(mesh)))
    return Sampler(_jit("hint_prefill", _prefill(model, mesh)), sampling, mesh, wave, hints)


def build_judge(judge_config: Judge, mesh: Mesh, judge: LanguageModel) -> JudgePrograms:
    """The programs of a local judge."""
    prefill = _jit("judge_prefill", _prefill(judge, mesh))
    if judge_config.readout == "text":
        sampling = _sample(judge, mesh, judge_config.max_tokens)

        def writing(*arguments):
            return sampling(*arguments)[0]

        judging, branching = (_jit(name, writing, rows_sharding(mesh)) for name in ("judge", "judge_branches"))
        return JudgePrograms(prefill, judging, branching if Placement(mesh).shares_segments else None)
    scoring = (
        functools.partial(score_fn, judge.on(mesh), digit_ids=digit_token_ids(judge.tokenizer))
        for score_fn in (score, score_branches)
    )
    judging, branching = (_jit(name, fn, rows_sharding(mesh)) for name, fn in zip(("judge", "judge_branches"), scoring))
    return JudgePrograms(prefill, judging, branching if Placement(mesh).shares_segments else None)


def build_teacher(config: Config, mesh: Mesh, policy: LanguageModel) -> TeacherPrograms:
    """The programs of a teacher of the policy's own architecture."""
    logp = functools.partial(every_logp, logp_fn=_policy_logp(config, mesh, policy))
    optimizer, states = _optimizer(config), functools.partial(packed_states, policy.on(mesh))

    def signal(params, teacher, teaching, experience):
        teacher_logp = logp(teacher, teaching.packed, experience.used)
        own_logp = logp(params, experience.packed, experience.used)
        gap = jnp.take_along_axis(teacher_logp, teaching.at_MBT, axis=2) - own_logp
        return gap, -jnp.where(experience.mask_MBT, gap, 0.0).sum() / jnp.maximum(experience.mask_MBT.sum(), 1)

    def distilling(state, base, teacher, teaching, experience):
        return distill_step(
            state,
            teacher,
            teaching,
            experience,
            optimizer=optimizer,
            states_fn=lambda params, packed: states(adapt(config.lora, base, params), packed),
            teacher_fn=states,
            temperature=config.rollout.temperature,
            chunk=config.updates.logp_chunk,
            placement=Placement(mesh),
            keep_sharded=policy.on(mesh).keep_sharded,
        )

    state_shardings = shard_state(config, mesh, policy)
    return TeacherPrograms(
        signal=_jit("teacher_signal", signal, (microbatches_sharding(mesh), replicated(mesh))),
        distill_step=_jit("distill_step", distilling, (state_shardings, replicated(mesh)), donate_argnums=0),
    )


def build_sft(config: Supervised, mesh: Mesh, policy: LanguageModel, updates: int) -> SftPrograms:
    """The programs of a supervised run of so many updates."""
    optimizer, rate = make_optimizer(config.optimizer, updates), learning_rate(config.optimizer, updates)
    # A score between two digits teaches both; other targets are one token.
    taught_by_digits = isinstance(config, JudgeTraining) and config.judge.readout == "logits"
    digit_ids = digit_token_ids(policy.tokenizer) if taught_by_digits else ()
    logp = functools.partial(lesson_logp_and_entropy, policy.on(mesh), chunk=config.logp_chunk, digit_ids=digit_ids)

    def measures(params, part):
        hidden, table = packed_states(policy.on(mesh), params, part.packed)
        top = top_tokens(hidden, table, config.logp_chunk)
        return logp(params, part)[0], is_right(top, part.packed.target_BT, part.share_MBT, digit_ids)

    def validating(params, base, lesson):
        return validate(adapt(config.lora, base, params), lesson, measures_fn=measures)

    def updating(state, base, lesson):
        return sft_step(
            state,
            lesson,
            logp_fn=lambda params, part: logp(adapt(config.lora, base, params), part),
            optimizer=optimizer,
            rate=rate if callable(rate) else optax.constant_schedule(rate),
            keep_sharded=policy.on(mesh).keep_sharded,
        )

    initialise = _init_state(config, policy, optimizer)
    abstract = _abstract(config.lora, policy.config, policy.arch, optimizer)
    shardings = policy.on(mesh).shard(abstract)
    return SftPrograms(
        abstract=abstract,
        shardings=shardings,
        init_state=_jit("init_state", initialise, shardings),
        sft_step=_jit("sft_step", updating, (shardings, replicated(mesh)), donate_argnums=0),
        validate=_jit("validate", validating, replicated(mesh)),
        all_finite=_jit("all_finite", all_finite, replicated(mesh)),
    )


def _prefill(model: LanguageModel, mesh: Mesh) -> Callable:
    transformer = model.on(mesh)
    return lambda params, context: transformer.prefill(attached(params), context)


def _sample(model: LanguageModel, mesh: Mesh, max_tokens: int, **slots: int) -> Callable:
    tokenizer = model.tokenizer
    sampling = functools.partial(
        sample, max_tokens=max_tokens, eos_ids=tokenizer.eos_ids, pad_id=tokenizer.pad_id, **slots
    )

    def on_mesh(params, prefix, rows, draw, traces=None):
        return sampling(model.on(mesh), attached(params), prefix, rows, draw, traces=traces)

    return on_mesh


def _policy_logp(config: Config, mesh: Mesh, policy: LanguageModel) -> Callable:
    temperature, chunk = config.rollout.temperature, config.updates.logp_chunk
    return functools.partial(packed_logp_and_entropy, policy.on(mesh), temperature=temperature, chunk=chunk)


def _optimizer(config: Config) -> optax.GradientTransformation:
    return make_optimizer(config.optimizer, config.steps * config.updates.per_batch)


def _init_state(
    config: Config | Supervised, policy: LanguageModel, optimizer: optax.GradientTransformation
) -> Callable:
    return functools.partial(
        init_state, lora=config.lora, model=policy.config, arch=policy.arch, optimizer=optimizer, seed=config.seed
    )


def init_state(
    params: Params, *, lora: Lora, model: Model, arch: Architecture, optimizer: optax.GradientTransformation, seed: int
) -> TrainState:
    """The state before the first step.

    Args:
      params: of the policy; with adapters they are left where they are, and the state is the adapters'.
    """
    if lora.rank:
        params = init_adapters(arch, model.execution, lora, "float32", fold_in_name(jax.random.key(seed), "lora"))
    else:
        # A copy even in the same dtype: updates donate the state, and a frozen model may be the same buffers.
        params = jax.tree.map(lambda x: jnp.array(x, model.param_dtype, copy=True), params)
    return TrainState(jnp.int32(0), params, optimizer.init(params), jnp.int32(0))


def abstract_state(config: Config, arch: Architecture) -> TrainState:
    """Shapes and dtypes of a run's state; allocates nothing."""
    return _abstract(config.lora, config.policy, arch, _optimizer(config))


def _abstract(lora: Lora, model: Model, arch: Architecture, optimizer: optax.GradientTransformation) -> TrainState:
    params = Transformer(arch, model.execution).abstract_params(model.param_dtype)
    initialise = functools.partial(init_state, lora=lora, model=model, arch=arch, optimizer=optimizer, seed=0)
    return jax.eval_shape(initialise, params)


def shard_state(config: Config, mesh: Mesh, policy: LanguageModel) -> Any:
    """Shardings of a run's state: the one parameter table for parameters and moments, scalars everywhere."""
    return policy.on(mesh).shard(abstract_state(config, policy.arch))


def packed_states(transformer: Transformer, params: Params, packed: Packed) -> tuple[Array, Array]:
    """The hidden states of packed rows [B, T, D], and the unembedding."""
    params = attached(params)
    return transformer.packed_hidden_states(params, packed), transformer.unembedding(params)


def packed_logp_and_entropy(
    transformer: Transformer, params: Params, packed: Packed, counted: Array, *, temperature: float, chunk: int
) -> tuple[Array, Array]:
    """log π of the targets of the slots that count, given what stands before each in its sequence, and the entropy of
    that distribution; both [B, T], and 0 elsewhere."""
    hidden, table = packed_states(transformer, params, packed)
    return token_logprobs(hidden, table, packed.target_BT, temperature, chunk, transformer.placement, counted)


def lesson_logp_and_entropy(
    transformer: Transformer, params: Params, lesson: Lesson, *, chunk: int, digit_ids: tuple[int, ...]
) -> tuple[Array, Array]:
    """The same for a microbatch of a lesson, [B, T]; a target between two digits counts for both.

    Args:
      digit_ids: of the digits; empty where no target is one.
    """
    hidden, table = packed_states(transformer, params, lesson.packed)
    target = lesson.packed.target_BT
    logp, entropy = token_logprobs(hidden, table, target, 1.0, chunk, transformer.placement, lesson.mask_MBT)
    if digit_ids:
        of_digits = logits(hidden, table[:, jnp.asarray(digit_ids)])
        logp += towards_next_digit(of_digits, target, lesson.share_MBT, digit_ids)
    return logp, entropy


def every_logp(params: Params, packed: Packed, used: Array, *, logp_fn: Callable) -> Array:
    """log π of each slot's target, one microbatch [B, T] at a time; 0 in those that are not used, and in padding."""

    def add_microbatch(m, logp_MBT):
        part = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, m, keepdims=False), packed)
        return jax.lax.dynamic_update_index_in_dim(logp_MBT, logp_fn(params, part, part.segment_BT > 0)[0], m, axis=0)

    return jax.lax.fori_loop(0, used, add_microbatch, jnp.zeros(packed.tokens_BT.shape, jnp.float32))


def _jit(name: str, function: Callable, out_shardings: Any = None, **options: Any) -> Callable:
    """Jits under a name that compile logs and profiles show."""

    def named(*arguments):
        return function(*arguments)

    named.__name__ = named.__qualname__ = name
    if out_shardings is not None:
        options["out_shardings"] = out_shardings
    return jax.jit(named, **options)
