"""Who may use a run's folder: the same config, one process at a time, where there is room."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading

import pytest
from tiny_runs import config_dict

from exprl_jax.files import write_atomically
from exprl_jax.resolve import resolve, to_dict
from exprl_jax.run import workdir as room
from exprl_jax.run.loop import check_records
from exprl_jax.run.workdir import check_workdir, open_workdir

CONFIG = {"seed": 1, "steps": 10, "loss": {"clip_low": 0.2, "pair": (1, 2)}, "data": {"source": "a.jsonl"}}


def test_a_first_start_makes_the_folder_and_a_second_resumes(tmp_path):
    with open_workdir(tmp_path / "new" / "run", CONFIG) as workdir:
        assert not workdir.resumed
        assert json.loads(workdir.config.read_text()) == json.loads(json.dumps(CONFIG))
        assert sorted(os.listdir(workdir.path)) == ["checkpoints", "config.json", "lock", "rollouts", "tensorboard"]
        assert workdir.metrics == tmp_path / "new" / "run" / "metrics.jsonl"
        assert workdir.export == tmp_path / "new" / "run" / "export"
    with open_workdir(tmp_path / "new" / "run", CONFIG) as workdir:
        assert workdir.resumed


def take_a_step(folder):
    (folder / "checkpoints" / "7").mkdir()


def test_only_the_number_of_steps_may_change(tmp_path):
    with open_workdir(tmp_path, CONFIG):
        take_a_step(tmp_path)
    with open_workdir(tmp_path, CONFIG | {"steps": 20}) as workdir:
        assert json.loads(workdir.config.read_text())["steps"] == 20
    other = CONFIG | {"seed": 2, "loss": {"clip_low": 0.1, "pair": (1, 2)}}
    with pytest.raises(ValueError) as caught, open_workdir(tmp_path, other):
        pass
    text = str(caught.value)
    assert "loss.clip_low: 0.1 != 0.2" in text and "seed: 2 != 1" in text and "steps:" not in text
    assert "choose another --workdir" in text and "\n" not in text
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 1


@pytest.mark.parametrize("rate", [{"schedule": "cosine", "warmup": 0.0}, {"schedule": "constant", "warmup": 0.1}])
def test_a_rate_that_follows_the_number_of_steps_holds_it(tmp_path, rate):
    config = CONFIG | {"optimizer": rate}
    with open_workdir(tmp_path, config):
        take_a_step(tmp_path)
    with pytest.raises(ValueError, match="steps: 20 != "), open_workdir(tmp_path, config | {"steps": 20}):
        pass


def test_a_run_without_a_step_takes_another_config(tmp_path):
    with open_workdir(tmp_path, CONFIG):
        pass
    with open_workdir(tmp_path, CONFIG | {"seed": 2}) as workdir:
        assert json.loads(workdir.config.read_text())["seed"] == 2
        workdir.metrics.write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="seed: 3 != 2"), open_workdir(tmp_path, CONFIG | {"seed": 3}):
        pass


def test_steps_cannot_fall_below_those_taken(tmp_path):
    with open_workdir(tmp_path, CONFIG):
        take_a_step(tmp_path)
    with pytest.raises(ValueError, match="has taken 7 steps"), open_workdir(tmp_path, CONFIG | {"steps": 6}):
        pass
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 10


def test_what_a_killed_export_left_is_removed(tmp_path):
    with open_workdir(tmp_path, CONFIG):
        (tmp_path / ".export.writing-1").mkdir()
    with open_workdir(tmp_path, CONFIG):
        assert not (tmp_path / ".export.writing-1").exists()


def test_many_differences_are_cut_short(tmp_path):
    with open_workdir(tmp_path, {"steps": 9} | {f"k{i:02d}": 0 for i in range(20)}):
        take_a_step(tmp_path)
    with (
        pytest.raises(ValueError, match="k07: 1 != 0 and 12 more;"),
        open_workdir(tmp_path, {"steps": 9} | {f"k{i:02d}": 1 for i in range(20)}),
    ):
        pass


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="holds thesis.tex but no config.json"), open_workdir(tmp_path, CONFIG):
        pass
    assert os.listdir(tmp_path) == ["thesis.tex"]
    with pytest.raises(ValueError, match="folder, got a file"), open_workdir(tmp_path / "thesis.tex", CONFIG):
        pass


def test_remains_of_a_first_start_that_was_killed_are_no_obstacle(tmp_path):
    (tmp_path / "lock").write_text("")
    (tmp_path / "config.json.tmp").write_text('{"se')
    with open_workdir(tmp_path, CONFIG) as workdir:
        assert not workdir.resumed


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_garbled_config_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="config.json: .* choose another --workdir"), open_workdir(tmp_path, CONFIG):
        pass


def test_no_room_is_refused_before_anything_is_written(tmp_path):
    with (
        pytest.raises(ValueError, match=r"needs 1000000000.00 GB, the disk has"),
        open_workdir(tmp_path / "run", CONFIG, needed_bytes=10**18),
    ):
        pass
    assert not (tmp_path / "run").exists()


def test_room_already_taken_by_its_checkpoints_counts(tmp_path, monkeypatch):
    with open_workdir(tmp_path, CONFIG) as workdir:
        (workdir.checkpoints / "1").mkdir()
        (workdir.checkpoints / "1" / "arrays").write_bytes(bytes(1000))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 500})())
    with open_workdir(tmp_path, CONFIG, needed_bytes=1500):
        pass
    with pytest.raises(ValueError, match="free some"), open_workdir(tmp_path, CONFIG, needed_bytes=1501):
        pass


@pytest.mark.parametrize("path", ["/proc/run", "/dev/null/run"])  # root too may not write there
def test_a_place_that_cannot_be_written_to_is_refused(path):
    with pytest.raises(ValueError, match="cannot write there|expected a folder"), open_workdir(path, CONFIG):
        pass


def test_a_bucket_url_is_refused():
    with pytest.raises(ValueError, match="mount the bucket"), open_workdir("gs://bucket/run", CONFIG):
        pass


# A trainer that forks a worker, as a grader pool does; both wait.
HOLDER = """
import json, os, sys, time
from exprl_jax.run.workdir import open_workdir
with open_workdir(sys.argv[1], json.loads(sys.argv[2])):
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_and_kill_9_opens_the_door(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path), json.dumps(CONFIG)], stdout=subprocess.PIPE, text=True
    )
    with holder:
        worker = int(holder.stdout.readline())
        try:
            with pytest.raises(ValueError, match=f"in use by process {holder.pid} "), open_workdir(tmp_path, CONFIG):
                pass
            holder.kill()
            holder.wait()
            with open_workdir(tmp_path, CONFIG) as workdir:  # though the forked worker lives on
                os.kill(worker, 0)
                assert workdir.resumed
        finally:
            os.kill(worker, signal.SIGKILL)


