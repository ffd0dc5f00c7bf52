"""What MODEL may name, its dtype, and weights from a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_export.errors import InputRefused
from lora_export.models.load import load_model, module_with_weights
from support import FACTORIES


def test_a_source_that_names_no_model_is_refused_with_the_possible_ones() -> None:
    with pytest.raises(
        InputRefused, match=r"'nowhere' is no model: give a Hugging Face folder that exists, .* or a \.pt2"
    ):
        load_model("nowhere")


def test_a_model_and_its_float_inputs_are_converted_to_the_dtype() -> None:
    loaded = load_model(f"{FACTORIES}:worded", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.module.parameters()} == {torch.bfloat16}
    assert {value.dtype for value in loaded.example_inputs().values()} == {torch.int64}
    floats = load_model(f"{FACTORIES}:scaled", dtype=torch.float16).example_inputs()
    assert {value.dtype for value in floats.values()} == {torch.float16}
    assert loaded.notes == ("the model runs in bfloat16, and its weights are rounded to it (dtype=)",)


def test_a_program_takes_no_dtype(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"model\.pt2 has one precision, which its graph names: leave out dtype="):
        load_model(str(tmp_path / "model.pt2"), dtype=torch.float16)


def test_a_file_of_weights_must_have_them_all(tmp_path: Path) -> None:
    loaded = load_model(f"{FACTORIES}:scaled")
    weights = {name: tensor + 1 for name, tensor in loaded.module.state_dict().items()}
    save_file(weights, tmp_path / "whole.safetensors")
    changed = module_with_weights(loaded, tmp_path / "whole.safetensors")
    assert torch.equal(changed.dense.weight, loaded.module.dense.weight + 1)
    del weights["dense.bias"]
    save_file(weights, tmp_path / "part.safetensors")
    with pytest.raises(InputRefused, match=r"dense\.bias"):
        module_with_weights(loaded, tmp_path / "part.safetensors")
