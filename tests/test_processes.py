"""The same run in two processes of four devices or four of two, as so many hosts would do it, and in one of eight; and
what becomes of all when something happens to one."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest
from stub_endpoint import Answer, StubEndpoint
from tiny_runs import ROOT, assert_same_rows, command, config_dict, environment, parameters, rows, run, tiny

from exprl_jax.evaluation.evaluate import evaluate
from exprl_jax.resolve import resolve

pytestmark = pytest.mark.slow

# Of 1x8 both processes hold all rows.
MESHES = {
    "8x1": {"mesh.data": 8, "mesh.model": 1},
    "2x4": {"mesh.data": 2, "mesh.model": 4},
    "1x8": {"mesh.data": 1, "mesh.model": 8},
}
AGREE = """
import sys
import jax
import numpy as np
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from exprl_jax import config
from exprl_jax.hosts import agree_rows, local_problems, owned_problems, sum_over_processes
from exprl_jax.mesh import make_mesh
mine = jax.process_index()
for data, model in ((1, 8), (2, 4), (4, 2)):
    mesh = make_mesh(config.Mesh(data, model))
    place, owned = local_problems(mesh, 4), owned_problems(mesh, 4)
    agreed = agree_rows({"x_P": 10 * mine + place, "y_PG": np.full((len(place), 3), mine)}, place)
    if data == 1:
        assert place.tolist() == [0, 1, 2, 3] and owned.tolist() == [mine == 0] * 4
        assert agreed["x_P"].tolist() == [0, 1, 2, 3] and (agreed["y_PG"] == 0).all()
    else:
        assert place.tolist() == [2 * mine, 2 * mine + 1] and owned.all()
        assert agreed["x_P"].tolist() == (10 * mine + place).tolist() and (agreed["y_PG"] == mine).all()
assert sum_over_processes([1, mine]) == [2, 1]
print("agreed")
"""


# What every process of a run does, without the models: it waits for the others, again and again.
WAIT = """
import sys, time
import jax
from jax.experimental import multihost_utils
from exprl_jax.run import distributed
coordinator, processes, process, faulty = sys.argv[1], *map(int, sys.argv[2:])
distributed.connect(coordinator, processes, process, 6)
try:
    with distributed.ending_together():
        for step in range(100_000):
            multihost_utils.sync_global_devices(str(step))
            print(step, flush=True)
            if process == faulty:
                raise ValueError("planted")
            time.sleep(0.1)
except ValueError as error:
    sys.exit(f"exprl_jax: {error}")
"""
# The full disk is a limit on file size: writes fail as on a full disk.
SAVE = """
import resource, sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from exprl_jax.run import distributed
from exprl_jax.run.checkpoint import Checkpoints
coordinator, processes, process, full, folder = sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5]
distributed.connect(coordinator, processes, process, 60)
rows = NamedSharding(Mesh(np.array(jax.devices()), "data"), PartitionSpec("data"))
w = np.random.default_rng(0).normal(size=1_000_000)
state = {"w": jax.make_array_from_callback(w.shape, rows, lambda index: w[index])}
try:
    with distributed.ending_together(), Checkpoints(folder, 3, {}) as checkpoints:
        found = checkpoints.restore(state)
        for step in (1, 2) if found is None else (found.step + 1,):
            checkpoints.save(step, state, {"next_batch": step})
            checkpoints.wait()
            if process == full:
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
except ValueError as error:
    sys.exit(f"exprl_jax: {error}")
"""
# The door, but untrained rollouts are made to end with an answer that a worker has to compare; and in process 1 an
# error ends the run in the second step after one with a comparison that hit its limit.
BOXED = """
import sys
from exprl_jax import main
from exprl_jax.reward.verifiers.grading import Graders
from exprl_jax.run import loop
submit, write, hung = Graders.submit, loop.Metrics.write, []
Graders.submit = lambda self, rows: submit(self, [(problem, text + r"\\boxed{7}") for problem, text in rows])
def fail(self, step, row):
    write(self, step, row)
    if len(hung) == 2 and "--process=1" in sys.argv:
        raise ValueError("planted")
    if hung or row["solve/timed_out"] > 0:
        hung.append(step)
