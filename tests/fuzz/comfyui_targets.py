"""Fuzz targets of single files for ComfyUI: the header and the layers that it states, a base of a merge and its proof.

As in `targets`, a target raises where the program did anything but succeed or refuse.
"""

from __future__ import annotations

import functools
import json

import numpy as np
from ml_dtypes import float8_e4m3fn

from fuzz.targets import Target, a_place, as_json, header_of, merged_and_proven, save, tensors
from lora_export.weights.quantised.comfyui_files import LAYERS_IN_HEADER

MODULES = ("a", "b", "c")
PAIR = {
    f"diffusion_model.{name}.lora_{side}.weight": shape
    for name in MODULES
    for side, shape in (("A", (1, 32)), ("B", (4, 1)))
}


@functools.cache
def a_file() -> bytes:
    """A layer of each form: in the header, by a tensor, and in groups."""
    numbers = np.linspace(-1, 1, 128).reshape(4, 32).astype(float8_e4m3fn)
    scale, tiled = np.full((), 0.5, np.float32), np.ones((128, 4), float8_e4m3fn)

    def stated(kind: str) -> np.ndarray:
        return np.frombuffer(json.dumps({"format": kind}).encode(), np.uint8)

    stored = {
        "a.weight": numbers,
        "a.weight_scale": scale,
        "b.weight": numbers,
        "b.weight_scale": np.full((128, 4), 127, np.uint8),
        "b.comfy_quant": stated("mxfp8"),
        "c.weight": numbers.view(np.uint8)[:, :16],
        "c.weight_scale": tiled,
        "c.weight_scale_2": scale,
        "c.comfy_quant": stated("nvfp4"),
    }
    layers = {"layers": {"a": {"format": "float8_e4m3fn"}}}
    return save(stored, {LAYERS_IN_HEADER: json.dumps(layers)})


def comfyui_base(data: bytes) -> bool:
    """A base: inspected, merged into, and the result proven."""
    with a_place() as place:
        (place / "base.safetensors").write_bytes(data)
        (place / "a.safetensors").write_bytes(save({name: np.ones(size, np.float32) for name, size in PAIR.items()}))
        return merged_and_proven(place / "base.safetensors", place / "a.safetensors", "--keep-quantised")


def comfyui_header(data: bytes) -> bool:
    """The header of such a file, with the data of a whole one."""
    return comfyui_base(tensors(data, a_file()))


def comfyui_layers(data: bytes) -> bool:
    """What the header states of its layers."""
    header = json.loads(header_of(a_file()))
    header["__metadata__"] = {LAYERS_IN_HEADER: data.decode("utf-8", "replace")}
    return comfyui_header(as_json(header))


TARGETS: dict[str, Target] = {
    "comfyui_base": comfyui_base,
    "comfyui_header": comfyui_header,
    "comfyui_layers": comfyui_layers,
}
GOOD = {
    "comfyui_base": a_file(),
    "comfyui_header": header_of(a_file()),
    "comfyui_layers": as_json({"layers": {"a": {"format": "float8_e4m3fn"}}}),
}
