"""Losses, log-probs and advantages against what verl and TRL publish, run from their packages.

Neither package is needed for anything else, and both bring much with them, so these tests are skipped where they are
not installed.  Seen to pass with verl 0.9.1 and TRL 1.16.0, both installed with --no-deps (verl asks for an older
transformers) beside what they import: accelerate, codetiming, hydra-core, peft, ray, tensordict and torchdata.

How the settings correspond:

  loss.aggregate   verl loss_agg_mode, with global_batch_size   TRL loss_type
  token_mean       token-mean                                   bnpo; dapo
  sequence_mean    seq-mean-token-mean, rows with a token       grpo, where every row has a token
  sequence_sum     seq-mean-token-sum, all rows                 luspo with token ratios
  constant         seq-mean-token-sum-norm, all rows            dr_grpo

  loss.dual_clip   clip_ratio_c                                 delta
  0                out of reach                                 None

What differs, and is held apart here.  TRL clamps neither log-ratios nor the k3 estimate, and by default multiplies that
estimate by the ratio (use_bias_correction_kl); its entropy bonus is a token mean whatever the loss type; it divides an
advantage by std + 1e-4 (verl and this package: 1e-6).  verl's actor divides its sequence means by all rows, those
without a counted token too, and leaves a group of one its raw reward, which here has advantage 0.  All three take the
unbiased standard deviation.
"""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from exprl_jax import config
from exprl_jax.learning import advantages
from exprl_jax.learning.logprobs import token_logprobs
from exprl_jax.learning.losses import k3, normaliser, policy_loss

# transformers says so of names that TRL still uses.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning")

P, G, R, D, V = 3, 4, 6, 8, 17
TEMPERATURE = 0.8
OUT_OF_REACH = 1e30
STAGE_1 = config.Loss(0.2, 0.28, dual_clip=3.0, kl_coef=0.1, entropy_coef=0.05, aggregate="token_mean")
STAGE_2 = config.Loss(1.0, 4.0, dual_clip=0.0, kl_coef=0.0, entropy_coef=0.05, aggregate="sequence_sum")
VERL_MODES = {
    "token_mean": "token-mean",
    "sequence_mean": "seq-mean-token-mean",
    "sequence_sum": "seq-mean-token-sum",
    "constant": "seq-mean-token-sum-norm",
}
TRL_TYPES = {
    "bnpo": "token_mean",
    "dapo": "token_mean",
    "grpo": "sequence_mean",
    "luspo": "sequence_sum",
    "dr_grpo": "constant",
}


def batch(seed, shortest):
    """Hidden states, an unembedding, tokens, a mask of rows of at least `shortest` tokens, advantages, and old and
    reference log-probs."""
    rng = np.random.default_rng(seed)
    hidden, table = rng.normal(size=(P, G, R, D)), rng.normal(size=(D, V))
    tokens = rng.integers(0, V, (P, G, R))
    mask = np.arange(R) < rng.integers(shortest, R + 1, (P, G, 1))
    mask[0, 0], mask[0, 1] = True, np.arange(R) < shortest
    away = rng.normal(size=(2, P, G, R)) * np.reshape([0.5, 2.0], (2, 1, 1, 1))
    numbers = dict(hidden=hidden, table=table, advantage=rng.normal(size=(P, G, R)))
    b = types.SimpleNamespace(tokens=jnp.asarray(tokens), mask=mask, away=jnp.asarray(away, jnp.float32))
    vars(b).update({name: jnp.asarray(x, jnp.float32) for name, x in numbers.items()})
    return off_policy(b)


def off_policy(b):
    """The batch with old and reference log-probs at its distances from the policy's."""
    logp, _ = logp_of_groups(b.hidden, b.table, b.tokens)
    b.old, b.ref = logp + b.away  # near half a nat and 2 nats
    return b


def ours(b, settings, max_tokens):
    """(loss, its gradients to hidden states and unembedding, entropy, diagnostics), put together as in `train_step`."""
    numbers = vars(b) | {"weight": normaliser(b.mask, settings.aggregate, max_tokens)}
    (loss, (entropy, diagnostics)), gradient = _objective_and_gradient(b.hidden, b.table, numbers, settings)
    return loss, gradient, entropy, diagnostics


def _objective(hidden, table, b, settings):
    logp, entropy = logp_of_groups(hidden, table, b["tokens"])
    loss, diagnostics = policy_loss(logp, b["old"], b["ref"], entropy, b["advantage"], settings)
    return (b["weight"] * loss).sum(), (entropy, diagnostics)


