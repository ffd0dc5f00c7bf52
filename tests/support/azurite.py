"""A store with the interface of Azure: Azurite, the emulator of its makers, and their client."""

from __future__ import annotations

import atexit
import functools
import itertools
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from support import ROOT
from support.browser import NODE
from support.folder_contents import folder_contents
from support.stores import Stored

SERVER = NODE / "node_modules" / ".bin" / "azurite-blob"
CLIENT = ROOT / ".venv" / "azure"  # where `make test-stores` installs azure-storage-blob
ACCOUNT = "devstoreaccount1"  # with this key, in every Azurite
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
READY = 60  # seconds in which it has to start
_numbers = itertools.count()


@functools.cache
def endpoint() -> str:
    """The address of the account. The server is started once in a process, and ends with it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder, end = tempfile.mkdtemp(prefix="azurite-"), time.monotonic() + READY
    options = ["--silent", "--disableTelemetry", "--skipApiVersionCheck", "--location", folder, "--blobPort", str(port)]
    process = subprocess.Popen([SERVER, *options])
    atexit.register(lambda: (process.kill(), process.wait(), shutil.rmtree(folder)))
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return f"http://127.0.0.1:{port}/{ACCOUNT}"
        except OSError:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.1)


class StoredInAzure(Stored):
    """A container of its own, and another client that reads and writes it."""

    scheme, tags_contents, keeps_parts = "az", False, False

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sys.path.append(str(CLIENT))
        from azure.storage.blob import ContainerClient

        for name, value in {"AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT, "AZURE_STORAGE_ACCOUNT_KEY": KEY}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
        self.move(monkeypatch, endpoint())
        self.name = f"container-{next(_numbers)}"
        self.client = ContainerClient(endpoint(), self.name, {"account_name": ACCOUNT, "account_key": KEY})
        self.client.create_container()

    def move(self, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
        monkeypatch.setenv("AZURE_ENDPOINT", endpoint)

    def put(self, key: str, content: bytes | Path) -> None:
        files = {"": content} if isinstance(content, bytes) else folder_contents(content)
        for name, each in files.items():
            self.client.upload_blob(f"{key}/{name}".strip("/"), each, overwrite=True)

    def get(self, key: str) -> bytes:
        return bytes(self.client.download_blob(key).readall())

    def objects(self, prefix: str = "") -> dict[str, Any]:
        found = {}
        for each in self.client.list_blobs(name_starts_with=prefix):
            tag = each.etag.strip('"')
            found[each.name] = {"Key": each.name, "ETag": f'"{tag}"', "LastModified": each.last_modified}
        return found

    def delete(self, key: str) -> None:
        self.client.delete_blob(key)

    def uploads(self) -> list[Any]:
        whole = self.objects()
        return [each for each in self.client.list_blobs(include=["uncommittedblobs"]) if each.name not in whole]