loop.Metrics.write = fail
sys.exit(main.main(sys.argv))
"""


# Three processes of one host, the first of which grades nothing, and one of another; as many workers as they have.
GRADERS = """
import sys, socket
from exprl_jax import config
from exprl_jax.reward.verifiers.grading import open_graders
from exprl_jax.run import distributed
coordinator, processes, process = sys.argv[1], *map(int, sys.argv[2:])
socket.gethostname = lambda: "one" if process < 3 else "two"
distributed.connect(coordinator, processes, process, 60)
from pathlib import Path
with distributed.ending_together():
    with open_graders(config.Grader(5.0, 5, ""), None, ["math"], process > 0):
        print(sum(len(path.read_text().split()) for path in Path("/proc/self/task").glob("*/children")))
"""


# The door, and how many responses the process has given to its verifiers.
COUNTED = """
import sys
from exprl_jax import main
from exprl_jax.reward.verifiers.grading import Graders
submit, graded = Graders.submit, []
Graders.submit = lambda self, rows: graded.extend(rows) or submit(self, rows)
status = main.main(sys.argv)
print("graded", len(graded))
sys.exit(status)
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def open_process(line, devices, **options):
    options = {"cwd": ROOT, "env": environment(devices)} | options
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def start(folder, changes, *more, processes=2, program=("-m", "exprl_jax.main")):
    """All processes of a run, of eight devices together."""
    line = command(folder, changes, *more)
    return start_line([line[0], *program, *line[3:]], processes)


def start_line(line, processes):
    together = (f"--coordinator=127.0.0.1:{free_port()}", f"--processes={processes}")
    return [open_process([*line, *together, f"--process={process}"], 8 // processes) for process in range(processes)]


def start_script(script, processes, *more):
    """Processes that run a script: its arguments are coordinator, processes, process, and more."""
    coordinator = f"127.0.0.1:{free_port()}"
    return [
        open_process([sys.executable, "-c", script, coordinator, str(processes), str(process), *map(str, more)], 2)
        for process in range(processes)
    ]


def finish(processes, seconds=400):
    """Waits for all; returns what each said: (status, stdout, stderr)."""
    try:
        ended = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *each) for process, each in zip(processes, ended)]


def wait_for(seen, processes):
    """Until something is seen of running processes."""
    limit = time.monotonic() + 300
    while not seen():
        assert all(process.poll() is None for process in processes), finish(processes, 60)
        if time.monotonic() > limit:
            for process in processes:
                process.kill()
            raise AssertionError(finish(processes))
        time.sleep(0.05)


def steps_of(folder):
    """Of which there are metrics."""
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def saved(folder):
    """The steps of the checkpoints that count."""
    path = folder / "checkpoints"
    return sorted(int(each.name) for each in path.iterdir() if each.name.isdecimal()) if path.exists() else []


def complaints(err):
    """What a process said of its end."""
    return [line.removeprefix("exprl_jax: ") for line in err.splitlines() if line.startswith("exprl_jax: ")]


def spoken(out):
    """Lines on stdout; XLA's collectives announce themselves there, from threads that may break each other's lines."""
    return [line for line in out.splitlines() if line and "[Gloo]" not in line and "connected peer ranks" not in line]


def assert_compiled_in_the_first_step(folder):
    """Counts of a row are of all steps up to it."""
    taken = [row for row in rows(folder, clock=True) if row["step"]]
    counts = [row["time/compilations"] + row["time/compilations_cached"] for row in taken]
    assert len(counts) == 2 and counts[0] > 0 and counts[1] == counts[0], counts


def test_processes_that_share_rows_take_one_answer():
    """A verifier's clock or an endpoint may say different things of one rollout to each of them."""
    coordinator = f"127.0.0.1:{free_port()}"
    processes = [open_process([sys.executable, "-c", AGREE, coordinator, str(process)], 4) for process in range(2)]
    assert [(status, spoken(out)) for status, out, _ in finish(processes, 120)] == [(0, ["agreed"])] * 2


@pytest.mark.parametrize("mesh, readout", [("8x1", "logits"), ("2x4", "text"), ("1x8", "logits")])
def test_two_processes_do_what_one_does(mesh, readout, tmp_path):
    # Of a save before the last step the second row would have the slices that Orbax compiles.
    changes = MESHES[mesh] | {"judge.readout": readout, "checkpoint.every": 2}
    one = run(tiny("outcome", changes), tmp_path / "one")
    ended = finish(start(tmp_path / "two", changes))
    assert [status for status, _, _ in ended] == [0, 0], ended
    assert "done" in ended[0][1] and spoken(ended[1][1]) == []
    assert "step 2/2" in ended[0][2] and "step 2/2" not in ended[1][2]

    assert_same_rows(rows(tmp_path / "two"), rows(one))
    assert_compiled_in_the_first_step(tmp_path / "two")
    for name, tensor in parameters(tmp_path / "two").items():
        assert abs(tensor - parameters(one)[name]).max() < 1e-5, name

    files = {path.relative_to(one).parts[:2] for path in one.rglob("*") if "tensorboard" not in path.parts}
    paths = {path.relative_to(tmp_path / "two").parts[:2] for path in (tmp_path / "two").rglob("*")}
    assert {parts for parts in paths if "tensorboard" not in parts} == files
    assert len(list((tmp_path / "two" / "tensorboard").iterdir())) == 1
    sampled = [json.loads(line) for line in open_lines(tmp_path / "two" / "rollouts" / "step_000001.jsonl")]
    expected = [json.loads(line) for line in open_lines(one / "rollouts" / "step_000001.jsonl")]
    assert [(each["id"], each["rollout"], each["response"]) for each in sampled] == [
        (each["id"], each["rollout"], each["response"]) for each in expected
    ]


