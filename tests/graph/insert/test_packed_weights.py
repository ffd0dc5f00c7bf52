"""Several weights packed in one matrix (q, k and v): their node gets one addition, whichever have an adapter."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from lora_export import plan
from lora_export.formats import onnx_adapter
from lora_export.graph.find_sites import Sites
from lora_export.graph.insert.adapter_inputs import contract_dora_factors, insert_inputs
from lora_export.graph.insert.adapter_nodes import insert_nodes
from lora_export.graph.insert.adapter_rows import insert_rows
from lora_export.graph.site import find_readers
from lora_export.lora import LoraPair
from support.graphs import Arrays, a_graph, an_adapter, quantised, run

RNG = np.random.default_rng(5)


BLOCKS = {"q": range(8), "k": range(8, 12), "v": range(12, 16)}


WEIGHT = RNG.normal(size=(16, 32)).astype(np.float32)


BIAS = RNG.normal(size=16).astype(np.float32)


X = RNG.normal(size=(3, 32)).astype(np.float32)


MODES = pytest.mark.parametrize("mode", ["nodes", "inputs", "rows"])


SUBSETS = pytest.mark.parametrize("with_adapter", ["q", "k", "v", "qk", "qv", "kv", "qkv", "vq"])


NODES = {  # one branch for each weight, concatenated, and one sum
    1: {"MatMul": 2, "Pad": 1, "Add": 1},
    2: {"MatMul": 4, "Pad": 1, "Concat": 1, "Add": 1},
    3: {"MatMul": 6, "Concat": 1, "Add": 1},
}


def packed(*, bits: int = 0, bias: bool = False) -> tuple[ir.Model, Sites]:
    """A graph of one node that multiplies by q, k and v."""
    product = "Gemm <transB = 1> (x, W, b)" if bias else "MatMul(x, W)"
    sizes = "16,32" if bias else "32,16"
    more = ", float[16] b = {0}" if bias else ""
    model = a_graph(f"g (float[N,32] x) => (float[N,16] y) <float[{sizes}] W = {{0}}{more}> {{ [n] y = {product} }}")
    arrays = {"W": WEIGHT if bias else np.ascontiguousarray(WEIGHT.T), "b": BIAS}
    for name, value in model.graph.initializers.items():
        value.const_value = ir.Tensor(arrays[name], name=name)
    model = quantised(model, bits=bits) if bits else model
    (site,) = (site for value in model.graph.initializers.values() for site in find_readers(value) if site.is_linear)
    by_name = {
        f"{name}.weight": (dataclasses.replace(site, name=f"{name}.weight", block=block),)
        for name, block in reversed(BLOCKS.items())  # the order in the matrix decides, not that of this list
    }
    return model, Sites(by_name, (), ())


def a_pair(name: str, *, rank: int = 2, dora: bool = False) -> LoraPair:
    rng, size = np.random.default_rng([rank, ord(name)]), len(BLOCKS[name])
    return LoraPair(
        a=rng.normal(size=(rank, 32)).astype(np.float32),
        b=rng.normal(size=(size, rank)).astype(np.float32),
        scale=0.5,
        magnitude=rng.uniform(1, 9, size) if dora else None,
    )


def outputs(mode: str, model: ir.Model, found: Sites, pairs: dict[str, LoraPair]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The outputs of a graph without the adapter and with it."""
    off, fed = run(model, x=X)["y"], dict[str, Any]()
    steps = plan.make([an_adapter(pairs)], found.specs, one_at_a_time=mode != "nodes")
    if mode == "nodes":
        insert_nodes(model, found, steps)
    elif mode == "rows":
        insert_rows(model, found, steps, batch="N")
        assert run(model, x=X, adapter_ids=np.zeros(3, np.int64))["y"].tobytes() == off.tobytes()
        fed = {"adapter_ids": np.ones(3, np.int64)}
    else:
        weights = [step.weight for step in steps.steps]
        contract = insert_inputs(model, found, weights, dora=[step.weight for step in steps.steps if step.has_dora])
        assert run(model, x=X)["y"].tobytes() == off.tobytes()
        fed = onnx_adapter.input_values(
            contract, steps, "default", contract_dora_factors(model, contract, steps, "default")
        )
    return off, run(model, x=X, **fed)["y"]


