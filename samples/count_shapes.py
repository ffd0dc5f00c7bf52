"""A vision transformer on images that this sample draws: what LoRA adds to a frozen model.

    python samples/count_shapes.py [FOLDER]  # a new folder

A small ViT learns from scratch which shape an image shows. Then it is to count shapes, which it has never done: once
with a new head alone on the frozen model, and once with a LoRA adapter. The adapter is exported as nodes of an ONNX
graph, which counts in new images through onnxruntime. Exits with a code other than 0 where the adapter is no better.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from rich.console import Console
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import lora_export as le
from lora_export.options.train import TrainingSettings
from lora_export.training.batches import ArrayData
from lora_export.training.loop import fit
from new_folder import new_folder

SIDE, PATCH = 32, 8  # pixels
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
SHAPES = ("circle", "square", "triangle")
COUNTS = ("one", "two", "three")
IMAGES = 1500  # of each task
NEW_IMAGES = 300  # which only the graph is shown
FROM_SCRATCH = TrainingSettings(epochs=12, learning_rate=2e-3, batch_size=32, seed=0)
ADAPTING = {"rank": 8, "epochs": 12, "batch_size": 32, "learning_rate": 4e-3}
MIDDLES = [(x, y) for x in (6, 16, 26) for y in (6, 16, 26)]  # of shapes, which do not overlap

console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Result:
    """Accuracies, from 0 to 1."""

    head_alone: float  # on held-out images
    adapter: float  # on the same
    graph: float  # of the graph, on new images


def draw(shapes: Sequence[str], rng: np.random.Generator) -> Image.Image:
    """An image with these shapes at different places, in one colour on a ground of another."""
    dark, light = rng.integers(0, 100, 3), rng.integers(156, 256, 3)
    image = Image.new("RGB", (SIDE, SIDE), tuple(map(int, dark)))
    pen = ImageDraw.Draw(image)
    for shape, place in zip(shapes, rng.permutation(len(MIDDLES)), strict=False):
        (x, y), r = MIDDLES[place], int(rng.integers(3, 5))
        draw_shape: dict[str, Callable[..., None]] = {"circle": pen.ellipse, "square": pen.rectangle}
        corners = (
            [(x, y - r), (x - r, y + r), (x + r, y + r)] if shape == "triangle" else [(x - r, y - r), (x + r, y + r)]
        )
        draw_shape.get(shape, pen.polygon)(corners, fill=tuple(map(int, light)))
    return image


def one_shape(number: int, rng: np.random.Generator) -> Image.Image:
    """An image of the shape with this number."""
    return draw([SHAPES[number]], rng)


def some_shapes(number: int, rng: np.random.Generator) -> Image.Image:
    """An image of `number` + 1 shapes of any kind."""
    return draw(list(rng.choice(SHAPES, number + 1)), rng)


def pixels(images: Sequence[Image.Image], processor: ViTImageProcessorPil) -> NDArray[np.float32]:
    """The model's input for images, (images, 3, SIDE, SIDE)."""
    values: NDArray[np.float32] = processor(list(images), return_tensors="np")["pixel_values"].astype(np.float32)
    return values


def train_from_scratch(folder: Path, processor: ViTImageProcessorPil) -> None:
    """Train a classifier of shapes, and save it without its head."""
    rng = np.random.default_rng(0)
    labels = np.arange(IMAGES) % len(SHAPES)
    images = pixels([one_shape(int(label), rng) for label in labels], processor)
    torch.manual_seed(0)
    config = ViTConfig(image_size=SIDE, patch_size=PATCH, num_labels=len(SHAPES), **SIZES)
    model = ViTForImageClassification(config)
    data = ArrayData({"pixel_values": torch.from_numpy(images)}, torch.from_numpy(labels))
    console.print(str(fit(model, data, FROM_SCRATCH)))
    model.vit.save_pretrained(folder)
    processor.save_pretrained(folder)


def count(graph: Path, labels: Sequence[str], processor: ViTImageProcessorPil) -> float:
    """The accuracy of the graph on new images."""
    rng = np.random.default_rng(1)
    wanted = np.arange(NEW_IMAGES) % len(COUNTS)
    images = pixels([some_shapes(int(number), rng) for number in wanted], processor)
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    (scores,) = session.run(["logits"], {"pixel_values": images})
    found = [labels[number] for number in scores.argmax(-1)]
    return float(np.mean([name == COUNTS[number] for name, number in zip(found, wanted, strict=True)]))


def main(folder: Path) -> Result:
    folder.mkdir(parents=True)
    processor = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})
    console.print("[bold]1. Train from scratch: which shape is it?[/bold]")
    train_from_scratch(folder / "base", processor)

    console.print("\n[bold]2. How many shapes are there? The head alone, and LoRA[/bold]")
    rng = np.random.default_rng(2)
    for number in range(IMAGES):
        place = folder / "images" / COUNTS[number % len(COUNTS)]
        place.mkdir(parents=True, exist_ok=True)
        some_shapes(number % len(COUNTS), rng).save(place / f"{number:03}.png")
    trained = le.train(
        folder / "base", folder / "images", folder / "adapter", compare=["frozen"], **ADAPTING, on_message=console.print
    )
    alone, adapted = (trained.scores[name].accuracy or 0.0 for name in ("frozen", "adapter"))
    console.print(f"held-out images: {alone:.1%} with the head alone, {adapted:.1%} with LoRA")

    console.print("\n[bold]3. Export, and count through onnxruntime[/bold]")
    graph = le.export_onnx(folder / "base", folder / "counting.onnx", adapters=folder / "adapter", lora="nodes")
    config = json.loads((folder / "adapter" / "config.json").read_text(encoding="utf-8"))
    labels = [config["id2label"][str(number)] for number in range(len(COUNTS))]
    result = Result(alone, adapted, count(graph.output, labels, processor))
    console.print(f"{graph.output}: {graph.proof.verdict.outcome}; {result.graph:.1%} of {NEW_IMAGES} new images")
    return result


if __name__ == "__main__":
    result = main(new_folder("shapes-output"))
    sys.exit(result.adapter <= result.head_alone)