def logp_of_groups(hidden_PGRD, table_DV, tokens_PGR):
    """`token_logprobs` of rows, in groups again."""
    results = token_logprobs(hidden_PGRD.reshape(P * G, R, D), table_DV, tokens_PGR.reshape(P * G, R), TEMPERATURE, 8)
    return tuple(x.reshape(P, G, R) for x in results)


_objective_and_gradient = jax.jit(jax.value_and_grad(_objective, (0, 1), has_aux=True), static_argnums=3)


def flat_tensors(b, *names):
    """Fields of a batch as torch tensors, [P·G, R]."""
    torch = pytest.importorskip("torch")
    return {name: torch.tensor(np.array(getattr(b, name)).reshape(P * G, R)) for name in names}


def agree(name, ours, theirs, rtol=1e-5, atol=2e-6):
    """Asserts equality to float32's precision; `pytest -rP` shows the largest differences."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    print(f"{name}: largest difference {np.abs(ours - theirs).max():.1e} of {np.abs(theirs).max():.1e}")
    np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=atol, err_msg=name)


# verl.


@pytest.fixture(scope="module")
def verl():
    core = pytest.importorskip("verl.trainer.ppo.core_algos", reason="needs verl==0.9.1")
    from verl.utils import torch_functional
    from verl.workers import config as workers
    from verl.workers.utils.losses import ppo_loss

    return types.SimpleNamespace(core=core, torch=torch_functional, actor=workers.FSDPActorConfig, ppo_loss=ppo_loss)


def verl_actor(verl, settings, max_tokens=None):
    return verl.actor(
        rollout_n=G,
        ppo_micro_batch_size_per_gpu=P * G,
        clip_ratio_low=settings.clip_low,
        clip_ratio_high=settings.clip_high,
        clip_ratio_c=settings.dual_clip or OUT_OF_REACH,
        loss_agg_mode=VERL_MODES[settings.aggregate],
        loss_scale_factor=max_tokens,
        entropy_coeff=settings.entropy_coef,
        use_kl_loss=settings.kl_coef > 0,
        kl_loss_coef=settings.kl_coef,
        kl_loss_type="low_var_kl",
    )


def verl_objective(verl, b, settings, max_tokens):
    """(loss, gradients, entropy, metrics) of verl's actor loss, from logits on."""
    torch = pytest.importorskip("torch")
    from tensordict import TensorDict

    hidden, table = (torch.tensor(np.array(x), requires_grad=True) for x in (b.hidden, b.table))
    logits = (hidden @ table / TEMPERATURE).reshape(P * G, R, V)
    rows = flat_tensors(b, "tokens", "mask", "old", "advantage", "ref")
    tokens = rows["tokens"].long()
    logp, entropy = verl.torch.logprobs_from_logits_naive(logits, tokens), verl.torch.entropy_from_logits(logits)
    # A model with a prompt of one token: its output in place t is about response token t, and the last is not read.
    packed = [torch.nn.functional.pad(x, (0, 1)).reshape(-1) for x in (logp, entropy)]
    data = TensorDict(
        {
            "response_mask": rows["mask"],
            "old_log_probs": rows["old"],
            "advantages": rows["advantage"],
            "ref_log_prob": rows["ref"],
            "prompts": tokens[:, :1],
            "responses": tokens,
            "attention_mask": torch.ones(P * G, 1 + R, dtype=int),
        },
        batch_size=P * G,
    )
    counted = b.mask.any(-1).sum() if settings.aggregate == "sequence_mean" else P * G
    data.set_non_tensor("dp_size", 1)
    data.set_non_tensor("batch_num_tokens", int(b.mask.sum()))
    data.set_non_tensor("global_batch_size", int(counted))
    outputs = {"log_probs": packed[0], "entropy": packed[1]}
    loss, metrics = verl.ppo_loss(verl_actor(verl, settings, max_tokens), outputs, data)
    loss.backward()
    return loss.detach(), (hidden.grad, table.grad), entropy.detach().reshape(P, G, R), metrics


