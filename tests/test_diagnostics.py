"""Problems with a known optimum, through the real step of every arm: its signal moves a tiny policy the right way, and
the same signal with its sign reversed moves it the wrong way.

The optimum is to write lower-case letters, which untrained weights do with one byte in ten.
"""

import contextlib
import dataclasses
import types

import numpy as np
import pytest
from tiny_runs import opened, sparse, take_step, tiny

from exprl_jax import distill, train
from exprl_jax.kinds import KINDS
from exprl_jax.reward.judge import AnswersAtOnce
from exprl_jax.reward.judgements import Judgements
from exprl_jax.reward.verifiers.verdict import Verdict
from exprl_jax.rl_run import first_state, open_run
from exprl_jax.wave import WaveRequest, sample_wave

# A group and its prompt fill a row.
FAST = {
    "data.max_prompt_tokens": 256,
    "updates.row_tokens": 320,
    "rollout.max_tokens": 8,
    "rollout.group": 16,
    "optimizer.learning_rate": 3e-3,
    "loss.kl_coef": 0.0,
    "segments.rule": "stride:4",
    "segments.max_segments": 2,
    "advantage.overlong": "keep",
    "mesh.data": 8,
}
STEPS = 8


def letters(text):
    """The share of lower-case letters."""
    return sum("a" <= c <= "z" for c in text) / max(len(text), 1)


class LetterJudge(AnswersAtOnce):
    """Scores a trace by the share of letters among what it adds; what the optimum is known for."""

    on_mesh = True

    def __init__(self, sign, group):
        self.sign, self.group = sign, group

    def score(self, problems, queries, segments):
        score = np.zeros((len(problems), self.group, segments))
        asked, text = np.zeros(score.shape, bool), {}
        for i, of_problem in enumerate(queries):
            for query in of_problem:
                share = letters(query.trace[-4:])  # bytes: a segment's worth
                score[i, query.g, query.n] = share if self.sign > 0 else 1 - share
                asked[i, query.g, query.n] = True
        return Judgements(score, asked, asked, np.zeros_like(asked), text, 1)

    def verify(self, problems, responses):
        return [[] for _ in problems]

    def report(self):
        return {}


class LetterGraders:
    """Finds a response correct if it holds more letters than most untrained ones."""

    class throughput:
        report = staticmethod(dict)

    def __init__(self, sign):
        self.sign = sign

    def submit(self, rows):
        right = [(letters(text) > 0.2) == (self.sign > 0) for _, text in rows]
        verdicts = [Verdict.correct if correct else Verdict.wrong for correct in right]
        return types.SimpleNamespace(result=lambda: verdicts)


def shares(run, state, part):
    """Mean share of letters in that part of fresh rollouts."""
    request = WaveRequest(run.problems[:8], np.arange(8), step=10_000, attempt=0, live_P=np.ones(8, bool))
    wave = sample_wave(run, run.model(state), request)
    texts = [np.asarray(row[part]) for group in wave.rollouts.tokens_PGR for row in group]
    return np.mean([letters(run.policy.tokenizer.decode(ids.tolist())) for ids in texts])


def taught(run, signed, part):
    """Shares of letters before and after some steps of a run with another signal, and the steps' metrics."""
    state, rows = first_state(run), []
    before = shares(run, state, part)
    for step in range(STEPS):
        state, result = take_step(train, signed, state, step)
        rows.append(result.row)
    return before, shares(run, state, part), rows


def assert_moved(share):
    """By the sign of the signal; under 0 is the share before."""
    assert share[1] > share[0] + 0.05, share
    assert share[-1] < share[0] - 0.02, share


@pytest.mark.parametrize(
    "arm, changes, part",
    [
        ("outcome", {}, slice(4, 8)),
        ("process", {"advantage.estimator": "delta_norm"}, slice(4, 8)),
        pytest.param("process", {"advantage.estimator": "end_norm"}, slice(4, 8), marks=pytest.mark.slow),
        pytest.param("process", {"advantage.estimator": "group_norm"}, slice(0, 8), marks=pytest.mark.slow),
        ("sparse", {}, slice(0, 8)),
        ("stage2", {"policy.weights": "random:qwen3"}, slice(0, 8)),
    ],
)
def test_a_signal_moves_the_policy_its_way(arm, changes, part):
    share = {}
    run = opened(tiny(arm, FAST | changes))
    for sign in (1, -1):
        signed = dataclasses.replace(run, judge=LetterJudge(sign, 16), graders=LetterGraders(sign))
        share[0], share[sign], _ = taught(run, signed, part)
    assert_moved(share)


