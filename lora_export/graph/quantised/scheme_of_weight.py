"""Recognising the scheme of a stored quantised weight, so that a changed weight can be quantised by the same rule."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.graph import quantised_weights
from lora_export.graph.find_sites import Sites
from lora_export.graph.quantised.requantise import RequantisedWeight
from lora_export.graph.quantised.scheme import Groups, PackedTensor, Rule, Scheme
from lora_export.graph.quantised_weights import DequantizeLinearWeight, NBitsWeight, QuantisedWeight
from lora_export.options.spelling import named
from lora_export.plan import Plan
from lora_export.storage import block_copy
from lora_export.weights.tensor_blocks import Patch

INTEGER_TYPES = frozenset({"INT2", "UINT2", "INT4", "UINT4", "INT8", "UINT8", "INT16", "UINT16"})
MIN_BITS_WITHOUT_LOWEST = 8  # from here on, a symmetric scheme of signed integers does not use the lowest one


def requantised_weight(stored: QuantisedWeight, patches: Sequence[Patch], name: str) -> RequantisedWeight:
    """A weight with patches that are applied to it. Reads its scales and zero points, in pieces, for the scheme.

    Raises InputRefused for a scheme that is not supported, and where a patch shares a scale with its neighbours.
    """
    refuse_unknown_scheme(stored, name)
    (levels, scales, zeros), (bits, lowest) = stored.tensors, stored.integers
    is_nbits, scale_dtype = isinstance(stored, NBitsWeight), scales.dtype.numpy()
    if zeros is None and not lowest and not is_nbits:
        raise InputRefused(f"{name} is quantised without zero points ({stored.kind}): it cannot store negative values")
    axis = stored.axis if isinstance(stored, DequantizeLinearWeight) else 1
    groups = Groups(stored.shape, None if scales.size == 1 and not is_nbits else axis, stored.block_size)
    band, integer = groups.band_groups, np.dtype(f"{'i' if lowest else 'u'}{max(bits // 8, 1)}")
    width = band * stored.block_size if is_nbits else math.prod(stored.shape[1:])
    scale_bits = 8 * scale_dtype.itemsize
    packed_scales = PackedTensor(scales, scale_dtype, scale_bits, band, scale_bits * band)
    if zeros is None:
        packed_zeros = None
    elif is_nbits and zeros.dtype != ir.DataType.UINT8:  # floats, as the scales
        packed_zeros = replace(packed_scales, tensor=zeros, dtype=zeros.dtype.numpy())
    else:
        row_bits = 8 * -(-band * bits // 8) if is_nbits else band * bits
        packed_zeros = PackedTensor(zeros, integer, bits, band, row_bits)
    scheme = Scheme(
        lowest=lowest,
        highest=lowest + (1 << bits) - 1,
        default_zero=0 if lowest else 1 << (bits - 1),
        rule=Rule.SYMMETRIC,
        scale_dtype=scale_dtype,
        zero_dtype=None if packed_zeros is None else packed_zeros.dtype,
        scale_of_zeros=0 if is_nbits else 1,
    )
    packed_levels = PackedTensor(levels, integer, bits, width, width * bits)
    weight = RequantisedWeight(name, stored.shape, groups, scheme, packed_levels, packed_scales, packed_zeros)
    return _with_rule(weight).with_patches(patches)


def stored_weight(node: ir.Node, index: int) -> QuantisedWeight | None:
    """The quantised weight whose integers a node reads at this input."""
    return quantised_weights.of_matmul_nbits(node, index) or quantised_weights.of_dequantize_linear(node, index)


def is_quantised(value: ir.Value) -> bool:
    """Whether a value holds the integers of a quantised weight."""
    return any(stored_weight(node, index) for node, index in value.uses())


def refuse_unknown_scheme(stored: QuantisedWeight, name: str) -> None:
    """Raise InputRefused for integers of a type that cannot be quantised again. Reads nothing."""
    if stored.tensors[0].dtype.name not in INTEGER_TYPES or 0 in stored.shape or not stored.shape:
        raise InputRefused(f"{name} is quantised in a way that cannot be repeated ({stored.kind})")


def requantise_notes(plan: Plan, model: ir.Model, sites: Sites) -> Iterator[str]:
    """Notes for the user on a merge into quantised weights."""
    weights = (site.quantised for step in plan.steps for site in sites.by_name[step.spec.stored_name][:1])
    kinds = Counter(weight.kind for weight in weights if weight is not None)
    if not kinds:
        yield f"{named('requantize', True)} has no effect: no weight that changes is quantised"
    for kind, count in kinds.items():
        yield f"quantised again: {count} of the weights, {kind}"
    nodes = [node for node in ir.traversal.RecursiveGraphIterator(model.graph) if node.op_type == "QuantizeLinear"]
    inputs = [node for node in nodes if node.inputs and node.inputs[0] is not None]
    activations = sum(quantised_weights.tensor_at(node, 0) is None for node in inputs)
    if kinds and activations:
        yield f"{activations} activations are quantised too, in ranges that were measured without the adapter"


def _with_rule(weight: RequantisedWeight) -> RequantisedWeight:
    """The weight with the rule by which its stored scales and zero points must have been made."""
    scheme = weight.scheme
    zeros = () if weight.zeros is None else _parameter_pieces(weight, weight.zeros)
    if not all((piece == scheme.default_zero).all() for piece in zeros):
        return replace(weight, scheme=replace(scheme, rule=Rule.ASYMMETRIC))
    if not all((piece >= 0).all() for piece in _parameter_pieces(weight, weight.scales)):
        return replace(weight, scheme=replace(scheme, rule=Rule.SIGNED_SCALE, scale_of_zeros=0))
    if scheme.lowest < 0 and weight.levels.bits >= MIN_BITS_WITHOUT_LOWEST:
        scheme = replace(scheme, lowest=-scheme.highest)
    return replace(weight, scheme=scheme)


def _parameter_pieces(weight: RequantisedWeight, tensor: PackedTensor) -> Iterator[NDArray[np.float32]]:
    """Scales or zero points in fp32, some bands at a time."""
    bands = -(-weight.shape[0] // weight.groups.band_rows)
    count = max(1, block_copy.BLOCK // max(tensor.row_bits // 8, 1))
    for first in range(0, bands, count):
        yield tensor.read(slice(first, min(first + count, bands))).astype(np.float32)
