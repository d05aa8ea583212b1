"""The route `likelihood`: its numbers against transformers on the policy's weights, and what it asks of a rollout."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import transformers
from tiny_runs import PROBLEMS, opened, tiny, write_problems

from exprl_jax.data.tokenizer import load_tokenizer
from exprl_jax.kinds import KINDS
from exprl_jax.mesh import make_mesh
from exprl_jax.reward.likelihood import AnswerRow, answer_likelihoods, answer_row
from exprl_jax.rl_run import first_state
from exprl_jax.run.workdir import Workdir
from exprl_jax.wave import WaveRequest, sample_wave, weigh_answers
from exprl_jax.weights.adapters import export_policy

ROUTE = {f"routes.{kind}": "likelihood" for kind in KINDS} | {"loss.kl_coef": 0.0}


@pytest.mark.parametrize(
    "response, answer, context, answer_ids",
    [
        ("So \\boxed{1}, no: \\boxed{7}. Yes.", "12", "So \\boxed{1}, no: \\boxed{", "12}"),
        ("So it is 7.", "12", "So it is 7.\n\nThe final answer is \\boxed{", "12}"),
        ("", "\\boxed{\\frac{1}{2}}", "\n\nThe final answer is \\boxed{", "\\frac{1}{2}}"),
    ],
)
def test_the_answer_stands_in_the_last_box(response, answer, context, answer_ids):
    tokenizer = load_tokenizer("byte")
    row = answer_row(tokenizer, (5, 6), response, answer)
    assert row.prompt == (5, 6)
    assert (tokenizer.decode(row.context), tokenizer.decode(row.answer)) == (context, answer_ids)


def test_likelihoods_are_those_of_transformers(tmp_path):
    """Mean probability of the answer's tokens at the temperature of the policy, a rollout at a time, nothing packed."""
    run = opened(tiny("outcome", ROUTE))
    state = first_state(run)
    policy = run.model(state)
    request = WaveRequest(run.problems[:8], np.arange(8), step=0, attempt=0, live_P=np.arange(8) != 5)
    wave = sample_wave(run, policy, request)
    responses = [list(group) for group in wave.responses]
    responses[0][1] = "So \\boxed{1}, no: \\boxed{7}. Yes."
    score_PG, valid_PG = weigh_answers(run, policy, dataclasses.replace(wave, responses=responses), request.index_P)
    assert valid_PG.tolist() == [[p != 5] * 4 for p in range(8)] and not score_PG[5].any()
    export_policy(run.config.lora, run.policy, run.base, state.params, Workdir(tmp_path, False))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32).eval()
    encode = run.policy.tokenizer.encode
    for p, problem in enumerate(request.problems):
        for g, response in enumerate(responses[p]):
            if p == 5:
                continue
            before = (
                "So \\boxed{1}, no: \\boxed{" if (p, g) == (0, 1) else f"{response}\n\nThe final answer is \\boxed{{"
            )
            given, answer_ids = [*run.prompts.ids[problem.id], *encode(before)], encode(problem.answer + "}")
            with torch.no_grad():
                logits = model(torch.tensor([[*given, *answer_ids]])).logits[0, len(given) - 1 : -1]
            probability = torch.softmax(logits / run.config.rollout.temperature, -1)[range(len(answer_ids)), answer_ids]
            np.testing.assert_allclose(score_PG[p, g], probability.mean().item(), rtol=1e-4)
    assert score_PG[valid_PG].std() > 0


def by_target(shape, calls):
    """A policy that gives token t the probability t / 100, whatever stands before it."""

    def logp_of(packed, used):
        calls.append(int(used))
        target = np.asarray(packed.target_BT)
        assert target.shape == shape
        return np.log(np.maximum(target, 1) / 100)

    return logp_of


def test_rows_that_no_pass_has_room_for_wait_for_the_next_and_longer_ones_have_none():
    rows = [[AnswerRow((1, 2), (90,) * 5, (p + 10 * g + 1, 50)) for g in range(3)] for p in range(8)]
    rows[1][2] = None
    rows[2][0] = AnswerRow((1, 2), (90,) * 20, (3,))
    calls, shape = [], (1, 8, 16)
    mesh = make_mesh(tiny().mesh)
    got = answer_likelihoods(rows, np.array([0, 3, 4, 7, 8, 9, 10, 12]), by_target(shape, calls), mesh, shape, 12)
    score_PG, valid_PG = got
    missing = {(1, 2), (2, 0)}
    for p in range(8):
        for g in range(3):
            assert valid_PG[p, g] == ((p, g) not in missing)
            expected = 0.0 if (p, g) in missing else (p + 10 * g + 1 + 50) / 200
            assert math.isclose(score_PG[p, g], expected, rel_tol=1e-12)
    assert len(calls) == 2
    nothing = answer_likelihoods([[None] * 3] * 8, np.arange(8), by_target(shape, calls), mesh, shape, 12)
    assert not nothing[0].any() and not nothing[1].any()


def test_tests_are_no_answer_that_a_policy_could_write(tmp_path):
    source = write_problems(tmp_path / "problems.jsonl", PROBLEMS)
    with pytest.raises(
        ValueError, match=r"^config.routes.code: got 'likelihood', expected another route: a policy does not"
    ):
        opened(tiny("outcome", ROUTE | {"data.source": source}))
