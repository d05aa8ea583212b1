"""A truth about the progress of fixed rollouts and their prefixes."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from exprl_jax.config import Calibrate
from exprl_jax.evaluation.judge_comparison import TraceKey
from exprl_jax.evaluation.passes import Trace
from exprl_jax.reward.judgements import Query
from exprl_jax.reward.truth import column_of, open_truth

# Traces that a function is asked about before the next are.
_AT_ONCE = 4096


def truths_of(config: Calibrate, traces: Sequence[Trace]) -> dict[TraceKey, float]:
    """The truth of each trace that has one, in [0, 1]; of whole rollouts a number of their row counts first.

    Raises:
      ValueError: a number outside [0, 1], a column that is nowhere, or a function that failed.
    """
    name, truths = column_of(config.truth), {}
    for trace in traces if name else ():
        value = trace.rollout.labels.get(name)
        if trace.segment is None and value is not None:
            if not 0 <= value <= 1:
                raise ValueError(
                    f"config.truth.source: {name!r} of rollout {trace.rollout.number} of problem "
                    f"{trace.rollout.problem.id!r} is {value}, expected a number in [0, 1]"
                )
            truths[key_of(trace)] = value
    left = [trace for trace in traces if key_of(trace) not in truths]
    if not config.truth.source or not left:
        return truths
    problems = list({trace.rollout.problem.id: trace.rollout.problem for trace in left}.values())
    if truths and not any(name in problem.extra for problem in problems):
        return truths  # numbers of rows are all that there is
    for unit in ("outcome", "prefix"):
        of_unit = [trace for trace in left if (trace.segment is None) == (unit == "outcome")]
        with contextlib.ExitStack() as stack:
            truth = open_truth(config.truth, problems, lambda _: unit, stack, group=1)
            for start in range(0, len(of_unit), _AT_ONCE):
                some = of_unit[start : start + _AT_ONCE]
                queries = [[Query(0, trace.segment or 0, trace.text)] for trace in some]
                segments = 1 + max(trace.segment or 0 for trace in some)
                made = truth.submit([trace.rollout.problem for trace in some], queries, segments).result()
                for i, trace in enumerate(some):
                    if made.valid_PGN[i, 0, trace.segment or 0]:
                        truths[key_of(trace)] = float(made.score_PGN[i, 0, trace.segment or 0])
    return truths


def key_of(trace: Trace) -> TraceKey:
    """What identifies a trace in a calibration's scores."""
    return *trace.rollout.key, trace.segment
