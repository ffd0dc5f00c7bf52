"""A store with the XML interface of Google Cloud Storage: moto, with generations in place of conditions by ETag.

The bucket, the objects and the parts of uploads are those of moto, whose interface (S3's) Google's is but for headers:
https://docs.cloud.google.com/storage/docs/xml-api/reference-headers.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import threading
import urllib.parse
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from support.stores import Stored, endpoint

STALE = b"<Error><Code>PreconditionFailed</Code></Error>"

SIGNED = "AWS4-HMAC-SHA256 Credential=a/20261128/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"


class Generations:
    """A WSGI application: each object that is put has a number, which a condition names; 0 stands for no object."""

    def __init__(self, store: Callable[..., Iterable[bytes]]):
        self._store, self._numbers, self._lock = store, dict[str, int](), threading.Lock()
        self._next = itertools.count(1_790_000_000_000_000)

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        path, query, method = environ["PATH_INFO"], environ.get("QUERY_STRING", ""), environ["REQUEST_METHOD"]
        environ["HTTP_AUTHORIZATION"] = SIGNED
        for name in ("RAW_URI", "REQUEST_URI"):  # obstore escapes each sign, and moto reads them as they are
            environ[name] = f"{urllib.parse.quote(path)}?{query}".removesuffix("?")
        if source := environ.pop("HTTP_X_GOOG_COPY_SOURCE", None):
            environ["HTTP_X_AMZ_COPY_SOURCE"] = source
        wanted = environ.pop("HTTP_X_GOOG_IF_GENERATION_MATCH", None)
        with self._lock:
            if wanted is not None and int(wanted) != self._numbers.get(path, 0):
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                start("412 Precondition Failed", [("Content-Length", str(len(STALE)))])
                return [STALE]

            def started(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
                if status.startswith("2"):
                    self._note(method, path, query)
                    if path in self._numbers and method != "DELETE":
                        headers = [*headers, ("x-goog-generation", str(self._numbers[path]))]
                return start(status, headers, *rest)

            return list(self._store(environ, started))

    def _note(self, method: str, path: str, query: str) -> None:
        if (method == "PUT" and "partNumber" not in query) or (method == "POST" and "uploadId" in query):
            self._numbers[path] = next(self._next)
        elif method == "DELETE" and "uploadId" not in query:
            self._numbers.pop(path, None)


@functools.cache
def google_endpoint() -> str:
    """The address of the server, which is started once in a process."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    endpoint()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = make_server("127.0.0.1", 0, Generations(DomainDispatcherApplication(create_backend_app)), threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


class StoredInGoogle(Stored):
    """A bucket of its own. What another client puts goes through the same server, which counts it."""

    scheme = "gs"

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import boto3

        monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
        self.move(monkeypatch, google_endpoint())
        keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region_name": "us-east-1"}
        super().__init__(boto3.client("s3", endpoint_url=google_endpoint(), **keys))

    def move(self, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
        account = {"gcs_base_url": endpoint, "disable_oauth": True, "client_email": "", "private_key": ""}
        monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps({**account, "private_key_id": ""}))
