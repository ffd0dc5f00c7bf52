"""The shape, the values and the forms of a model's images."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_export.errors import InputRefused
from lora_export.models.images import BEYOND, draw_pixels, image_forms, image_shape, pixel_range
from lora_export.models.load import load_model


def shape(folder: Path, processor: dict[str, Any] | None = None, **config: Any) -> tuple[tuple[int, int, int], str]:
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return image_shape(SimpleNamespace(**config), folder)


@pytest.mark.parametrize(
    ("processor", "config", "expected"),
    [
        ({}, {"image_size": 30, "num_channels": 1}, (1, 30, 30)),
        ({}, {"image_size": (30, 40)}, (3, 30, 40)),
        ({"size": 20}, {"input_size": 32, "patch_size": 8}, (3, 32, 32)),  # of LayoutLMv3
        ({"size": 20}, {"image_size": [30, 40]}, (3, 30, 40)),
        ({}, {"vision_config": SimpleNamespace(image_size=12, num_channels=2)}, (2, 12, 12)),
        ({}, {"encoder": SimpleNamespace(image_size=[10, 14])}, (3, 10, 14)),
        ({"size": 20}, {}, (3, 20, 20)),
        ({"size": {"height": 20, "width": 24}}, {}, (3, 20, 24)),
        ({"size": {"shortest_edge": 32}}, {}, (3, 32, 32)),
        ({"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 26}}, {}, (3, 28, 26)),
        ({"size": {"shortest_edge": 32}, "crop_size": 28, "do_center_crop": False}, {}, (3, 32, 32)),
    ],
)
def test_the_size_is_the_configs_or_the_image_processors(
    tmp_path: Path, processor: dict[str, Any], config: dict[str, Any], expected: tuple[int, int, int]
) -> None:
    assert shape(tmp_path, processor, **config) == (expected, "")


def test_the_processor_of_transformers_5_comes_first(tmp_path: Path) -> None:
    shape(tmp_path, {"size": 20, "do_rescale": True})
    whole = {"image_processor": {"size": 24, "do_rescale": False}, "processor_class": "LlavaProcessor"}
    (tmp_path / "processor_config.json").write_text(json.dumps(whole))
    assert image_shape(SimpleNamespace(), tmp_path) == ((3, 24, 24), "")
    assert pixel_range(tmp_path, 3).high.tolist() == [255]
    (tmp_path / "processor_config.json").write_text('{"processor_class": "LlavaProcessor"}')  # of transformers 4
    assert pixel_range(tmp_path, 3).high.tolist() == [1]


def test_a_size_that_nothing_names_is_noted(tmp_path: Path) -> None:
    found, note = shape(tmp_path, num_channels=1)
    assert found == (1, 224, 224)
    assert note == "neither the config nor preprocessor_config.json names the size of an image: 224 x 224 is used"


@pytest.mark.parametrize("size", [-3, 10**9, "large", {"height": 2.5, "width": 4}, [1, 2, 3], True])
def test_a_size_that_is_none_is_refused(tmp_path: Path, size: Any) -> None:
    with pytest.raises(InputRefused, match=r"preprocessor_config.json: the size of an image is .*it must be 1 to 4096"):
        shape(tmp_path, {"size": size})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"image_size": 4096}, "an image has the shape 3 x 4096 x 4096. At most 33,554,432 numbers are generated"),
        ({"image_size": 64, "num_channels": 10**7}, "an image has the shape 10000000 x 64 x 64"),
        ({"image_size": 64, "num_channels": "3"}, "an image has the shape 3 x 64 x 64"),
        ({"image_size": 2048, "patch_size": 8}, "an image of 2048 x 2048 has 65,536 patches of 8 x 8. At most 16,384"),
    ],
)
def test_images_too_large_for_an_example_are_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputRefused, match=message):
        shape(tmp_path, **config)


def test_large_images_of_windowed_attention_are_generated(tmp_path: Path) -> None:
    found, _ = shape(tmp_path, image_size=[2560, 1920], patch_size=4, window_size=10)  # Donut's
    assert found == (3, 2560, 1920)


def test_a_resnet_gets_images(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=3)
    torch.manual_seed(0)
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    assert model.example_inputs()["pixel_values"].shape == (2, 3, 224, 224)
    assert model.module(**model.example_inputs()).logits.shape == (2, 3)
    assert "224 x 224" in model.notes[0]
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"shortest_edge": 40}}')
    assert load_model(str(tmp_path)).example_inputs()["pixel_values"].shape == (2, 3, 40, 40)


MEAN, DEVIATION = [0.5, 0.4, 0.3], [0.5, 0.25, 0.2]


def processor(folder: Path, **fields: Any) -> Path:
    (folder / "preprocessor_config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize(
    ("fields", "low", "high"),
    [
        ({"do_normalize": True, "image_mean": MEAN, "image_std": DEVIATION}, [-1, -1.6, -1.5], [1, 2.4, 3.5]),
        ({"do_normalize": True, "image_mean": 0.5, "image_std": 0.5}, [-1], [1]),
        ({"do_normalize": False, "image_mean": MEAN, "image_std": DEVIATION}, [0], [1]),
        ({"do_rescale": False}, [0], [255]),
        ({"rescale_factor": 1 / 127.5, "do_normalize": True, "image_mean": 1.0, "image_std": 1.0}, [-1], [1]),
    ],
)
def test_range_is_that_of_the_processor(fields: dict[str, Any], low: Any, high: Any, tmp_path: Path) -> None:
    found = pixel_range(processor(tmp_path, **fields), 3)
    assert found.low.tolist() == pytest.approx(low) and found.high.tolist() == pytest.approx(high)


@pytest.mark.parametrize(
    "fields",
    [
        {"do_normalize": True},
        {"do_normalize": True, "image_mean": [0.5, 0.5], "image_std": [1, 1]},
        {"do_normalize": True, "image_mean": 0.5, "image_std": 0},
        {"do_normalize": True, "image_mean": 0.5, "image_std": 1e-9},
        {"do_normalize": True, "image_mean": "0.5", "image_std": 1},
        {"rescale_factor": float("nan")},
        {"rescale_factor": True},
    ],
)
def test_unusable_numbers_are_replaced_by_the_usual_range(fields: dict[str, Any], tmp_path: Path) -> None:
    usual = pixel_range(tmp_path / "none", 3)
    assert usual.low.item() < -2.1 and usual.high.item() > 2.6
    assert pixel_range(processor(tmp_path, **fields), 3) == usual


def test_pixels_fill_the_range_of_each_channel_and_go_beyond(tmp_path: Path) -> None:
    values = pixel_range(processor(tmp_path, do_normalize=True, image_mean=MEAN, image_std=DEVIATION), 3)
    pixels = draw_pixels((4, 2, 3, 32, 32), values, torch.Generator().manual_seed(0))
    assert pixels.shape == (4, 2, 3, 32, 32)
    for channel, (low, high) in enumerate(zip(values.low.tolist(), values.high.tolist(), strict=True)):
        own = pixels[:, :, channel]
        middle, half = (low + high) / 2, (high - low) / 2
        assert own.min() < middle - 0.98 * BEYOND * half and own.max() > middle + 0.98 * BEYOND * half
        assert 0.03 < ((own < low) | (own > high)).float().mean() < 0.1
        assert ((own > low) & (own < low + half / 10)).any() and ((own < high) & (own > high - half / 10)).any()


GRID = {"patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2, "in_channels": 3}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shapes(drawn: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in drawn.items()}


def grid_form(folder: Path, **more: Any) -> Any:
    config = SimpleNamespace(vision_config=SimpleNamespace(**{**GRID, **more}))
    (form,) = image_forms(config, ["pixel_values", "image_grid_thw"], folder)
    return form


def test_whole_images_come_first_then_with_sizes_then_tiles(tmp_path: Path) -> None:
    config = SimpleNamespace(image_size=8, image_grid_pinpoints=[[8, 16], [24, 16]])
    whole, sized, tiled = image_forms(config, ["pixel_values", "image_sizes"], tmp_path)
    assert shapes(whole.draw(2, generator())) == {"pixel_values": (2, 3, 8, 8)}
    assert shapes(sized.draw(2, generator())) == {"pixel_values": (2, 3, 8, 8), "image_sizes": (2, 2)}
    # The whole image, the two tiles of the first resolution or the six of the other, and padding
    assert shapes(tiled.draw(1, generator())) == {"pixel_values": (1, 3 + 1, 3, 8, 8), "image_sizes": (1, 2)}
    assert shapes(tiled.draw(2, generator())) == {"pixel_values": (2, 7 + 2, 3, 8, 8), "image_sizes": (2, 2)}
    assert tiled.draw(2, generator())["image_sizes"].tolist() == [[8, 12], [10, 17]]
    axes = [form.axes["pixel_values"] for form in (whole, sized, tiled)]
    assert axes == [{0: "images"}, {0: "images"}, {0: "images", 1: "tiles"}]


def test_padded_images_of_rows_have_several_sizes(tmp_path: Path) -> None:
    vision = {"model_type": "pixtral", "patch_size": 4}
    config = SimpleNamespace(vision_config=SimpleNamespace(**vision), spatial_merge_size=2)
    (form,) = image_forms(config, ["pixel_values", "image_sizes"], tmp_path)
    for images in (1, 2, 3):
        made = form.draw(images, generator())
        assert dict(zip(("height", "width"), made["pixel_values"].shape[2:], strict=True)) == form.sizes(images)
        assert {tuple(sorted(size)) for size in made["image_sizes"].tolist()} == {(16, 24), (8, 40)} or images == 1
        assert (made["image_sizes"].amax(0) <= torch.tensor(made["pixel_values"].shape[2:])).all()
    assert len({tuple(form.sizes(images).values()) for images in (1, 2, 3)}) == 3
    for changes in ({"patch_size": None}, {"patch_size": 0}, {"patch_size": 10**6}, {"num_channels": "a"}):
        broken = SimpleNamespace(vision_config=SimpleNamespace(**{**vision, **changes}), spatial_merge_size=2)
        with pytest.raises(InputRefused, match=r"a (patch|padded image) has the shape"):
            list(image_forms(broken, ["pixel_values", "image_sizes"], tmp_path))


def test_grids_hold_the_patches_that_are_drawn(tmp_path: Path) -> None:
    form = grid_form(tmp_path)
    for images in (1, 2, 5):
        drawn = form.draw(images, generator())
        assert int(drawn["image_grid_thw"].prod(1).sum()) == sum(map(form.patches, range(images)))
        assert drawn["pixel_values"].shape == (sum(map(form.patches, range(images))), 3 * 2 * 4 * 4)
    assert [form.patches(image) for image in range(4)] == [16, 24, 16, 24]


def test_grids_vary_between_draws_of_equal_sizes(tmp_path: Path) -> None:
    """Each input is drawn again by itself: a candidate that ignores the grids must show."""
    grids = [grid_form(tmp_path).draw(2, generator(seed))["image_grid_thw"] for seed in range(8)]
    assert {tuple(grid[1].tolist()) for grid in grids} == {(1, 4, 6), (1, 6, 4)}


def test_an_image_passes_the_window_of_the_attention(tmp_path: Path) -> None:
    assert [grid_form(tmp_path, window_size=40).patches(image) for image in (0, 1)] == [16, 48]  # 6 > 40 / (4 * 2)


@pytest.mark.parametrize("field", ["patch_size", "temporal_patch_size", "spatial_merge_size", "in_channels"])
def test_huge_patches_are_refused_before_they_are_drawn(tmp_path: Path, field: str) -> None:
    with pytest.raises(InputRefused, match=r"a group of patches has the shape .*1000000000"):
        grid_form(tmp_path, **{field: 10**9})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": "a"}, "a group of patches has the shape 2 x 2 x 3 x 2 x a x a"),
        ({"patch_size": None}, "a group of patches has the shape 2 x 2 x 3 x 2 x None x None"),
        ({"window_size": 10**30}, "the patches of an image has the shape 4 x 2500"),
    ],
)
def test_values_that_are_no_sizes_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputRefused, match=message):
        grid_form(tmp_path, **changes)
    assert grid_form(tmp_path, window_size="a").patches(1) == 24  # which the model itself refuses


@pytest.mark.parametrize("resolutions", [-1, [1], [[1]], [["a", 2]], [[0, 2]], {"a": 1}])
def test_resolutions_that_are_none_are_refused(tmp_path: Path, resolutions: Any) -> None:
    config = SimpleNamespace(image_size=8, image_grid_pinpoints=resolutions)
    with pytest.raises(InputRefused, match="image_grid_pinpoints is no list of heights and widths"):
        list(image_forms(config, ["pixel_values", "image_sizes"], tmp_path))


def test_many_tiles_are_refused_before_they_are_drawn(tmp_path: Path) -> None:
    config = SimpleNamespace(image_size=64, image_grid_pinpoints=[[10**6, 10**6]])
    with pytest.raises(InputRefused, match="the tiles of an image has the shape 244140626 x 3 x 64 x 64"):
        list(image_forms(config, ["pixel_values", "image_sizes"], tmp_path))