def expected_output(
    off: NDArray[Any], found: Sites, pairs: dict[str, LoraPair], bias: Any = 0.0
) -> NDArray[np.float64]:
    """The output with adapters, by NumPy in fp64, from the output without them."""
    expected = off.astype(np.float64) - bias
    for name, pair in pairs.items():
        own = slice(BLOCKS[name].start, BLOCKS[name].stop)
        expected[:, own] += X.astype(np.float64) @ pair.delta().T
        if pair.magnitude is not None:
            (site,) = found.by_name[f"{name}.weight"]
            total = site.matrix.astype(np.float64) + pair.delta()
            expected[:, own] *= pair.magnitude / np.linalg.norm(total, axis=1)
    return expected + bias


def assert_close(
    output: NDArray[Any], expected: NDArray[np.float64], off: NDArray[Any], changed: Collection[str]
) -> None:
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-4)
    for name, block in BLOCKS.items():
        own = slice(block.start, block.stop)
        assert (output[:, own].tobytes() == off[:, own].tobytes()) == (name not in changed)


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


@MODES
@SUBSETS
@pytest.mark.parametrize("bits", [0, 4])
def test_each_weight_gains_its_own_adapter(mode: str, with_adapter: str, bits: int) -> None:
    model, found = packed(bits=bits)
    before = operators(model)
    pairs = {name: a_pair(name) for name in with_adapter}
    off, on = outputs(mode, model, found, pairs)
    assert_close(on, expected_output(off, found, pairs), off, with_adapter)
    if mode != "rows":
        assert operators(model) - before == NODES[len(with_adapter)]


@MODES
def test_dora_on_one_weight_changes_no_neighbour_or_bias(mode: str) -> None:
    model, found = packed(bias=True)
    pairs = {name: a_pair(name, dora=name == "k") for name in "qk"}
    off, on = outputs(mode, model, found, pairs)
    expected = expected_output(off, found, pairs, BIAS)
    np.testing.assert_allclose(on, expected, rtol=1e-4, atol=1e-4)
    plain = expected_output(off, found, {name: a_pair(name) for name in "qk"}, BIAS)
    assert np.abs(expected - plain)[:, 8:12].min() > 1e-2


def test_several_adapters_are_one_product() -> None:
    model, found = packed()
    one, two = {name: a_pair(name) for name in "qk"}, {name: a_pair(name, rank=3) for name in "kv"}
    adapters = [an_adapter(one, name="one"), an_adapter(two, name="two")]
    off = run(model, x=X)["y"]
    insert_nodes(model, found, plan.make(adapters, found.specs, strengths=[1.0, -2.0]))
    twice = {name: dataclasses.replace(pair, scale=-2 * pair.scale) for name, pair in two.items()}
    expected = expected_output(expected_output(off, found, one), found, twice)
    assert_close(run(model, x=X)["y"], expected, off, "qkv")
    assert operators(model) == {"MatMul": 1 + 2 * 3, "Concat": 1 + 2, "Add": 1}
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_rows_of_batch_have_adapters_of_different_weights() -> None:
    model, found = packed()
    one, two = {"q": a_pair("q")}, {name: a_pair(name, rank=3, dora=name == "v") for name in "kv"}
    off = run(model, x=X)["y"]
    adapters = [an_adapter(one, name="one"), an_adapter(two, name="two")]
    insert_rows(model, found, plan.make(adapters, found.specs, one_at_a_time=True), batch="N")
    fed: Arrays = {"adapter_ids": np.array([2, 0, 1])}
    output = run(model, x=X, **fed)["y"]
    expected = np.stack([expected_output(off, found, two)[0], off[1], expected_output(off, found, one)[2]])
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-4)
    assert output[1].tobytes() == off[1].tobytes()
