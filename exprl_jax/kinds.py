"""Kinds of problems: what decides a problem's verifier, its reward route and what a judge is told of it.

To add one, write its record here and its verifier's module (`reward.verifiers.verifier`); a route for it then has to
stand in every config (`routes`), for `config.Routes` has a key for each kind.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class ProblemKind:
    """A kind of problem.

    Attributes:
      domains: words of a data file's `domain` or `ability` that mean it; none for `choice`, which answer choices make.
      plural: what the config calls its problems.
      task: what a judge's prompt calls a problem of the domain.
      advice: what a judge is told to look at in attempts at one.
      verifier: `module:name` of its `Verifier`.
      by_judge: only a judge can say whether an answer is right; verifiers say `missing`.
      keeps_answer: records of rollouts hold the answer too.
      slow_is_wrong: an answer that takes too long to verify is at fault itself.
    """

    domains: tuple[str, ...]
    verifier: str
    plural: str
    task: str = ""
    advice: str = ""
    by_judge: bool = False
    keeps_answer: bool = True
    slow_is_wrong: bool = False


_VERIFIERS = "exprl_jax.reward.verifiers"
KINDS = {
    "math": ProblemKind(
        ("math",),
        f"{_VERIFIERS}.math:VERIFIER",
        "math problems",
        "math problem",
        "A different method counts as much as the reference's where it is valid. Equal values in another form are "
        "equal. A right result from wrong reasoning, or by guessing, is worth no more than 2.",
    ),
    "choice": ProblemKind((), f"{_VERIFIERS}.choice:VERIFIER", "problems with answer choices"),
    "science": ProblemKind(
        ("science", "physics"),
        f"{_VERIFIERS}.open_ended:VERIFIER",
        "open-ended science problems",
        "science question",
        "A different line of argument counts as much as the reference's where it is valid. Check quantities, units, "
        "signs and conditions; where the problem offers choices, check which one is meant, not how it is worded. A "
        "right result from wrong reasoning, or by guessing, is worth no more than 2.",
        by_judge=True,
    ),
    "custom": ProblemKind(
        ("custom",),
        f"{_VERIFIERS}.custom:VERIFIER",
        "problems that `grader.function` verifies",
        "problem",
        "A different method counts as much as the reference's where it is valid. A right result from wrong reasoning, "
        "or by guessing, is worth no more than 2.",
    ),
    "code": ProblemKind(
        ("code",),
        f"{_VERIFIERS}.code:VERIFIER",
        "programming problems",
        "programming task",
        "A different program counts as much as the reference where it does the same. Trace it on a small input and on "
        "an edge case, check that it reads and prints what the task asks for, and that it is fast enough for the "
        "task's largest input. Style counts for nothing.",
        keeps_answer=False,  # its tests are megabytes
        slow_is_wrong=True,
    ),
}
# A data file's word → the domain that it means.
DOMAINS = {word: name for name, kind in KINDS.items() for word in kind.domains}
