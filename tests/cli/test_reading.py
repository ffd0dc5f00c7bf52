"""Options on how adapters are read: every command that reads adapters has them, and passes them on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_export.cli import COMMANDS, reading
from support.cli import answer, call
from support.handmade import base_file, peft_adapter

READERS = ("combine", "convert", "inspect", "merge", "onnx", "resize", "torchscript", "verify")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A base, and an adapter for it in a pickle."""
    base_file(tmp_path / "base.safetensors", {"fc.weight": [[0, 1, 2], [3, 4, 5]]})
    adapter = peft_adapter(tmp_path / "adapter", {"fc": ([[1, 2, 3]], [[1], [10]])})
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    return tmp_path


@pytest.mark.parametrize("command", READERS)
def test_every_command_that_reads_adapters_has_the_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command in COMMANDS
    call(command, "--help")
    shown = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in shown for name in reading.FIELDS)


def test_a_pickle_needs_the_option_and_then_merges(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merge = ("merge", place / "base.safetensors", place / "adapter", "-o", place / "out.safetensors")
    assert call(*merge) == 3
    assert "adapter_model.bin is a pickle" in capsys.readouterr().err
    assert not (place / "out.safetensors").exists()
    assert call(*merge, "--allow-pickle") == 0
    assert load_file(place / "out.safetensors")["fc.weight"].tolist() == [[1, 3, 5], [13, 24, 35]]


def test_other_commands_read_the_same_pickle(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(capsys, "inspect", place / "adapter", "--allow-pickle")[0] == 0
    assert call("resize", place / "adapter", "-o", place / "small", "--rank", "1", "--allow-pickle") == 0
    assert call("combine", place / "adapter", "-o", place / "one", "--allow-pickle") == 0
    merged = ("merge", place / "base.safetensors", place / "adapter", "-o", place / "out.safetensors")
    assert call(*merged, "--allow-pickle", "--keep-residual", place / "kept") == 0
    unmerge = ("unmerge", place / "out.safetensors", place / "adapter", "-o", place / "again.safetensors")
    assert call(*unmerge, "--base-from", place / "kept") == 3
    assert call(*unmerge, "--base-from", place / "kept", "--allow-pickle") == 0
    assert (place / "again.safetensors").read_bytes() == (place / "base.safetensors").read_bytes()


def test_values_that_do_not_exist_or_do_not_apply(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = peft_adapter(place / "plain", {"fc": ([[1, 2, 3]], [[1], [10]])})
    assert call("inspect", adapter, "--lora-alpha", "-1") == 2
    assert "--lora-alpha is -1.0; it must be a positive number" in capsys.readouterr().err
    assert call("inspect", adapter, "--lora-alpha", "2") == 3
    assert "--lora-alpha is for adapters that do not record it; this one does" in capsys.readouterr().err
    assert call("resize", adapter, "-o", place / "small", "--rank", "1", "--format", "tarot") == 3
    assert "unknown adapter format 'tarot'; known: peft" in capsys.readouterr().err
