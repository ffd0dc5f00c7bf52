"""New nodes and initializers of a graph, under names that are not in use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.graph.refusals import refuse_not_finite
from lora_export.graph.site import Site
from lora_export.graph.values import new_initializer, unused_name, value_names

MIN_OPSET = 11  # from here on, a Gemm's bias is optional, and the sizes of a Pad are an input
MIN_ROWS_OPSET = 15  # from here on, Shape has `start` and `end`

Attributes = Mapping[str, int | float | Sequence[int] | ir.Attr]
NO_ATTRIBUTES: Attributes = MappingProxyType({})
Dim = int | ir.SymbolicDim


class Factor(NamedTuple):
    """A factor of an adapter in a graph: A, B, or the factor of DoRA."""

    value: ir.Value
    path: str  # the prefix of its nodes' names


class NodeFactory:
    """Makes nodes and initializers for one graph, under names that are not in use.

    Initializers are registered with the graph at once. Nodes are not: the caller inserts them.
    """

    def __init__(self, model: ir.Model):
        self.model = model
        self.value_names = value_names(model)
        self.node_names = {node.name for node in ir.traversal.RecursiveGraphIterator(model.graph) if node.name}
        self.original_names = frozenset(self.value_names)
        self.has_inferred_shapes = False

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        path: str,
        shape: ir.Shape | None = None,
        attributes: Attributes = NO_ATTRIBUTES,
    ) -> ir.Node:
        """A node with one output, which has the type of the first input. Its name begins with `path`."""
        name = unused_name(f"{path}/{op_type}", self.node_names)
        output = ir.Value(name=unused_name(f"{name}_output_0", self.value_names), type=inputs[0].type, shape=shape)
        return ir.node(op_type, inputs, attributes, outputs=[output], name=name)

    def constant(self, path: str, name: str, array: NDArray[Any]) -> ir.Value:
        """A new initializer, whose name follows a node's path."""
        name = unused_name(f"{path[1:].replace('/', '.')}.{name}", self.value_names)
        return new_initializer(self.model, name, ir.Tensor(array))

    def factor(self, module: str, part: str, array: NDArray[Any], *, name: str = "") -> Factor:
        """A new initializer `MODULE.PART.weight`, or `name`.

        Raises InputRefused where the graph had that name before, and where a value is not finite.
        """
        parts = [part for part in (module, part) if part]
        name = name or ".".join([*parts, "weight"])
        if name in self.original_names:
            raise InputRefused(
                f"the graph holds {name} already: an adapter was inserted before. Start from the graph without it"
            )
        refuse_not_finite(name, array)
        name = unused_name(name, self.value_names)
        value = new_initializer(self.model, name, ir.Tensor(np.ascontiguousarray(array)))
        return Factor(value, "/".join(["", *parts]))

    def replace_graph_outputs(self, old: ir.Value, new: ir.Value) -> None:
        """Make `new` the graph's output in place of `old`, under the same name."""
        if not old.is_graph_output():  # `graphs` visits all nodes, and each layer calls this
            return
        for graph in self.model.graphs():
            for index, output in enumerate(graph.outputs):
                if output is old:
                    new.name, old.name = old.name, new.name
                    graph.outputs[index] = new

    def require_opset(self, opset: int, feature: str) -> None:
        """Raise InputRefused for a graph of an older opset."""
        graph_opset = self.model.opset_imports.get("", 0)
        if graph_opset < opset:
            raise InputRefused(
                f"the graph has opset {graph_opset}, and {feature} needs {opset}. Export the model again, or merge the "
                "adapter"
            )


class NodeList:
    """New nodes in the order in which they run. Their names begin with `path`."""

    def __init__(self, factory: NodeFactory, path: str):
        self.factory, self.path = factory, path
        self.nodes: list[ir.Node] = []

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

    def constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        """A new initializer, whose name begins with the path."""
        return self.factory.constant(self.path, name, array)

    def cast(self, value: ir.Value, dtype: ir.DataType | None) -> ir.Value:
        """The value in this dtype. Adds no node where it has it."""
        assert dtype is not None
        return value if value.dtype == dtype else self.add("Cast", [value], value.shape, dtype, to=int(dtype))

    def product(self, x: ir.Value, factor: Factor, attributes: Attributes = NO_ATTRIBUTES) -> ir.Value:
        """x by a factor: a MatMul, or a Gemm where there are attributes."""
        self.path = factor.path
        is_known = x.shape is not None and "transA" not in attributes
        shape = [*x.shape[:-1], sizes_of(factor.value)[-1]] if is_known and x.shape is not None else None
        return self.add("Gemm" if attributes else "MatMul", [x, factor.value], shape, None, attributes)

    def cast_to_site(self, site: Site, factor: Factor) -> Factor:
        """A factor in the dtype in which the site computes."""
        before, self.path = self.path, factor.path
        value = self.cast(factor.value, ir.DataType.from_numpy(np.dtype(site.dtype)))
        self.path = before
        return factor._replace(value=value)

    def padded_to(self, site: Site, factor: Factor, outputs: range, number: float) -> Factor:
        """A factor in the site's dtype, whose last dimension covers these outputs of the site's node.

        Pads with `number` for the neighbours of the site's block. Adds no Pad where the site has no block.
        """
        factor = self.cast_to_site(site, factor)
        if site.block is None or site.block == outputs:
            return factor
        self.factory.require_opset(MIN_OPSET, "an adapter beside a part of a weight")
        before, self.path = self.path, factor.path
        zeros = [0] * (len(sizes_of(factor.value)) - 1)
        sizes = [*zeros, site.block.start - outputs.start, *zeros, outputs.stop - site.block.stop]
        shape = [*sizes_of(factor.value)[:-1], len(outputs)]
        value = self.pad(factor.value, ("outputs", "fill"), sizes, number, shape)
        self.path = before
        return factor._replace(value=value)

    def pad(
        self, value: ir.Value, names: tuple[str, str], sizes: Sequence[int], number: float, shape: Iterable[Dim] | None
    ) -> ir.Value:
        """The value padded by these sizes with a number. `names` are those of the initializers of both."""
        dtype = value.dtype
        assert dtype is not None
        # onnxruntime has no Pad in bfloat16.
        value = self.cast(value, ir.DataType.FLOAT) if dtype == ir.DataType.BFLOAT16 else value
        inputs = [value, self.constant(names[0], np.array(sizes, np.int64))]
        if number:
            assert value.dtype is not None
            inputs.append(self.constant(names[1], np.array(number, value.dtype.numpy())))
        return self.cast(self.add("Pad", inputs, shape), dtype)

    def insert_behind(self, value: ir.Value) -> None:
        """Insert the nodes behind the one that computes a value."""
        producer = value.producer()
        assert producer is not None and producer.graph is not None
        producer.graph.insert_after(producer, self.nodes)


def layer_input(site: Site) -> ir.Value:
    """The value that a layer computes on. Of an embedding, the row numbers that it looks up."""
    x = site.node.inputs[1 if site.is_lookup else 0]
    assert x is not None
    return x


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
