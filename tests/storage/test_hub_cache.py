"""Names of the Hugging Face Hub are looked up in a local cache, and nothing is downloaded."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from lora_export.errors import EnvironmentLacking, InputRefused, LoraExportError, OutputFailed
from lora_export.storage.hub_cache import hub_name, hub_source, locate
from support import ROOT
from support.hub import COMMIT, cached
from support.hub_server import HubServer, ask, hub_server


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


@pytest.mark.parametrize(
    "name", ["org/small", "org/small@main", f"org/small@{COMMIT}", "org/small.gguf", "org/ov.xml", "org/small@v.gguf"]
)
def test_a_name_in_the_cache_is_its_snapshot(cache: Path, name: str) -> None:
    messages: list[str] = []
    repository, _, revision = name.partition("@")
    if repository != "org/small":
        cached(cache, repository, {"config.json": "{}"})
    elif revision:
        (cache / "models--org--small/refs" / revision).write_text(COMMIT)
    snapshot = cache / f"models--{repository.replace('/', '--')}" / "snapshots" / COMMIT
    assert locate(name, messages.append) == snapshot
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
    "path", ["missing", "a/b/c", "models/x.onnx", "a/models/x.gguf", "net.py:make", "dir/net.py", "/org/small", "~/org"]
)
def test_other_paths_are_left_alone(cache: Path, path: str) -> None:
    assert locate(path, print) == Path(path)


def test_a_folder_of_that_name_comes_first(cache: Path) -> None:
    Path("org/small").mkdir(parents=True)
    assert locate("org/small", print) == Path("org/small")


def test_a_folder_without_permission_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("locked").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: not (path == "locked" and mode & os.R_OK))  # root reads all
    with pytest.raises(InputRefused, match=r"^locked: Permission denied$"):
        locate("locked", print)


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


WEIGHTS = bytes(range(256)) * 4000
WANTED = {
    "config.json": b"{}",
    "model.safetensors": WEIGHTS,
    "vocab.txt": b"a",
    "spiece.model": b"b",
    "chat_template.jinja": b"c",
}
OTHERS = {
    "pytorch_model.bin": b"pickle",
    "training_args.bin": b"pickle",
    "model.pt": b"pickle",
    "modeling_own.py": b"code",
    "consolidated.safetensors": b"again",
    "original/consolidated.00.safetensors": b"again",
    "checkpoint-5/adapter_model.safetensors": b"before",
    "README.md": b"words",
    ".gitattributes": b"",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub that huggingface_hub asks, an empty cache, and an empty current folder."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    repositories = {
        "org/small": {**WANTED, **OTHERS},
        "org/closed": WANTED,
        "org/pickles": {"config.json": b"{}", "pytorch_model.bin": b"pickle"},
    }
    with hub_server(repositories, gated=frozenset({"org/closed"})) as server:
        ask(server, tmp_path / "hub", monkeypatch)
        yield server


def refused(name: str) -> LoraExportError:
    """The error of a download that fails."""
    with pytest.raises(LoraExportError) as failure:
        locate(name, print, download=True)
    return failure.value


@pytest.mark.parametrize("name", ["org/small", "org/small@main", f"org/small@{COMMIT}"])
def test_the_files_that_commands_read_are_downloaded(hub: HubServer, name: str) -> None:
    messages: list[str] = []
    folder = locate(name, messages.append, download=True)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == WANTED
    assert hub.files_sent == set(WANTED)
    assert messages == [
        f"{name}: downloading from {hub.endpoint}",
        f"{name}: the snapshot {COMMIT} in the Hugging Face cache",
    ]


def test_nothing_is_asked_without_the_option(hub: HubServer) -> None:
    with pytest.raises(InputRefused, match=r"add download=True, or use: hf download org/small$"):
        locate("org/small", print)
    assert hub.requests == []


def test_what_the_cache_has_is_not_downloaded_again(hub: HubServer) -> None:
    folder = locate("org/small", print, download=True)
    hub.requests.clear()
    assert locate("org/small", print, download=True) == folder
    assert locate("org/small", print) == folder
    assert hub.requests == []


@pytest.mark.parametrize("name", ["config.json", "vocab.txt"])
def test_a_cache_without_weights_is_downloaded_to_the_end(hub: HubServer, name: str) -> None:
    huggingface_hub.hf_hub_download("org/small", name)
    folder = locate("org/small", print, download=True)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == WANTED


@pytest.mark.slow
def test_after_a_cut_connection_the_same_command_downloads_the_rest(hub: HubServer) -> None:
    hub.cut.add("model.safetensors")
    error = refused("org/small")
    assert isinstance(error, EnvironmentLacking)
    assert f"the download of org/small from {hub.endpoint} failed (" in str(error)
    assert "The same command downloads the files that are missing" in str(error)
    with pytest.raises(InputRefused, match="download=True"):  # half a model is none
        locate("org/small", print)
    hub.cut.clear()
    hub.requests.clear()
    folder = locate("org/small", print, download=True)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert "model.safetensors" in hub.files_sent


@pytest.mark.parametrize("is_terminal", [False, True])
def test_progress_is_shown_on_a_terminal_alone(
    hub: HubServer, is_terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    locate("org/small", print, download=True)
    assert ("Fetching 5 files" in capsys.readouterr().err) is is_terminal


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("org/other", InputRefused, "{0} has no repository org/other, or it is private. Check the name, or log in"),
        ("org/small@v9", InputRefused, "the repository org/small at {0} has no revision v9"),
        ("org/closed", InputRefused, "org/closed is gated: accept its conditions at {0}/org/closed, and log in"),
        ("org/pickles", InputRefused, "org/pickles has no .safetensors file, and download=True gets no other weights"),
        ("org/a--b", InputRefused, "org/a--b is no name of a repository: "),
    ],
)
def test_what_cannot_be_downloaded_is_refused(
    hub: HubServer, name: str, kind: type[LoraExportError], message: str
) -> None:
    error = refused(name)
    assert type(error) is kind
    assert message.format(hub.endpoint) in str(error)
    assert "\n" not in str(error)


def test_a_hub_that_is_down_or_not_reached(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.down = True
    assert "503" in str(refused("org/small"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://me:secret@127.0.0.1:9")
    error = refused("org/small")
    assert isinstance(error, EnvironmentLacking)
    assert "the download of org/small from http://127.0.0.1:9 failed (ConnectError: " in str(error)


def test_an_error_of_the_hub_shows_no_password(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.down = True
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint.replace("//", "//me:secret@"))
    error = str(refused("org/small"))
    assert "503" in error and "secret" not in error


def test_offline_mode_forbids_the_download(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    error = refused("org/small")
    assert isinstance(error, EnvironmentLacking)
    assert "org/small is not in the Hugging Face cache, and HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set" in str(error)
    assert hub.requests == []


def test_a_download_without_huggingface_hub(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    error = refused("org/small")
    assert isinstance(error, EnvironmentLacking)
    assert str(error).endswith(": pip install huggingface_hub")


def test_a_cache_that_cannot_be_written(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: str, *, local_files_only: bool = False, **__: object) -> str:
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not cached")
        raise OSError(errno.ENOSPC, "No space left on device", "blob")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    error = refused("org/small")
    assert isinstance(error, OutputFailed)
    assert "org/small cannot be written into the Hugging Face cache: [Errno 28] No space left on device" in str(error)


# An address -> what it names in the snapshot, and the files that are downloaded
ADDRESSES: dict[str, tuple[str, set[str]]] = {
    "hf://org/small": ("", set(WANTED)),
    "hf://org/small/": ("", set(WANTED)),
    "hf://org/small@main": ("", set(WANTED)),
    f"hf://org/small@{COMMIT}": ("", set(WANTED)),
    "hf://org/small@feature%2Fx": ("", set(WANTED)),
    "hf://org/small@refs/pr/1/README.md": ("README.md", {"README.md"}),
    "hf://org/small@refs%2Fpr%2F1/README.md": ("README.md", {"README.md"}),
    "hf://org/small/checkpoint-5": ("checkpoint-5", {"adapter_model.safetensors"}),
    "hf://org/small@main/original/consolidated.00.safetensors": (
        "original/consolidated.00.safetensors",
        {"consolidated.00.safetensors"},
    ),
    "hf://org/small/README.md": ("README.md", {"README.md"}),
}


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_is_downloaded_as_far_as_the_cache_lacks_it(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    below, files = ADDRESSES[address]
    messages: list[str] = []
    found = locate(address, messages.append)
    assert found == tmp_path / "hub/models--org--small/snapshots" / COMMIT / below and hub.files_sent == files
    assert messages[-1] == f"{address}: the snapshot {COMMIT} in the Hugging Face cache" and found.exists()
    assert hub_source(found) == {"repository": "org/small", "revision": COMMIT}
    for name, value in {"HF_HUB_OFFLINE": True, "ENDPOINT": "http://127.0.0.1:9"}.items():  # then with no connection
        monkeypatch.setattr(constants, name, value)
        hub.requests.clear()
        assert locate(address, print) == found and hub.requests == []
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.mark.parametrize(
    ("address", "kind", "message"),
    [
        ("hf://org", InputRefused, "hf://org is no address of a model: hf://OWNER/NAME[@REVISION][/PATH]"),
        ("hf://org/small/../other", InputRefused, "is no address of a model"),
        ("hf://org/small/.", InputRefused, "is no address of a model"),
        ("hf://org/small/*", InputRefused, "the repository org/small has no *"),
        ("hf://org/small/nothing", InputRefused, "the repository org/small has no nothing"),
        ("hf://org/small@v9/config.json", InputRefused, "the repository org/small at {0} has no revision v9"),
        ("hf://org/small@feature/y", InputRefused, "no revision feature. In an hf:// address, %2F is a slash"),
        ("hf://org/other", InputRefused, "{0} has no repository org/other, or it is private"),
        ("hf://org/closed", InputRefused, "org/closed is gated"),
        ("hf://org/pickles", InputRefused, "org/pickles has no .safetensors file"),
    ],
)
def test_an_address_of_nothing_is_refused(
    hub: HubServer, address: str, kind: type[LoraExportError], message: str
) -> None:
    with pytest.raises(LoraExportError) as failed:
        locate(address, print)
    assert type(failed.value) is kind and message.format(hub.endpoint) in str(failed.value)
    assert "\n" not in str(failed.value) and hub.files_sent <= {"config.json"}


def test_an_address_that_is_not_cached_is_refused_offline(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(EnvironmentLacking, match="org/small is not in the Hugging Face cache, and HF_HUB_OFFLINE"):
        locate("hf://org/small", print)
    assert hub.requests == []


INDEX = json.dumps({"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}})
PARTS = {
    "no weights": ({"config.json": "{}"}, "", "a .safetensors file"),
    "an index alone": (
        {"model.safetensors.index.json": INDEX},
        "",
        "model-1-of-2.safetensors and model-2-of-2.safetensors",
    ),
    "one of two shards": (
        {"model.safetensors.index.json": INDEX, "model-1-of-2.safetensors": "x"},
        "",
        "model-2-of-2.safetensors",
    ),
    "another folder": ({"config.json": "{}"}, "/unet", "unet"),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_a_snapshot_is_refused_offline(part: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, below, lacking = PARTS[part]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cached(cache, "org/part", files)
    with pytest.raises(EnvironmentLacking) as refused:
        locate(f"hf://org/part{below}", print)
    assert str(refused.value) == (
        f"the Hugging Face cache has a part of org/part, without {lacking}, and HF_HUB_OFFLINE or "
        "TRANSFORMERS_OFFLINE is set. To download it, unset the variable"
    )


@pytest.mark.parametrize("name", ["/nope/x.safetensors", "../x.safetensors", "x" * 5000, "x\0y", "\ud800", "", 5])
def test_an_index_that_names_no_file_below_it_is_refused_offline(
    name: object, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cached(cache, "org/part", {"model.safetensors.index.json": json.dumps({"weight_map": {"a": name}})})
    with pytest.raises(InputRefused, match=r"index\.json may only name files below its folder, and names ") as refused:
        locate("hf://org/part", print)
    assert len(str(refused.value)) < 1000
