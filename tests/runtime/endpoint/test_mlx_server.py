"""The server of mlx-lm, on the loopback: right by one name, and the base by the name that it lists."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

import lora_export as le
from support.endpoints import save_adapter, save_base

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("mlx_lm") is None, reason="needs mlx-lm"),
]
READY = 180  # seconds until it answers, at most


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mlx")
    base = save_base(folder / "base")
    le.convert(save_adapter(base, folder / "a", alpha=20), folder / "mlx", to="mlx", base=base)
    (folder / "home" / "hub").mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # It ends itself at a prompt that it has in its cache (0.32): this one has none.
    server = [sys.executable, "-m", "mlx_lm", "server", "--prompt-cache-size", "0", "--host", "127.0.0.1"]
    paths = ["--model", folder / "base", "--adapter-path", folder / "mlx", "--port", str(port)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    log = (folder / "log").open("w")
    process = subprocess.Popen([*server, *map(str, paths)], env=environment, stdout=log, stderr=subprocess.STDOUT)
    found = f"http://127.0.0.1:{port}/v1"
    try:
        end = time.monotonic() + READY
        while True:
            try:
                urllib.request.urlopen(f"{found}/models", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < end, (folder / "log").read_text()
                time.sleep(0.5)
        yield found
    finally:
        process.terminate()
        process.wait()
        log.close()


@pytest.mark.parametrize(
    ("name", "outcome", "sentence"),
    [
        ("default_model", "same", "by `next tokens`"),
        (None, "different", "the server answers as the base model: the adapter's name is accepted"),
    ],
)
def test_a_real_server_is_judged(name: str | None, outcome: str, sentence: str, address: str, folder: Path) -> None:
    result = le.verify(address, folder / "base", adapters=folder / "a", served_name=name)
    assert result.verdict.outcome == outcome, str(result)
    assert sentence in str(result) and result.about["endpoint"]["requests"] <= 200
