"""modelopt's nvfp4 as floats: by hand, and as modelopt itself dequantises it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_export.errors import InputRefused
from lora_export.weights.quantised.modelopt import modelopt_weights
from support.quantised import OpenedWeight, Tensors, bits_of, example, opened


def found(stored: Tensors, path: Path, algorithm: str = "NVFP4", dtype: str = "bfloat16") -> OpenedWeight:
    return opened(path, stored, modelopt_weights, {"quant_method": "modelopt", "quant_algo": algorithm}, dtype)


def test_weight_is_number_times_both_scales(tmp_path: Path) -> None:
    numbers = torch.zeros(1, 16, dtype=torch.uint8)
    numbers[0, 0], numbers[0, 15] = 0x72, 0xC1  # 1 and 6; 0.5 and -2
    stored = {
        "x.weight": numbers,
        "x.weight_scale": torch.tensor([[2.0, 448]]).to(torch.float8_e4m3fn),
        "x.weight_scale_2": torch.tensor(0.25),
    }
    weight = found(stored, tmp_path / "m.safetensors").whole.tolist()
    assert weight == [[0.5, 3, *[0] * 28, 56, -224]]


def test_weight_is_what_modelopt_makes_of_it(tmp_path: Path) -> None:
    stored, weight = example("modelopt nvfp4")
    one = found(stored | {"x.input_scale": torch.ones(1)}, tmp_path / "m.safetensors")
    assert (one.tensor.shape, one.tensor.scheme) == ((8, 48), "modelopt nvfp4")
    assert {*one.tensor.parts, one.tensor.packed} == {*stored, "x.input_scale"}
    assert bits_of(one.whole) == bits_of(weight) and bits_of(one.rows(slice(3, 5))) == bits_of(weight[3:5])


@pytest.mark.parametrize("algorithm", ["FP8", "NVFP4_AWQ", "MIXED_PRECISION", "None"])
def test_other_algorithms_are_refused_by_name(algorithm: str, tmp_path: Path) -> None:
    stored, _ = example("modelopt nvfp4")
    with pytest.raises(InputRefused, match=f"NVFP4 and W4A16_NVFP4 of modelopt, and this base has {algorithm.upper()}"):
        found(stored, tmp_path / "m.safetensors", algorithm)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x.pre_quant_scale": torch.ones(48)}, r"x\.pre_quant_scale changes the inputs of the layer"),
        (
            {"x.weight": torch.zeros(8, 23, dtype=torch.uint8)},
            r"\[8, 23\] does not fit scales of \[8, 3\] for 16 columns",
        ),
        ({"x.weight": torch.zeros(8, 24)}, "its dtype is float32, and x.weight needs uint8"),
        ({"x.weight_scale": torch.ones(8, 3)}, "its dtype is float32, and x.weight needs float8_e4m3fn"),
        ({"x.weight_scale": torch.ones(24).to(torch.float8_e4m3fn)}, "does not fit"),
        ({"x.weight_scale": torch.ones(8, 0).to(torch.float8_e4m3fn)}, "does not fit"),
        ({"x.weight_scale_2": torch.ones(8)}, "8 elements, and x.weight needs 1"),
        ({"x.weight_scale_2": torch.tensor(torch.inf)}, "1 scales are not finite numbers"),
        ({"x.weight_scale": torch.full((8, 3), torch.nan).to(torch.float8_e4m3fn)}, "24 scales are not finite numbers"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change: Tensors, message: str, tmp_path: Path) -> None:
    stored, _ = example("modelopt nvfp4")
    with pytest.raises(InputRefused, match=message):
        found(stored | change, tmp_path / "m.safetensors").rows(slice(0, 1))
