"""Images as a model takes them: files that Pillow reads, and the pixels that the folder's image processor makes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import EnvironmentLacking, InputRefused
from lora_export.models.image_forms import PIXELS
from lora_export.models.images import PROCESSOR
from lora_export.models.processors import open_processor
from lora_export.storage import input_files


def open_image_processor(folder: Path) -> Any:
    """The image processor of transformers in a folder.

    Raises InputRefused where it is missing or damaged, and EnvironmentLacking without transformers.
    """
    failure = f"{folder} has no image processor ({PROCESSOR})"
    return open_processor("AutoImageProcessor", folder, needs="images need", failure=failure)


def read_image(image: Path | Any) -> Any:
    """An image file, or an image of Pillow, as Pillow's image in RGB.

    Raises InputRefused for a file that is no image, and EnvironmentLacking without Pillow.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise EnvironmentLacking(f"images need Pillow ({error}): pip install 'lora-export[data]'") from error
    if not isinstance(image, Path):
        return image.convert("RGB")
    try:
        with Image.open(image) as opened:
            return opened.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputRefused(f"no image that can be read ({error})") from error


def pixels_of(paths: Sequence[Path], folder: Path) -> NDArray[np.float32]:
    """The pixels of image files as the image processor in a folder makes them, (files, channels, height, width).

    Raises InputRefused for what is no image, for a processor that is missing or makes images of several sizes, and
    EnvironmentLacking without Pillow or transformers.
    """
    processor = open_image_processor(folder)
    for path in paths:
        input_files.must_be_regular(path)
    made = [processor(read_image(path), return_tensors="pt")[PIXELS][0].numpy() for path in paths]
    shapes = {array.shape for array in made}
    if len(shapes) > 1:
        sizes = " and ".join(sorted(str(list(shape)) for shape in shapes))
        raise InputRefused(f"the image processor in {folder} makes images of several sizes: {sizes}")
    return np.stack(made).astype(np.float32)