def open_lines(path):
    return path.read_text().splitlines()


@pytest.mark.parametrize("kl", ["full", "sampled"])
def test_two_processes_distil_as_one_does(kl, tmp_path):
    """And evaluate on the way, with a judge, waves that 24 problems do not fill, and a sample of the training data."""
    changes = MESHES["8x1"] | {
        "distillation.kl": kl,
        "checkpoint.every": 2,
        "data.max_prompt_tokens": 256,
        "evaluate.every": 2,
        "evaluate.source": str(ROOT / "configs/data/mixed.jsonl"),
        "evaluate.training_problems": 5,
        "evaluate.samples": 4,
        "data.allow_held_out": True,
    }
    one = run(tiny("distill", changes), tmp_path / "one")
    line = [each.replace("tiny.py", "tiny.py:distill") for each in command(tmp_path / "two", changes)]
    ended = finish(start_line(line, 2))
    assert [status for status, _, _ in ended] == [0, 0], ended
    assert_same_rows(rows(tmp_path / "two"), rows(one))
    assert_compiled_in_the_first_step(tmp_path / "two")
    for name, tensor in parameters(tmp_path / "two").items():
        assert abs(tensor - parameters(one)[name]).max() < 1e-5, name


def test_two_processes_evaluate_as_one_does(tmp_path):
    """All kinds of problems, the judge that open-ended ones need, and a wave that 24 problems do not fill."""
    changes = {
        "data.source": str(ROOT / "configs/data/mixed.jsonl"),
        "sampling.samples": 4,
        "sampling.group": 2,
        "sampling.wave": 16,
        "grader.seconds": 20.0,
    }
    evaluate(resolve(config_dict("evaluate", "tiny", changes)), str(tmp_path / "one"))
    line = [
        sys.executable,
        "-m",
        "exprl_jax.main",
        f"--config={ROOT / 'configs/evaluate.py:tiny'}",
        f"--workdir={tmp_path / 'two'}",
        *(f"--config.{path}={value}" for path, value in changes.items()),
    ]
    ended = finish(start_line(line, 2))
    assert [status for status, _, _ in ended] == [0, 0], ended
    assert "mixed: 48/48 groups of 2" in ended[0][2] and spoken(ended[1][1]) == []
    for name in ("samples/mixed.jsonl", "results.json", "table.txt", "summary.csv", "pass_at_k.csv"):
        assert (tmp_path / "two" / name).read_text() == (tmp_path / "one" / name).read_text(), name
    sampled = [json.loads(line) for line in open_lines(tmp_path / "two/samples/mixed.jsonl")]
    assert len(sampled) == 24 * 4


def counts(ended):
    """Of each process, how many responses it had graded."""
    assert [status for status, _, _ in ended] == [0, 0], ended
    return [
        int(line.removeprefix("graded ")) for _, out, _ in ended for line in spoken(out) if line.startswith("graded")
    ]


def test_processes_that_share_rows_evaluate_each_response_once(tmp_path):
    """Both hold all rows; one of them has a response graded, and asks an endpoint about it."""
    changes = {
        "data.source": str(ROOT / "configs/data/mixed.jsonl"),
        "sampling.samples": 2,
        "sampling.group": 2,
        "grader.seconds": 20.0,
        "judge.backend": "openai",
        "judge.readout": "text",
        "judge.endpoint.model": "stub",
        "judge.endpoint.api_key_variable": "",
    } | MESHES["1x8"]
    with StubEndpoint(lambda *_: Answer("Verdict: yes")) as stub:
        line = [
            sys.executable,
            "-c",
            COUNTED,
            f"--config={ROOT / 'configs/evaluate.py:tiny'}",
            f"--workdir={tmp_path}/run",
            f"--config.judge.endpoint.base_url={stub.base_url}",
            *(f"--config.{path}={value}" for path, value in changes.items()),
        ]
        ended = finish(start_line(line, 2))
        asked = len(stub.seen)
    sampled = [json.loads(line) for line in open_lines(tmp_path / "run/samples/mixed.jsonl")]
    assert len(sampled) == 24 * 2 and sorted(counts(ended)) == [0, 24 * 2]
    science = [row for row in sampled if row["kind"] == "science"]
    assert asked == len(science) > 0 and {row["verdict"] for row in science} == {"correct"}


