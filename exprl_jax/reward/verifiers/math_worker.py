"""The process that compares answers: `python -m exprl_jax.reward.verifiers.math_worker <limit in seconds>`.

Requests are JSON lines on stdin, `[boxed, answer]`; each is answered by one line on stdout, a JSON object.  The first
line, before any request, is `{"ready": true}`, or `{"error": "..."}` where the process cannot work.  It ends when stdin
closes, and, whatever it is doing and whoever still lives, soon after an item's time limit.

JAX is not imported here: a worker starts in the time that math-verify takes to load.
"""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import signal
import sys
from typing import Any

# A comparison may ask for any amount of memory; beyond this the request fails instead of the machine.
_ADDRESS_SPACE = 4 << 30
# SymPy's caches grow; a worker that holds this much more than when it was ready is replaced.
_RETIRE_BYTES = 256 << 20
# The parent kills at the limit; this is for a worker whose parent was killed first.
_GRACE_S = 1.0

_WRAPPER = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_WORDS = re.compile(r"[A-Za-z]{3,}(?:[ '-]+[A-Za-z]+)*")


def compare(boxed: str, answer: str) -> str:
    """Whether what a response boxed is equivalent to the reference answer.

    Args:
      boxed: the content of the response's box.
      answer: the reference answer, bare, in dollar signs, or boxed.

    Returns:
      `correct`, `wrong`, or `unparsable` where math-verify can read one of the two not at all.
    """
    import math_verify

    # math-verify sees through dollar signs and boxes around an answer, but not through a full stop.
    boxed, answer = (text.strip().removesuffix(".").strip() for text in (boxed, answer))
    if not boxed or not answer:
        return "unparsable"
    if boxed == answer:
        return "correct"
    # As mathematics a word is the product of its letters: "listen" would equal "silent".
    if _WORDS.fullmatch(_words(answer)):
        return "correct" if _words(boxed) == _words(answer) else "wrong"
    latex = [math_verify.LatexExtractionConfig()]
    got, expected = (
        # Their own time limits are alarms, which a long computation in C does not notice; ours is outside.
        math_verify.parse(f"\\boxed{{{text}}}", latex, fallback_mode="no_fallback", parsing_timeout=None)
        for text in (boxed, answer)
    )
    if not got or not expected:
        return "unparsable"
    return "correct" if math_verify.verify(expected, got, timeout_seconds=None) else "wrong"


def _words(text: str) -> str:
    return " ".join(_WRAPPER.sub(r"\1", text).split()).casefold()


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

    try:
        logging.disable(logging.CRITICAL)
        # The first comparison loads what the package loads late.
        working = compare("\\frac{1}{2}", "0.5") == "correct" and compare("x + 1", "(x - 1)") == "wrong"
    except ImportError as error:
        reply(error=f"the answer grader needs the package math-verify: {error}; pip install math-verify")
        return
    if not working:
        reply(error="math-verify says that 1/2 is not 0.5, or that x + 1 is x - 1: it is broken; reinstall it")
        return
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
