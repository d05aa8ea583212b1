"""Row width and microbatch that a config leaves to the program: by hand, as recorded, and in whole runs."""

import contextlib
import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import LIVELY, config_dict, opened, tiny

from exprl_jax import main
from exprl_jax.config import Execution
from exprl_jax.distill import open_distill_run
from exprl_jax.plan.dry_run import describe
from exprl_jax.resolve import resolve
from exprl_jax.sizes import Lengths, choose_sizes, recorded_sizes, row_width, sizes_of, update_bytes
from exprl_jax.weights.families import FAMILIES

CHOSEN = {"updates.row_tokens": 0, "updates.microbatch": 0}
ARCH = FAMILIES["qwen3"].architecture(
    "qwen3",
    vocab_size=1000,
    width=100,
    ffn=300,
    layers=4,
    heads=4,
    kv_heads=2,
    head_size=20,
    rope_theta=1e4,
    rope_scaling=None,
    norm_eps=1e-6,
    tied=True,
    max_positions=4096,
)


def sft(changes):
    return resolve(config_dict("tiny", "sft", {"microbatch": 0, "row_tokens": 0} | changes))


@pytest.mark.parametrize(
    "lengths, width",
    [
        (Lengths(90, 90, 64), 384),  # four of them are 360 tokens
        (Lengths(90, 90, 2), 256),  # there are no more than two
        (Lengths(300, 200, 64), 1024),  # three are 900
        (Lengths(600, 600, 64), 640),  # two would be more than 1,024
        (Lengths(20_000, 20_000, 64), 20_096),
        (Lengths(1, 1, 64), 128),
    ],
)
def test_rows_hold_up_to_four_of_the_longest_within_1024_tokens(lengths, width):
    assert row_width(lengths) == width


@given(st.integers(1, 50_000), st.integers(1, 1000))
def test_the_longest_always_fits_and_kernels_divide_the_row(longest, sequences):
    width = row_width(Lengths(longest, longest, sequences))
    assert width >= longest and width % 128 == 0
    assert width < longest + 128 or width <= 1024


def test_a_microbatch_is_a_quarter_of_an_update_at_most():
    """64 examples of 83 tokens are 14 rows of 384: a microbatch of 16 of them was computed whole on every step."""
    chosen = choose_sizes(sft({"batch": 64}), Lengths(83, 83.0, 64), ARCH, 1, None, "cpu")
    assert sizes_of(chosen) == (384, 2)
    # On an accelerator tokens would allow 42 rows; a quarter of the 14 are 3.
    chosen = choose_sizes(sft({"batch": 64}), Lengths(83, 83.0, 64), ARCH, 1, None, "gpu")
    assert sizes_of(chosen) == (384, 3)


@pytest.mark.parametrize("shards, platform, rows", [(1, "cpu", 2), (1, "gpu", 42), (4, "gpu", 4 * 42), (8, "cpu", 16)])
def test_a_microbatch_has_enough_tokens_for_every_device(shards, platform, rows):
    """1,024 tokens on a CPU are 2 rows of 384, 16,384 on an accelerator 42."""
    chosen = choose_sizes(sft({}), Lengths(96, 96.0, 100_000), ARCH, shards, None, platform)
    assert sizes_of(chosen) == (384, rows)


def test_no_more_rows_than_memory_holds():
    """By hand: a layer has 6·100 + 2·80 + 2·40 + 3·300 = 1,740 numbers a token, and logits 3 · 1000 · chunk float32."""
    execution = Execution(scan_layers=True, compute_dtype="float32", remat="full", kv_dtype="compute")
    assert update_bytes(ARCH, execution, 50) == (12 * 50 * 1000, 4 * 4 * 100 + 2 * 4 * 1740)
    kept = dataclasses.replace(execution, remat="none", compute_dtype="bfloat16")
    assert update_bytes(ARCH, kept, 50)[1] == 2 * 1740 * (4 + 2)
    lengths = Lengths(96, 96.0, 100_000)
    config = sft({"logp_chunk": 50})
    config = dataclasses.replace(config, policy=dataclasses.replace(config.policy, execution=execution))
    for rows in (1, 5, 30):
        free = (600_000 + rows * 384 * 15_520) / 0.7
        assert sizes_of(choose_sizes(config, lengths, ARCH, 1, int(free) + 10, "gpu")) == (384, rows)
    assert sizes_of(choose_sizes(config, lengths, ARCH, 2, 0, "gpu")) == (384, 2)  # a row a device it must be


