"""Keep the pictures that `make samples` drew, for the gallery: python release/site/pictures.py SAMPLES_OUTPUT"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

# The picture of a sample -> where the sample writes it
DRAWN = {
    "rank_4_or_64": "curves.png",
    "three_strategies": "strategies/trained/comparison.png",
    "count_shapes": "shapes/adapter/comparison.png",
    "small_gpt": "gpt/adapter/losses.png",
    "demo": "demo/adapter/comparison.png",
}
SHAPES = "shapes/images"  # a folder for each number of shapes
COLUMNS, WIDTH = 8, 1000  # WIDTH: pixels


def main(output: Path) -> None:
    target = Path(__file__).with_name("pictures")
    for name, path in DRAWN.items():
        picture = Image.open(output / path)
        picture.thumbnail((WIDTH, WIDTH))
        _save(picture, target / f"{name}.png")
    folders = sorted((output / SHAPES).iterdir())
    images = [[Image.open(path) for path in sorted(folder.iterdir())[:COLUMNS]] for folder in folders]
    size = 4 * images[0][0].width  # pixels
    sheet = Image.new("RGB", (COLUMNS * size, len(images) * size))
    for row, line in enumerate(images):
        for column, image in enumerate(line):
            sheet.paste(
                image.convert("RGB").resize((size, size), Image.Resampling.NEAREST), (column * size, row * size)
            )
    sheet.thumbnail((WIDTH, WIDTH))
    _save(sheet, target / "count_shapes_images.png")


def _save(picture: Image.Image, path: Path) -> None:
    """With 64 colours: a fifth of the size."""
    picture.convert("RGB").quantize(64).save(path, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
