"""The miniature's runs in little: what the main job rewards is what a second evaluator calls right."""

import numpy as np
import pytest
from mini.test_puzzles import FOLDER, exact
from tiny_runs import ROOT, config_dict, read_jsonl, rows, run

from exprl_jax.resolve import resolve

SMALL = {
    "steps": 1,
    "rollout.prompts": 8,
    "rollout.wave": 8,
    "rollout.group": 4,
    "updates.row_tokens": 128,
    "evaluate.every": 1,
    "evaluate.samples": 4,
    "evaluate.k": "4",
    "log.rollouts": 32,
}


@pytest.mark.parametrize("arm", ["outcome", pytest.param("process", marks=pytest.mark.slow)])
def test_the_main_job_rewards_what_is_right(tmp_path, monkeypatch, arm):
    monkeypatch.chdir(ROOT)
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join((FOLDER / "data/k6_tune.jsonl").read_text().splitlines(True)[:8]))
    config = config_dict("mini.stage1", arm, SMALL | {"evaluate.source": str(held_out)})
    metrics = rows(folder := run(resolve(config), tmp_path / "run"))
    assert [row["step"] for row in metrics] == [0, 1]
    for row in metrics:  # of six operations the base solves a few percent
        assert 0 <= row["evaluate/pass@1"] <= row["evaluate/pass@4"] == pytest.approx(1 - row["evaluate/unsolved"])
        assert row["evaluate/pass@4"] < 0.6
    rollouts = read_jsonl(folder / "rollouts/step_000001.jsonl")
    assert len(rollouts) == 32 and sum(row["ended"] for row in rollouts) > 20
    last = []
    for row in rollouts:
        text = ""
        for segment in row["segments"]:
            text += segment["text"]
            if row["ended"]:
                wanted = exact(row["problem"], text, "outcome" if arm == "outcome" else "prefix")
                assert segment["score"] == pytest.approx((wanted - 1) / 4, abs=1e-6), text
        last.append((wanted - 1) / 4 if row["ended"] else 0.0)
    assert metrics[1]["reward/mean"] == pytest.approx(np.mean(last), abs=1e-5)