def test_what_the_config_says_stays():
    lengths = Lengths(96, 96.0, 1000)
    assert sizes_of(choose_sizes(sft({"row_tokens": 512}), lengths, ARCH, 1, None, "cpu")) == (512, 2)
    assert sizes_of(choose_sizes(sft({"microbatch": 8}), lengths, ARCH, 1, None, "cpu")) == (384, 8)


def test_a_run_that_goes_on_keeps_what_was_chosen_for_it():
    """Unless the config gives a number, or this mesh (8 devices) cannot divide the rows."""
    recorded = {"updates": {"row_tokens": 777, "microbatch": 16}}
    assert sizes_of(recorded_sizes(tiny(changes=CHOSEN), recorded)) == (777, 16)
    assert sizes_of(recorded_sizes(tiny(changes={"updates.microbatch": 0}), recorded)) == (320, 16)
    recorded["updates"]["microbatch"] = 12
    assert sizes_of(recorded_sizes(tiny(changes=CHOSEN), recorded)) == (777, 0)
    assert sizes_of(recorded_sizes(tiny(changes=CHOSEN), {})) == (0, 0)
    assert sizes_of(recorded_sizes(sft({}), {"row_tokens": 512, "microbatch": 8})) == (512, 8)


def test_rollouts_fit_beside_the_longest_prompt(capsys):
    run = opened(tiny(changes=CHOSEN))
    longest = max(len(run.prompts.ids[p.id]) for p in run.problems) + run.config.rollout.max_tokens
    row_tokens, microbatch = sizes_of(run.config)
    assert row_tokens == row_width(Lengths(longest, longest, 32)) and microbatch == 8
    output = capsys.readouterr().err
    expected = f"config.updates.row_tokens = {row_tokens}, config.updates.microbatch = 8: for sequences of up to"
    assert f"{expected} {longest} tokens, 32 an update" in output


def test_a_distilled_runs_rows_hold_its_teachers_prompts():
    with contextlib.ExitStack() as stack:
        distilled = open_distill_run(resolve(config_dict("tiny", "distill", LIVELY | CHOSEN)), stack)
    longest = max(map(len, distilled.prompts.ids.values())) + distilled.run.config.rollout.max_tokens
    assert max(map(len, distilled.run.prompts.ids.values())) < max(map(len, distilled.prompts.ids.values()))
    assert sizes_of(distilled.run.config)[0] == row_width(Lengths(longest, longest, 32))


@pytest.mark.long
def test_a_run_records_its_sizes_and_goes_on_with_them(tmp_path, capsys):
    """An earlier version may have chosen otherwise."""
    config = sft({"data.source": LIVELY["data.source"], "batch": 16, "epochs": 1, "checkpoint.every": 2})
    main._run(config, str(tmp_path / "run"), False)
    path = tmp_path / "run" / "config.json"
    recorded = json.loads(path.read_text())
    assert recorded["row_tokens"] and recorded["microbatch"]
    assert "config.row_tokens = " in capsys.readouterr().err
    # Its own rule, undone by hand.
    path.write_text(json.dumps(recorded | {"row_tokens": recorded["row_tokens"] + 128}))
    main._run(config, str(tmp_path / "run"), False)
    assert json.loads(path.read_text())["row_tokens"] == recorded["row_tokens"] + 128


def test_a_plan_takes_budgets_for_lengths_and_refuses_what_only_data_say():
    output = describe(tiny(changes=CHOSEN | {"mesh.data": 1}))
    assert "rows of 1024 tokens" in output  # four times 216 + 24 within 1,024
    with pytest.raises(ValueError, match="^config.row_tokens, config.microbatch: got 0, which a run chooses from its"):
        describe(sft({"mesh.data": 1}))
