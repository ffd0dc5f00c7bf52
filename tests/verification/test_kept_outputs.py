"""Outputs that are kept on the disk where they are large."""

from __future__ import annotations

import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from lora_export.verification import kept_outputs
from lora_export.verification.kept_outputs import kept


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(kept_outputs, "LARGEST_IN_MEMORY", 100)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("dtype", [np.float64, np.float32, ml_dtypes.bfloat16, np.int64, np.bool_])
def test_large_outputs_are_mapped_with_the_same_values(dtype: type, folder: Path) -> None:
    large, small = np.arange(2000).reshape(20, 100).astype(dtype).T, np.ones(3, dtype)
    found = kept({"large": large, "small": small})
    assert found["small"] is small
    assert (found["large"].dtype, found["large"].shape) == (large.dtype, large.shape)
    assert np.array_equal(found["large"], large)
    assert not np.shares_memory(found["large"], large)
    assert isinstance(found["large"].base, np.memmap)
    assert not list(folder.iterdir())  # the file has no name, so that nothing is left behind


def test_outputs_stay_in_memory_where_no_file_can_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> object:
        raise OSError("no space left on the device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    large = np.ones(1000)
    assert kept({"large": large})["large"] is large
