"""ExpRL-Outcome at the paper's settings; every other config is a short difference from this one.

Numbers: arXiv 2606.17024 and the released 4B scripts.  All keys and their meaning: `exprl_jax/config/`.
"""

from ml_collections import ConfigDict

from exprl_jax.kinds import KINDS

QWEN3_4B = "Qwen/Qwen3-4B-Instruct-2507"
QWEN3_8B = "Qwen/Qwen3-8B"
# LiveCodeBench v6 with the paper's oracle solutions is trained on; v5, on which the paper evaluates, is a part of it.
MIXED = ("pope", "int", "sciknow_physics", "sciknow_choice", "livecodebench_v6")


def model(
    weights: str, *, compute_dtype: str, param_dtype: str, scan_layers: bool, remat: str, kv_dtype: str = "compute"
) -> ConfigDict:
    """A model section."""
    execution = dict(scan_layers=scan_layers, compute_dtype=compute_dtype, remat=remat, kv_dtype=kv_dtype)
    return ConfigDict(dict(weights=weights, execution=execution, param_dtype=param_dtype, date="2026-01-01"))


def base() -> ConfigDict:
    """The paper's ExpRL-Outcome run of Qwen3-4B."""
    accelerator = dict(compute_dtype="bfloat16", scan_layers=True, remat="full")
    return ConfigDict(
        dict(
            task="rl",
            seed=1,
            steps=230,
            data=dict(
                source="data/pope.parquet,data/int.parquet",
                split="train",
                columns="",
                worked_examples="",
                max_prompt_tokens=4096,
                held_out="aime25,aime26,hmmt_nov25,imo_answerbench",
                allow_held_out=False,
            ),
            mesh=dict(data=2, model=8),
            # The policy's float32 parameters are trained; one bfloat16 copy of its start is KL reference and judge.
            policy=model(QWEN3_4B, param_dtype="float32", **accelerator),
            lora=dict(rank=0, alpha=32.0, targets="q,k,v,o,gate,up,down"),
            reference=model(QWEN3_4B, param_dtype="bfloat16", **accelerator),
            routes=dict.fromkeys(KINDS, "outcome"),
            judge=dict(
                backend="local",
                model=model(QWEN3_4B, param_dtype="bfloat16", **accelerator),
                endpoint=dict(
                    base_url="",
                    model="",
                    api_key_variable="OPENAI_API_KEY",
                    concurrency=32,
                    seconds=120.0,
                    retries=4,
                    max_missing=0.5,
                    budget_key="max_tokens",
                    extra_body="{}",
                ),
                function="",
                workers=dict(count=2, batch=32, seconds=60.0, max_missing=0.5),
                rubric="",
                checklists="",
                unit="prefix",
                readout="text",
                logits_value="expected",
                max_tokens=2048,
                max_context_tokens=20_480,
                max_trace_tokens=16_640,
                wave=0,
            ),
            truth=dict(source="", workers=dict(count=2, batch=32, seconds=60.0, max_missing=0.5)),
            rollout=dict(
                prompts=36,
                group=10,
                max_tokens=16_384,
                temperature=0.8,
                wave=4,
                slots=0,
                expected_tokens=0,
                max_resample=0,
                hints=0,
            ),
            segments=dict(rule="heading", max_segments=32),
            advantage=dict(
                estimator="delta_norm",
                one_segment="zero",
                rollout_estimator="grpo",
                std_normalise=True,
                min_spread=0.0,
                min_logits_spread=0.02,
                overlong="zero_score",
                overlong_penalty=-1.0,
                missing="drop_segment",
            ),
            loss=dict(
                clip_low=0.2, clip_high=0.28, dual_clip=3.0, kl_coef=0.001, entropy_coef=0.0, aggregate="token_mean"
            ),
            distillation=dict(kl="sampled"),
            updates=dict(per_batch=2, row_tokens=20_480, microbatch=4, logp_chunk=4096),
            optimizer=dict(
                learning_rate=1e-6,
                schedule="constant",
                warmup=0.0,
                b1=0.9,
                b2=0.999,
                eps=1e-8,
                weight_decay=0.01,
                clip_norm=1.0,
            ),
            checkpoint=dict(every=10, keep=2, best="solve/accuracy", best_is="highest"),
            evaluate=dict(every=0, source="", training_problems=0, samples=10, k="", temperature=0.8),
            log=dict(rollouts=16, to="tensorboard"),
            grader=dict(seconds=5.0, workers=4, function=""),
            code=dict(seconds=10.0, memory_mb=1024, allow_unsandboxed=False),
            probe=dict(strict=False),
            watch=dict(window=10, strict=False),
        )
    )


