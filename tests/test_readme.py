"""What the README and the pages beside it promise about names and commands."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?:configs|docs|benchmarks|tests)/[\w/.]+\w", README))))
def test_named_files_exist(path):
    assert (ROOT / path).exists()


def test_nothing_is_left_to_fill_in():
    assert not re.findall(r"\b[A-Z]{3,}_[A-Z]{3,}\b", README)
