"""The weights of a quantised checkpoint, read as the floats that its own library makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lora_export.errors import InputRefused, listed
from lora_export.options.spelling import named
from lora_export.storage.safetensors_file import TensorFile
from lora_export.weights.quantised import CACHE_KEYS, CACHE_SCALES, SCHEMES, method_of
from lora_export.weights.quantised.stored_parts import Decode, Pieces, QuantisedTensor, StoredParts


def find_quantised(
    shards: Mapping[str, TensorFile],
    quantization: Mapping[str, Any],
    dtype: str,
    is_conv1d: Callable[[str], bool | None] = lambda _: False,
) -> dict[str, QuantisedTensor]:
    """The quantised weights of a checkpoint, by name. `quantization` is the config's `quantization_config`.

    `dtype` is the float dtype of the model, for schemes that do not store it with each weight. `is_conv1d` returns
    whether a weight belongs to a Conv1D, whose float weight is (inputs, outputs), and None where that is unknown.
    Reads the small tensors that describe a weight, and no weight. Raises InputRefused for a scheme that is not known,
    and for a weight whose parts are missing or do not fit.
    """
    method = method_of(quantization)
    if method not in SCHEMES:
        known = ", ".join(scheme.description for scheme in SCHEMES.values())
        raise InputRefused(
            f"{named('dequantize', True)} knows {known}, and this base is quantised by {method}. Merge into the "
            "original float model, or dequantise this one with its own library"
        )
    scheme, parts = SCHEMES[method], StoredParts(shards)
    found = scheme.read(parts, quantization, dtype)
    if not found:
        raise InputRefused(f"the config names {method}, and no weight is stored so: remove its quantization_config")
    # Parts of a quantised weight whose numbers are missing would be copied as weights.
    used = {name for tensor in found.values() for name in (tensor.packed, *tensor.parts)}
    if orphans := [name for name in parts.names() if name.endswith(tuple(scheme.parts)) and name not in used]:
        raise InputRefused(f"parts of weights in {method} belong to no quantised weight:", listed(orphans))
    cache_scales = _cache_scales(parts, quantization, found)
    return {
        name: as_conv1d(
            tensor.with_parts(*cache_scales.get(name, ())),
            parts.expect(tensor.packed, name).nbytes,
            is_conv1d(name),
            scheme.conv1d_as_linear,
        )
        for name, tensor in found.items()
    }


def _cache_scales(
    parts: StoredParts, quantization: Mapping[str, Any], found: Mapping[str, QuantisedTensor]
) -> dict[str, list[str]]:
    """The scales of a quantised cache of keys and values, by a quantised weight of the same attention."""
    if not any(quantization.get(key) for key in CACHE_KEYS):
        return {}
    by_module = {name.rpartition(".")[0]: name for name in found}
    by_module |= {module.rpartition(".")[0]: name for module, name in by_module.items()}
    scales: dict[str, list[str]] = {}
    for name in parts.names():
        module, _, kind = name.rpartition(".")
        if kind in CACHE_SCALES and module in by_module:
            scales.setdefault(by_module[module], []).append(name)
    return scales


def as_conv1d(
    tensor: QuantisedTensor, packed_bytes: int, is_conv1d: bool | None, is_stored_as_linear: bool
) -> QuantisedTensor:
    """The weight as the float checkpoint of its model has it. `is_conv1d` is None where that is unknown.

    The float weight of a Conv1D (GPT-2) is (inputs, outputs), and some libraries quantise it in the order of nn.Linear.
    It is decoded whole for any of its rows: such models are small. `packed_bytes` is the size of its numbers.
    """
    if is_conv1d is False:
        return tensor
    if is_conv1d is None or not is_stored_as_linear:
        raise InputRefused(
            f"{tensor.name}: this module may be a Conv1D, and how {tensor.scheme} stores its weight is not known. "
            "Merge into the original float model"
        )
    outputs, inputs = tensor.row_shape
    every = slice(0, outputs)

    def load() -> Decode:
        decode = tensor.load()
        return lambda rows, packed: decode(every, packed).T[rows].copy()

    def pieces(_: slice) -> Sequence[Pieces]:
        return [Pieces(0, packed_bytes)] if tensor.pieces is None else tensor.pieces(every)

    codes = tensor.codes and replace(tensor.codes, is_turned=not tensor.codes.is_turned)
    return replace(tensor, shape=(inputs, outputs), load=load, pieces=pieces, rows_at_once=inputs, codes=codes)
