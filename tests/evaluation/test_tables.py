"""Results written and read back, tables and CSV that show what was not measured, figures with gaps, and the command."""

import csv
import io
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from tiny_runs import ROOT

from exprl_jax.evaluation.pass_at_k import Summary
from exprl_jax.evaluation.tables import (
    RESULTS,
    EvaluatedModel,
    curves_csv,
    pass_at_k_figure,
    read_results,
    render_table,
    set_names,
    summary_csv,
    write_results,
    write_tables,
)


def summary(name="aime25", n=4, first=0.25, **changes):
    curve = tuple(first + (1 - first) * i / (2 * n) for i in range(n))
    fields = {
        "name": name,
        "problems": 30,
        "ungraded": 0,
        "n": n,
        "missing": 0,
        "pass_at_k": curve,
        "low": tuple(x - 0.1 for x in curve),
        "high": tuple(x + 0.1 for x in curve),
        "majority": 0.5,
        "accuracy": first,
        "no_answer": 0.0,
        "overlong": 0.125,
        "length_mean": 12.5,
        "length_median": 12.0,
        "length_max": 40,
    }
    return Summary(**fields | changes)


def run(label="base", *sets):
    return EvaluatedModel(label, "random:tiny", sets or (summary(),))


GAPS = summary("hmmt", 4, pass_at_k=(0.5, 0.75, None, None), low=(0.4, 0.6, None, None), high=(0.6, 0.9, None, None))
UNKNOWN = summary(
    "gpqa",
    2,
    problems=0,
    ungraded=3,
    missing=6,
    pass_at_k=(None, None),
    low=(None, None),
    high=(None, None),
    majority=None,
    accuracy=None,
    no_answer=None,
)


def test_results_are_read_back_as_written(tmp_path):
    written = run("base", summary(), GAPS, UNKNOWN)
    write_results(tmp_path / RESULTS, written)
    assert read_results(tmp_path / RESULTS) == written
    assert json.loads((tmp_path / RESULTS).read_text())["sets"][1]["pass_at_k"] == [0.5, 0.75, None, None]


def test_a_nan_is_a_number_that_was_not_measured(tmp_path):
    with pytest.raises(ValueError, match="[nN]a[nN]|JSON compliant"):
        write_results(tmp_path / RESULTS, run("base", summary(majority=math.nan)))
    write_results(tmp_path / RESULTS, run())
    text = (tmp_path / RESULTS).read_text().replace('"majority": 0.5', '"majority": NaN')
    (tmp_path / RESULTS).write_text(text)
    assert read_results(tmp_path / RESULTS).sets[0].majority is None


def altered(**changes):
    content = {"label": "a", "weights": "w", "sets": [dict(vars(summary()))]}
    content["sets"][0] |= changes
    return content


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "results.json is not JSON"),
        ("[]", "has no sets"),
        ({"label": "a", "weights": "w", "sets": []}, "has no sets"),
        ({"label": None, "weights": "w", "sets": [1]}, "label and weights must be strings"),
        ({"label": "a", "weights": "w", "sets": [1]}, "a set must be an object, got 1"),
        ({"label": "a", "weights": "w", "sets": [{"name": "x"}]}, "set 'x' has no problems, ungraded, n"),
        (altered(n=3), "pass_at_k must be a list of n"),
        (altered(n=0, pass_at_k=[], low=[], high=[]), "n must be at least 1"),
        (altered(name="a/b"), "set 'a/b': the name must be fit for a file's"),
        (altered(low=None), "low must be a list of n"),
        (altered(high=[1, 1, "x", 1]), "high must be a list of n"),
        (altered(problems=None), "problems must be"),
        (altered(problems=True), "problems must be"),
        (altered(overlong=None), "overlong must be"),
        (altered(majority="half"), "majority must be"),
        (altered() | {"sets": [dict(vars(summary()))] * 2}, "has a set twice: got aime25, aime25"),
    ],
)
def test_results_that_are_not_results_are_refused(tmp_path, content, match):
    (tmp_path / RESULTS).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=match) as caught:
        read_results(tmp_path / RESULTS)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_the_table_has_a_row_a_run_and_columns_for_each_set():
    table = render_table(
        [run("base", summary(n=32), summary("imo", 32, 0.5)), run("a longer name", summary(n=32, first=0.5))]
    )
    assert table.splitlines() == [
        "                aime25: 30 × 32                                imo: 30 × 32",
        "run                        pass@1            pass@16  maj@32              pass@1            pass@16  maj@32",
        "base            25.0 [15.0, 35.0]  42.6 [32.6, 52.6]    50.0   50.0 [40.0, 60.0]  61.7 [51.7, 71.7]    50.0",
        "a longer name   50.0 [40.0, 60.0]  61.7 [51.7, 71.7]    50.0                   –                  –       –",
        "",
        "percent [95 % interval over problems]; set: problems × samples a problem",
    ]


