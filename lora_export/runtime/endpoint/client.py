"""Requests to a server that is not trusted: each answer is bounded in bytes and time, and no redirect is followed.

An endpoint is an address such as https://host/v1. The key comes from the environment and is in no message. Proxies are
those of the environment, and TLS is verified, as Python's urllib does both.
"""

from __future__ import annotations

import json
import os
import queue
import random
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from email.message import Message
from http.client import HTTPException
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urljoin, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from lora_export.errors import Different, EnvironmentLacking, InputRefused, RuntimeRefused, WrongUsage
from lora_export.isolation.limits import MAX_REQUESTS, MAX_RESPONSE
from lora_export.options.spelling import named
from lora_export.storage.json_files import checked_objects, refuse_flood
from lora_export.version import __version__

if TYPE_CHECKING:  # requests need no PyTorch
    from lora_export.models.model import Model
    from lora_export.models.served_values import DrawTexts

KEY_VARIABLES = ("LORA_EXPORT_API_KEY", "OPENAI_API_KEY")  # variables of the environment; the first that is set counts
BUSY = (429, 503)  # answers after which a request is sent again
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds before that
LONGEST_WAIT = 1e6  # seconds; a socket counts milliseconds in 31 bits
LONGEST_INTEGER = 40  # digits
LENGTH_OF_JSON = "Inference-Header-Content-Length"  # of the binary extension: tensors follow
SHOWN_OF_MESSAGE = 300  # characters of a server's own message
LOCAL = ("localhost", "127.0.0.1", "::1")


class RequestRefused(RuntimeRefused):
    """The server answered with an error: it takes no such request."""


class Answer(NamedTuple):
    content: bytes
    headers: Message


class _NoRedirects(HTTPRedirectHandler):
    """A redirect is an answer like others: it could lead to a file, to another host, or out of TLS."""

    def redirect_request(self, *_: Any) -> None:
        return None


def refuse_address(address: str) -> None:
    """Raise WrongUsage for an address that is none, or that holds what belongs to no report."""
    try:
        parts = urlsplit(address)
        is_address = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        is_address = False
    if not is_address:
        raise WrongUsage("CANDIDATE is no address of a server: give one such as https://host/v1")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise WrongUsage(
            "CANDIDATE is an address with a password, a query or a fragment. Reports would show it: put the key into "
            f"the variable {KEY_VARIABLES[0]}, and give an address such as https://host/v1"
        )


def key_of(address: str) -> str:
    """The key from the environment; empty where there is none. Raises WrongUsage for one that cannot be sent safely."""
    parts = urlsplit(address)
    own, other = KEY_VARIABLES
    is_safe = parts.scheme == "https" or parts.hostname in LOCAL
    if os.environ.get(own) and not is_safe:
        raise WrongUsage(f"the key of {own} would be readable on its way to {address}: give an https:// address")
    key = os.environ.get(own) or (os.environ.get(other, "") if is_safe else "")
    if not (key.isascii() and key.isprintable()):
        raise WrongUsage(f"the key in {own} or {other} has characters that no key has")
    return key


