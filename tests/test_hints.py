"""Hints for groups without success: who gets one, what is trained on, what is counted, and where they are refused."""

import contextlib
import dataclasses
import types

import numpy as np
import pytest
from tiny_runs import config_dict, sparse

from exprl_jax.batch import join_waves, pack_update
from exprl_jax.data.problems import Problem
from exprl_jax.data.prompts import PromptStyle, hint_prompt, hinted_prompt
from exprl_jax.data.tokenizer import load_tokenizer
from exprl_jax.kinds import KINDS
from exprl_jax.resolve import resolve
from exprl_jax.reward.verifiers.verdict import Verdict
from exprl_jax.rl_run import first_state, open_run
from exprl_jax.rollout.hints import FRAME, gives_answer
from exprl_jax.rollout_log import gather_table, sample_rows
from exprl_jax.run.clock import Clock
from exprl_jax.wave import finish_wave, start_wave, wave_requests

HINTS = {"rollout.hints": 16, "data.max_prompt_tokens": 280, "advantage.overlong": "keep"}
VERIFIER = {f"routes.{kind}": "verifier" for kind in KINDS}
CHOICES = (("A", "iron"), ("B", "gold"))


class Graded:
    """Verdicts by problem and call: the first is of bare prompts, the second of prompts with hints."""

    class throughput:
        report = staticmethod(dict)

    def __init__(self, verdicts):
        self.calls = iter(verdicts)

    def submit(self, rows):
        verdicts, seen = next(self.calls), {}
        answers = []
        for problem, _ in rows:
            seen[problem.id] = seen.get(problem.id, -1) + 1
            answers.append(verdicts[problem.id][seen[problem.id]])
        return types.SimpleNamespace(result=lambda: answers)


@pytest.fixture(scope="module")
def nudged():
    """A wave of 8 problems: 0 solved at once, two after a hint, others not even then, 4 without a verdict."""
    W, C, M = Verdict.wrong, Verdict.correct, Verdict.missing
    with contextlib.ExitStack() as stack:
        run = open_run(sparse(HINTS), stack)
        state = first_state(run)
        (request,) = wave_requests(run, run.problems[:8], 0)
        names = [problem.id for problem in request.problems]
        bare = {name: [W] * 4 for name in names} | {names[0]: [W, C, W, W], names[4]: [M] * 4}
        # A model with random weights may write blanks or the answer: two of the problems for which it does not.
        got = run.hints(request.problems, np.array([i not in (0, 4) for i in range(8)])).prompts
        one, all_four, *_ = (i for i, name in enumerate(names) if name in got)
        hinted = {name: [W] * 4 for name in names} | {names[one]: [C, W, C, W], names[all_four]: [C] * 4}
        policy, clock = run.model(state), Clock()

        def score(calls, hints):
            made = dataclasses.replace(run, graders=Graded(calls), hints=hints)
            return made, finish_wave(made, policy, start_wave(made, policy, request, clock), clock)

        _, before = score([bare], None)
        made, after = score([bare, hinted], run.hints)
        yield types.SimpleNamespace(run=made, state=state, before=before, after=after, got=got, solved=(one, all_four))


def test_groups_without_success_get_a_hint_and_those_that_then_succeed_are_taken(nudged):
    before, after = nudged.before, nudged.after
    np.testing.assert_array_equal(after.nudged.hinted_P, [p.id in nudged.got for p in after.wave.problems])
    np.testing.assert_array_equal(np.flatnonzero(after.nudged.solved_P), nudged.solved)
    for p in range(8):
        same = np.array_equal(before.wave.rollouts.tokens_PGR[p], after.wave.rollouts.tokens_PGR[p])
        assert same == (p not in nudged.solved)
    np.testing.assert_array_equal(np.flatnonzero(after.advantages.live_P), [0, nudged.solved[0]])
    assert after.advantages.advantage_PGN[nudged.solved[0], :, 0].tolist() == [0.5, -0.5, 0.5, -0.5]
    again = after.nudged.hinted_P.sum() * 4
    assert after.sampled > before.sampled + again and not after.resampled_P.any()


def test_solve_rates_are_of_bare_prompts(nudged):
    ours, theirs = (gather_table(nudged.run, [wave]) for wave in (nudged.after, nudged.before))
    np.testing.assert_array_equal(ours["verdict_PG"], theirs["verdict_PG"])
    assert ours["nudged_P"].sum() == 2 and ours["hinted_P"].sum() == len(nudged.got) >= 2
    assert not theirs["hinted_P"].any()


