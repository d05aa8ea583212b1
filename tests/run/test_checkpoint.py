"""Checkpoints against the real Orbax: what is saved comes back bitwise, and only that."""

import gc
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from exprl_jax.records import TrainState
from exprl_jax.run.checkpoint import Checkpoints, newest_step

CONFIG = {"seed": 3, "model": {"weights": "random:tiny"}}
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def make_state(seed: int, step: int = 0) -> TrainState:
    key = jax.random.key(seed)
    params = {
        "embed": jax.random.normal(key, (64, 32)),
        "layer_0": {"q": jax.random.normal(jax.random.fold_in(key, 1), (32, 8, 4), jnp.bfloat16)},
    }
    return TrainState(step=jnp.int32(step), params=params, opt_state=OPTIMIZER.init(params), skipped=jnp.int32(1))


def abstract(state, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), state)


def snapshot(state):
    """Host copies that do not alias device buffers."""
    return jax.tree.map(lambda x: np.array(x, copy=True), state)


def assert_bitwise(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def write(folder, steps, keep=3):
    states = {}
    with Checkpoints(folder, keep, CONFIG) as checkpoints:
        for step in steps:
            states[step] = make_state(step, step)
            checkpoints.save(step, states[step], {"next_batch": step})
    return states


def array_file(folder: pathlib.Path) -> pathlib.Path:
    return max((folder / "state").rglob("ocdbt.process_0/d/*"), key=lambda p: p.stat().st_size)


@pytest.fixture
def logged(caplog):
    """The warnings that the rooms log, which go to stderr in a run."""
    return lambda: [record.getMessage() for record in caplog.records if "exprl_jax" in record.pathname]


def test_a_new_run_has_nothing_to_restore(tmp_path):
    with Checkpoints(tmp_path, 2, CONFIG) as checkpoints:
        assert checkpoints.latest() is None
        assert checkpoints.restore(abstract(make_state(0))) is None


def test_state_position_and_config_come_back_and_old_ones_go(tmp_path):
    states = write(tmp_path, [1, 2, 4], keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "4"]
    with Checkpoints(tmp_path, 2, CONFIG) as checkpoints:
        last = checkpoints.restore(abstract(states[4]))
    assert last.step == 4 and last.position == {"next_batch": 4}
    assert_bitwise(last.state, states[4])
    assert json.loads((tmp_path / "4" / "config" / "metadata").read_text()) == CONFIG


def test_donating_the_state_right_after_save_does_not_reach_the_checkpoint(tmp_path):
    state = jax.device_put(make_state(5), NamedSharding(Mesh(jax.devices(), "data"), PartitionSpec()))
    state = state.replace(params={"w": jnp.arange(2.0e6), **state.params})
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    other = jax.tree.map(jnp.copy, state)
    step(other)  # compiled before, so that the overwrite falls into the save
    assert all(x.is_deleted() for x in jax.tree.leaves(other))
    expected = snapshot(state)
    with Checkpoints(tmp_path, 1, CONFIG) as checkpoints:
        checkpoints.save(1, state, {"next_batch": 1})
        shapes = abstract(state)
        for _ in range(3):
            state = step(state)
        jax.block_until_ready(state)
        last = checkpoints.restore(shapes)
    assert_bitwise(snapshot(last.state), expected)


def test_restores_onto_other_meshes(tmp_path):
    devices = np.array(jax.devices())
    specs = {(8, 1): ("data", "model"), (2, 4): ("model", "data")}

    def place(state, shape):
        mesh = Mesh(devices.reshape(shape), ("data", "model"))
        return jax.tree.map(
            lambda x: NamedSharding(mesh, PartitionSpec(*specs[shape]) if x.ndim == 2 else PartitionSpec()), state
        )

    state = make_state(7, 7)
    expected = snapshot(state)
    shardings = place(state, (8, 1))
    with Checkpoints(tmp_path, 1, CONFIG) as checkpoints:
        checkpoints.save(7, jax.device_put(state, shardings), {"next_batch": 7})
    for target in (place(state, (2, 4)), jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(devices[3]), state)):
        wanted = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, target)
        with Checkpoints(tmp_path, 1, CONFIG) as checkpoints:
            last = checkpoints.restore(wanted).state
        assert_bitwise(snapshot(last), expected)
        assert all(x.sharding == s for x, s in zip(jax.tree.leaves(last), jax.tree.leaves(target)))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def unrecorded(folder, position):
    (folder / "manifest.json").unlink()
    (folder / "position" / "metadata").write_text(json.dumps(position))


