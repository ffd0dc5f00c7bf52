"""The name of an output gets the suffix of its kind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lora_export.artifacts.files import with_suffix
from lora_export.errors import OutputFailed, WrongUsage


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("out/model", "out/model.onnx"),
        ("llama-3.2", "llama-3.2.onnx"),
        ("model.onnx", "model.onnx"),
        ("model.v2.onnx", "model.v2.onnx"),
        (".hidden", ".hidden.onnx"),
        ("..", ".."),
    ],
)
def test_a_name_without_the_suffix_gets_it(name: str, expected: str) -> None:
    assert with_suffix(name, ".onnx") == Path(expected)


@pytest.mark.parametrize(
    ("name", "suffix", "library"),
    [(b"m\xff.onnx", ".onnx", "ONNX's libraries"), (b"\xff/m.ts", ".pt", "PyTorch's readers")],
)
def test_a_path_that_a_library_cannot_open_is_refused(name: bytes, suffix: str, library: str) -> None:
    with pytest.raises(OutputFailed, match=rf"\\udcff.* is not UTF-8, and {library} take no such path"):
        with_suffix(os.fsdecode(name), suffix, ".ts")


def test_safetensors_may_have_any_path() -> None:
    assert with_suffix(os.fsdecode(b"m\xff"), ".safetensors").name == os.fsdecode(b"m\xff.safetensors")


def test_further_suffixes_of_the_kind_are_left_alone() -> None:
    assert with_suffix("x.ts", ".pt", ".ts") == Path("x.ts")


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors", "model.onnx_adapter"])
def test_the_suffix_of_another_kind_is_refused(name: str) -> None:
    with pytest.raises(WrongUsage, match=rf"the output is a .onnx file: name it model.onnx, not {name}"):
        with_suffix(name, ".onnx")


def test_what_exists_keeps_its_name(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("folder", "file", "link"):
        assert with_suffix(tmp_path / name, ".onnx") == tmp_path / name