def process(config: ConfigDict, estimator: str) -> ConfigDict:
    """ExpRL-Process: the judge scores prefixes of math and multiple-choice rollouts; fully on-policy."""
    config.rollout.update(group=16, wave=2)
    config.routes.update(math="process", choice="process")
    config.advantage.estimator = estimator
    config.updates.per_batch = 1
    config.loss.clip_high = 0.26
    return config


def sparse(config: ConfigDict) -> ConfigDict:
    """GRPO on final answers: every reward is the verifier's, and cut rollouts are graded like others."""
    config.routes = dict.fromkeys(KINDS, "verifier")
    config.advantage.overlong = "keep"
    return config


def stage2(config: ConfigDict) -> ConfigDict:
    """The released Stage II: no std, no KL, a ratio cap of 5 alone, sums over tokens divided by rollouts."""
    config = sparse(config)
    config.steps = 500
    config.rollout.update(prompts=16, group=32, wave=2)
    config.updates.per_batch = 1
    config.advantage.std_normalise = False
    config.loss.update(
        clip_low=1.0, clip_high=4.0, dual_clip=0.0, kl_coef=0.0, entropy_coef=1e-4, aggregate="sequence_sum"
    )
    config.optimizer.clip_norm = 0.3
    return config


def distill(config: ConfigDict) -> ConfigDict:
    """On-policy self-distillation: the frozen start of the policy, shown the reference, is the teacher."""
    config.task = "distill"
    config.rollout.update(prompts=32, group=16)
    config.updates.per_batch = 1
    config.loss.kl_coef = 0.0
    config.updates.row_tokens = 40_960  # the teacher's prompt holds the reference too
    config.optimizer.learning_rate = 1e-7
    return config


def large(config: ConfigDict) -> ConfigDict:
    """The 8B policy, thinking disabled, on all domains; the judge stays the 4B."""
    config.steps = 270
    config.policy.weights = config.reference.weights = QWEN3_8B
    config.judge.max_tokens = 4096
    config.rollout.update(group=16, wave=2)
    config.updates.microbatch = 2
    config.data.source = ",".join(f"data/{name}.parquet" for name in MIXED)
    config.data.held_out += ",gpqa_diamond,olympiadbench_physics"
    return config


def supervised(config: ConfigDict) -> ConfigDict:
    """SFT on the references with what it shares with an RL config: data, mesh, policy, checkpoints."""
    shared = {name: config[name].to_dict() for name in ("data", "mesh", "policy", "lora", "checkpoint")}
    shared["checkpoint"].update(best="loss/total", best_is="lowest")
    shared["log"] = dict(to=config.log.to)
    optimizer = config.optimizer.to_dict() | dict(b2=0.95, schedule="cosine", warmup=0.1)
    return ConfigDict(
        dict(
            task="sft",
            seed=config.seed,
            epochs=2,
            steps=0,
            batch=32,
            microbatch=2,
            row_tokens=20_480,
            logp_chunk=config.updates.logp_chunk,
            validation=dict(every=0, fraction=0.0, source=""),
            optimizer=optimizer,
            **shared,
        )
    )


def lessons(config: ConfigDict) -> ConfigDict:
    """Training a small judge for an RL config; its float32 parameters are trained."""
    shared = {name: config[name].to_dict() for name in ("mesh", "lora", "checkpoint", "judge")}
    shared["checkpoint"].update(best="validation/loss", best_is="lowest")
    shared["log"] = dict(to=config.log.to)
    shared["judge"]["model"].update(weights="Qwen/Qwen3-0.6B", param_dtype="float32")
    optimizer = config.optimizer.to_dict() | dict(learning_rate=1e-5, b2=0.95, schedule="cosine", warmup=0.1)
    return ConfigDict(
        dict(
            task="judge",
            seed=config.seed,
            epochs=1,
            steps=0,
            lessons="data/lessons.jsonl",
            batch=64,
            microbatch=4,
            row_tokens=20_480,
            logp_chunk=config.updates.logp_chunk,
            validation=dict(every=20, fraction=0.05, source="", wave=4),
            optimizer=optimizer,
            **shared,
        )
    )


def evaluation(config: ConfigDict) -> ConfigDict:
    """128 samples a problem of the benchmarks, with what it shares with an RL config."""
    shared = {name: config[name].to_dict() for name in ("data", "mesh", "policy", "judge", "grader", "code")}
    sampling = dict(samples=128, group=16, wave=4, slots=0, max_tokens=config.rollout.max_tokens, temperature=0.8)
    made = ConfigDict(dict(task="evaluate", seed=config.seed, label="base", sampling=sampling, **shared))
    made.data.update(source=config.data.held_out, split="test", columns="")
    del made.data.held_out, made.data.allow_held_out
    made.policy.param_dtype = "bfloat16"
    return made
