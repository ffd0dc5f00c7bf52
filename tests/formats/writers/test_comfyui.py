"""Adapters for ComfyUI: they come back bit for bit, under the prefixes that ComfyUI reads."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from safetensors.numpy import load_file

import lora_export
from lora_export.errors import InputRefused
from lora_export.lora import Adapter
from support.one_files import drawn_adapters
from support.written import adapter_of, assert_same_pairs, converted, low_rank


@settings(deadline=None, max_examples=40)
@given(drawn_adapters())
def test_pairs_come_back(adapter: Adapter) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert_same_pairs(converted(adapter, Path(folder), "comfyui"), adapter)


def test_two_transformers_are_numbered(tmp_path: Path) -> None:
    names = ("denoiser/a", "denoiser_2/a", "text_encoder/a", "text_encoder_3/a")
    adapter = adapter_of({name: low_rank(3, 2, 1) for name in names})
    keys = load_file(lora_export.convert(adapter, tmp_path / "out", to="comfyui").output)
    assert {key.removesuffix(".a.alpha") for key in keys if key.endswith("alpha")} == {
        "diffusion_model.transformer_1",
        "diffusion_model.transformer_2",
        "text_encoders.clip_l.transformer",
        "text_encoders.t5xxl.transformer",
    }
    assert_same_pairs(converted(adapter, tmp_path, "comfyui"), adapter)


def test_flattened_names_need_a_base(tmp_path: Path) -> None:
    adapter = adapter_of({"denoiser/a_b": low_rank(3, 2, 1)}, flattened=True)
    with pytest.raises(InputRefused, match="names in which `_` stands for the dots: state the model that has them by"):
        lora_export.convert(adapter, tmp_path / "out", to="comfyui")


def test_names_without_a_model_are_noted(tmp_path: Path) -> None:
    result = lora_export.convert(adapter_of({"a.b": low_rank(3, 2, 1)}), tmp_path / "out", to="comfyui")
    assert result.notes == ("mine: names without a model are written as those of the UNet or transformer.",)
    assert "diffusion_model.a.b.lora_A.weight" in load_file(result.output)


def test_two_modules_of_one_name_are_refused(tmp_path: Path) -> None:
    adapter = adapter_of({"a": low_rank(3, 2, 1), "denoiser/a": low_rank(3, 2, 1, seed=1)})
    for to in ("comfyui", "diffusers", "kohya"):
        with pytest.raises(InputRefused, match=r"two (tensors would|modules) have this"):
            lora_export.convert(adapter, tmp_path / to, to=to)
    assert list(tmp_path.iterdir()) == []
