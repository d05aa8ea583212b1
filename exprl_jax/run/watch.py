"""A watch over the whole run, as the probe is over its first batch: a collapse is said aloud while it happens.

The means of a run's last `watch.window` / 2 steps are compared with those of its first `watch.window`, and where more
is better with the best window that the run has had, for a run that begins with nothing can lose what it learned.  A
policy that has stopped cutting its answers into segments, runs into its token limit, or writes one and the same thing
still has finite metrics and healthy hardware; without a word it ends "done" with a dead model.
"""

from __future__ import annotations

import collections
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from exprl_jax.config import Watch
from exprl_jax.hosts import say

Row = Mapping[str, Any]


class Symptom(NamedTuple):
    """A metric that tells of a collapse.

    Attributes:
      metric: whose windows are compared.
      shows: (mean of the first or best window, mean of the last steps) → whether the run has the symptom.
      cure: what to try.
      best: the best window so far is compared, instead of the first; a fall must then be more than the noise of that.
    """

    metric: str
    shows: Callable[[float, float], bool]
    cure: str
    best: bool = False


class _Window(NamedTuple):
    """Mean of a metric over a window of steps, and its spread from step to step."""

    mean: float
    std: float


_LEAST_MOVED = 0.2
_WHICH = {True: "best", False: "first"}
# So many standard deviations of the best window's own noise must a fall be.
_DEVIATIONS = 3
_BACK = "go back to a checkpoint before it (checkpoint.best keeps one), then"
SYMPTOMS = (
    Symptom(
        "segments/mean",
        lambda first, last: first >= 2 and last < 0.5 * first,
        f"rollouts lose the headings that rewards hang on: {_BACK} add a KL (loss.kl_coef), set advantage.overlong to "
        "'penalty', or take the estimator delta_group or the route outcome",
        best=True,
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
        lambda first, last: first > 0 and (last < 0.1 * first or last > 3 * first),
        f"the entropy of the policy has collapsed or exploded: {_BACK} lower optimizer.learning_rate, raise "
        "loss.clip_high, or add a KL (loss.kl_coef)",
    ),
    Symptom(
        "solve/accuracy",
        lambda best, last: best >= 0.05 and last < 0.6 * best,
        f"accuracy is far below what it was: {_BACK} lower optimizer.learning_rate or add a KL (loss.kl_coef)",
        best=True,
    ),
)


class RunWatch:
    """Compares windows of a run's metrics; every symptom is told once, and again if it comes back.

    Attributes:
      told: a line for each symptom that the run has shown, in order.
    """

    def __init__(self, config: Watch, rows: Sequence[Row]):
        """Args: rows: metrics of the steps before, of a run that goes on; their symptoms have been told."""
        self._config, self._recent = config, max(1, config.window // 2)
        self._rows: collections.deque[Row] = collections.deque(maxlen=config.window + self._recent)
        self._compared: dict[str, _Window] = {}
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
        window, recent = self._config.window, self._recent
        self._rows.append(row)
        if len(self._rows) < window + recent:
            return []
        rows = list(self._rows)
        showing = []
        for symptom in SYMPTOMS:
            then, now = _over(rows[:window], symptom.metric), _over(rows[window:], symptom.metric)
            known = self._compared.get(symptom.metric)
            if then and (known is None or symptom.best and then.mean > known.mean):
                self._compared[symptom.metric] = known = then
            if known is None or now is None or not symptom.shows(known.mean, now.mean):
                continue
            noise = known.std * math.sqrt(1 / window + 1 / recent)
            if symptom.best and known.mean - now.mean <= _DEVIATIONS * noise:
                continue
            told = (
                f"{symptom.metric} went from {known.mean:.3g} to {now.mean:.3g} (means of the {_WHICH[symptom.best]} "
                f"{window} steps and of the last {recent}): {symptom.cure}"
            )
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


def _over(rows: Sequence[Row], name: str) -> _Window | None:
    """Over the rows where it is defined; None where it is in none."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return _Window(statistics.fmean(values), statistics.pstdev(values)) if values else None