def test_processes_that_share_rows_distil_each_response_once(tmp_path):
    changes = MESHES["1x8"]
    one = run(tiny("distill", changes), tmp_path / "one")
    line = [part.replace("tiny.py", "tiny.py:distill") for part in command(tmp_path / "two", changes)]
    ended = finish(start_line([line[0], "-c", COUNTED, *line[3:]], 2))
    assert sorted(counts(ended)) == [0, 2 * 8 * 4]  # steps, prompts, rollouts
    # What verdicts and rollouts say is the same; the other metrics are compared where each process has its own rows.
    graded = [
        [{k: v for k, v in row.items() if k.startswith(("solve/", "response/"))} for row in rows(folder)]
        for folder in (one, tmp_path / "two")
    ]
    assert graded[0] == graded[1] and "solve/accuracy" in graded[0][0]


# ---------------------------------------------------------------------------------------------- one of several


def test_a_run_that_is_killed_stopped_and_regrouped_ends_with_the_numbers_of_one_that_was_not(tmp_path):
    """Four processes, one of them killed; one; two; four, one of them asked to stop; one."""
    folder, endless = tmp_path / "run", {"steps": 400, "checkpoint.keep": 400} | MESHES["8x1"]

    processes = start(folder, endless, "--heartbeat_seconds=10", processes=4)
    wait_for(lambda: saved(folder), processes)
    processes[2].kill()
    ended = finish(processes)
    assert ended[2][0] == -signal.SIGKILL and all(status != 0 for status, _, _ in ended), ended
    taken = saved(folder)[-1]

    run(tiny("outcome", endless | {"steps": taken + 1}), folder)
    ended = finish(start(folder, endless | {"steps": taken + 2}))
    assert [status for status, _, _ in ended] == [0, 0] and f"resuming after step {taken + 1} of" in ended[0][2], ended

    processes = start(folder, endless, processes=4)
    wait_for(lambda: steps_of(folder) > taken + 2, processes)
    processes[3].send_signal(signal.SIGTERM)
    ended = finish(processes)
    assert [status for status, _, _ in ended] == [0, 0, 0, 0], ended
    stopped = rows(folder)[-1]["step"]
    assert f"stopped after step {stopped} of 400" in ended[0][2] and saved(folder)[-1] == stopped

    run(tiny("outcome", endless | {"steps": stopped + 1}), folder)
    whole = run(tiny("outcome", endless | {"steps": stopped + 1}), tmp_path / "whole")
    assert_same_rows(rows(folder), rows(whole))
    for name, tensor in parameters(folder).items():
        assert abs(tensor - parameters(whole)[name]).max() < 1e-5, name


@pytest.mark.parametrize("number, victim", [(signal.SIGKILL, 0), (signal.SIGKILL, 1), (signal.SIGSTOP, 1)])
def test_a_process_that_is_gone_takes_the_others_with_it(number, victim):
    """Process 0 is the coordinator.  A stopped process keeps its connections, as a host does whose power is cut."""
    processes = start_script(WAIT, 4, -1)
    wait_for(lambda: processes[3].stdout.readline().strip().isdecimal(), processes)
    processes[victim].send_signal(number)
    others = [process for process in processes if process is not processes[victim]]
    try:
        ended = finish(others, 120)
    finally:
        processes[victim].kill()
        processes[victim].communicate()
    assert all(status != 0 for status, _, _ in ended), ended


@pytest.mark.parametrize("faulty", [0, 3])
def test_an_error_in_one_process_is_what_all_say(faulty):
    ended = finish(start_script(WAIT, 4, faulty), 120)
    for process, (status, _, err) in enumerate(ended):
        assert status == 1, ended
        assert complaints(err) == ["planted" if process == faulty else f"ended with process {faulty}: planted"], err


