"""Branches in a graph that are no x·A·B: the two factors of LoKr, and factors of a layer's inputs."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lora_export.errors import InputRefused
from lora_export.graph.insert.branches import BranchNodes, gemm_attributes
from lora_export.graph.insert.node_factory import Factor, NodeFactory, NodeList, fixed_sizes, layer_input, sizes_of
from lora_export.graph.site import Site


def kronecker_branch(factory: NodeFactory, site: Site, w1: Factor, w2: Factor) -> BranchNodes:
    """x·kron(w1, w2)ᵀ, for w1 (a, b) and the transpose of w2 (d, c): x (..., b d) as (..., b, d) by both.

    Raises InputRefused where x is transposed, or where its number of dimensions is unknown.
    """
    nodes, x = NodeList(factory, w2.path), layer_input(site)
    w1, w2 = (nodes.cast_to_site(site, each) for each in (w1, w2))
    (a, b), (d, c) = (fixed_sizes(each.value, 0, 1) for each in (w1, w2))
    if x.shape is None or site.block is not None or gemm_attributes(site.node)[0]:
        raise InputRefused(
            f"{site.name}: LoKr's factors cannot be beside {site.node.op_type}: its input has an unknown shape, or is "
            "transposed, or the weight is stored beside others. Merge the adapter into the weights instead"
        )
    others = sizes_of(x)[:-1]
    kept = [0] * len(others)  # for Reshape: as in x

    def shape(name: str, *last: int) -> ir.Value:
        return factory.constant(nodes.path, name, np.array([*kept, *last], np.int64))

    split = nodes.add("Reshape", [x, shape("split", b, d)], [*others, b, d])
    half = nodes.add("MatMul", [split, w2.value], [*others, b, c])
    nodes.path = w1.path
    whole = nodes.add("MatMul", [w1.value, half], [*others, a, c])
    joined = nodes.add("Reshape", [whole, shape("joined", -1)], [*others, site.node_outputs])
    for_b = gemm_attributes(site.node)[1]
    if for_b:
        alpha = factory.constant(w1.path, "alpha", np.array(for_b["alpha"], np.dtype(site.dtype)))
        joined = nodes.add("Mul", [joined, alpha], joined.shape)
    return BranchNodes(nodes.nodes, joined, w1.path)


def scaled_input(factory: NodeFactory, site: Site, factor: Factor) -> tuple[NodeList, ir.Value]:
    """x times one factor (in,) of all rows; of a convolution, (in, 1...)."""
    nodes = NodeList(factory, factor.path)
    value, x = nodes.cast_to_site(site, factor).value, layer_input(site)
    if gemm_attributes(site.node)[0]:  # x is transposed
        value = nodes.add("Unsqueeze", [value, factory.constant(factor.path, "axis", np.array([1]))], None)
    return nodes, nodes.add("Mul", [x, value], x.shape)
