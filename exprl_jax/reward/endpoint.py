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
import json
import random
import re
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from exprl_jax import config
from exprl_jax.data.tokenizer import Message
from exprl_jax.hosts import sum_over_processes
from exprl_jax.reward.endpoint_connection import open_http, read_address, read_key
from exprl_jax.reward.endpoint_replies import (
    MAX_EXCERPT,
    Failed,
    Reply,
    asked_wait_s,
    read_completion,
    read_error,
    retry_wait_s,
)

GREEDY: Mapping[str, float] = {"temperature": 0}

_LEAVE_S = 0.5
_CHECK_S = 1.0
_MAX_BODY = 16 << 20
# The most that OpenAI, Azure and vLLM give; a server that gives fewer is told so by `extra_body`.
_TOP_LOGPROBS = 20
_USAGE = ("requests", "retries", "failures", "prompt_tokens", "completion_tokens")


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
        address = read_address(endpoint.base_url)
        self._url = f"{str(address).rstrip('/')}/chat/completions"
        self._key = read_key(endpoint.api_key_variable)
        self._extra: dict[str, Any] = json.loads(endpoint.extra_body)
        self._http = open_http(address, self._key)
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
        failure = self._redacted(reply.failure)[:MAX_EXCERPT]
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
                failed = Failed(f"no answer within {limit_s:g} s", passing=True)
            except Failed as error:
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
          Failed: no answer.
          ValueError: the configuration is at fault.
        """
        content = bytearray()
        try:
            async with self._http.stream("POST", self._url, content=body) as response:
                async for piece in response.aiter_bytes():
                    content += piece
                    if len(content) > _MAX_BODY:
                        raise Failed(f"an answer of more than {_MAX_BODY >> 20} MiB", passing=False)
        except httpx.RequestError as error:
            raise Failed(f"{type(error).__name__}: {error}", passing=True) from None
        if response.is_success:
            return bytes(content)
        status, error = response.status_code, read_error(bytes(content))
        refused = status == 400 and error.code in ("unsupported_parameter", "unsupported_value")
        if response.is_redirect or status in (401, 403, 404) or refused:
            # What a server says of a wrong key may hold parts of it.
            message = "" if status == 401 else f" ({self._redacted(error.message)[:MAX_EXCERPT]})"
            variable = self._endpoint.api_key_variable
            key = f"the key in ${variable}" if variable else "no key"
            cure = "budget_key or extra_body" if refused else "base_url, model or api_key_variable"
            self._fault = (
                f"endpoint: HTTP {status}{message} from base_url {self._endpoint.base_url!r} for model"
                f" {self._endpoint.model!r} with {key}: correct {cure}"
            )
            raise ValueError(self._fault)
        passing = status in (408, 409, 425, 429) or status >= 500
        raise Failed(f"HTTP {status}: {error.message}", passing, retry_after_s=asked_wait_s(response.headers))

    def _redacted(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


# Complete control strings of the chat templates in use: <|…|>, <|…>, <…|>, <｜…｜>, <s>, <end_of_turn>, [INST].
_CONTROL = re.compile(
    r"(?<=<)(?=\|[^|<>\s]{1,40}\|?>|[^|<>\s]{1,40}\|>|｜[^｜<>\s]{1,40}｜>|/?s>|(?:bos|eos|pad|(?:start|end)_of_turn)>)"
    r"|(?<=\[)(?=/?INST\])"
)


def _harmless(content: str) -> str:
    return _CONTROL.sub("\u200b", content)
