"""tpu_scripts/colab_smoke.ipynb, executed by a real kernel, on the CPU."""

import ast
import json
import os
import pathlib
import signal
import subprocess
import sys

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from tiny_runs import ROOT, environment

PATH = ROOT / "tpu_scripts/colab_smoke.ipynb"


def execute(folder, configs, cwd=ROOT, **variables):
    """The notebook as it is after its last cell."""
    book = nbformat.read(PATH, as_version=4)
    client = NotebookClient(book, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(cwd)}})
    beside = str(pathlib.Path(sys.executable).parent)  # where tensorboard is
    held = environment(1) | {"EXPRL_CONFIGS": configs, "EXPRL_RUNS": str(folder / "runs"), "TMPDIR": str(folder)}
    held |= {"PATH": f"{beside}{os.pathsep}{os.environ['PATH']}", "JUPYTER_PLATFORM_DIRS": "1"} | variables
    try:
        client.execute(env=held)
    finally:
        for file in folder.glob(".tensorboard-info/pid-*.info"):  # the server outlives its kernel
            os.kill(json.loads(file.read_text())["pid"], signal.SIGKILL)
    return book


def shown(book, kind):
    """What its cells show, as text/plain, text/markdown, ..., or have printed."""
    for cell in book.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and kind == "stream":
                yield output.text
            yield from [output.data[kind]] if kind in output.get("data", {}) else []


def check_run(book, folder, name, steps, *, board):
    rows = [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    printed = "".join(shown(book, "stream"))
    assert "CpuDevice(id=0)" in printed and f"step {steps}/{steps}" in printed
    (table,) = shown(book, "text/markdown")
    assert len(table.splitlines()) == steps + 2 and f"{rows[-1]['response/length_mean']:.4g}" in table
    if board:
        assert any("tensorboard-frame" in html for html in shown(book, "text/html"))


def test_it_is_committed_without_outputs_and_is_whole():
    book = nbformat.read(PATH, as_version=4)
    nbformat.validate(book)
    assert 8 <= len(book.cells) <= 12
    for cell in book.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
            if "%" not in cell.source.split()[0]:
                ast.parse(cell.source)


def test_it_runs_the_tiny_config(tmp_path):
    check_run(
        execute(tmp_path, "tiny"), tmp_path, "tiny", 4, board=False
    )  # TensorBoard takes a minute to start beside other work


def test_it_asks_for_the_repository_where_there_is_no_package(tmp_path):
    with pytest.raises(CellExecutionError) as caught:
        execute(tmp_path, "tiny", cwd=tmp_path, PYTHONPATH="")
    assert caught.value.ename == "ValueError" and caught.value.evalue.startswith("REPOSITORY is empty")


def test_a_process_that_fails_ends_it(tmp_path):
    with pytest.raises(CellExecutionError) as caught:
        execute(tmp_path, "tiny", JAX_PLATFORMS="abacus")
    assert caught.value.ename == "CalledProcessError"


def source_of(word):
    """The code cell that holds a word."""
    (cell,) = (each.source for each in nbformat.read(PATH, as_version=4).cells if word in each.source)
    return cell


def test_a_restarted_session_finds_its_clone_and_installs(tmp_path):
    """It begins beside the clone, whose folder has the package's name and can be imported; pip is a stand-in."""
    for name in ("exprl_jax/exprl_jax/main.py", "exprl_jax/requirements.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    pip = tmp_path / "pip"
    pip.write_text("#!/bin/sh\necho called $*\n")
    pip.chmod(0o755)
    cell = f"import os, sys\nREPOSITORY, sys.executable = '', {str(pip)!r}\n{source_of('pip')}\nprint(os.getcwd())"
    held = os.environ | {"PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "-c", cell], cwd=tmp_path, env=held, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.splitlines()
    assert printed[0].startswith("called -m pip install -q -r requirements.txt") and printed[1:] == [
        f"{tmp_path}/exprl_jax"
    ]


_SAVES = """
import signal, time
asked = []
signal.signal(signal.SIGINT, lambda *_: asked.append(1))
print("ready", flush=True)
while not asked:
    time.sleep(0.01)
time.sleep(1)
for line in range(3):
    print("saving", line, flush=True)
print("saved", flush=True)
"""


def test_an_interrupt_lets_a_run_save_and_ends_the_cell(tmp_path):
    """It reaches all processes of the kernel's group."""
    function = source_of("def python(").partition("\n\n\n")[0]
    cell = f"import subprocess, sys\n{function}\npython('-c', {_SAVES!r})\nprint('the next cell')"
    with subprocess.Popen(
        [sys.executable, "-c", cell],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as kernel:
        assert kernel.stdout.readline() == "ready\n"
        os.killpg(kernel.pid, signal.SIGINT)
        printed, failed = kernel.communicate(timeout=60)
    assert printed.splitlines() == ["saving 0", "saving 1", "saving 2", "saved"]
    assert failed.splitlines()[-1] == "KeyboardInterrupt"


@pytest.mark.slow
def test_it_runs_the_smoke_config(tmp_path):
    # Compiled as users compile it: programs that LLVM did not optimise are slow with a real model.
    book = execute(tmp_path, "smoke", XLA_FLAGS="")
    check_run(book, tmp_path, "smoke", 4, board=True)
