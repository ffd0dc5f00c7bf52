"""How quantised weights are stored: onnxruntime's MatMulNBits, and ONNX's DequantizeLinear.

The layouts are documented in onnxruntime's docs/ContribOperators.md (MatMulNBits) and in ONNX's Operators.md
(DequantizeLinear).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

MATMUL_NBITS = "MatMulNBits"
SUPPORTED_BITS = frozenset({2, 4, 8})  # a byte holds a whole number of these
INVALID = -(1 << 40)  # in place of an attribute that is no whole number; no axis, size or count has this value
SCALE_TYPES = frozenset({"FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE"})
BYTE_TYPES = (ir.DataType.UINT8, ir.DataType.INT8)
Rows = slice | NDArray[np.int64]
ALL_ROWS = slice(None)


class Steps(NamedTuple):
    """How fine a quantised weight is, entry by entry."""

    own: NDArray[np.float64]  # the distance between two neighbouring numbers: the magnitude of the entry's scale
    largest: NDArray[np.float64]  # the largest magnitude of all entries that share this scale
    levels: int  # the integers on either side of zero in a symmetric range

    @property
    def needed(self) -> NDArray[np.float64]:
        """The distance between neighbouring numbers at which a symmetric range just reaches the largest entry."""
        return self.largest / self.levels


@dataclass(frozen=True, eq=False)
class QuantisedWeight:
    """A weight that is stored as integers and scales: (integers - zero point) * scale."""

    node: ir.Node  # that reads the integers and scales
    block_size: int  # entries that share a scale; 0: no blocks
    shape: tuple[int, ...]  # of the dequantised weight, as it is stored
    dtype: str  # of the dequantised weight

    POSITIONS: ClassVar[tuple[int, int, int]]  # of the integers, scales and zero points in the node's inputs

    @property
    def tensors(self) -> tuple[ir.TensorProtocol, ir.TensorProtocol, ir.TensorProtocol | None]:
        """The integers, scales and zero points, as they are stored."""
        integers, scales, zeros = (tensor_at(self.node, position) for position in self.POSITIONS)
        assert integers is not None and scales is not None
        return integers, scales, zeros

    @property
    def kind(self) -> str:
        """How it is quantised, for messages: `4 bits in blocks of 32`."""
        raise NotImplementedError

    @property
    def scale_dtype(self) -> str:
        """The dtype of the scales, as they are stored."""
        return str(self.tensors[1].dtype.numpy())

    @property
    def has_float_zeros(self) -> bool:
        """Whether zero points are rounded floats, not integers."""
        return False

    def rows(self, part: Rows) -> NDArray[np.float32]:
        """Dequantise some rows. Reads all of the stored tensors."""
        raise NotImplementedError

    def nearest(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Round `values` to the nearest numbers that the stored scales and zero points can represent."""
        bits, lowest = self.integers
        scales, zeros = (np.asarray(each, np.float64) for each in self._parameters(ALL_ROWS))
        levels = np.rint(self._split(values) / np.where(scales, scales, 1.0) + zeros)
        return self._joined((np.clip(levels, lowest, lowest + (1 << bits) - 1) - zeros) * scales)

    def steps(self, values: NDArray[np.float64]) -> Steps:
        """The steps between the numbers that the stored scales can represent, beside those that `values` need."""
        magnitudes = np.abs(self._split(values))
        own = np.abs(np.asarray(self._parameters(ALL_ROWS)[0], np.float64))
        whole = (np.broadcast_to(each, magnitudes.shape) for each in (own, self._largest(magnitudes)))
        own, largest = map(self._joined, whole)
        return Steps(own, largest, max(1, (1 << (self.integers[0] - 1)) - 1))

    @property
    def integers(self) -> tuple[int, int]:
        """The bits of an integer, and the lowest one."""
        raise NotImplementedError

    def _parameters(self, part: Rows) -> tuple[NDArray[Any], NDArray[Any]]:
        """Scales and zero points of some rows, in shapes that broadcast over the rows of `_split`."""
        raise NotImplementedError

    def _largest(self, magnitudes: NDArray[np.float64]) -> NDArray[np.float64]:
        """The largest magnitude under each scale, in a shape that broadcasts over the weight."""
        raise NotImplementedError

    def _split(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        return values

    def _joined(self, split: NDArray[np.float64]) -> NDArray[np.float64]:
        return split


@dataclass(frozen=True, eq=False)
class NBitsWeight(QuantisedWeight):
    """The (out, in) weight of a MatMulNBits node.

    Each entry has `bits` bits, the lowest bits of a byte first. Each `block_size` entries of a row share a scale.
    """

    bits: int

    POSITIONS = (1, 2, 3)

    @property
    def kind(self) -> str:
        return f"{self.bits} bits in blocks of {self.block_size}"

    @property
    def blocks(self) -> int:
        """Blocks in a row."""
        return -(-self.shape[1] // self.block_size)

    @property
    def has_float_zeros(self) -> bool:
        zeros = self.tensors[2]
        return zeros is not None and zeros.dtype not in BYTE_TYPES

    @property
    def integers(self) -> tuple[int, int]:
        return self.bits, 0

    def rows(self, part: Rows) -> NDArray[np.float32]:
        out, inner = self.shape
        packed = self.tensors[0].numpy().view(np.uint8).reshape(out, -1)[part]
        levels = unpack_bits(packed, self.bits).reshape(len(packed), self.blocks, self.block_size).astype(np.float32)
        scales, zeros = self._parameters(part)
        weight: NDArray[np.float32] = (levels - zeros) * scales.astype(np.float32)
        return weight.reshape(len(packed), -1)[:, :inner]

    def _parameters(self, part: Rows) -> tuple[NDArray[Any], NDArray[Any]]:
        out, (_, scales, zeros) = self.shape[0], self.tensors
        scales_of_rows = scales.numpy().reshape(out, self.blocks, 1)[part]
        if zeros is None:
            return scales_of_rows, np.asarray(np.float32(1 << (self.bits - 1)))
        points = zeros.numpy().reshape(out, -1)[part]
        points = unpack_bits(points, self.bits) if points.dtype == np.uint8 else points
        return scales_of_rows, points[:, : self.blocks, None].astype(np.float32)

    def _largest(self, magnitudes: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(magnitudes.max(-1, keepdims=True))

    def _split(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """(out, blocks, block_size), padded with zeros."""
        out, inner = self.shape
        padded = np.pad(values, [(0, 0), (0, self.blocks * self.block_size - inner)])
        return padded.reshape(out, self.blocks, self.block_size)

    def _joined(self, split: NDArray[np.float64]) -> NDArray[np.float64]:
        out, inner = self.shape
        return split.reshape(out, -1)[:, :inner]


@dataclass(frozen=True, eq=False)
class DequantizeLinearWeight(QuantisedWeight):
    """A weight behind a DequantizeLinear node.

    There is one scale for the tensor, one per slice along the axis, or one per block along the axis.
    """

    axis: int

    POSITIONS = (0, 1, 2)

    @property
    def kind(self) -> str:
        integers, scales, _ = self.tensors
        blocks = f"in blocks of {self.block_size}" if self.block_size else ""
        return f"{integers.dtype.name.lower()} {blocks or ('by channel' if scales.size > 1 else 'by tensor')}"

    @property
    def integers(self) -> tuple[int, int]:
        dtype = self.tensors[0].dtype
        return dtype.bitwidth, -(1 << (dtype.bitwidth - 1)) if dtype.is_signed() else 0

    def rows(self, part: Rows) -> NDArray[np.float32]:
        levels = self.tensors[0].numpy()[part].astype(np.float32)
        scales, zeros = self._parameters(part)
        levels -= zeros
        levels *= scales
        return levels

    def _parameters(self, part: Rows) -> tuple[NDArray[Any], NDArray[Any]]:
        _, scales, zeros = self.tensors
        points = np.zeros((), np.float32) if zeros is None else self._broadcast(zeros.numpy(), part)
        return self._broadcast(scales.numpy(), part), points

    def _largest(self, magnitudes: NDArray[np.float64]) -> NDArray[np.float64]:
        if self.tensors[1].size == 1:
            return np.asarray(magnitudes.max(initial=0.0, keepdims=True))
        if not self.block_size:
            others = tuple(axis for axis in range(len(self.shape)) if axis != self.axis)
            return np.asarray(magnitudes.max(others, initial=0.0, keepdims=True))
        starts = np.arange(0, self.shape[self.axis], self.block_size)
        return self._repeated(np.maximum.reduceat(magnitudes, starts, axis=self.axis))

    def _repeated(self, by_block: NDArray[Any]) -> NDArray[Any]:
        """One number for each entry, of one for each block."""
        return np.repeat(by_block, self.block_size, axis=self.axis)[tuple(map(slice, self.shape))]

    def _broadcast(self, parameters: NDArray[Any], part: Rows) -> NDArray[np.float32]:
        """Scales or zero points, in a shape that broadcasts over the rows."""
        parameters = parameters.astype(np.float32)
        if parameters.size == 1:
            return parameters.reshape(())
        if self.block_size:
            parameters = self._repeated(parameters)
        else:
            parameters = parameters.reshape([-1 if axis == self.axis else 1 for axis in range(len(self.shape))])
        return parameters[part] if parameters.shape[0] > 1 else parameters


def of_matmul_nbits(node: ir.Node, index: int) -> NBitsWeight | None:
    """The weight whose integers a MatMulNBits node reads at this input.

    None for any other node, and for an unsupported format: group indices, prepacked weights, unknown types or sizes.
    """
    if (node.domain, node.op_type, index) != ("com.microsoft", MATMUL_NBITS, 1):
        return None
    inner, out = _integer(node, "K"), _integer(node, "N")
    bits, block_size = _integer(node, "bits", 4), _integer(node, "block_size")
    integers, scales, zero_points = (tensor_at(node, position) for position in (1, 2, 3))
    if bits not in SUPPORTED_BITS or integers is None or scales is None or min(inner, out, block_size) < 1:
        return None
    if _input_name(node, 4):
        return None  # a group index permutes the rows
    if _integer(node, "weight_prepacked") or integers.dtype not in BYTE_TYPES:
        return None  # prepacked weights are in the byte order of a GPU kernel
    if scales.dtype.name not in SCALE_TYPES:
        return None
    if zero_points is not None and zero_points.dtype not in (BYTE_TYPES[0], scales.dtype):
        return None
    blocks = -(-inner // block_size)
    if (integers.size, scales.size) != (out * blocks * block_size * bits // 8, out * blocks):
        return None
    if zero_points is None:
        is_valid = not _input_name(node, 3)
    else:
        row = -(-blocks * bits // 8) if zero_points.dtype == ir.DataType.UINT8 else blocks
        is_valid = zero_points.size == out * row
    return NBitsWeight(node, block_size, (out, inner), str(scales.dtype.numpy()), bits) if is_valid else None


def of_dequantize_linear(node: ir.Node, index: int) -> DequantizeLinearWeight | None:
    """The weight that a DequantizeLinear node makes of stored integers at its input 0. None for any other node."""
    if node.domain not in ("", "ai.onnx", "com.microsoft") or node.op_type != "DequantizeLinear" or index != 0:
        return None
    integers, scale, zero = (tensor_at(node, position) for position in (0, 1, 2))
    if integers is None or scale is None or scale.dtype.name not in SCALE_TYPES:
        return None
    if _input_name(node, 2) and zero is None:
        return None
    shape = tuple(int(size) for size in integers.shape.numpy())
    axis, block_size = _integer(node, "axis", 1), _integer(node, "block_size")
    axis = axis + len(shape) if axis < 0 else axis
    if scale.size > 1 and not (0 <= axis < len(shape) and _scale_fits(scale, shape, axis, block_size)):
        return None
    if block_size < 0 or (zero is not None and (zero.size, zero.dtype) != (scale.size, integers.dtype)):
        return None
    block_size = block_size if scale.size > 1 else 0
    return DequantizeLinearWeight(node, block_size, shape, str(scale.dtype.numpy()), axis)


def _scale_fits(scale: ir.TensorProtocol, shape: Sequence[int], axis: int, block_size: int) -> bool:
    sizes = [int(size) for size in scale.shape.numpy()]
    if not block_size:
        return sizes == [shape[axis]]
    return sizes == [-(-size // block_size) if at == axis else size for at, size in enumerate(shape)]


def unpack_bits(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Unpack bytes (..., n) into numbers of this many bits (..., n * 8 / bits), the lowest bits of a byte first."""
    unpacked = np.empty((*packed.shape, 8 // bits), np.uint8)
    for place in range(8 // bits):  # several times as fast as one shift by an array
        np.bitwise_and(packed >> np.uint8(place * bits), np.uint8((1 << bits) - 1), out=unpacked[..., place])
    return unpacked.reshape(*packed.shape[:-1], math.prod(unpacked.shape[-2:]))


def _integer(node: ir.Node, name: str, default: int = 0) -> int:
    """An integer attribute. INVALID where it is no integer: ONNX does not check onnxruntime's operators."""
    attribute = node.attributes.get(name)
    if attribute is None:
        return default
    return attribute.as_int() if attribute.type == ir.AttributeType.INT and not attribute.is_ref() else INVALID


def _input_name(node: ir.Node, index: int) -> str:
    value = node.inputs[index] if index < len(node.inputs) else None
    return (value.name or "") if value is not None else ""


def tensor_at(node: ir.Node, index: int) -> ir.TensorProtocol | None:
    """The stored tensor at an input of a node. None where the input is computed or absent."""
    value = node.inputs[index] if index < len(node.inputs) else None
    return ir.convenience.get_const_tensor(value) if value is not None else None


def stored_weight(node: ir.Node, index: int) -> QuantisedWeight | None:
    """The quantised weight whose integers a node reads at this input."""
    return of_matmul_nbits(node, index) or of_dequantize_linear(node, index)


def is_quantised(value: ir.Value) -> bool:
    """Whether a value holds the integers of a quantised weight."""
    return any(stored_weight(node, index) for node, index in value.uses())