DAMAGE = {
    "a truncated array": (lambda f: truncate(array_file(f)), "bytes, expected"),
    "a flipped byte in an array": (lambda f: flip(array_file(f)), "right size but other content"),
    "a missing array": (lambda f: array_file(f).unlink(), "is missing"),
    "a missing item": (lambda f: shutil.rmtree(f / "state"), "is missing"),
    "a garbled position": (lambda f: (f / "position" / "metadata").write_text("{{"), "position/metadata"),
    "a garbled manifest": (lambda f: (f / "manifest.json").write_text("{"), "manifest.json"),
    "a manifest of infinite sizes": (lambda f: (f / "manifest.json").write_text('{"a": [1e999, 0]}'), "manifest.json"),
    "a manifest nested too deeply": (lambda f: (f / "manifest.json").write_text("[" * 100_000), "manifest.json"),
    "an emptied manifest": (lambda f: (f / "manifest.json").write_text("{}"), "was not part of it"),
    "nothing recorded and a truncated array": (
        lambda f: (truncate(array_file(f)), (f / "manifest.json").unlink()),
        "reading",
    ),
    "nothing recorded and an empty folder": (lambda f: [shutil.rmtree(f), f.mkdir()], "Error"),
    "nothing recorded and no position": (lambda f: unrecorded(f, {}), "KeyError"),
    "nothing recorded and a position that is a list": (lambda f: unrecorded(f, []), "TypeError"),
    "a copy of the one before": (
        lambda f: [shutil.rmtree(f), shutil.copytree(f.with_name("1"), f)],
        "it is the checkpoint of step 1",
    ),
    "an unrecorded copy of the one before": (
        lambda f: [shutil.rmtree(f), shutil.copytree(f.with_name("1"), f), (f / "manifest.json").unlink()],
        "it is the checkpoint of step 1",
    ),
}


# Orbax leaves the coroutines of the other arrays unfinished when one cannot be read; the test collects them itself.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_used(tmp_path, logged, damage):
    states = write(tmp_path, [1, 2])
    spoil, words = DAMAGE[damage]
    spoil(tmp_path / "2")
    with Checkpoints(tmp_path, 3, CONFIG) as checkpoints:
        last = checkpoints.restore(abstract(states[1]))
        assert last.step == 1 and last.position == {"next_batch": 1}
        assert_bitwise(last.state, states[1])
        *before, line = logged()
        assert all("has no manifest.json" in earlier for earlier in before)
        assert "step 2 is damaged" in line and words in line and "\n" not in line
        assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2.corrupt"]
        gc.collect()
        checkpoints.save(2, states[2], {"next_batch": 2})  # the run comes by again
    with Checkpoints(tmp_path, 3, CONFIG) as checkpoints:
        assert_bitwise(checkpoints.restore(abstract(states[2])).state, states[2])


def test_a_checkpoint_killed_before_its_manifest_is_used_and_said(tmp_path, logged):
    states = write(tmp_path, [1, 2])
    (tmp_path / "2" / "manifest.json").unlink()
    with Checkpoints(tmp_path, 3, CONFIG) as checkpoints:
        assert checkpoints.restore(abstract(states[2])).step == 2
    assert logged() == ["checkpoint of step 2 has no manifest.json: its bytes are not checked"]


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path):
    with Checkpoints(tmp_path, 1, CONFIG) as checkpoints:
        for step, best in ((1, 1), (2, 2), (3, 2), (4, 2), (5, 5), (6, 5)):
            checkpoints.save(step, make_state(step, step), {"next_batch": step}, best)
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [5, 6]


def test_a_run_with_only_damaged_checkpoints_does_not_start_over(tmp_path):
    states = write(tmp_path, [1, 2])
    for step in (1, 2):
        truncate(array_file(tmp_path / str(step)))
    for _ in range(2):  # nor at the second attempt, when they are set aside already
        with Checkpoints(tmp_path, 3, CONFIG) as checkpoints:
            with pytest.raises(ValueError, match=r"none of the checkpoints .* can be read"):
                checkpoints.restore(abstract(states[1]))


def test_an_intact_checkpoint_of_other_shapes_is_refused_and_kept(tmp_path):
    states = write(tmp_path, [1])
    other = states[1].replace(params={"embed": jnp.zeros((3, 3))})
    with Checkpoints(tmp_path, 3, CONFIG) as checkpoints:
        with pytest.raises(ValueError, match="step 1 .* does not restore") as caught:
            checkpoints.restore(abstract(other))
    assert "\n" not in str(caught.value) and (tmp_path / "1").is_dir()


def test_what_no_save_has_named_is_no_checkpoint(tmp_path):
    for name in ("3", "09", "\u0669", "4.corrupt", "x"):
        (tmp_path / name).mkdir()
    assert newest_step(tmp_path) == 3


def test_steps_go_forward(tmp_path):
    with Checkpoints(tmp_path, 3, CONFIG) as checkpoints:
        checkpoints.save(2, make_state(0), {"next_batch": 2})
        with pytest.raises(ValueError, match="expected a step after 2"):
            checkpoints.save(2, make_state(0), {"next_batch": 2})


