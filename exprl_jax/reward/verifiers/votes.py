"""One spelling for answers that a majority vote counts as one."""

from __future__ import annotations

import decimal
import re

_SPACING = re.compile(r"\\(?:left|right|displaystyle|qquad|quad|[,;:!\s])(?![A-Za-z])|[\s~$]|\\[()\[\]]")
_WRAPPED = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}")
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?")


def normalise_answer(boxed: str) -> str:
    r"""One spelling for boxed answers that differ in spacing and dress only, for counting votes.

    Drops LaTeX spacing, `$`, `\left` and `\right`, a final period and `\text{}` around words; `\dfrac` and `\tfrac`
    are `\frac`; plain numbers lose leading and trailing zeros and separators of thousands.  Whether `1/2` equals
    `0.5` it does not ask: that is the verifier's matter.
    """
    answer = _WRAPPED.sub(r"\1", boxed)
    answer = _SPACING.sub("", re.sub(r"\\[dt]frac", r"\\frac", answer)).replace("{,}", ",").rstrip(".")
    if _THOUSANDS.fullmatch(answer):
        answer = answer.replace(",", "")
    if _NUMBER.fullmatch(answer):
        number = decimal.Decimal(answer)
        answer = format(number if number else decimal.Decimal(0), "f")
        return answer.rstrip("0").rstrip(".") if "." in answer else answer
    return answer
