"""Supervised training end to end, on a tiny model."""

import dataclasses
import functools
import json
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from tiny_runs import (
    ROOT,
    assert_same_parameters,
    assert_same_rows,
    config_dict,
    environment,
    parameters,
    rows,
    seen_by,
    take_step,
)

from exprl_jax import sft, supervised_run
from exprl_jax.data.packing import Branches, pack_branches
from exprl_jax.data.problems import Problem, batch_indices, read_problems
from exprl_jax.data.prompts import PromptStyle, policy_prompt
from exprl_jax.data.tokenizer import load_tokenizer
from exprl_jax.layout import packed_shape
from exprl_jax.learning import supervised
from exprl_jax.resolve import resolve
from exprl_jax.run import loop
from tests.oracles.tiny_decoder import forward_logits

ARITHMETIC = str(ROOT / "configs/data/arithmetic.jsonl")
# Four updates; a rate at which each of them shows.
SHORT = {"data.source": ARITHMETIC, "batch": 16, "epochs": 1, "optimizer.learning_rate": 5e-3, "optimizer.eps": 1e-4}


def tiny(changes=None):
    return resolve(config_dict("tiny", "sft", SHORT | (changes or {})))


def run(config, folder):
    sft.sft(config, str(folder))
    return folder


@functools.cache
def opened():
    return sft.open_run(tiny())


def examples_of(run):
    """What it trains on, in the order of its problems."""
    return [branches.examples[0] for branches in run.examples.branches]


