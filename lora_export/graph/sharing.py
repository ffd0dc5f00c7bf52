"""Branches that read the same x (q, k and v; gate and up) multiply by their A together.

x·[A₁ A₂ …] is one product (…, r₁ + r₂ + …), and each branch takes it by its own B, filled up with rows of zeros for
the others' ranks. The matrices that lie side by side are made by Concat of the initializers, which keep their names
and shapes: a runtime that folds constants, as onnxruntime does, has made them when the graph is loaded. Measured on
a CPU (tests/benchmarks/README.md has the table): what takes the time of a branch is not its few products, it is that
they are so narrow, and that they are so many.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

from lora_export.graph.weaver import Branch, Weaver

MOST_RANKS = 64  # of the branches that share; at about half as many again the zeros take as long as what is saved


def share(weaver: Weaver, layers: Iterable[Sequence[Branch]]) -> None:
    """Let linear layers that read one x, whose branches are in the graph, multiply it by their A together.

    Branches that turn x on its way in, or whose A is cast to another dtype first, stay by themselves.
    """
    groups: dict[tuple[ir.Value, ir.Graph | ir.Function, ir.DataType | None], list[_Pair]] = {}
    for layer, branches in enumerate(layers):
        for pair in (_Pair(branch, layer) for branch in branches):
            if pair.is_plain and pair.down.graph is not None:
                groups.setdefault((pair.x, pair.down.graph, pair.a.dtype), []).append(pair)
    together = [(graph, pairs) for (_, graph, _), pairs in groups.items() if _is_worth_it(pairs)]
    places = {node: place for graph in {graph for graph, _ in together} for place, node in enumerate(graph)}
    zeros = _Zeros(weaver)
    for graph, pairs in together:
        _share(weaver, zeros, graph, sorted(pairs, key=lambda pair: places[pair.down]))


class _Pair:
    """The last two nodes of a branch: by A, and by B."""

    def __init__(self, branch: Branch, layer: int):
        self.layer = layer
        self.down, self.up = branch.nodes[-2:]
        self.path = branch.path

    @property
    def is_plain(self) -> bool:
        matrices = self.down.op_type == "MatMul" and self.up.op_type in ("MatMul", "Gemm")
        return matrices and self.a.is_initializer() and self.b.shape is not None

    @property
    def x(self) -> ir.Value:
        return _input(self.down, 0)

    @property
    def a(self) -> ir.Value:
        return _input(self.down, 1)

    @property
    def b(self) -> ir.Value:
        return _input(self.up, 1)

    @property
    def rank(self) -> int:
        return _sizes(self.a)[1]


class _Zeros:
    """Rows of zeros as initializers, one for each shape and dtype."""

    def __init__(self, weaver: Weaver):
        self.weaver = weaver
        self.made: dict[tuple[int, int, ir.DataType], ir.Value] = {}

    def of(self, rows: int, like: ir.Value) -> list[ir.Value]:
        """So many rows as wide as `like`; none for none."""
        assert like.dtype is not None
        columns, dtype = _sizes(like)[1], like.dtype
        if rows and (rows, columns, dtype) not in self.made:
            array = np.zeros((rows, columns), dtype.numpy())
            self.made[rows, columns, dtype] = self.weaver.constant("/lora_zeros", f"{rows}x{columns}", array)
        return [self.made[rows, columns, dtype]] if rows else []


def _is_worth_it(pairs: Sequence[_Pair]) -> bool:
    return len({pair.layer for pair in pairs}) > 1 and sum(pair.rank for pair in pairs) <= MOST_RANKS


def _share(weaver: Weaver, zeros: _Zeros, graph: ir.Graph | ir.Function, pairs: Sequence[_Pair]) -> None:
    first, total = pairs[0], sum(pair.rank for pair in pairs)
    x, sizes = first.x, _sizes(first.a)
    path = first.down.name.rpartition("/")[0] if first.down.name else ""
    side_by_side = weaver.node("Concat", [pair.a for pair in pairs], path, ir.Shape([sizes[0], total]), {"axis": 1})
    shape = ir.Shape([*x.shape[:-1], total]) if x.shape is not None else None
    down = weaver.node("MatMul", [x, side_by_side.outputs[0]], path, shape)
    graph.insert_before(first.down, [side_by_side, down])
    begin = 0
    for pair in pairs:
        end = begin + pair.rank
        rows = [*zeros.of(begin, pair.b), pair.b, *zeros.of(total - end, pair.b)]
        filled = weaver.node("Concat", rows, pair.path, ir.Shape([total, _sizes(pair.b)[1]]), {"axis": 0})
        filled.outputs[0].type = pair.b.type
        graph.insert_before(pair.up, filled)
        pair.up.replace_input_with(0, down.outputs[0])
        pair.up.replace_input_with(1, filled.outputs[0])
        graph.remove(pair.down, safe=True)
        begin = end


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _sizes(value: ir.Value) -> tuple[int, int]:
    assert value.shape is not None
    rows, columns = value.shape.numpy()
    return rows, columns
