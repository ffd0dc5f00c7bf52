"""Which format of compressed-tensors each module is stored in; formats that are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_export.errors import InputRefused
from lora_export.weights.quantised.compressed_tensors import ACTIVATION_PARTS, COMPRESSED_FORMATS, compressed_weights
from support.quantised import Tensors, parts_in

# One module of each kind; what they become is tested with each format.
MODULES: dict[str, Tensors] = {
    "4-bit integers": {
        "weight_packed": torch.zeros(4, 4, dtype=torch.int32),
        "weight_shape": torch.tensor([4, 32]),
        "weight_scale": torch.ones(4, 1),
    },
    "8-bit integers": {"weight": torch.zeros(4, 32, dtype=torch.int8), "weight_scale": torch.ones(4, 1)},
    "8-bit floats": {"weight": torch.zeros(4, 32).to(torch.float8_e4m3fn), "weight_scale": torch.ones(1)},
    "nvfp4": {
        "weight_packed": torch.zeros(4, 16, dtype=torch.uint8),
        "weight_scale": torch.ones(4, 2).to(torch.float8_e4m3fn),
        "weight_global_scale": torch.ones(1),
    },
    "mxfp8": {
        "weight": torch.zeros(4, 32).to(torch.float8_e4m3fn),
        "weight_scale": torch.ones(4, 1, dtype=torch.uint8),
    },
}


def stored(*kinds: str) -> Tensors:
    return {f"{kind}.{name}": value for kind in kinds for name, value in MODULES[kind].items()}


def test_one_model_may_have_several_formats(tmp_path: Path) -> None:
    parts = parts_in(tmp_path / "m.safetensors", stored(*MODULES) | {"norm.weight": torch.ones(4)})
    found = compressed_weights(parts, {"format": "mixed-precision"}, "bfloat16")
    assert {name: tensor.scheme for name, tensor in found.items()} == {f"{kind}.weight": kind for kind in MODULES}


def test_scales_of_activations_belong_to_the_weight(tmp_path: Path) -> None:
    more = {f"{kind}.{name}": torch.ones(1) for kind in MODULES for name in ("input_scale", "output_scale")}
    parts = parts_in(tmp_path / "m.safetensors", stored(*MODULES) | more)
    found = compressed_weights(parts, {}, "bfloat16")
    assert set(more) == {name for tensor in found.values() for name in tensor.parts if name in more}
    assert "input_global_scale" in ACTIVATION_PARTS


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"format": "marlin-24"}, "marlin-24"),
        ({"format": "mixed-precision", "config_groups": {"a": {"format": "sparse-bitmask"}}}, "sparse-bitmask"),
    ],
)
def test_other_formats_are_refused_by_name(fields: dict[str, object], name: str, tmp_path: Path) -> None:
    parts = parts_in(tmp_path / "m.safetensors", stored("nvfp4"))
    with pytest.raises(InputRefused, match=f"pack-quantized, .*mxfp8-quantized of .* this base has {name}"):
        compressed_weights(parts, fields, "bfloat16")


def test_every_format_that_the_library_writes_is_read() -> None:
    from compressed_tensors.compressors import BaseCompressor

    assert {*COMPRESSED_FORMATS, "dense"} == set(BaseCompressor.registered_names())
