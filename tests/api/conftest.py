"""Files that several tests of `verify` judge, made once for a worker; and data to train on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
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


@pytest.fixture
def data(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((24, 5, 8)).astype(np.float32)
    np.savez(tmp_path / "data.npz", rows=rows, weights=np.ones((24, 5), np.float32), labels=np.tanh(rows[..., ::-1]))
    return tmp_path / "data.npz"
