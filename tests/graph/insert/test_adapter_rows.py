"""Adapters selected per row: what each row computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from lora_export import plan
from lora_export.errors import InputRefused
from lora_export.graph.find_sites import find_sites
from lora_export.graph.insert.adapter_rows import AdapterStacks
from lora_export.graph.insert.node_factory import Factor, NodeFactory
from lora_export.lora import Adapter, LoraPair
from lora_export.provenance import ROW_ADAPTERS_KEY
from support.graphs import a_graph, an_adapter, contents, run, stored
from support.insertion import CONVOLUTION, CONVOLUTION_PAIR, OTHER_PAIR, TWO_LAYERS, X, row_ids, with_rows
from support.small_graphs import GEMM, PAIR, SHARED, SQUARE


def test_each_row_has_its_own_adapter() -> None:
    model = a_graph(GEMM)
    with_rows(
        model, an_adapter({"m": PAIR}, name="one"), an_adapter({"m": OTHER_PAIR}, name="two"), strengths=[1.0, -1.0]
    )
    # x W^T = [9, 21] for both rows; PAIR adds [-2, -4] to both, OTHER_PAIR subtracts 3 [x1, x0]
    expected = {0: [[9, 21]] * 2, 1: [[7, 17]] * 2, 2: [[9 - 3, 21 - 3], [9 - 9, 21]]}
    for first in range(3):
        for second in range(3):
            output = run(model, x=X, adapter_ids=row_ids(first, second))["y"]
            assert np.array_equal(output, [expected[first][0], expected[second][1]]), (first, second)


def test_ranks_are_padded_and_names_are_in_metadata() -> None:
    model = a_graph(GEMM)
    before = contents(model)
    with_rows(model, an_adapter({"m": PAIR}, name="one"), an_adapter({"m": OTHER_PAIR}, name="two"))
    assert stored(model, "m.lora_A.weight").tolist() == [
        [[0, 0], [0, 0], [0, 0]],
        [[1, 0], [0, 0], [-1, 0]],
        [[0, 1], [1, 0], [0, 0]],
    ]
    assert stored(model, "m.lora_B.weight").tolist() == [[[0, 0], [0, 0]], [[2, 4], [0, 0]], [[3, 0], [0, 3]]]
    assert before.items() < contents(model).items()
    assert json.loads(model.metadata_props[ROW_ADAPTERS_KEY]) == {"adapters": ["one", "two"]}
    assert [(value.name, str(value.shape)) for value in model.graph.inputs] == [("x", "[N,3]"), ("adapter_ids", "[N]")]


def test_adapters_of_different_layers_in_one_batch() -> None:
    # The text has no shape between the layers: it is inferred.
    model = a_graph(TWO_LAYERS)
    with_rows(model, an_adapter({"a": SQUARE}, name="one"), an_adapter({"b": SQUARE}, name="two"))
    a, b, change = np.float32([[1, 2], [3, 4]]), np.float32([[1, 0], [1, 1]]), np.float32([[1, 2], [0, 0]])
    x = np.float32([[1, 2], [3, 4], [5, 6]])
    expected = [x[0] @ (a + change) @ b, x[1] @ a @ (b + change), x[2] @ a @ b]
    assert np.array_equal(run(model, x=x, adapter_ids=row_ids(1, 2, 0))["y"], expected)


def test_module_called_twice_has_adapter_at_both_sites() -> None:
    model = a_graph(SHARED, modules={"first": "a.fc", "second": "a.fc"})
    with_rows(model, an_adapter({"a.fc": SQUARE}))
    w, x = np.float32([[1, 2], [3, 4]]), np.float32([[1, 2], [1, 2]])
    changed = w + np.float32([[1, 2], [0, 0]])
    assert np.array_equal(run(model, x=x, adapter_ids=row_ids(1, 0))["y"], [x[0] @ changed @ changed, x[1] @ w @ w])


@pytest.mark.parametrize("wrong", [[3, 0], [-1, 0], [0, -3], [0], [], [0, 0, 0], [1]])
def test_invalid_ids_and_wrong_count_end_the_run(wrong: list[int]) -> None:
    model = a_graph(GEMM)
    with_rows(model, an_adapter({"m": PAIR}, name="one"), an_adapter({"m": OTHER_PAIR}, name="two"))
    with pytest.raises(Exception, match="ONNXRuntimeError"):
        run(model, x=X, adapter_ids=row_ids(*wrong))
    assert np.array_equal(run(model, x=X[:1], adapter_ids=row_ids(0))["y"], [[9, 21]])


def lower_opset(model: ir.Model) -> None:
    model.opset_imports[""] = 13


def add_input_of_same_name(model: ir.Model) -> None:
    model.graph.inputs[0].name = "adapter_ids"


@pytest.mark.parametrize(
    ("change", "message"),
    [(lower_opset, 'opset 13, and lora="rows" needs 15'), (add_input_of_same_name, "adapter_ids already")],
)
def test_old_opset_and_existing_input_are_refused(change: Callable[[ir.Model], None], message: str) -> None:
    model = a_graph(GEMM)
    change(model)
    with pytest.raises(InputRefused, match=message):
        with_rows(model, an_adapter({"m": PAIR}))


def test_overflow_and_second_insertion_are_refused() -> None:
    model = a_graph(GEMM)
    model.graph.initializers["m.weight"].const_value = ir.Tensor(np.ones((2, 3), np.float16), name="m.weight")
    with pytest.raises(InputRefused, match=r"m.weight: 1 value of lora_B .* float16 is 65504"):
        with_rows(model, an_adapter({"m": LoraPair(a=PAIR.a, b=[[1], [2]], scale=4e4)}))
    model = a_graph(GEMM)
    with_rows(model, an_adapter({"m": PAIR}))
    with pytest.raises(InputRefused, match="adapter_ids already"):
        with_rows(model, an_adapter({"m": PAIR}))


def test_fixed_rank_pads_every_stack() -> None:
    model, plain = a_graph(TWO_LAYERS), a_graph(TWO_LAYERS)
    adapters = an_adapter({"a": SQUARE}, name="one"), an_adapter({"a": SQUARE, "b": SQUARE}, name="two")
    with_rows(model, *adapters, max_rank=4)
    with_rows(plain, *adapters)
    shapes = {name: stored(model, f"{name}.weight").shape for name in ("a.lora_A", "a.lora_B", "b.lora_A", "b.lora_B")}
    assert shapes == {"a.lora_A": (3, 2, 4), "a.lora_B": (3, 4, 2), "b.lora_A": (3, 2, 4), "b.lora_B": (3, 4, 2)}
    x = np.float32([[1, 2], [3, 4], [5, 6]])
    assert np.array_equal(
        run(model, x=x, adapter_ids=row_ids(2, 0, 1))["y"], run(plain, x=x, adapter_ids=row_ids(2, 0, 1))["y"]
    )
    with pytest.raises(InputRefused, match=r"two, m.weight: rank 2 > 1"):
        with_rows(
            a_graph(GEMM), an_adapter({"m": PAIR}, name="one"), an_adapter({"m": OTHER_PAIR}, name="two"), max_rank=1
        )


def test_fixed_rank_of_convolutions_is_that_of_each_adapter() -> None:
    body = CONVOLUTION.replace("ATTRIBUTES", "strides = [1]")
    model, plain = a_graph(body), a_graph(body)
    pair = LoraPair(a=CONVOLUTION_PAIR.a, b=CONVOLUTION_PAIR.b, scale=0.5)
    adapters = an_adapter({"c": pair}, name="one"), an_adapter({"c": replace(pair, scale=-3.0)}, name="two")
    with_rows(model, *adapters, max_rank=2)
    with_rows(plain, *adapters)
    assert stored(model, "c.lora_A.weight").shape == (4, 2, 2) and stored(plain, "c.lora_A.weight").shape == (2, 2, 2)
    x = np.arange(18, dtype=np.float32).reshape(3, 2, 3)
    outputs = [run(graph, x=x, adapter_ids=row_ids(2, 0, 1))["y"] for graph in (model, plain)]
    assert np.array_equal(*outputs)


# --- The factors of all adapters for one weight, stacked: entry 0 is the base, which adds nothing ---


def stacks_of(body: str, *adapters: Adapter) -> AdapterStacks:
    model = a_graph(body)
    steps = plan.make(adapters, find_sites(model).specs, one_at_a_time=True)
    (step,) = steps.low_rank
    return AdapterStacks(NodeFactory(model), step, [adapter.name for adapter in adapters], "float32")


def array(factor: Factor) -> np.ndarray:
    assert factor.value.const_value is not None
    return factor.value.const_value.numpy()


def test_ranks_are_padded_and_entry_0_is_zero() -> None:
    stacks = stacks_of(GEMM, an_adapter({"m": PAIR}, name="one"), an_adapter({"m": OTHER_PAIR}, name="two"))
    a, b = map(array, stacks.pairs() or ())
    assert (a.shape, b.shape) == ((3, 3, 2), (3, 2, 2))
    assert not a[0].any() and not b[0].any()
    assert np.array_equal((a[1] @ b[1]).T, PAIR.delta())
    assert np.array_equal((a[2] @ b[2]).T, OTHER_PAIR.delta())


def test_adapter_without_pair_has_zeros() -> None:
    other = an_adapter({"other": PAIR}, name="two")
    body = (
        GEMM.replace("{1,2,3,4,5,6}>", "{1,2,3,4,5,6}, float[2,3] other.weight = {1,2,3,4,5,6}>")
        .replace("}\n", "", 1)
        .rstrip(" }\n")
        + "\n  z = Gemm <transB = 1> (x, other.weight) }"
    )
    model = a_graph(body.replace("(float[N,2] y)", "(float[N,2] y, float[N,2] z)"))
    steps = plan.make([an_adapter({"m": PAIR}, name="one"), other], find_sites(model).specs, one_at_a_time=True)
    step = next(step for step in steps.low_rank if step.weight == "m.weight")
    a, b = map(array, AdapterStacks(NodeFactory(model), step, ["one", "two"], "float32").pairs() or ())
    assert a[1].any() and not a[2].any() and not b[2].any()


def test_ranks_of_convolutions_are_concatenated() -> None:
    adapters = [an_adapter({"c": CONVOLUTION_PAIR}, name=name) for name in ("one", "two")]
    stacks = stacks_of(CONVOLUTION.replace("ATTRIBUTES", "strides = [1]"), *adapters)
    a, b = map(array, stacks.convolutions() or ())
    assert (a.shape, b.shape) == ((2, 2, 2), (3, 2, 1))
    assert stacks.rank_mask().tolist() == [[False, False], [True, False], [False, True]]


def test_factors_of_dora_are_ones_without_dora() -> None:
    stacks = stacks_of(GEMM, an_adapter({"m": PAIR}, name="one"), an_adapter({"m": OTHER_PAIR}, name="two"))
    assert stacks.of_outputs() is None and stacks.of_inputs() is None
    stacks.dora = [None, np.array([2.0, -3.0])]
    factors = stacks.of_outputs()
    assert factors is not None and array(factors).tolist() == [[1, 1], [1, 1], [2, -3]]