@pytest.mark.parametrize("full", [0, 1])
def test_a_save_that_fails_in_one_process_ends_all_and_does_not_count(full, tmp_path):
    ended = finish(start_script(SAVE, 2, full, tmp_path), 120)
    for process, (status, _, err) in enumerate(ended):
        assert status == 1, ended
        (line,) = complaints(err)
        assert line.startswith("checkpoint of step 2 " if process == full else f"ended with process {full}: ")
        assert "checkpoint of step 2 could not be written" in line
    assert [each.name for each in tmp_path.iterdir() if each.name.isdecimal()] == ["1"]
    assert [status for status, _, _ in finish(start_script(SAVE, 2, -1, tmp_path), 120)] == [0, 0]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["1", "2"]


def children(pid):
    """The processes that a process has started."""
    of_threads = [path.read_text().split() for path in pathlib.Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(each) for of_thread in of_threads for each in of_thread]


def test_a_grader_that_hangs_in_one_process_costs_a_verdict_and_an_error_the_run(tmp_path):
    folder, changes = tmp_path / "run", {"steps": 400, "checkpoint.every": 400, "grader.seconds": 5.0}
    processes = start(folder, changes, program=("-c", BOXED))
    wait_for(lambda: steps_of(folder) >= 1, processes)
    (worker,) = children(processes[1].pid)
    os.kill(worker, signal.SIGSTOP)
    ended = finish(processes)
    assert [status for status, _, _ in ended] == [1, 1], ended
    assert complaints(ended[1][2]) == ["planted"] and complaints(ended[0][2]) == ["ended with process 1: planted"]
    hung = [row["step"] for row in rows(folder) if row["solve/timed_out"] > 0]
    assert hung and steps_of(folder) >= hung[0] + 2
    assert not pathlib.Path(f"/proc/{worker}").exists()


def test_the_processes_of_a_host_share_its_graders():
    ended = finish(start_script(GRADERS, 4), 120)
    assert [(status, spoken(out)) for status, out, _ in ended] == [(0, [workers]) for workers in "1225"], ended


# ---------------------------------------------------------------------------------------------- at the start


def slurm(process, port):
    """What srun tells a task; JAX makes the coordinator's port of the job's number."""
    told = {"JOB_ID": port, "STEP_NODELIST": "127.0.0.1", "NTASKS": 2, "PROCID": process, "LOCALID": process}
    return {f"SLURM_{name}": str(value) for name, value in told.items()} | {"JAX_COORDINATOR_PORT": str(port)}


def test_slurm_tells_processes_of_one_another(tmp_path):
    """The data axis that neither has enough problems for is of the eight devices that they have together."""
    changes, port = {"rollout.wave": 4}, free_port()
    processes = [
        open_process(
            command(tmp_path / "run", changes, "--distributed=auto"), 4, env=environment(4) | slurm(process, port)
        )
        for process in range(2)
    ]
    for status, out, err in finish(processes, 120):
        assert status == 1 and spoken(out) == [] and "Traceback" not in err
        wanted = "expected a multiple of mesh.data = 8, so that every device has a problem of every wave"
        assert complaints(err) == [f"config.rollout.wave: got 4, {wanted}"]
    assert not (tmp_path / "run").exists()


def test_what_processes_do_not_have_in_common_is_refused(tmp_path):
    """Another seed; and, under one name, other data."""
    text = (ROOT / "configs/data/arithmetic.jsonl").read_text()
    for process, lines in enumerate([text, "".join(text.splitlines(keepends=True)[1:])]):
        (tmp_path / str(process)).mkdir()
        (tmp_path / str(process) / "problems.jsonl").write_text(lines)
    expected = {
        "seed": "was started with another config than process 0 (its value != the value there): seed: 2 != 1",
        "data": "config.data.source: processes 1 have read other problems than process 0; give all hosts the same",
    }
    for name, message_of_one in expected.items():
        together = (f"--coordinator=127.0.0.1:{free_port()}", "--processes=2")
        changes = [{"data.source": "problems.jsonl", "seed": 1 + (name == "seed") * process} for process in range(2)]
        processes = [
            open_process(
                command(tmp_path / name, changes[process], *together, f"--process={process}"),
                4,
                cwd=tmp_path / (str(process) if name == "data" else "0"),
                env=environment(4) | {"PYTHONPATH": str(ROOT)},
            )
            for process in range(2)
        ]
        ended = finish(processes, 300)
        assert [status for status, _, _ in ended] == [1, 1], ended
        assert message_of_one in complaints(ended[1][2])[0] and message_of_one in complaints(ended[0][2])[0]
        assert not steps_of(tmp_path / name)
