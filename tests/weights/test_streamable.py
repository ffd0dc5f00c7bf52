"""Which checkpoints can be read tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from lora_export.storage import safetensors_file
from lora_export.weights.checkpoint import open_checkpoint
from lora_export.weights.streamable import is_streamable


@pytest.mark.parametrize(
    ("model_type", "dtype", "expected"),
    [
        ("llama", np.float32, True),
        ("llama", np.float16, True),
        ("llama", ml_dtypes.bfloat16, True),
        ("llama", np.float64, False),
        ("llama", np.int64, False),
        ("mixtral", np.float32, False),  # transformers stacks its experts
    ],
)
def test_floats_that_are_loaded_as_they_are_stored(model_type: str, dtype: Any, expected: bool, tmp_path: Path) -> None:
    safetensors_file.write(tmp_path / "model.safetensors", {"w": np.ones(2, np.float32), "v": np.ones(2, dtype)})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert is_streamable(open_checkpoint(tmp_path)) is expected
    assert is_streamable(open_checkpoint(tmp_path / "model.safetensors")) is (expected or model_type == "mixtral")
