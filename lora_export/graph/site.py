"""A Site: one place where a node of a graph reads a weight, found by following the weight to its readers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export.graph import quantised_weights
from lora_export.graph.operators import FUSED_PRODUCTS, MICROSOFT, ONNX, layout_at, operator_id, transposed_layout
from lora_export.graph.quantised_weights import MATMUL_NBITS, QuantisedWeight, Steps
from lora_export.graph.values import stored_dtype, stored_shape, tensor_of
from lora_export.plan import FLOATS, Layout


class NameSource(StrEnum):
    """Where the name of a weight was found."""

    INITIALIZER = "initializer"
    FOLDED_FROM = "folded_from"
    NAME_SCOPE = "name_scope"
    NODE_NAME = "node_name"
    CONTENT = "content"
    NONE = "none"


@dataclass(frozen=True, eq=False)
class Site:
    """One place where a node reads a weight, a block of a packed weight, or one expert of a stacked weight.

    A packed weight is one matrix that holds several parameters side by side (q, k and v; gate and up). A stacked weight
    (experts, ., .) holds one matrix for each expert.
    """

    node: ir.Node  # the reader; behind Transpose, Cast, Identity and DequantizeLinear nodes
    index: int  # of the node's input
    value: ir.Value  # the initializer or the output of a Constant node; of a quantised weight, its integers
    layout: Layout  # of the stored matrix in a linear layer or convolution; EMBEDDING where rows are looked up
    behind_transpose: bool = False  # whether a Transpose is between the value and the node
    name: str = ""  # of the parameter, as the model calls it
    named_by: NameSource = NameSource.NONE
    dtype: str = ""  # in which the reader computes; a Cast or DequantizeLinear can make it differ from the stored one
    block: range | None = None  # of the output features, where the matrix is packed
    expert: int | None = None  # where the weight is stacked: which of its matrices
    quantised: QuantisedWeight | None = None
    transposed: bool | None = None  # whether the model's parameter is the transpose of `array`; None: unknown
    inner_node: ir.Node | None = None  # the reader in a function's body; `node` is the call
    equal_tensors: tuple[str, ...] = ()  # tensors of the base with exactly this content, where there are several

    @property
    def node_input(self) -> tuple[ir.Node, int]:
        """The node and the number of its input: what identifies a site."""
        return self.node, self.index

    @property
    def is_linear(self) -> bool:
        """Whether the node is a linear layer or a convolution."""
        return self.layout not in (Layout.OTHER, Layout.EMBEDDING)

    @property
    def is_lookup(self) -> bool:
        """Whether the node looks up rows of an embedding."""
        return operator_id(self.node) == (ONNX, "Gather") and self.layout is Layout.EMBEDDING

    @property
    def is_convolution(self) -> bool:
        """Whether the node is an ONNX Conv."""
        return operator_id(self.node) == (ONNX, "Conv") and self.layout is Layout.OUT_IN

    @property
    def holder(self) -> ir.Value | ir.Node:
        """What stores the weight: the initializer, or the node that dequantises it."""
        return self.value if self.quantised is None else self.quantised.node

    @property
    def tensor(self) -> ir.TensorProtocol:
        """The stored tensor, neighbouring blocks included."""
        tensor = tensor_of(self.value)
        assert tensor is not None
        return tensor

    @property
    def stored_array(self) -> NDArray[Any]:
        """The stored matrix, dequantised, neighbouring blocks included. Reads external data."""
        if self.quantised is not None:
            return self.quantised.rows(slice(None))
        whole = self.tensor.numpy()
        return whole if self.expert is None else whole[self.expert]

    @property
    def block_slices(self) -> tuple[slice, ...]:
        """The site's own entries in `stored_array`."""
        if self.block is None:
            return (slice(None),)
        block = slice(self.block.start, self.block.stop)
        return (slice(None), block) if self.layout is Layout.IN_OUT else (block,)

    @property
    def array(self) -> NDArray[Any]:
        """The site's own entries, as they are stored. Reads external data."""
        return self.stored_array[self.block_slices] if self.block is not None else self.stored_array

    @property
    def matrix(self) -> NDArray[Any]:
        """The weight as (out, in). Reads external data."""
        return self.array.T if self.layout is Layout.IN_OUT else self.array

    def nearest(self, matrix: NDArray[np.float64]) -> NDArray[np.float64]:
        """Round `matrix` (out, in) to the nearest values that the scales of the quantised weight can represent."""
        assert self.quantised is not None
        return self._as_matrix(self.quantised.nearest(self._as_stored(matrix)))

    def steps(self, matrix: NDArray[np.float64]) -> Steps:
        """The steps of the quantised weight, beside those that `matrix` (out, in) needs."""
        assert self.quantised is not None
        own, largest, levels = self.quantised.steps(self._as_stored(matrix))
        return Steps(self._as_matrix(own), self._as_matrix(largest), levels)

    def _as_stored(self, matrix: NDArray[np.float64]) -> NDArray[np.float64]:
        """`matrix` (out, in) in the layout of the stored array, beside the neighbouring blocks."""
        array = matrix.T if self.layout is Layout.IN_OUT else matrix
        if self.block is None:
            return array
        whole = self.stored_array.astype(np.float64)
        whole[self.block_slices] = array
        return whole

    def _as_matrix(self, whole: NDArray[np.float64]) -> NDArray[np.float64]:
        """The site's own entries of an array in the stored layout, as (out, in)."""
        array = whole[self.block_slices] if self.block is not None else whole
        return array.T if self.layout is Layout.IN_OUT else array

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of `stored_array`. Reads no data."""
        if self.quantised is not None:
            return self.quantised.shape
        return stored_shape(self.value) if self.expert is None else stored_shape(self.value)[1:]

    @property
    def node_outputs(self) -> int:
        """Output features of the stored matrix, neighbouring blocks included."""
        return self.stored_shape[1 if self.layout in (Layout.IN_OUT, Layout.EMBEDDING) else 0]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `array`. Reads no data."""
        whole = self.stored_shape
        if self.block is None:
            return whole
        return (whole[0], len(self.block)) if self.layout is Layout.IN_OUT else (len(self.block), *whole[1:])

    @property
    def accepts_changed_weight(self) -> bool:
        """Whether the node computes more than a product, and can read W + ΔW in place of W."""
        plain = self.is_linear and self.index == 1 and self.inner_node is None and self.quantised is None
        return plain and operator_id(self.node) in FUSED_PRODUCTS

    @property
    def obstacle(self) -> str:
        """The reader, where no branch can be added to its product. Empty where it computes x·W for x at input 0."""
        operator = self.node.op_type
        if not self.is_linear:
            return operator
        if self.inner_node is not None:
            return f"the function {operator}"
        if self.index == 0:
            return f"{operator} as its first operand"
        products = {(ONNX, "MatMul"), (ONNX, "Gemm"), (MICROSOFT, MATMUL_NBITS)}
        return "" if operator_id(self.node) in products else operator

    @property
    def location(self) -> str:
        """Operator, node name and block, for messages."""
        block = f" [{self.block.start}:{self.block.stop}]" if self.block is not None else ""
        return f"{self.node.op_type} `{self.node.name}`{block}"


def common_dtype(sites: Iterable[Site]) -> str:
    """The narrowest dtype that holds the values that all readers of one weight compute with."""
    dtypes = {site.dtype for site in sites}
    if len(dtypes) == 1:
        return dtypes.pop()
    return "float64" if "float64" in dtypes else "float32"


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