@pytest.mark.parametrize(
    "settings",
    [STAGE_2, dataclasses.replace(STAGE_1, dual_clip=0.0)]
    + [dataclasses.replace(STAGE_1, aggregate=aggregate) for aggregate in VERL_MODES],
    ids=["stage_2", "no_dual_clip", *VERL_MODES],
)
def test_verl_actor_loss(verl, settings):
    for seed in range(3):
        b = batch(seed, shortest=0)
        loss, gradient, entropy, diagnostics = ours(b, settings, R + 2)
        their_loss, their_gradient, their_entropy, metrics = verl_objective(verl, b, settings, R + 2)
        agree("loss", loss, their_loss)
        agree("gradient to hidden states", gradient[0], their_gradient[0])
        agree("gradient to unembedding", gradient[1], their_gradient[1])
        agree("entropy", entropy, their_entropy)
        means = {
            "actor/pg_clipfrac": diagnostics.clipped,
            "actor/pg_clipfrac_lower": diagnostics.dual_clipped,
            "actor/ppo_kl": diagnostics.approx_kl,
        }
        for name, x in means.items():
            agree(name, x[b.mask].mean(), float(metrics[name].aggregate()))


def test_verl_on_policy_loss(verl):
    b = batch(7, shortest=1)
    b.old = b.old - b.away[0]
    loss, gradient, _, _ = ours(b, STAGE_1, R)
    their_loss, their_gradient, _, _ = verl_objective(verl, b, STAGE_1, R)
    agree("loss", loss, their_loss)
    agree("gradient to hidden states", gradient[0], their_gradient[0])


def test_verl_token_losses_beyond_the_clamps(verl):
    """One token a call, far off policy: the clamps of log-ratio and k3 are the same."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    numbers = np.concatenate([rng.normal(-10, 12, (3, 200)), rng.normal(size=(1, 200))]).astype(np.float32)
    logp, old, ref, advantage = jnp.asarray(numbers)
    actor = verl_actor(verl, STAGE_1)

    def policy(logp):
        x = (logp, old, ref, jnp.zeros_like(logp), advantage)
        settings = dataclasses.replace(STAGE_1, kl_coef=0.0, entropy_coef=0.0)
        return policy_loss(*(jnp.reshape(y, (1, 1, -1)) for y in x), settings)[0].ravel()

    vanilla = verl.core.get_policy_loss_fn("vanilla")
    kl_penalty = functools.partial(verl.core.kl_penalty, kl_penalty="low_var_kl")
    theirs = {"policy": [], "kl": []}
    for i in range(200):
        x, o, r, a = (torch.tensor([[y[i]]]) for y in numbers)
        x, one = x.requires_grad_(), torch.ones(1, 1)
        for name, value in (("policy", vanilla(o, x, a, one, "token-mean", actor)[0]), ("kl", kl_penalty(x, r).sum())):
            theirs[name].append((float(value.detach()), float(torch.autograd.grad(value, x)[0])))
    for name, function in (("policy", policy), ("kl", lambda logp: k3(logp, ref))):
        values, slopes = np.array(theirs[name]).T
        agree(f"{name} loss", function(logp), values, rtol=1e-5)
        agree(f"{name} gradient", jax.grad(lambda x: function(x).sum())(logp), slopes, rtol=1e-5)


@pytest.mark.parametrize("std_normalise", [True, False])
def test_verl_grpo_advantage(verl, std_normalise):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    reward = rng.choice([0.0, 0.25, 0.5, 1.0], (8, G))
    reward[0] = 0.5
    rows = torch.zeros(8 * G, R)
    rows[:, R - 2] = torch.tensor(reward.ravel(), dtype=torch.float32)
    mask = torch.tensor(np.arange(R) < R - 1).expand(8 * G, R).float()
    theirs, _ = verl.core.compute_grpo_outcome_advantage(
        rows, mask, np.repeat(np.arange(8), G), norm_adv_by_std_in_grpo=std_normalise
    )
    assigned, _ = advantages.grpo(reward, np.ones((8, G), bool), std_normalise=std_normalise, min_spread=0.0)
    agree("advantage", assigned[..., None] * mask.numpy().reshape(8, G, R), theirs.reshape(8, G, R), atol=1e-6)


# TRL.


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """TRL's trainer around a tiny model of its own: nothing of it is replaced."""
    trl = pytest.importorskip("trl", reason="needs trl==1.16.0")
    torch = pytest.importorskip("torch")
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("trl")
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(V)}, unk_token="t0"))
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V,
            hidden_size=D,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            tie_word_embeddings=False,
            pad_token_id=2,
            eos_token_id=1,
            bos_token_id=0,
        )
    )
    torch.manual_seed(0)
    torch.nn.init.normal_(model.lm_head.weight)
    model.save_pretrained(folder / "model")
    args = trl.GRPOConfig(
        output_dir=str(folder / "out"),
        use_cpu=True,
        bf16=False,
        report_to="none",
        per_device_train_batch_size=P * G,
        num_generations=G,
        max_completion_length=R,
        temperature=TEMPERATURE,
        beta=STAGE_1.kl_coef,
        epsilon=STAGE_1.clip_low,
        epsilon_high=STAGE_1.clip_high,
        entropy_coef=0.05,
        use_bias_correction_kl=False,
    )
    made = trl.GRPOTrainer(
        str(folder / "model"),
        args=args,
        reward_funcs=lambda completions, reward, **_: reward,
        train_dataset=Dataset.from_list([{"prompt": "t3 t4"}] * P * G),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t1", pad_token="t2"),
    )
    made.model.train()
    made.current_gradient_accumulation_steps = 1  # which its loop sets
    return made


