"""Weights in 8 and 4 bits without a config, as single files for ComfyUI have them: with one scale each, or with none.

    X.weight        float8_e4m3fn or float8_e5m2, or int8
    X.scale_weight  its factor, where a tensor `scaled_fp8` is before it in the file (fp8_scaled)
    X.weight_scale  its factor, where `X.comfy_quant` (JSON in bytes) or the header's `_quantization_metadata` names X
                    (nvfp4 and mxfp8 have scales of groups: see `comfyui_groups`)
    X.scale_input, X.input_scale  of the inputs of the layer: a float model has no use for them

A float8 without a scale is its own value. A float layer in such a file is one that nothing of this names. The product
is made in fp32, and rounded once to the dtype of the file's other weights.

Source: comfy/utils.py (convert_old_quants) and comfy/ops.py of ComfyUI in 2026, and comfy-kitchen 0.2.40.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.storage import json_files
from lora_export.storage.block_copy import Bytes
from lora_export.storage.safetensors_file import Entry
from lora_export.weights.quantised.codes import FLOAT8_KINDS, INT8_VALUES, Grid, PackedRows, StoredCodes
from lora_export.weights.quantised.comfyui_files import COMFYUI, MARKER, STATED_FORMAT, is_marker
from lora_export.weights.quantised.comfyui_groups import FORMATS_IN_GROUPS, weight_in_groups
from lora_export.weights.quantised.new_grid import ScaleRule
from lora_export.weights.quantised.stored_parts import FLOAT_SCALES, Decode, QuantisedTensor, StoredParts

FIRST_SCALE, STATED_SCALE = "scale_weight", "weight_scale"
SCALES_OF_INPUTS = ("scale_input", "input_scale")
VALUES_OF_FORMATS = {**{name: values for name, (_, values) in FLOAT8_KINDS.items()}, "int8_tensorwise": INT8_VALUES}
# Format -> dtype of the numbers
STORED_AS = {
    **{name: name for name in FLOAT8_KINDS},
    "int8_tensorwise": "int8",
    **{name: one.dtype for name, one in FORMATS_IN_GROUPS.items()},
}
MOST_STATED_BYTES = 1 << 16


def comfyui_weights(parts: StoredParts, quantization: Mapping[str, Any], dtype: str) -> dict[str, QuantisedTensor]:
    """The weights in 8 bits, by name. Raises InputRefused for another format, and where a scale is missing."""
    layers = dict(quantization.get("layers") or {})
    for module in parts.modules_with(STATED_FORMAT):
        parts.expect(f"{module}.{STATED_FORMAT}", module, "uint8", most=MOST_STATED_BYTES)
        layers[module] = json_files.parse_json(
            parts.read(f"{module}.{STATED_FORMAT}").tobytes(), f"{module}.{STATED_FORMAT}"
        )
    markers = tuple(name.removesuffix(MARKER) for name in parts.names() if is_marker(name))
    scaled = {module for module in parts.modules_with(FIRST_SCALE) if f"{module}.".startswith(markers)}
    found = {}
    for module in {**layers, **dict.fromkeys(sorted(scaled))}:
        entry = parts.expect(f"{module}.weight", f"{module}.weight")
        kind = _format(module, layers[module]) if module in layers else str(entry.dtype)
        if str(entry.dtype) != STORED_AS.get(kind):
            raise InputRefused(
                f"{entry.name} is {entry.dtype}, and the file states {kind} for it: lora-export reads "
                f"{', '.join(STORED_AS)} of such files. Merge into the original float model"
            )
        if kind in FORMATS_IN_GROUPS:
            others = tuple(_present(parts, module, entry.name))
            of_file = (f"{COMFYUI} {kind}", np.dtype(dtype), others)
            found[entry.name] = weight_in_groups(parts, entry, module, kind, *of_file)
            continue
        scale = f"{module}.{STATED_SCALE if module in layers else FIRST_SCALE}"
        found[entry.name] = _quantised(parts, entry, module, kind, scale, dtype)
    known = {*found, *(part for tensor in found.values() for part in tensor.parts)}
    for name in parts.names():
        plain = parts.find(name)
        if plain is not None and str(plain.dtype) in FLOAT8_KINDS and name not in known and not is_marker(name):
            found[name] = _quantised(parts, plain, name.rpartition(".")[0], str(plain.dtype), "", dtype)
    return _with_markers(parts, found)


def _format(module: str, stated: Any) -> str:
    """The format of a layer. Raises InputRefused where its inputs are rotated."""
    stated = stated if isinstance(stated, dict) else {}
    own = stated.get("params") if isinstance(stated.get("params"), dict) else {}
    if stated.get("convrot") or own.get("convrot"):
        raise InputRefused(f"{module}.weight: its inputs are rotated (convrot), which a merge cannot follow")
    return str(stated.get("format"))


def _with_markers(parts: StoredParts, found: dict[str, QuantisedTensor]) -> dict[str, QuantisedTensor]:
    """Each marker is a part of the first weight that it is about: it stays as long as any weight is quantised."""
    for marker in (name for name in parts.names() if is_marker(name)):
        first = next((name for name in found if name.startswith(marker.removesuffix(MARKER))), None)
        if first is not None:
            found[first] = found[first].with_parts(marker)
    return found


def _quantised(parts: StoredParts, entry: Entry, module: str, kind: str, scale: str, dtype: str) -> QuantisedTensor:
    """A weight with one scale, or one for each row; or without (`scale` is empty)."""
    rows, values = (entry.shape or (1,))[0], VALUES_OF_FORMATS[kind]
    matrix = (rows, math.prod(entry.shape[1:]))
    if scale:
        shape = parts.expect(scale, entry.name, *FLOAT_SCALES, most=max(rows, 1)).shape
        if math.prod(shape) != 1 and shape != (rows, *[1] * (len(entry.shape) - 1)):
            raise InputRefused(f"{scale}: the shape {list(shape)} fits no weight of {list(entry.shape)}")

    def spread(values: NDArray[np.float32]) -> Callable[[slice], NDArray[np.float32]]:
        factors = values.reshape(-1, 1)
        return lambda own: factors if len(factors) == 1 else factors[own]

    def grid() -> Grid:
        of_rows = spread(parts.read_scales(scale).astype(np.float32) if scale else np.ones(1, np.float32))
        return lambda own: (of_rows(own), None)

    def load() -> Decode:
        of_rows, stored = grid(), entry.dtype

        def decode(own: slice, packed: Bytes) -> NDArray[Any]:
            floats = packed.view(stored).reshape(-1, matrix[1]).astype(np.float32)
            floats *= of_rows(own)[0]
            return floats.astype(dtype)

        return decode

    codes = StoredCodes(matrix, False, values, PackedRows(8, matrix[1], matrix[1]), grid)
    own: Sequence[str] = (*([scale] if scale else []), *_present(parts, module, entry.name))
    return QuantisedTensor(
        *(entry.name, entry.shape, np.dtype(dtype), entry.name, tuple(own), f"{COMFYUI} {kind}", load),
        codes=codes,
        matrix=matrix,
        scaling=ScaleRule(scale, lambda: parts.read_scales(scale), spread, float(np.nanmax(values))) if scale else None,
    )


def _present(parts: StoredParts, module: str, name: str) -> Iterator[str]:
    """What describes the inputs and the format of the layer whose weight this is."""
    if name == f"{module}.weight":
        yield from parts.present(*(f"{module}.{what}" for what in (*SCALES_OF_INPUTS, STATED_FORMAT)))
