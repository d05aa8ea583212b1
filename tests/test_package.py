"""What an installed package finds, from a folder that knows nothing of a clone."""

import os
import pathlib
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest

from exprl_jax.packaged import locate

ROOT = pathlib.Path(__file__).resolve().parents[1]

PROBLEMS = "from exprl_jax.data.problems import read_problems; print(len(read_problems('configs/data/*ic.jsonl')))"
MINE = "from configs.tiny import ARMS, get_config as tiny\n\ndef get_config():\n    return tiny('sparse')\n"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from the files that git would commit: what is built in a clone stays there."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "clone" / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, f"--wheel-dir={folder}", str(folder / "clone")], check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Runs Python where the wheel is installed, beside the packages that this Python has, in a folder elsewhere."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv/bin/python"
    pip = [sys.executable, "-m", "pip", f"--python={python}", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True)
    (packages,) = (folder / "venv/lib").glob("python*/site-packages")
    (packages / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    elsewhere = folder / "elsewhere"
    (elsewhere / "configs").mkdir(parents=True)
    (elsewhere / "configs/mine.py").write_text(MINE)
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*arguments):
        command = [python, "-W", "ignore", *arguments]
        done = subprocess.run(command, cwd=elsewhere, env=alone, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert pathlib.Path(run("-c", "import exprl_jax; print(exprl_jax.__file__)").strip()).is_relative_to(packages)
    return run


def test_a_committed_config_is_found(installed):
    assert installed("-m", "exprl_jax.main", "--config=configs/tiny.py:process", "--dry_run").startswith("== resolved")


def test_a_config_of_ones_own_may_build_on_a_committed_one(installed):
    told = installed("-m", "exprl_jax.main", "--config=configs/mine.py", "--diff=configs/tiny.py")
    assert "routes.math: 'verifier' != 'outcome'" in told.splitlines()


def test_committed_data_are_found(installed):
    assert installed("-c", PROBLEMS) == "64\n"


def test_every_file_of_the_packages_is_installed_and_no_other(wheel):
    clone = wheel.parent / "clone"
    ours = {str(path.relative_to(clone)) for name in ("exprl_jax", "configs") for path in (clone / name).rglob("*.*")}
    with zipfile.ZipFile(wheel) as files:
        assert {name for name in files.namelist() if ".dist-info/" not in name} == ours


def test_the_requirements_are_one_list(wheel):
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    with zipfile.ZipFile(wheel) as files:
        (name,) = [name for name in files.namelist() if name.endswith(".dist-info/METADATA")]
        told = files.read(name).decode().splitlines()
    asked = [line.removeprefix("Requires-Dist: ") for line in told if line.startswith("Requires-Dist: ")]
    assert asked == [line for line in lines if line and not line.startswith("#")]


def test_the_working_directory_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert locate("configs/tiny.py") == locate("./configs/tiny.py") == str(ROOT / "configs/tiny.py")
    assert locate("configs/data/*.jsonl") == str(ROOT / "configs/data/*.jsonl")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/tiny.py").touch()
    assert locate("configs/tiny.py") == "configs/tiny.py"
    assert locate("configs/data/*.jsonl") == str(ROOT / "configs/data/*.jsonl")


@pytest.mark.parametrize(
    "path", ["configs/tini.py", "exprl_jax/main.py", "data/configs/tiny.py", "/configs/tiny.py", ""]
)
def test_nothing_else_is_looked_for_in_the_package(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert locate(path) == path
