"""A hostile server gets a clear error, in bounded time and memory, and never a key that is not its own."""

from __future__ import annotations

import gzip
import time
import tracemalloc
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from lora_export.errors import EnvironmentLacking, LoraExportError, RuntimeRefused, WrongUsage
from lora_export.isolation.limits import MAX_REQUESTS
from lora_export.runtime.endpoint import client as clients
from lora_export.runtime.endpoint.client import Client, key_of, refuse_address
from support.endpoints import reply, running

KEY = "sk-very-secret"
Handle = Callable[[BaseHTTPRequestHandler], None]


def sent(content: Any, status: int = 200, **headers: str) -> Handle:
    return lambda request: reply(request, content, status, **headers)


def endless(request: BaseHTTPRequestHandler) -> None:
    request.send_response(200)
    request.end_headers()
    for _ in range(200):
        request.wfile.write(b"[" * (1 << 20))


def slow_bytes(request: BaseHTTPRequestHandler) -> None:
    request.send_response(200)
    request.end_headers()
    for _ in range(100):
        request.wfile.write(b" ")
        request.wfile.flush()
        time.sleep(0.05)


def slow_headers(request: BaseHTTPRequestHandler) -> None:
    for _ in range(100):
        request.wfile.write(b"H")
        request.wfile.flush()
        time.sleep(0.05)


HOSTILE: dict[str, tuple[Handle, str]] = {
    "endless": (endless, "answered with more than 64 MiB"),
    "slow bytes": (slow_bytes, "did not answer within 0.6 seconds. Allow more with timeout="),
    "slow headers": (slow_headers, "did not answer within 0.6 seconds"),
    "gzip bomb": (sent(gzip.compress(bytes(1 << 24)), Content_Encoding="gzip"), "compressed its answer (gzip)"),
    "redirect to a file": (sent(b"", 302, Location="file:///etc/passwd"), "leads to file:///etc/passwd, which is not"),
    "redirect elsewhere": (sent(b"", 307, Location="http://127.0.0.2/v1"), "leads to http://127.0.0.2/v1"),
    "no JSON": (sent(b"<html>"), "answered with what is no JSON (Expecting value"),
    "no text": (sent(b"\xff\xfe{"), "answered with what is no JSON"),
    "a list": (sent([1]), "answered with JSON that is no object"),
    "deep": (sent(b'{"a":' * 50_000), "answered with what is no JSON"),
    "a flood": (sent(b"[" * 4_000_000), "answered with too much"),
    "NaN": (sent(b'{"logprob": NaN}'), "answered with NaN, which is no number"),
    "Infinity": (sent(b'{"logprob": -Infinity}'), "answered with -Infinity"),
    "a huge exponent": (sent(b'{"logprob": 1e99999999999999999999999}'), "answered with what is no JSON"),
    "a huge integer": (sent(b'{"logprob": 1%s}' % (b"0" * 400)), "no JSON (an integer of 401 digits)"),
    "a key twice": (sent(b'{"a": 1, "a": 2}'), "names a more than once"),
    "an error": (sent({"error": {"message": f"bad\x1b[2J {KEY} {'long ' * 200}"}}, 400), "answered 400: bad\\x1b[2J ("),
    "a proxy's page": (sent(b"<html>502</html>", 502), "answered 502: <html>502</html>"),
    "busy": (sent({}, 429, Retry_After="99999999999"), "was busy for 0.6 seconds"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_wrong_with_an_answer_is_said(name: str) -> None:
    handle, message = HOSTILE[name]
    seconds = 0.6 if "slow" in name or name == "busy" else 30.0
    begun = time.monotonic()
    with running(handle) as address, pytest.raises(RuntimeRefused) as refused:
        Client(address, seconds, KEY).post("completions", {"prompt": "a"})
    text = str(refused.value)
    assert text.startswith(address) and message in text and len(text) < 500
    assert KEY not in text and refused.value.__suppress_context__
    assert time.monotonic() - begun < 20


def test_the_memory_of_an_answer_is_bounded() -> None:
    tracemalloc.start()
    with running(endless) as address, pytest.raises(RuntimeRefused):
        Client(address, 1e12).get("models")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300 << 20


def test_a_busy_server_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "FIRST_PAUSE", 0.01)
    answers = [429, 503, 200]

    def handle(request: BaseHTTPRequestHandler) -> None:
        reply(request, {"x": 0.25}, answers.pop(0))

    with running(handle) as address:
        client = Client(address, 30.0)
        assert float(client.get("models")["x"]) == 0.25
    assert client.requests == 3 and answers == []


def test_requests_are_counted() -> None:
    client = Client("http://127.0.0.1:1/v1", 5.0, requests=MAX_REQUESTS)
    with pytest.raises(RuntimeRefused, match="more than 200 requests"):
        client.get("models")


@pytest.mark.parametrize(
    ("handle", "message"),
    [
        (sent({"detail": f"no such key {KEY}"}, 401), "refuses the key (401): no such key (the key)"),
        (None, "cannot be reached"),
    ],
)
def test_a_server_out_of_reach_is_the_environment(handle: Handle | None, message: str) -> None:
    with running(handle or sent({})) as address:
        where = address if handle else "http://127.0.0.1:1/v1"
        with pytest.raises(EnvironmentLacking) as refused:
            Client(where, 5.0, KEY).get("models")
    assert message in str(refused.value) and KEY not in str(refused.value)


def test_a_certificate_that_nobody_signed_is_refused() -> None:
    with running(sent({})) as address, pytest.raises(EnvironmentLacking, match=r"cannot be reached: .*SSL"):
        Client(address.replace("http:", "https:"), 5.0, KEY).get("models")


@pytest.mark.parametrize(
    ("address", "own", "other", "found"),
    [
        ("https://host/v1", "mine", "openai", "mine"),
        ("https://host/v1", "", "openai", "openai"),
        ("http://localhost:8000/v1", "", "openai", "openai"),
        ("http://host/v1", "", "openai", ""),  # it would be readable, and nobody asked for it
        ("http://host/v1", "mine", "", "would be readable on its way"),
        ("https://host/v1", "line\nbreak", "", "characters that no key has"),
        ("https://host/v1", "schlüssel", "", "characters that no key has"),
    ],
)
def test_the_key_is_from_the_environment(
    address: str, own: str, other: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in zip(clients.KEY_VARIABLES, (own, other), strict=True):
        monkeypatch.setenv(name, value)
    if " " not in found:
        assert key_of(address) == found
        return
    with pytest.raises(WrongUsage, match=found) as refused:
        key_of(address)
    assert own not in str(refused.value)


def test_a_key_is_sent_and_not_shown() -> None:
    seen = []

    def handle(request: BaseHTTPRequestHandler) -> None:
        seen.append(request.headers["Authorization"])
        reply(request, {"echo": KEY})

    with running(handle) as address:
        client = Client(address, 30.0, KEY)
        client.get("models")
    assert seen == [f"Bearer {KEY}"] and KEY not in repr(client)


@pytest.mark.parametrize(
    "address", ["http://", "http://host:99999/v1", "https://user:sk-1@host/v1", "https://host/v1?key=sk-1", "http://[/"]
)
def test_an_address_that_is_none_or_has_a_secret_is_refused(address: str) -> None:
    with pytest.raises(WrongUsage, match="CANDIDATE is") as refused:
        refuse_address(address)
    assert "sk-1" not in str(refused.value) and issubclass(WrongUsage, LoraExportError)
