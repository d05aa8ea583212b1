"""Every `jax.jit` of a training run.  Each program has one shape and compiles once."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from exprl_jax.config import Config
from exprl_jax.learning.logprobs import token_logprobs
from exprl_jax.learning.update import make_optimizer, microbatch_shape, stride_slots, train_step
from exprl_jax.mesh import DATA, constrain_mapped, constrain_rows, replicated, rows_sharding, shard_parameters
from exprl_jax.model import decoder
from exprl_jax.model.config import Architecture
from exprl_jax.model.language_model import LanguageModel
from exprl_jax.records import Array, Context, Rows, TrainState
from exprl_jax.reward.judge_prompts import digit_token_ids
from exprl_jax.reward.scoring import score
from exprl_jax.rollout.sampler import sample


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled programs of a run.  P is a wave's problems in the first five, an update's in the last two.

    Attributes:
      init_state: params → TrainState; the parameters are copied, so a frozen model's buffers stay its own.
      prefill: policy params, Context → Prefix.
      sample: policy params, Prefix, Rows, Draw → Rollouts.
      judge_prefill: judge params, Context → Prefix.
      judge: judge params, Prefix, Rows → probabilities [P, J, 5] (`logits`); with a Draw more → Rollouts (`text`).
      token_logp: params, Context, last_P, tokens_PGR → logp_PGR.
      train_step: TrainState (donated), Experience → TrainState, metrics.
    """

    init_state: Callable
    prefill: Callable
    sample: Callable
    judge_prefill: Callable
    judge: Callable
    token_logp: Callable
    train_step: Callable


def build(config: Config, mesh: Mesh, policy: LanguageModel, judge: LanguageModel) -> Programs:
    """Binds a config's static choices to the programs; compiles nothing yet."""
    rows, scalars = rows_sharding(mesh), replicated(mesh)
    problems = config.rollout.prompts // config.updates.per_batch
    token_logp = functools.partial(token_logp_and_entropy, config=config, mesh=mesh, policy=policy)
    shape = microbatch_shape(problems, config.rollout.group, config.updates.microbatch, mesh.shape[DATA])
    state_shardings = shard_state(config, mesh, policy)
    forward = {"constrain": constrain_rows(mesh)}

    if config.judge.readout == "logits":
        judging = functools.partial(
            score, arch=judge.arch, how=judge.execution, digit_ids=digit_token_ids(judge.tokenizer),
            constrain=constrain_mapped(mesh),
        )  # fmt: skip
    else:
        judging = functools.partial(
            sample, arch=judge.arch, how=judge.execution, max_tokens=config.judge.max_tokens,
            eos_ids=judge.tokenizer.eos_ids, pad_id=judge.tokenizer.pad_id, **forward,
        )  # fmt: skip
    sampling = functools.partial(
        sample, arch=policy.arch, how=policy.execution, max_tokens=config.rollout.max_tokens,
        eos_ids=policy.tokenizer.eos_ids, pad_id=policy.tokenizer.pad_id, **forward,
    )  # fmt: skip
    updating = functools.partial(
        train_step, token_logp_fn=token_logp, optimizer=make_optimizer(config.optimizer), loss=config.loss,
        microbatch=config.updates.microbatch, data_shards=mesh.shape[DATA], on_policy=config.updates.per_batch == 1,
        max_tokens=config.rollout.max_tokens,
    )  # fmt: skip
    return Programs(
        init_state=jax.jit(
            functools.partial(init_state, optimizer=make_optimizer(config.optimizer), dtype=policy.how.param_dtype),
            out_shardings=state_shardings,
        ),
        prefill=_jit(
            "prefill", lambda params, context: decoder.prefill(params, policy.arch, policy.execution, context, **forward)
        ),
        sample=_jit("sample", lambda params, prefix, own, draw: sampling(params, prefix=prefix, rows=own, draw=draw), rows),
        judge_prefill=_jit(
            "judge_prefill",
            lambda params, context: decoder.prefill(params, judge.arch, judge.execution, context, **forward),
        ),
        judge=_jit(
            "judge",
            lambda params, prefix, own, *draw: judging(
                params, prefix=prefix, rows=own, **({"draw": draw[0]} if draw else {})
            ),
            rows,
        ),
        token_logp=_jit(
            "token_logp", functools.partial(microbatched_logp, token_logp=token_logp, shape=shape), rows
        ),
        train_step=_jit("train_step", updating, (state_shardings, scalars), donate_argnums=0),
    )


def init_state(params: decoder.Params, *, optimizer: optax.GradientTransformation, dtype: str) -> TrainState:
    """The state before the first step."""
    params = jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), params)
    return TrainState(jnp.int32(0), params, optimizer.init(params), jnp.int32(0))


def abstract_state(config: Config, arch: Architecture) -> TrainState:
    """Shapes and dtypes of a run's state; allocates nothing."""
    how = config.policy
    params = decoder.abstract_params(arch, how.execution, how.param_dtype)
    initialise = functools.partial(init_state, optimizer=make_optimizer(config.optimizer), dtype=how.param_dtype)
    return jax.eval_shape(initialise, params)


def shard_state(config: Config, mesh: Mesh, policy: LanguageModel) -> Any:
    """Shardings of a run's state: the one parameter table for parameters and moments, scalars everywhere."""
    return shard_parameters(abstract_state(config, policy.arch), policy.arch, policy.execution, mesh)


def token_logp_and_entropy(
    params: decoder.Params, context: Context, last_P: Array, tokens_PGR: Array, *, config: Config, mesh: Mesh,
    policy: LanguageModel,
) -> tuple[Array, Array]:  # fmt: skip
    """log π and entropy of each response token, through the forward that sampling uses: contexts once, then rows."""
    P, G, R = tokens_PGR.shape
    arch, how, constrain = policy.arch, policy.execution, constrain_rows(mesh)
    prefix = decoder.prefill(params, arch, how, context, constrain)
    first = jnp.broadcast_to(last_P[:, None, None], (P, G, 1))
    fed = Rows(jnp.concatenate([first, tokens_PGR[..., :-1]], axis=-1), jnp.zeros((P, G), jnp.int32))
    hidden = decoder.hidden_states(params, arch, how, prefix, fed, constrain)
    table = decoder.unembedding(params, arch)
    return token_logprobs(hidden, table, tokens_PGR, config.rollout.temperature, config.updates.logp_chunk)


def microbatched_logp(
    params: decoder.Params, context: Context, last_P: Array, tokens_PGR: Array, *, token_logp: Callable,
    shape: tuple[int, int],
) -> Array:  # fmt: skip
    """`token_logp` over slots of p contexts × g rows at a time, as the update cuts them (`microbatch_shape`)."""
    p, g = shape
    P, G, R = tokens_PGR.shape

    def problems(x):
        return stride_slots(jnp.repeat(x, G // g, axis=0), p)

    parts = (jax.tree.map(problems, context), problems(last_P), stride_slots(tokens_PGR.reshape(-1, g, R), p))
    logp = jax.lax.map(lambda part: token_logp(params, *part)[0], parts)
    return jnp.swapaxes(logp, 0, 1).reshape(P, G, R)


def _jit(name: str, function: Callable, out_shardings: Any = None, **options: Any) -> Callable:
    """Jits under a name that compile logs and profiles show."""

    def named(*arguments):
        return function(*arguments)

    named.__name__ = named.__qualname__ = name
    if out_shardings is not None:
        options["out_shardings"] = out_shardings
    return jax.jit(named, **options)
