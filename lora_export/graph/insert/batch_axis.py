"""Which dimension of a layer's input is the batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from lora_export.errors import InputRefused, count, listed
from lora_export.graph import quantised_weights
from lora_export.graph.insert.node_factory import Dim, layer_input
from lora_export.graph.insert.token_rows import SortedTokens, TokenPaths, is_symbol
from lora_export.graph.site import Site
from lora_export.graph.values import is_stored
from lora_export.options.spelling import named

UNKNOWN = -1  # a size that only a run knows


@dataclass(frozen=True)
class BatchAxis:
    """How to transpose or reshape a layer's input so that the batch comes first."""

    rank: int  # of the input
    axis: int = 0  # of the batch, after the reshaping
    # Of rows that were flattened: their number outside and inside of the batch; UNKNOWN where only a run knows it.
    outer: int = 0
    inner: int = 0
    tokens: SortedTokens | None = (
        None  # where the rows are tokens in an order of their own, which take the batch's place
    )

    @property
    def is_flat(self) -> bool:
        """Whether the batch and other dimensions were flattened into one."""
        return self.outer != 0


def batch_input(model: ir.Model, batch: str, layers: Sequence[Site]) -> tuple[ir.Value, str]:
    """A graph input whose first dimension is the batch, and the batch's symbol. Raises InputRefused without one.

    Where no input has the symbol `batch`, the symbol is the one that all inputs have in their first dimension, or else
    the only one that enters every layer.
    """
    symbols = {value: value.shape[0] for value in model.graph.inputs if value.shape is not None and len(value.shape)}
    if not any(is_symbol(size, batch) for size in symbols.values()):
        names = {size.value for size in symbols.values() if isinstance(size, ir.SymbolicDim) and size.value}
        # Without names from the user, exporters give the inputs of one batch different symbols.
        if len(set(symbols.values())) > 1:
            names = {name for name in names if all(_enters(site, own) for own in [TokenPaths(name)] for site in layers)}
        batch = names.pop() if len(names) == 1 else batch
    for value, size in symbols.items():
        if is_symbol(size, batch):
            return value, batch
    inputs = [f"{value.name} {value.shape}" for value in model.graph.inputs]
    raise InputRefused(f"no input of the graph has the batch, `{batch}`, as its first dimension: {', '.join(inputs)}")


def unclear_inputs(model: ir.Model, layers: Sequence[Site]) -> list[ir.Value]:
    """The values whose shapes do not tell where the batch is: inputs of layers, and what was reshaped to them.

    Empty for layers of which every input has the first dimension of a graph's input. Sets the shapes that ONNX infers.
    """
    if any(layer_input(site).shape is None for site in layers):
        infer_shapes(model)
    firsts = [value.shape[0] for value in model.graph.inputs if value.shape is not None and len(value.shape)]
    batches = {size.value for size in firsts if isinstance(size, ir.SymbolicDim) and size.value}
    paths = [TokenPaths(name) for name in batches]
    unclear = [site for site in layers if not any(_enters(site, own) for own in paths)]
    inputs = [layer_input(site) for site in unclear if site.node.graph is model.graph]
    flattened = [value for own in paths for value in own.unclear] if unclear else []
    values = dict.fromkeys([*(value for x in inputs for value in (x, value_before_reshape(x))), *flattened])
    return [value for value in values if value is not None and value.producer() is not None and not is_stored(value)]


def batch_axes(layers: Sequence[tuple[str, Site]], batch: str) -> dict[tuple[ir.Node, int], BatchAxis]:
    """The batch axis of each layer, by node and input.

    Raises InputRefused, with every such layer, where no dimension is the batch for certain.
    """
    axes: dict[tuple[ir.Node, int], BatchAxis] = {}
    problems = []
    paths = TokenPaths(batch)
    for name, site in layers:
        axis = _batch_axis(site, paths)
        if isinstance(axis, str):
            problems.append(f"{name} ({site.node.op_type} `{site.node.name}`): {axis}")
        else:
            axes[site.node_input] = axis
    if problems:
        raise InputRefused(
            f"{count(len(problems), 'layer')} cannot have an adapter for each row of the batch, `{batch}`:",
            listed(problems),
            f"Remove them from the adapter, or switch whole adapters instead ({named('lora', 'inputs')})",
        )
    return axes


