"""What adapters change in parts of a model that no text reaches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import lora_export as le
from lora_export.api.load import load_adapters
from lora_export.errors import InputRefused
from lora_export.models.image_parts import image_parts, without_image_pairs
from lora_export.models.load import load_model
from support.small_models import small_adapter, small_model


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("gemma3", ("model.vision_tower", "model.multi_modal_projector")),
        ("qwen3_vl", ("model.visual",)),
        ("idefics3", ("model.vision_model", "model.connector")),
    ],
)
def test_no_text_reaches_tower_and_projector(name: str, parts: tuple[str, ...], tmp_path: Path) -> None:
    model = load_model(str(small_model(name, tmp_path)))
    assert image_parts(model) == () and image_parts(model.without_images("texts")) == parts


def test_models_of_images_alone_or_of_texts_alone_have_no_such_parts(tmp_path: Path) -> None:
    for name in ("clip", "llama"):
        assert image_parts(load_model(str(small_model(name, tmp_path / name)))) == ()


def test_an_adapter_of_all_layers_loses_those_that_read_images(tmp_path: Path) -> None:
    base = small_model("gemma3", tmp_path / "base")
    (adapter,) = load_adapters([small_adapter("gemma3", base, tmp_path / "adapter")])
    model, messages = load_model(str(base)).without_images("texts"), list[str]()
    changed, (kept,) = without_image_pairs(model, [adapter], messages.append)
    assert set(kept.pairs) == {name for name in adapter.pairs if ".language_model." in name} != set(adapter.pairs)
    assert "fc1" in "".join(adapter.targets) and "fc1" not in "".join(kept.targets)
    assert set(kept.targets) < set(adapter.targets)
    left_out = (
        "12 layers that adapter changes in model.vision_tower, model.multi_modal_projector, which no text reaches"
    )
    assert changed.not_judged == (*model.not_judged, left_out) and messages == [f"note: left out: {left_out}"]
    tower = adapter.renamed(lambda name: None if ".language_model." in name else name)
    with pytest.raises(InputRefused, match="adapter changes only layers that read images, and no text reaches these"):
        without_image_pairs(model, [tower], messages.append)
    unmatched = replace(adapter, targets=(*adapter.targets, "elsewhere"))
    assert "elsewhere" in without_image_pairs(model, [unmatched], messages.append)[1][0].targets


@pytest.mark.slow
def test_a_graph_of_texts_takes_adapters_of_all_layers(tmp_path: Path) -> None:
    base = small_model("gemma3", tmp_path / "base")
    adapter, graph = small_adapter("gemma3", base, tmp_path / "adapter"), tmp_path / "texts.onnx"
    shape = {"task": "text-generation", "lora": "inputs", "target": "all-linear"}
    made = le.export_onnx(base, graph, adapters=[adapter], **shape)
    assert made.proof is not None and made.proof.verdict.same
    assert any("which no text reaches" in each for each in made.proof.verdict.not_judged)
    with_adapter = {"model": base, "adapters": [adapter], "onnx_adapter": tmp_path / "adapter.onnx_adapter"}
    assert le.verify(graph, **with_adapter).verdict.same
    alone = le.export_onnx(base, tmp_path / "future.onnx", **shape)
    assert alone.proof is not None and alone.proof.verdict.same
