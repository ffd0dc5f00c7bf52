"""Exports of transformers' architectures, with PEFT's adapters inside their blocks, are proven."""

from __future__ import annotations

from pathlib import Path

import pytest

import lora_export as le
from support.small_models import MODELS, small_adapter, small_model

QUICK = {"clip", "whisper", "wav2vec2"}  # texts with images, a spectrogram, and a waveform


@pytest.mark.parametrize("lora", ["merged", "nodes"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in MODELS]
)
def test_an_export_of_each_architecture_is_proven(name: str, lora: str, tmp_path: Path) -> None:
    base = small_model(name, tmp_path / "base")
    adapter = small_adapter(name, base, tmp_path / "adapter")
    assert le.export_onnx(base, tmp_path / "model.onnx", adapters=adapter, lora=lora).proofs.whole.verdict.same


@pytest.mark.parametrize("name", ["clip", pytest.param("whisper", marks=pytest.mark.slow)])
def test_a_merged_folder_of_several_inputs_is_proven(name: str, tmp_path: Path) -> None:
    base = small_model(name, tmp_path / "base")
    adapter = small_adapter(name, base, tmp_path / "adapter")
    le.merge(base, adapter, tmp_path / "merged")
    assert le.verify(tmp_path / "merged", base, adapters=adapter)
    assert not le.verify(tmp_path / "merged", base, adapters=adapter, weights=[0.5])
