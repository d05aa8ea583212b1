"""The page of metrics: its tables are the code's, and a page that lacks one is refused."""

import re

import pytest
from tiny_runs import ROOT

from exprl_jax.learning import distillation, supervised, update
from exprl_jax.metric_tables import TABLES, explanations, main, rewrite
from exprl_jax.reward import statistics
from exprl_jax.rollout import usage
from exprl_jax.run import evaluating

PAGE = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")


def test_the_page_is_current():
    assert rewrite(PAGE) == PAGE, "run: python -m exprl_jax.metric_tables docs/metrics.md"


@pytest.mark.parametrize(
    "heading, explained",
    [
        ("Reinforcement learning", {**statistics.METRICS, **usage.METRICS, **update.METRICS}),
        ("Self-distillation", distillation.METRICS),
        ("Evaluation inside a run", evaluating.METRICS),
        ("SFT", {**supervised.METRICS, **supervised.VALIDATION}),
        ("Judges' training", supervised.JUDGE_VALIDATION),
    ],
)
def test_every_metric_is_explained_under_its_heading_and_none_is_invented(heading, explained):
    """Read back from the page, without the code that wrote it."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    assert dict(re.findall(r"^\| `([a-z]+/[\w@]+)` \| (.+) \|$", section, re.MULTILINE)) == explained
    assert heading != "Reinforcement learning" or all(f"`{name}`" in section for name in statistics.BY_KIND)


def test_a_stale_page_is_made_current_and_its_prose_is_left(tmp_path):
    path = tmp_path / "page.md"
    stale = PAGE.replace("| `grad/norm` |", "| `grad/old` |").replace("`reward/mean`,", "")
    assert stale != PAGE
    path.write_text(stale, encoding="utf-8")
    assert main([str(path)]) == 0 and path.read_text(encoding="utf-8") == PAGE


@pytest.mark.parametrize(
    "page",
    [
        "",
        PAGE.replace("metrics: updates", "metrics: update"),
        PAGE.replace("metrics: updates", "metrics: rollouts"),
        PAGE * 2,
    ],
)
def test_a_page_without_each_table_once_is_refused(tmp_path, page, capsys):
    path = tmp_path / "page.md"
    path.write_text(page, encoding="utf-8")
    assert main([str(path)]) == 1 and path.read_text(encoding="utf-8") == page
    assert "expected each of rollouts, sampling, updates" in capsys.readouterr().err
    assert main([str(tmp_path / "none.md")]) == 1 and main([]) == 2


def test_the_tasks_metrics_are_those_of_their_tables():
    assert set(explanations("rl")) == {*statistics.METRICS, *usage.METRICS, *update.METRICS, *evaluating.METRICS}
    assert explanations("distill")["loss/total"] == distillation.METRICS["loss/total"]
    assert explanations("sft") == {**TABLES["supervised"], **TABLES["validation"]} and explanations("evaluate") == {}
    assert explanations("judge") == {**explanations("sft"), **TABLES["judge_validation"]}
