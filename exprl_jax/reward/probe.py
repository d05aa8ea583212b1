"""A check of the first judged batch, before anything is learned from it: silent failures said aloud, with their
cure."""

from __future__ import annotations

from collections.abc import Mapping

from exprl_jax.config import Config
from exprl_jax.hosts import say
from exprl_jax.reward.routes import ROUTES

# A standard deviation of scores in [0, 1] below which they are taken for equal.
_NEARLY_EQUAL = 0.01
# How a judge's scores are made finer, by whether it is a function.
_FINER = ("set judge.logits_value to 'expected'", "let judge.function give finer scores")


def probe_batch(row: Mapping[str, float | None], config: Config) -> None:
    """Warns on stderr about a batch that has little to learn from.

    Args:
      row: the first step's `reward.statistics.summarise`.

    Raises:
      ValueError: there is something to warn of and `probe.strict` is set.
    """
    problems = warnings(row, config)
    if problems and config.probe.strict:
        raise ValueError(f"probe: {'; '.join(problems)} (config.probe.strict is set)")
    for warning in problems:
        say(f"warning: probe: {warning}")


def warnings(row: Mapping[str, float | None], config: Config) -> list[str]:
    """One line for each fault of the batch, naming the cure."""

    def value(name: str) -> float:
        return row[name] if row[name] is not None else 0.0

    problems, routes = [], [ROUTES[name] for name in config.routes.all]
    sparse, function = all(route.verdict_reward for route in routes), config.judge.backend == "function"
    if value("response/overlong") > 0.5:
        scored = "" if config.advantage.overlong == "keep" else " and are not scored"
        problems.append(
            f"{value('response/overlong'):.0%} of the rollouts were cut at rollout.max_tokens = "
            f"{config.rollout.max_tokens}{scored}: raise it, or show shorter solutions in data.worked_examples"
        )
    # Sparse rewards leave many groups without any; that is what the first stage is for.
    if value("advantage/live_groups") < (0.1 if sparse else 0.5):
        if any(route.per_segment for route in routes):
            cure = f"choose a segments.rule that cuts these rollouts, {_FINER[function]}"
        else:
            nearly_equal = any(route.answer_likelihood for route in routes) or config.judge.reads_digits
            key = "min_logits_spread" if nearly_equal and not sparse else "min_spread"
            cure = f"raise rollout.group or rollout.max_resample, lower advantage.{key}"
            judged = any(route.judged for route in routes)
            cure += f", {_FINER[function]}" if judged else ", start from a primed policy"
        problems.append(
            f"only {value('advantage/live_groups'):.0%} of the groups have any advantage: {cure}, or take problems of "
            "another difficulty"
        )
    if value("judge/asked") and value("judge/parsed") < 0.5:
        if function:
            cure = "see for which rollouts judge.function gives None, or raise judge.workers.seconds"
        elif config.judge.readout == "text":
            cure = "raise judge.max_tokens, set judge.readout to 'logits', or take a larger judge"
        else:
            cure = "raise judge.max_trace_tokens"
        problems.append(f"only {value('judge/parsed'):.0%} of the judge's answers held a score: {cure}")
    spread = row["judge/group_spread"]
    if spread is not None and 0 < spread < _NEARLY_EQUAL and config.advantage.std_normalise:
        problems.append(
            f"the scores of a group differ by {spread:.1g} (standard deviation): that is noise, which "
            "advantage.std_normalise makes advantages of 1 from; take a judge that tells these rollouts apart, or keep "
            "advantage.min_spread and min_logits_spread above it"
        )
    if row["reward/std"] == 0 and not sparse:
        problems.append(
            "all scores are equal: look at rollouts/step_000001.jsonl, and take a judge that tells these rollouts "
            f"apart or {_FINER[function]}"
        )
    return problems
