"""Shapes that a graph's inputs show in runs."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lora_export.api.onnx_from_graph import set_measured_shapes
from lora_export.runtime.runner import Arrays
from support.graphs import a_graph, contents

# `h` is (N, L, 3) and `rows` (N·L, 3), `pairs` is (N, N), and `where` has a row for each entry that is no zero.
LOST = """
g (float[N,L,3] x, int64[L] ids) => (y)
<float[3,3] m.weight = {1,4,2,5,3,6,7,8,9}, int64[2] flat = {-1,3}, float[2] table = {0,1}, int64[1] last = {-1}>
{ h = MatMul(x, m.weight)
  rows = Reshape(h, flat)
  first = ReduceMax <keepdims = 0> (x, last)
  turned = Transpose(first)
  pairs = MatMul(first, turned)
  where = NonZero(x)
  read = Gather(table, ids)
  y = Relu(h) }
"""


def lost_graph() -> ir.Model:
    model = a_graph(LOST)
    for node in model.graph:
        for value in node.outputs:
            value.shape = value.type = None
    return model


def cases(*sizes: tuple[int, int]) -> dict[str, Arrays]:
    rng = np.random.default_rng(0)
    return {
        str(number): {"x": rng.integers(1, 3, (n, length, 3)).astype(np.float32), "ids": np.zeros(length, np.int64)}
        for number, (n, length) in enumerate(sizes)
    }


def measured(model: ir.Model, given: dict[str, Arrays], *names: str) -> dict[str, str]:
    values = {value.name: value for node in model.graph for value in node.outputs}
    set_measured_shapes(model, [values[name] for name in names], given)
    return {name: str(values[name].shape) for name in names}


def test_dimensions_get_the_symbols_of_the_inputs() -> None:
    model = lost_graph()
    before = (contents(model), len(list(model.graph)), [value.name for value in model.graph.outputs])
    shapes = measured(model, cases((1, 7), (3, 16)), "h", "pairs", "read", "y")
    assert shapes == {"h": "[N,L,3]", "pairs": "[N,N]", "read": "[L]", "y": "[N,L,3]"}
    types = {value.name: value.dtype for node in model.graph for value in node.outputs if value.type is not None}
    assert types == dict.fromkeys(("h", "pairs", "read", "y"), ir.DataType.FLOAT)
    after = (contents(model), len(list(model.graph)), [value.name for value in model.graph.outputs])
    assert after == before


def test_a_size_of_no_single_symbol_is_unknown() -> None:
    model = lost_graph()
    measured(model, cases((1, 7), (3, 16)), "rows", "where")
    rows, where = (next(v for n in model.graph for v in n.outputs if v.name == name) for name in ("rows", "where"))
    assert rows.shape is not None and where.shape is not None
    assert [getattr(size, "value", size) for size in rows.shape] == [None, 3]
    assert [getattr(size, "value", size) for size in where.shape] == [3, None]
    assert where.dtype is ir.DataType.INT64


def test_two_symbols_of_equal_sizes_are_not_told_apart() -> None:
    model = lost_graph()
    measured(model, cases((2, 2), (3, 3)), "h")
    (shape,) = (value.shape for node in model.graph for value in node.outputs if value.name == "h")
    assert shape is not None and [getattr(size, "value", size) for size in shape] == [None, None, 3]


def test_one_case_says_nothing() -> None:
    assert measured(lost_graph(), cases((3, 16)), "h") == {"h": "None"}
