"""The endpoint client and judge against a server on this machine: order, retries, faults, and what must never leak."""

from __future__ import annotations

import concurrent.futures
import contextlib
import email.utils
import json
import logging
import math
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stub_endpoint import Answer, StubEndpoint

from exprl_jax import config
from exprl_jax.data.tokenizer import Message
from exprl_jax.reward import endpoint, endpoint_replies
from exprl_jax.reward.endpoint import ChatClient
from exprl_jax.reward.endpoint_connection import bypasses
from exprl_jax.reward.endpoint_replies import Failed, asked_wait_s, read_completion, retry_wait_s

KEY = "sk-Zq81.never/write+me"
ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 60.0  # far more than a loaded machine needs; no test waits for it


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Back-off in milliseconds, a key, and no proxy between a test and its server."""
    monkeypatch.setattr(endpoint_replies, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setenv("STUB_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def endpoint_config(base_url, **changes):
    settings = dict(
        model="m",
        api_key_variable="STUB_KEY",
        concurrency=4,
        seconds=PATIENCE,
        retries=2,
        max_missing=1.0,
        budget_key="max_tokens",
        extra_body="{}",
    )
    return config.Endpoint(base_url=base_url, **(settings | changes))


@contextlib.contextmanager
def talking(answer, dialect="openai", refused=(), **changes):
    with (
        StubEndpoint(answer, dialect, refused) as stub,
        ChatClient(endpoint_config(stub.base_url, **changes)) as client,
    ):
        yield stub, client


def submit(client, *contents, max_tokens=9, **options):
    chats = [[Message("system", "s"), Message("user", content)] for content in contents]
    return client.submit(chats, max_tokens, "replies", **options)


def ask(client, *contents, **options):
    return submit(client, *contents, **options).result()


def first_then(*failures):
    """Each of the failures once, then an answer that names the request."""
    return lambda seen, before: failures[before] if before < len(failures) else Answer(f"to {seen.content}")


# --- what is sent and what comes back --------------------------------------------------------------------------------


def test_a_request_is_what_the_protocol_asks_for():
    with talking(first_then()) as (stub, client):
        (reply,) = ask(client, "Wie spät? ⌛", max_tokens=77)
    (seen,) = stub.seen
    assert seen.body == {
        "model": "m",
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "Wie spät? ⌛"}],
        "max_tokens": 77,
        "temperature": 0,
    }
    assert seen.headers["authorization"] == f"Bearer {KEY}" and seen.headers["content-type"] == "application/json"
    assert reply == ("to Wie spät? ⌛", True, False, 4, 4, "", None)
    assert client.usage() | {"seconds_waited": 0} == {
        "requests": 1,
        "retries": 0,
        "failures": 0,
        "prompt_tokens": 4,
        "completion_tokens": 4,
        "seconds_waited": 0,
    }
    assert client.usage()["seconds_waited"] > 0


def test_without_a_key_variable_no_key_is_sent():
    with talking(first_then(), api_key_variable="") as (stub, client):
        assert ask(client, "a")[0].answered
    assert "authorization" not in stub.seen[0].headers


def test_what_a_server_wants_otherwise_is_a_matter_of_the_config():
    extra = {
        "temperature": None,
        "chat_template_kwargs": {"enable_thinking": False},
        "reasoning_effort": "low",
        "seed": 3,
        "nothing": None,
    }
    changes = {"budget_key": "max_completion_tokens", "extra_body": json.dumps(extra)}
    with talking(first_then(), refused=("max_tokens", "temperature"), **changes) as (stub, client):
        assert ask(client, "a", sampling={"temperature": 0.7, "seed": 5})[0].text == "to a"
    body = dict(stub.seen[0].body)
    assert body.pop("messages")[-1]["content"] == "a"
    assert body == {
        "model": "m",
        "max_completion_tokens": 9,
        "chat_template_kwargs": {"enable_thinking": False},
        "reasoning_effort": "low",
        "seed": 3,
    }


@pytest.mark.parametrize("dialect", ["openai", "azure"])
@pytest.mark.parametrize("refused", ["max_tokens", "temperature"])
def test_a_key_that_the_model_does_not_take_is_the_configurations_fault(dialect, refused):
    with talking(first_then(), dialect, (refused,)) as (stub, client):
        with pytest.raises(ValueError, match=f"HTTP 400 .*{refused}.*: correct budget_key or extra_body"):
            ask(client, *map(str, range(20)))
    assert not stub.seen


def test_the_same_words_from_a_server_without_codes_are_a_missing_reply():
    with talking(first_then(), "vllm", ("temperature",)) as (_, client):
        assert ask(client, "a")[0].failure == "HTTP 400: Unsupported parameter: 'temperature'"


@pytest.mark.parametrize("dialect", ["openai", "vllm", "azure"])
def test_every_dialect_is_understood(dialect):
    answers = {
        "thinks": Answer("Score: 4", thought="Score: 2, or"),
        "cut": Answer(None, "length", thought="Score: 2, or"),
        "mute": Answer(None, "stop", thought="Score: 2"),
        "filtered": Answer("", "content_filter"),
        "long": Answer(status=400),
        "busy": Answer(status=429, headers={"retry-after-ms": "10", "retry-after": "1"}),
    }
    with talking(lambda seen, before: answers[seen.content], dialect, retries=1) as (_, client):
        replies = dict(zip(answers, ask(client, *answers), strict=True))
    assert replies["thinks"][:3] == ("Score: 4", True, False) and replies["thinks"].completion_tokens == 2
    assert replies["cut"][:3] == ("", True, True)
    assert replies["mute"].failure == "an empty answer, finish_reason 'stop'" and not replies["mute"].answered
    assert replies["filtered"].failure == "an empty answer, finish_reason 'content_filter'"
    assert replies["long"].failure == "HTTP 400: stub says 400" and replies["busy"].failure == "HTTP 429: stub says 429"


def test_as_many_requests_as_allowed_are_under_way_and_no_more():
    together = threading.Barrier(5)  # nobody is answered before five are there

    def answer(seen, before):
        together.wait(PATIENCE)
        return Answer(after_s=0.02)

    with talking(answer, concurrency=5) as (stub, client):
        assert all(reply.answered for reply in ask(client, *map(str, range(20))))
    assert stub.most_at_once == 5 and len(stub.seen) == 20


def test_replies_are_in_row_order():
    def answer(seen, before):
        i = int(seen.content)
        return Answer(f"to {i}", status=429 if i % 7 == 0 and not before else 200, after_s=(13 * i % 10) / 200)

    with talking(answer, concurrency=5) as (stub, client):
        replies, more = submit(client, *map(str, range(40))), submit(client, *map(str, range(40, 50)))
        assert [reply.text for reply in more.result()] == [f"to {i}" for i in range(40, 50)]
        assert [reply.text for reply in replies.result()] == [f"to {i}" for i in range(40)]
    assert len(stub.seen) == 50 + 8
    assert (client.usage()["requests"], client.usage()["retries"], client.usage()["failures"]) == (50, 8, 0)


def test_a_closed_client_takes_no_requests():
    with talking(first_then()) as (_, client):
        pass
    with pytest.raises(ValueError, match="client that is closed"):
        ask(client, "late")


def test_no_requests_are_no_replies():
    with talking(first_then()) as (stub, client):
        assert ask(client) == [] and not stub.seen


def test_an_answer_cut_by_its_budget_says_so():
    texts = {"half": "a thought that", "thinking": ""}
    with talking(lambda seen, before: Answer(texts[seen.content], "length")) as (_, client):
        half, thinking = ask(client, *texts)
    assert half[:3] == ("a thought that", True, True) and thinking[:3] == ("", True, True)
    assert client.usage()["failures"] == 0


@pytest.mark.parametrize("text", ["", None, " \n"])
def test_an_empty_answer_is_none(text):
    with talking(lambda seen, before: Answer(text, "content_filter")) as (stub, client):
        (reply,) = ask(client, "a")
    assert reply[:3] == ("", False, False) and reply.prompt_tokens == 2
    assert reply.failure == "an empty answer, finish_reason 'content_filter'" and len(stub.seen) == 1
    assert (client.usage()["failures"], client.usage()["prompt_tokens"]) == (1, 2)


# --- what is tried again ---------------------------------------------------------------------------------------------

MALFORMED = [b"", b"{", b"[]", b"null", b'{"choices": []}', b'{"choices": [{"message": {"content": 4}}]}', b"[" * 90000]
PASSING = [
    *(Answer(status=status) for status in (408, 409, 425, 429, 500, 502, 503, 529)),
    Answer(reset=True),
    *(Answer(body=body) for body in MALFORMED),
]


@pytest.mark.parametrize("failure", PASSING, ids=lambda failure: str(failure.status))
def test_what_may_pass_is_tried_again(failure):
    with talking(first_then(failure, failure)) as (stub, client):
        (reply,) = ask(client, "a")
        assert reply.text == "to a" and reply.failure == ""
        assert len(stub.seen) == 3 and client.usage()["retries"] == 2 and client.usage()["failures"] == 0


@pytest.mark.parametrize("failure", PASSING, ids=lambda failure: str(failure.status))
def test_a_request_that_fails_every_time_is_a_missing_reply(failure):
    with talking(lambda seen, before: failure if seen.content == "a" else Answer("fine")) as (stub, client):
        missing, other = ask(client, "a", "b")
    assert missing[:5] == ("", False, False, 0, 0) and missing.failure and "\n" not in missing.failure
    assert other.text == "fine"
    assert len(stub.seen) == 4  # three times and the other one
    assert {name: client.usage()[name] for name in ("requests", "retries", "failures")} == {
        "requests": 2,
        "retries": 2,
        "failures": 1,
    }


def test_failures_are_told_apart_by_their_reasons():
    failures = {
        "status": (Answer(status=503), "HTTP 503: stub says 503"),
        "reset": (Answer(reset=True), "ReadError: "),
        "body": (Answer(body=b"<html>\n busy\x07</html>"), "not a chat completion: <html> busy </html>"),
        "plain": (Answer(status=500, body=b""), "HTTP 500: no message"),
        "detail": (Answer(status=400, body=b'{"message": "too long"}'), "HTTP 400: too long"),
    }
    with talking(lambda seen, before: failures[seen.content][0], retries=0) as (_, client):
        for reply, (_, reason) in zip(ask(client, *failures), failures.values(), strict=True):
            assert reply.failure.startswith(reason), reply


def test_a_slow_answer_is_given_up_and_tried_again():
    slow = Answer(after_s=PATIENCE)
    with talking(first_then(slow), seconds=0.5) as (stub, client):
        assert ask(client, "a")[0].text == "to a" and client.usage()["retries"] > 0
    with talking(lambda seen, before: slow, seconds=0.3, retries=1) as (_, client):
        assert ask(client, "a")[0].failure == "no answer within 0.3 s" and client.usage()["retries"] == 1


def test_an_answer_that_trickles_is_given_up_too():
    """No silence is ever as long as the limit, and the whole would take minutes."""
    with talking(lambda seen, before: Answer("x" * 1000, trickle_s=0.2), seconds=0.6, retries=0) as (_, client):
        assert ask(client, "a")[0].failure == "no answer within 0.6 s"


def test_an_endless_answer_is_given_up(monkeypatch):
    monkeypatch.setattr(endpoint, "_MAX_BODY", 1 << 20)
    with talking(lambda seen, before: Answer("x" * (1 << 21))) as (stub, client):
        assert ask(client, "a")[0].failure == "an answer of more than 1 MiB" and len(stub.seen) == 1


def test_nobody_there_is_a_missing_reply():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with ChatClient(endpoint_config(f"http://127.0.0.1:{free.getsockname()[1]}/v1")) as client:
            (reply,) = ask(client, "a")
    assert not reply.answered and reply.failure.startswith("ConnectError")
    assert client.usage()["retries"] == 2


@pytest.mark.parametrize("status", [400, 402, 413, 422, 451])
def test_what_would_fail_again_is_not_tried_again(status):
    with talking(lambda seen, before: Answer(status=status)) as (stub, client):
        assert ask(client, "a")[0].failure == f"HTTP {status}: stub says {status}"
        assert len(stub.seen) == 1 and client.usage()["failures"] == 1


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("headers", [{"Retry-After": "1"}, {"Retry-After": "9", "Retry-After-Ms": "1000"}])
def test_retry_after_is_honoured(status, headers):
    with talking(first_then(Answer(status=status, headers=headers))) as (stub, client):
        assert ask(client, "a")[0].answered
    first, second = stub.seen
    assert 1.0 <= second.at - first.at < 9.0


def test_waits_double_and_are_spread_and_never_shorter_than_asked(monkeypatch):
    monkeypatch.undo()
    assert [retry_wait_s(n, 0.0, 0.0) for n in range(9)] == [0.5, 1, 2, 4, 8, 16, 32, 60, 60]
    assert retry_wait_s(10**6, 0.0, 0.0) == 60
    assert [retry_wait_s(1, 0.0, draw) for draw in (0.0, 0.5, 0.999)] == pytest.approx([1, 0.75, 0.5005])
    assert [retry_wait_s(0, asked_s, 0.0) for asked_s in (7, 2.5, 0, 99999, math.inf)] == [7, 2.5, 0.5, 60, 60]
    assert retry_wait_s(7, 3.0, 0.0) == 60


def test_what_a_server_asks_to_wait():
    def asked(after, **more):
        return asked_wait_s(httpx.Headers({"Retry-After": after, **more}))

    assert [asked(after) for after in ("7", " 2.5 ", "0", "99999", "9" * 400)] == [7, 2.5, 0, 99999, math.inf]
    for nonsense in ("", "-5", "soon", "nan", "inf", "1e3", "Wed, 99 Foo 2026 00:00:00 GMT"):
        assert asked(nonsense) == 0
    assert asked("7", **{"retry-after-ms": "1500"}) == 1.5 and asked("7", **{"retry-after-ms": "x"}) == 7
    later, before = (email.utils.formatdate(time.time() + away, usegmt=True) for away in (40, -3000))
    assert 10 < asked(later) <= 40 and asked(before) == 0 and asked_wait_s({}) == 0


# --- every wait has an end -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "after, seconds, retries, most",
    [("50", 0.5, 3, 1), ("0.3", 0.02, 99, 8), ("soon", 0.02, 99, 12)],
    ids=["a wait too long", "waits that are asked for", "our own waits"],
)
def test_a_request_ends_after_its_attempts_and_waits_together(after, seconds, retries, most):
    """Here after two seconds, which only some of the attempts fit in."""
    busy = Answer(status=503, headers={"Retry-After": after})
    with talking(lambda seen, before: busy, seconds=seconds, retries=retries) as (stub, client):
        start = time.monotonic()
        (reply,) = ask(client, "a")
        assert time.monotonic() - start < 2.0 + 2.0
    assert reply.failure in ("HTTP 503: stub says 503", f"no answer within {seconds} s")
    assert client.usage()["retries"] < most


def test_a_server_that_never_ends_its_headers_is_given_up():
    with socket.create_server(("127.0.0.1", 0)) as server:
        stop = threading.Event()

        def trickle():
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 200 OK\r\nx: ")
                while not stop.wait(0.05):
                    connection.sendall(b"y")

        thread = threading.Thread(target=trickle)
        thread.start()
        try:
            address = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
            with ChatClient(endpoint_config(address, seconds=0.5, retries=0)) as client:
                assert ask(client, "a")[0].failure == "no answer within 0.5 s"
        finally:
            stop.set()
            thread.join()


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()], ids=["exit", "interrupt"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_whoever_waits_for_a_thread_that_has_died_is_told(error, monkeypatch):
    async def die(self, body):
        raise error

    with talking(lambda seen, before: Answer(after_s=PATIENCE)) as (stub, client):
        earlier = submit(client, "a")
        until(lambda: stub.seen)
        monkeypatch.setattr(ChatClient, "_send", die)
        for pending in (submit(client, "b"), earlier):
            with pytest.raises(RuntimeError, match="the client was closed, or its thread ended"):
                pending.result()
        with pytest.raises(ValueError, match="client that is closed"):
            submit(client, "c")


def test_whoever_waits_for_what_a_dead_thread_never_took_up_is_told(monkeypatch):
    monkeypatch.setattr(endpoint, "_CHECK_S", 0.05)
    with talking(first_then()) as (_, client):
        pass
    with pytest.raises(RuntimeError, match="its thread ended"):
        client.wait(concurrent.futures.Future())


# --- what is the configuration's fault -------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [401, 403, 404, 307])
def test_a_configuration_fault_ends_all_at_once(status):
    def answer(seen, before):
        return Answer(status=status) if seen.content == "3" else Answer(after_s=PATIENCE)

    with talking(answer, concurrency=4) as (stub, client):
        with pytest.raises(ValueError) as caught:
            ask(client, *map(str, range(50)))
        # Nothing else is sent: not what waited, not what comes later.
        with pytest.raises(ValueError, match=f"HTTP {status}"):
            ask(client, "later")
    message = str(caught.value)
    detail = "" if status == 401 else f" (stub says {status})"
    assert message == (
        f"endpoint: HTTP {status}{detail} from base_url '{stub.base_url}' for model 'm' with the key in $STUB_KEY:"
        " correct base_url, model or api_key_variable"
    )
    assert len(stub.seen) <= 4 and client.usage()["retries"] == 0


def test_a_fault_without_key_says_that_there_was_none():
    with talking(lambda seen, before: Answer(status=403), api_key_variable="") as (_, client):
        with pytest.raises(ValueError, match="for model 'm' with no key: correct"):
            ask(client, "a")


def test_a_wrong_path_is_a_fault():
    with StubEndpoint(first_then()) as stub, ChatClient(endpoint_config(stub.base_url.removesuffix("/v1"))) as client:
        with pytest.raises(ValueError, match="HTTP 404"):
            ask(client, "a")
    with StubEndpoint(first_then()) as stub, ChatClient(endpoint_config(f"{stub.base_url}/")) as client:
        assert ask(client, "a")[0].answered


@pytest.mark.parametrize("export", [{}, {"STUB_KEY": ""}, {"STUB_KEY": " \n"}])
def test_a_missing_key_is_refused_before_anything_starts(monkeypatch, export):
    monkeypatch.delenv("STUB_KEY")
    for name, value in export.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="variable STUB_KEY, named by api_key_variable, is not set, or empty"):
        ChatClient(endpoint_config("http://127.0.0.1:1/v1"))


@pytest.mark.parametrize("key", [f"{KEY} x", f"{KEY}\n{KEY}", f"{KEY}é", f"{KEY}\x01"])
def test_a_key_that_no_header_can_hold_is_refused_without_being_shown(monkeypatch, key):
    monkeypatch.setenv("STUB_KEY", key)
    with pytest.raises(ValueError, match="holds no key") as caught:
        ChatClient(endpoint_config("http://127.0.0.1:1/v1"))
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        f"http://me:{KEY}@host/v1",
        f"https://host/v1?key={KEY}",
        f"https://host/v1#{KEY}",
        "ftp://host",
        "host/v1",
        "",
        "http://",
        "http://host:port/v1",
        "http://host:99999/v1",
        "http://a b/v1",
        "http://[::1/v1",
        "http://xn--zz--/v1",
    ],
)
def test_an_address_that_holds_more_or_less_than_an_address_is_refused(url):
    with pytest.raises(ValueError, match="base_url got .* expected only an address like 'https://host/v1'") as caught:
        ChatClient(endpoint_config(url))
    assert KEY[:8] not in str(caught.value)


# --- what the environment says ---------------------------------------------------------------------------------------

DEAD = "http://127.0.0.1:9"  # the discard service, which nobody offers


@pytest.fixture
def bare(monkeypatch):
    """No variables about proxies and certificates but those that a test sets."""
    for name in (
        "http_proxy",
        "https_proxy",
        "all_proxy",
        "no_proxy",
        "ssl_cert_file",
        "ssl_cert_dir",
        "sslkeylogfile",
    ):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


UNREADABLE = ["[::1]", "fe80::/10", "[fd00::]/8", "[", "]:", "::::", "http://[::1", "a b", ",,", "*.", "[::1]:http"]


@pytest.mark.parametrize("no_proxy", UNREADABLE)
@pytest.mark.parametrize("name", ["NO_PROXY", "no_proxy"])
def test_no_entry_of_no_proxy_stops_a_client(bare, name, no_proxy):
    bare.setenv(name, no_proxy)
    with talking(first_then()) as (_, client):
        assert ask(client, "a")[0].answered
    bare.setenv(name, f"{no_proxy},localhost,127.0.0.0/8")
    bare.setenv("ALL_PROXY", "socks5://nowhere:1")
    with talking(first_then()) as (_, client):
        assert ask(client, "a")[0].answered


@pytest.mark.parametrize(
    "no_proxy, host, port, bypassed",
    [
        ("", "a.b", None, False),
        ("*", "a.b", None, True),
        ("x, *", "a.b", 80, True),
        (" localhost ,", "localhost", 8000, True),
        ("localhost:8000", "localhost", 8000, True),
        ("localhost:8001", "localhost", 8000, False),
        ("example.com", "example.com", None, True),
        ("example.com", "www.Example.COM", None, True),
        (".example.com", "www.example.com", None, True),
        ("*.example.com", "www.example.com", None, True),
        ("http://example.com", "example.com", None, True),
        ("example.com", "wwwexample.com", None, False),
        ("www.example.com", "example.com", None, False),
        ("[::1]", "::1", 80, True),
        ("[::1]:80", "::1", 80, True),
        ("[::1]:81", "::1", 80, False),
        ("::1", "::1", None, True),
        ("0:0:0:0:0:0:0:1", "::1", None, True),
        ("fd00::/8", "fd12::3", None, True),
        ("[fd00::]/8", "fd12::3", None, True),
        ("[fd00::/8]", "fd12::3", None, True),
        ("fd00::/8", "fe80::1", None, False),
        ("10.0.0.0/8", "10.1.2.3", 1, True),
        ("10.0.0.0/8", "11.1.2.3", 1, False),
        ("10.0.0.0/8", "host10.0.0.0", 1, False),
        ("127.0.0.1:5", "127.0.0.1", 5, True),
        ("127.0.0.1:6", "127.0.0.1", 5, False),
        ("::/0", "1.2.3.4", None, False),
        (":::::", "::1", None, False),
        (".", "a", None, False),
    ],
)
def test_what_no_proxy_means(no_proxy, host, port, bypassed):
    assert bypasses(no_proxy, host, port) == bypassed


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "ALL_PROXY"])
def test_requests_go_through_the_proxy_that_the_environment_names(bare, name):
    with StubEndpoint(first_then()) as stub:
        bare.setenv(name, stub.base_url.removesuffix("/v1").removeprefix("http://" if name == "http_proxy" else ""))
        bare.setenv("HTTPS_PROXY", DEAD)
        bare.setenv("NO_PROXY", "[::1]")
        with ChatClient(endpoint_config("http://judge.invalid/v1")) as client:
            assert ask(client, "a")[0].text == "to a"
    assert stub.seen[0].headers["host"] == "judge.invalid"


def test_a_dead_proxy_is_a_missing_reply(bare):
    bare.setenv("HTTP_PROXY", DEAD)
    with talking(first_then(), retries=0) as (stub, client):
        assert ask(client, "a")[0].failure.startswith("ConnectError") and not stub.seen


SECRET = "hunter2"


@pytest.mark.parametrize(
    "name, value, cure",
    [
        ("ALL_PROXY", f"socks5://me:{SECRET}@proxy:1080", "a SOCKS proxy, which needs `pip install socksio`"),
        ("all_proxy", "socks5h://proxy:1080", "a SOCKS proxy"),
        ("HTTP_PROXY", f"socks4://{SECRET}", "what is no proxy's address like 'http://host:3128'"),
        ("http_proxy", f"http://me:{SECRET}@proxy:port", "what is no proxy's address"),
        ("HTTP_PROXY", "http://[::1", "what is no proxy's address"),
        ("HTTP_PROXY", "http://", "what is no proxy's address"),
        ("ALL_PROXY", "ftp://proxy", "what is no proxy's address"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_refused_by_the_name_of_its_variable(bare, name, value, cure):
    bare.setitem(sys.modules, "socksio", None)  # as where it is not installed
    bare.setenv(name, value)
    before = threading.active_count()
    with pytest.raises(ValueError, match=f"^endpoint: the environment variable {name} names {cure}") as caught:
        ChatClient(endpoint_config("http://judge.invalid/v1"))
    assert "add 'judge.invalid' to NO_PROXY" in str(caught.value) and "\n" not in str(caught.value)
    assert SECRET not in str(caught.value) and threading.active_count() == before


@pytest.mark.parametrize("name", ["SSL_CERT_FILE", "SSLKEYLOGFILE"])
def test_certificates_that_cannot_be_read_are_refused_by_the_name_of_their_variable(bare, name, tmp_path):
    bare.setenv(name, str(tmp_path / "nowhere" / "file"))
    with pytest.raises(ValueError, match=f"^endpoint: the environment variable {name} names no usable file"):
        ChatClient(endpoint_config("https://judge.invalid/v1"))


# --- secrets ---------------------------------------------------------------------------------------------------------


def test_the_key_is_in_no_log_and_no_error(caplog, capfd):
    """The server repeats the key wherever it can."""
    echo, late_echo = (json.dumps({"error": {"message": f"{'x' * n} {KEY} is {KEY}"}}).encode() for n in (50, 180))
    answers = [
        # What is cut off after 200 characters is cut off in the middle of a key.
        Answer(status=400, body=late_echo),
        Answer(status=503, body=echo),
        Answer(body=echo),
        Answer(body=KEY.encode()),
        Answer(status=500, body=KEY.encode()),
        Answer(reset=True),
        Answer(status=429),
        Answer(f"The key is {KEY}."),
        Answer("", f"stop {KEY}"),
    ]
    told = []
    with caplog.at_level(logging.DEBUG):
        with talking(lambda seen, before: answers[int(seen.content)], retries=1) as (_, client):
            told += [repr(reply) for reply in ask(client, *map(str, range(len(answers))))]
            told += [repr(client), str(vars(client)["_endpoint"]), str(client.usage())]
        for status in (401, 403, 404):
            with talking(lambda seen, before: Answer(status=status, body=echo)) as (_, client):
                with pytest.raises(ValueError) as caught:
                    ask(client, "a")
                told.append(str(caught.value))
    assert "HTTP Request: POST" in caplog.text  # the log is on
    for text in (*told, caplog.text, *capfd.readouterr()):
        assert KEY not in text and KEY[:8] not in text
    assert sum("***" in text for text in told) == 9  # the server did say it


# --- what a server's words become ------------------------------------------------------------------------------------


def body_of(**choice):
    return json.dumps({"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": True}}).encode()


def test_half_a_surrogate_pair_is_text_that_can_be_written():
    reply = read_completion(rb'{"choices": [{"message": {"content": "a\ud83d"}, "finish_reason": "stop"}]}')
    assert reply[:5] == ("a?", True, False, 0, 0) and reply.text.encode()


def test_counts_that_are_no_counts_are_none():
    assert read_completion(body_of(message={"content": "a"}))[3:5] == (3, 0)
    assert read_completion(body_of(message={"reasoning": "hm"}, finish_reason="length"))[:3] == ("", True, True)
    huge = json.loads(body_of(message={"content": "a"})) | {"usage": {"prompt_tokens": 10**400}}
    assert read_completion(json.dumps(huge).encode())[3:5] == (0, 0)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.text())
def test_a_text_comes_back_as_it_was_written(text):
    assert read_completion(body_of(message={"content": text + "."}))[:2] == (text + ".", True)


def test_a_text_in_parts_is_its_text_alone():
    parts = [
        {"type": "thinking", "thinking": [{"type": "text", "text": "Score: 2"}]},
        {"type": "text", "text": "Score:"},
    ]
    reply = read_completion(body_of(message={"content": [*parts, {"type": "text", "text": " 4"}]}))
    assert reply[:3] == ("Score: 4", True, False)
    assert read_completion(body_of(message={"content": parts[:1]}, finish_reason="stop")).answered is False


LOGS = {digit: math.log(p) for digit, p in {"4": 0.5, "5": 0.25, "3": 0.125, " 4": 0.05, "Score": 0.05}.items()}


@pytest.mark.parametrize("dialect", ["openai", "vllm", "azure"])
def test_the_digits_probabilities_are_those_of_the_first_token(dialect):
    with talking(lambda seen, before: Answer("4", "length", first=LOGS), dialect) as (stub, client):
        (reply,) = ask(client, "a", max_tokens=1, digits=True)
    assert reply.probability_5 == pytest.approx(np.array([0, 0, 0.125, 0.55, 0.25]) / 0.925)
    assert reply[:6] == ("4", True, False, 2, 1, "")
    sent = {name: stub.seen[0].body[name] for name in ("max_tokens", "logprobs", "top_logprobs", "temperature")}
    assert sent == {"max_tokens": 1, "logprobs": True, "top_logprobs": 20, "temperature": 0}


def test_no_log_probabilities_are_asked_for_where_none_are_wanted():
    with talking(lambda seen, before: Answer("4", first=LOGS)) as (stub, client):
        assert ask(client, "a")[0].probability_5 is None
    assert not {"logprobs", "top_logprobs"} & set(stub.seen[0].body)


def test_a_server_that_gives_fewer_log_probabilities_is_asked_for_fewer():
    answer = Answer("4", first=LOGS)
    with talking(lambda seen, before: answer, extra_body='{"top_logprobs": 2}') as (stub, client):
        (reply,) = ask(client, "a", max_tokens=1, digits=True)
    assert stub.seen[0].body["top_logprobs"] == 2
    assert reply.probability_5 == pytest.approx((0, 0, 0, 2 / 3, 1 / 3))


@pytest.mark.parametrize(
    "first, probability_5",
    [
        ({"1": 0.0}, (1, 0, 0, 0, 0)),
        ({"5": 1e-6, "4": -9999.0}, (0, 0, 0, 0, 1)),
        ({"▁2": math.log(0.5), "Ġ3": math.log(0.5)}, (0, 0.5, 0.5, 0, 0)),
        ({"2": -math.inf, "3": -0.1}, (0, 0, 1, 0, 0)),
        # Most of the mass is elsewhere: the answer is not the digit that was asked for.
        ({"<think>": -0.01, "4": -5.0}, None),
        ({"Score": math.log(0.6), "4": math.log(0.4)}, None),
        ({"45": 0.0}, None),
        ({"0": -0.1, "6": -2.0}, None),
        ({"٤": 0.0}, None),
        ({"4.": 0.0}, None),
    ],
)
def test_which_answers_begin_with_a_digit(first, probability_5):
    with talking(lambda seen, before: Answer("x", "length", first=first)) as (_, client):
        (reply,) = ask(client, "a", max_tokens=1, digits=True)
    assert reply.answered and reply.probability_5 == (probability_5 and pytest.approx(probability_5))


@pytest.mark.parametrize(
    "logprobs",
    [
        None,
        {},
        {"content": None},
        {"content": []},
        {"content": [{}]},
        {"content": [{"top_logprobs": None}]},
        {"content": [{"top_logprobs": [{"token": 4, "logprob": -0.1}]}]},
        {"content": [{"top_logprobs": [{"token": "4", "logprob": None}]}]},
        {"content": [{"top_logprobs": [{"token": "4", "logprob": math.nan}]}]},
        {"tokens": ["4"], "top_logprobs": [{"4": -0.1}]},
    ],
)
def test_an_answer_without_log_probabilities_is_none_and_says_what_to_do(logprobs):
    with pytest.raises(Failed, match="gives none; set the read-out to 'text'") as caught:
        read_completion(body_of(message={"content": "4"}, logprobs=logprobs), True)
    assert not caught.value.passing


CONTROLS = [
    "<|im_end|>",
    "<|im_start|>",
    "<|eot_id|>",
    "<|turn>",
    "<turn|>",
    "</s>",
    "<s>",
    "<bos>",
    "<end_of_turn>",
    "<start_of_turn>",
    "[INST]",
    "[/INST]",
    "<｜User｜>",
    "<｜end▁of▁sentence｜>",
    "<|start_header_id|>",
]
HARMLESS = [
    "a <| b |> c",
    "x < y",
    "f <$> g <|> h",
    "Verdict: <yes|no>",
    "Score: <1-5>",
    "<strong>",
    "[INSTANCE]",
    "|x|<2",
]


def test_control_strings_reach_the_server_broken_and_nothing_else_does():
    with talking(first_then()) as (stub, client):
        ask(client, *CONTROLS, *HARMLESS)
    sent = {seen.content for seen in stub.seen}
    assert sent & set(CONTROLS) == set() and set(HARMLESS) < sent
    assert {text.replace("\u200b", "") for text in sent} == {*CONTROLS, *HARMLESS}


# --- ending ----------------------------------------------------------------------------------------------------------


def test_closing_drops_what_waits_and_what_is_under_way():
    with StubEndpoint(lambda seen, before: Answer(after_s=PATIENCE)) as stub:
        with ChatClient(endpoint_config(stub.base_url, concurrency=2, seconds=10 * PATIENCE)) as client:
            replies = submit(client, *map(str, range(20)))
            until(lambda: len(stub.seen) == 2)
        assert len(stub.seen) == 2 and not client._thread.is_alive()  # else closing would have waited for the server
        with pytest.raises(RuntimeError, match="the client was closed"):
            replies.result()
    assert len(stub.seen) == 2


def test_an_error_of_ours_reaches_whoever_waits(monkeypatch):
    monkeypatch.setattr(endpoint, "read_completion", lambda content, digits: 1 / 0)
    with talking(first_then()) as (_, client):
        with pytest.raises(ZeroDivisionError):
            ask(client, "a")


def test_closing_ends_a_wait_for_another_attempt():
    with talking(lambda seen, before: Answer(status=503, headers={"Retry-After": "50"})) as (stub, client):
        submit(client, "a")
        until(lambda: stub.seen)
    assert len(stub.seen) == 1 and not client._thread.is_alive()


def test_ctrl_c_ends_a_process_that_waits_for_answers():
    script = """
        import signal, sys
        from exprl_jax import config
        from exprl_jax.data.tokenizer import Message
        from exprl_jax.reward.endpoint import ChatClient

        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a shell
        endpoint = config.Endpoint(sys.argv[1], "m", "", 3, 3600.0, 2, 0.5, "max_tokens", "{}")
        with ChatClient(endpoint) as client:
            client.submit([[Message("user", str(i))] for i in range(9)], 9, "replies").result()
    """
    with StubEndpoint(lambda seen, before: Answer(after_s=10 * PATIENCE)) as stub:
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script), stub.base_url],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            until(lambda: len(stub.seen) == 3)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=PATIENCE)  # the requests would take an hour
        finally:
            process.kill()
            process.wait()
    assert process.returncode == -signal.SIGINT and err.strip().endswith("KeyboardInterrupt"), err
    assert len(stub.seen) == 3 and not out


def until(happened):
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)