def test_what_is_trained_on_has_the_prompt_that_it_was_sampled_from(nudged):
    """The log-probs of the packed rows are the sampler's, with the hint; without it they are others."""
    run, state, after = nudged.run, nudged.state, nudged.after
    batch = join_waves(run, run.problems[:8], [after])
    text = [run.policy.tokenizer.decode(prompt) for prompt in batch.prompts]
    assert ["Hint: " in t for t in text] == [p in nudged.solved for p in range(8)]

    def gap(batch):
        packed = pack_update(run, batch, slice(None))
        e = packed.experience
        logp = np.asarray(run.programs.token_logp(state.params, e.packed, e.used))
        of_hinted = np.isin(packed.group_N, nudged.solved)
        spread = packed.packed.spread([np.full(24, h)[:n] for h, n in zip(of_hinted, _lengths(packed, batch))], bool)
        return np.abs(logp - np.asarray(e.sampler_logp_MBT))[spread & np.asarray(e.mask_MBT)].max()

    assert gap(batch) < 1e-4
    bare = [run.prompts.ids[problem.id] for problem in run.problems[:8]]
    assert gap(batch._replace(prompts=bare)) > 1e-3


def _lengths(packed, batch):
    return batch.rollouts.mask_PGR.sum(-1)[packed.group_N, packed.index_N]


def test_rows_for_people_show_the_prompt_with_its_hint(nudged):
    rows = sample_rows(nudged.run, [nudged.after], 8)
    assert ["Hint: " in row["prompt"] for row in rows] == [p in nudged.solved for p in range(8)]
    assert rows[nudged.solved[0]]["verdict"] == "correct"


def test_a_hint_is_the_same_every_time_and_fits(nudged):
    run, after = nudged.run, nudged.after
    wanted = np.ones(8, bool)
    once, again = (run.hints(after.wave.problems, wanted) for _ in range(2))
    assert once == again and once.prompts
    longest = max(len(run.prompts.ids[p.id]) for p in run.problems)
    assert run.hints.limit == min(280, longest + 16 + FRAME)
    assert max(map(len, once.prompts.values())) <= run.hints.limit
    assert not run.hints(after.wave.problems, ~wanted).prompts


# --- Prompts.


def test_the_base_sees_the_reference_and_the_policy_the_hint():
    tokenizer = load_tokenizer("byte")
    problem = Problem("a", "Which shines?", "Think of rings.", "B", "science", CHOICES)
    asked = tokenizer.decode(hint_prompt(tokenizer, problem))
    assert "Think of rings." in asked and "Which shines?\n\nA. iron\nB. gold" in asked and "Do not give" in asked
    shown = tokenizer.decode(hinted_prompt(tokenizer, problem.question, "Rings.", PromptStyle()))
    assert "Which shines?\n\nA. iron\nB. gold\n\nHint: Rings." in shown and "Think" not in shown
    with pytest.raises(ValueError, match="'a' has no reference solution, from which its hint is made"):
        hint_prompt(tokenizer, Problem("a", "?", None, "B", "math"))


@pytest.mark.parametrize(
    "hint, answer, gives",
    [
        ("Add them: it is 42.", "42", True),
        ("Add 420 and 142.", "42", False),
        ("It is \\boxed{x + 1}", "x + 1", True),
        ("Newton's  Law\nholds", "newton's law", True),
        ("Think of pairs.", "42", False),
    ],
)
def test_a_hint_with_the_answer_in_it_is_known(hint, answer, gives):
    assert gives_answer(hint, answer) == gives


# --- Where they are refused.


@pytest.mark.parametrize(
    "changes, route",
    [({}, "outcome"), ({"routes.math": "process"}, "outcome"), (VERIFIER | {"routes.science": "process"}, "process")],
)
def test_no_arm_with_a_judge_has_hints(changes, route):
    """They show the policy what was made from references: the leak that ExpRL rules out."""
    message = (
        f"config.rollout.hints: got 16, expected 0 with the route '{route}': hints are for the route 'verifier' alone"
    )
    with pytest.raises(ValueError) as error:
        resolve(config_dict("tiny", "outcome", {"rollout.hints": 16} | changes))
    assert str(error.value) == message


def test_a_distilled_run_has_no_hints():
    with pytest.raises(ValueError, match="config.rollout.hints: got 16, expected 0 with"):
        resolve(config_dict("tiny", "distill", {"rollout.hints": 16} | VERIFIER))


def test_a_run_without_hints_opens_no_writer_and_reads_no_reference():
    config = resolve(config_dict("tiny", "sparse", {"loss.kl_coef": 0.0}))
    assert not config.reads_references and not config.has_reference_model
    with_hints = resolve(config_dict("tiny", "sparse", {"loss.kl_coef": 0.0, "rollout.hints": 8}))
    assert with_hints.reads_references and with_hints.has_reference_model
