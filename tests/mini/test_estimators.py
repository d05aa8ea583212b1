"""Every estimator on the miniature, the whole way from sampler to Adam: the update goes where the paper's equations
point, by a second evaluator and plain differentiation, and a few updates teach; a wrong sign or baseline does not.

Puzzles of three operations, which the base solves one time in eight.
"""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mini.test_puzzles import exact
from tiny_runs import ROOT, config_dict, take_step

from configs.mini.puzzles import problem_rows, write_rows
from configs.mini.task import draw_puzzle
from exprl_jax import batch, train
from exprl_jax.data.problems import batch_indices
from exprl_jax.learning import advantages
from exprl_jax.resolve import resolve
from exprl_jax.rl_run import first_state, open_run
from exprl_jax.wave import sample_wave, wave_requests
from tests.oracles import learning_numpy as oracle
from tests.oracles.tiny_decoder import forward_logits

pytestmark = pytest.mark.slow
SMALL = {
    "rollout.prompts": 8,
    "rollout.wave": 8,
    "rollout.max_tokens": 24,
    "updates.microbatch": 8,
    "evaluate.every": 0,
    "evaluate.source": "",
}
# Adam with a large eps is plain descent: the change of the parameters is the gradient, to a factor.
PLAIN = {"optimizer.eps": 1e3, "optimizer.learning_rate": 1e3}
FAST = {"optimizer.learning_rate": 1e-3}
STEPS = 10
ESTIMATORS = ("outcome", "delta_norm", "end_norm", "group_norm")


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Runs by whether prefixes are scored, and by the optimizer's settings; each is opened once."""
    source = tmp_path_factory.mktemp("puzzles") / "k3.jsonl"
    rng = np.random.default_rng(7)
    write_rows(source, problem_rows("k3", [draw_puzzle(rng, 3) for _ in range(32)], "answer_first"))
    made = {}
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)

        def open_for(estimator, settings):
            arm = "outcome" if estimator == "outcome" else "process"
            if (key := (arm, *settings.items())) not in made:
                changes = SMALL | settings | {"data.source": str(source), "data.held_out": ""}
                made[key] = open_run(resolve(config_dict("mini.stage1", arm, changes)), stack)
            run = made[key]
            if arm == "outcome":
                return run
            rules = dataclasses.replace(run.config.advantage, estimator=estimator)
            return dataclasses.replace(run, config=dataclasses.replace(run.config, advantage=rules))

        yield open_for


def segment_ends(texts):
    """Where segments end: with the token that holds a heading, unless nothing follows."""
    ends = [r + 1 for r, text in enumerate(texts) if "###" in text and "".join(texts[r + 1 :]).strip()]
    return [*ends, len(texts)]


def wanted_advantages(run, estimator, wave):
    """The advantage of each sampled token [P, G, R], by the equations; 0 elsewhere."""
    tokens, mask = np.asarray(wave.rollouts.tokens_PGR), np.asarray(wave.rollouts.mask_PGR)
    wanted, decode = np.zeros(tokens.shape), run.policy.tokenizer.decode
    for p, problem in enumerate(wave.problems):
        cuts, scores = [], []
        for g, row in enumerate(tokens[p]):
            texts = [decode([token]) for token in row[mask[p, g]].tolist()]
            cuts.append([len(texts)] if estimator == "outcome" else segment_ends(texts))
            unit = "outcome" if estimator == "outcome" else "prefix"
            given = [(exact(problem.problem, "".join(texts[:end]), unit) - 1) / 4 for end in cuts[g]]
            scores.append(given if wave.rollouts.ended_PG[p, g] else [0.0] * len(given))
        if estimator == "outcome":
            of_segments = [[a] for a in oracle.grpo([score for (score,) in scores])]
        elif estimator == "group_norm":
            of_segments = oracle.group_norm(scores)
        else:
            of_segments = [getattr(oracle, estimator)(given) for given in scores]
        for g, values in enumerate(of_segments):
            for start, end, value in zip([0, *cuts[g]], cuts[g], values):
                wanted[p, g, start:end] = value
    return wanted