@dataclass(eq=False)
class Client:
    """A server at an address, and how long it may take. Counts its requests, of which a proof has MAX_REQUESTS."""

    address: str
    seconds: float  # that one request may take, with what is sent again
    key: str = field(default="", repr=False)
    requests: int = 0
    server: str = ""  # what it calls itself, in its last answer

    def get(self, path: str) -> dict[str, Any]:
        """The JSON object at a path. Errors are those of `post`."""
        return self._json(Request(self._url(path)))

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON object that answers this one; its fractions are Decimal, as many digits as the server gives.

        Raises EnvironmentLacking where the server cannot be reached or wants another key, and RuntimeRefused where it
        refuses, takes too long, or answers with what is no JSON object of numbers that are finite.
        """
        request = Request(self._url(path), data=json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        return self._json(request)

    def post_tensors(self, path: str, body: Mapping[str, Any], tensors: bytes) -> tuple[dict[str, Any], bytes]:
        """The same for an object and the bytes of tensors behind it, as KServe's binary extension has them.

        An answer without its header is JSON alone. Errors are those of `post`.
        """
        described = json.dumps(body).encode()
        request = Request(self._url(path), data=described + tensors)
        request.add_header("Content-Type", "application/octet-stream")
        request.add_header(LENGTH_OF_JSON, str(len(described)))
        answer = self._requested(request)
        stated = answer.headers.get(LENGTH_OF_JSON, str(len(answer.content)))
        if not (stated.isascii() and stated.isdecimal() and len(stated) < LONGEST_INTEGER):
            self._refuse(f"answered with a header {LENGTH_OF_JSON} that is no number")
        return self._parsed(answer.content[: int(stated)]), answer.content[int(stated) :]

    def _url(self, path: str) -> str:
        return urljoin(f"{self.address}/", quote(path, safe="/%"))  # a name may have spaces

    def _json(self, request: Request) -> dict[str, Any]:
        return self._parsed(self._requested(request).content)

    def _requested(self, request: Request) -> Answer:
        request.add_header("User-Agent", f"lora-export/{__version__}")
        request.add_header("Accept-Encoding", "identity")
        if self.key:
            request.add_unredirected_header("Authorization", f"Bearer {self.key}")
        answer = self._answer(request)
        self.server = self._clean(answer.headers.get("Server", ""))
        if (encoding := answer.headers.get("Content-Encoding", "identity")) != "identity":
            self._refuse(f"compressed its answer ({encoding}), which was not requested")
        return answer

    def _parsed(self, answer: bytes) -> dict[str, Any]:
        try:
            refuse_flood(answer, "it")
            content = json.loads(
                answer,
                parse_float=Decimal,
                parse_int=_parsed_integer,
                parse_constant=lambda word: self._refuse(f"answered with {word}, which is no number"),
                object_pairs_hook=checked_objects("it"),
            )
        except (ValueError, ArithmeticError, RecursionError) as error:
            raise RuntimeRefused(self._clean(f"{self.address} answered with what is no JSON ({error})")) from None
        except InputRefused as error:
            raise RuntimeRefused(self._clean(f"{self.address} answered with too much: {error}")) from None
        if not isinstance(content, dict):
            self._refuse("answered with JSON that is no object")
        return content

    def _answer(self, request: Request) -> Answer:
        """The answer, after as many tries as a busy server needs and the time allows."""
        end, pause = time.monotonic() + min(self.seconds, LONGEST_WAIT), FIRST_PAUSE
        while True:
            if self.requests >= MAX_REQUESTS:
                self._refuse(f"would get more than {MAX_REQUESTS} requests, which are a proof's limit")
            self.requests += 1
            try:
                return self._within(request, end)
            except HTTPError as error:
                pause = self._pause_after(error, pause)
            if time.monotonic() + pause >= end:
                self._refuse(f"was busy for {self.seconds:g} seconds")
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _within(self, request: Request, end: float) -> Answer:
        """The answer before the end. Another thread waits for it: a server that sends a byte a second holds no other.

        No time limit of a socket ends that: each byte of a header, or of the answer to a name's look-up, begins it
        again.
        """
        found: queue.SimpleQueue[Answer | BaseException] = queue.SimpleQueue()

        def work() -> None:
            try:
                found.put(self._read(request, end))
            except BaseException as error:  # noqa: BLE001 - raised where it is waited for
                found.put(error)

        threading.Thread(target=work, daemon=True).start()
        try:
            answer = found.get(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            answer = TimeoutError()
        if isinstance(answer, Answer):
            return answer
        if isinstance(answer, HTTPError):
            raise answer
        if isinstance(answer, TimeoutError) or isinstance(getattr(answer, "reason", None), TimeoutError):
            self._refuse(f"did not answer within {self.seconds:g} seconds. Allow more with {named('timeout')}")
        if isinstance(answer, RuntimeRefused):
            raise answer
        if isinstance(answer, URLError | OSError | HTTPException | ValueError):
            why = getattr(answer, "reason", answer)
            raise EnvironmentLacking(self._clean(f"{self.address} cannot be reached: {why or repr(why)}")) from None
        raise answer

    def _read(self, request: Request, end: float) -> Answer:
        opener = build_opener(_NoRedirects)
        try:
            with opener.open(request, timeout=max(0.01, end - time.monotonic())) as response:
                return Answer(self._bounded(response, end), response.headers)
        except HTTPError as error:
            error.msg = self._clean(_message(self._bounded(error, end)))  # read here, within the same bounds
            raise

    def _bounded(self, response: Any, end: float) -> bytes:
        content = bytearray()
        while part := response.read1(1 << 16):
            content += part
            if len(content) > MAX_RESPONSE:
                self._refuse(f"answered with more than {MAX_RESPONSE >> 20} MiB")
            if time.monotonic() > end:
                raise TimeoutError
        return bytes(content)

    def _pause_after(self, error: HTTPError, pause: float) -> float:
        """How long to wait before the request is sent again. Raises for an error that another try will not change."""
        if error.code in BUSY:
            wanted = error.headers.get("Retry-After", "")
            return max(pause, float(wanted)) if wanted.isdecimal() else pause
        if 300 <= error.code < 400:
            where = self._clean(str(error.headers.get("Location", "elsewhere")))
            self._refuse(f"leads to {where}, which is not followed. Give that address where you trust it")
        if error.code in (401, 403):
            raise EnvironmentLacking(
                f"{self.address} refuses the key ({error.code}): {error.msg}. It is the value of the variable "
                f"{' or '.join(KEY_VARIABLES)}"
            ) from None
        raise RequestRefused(f"{self.address} answered {error.code}: {error.msg}") from None

    def _refuse(self, what: str) -> NoReturn:
        raise RuntimeRefused(f"{self.address} {what}") from None

    def _clean(self, text: str) -> str:
        """A server's text, shortened, and without the key, which it may repeat."""
        return (text.replace(self.key, "(the key)") if self.key else text)[:SHOWN_OF_MESSAGE]


