"""Where things may stand: one room for flax, one for jit, one for partition specs, and a door that opens at once."""

import ast
import subprocess
import sys

import pytest
from tiny_runs import ROOT

SOURCES = sorted((ROOT / "exprl_jax").rglob("*.py"))


def uses(path, name):
    """Lines of a file that name `name`, as an attribute, a name, or an import."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute | ast.Name):
            names = [ast.unparse(node)]
        else:
            continue
        if any(each == name or each.startswith(f"{name}.") or each.endswith(f".{name}") for each in names):
            found.append(node.lineno)
    return found


def rooms(*names):
    return {str(path.relative_to(ROOT / "exprl_jax")) for path in SOURCES if any(uses(path, name) for name in names)}


def test_only_the_decoder_imports_linen():
    assert rooms("flax.linen") == {"model/decoder.py"}


def test_only_programs_jit():
    """Besides them, random weights are initialised where they are to lie."""
    assert rooms("jax.jit", "jit", "jax.pmap") == {"programs.py", "weights/language_model.py"}


def test_only_the_mesh_has_partition_specs():
    assert rooms("PartitionSpec", "jax.sharding.PartitionSpec", "jax.P") == {"mesh.py"}


def test_the_door_opens_without_the_slow_imports():
    code = (
        "import sys, exprl_jax.main; "
        "print([name for name in ('jax', 'tensorflow', 'transformers', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_training_does_not_import_torch():
    code = "import sys, exprl_jax.train; print([name for name in ('torch', 'tensorflow') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", done.stderr


def tracked():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.splitlines()]


def test_nothing_points_outside_the_repository():
    words = ["../sha" + "red", "/wo" + "rk/", "/tmp/" + "brief"]
    for path in tracked():
        if path.is_file() and path.suffix not in (".png", ".parquet"):
            text = path.read_text(encoding="utf-8")
            assert not [word for word in words if word in text], path
