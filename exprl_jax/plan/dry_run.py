"""What a run would be, without running it: resolved config, derived numbers, sharding table, memory."""

from __future__ import annotations

import json
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from exprl_jax.architecture import Architecture
from exprl_jax.config import Config, Model
from exprl_jax.layout import check_layout, check_lengths
from exprl_jax.mesh import DATA, MODEL, bytes_per_device, fit_mesh, shard_parameters
from exprl_jax.model.attention import SCORES
from exprl_jax.model.cache import empty_cache, empty_context
from exprl_jax.model.decoder import Transformer
from exprl_jax.programs import abstract_state
from exprl_jax.resolve import to_dict
from exprl_jax.reward.judges import check_judge_lengths
from exprl_jax.reward.segments import segment_rule
from exprl_jax.weights.language_model import published_architecture

_GIB = 1024**3


def describe(config: Config) -> str:
    """The report of `--dry_run`.  Allocates nothing and needs no devices: a mesh of another machine will do.

    Budgets stand in for what a run measures from its data (prompt widths), so sizes are upper bounds.

    Raises:
      ValueError: as a run would, for what can be known without its data.
    """
    data, model = fit_mesh(config.mesh)
    mesh = AbstractMesh((data, model), (DATA, MODEL))
    check_layout(config, data)
    segment_rule(config)
    archs = {how: published_architecture(how) for how in (config.policy, *_frozen(config))}
    policy = archs[config.policy]
    check_lengths(config, policy)
    if config.has_local_judge:
        check_judge_lengths(config.judge, archs[config.judge.model])
    state = abstract_state(config, policy)
    shardings = shard_parameters(state, policy, config.policy.execution, mesh)
    problems = config.rollout.prompts // config.updates.per_batch

    sections = [("resolved config", json.dumps(to_dict(config), indent=2))]
    derived = {
        "mesh": f"data {data} x model {model} = {data * model} devices",
        "policy parameters": f"{policy.parameters:,}",
        "rollouts a step": config.rollout.prompts * config.rollout.group,
        "waves a step": config.rollout.prompts // config.rollout.wave,
        "rows a wave": config.rollout.wave * config.rollout.group,
        "updates a step": config.updates.per_batch,
        "rows an update": problems * config.rollout.group,
        "microbatch": f"{config.updates.microbatch} rows of {config.updates.row_tokens} tokens",
        "optimizer updates in all": config.steps * config.updates.per_batch,
        "frozen copies": f"{len(_frozen(config))} ({', '.join(sorted({how.weights for how in _frozen(config)})) or 'none'})",
        "sequence": f"{config.data.max_prompt_tokens} + {config.rollout.max_tokens} tokens",
    }
    if config.task == "rl" and config.judge.backend == "local" and not config.has_local_judge:
        # Which kinds of problems there are, a plan without data cannot know.
        derived["judge"] = (
            f"not planned for; if the data hold open-ended science, {config.judge.model.weights} verifies it"
        )
    sections.append(("derived", _table([(name, value) for name, value in derived.items()])))

    rows = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        sharding = _at(shardings.params, path)
        name = "/".join(key.key for key in path)
        if name.startswith("layer_") and not name.startswith("layer_0/"):
            continue  # all layers alike
        rows.append((name, str(leaf.shape), leaf.dtype.name, str(sharding.spec), str(sharding.shard_shape(leaf.shape))))
    which = "" if config.policy.execution.scan_layers else " (layer_0 for all layers)"
    sections.append((f"parameters: shape, dtype, axes, shape on a device{which}", _table(rows)))

    memory = _memory(config, archs, mesh, state, shardings)
    listed = [(name, f"{size / _GIB:.3f} GiB") for name, size in memory.items()]
    for phase in dict.fromkeys(name.partition(":")[0] for name in memory if not name.startswith("resident")):
        total = sum(v for k, v in memory.items() if k.startswith(("resident", phase)))
        listed.append((f"= while {phase}", f"{total / _GIB:.3f} GiB"))
    title = (
        "memory a device (by arithmetic, at full budgets, on devices that are no TPUs; the compiler's own temporaries come "
        "on top; for a TPU ask exprl_jax.compile_check)"
    )
    sections.append((title, _table(listed)))
    return "\n\n".join(f"== {title}\n{body}" for title, body in sections)


