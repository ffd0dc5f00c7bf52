"""Weights as few bits and scales: onnxruntime's MatMulNBits, and ONNX's DequantizeLinear.

onnxruntime's contrib operators (docs/ContribOperators.md, MatMulNBits) and ONNX's Operators.md (DequantizeLinear)
tell how both are laid out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

NBITS = "MatMulNBits"
BITS = frozenset({2, 4, 8})  # those that a byte holds whole
NO_NUMBER = -(1 << 40)  # no axis, no size and no count
SCALES = frozenset({"FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE"})
BYTES = (ir.DataType.UINT8, ir.DataType.INT8)
Rows = slice | NDArray[np.int64]


class Quantised(Protocol):
    """A weight that is stored as integers and scales."""

    @property
    def node(self) -> ir.Node: ...  # that holds them
    @property
    def kind(self) -> str: ...  # what is said of it: `4 bits in blocks of 32`
    @property
    def shape(self) -> tuple[int, ...]: ...  # of the weight that it stands for, as it is stored
    @property
    def dtype(self) -> str: ...  # that it computes in

    def rows(self, part: Rows) -> NDArray[np.float32]:
        """The weight's rows as they compute. Reads all of the stored tensors, and makes only these rows."""
        ...

    def nearest(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Of the numbers that the scales and zero points allow each entry, those nearest to these `values`."""
        ...


@dataclass(frozen=True, eq=False)
class NBits:
    """A MatMulNBits node's (out, in) weight: `bits` each, the lowest first, a scale for every `size` along a row."""

    node: ir.Node
    bits: int
    size: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def kind(self) -> str:
        return f"{self.bits} bits in blocks of {self.size}"

    def rows(self, part: Rows) -> NDArray[np.float32]:
        out, inner = self.shape
        blocks = -(-inner // self.size)
        packed = _array(self.node, 1).view(np.uint8).reshape(out, -1)[part]
        levels = unpacked(packed, self.bits).reshape(len(packed), blocks, self.size).astype(np.float32)
        scales = _array(self.node, 2).reshape(out, blocks)[part].astype(np.float32)
        weight: NDArray[np.float32] = (levels - self._zero(part, out, blocks)) * scales[..., None]
        return weight.reshape(len(packed), -1)[:, :inner]

    def nearest(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        out, inner = self.shape
        blocks = -(-inner // self.size)
        apart = np.pad(values, [(0, 0), (0, blocks * self.size - inner)]).reshape(out, blocks, self.size)
        scales = _array(self.node, 2).reshape(out, blocks, 1)
        found = _nearest(apart, scales, self._zero(slice(None), out, blocks), 0, (1 << self.bits) - 1)
        return found.reshape(out, -1)[:, :inner]

    def _zero(self, part: Rows, out: int, blocks: int) -> NDArray[np.float32] | np.float32:
        zero = tensor_at(self.node, 3)
        if zero is None:
            return np.float32(1 << (self.bits - 1))
        points = zero.numpy()
        points = points.reshape(out, -1)[part]
        if points.dtype == np.uint8:
            points = unpacked(points, self.bits)
        return points[:, :blocks, None].astype(np.float32)


@dataclass(frozen=True, eq=False)
class Dequantised:
    """A weight behind a DequantizeLinear: (integers - zero point) * scale, one for all, for each slice, or a block."""

    node: ir.Node
    axis: int
    size: int  # of a block along the axis; 0: none
    shape: tuple[int, ...]
    dtype: str

    @property
    def kind(self) -> str:
        tensor, scale = tensor_at(self.node, 0), tensor_at(self.node, 1)
        assert tensor is not None and scale is not None
        over = f"in blocks of {self.size}" if self.size else "by channel" if scale.size > 1 else "by tensor"
        return f"{tensor.dtype.name.lower()} {over}"

    def rows(self, part: Rows) -> NDArray[np.float32]:
        levels = _array(self.node, 0)[part].astype(np.float32)
        zero = tensor_at(self.node, 2)
        if zero is not None:
            levels -= self._spread(zero.numpy(), part)
        levels *= self._spread(_array(self.node, 1), part)
        return levels

    def nearest(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        held, zero = tensor_at(self.node, 0), tensor_at(self.node, 2)
        assert held is not None
        bits, is_signed = held.dtype.bitwidth, held.dtype.is_signed()
        lowest = -(1 << (bits - 1)) if is_signed else 0
        every = slice(None)
        zeros = np.float32(0) if zero is None else self._spread(zero.numpy(), every)
        return _nearest(values, self._spread(_array(self.node, 1), every), zeros, lowest, lowest + (1 << bits) - 1)

    def _spread(self, points: NDArray[Any], part: Rows) -> NDArray[np.float32]:
        """Scales or zero points over the rows that they belong to."""
        points = points.astype(np.float32)
        if points.size == 1:
            return points.reshape(())
        if self.size:
            points = np.repeat(points, self.size, axis=self.axis)
            points = points[tuple(map(slice, self.shape))]
        else:
            points = points.reshape([-1 if axis == self.axis else 1 for axis in range(len(self.shape))])
        return points[part] if points.shape[0] > 1 else points


def of_node(node: ir.Node, index: int) -> NBits | None:
    """The weight of a MatMulNBits whose integers are read at this input; None for any other, or one not understood."""
    if (node.domain, node.op_type, index) != ("com.microsoft", NBITS, 1):
        return None
    inner, out = _number(node, "K"), _number(node, "N")
    bits, size = _number(node, "bits", 4), _number(node, "block_size")
    held, scales, zero = (tensor_at(node, at) for at in (1, 2, 3))
    if bits not in BITS or held is None or scales is None or min(inner, out, size) < 1 or _name(node, 4):
        return None  # a group index (input 4) permutes the rows
    if _number(node, "weight_prepacked") or held.dtype not in BYTES:
        return None  # in another order of some GPU's
    if scales.dtype.name not in SCALES or (zero is not None and zero.dtype not in (BYTES[0], scales.dtype)):
        return None
    blocks = -(-inner // size)
    points = None if zero is None else out * (-(-blocks * bits // 8) if zero.dtype == ir.DataType.UINT8 else blocks)
    fits = (held.size, scales.size) == (out * blocks * size * bits // 8, out * blocks)
    if not fits or (zero is not None and zero.size != points) or (_name(node, 3) and zero is None):
        return None
    return NBits(node, bits, size, (out, inner), str(scales.dtype.numpy()))


def behind(node: ir.Node, index: int) -> Dequantised | None:
    """The weight that a DequantizeLinear gives of integers at its input 0; None for any other node."""
    if node.domain not in ("", "ai.onnx", "com.microsoft") or node.op_type != "DequantizeLinear" or index != 0:
        return None
    held, scale, zero = (tensor_at(node, at) for at in (0, 1, 2))
    if held is None or scale is None or scale.dtype.name not in SCALES or (_name(node, 2) and zero is None):
        return None
    shape = tuple(int(size) for size in held.shape.numpy())
    axis, size = _number(node, "axis", 1), _number(node, "block_size")
    axis = axis + len(shape) if axis < 0 else axis
    if scale.size > 1 and not (0 <= axis < len(shape) and _fits(scale, shape, axis, size)):
        return None
    if size < 0 or (zero is not None and (zero.size, zero.dtype) != (scale.size, held.dtype)):
        return None
    return Dequantised(node, axis, size if scale.size > 1 else 0, shape, str(scale.dtype.numpy()))


def _fits(scale: ir.TensorProtocol, shape: Sequence[int], axis: int, size: int) -> bool:
    there = [int(size) for size in scale.shape.numpy()]
    if not size:
        return there == [shape[axis]]
    return there == [-(-count // size) if at == axis else count for at, count in enumerate(shape)]


def unpacked(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Rows of bytes (or one) as rows of numbers of so many bits, the lowest bits of a byte first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    apart = (packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return apart.reshape(*packed.shape[:-1], math.prod(apart.shape[-2:]))


def _nearest(
    values: NDArray[np.float64],
    scales: NDArray[Any],
    zeros: NDArray[np.float32] | np.float32,
    lowest: int,
    highest: int,
) -> NDArray[np.float64]:
    scales, zeros = scales.astype(np.float64), np.asarray(zeros, np.float64)
    levels = np.clip(np.rint(values / np.where(scales, scales, 1.0) + zeros), lowest, highest)
    found: NDArray[np.float64] = (levels - zeros) * scales
    return found


def _number(node: ir.Node, name: str, default: int = 0) -> int:
    """An attribute; far below zero where it is no whole number: onnxruntime's operators have no checker."""
    attribute = node.attributes.get(name)
    if attribute is None:
        return default
    return attribute.as_int() if attribute.type == ir.AttributeType.INT and not attribute.is_ref() else NO_NUMBER


def _name(node: ir.Node, index: int) -> str:
    value = node.inputs[index] if index < len(node.inputs) else None
    return (value.name or "") if value is not None else ""


def tensor_at(node: ir.Node, index: int) -> ir.TensorProtocol | None:
    """What is stored and read at one of a node's inputs; None where it is computed, or nothing is read there."""
    value = node.inputs[index] if index < len(node.inputs) else None
    return ir.convenience.get_const_tensor(value) if value is not None else None


def _array(node: ir.Node, index: int) -> NDArray[Any]:
    tensor = tensor_at(node, index)
    assert tensor is not None
    return tensor.numpy()
