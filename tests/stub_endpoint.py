"""A chat-completions server on this machine that speaks the real protocol over HTTP and fails as it is told to.

It answers in one of three dialects, by its makers' references: `openai`, `vllm` (0.10) and `azure`.
"""

from __future__ import annotations

import dataclasses
import http.server
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

Dialect = Literal["openai", "vllm", "azure"]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the stub does with one request.

    Attributes:
      text: choices[0].message.content; None for null.
      finish_reason: as the server gives it.
      thought: what a server of `vllm`'s dialect keeps apart as reasoning_content.
      first: log-probability of each token with which the text could begin; of these, no more are given than asked for.
      status: other than 200 sends an error body.
      after_s: the answer is held back for so long, or until the stub closes.
      trickle_s: time between two bytes of the body.
      reset: the connection is reset in place of an answer.
      body: sent as it is in place of a completion or an error.
    """

    text: str | None = "Fine.\nScore: 4"
    finish_reason: str = "stop"
    thought: str | None = None
    first: Mapping[str, float] | None = None
    status: int = 200
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    after_s: float = 0.0
    trickle_s: float = 0.0
    reset: bool = False
    body: bytes | None = None


@dataclasses.dataclass(frozen=True)
class Seen:
    """A request as it came in: decoded body, headers (names in lower case) and the time (monotonic)."""

    body: Mapping[str, Any]
    headers: Mapping[str, str]
    at: float

    @property
    def content(self) -> str:
        return self.body["messages"][-1]["content"]


class StubEndpoint:
    """Use as a context manager.

    Attributes:
      seen: every request, in the order of arrival.
      most_at_once: requests that were in work together.
    """

    def __init__(
        self, answer: Callable[[Seen, int], Answer], dialect: Dialect = "openai", refused: Collection[str] = ()
    ):
        """Starts nothing yet.

        Args:
          answer: gets a request and how often the same one came before.
          refused: keys of a request that the model does not take.
        """
        self._answer = answer
        self.dialect, self.refused = dialect, refused
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._now = 0
        self.seen: list[Seen] = []
        self.most_at_once = 0
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> StubEndpoint:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def take(self, seen: Seen) -> Answer:
        """What to do with a request, after it was held back."""
        with self._lock:
            before = sum(seen.body == earlier.body for earlier in self.seen)
            self.seen.append(seen)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        answer = self._answer(seen, before)
        self._closing.wait(answer.after_s)
        with self._lock:
            self._now -= 1
        return answer

    def pause(self, seconds: float) -> None:
        self._closing.wait(seconds)


def completion(request: Mapping[str, Any], answer: Answer, dialect: Dialect) -> dict[str, Any]:
    """A chat completion; a word is a token."""
    read = sum(len(message["content"].split()) for message in request["messages"])
    written = len((answer.text or "").split())
    message = {"role": "assistant", "content": answer.text}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish_reason}
    if request.get("logprobs") and answer.first is not None:
        listed = sorted(answer.first.items(), key=lambda item: -item[1])[: request["top_logprobs"]]
        tokens = [{"token": t, "logprob": p, "bytes": list(t.encode())} for t, p in listed]
        choice["logprobs"] = {"content": [tokens[0] | {"top_logprobs": tokens}] if tokens else []}
    whole = {
        "id": "chatcmpl-stub",
        "object": "chat.completion",
        "created": 0,
        "model": request["model"],
        "choices": [choice],
        "usage": {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written},
    }
    if dialect == "vllm":
        message |= {"reasoning_content": answer.thought, "tool_calls": []}
        choice["stop_reason"] = None
        whole |= {"prompt_logprobs": None, "kv_transfer_params": None}
        whole["usage"]["prompt_tokens_details"] = None
    else:
        message |= {"refusal": None, "annotations": []}
        whole |= {"system_fingerprint": "fp_stub"}
        whole["usage"]["completion_tokens_details"] = {"reasoning_tokens": 0}
    if dialect == "azure":
        unharmed = {"hate": {"filtered": False, "severity": "safe"}}
        choice["content_filter_results"] = unharmed
        whole["prompt_filter_results"] = [{"prompt_index": 0, "content_filter_results": unharmed}]
    return whole


def failure(status: int, dialect: Dialect, **about: Any) -> dict[str, Any]:
    """The body of an error."""
    error = {"message": f"stub says {status}", "type": "invalid_request_error", "param": None, "code": None} | about
    if dialect == "vllm":
        return {
            "object": "error",
            "message": error["message"],
            "type": "BadRequestError",
            "param": None,
            "code": status,
        }
    if dialect == "azure":
        error |= {"status": status, "innererror": {"code": "StubError"}}
    return {"error": error}


def well_formed(request: Mapping[str, Any]) -> bool:
    """Whether a real server would take a request."""
    budget = [request[name] for name in ("max_tokens", "max_completion_tokens") if name in request]
    return (
        isinstance(request.get("model"), str)
        and len(budget) == 1
        and type(budget[0]) is int
        and 0 <= request.get("temperature", 1) <= 2
        and 0 <= request.get("top_logprobs", 0) <= (20 if request.get("logprobs") else 0)
        and bool(request.get("messages"))
        and all(set(m) == {"role", "content"} and isinstance(m["content"], str) for m in request["messages"])
        and all(m["role"] in ("system", "user", "assistant") for m in request["messages"])
    )


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def handle_error(self, request, client_address):
        """Clients that went away are what some tests are about."""


def _handler(stub: StubEndpoint) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            # A proxy is given the whole address.
            if not self.path.endswith("/v1/chat/completions") or not well_formed(body):
                self.send(Answer(status=404 if well_formed(body) else 400), body)
                return
            headers = {name.lower(): value for name, value in self.headers.items()}
            if refused := [name for name in stub.refused if name in body]:
                about = {"message": f"Unsupported parameter: {refused[0]!r}", "param": refused[0]}
                error = failure(400, stub.dialect, code="unsupported_parameter", **about)
                self.send(Answer(status=400, body=json.dumps(error).encode()), body)
                return
            answer = stub.take(Seen(body, headers, time.monotonic()))
            if answer.reset:
                # Linger for no time: the peer gets a reset in place of an orderly end.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                self.close_connection = True
            else:
                self.send(answer, body)

        def send(self, answer, request):
            body = answer.body
            if body is None and answer.status == 200:
                body = json.dumps(completion(request, answer, stub.dialect)).encode()
            elif body is None:
                body = json.dumps(failure(answer.status, stub.dialect)).encode()
            self.send_response(answer.status)
            for name, value in {"content-type": "application/json", **answer.headers}.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            if not answer.trickle_s:
                self.wfile.write(body)
                return
            for byte in body:
                self.wfile.write(bytes([byte]))
                stub.pause(answer.trickle_s)

        def log_message(self, *_):
            """Nothing: pytest's output is not a server's log."""

    return Handler