FUNCTIONS = """
def share(trace):
    return sum("a" <= c <= "z" for c in trace[-4:]) / max(len(trace[-4:]), 1)
def right(attempts):
    return [share(attempt.trace) for attempt in attempts]
def wrong(attempts):
    return [1 - share(attempt.trace) for attempt in attempts]
"""


@pytest.mark.parametrize("arm", ["process", pytest.param("outcome", marks=pytest.mark.slow)])
def test_a_functions_signal_moves_the_policy_its_way(arm, tmp_path):
    (tmp_path / "letters.py").write_text(FUNCTIONS)
    share, changes = {}, FAST | {"judge.backend": "function", "judge.workers.seconds": 60.0}
    for sign, name in ((1, "right"), (-1, "wrong")):
        with contextlib.ExitStack() as stack:
            run = open_run(tiny(arm, changes | {"judge.function": f"{tmp_path}/letters.py:{name}"}), stack)
            share[0], share[sign], _ = taught(run, run, slice(4, 8))
    assert_moved(share)


def letters_before_the_answer(sign):
    """Log-probs of a policy that finds an answer the likelier the more letters it has written before it."""

    def token_logp(params, packed, used):
        tokens, segment = np.asarray(packed.tokens_BT), np.asarray(packed.segment_BT)
        logp, small = np.zeros(tokens.shape, np.float32), (tokens >= ord("a")) & (tokens <= ord("z"))
        for row in np.ndindex(tokens.shape[:-1]):
            for own in range(1, segment[row].max() + 1):
                part = segment[row] == own
                share = np.clip(small[row][part].sum(), 1, 99) / 100  # a prompt's segment has more, and no answer
                logp[row][part] = np.log(share if sign > 0 else 1 - share)
        return logp

    return token_logp


def test_likelihood_moves_the_policy_towards_what_makes_the_answer_likelier():
    share, routes = {}, dict.fromkeys((f"routes.{kind}" for kind in KINDS), "likelihood")
    run = opened(tiny("outcome", FAST | routes))
    for sign in (1, -1):
        programs = dataclasses.replace(run.programs, token_logp=letters_before_the_answer(sign))
        signed = dataclasses.replace(run, programs=programs, graders=LetterGraders(sign))
        share[0], share[sign], _ = taught(run, signed, slice(0, 8))
    assert_moved(share)


class LettersAfterHints(LetterGraders):
    """Finds everything wrong that follows a bare prompt, and what follows a hint as `LetterGraders` does: the calls
    take turns."""

    def __init__(self, sign):
        super().__init__(sign)
        self.hinted = True

    def submit(self, rows):
        self.hinted = not self.hinted
        found = [Verdict.wrong] * len(rows)
        return super().submit(rows) if self.hinted else types.SimpleNamespace(result=lambda: found)


@pytest.mark.slow
def test_success_after_hints_moves_the_policy_on_bare_prompts():
    share, changes = {}, FAST | {"rollout.hints": 16, "data.max_prompt_tokens": 280, "updates.row_tokens": 512}
    with contextlib.ExitStack() as stack:
        run = open_run(sparse(changes), stack)
    for sign in (1, -1):
        signed = dataclasses.replace(run, graders=LettersAfterHints(sign))
        share[0], share[sign], rows = taught(run, signed, slice(0, 8))
        nudged = [row["rollout/nudged"] for row in rows]
        assert np.mean(nudged) > 2, nudged
    assert_moved(share)


@pytest.mark.parametrize("kl, steps", [pytest.param("sampled", 40, marks=pytest.mark.slow), ("full", 16)])
def test_a_teacher_draws_the_policy_to_itself(kl, steps):
    """The teacher is surer than the policy.  The KL to it falls; with a negative learning rate it does not."""
    growth = {}
    for sign in (1, -1):
        config = tiny("distill", FAST | {"distillation.kl": kl, "updates.row_tokens": 512})
        optimizer = dataclasses.replace(config.optimizer, learning_rate=sign * 1e-3)
        with contextlib.ExitStack() as stack:
            distilled = distill.open_distill_run(dataclasses.replace(config, optimizer=optimizer), stack)
        start = distilled.run.frozen[config.reference]
        surer = {config.reference: start | {"final_norm": 3.0 * start["final_norm"]}}
        run = dataclasses.replace(distilled.run, frozen=surer, graders=LetterGraders(1))
        distilled = dataclasses.replace(distilled, run=run)
        state, gaps = run.programs.init_state(start), []
        for step in range(steps):
            state, result = take_step(distill, distilled, state, step)
            gaps.append(result.row["distill/kl"])
        growth[sign] = np.mean(gaps[-4:]) / np.mean(gaps[:4])
    assert growth[1] < 0.8, growth
    assert growth[-1] > 1.0, growth
