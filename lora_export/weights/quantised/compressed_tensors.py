"""Weights of compressed-tensors: which of its formats a module is stored in.

    compressed_integers.py  integers of 1 to 8 bits packed into words; int8 and 8-bit floats (int, float, naive)
    compressed_floats.py    4-bit, 6-bit and 8-bit floats in groups: nvfp4, mxfp4, mxfp6, mxfp8

Source: the library's own functions, which the tests compare with bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lora_export.errors import InputRefused
from lora_export.options.spelling import named
from lora_export.weights.quantised.compressed_floats import floats_in_groups
from lora_export.weights.quantised.compressed_integers import packed_integers, plain_numbers
from lora_export.weights.quantised.stored_parts import QuantisedTensor, StoredParts

COMPRESSED_FORMATS = (
    *("pack-quantized", "int-quantized", "float-quantized", "naive-quantized"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized"),
)
NO_FORMATS = ("dense", "mixed-precision")
# What the library stores of a module's inputs and outputs. A float model has no use for it.
ACTIVATION_PARTS = tuple(
    f"{what}_{kind}" for what in ("input", "output") for kind in ("scale", "zero_point", "global_scale", "g_idx")
)


def compressed_weights(parts: StoredParts, quantization: Mapping[str, Any], _: str) -> dict[str, QuantisedTensor]:
    """The weights that compressed-tensors stores, by name. Raises InputRefused for a format that is not known."""
    groups = _groups(quantization)
    formats = {str(name) for name in (*(group.get("format") for group in groups), quantization.get("format")) if name}
    if unknown := formats - {*COMPRESSED_FORMATS, *NO_FORMATS}:
        raise InputRefused(
            f"{named('dequantize', True)} reads {', '.join(COMPRESSED_FORMATS)} of compressed-tensors, and this base "
            f"has {', '.join(sorted(unknown))}. Merge into the original float model"
        )
    return {tensor.name: tensor for tensor in _found(parts, _arguments(groups))}


def _groups(quantization: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    groups = quantization.get("config_groups")
    return [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []


def _arguments(groups: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """What the config's groups state of their weights."""
    return [group["weights"] for group in groups if isinstance(group.get("weights"), dict)]


def _found(parts: StoredParts, arguments: Sequence[Mapping[str, Any]]) -> Iterator[QuantisedTensor]:
    for name in parts.names():
        module, _, kind = name.rpartition(".")
        others = parts.present(*(f"{module}.{activation}" for activation in ACTIVATION_PARTS))
        if kind == "weight_packed":
            words = parts.find(name)
            if words is not None and str(words.dtype) == "uint8":
                yield floats_in_groups(parts, f"{module}.weight", name, others)
            else:
                yield packed_integers(parts, f"{module}.weight", arguments, others)
        elif kind == "weight_scale" and not parts.present(f"{module}.weight_packed"):
            scales = parts.find(name)
            if scales is not None and str(scales.dtype) == "uint8":
                yield floats_in_groups(parts, f"{module}.weight", f"{module}.weight", others)
            else:
                yield plain_numbers(parts, f"{module}.weight", arguments, others)
