"""A watch over the whole run, as the probe is over its first batch: a collapse is said aloud while it happens.

The means of a run's last `watch.window` steps are compared with those of its first.  A policy that has stopped cutting
its answers into segments, runs into its token limit, or writes one and the same thing still has finite metrics and
healthy hardware; without a word it ends "done" with a dead model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from exprl_jax.config import Watch
from exprl_jax.hosts import say

Row = Mapping[str, Any]


class Symptom(NamedTuple):
    """A metric that tells of a collapse.

    Attributes:
      metric: whose windows are compared.
      shows: (mean of the first window, mean of the last) → whether the run has the symptom.
      cure: what to try.
    """

    metric: str
    shows: Callable[[float, float], bool]
    cure: str


_LEAST_MOVED = 0.2
_BACK = "go back to a checkpoint before it (checkpoint.best keeps one), then"
SYMPTOMS = (
    Symptom(
        "segments/mean",
        lambda first, last: first >= 2 and last < 0.5 * first,
        f"rollouts lose the headings that rewards hang on: {_BACK} add a KL (loss.kl_coef), set advantage.overlong to "
        "'penalty', or take the estimator end_norm or the route outcome",
    ),
    Symptom(
        "response/overlong",
        lambda first, last: last > 0.5 and last > first + 0.25,
        f"rollouts run into rollout.max_tokens: {_BACK} set advantage.overlong to 'penalty', add a KL (loss.kl_coef), "
        "or raise rollout.max_tokens",
    ),
    Symptom(
        "advantage/live_groups",
        lambda first, last: first >= 0.1 and last < 0.25 * first,
        "hardly a group has any advantage: take harder problems if accuracy is high, or easier ones if it is low; "
        "raise rollout.group, lower advantage.min_spread",
    ),
    Symptom(
        "response/length_mean",
        lambda first, last: last > 3 * first or last < first / 3,
        f"the length of responses has changed more than threefold: {_BACK} lower optimizer.learning_rate or add a KL "
        "(loss.kl_coef)",
    ),
    Symptom(
        "policy/entropy",
        lambda first, last: first > 0 and (last < 0.2 * first or last > 3 * first),
        f"the entropy of the policy has collapsed or exploded: {_BACK} lower optimizer.learning_rate, raise "
        "loss.clip_high, or add a KL (loss.kl_coef)",
    ),
    Symptom(
        "solve/accuracy",
        lambda first, last: first >= 0.05 and last < 0.5 * first,
        f"accuracy is less than half of what it was: {_BACK} lower optimizer.learning_rate or add a KL (loss.kl_coef)",
    ),
)


class RunWatch:
    """Compares windows of a run's metrics; every symptom is told once, and again if it comes back.

    Attributes:
      told: a line for each symptom that the run has shown, in order.
    """

    def __init__(self, config: Watch, rows: Sequence[Row]):
        """Args: rows: metrics of the steps before, of a run that goes on; their symptoms have been told."""
        self._config, self._first, self._last = config, [], []
        self._shown: set[str] = set()
        self.told: list[str] = []
        for row in rows:
            self.new(row)

    def see(self, step: int, row: Row) -> None:
        """Warns on stderr of symptoms that were not there at the step before.

        Raises:
          ValueError: there is something to warn of and `watch.strict` is set.
        """
        lines = [f"step {step}: {line}" for line in self.new(row)]
        self.told += lines
        if lines and self._config.strict:
            raise ValueError(f"watch: {'; '.join(lines)} (config.watch.strict is set)")
        for line in lines:
            say(f"warning: watch: {line}")

    def new(self, row: Row) -> list[str]:
        """A line for each symptom that a step has and the step before had not; says and raises nothing."""
        showing = self._add(row)
        lines = [line for symptom, line in showing if symptom.metric not in self._shown]
        self._shown = {symptom.metric for symptom, _ in showing}
        return lines

    def _add(self, row: Row) -> list[tuple[Symptom, str]]:
        window = self._config.window
        if len(self._first) < window:
            self._first.append(row)
        else:
            self._last = [*self._last, row][-window:]
        if len(self._last) < window:
            return []
        showing = []
        for symptom in SYMPTOMS:
            first, last = (_mean(rows, symptom.metric) for rows in (self._first, self._last))
            if first is not None and last is not None and symptom.shows(first, last):
                told = f"{symptom.metric} went from {first:.3g} to {last:.3g} (means of {window} steps): {symptom.cure}"
                showing.append((symptom, told))
        return showing


def check_moved(step: int, row: Row) -> None:
    """Warns of an update that left nearly all parameters where they were: what is learned is lost in rounding.

    A parameter in bfloat16 has 8 bits: it does not change by less than 1 part in 256 or so.
    """
    moved = row.get("update/moved")
    if moved is not None and moved < _LEAST_MOVED:
        say(
            f"warning: step {step}: the update changed {moved:.1%} of the parameters; hold them in float32 "
            "(policy.param_dtype), or raise optimizer.learning_rate"
        )


def _mean(rows: Sequence[Row], name: str) -> float | None:
    """Over the rows where it is defined; None where it is in none."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return sum(values) / len(values) if values else None
