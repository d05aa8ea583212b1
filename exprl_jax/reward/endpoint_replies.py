"""What an endpoint's server answers: a chat completion, or why there is none, and how long to wait before the next."""

from __future__ import annotations

import email.utils
import json
import math
import re
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 60.0
# Characters of what a server says that a message repeats.
MAX_EXCERPT = 200
_MAX_COUNT = 1 << 53  # the largest that a metric holds exactly


class Reply(NamedTuple):
    """What became of one request.

    Attributes:
      text: what the model wrote, without a thought that the server keeps apart; empty where it did not answer.
      answered: the model said something, or came to the end of its budget.
      cut: the text reached its budget.
      prompt_tokens, completion_tokens: as the server counts them; 0 where it does not say.
      failure: why there is no answer, in a few words; empty where there is one.
      probability_5: that the answer begins with each of the digits 1 to 5, given that it begins with one of them; None
        where that was not asked for, or where it rather begins with something else.
    """

    text: str
    answered: bool
    cut: bool
    prompt_tokens: int
    completion_tokens: int
    failure: str
    probability_5: tuple[float, ...] | None = None


class Failed(Exception):
    """No answer to one attempt.

    Attributes:
      passing: another attempt may fare better.
      retry_after_s: how long the server asks to wait before it.
    """

    def __init__(self, reason: str, passing: bool, retry_after_s: float = 0.0):
        super().__init__(reason)
        self.reason, self.passing, self.retry_after_s = reason, passing, retry_after_s


def retry_wait_s(retries: int, asked_s: float, draw: float) -> float:
    """Seconds before another attempt: half a second, doubled by every retry, less up to a half by chance.

    Args:
      retries: how many there were.
      asked_s: what the server asks for at least; a minute at most is granted.
      draw: uniform in [0, 1), so that requests which failed together do not come back together.
    """
    own = min(_FIRST_WAIT_S * 2.0 ** min(retries, 30), _LONGEST_WAIT_S) * (1 - draw / 2)
    return max(own, min(asked_s, _LONGEST_WAIT_S))


def asked_wait_s(headers: Mapping[str, str]) -> float:
    """Seconds that a server asks to wait: `retry-after-ms`, or `retry-after` (seconds or a date); 0 for nonsense."""
    for name, unit_s in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        if re.fullmatch(r"\s*\d+(\.\d+)?\s*", headers.get(name, ""), re.ASCII):
            return float(headers[name]) * unit_s
    try:
        return max(0.0, email.utils.parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0  # a header that says nothing asks for nothing


def read_completion(content: bytes, digits: bool = False) -> Reply:
    """The reply in the body of a successful response.

    A thought that the server keeps apart (`reasoning_content`, `reasoning`, parts of type `thinking`) is no part of the
    text.  An empty text is an answer only where the budget ended it (a model that was still thinking).

    Args:
      digits: whether `probability_5` was asked for.

    Raises:
      Failed: not a chat completion, and another attempt may bring one; or one without the log-probabilities that were
        asked for.
    """
    try:
        completion = json.loads(content)
        choice = completion["choices"][0]
        text, ended = choice["message"].get("content"), choice.get("finish_reason")
        if isinstance(text, list):
            text = "".join(part["text"] for part in text if part["type"] == "text")
        usage = completion.get("usage") or {}
        spent = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        if not isinstance(text, str | None):
            raise TypeError
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise Failed(f"not a chat completion: {read_error(content).message}", passing=True) from None
    # JSON can spell half a surrogate pair, which no file that we write can hold.
    text = (text or "").encode("utf-8", "replace").decode()
    tokens = [count if type(count) is int and 0 < count <= _MAX_COUNT else 0 for count in spent]
    if digits:
        return Reply(text, True, False, *tokens, "", _digit_probabilities(choice))
    if text.strip() or ended == "length":
        return Reply(text, True, ended == "length", *tokens, "")
    return Reply("", False, False, *tokens, f"an empty answer, finish_reason {str(ended)[:40]!r}")


def _digit_probabilities(choice: Mapping[str, Any]) -> tuple[float, ...] | None:
    """Of 1 to 5 as the first token, given that it is one of them; None where it is more probably something else.

    Digits that are not among the listed tokens count as impossible: each is less probable than all that are.
    """
    mass_5 = [0.0] * 5
    try:
        for listed in choice["logprobs"]["content"][0]["top_logprobs"]:
            digit, logprob = listed["token"].strip(" \n\t▁Ġ"), float(listed["logprob"])
            if math.isnan(logprob):
                raise ValueError
            if digit in ("1", "2", "3", "4", "5"):
                mass_5[int(digit) - 1] += math.exp(min(logprob, 0.0))
    except (KeyError, IndexError, TypeError, AttributeError, ValueError):
        raise Failed(
            "no log-probabilities in the answer: this server or model gives none; set the read-out to 'text'",
            passing=False,
        ) from None
    total = sum(mass_5)
    return tuple(mass / total for mass in mass_5) if total >= 0.5 else None


class ServerError(NamedTuple):
    """What a server said of a failure: its message on one line, and its code."""

    message: str
    code: Any


def read_error(content: bytes) -> ServerError:
    """Of a response without success, whose body may be anything."""
    try:
        error = json.loads(content)
    except (ValueError, RecursionError):
        error = None
    if isinstance(error, Mapping):
        error = error.get("error", error)
    code = error.get("code") if isinstance(error, Mapping) else None
    message = error.get("message") if isinstance(error, Mapping) else error
    if not isinstance(message, str):
        message = content[: 10 * MAX_EXCERPT].decode("utf-8", "replace")
    printable = "".join(c if c.isprintable() else " " for c in message)
    return ServerError(" ".join(printable.split()) or "no message", code)
