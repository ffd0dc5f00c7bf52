"""What files for ComfyUI state of their layers, in tensors and in headers: see `comfyui`, which reads the weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from lora_export.errors import InputRefused
from lora_export.storage import json_files
from lora_export.storage.safetensors_file import Entry, TensorFile

COMFYUI = "comfyui"
MARKER, LAYERS_IN_HEADER, STATED_FORMAT = "scaled_fp8", "_quantization_metadata", "comfy_quant"
FLOATS8 = ("float8_e4m3fn", "float8_e5m2")


def stated_by_file(shards: Mapping[str, TensorFile]) -> dict[str, Any] | None:
    """What the tensors and headers of files without a config state, as a `quantization_config`; None for floats."""
    layers: dict[str, Any] = {}
    for shard in shards.values():
        if text := shard.metadata.get(LAYERS_IN_HEADER):
            found = json_files.parse_json(text, f"{LAYERS_IN_HEADER} of {shard.path}").get("layers")
            if not isinstance(found, dict):
                raise InputRefused(f"{LAYERS_IN_HEADER} of {shard.path} has no table of layers")
            layers |= found
    every = {name: entry for shard in shards.values() for name, entry in shard.entries.items()}
    is_quantised = layers or any(
        name.endswith(f".{STATED_FORMAT}") or (str(entry.dtype) in FLOATS8 and not is_marker(name))
        for name, entry in every.items()
    )
    return {"quant_method": COMFYUI, "layers": layers} if is_quantised else None


def without_layers(metadata: Mapping[str, str], modules: Iterable[str] | None) -> dict[str, str]:
    """The metadata of a header in which more modules are floats; all of them for None."""
    found = dict(metadata)
    if LAYERS_IN_HEADER in found:
        stated = json.loads(found.pop(LAYERS_IN_HEADER))
        left = {} if modules is None else {k: v for k, v in stated["layers"].items() if k not in set(modules)}
        found |= {LAYERS_IN_HEADER: json.dumps({**stated, "layers": left})} if left else {}
    return found


def file_dtype(entries: Iterable[Entry]) -> str:
    """The dtype of the floats that are made: float16 where the file has such tensors, and none in bfloat16."""
    dtypes = {str(entry.dtype) for entry in entries}
    return "float16" if "float16" in dtypes and "bfloat16" not in dtypes else "bfloat16"


def is_marker(name: str) -> bool:
    """Whether a tensor marks the weights of a file as scaled."""
    return name.rpartition(".")[2] == MARKER
