"""`--expect-…` of `verify` and `inspect`: a gate for the adapter and the base, before anything is compared."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_export import formats
from lora_export.storage.hashes import file_sha256
from support.cli import call
from support.handmade import base_file, peft_adapter

OTHER = "0" * 64


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A base, an adapter of rank 1 and alpha 3, and the merge of both."""
    base_file(tmp_path / "base.safetensors", {"fc.weight": [[0, 1, 2], [3, 4, 5]]})
    peft_adapter(tmp_path / "adapter", {"fc": ([[1, 2, 3]], [[1], [10]])}, lora_alpha=3)
    merge = ("merge", tmp_path / "base.safetensors", tmp_path / "adapter", "-o", tmp_path / "out.safetensors")
    assert call(*merge, "--hash", "sha256") == 0
    return tmp_path


def commands(place: Path) -> dict[str, tuple[object, ...]]:
    base, adapter, out = place / "base.safetensors", place / "adapter", place / "out.safetensors"
    return {"verify": ("verify", out, "--base", base, "-a", adapter), "inspect": ("inspect", out)}


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_a_gate_passes_what_it_expects_alone(command: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = commands(place)[command]
    adapter, base = formats.load(place / "adapter").sha256, file_sha256(place / "base.safetensors")
    right = {
        "--expect-adapter-sha256": (adapter, OTHER), "--expect-rank": ("1", "2"), "--expect-alpha": ("3", "4"),
        "--expect-base-sha256": (base, OTHER),
    }  # fmt: skip
    assert call(*line, *(word for option, (value, _) in right.items() for word in (option, value))) == 0
    for option, (value, wrong) in right.items():
        capsys.readouterr()
        assert call(*line, option, wrong) == 4
        printed = capsys.readouterr().err
        assert "is not what was expected" in printed and f"is {value}, expected: {wrong}" in printed
    assert call(*line, "--expect-adapter-sha256", "12") == 2


def test_an_adapter_itself_has_a_rank_and_an_alpha(place: Path) -> None:
    line = ("inspect", place / "adapter", "--expect-rank", "1")
    assert call(*line, "--expect-alpha", "3") == 0
    assert call(*line, "--expect-alpha", "6") == 4


def test_a_base_without_sha256_is_undecided(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = place / "fast.safetensors"
    assert call("merge", place / "base.safetensors", place / "adapter", "-o", out) == 0
    capsys.readouterr()
    assert call("inspect", out, "--expect-base-sha256", OTHER) == 5
    assert "`merge --hash sha256` records it" in capsys.readouterr().err


def test_a_factory_has_no_file_to_compare(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ("verify", place / "out.safetensors", "--model", "some.module:factory", "-a", place / "adapter")
    assert call(*line, "--expect-base-sha256", OTHER) == 2
    assert "is for a base that is a folder or a file" in capsys.readouterr().err
