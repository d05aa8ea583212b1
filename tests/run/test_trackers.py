"""Rows at the trackers: the same keys, each step once, also after a stop; and what a missing package says.

The tests of Weights & Biases and Trackio are run where the packages are installed.
"""

import importlib.util
import json
import struct
import time

import pytest
from tiny_runs import config_dict, sparse

from exprl_jax.resolve import resolve
from exprl_jax.run.metrics import Metrics, truncate_after
from exprl_jax.run.trackers import check_trackers
from exprl_jax.run.workdir import open_workdir
from exprl_jax.train import train

ROWS = [
    {"evaluate/pass@1": 0.25},
    {"reward/mean": 0.5, "judge/auc": None, "evaluate/pass@1": None},
    {"reward/mean": 0.75, "judge/auc": 0.5, "evaluate/pass@1": 0.5},
]
SENT = {0: {"evaluate/pass@1": 0.25}, 1: {"reward/mean": 0.5}, 2: ROWS[2], 3: {"reward/mean": 0.125}}


def write_with_a_stop(folder, tracker):
    """Three rows of which the last is lost, and after a resume that one again and another."""
    with open_workdir(folder, {"seed": 7, "judge": {"unit": "prefix"}}) as workdir:
        with Metrics(workdir, (tracker,)) as metrics:
            for step, row in enumerate(ROWS):
                metrics.write(step, row)
        truncate_after(workdir, 1)
        with Metrics(workdir, (tracker,)) as metrics:
            metrics.write(2, ROWS[2])
            metrics.write(3, SENT[3])
        return workdir


def own_keys(logged):
    return {step: {k: v for k, v in row.items() if not k.startswith("_")} for step, row in logged.items()}


def records_of(data):
    """The records of a `.wandb` file: a header of 7 bytes, then LevelDB's log format, 32 KiB blocks of fragments, each
    after its checksum (4 bytes), length (2) and type (1: 1 whole, 2 first, 3 middle, 4 last)."""
    place, record = 7, b""
    while place + 7 <= len(data):
        if (left := -place % (1 << 15)) < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def whole_records(path, parse):
    """The records up to that of the end: a process of Weights & Biases' own writes them, a moment later."""
    limit = time.monotonic() + 60
    while True:
        records = [parse(data) for data in records_of(path.read_bytes())]
        if records and records[-1].HasField("exit"):
            return records
        assert time.monotonic() < limit, path
        time.sleep(0.1)


def test_wandb_gets_every_row_once(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    workdir = write_with_a_stop(tmp_path / "run", "wandb")
    logged, configs, ids = {}, {}, set()
    for path in sorted((workdir.path / "wandb").glob("offline-run-*/*.wandb")):
        for record in whole_records(path, wandb_internal_pb2.Record.FromString):
            if record.HasField("run"):
                ids.add(record.run.run_id)
                configs |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            if record.HasField("history"):
                items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                assert record.history.step.num not in logged
                logged[record.history.step.num] = items
    assert own_keys(logged) == SENT
    assert configs["seed"] == 7 and configs["judge"] == {"unit": "prefix"}
    assert ids == {json.loads((workdir.path / "trackers.json").read_text())["id"]}


def test_trackio_gets_every_row_once(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # it is read at the import
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    workdir = write_with_a_stop(tmp_path / "run", "trackio")
    name = f"run-{json.loads((workdir.path / 'trackers.json').read_text())['id']}"
    assert SQLiteStorage.get_runs("exprl_jax") == [name]
    logs = SQLiteStorage.get_logs("exprl_jax", name)
    assert [row["step"] for row in logs] == [0, 1, 2, 3]
    kept = {row["step"]: {k: v for k, v in row.items() if k not in ("step", "timestamp")} for row in logs}
    assert own_keys(kept) == SENT
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_package_is_named_before_anything_is_loaded(name, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None if module == name else find(module))
    config = sparse({"log.to": f"tensorboard,{name}", "policy.weights": "nowhere"})
    with pytest.raises(ValueError, match=f"^config.log.to: '{name}' needs .*python -m pip install {name}$"):
        train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_no_tracker_is_a_choice(tmp_path):
    check_trackers(sparse({"log.to": ""}).log.trackers)
    with open_workdir(tmp_path / "run", {}) as workdir, Metrics(workdir, ()) as metrics:
        metrics.write(1, {"a": 1.0})
    assert not list(workdir.tensorboard.iterdir()) and workdir.metrics.read_text()


@pytest.mark.parametrize("to", ["mlflow", "wandb,wandb", "tensorboard, wandb"])
def test_other_trackers_are_refused(to):
    with pytest.raises(ValueError) as refused:
        resolve(config_dict("tiny", "sft", {"log.to": to}))
    assert str(refused.value) == (
        f"config.log.to: got {to!r}, expected some of tensorboard,wandb,trackio, each once, with commas between; "
        "'' for none"
    )
