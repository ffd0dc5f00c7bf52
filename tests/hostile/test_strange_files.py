"""What is no file, has no end or is far too large, in place of each input of each command: refused soon, by name.

The links to /proc are regular files without a size, whose contents the kernel makes when they are read; reading
/proc/kmsg waits for the next message of the kernel.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lora_export.errors import InputRefused
from lora_export.storage.input_files import open_regular, read_text
from support.cli import call
from support.handmade import base_file, graph_file, peft_adapter
from support.slow import slow

W = np.arange(6, dtype=np.float32).reshape(2, 3)
SECONDS = 60
FACTORY = """
import torch
from torch import nn
def make():
    model = nn.Sequential()
    model.fc = nn.Linear(3, 2, bias=False)
    model.fc.weight.data = torch.arange(6.0).reshape(2, 3)
    return model, torch.randn(2, 3)
"""
KINDS = {
    "kernel log": "/proc/kmsg",
    "generated": "/proc/self/status",
    "endless": "/dev/zero",
    "input": "/dev/stdin",
    "nothing": "nowhere",
    "sparse": "",
    "fifo": "",
    "folder": "",
}


@pytest.fixture(autouse=True)
def soon() -> Iterator[None]:
    """End what hangs with an error."""

    def expire(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, expire)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    graph_file(tmp_path / "g.onnx", {"fc.weight": W.T})
    peft_adapter(tmp_path / "adapter", {"fc": ([[1, 2, 3]], [[1], [10]])})
    (tmp_path / "base").mkdir()
    base_file(tmp_path / "base/model.safetensors", {"fc.weight": W})
    (tmp_path / "base/config.json").write_text('{"model_type": "llama"}')
    shutil.copytree(tmp_path / "base", tmp_path / "b")
    shutil.copytree(tmp_path / "adapter", tmp_path / "a")
    (tmp_path / "gx").mkdir()
    shutil.copy(tmp_path / "g.onnx", tmp_path / "gx/g.onnx")
    (tmp_path / "f.py").write_text(FACTORY)
    return tmp_path


def strange(path: Path, kind: str) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "sparse":
        path.touch()
        os.truncate(path, 4 << 40)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind != "nothing" and not os.access(KINDS[kind], os.R_OK):
        pytest.skip(f"{KINDS[kind]} cannot be read here")
    else:
        path.symlink_to(KINDS[kind])


PROOF = ["--model", "f.py:make"]
AUDIT = ["--base", "base", "-a", "adapter"]
COMMANDS = {
    "x.onnx": [
        ["inspect", "x.onnx"],
        ["merge", "x.onnx", "adapter", "-o", "o.onnx"],
        ["verify", "x.onnx", *PROOF],
        ["verify", "g.onnx", *PROOF, "--base", "x.onnx"],
        ["onnx", "x.onnx", "-a", "adapter", "-o", "o.onnx"],
        ["convert", "adapter", "-o", "o.onnx_adapter", "--for", "x.onnx"],
    ],
    "x.safetensors": [
        ["inspect", "x.safetensors"],
        ["merge", "x.safetensors", "adapter", "-o", "o.safetensors"],
        ["merge", "base", "x.safetensors", "-o", "o"],
        ["merge", "g.onnx", "adapter", "--base", "x.safetensors", "-o", "o.onnx"],
        ["verify", "x.safetensors", *AUDIT],
        ["verify", "base", "--base", "x.safetensors", "-a", "adapter"],
        ["verify", "x.safetensors", *PROOF],
    ],
    "x.pt": [["verify", "x.pt", *PROOF], ["inspect", "x.pt"], ["onnx", "f.py:make", "-a", "x.pt", "-o", "o.onnx"]],
    "x.py": [["verify", "g.onnx", "--model", "x.py:make"], ["onnx", "x.py:make", "-o", "o.onnx"]],
    **{f"x.{kind}": [["train", "f.py:make", "--data", f"x.{kind}", "-o", "o"]] for kind in ("jsonl", "csv", "parquet")},
    "x.pt2": [["verify", "x.pt2", *PROOF], ["verify", "g.onnx", "--model", "x.pt2"], ["onnx", "x.pt2", "-o", "o.onnx"]],
    "x.onnx_adapter": [["inspect", "x.onnx_adapter"], ["verify", "g.onnx", *PROOF, "--onnx-adapter", "x.onnx_adapter"]],
    "x.npz": [
        ["verify", "g.onnx", *PROOF, "--inputs", "x.npz"],
        ["onnx", "f.py:make", "-o", "o.onnx", "--inputs", "x.npz"],
        ["train", "f.py:make", "--data", "x.npz", "-o", "o"],
    ],
    "b": [["merge", "b", "adapter", "-o", "o"]],
    "a": [["merge", "base", "a", "-o", "o"]],
    "b/config.json": [
        ["inspect", "b"],
        ["merge", "b", "adapter", "-o", "o"],
        ["onnx", "b", "-o", "o.onnx"],
        ["verify", "g.onnx", "--model", "b"],
    ],
    "b/model.safetensors.index.json": [["inspect", "b"], ["merge", "b", "adapter", "-o", "o"]],
    "b/lora_export.json": [["inspect", "b", "--check"]],
    "b/model.safetensors": [["inspect", "b"], ["merge", "b", "adapter", "-o", "o"], ["verify", "b", *AUDIT]],
    "a/adapter_config.json": [["inspect", "a"], ["merge", "base", "a", "-o", "o"]],
    "a/adapter_model.safetensors": [["inspect", "a"], ["merge", "base", "a", "-o", "o"]],
    "gx/genai_config.json": [["merge", "gx/g.onnx", "adapter", "-o", "o.onnx"]],
}
MAY_BE_ABSENT = ("gx/genai_config.json", "b/lora_export.json")  # where there is no regular file
# Beside `sparse`: some that are no regular file and one without a size, such that each name meets all of them.
QUICK = {
    **dict.fromkeys(("inspect", "onnx"), ("sparse", "endless", "kernel log", "fifo")),
    **dict.fromkeys(("verify", "convert"), ("sparse", "fifo", "generated")),
    "merge": ("sparse", "fifo", "generated", "input", "nothing", "folder"),
    "train": ("fifo", "endless"),
}
OF_A_MERGE = ("input", "nothing", "folder")
# Of rows, code and folders only what is no file: neither has a limit.
UNLIMITED = ("x.jsonl", "x.csv", "x.parquet", "x.py", "a", "b")


def is_refused(name: str, kind: str, command: str) -> bool:
    if kind in OF_A_MERGE:
        return (
            command == "merge" and not name.startswith(("x.", "gx/")) and (name, kind) != ("b/config.json", "nothing")
        )
    return name not in (MAY_BE_ABSENT if kind in ("endless", "fifo") else UNLIMITED)


CASES = [
    (name, kind, command) if name in MAY_BE_ABSENT or kind in QUICK[command[0]] else slow(name, kind, command)
    for name, commands in COMMANDS.items()
    for command in commands
    for kind in KINDS
    if is_refused(name, kind, command[0])
]


@pytest.mark.fault(41)
@pytest.mark.parametrize(("name", "kind", "command"), CASES, ids=lambda value: str(value).replace("'", ""))
def test_no_input_is_read_without_end(
    place: Path, name: str, kind: str, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    strange(place / name, kind)
    before = sorted(place.iterdir())
    capsys.readouterr()
    assert call(*command) == 3
    error = capsys.readouterr().err
    assert Path(name).name in error or name.partition("/")[0] in error
    assert kind in ("sparse", "nothing") or command[0] != "merge" or "/" not in name or "regular file" in error
    assert sorted(path for path in place.iterdir() if path.name != "__pycache__") == before


@pytest.mark.parametrize("kind", ["kernel log", "sparse"])
def test_a_chat_template_is_a_file(place: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "base/chat_template.jinja").write_text("x")
    assert call("merge", "base", "adapter", "-o", "merged") == 0
    strange(place / "merged/chat_template.jinja", kind)
    assert call("verify", "merged", *AUDIT) == 3
    assert "chat_template.jinja" in capsys.readouterr().err


def test_a_config_that_is_a_link_to_nothing_is_none(place: Path) -> None:
    strange(place / "b/config.json", "nothing")
    assert call("merge", "b", "adapter", "-o", "o") == 0


@pytest.mark.fault(27)
@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("b/tokenizer.json", ["merge", "b", "adapter", "-o", "o"]),
        ("gx/tokenizer.json", ["merge", "gx/g.onnx", "adapter", "-o", "o.onnx"]),
        ("gx/tokenizer.json", ["onnx", "gx/g.onnx", "-a", "adapter", "-o", "o.onnx"]),
    ],
)
def test_files_that_are_copied_count_as_needed_space(
    place: Path, name: str, command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.disk_usage(place).free > 4 << 40:
        pytest.skip("the disk has room for it")
    strange(place / name, "sparse")
    assert call(*command) == 7
    assert "free, 4,398 GB needed" in capsys.readouterr().err
    assert not list(place.glob("o*")) and not list(place.glob(".o*.partial"))


def test_an_empty_file_is_a_file_and_text_has_a_limit(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with open_regular(tmp_path / "empty") as file:
        assert file.read() == b""
    (tmp_path / "text").write_bytes(b"ab\xff")
    assert read_text(tmp_path / "text", 3) == "ab\ufffd"
    with pytest.raises(InputRefused, match="text has more than 2 bytes"):
        read_text(tmp_path / "text", 2)
    os.truncate(tmp_path / "text", 2 << 40)
    with pytest.raises(InputRefused, match="text has more than"):
        read_text(tmp_path / "text", 1 << 40)  # to read so much would raise MemoryError
