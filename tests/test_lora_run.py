"""Runs that train adapters: what they train, what they leave behind, and that it is learning."""

import contextlib
import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from test_diagnostics import FAST, LetterGraders, LetterJudge, letters
from tiny_runs import (
    assert_same_parameters,
    assert_same_rows,
    config_dict,
    opened,
    parameters,
    rows,
    run,
    take_step,
    tiny,
)

from exprl_jax import distill, sft, train
from exprl_jax.resolve import resolve
from exprl_jax.rl_run import first_state, open_run
from exprl_jax.run import loop
from exprl_jax.wave import WaveRequest, sample_wave
from exprl_jax.weights.folder import export_folder
from exprl_jax.weights.language_model import open_model
from tests.oracles.tiny_decoder import forward_logits

STEPS = 3
TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
LIVE = {"steps": STEPS, "optimizer.learning_rate": 1e-2}
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 24), dtype=np.int32)


def live(changes=None):
    return tiny("lora", LIVE | (changes or {}))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted."""
    return run(live(), tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """What its adapters stand on, as a folder."""
    made = opened(live())
    folder = tmp_path_factory.mktemp("base") / "export"
    export_folder(made.base, made.policy.arch, made.policy.execution, folder, made.policy.tokenizer, "float32")
    return folder


def adapters(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


# ------------------------------------------------------------------------------------------------ what a run trains


def test_a_step_changes_the_adapters_and_nothing_else():
    with contextlib.ExitStack() as stack:
        made = open_run(live(), stack)
        state = first_state(made)
        before = jax.device_get((made.base, state.params))
        trained = sum(x.size for x in jax.tree.leaves(state.params))
        moments = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
        for step in range(2):  # in the first only B has a gradient
            state, _ = take_step(train, made, state, step)
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(state.params)}
    assert names == {name + part for name in TARGETS for part in ("_lora_a", "_lora_b")}
    assert moments == 2 * trained < made.policy.arch.parameters / 2
    # One frozen copy is base, reference and judge.
    assert list(made.frozen) == [made.config.policy] == [made.config.reference] == [made.config.judge.model]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(made.base), before[0])
    for (path, new), old in zip(jax.tree_util.tree_leaves_with_path(state.params), jax.tree.leaves(before[1])):
        assert (np.asarray(new) != old).any(), path


def test_every_step_of_the_whole_run_moves_the_adapters(whole):
    """Else the comparisons below would prove little."""
    assert len({row["policy/entropy"] for row in rows(whole)}) == STEPS
    assert all(row["grad/norm"] > 0 and row["update/skipped"] == 0 for row in rows(whole))


# ------------------------------------------------------------------------------------------------ what a run leaves


def transformers_logits(model):
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS).long()).logits.float().numpy()


def read_transformers(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def test_the_export_is_an_ordinary_model(whole, base):
    """Merged: it differs from the base in every target and in nothing else, and loads here and in transformers."""
    ours, start = parameters(whole), load_file(base / "model.safetensors")
    assert ours.keys() == start.keys()
    for name in ours:
        target = name.rpartition("_proj.weight")[1] != ""
        assert (ours[name] != start[name]).any() == target, name
    made = opened(live({"policy.weights": str(whole / "export"), "lora.rank": 0}))
    params = jax.device_get(first_state(made).params)
    logits = forward_logits(
        jax.tree.map(jnp.asarray, params), made.policy.arch, made.policy.execution, jnp.asarray(TOKENS)
    )
    np.testing.assert_allclose(logits, transformers_logits(read_transformers(whole / "export")), atol=1e-4)


def test_the_merged_targets_are_the_adapters_on_their_base(whole, base):
    own, start, ours, config = adapters(whole), load_file(base / "model.safetensors"), parameters(whole), live()
    stems = {name.partition(".lora_")[0] for name in own}
    assert len(own) == 2 * len(stems)
    for stem in stems:
        a, b = (own[f"{stem}.lora_{part}.weight"].astype(np.float64) for part in "AB")
        name = f"{stem.removeprefix('base_model.model.')}.weight"
        np.testing.assert_allclose(ours[name], start[name] + config.lora.alpha / 4 * (b @ a), atol=1e-6, err_msg=name)
        assert a.shape[0] == b.shape[1] == 4 and b.any()


# Of PEFT about transformers, neither of them ours.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_makes_the_exported_model_of_base_and_adapter(whole, base):
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(read_transformers(base), whole / "adapter").eval()
    expected = transformers_logits(read_transformers(whole / "export"))
    np.testing.assert_allclose(transformers_logits(theirs), expected, atol=1e-4)
    assert np.abs(transformers_logits(read_transformers(base)) - expected).max() > 1e-2
    assert (
        json.loads((whole / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == "random:qwen3"
    )


def test_a_run_stopped_at_a_step_goes_on_as_if_it_had_not(whole, tmp_path, monkeypatch, capfd):
    asked = iter([True])
    monkeypatch.setattr(loop.StopRequest, "agreed", lambda self: next(asked))
    folder = run(live(), tmp_path / "run")
    assert not (folder / "export").exists() and not (folder / "adapter").exists()
    monkeypatch.setattr(loop.StopRequest, "agreed", lambda self: False)
    run(live(), folder)
    assert f"resuming after step 1 of {STEPS}" in capfd.readouterr().err
    assert rows(folder) == rows(whole)
    assert_same_parameters(folder, whole)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (folder / "adapter" / name).read_bytes() == (whole / "adapter" / name).read_bytes()


@pytest.mark.slow
def test_waves_microbatches_and_the_mesh_change_nothing(whole, tmp_path):
    folder = run(live({"mesh.data": 4, "mesh.model": 2, "rollout.wave": 4, "updates.microbatch": 4}), tmp_path / "run")
    differing = {"update/padding"}  # of the rows, which are other ones
    ours, theirs = ([{k: v for k, v in row.items() if k not in differing} for row in rows(x)] for x in (folder, whole))
    assert_same_rows(ours, theirs, 1e-3)
    for name, tensor in adapters(whole).items():
        np.testing.assert_allclose(adapters(folder)[name], tensor, atol=1e-3, err_msg=name)


# ------------------------------------------------------------------------------------------------ doors


@pytest.mark.parametrize("below", ["", "checkpoints/1", "checkpoints/3"])
def test_a_runs_adapters_are_no_model(whole, below):
    model = dataclasses.replace(live().policy, weights=str(whole / below))
    with pytest.raises(ValueError) as caught:
        open_model(model)
    text = str(caught.value)
    assert text.startswith(f"model {whole / below}: its run trained adapters") and "\n" not in text
    assert text.endswith(f"name {whole}/export")
    assert open_model(dataclasses.replace(model, weights=str(whole / "export"))).arch == opened(live()).policy.arch


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"targets": "q,k,w"}, "config.lora.targets: got 'q,k,w', expected some of q,k,v,o,gate,up,down"),
        ({"targets": "q,v,q"}, "config.lora.targets: got 'q,v,q', expected some of q,k,v,o,gate,up,down, each once"),
        ({"targets": ""}, "config.lora.targets: got '', expected some of"),
        ({"targets": "q, v"}, "config.lora.targets: got 'q, v', expected some of"),
        ({"rank": -1}, "config.lora.rank: got -1, expected"),
        ({"alpha": 0.0}, "config.lora.alpha: got 0.0, expected"),
    ],
)
@pytest.mark.parametrize("arm", ["lora", "sft"])
def test_refuses(arm, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        resolve(config_dict("tiny", arm, {f"lora.{name}": value for name, value in changes.items()}))
    assert "\n" not in str(caught.value)


def test_another_rank_is_another_run(whole):
    with pytest.raises(ValueError, match="holds a run of another config .*lora.rank: 2 != 4"):
        run(live({"lora.rank": 2}), whole)


# ------------------------------------------------------------------------------------------------ that it learns


def share(made, state):
    """Of lower-case letters in fresh rollouts."""
    request = WaveRequest(made.problems[:8], np.arange(8), step=10_000, attempt=0, live_P=np.ones(8, bool))
    wave = sample_wave(made, made.model(state), request)
    texts = [
        made.policy.tokenizer.decode(np.asarray(row).tolist()) for group in wave.rollouts.tokens_PGR for row in group
    ]
    return np.mean([letters(text) for text in texts])


@pytest.mark.slow
def test_rewards_move_the_policy_their_way():
    """The diagnostic of full training, through adapters; with the sign reversed, the other way."""
    letters_by_sign = {}
    made = opened(tiny("lora", FAST | {"optimizer.learning_rate": 1e-2}))
    for sign in (1, -1):
        signed = dataclasses.replace(made, judge=LetterJudge(sign, 16), graders=LetterGraders(sign))
        state = first_state(signed)
        letters_by_sign[0] = share(signed, state)
        for step in range(8):
            state, _ = take_step(train, signed, state, step)
        letters_by_sign[sign] = share(signed, state)
    assert letters_by_sign[1] > letters_by_sign[0] + 0.01, letters_by_sign
    assert letters_by_sign[-1] < letters_by_sign[0] - 0.01, letters_by_sign


def test_an_imitators_loss_falls(tmp_path):
    changes = {
        "data.source": live().data.source,
        "batch": 16,
        "epochs": 2,
        "lora.rank": 4,
        "optimizer.learning_rate": 3e-3,
    }
    sft.sft(resolve(config_dict("tiny", "sft", changes)), str(tmp_path / "run"))
    losses = [row["loss/total"] for row in rows(tmp_path / "run")]
    assert losses[-1] < losses[0] - 0.2, losses
    assert len(adapters(tmp_path / "run")) == 2 * 7 * opened(live()).policy.arch.layers


@pytest.mark.slow
@pytest.mark.parametrize("kl", ["sampled", "full"])
def test_a_teacher_draws_adapters_to_itself(kl):
    """The teacher is surer than the base, a copy of which in another dtype it is made of.  The KL to it falls; with a
    negative learning rate it grows."""
    growth = {}
    for sign in (1, -1):
        changes = {"distillation.kl": kl, "lora.rank": 4, "reference.param_dtype": "bfloat16"}
        config, gaps = tiny("distill", FAST | changes), []
        optimizer = dataclasses.replace(config.optimizer, learning_rate=sign * 5e-3)
        config = dataclasses.replace(config, optimizer=optimizer)
        with contextlib.ExitStack() as stack:
            distilled = distill.open_distill_run(config, stack)
        start = distilled.run.frozen[config.reference]
        frozen = distilled.run.frozen | {config.reference: start | {"final_norm": 3.0 * start["final_norm"]}}
        run = dataclasses.replace(distilled.run, frozen=frozen, graders=LetterGraders(1))
        distilled, state = dataclasses.replace(distilled, run=run), first_state(run)
        for step in range(12):
            state, result = take_step(distill, distilled, state, step)
            gaps.append(result.row["distill/kl"])
        growth[sign] = np.mean(gaps[-4:]) / np.mean(gaps[:4])
    assert growth[1] < 1.0, growth
    assert growth[-1] > 1.3, growth
