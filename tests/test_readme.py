"""What the README promises about names and commands."""

import pathlib
import re

import pytest

from exprl_jax.learning import update
from exprl_jax.reward import statistics

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_metric_is_explained_and_none_is_invented():
    listed = dict(re.findall(r"^\| `([a-z]+/\w+)` \| (.+) \|$", README, re.MULTILINE))
    assert listed == {**statistics.METRICS, **update.METRICS}


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?:configs|docs|benchmarks|tests)/[\w/.]+\w", README))))
def test_named_files_exist(path):
    assert (ROOT / path).exists()


def test_nothing_is_left_to_fill_in():
    assert not re.findall(r"\b[A-Z]{3,}_[A-Z]{3,}\b", README)
