"""A stored quantised weight of a graph as codes on its own scales: those of `weights.quantised`."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.graph import quantised_weights
from lora_export.graph.find_sites import Sites
from lora_export.graph.quantised.scheme import Groups, IntegerCodes, PackedTensor
from lora_export.graph.quantised_weights import DequantizeLinearWeight, NBitsWeight, QuantisedWeight
from lora_export.options.spelling import named
from lora_export.plan import Plan
from lora_export.weights.quantised import QuantisedTensor
from lora_export.weights.quantised.codes import StoredCodes
from lora_export.weights.quantised.stored_parts import Decode, Pieces

INTEGER_TYPES = frozenset({"INT2", "UINT2", "INT4", "UINT4", "INT8", "UINT8", "INT16", "UINT16"})


def quantised_tensor(stored: QuantisedWeight, name: str) -> QuantisedTensor:
    """A weight in the form in which those of checkpoints are kept or made floats. Reads nothing.

    Its shape is (rows, columns): all dimensions of what is stored but the first are one. Raises InputRefused for a
    scheme that is not supported.
    """
    refuse_unknown_scheme(stored, name)
    (levels, scales, zeros), (bits, lowest) = stored.tensors, stored.integers
    is_nbits, scale_dtype = isinstance(stored, NBitsWeight), scales.dtype.numpy()
    if zeros is None and not lowest and not is_nbits:
        raise InputRefused(f"{name} is quantised without zero points ({stored.kind}): it cannot store negative values")
    axis = stored.axis if isinstance(stored, DequantizeLinearWeight) else 1
    groups = Groups(stored.shape, None if scales.size == 1 and not is_nbits else axis, stored.block_size)
    band, integer = groups.band_groups, np.dtype(f"{'i' if lowest else 'u'}{max(bits // 8, 1)}")
    rows, columns = stored.shape[0], math.prod(stored.shape[1:])
    scale_bits = 8 * scale_dtype.itemsize
    packed_scales = PackedTensor(scales, scale_dtype, scale_bits, band, scale_bits * band)
    if zeros is None:
        packed_zeros = None
    elif stored.has_float_zeros:
        packed_zeros = PackedTensor(zeros, zeros.dtype.numpy(), scale_bits, band, scale_bits * band)
    else:
        packed_zeros = PackedTensor(zeros, integer, bits, band, 8 * -(-band * bits // 8) if is_nbits else band * bits)
    row_bits = (band * stored.block_size if is_nbits else columns) * bits
    layout = IntegerCodes(PackedTensor(levels, integer, bits, columns, row_bits))
    zero = 1 << (bits - 1) if is_nbits and zeros is None else 0
    codes = StoredCodes(
        shape=(rows, columns),
        is_turned=False,
        values=np.arange(lowest - zero, lowest - zero + (1 << bits), dtype=np.float32),
        layout=layout,
        load=lambda: _StoredGrid(groups, packed_scales, packed_zeros),
        has_float_zeros=stored.has_float_zeros,
    )
    return QuantisedTensor(
        name=name,
        shape=codes.shape,
        dtype=np.dtype(np.float32),  # rounded once, after the sum
        packed=name,
        parts=(),
        scheme=stored.kind,
        load=functools.partial(_decoder, codes),
        pieces=functools.partial(_pieces, layout) if layout.rows_together > 1 else None,
        rows_at_once=layout.rows_together,
        codes=codes,
    )


@dataclass(frozen=True, eq=False)
class _StoredGrid:
    """Reads the scales and zero points of some rows when they are needed: those of a whole head are large."""

    groups: Groups
    scales: PackedTensor
    zeros: PackedTensor | None

    def __call__(self, rows: slice) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        return self._of_entries(self.scales, rows), None if self.zeros is None else self._of_entries(self.zeros, rows)

    def _of_entries(self, tensor: PackedTensor, rows: slice) -> NDArray[np.float32]:
        found = self.groups.broadcast(tensor.read(self.groups.bands(rows)).astype(np.float32), rows)
        if found.ndim == 2:
            return found
        count = rows.stop - rows.start
        return np.broadcast_to(found, (count, *self.groups.shape[1:])).reshape(count, -1)


def _decoder(codes: StoredCodes) -> Decode:
    grid = codes.load()
    return lambda rows, packed: codes.weight(codes.layout.unpack(rows, packed), *grid(rows))


def _pieces(layout: IntegerCodes, rows: slice) -> list[Pieces]:
    first, last = layout.extent(rows)
    return [Pieces(first, last - first)]


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
