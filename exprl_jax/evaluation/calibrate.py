"""Judge calibration: fixed rollouts put to several judges, with their reference, without, and with another problem's.

The verifier's verdicts, which the rollouts carry, say what is true (paper Tables 5 and 6, Fig. 11).  Each judge is
asked in several passes:

  correct, none, wrong   whole rollouts against the reference, against none, and against another problem's (a
                         derangement within each domain)
  reference_last         the first once more, with the reference after the trace, as the released templates have it
  repeats                some rollouts several times at a temperature: what chance adds to a `text` judge's score
  prefixes               prefixes of some rollouts, against the success of what the policy writes after them

What was asked is on disk in `scores.jsonl` and `continuations.jsonl` before more is asked, and is not asked again.  One
process; its mesh may have any number of devices.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import jax

from exprl_jax.config import Calibrate
from exprl_jax.data.problems import Problem
from exprl_jax.evaluation.asking import SCORE_KEY, Asking, Pass, Trace, chosen, says_something
from exprl_jax.evaluation.calibration import derangement
from exprl_jax.evaluation.calibration_tables import write_calibration
from exprl_jax.evaluation.continuations import continue_prefixes
from exprl_jax.evaluation.fixed_rollouts import Ledger, Rollout, read_rollouts
from exprl_jax.hosts import local_problems, say
from exprl_jax.mesh import make_mesh
from exprl_jax.resolve import to_dict
from exprl_jax.reward.judgements import needed_reference
from exprl_jax.reward.segments import Splitter, parse_rule
from exprl_jax.run.stopping import StopRequest
from exprl_jax.run.workdir import check_workdir, open_workdir
from exprl_jax.weights.language_model import open_model


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
    rollouts = read_rollouts(config.rollouts, config.data, references=True)
    judged = [rollout for rollout in rollouts if says_something(rollout.problem, rollout.verdict)]
    if not judged:
        raise ValueError(f"config.rollouts: none of {len(rollouts)} rollouts has a verdict that says anything")
    say(f"{len(judged)} rollouts; left out {len(rollouts) - len(judged)} without a verdict (missing or timed out)")
    wrong = wrong_references([rollout.problem for rollout in judged], config.seed)
    prefixes = prefixes_of(config, judged)
    passes = passes_of(judged, prefixes)
    asking = [Asking(config, name, how, mesh) for name, how in config.judges.items()]
    with contextlib.ExitStack() as held:
        workdir = held.enter_context(open_workdir(workdir_path, to_dict(config), folders=()))
        scores = Ledger(workdir.path / "scores.jsonl", SCORE_KEY)
        scores.check_unchanged(judged)
        continuations = Ledger(workdir.path / "continuations.jsonl", ("id", "rollout", "segment", "part"))
        stop = held.enter_context(StopRequest())
        for each in asking:
            if not each.ask(passes, wrong, scores, stop):
                say("stopped; start again with the same command to go on")
                return
        if prefixes and not continue_prefixes(config, mesh, prefixes, continuations, stop):
            say("stopped; start again with the same command to go on")
            return
        counts = {"rollouts": len(judged), "left_out": len(rollouts) - len(judged)}
        write_calibration(
            config, workdir.path, judged, counts, list(scores.rows.values()), list(continuations.rows.values())
        )


def wrong_references(problems: Sequence[Problem], seed: int) -> dict[str, str]:
    """Another problem's reference for each problem, by id, from the problems of its own domain.

    Raises:
      ValueError: a problem has no reference, or a domain has too few different problems.
    """
    distinct = {problem.id: problem for problem in problems}
    found = {}
    for domain in sorted({problem.domain for problem in distinct.values()}):
        of_domain = [distinct[name] for name in sorted(distinct) if distinct[name].domain == domain]
        texts = [(problem.problem, needed_reference(problem)) for problem in of_domain]
        for problem, place in zip(of_domain, derangement(texts, seed), strict=True):
            found[problem.id] = needed_reference(of_domain[place])
    return found


def passes_of(rollouts: Sequence[Rollout], prefixes: Sequence[Trace]) -> list[Pass]:
    """Every pass; the prefixes' unit is filled in by the judge."""
    whole = [Trace(rollout, None, rollout.response, ()) for rollout in rollouts]
    passes = [Pass(condition, "trace_last", "outcome", whole) for condition in ("correct", "none", "wrong")]
    passes.append(Pass("correct", "reference_last", "outcome", whole))
    return [*passes, Pass("correct", "trace_last", "prefix", prefixes)] if prefixes else passes


def prefixes_of(config: Calibrate, rollouts: Sequence[Rollout]) -> list[Trace]:
    """What precedes each cut of some rollouts; nothing precedes the first segment, and after the last nothing follows.

    Open-ended science is left out: its answers are not graded here.
    """
    how = config.prefixes
    if not how.rollouts:
        return []
    policy = open_model(config.policy)
    splitter = Splitter(policy.tokenizer.token_bytes, parse_rule(how.segments))
    found = []
    for rollout in chosen([r for r in rollouts if r.problem.kind != "science"], how.rollouts, config.seed):
        ids = policy.tokenizer.encode(rollout.response)
        for segment, end in enumerate(splitter.segment_ends(ids)[:-1].tolist()):
            found.append(Trace(rollout, segment, policy.tokenizer.decode(ids[:end]), tuple(ids[:end])))
    if not found:
        raise ValueError(
            f"config.prefixes.segments.rule: {how.segments.rule!r} cuts none of the rollouts; expected a rule that does"
        )
    return found