def test_remains_of_a_killed_save_are_removed(tmp_path, logged):
    states = write(tmp_path, [1])
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")
    with Checkpoints(tmp_path, 3, CONFIG) as checkpoints:
        assert checkpoints.restore(abstract(states[1])).step == 1
    assert [p.name for p in tmp_path.iterdir()] == ["1"]
    assert "did not finish" in logged()[0]


# The full disk is a limit on file size (SIGXFSZ ignored, so that writes fail as on a full disk), which needs no mount.
FULL_DISK = """
import resource, signal, sys
import jax, jax.numpy as jnp
from exprl_jax.run.checkpoint import Checkpoints
with Checkpoints(sys.argv[1], 2, {}) as checkpoints:
    checkpoints.save(1, {"w": jnp.ones(10)}, {"next_batch": 1})
    checkpoints.wait()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    big = {"w": jax.random.normal(jax.random.key(0), (1_000_000,))}
    try:
        checkpoints.save(2, big, {"next_batch": 2})
        checkpoints.wait()
    except ValueError as error:
        print(error)
    else:
        raise SystemExit("the save was not refused")
    found = checkpoints.restore({"w": jax.ShapeDtypeStruct((10,), jnp.float32)})
    print(found.step, float(found.state["w"].sum()))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    checkpoints.save(2, big, {"next_batch": 2})
"""


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FULL_DISK), str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    refusal, restored = done.stdout.splitlines()
    assert refusal.startswith("checkpoint of step 2 could not be written") and "free some disk space" in refusal
    assert restored == "1 10.0"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]  # saved once there was room again


KILLED = """
import sys
import jax.numpy as jnp, jax
from exprl_jax.run.checkpoint import Checkpoints
with Checkpoints(sys.argv[1], 2, {}) as checkpoints:
    found = checkpoints.restore({"w": jax.ShapeDtypeStruct((50_000,), jnp.float32)})
    step = found.step if found else 0
    assert found is None or found.position == {"next_batch": step} and bool((found.state["w"] == step).all())
    print(step, flush=True)
    while True:
        step += 1
        checkpoints.save(step, {"w": jnp.full(50_000, step, jnp.float32)}, {"next_batch": step})
"""


@pytest.mark.slow
def test_killed_at_any_moment_of_a_save_it_goes_on_from_an_intact_one(tmp_path):
    moments, last = np.random.default_rng(0), 0
    for _ in range(12):
        with subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as run:
            step = run.stdout.readline()
            time.sleep(moments.uniform(0.05, 0.6))
            run.kill()
            report = run.stderr.read()
        assert step and int(step) >= last and "damaged" not in report, report
        last = int(step)
    assert last > 12


PROCESS = """
import pathlib, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
jax.config.update("jax_num_cpu_devices", 4)
folder, port, process = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
from exprl_jax.run.checkpoint import Checkpoints
rows, both = (NamedSharding(Mesh(np.array(jax.devices()).reshape(shape), ("data", "model")), spec)
              for shape, spec in (((8, 1), PartitionSpec("data")), ((2, 4), PartitionSpec("model", "data"))))
w = np.arange(6400.0, dtype=np.float32).reshape(64, 100)
state = {"w": jax.make_array_from_callback(w.shape, rows, lambda index: w[index])}
with Checkpoints(folder, 3, {}) as checkpoints:
    assert checkpoints.restore(state) is None
    for step in (1, 2):
        checkpoints.save(step, state, {"next_batch": step})
multihost_utils.sync_global_devices("saved")
if process == 0:
    largest = max((folder / "2" / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(bytes(largest.stat().st_size))
with Checkpoints(folder, 3, {}) as checkpoints:
    found = checkpoints.restore({"w": jax.ShapeDtypeStruct(w.shape, jnp.float32, sharding=both)})
    assert found.step == 1 and found.position == {"next_batch": 1}
    for shard in found.state["w"].addressable_shards:
        np.testing.assert_array_equal(shard.data, w[shard.index])
print("agreed", flush=True)
"""


@pytest.mark.slow
def test_two_processes_save_together_and_agree_on_what_is_damaged(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(tmp_path), port, str(process)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(2)
    ]
    outputs = [run.communicate(timeout=180)[0] for run in runs]
    assert all("agreed" in output for output in outputs), outputs
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2.corrupt"]


def test_a_save_that_never_ends_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    """A file system that hangs: here the thread that records a save waits for an event that comes after the test."""
    released = threading.Event()
    monkeypatch.setattr("exprl_jax.run.checkpoint._SAVE_LIMIT_S", 0.2)
    monkeypatch.setattr("exprl_jax.run.checkpoint._fingerprints", lambda folder: released.wait(60) and {})
    try:
        with pytest.raises(ValueError, match="checkpoint of step 1 is not in .* after 0 minutes; look at its file"):
            with Checkpoints(tmp_path, 2, CONFIG) as checkpoints:
                checkpoints.save(1, make_state(1), {"next_batch": 1})
                checkpoints.wait()
    finally:
        released.set()
