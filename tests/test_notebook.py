"""tpu_scripts/colab_smoke.ipynb, executed by a real kernel, on the CPU."""

import ast
import json
import os
import pathlib
import signal
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
    check_run(execute(tmp_path, "tiny"), tmp_path, "tiny", 4, board=False)  # TensorBoard takes a minute to start beside other work


def test_it_asks_for_the_repository_where_there_is_no_package(tmp_path):
    with pytest.raises(CellExecutionError) as caught:
        execute(tmp_path, "tiny", cwd=tmp_path, PYTHONPATH="")
    assert caught.value.ename == "ValueError" and caught.value.evalue.startswith("REPOSITORY is empty")


def test_a_process_that_fails_ends_it(tmp_path):
    with pytest.raises(CellExecutionError) as caught:
        execute(tmp_path, "tiny", JAX_PLATFORMS="abacus")
    assert caught.value.ename == "CalledProcessError"


@pytest.mark.slow
def test_it_runs_the_smoke_config(tmp_path):
    check_run(execute(tmp_path, "smoke"), tmp_path, "smoke", 4, board=True)
