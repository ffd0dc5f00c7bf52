"""How quantised weights are stored: onnxruntime's MatMulNBits, and ONNX's DequantizeLinear.

The layouts are documented in onnxruntime's docs/ContribOperators.md (MatMulNBits) and in ONNX's Operators.md
(DequantizeLinear).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

MATMUL_NBITS = "MatMulNBits"
SUPPORTED_BITS = frozenset({2, 4, 8})  # a byte holds a whole number of these
INVALID = -(1 << 40)  # in place of an attribute that is no whole number; no axis, size or count has this value
SCALE_TYPES = frozenset({"FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE"})
BYTE_TYPES = (ir.DataType.UINT8, ir.DataType.INT8)
Rows = slice | NDArray[np.int64]


class Steps(NamedTuple):
    """How fine a quantised weight is, entry by entry."""

    own: NDArray[np.float64]  # the distance between two neighbouring numbers: the magnitude of the entry's scale
    largest: NDArray[np.float64]  # the largest magnitude of all entries that share this scale
    levels: int  # the integers on either side of zero in a symmetric range

    @property
    def needed(self) -> NDArray[np.float64]:
        """The distance between neighbouring numbers at which a symmetric range just reaches the largest entry."""
        return self.largest / self.levels


class QuantisedWeight(Protocol):
    """A weight that is stored as integers and scales."""

    @property
    def node(self) -> ir.Node: ...  # that reads the integers and scales
    @property
    def kind(self) -> str: ...  # for messages: `4 bits in blocks of 32`
    @property
    def shape(self) -> tuple[int, ...]: ...  # of the dequantised weight, as it is stored
    @property
    def dtype(self) -> str: ...  # of the dequantised weight

    def rows(self, part: Rows) -> NDArray[np.float32]:
        """Dequantise some rows. Reads all of the stored tensors."""
        ...

    def nearest(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Round `values` to the nearest numbers that the stored scales and zero points can represent."""
        ...

    def steps(self, values: NDArray[np.float64]) -> Steps:
        """The steps between the numbers that the stored scales can represent, beside those that `values` need."""
        ...

    @property
    def scale_dtype(self) -> str: ...  # as it is stored
    @property
    def has_float_zeros(self) -> bool: ...  # whether zero points are rounded floats, not integers


