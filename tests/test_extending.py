"""The diffs of docs/extending.md are real: each is applied to a copy of the package, and what it adds is used there."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from tiny_runs import ROOT

PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
ROUTE = """
import dataclasses
from configs.tiny import get_config
from exprl_jax.resolve import resolve
from exprl_jax.reward.routes import ROUTES
from exprl_jax.reward.verifiers.verdict import Verdict
config = get_config("sparse")
config.unlock()
config.routes.math = "attempted"
routes = resolve(config).routes
route = ROUTES[routes.of("math")]
print([route.verdict_reward(Verdict[name]) for name in ("correct", "wrong", "no_answer", "missing")])
"""
KIND = """
import sys
from configs.tiny import get_config
from exprl_jax.data.problems import read_problems
from exprl_jax.resolve import resolve
from exprl_jax.reward.judge_prompts import judge_messages
from exprl_jax.reward.verifiers.grading import Graders, check_answers
good, bad = read_problems(sys.argv[1])
check_answers([good])
try:
    check_answers([bad])
except ValueError as error:
    print(error)
config = resolve(get_config("sparse"))
with Graders(config.grader, config.code, [good.kind]) as graders:
    verdicts = graders.submit([(good, text) for text in ("No? Yes.", "no", "perhaps")]).result()
print(good.kind, config.routes.of(good.kind), [str(verdict) for verdict in verdicts])
prompt = str(judge_messages(good.problem, (), "r", good.domain, "outcome", "text", "<trace>"))
print("yes-or-no question" in prompt, "Check every inference." in prompt)
"""


def diffs(heading):
    section = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(r"```diff\n(.*?)```", section, re.DOTALL)


def applied(heading, folder):
    """A copy of package and configs with a section's diff applied; of two files at most."""
    (diff,) = diffs(heading)
    for name in ("exprl_jax", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "change.diff").write_text(diff, encoding="utf-8")
    # Away from any repository, git applies to the folder that it stands in.
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    subprocess.run(["git", "apply", "change.diff"], cwd=folder, env=environment, check=True)
    assert len(re.findall(r"^\+\+\+ ", diff, re.MULTILINE)) <= 2
    return folder


def printed(code, folder, *arguments):
    environment = os.environ | {"PYTHONPATH": str(folder), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.skipif(shutil.which("git") is None, reason="git applies the diffs")
def test_a_reward_route_is_two_places(tmp_path):
    assert printed(ROUTE, applied("A reward route", tmp_path)) == ["[1.0, 0.1, 0.0, None]"]


@pytest.mark.skipif(shutil.which("git") is None, reason="git applies the diffs")
def test_a_kind_of_problem_is_a_record_and_a_verifier(tmp_path):
    row = dict(problem="Is 7 prime?", reference="It is.", answer="Yes", domain="logic")
    rows = [row, row | dict(problem="Is 8?", answer="8")]
    source = tmp_path / "problems.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (refusal, *lines) = printed(KIND, applied("A kind of problem, with its verifier", tmp_path / "copy"), str(source))
    assert refusal.endswith("its answer is '8', expected yes or no")
    assert lines == ["yes_no verifier ['correct', 'wrong', 'no_answer']", "True True"]


def test_the_other_two_name_the_commits_that_made_them():
    for heading, subject in (
        ("A whole-rollout estimator", "Add the estimator maxrl"),
        ("A model family", "Know Mistral: a family that differs by fields alone"),
    ):
        section = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
        assert subject in " ".join(section.split()) and diffs(heading)