@pytest.mark.parametrize(
    "loss_type, dual_clip, entropy_coef",
    [("bnpo", 0.0, 0.0), ("bnpo", 3.0, 0.05), ("dapo", 3.0, 0.05)] + [(name, 3.0, 0.0) for name in TRL_TYPES],
)
def test_trl_loss(trainer, monkeypatch, loss_type, dual_clip, entropy_coef):
    torch = pytest.importorskip("torch")
    settings = dataclasses.replace(
        STAGE_1, dual_clip=dual_clip, entropy_coef=entropy_coef, aggregate=TRL_TYPES[loss_type]
    )
    monkeypatch.setattr(trainer, "loss_type", loss_type)
    monkeypatch.setattr(trainer.args, "delta", dual_clip or None)
    monkeypatch.setattr(trainer, "_entropy_bonus_enabled", entropy_coef > 0)
    model = trainer.model
    for seed in range(3):
        b = batch(seed, shortest=1)
        b.away = b.away * jnp.reshape(jnp.array([1.0, 0.25]), (2, 1, 1, 1))  # k3 stays within our clamp
        rows = flat_tensors(b, "tokens", "mask", "advantage")
        prompt = torch.tensor([[3, 4]]).expand(P * G, 2)
        with torch.no_grad():
            hidden = model.model(torch.cat([prompt, rows["tokens"]], 1)).last_hidden_state[:, 1:-1]
        b.hidden = jnp.asarray(hidden.numpy().reshape(P, G, R, D))
        b.table = jnp.asarray(model.lm_head.weight.detach().numpy().T)
        rows |= flat_tensors(off_policy(b), "old", "ref")
        given = {
            "prompt_ids": prompt,
            "prompt_mask": torch.ones_like(prompt),
            "completion_ids": rows["tokens"],
            "completion_mask": rows["mask"].int(),
            "advantages": rows["advantage"],
            "old_per_token_logps": rows["old"],
            "ref_per_token_logps": rows["ref"],
            "num_items_in_batch": rows["mask"].sum(),
        }
        model.zero_grad()
        their_loss = trainer._compute_loss(model, given)
        their_loss.backward()
        loss, gradient, entropy, diagnostics = ours(b, settings, R)
        agree("loss", loss, their_loss.detach())
        agree("gradient to unembedding", gradient[1], model.lm_head.weight.grad.T)
        means = {"entropy": entropy, "kl": diagnostics.kl, "clip_ratio/region_mean": diagnostics.clipped}
        for name, x in means.items():
            agree(name, x[b.mask].mean(), trainer._metrics["train"][name][-1])


@pytest.mark.parametrize("std_normalise", [True, False])
def test_trl_grpo_advantage(trainer, monkeypatch, std_normalise):
    """Unscorable rollouts leave mean and standard deviation in TRL too."""
    monkeypatch.setattr(trainer, "scale_rewards", "group" if std_normalise else "none")
    reward = np.array([[0, 0.25, 1, 0.5], [0.5, 0.5, 0.5, 0.5], [1, 0, 0, 0.75]])
    valid = np.array([[True] * 4, [True] * 4, [True, True, False, True]])
    rows = [{"prompt": "t3 t4", "reward": float(r) if ok else None} for r, ok in zip(reward.ravel(), valid.ravel())]
    theirs = trainer._generate_and_score_completions(rows)["advantages"]
    assigned, _ = advantages.grpo(reward, valid, std_normalise=std_normalise, min_spread=0.0, eps=1e-4)
    agree("advantage", assigned, theirs.reshape(P, G), atol=1e-6)
