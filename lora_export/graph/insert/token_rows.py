"""Which row of the batch each row of a layer's input belongs to, where tokens were sorted: as those of experts are.

The rows of such an input are tokens of the whole batch, in an order that only a run knows. They are followed back to
where the batch was flattened. What took them from there then takes the adapters of the rows, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from lora_export.graph.insert.node_factory import Dim, NodeList, fixed_sizes, sizes_of
from lora_export.graph.operators import MATRIX_PRODUCTS, ONNX, operator_id
from lora_export.graph.values import is_stored, tensor_of

MOST_NODES = 64  # between a layer and where its tokens are flattened
# Each row of their result is computed of the same rows of what they read.
ROW_BY_ROW = frozenset(
    {
        *("Cast", "Identity", "Sigmoid", "Tanh", "Relu", "Gelu", "QuickGelu", "FastGelu", "Erf", "Softplus", "Swish"),
        *("Clip", "Sqrt", "Reciprocal", "Exp", "Neg", "Pow", "Add", "Sub", "Mul", "Div", "Min", "Max", "Where"),
    }
)


@dataclass(frozen=True, eq=False)
class SortedTokens:
    """The rows of a value [tokens, features].

    `of` are those from which the value's node takes them. Without any, the node flattens a batch, which is the
    dimension `axis` of what it reads.
    """

    value: ir.Value
    of: tuple[SortedTokens, ...] = ()
    axis: int = 0


@dataclass(eq=False)
class TokenPaths:
    """Finds the rows of values, each once. `batch` is the symbol of the batch."""

    batch: str
    known: dict[ir.Value, SortedTokens | None] = field(default_factory=dict)
    unclear: dict[ir.Value, None] = field(default_factory=dict)  # what is flattened and shows no batch

    def rows_of(self, value: ir.Value, nodes_left: int = MOST_NODES) -> SortedTokens | None:
        """The rows of a value; None where it is not certain which they are."""
        if value not in self.known:
            self.known[value] = None  # a graph has no cycles, and a damaged one ends here
            is_matrix = value.shape is not None and len(value.shape) == 2
            self.known[value] = self._found(value, nodes_left - 1) if nodes_left and is_matrix else None
        return self.known[value]

    def _found(self, value: ir.Value, nodes_left: int) -> SortedTokens | None:
        node = value.producer()
        if node is None or not node.inputs or node.inputs[0] is None:
            return None
        first, (domain, operator) = node.inputs[0], operator_id(node)
        if (domain, operator) == (ONNX, "Reshape"):
            return self._reshaped(value, first, nodes_left)
        if domain == ONNX and _takes_rows(node):
            rows = self.rows_of(first, nodes_left)
            return None if rows is None else SortedTokens(value, (rows,))
        if (domain, operator) == (ONNX, "Concat") and _is_of_rows(node):
            parts = [None if part is None else self.rows_of(part, nodes_left) for part in node.inputs]
            found = tuple(rows for rows in parts if rows is not None)
            return SortedTokens(value, found) if len(found) == len(parts) else None
        found_rows = {self.rows_of(each, nodes_left) for each in _of_same_rows(node)}
        return found_rows.pop() if len(found_rows) == 1 else None

    def _reshaped(self, value: ir.Value, before: ir.Value, nodes_left: int) -> SortedTokens | None:
        """The rows of [..., features] that a Reshape flattens to [tokens, features]."""
        sizes: list[Dim] = [] if before.shape is None else list(before.shape)
        if not sizes or sizes[-1] != sizes_of(value)[-1] or not isinstance(sizes[-1], int):
            return None
        if len(sizes) == 2:
            return self.rows_of(before, nodes_left)
        axes = [axis for axis, size in enumerate(sizes) if is_symbol(size, self.batch)]
        if len(axes) == 1:
            return SortedTokens(value, axis=axes[0])
        self.unclear[before] = None
        return None


def is_symbol(size: Dim, symbol: str) -> bool:
    """Whether a dimension has this symbol."""
    return isinstance(size, ir.SymbolicDim) and size.value == symbol


def _takes_rows(node: ir.Node) -> bool:
    """Whether a node takes whole rows of a matrix, one for each index."""
    if node.op_type == "GatherND":
        shape = None if node.inputs[1] is None else node.inputs[1].shape
        return not node.attributes.get_int("batch_dims", 0) and shape is not None and list(shape)[1:] == [1]
    shape = None if len(node.inputs) < 2 or node.inputs[1] is None else node.inputs[1].shape
    return node.op_type == "Gather" and _is_of_rows(node) and shape is not None and len(shape) == 1


def _is_of_rows(node: ir.Node) -> bool:
    """Whether a node's axis is the first of a matrix."""
    return node.attributes.get_int("axis", 0) in (0, -2)


