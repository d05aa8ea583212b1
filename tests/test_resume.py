"""A run that was stopped, killed, extended or damaged ends with the bits and the rows of one that never was."""

import json
import os
import random
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
from tiny_runs import (
    LONG,
    ROOT,
    assert_same_parameters,
    command,
    environment,
    parameters,
    read_jsonl,
    rows,
    run,
    tiny,
    write_problems,
)

from exprl_jax import wave
from exprl_jax.rollout.lengths import deal
from exprl_jax.run import loop

STEPS = 4


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of four steps, uninterrupted."""
    return run(tiny("outcome", {"steps": STEPS}), tmp_path_factory.mktemp("whole") / "run")


def resampling(changes):
    """A spread that untrained rollouts seldom have, so that groups are sampled again at every step."""
    again = {"rollout.max_resample": 2, "advantage.min_logits_spread": 0.5, "advantage.overlong": "keep"}
    return tiny("outcome", {"steps": STEPS} | again | changes)


def assert_as_whole(folder, whole):
    assert rows(folder) == rows(whole)
    assert_same_parameters(folder, whole)
    written = sorted(path.name for path in (folder / "rollouts").iterdir())
    assert written == [f"step_{step:06d}.jsonl" for step in range(1, STEPS + 1)]
    for name in written:
        assert (folder / "rollouts" / name).read_text() == (whole / "rollouts" / name).read_text()


def test_every_step_of_the_whole_run_moves_the_parameters(whole):
    """Else the comparisons below would prove little."""
    assert len({row["policy/entropy"] for row in rows(whole)}) == STEPS
    assert all(row["grad/norm"] > 0 for row in rows(whole))


@pytest.mark.parametrize("every", [1, 3], ids=["saved every step", "saved every third step"])
def test_a_run_stopped_at_a_step_goes_on_as_if_it_had_not(every, whole, tmp_path, monkeypatch, capfd):
    config = tiny("outcome", {"steps": STEPS, "checkpoint.every": every})
    asked = iter([False, True])
    monkeypatch.setattr(loop.StopRequest, "agreed", lambda self: next(asked))
    folder = run(config, tmp_path / "run")
    assert [row["step"] for row in rows(folder)] == [1, 2]
    assert not (folder / "export").exists()
    assert "stopped after step 2 of 4; start again with the same command to go on" in capfd.readouterr().err

    monkeypatch.setattr(loop.StopRequest, "agreed", lambda self: False)
    run(config, folder)
    assert "resuming after step 2 of 4" in capfd.readouterr().err
    assert_as_whole(folder, whole)


def test_groups_sampled_again_are_so_after_a_stop_too(tmp_path, monkeypatch):
    """Which attempt a rollout is of is part of its identity, and of no state."""
    expected = run(resampling({}), tmp_path / "whole")
    assert all(row["rollout/resampled"] > 0 for row in rows(expected))
    asked = iter([False, True])
    monkeypatch.setattr(loop.StopRequest, "agreed", lambda self: next(asked))
    folder = run(resampling({}), tmp_path / "run")
    monkeypatch.setattr(loop.StopRequest, "agreed", lambda self: False)
    run(resampling({}), folder)
    assert_as_whole(folder, expected)


def test_rows_in_slots_and_what_is_expected_of_them_go_on_after_a_stop(tmp_path, monkeypatch):
    """Eight problems again and again, so that each step deals them by the lengths of the one before; the order of the
    batch, and all that is learned from it, is that of a run that does not deal."""
    source = write_problems(tmp_path / "eight.jsonl", read_jsonl(ROOT / "configs/data/arithmetic.jsonl")[:8])
    changes = LONG | {"log.rollouts": 8, "steps": 3, "data.source": source, "rollout.slots": 3}
    dealt = []
    with monkeypatch.context() as patch:
        patch.setattr(wave, "deal", lambda expected_P, queues: np.arange(len(expected_P)))
        plain = run(tiny("outcome", changes), tmp_path / "plain")
    monkeypatch.setattr(wave, "deal", lambda *given: dealt.append(deal(*given)) or dealt[-1])
    whole = run(tiny("outcome", changes), tmp_path / "whole")
    assert rows(whole) == rows(plain)
    assert_same_parameters(whole, plain)
    written = [path.read_text() for path in sorted((whole / "rollouts").iterdir())]
    assert written == [path.read_text() for path in sorted((plain / "rollouts").iterdir())]
    assert len(dealt) == 2 and all(sorted(order) == list(range(8)) and (order != range(8)).any() for order in dealt)

    asked = iter([False, True])
    monkeypatch.setattr(loop.StopRequest, "agreed", lambda self: next(asked))
    folder = run(tiny("outcome", changes), tmp_path / "stopped")
    monkeypatch.setattr(loop.StopRequest, "agreed", lambda self: False)
    run(tiny("outcome", changes), folder)
    without_clock = [
        [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows(each, clock=True)]
        for each in (folder, whole)
    ]
    assert without_clock[0] == without_clock[1]
    first, *later = (row["rollout/expected_tokens"] for row in without_clock[0])
    assert first is None and later == [row["response/length_mean"] for row in rows(whole)[:-1]]


def test_what_was_done_after_the_last_checkpoint_is_done_again(whole, tmp_path, monkeypatch):
    """A fault in the third step, with a checkpoint of the second and rollouts of the third on disk."""
    config = tiny("outcome", {"steps": STEPS, "checkpoint.every": 2, "checkpoint.keep": 1})
    write = loop.Metrics.write

    def fail_at_three(self, step, row):
        write(self, step, row)
        if step == 3:
            raise FloatingPointError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(loop.Metrics, "write", fail_at_three)
        with pytest.raises(FloatingPointError, match="planted"):
            run(config, tmp_path / "run")
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3]
    assert_as_whole(run(config, tmp_path / "run"), whole)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["4"]


def test_a_finished_run_can_be_extended(whole, tmp_path):
    folder = run(tiny("outcome", {"steps": 2}), tmp_path / "run")
    short = parameters(folder)
    run(tiny("outcome", {"steps": STEPS}), folder)
    assert_as_whole(folder, whole)
    assert any((short[name] != parameters(folder)[name]).any() for name in short)


def test_a_second_start_of_a_finished_run_changes_nothing(whole, tmp_path, capfd):
    folder = shutil.copytree(whole, tmp_path / "run")
    run(tiny("outcome", {"steps": STEPS}), folder)
    assert_as_whole(folder, whole)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["3", "4"]
    assert f"\n  rollouts     {folder}/rollouts\n" in capfd.readouterr().out


def largest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def test_a_truncated_checkpoint_is_reported_and_the_one_before_is_used(whole, tmp_path, caplog, capfd):
    folder = shutil.copytree(whole, tmp_path / "run")
    damaged = largest_file(folder / "checkpoints" / "4")
    os.truncate(damaged, damaged.stat().st_size // 2)
    run(tiny("outcome", {"steps": STEPS}), folder)
    assert "checkpoint of step 4 is damaged" in caplog.text and "set aside as 4.corrupt" in caplog.text
    assert "resuming after step 3 of 4" in capfd.readouterr().err
    assert_as_whole(folder, whole)


def test_no_readable_checkpoint_is_refused_not_restarted(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    for step in ("3", "4"):
        os.truncate(largest_file(folder / "checkpoints" / step), 10)
    with pytest.raises(ValueError, match="none of the checkpoints in .* can be read"):
        run(tiny("outcome", {"steps": STEPS}), folder)
    assert rows(folder) == rows(whole)


# ------------------------------------------------------------------------------------------------ from outside

MANY = 400


def steps_done(folder):
    return (folder / "metrics.jsonl").read_bytes().count(b"\n") if (folder / "metrics.jsonl").exists() else 0


def wait_for(condition, process, seconds=240):
    limit = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.02)


def test_sigterm_saves_and_exits_cleanly_and_the_run_goes_on(tmp_path):
    folder = tmp_path / "run"
    changes = {"steps": MANY, "checkpoint.every": MANY}
    process = subprocess.Popen(
        command(folder, changes),
        cwd=ROOT,
        env=environment(8),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: steps_done(folder), process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    stopped = rows(folder)[-1]["step"]
    assert 1 <= stopped < MANY
    assert "stopping after what is under way, which is kept" in err and "Traceback" not in err
    assert f"stopped after step {stopped} of {MANY}; start again with the same command to go on" in err
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [str(stopped)]
    assert not (folder / "export").exists()

    changes["steps"] = stopped + 1
    done = subprocess.run(
        command(folder, changes), cwd=ROOT, env=environment(8), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert f"resuming after step {stopped} of {stopped + 1}" in done.stderr
    assert [row["step"] for row in rows(folder)] == list(range(1, stopped + 2))
    assert (folder / "export" / "model.safetensors").exists()


@pytest.mark.slow
def test_killed_at_any_moment_a_run_ends_with_the_same_bits(tmp_path):
    """kill -9 at 20 random moments: of a whole run's duration, and, as starting up takes most of that, by turns of the
    time after the first step of a start.  A run that survives its moment is compared and the next one begun."""
    changes, dice = {"steps": 24, "checkpoint.every": 1}, random.Random(20)
    options = {"cwd": ROOT, "env": environment(1), "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    subprocess.run(command(tmp_path / "warm", changes), check=True, **options)  # fills the compilation cache
    start = time.monotonic()
    subprocess.run(command(tmp_path / "whole", changes), check=True, **options)
    duration = time.monotonic() - start

    kills, finished, resumed = [], 0, []
    while len(kills) < 20 or (tmp_path / f"run{finished}").exists():
        folder = tmp_path / f"run{finished}"
        before = steps_done(folder)
        process = subprocess.Popen(command(folder, changes), **options)
        moment = 240.0
        if len(kills) % 2 == 0 and len(kills) < 20:
            moment = dice.uniform(0, duration)
        elif len(kills) < 20:
            while steps_done(folder) <= before and process.poll() is None:
                time.sleep(0.01)
            moment = dice.uniform(0, 1.5)
        try:
            _, err = process.communicate(timeout=moment)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills.append((round(moment, 2), before, steps_done(folder)))
            continue
        assert process.returncode == 0, err.decode()
        resumed += [line for line in err.decode().splitlines() if line.startswith("resuming after")]
        assert rows(folder) == rows(tmp_path / "whole"), kills
        assert_same_parameters(folder, tmp_path / "whole")
        assert {path.name for path in (folder / "checkpoints").iterdir()} == {"23", "24"}
        finished += 1
    print(json.dumps({"duration": duration, "kills": kills, "finished": finished, "resumed": resumed}))
    assert len(kills) == 20 and finished and resumed