def infer_shapes(model: ir.Model) -> None:
    """Set the shapes and types that ONNX infers, also behind MatMulNBits, which ONNX does not know.

    Infers them on a copy in which a MatMul by an input of the weight's shape replaces each MatMulNBits.
    """
    copy = model.clone()
    for node in list(ir.traversal.RecursiveGraphIterator(copy.graph)):
        packed = quantised_weights.of_matmul_nbits(node, 1) if len(node.inputs) > 1 else None
        if packed is not None:
            dtype = ir.DataType.from_numpy(np.dtype(packed.dtype))
            shape = ir.Shape(packed.shape[::-1])
            weight = ir.Value(name=f"{node.name}.plain", shape=shape, type=ir.TensorType(dtype))
            copy.graph.inputs.append(weight)
            node.resize_inputs(2)
            node.replace_input_with(1, weight)
            node.op_type, node.domain = "MatMul", ""
            node.attributes.clear()
    ShapeInferencePass()(copy)
    inferred = {value.name: value for value in _node_outputs(copy)}
    for value in _node_outputs(model):
        known = inferred[value.name]
        value.shape = known.shape if value.shape is None else value.shape
        value.type = known.type if value.type is None else value.type


def _node_outputs(model: ir.Model) -> Iterator[ir.Value]:
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        yield from node.outputs


def _enters(site: Site, paths: TokenPaths) -> bool:
    return isinstance(_batch_axis(site, paths), BatchAxis)


def _batch_axis(site: Site, paths: TokenPaths) -> BatchAxis | str:
    """The batch axis of a layer's input, or the reason why it is not certain."""
    x, batch = layer_input(site), paths.batch
    attributes = site.node.attributes
    if attributes.get_int("transA", 0) == 1:
        return "it transposes its input"
    if x.shape is None:
        return "the shape of its input is unknown"
    if site.is_convolution and not is_symbol(x.shape[0], batch):
        return f"its input has the shape {x.shape}, whose first dimension is not the batch for certain"
    if site.is_convolution:
        return BatchAxis(len(x.shape))
    axes = [axis for axis, size in enumerate(x.shape) if is_symbol(size, batch)]
    if len(axes) == 1 and site.is_lookup:
        return BatchAxis(len(x.shape) + 1, axes[0])
    if len(axes) == 1 and axes[0] < len(x.shape) - 1 and isinstance(x.shape[-1], int):
        return BatchAxis(len(x.shape), axes[0])
    flat = None if axes or site.is_lookup else _axis_before_reshape(x, batch)
    rows = None if axes or site.is_lookup or flat else paths.rows_of(x)
    flat = flat if rows is None else BatchAxis(2, tokens=rows)
    return flat or f"its input has the shape {x.shape}, in which no single dimension is the batch for certain"


def _axis_before_reshape(x: ir.Value, batch: str) -> BatchAxis | None:
    """The batch axis of rows that a Reshape made of several dimensions. None where it is not certain."""
    assert x.shape is not None
    before, features = value_before_reshape(x), x.shape[-1]
    if len(x.shape) != 2 or before is None or before.shape is None or not isinstance(features, int):
        return None
    rows, columns = list(before.shape), 1
    while rows and columns != features and isinstance(size := rows.pop(), int):
        columns *= size
    axes = [axis for axis, size in enumerate(rows) if is_symbol(size, batch)]
    if columns != features or len(axes) != 1:
        return None
    outer, inner = _product(rows[: axes[0]]), _product(rows[axes[0] + 1 :])
    return None if outer == inner == UNKNOWN else BatchAxis(2, 1, outer, inner)


def value_before_reshape(x: ir.Value) -> ir.Value | None:
    """What a Reshape made this value of. None where there is no Reshape."""
    node = x.producer()
    while node is not None and node.op_type in ("Cast", "Identity") and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node.inputs[0] if node is not None and node.op_type == "Reshape" else None


def _product(sizes: Sequence[Dim]) -> int:
    """The product of the sizes, UNKNOWN where one of them is."""
    known = [size for size in sizes if isinstance(size, int)]
    return math.prod(known) if len(known) == len(sizes) else UNKNOWN
