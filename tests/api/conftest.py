"""Files that several tests of `verify` judge: made once for a worker."""

from __future__ import annotations

from pathlib import Path

import pytest

import lora_export as le
from support.api import MODEL, an_adapter, base_weights


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    an_adapter(folder / "adapter")
    an_adapter(folder / "stronger", scale=2.0)
    base_weights(folder / "base.safetensors")
    le.merge(folder / "base.safetensors", folder / "adapter", folder / "merged.safetensors")
    le.export_onnx(MODEL, folder / "m.onnx", adapters=folder / "adapter")
    return folder
