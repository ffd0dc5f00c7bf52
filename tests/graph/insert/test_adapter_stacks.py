"""Stacked factors of several adapters for one weight, by hand."""

from __future__ import annotations

import numpy as np

from lora_export import plan
from lora_export.graph.find_sites import find_sites
from lora_export.graph.insert.adapter_stacks import AdapterStacks
from lora_export.graph.insert.node_factory import Factor, NodeFactory
from lora_export.lora import Adapter
from support.graphs import a_graph, an_adapter
from support.insertion import CONVOLUTION, CONVOLUTION_PAIR, OTHER_PAIR
from support.small_graphs import GEMM, PAIR


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
    a, b = map(array, stacks.pairs())
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
    a, b = map(array, AdapterStacks(NodeFactory(model), step, ["one", "two"], "float32").pairs())
    assert a[1].any() and not a[2].any() and not b[2].any()


def test_ranks_of_convolutions_are_concatenated() -> None:
    adapters = [an_adapter({"c": CONVOLUTION_PAIR}, name=name) for name in ("one", "two")]
    stacks = stacks_of(CONVOLUTION.replace("ATTRIBUTES", "strides = [1]"), *adapters)
    a, b = map(array, stacks.convolutions())
    assert (a.shape, b.shape) == ((2, 2, 2), (3, 2, 1))
    assert stacks.rank_mask().tolist() == [[False, False], [True, False], [False, True]]


def test_factors_of_dora_are_ones_without_dora() -> None:
    stacks = stacks_of(GEMM, an_adapter({"m": PAIR}, name="one"), an_adapter({"m": OTHER_PAIR}, name="two"))
    assert array(stacks.dora([None, np.array([2.0, -3.0])])).tolist() == [[1, 1], [1, 1], [2, -3]]