@dataclass(frozen=True, eq=False)
class NBitsWeight:
    """The (out, in) weight of a MatMulNBits node.

    Each entry has `bits` bits, the lowest bits of a byte first. Each `block_size` entries of a row share a scale.
    """

    node: ir.Node
    bits: int
    block_size: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def kind(self) -> str:
        return f"{self.bits} bits in blocks of {self.block_size}"

    @property
    def blocks(self) -> int:
        """Blocks in a row."""
        return -(-self.shape[1] // self.block_size)

    def rows(self, part: Rows) -> NDArray[np.float32]:
        out, inner = self.shape
        packed = _array_at(self.node, 1).view(np.uint8).reshape(out, -1)[part]
        levels = unpack_bits(packed, self.bits).reshape(len(packed), self.blocks, self.block_size).astype(np.float32)
        scales = _array_at(self.node, 2).reshape(out, self.blocks)[part].astype(np.float32)
        weight: NDArray[np.float32] = (levels - self._zero_points(part)) * scales[..., None]
        return weight.reshape(len(packed), -1)[:, :inner]

    def nearest(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        zeros = self._zero_points(slice(None))
        return self._joined(_round_to_levels(self._split(values), self._scales, zeros, 0, (1 << self.bits) - 1))

    def steps(self, values: NDArray[np.float64]) -> Steps:
        blocks = self._split(values)
        largest = np.abs(blocks).max(-1, keepdims=True)
        every = np.ones_like(blocks)
        own = self._joined(every * np.abs(self._scales.astype(np.float64)))
        return Steps(own, self._joined(every * largest), _levels_on_a_side(self.bits))

    @property
    def scale_dtype(self) -> str:
        return str(self._scales.dtype)

    @property
    def has_float_zeros(self) -> bool:
        tensor = tensor_at(self.node, 3)
        return tensor is not None and tensor.dtype not in BYTE_TYPES

    @property
    def _scales(self) -> NDArray[Any]:
        return _array_at(self.node, 2).reshape(self.shape[0], self.blocks, 1)

    def _split(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """(out, blocks, block_size), padded with zeros."""
        out, inner = self.shape
        padded = np.pad(values, [(0, 0), (0, self.blocks * self.block_size - inner)])
        return padded.reshape(out, self.blocks, self.block_size)

    def _joined(self, blocks: NDArray[np.float64]) -> NDArray[np.float64]:
        out, inner = self.shape
        return blocks.reshape(out, -1)[:, :inner]

    def _zero_points(self, part: Rows) -> NDArray[np.float32] | np.float32:
        """The zero points of some rows (rows, blocks, 1), or their default."""
        tensor = tensor_at(self.node, 3)
        if tensor is None:
            return np.float32(1 << (self.bits - 1))
        points = tensor.numpy()
        points = points.reshape(self.shape[0], -1)[part]
        if points.dtype == np.uint8:
            points = unpack_bits(points, self.bits)
        return points[:, : self.blocks, None].astype(np.float32)


@dataclass(frozen=True, eq=False)
class DequantizeLinearWeight:
    """A weight behind a DequantizeLinear node: (integers - zero point) * scale.

    There is one scale for the tensor, one per slice along the axis, or one per block along the axis.
    """

    node: ir.Node
    axis: int
    block_size: int  # along the axis; 0: no blocks
    shape: tuple[int, ...]
    dtype: str

    @property
    def kind(self) -> str:
        tensor, scale = tensor_at(self.node, 0), tensor_at(self.node, 1)
        assert tensor is not None and scale is not None
        granularity = (
            f"in blocks of {self.block_size}" if self.block_size else "by channel" if scale.size > 1 else "by tensor"
        )
        return f"{tensor.dtype.name.lower()} {granularity}"

    def rows(self, part: Rows) -> NDArray[np.float32]:
        levels = _array_at(self.node, 0)[part].astype(np.float32)
        zero_points = tensor_at(self.node, 2)
        if zero_points is not None:
            levels -= self._broadcast(zero_points.numpy(), part)
        levels *= self._broadcast(_array_at(self.node, 1), part)
        return levels

    def nearest(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        integers, zero_points = tensor_at(self.node, 0), tensor_at(self.node, 2)
        assert integers is not None
        bits, is_signed = integers.dtype.bitwidth, integers.dtype.is_signed()
        lowest = -(1 << (bits - 1)) if is_signed else 0
        all_rows = slice(None)
        scales = self._broadcast(_array_at(self.node, 1), all_rows)
        zeros = np.float32(0) if zero_points is None else self._broadcast(zero_points.numpy(), all_rows)
        return _round_to_levels(values, scales, zeros, lowest, lowest + (1 << bits) - 1)

    def steps(self, values: NDArray[np.float64]) -> Steps:
        integers = tensor_at(self.node, 0)
        assert integers is not None
        scales = np.abs(self._broadcast(_array_at(self.node, 1), slice(None)).astype(np.float64))
        largest = np.broadcast_to(self._largest(np.abs(values)), self.shape)
        return Steps(np.broadcast_to(scales, self.shape), largest, _levels_on_a_side(integers.dtype.bitwidth))

    @property
    def scale_dtype(self) -> str:
        return str(_array_at(self.node, 1).dtype)

    @property
    def has_float_zeros(self) -> bool:
        return False

    def _largest(self, magnitudes: NDArray[np.float64]) -> NDArray[np.float64]:
        """The largest magnitude under each scale, in a shape that broadcasts over the weight."""
        if _array_at(self.node, 1).size == 1:
            return np.asarray(magnitudes.max(initial=0.0, keepdims=True))
        if not self.block_size:
            others = tuple(axis for axis in range(len(self.shape)) if axis != self.axis)
            return np.asarray(magnitudes.max(others, initial=0.0, keepdims=True))
        starts = np.arange(0, self.shape[self.axis], self.block_size)
        by_block = np.maximum.reduceat(magnitudes, starts, axis=self.axis)
        repeated = np.repeat(by_block, self.block_size, axis=self.axis)
        return repeated[tuple(map(slice, self.shape))]

    def _broadcast(self, parameters: NDArray[Any], part: Rows) -> NDArray[np.float32]:
        """Scales or zero points, in a shape that broadcasts over the rows."""
        parameters = parameters.astype(np.float32)
        if parameters.size == 1:
            return parameters.reshape(())
        if self.block_size:
            parameters = np.repeat(parameters, self.block_size, axis=self.axis)
            parameters = parameters[tuple(map(slice, self.shape))]
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
    return NBitsWeight(node, bits, block_size, (out, inner), str(scales.dtype.numpy())) if is_valid else None


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
    return DequantizeLinearWeight(node, axis, block_size, shape, str(scale.dtype.numpy()))


def _scale_fits(scale: ir.TensorProtocol, shape: Sequence[int], axis: int, block_size: int) -> bool:
    sizes = [int(size) for size in scale.shape.numpy()]
    if not block_size:
        return sizes == [shape[axis]]
    return sizes == [-(-size // block_size) if at == axis else size for at, size in enumerate(shape)]


def unpack_bits(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Unpack bytes (..., n) into numbers of this many bits (..., n * 8 / bits), the lowest bits of a byte first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    unpacked = (packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return unpacked.reshape(*packed.shape[:-1], math.prod(unpacked.shape[-2:]))


def _levels_on_a_side(bits: int) -> int:
    """The integers on either side of zero in a symmetric range."""
    return max(1, (1 << (bits - 1)) - 1)


def _round_to_levels(
    values: NDArray[np.float64],
    scales: NDArray[Any],
    zeros: NDArray[np.float32] | np.float32,
    lowest: int,
    highest: int,
) -> NDArray[np.float64]:
    scales, zeros = scales.astype(np.float64), np.asarray(zeros, np.float64)
    levels = np.clip(np.rint(values / np.where(scales, scales, 1.0) + zeros), lowest, highest)
    rounded: NDArray[np.float64] = (levels - zeros) * scales
    return rounded


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


def _array_at(node: ir.Node, index: int) -> NDArray[Any]:
    tensor = tensor_at(node, index)
    assert tensor is not None
    return tensor.numpy()