def test_the_table_compares_the_largest_k_that_all_runs_have():
    table = render_table([run("a", summary(n=8)), run("b", summary(n=4))])
    assert "pass@4 " in table and "pass@8" not in table and "aime25: 30 × 4/8" in table
    assert "pass@1 " in render_table([run("a", summary(n=1))]) and "pass@2" not in render_table(
        [run("a", summary(n=1))]
    )


def test_the_table_says_what_was_not_measured_and_what_cannot_be_compared():
    table = render_table([run("a", UNKNOWN), run("b", summary("gpqa", 2, problems=4, majority=None))])
    row = next(line for line in table.splitlines() if line.startswith("a "))
    assert row.split() == ["a", "–", "–"] and "maj@" not in table
    assert "gpqa, a: 6 samples were not graded and are left out, with them 3 whole problems" in table
    assert "gpqa: the runs have different numbers of problems and cannot be compared" in table
    assert "0.0" not in row


def test_wide_tables_go_on_below():
    table = render_table([run("base", *(summary(f"set{i}", 16) for i in range(5)))])
    assert max(map(len, table.splitlines())) <= 150
    assert table.count("\nbase ") == 2 and all(f"set{i}: 30 × 16" in table for i in range(5))


def test_csv_leaves_empty_what_was_not_measured():
    runs = [run("base, greedy", summary(), GAPS, UNKNOWN)]
    rows = list(csv.DictReader(io.StringIO(curves_csv(runs))))
    assert len(rows) == 4 + 4 + 2
    assert rows[0] == {
        "run": "base, greedy",
        "set": "aime25",
        "k": "1",
        "pass_at_k": "0.25",
        "low": "0.15",
        "high": "0.35",
    }
    assert [row["pass_at_k"] for row in rows if row["set"] == "hmmt"] == ["0.5", "0.75", "", ""]
    wide = list(csv.DictReader(io.StringIO(summary_csv(runs))))
    assert [row["accuracy"] for row in wide] == ["0.25", "0.25", ""] and wide[0]["majority"] == "0.5"
    assert wide[1]["pass_at_n"] == "" and wide[1]["pass_at_1"] == "0.5" and wide[0]["length_max"] == "40"


def drawn(panel):
    """The thick lines of a panel: those with markers."""
    return [line for line in panel.lines if line.get_marker() not in ("None", None, "")]


def test_the_figure_has_a_panel_a_set_and_a_line_a_run():
    runs = [run("a", summary(n=8), GAPS), run("b", summary(n=4, first=0.5)), run("c", summary(n=8), GAPS)]
    figure = pass_at_k_figure(runs, set_names(runs))
    panels = figure.axes
    assert [panel.get_title() for panel in panels] == ["aime25 (30 problems)", "hmmt (30 problems)"]
    assert [len(drawn(panel)) for panel in panels] == [3, 2]
    first = drawn(panels[0])
    np.testing.assert_allclose(first[0].get_ydata(), [100 * x for x in runs[0].sets[0].pass_at_k])
    assert list(first[1].get_xdata()) == [1, 2, 3, 4] and list(first[0].get_markevery()) == [0, 1, 3, 7]
    assert all(panel.get_xscale() == "log" for panel in panels)
    assert list(panels[0].get_xticks()) == [1, 2, 4, 8]
    # A run has one colour in every panel, also where another run lacks the set.
    assert to_rgb(drawn(panels[1])[1].get_color()) == to_rgb(first[2].get_color()) != to_rgb(first[0].get_color())
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b", "c"]
    assert legend.get_title().get_text() == "bands: 95 % interval over problems"


