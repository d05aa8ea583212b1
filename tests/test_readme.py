"""What the README and docs/ promise: names, links, keys and commands that are there, messages as they are."""

import ast
import importlib.util
import pathlib
import re
import runpy
import shlex

import pytest
from ml_collections import ConfigDict

from exprl_jax.config import TASKS
from exprl_jax.help import keys
from exprl_jax.resolve import resolve
from exprl_jax.run.workdir import NEUTRAL_KEYS

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
README = TEXT["README.md"]
PATHS = {key.path for record in TASKS.values() for key in keys(record)}


def test_the_first_screen():
    lines = README.splitlines()
    assert len(lines) <= 150
    first = "\n".join(lines[:40])
    for wanted in (
        "problems → prompts → sampler",
        "pip install -r",
        "python -m pytest",
        "| what you want |",
        "**Status:",
    ):
        assert wanted in first


def test_the_rooms_are_those_that_there_are():
    """Every folder and file of the package, and every folder beside it."""
    (listed,) = re.findall(r"^    exprl_jax/\n((?:    .*\n)+)", README, re.MULTILINE)
    inside = [re.split(" {2,}", line[6:])[0] for line in listed.splitlines() if line.startswith(" " * 6)]
    named = {name.rstrip("/") for names in inside for name in names.split()}
    names = {path.name for path in (ROOT / "exprl_jax").iterdir() if not path.name.startswith("__")}
    assert named == names
    beside = set(re.findall(r"^    (\w+)/ ", listed, re.MULTILINE))
    assert beside == {"configs", "benchmarks", "tests", "tpu_scripts"}


def test_every_page_is_linked_from_the_readme():
    linked = set(re.findall(r"\]\((?:docs/)?([\w.]+\.md)\)", README))
    assert {page.name for page in PAGES} - {"README.md"} <= linked


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXT[page.name]):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            file = (page.parent / path) if path else page
            assert file.exists(), target
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
            assert not anchor or anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}, (
                target
            )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page):
    for path in set(
        re.findall(r"(?<![\w/])(?:configs|docs|benchmarks|tests|exprl_jax|tpu_scripts)/[\w/.]+\w", TEXT[page.name])
    ):
        assert (ROOT / path).exists(), path


def test_nothing_is_left_to_fill_in():
    assert not re.findall(r"\b[A-Z]{3,}_[A-Z]{3,}\b", README)


# ------------------------------------------------------------------------------------------------ commands, keys


def words(text):
    """Words of code in a page: indented blocks with their continued lines joined, and what stands in backticks."""
    blocks = "".join(re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)).replace("\\\n", " ")
    return [*blocks.splitlines(), *re.findall(r"`([^`\n]+)`", text)]


_KEY = re.compile(r"--config\.([\w.]+)=(.*)")
COMMANDS = sorted({line.strip() for page in PAGES for line in words(TEXT[page.name]) if "--config=configs/" in line})


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_with_a_config_resolves(command):
    """As the door reads it: the file and its arm, then each key that is set."""
    arguments = [
        word.removesuffix(",") for word in shlex.split(command.replace("‹", "").replace("[", ""), comments=True)
    ]
    names = [word.partition("=")[2] for word in arguments if re.match(r"--(config|diff)=configs/[\w/]+\.py", word)]
    for name in names:
        file, _, arm = name.partition(":")
        get_config = runpy.run_path(str(ROOT / file))["get_config"]
        config = ConfigDict(get_config(arm) if arm else get_config())
        for key, value in (match.groups() for word in arguments if (match := re.fullmatch(_KEY, word))):
            kind = type(_get(config, key))
            config.update_from_flattened_dict({key: value if kind is str else kind(_literal(value))})
        resolve(config.to_dict())


def _get(config, key):
    for name in key.split("."):
        config = config[name]
    return config


def _literal(value):
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False}.get(value, value)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_that_are_run_exist(page):
    for module in set(re.findall(r"python -m ((?:exprl_jax|benchmarks)[\w.]*\w)", TEXT[page.name])):
        assert importlib.util.find_spec(module), module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_that_are_named_exist(page):
    sections = {path.partition(".")[0] for path in PATHS if "." in path}
    named = set(re.findall(r"--(?:config|diff)\.([\w.]+\w)", TEXT[page.name]))
    for word in re.findall(r"`([a-z_0-9]+(?:\.[a-z_0-9]+)+)(?:=[^`]*)?`", TEXT[page.name]):
        if word.partition(".")[0] in sections and not word.endswith((".md", ".py", ".jsonl")):
            named.add(word)
    assert named <= PATHS, named - PATHS


def test_the_keys_that_may_change_when_a_run_resumes_are_told():
    told = set(re.findall(r"`([^`\n]+)`", TEXT["metrics.md"]))
    assert set(NEUTRAL_KEYS) <= told, set(NEUTRAL_KEYS) - told


def test_help_is_asked_for_what_there_is():
    topics = {topic for text in TEXT.values() for topic in re.findall(r"--help=([\w.]+\w)", text)}
    assert topics and topics <= PATHS | set(TASKS)


def test_the_test_command_is_what_ci_runs():
    (command,) = re.findall(
        r"^    pip install -r tests/requirements.txt && (python -m pytest.*)$", README, re.MULTILINE
    )
    assert command in (ROOT / ".ci/run").read_text().splitlines()


# ------------------------------------------------------------------------------------------------ messages


def messages():
    """The texts of the package, with … for what differs from case to case."""
    for path in sorted((ROOT / "exprl_jax").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def headings_as_patterns():
    headings = re.findall(r"^### (.+)$", TEXT["troubleshooting.md"], re.MULTILINE)
    return [".*?".join(re.escape(part.strip()) for part in heading.split("…")) for heading in headings]


def warnings_of(module, method):
    """What a module hands to a method of that name: a probe's `problems.append`, for instance."""
    for node in ast.walk(ast.parse((ROOT / "exprl_jax" / module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == method:
            yield ast.unparse(node.args[-1])


@pytest.mark.parametrize(
    "module, method, least", [("reward/probe.py", "problems.append", 5), ("run/watch.py", "Symptom", 6)]
)
def test_every_warning_of_probe_and_watch_has_its_heading(module, method, least):
    warnings, patterns = list(warnings_of(module, method)), headings_as_patterns()
    assert len(warnings) >= least
    for warning in warnings:
        assert any(re.search(pattern, warning, re.DOTALL) for pattern in patterns), warning


def test_the_headings_of_the_troubles_are_the_messages_own_words():
    texts, patterns = list(messages()), headings_as_patterns()
    assert len(patterns) > 30
    for pattern in patterns:
        assert any(re.search(pattern, text, re.DOTALL) for text in texts), pattern