def _memory(
    config: Config, archs: dict[Model, Architecture], mesh: Any, state: Any, shardings: Any
) -> dict[str, float]:
    policy = archs[config.policy]
    data, model = mesh.shape[DATA], mesh.shape[MODEL]
    how = config.policy.execution
    compute = jnp.dtype(how.compute_dtype).itemsize

    def cache(arch, execution, contexts, context_tokens, rows, slots):
        """Keys and values on a device: problems over `data`, heads over `model` where they divide."""
        heads = model if arch.kv_heads % model == 0 else 1
        group = rows // contexts
        own = jax.eval_shape(lambda: empty_cache(arch, execution, contexts, group, slots))
        shared = jax.eval_shape(lambda: empty_context(arch, execution, contexts))
        token = sum(math.prod(x.shape[:-2]) * x.shape[-1] * x.dtype.itemsize for x in jax.tree.leaves(shared))
        total = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(own)) + token * context_tokens
        # Scanned layers take the rows' cache as input and give it back as output: two copies of it while decoding.  On
        # TPUs there is one pool, and attention scores are nowhere: `compile_check` asks the compiler.
        copies = 2 if execution.scan_layers else 1
        return (total * copies - token * context_tokens * (copies - 1)) / data / heads

    def scores(arch, rows, queries, keys):
        """Float32 attention scores and weights of one chunk of queries, rows over `data`, heads over `model`."""
        heads = arch.heads / (model if arch.heads % model == 0 else 1)
        return 2 * 4 * min(rows / data * heads * queries * keys, SCORES)

    def copy(arch, model_how, shards):
        """The copy that a program makes, in the compute dtype, `shards` ways over `data`; none where it would be the same."""
        if model_how.param_dtype == model_how.execution.compute_dtype and shards == data:
            return 0
        abstract = Transformer(arch, model_how.execution).abstract_params(model_how.execution.compute_dtype)
        over = AbstractMesh((shards, model), (DATA, MODEL))
        return bytes_per_device(abstract, shard_parameters(abstract, arch, model_how.execution, over))

    wave, group = config.rollout.wave, config.rollout.group
    tokens = config.updates.microbatch / data * config.updates.row_tokens
    if how.remat != "none":  # the residual at every layer, and one layer's insides
        residuals = tokens * policy.width * compute * (policy.layers + 2 + 3 * policy.ffn / policy.width / model)
    else:
        layer = 4 * policy.width + (2 * policy.heads + 2 * policy.kv_heads) * policy.head_size + 4 * policy.ffn
        residuals = tokens * layer * compute * policy.layers
    frozen = 0
    for model_how in _frozen(config):
        arch = archs[model_how]
        abstract = Transformer(arch, model_how.execution).abstract_params(model_how.param_dtype)
        frozen += bytes_per_device(abstract, shard_parameters(abstract, arch, model_how.execution, mesh))
    # Of logits that exist at once: forward and backward, and one more for an entropy bonus or a teacher's.
    full = config.task == "distill" and config.distillation.kl == "full"
    slices = 3 if config.loss.entropy_coef or full else 2
    memory = {
        "resident: policy": bytes_per_device(state.params, shardings.params),
        "resident: Adam": bytes_per_device(state.opt_state, shardings.opt_state),
        "resident: frozen": frozen,
        "sampling: policy copy": copy(policy, config.policy, 1),  # no decode step gathers
        "sampling: KV cache": cache(
            policy, how, wave, config.data.max_prompt_tokens, wave * group, config.rollout.max_tokens
        ),
        # The sum so far and one microbatch's part.
        "training: gradients": 2 * bytes_per_device(_float32(state.params), shardings.params),
        "training: activations": residuals,
        "training: attention scores": 2
        * scores(policy, config.updates.microbatch, config.updates.row_tokens, config.updates.row_tokens),
        "training: logits": slices
        * 4
        * min(config.updates.logp_chunk, tokens * data)
        * policy.vocab_size
        / data
        / model,
    }
    if config.has_local_judge:
        judge, context, trace = config.judge.model, config.judge.max_context_tokens, config.judge.max_trace_tokens
        answer = config.judge.max_tokens if config.judge.readout == "text" else 0
        memory |= {
            "judging: judge copy": copy(archs[judge], judge, 1 if config.judge.readout == "text" else data),
            "judging: KV cache": cache(archs[judge], judge.execution, wave, context, wave * group, trace + answer),
            "judging: attention scores": scores(archs[judge], wave * group, trace, context + trace + answer),
        }
    return memory


def _frozen(config: Config) -> set[Model]:
    """Models that a run holds beside the policy, whatever its problems turn out to be."""
    reference = {config.reference} if config.has_reference_model else set()
    base = {config.policy} if config.lora.rank else set()
    return reference | base | ({config.judge.model} if config.has_local_judge else set())


def _float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), tree)


def _at(tree: Any, path: Any) -> Any:
    for key in path:
        tree = tree[key.key]
    return tree


def _table(rows: list[tuple[Any, ...]]) -> str:
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells)
