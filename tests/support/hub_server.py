"""A server on the loopback address that answers huggingface_hub as the Hugging Face Hub does."""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha1
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from support.hub import COMMIT
from support.local_server import Silent, local_server

BRANCHES = ("main", "feature/x", "refs/pr/1")


@dataclass
class HubServer:
    """Repositories with one commit, that of BRANCHES. `requests` lists what was asked for, as "METHOD path"."""

    repositories: Mapping[str, Mapping[str, bytes]]
    gated: frozenset[str] = frozenset()  # their files are not listed as missing, but refused
    cut: set[str] = field(default_factory=set)  # files whose connection is closed in the middle
    down: bool = False  # every request is answered with 503
    requests: list[str] = field(default_factory=list)
    endpoint: str = ""

    @property
    def files_sent(self) -> set[str]:
        """The names of the files whose contents were asked for."""
        return {line.rpartition("/")[2] for line in self.requests if line.startswith("GET ") and "/resolve/" in line}


def ask(hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub ask this server, without a token, and use this cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@contextmanager
def hub_server(
    repositories: Mapping[str, Mapping[str, bytes]], gated: frozenset[str] = frozenset()
) -> Iterator[HubServer]:
    """Serve repositories until the end of the block."""
    hub = HubServer(repositories, gated)
    with local_server(type("Handler", (_Handler,), {"hub": hub})) as hub.endpoint:
        yield hub


class _Handler(Silent, BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        parts = path.removeprefix("/api/models").strip("/").split("/")
        if len(parts) < 4:  # such as the list of agents, which is no repository
            self._send(404, b"")
            return
        self.hub.requests.append(f"{self.command} {path}")
        name, action, revision, file = "/".join(parts[:2]), parts[2], parts[3], "/".join(parts[4:])
        files = self.hub.repositories.get(name)
        if self.hub.down:
            self._send(503, b"")
        elif files is None:
            self._refuse(404, "RepoNotFound")
        elif urllib.parse.unquote(revision) not in (*BRANCHES, COMMIT):
            self._refuse(404, "RevisionNotFound")
        elif action == "revision":
            self._send(200, json.dumps({"id": name, "sha": COMMIT, "siblings": []}).encode())
        elif action == "tree":
            self._send(200, json.dumps([_listed(file, content) for file, content in files.items()]).encode())
        elif name in self.hub.gated:
            self._refuse(403, "GatedRepo")
        elif file not in files:
            self._refuse(404, "EntryNotFound")
        else:
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{sha1(files[file]).hexdigest()}"', "Accept-Ranges": "bytes"}
            self._send(200, files[file], headers, cut=file in self.hub.cut)

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None, *, cut: bool = False) -> None:
        start = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0]
        offset = int(start) if status == 200 else 0
        self.send_response(206 if offset else status)
        for header, value in {**(headers or {}), "Content-Length": str(len(body) - offset)}.items():
            self.send_header(header, value)
        if offset:
            self.send_header("Content-Range", f"bytes {offset}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[offset : len(body) // 2] if cut else body[offset:])
        if cut:
            self.close_connection = True


def _listed(file: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": file, "size": len(content), "oid": sha1(content).hexdigest()}