def _of_same_rows(node: ir.Node) -> Iterable[ir.Value]:
    """The values of which each row becomes the same row of the result."""
    domain, operator = operator_id(node)
    given = [value for value in node.inputs if value is not None and not is_stored(value)]
    if (domain, operator) in MATRIX_PRODUCTS:
        return [] if node.attributes.get_int("transA", 0) or node.inputs[0] not in given else given[:1]
    if (domain, operator) in ((ONNX, "Split"), (ONNX, "Concat")):
        return [] if _is_of_rows(node) else given[: 1 if operator == "Split" else None]
    if (domain, operator) == (ONNX, "Slice"):
        return given[:1] if _slices_features(node) else []
    return [value for value in given if not _is_constant_of_row(value)] if operator in ROW_BY_ROW else []


def _slices_features(node: ir.Node) -> bool:
    axes = tensor_of(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] is not None else None
    return axes is not None and axes.numpy().ravel().tolist() in ([1], [-1])


def _is_constant_of_row(value: ir.Value) -> bool:
    """Whether an operand has one number for each row or each feature, or is looked up in a table: it moves no row."""
    shape, node = value.shape, value.producer()
    is_looked_up = node is not None and node.op_type in ("Gather", "GatherND") and is_stored(node.inputs[0])
    return is_looked_up or (shape is not None and (len(shape) < 2 or 1 in (shape[0], shape[-1])))


# --- What rows of the batch have, for each token ---


def of_tokens(branch: NodeList, rows: SortedTokens, by_row: ir.Value, made: dict[SortedTokens, ir.Value]) -> ir.Value:
    """What the batch has by row (batch, ...), for each of these tokens (tokens, ...).

    Inserts nodes, one for each in `made`, behind those that move the tokens; `branch` has the path of their names.
    """
    if rows not in made:
        parts = [of_tokens(branch, part, by_row, made) for part in rows.of]
        nodes = NodeList(branch.factory, branch.path)
        made[rows] = _moved(nodes, rows, parts) if parts else _flattened(nodes, rows, by_row)
        nodes.insert_behind(rows.value)
    return made[rows]


def _moved(nodes: NodeList, rows: SortedTokens, parts: Sequence[ir.Value]) -> ir.Value:
    """What the node of the rows does to their tokens, done to what these have."""
    node = rows.value.producer()
    assert node is not None
    others = [] if node.op_type == "Concat" else [value for value in node.inputs[1:] if value is not None]
    shape = [sizes_of(rows.value)[0], *sizes_of(parts[0])[1:]]
    attributes = {} if node.op_type == "GatherND" else {"axis": 0}
    return nodes.add(node.op_type, [*parts, *others], shape, None, attributes)


def _flattened(nodes: NodeList, rows: SortedTokens, by_row: ir.Value) -> ir.Value:
    """What each token's row of the batch has, in the order in which a Reshape flattens the tokens."""
    node = rows.value.producer()
    assert node is not None and node.inputs[0] is not None
    before, (batch, *more) = node.inputs[0], sizes_of(by_row)
    others = [axis for axis in range(len(sizes_of(before)) - 1) if axis != rows.axis]

    def constant(name: str, *numbers: int) -> ir.Value:
        return nodes.factory.constant(nodes.path, name, np.array(numbers, np.int64))

    wide: list[Dim] = [batch if axis == rows.axis else 1 for axis in range(len(others) + 1)]
    by_axis = nodes.add("Unsqueeze", [by_row, constant("axes", *others)], [*wide, *more])
    shape = nodes.add("Shape", [before], [len(wide)], ir.DataType.INT64, start=0, end=len(wide))
    if more:
        shape = nodes.add("Concat", [shape, constant("more", *fixed_sizes(by_row, 1))], [len(wide) + 1], axis=0)
    expanded = nodes.add("Expand", [by_axis, shape], [*sizes_of(before)[:-1], *more])
    last = constant("tokens", -1, *(fixed_sizes(by_row, 1) if more else ()))
    return nodes.add("Reshape", [expanded, last], [sizes_of(rows.value)[0], *more])
