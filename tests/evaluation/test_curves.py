"""The picture of evaluations inside runs: its lines are what the workdirs hold."""

import json

import pytest

from exprl_jax import report
from exprl_jax.evaluation.curves import curves_figure
from exprl_jax.evaluation.report_page import read_workdirs

ONE = [
    {"step": 0, "evaluate/pass@1": 0.25, "evaluate/training_unsolved": 0.5},
    {"step": 1, "reward/mean": 0.5, "evaluate/pass@1": None, "evaluate/training_unsolved": None},
    {"step": 2, "reward/mean": 0.5, "evaluate/pass@1": 0.375, "evaluate/training_unsolved": 0.25},
]
OTHER = [{"step": 0, "evaluate/pass@1": 0.25}, {"step": 4, "evaluate/pass@1": 0.5}]
BARE = [{"step": 1, "reward/mean": 0.5}]


def write_run(folder, rows):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_panel_holds_a_line_for_each_run_that_has_the_metric(tmp_path):
    folders = [write_run(tmp_path / name, rows) for name, rows in (("a", ONE), ("bare", BARE), ("b_$x$", OTHER))]
    figure = curves_figure(read_workdirs(folders)[0].runs)
    drawn = {
        axes.get_title(): [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axes.lines]
        for axes in figure.axes
    }
    assert drawn == {
        "held-out pass@1, %": [([0, 2], [25.0, 37.5]), ([0, 4], [25.0, 50.0])],
        "unsolved training problems, %": [([0, 2], [50.0, 25.0])],
    }
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", r"b_\$x\$"]
    colours = [line.get_color() for line in figure.axes[0].lines]
    assert [line.get_color() for line in legend.get_lines()] == colours and len(set(colours)) == 2


def test_seeds_of_an_arm_share_its_colour_and_no_two_lines_look_alike(tmp_path):
    names = [*(f"arm-{seed}" for seed in (1, 2, 3)), "other-1", *"cdefghi"]
    figure = curves_figure(read_workdirs([write_run(tmp_path / name, ONE) for name in names])[0].runs)
    looks = [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in figure.axes[0].lines]
    assert len(set(looks)) == len(names) and len({colour for colour, _, _ in looks[:3]}) == 1
    assert looks[3][0] != looks[0][0]


def test_the_report_writes_it_beside_the_page(tmp_path, capsys):
    folder, png = write_run(tmp_path / "a", ONE), tmp_path / "curves.png"
    assert report.main([str(folder), f"--output={tmp_path / 'out.html'}", f"--png={png}"]) == 0
    assert png.read_bytes().startswith(b"\x89PNG") and (tmp_path / "out.html").exists()
    assert str(png) in capsys.readouterr().out


@pytest.mark.parametrize(
    "rows, png, told", [(BARE, "curves.png", "set evaluate.every"), (ONE, "no/curves.png", "could not be written")]
)
def test_what_cannot_be_drawn_is_one_line(rows, png, told, tmp_path, capsys):
    folder = write_run(tmp_path / "a", rows)
    assert report.main([str(folder), f"--output={tmp_path / 'out.html'}", f"--png={tmp_path / png}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("exprl_jax.report: ") and told in line