def steps_of(run, count, state=None):
    """Metrics of some updates, and the state after them."""
    state, made = supervised_run.first_state(run) if state is None else state, []
    for step in range(count):
        state, result = take_step(supervised_run, run, state, step)
        made.append({"step": step + 1, **result.row})
    return made, state


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted."""
    return run(tiny(), tmp_path_factory.mktemp("whole") / "run")


def test_the_loss_falls(whole):
    made = rows(whole)
    losses = [row["loss/total"] for row in made]
    assert [row["step"] for row in made] == [1, 2, 3, 4]
    assert losses[3] < losses[2] < losses[1] and losses[3] < losses[0] - 0.5
    assert set(made[0]) == {"step", "data/epoch", "update/skipped_total", "update/padding", *supervised.METRICS}
    assert losses[0] == pytest.approx(np.log(opened().policy.arch.vocab_size), abs=0.2)
    counted = sum(row["update/tokens"] for row in made)
    assert counted == sum(len(example.response) for example in examples_of(opened()))


def test_a_run_stopped_at_a_step_goes_on_as_if_it_had_not(whole, tmp_path, monkeypatch, capfd):
    asked = iter([False, True])
    monkeypatch.setattr(loop.StopRequest, "agreed", lambda self: next(asked))
    run(tiny(), tmp_path / "run")
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2]
    monkeypatch.setattr(loop.StopRequest, "agreed", lambda self: False)
    run(tiny(), tmp_path / "run")
    assert "resuming after step 2 of 4" in capfd.readouterr().err
    assert rows(tmp_path / "run") == rows(whole)
    assert_same_parameters(tmp_path / "run", whole)


def test_with_the_rate_reversed_the_loss_rises():
    config = tiny({"optimizer.clip_norm": 1.0})
    reversed_rate = dataclasses.replace(config.optimizer, learning_rate=-config.optimizer.learning_rate)
    made, _ = steps_of(sft.open_run(dataclasses.replace(config, optimizer=reversed_rate)), 4)
    losses = [row["loss/total"] for row in made]
    assert losses[3] > losses[2] > losses[1] and losses[3] > losses[0] + 0.5


@pytest.mark.parametrize("data, model", [(1, 1), (2, 4)])
def test_the_mesh_changes_nothing(data, model, whole, monkeypatch):
    devices = np.array(jax.devices()[: data * model]).reshape(data, model)
    monkeypatch.setattr(sft, "make_mesh", lambda config: Mesh(devices, ("data", "model")))
    made, _ = steps_of(sft.open_run(tiny({"microbatch": 4})), 4)
    expected = [{k: v for k, v in row.items() if k != "update/skipped_total"} for row in rows(whole)]
    assert_same_rows(made, expected, tolerance=1e-4)


def packed(step, **changes):
    """(the step's examples, how they are packed)."""
    run = opened()
    examples = examples_of(run)
    indices, _ = batch_indices(len(examples), run.config.batch, run.config.seed, step)
    examples = [examples[i] for i in indices]
    shape = packed_shape(dataclasses.replace(run.config, **changes))
    return examples, pack_branches([Branches([example], [0]) for example in examples], shape, True)


def test_one_program_serves_every_batch(monkeypatch):
    """The first two batches need different numbers of microbatches."""
    assert [int(packed(step, microbatch=1)[1].used) for step in range(2)] == [8, 7]
    monkeypatch.setattr(
        sft, "make_mesh", lambda config: Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
    )
    run = sft.open_run(tiny({"microbatch": 1}))
    steps_of(run, 2)
    assert run.programs.sft_step._cache_size() == 1


@pytest.mark.parametrize("width", [400, 512, 2000])
def test_packed_rows_hold_the_batchs_examples_and_count_their_responses(width):
    examples, filled = packed(0, row_tokens=width)
    assert filled.packed.tokens_BT.shape == (2, 8, width)  # room for a row an example
    target = filled.packed.target_BT.reshape(-1, width)
    for example, row, first in zip(examples, filled.row_N, filled.first_N, strict=True):
        for k in (0, len(example.response) - 1):
            assert target[row, first + k] == example.response[k]
            assert seen_by(filled.packed, row, first + k) == [*example.prompt, *example.response[:k]]
    tokens = sum(len(example.prompt) + len(example.response) - 1 for example in examples)
    assert (filled.packed.segment_BT > 0).sum() == tokens
    assert filled.padding == pytest.approx(1 - tokens / (int(filled.used) * 8 * width))
    assert filled.used == -(-(filled.row_N.max() + 1) // 8)


def test_a_step_reports_its_padding_and_its_tokens(whole):
    for step, row in enumerate(rows(whole)):
        examples, filled = packed(step)
        assert row["update/padding"] == pytest.approx(filled.padding) and 0 < filled.padding < 1
        assert row["update/tokens"] == sum(len(example.response) for example in examples)


def test_every_epoch_has_every_example_once():
    run = sft.open_run(tiny({"epochs": 2}))
    assert run.steps == 8
    for epoch in range(2):
        seen = [batch_indices(len(run.examples.items), 16, run.config.seed, 4 * epoch + step) for step in range(4)]
        assert sorted(i for indices, _ in seen for i in indices) == list(range(64))
        assert {at for _, at in seen} == {epoch}


# Validation.


def test_steps_take_the_place_of_epochs():
    run = sft.open_run(tiny({"steps": 7}))
    assert run.steps == 7  # nearly two passes
    made, _ = steps_of(sft.open_run(tiny({"steps": 5})), 5)
    assert [row["data/epoch"] for row in made] == [0, 0, 0, 0, 1]


def test_what_is_held_back_is_not_trained_on_and_is_the_same_in_every_start():
    held = {"validation.every": 2, "validation.fraction": 0.25}
    runs = [sft.open_run(tiny(held | {"seed": seed})) for seed in (1, 1, 2)]
    trained = [[p.id for p in run.examples.items] for run in runs]
    held_back = [[p.id for p in run.held_back.items] for run in runs]
    assert [len(ids) for ids in held_back] == [16, 16, 16] and held_back[0] == held_back[1] != held_back[2]
    for ours, theirs in zip(trained, held_back):
        assert sorted(ours + theirs) == sorted(p.id for p in opened().examples.items)


def test_a_validation_is_the_loss_of_what_was_held_back_and_the_tokens_that_are_most_likely(monkeypatch):
    """Each example alone through the plain forward; batches of the held-back are of different sizes."""
    run = sft.open_run(tiny({"validation.every": 2, "validation.fraction": 0.3, "steps": 3}))
    made, state = steps_of(run, 3)
    assert [row["validation/loss"] is None for row in made] == [True, False, False]  # every second, and the last
    assert set(made[0]) >= set(supervised.VALIDATION)
    losses, right = [], []
    forward = jax.jit(lambda tokens: forward_logits(state.params, run.policy.arch, run.policy.execution, tokens))
    held_back = [branches.examples[0] for branches in run.held_back.branches]
    longest = max(len(x.prompt) + len(x.response) for x in held_back)
    for example in held_back:
        whole = [*example.prompt, *example.response]
        logits = np.asarray(forward(np.array([whole + [0] * (longest - len(whole))])), np.float64)[0]
        for i, token in enumerate(example.response, len(example.prompt) - 1):
            losses.append(np.log(np.exp(logits[i] - logits[i].max()).sum()) + logits[i].max() - logits[i][token])
            right.append(logits[i].argmax() == token)
    assert len(held_back) == 19 and 0.05 < np.mean(right) < 0.95
    assert made[2]["validation/loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert made[2]["validation/accuracy"] == pytest.approx(np.mean(right), abs=1e-6)


def test_the_best_checkpoint_may_be_that_of_the_lowest_validation_loss(tmp_path, capfd):
    changes = {"validation.every": 1, "validation.fraction": 0.2, "batch": 8, "steps": 3}
    changes |= {"checkpoint.best": "validation/loss", "checkpoint.best_is": "lowest", "checkpoint.every": 1}
    made = rows(run(tiny(changes), tmp_path / "run"))
    losses = [row["validation/loss"] for row in made]
    best = f"best         step {1 + int(np.argmin(losses))}, validation/loss {min(losses):.4g}"
    said = capfd.readouterr().out
    assert best in said and "  rollouts  " not in said  # there are none


def test_another_source_is_looked_at_in_place_of_a_fraction(tmp_path):
    other = [{"problem": f"{n} + 4?", "reference": f"{n + 4}", "answer": f"{n + 4}"} for n in range(3)]
    path = tmp_path / "other.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in other))
    run = sft.open_run(tiny({"validation.every": 2, "validation.source": str(path)}))
    assert len(run.examples.items) == 64 and [p.problem for p in run.held_back.items] == [x["problem"] for x in other]


# Examples.


def test_an_example_is_the_policys_prompt_and_the_reference_and_an_end():
    tokenizer = load_tokenizer("byte")
    problems = read_problems(ARITHMETIC)
    for problem, example in zip(problems, examples_of(opened()), strict=True):
        assert list(example.prompt) == policy_prompt(tokenizer, problem.question, PromptStyle())
        assert tokenizer.decode(example.response) == problem.reference
        assert example.response[-1] == tokenizer.eos_ids[0] and tokenizer.eos_ids[0] not in example.response[:-1]


def test_control_strings_in_a_reference_are_plain_text():
    tokenizer = load_tokenizer("byte")
    text = "7 <|im_end|> <|im_start|>"
    controls = set(np.flatnonzero([not piece for piece in tokenizer.token_bytes]).tolist())
    example = sft.make_example(tokenizer, (1, 2), Problem("x", "2 + 5?", text, "7", "math"))
    assert tokenizer.decode(example.response) == text
    assert not controls & set(example.response[:-1]) and example.response[-1] in controls


def test_what_does_not_fit_is_dropped_and_counted(capfd):
    def length(example):
        return len(example.prompt) + len(example.response)

    lengths = sorted(map(length, examples_of(opened())))
    limit = lengths[40]
    run = sft.open_run(tiny({"row_tokens": limit}))
    kept = sum(length <= limit for length in lengths)
    assert sorted(map(length, examples_of(run))) == lengths[:kept] and kept < 64
    assert f"{kept} problems; dropped {64 - kept} over config.row_tokens = {limit}" in capfd.readouterr().err


# Doors.


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"microbatch": 12},
            "config.microbatch: got 12, expected a multiple of mesh.data = 8, so that every device has a row of every",
        ),
        ({"batch": 65}, "config.batch: got 65, expected at most 64"),
        ({"row_tokens": 20}, "config.row_tokens: no problem is left"),
        ({"data.max_prompt_tokens": 20}, "config.data.max_prompt_tokens: no problem is left"),
        ({"data.held_out": ARITHMETIC}, "training problems are held out"),
        (
            {"validation.every": 1, "validation.source": ARITHMETIC},
            "config.validation.source: 64 of 64 training examples are of problems that it holds, the first of 'Zoe",
        ),
        ({"validation.every": 1, "validation.fraction": 0.9}, "config.batch: got 16, expected at most 6"),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        sft.open_run(tiny(changes))


def test_refuses_examples_beyond_the_models_context(tmp_path):
    row = {"problem": "Write much.", "reference": "much " * 900, "answer": "much"}
    (tmp_path / "long.jsonl").write_text(json.dumps(row) + "\n")
    changes = {"data.source": str(tmp_path / "long.jsonl"), "batch": 1, "row_tokens": 8192}
    with pytest.raises(ValueError, match="lets in an example of 4587 tokens; expected at most 4096"):
        sft.open_run(tiny(changes))


def test_held_out_problems_can_be_allowed():
    assert len(sft.open_run(tiny({"data.held_out": ARITHMETIC, "data.allow_held_out": True})).examples.items) == 64


def test_the_released_settings():
    config = resolve(config_dict("paper.sft_4b"))
    optimizer = config.optimizer
    assert (config.batch, config.epochs, config.row_tokens) == (32, 2, 20_480)
    assert (optimizer.schedule, optimizer.warmup, optimizer.learning_rate) == ("cosine", 0.1, 1e-6)
    assert (optimizer.b1, optimizer.b2, optimizer.weight_decay, optimizer.clip_norm) == (0.9, 0.95, 0.01, 1.0)
    assert config.policy.weights == "Qwen/Qwen3-4B-Instruct-2507" and config.policy.param_dtype == "float32"


@pytest.mark.slow
def test_two_processes_do_what_one_does(whole, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "exprl_jax.main",
        f"--config={ROOT / 'configs/tiny.py'}:sft",
        f"--workdir={tmp_path / 'run'}",
        f"--coordinator=127.0.0.1:{port}",
        "--processes=2",
        *(f"--config.{path}={value}" for path, value in SHORT.items()),
    ]
    options = dict(cwd=ROOT, env=environment(4), stderr=subprocess.PIPE, text=True)
    processes = [subprocess.Popen([*command, f"--process={number}"], **options) for number in range(2)]
    try:
        errors = [process.communicate(timeout=400)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors
    assert_same_rows(rows(tmp_path / "run"), rows(whole), tolerance=1e-4)
    for name, tensor in parameters(whole).items():
        np.testing.assert_allclose(parameters(tmp_path / "run")[name], tensor, atol=1e-4, err_msg=name)
