"""Judges of three kinds that give the same scores give the same run, bit for bit: only what they cost differs."""

from __future__ import annotations

import json
import re
import textwrap

import pytest
from safetensors.numpy import load_file, save_file
from stub_endpoint import Answer, StubEndpoint
from tiny_runs import assert_same_parameters, opened, read_jsonl, rows, run, tiny

from exprl_jax.reward.judge import Judge
from exprl_jax.rl_run import first_state
from exprl_jax.run.workdir import Workdir
from exprl_jax.weights.adapters import export_policy

SHAPE = {
    "advantage.overlong": "keep",
    "advantage.std_normalise": False,
    "judge.logits_value": "argmax",
    "log.rollouts": 32,
    "steps": 2,
}
# Loud enough weights that what a judge has read decides its digit.
SCALE = 4.0
FUNCTION = """
    import json, pathlib
    RECORDED = json.loads(pathlib.Path(__file__).with_name("scores.json").read_text())
    SCORES = {tuple(key): score for key, score in RECORDED}
    def score(attempts):
        return [SCORES[a.problem, a.trace] for a in attempts]
"""


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A run with a judge on the mesh that tells traces apart; its folder, and its scores by problem and trace."""
    folder, config = tmp_path_factory.mktemp("same"), tiny("process", SHAPE)
    made = opened(config)
    export_policy(config.lora, made.policy, made.base, first_state(made).params, Workdir(folder, False))
    weights = folder / "export" / "model.safetensors"
    loud = {name: SCALE * x if x.ndim == 2 else x for name, x in load_file(weights).items()}
    save_file(loud, weights, metadata={"format": "pt"})
    scores, score = {}, Judge.score

    def recording(self, problems, queries, segments):
        made = score(self, problems, queries, segments)
        for i, of_problem in enumerate(queries):
            for query in of_problem:
                scores[problems[i].problem, query.trace] = float(made.score_PGN[i, query.g, query.n])
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Judge, "score", recording)
        run(tiny("process", SHAPE | {"judge.model.weights": str(folder / "export")}), folder / "run")
    return folder, scores


def assert_same_run(ours, theirs):
    """Parameters, metrics but for the clock, and what was written of every rollout but the judge's words."""
    assert_same_parameters(ours, theirs)
    assert rows(ours) == rows(theirs)
    for name in ("step_000001.jsonl", "step_000002.jsonl"):
        for a, b in zip(read_jsonl(ours / "rollouts" / name), read_jsonl(theirs / "rollouts" / name), strict=True):
            for segment in (*a["segments"], *b["segments"]):
                del segment["judge"]
            assert a == b


def test_the_scores_are_worth_comparing(local):
    """Many, different within groups, and learned from."""
    folder, scores = local
    assert len(scores) > 100 and len(set(scores.values())) > 1
    assert all(row["advantage/live_groups"] > 0 and row["update/moved"] > 0 for row in rows(folder / "run"))


def test_a_function_of_the_same_scores_gives_the_same_run(local, tmp_path, capfd):
    folder, scores = local
    (tmp_path / "scores.json").write_text(json.dumps([[key, score] for key, score in scores.items()]))
    (tmp_path / "recorded.py").write_text(textwrap.dedent(FUNCTION))
    function = {"judge.backend": "function", "judge.function": f"{tmp_path}/recorded.py:score"}
    assert_same_run(run(tiny("process", SHAPE | function), tmp_path / "run"), folder / "run")
    assert "max_context_tokens" not in capfd.readouterr().err  # it takes no prompt


def test_an_endpoint_of_the_same_scores_gives_the_same_run(local, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    folder, scores = local
    problems = sorted({problem for problem, _ in scores}, key=len)

    def answer(seen, before):
        trace = re.search(r"Attempt so far:\n(.*)\n\nThat is the end of the attempt", seen.content, re.DOTALL)[1]
        problem = next(p for p in reversed(problems) if p in seen.content)
        return Answer(f"So be it.\nScore: {4 * scores[problem, trace] + 1:.0f}")

    with StubEndpoint(answer) as stub:
        endpoint = {
            "judge.backend": "openai",
            "judge.readout": "text",
            "judge.endpoint.base_url": stub.base_url,
            "judge.endpoint.model": "stub",
            "judge.endpoint.api_key_variable": "",
        }
        assert_same_run(run(tiny("process", SHAPE | endpoint), tmp_path / "run"), folder / "run")
