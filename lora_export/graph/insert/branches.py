"""The nodes of a branch: x·A·B, computed beside a linear layer, an embedding or a convolution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from lora_export.graph.insert.node_factory import NO_ATTRIBUTES, Attributes, Factor, NodeFactory
from lora_export.graph.site import Site

MIN_OPSET = 11  # from here on, a Gemm's bias is optional, and the sizes of a Pad are an input

Pairs = Sequence[tuple[Factor, Factor]]  # A and B


class BranchNodes(NamedTuple):
    """The nodes that compute what is added to a layer's product."""

    nodes: list[ir.Node]  # in the order in which they run
    product: ir.Value
    path: str  # the prefix of their names


class Rescaling(NamedTuple):
    """The multiplication of a layer's product, branches included, by the factor of DoRA."""

    nodes: Callable[[ir.Value], list[ir.Node]]  # makes the nodes for a product; the last one has the result
    path: str


def low_rank_branch(factory: NodeFactory, site: Site, pairs: Pairs, outputs: range) -> BranchNodes:
    """x·A·B for these outputs of the site's node. For an embedding, x·A are the rows that it looks up in A."""
    before, a, b = concatenated(factory, site, pairs)
    padding, b = padded(factory, site, b, outputs, 0.0)
    if site.is_lookup:
        nodes = _embedding_nodes(factory, site, a, b)
    elif site.is_convolution:
        nodes = _convolution_nodes(factory, site, a, b)
    else:
        x = site.node.inputs[0]
        assert x is not None
        for_a, for_b = _gemm_attributes(site.node)
        down = factory.product(x, a, for_a)
        nodes = [down, factory.product(down.outputs[0], b, for_b)]
    return BranchNodes([*before, *padding, *nodes], nodes[-1].outputs[0], b.path)


def concatenated(factory: NodeFactory, site: Site, pairs: Pairs) -> tuple[list[ir.Node], Factor, Factor]:
    """All pairs as one pair in the site's dtype, their ranks concatenated, and the nodes that make it."""
    rank_axes = (0, 1) if site.is_convolution else (1, 0)
    nodes, result = [], []
    for factors, axis in zip(zip(*pairs, strict=True), rank_axes, strict=True):
        casts, cast_factors = zip(*(cast_to_site(factory, site, factor) for factor in factors), strict=True)
        nodes += [node for cast in casts for node in cast]
        if len(cast_factors) > 1:
            shape = list(cast_factors[0].value.shape)
            shape[axis] = sum(factor.value.shape[axis] for factor in cast_factors)
            values = [factor.value for factor in cast_factors]
            nodes.append(factory.node("Concat", values, cast_factors[0].path, ir.Shape(shape), {"axis": axis}))
            cast_factors = (cast_factors[0].after(nodes),)
        result.append(cast_factors[0])
    a, b = result
    return nodes, a, b


def cast_to_site(factory: NodeFactory, site: Site, factor: Factor) -> tuple[list[ir.Node], Factor]:
    """A factor in the dtype in which the site computes, and the nodes that cast it."""
    dtype = ir.DataType.from_numpy(np.dtype(site.dtype))
    nodes = [] if factor.value.dtype == dtype else [factory.cast(dtype, factor.value, factor.path)]
    return nodes, factor.after(nodes)


def padded(
    factory: NodeFactory, site: Site, factor: Factor, outputs: range, number: float
) -> tuple[list[ir.Node], Factor]:
    """A factor whose last dimension covers these outputs of the site's node, and the nodes that pad it.

    Pads with `number` for the neighbours of the site's block. Adds no node where the site has no block.
    """
    is_wider = site.block is not None and site.block != outputs
    nodes = _padding(factory, site, factor, outputs, number) if is_wider else []
    return nodes, factor.after(nodes)


def common_rescaling(factory: NodeFactory, site: Site, factor: Factor) -> Rescaling:
    """The multiplication of all rows by one factor (out,); of a convolution, (out, 1...)."""
    factory.require_opset(MIN_OPSET, "DoRA beside its weights")
    casts, cast_factor = cast_to_site(factory, site, factor)
    padding, last = padded(factory, site, cast_factor, range(site.node_outputs), 1.0)

    def nodes(total: ir.Value) -> list[ir.Node]:
        return [*casts, *padding, factory.node("Mul", [total, last.value], factor.path, total.shape)]

    return Rescaling(nodes, factor.path)


def _padding(factory: NodeFactory, site: Site, factor: Factor, outputs: range, number: float) -> list[ir.Node]:
    assert site.block is not None
    factory.require_opset(MIN_OPSET, "an adapter beside a part of a weight")
    value, path = factor.value, factor.path
    assert value.shape is not None
    zeros = [0] * (len(value.shape) - 1)
    sizes = [*zeros, site.block.start - outputs.start, *zeros, outputs.stop - site.block.stop]
    shape = ir.Shape([*value.shape[:-1], len(outputs)])
    nodes = []
    if value.dtype == ir.DataType.BFLOAT16:  # onnxruntime has no Pad in bfloat16
        nodes.append(factory.cast(ir.DataType.FLOAT, value, path))
        value = nodes[-1].outputs[0]
    assert value.dtype is not None
    inputs = [value, factory.constant(path, "outputs", np.array(sizes, np.int64))]
    if number:
        inputs.append(factory.constant(path, "fill", np.array(number, value.dtype.numpy())))
    nodes.append(factory.node("Pad", inputs, path, shape))
    if factor.value.dtype == ir.DataType.BFLOAT16:
        nodes.append(factory.cast(ir.DataType.BFLOAT16, nodes[-1].outputs[0], path))
    return nodes


def _embedding_nodes(factory: NodeFactory, site: Site, a: Factor, b: Factor) -> list[ir.Node]:
    ids = site.node.inputs[1]
    assert ids is not None and a.value.shape is not None
    shape = None if ids.shape is None else ir.Shape([*ids.shape, a.value.shape[-1]])
    down = factory.node("Gather", [a.value, ids], a.path, shape)
    return [down, factory.product(down.outputs[0], b, NO_ATTRIBUTES)]


def _convolution_nodes(factory: NodeFactory, site: Site, a: Factor, b: Factor) -> list[ir.Node]:
    x, product = site.node.inputs[0], site.node.outputs[0]
    assert x is not None and a.value.shape is not None
    shape = product.shape and ir.Shape([product.shape[0], a.value.shape[0], *product.shape[2:]])
    down = factory.node("Conv", [x, a.value], a.path, shape, site.node.attributes)
    return [down, factory.node("Conv", [down.outputs[0], b.value], b.path, product.shape)]


def _gemm_attributes(node: ir.Node) -> tuple[Attributes, Attributes]:
    """The attributes of a branch beside a Gemm: its product by A transposes x, its product by B has alpha."""
    if node.op_type != "Gemm":
        return NO_ATTRIBUTES, NO_ATTRIBUTES
    alpha = node.attributes.get_float("alpha", 1.0)
    is_transposed = node.attributes.get_int("transA", 0) == 1
    for_a: Attributes = {"transA": 1} if is_transposed else NO_ATTRIBUTES
    for_b: Attributes = {"alpha": alpha} if alpha != 1 else NO_ATTRIBUTES
    return for_a, for_b
