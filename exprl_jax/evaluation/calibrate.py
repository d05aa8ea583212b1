"""Judge calibration: fixed rollouts put to several judges, with their reference, without, and with another problem's.

The verifier's verdicts, which the rollouts carry, say what is true (paper Tables 5 and 6, Fig. 11).  Each judge is
asked in several passes:

  correct, none, wrong   whole rollouts against the reference, against none, and against another problem's (a
                         derangement within each domain), as far as `references` names them
  reference_last         the first once more, with the reference after the trace, as the released templates have it
  repeats                some rollouts several times at a temperature: what chance adds to a `text` judge's score
  prefixes               prefixes of some rollouts under the same conditions, against the success of what the policy
                         writes after them

A judge whose scores the rollouts' files hold (`stored`) is compared with the others and asked nothing.

What was asked is on disk in `scores.jsonl` and `continuations.jsonl` before more is asked, and is not asked again.  One
process; its mesh may have any number of devices.
"""

from __future__ import annotations

import contextlib

import jax

from exprl_jax.config import Calibrate
from exprl_jax.data.training import kinds_of
from exprl_jax.evaluation.calibration_tables import write_calibration
from exprl_jax.evaluation.continuations import CONTINUATION_FIELDS, CONTINUATION_KEY, continue_prefixes
from exprl_jax.evaluation.fixed_rollouts import check_unchanged, read_rollouts
from exprl_jax.evaluation.judge_task import SCORE_FIELDS, SCORE_KEY, JudgeTask, TooShort, open_judge_model
from exprl_jax.evaluation.judging import ask_judge
from exprl_jax.evaluation.passes import Trace, cut_prefixes, decides, scoring_passes, stored_prefixes, stored_scores
from exprl_jax.evaluation.truths import truths_of
from exprl_jax.files import Ledger
from exprl_jax.hosts import local_problems, say
from exprl_jax.mesh import make_mesh
from exprl_jax.resolve import to_dict
from exprl_jax.reward.checklists import check_rubric
from exprl_jax.reward.judges import judge_files
from exprl_jax.reward.verifiers.grading import verifier_files
from exprl_jax.run.stopping import StopRequest
from exprl_jax.run.workdir import check_workdir, open_workdir
from exprl_jax.weights.language_model import LanguageModel, open_model
from exprl_jax.weights.run_models import check_models


def calibrate(config: Calibrate, workdir_path: str) -> None:
    """Asks all judges in the folder's run, from where its files end, and reports.

    Raises:
      ValueError: anything about config, rollouts, model or folder that cannot work, in one line.
    """
    if jax.process_count() > 1:
        raise ValueError("task = 'calibrate' runs in one process; start it without --coordinator and --distributed")
    check_workdir(workdir_path, to_dict(config))
    mesh = make_mesh(config.mesh)
    local_problems(mesh, config.wave)  # whether waves can be divided over the mesh
    rollouts = read_rollouts(config.rollouts, config.data, references=config.shows_references)
    judged = [rollout for rollout in rollouts if decides(rollout.problem, rollout.verdict)]
    counts = {"rollouts": len(judged), "left_out": len(rollouts) - len(judged)}
    if not judged:
        expected = "some found right or wrong: these verdicts are missing or timed_out"
        raise ValueError(f"config.rollouts: got {len(rollouts)} rollouts, expected {expected}")
    say(f"{len(judged)} rollouts; left out {counts['left_out']} without a verdict (missing or timed out)")
    policy = open_model(config.policy) if config.prefixes.rollouts else None
    prefixes = [] if policy is None else cut_prefixes(config, policy.tokenizer, judged)
    stored = stored_scores(config.stored, judged) if config.stored else []
    passes = scoring_passes(config, judged, prefixes)
    left_out: dict[str, str] = {}
    models = _open_models(config, left_out)
    files = {name: paths for judge in config.judges.values() for name, paths in judge_files(judge).items()}
    files |= verifier_files(config.grader, kinds_of([trace.rollout.problem for trace in prefixes]))
    with contextlib.ExitStack() as stack:
        workdir = stack.enter_context(open_workdir(workdir_path, to_dict(config), folders=()))
        check_models(workdir, [model for model in (policy, *models.values()) if model is not None], files)
        scores = Ledger(workdir.path / "scores.jsonl", "score", SCORE_KEY, SCORE_FIELDS)
        check_unchanged(scores, judged)
        continuations = Ledger(
            workdir.path / "continuations.jsonl", "continuation", CONTINUATION_KEY, CONTINUATION_FIELDS
        )
        stop = stack.enter_context(StopRequest())
        finished = True
        for name, model in models.items():
            task = JudgeTask(name, config.judges[name], model, config, scores, stop)
            try:
                finished = finished and ask_judge(task, mesh, passes)
            except TooShort as error:
                _leave_out(config, left_out, name, error)
        if policy is not None and config.prefixes.continued:
            finished = finished and continue_prefixes(config, policy, mesh, prefixes, continuations, stop)
        if not finished:
            say("stopped; start again with the same command to go on")
            return
        asked, continued = [*stored, *scores.rows()], list(continuations.rows())
        traces = [Trace(rollout, None, rollout.response, ()) for rollout in judged]
        cut = [trace for rollout in judged for trace in stored_prefixes(rollout)] if config.stored else prefixes
        truths = truths_of(config, [*traces, *cut])
        write_calibration(config, workdir.path, judged, counts, left_out, asked, continued, truths)


def _open_models(config: Calibrate, left_out: dict[str, str]) -> dict[str, LanguageModel | None]:
    """The judges' models; a judge whose context is too short is left out."""
    models = {}
    for name, judge in config.judges.items():
        check_rubric(judge)
        try:
            models[name] = open_judge_model(judge)
        except TooShort as error:
            _leave_out(config, left_out, name, error)
    return models


def _leave_out(config: Calibrate, left_out: dict[str, str], name: str, error: TooShort) -> None:
    """Names a judge that cannot be asked, and goes on with the others.

    Raises:
      ValueError: there are none.
    """
    left_out[name] = str(error).replace("config.judge.", f"config.judges.{name}.")
    if len(left_out) == len(config.names):
        raise ValueError(left_out[name]) from error
    say(f"{name}: left out: {left_out[name]}")
