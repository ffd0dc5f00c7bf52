"""What a candidate computes, against PyTorch with the adapter attached."""

from __future__ import annotations

from pathlib import Path

import pytest

import lora_export as le
from lora_export.runtime.memory import AVAILABLE
from support.api import MODEL


def test_another_adapter_is_different_and_returned(place: Path) -> None:
    result = le.verify(place / "m.onnx", MODEL, adapters=place / "stronger")
    assert not result and result.verdict.outcome == "different" and result.exit_code == 4


def test_modules_are_not_compared_where_memory_is_missing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = le.verify(place / "m.onnx", MODEL, adapters=place / "stronger")
    monkeypatch.setenv(AVAILABLE, "1")
    result = le.verify(place / "m.onnx", MODEL, adapters=place / "stronger")
    assert compared.exit_code == result.exit_code == 4
    note = "modules were not compared: this needs 0.0 GiB of memory, and 0.0 GiB are available"
    assert note in result.verdict.notes and note not in compared.verdict.notes
