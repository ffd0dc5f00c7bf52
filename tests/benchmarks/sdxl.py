"""The UNet of Stable Diffusion XL with random weights in fp16, and an adapter for it as kohya's scripts write it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch

from lora_export.names.diffusion_layouts import other_layouts
from lora_export.storage import safetensors_file

RANK = 16
BLOCK = 1 << 22  # random numbers that are repeated: a generator would take minutes
CONFIG = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def sdxl_unet(folder: Path) -> Path:
    """A folder as diffusers saves it: config.json and one file. Memory holds one block."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        model = UNet2DConditionModel(**CONFIG)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    model.save_config(folder)
    text = json.dumps(header).encode()
    values = (np.float32(0.02) * np.random.default_rng(0).standard_normal(BLOCK, np.float32)).astype(np.float16)
    with (folder / "diffusion_pytorch_model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for first in range(0, end, values.nbytes):
            file.write(values.data.cast("B")[: end - first])
    return folder


def kohya_adapter(unet: Path, path: Path) -> Path:
    """Pairs of rank 16 on every linear layer of the attention blocks, under the original names, flattened."""
    shapes = {name: entry.shape for name, entry in safetensors_file.open_file(
        unet / "diffusion_pytorch_model.safetensors"
    ).entries.items()}  # fmt: skip
    (layout,) = other_layouts(shapes)
    rng, tensors = np.random.default_rng(1), {}
    for name, tensor in layout.tensors.items():
        (source,) = tensor.sources
        if ".attentions." in source and source.endswith(".weight") and len(shapes[source]) == 2:
            out, inputs = shapes[source]
            module = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
            tensors[f"{module}.lora_down.weight"] = _normal(rng, RANK, inputs)
            tensors[f"{module}.lora_up.weight"] = _normal(rng, out, RANK)
            tensors[f"{module}.alpha"] = np.array(RANK, np.float16)
    safetensors_file.write(path, tensors, {"format": "pt"})
    return path


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return (np.float32(0.02) * rng.standard_normal(shape, np.float32)).astype(np.float16)
