"""`--help`: every key has a meaning, and it is found at once."""

import dataclasses
import pathlib
import subprocess
import sys

import pytest

from exprl_jax import config, main
from exprl_jax.config import TASKS
from exprl_jax.help import describe, keys, meanings

ROOT = pathlib.Path(__file__).resolve().parents[1]


def records():
    """Every record that a config is made of."""
    named = {key.hint for record in TASKS.values() for key in keys(record) if dataclasses.is_dataclass(key.hint)}
    return sorted(named | set(TASKS.values()), key=lambda record: record.__name__)


def test_every_record_of_the_config_is_reached():
    ours = {x for x in vars(config).values() if dataclasses.is_dataclass(x)}
    # Of these three at least the heirs are reached.
    assert ours - set(records()) <= {config.Source, config.Supervised, config.Asking}


@pytest.mark.parametrize("record", records(), ids=lambda record: record.__name__)
def test_every_key_is_explained_and_none_is_invented(record):
    assert set(meanings(record)) == {field.name for field in dataclasses.fields(record)}
    assert all(len(text) > 5 for text in meanings(record).values())


@dataclasses.dataclass
class Parent:
    """A line.

    Attributes:
      first: one.
      shared, other: two: with a colon,
        and a second line.
    """

    first: int
    shared: int
    other: int


@dataclasses.dataclass
class Heir(Parent):
    """Another.

    Attributes:
      first: told otherwise.
      last: three.
    """

    last: int


def test_meanings_are_read_from_the_docstrings():
    both = "two: with a colon, and a second line."
    assert meanings(Heir) == {"first": "told otherwise.", "shared": both, "other": both, "last": "three."}


@dataclasses.dataclass
class Bare:
    """No more than this: nothing."""

    field: int


def test_a_record_without_attributes_has_no_meanings():
    assert meanings(Bare) == {}


def words(text):
    return " ".join(text.split())


def test_the_whole_lists_every_task_every_option_and_every_leaf(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    page = describe("", {"config": "The experiment.", "dry_run": "Print."})
    lines = page.splitlines()
    assert max(map(len, lines)) <= 120
    assert any(line.split() == ["--config", "The", "experiment."] for line in lines)
    for task, record in TASKS.items():
        (part,) = [part for part in page.split("\nkeys of ") if task in part.partition(", each")[0].split(" and ")]
        for key in keys(record):
            if "." not in key.path:
                assert words(f" {key.path} {meanings(record)[key.path]}") in words(part), key
    (rl,) = [part for part in page.split("\nkeys of ") if part.startswith("rl and distill,")]
    listed = {line.split()[0] for line in rl.splitlines() if line.startswith("  ") and line[2:3].isalpha()}
    models = ("reference.", "judge.model.", "truth.workers.")
    assert {key.path for key in keys(config.Config) if not key.path.startswith(models)} <= listed
    assert words("judge.model the judge; equal weights to the reference's") in words(rl)
    assert words("Its keys are those of `policy`.") in words(rl)


def test_a_narrow_terminal_is_filled_and_no_more(monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    assert max(map(len, describe("rollout", {}).splitlines())) in range(60, 71)


@pytest.mark.parametrize(
    "topic, told",
    [
        ("rollout", ["rollout (rl, distill):", "rollout.group rollouts a problem (G). (int)"]),
        (
            "judge.endpoint",
            ["judge.endpoint (rl, distill, judge, evaluate, label):", "judge.endpoint.retries how often"],
        ),
        ("judge.model", ["judge.model.execution.remat what the backward pass"]),
        (
            "routes.math",
            [
                "routes.math (rl, distill): route of math problems. One of `process`, `outcome`, `verifier`, "
                "`likelihood`."
            ],
        ),
        ("sft", ["epochs passes over the data, where `steps` is 0. (int)", "data.held_out sources"]),
        ("data", ["data (sft): problems whose references are trained on.", "data.held_out sources"]),
        ("judges.4B.readout", ["judges.<name>.readout (calibrate): `text` generates"]),
        ("judges", ["judges.<name>.max_tokens"]),
        ("group", ["group (calibrate, label):", "other keys of that name: rollout.group, sampling.group"]),
    ],
)
def test_a_topic_is_a_section_a_key_or_a_task(topic, told):
    page = words(describe(topic, {}))
    assert all(each in page for each in told), page


def test_a_section_lists_what_is_in_it_and_nothing_else():
    rows = [line.split()[0] for line in describe("checkpoint", {}).splitlines() if line.startswith("  checkpoint.")]
    assert rows == ["checkpoint.every", "checkpoint.keep", "checkpoint.best", "checkpoint.best_is"]


@pytest.mark.parametrize(
    "topic, told",
    [
        ("rolout", "--help=rolout: no such section, key or task; did you mean rollout?"),
        ("rollout.grop", "did you mean rollout.group?"),
        ("temperature", "did you mean rollout.temperature or evaluate.temperature or sampling.temperature or "),
        ("evalate", "did you mean evaluate?"),
        ("#", "--help=#: no such section, key or task; --help lists all"),
    ],
)
def test_an_unknown_topic_is_one_line_with_the_nearest_name(topic, told, capfd):
    assert main.main(["exprl_jax", f"--help={topic}"]) == 2
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err.startswith("exprl_jax: ") and told in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["-h"], ["--config=configs/none.py", "--help", "--nonsense"], ["--help="], ["--workdir=x", "-help"]],
)
def test_help_goes_before_all_else(arguments, capfd):
    assert main.main(["exprl_jax", *arguments]) == 0
    captured = capfd.readouterr()
    assert captured.err == "" and captured.out.startswith("python -m exprl_jax.main --config=FILE")
    names = ("config", "workdir", "diff", "dry_run", "distributed", "coordinator", "processes", "process", "help")
    assert all(f"  --{name} " in captured.out for name in (*names, "heartbeat_seconds"))


def test_help_is_there_at_once():
    code = (
        "import sys; from exprl_jax import main; main.main(['x', '--help']); "
        "print([name for name in ('jax', 'numpy', 'tensorflow', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
