"""Which room stands on which, and where things may stand: one room for flax, one for jit, one for partition specs."""

import ast
import graphlib
import subprocess
import sys

import pytest
from tiny_runs import ROOT

PACKAGE = ROOT / "exprl_jax"
SOURCES = sorted(PACKAGE.rglob("*.py"))
# A room is a folder of the package or a file beside them.  From the ground upwards: a room imports rooms of lower
# floors alone.
FLOORS = (
    ("kinds",),
    ("architecture", "config", "files", "gguf_reader", "packaged", "records", "text_tables"),
    ("help", "layout", "mesh", "resolve"),
    ("hosts",),
    ("data", "learning", "model", "sizes"),
    ("rollout", "run"),
    ("weights",),
    ("reward",),
    ("metric_tables", "programs"),
    ("evaluation", "plan", "rl_run", "supervised_run"),
    ("compile_check", "judge_training", "report", "run_evaluation", "sft", "wave"),
    ("batch", "rollout_log"),
    ("distill", "train"),
    ("show",),
    ("main",),
)
GROUND = {"architecture", "config", "files", "hosts", "kinds", "mesh", "records"}


def dotted(path):
    """A module's name within the package: `run.loop`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports():
    """The package's modules that each of its modules imports, inside functions too."""
    modules, graph = {dotted(path) for path in SOURCES} - {""}, {}
    for path in SOURCES:
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}: a relative import"
                names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
        graph[dotted(path)] = {name.removeprefix("exprl_jax.") for name in names if name.startswith("exprl_jax.")}
        graph[dotted(path)] &= modules
    return graph


def room(module):
    return module.partition(".")[0]


IMPORTS = imports()


def importers(name):
    """Rooms that import a room."""
    return {room(module) for module, names in IMPORTS.items() if name in map(room, names)} - {name}


def test_every_room_has_its_floor():
    assert sorted(name for floor in FLOORS for name in floor) == sorted({room(module) for module in IMPORTS} - {""})


@pytest.mark.parametrize("name", [name for floor in FLOORS for name in floor])
def test_a_room_imports_lower_floors_alone(name):
    """So there is no circle of rooms either."""
    level = next(i for i, floor in enumerate(FLOORS) if name in floor)
    below = {name for floor in FLOORS[:level] for name in floor}
    imported = {room(x) for module, names in IMPORTS.items() if room(module) == name for x in names}
    assert imported - {name} <= below


def test_modules_import_one_another_in_no_circle():
    """Within a room too; a folder's own file is no module that stands between."""
    assert len(list(graphlib.TopologicalSorter(IMPORTS).static_order())) == len(IMPORTS)


def test_the_loop_is_the_doors_alone():
    assert importers("train") == {"main"}


def test_evaluation_does_not_train():
    assert not [name for name in ("train", "wave", "batch", "rl_run", "rollout_log") if "evaluation" in importers(name)]


def test_rewards_do_not_know_the_programs_that_they_are_computed_with():
    assert "reward" not in importers("programs")


def test_the_ground_floor_stands_on_itself():
    assert {room(x) for module in GROUND for x in IMPORTS[module]} <= GROUND


def uses(path, name):
    """Lines of a file that name `name`, as an attribute, a name, or an import."""
    lines = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute | ast.Name):
            names = [ast.unparse(node)]
        else:
            continue
        if any(x == name or x.startswith(f"{name}.") or x.endswith(f".{name}") for x in names):
            lines.append(node.lineno)
    return lines


def users(*names):
    """Files of the package that name one of them."""
    return {str(path.relative_to(PACKAGE)) for path in SOURCES if any(uses(path, name) for name in names)}


def test_only_the_decoder_imports_linen():
    assert users("flax.linen") == {"model/decoder.py"}


def test_only_programs_jit():
    """Besides them, random weights are initialised where they are to lie."""
    assert users("jax.jit", "jit", "jax.pmap") == {"programs.py", "weights/language_model.py"}


def test_only_the_mesh_has_partition_specs():
    assert users("PartitionSpec", "jax.sharding.PartitionSpec", "jax.P") == {"mesh.py"}


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
        if path.is_file() and path.suffix not in (".png", ".parquet", ".safetensors"):
            text = path.read_text(encoding="utf-8")
            assert not [word for word in words if word in text], path
