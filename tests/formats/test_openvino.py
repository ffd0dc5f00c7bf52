"""Adapters for OpenVINO GenAI, which reads A and B alone: the scale is in B."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_export as le
from lora_export.errors import InputRefused
from support.handmade import peft_adapter

A, B = [[1.0, 2.0], [0.5, -1.0]], [[1.0, 0.25], [3.0, -2.0]]


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        ({"lora_alpha": 2}, 1),
        ({"lora_alpha": 5}, 2.5),
        ({"lora_alpha": 3, "use_rslora": True}, 3 / np.sqrt(2)),
        ({"lora_alpha": 2, "alpha_pattern": {"fc": 7}}, 3.5),
        ({"lora_alpha": 2, "rank_pattern": {"fc": 2}, "r": 8}, 1),
    ],
)
def test_the_product_of_both_factors_is_the_trained_change(
    config: dict[str, Any], factor: float, tmp_path: Path
) -> None:
    adapter = peft_adapter(tmp_path / "a", {"model.fc": (A, B)}, **config)
    result = le.convert(adapter, tmp_path / "a.safetensors", to="openvino")
    found = load_file(result.output)
    assert sorted(found) == [f"base_model.model.model.fc.lora_{side}.weight" for side in "AB"]
    product = found["base_model.model.model.fc.lora_B.weight"] @ found["base_model.model.model.fc.lora_A.weight"]
    assert product == pytest.approx(factor * np.array(B) @ np.array(A), rel=1e-6)
    (pair,) = le.load_adapter(result.output).pairs.values()
    assert pair.scale == 1 and pair.delta() == pytest.approx(product, rel=1e-6)


def test_what_openvino_would_pass_over_is_refused(tmp_path: Path) -> None:
    adapter = peft_adapter(tmp_path / "a", {"fc": (A, B)}, {"head.weight": [[1.0]]})
    with pytest.raises(
        InputRefused, match=r"(?s)openvino cannot express everything in a:.*head\.weight: a whole tensor"
    ):
        le.convert(adapter, tmp_path / "out.safetensors", to="openvino")
    convolution = peft_adapter(tmp_path / "c", {"conv": (np.ones((1, 2, 3, 3)), np.ones((2, 1, 1, 1)))})
    with pytest.raises(InputRefused, match="conv: no pair of a linear layer, or of a convolution of one pixel"):
        le.convert(convolution, tmp_path / "out.safetensors", to="openvino")
    assert not (tmp_path / "out.safetensors").exists()


def test_bare_keys_of_peft_without_the_mark_have_no_scale(tmp_path: Path) -> None:
    adapter = peft_adapter(tmp_path / "a", {"fc": (A, B)}, lora_alpha=4)
    marked = le.convert(adapter, tmp_path / "b.safetensors", to="openvino").output
    save_file(load_file(marked), tmp_path / "bare.safetensors")
    with pytest.raises(InputRefused, match="lora_rank="):
        le.load_adapter(tmp_path / "bare.safetensors")