def test_other_processes_wait_for_the_first_and_only_read(tmp_path):
    barrier, known = threading.Barrier(2), []

    def other():
        with open_workdir(tmp_path / "run", CONFIG, process=1, barrier=barrier.wait) as workdir:
            known.append(workdir.config.exists())

    thread = threading.Thread(target=other)
    thread.start()
    with open_workdir(tmp_path / "run", CONFIG, process=0, barrier=barrier.wait):
        thread.join()
    assert known == [True]


def test_other_processes_wait_for_a_file_system_that_shows_them_the_run_later(tmp_path, monkeypatch):
    """As NFS does, which remembers for a while that a file was not there."""
    first, exists, looks = threading.Event(), pathlib.Path.exists, []

    def late(path):
        if path.name == "config.json" and threading.current_thread() is other:
            looks.append(path)
            if len(looks) == 1:
                return False
        return exists(path)

    def enter():
        with open_workdir(tmp_path / "run", CONFIG, process=1, barrier=first.wait) as workdir:
            known.append(workdir.path)

    known, other = [], threading.Thread(target=enter)
    monkeypatch.setattr(pathlib.Path, "exists", late)
    other.start()
    with open_workdir(tmp_path / "run", CONFIG, process=0, barrier=first.set):
        other.join(30)
    assert known == [tmp_path / "run"] and len(looks) == 2