def _parsed_integer(text: str) -> int:
    if len(text) > LONGEST_INTEGER:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def _message(content: bytes) -> str:
    """What a server answers with an error: OpenAI's form, FastAPI's, or its first characters."""
    text = content[: 10 * SHOWN_OF_MESSAGE].decode(errors="replace")
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError):
        return text
    for name in ("error", "message", "detail"):
        found = found.get(name, found) if isinstance(found, dict) else found
    return str(found)


# --- one model of a server ---

WEIGHTS_NOT_JUDGED = "Its weights were not judged"

Number = Decimal | int


class Way(Protocol):
    """How a server gives what is compared: its values of some texts, each a list of token ids."""

    @property
    def name(self) -> str: ...
    @property
    def output(self) -> str: ...  # of the model, and of PyTorch's
    @property
    def note(self) -> str: ...  # what was sent, and what was not compared

    def rows(self, texts: Sequence[Sequence[int]]) -> list[list[Number]]:
        """The values of each text."""

    def draw(self, length: int, choose: random.Random) -> list[int] | None:
        """The tokens of an input; None where any will do."""

    def judged(self, model: Model, draw: DrawTexts, longest: int | None) -> Model:
        """The model whose output has these values."""


@dataclass(eq=False)
class ServedModel:
    """The model of this name at a server. `client` counts the requests."""

    client: Client
    model: str
    answered_as: set[str] = field(default_factory=set)  # the models that answered, as the server states

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer of a path. Errors are those of `Client.post`."""
        answer = self.client.post(path, {"model": self.model, **body})
        if isinstance(model := answer.get("model"), str):
            self.answered_as.add(model)
        return answer

    def wrong(self, what: str) -> RuntimeRefused:
        """The error for an answer that is not what the protocol allows."""
        return RuntimeRefused(f"{self.client.address} answered with JSON of another form: {what}")

    def refuse_other_tokens(self, usage: Any, count: int, by: str = "tokenizer") -> None:
        """Raise Different where the server counts other tokens than were sent, or than are made `by` the base's own."""
        found = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        if isinstance(found, int) and found != count:
            how = "adds tokens, such as that of a beginning (BOS) or of a chat" if found > count else "drops tokens"
            raise Different(
                f"the server counts {found} tokens in a text of which the base's {by} makes {count}: it {how}, "
                f"or has another {by}. {WEIGHTS_NOT_JUDGED}"
            )
