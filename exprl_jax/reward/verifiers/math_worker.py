"""The process that compares answers: `python -m exprl_jax.reward.verifiers.math_worker <limit in seconds>`.

Requests are JSON lines on stdin, `[boxed, answer]`; each is answered by one line on stdout, a JSON object.  The first
line, before any request, is `{"ready": true}`; a process that cannot work dies before it.  It ends when stdin
closes, and, whatever it is doing and whoever still lives, soon after an item's time limit.

JAX is not imported here: a worker starts in the time that SymPy and pint take to load.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import resource
import signal
import sys
from typing import Any

from exprl_jax.reward.verifiers.math_answers.box import unboxed
from exprl_jax.reward.verifiers.math_answers.equality import same_answer
from exprl_jax.reward.verifiers.math_answers.kinds import Answer
from exprl_jax.reward.verifiers.math_answers.reading import read
from exprl_jax.reward.verifiers.math_answers.tokens import ambiguous_commas, ambiguous_letters

# A comparison may ask for any amount of memory; beyond this the request fails instead of the machine.
_ADDRESS_SPACE = 4 << 30
# SymPy's caches grow; a worker that holds this much more than when it was ready is replaced.
_RETIRE_BYTES = 256 << 20
# The parent kills at the limit; this is for a worker whose parent was killed first.
_GRACE_S = 1.0

_WARM_UP = [(r"\frac{1}{2}\sqrt{2}x", r"\frac{x}{\sqrt{2}}"), (r"5\text{ km/h}", r"5\text{ m/s}"), ("x>2", "[0,1)")]
# Most answers are whole numbers: these need no grammar.
_WHOLE = re.compile(r"\s*(-?[0-9]+)\s*")


def compare(boxed: str, answer: str) -> str:
    """Whether what a response boxed says what the reference answer says.

    Args:
      boxed: the content of the response's box.
      answer: the reference answer, bare, in dollar signs, or boxed.

    Returns:
      `correct`, `wrong`, or `unparsable` where one of the two cannot be read at all.
    """
    try:
        whole = [_WHOLE.fullmatch(text) for text in (boxed, answer)]
        if all(whole):
            return "correct" if int(whole[0][1]) == int(whole[1][1]) else "wrong"
        pairs = itertools.product(_readings(answer, as_reference=True), _readings(boxed, as_reference=False))
        same = any(same_answer(expected, got) for expected, got in pairs)
    except Exception:  # SymPy raises whatever it meets
        return "unparsable"
    return "correct" if same else "wrong"


@functools.lru_cache(maxsize=4096)
def _readings(text: str, as_reference: bool) -> list[Answer]:
    """What a text may say: `12cm` is a length or a product and, of an answer, `1,234` one number or two."""
    text = unboxed(text)
    commas = (True, False) if ambiguous_commas(text) and not as_reference else (True,)
    bare_units = (True, False) if ambiguous_letters(text) else (True,)
    return [read(text, *options) for options in itertools.product(commas, bare_units)]


def _resident_bytes() -> int:
    """Memory held now; not `ru_maxrss`, which a process inherits from the parent that executed it."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def main() -> None:
    """Answers requests until stdin closes."""
    limit_s = float(sys.argv[1])
    # Replies leave by a descriptor of their own, so that nothing a library prints can be taken for one.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def reply(**fields: Any) -> None:
        replies.write(json.dumps(fields) + "\n")
        replies.flush()

    # The first comparisons load what SymPy and pint load late.
    for pair in _WARM_UP:
        compare(*pair)
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
    # The kernel's own response to the alarm, which asks nothing of the interpreter.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    at_start = _resident_bytes()
    reply(ready=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, limit_s + _GRACE_S)
        verdict = compare(*json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, 0)
        retire = _resident_bytes() - at_start > _RETIRE_BYTES
        reply(verdict=verdict, retire=retire)


if __name__ == "__main__":
    main()