def wanted_gradient(run, params, wave, wanted):
    """Of the mean over sampled tokens of advantage · log-probability."""
    tokens, mask = np.asarray(wave.rollouts.tokens_PGR), np.asarray(wave.rollouts.mask_PGR)
    prompts = np.array([run.prompts.ids[problem.id] for problem in wave.problems])  # all of one length
    (P, G, R), L = tokens.shape, prompts.shape[1]
    whole = np.concatenate([np.repeat(prompts[:, None], G, 1), tokens], -1).reshape(P * G, L + R)
    weight = (wanted * mask / mask.sum()).reshape(P * G, R)

    def objective(params):
        logits = forward_logits(params, run.policy.arch, run.config.policy.execution, jnp.asarray(whole))
        logp = jax.nn.log_softmax(logits[:, L - 1 : -1])
        return (jnp.take_along_axis(logp, jnp.asarray(tokens).reshape(P * G, R, 1), -1)[..., 0] * weight).sum()

    return jax.jit(jax.grad(objective))(params)


def agreement(run, estimator):
    """Cosine between the change of the parameters in one step and the wanted gradient."""
    state = first_state(run)
    before = jax.device_get(state.params)
    indices, _ = batch_indices(len(run.problems), run.config.rollout.prompts, run.config.seed, 0)
    (request,) = wave_requests(run, [run.problems[i] for i in indices], 0)
    wave = sample_wave(run, run.model(state), request)
    gradient = wanted_gradient(run, before, wave, wanted_advantages(run, estimator, wave))
    state, _ = take_step(train, run, state, 0)
    change = jax.tree.map(lambda x, y: np.asarray(x) - y, jax.device_get(state.params), before)
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (change, gradient))
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def taught(run):
    """By how much a few steps raise the share of solved rollouts."""
    state, solved = first_state(run), []
    for step in range(STEPS):
        state, result = take_step(train, run, state, step)
        solved.append(result.row["solve/accuracy"])
    return np.mean(solved[-3:]) - np.mean(solved[:3])


def without_baseline(patch):
    patch.setitem(advantages.PROCESS_ESTIMATORS, "delta_norm", first_less_nothing)
    patch.setitem(advantages.PROCESS_ESTIMATORS, "end_norm", scores_themselves)
    patch.setitem(advantages.PROCESS_ESTIMATORS, "group_norm", scores_themselves)
    patch.setitem(advantages.ROLLOUT_ESTIMATORS, "grpo", scores_of_rollouts)


def scores_themselves(score, valid, count):
    return np.where(valid, score, 0).astype(np.float32), valid


def first_less_nothing(score, valid, count):
    advantage, defined = advantages.delta_norm(score, valid, count)
    advantage[..., 0] = np.where(valid[..., 0], score[..., 0], 0)
    return advantage, defined


def scores_of_rollouts(score, valid, *, std_normalise, min_spread):
    return np.where(valid, score, 0).astype(np.float32), np.ones(len(score), bool)


def with_sign(patch):
    right = batch.to_tokens

    def negated(advantage, *arguments):
        return right(-advantage, *arguments)

    patch.setattr(batch, "to_tokens", negated)


PLANTS = {"none": lambda patch: None, "sign": with_sign, "baseline": without_baseline}


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("plant", PLANTS)
def test_an_update_goes_where_the_equations_point(opened, monkeypatch, estimator, plant):
    run = opened(estimator, PLAIN)
    PLANTS[plant](monkeypatch)
    found = agreement(run, estimator)
    if plant == "none":
        assert found > 0.9999
    else:
        assert found < 0.99


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_few_updates_teach_and_with_a_wrong_sign_do_not(opened, monkeypatch, estimator):
    run = opened(estimator, FAST)
    right = taught(run)
    with_sign(monkeypatch)
    wrong = taught(run)
    assert right > 0.1 > 0 > wrong
