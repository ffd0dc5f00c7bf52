"""Following a weight to the nodes that read it, through nodes that compute nothing and into functions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export.graph import quantised_weights
from lora_export.graph.operators import ONNX, layout_at, operator_id, transposed_layout
from lora_export.graph.quantised_weights import QuantisedWeight
from lora_export.graph.site import Site
from lora_export.graph.values import stored_dtype, stored_shape, tensor_of
from lora_export.plan import FLOATS, Layout

# On a node that adds ΔW to the weight at its input 0, or multiplies the sum by DoRA's factor. Metadata key.
CHANGES_WEIGHT = "lora_export.changed"
MAX_NODES_BETWEEN = 8  # between a weight and its reader
FLOAT_DTYPES = {int(dtype): str(dtype.numpy()) for dtype in map(ir.DataType.from_numpy, map(np.dtype, sorted(FLOATS)))}

Functions = Mapping[ir.OperatorIdentifier, ir.Function]


def find_readers(value: ir.Value, functions: Functions | None = None) -> Iterator[Site]:
    """Find every node that reads an initializer. The sites have no names.

    Follows Transpose, Cast, Identity and DequantizeLinear nodes, and nodes that split a stacked weight into the
    matrices of its experts. `functions` are the model's own; a weight that is passed to one of them is followed into
    its body.
    """
    path = _Path(value, stored_shape(value), stored_dtype(value))
    yield from _readers_behind(value, path, functions or {}, MAX_NODES_BETWEEN)


class _Path(NamedTuple):
    """What the nodes between a weight and its reader do to it."""

    value: ir.Value
    shape: tuple[int, ...]
    dtype: str
    is_transposed: bool = False
    quantised: QuantisedWeight | None = None
    expert: int | None = None  # of a stacked weight; the shape is that of its matrix then

    def to(self, node: ir.Node, index: int, layout: Layout) -> Site:
        """The site at the end of the path."""
        return Site(
            node,
            index,
            self.value,
            layout,
            behind_transpose=self.is_transposed,
            dtype=self.dtype,
            quantised=self.quantised,
            expert=self.expert,
        )


def _readers_behind(at: ir.Value, path: _Path, functions: Functions, nodes_left: int) -> Iterator[Site]:
    for node, index in at.uses():
        extended = _through(node, index, path) if nodes_left else None
        body = functions.get(node.op_identifier())
        experts = list(_experts(node, index, path)) if nodes_left else []
        if extended is not None:
            yield from _readers_behind(node.outputs[0], extended, functions, nodes_left - 1)
        elif experts:
            for matrix, of_expert in experts:
                yield from _readers_behind(matrix, of_expert, functions, nodes_left - 1)
        elif body is not None and nodes_left:
            for inner in _readers_behind(body.inputs[index], path, functions, nodes_left - 1):
                yield replace(inner, node=node, index=index, inner_node=inner.inner_node or inner.node)
        elif (packed := quantised_weights.of_matmul_nbits(node, index)) is not None:
            yield path._replace(dtype=packed.dtype, quantised=packed).to(node, index, Layout.OUT_IN)
        else:
            layout = layout_at(node, index, len(path.shape))
            yield path.to(node, index, transposed_layout(layout) if path.is_transposed else layout)


def _experts(node: ir.Node, index: int, path: _Path) -> Iterator[tuple[ir.Value, _Path]]:
    """The matrices into which a node splits a stacked weight (experts, ., .), where it does nothing else."""
    domain, operator = operator_id(node)
    if len(path.shape) != 3 or index != 0 or domain != ONNX or node.attributes.get_int("axis", 0) != 0:
        return
    count, *matrix = path.shape
    if operator == "Split" and len(node.outputs) == count:
        for expert, part in enumerate(node.outputs):
            of_expert = path._replace(shape=tuple(matrix), expert=expert)
            for reader, _ in part.uses():
                if not _removes_first_axis(reader):
                    return
                yield reader.outputs[0], of_expert
    elif operator == "Gather" and (chosen := _constant(node.inputs[1])) is not None and chosen.shape == ():
        yield node.outputs[0], path._replace(shape=tuple(matrix), expert=int(chosen) % count)


def _removes_first_axis(node: ir.Node) -> bool:
    if operator_id(node) != (ONNX, "Squeeze"):
        return False
    attribute = node.attributes.get("axes")  # before opset 13
    axes = _constant(node.inputs[1]) if len(node.inputs) > 1 else None
    chosen = list(attribute.as_ints()) if attribute is not None else [] if axes is None else axes.ravel().tolist()
    return chosen == [0]


def _constant(value: ir.Value | None) -> NDArray[Any] | None:
    tensor = None if value is None else tensor_of(value)
    return None if tensor is None else tensor.numpy()


def _through(node: ir.Node, index: int, path: _Path) -> _Path | None:
    """The path extended by a node that computes nothing. None where the node is itself a reader."""
    domain, operator = operator_id(node)
    if (domain, operator) == (ONNX, "Transpose") and len(path.shape) == 2:
        perm = node.attributes.get("perm")  # of two axes: the transpose or the identity
        is_transpose = perm is None or list(perm.as_ints()) == [1, 0]
        return path._replace(is_transposed=not path.is_transposed) if is_transpose else path
    if (domain, operator) == (ONNX, "Transpose") and len(path.shape) == 3:
        perm = node.attributes.get("perm")
        swaps_matrices = perm is not None and list(perm.as_ints()) == [0, 2, 1]
        return path._replace(is_transposed=not path.is_transposed) if swaps_matrices else None
    if (domain, operator) == (ONNX, "Identity") or (index == 0 and CHANGES_WEIGHT in node.metadata_props):
        return path
    if (domain, operator) == (ONNX, "Cast"):
        to = node.attributes.get("to")
        dtype = "" if to is None or to.is_ref() else FLOAT_DTYPES.get(to.as_int(), "")
        return path._replace(dtype=dtype) if dtype and path.dtype in FLOATS else None
    packed = quantised_weights.of_dequantize_linear(node, index)
    return path._replace(quantised=packed, dtype=packed.dtype) if packed is not None else None
