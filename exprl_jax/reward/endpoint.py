"""A language model behind an OpenAI-compatible chat-completions endpoint, and the judge that asks it.

A request that fails is a missing reply, never an exception, unless the server says that the configuration is at fault.
Requests that may fare better are sent again.  The key is read from the environment and never written anywhere.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import email.utils
import json
import os
import queue
import random
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, NamedTuple

import httpx
import numpy as np

from exprl_jax import config
from exprl_jax.data.problems import Problem
from exprl_jax.data.tokenizer import Message
from exprl_jax.hosts import sum_over_processes
from exprl_jax.reward.judge import Judgements, Query, needed_reference
from exprl_jax.reward.judge_prompts import Unit, judge_messages, normalise, parse_score
from exprl_jax.reward.verifiers.open_ended import parse_verdict, verify_messages
from exprl_jax.reward.verifiers.verdict import Verdict

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 60.0
_LEAVE_S = 0.5
_MAX_BODY = 16 << 20
_MAX_EXCERPT = 200
_GREEDY: Mapping[str, float] = {"temperature": 0}
# Stands for a trace or a response in a prompt; nobody can guess it, so no problem contains it.
_MARKER = f"trace{secrets.token_hex(16)}"

# --- the client ------------------------------------------------------------------------------------------------------


class Reply(NamedTuple):
    """What became of one request.

    Attributes:
      text: what the model wrote; empty where it did not answer.
      answered: the model said something, or came to the end of its budget.
      cut: the text reached its budget.
      prompt_tokens, completion_tokens: as the server counts them; 0 where it does not say.
      failure: why there is no answer, in a few words; empty where there is one.
    """

    text: str
    answered: bool
    cut: bool
    prompt_tokens: int
    completion_tokens: int
    failure: str


class Replies:
    """Replies that are on their way."""

    def __init__(self, futures: Sequence[concurrent.futures.Future[Reply]], waited: Callable[[float], None]):
        self._futures = futures
        self._waited = waited

    def done(self) -> bool:
        """True once `result` will not wait."""
        return all(future.done() for future in self._futures)

    def result(self) -> list[Reply]:
        """Waits for every reply; replies in row order.

        Raises:
          ValueError: the server said that address, model or key are wrong; at once, whatever else is on its way.
          concurrent.futures.CancelledError: the client was closed first.
        """
        begun = time.monotonic()
        try:
            done, _ = concurrent.futures.wait(self._futures, return_when=concurrent.futures.FIRST_EXCEPTION)
            for future in done:
                future.result()
            return [future.result() for future in self._futures]
        finally:
            self._waited(time.monotonic() - begun)


class ChatClient:
    """Threads that ask a chat-completions endpoint; use as a context manager.

    The threads are daemons: a request that is on its way keeps neither `close` nor the process waiting.
    """

    def __init__(self, how: config.Endpoint):
        """Starts the threads; sends nothing.

        Raises:
          ValueError: the key is not in the environment or cannot be one, or the address holds more than an address.
        """
        self._how = how
        self._url = f"{_read_address(how.base_url)}/chat/completions"
        self._key = _read_key(how.api_key_variable)
        self._queue: queue.SimpleQueue[tuple[concurrent.futures.Future[Reply], bytes] | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._fault = ""
        self._lock = threading.Lock()
        self._chance = random.Random()
        self._usage = dict.fromkeys(("requests", "retries", "failures", "prompt_tokens", "completion_tokens"), 0)
        self._waited = 0.0
        self._tls = httpx.create_ssl_context()  # takes tens of milliseconds, so once for all threads
        self._threads = [
            threading.Thread(target=self._work, name=f"endpoint-{i}", daemon=True) for i in range(how.concurrency)
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> ChatClient:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def max_missing(self) -> float:
        """The largest fraction of a batch that may fail."""
        return self._how.max_missing

    def submit(
        self, requests: Sequence[Sequence[Message]], max_tokens: int, *, chance: Mapping[str, float] = _GREEDY
    ) -> Replies:
        """Begins to ask and returns at once.

        The server puts contents into its chat template as it likes, so control strings in them (`<|im_end|>`) are
        broken by a zero-width space first: a graded text must not be able to end its turn.

        Args:
          requests: a chat each.
          max_tokens: budget of an answer.
          chance: `temperature`, and above 0 a `seed`, which servers may heed or not.

        Raises:
          ValueError: the client is closed.
        """
        if self._closing.is_set():
            raise ValueError("endpoint: got requests for a client that is closed; submit them inside its context")
        futures = []
        for messages in requests:
            body = {
                "model": self._how.model,
                "messages": [{"role": role, "content": _harmless(content)} for role, content in messages],
                # Superseded by max_completion_tokens at OpenAI, and the only name that every server knows.
                "max_tokens": max_tokens,
                **chance,
            }
            futures.append(concurrent.futures.Future())
            self._queue.put((futures[-1], json.dumps(body).encode()))
        return Replies(futures, self._add_waited)

    def ask(
        self,
        requests: Sequence[Sequence[Message]],
        max_tokens: int,
        wanted: str,
        *,
        chance: Mapping[str, float] = _GREEDY,
    ) -> list[Reply]:
        """The replies, in row order, unless too few of all processes' requests got one; then every process raises.

        Every process of a run must make the same calls.

        Args:
          requests, max_tokens, chance: as `submit` takes them.
          wanted: what replies are called in the error.

        Raises:
          ValueError: more than `max_missing` of the requests failed, or the server says that the configuration is at
            fault.
        """
        fault, replies = "", []
        try:
            replies = self.submit(requests, max_tokens, chance=chance).result()
        except ValueError as error:
            fault = str(error)
        reasons = [reply.failure for reply in replies if not reply.answered]
        faults, failures, asked = sum_over_processes([bool(fault), len(reasons), len(requests)])
        if faults:
            raise ValueError(fault or "endpoint: another process was refused by its endpoint; its own message says why")
        if failures > self.max_missing * asked:
            last = reasons[-1] if reasons else "on another process"
            raise ValueError(
                f"endpoint: {failures} of {asked} {wanted} are missing because their requests failed, more"
                f" than the fraction max_missing = {self.max_missing:g}; the last failure: {last}"
            )
        return replies

    def usage(self) -> dict[str, float]:
        """What was spent so far.

        Returns:
          requests: chats that got a reply or failed for good; retries: further attempts at them; failures: those of
          them without an answer; prompt_tokens, completion_tokens: as the server counts them; seconds_waited: spent
          in `Replies.result`.
        """
        with self._lock:
            return {**self._usage, "seconds_waited": self._waited}

    def close(self) -> None:
        """Drops the requests that are not under way and leaves those that are to their fate."""
        self._closing.set()
        while True:
            try:
                left = self._queue.get_nowait()
            except queue.Empty:
                break
            if left is not None:
                # Set, not `cancel()`: waiting ends at an exception, and does not end at a cancelled future.
                left[0].set_exception(concurrent.futures.CancelledError("the endpoint's client was closed"))
        for _ in self._threads:
            self._queue.put(None)
        leave = time.monotonic() + _LEAVE_S
        for thread in self._threads:
            thread.join(max(0.0, leave - time.monotonic()))

    def _add_waited(self, seconds: float) -> None:
        with self._lock:
            self._waited += seconds

    def _count(self, **more: int) -> None:
        with self._lock:
            for name, count in more.items():
                self._usage[name] += count

    def _work(self) -> None:
        headers = {"content-type": "application/json"}
        if self._key:
            headers["authorization"] = f"Bearer {self._key}"
        with httpx.Client(verify=self._tls, headers=headers, timeout=self._how.seconds) as http:
            while (item := self._queue.get()) is not None:
                future, body = item
                try:
                    future.set_result(self._ask(http, body))
                except Exception as error:  # whoever waits for the reply has to know of it
                    future.set_exception(error)

    def _ask(self, http: httpx.Client, body: bytes) -> Reply:
        """Sends a request until it is answered, hopeless, or sent `retries` times more."""
        for retries in range(self._how.retries + 1):
            if self._fault:
                raise ValueError(self._fault)
            try:
                reply = self._send(http, body)
                break
            except _Failed as failed:
                reply = Reply("", False, False, 0, 0, self._redacted(failed.reason))
                if not failed.passing or retries == self._how.retries:
                    break
                if self._closing.wait(retry_wait_s(retries, failed.retry_after, self._chance.random())):
                    break
                self._count(retries=1)
        self._count(
            requests=1,
            failures=int(not reply.answered),
            prompt_tokens=reply.prompt_tokens,
            completion_tokens=reply.completion_tokens,
        )
        return reply

    def _send(self, http: httpx.Client, body: bytes) -> Reply:
        """One attempt.

        Raises:
          _Failed: no answer.
          ValueError: the configuration is at fault.
        """
        late = _Failed(f"no answer within {self._how.seconds:g} s", passing=True)
        deadline = time.monotonic() + self._how.seconds
        content = bytearray()
        try:
            with http.stream("POST", self._url, content=body) as response:
                for piece in response.iter_bytes():
                    content += piece
                    # The client's own limit is on the silence between two pieces.
                    if time.monotonic() > deadline:
                        raise late
                    if len(content) > _MAX_BODY:
                        raise _Failed(f"an answer of more than {_MAX_BODY >> 20} MiB", passing=False)
        except httpx.TimeoutException:
            raise late from None
        except httpx.RequestError as error:
            raise _Failed(f"{type(error).__name__}: {error}", passing=True) from None
        status = response.status_code
        if response.is_success:
            return read_completion(bytes(content))
        if response.is_redirect or status in (401, 403, 404):
            # What a server says of a wrong key may hold parts of it.
            said = "" if status == 401 else f" ({self._redacted(_excerpt(content))})"
            key = f"the key in ${self._how.api_key_variable}" if self._how.api_key_variable else "no key"
            self._fault = (
                f"endpoint: HTTP {status}{said} from base_url {self._how.base_url!r} for model {self._how.model!r} with"
                f" {key}: correct base_url, model or api_key_variable"
            )
            raise ValueError(self._fault)
        passing = status in (408, 409, 425, 429) or status >= 500
        raise _Failed(f"HTTP {status}: {_excerpt(content)}", passing, response.headers.get("retry-after", ""))

    def _redacted(self, text: str) -> str:
        text = text.replace(self._key, "***") if self._key else text
        return text[:_MAX_EXCERPT]


class _Failed(Exception):
    """No answer to one attempt.

    Attributes:
      passing: another attempt may fare better.
      retry_after: the server's header of that name.
    """

    def __init__(self, reason: str, passing: bool, retry_after: str = ""):
        super().__init__(reason)
        self.reason, self.passing, self.retry_after = reason, passing, retry_after


def retry_wait_s(retries: int, retry_after: str, draw: float) -> float:
    """Seconds before another attempt: half a second, doubled by every retry, less up to a half by chance.

    Args:
      retries: how many there were.
      retry_after: the server's header, seconds or a date, which asks for at least that; a minute at most is granted.
      draw: uniform in [0, 1), so that requests which failed together do not come back together.
    """
    own = min(_FIRST_WAIT_S * 2.0 ** min(retries, 30), _LONGEST_WAIT_S) * (1 - draw / 2)
    asked = 0.0
    if re.fullmatch(r"\s*\d+(\.\d+)?\s*", retry_after, re.ASCII):
        asked = float(retry_after)
    elif retry_after:
        try:
            asked = email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (ValueError, OverflowError):
            asked = 0.0  # a header that says nothing asks for nothing
    return max(own, min(asked, _LONGEST_WAIT_S))


def read_completion(content: bytes) -> Reply:
    """The reply in the body of a successful response.

    An empty text is an answer only where the budget ended it (a model that was still thinking).

    Raises:
      _Failed: not a chat completion; another attempt may bring one.
    """
    try:
        completion = json.loads(content)
        choice = completion["choices"][0]
        text, ended = choice["message"].get("content"), choice.get("finish_reason")
        usage = completion.get("usage") or {}
        spent = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        if not isinstance(text, str | None):
            raise TypeError
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise _Failed(f"not a chat completion: {_excerpt(content)}", passing=True) from None
    # JSON can spell half a surrogate pair, which no file that we write can hold.
    text = (text or "").encode("utf-8", "replace").decode()
    tokens = [count if type(count) is int and count > 0 else 0 for count in spent]
    if text.strip() or ended == "length":
        return Reply(text, True, ended == "length", *tokens, "")
    return Reply("", False, False, *tokens, f"an empty answer, finish_reason {str(ended)[:40]!r}")


# Complete control strings of the chat templates in use: <|…|>, <|…>, <…|>, <｜…｜>, <s>, <end_of_turn>, [INST].
_CONTROL = re.compile(
    r"(?<=<)(?=\|[^|<>\s]{1,40}\|?>|[^|<>\s]{1,40}\|>|｜[^｜<>\s]{1,40}｜>|/?s>|(?:bos|eos|pad|(?:start|end)_of_turn)>)"
    r"|(?<=\[)(?=/?INST\])"
)


def _harmless(content: str) -> str:
    return _CONTROL.sub("\u200b", content)


def _read_address(base_url: str) -> str:
    try:
        url = httpx.URL(base_url)
        plain = url.scheme in ("http", "https") and bool(url.host) and (url.port or 0) < 1 << 16
        plain = plain and not re.search(r"[@?#\s]", base_url)
    except httpx.InvalidURL:
        plain = False
    if not plain:
        # Whatever stands before an @ or after a ? may be a secret.
        got = "one with a user, password, query or fragment" if re.search("[@?#]", base_url) else repr(base_url)
        raise ValueError(
            f"endpoint: base_url got {got}, expected only an address like 'https://host/v1'; put a key into the"
            " environment variable that api_key_variable names"
        )
    return str(url).rstrip("/")


def _read_key(variable: str) -> str:
    if not variable:
        return ""
    key = os.environ.get(variable, "").strip()
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        found = "holds no key: other characters than printable ASCII" if key else "is not set, or empty"
        raise ValueError(
            f"endpoint: the environment variable {variable}, named by api_key_variable, {found}; export it, or set"
            " api_key_variable to '' for an endpoint without keys"
        )
    return key


def _excerpt(content: bytes | bytearray) -> str:
    """What a server said of a failure, on one line."""
    try:
        said = json.loads(content)
    except (ValueError, RecursionError):
        said = None
    for name in ("error", "message"):
        said = said.get(name, said) if isinstance(said, Mapping) else said
    text = said if isinstance(said, str) else bytes(content[: 10 * _MAX_EXCERPT]).decode("utf-8", "replace")
    return " ".join("".join(c if c.isprintable() else " " for c in text).split()) or "no message"


# --- the judge -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ChatPrompt:
    """A chat whose last message has one hole for untrusted text.

    Attributes:
      opening: the messages before the last.
      head, suffix: the last message before and after the hole.
    """

    opening: tuple[Message, ...]
    head: str
    suffix: str

    def filled(self, text: str) -> list[Message]:
        """The chat when `text` fills the hole."""
        return [*self.opening, Message("user", f"{self.head}{text}{self.suffix}")]


def judge_prompt(problem: Problem, unit: Unit) -> ChatPrompt:
    """The judge's prompt for a problem, with a hole for the trace.

    Raises:
      ValueError: the problem has no reference.
    """
    reference = needed_reference(problem)
    messages = judge_messages(problem.problem, problem.choices, reference, problem.domain, unit, "text", _MARKER)
    return split_chat(messages, _MARKER)


@dataclasses.dataclass(frozen=True)
class EndpointJudge:
    """A judge behind an endpoint; scores and verdicts like those of the local judge, by the `text` read-out.

    Attributes:
      client: open for as long as the judge is at work.
      prompts: by problem id, of the problems that will be scored.
      group: rollouts of a problem (G).
      max_tokens: budget of an answer.
    """

    client: ChatClient
    prompts: Mapping[str, ChatPrompt]
    group: int
    max_tokens: int
    on_mesh: ClassVar[bool] = False

    def score(self, problems: Sequence[Problem], queries: Sequence[Sequence[Query]], segments: int) -> Judgements:
        """Scores every query against its problem's reference.

        A request that failed is a score that was not given, and is not in `text`; `cut` is what the server says; a
        trace beyond the server's context is a failure.  `tokens` are the server's counts of whole prompts and answers.

        Args:
          problems: this process's problems of a wave.
          queries: of each problem; any number.
          segments: N of the result.

        Raises:
          ValueError: more than the client's `max_missing` of the requests failed, or the server says that the
            configuration is at fault.
        """
        shape = (len(problems), self.group, segments)
        score, cut = np.zeros(shape), np.zeros(shape, bool)
        valid, asked, text, tokens = cut.copy(), cut.copy(), {}, 0
        places, requests = [], []
        for i, (problem, of_problem) in enumerate(zip(problems, queries, strict=True)):
            for query in of_problem:
                places.append((i, query.g, query.n))
                requests.append(self.prompts[problem.id].filled(query.trace))
        for at, reply in zip(places, self.client.ask(requests, self.max_tokens, "scores"), strict=True):
            asked[at], cut[at] = True, reply.cut
            tokens += reply.prompt_tokens + reply.completion_tokens
            if reply.answered:
                text[at] = reply.text
            if (digit := parse_score(reply.text)) is not None:
                score[at], valid[at] = normalise(digit), True
        return Judgements(score, valid, asked, cut, text, tokens)

    def verify(self, problems: Sequence[Problem], responses: Sequence[Sequence[str]]) -> list[list[Verdict]]:
        """Says of every response whether its final answer agrees with its problem's.

        Args:
          problems: this process's problems of a wave.
          responses: to each problem, any number; none to problems that have other verifiers.

        Returns:
          A verdict a response: `correct`, `wrong`, or `missing` where the request failed or the model did not say.

        Raises:
          ValueError: as `score`.
        """
        requests = []
        for problem, of_problem in zip(problems, responses, strict=True):
            if of_problem:
                prompt = split_chat(verify_messages(problem.problem, problem.answer, "text", _MARKER), _MARKER)
                requests += [prompt.filled(response) for response in of_problem]
        verdicts = iter([parse_verdict(reply.text) for reply in self.client.ask(requests, self.max_tokens, "verdicts")])
        return [[next(verdicts) for _ in of_problem] for of_problem in responses]

    def report(self) -> dict[str, float]:
        """What was asked of the endpoint so far in this process, and what it cost: `time/endpoint_requests` and so on."""
        return {f"time/endpoint_{name}": value for name, value in self.client.usage().items()}


def split_chat(messages: Sequence[Message], marker: str) -> ChatPrompt:
    """A chat with a hole where the marker stands in its last message, once."""
    *opening, last = messages
    head, suffix = last.content.split(marker)
    return ChatPrompt(tuple(opening), head, suffix)
