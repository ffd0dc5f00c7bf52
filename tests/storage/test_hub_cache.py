"""Names of the Hugging Face Hub are looked up in a local cache, and nothing is downloaded."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from lora_export.errors import InputRefused
from lora_export.storage.hub_cache import hub_name, hub_source, locate
from support import ROOT
from support.hub import COMMIT, cached


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with the model org/small in it, in a process that reaches no network, and an empty current folder."""

    def connect(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    cached(tmp_path / "hub", "org/small", {"config.json": "{}"})
    return tmp_path / "hub"


@pytest.mark.parametrize("name", ["org/small", "org/small@main", f"org/small@{COMMIT}"])
def test_a_name_in_the_cache_is_its_snapshot(cache: Path, name: str) -> None:
    messages: list[str] = []
    assert locate(name, messages.append) == cache / "models--org--small/snapshots" / COMMIT
    assert messages == [f"{name}: the snapshot {COMMIT} in the Hugging Face cache"]


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("meta-llama/Llama-3.2-1B", "hf download meta-llama/Llama-3.2-1B"),
        ("org/small@v2", "hf download org/small --revision v2"),
    ],
)
def test_another_name_is_refused_with_the_command_that_gets_it(cache: Path, name: str, command: str) -> None:
    with pytest.raises(InputRefused) as refused:
        locate(name, print)
    assert str(refused.value) == (
        f"there is no file or folder {name}, and the Hugging Face cache has no snapshot of that name. "
        f"To download it, add download=True, or use: {command}"
    )


@pytest.mark.parametrize(
    "path", ["missing", "a/b/c", "models/x.onnx", "net.py:make", "dir/net.py", "/org/small", "~/org"]
)
def test_other_paths_are_left_alone(cache: Path, path: str) -> None:
    assert locate(path, print) == Path(path)


def test_a_folder_of_that_name_comes_first(cache: Path) -> None:
    Path("org/small").mkdir(parents=True)
    assert locate("org/small", print) == Path("org/small")


def test_without_huggingface_hub_the_name_is_refused_too(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputRefused, match="hf download org/small"):
        locate("org/small", print)


def test_the_name_of_a_snapshot_is_read_from_its_path(cache: Path) -> None:
    assert hub_name(locate("org/small", print)) == "org/small"
    assert hub_name(Path("org/small")) is None


@pytest.mark.parametrize(("variable", "folder"), [("HF_HUB_CACHE", "hub"), ("HF_HOME", ".")])
def test_the_environment_determines_where_the_cache_is(cache: Path, variable: str, folder: str) -> None:
    code = "from lora_export.storage.hub_cache import locate; print(locate('org/small', lambda _: None))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {variable: str(cache.parent / folder), "PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()) == cache / "models--org--small/snapshots" / COMMIT


def test_the_commit_of_a_snapshot_is_its_source(cache: Path) -> None:
    snapshot = cache / "models--org--small/snapshots" / COMMIT
    for path in (snapshot, snapshot / "model.onnx"):
        assert hub_source(path) == {"repository": "org/small", "revision": COMMIT}
    for path in (cache, cache / "models--org--small", cache / "models--org--small/refs/main", Path("org/small")):
        assert hub_source(path) == {}
