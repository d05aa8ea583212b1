"""A judge's budgets: one meaning wherever a judge is asked, counted in the tokens that it reads and writes."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from configs import calibrate, tiny
from exprl_jax import programs
from exprl_jax.architecture import Architecture
from exprl_jax.data.problems import Problem
from exprl_jax.data.tokenizer import load_tokenizer
from exprl_jax.evaluation.fixed_rollouts import FixedRollout
from exprl_jax.evaluation.judge_task import JudgeTask, open_judge_model
from exprl_jax.evaluation.judging import ask_judge
from exprl_jax.evaluation.passes import ScoringPass, Trace
from exprl_jax.files import Ledger
from exprl_jax.resolve import resolve
from exprl_jax.reward.judge import score_prompt, verify_prompt
from exprl_jax.reward.judgements import Query
from exprl_jax.reward.judges import JudgeBuilder, check_judge_lengths
from exprl_jax.reward.verifiers.verdict import Verdict
from exprl_jax.weights.language_model import load_params, open_model

TOKENIZER = load_tokenizer("byte")
PROBLEMS = [Problem(f"p{i}", "Why? " * (1 + 7 * i), "Because. " * (3 + i), "x", "science") for i in range(4)]
# Not a multiple of 16, up to which widths are rounded.
TRACE = 53


def judge_config(**changes):
    return dataclasses.replace(resolve(tiny.get_config("process")).judge, max_trace_tokens=TRACE, **changes)


def builder(config):
    return JudgeBuilder(config, scored=PROBLEMS, verified=PROBLEMS, unit=lambda _: "outcome")


@pytest.mark.parametrize("readout", ["text", "logits"])
def test_a_prompts_length_is_that_of_the_whole_prompt_around_the_trace(readout):
    """Against the whole prompt with nothing where the trace goes, of the longer of the two that a problem has."""
    config = judge_config(readout=readout)
    for problem, length in zip(PROBLEMS, builder(config).lengths(PROBLEMS).values()):
        prompts = score_prompt(config, TOKENIZER, problem, "outcome"), verify_prompt(config, TOKENIZER, problem)
        whole = [len([*prompt.head, *prompt.tail("")]) for prompt in prompts]
        assert length == max(whole) > max(len(prompt.head) for prompt in prompts)


@pytest.mark.parametrize("readout", ["text", "logits"])
def test_a_trace_is_within_its_budget_whatever_widths_are_rounded_up_to(readout):
    """At the budget it is asked about; one token more gets no score, though the row has room for it."""
    config = judge_config(readout=readout, max_tokens=4)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]).reshape(2, 1), ("data", "model"))
    made, read = builder(config), []

    def build(*arguments):
        made = programs.build_judge(*arguments)

        def judge(params, prefix, rows, *draw):
            width = rows.tokens_PGT.shape[-1]
            read.append((np.asarray(prefix.length_P)[:, None] + width - np.asarray(rows.start_PG)).max())
            return made.judge(params, prefix, rows, *draw)

        return dataclasses.replace(made, judge=judge)

    judge = made.open(
        mesh, None, lambda model: load_params(model, mesh, 0), build, PROBLEMS, wave=len(PROBLEMS), group=2
    )
    queries = [[Query(0, 0, "y" * TRACE), Query(1, 0, "y" * (TRACE + 1))] for _ in PROBLEMS]
    judgements = judge.score(PROBLEMS, queries, 1)
    assert judgements.asked_PGN.all() and judgements.cut_PGN[:, 1, 0].all()
    assert not judgements.valid_PGN[:, 1].any()
    if readout == "logits":
        assert judgements.valid_PGN[:, 0].all()
    # The judge reads exactly the longest prompt and a trace at its budget.
    frames = [score_prompt(config, TOKENIZER, problem, "outcome").frame_tokens for problem in PROBLEMS]
    assert max(read) == max(frames) + TRACE


@pytest.mark.parametrize("readout, answer", [("text", 16), ("logits", 0)])
def test_budgets_that_exactly_fill_the_context_are_accepted(readout, answer):
    config = judge_config(readout=readout, max_tokens=16)
    arch = open_model(config.model).arch
    exact: Architecture = dataclasses.replace(arch, max_positions=config.max_context_tokens + TRACE + answer)
    check_judge_lengths(config, exact)
    with pytest.raises(ValueError, match="the judge's context length"):
        check_judge_lengths(config, dataclasses.replace(exact, max_positions=exact.max_positions - 1))


def test_a_calibration_leaves_out_the_problems_that_training_drops(tmp_path):
    """With a budget between the prompts' lengths, by the same count."""
    lengths = JudgeBuilder(judge_config(), scored=PROBLEMS, verified=[], unit=lambda _: "outcome").lengths(PROBLEMS)
    budget = sorted(lengths.values())[1]
    dropped = {name for name, tokens in lengths.items() if tokens > budget}
    assert len(dropped) == 2
    config = judge_config(max_context_tokens=budget)
    rollouts = [FixedRollout(problem, 0, "It is so.", Verdict.correct) for problem in PROBLEMS]
    traces = [Trace(rollout, None, rollout.response, ()) for rollout in rollouts]
    references = {problem.id: problem.reference for problem in PROBLEMS}
    scoring_pass = ScoringPass("correct", "trace_last", "outcome", references, traces)
    scores = Ledger(tmp_path / "scores.jsonl", "score", ("id",), {"id": str})
    calibration = resolve(calibrate.get_config("tiny"))
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(-1, 1), ("data", "model"))
    task = JudgeTask("judge", config, open_judge_model(config), calibration, scores, Never())
    assert ask_judge(task, mesh, [scoring_pass])
    asked = {json.loads(line)["id"] for line in (tmp_path / "scores.jsonl").read_text().splitlines()}
    assert asked == {problem.id for problem in PROBLEMS} - dropped


class Never:
    """Nobody asks to stop."""

    def agreed(self):
        return False
