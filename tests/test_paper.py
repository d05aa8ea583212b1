"""The released settings, arm by arm, against the resolved configs (arXiv 2606.17024 and the released scripts)."""

import dataclasses

import pytest
from tiny_runs import ROOT, config_dict

from exprl_jax.config import Config, Sft
from exprl_jax.resolve import resolve

# prompts, rollouts a prompt, updates a batch, upper clip, learning rate
UPDATE = {
    "outcome_4b": (36, 10, 2, 0.28, 1e-6),
    "process_delta_4b": (36, 16, 1, 0.26, 1e-6),
    "process_end_4b": (36, 16, 1, 0.26, 1e-6),
    "process_group_4b": (36, 16, 1, 0.26, 1e-6),
    "grpo_4b": (32, 16, 2, 0.26, 1e-6),
    "outcome_8b": (36, 16, 2, 0.28, 1e-6),
    "mixed_8b": (36, 16, 2, 0.28, 1e-6),
    "process_delta_8b": (36, 16, 1, 0.26, 1e-6),
    "grpo_8b": (32, 16, 2, 0.26, 1e-6),
}
# Of math, multiple choice, open-ended science and code.
ROUTES = {
    "outcome_4b": "outcome outcome outcome outcome",
    "process_delta_4b": "process process outcome outcome",
    "grpo_4b": "verifier verifier verifier verifier",
    "outcome_8b": "outcome outcome outcome outcome",
    "mixed_8b": "process process outcome outcome",
}
STAGE_1 = {*UPDATE, "distill_4b"}
BASE, LARGE = "Qwen/Qwen3-4B-Instruct-2507", "Qwen/Qwen3-8B"


def paper(name):
    return resolve(config_dict(f"paper.{name}"))


def test_every_paper_config_is_held_to_the_table():
    files = {path.stem for path in (ROOT / "configs/paper").glob("*.py")}
    assert files == {*UPDATE, "distill_4b", "sft_4b", "stage2_8b"}


@pytest.mark.parametrize("name", UPDATE)
def test_the_update(name):
    c = paper(name)
    found = c.rollout.prompts, c.rollout.group, c.updates.per_batch, c.loss.clip_high, c.optimizer.learning_rate
    assert found == UPDATE[name]
    assert (c.loss.clip_low, c.loss.dual_clip, c.loss.kl_coef, c.loss.entropy_coef) == (0.2, 3.0, 0.001, 0.0)
    assert c.advantage.std_normalise and c.rollout.max_resample == 0


@pytest.mark.parametrize("name", sorted(STAGE_1))
def test_what_all_stage_1_arms_share(name):
    c = paper(name)
    assert (c.rollout.temperature, c.data.max_prompt_tokens, c.rollout.max_tokens) == (0.8, 4096, 16_384)
    o = c.optimizer
    assert (o.schedule, o.warmup, o.b1, o.b2, o.weight_decay, o.clip_norm) == ("constant", 0.0, 0.9, 0.999, 0.01, 1.0)
    large = name.endswith("8b")
    assert c.policy.weights == c.reference.weights == (LARGE if large else BASE)
    assert c.judge.model.weights == BASE and c.judge.readout == "text"
    assert c.steps == (270 if large else 230)
    assert c.judge.max_tokens == (2048 if name == "process_delta_8b" or not large else 4096)
    assert c.policy.param_dtype == "float32" and c.reference.param_dtype == "bfloat16"


@pytest.mark.parametrize("name", ROUTES)
def test_the_routes(name):
    routes = paper(name).routes
    assert " ".join(routes.of(kind) for kind in ("math", "choice", "science", "code")) == ROUTES[name]


@pytest.mark.parametrize("arm", ["delta", "end", "group"])
def test_the_process_arms_differ_in_their_estimator_alone(arm):
    assert paper(f"process_{arm}_4b").advantage.estimator == f"{arm}_norm"
    advantage = dataclasses.replace(paper(f"process_{arm}_4b").advantage, estimator="delta_norm")
    assert dataclasses.replace(paper(f"process_{arm}_4b"), advantage=advantage) == paper("process_delta_4b")


def test_self_distillation():
    c = paper("distill_4b")
    assert isinstance(c, Config) and c.task == "distill" and c.distillation.kl == "sampled"
    assert (c.rollout.prompts, c.rollout.group, c.updates.per_batch) == (32, 16, 1)
    assert (c.optimizer.learning_rate, c.loss.kl_coef, c.loss.entropy_coef) == (1e-7, 0.0, 0.0)
    assert c.reference.weights == c.policy.weights


def test_sft():
    c = paper("sft_4b")
    assert isinstance(c, Sft)
    assert (c.batch, c.epochs, c.row_tokens, c.policy.weights) == (32, 2, 20_480, BASE)
    o = c.optimizer
    assert (o.learning_rate, o.schedule, o.warmup, o.b1, o.b2) == (1e-6, "cosine", 0.1, 0.9, 0.95)
    assert (o.weight_decay, o.clip_norm) == (0.01, 1.0)


@pytest.mark.parametrize("config", [("stage2", "released"), ("paper.stage2_8b", None)])
def test_stage_2(config):
    c = resolve(config_dict(*config))
    assert (c.rollout.prompts, c.rollout.group, c.updates.per_batch, c.steps) == (16, 32, 1, 500)
    assert set(dataclasses.astuple(c.routes)) == {"verifier"} and c.advantage.overlong == "keep"
    assert not c.advantage.std_normalise
    # The ratio is capped at 5 for positive advantages and nothing else is clipped; sums over tokens by 512 rollouts.
    assert (c.loss.clip_low, 1 + c.loss.clip_high, c.loss.dual_clip, c.loss.aggregate) == (
        1.0,
        5.0,
        0.0,
        "sequence_sum",
    )
    assert (c.loss.kl_coef, c.loss.entropy_coef, c.optimizer.clip_norm, c.optimizer.learning_rate) == (
        0.0,
        1e-4,
        0.3,
        1e-6,
    )
    assert c.policy.weights.startswith("runs/")


def test_stage_2_as_the_paper_words_it():
    c = resolve(config_dict("stage2", "text"))
    assert c.advantage.std_normalise and c.rollout.prompts == 32


def test_evaluation_is_the_papers():
    c = resolve(config_dict("evaluate", "4b"))
    assert (c.sampling.samples, c.sampling.temperature, c.sampling.max_tokens) == (128, 0.8, 16_384)
    assert c.data.source == "aime25,aime26,hmmt_nov25,imo_answerbench"
    assert resolve(config_dict("evaluate", "8b")).data.source.endswith(
        "gpqa_diamond,olympiadbench_physics,livecodebench_v5"
    )


def test_no_arm_trains_on_what_it_is_evaluated_on():
    for name in sorted(STAGE_1):
        c = paper(name)
        assert not c.data.allow_held_out and c.data.held_out.startswith("aime25,aime26,hmmt_nov25,imo_answerbench")
