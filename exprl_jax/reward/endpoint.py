"""A client of an OpenAI-compatible chat-completions endpoint.

    submit ──► the client's own thread: an event loop, `concurrency` requests under way at a time ──► result
               one request: attempt, wait, attempt, ...   at most (retries + 1) · seconds in all

A request that fails is a missing reply, never an exception, unless the server says that the configuration is at fault.
Requests that may fare better are sent again.  The key is read from the environment and never written anywhere.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import email.utils
import ipaddress
import json
import math
import os
import random
import re
import threading
import time
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import httpx

from exprl_jax import config
from exprl_jax.data.tokenizer import Message
from exprl_jax.hosts import sum_over_processes

GREEDY: Mapping[str, float] = {"temperature": 0}

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 60.0
_LEAVE_S = 0.5
_CHECK_S = 1.0
_MAX_BODY = 16 << 20
_MAX_EXCERPT = 200
_MAX_COUNT = 1 << 53  # the largest that a metric holds exactly
# The most that OpenAI, Azure and vLLM give; a server that gives fewer is told so by `extra_body`.
_TOP_LOGPROBS = 20
_USAGE = ("requests", "retries", "failures", "prompt_tokens", "completion_tokens")


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


class PendingReplies:
    """Replies that are on their way."""

    def __init__(self, client: ChatClient, future: concurrent.futures.Future[list[Reply]], asked: int, wanted: str):
        self._client, self._future, self._asked, self._wanted = client, future, asked, wanted

    def result(self) -> list[Reply]:
        """Waits for every reply; replies in row order.

        Every process of a run must make the same calls in the same order: all of them raise if one of them does.

        Raises:
          ValueError: more than `max_missing` of all processes' requests failed, or the server says that the
            configuration is at fault; then at once, whatever else is on its way.
          RuntimeError: the client was closed, or its thread ended, before the replies were there.
        """
        fault, replies = "", []
        try:
            replies = self._client.wait(self._future)
        except ValueError as error:
            fault = str(error)
        reasons = [reply.failure for reply in replies if not reply.answered]
        faults, failures, asked = sum_over_processes([bool(fault), len(reasons), self._asked])
        if faults:
            raise ValueError(fault or "endpoint: another process was refused by its endpoint; its own message says why")
        if failures > self._client.max_missing * asked:
            last = reasons[-1] if reasons else "on another process"
            raise ValueError(
                f"endpoint: {failures} of {asked} {self._wanted} are missing because their requests failed, more"
                f" than the fraction max_missing = {self._client.max_missing:g}; the last failure: {last}"
            )
        return replies


class ChatClient:
    """A thread that asks a chat-completions endpoint; use as a context manager.

    The thread is a daemon: a request that is on its way keeps neither `close` nor the process waiting.  When the thread
    ends, for whatever reason, everything that is on its way is cancelled, and whoever waits for it is told.
    """

    def __init__(self, endpoint: config.Endpoint):
        """Starts the thread; sends nothing.

        Raises:
          ValueError: the key is not in the environment or cannot be one, the address holds more than an address, or an
            environment variable names a proxy or certificates that cannot be used.
        """
        self._endpoint = endpoint
        address = _read_address(endpoint.base_url)
        self._url = f"{str(address).rstrip('/')}/chat/completions"
        self._key = _read_key(endpoint.api_key_variable)
        self._extra: dict[str, Any] = json.loads(endpoint.extra_body)
        self._http = _open_http(address, self._key)
        self._slots = asyncio.Semaphore(endpoint.concurrency)
        self._closing = asyncio.Event()
        self._fault = ""
        self._usage = collections.Counter(dict.fromkeys(_USAGE, 0))
        self._seconds_waited = 0.0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="endpoint", daemon=True)
        self._thread.start()

    def __enter__(self) -> ChatClient:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def max_missing(self) -> float:
        """The largest fraction of a batch that may fail."""
        return self._endpoint.max_missing

    def submit(
        self,
        requests: Sequence[Sequence[Message]],
        max_tokens: int,
        wanted: str,
        *,
        sampling: Mapping[str, float] = GREEDY,
        digits: bool = False,
    ) -> PendingReplies:
        """Begins to ask and returns at once.

        The server puts contents into its chat template as it likes, so control strings in them (`<|im_end|>`) are
        broken by a zero-width space first: a graded text must not be able to end its turn.

        Args:
          requests: a chat each.
          max_tokens: budget of an answer.
          wanted: what replies are called in an error.
          sampling: `temperature`, and above 0 a `seed`, which servers may heed or not.
          digits: whether `probability_5` is wanted; `max_tokens` is 1 then.

        Raises:
          ValueError: the client is closed.
        """
        if not self._thread.is_alive():
            raise ValueError("endpoint: got requests for a client that is closed; submit them inside its context")
        shared = {"model": self._endpoint.model, self._endpoint.budget_key: max_tokens, **sampling}
        if digits:
            shared |= {"logprobs": True, "top_logprobs": _TOP_LOGPROBS}
        shared = {name: value for name, value in (shared | self._extra).items() if value is not None}
        bodies = [
            json.dumps(shared | {"messages": [{"role": role, "content": _harmless(text)} for role, text in messages]})
            for messages in requests
        ]
        future = asyncio.run_coroutine_threadsafe(self._ask_all([body.encode() for body in bodies], digits), self._loop)
        return PendingReplies(self, future, len(requests), wanted)

    def wait(self, future: concurrent.futures.Future[list[Reply]]) -> list[Reply]:
        """A future's result; the wait ends with the thread that works at it."""
        begun = time.monotonic()
        try:
            while not concurrent.futures.wait([future], timeout=_CHECK_S).done:
                if not self._thread.is_alive():
                    raise concurrent.futures.CancelledError
            return future.result()
        except concurrent.futures.CancelledError:
            raise RuntimeError("endpoint: the client was closed, or its thread ended, before all replied") from None
        finally:
            self._seconds_waited += time.monotonic() - begun

    def usage(self) -> dict[str, float]:
        """What was spent so far.

        Returns:
          requests: chats that got a reply or failed for good; retries: further attempts at them; failures: those of
          them without an answer; prompt_tokens, completion_tokens: as the server counts them; seconds_waited: spent
          in `PendingReplies.result`.
        """
        return {**self._usage, "seconds_waited": self._seconds_waited}

    def close(self) -> None:
        """Drops all requests, those that are under way too."""
        with contextlib.suppress(RuntimeError):  # of a loop that has ended by itself
            self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join(_LEAVE_S)

    def _serve(self) -> None:
        # The runner cancels what is left when it ends, also when an error ends it.
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._until_closed())

    async def _until_closed(self) -> None:
        async with self._http:
            try:
                await self._closing.wait()
            finally:
                left = asyncio.all_tasks() - {asyncio.current_task()}
                for task in left:
                    task.cancel()
                await asyncio.gather(*left, return_exceptions=True)

    async def _ask_all(self, bodies: Sequence[bytes], digits: bool) -> list[Reply]:
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._ask(body, digits)) for body in bodies]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _ask(self, body: bytes, digits: bool) -> Reply:
        async with self._slots:
            reply = await self._attempts(body, digits)
        # Redacted before it is cut: half a key is still a secret.
        failure = self._redacted(reply.failure)[:_MAX_EXCERPT]
        reply = reply._replace(text=self._redacted(reply.text), failure=failure)
        self._usage.update(
            requests=1,
            failures=int(not reply.answered),
            prompt_tokens=reply.prompt_tokens,
            completion_tokens=reply.completion_tokens,
        )
        return reply

    async def _attempts(self, body: bytes, digits: bool) -> Reply:
        """Sends a request until it is answered, hopeless, sent `retries` times more, or out of time."""
        limit_s, most = self._endpoint.seconds, self._endpoint.retries
        deadline = self._loop.time() + (most + 1) * limit_s
        retries = 0
        while True:
            if self._fault:
                raise ValueError(self._fault)
            try:
                async with asyncio.timeout_at(min(self._loop.time() + limit_s, deadline)):
                    return read_completion(await self._send(body), digits)
            except TimeoutError:
                failed = _Failed(f"no answer within {limit_s:g} s", passing=True)
            except _Failed as error:
                failed = error
            wait_s = retry_wait_s(retries, failed.retry_after_s, random.random())
            if not failed.passing or retries == most or self._loop.time() + wait_s >= deadline:
                return Reply("", False, False, 0, 0, failed.reason)
            await asyncio.sleep(wait_s)
            retries += 1
            self._usage.update(retries=1)

    async def _send(self, body: bytes) -> bytes:
        """One attempt: the body of a successful response.

        Raises:
          _Failed: no answer.
          ValueError: the configuration is at fault.
        """
        content = bytearray()
        try:
            async with self._http.stream("POST", self._url, content=body) as response:
                async for piece in response.aiter_bytes():
                    content += piece
                    if len(content) > _MAX_BODY:
                        raise _Failed(f"an answer of more than {_MAX_BODY >> 20} MiB", passing=False)
        except httpx.RequestError as error:
            raise _Failed(f"{type(error).__name__}: {error}", passing=True) from None
        if response.is_success:
            return bytes(content)
        status, error = response.status_code, _read_error(bytes(content))
        refused = status == 400 and error.code in ("unsupported_parameter", "unsupported_value")
        if response.is_redirect or status in (401, 403, 404) or refused:
            # What a server says of a wrong key may hold parts of it.
            message = "" if status == 401 else f" ({self._redacted(error.message)[:_MAX_EXCERPT]})"
            variable = self._endpoint.api_key_variable
            key = f"the key in ${variable}" if variable else "no key"
            cure = "budget_key or extra_body" if refused else "base_url, model or api_key_variable"
            self._fault = (
                f"endpoint: HTTP {status}{message} from base_url {self._endpoint.base_url!r} for model"
                f" {self._endpoint.model!r} with {key}: correct {cure}"
            )
            raise ValueError(self._fault)
        passing = status in (408, 409, 425, 429) or status >= 500
        raise _Failed(f"HTTP {status}: {error.message}", passing, retry_after_s=asked_wait_s(response.headers))

    def _redacted(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


class _Failed(Exception):
    """No answer to one attempt.

    Attributes:
      passing: another attempt may fare better.
      retry_after_s: how long the server asks to wait before it.
    """

    def __init__(self, reason: str, passing: bool, retry_after_s: float = 0.0):
        super().__init__(reason)
        self.reason, self.passing, self.retry_after_s = reason, passing, retry_after_s


# --- waiting ---------------------------------------------------------------------------------------------------------


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


# --- reading ---------------------------------------------------------------------------------------------------------


def read_completion(content: bytes, digits: bool = False) -> Reply:
    """The reply in the body of a successful response.

    A thought that the server keeps apart (`reasoning_content`, `reasoning`, parts of type `thinking`) is no part of the
    text.  An empty text is an answer only where the budget ended it (a model that was still thinking).

    Args:
      digits: whether `probability_5` was asked for.

    Raises:
      _Failed: not a chat completion, and another attempt may bring one; or one without the log-probabilities that were
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
        raise _Failed(f"not a chat completion: {_read_error(content).message}", passing=True) from None
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
        raise _Failed(
            "no log-probabilities in the answer: this server or model gives none; set the read-out to 'text'",
            passing=False,
        ) from None
    total = sum(mass_5)
    return tuple(mass / total for mass in mass_5) if total >= 0.5 else None


class _Error(NamedTuple):
    """What a server said of a failure: its message on one line, and its code."""

    message: str
    code: Any


def _read_error(content: bytes) -> _Error:
    try:
        error = json.loads(content)
    except (ValueError, RecursionError):
        error = None
    if isinstance(error, Mapping):
        error = error.get("error", error)
    code = error.get("code") if isinstance(error, Mapping) else None
    message = error.get("message") if isinstance(error, Mapping) else error
    if not isinstance(message, str):
        message = content[: 10 * _MAX_EXCERPT].decode("utf-8", "replace")
    printable = "".join(c if c.isprintable() else " " for c in message)
    return _Error(" ".join(printable.split()) or "no message", code)


# Complete control strings of the chat templates in use: <|…|>, <|…>, <…|>, <｜…｜>, <s>, <end_of_turn>, [INST].
_CONTROL = re.compile(
    r"(?<=<)(?=\|[^|<>\s]{1,40}\|?>|[^|<>\s]{1,40}\|>|｜[^｜<>\s]{1,40}｜>|/?s>|(?:bos|eos|pad|(?:start|end)_of_turn)>)"
    r"|(?<=\[)(?=/?INST\])"
)


def _harmless(content: str) -> str:
    return _CONTROL.sub("\u200b", content)


# --- opening ---------------------------------------------------------------------------------------------------------


def _read_address(base_url: str) -> httpx.URL:
    try:
        url = httpx.URL(base_url)
        plain = url.scheme in ("http", "https") and bool(url.host) and (url.port or 0) < 1 << 16
        plain = plain and not re.search(r"[@?#\s]", base_url)
    except (httpx.InvalidURL, ValueError):
        plain = False
    if not plain:
        # Whatever stands before an @ or after a ? may be a secret.
        got = "one with a user, password, query or fragment" if re.search("[@?#]", base_url) else repr(base_url)
        raise ValueError(
            f"endpoint: base_url got {got}, expected only an address like 'https://host/v1'; put a key into the"
            " environment variable that api_key_variable names"
        )
    return url


def _read_key(variable: str) -> str:
    if not variable:
        return ""
    key = os.environ.get(variable, "").strip()
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        fault = "holds no key: other characters than printable ASCII" if key else "is not set, or empty"
        raise ValueError(
            f"endpoint: the environment variable {variable}, named by api_key_variable, {fault}; export it, or set"
            " api_key_variable to '' for an endpoint without keys"
        )
    return key


def _open_http(address: httpx.URL, key: str) -> httpx.AsyncClient:
    """An HTTP client that sends to one address, through the proxy that the environment names for it, if any.

    httpx itself refuses all proxy variables for one entry of NO_PROXY that it cannot read.

    Raises:
      ValueError: what an environment variable names cannot be used.
    """
    try:
        tls = httpx.create_ssl_context()
    except OSError as error:  # of which ssl's errors are
        names = [name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE") if os.environ.get(name)]
        raise ValueError(
            f"endpoint: the environment variable {' or '.join(names)} names no usable file: {error}"
        ) from None
    proxies = urllib.request.getproxies_environment()
    scheme = next((scheme for scheme in (address.scheme, "all") if proxies.get(scheme)), "")
    if bypasses(proxies.get("no", ""), address.host, address.port):
        scheme = ""
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    try:
        proxy = httpx.Proxy(re.sub(r"^(?!\w+://)", "http://", proxies[scheme])) if scheme else None
        if proxy and not proxy.url.host:
            raise ValueError
        # Time and number of requests are limited where they are sent.
        limits = httpx.Limits(max_connections=None)
        return httpx.AsyncClient(verify=tls, headers=headers, proxy=proxy, trust_env=False, timeout=None, limits=limits)
    except ImportError:
        fault = "a SOCKS proxy, which needs `pip install socksio`"
    except (httpx.InvalidURL, ValueError):
        fault = "what is no proxy's address like 'http://host:3128'"
    # In lower case where it is there in both, as they are read.
    variable = max(name for name, value in os.environ.items() if value and name.lower() == f"{scheme}_proxy")
    # Its value may hold a password.
    raise ValueError(
        f"endpoint: the environment variable {variable} names {fault}; correct or unset it, or add {address.host!r} to"
        " NO_PROXY"
    )


def bypasses(no_proxy: str, host: str, port: int | None) -> bool:
    """Whether an entry of NO_PROXY means a host: `*`, a domain, or an address or a range with or without brackets.

    An entry with a port means that port alone; an entry that is none of these means nothing.
    """
    for entry in no_proxy.lower().split(","):
        name = re.sub(r"^\w+://", "", entry.strip())
        if parts := re.fullmatch(r"(\[[^\]]*\]|[^:]*):(\d+)", name):
            if int(parts[2]) != port:
                continue
            name = parts[1]
        name = re.sub(r"[\[\]]", "", name)
        try:
            if ipaddress.ip_address(host) in ipaddress.ip_network(name, strict=False):
                return True
        except ValueError:
            domain = name.lstrip("*").lstrip(".")
            if name == "*" or (domain and f".{host.lower()}".endswith(f".{domain}")):
                return True
    return False