def test_other_processes_are_let_go_when_the_first_refuses(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "_SHOWN_WITHIN_S", 0.0)
    barrier, refusals = threading.Barrier(2), []
    (tmp_path / "something").write_text("")

    def enter(process):
        try:
            with open_workdir(tmp_path, CONFIG, process=process, barrier=barrier.wait):
                pass
        except ValueError as error:
            refusals.append(str(error))

    threads = [threading.Thread(target=enter, args=(process,)) for process in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(refusals) == 2 and any("process 1 sees no config.json" in each for each in refusals)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "rows"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")  # fails half-way, as a full disk would
    assert path.read_text() == "old"
    (tmp_path / "rows.tmp").unlink()
    (tmp_path / "rows.tmp").symlink_to("/dev/full")
    with pytest.raises(ValueError, match="rows could not be written .No space left on device"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    (tmp_path / "rows.tmp").unlink()
    write_atomically(path, "new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["rows"]


RL = to_dict(resolve(config_dict("tiny")))
NEUTRAL = {
    "mesh.data": 2,
    "mesh.model": 2,
    "rollout.wave": 4,
    "rollout.slots": 3,
    "rollout.expected_tokens": 9,
    "updates.microbatch": 16,
    "updates.logp_chunk": 64,
    "grader.seconds": 1.0,
    "grader.workers": 3,
    "code.seconds": 1.0,
    "judge.endpoint.concurrency": 1,
    "judge.endpoint.seconds": 1.0,
    "judge.workers.count": 1,
    "judge.workers.seconds": 1.0,
    "policy.execution.remat": "full",
    "judge.model.execution.remat": "full",
    "checkpoint.best": "solve/none",
    "watch.window": 99,
}
BINDING = {
    "rollout.group": 2,
    "rollout.temperature": 0.5,
    "updates.per_batch": 2,
    "updates.row_tokens": 900,
    "optimizer.learning_rate": 1.0,
    "seed": 2,
    "policy.execution.compute_dtype": "bfloat16",
    "judge.readout": "text",
    "judge.function": "mine:score",
    "grader.function": "mine:verify",
    "code.memory_mb": 1,
}


def with_key(config, path, value):
    changed = json.loads(json.dumps(config))
    *sections, leaf = path.split(".")
    section = changed
    for name in sections:
        section = section[name]
    assert section[leaf] != value
    section[leaf] = value
    return changed


def taken(folder):
    with open_workdir(folder, RL) as workdir:
        (workdir.checkpoints / "3").mkdir()


@pytest.mark.parametrize("key", NEUTRAL)
def test_a_run_goes_on_elsewhere_in_other_parts_and_within_other_limits(key, tmp_path):
    taken(tmp_path)
    changed = with_key(RL, key, NEUTRAL[key])
    with open_workdir(tmp_path, changed) as workdir:
        assert json.loads(workdir.config.read_text()) == changed


@pytest.mark.parametrize("key", BINDING)
def test_a_run_does_not_go_on_with_what_changes_its_numbers(key, tmp_path):
    taken(tmp_path)
    with pytest.raises(ValueError, match=f"another config.*{re.escape(key)}: "):
        check_workdir(tmp_path, with_key(RL, key, BINDING[key]))


@pytest.mark.parametrize("name, what", [("a file", "got a file"), ("", "not a workdir"), ("gs://a/b", "got a URL")])
def test_what_is_no_workdir_is_refused_before_anything_is_loaded(name, what, tmp_path):
    (tmp_path / "a file").write_text("")
    with pytest.raises(ValueError, match=what):
        check_workdir(name if "://" in name else tmp_path / name, RL)


@pytest.mark.parametrize(
    "steps, done, lost",
    [(range(1, 13), 0, "metrics go to step 12, but it has no checkpoint"), ((), 10, "metrics go to step 0")]
    + [(range(1, 8), 10, "newest checkpoint is of step 10, but its metrics go to step 7")],
)
def test_records_that_somebody_has_deleted_are_missed(steps, done, lost, tmp_path):
    with open_workdir(tmp_path, RL) as workdir:
        workdir.metrics.write_text("".join(json.dumps({"step": step}) + "\n" for step in steps))
        with pytest.raises(ValueError, match=f"{lost}; .*--accept_lost_records"):
            check_records(workdir, 10, done)


@pytest.mark.parametrize("last, done", [(0, 0), (10, 0), (10, 10), (14, 10), (10, 5)])
def test_what_a_kill_leaves_is_no_loss(last, done, tmp_path):
    with open_workdir(tmp_path, RL) as workdir:
        workdir.metrics.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, last + 1)))
        check_records(workdir, 10, done)
