"""How nodes read weights: which operators do, how the matrix lies there, and what stands between."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export.graph.quantised import layouts
from lora_export.graph.quantised.layouts import Quantised
from lora_export.plan import FLOATS, Layout

MICROSOFT = "com.microsoft"
ONNX = ""
# Operators that multiply by a matrix at input 1, (in, out) unless `transB` says otherwise.
PRODUCTS = frozenset({(ONNX, "MatMul"), (ONNX, "Gemm"), (MICROSOFT, "FusedMatMul"), (MICROSOFT, "FusedGemm")})
# Those that can take the matrix at input 0 just as well: y = W x.
EITHER = frozenset({(ONNX, "MatMul"), (MICROSOFT, "FusedMatMul")})
# onnxruntime's attention with q, k and v in one (in, out) matrix at input 1; the product is not to be seen.
ATTENTIONS = frozenset(
    {(MICROSOFT, "Attention"), (MICROSOFT, "PackedAttention"), (MICROSOFT, "DecoderMaskedSelfAttention")}
)
CONVOLUTIONS = frozenset({(ONNX, "Conv"), (MICROSOFT, "FusedConv")})
NAMES = {int(kind): str(kind.numpy()) for kind in map(ir.DataType.from_numpy, map(np.dtype, sorted(FLOATS)))}
# Those that multiply by a matrix at input 1 and do more in one: no branch stands beside them, but its change can be
# added to what they read.
FUSED = ATTENTIONS | {(MICROSOFT, "FusedMatMul"), (MICROSOFT, "FusedGemm")}
CHANGED = "lora_export.changed"  # on a node that adds a change to the weight at its input 0, or scales the sum
MOST_BETWEEN = 8  # nodes between a weight and its reader


class How(StrEnum):
    """Which layer of names answered."""

    INITIALIZER = "initializer"
    FOLDED_FROM = "folded_from"
    NAME_SCOPE = "name_scope"
    NODE_NAME = "node_name"
    CONTENT = "content"
    NONE = "none"


@dataclass(frozen=True, eq=False)
class Site:
    """One place where a node reads a weight, or a block of one."""

    node: ir.Node  # the reader; where Transpose, Cast and the like stand between, the one behind them
    index: int  # which of its inputs
    value: ir.Value  # the initializer, or what a Constant node gives; of a quantised weight, its integers
    layout: Layout  # how it lies for a linear layer or a convolution; EMBEDDING where rows are looked up; else OTHER
    turned: bool = False  # whether a Transpose stands between
    name: str = ""  # of the parameter, as the model calls it
    how: How = How.NONE
    dtype: str = ""  # that the reader computes in; a Cast or DequantizeLinear between makes it another than the stored
    block: range | None = None  # of the output features, where the matrix holds several parameters side by side
    quantised: Quantised | None = None
    transposed: bool | None = None  # whether the model's parameter lies the other way round; None: not known for sure
    inner: ir.Node | None = None  # the reader in a function's body; `node` is the call then
    equals: tuple[str, ...] = ()  # what a base has of this very content, where that is more than one tensor

    @property
    def place(self) -> tuple[ir.Node, int]:
        return self.node, self.index

    @property
    def is_linear(self) -> bool:
        return self.layout not in (Layout.OTHER, Layout.EMBEDDING)

    @property
    def is_lookup(self) -> bool:
        return identity(self.node) == (ONNX, "Gather") and self.layout is Layout.EMBEDDING

    @property
    def is_convolution(self) -> bool:
        return identity(self.node) == (ONNX, "Conv") and self.layout is Layout.OUT_IN

    @property
    def holder(self) -> ir.Value | ir.Node:
        """What stores the weight: the initializer, or the node that turns integers into it."""
        return self.value if self.quantised is None else self.quantised.node

    @property
    def tensor(self) -> ir.TensorProtocol:
        """What is stored, whole."""
        found = tensor_of(self.value)
        assert found is not None
        return found

    @property
    def stored(self) -> NDArray[Any]:
        """The initializer as stored, whole; a quantised one as it computes. Reads external data."""
        return self.tensor.numpy() if self.quantised is None else self.quantised.rows(slice(None))

    @property
    def where(self) -> tuple[slice, ...]:
        """Where in `stored` the site's own entries lie."""
        if self.block is None:
            return (slice(None),)
        own = slice(self.block.start, self.block.stop)
        return (slice(None), own) if self.layout is Layout.IN_OUT else (own,)

    @property
    def array(self) -> NDArray[Any]:
        """The site's own entries, as they are stored. Reads external data."""
        return self.stored[self.where] if self.block is not None else self.stored

    @property
    def matrix(self) -> NDArray[Any]:
        """The weight in the (out, in) view."""
        return self.array.T if self.layout is Layout.IN_OUT else self.array

    def nearest(self, matrix: NDArray[np.float64]) -> NDArray[np.float64]:
        """Of what the scales of a quantised weight allow, the nearest to this `matrix`, in the (out, in) view."""
        assert self.quantised is not None
        array = matrix.T if self.layout is Layout.IN_OUT else matrix
        if self.block is None:
            found = self.quantised.nearest(array)
        else:
            whole = self.stored.astype(np.float64)
            whole[self.where] = array
            found = self.quantised.nearest(whole)[self.where]
        return found.T if self.layout is Layout.IN_OUT else found

    @property
    def whole(self) -> tuple[int, ...]:
        """The shape of `stored`: the site's own entries and their neighbours. Reads nothing."""
        return self.quantised.shape if self.quantised is not None else _stored_shape(self.value)

    @property
    def width(self) -> int:
        """Output features of a layer's whole matrix, neighbours included."""
        return self.whole[1 if self.layout in (Layout.IN_OUT, Layout.EMBEDDING) else 0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of `array`. Reads nothing."""
        whole = self.whole
        if self.block is None:
            return whole
        return (whole[0], len(self.block)) if self.layout is Layout.IN_OUT else (len(self.block), *whole[1:])

    @property
    def reads_whole(self) -> bool:
        """Whether the node can read W + ΔW in place of W, where nothing can be added to its product."""
        plain = self.is_linear and self.index == 1 and self.inner is None and self.quantised is None
        return plain and identity(self.node) in FUSED

    @property
    def as_read(self) -> Layout:
        """How the matrix lies for the node itself, behind what stands between."""
        return flipped(self.layout) if self.turned else self.layout

    @property
    def obstacle(self) -> str:
        """What reads the weight, where no branch can stand beside that; empty where it gives x·W for x at input 0."""
        operator = self.node.op_type
        if not self.is_linear:
            return operator
        if self.inner is not None:
            return f"the function {operator}"
        if self.index == 0:
            return f"{operator} as its first operand"
        plain = {(ONNX, "MatMul"), (ONNX, "Gemm"), (MICROSOFT, "MatMulNBits")}
        return "" if identity(self.node) in plain else operator


def readers(value: ir.Value, functions: Mapping[ir.OperatorIdentifier, ir.Function] | None = None) -> Iterator[Site]:
    """Every node that reads an initializer, itself or behind Transpose, Cast, Identity or DequantizeLinear.

    `functions` are the model's own: a weight that is passed to one is followed into its body. Not named yet.
    """
    shape, dtype = _stored_shape(value), stored_dtype(value)
    yield from _read(value, _Way(value, shape, dtype), functions or {}, MOST_BETWEEN)


class _Way(NamedTuple):
    """What stands between a weight and its reader."""

    value: ir.Value
    shape: tuple[int, ...]
    dtype: str
    turned: bool = False
    quantised: Quantised | None = None

    def ends(self, node: ir.Node, index: int, layout: Layout) -> Site:
        return Site(node, index, self.value, layout, turned=self.turned, dtype=self.dtype, quantised=self.quantised)


def _read(at: ir.Value, way: _Way, functions: Mapping[ir.OperatorIdentifier, ir.Function], room: int) -> Iterator[Site]:
    for node, index in at.uses():
        behind = _between(node, index, way) if room else None
        body = functions.get(node.op_identifier())
        if behind is not None:
            yield from _read(node.outputs[0], behind, functions, room - 1)
        elif body is not None and room:
            for inside in _read(body.inputs[index], way, functions, room - 1):
                yield replace(inside, node=node, index=index, inner=inside.inner or inside.node)
        elif (packed := layouts.of_node(node, index)) is not None:
            yield way._replace(dtype=packed.dtype, quantised=packed).ends(node, index, Layout.OUT_IN)
        else:
            layout = layout_at(node, index, len(way.shape))
            yield way.ends(node, index, flipped(layout) if way.turned else layout)


def _between(node: ir.Node, index: int, way: _Way) -> _Way | None:
    """The way as it is behind a node that computes nothing; None where the node is a reader itself."""
    if _is_onnx(node, "Transpose") and len(way.shape) == 2:
        perm = node.attributes.get("perm")  # left out or not, it can only be the turn or the identity
        return way._replace(turned=not way.turned) if perm is None or list(perm.as_ints()) == [1, 0] else way
    if _is_onnx(node, "Identity") or (index == 0 and CHANGED in node.metadata_props):
        return way
    if _is_onnx(node, "Cast"):
        to = "" if (target := node.attributes.get("to")) is None or target.is_ref() else NAMES.get(target.as_int(), "")
        return way._replace(dtype=to) if to and way.dtype in FLOATS else None
    packed = layouts.behind(node, index)
    return way._replace(quantised=packed, dtype=packed.dtype) if packed is not None else None


def layout_at(node: ir.Node, index: int, rank: int) -> Layout:
    """How a tensor of this rank lies when this node reads it at this input."""
    operator = identity(node)
    if operator in CONVOLUTIONS and index == 1 and rank > 2:
        return Layout.OUT_IN  # (out, in, kernel)
    if rank != 2:
        return Layout.OTHER
    if operator == (ONNX, "Gather") and index == 0 and _axis(node) == 0:
        return Layout.EMBEDDING
    if operator in ATTENTIONS and index == 1:
        return Layout.IN_OUT
    turned = _flag(node, "transB" if index == 1 else "transA")
    if turned is None or _flag(node, "transBatchA") or _flag(node, "transBatchB"):
        return Layout.OTHER
    if operator in PRODUCTS and index == 1:
        return Layout.OUT_IN if turned else Layout.IN_OUT
    if operator in EITHER and index == 0 and not _is_stored(node.inputs[1]):
        return Layout.IN_OUT if turned else Layout.OUT_IN
    return Layout.OTHER


def _axis(node: ir.Node) -> int | None:
    attribute = node.attributes.get("axis")
    return None if attribute is not None and attribute.is_ref() else node.attributes.get_int("axis", 0)


def _flag(node: ir.Node, name: str) -> bool | None:
    """A yes or no among a node's attributes; None where a function's caller decides, or it is neither."""
    attribute = node.attributes.get(name)
    if attribute is None:
        return False
    return None if attribute.is_ref() or attribute.type != ir.AttributeType.INT else attribute.as_int() == 1


def flipped(layout: Layout) -> Layout:
    """How a matrix lies on the other side of a Transpose."""
    return {Layout.IN_OUT: Layout.OUT_IN, Layout.OUT_IN: Layout.IN_OUT}.get(layout, Layout.OTHER)


def identity(node: ir.Node) -> tuple[str, str]:
    """Domain and operator; ONNX's own domain is the empty one."""
    return ONNX if node.domain == "ai.onnx" else node.domain, node.op_type


def _is_onnx(node: ir.Node, *op_types: str) -> bool:
    return node.op_type in op_types and identity(node)[0] == ONNX


def tensor_of(value: ir.Value) -> ir.TensorProtocol | None:
    """What an initializer or a Constant node holds; None where the value is computed."""
    if value.const_value is not None:
        return value.const_value
    node = value.producer()
    if node is None or not _is_onnx(node, "Constant"):
        return None
    held = node.attributes.get("value")
    return held.as_tensor() if held is not None and not held.is_ref() else None


def _stored_shape(value: ir.Value) -> tuple[int, ...]:
    tensor = tensor_of(value)
    return tuple(int(size) for size in tensor.shape.numpy()) if tensor is not None else ()


def _is_stored(value: ir.Value | None) -> bool:
    return value is not None and tensor_of(value) is not None


def stored_dtype(value: ir.Value) -> str:
    """NumPy's name for what a value holds; empty where it holds nothing."""
    tensor = tensor_of(value)
    if tensor is None:
        return ""
    return "string" if tensor.dtype.is_string() else str(tensor.dtype.numpy())


def common_dtype(sites: Iterable[Site]) -> str:
    """The dtype that holds what all these readers of one weight compute in."""
    dtypes = {site.dtype for site in sites}
    if len(dtypes) == 1:
        return dtypes.pop()
    return "float64" if "float64" in dtypes else "float32"


def size_of(site: Site) -> int:
    """Bytes of the site's entries as the reader sees them."""
    return math.prod(site.shape) * np.dtype(site.dtype).itemsize
