"""Merges and exports of models of several inputs are proven. `tests/matrix` has the exports of all architectures."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_export as le
from lora_export.errors import MatchError
from support.small_models import small_adapter, small_model

# The exporter fixes the number of images, or cannot follow their grids: these graphs take texts alone.
TEXTS_ALONE = {"llava", "qwen2_vl", "qwen2_5_vl"}
WITH_IMAGES = ["llava", "paligemma", "gemma3", "internvl", "qwen2_vl", "qwen2_5_vl"]


def some(names: Iterable[str], quick: Collection[str]) -> list[Any]:
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


def names_of_pairs(adapter: Path) -> set[str]:
    keys = load_file(adapter / "adapter_model.safetensors")
    return {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in keys}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip", pytest.param("whisper", marks=pytest.mark.slow)])
def test_a_merged_folder_of_several_inputs_is_proven(name: str, tmp_path: Path) -> None:
    base = small_model(name, tmp_path / "base")
    adapter = small_adapter(name, base, tmp_path / "adapter")
    le.merge(base, adapter, tmp_path / "merged")
    assert le.verify(tmp_path / "merged", base, adapters=adapter)
    assert not le.verify(tmp_path / "merged", base, adapters=adapter, weights=[0.5])


@pytest.mark.slow
@pytest.mark.parametrize("name", some(WITH_IMAGES, {"llava"}))
def test_a_folder_without_the_pairs_of_its_image_tower_is_different(name: str, tmp_path: Path) -> None:
    """Texts alone would never reach them."""
    base = small_model(name, tmp_path / "base")
    adapter = small_adapter(name, base, tmp_path / "adapter")
    le.merge(base, adapter, tmp_path / "merged")
    right = le.verify(tmp_path / "merged", base, adapters=adapter)
    assert right, str(right.proof.verdict)
    weights, original = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", base))
    towers = [key for key in weights if "language_model" not in key and not torch.equal(weights[key], original[key])]
    assert any("vision" in key or "visual" in key for key in towers)
    save_file({**weights, **{key: original[key] for key in towers}}, tmp_path / "merged" / "model.safetensors")
    wrong = le.verify(tmp_path / "merged", base, adapters=adapter)
    assert wrong.exit_code == 4
    assert wrong.proof.diagnosis.first in names_of_pairs(adapter)
    assert "vis" in wrong.proof.diagnosis.first


@pytest.mark.slow
@pytest.mark.parametrize("name", some(WITH_IMAGES, {"internvl"}))
def test_an_export_with_images_lists_what_no_image_reaches(name: str, tmp_path: Path) -> None:
    """Pairs of the language model alone are proven in every graph; images are listed where it takes none."""
    base = small_model(name, tmp_path / "base")
    adapter = small_adapter(name, base, tmp_path / "adapter", inside=r"language_model.*layers")
    messages: list[str] = []
    proof = le.export_onnx(base, tmp_path / "model.onnx", adapters=adapter, on_message=messages.append).proofs.whole
    takes = any("pixel_values" in arrays for arrays in proof.inputs.values())
    assert proof.verdict.same and takes == (name not in TEXTS_ALONE)
    left_out = [text for text in proof.verdict.not_judged if "images" in text.partition(" among")[0]]
    assert bool(left_out) == (name in TEXTS_ALONE)
    assert all("the exporter refused" in text for text in left_out)
    noted = [text for text in messages if "takes texts without images. With images, the exporter refused" in text]
    assert bool(noted) == (name in TEXTS_ALONE)


@pytest.mark.slow
def test_a_graph_without_images_refuses_pairs_of_the_tower_with_the_reason(tmp_path: Path) -> None:
    base = small_model("llava", tmp_path / "base")
    adapter = small_adapter("llava", base, tmp_path / "adapter")
    with pytest.raises(MatchError, match=r"takes texts without images, and lacks the weights .*: the exporter refused"):
        le.export_onnx(base, tmp_path / "model.onnx", adapters=adapter)
    assert not list(tmp_path.glob("model.onnx*"))


@pytest.mark.slow
def test_inputs_without_images_export_the_language_model_alone(tmp_path: Path) -> None:
    base = small_model("internvl", tmp_path / "base")
    adapter = small_adapter("internvl", base, tmp_path / "adapter", inside=r"language_model.*layers")
    texts = {"input_ids": np.full((2, 9), 7), "attention_mask": np.ones((2, 9), np.int64)}
    np.savez(tmp_path / "texts.npz", **texts)
    output = tmp_path / "model.onnx"
    proof = le.export_onnx(base, output, adapters=adapter, inputs=tmp_path / "texts.npz").proofs.whole
    assert {name for arrays in proof.inputs.values() for name in arrays} == set(texts)
    assert le.verify(output, base, adapters=adapter)  # finds that the graph takes no images
    assert le.verify(output, base, adapters=adapter, strict=True).exit_code == 5
