"""New nodes and initializers of a graph, under names that are not in use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.graph.refusals import refuse_not_finite
from lora_export.graph.values import new_initializer, unused_name, value_names

Attributes = Mapping[str, int | float | Sequence[int] | ir.Attr]
NO_ATTRIBUTES: Attributes = MappingProxyType({})


class Factor(NamedTuple):
    """A factor of an adapter in a graph: A, B, or the factor of DoRA."""

    value: ir.Value
    path: str  # the prefix of its nodes' names

    def after(self, nodes: Sequence[ir.Node]) -> Factor:
        """The factor as the output of the last of these nodes."""
        return self._replace(value=nodes[-1].outputs[0]) if nodes else self


class NodeFactory:
    """Makes nodes and initializers for one graph, under names that are not in use.

    Initializers are registered with the graph at once. Nodes are not: the caller inserts them.
    """

    def __init__(self, model: ir.Model):
        self.model = model
        self.value_names = value_names(model)
        self.node_names = {node.name for node in ir.traversal.RecursiveGraphIterator(model.graph) if node.name}
        self.original_names = frozenset(self.value_names)

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

    def cast(self, dtype: ir.DataType, value: ir.Value, path: str) -> ir.Node:
        """A Cast node."""
        node = self.node("Cast", [value], path, value.shape, {"to": int(dtype)})
        node.outputs[0].type = ir.TensorType(dtype)
        return node

    def product(self, x: ir.Value, factor: Factor, attributes: Attributes) -> ir.Node:
        """x by a factor: a MatMul, or a Gemm where there are attributes."""
        assert factor.value.shape is not None
        is_known = x.shape is not None and "transA" not in attributes
        shape = ir.Shape([*x.shape[:-1], factor.value.shape[-1]]) if is_known and x.shape is not None else None
        return self.node("Gemm" if attributes else "MatMul", [x, factor.value], factor.path, shape, attributes)

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

    def require_opset(self, opset: int, feature: str) -> None:
        """Raise InputRefused for a graph of an older opset."""
        graph_opset = self.model.opset_imports.get("", 0)
        if graph_opset < opset:
            raise InputRefused(
                f"the graph has opset {graph_opset}, and {feature} needs {opset}. Export the model again, or merge the "
                "adapter"
            )
