"""The report: what it embeds is what the workdirs hold, hostile rollouts stay text, and the page needs nothing else."""

import base64
import dataclasses
import hashlib
import html.parser
import json
import re
import shutil
import subprocess

import pytest
from tiny_runs import run, tiny

from exprl_jax import report
from exprl_jax.evaluation import report_page
from exprl_jax.evaluation.pass_at_k import Summary
from exprl_jax.evaluation.report_page import read_workdirs, render
from exprl_jax.evaluation.tables import EvaluatedModel, write_results
from exprl_jax.resolve import resolve, to_dict
from exprl_jax.reward import statistics
from exprl_jax.run.watch import RunWatch

CONFIG = to_dict(tiny("process"))
# Ends the data's element and runs code where it is not escaped; \ud800 cannot be written as UTF-8.
HOSTILE = (
    "</script><img src=x onerror=\"document.body.dataset.taken='1'\"><script>document.body.dataset.taken='2'</script>"
    "<!-- ]]> {{POLICY}} {{DATA}} &lt; \u2028 \u2029 \u202e \ud800 \\u003c \x00"
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Elements(html.parser.HTMLParser):
    """Every element with its attributes, and the text of scripts and styles, as a browser would see them."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.raw = [], []
        self._open = None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in ("script", "style"):
            self._open = (tag, dict(attributes))
            self.raw.append([*self._open, ""])

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self._open = None

    def handle_data(self, data):
        if self._open:
            self.raw[-1][2] += data


def embedded(page):
    texts = [text for tag, attributes, text in Elements(page).raw if attributes.get("id") == "data"]
    assert len(texts) == 1
    return json.loads(texts[0])


def rollout(**changes):
    segments = [
        {"text": "### One\n$x^2$", "score": 0.25, "advantage": -0.5, "judge": "Score: 2"},
        {"text": "### Two", "score": None, "advantage": None, "judge": None},
    ]
    made = {
        "id": "a",
        "rollout": 0,
        "domain": "math",
        "kind": "math",
        "problem": "1 + 1?",
        "reference": None,
        "answer": "2",
        "prompt": "Q: 1 + 1?",
        "response": "### One\n$x^2$### Two",
        "length": 9,
        "ended": True,
        "verdict": "correct",
        "segments": segments,
    }
    return made | changes


def lines(objects):
    return "".join(json.dumps(each) + "\n" for each in objects)


def write_run(folder, rows=None, config=CONFIG, rollouts=None):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text(
        lines(rows or [{"step": 1, "reward/mean": 0.5}, {"step": 2, "reward/mean": 0.625}])
    )
    for step, made in (rollouts or {}).items():
        (folder / "rollouts").mkdir(exist_ok=True)
        (folder / "rollouts" / f"step_{step:06d}.jsonl").write_text(lines(made))
    return folder


def one_set(**changes):
    made = Summary(
        name="aime",
        problems=30,
        ungraded=0,
        n=2,
        missing=1,
        pass_at_k=(0.25, 0.5),
        low=(0.125, None),
        high=(0.5, None),
        majority=None,
        accuracy=0.25,
        no_answer=0.0,
        overlong=0.5,
        length_mean=7.0,
        length_median=7.0,
        length_max=9,
    )
    return dataclasses.replace(made, **changes)


def write_evaluation(folder, *sets):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    write_results(folder / "results.json", EvaluatedModel("base", "w", sets))
    return folder


def page_of(*folders, **budget):
    contents, left_out = read_workdirs(folders, **budget)
    assert left_out == []
    return render(contents)


# ---------------------------------------------------------------------------------------------------- the data


def test_metrics_arrive_as_they_were_written_and_null_stays_null(tmp_path):
    rows = [
        {"step": 1, "reward/mean": 0.1234567890123, "judge/correct_auroc": None, "data/epoch": 0},
        {"step": 2, "reward/mean": None, "judge/correct_auroc": None, "data/epoch": 0, "solve/accuracy/math": 0.0},
        {"step": 5, "reward/mean": 1e-12, "judge/correct_auroc": None, "data/epoch": 1, "solve/accuracy/math": 1.0},
    ]
    (shown,) = embedded(page_of(write_run(tmp_path / "run", rows)))["runs"]
    assert shown["name"] == "run"
    assert shown["steps"] == [1, 2, 5]
    assert shown["series"] == {
        "reward/mean": [0.1234567890123, None, 1e-12],
        "judge/correct_auroc": [None, None, None],
        "data/epoch": [0, 0, 1],
        "solve/accuracy/math": [None, 0.0, 1.0],
    }


def test_the_watch_s_warnings_are_those_that_the_run_told(tmp_path, capfd):
    """Also of a run that was stopped in between: they follow from its metrics."""
    config = json.loads(json.dumps(CONFIG))
    config["watch"] = {"window": 2, "strict": False}
    rows = [{"step": 0}, *({"step": step, "segments/mean": 8.0 if step < 5 else 1.0} for step in range(1, 9))]
    watch = RunWatch(resolve(config).watch, [])
    for row in rows[1:]:
        watch.see(row["step"], row)
    assert len(watch.told) == 1 and "step 5: segments/mean went from 8 to 1" in capfd.readouterr().err
    (shown,) = embedded(page_of(write_run(tmp_path / "run", rows, config)))["runs"]
    assert shown["warnings"] == watch.told
    assert embedded(page_of(write_run(tmp_path / "bare")))["runs"][0]["warnings"] == []


def test_evaluated_problems_arrive_with_their_share_at_every_evaluation(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "evaluations").mkdir()
    about = {"set": "held-out", "id": "a", "problem": "1 + 1? " * 100}
    for step, (graded, correct) in {0: (4, 0), 10: (0, 0), 20: (4, 3)}.items():
        made = [about | {"graded": graded, "correct": correct}]
        made += [{"set": "training", "id": "a", "problem": "2?", "graded": 1, "correct": 1}] * (step == 20)
        (folder / "evaluations" / f"step_{step:06d}.jsonl").write_text(lines(made))
    shown = embedded(page_of(folder))["runs"][0]["evaluated"]
    assert shown == {
        "steps": [0, 10, 20],
        "problems": [
            {"set": "held-out", "id": "a", "problem": about["problem"][:160], "rates": [0.0, None, 0.75]},
            {"set": "training", "id": "a", "problem": "2?", "rates": [None, None, 1.0]},
        ],
        "left_out": 0,
    }


def test_what_metrics_mean_is_told_where_they_are_drawn(tmp_path):
    assert embedded(page_of(write_run(tmp_path / "run")))["metrics"].items() >= statistics.METRICS.items()


def test_runs_stand_side_by_side_with_what_they_are_and_how_they_differ(tmp_path):
    other = json.loads(json.dumps(CONFIG))
    other["steps"], other["advantage"]["estimator"], other["policy"]["weights"] = 9, "end_norm", "random:other"
    data = embedded(page_of(write_run(tmp_path / "one/run"), write_run(tmp_path / "two/run", config=other)))
    assert [shown["name"] for shown in data["runs"]] == ["one/run", "two/run"]
    about = {row["key"]: row["values"] for row in data["about"]}
    assert about["steps"] == ["2 of 2", "2 of 9"]
    assert about["process estimator"] == [CONFIG["advantage"]["estimator"], "end_norm"]
    assert about["policy"] == [CONFIG["policy"]["weights"], "random:other"]
    assert {row["key"]: row["values"] for row in data["differences"]["runs"]} == {
        "steps": ["2", "9"],
        "advantage.estimator": [CONFIG["advantage"]["estimator"], "end_norm"],
        "policy.weights": [CONFIG["policy"]["weights"], "random:other"],
    }


def test_runs_of_other_tasks_are_compared_where_they_have_the_same_sections(tmp_path):
    """A leaf that only the second and third differ in is found too; a section that one lacks is not a difference."""
    sft = {"task": "sft", "steps": 2, "policy": {"weights": "random:other"}}
    third = json.loads(json.dumps(CONFIG))
    third["rollout"]["group"] = 99
    folders = [
        write_run(tmp_path / name, config=config, rows=[{"step": 1, "loss/nll": 0.5}])
        for name, config in (("sft", sft), ("a", CONFIG), ("b", third))
    ]
    data = embedded(page_of(*folders))
    differing = {row["key"]: row["values"] for row in data["differences"]["runs"]}
    assert differing["rollout.group"] == [None, str(CONFIG["rollout"]["group"]), "99"]
    assert differing["policy.weights"] == ["random:other", CONFIG["policy"]["weights"], CONFIG["policy"]["weights"]]
    assert not {"rollout", "judge", "advantage"} & differing.keys()
    assert data["runs"][0]["rollouts"] == {"steps": [], "rows": [], "problems": [], "left_out": 0}


def test_a_run_without_a_config_is_still_drawn(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "config.json").unlink()
    assert embedded(page_of(folder))["about"] == [{"key": "steps", "values": ["2"]}]


def test_evaluations_arrive_as_they_were_written(tmp_path):
    sets = one_set(), one_set(name="imo", n=1, pass_at_k=(None,), low=(None,), high=(None,))
    (shown,) = embedded(page_of(write_evaluation(tmp_path / "eval", *sets)))["evaluations"]
    assert (shown["name"], shown["label"], shown["weights"]) == ("eval", "base", "w")
    assert shown["sets"] == [json.loads(json.dumps(dataclasses.asdict(each))) for each in sets]


def test_a_workdir_can_be_both_a_run_and_an_evaluation(tmp_path):
    write_results(write_run(tmp_path / "both") / "results.json", EvaluatedModel("base", "w", (one_set(),)))
    data = embedded(page_of(tmp_path / "both"))
    assert [len(data["runs"]), len(data["evaluations"])] == [1, 1]


# ---------------------------------------------------------------------------------------------------- rollouts


def test_rollouts_arrive_with_their_problem_once_and_their_text_once(tmp_path):
    other = rollout(id="b", reference="by counting", segments=[])
    folder = write_run(
        tmp_path / "run", rollouts={1: [rollout(), rollout(rollout=1, response="?"), other], 2: [rollout()]}
    )
    shown = embedded(page_of(folder))["runs"][0]["rollouts"]
    assert [(row["step"], row["problem"], row["rollout"]) for row in shown["rows"]] == [
        (1, 0, 0),
        (1, 0, 1),
        (1, 1, 0),
        (2, 0, 0),
    ]
    keys = ("id", "domain", "kind", "problem", "reference", "answer", "prompt")
    assert shown["problems"] == [{key: each[key] for key in keys} for each in (rollout(), other)]
    first, unlike, bare, _ = shown["rows"]
    assert first["segments"] == rollout()["segments"]
    assert "response" not in first  # it is its segments, one after another
    assert unlike["response"] == "?"
    assert (bare["response"], bare["segments"]) == (rollout()["response"], [])
    assert (first["verdict"], first["ended"], first["length"]) == ("correct", True, 9)


def test_tokens_their_log_probs_and_entropies_arrive_where_they_were_written(tmp_path):
    segment = rollout()["segments"][0] | {"token_text": ["### ", "One"], "token_logp": [-0.5, 0.0]}
    segment["token_entropy"] = [0.75, 0.0]
    folder = write_run(tmp_path / "run", rollouts={1: [rollout(segments=[segment]), rollout()]})
    new, old = embedded(page_of(folder))["runs"][0]["rollouts"]["rows"]
    assert new["segments"] == [segment] and not {"token_logp", "token_entropy"} & old["segments"][0].keys()


def test_a_line_of_rollouts_ends_only_at_its_newline(tmp_path):
    """Runs write text as it is, and U+2028 ends a line in Python's view, not in JSON's."""
    folder, made = write_run(tmp_path / "run", rollouts={1: []}), rollout(problem="a\u2028b\x85c")
    text = json.dumps(made, ensure_ascii=False) + "\n"
    (folder / "rollouts" / "step_000001.jsonl").write_text(text, encoding="utf-8")
    assert embedded(page_of(folder))["runs"][0]["rollouts"]["problems"][0]["problem"] == "a\u2028b\x85c"


def test_fields_that_older_runs_did_not_write_are_absent_not_null(tmp_path):
    old = {key: value for key, value in rollout().items() if key in ("id", "rollout", "prompt", "response", "segments")}
    shown = embedded(page_of(write_run(tmp_path / "run", rollouts={1: [old]})))["runs"][0]["rollouts"]
    assert shown["problems"] == [{"id": "a", "prompt": "Q: 1 + 1?"}]
    assert shown["rows"][0]["verdict"] is None


def test_a_budget_keeps_first_and_last_and_steps_evenly_between(tmp_path):
    written = {step: [rollout(rollout=g) for g in range(4)] for step in range(1, 42)}
    folder = write_run(tmp_path / "run", rollouts=written)
    shown = embedded(page_of(folder, rollouts=20))["runs"][0]["rollouts"]
    assert shown["steps"] == list(range(1, 42))
    assert sorted({row["step"] for row in shown["rows"]}) == [1, 11, 21, 31, 41]
    assert len(shown["rows"]) == 20
    assert shown["left_out"] == 0


def test_a_budget_smaller_than_two_steps_cuts_them_and_says_so(tmp_path):
    folder = write_run(tmp_path / "run", rollouts={step: [rollout(rollout=g) for g in range(8)] for step in (1, 2, 3)})
    shown = embedded(page_of(folder, rollouts=6))["runs"][0]["rollouts"]
    assert [(row["step"], row["rollout"]) for row in shown["rows"]] == [(step, g) for step in (1, 3) for g in range(3)]
    assert shown["left_out"] == 10


@pytest.mark.parametrize("text", ["x", "<&>", "数"])
def test_a_budget_of_bytes_holds_however_text_is_escaped(tmp_path, text):
    """A huge rollout in one step is left out, not its neighbours."""
    written = {step: [rollout(rollout=g, segments=[], response=text * 500) for g in range(4)] for step in range(1, 30)}
    written[1][0]["response"] = text * 100_000
    folder = write_run(tmp_path / "run", rollouts=written)
    (bare,) = embedded(page_of(folder, rollouts=0))["runs"]
    assert bare["rollouts"]["rows"] == []
    page = page_of(folder, rollout_bytes=60_000)
    shown = embedded(page)["runs"][0]["rollouts"]
    assert shown["left_out"] >= 1
    assert (1, 1) in [(row["step"], row["rollout"]) for row in shown["rows"]]
    assert 30_000 < len(page) - len(page_of(folder, rollouts=0)) < 63_000  # and a few bytes of indices


def test_runs_share_the_budget(tmp_path):
    written = {step: [rollout(rollout=g) for g in range(5)] for step in range(1, 21)}
    folders = [write_run(tmp_path / name, rollouts=written) for name in ("a", "b")] + [write_run(tmp_path / "sft")]
    shown = embedded(page_of(*folders, rollouts=40))["runs"]
    assert [len(each["rollouts"]["rows"]) for each in shown] == [20, 20, 0]


# ---------------------------------------------------------------------------------------------------- the page


def hostile_run(folder):
    segments = [{"text": HOSTILE, "score": 0.5, "advantage": 0.5, "judge": HOSTILE}]
    texts = dict.fromkeys(
        ("id", "domain", "kind", "problem", "reference", "answer", "prompt", "response", "verdict"), HOSTILE
    )
    config = json.loads(json.dumps(CONFIG)) | {"task": HOSTILE}
    rows = [{"step": 1, f"{HOSTILE}/x": 1.0, "reward/mean": 0.5}, {"step": 2, f"{HOSTILE}/x": 2.0, "reward/mean": 0.25}]
    return write_run(folder, rows, config, {1: [rollout(**texts, segments=segments)]})


def test_hostile_text_arrives_whole_and_opens_no_element(tmp_path):
    page = page_of(hostile_run(tmp_path / "<img src=x>"), write_run(tmp_path / "tame"))
    plain = page_of(write_run(tmp_path / "other"))
    assert [tag for tag, _ in Elements(page).tags] == [tag for tag, _ in Elements(plain).tags]
    shown = embedded(page)["runs"][0]["rollouts"]
    assert shown["problems"][0]["reference"] == HOSTILE
    assert shown["rows"][0]["segments"][0]["judge"] == HOSTILE
    (data,) = [text for _, attributes, text in Elements(page).raw if attributes.get("id") == "data"]
    assert data.isascii() and not re.search("[<>&]", data)


def test_the_page_asks_nothing_of_any_network(tmp_path):
    page = page_of(
        write_run(tmp_path / "run", rollouts={1: [rollout()]}), write_evaluation(tmp_path / "eval", one_set())
    )
    assert set(re.findall(r"\w+://[^\s\"']*", page)) == {"http://www.w3.org/2000/svg"}  # the name of SVG, never fetched
    assert not [name for _, attributes in Elements(page).tags for name in attributes if name in ("src", "href")]
    assert not re.search(r"@import|url\((?!#)|import\(|fetch\(|XMLHttpRequest|WebSocket", page)


def test_only_the_page_s_own_script_and_style_are_admitted(tmp_path):
    elements = Elements(page_of(hostile_run(tmp_path / "run")))
    (policy,) = [a["content"] for _, a in elements.tags if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    for kind in ("script", "style"):
        (text,) = [text for tag, attributes, text in elements.raw if tag == kind and "id" not in attributes]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[f"{kind}-src"] == f"'sha256-{digest}'"


def test_the_script_writes_text_and_parses_none():
    script = report_page.TEMPLATE.read_text(encoding="utf-8")
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|DOMParser|srcdoc", script
    )


# ---------------------------------------------------------------------------------------------------- the door


def test_the_door_writes_one_file(tmp_path, capsys):
    folder, output = write_run(tmp_path / "run", rollouts={1: [rollout()]}), tmp_path / "out.html"
    assert report.main([str(folder), str(write_evaluation(tmp_path / "eval", one_set())), f"--output={output}"]) == 0
    assert "1 runs, 1 rollouts, 1 evaluations" in capsys.readouterr().out
    assert [shown["name"] for shown in embedded(output.read_text(encoding="utf-8"))["runs"]] == ["run"]


def test_a_folder_given_twice_is_shown_once(tmp_path):
    folder = write_run(tmp_path / "run")
    shown = embedded(page_of(folder, tmp_path / "run" / ".." / "run"))["runs"]
    assert [each["name"] for each in shown] == ["run"]


@pytest.mark.parametrize(
    "file, text, told",
    [
        (None, "", "holds neither a run's"),
        ("metrics.jsonl", "", "holds neither a run's"),  # a run that has not stepped
        ("results.json", '{"cells": []}', "has no sets"),  # of another program
        ("results.json", "{", "not JSON"),
    ],
)
def test_a_folder_of_neither_sort_is_named_and_left_out(tmp_path, capsys, file, text, told):
    strange = tmp_path / "strange"
    strange.mkdir()
    if file:
        (strange / file).write_text(text)
    output = tmp_path / "out.html"
    assert report.main([str(strange), str(write_run(tmp_path / "run")), f"--output={output}"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"exprl_jax.report: {strange}") and told in line and line.endswith("left out")
    assert [shown["name"] for shown in embedded(output.read_text(encoding="utf-8"))["runs"]] == ["run"]
    output.unlink()
    assert report.main([str(strange), f"--output={output}"]) == 1
    assert "nothing to report" in capsys.readouterr().err.splitlines()[-1]
    assert not output.exists()


def test_what_cannot_work_ends_with_one_line(tmp_path, capsys):
    folder = write_run(tmp_path / "run")
    broken = write_run(tmp_path / "broken", rollouts={1: [rollout()]})
    (broken / "rollouts" / "step_000001.jsonl").write_text("[1]\n")
    for given, told in (
        ([tmp_path / "nowhere"], "no such folder"),
        ([folder / "config.json"], "no such folder"),
        ([folder, f"--output={tmp_path / 'no' / 'out.html'}"], "could not be written"),
        (
            [broken, f"--output={tmp_path / 'out.html'}"],
            "step_000001.jsonl, line 1: not a row (expected a JSON object, got [1])",
        ),
    ):
        assert report.main([str(each) for each in given]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("exprl_jax.report: ") and told in line


@pytest.mark.parametrize("given", [[], ["--colour=red", "run"]])
def test_a_wrong_command_line_ends_with_one_line(capsys, given):
    with pytest.raises(SystemExit) as ended:
        report.main(given)
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


# ---------------------------------------------------------------------------------------------------- a browser


def in_browser(path):
    """The page's elements after its script has run."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000", "--dump-dom"]
    done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_draws_the_page_and_runs_nothing_of_a_rollout(tmp_path):
    trained = run(tiny("process"), tmp_path / "trained")
    evaluated = write_evaluation(tmp_path / "eval", one_set())
    output = tmp_path / "out.html"
    assert (
        report.main(
            [str(each) for each in (hostile_run(tmp_path / "<b>run"), trained, evaluated)] + [f"--output={output}"]
        )
        == 0
    )
    tags = Elements(in_browser(output)).tags
    assert not [attributes for _, attributes in tags if "data-taken" in attributes or "onerror" in attributes]
    assert not [tag for tag, _ in tags if tag == "img"]
    assert sum(tag == "script" for tag, _ in tags) == 2
    drawn = [attributes["aria-label"] for tag, attributes in tags if tag == "svg" and attributes.get("role") == "img"]
    for title in ("Reward", "Unsolved prompts", "Token entropy", "Segments", "Parsed", "aime"):
        assert [label for label in drawn if label.startswith(f"{title}. ")], title
    assert sum(attributes.get("class", "").startswith("curve") for tag, attributes in tags if tag == "path") > 10
    assert [attributes for _, attributes in tags if attributes.get("class", "").startswith("segment positive")]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_leaves_a_gap_where_a_metric_is_null(tmp_path):
    rows = [{"step": step, "reward/mean": None if step in (4, 5) else 0.5 + 0.01 * step} for step in range(1, 10)]
    output = tmp_path / "out.html"
    output.write_text(page_of(write_run(tmp_path / "run", rows)))
    paths = [
        attributes["d"]
        for tag, attributes in Elements(in_browser(output)).tags
        if attributes.get("class") == "curve c0 d0" and tag == "path"
    ]
    assert [path.count("L") + 1 for path in paths[:2]] == [3, 4]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_joins_the_points_of_evaluations_and_shows_problems_warnings_and_tokens(tmp_path):
    config = json.loads(json.dumps(CONFIG)) | {"watch": {"window": 2, "strict": False}}
    rows = [
        {"step": s, "evaluate/pass@1": s / 10 if s % 4 == 0 else None, "segments/mean": 8.0 if 0 < s < 5 else 1.0}
        for s in range(9)
    ]
    segment = rollout()["segments"][0] | {"token_text": ["### ", "One"], "token_logp": [-0.5, -2.25]}
    segment["token_entropy"] = [0.25, 3.0]
    folder, output = write_run(tmp_path / "run", rows, config, {1: [rollout(segments=[segment])]}), tmp_path / "a.html"
    (folder / "evaluations").mkdir()
    solved = {"set": "held-out", "id": HOSTILE, "problem": HOSTILE, "graded": 4, "correct": 0}
    (folder / "evaluations" / "step_000000.jsonl").write_text(lines([solved]))
    (folder / "evaluations" / "step_000004.jsonl").write_text(lines([solved | {"correct": 2}]))
    output.write_text(page_of(folder))
    drawn = in_browser(output)
    tags = Elements(drawn).tags
    labels = [a["aria-label"] for tag, a in tags if tag == "svg" and a.get("role") == "img"]
    assert any(label.startswith("Held-out pass@1. run: 0 at step 0, 0.8 at 8") for label in labels)
    first = next(a for tag, a in tags if tag == "path" and a.get("class") == "curve c0 d0")
    assert first["d"].count("L") == 2
    # Three points, here and under "Any other metric".
    assert sum(a.get("class") == "dot c0 d0" for tag, a in tags if tag == "circle") == 6
    assert "step 5: segments/mean went from 8 to 1" in drawn
    assert "held-out: 0 of 1 unsolved after step 4; since step 0 solved 1, lost 0" in drawn and "○◐" in drawn
    assert "by entropy" in drawn and "−1.375" in drawn and "1.625" in drawn
    assert not [a for _, a in tags if "data-taken" in a or "onerror" in a]
