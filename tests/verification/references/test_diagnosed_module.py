"""When a candidate is compared module by module, and that a failure there changes no verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora_export.errors import RuntimeRefused
from lora_export.verification.diagnose import traced_candidate
from lora_export.verification.parity import Outcome
from lora_export.verification.references import diagnosed_module
from support.diagnosed_graphs import half_value, make, proven, the_adapter


def test_same_candidate_is_not_diagnosed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(diagnosed_module, "diagnose", unexpected)
    assert proven(make("merged", tmp_path, the_adapter()), the_adapter()).diagnosis is None


def test_failed_diagnosis_leaves_the_verdict_and_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise RuntimeRefused("onnxruntime: no", "more")

    monkeypatch.setattr(traced_candidate, "expose", failing)
    result = proven(half_value(make("merged", tmp_path, the_adapter())), the_adapter())
    assert result.verdict.outcome is Outcome.DIFFERENT and result.diagnosis is None
    assert "modules could not be compared: onnxruntime: no" in result.verdict.notes
