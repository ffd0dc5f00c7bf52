"""A store with the interface of S3 (moto) in this process, a server with one answer, and a model in three shards."""

from __future__ import annotations

import functools
import html
import io
import itertools
import json
import logging
import os
import random
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_export.storage.store_path import StorePath, place
from support.folder_contents import folder_contents
from support.handmade import base_file, peft_adapter
from support.local_server import Silent, local_server

SECRET = "wJalrXUtnFEMIbPxRfiCYEXAMPLEKEY"
PART = 1 << 12  # bytes of `small_parts`
_numbers = itertools.count()


@functools.cache
def endpoint() -> str:
    """The address of moto's server, which is started once in a process."""
    from moto import backends
    from moto.server import ThreadedMotoServer

    services = frozenset(backends.list_of_moto_modules())  # it reads its own folder at each request
    backends.list_of_moto_modules = lambda: services
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    return "http://127.0.0.1:{1}".format(*server.get_host_and_port())


@functools.cache
def client() -> Any:
    """Another client of that server, made once in a process."""
    import boto3

    return boto3.client("s3", endpoint_url=endpoint(), region_name="us-east-1")


def use(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """Let obstore find this server, with credentials that are none."""
    values = {"ENDPOINT_URL": address, "ALLOW_HTTP": "true", "REGION": "us-east-1"}
    for name, value in {**values, "ACCESS_KEY_ID": "AKIAEXAMPLE", "SECRET_ACCESS_KEY": SECRET}.items():
        monkeypatch.setenv(f"AWS_{name}", value)


class Stored:
    """A bucket of its own, and another client that reads and writes it."""

    scheme = "s3"
    tags_contents = True  # equal objects have equal ETags
    keeps_parts = True  # of an upload, whatever is put under its key meanwhile

    def __init__(self, other: Any = None) -> None:
        self.name, self.client = f"bucket-{next(_numbers)}", other or client()
        self.client.create_bucket(Bucket=self.name)

    @property
    def address(self) -> str:
        return f"{self.scheme}://{self.name}"

    def move(self, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
        """Let obstore find the bucket at another server."""
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)

    def __truediv__(self, key: str) -> StorePath:
        found = place(f"{self.address}/{key}")
        assert isinstance(found, StorePath)
        return found

    def put(self, key: str, content: bytes | Path) -> None:
        """Put an object, or all files of a folder below a key."""
        files = {"": content} if isinstance(content, bytes) else folder_contents(content)
        for name, each in files.items():
            self.client.put_object(Bucket=self.name, Key=f"{key}/{name}".strip("/"), Body=each)

    def get(self, key: str) -> bytes:
        body: bytes = self.client.get_object(Bucket=self.name, Key=key)["Body"].read()
        return body

    def objects(self, prefix: str = "") -> dict[str, Any]:
        """The keys below a prefix, with what the store states of each."""
        found = self.client.list_objects_v2(Bucket=self.name, Prefix=prefix).get("Contents", [])
        return {each["Key"]: each for each in found}

    def delete(self, key: str) -> None:
        self.client.delete_object(Bucket=self.name, Key=key)

    def uploads(self) -> list[Any]:
        """The multipart uploads that were neither completed nor aborted."""
        return list(self.client.list_multipart_uploads(Bucket=self.name).get("Uploads", []))

    def files(self, key: str) -> dict[str, bytes]:
        return {name.removeprefix(f"{key}/"): self.get(name) for name in self.objects(f"{key}/")}


def model(folder: Path, shards: int = 3, rows: int = 96) -> tuple[Path, Path]:
    """A base of three shards or more, all but the third of which an adapter changes, and the adapter."""
    base = folder / "base"
    base.mkdir(parents=True)
    rng, weight_map = np.random.default_rng(0), {}
    modules = ("up", "down", "norm", *(f"up{number}" for number in range(3, shards)))
    for number, module in enumerate(modules):
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        base_file(base / name, {f"{module}.weight": rng.integers(-8, 8, (rows, 40))}, metadata={"format": "pt"})
        weight_map[f"{module}.weight"] = name
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (base / "config.json").write_text("{}")
    changed = [module for module in modules if module != "norm"]
    pairs = {one: (rng.integers(1, 4, (2, 40)), rng.integers(1, 4, (rows, 2))) for one in changed}
    return base, peft_adapter(folder / "adapter", pairs)


class Failing:
    """Lets the store refuse a share of all requests, and records the changes of objects that it made.

    The next put of `unconfirmed` (/bucket/key) is done, and answered with 500.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, share: float, seed: int):
        from moto.server import DomainDispatcherApplication

        if os.environ.get("STORE", "s3") != "s3":
            pytest.skip("it lets moto fail, and another store is tested")
        self.requests, self.refused, self.changes = 0, 0, list[tuple[str, str]]()
        self.unconfirmed = ""
        self._share, self._random, self._answer = share, random.Random(seed), DomainDispatcherApplication.__call__

        def call(app: Any, environ: dict[str, Any], start: Callable[..., Any]) -> Any:
            return self._call(app, environ, start)

        monkeypatch.setattr(DomainDispatcherApplication, "__call__", call)

    def _call(self, app: Any, environ: dict[str, Any], start: Callable[..., Any]) -> Any:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests += 1
        if self._random.random() < self._share:
            self.refused += 1
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start("503 Slow Down", [("Content-Type", "application/xml")])
            return [b"" if method == "HEAD" else b"<Error><Code>SlowDown</Code></Error>"]

        changed = [] if environ.get("QUERY_STRING") else [(method, path)]
        if environ.get("QUERY_STRING") == "delete":  # as obstore deletes one object, too
            body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            environ["wsgi.input"] = io.BytesIO(body)
            keys = (html.unescape(key) for key in re.findall("<Key>(.*?)</Key>", body.decode()))
            changed = [("DELETE", f"{path.rstrip('/')}/{key}") for key in keys]

        if method == "PUT" and path == self.unconfirmed:
            self.unconfirmed = ""
            return self._answer(app, environ, lambda _, *rest: start("500 Internal Server Error", *rest))

        def started(status: str, *rest: Any) -> Any:
            if method in ("PUT", "POST", "DELETE") and status.startswith("2"):
                self.changes += changed
            return start(status, *rest)

        return self._answer(app, environ, started)

    def put_twice(self, name: str) -> list[str]:
        """The objects of this name that were put while they were there."""
        there, found = set[str](), []
        for method, path in (change for change in self.changes if change[1].endswith(f"/{name}")):
            found += [path] if method == "PUT" and path in there else []
            (there.discard if method == "DELETE" else there.add)(path)
        return found


def lists_without_quotes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the store leave out the quotes of ETags in its lists."""
    from moto.server import DomainDispatcherApplication

    answer = DomainDispatcherApplication.__call__

    def call(app: Any, environ: dict[str, Any], start: Callable[..., Any]) -> Any:
        content = b"".join(answer(app, environ, start))
        if "list-type" not in environ["QUERY_STRING"]:
            return [content]
        quote = rb"(?:\"|&quot;)"
        return [re.sub(rb"<ETag>%s(.*?)%s<" % (quote, quote), rb"<ETag>\1<", content).ljust(len(content))]

    monkeypatch.setattr(DomainDispatcherApplication, "__call__", call)


@contextmanager
def answering(
    status: int, body: bytes = b"", *, headers: dict[str, str] | None = None, wait: float = 0
) -> Iterator[str]:
    """A server that gives each request one answer, after some seconds; its address."""
    released = threading.Event()

    class Answer(Silent, BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            released.wait(wait)
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body if self.command != "HEAD" else b"")

        do_HEAD = do_PUT = do_POST = do_GET  # noqa: N815 - the names of http.server

    with local_server(Answer) as address:
        yield address
        released.set()
