"""New nodes of a graph in the order in which they run, with the shapes of their outputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx_ir as ir

from lora_export.graph.insert.batch_axis import Dim
from lora_export.graph.insert.branches import cast_to_site, padded
from lora_export.graph.insert.node_factory import NO_ATTRIBUTES, Attributes, Factor, NodeFactory
from lora_export.graph.site import Site


class NodeList:
    """New nodes in the order in which they run. Their names begin with `path`."""

    def __init__(self, factory: NodeFactory, path: str):
        self.factory, self.path = factory, path
        self.nodes: list[ir.Node] = []

    def cast_to_site(self, site: Site, factor: Factor) -> Factor:
        """As `branches.cast_to_site`."""
        casts, factor = cast_to_site(self.factory, site, factor)
        self.nodes += casts
        return factor

    def padded_to(self, site: Site, factor: Factor, outputs: range, number: float) -> Factor:
        """As `branches.padded`, after `branches.cast_to_site`."""
        factor = self.cast_to_site(site, factor)
        padding, factor = padded(self.factory, site, factor, outputs, number)
        self.nodes += padding
        return factor

    def add(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        shape: Iterable[Dim] | None,
        dtype: ir.DataType | None = None,
        copied: Attributes = NO_ATTRIBUTES,
        **attributes: int | Sequence[int],
    ) -> ir.Value:
        """Add a node. Its output has the type of the first input where `dtype` is None."""
        known_shape = None if shape is None else ir.Shape(shape)
        node = self.factory.node(op_type, inputs, self.path, known_shape, {**copied, **attributes})
        if dtype is not None:
            node.outputs[0].type = ir.TensorType(dtype)
        self.nodes.append(node)
        return node.outputs[0]


def sizes_of(value: ir.Value) -> list[Dim]:
    """The shape of a value, which is known."""
    assert value.shape is not None
    return list(value.shape)


def fixed_sizes(value: ir.Value, *axes: int) -> list[int]:
    """The sizes of some dimensions of a value, which are no symbols."""
    sizes = [size for axis in axes if isinstance(size := sizes_of(value)[axis], int)]
    assert len(sizes) == len(axes)
    return sizes


def last_size(value: ir.Value) -> int:
    """The size of a value's last dimension, which is no symbol."""
    return fixed_sizes(value, -1)[0]