def test_what_was_not_measured_is_a_gap_and_never_zero():
    figure = pass_at_k_figure([run("a", GAPS)], ["hmmt"])
    (line,) = drawn(figure.axes[0])
    np.testing.assert_array_equal(line.get_ydata(), [50, 75, math.nan, math.nan])
    (band,) = figure.axes[0].collections
    assert np.nanmin(band.get_paths()[0].vertices[:, 1]) >= 39.9
    nothing = pass_at_k_figure([run("a", UNKNOWN)], ["gpqa"])
    assert np.isnan(drawn(nothing.axes[0])[0].get_ydata()).all()
    assert nothing.legends[0].get_title().get_text() == ""


def test_one_sample_a_problem_has_its_interval_as_a_bar():
    figure = pass_at_k_figure([run("a", summary(n=1))], ["aime25"])
    bar = figure.axes[0].collections[-1].get_segments()
    np.testing.assert_allclose(bar, [[[1, 15], [1, 35]]])


def test_the_axis_stays_within_what_a_percentage_can_be():
    certain = summary(n=1, first=1.0, pass_at_k=(1.0,), low=(1.0,), high=(1.0,), problems=1)
    panel = pass_at_k_figure([run("a", certain)], ["aime25"]).axes[0]
    assert panel.get_ylim()[1] <= 103 and max(panel.get_yticks()) <= 100 and panel.get_title() == "aime25 (1 problem)"


def test_many_runs_are_told_apart():
    runs = [run(f"run {i}") for i in range(15)]
    lines = drawn(pass_at_k_figure(runs, ["aime25"]).axes[0])
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 15


def test_names_are_not_taken_for_mathematics(tmp_path):
    written = write_tables([run("_cost $\\nonsense{$", summary())], tmp_path / "out")
    assert all(path.stat().st_size > 0 for path in written)


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "exprl_jax.evaluation.tables", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_command_compares_workdirs(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_results(tmp_path / name / RESULTS, run("same", summary(n=16), GAPS))
    done = command(tmp_path / "one", tmp_path / "two", f"--output={tmp_path / 'out'}")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert (tmp_path / "out" / "table.txt").read_text() in done.stdout and "same (one)" in done.stdout
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "table.txt",
        "summary.csv",
        "pass_at_k.csv",
        "pass_at_k.png",
        "pass_at_k_aime25.png",
        "pass_at_k_hmmt.png",
    }
    assert (tmp_path / "out" / "pass_at_k.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["nowhere", "--output=out"], 1, "nowhere/results.json cannot be read (No such file or directory)"),
        (["eval", "eval", "--output=out"], 1, "two runs are called alike"),
        (["eval", "--output=eval/results.json"], 1, "eval/results.json"),
        (["eval"], 2, "the following arguments are required: --output"),
        (["--output=out"], 2, "the following arguments are required: workdir"),
        (["eval", "--output=out", "--wrong"], 2, "--wrong"),
    ],
)
def test_the_command_fails_with_one_line(tmp_path, arguments, status, message):
    (tmp_path / "eval").mkdir()
    write_results(tmp_path / "eval" / RESULTS, run())
    paths = [argument.replace("=", f"={tmp_path}/") if "=" in argument else argument for argument in arguments]
    done = command(*(path if path.startswith("-") else tmp_path / path for path in paths))
    assert done.returncode == status and len(done.stderr.splitlines()) == 1 and message in done.stderr, done.stderr
