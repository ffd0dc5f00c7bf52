"""Inputs of Hugging Face models, generated from their configs: every kind, at every size that is checked."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from lora_export.errors import InputRefused
from lora_export.models.generated_inputs import generated_inputs
from lora_export.models.load import load_model
from support.more_models import MORE_MODELS
from support.small_models import MODELS, small_model

IMAGES = {"vit", "deit", "swin", "convnext", "dinov2", "segformer", "detr"}
WITH_TYPES = {"bert", "roberta", "electra"}
GRIDS = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "mm_token_type_ids")
TAKES = dict.fromkeys(MODELS, ("input_ids", "attention_mask"))
TAKES |= dict.fromkeys(IMAGES, ("pixel_values",))
TAKES |= dict.fromkeys(WITH_TYPES, ("input_ids", "attention_mask", "token_type_ids"))
TAKES |= dict.fromkeys(("t5", "bart", "mbart"), ("input_ids", "attention_mask", "decoder_input_ids"))
TAKES |= dict.fromkeys(("wav2vec2", "hubert"), ("input_values",))
TAKES |= {
    "layoutlm": ("input_ids", "bbox", "attention_mask", "token_type_ids"),
    "whisper": ("input_features", "decoder_input_ids"),
    "clip": ("input_ids", "pixel_values", "attention_mask"),
    "siglip": ("input_ids", "pixel_values", "attention_mask"),
    "blip": ("pixel_values", "input_ids", "attention_mask"),
    "clap": ("input_ids", "input_features", "attention_mask"),
    "llava": ("input_ids", "pixel_values", "attention_mask"),
    "paligemma": ("input_ids", "pixel_values", "attention_mask", "token_type_ids"),
    "gemma3": ("input_ids", "pixel_values", "attention_mask", "token_type_ids"),
    "internvl": ("input_ids", "pixel_values", "attention_mask"),
    **dict.fromkeys(("idefics3", "smolvlm"), ("input_ids", "attention_mask", "pixel_values", "pixel_attention_mask")),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), GRIDS),
    **dict.fromkeys(
        ("llava_next", "pixtral", "mistral3"), ("input_ids", "attention_mask", "pixel_values", "image_sizes")
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_takes_its_generated_inputs_at_every_size(name: str, tmp_path: Path) -> None:
    model = load_model(str(small_model(name, tmp_path)))
    assert set(model.input_names) == set(TAKES[name])
    wanted = [model.traced_sizes, *model.checked_sizes({})]
    has_text = bool({"input_ids", "decoder_input_ids"} & set(model.input_names))
    has_single = "input_ids" in model.input_names and not model.placeholders  # tokens: beside images there are more
    assert len({tuple(sizes.items()) for sizes in wanted}) == 4 + (has_text and name != "whisper") + has_single
    for sizes in wanted:
        inputs = model.inputs(sizes, seed=1)
        assert list(inputs) == list(model.axes)
        for input_name, symbols in model.axes.items():
            assert {symbol: inputs[input_name].shape[axis] for axis, symbol in symbols.items()} == {
                symbol: sizes[symbol] for symbol in symbols.values()
            }
        with torch.no_grad():
            model.module(**inputs)


def test_lengths_of_a_sound_differ_by_whole_frames(tmp_path: Path) -> None:
    model = load_model(str(small_model("wav2vec2", tmp_path)))
    frames = set()
    for sizes in (model.traced_sizes, *model.checked_sizes({})):
        with torch.no_grad():
            frames.add(model.module(**model.inputs(sizes, seed=0)).logits.shape[1])
    assert len(frames) == 3  # the traced number, which one more sample does not change, and two others


@pytest.mark.parametrize(
    ("name", "takes"),
    [
        ("bros", {"input_ids", "attention_mask", "token_type_ids", "bbox"}),
        ("canine", {"input_ids", "attention_mask", "token_type_ids"}),
        ("vjepa2", {"pixel_values_videos"}),
    ],
)
def test_pages_characters_and_videos_are_drawn(name: str, takes: set[str]) -> None:
    architecture, config = MORE_MODELS[name]
    torch.manual_seed(0)
    module = getattr(hf, architecture)(config()).eval()
    inputs = generated_inputs(module, Path("no-such-folder"))
    assert set(inputs.axes) == takes
    made = inputs.make_inputs(inputs.traced_sizes, torch.Generator().manual_seed(0))
    with torch.no_grad():
        module(**made)
    if name == "bros":
        left, top, right, bottom = made["bbox"].unbind(-1)  # fractions of a page
        assert bool((left <= right).all() and (top <= bottom).all())
        assert 0 <= made["bbox"].min() < 0.2 and 0.8 < made["bbox"].max() <= 1
    if name == "canine":
        assert made["input_ids"].max() > 0xFFFF  # beyond the first plane of Unicode
    if name == "vjepa2":
        assert made["pixel_values_videos"].shape == (2, 4, 3, 16, 16)


class Strange(nn.Module):
    main_input_name: Any = "input_features"
    config = SimpleNamespace(get_text_config=lambda decoder=False: SimpleNamespace())

    def forward(self, input_features: Any, other: Any = None) -> None: ...


def test_undetermined_inputs_are_refused_with_their_names(tmp_path: Path) -> None:
    message = (
        r'Strange takes input_features, and its config does not determine .*inputs="FILE.npz".*input_features, other'
    )
    with pytest.raises(InputRefused, match=message):
        generated_inputs(Strange(), tmp_path)


class TakesBoth(Strange):
    main_input_name = ("input_features", "other")  # as OneFormer's


def test_each_of_several_main_inputs_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="TakesBoth takes input_features and other, and its config does not"):
        generated_inputs(TakesBoth(), tmp_path)


FOLDER = Path("no-such-folder")


def test_a_model_of_segments_takes_points_with_labels() -> None:
    torch.manual_seed(0)
    module = hf.SamModel(MORE_MODELS["sam"][1]()).eval()
    inputs = generated_inputs(module, FOLDER)
    axes = {0: "batch", 1: "objects", 2: "points"}
    assert inputs.axes == {"pixel_values": {0: "batch"}, "input_points": axes, "input_labels": axes}
    made = inputs.make_inputs({"batch": 2, "objects": 4, "points": 5}, torch.Generator().manual_seed(0))
    assert made["input_points"].shape == (2, 4, 5, 2) and made["input_labels"].shape == (2, 4, 5)
    assert 0 <= made["input_points"].min() < 4 and 12 < made["input_points"].max() <= 16  # the image has 16 x 16 pixels
    assert set(made["input_labels"].unique().tolist()) == {-1, 0, 1}
    with torch.no_grad():
        masks, others = (
            module(**{**made, "input_points": points}).pred_masks
            for points in (made["input_points"], made["input_points"].flip(0))
        )
    assert masks.shape[:2] == (2, 4)
    assert not torch.allclose(masks, others)


def test_other_models_of_images_get_no_points() -> None:
    module = hf.ViTModel(
        hf.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4)
    )
    assert set(generated_inputs(module, FOLDER).axes) == {"pixel_values"}


def of(name: str) -> hf.PreTrainedModel:
    architecture, config = MORE_MODELS[name]
    torch.manual_seed(0)
    return getattr(hf, architecture)(config()).eval()


def encodec() -> hf.PreTrainedModel:
    config = hf.EncodecConfig(num_filters=4, hidden_size=16, codebook_size=16, upsampling_ratios=[4, 2])
    return hf.EncodecModel(config).eval()


@pytest.mark.parametrize(
    ("model", "axes"),
    [
        (lambda: of("parakeet"), {"input_features": {0: "batch", 1: "frames"}}),
        (encodec, {"input_values": {0: "batch", 2: "samples"}}),
        (lambda: of("patchtst"), {"past_values": {0: "batch"}}),
        (lambda: of("patchtsmixer"), {"past_values": {0: "batch"}}),
        (
            lambda: of("moonshine"),
            {"input_values": {0: "batch", 1: "samples"}, "decoder_input_ids": {0: "batch", 1: "target"}},
        ),
    ],
)
def test_a_model_takes_the_signal_of_its_layout(model, axes) -> None:
    module = model()
    inputs = generated_inputs(module, FOLDER)
    assert inputs.axes == axes
    sizes = (
        inputs.traced_sizes
        | {"batch": 3}
        | {symbol: inputs.traced_sizes[symbol] + 2 * step for symbol, step in inputs.steps.items()}
    )
    with torch.no_grad():
        first, second = (
            module(**inputs.make_inputs(wanted, torch.Generator().manual_seed(0)))
            for wanted in (inputs.traced_sizes, sizes)
        )
    varying = next((name for name in ("frames", "samples") if name in inputs.traced_sizes), None)
    one, other = (next(iter(outputs.values())).shape for outputs in (first, second))
    assert other[0] == 3 * one[0] // 2
    if varying and "decoder_input_ids" not in axes:
        assert one[1:] != other[1:]  # the step changes the number of frames that the model makes of it
