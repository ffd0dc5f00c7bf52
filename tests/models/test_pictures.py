"""Image files as the pixels that a folder's image processor makes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from lora_export.errors import InputRefused
from lora_export.models.pictures import pixels_of, read_image

RED, BLUE = (255, 0, 0), (0, 0, 255)


def an_image(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (9, 7)) -> Path:
    Image.new("RGB", size, colour).save(path)
    return path


def test_pixels_are_those_of_the_processor_in_the_folder(tmp_path: Path) -> None:
    ViTImageProcessorPil(size={"height": 4, "width": 4}).save_pretrained(tmp_path)
    paths = [an_image(tmp_path / "red.png", RED), an_image(tmp_path / "blue.jpg", BLUE, (5, 5))]
    pixels = pixels_of(paths, tmp_path)
    assert pixels.shape == (2, 3, 4, 4) and pixels.dtype == np.float32
    np.testing.assert_allclose(pixels[:, :, 0, 0], [[1, -1, -1], [-1, -1, 1]], atol=0.02)  # (x / 255 - 0.5) / 0.5


def test_images_of_several_sizes_are_refused(tmp_path: Path) -> None:
    ViTImageProcessorPil(do_resize=False).save_pretrained(tmp_path)
    paths = [an_image(tmp_path / "a.png", RED), an_image(tmp_path / "b.png", RED, (5, 5))]
    with pytest.raises(InputRefused, match=r"several sizes: \[3, 5, 5\] and \[3, 7, 9\]"):
        pixels_of(paths, tmp_path)


def test_what_is_no_image_or_no_processor_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(InputRefused, match=r"no image that can be read \(cannot identify image file"):
        read_image(tmp_path / "a.png")
    with pytest.raises(InputRefused, match=r"has no image processor \(preprocessor_config\.json\)"):
        pixels_of([an_image(tmp_path / "b.png", RED)], tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(InputRefused, match="has no image processor"):
        pixels_of([tmp_path / "b.png"], tmp_path)
