"""Reference graphs with adapters, in fp64, against W + ΔW that NumPy computes in fp64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from lora_export import plan
from lora_export.graph.exporter_names import FOLDED_FROM
from lora_export.graph.find_sites import find_sites
from lora_export.graph.onnx_file.writing import in_memory
from lora_export.graph.site import NameSource
from lora_export.lora import LoraPair
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.ort_session import InMemoryGraph
from lora_export.verification.references.base_graph import inferred_types
from lora_export.verification.references.graph_fp64 import widen
from lora_export.verification.references.graph_with_adapter import (
    at_strength,
    branches_at_quantised_weights,
    branches_where_possible,
    sum_at_weights,
)
from support.graphs import a_graph, an_adapter, planned, quantised

Wide = NDArray[np.float64]
RNG = np.random.default_rng(0)
EXACT = 1e-14


def in_fp64(model: ir.Model, **feeds: Any) -> Wide:
    widen(model, inferred_types)
    (output, *_) = OnnxRunner(InMemoryGraph("wide", *in_memory(model)), optimise=False).run(feeds).values()
    return output


def random_pair(shape: tuple[int, ...], rank: int = 2, **options: Any) -> LoraPair:
    """A random pair for a weight of this shape, (out, in, ...)."""
    out, inner, *kernel = shape
    a, b = RNG.standard_normal((rank, inner, *kernel)), RNG.standard_normal((out, rank, *[1] * len(kernel)))
    return LoraPair(a=a, b=b, scale=0.3, **options)


def changed(weight: Wide, *pairs: LoraPair, factor: float = 1.0) -> Wide:
    """W + ΔW of these pairs (out, in, ...)."""
    total = weight.astype(np.float64).reshape(len(weight), -1)
    for pair in pairs:
        a, b = (array.astype(np.float64).reshape(len(array), -1) for array in (pair.a, pair.b))
        total = total + factor * pair.scale * b @ a
        if pair.magnitude is not None:
            total *= (pair.magnitude / np.linalg.norm(total, axis=1))[:, None]
    return total.reshape(weight.shape)


def filled(text: str, **weights: NDArray[Any]) -> ir.Model:
    model = a_graph(text)
    for name, array in weights.items():
        model.graph.initializers[name].const_value = ir.Tensor(array, name=name)
    return model


MATMUL = "g (float[b, 5] x) => (float[b, 4] y) <float[5, 4] up.weight = {0}> { y = MatMul(x, up.weight) }"
GEMM = "g (float[b, 5] x) => (float[b, 4] y) <float[4, 5] up.weight = {0}> { y = Gemm<transB: int = 1>(x, up.weight) }"
TRANSPOSED = """g (float[b, 5] x) => (float[b, 4] y) <float[4, 5] up.weight = {0}> {
    transposed = Transpose<perm = [1, 0]>(up.weight) y = MatMul(x, transposed) }"""
FUNCTIONS = {"branches": branches_where_possible, "sums": sum_at_weights}


@pytest.mark.parametrize("method", FUNCTIONS)
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("text", [MATMUL, GEMM, TRANSPOSED])
def test_linear_layer_equals_numpy(text: str, dora: bool, method: str) -> None:
    weight = RNG.standard_normal((4, 5)).astype(np.float32)  # (out, in)
    model = filled(text, **{"up.weight": np.ascontiguousarray(weight.T) if text is MATMUL else weight})
    if text is MATMUL:
        model.graph.initializers["up.weight"].metadata_props[FOLDED_FROM] = "['up.weight']"
    adapter = an_adapter({"up": random_pair((4, 5), magnitude=np.arange(1.0, 5.0) if dora else None)})
    x = RNG.standard_normal((3, 5)).astype(np.float32)
    found, steps = planned(model, adapter)
    FUNCTIONS[method](model, found, steps)
    expected = x.astype(np.float64) @ changed(weight, adapter.pairs["up"]).T
    # The s·B and the DoRA factor of a branch are rounded to the weight's dtype; the sum at the weight is not.
    assert np.abs(in_fp64(model, x=x) - expected).max() < (EXACT if method == "sums" and not dora else 3e-6)
    assert np.abs(expected - x @ weight.T).max() > 0.1


def test_embedding_and_convolution_equal_numpy() -> None:
    table, kernel = RNG.standard_normal((7, 3)).astype(np.float32), RNG.standard_normal((2, 3, 3)).astype(np.float32)
    model = filled(
        """g (int64[b, s] ids, float[b, 3, s] x) => (float[b, s, 3] y, float[b, 2, s] z)
        <float[7, 3] words.weight = {0}, float[2, 3, 3] conv.weight = {0}> {
            y = Gather(words.weight, ids) z = Conv<pads = [1, 1]>(x, conv.weight) }""",
        **{"words.weight": table, "conv.weight": kernel},
    )
    embedding_pair = replace(random_pair((3, 7)), embedding=True)
    adapter = an_adapter({"words": embedding_pair, "conv": random_pair((2, 3, 3))})
    feeds = {"ids": np.array([[0, 6, 3]]), "x": RNG.standard_normal((1, 3, 3)).astype(np.float32)}
    found, steps = planned(model, adapter)
    sum_at_weights(model, found, steps)
    widen(model, inferred_types)
    outputs = OnnxRunner(InMemoryGraph("wide", *in_memory(model)), optimise=False).run(feeds)
    rows = changed(table.T, embedding_pair).T[feeds["ids"]]
    assert np.abs(outputs["y"] - rows).max() < EXACT
    padded = np.pad(feeds["x"][0].astype(np.float64), ((0, 0), (1, 1)))
    windows = np.stack([padded[:, position : position + 3] for position in range(3)])  # (position, in, kernel)
    convolved = np.einsum("oik,pik->op", changed(kernel, adapter.pairs["conv"]), windows)
    assert np.abs(outputs["z"][0] - convolved).max() < 1e-5  # onnxruntime has no fp64 convolution


@pytest.mark.parametrize("dora", [False, True])
def test_block_of_packed_weight_changes_alone(dora: bool) -> None:
    weight = RNG.standard_normal((6, 5)).astype(np.float32)  # (out, in): q is 2 rows, k is 4
    model = filled(
        "g (float[b, 5] x) => (float[b, 6] y) <float[5, 6] packed = {0}> { y = MatMul(x, packed) }",
        packed=np.ascontiguousarray(weight.T),
    )
    found = find_sites(model)
    (whole,) = found.unnamed
    parts = {"q.weight": range(2), "k.weight": range(2, 6)}
    named = {
        name: (replace(whole, name=name, named_by=NameSource.CONTENT, block=block, transposed=True),)
        for name, block in parts.items()
    }
    sites = replace(found, by_name=named, unnamed=())
    adapter = an_adapter({"k": random_pair((4, 5), magnitude=np.arange(1.0, 5.0) if dora else None)})
    sum_at_weights(model, sites, plan.make([adapter], sites.specs))
    x = RNG.standard_normal((3, 5)).astype(np.float32)
    expected = np.concatenate([weight[:2].astype(np.float64), changed(weight[2:], adapter.pairs["k"])])
    assert np.abs(in_fp64(model, x=x) - x.astype(np.float64) @ expected.T).max() < EXACT


def in_half(rounded: bool) -> tuple[Wide, Wide]:
    """The output of a half-precision graph in fp64, and its W + ΔW."""
    weight = RNG.standard_normal((4, 5)).astype(np.float16)
    text = GEMM.replace("float[", "float16[")
    model = filled(text, **{"up.weight": weight})
    adapter = an_adapter({"up": random_pair((4, 5))})
    found, steps = planned(model, adapter)
    sum_at_weights(model, found, steps, rounded=rounded)
    x = np.eye(5, dtype=np.float16)
    return in_fp64(model, x=x).T, changed(weight.astype(np.float64), adapter.pairs["up"])


def test_half_precision_sum_is_rounded_if_requested() -> None:
    output, exact = in_half(rounded=False)
    assert np.abs(output - exact).max() < EXACT
    output, exact = in_half(rounded=True)
    assert np.array_equal(output, exact.astype(np.float16).astype(np.float64))
    assert np.abs(output - exact).max() > 1e-5


def layer(**weights: NDArray[Any]) -> ir.Model:
    return filled(
        """g (float[b, 32] x) => (float[b, 4] y) <float[32, 4] up.weight = {0}, float[4] up.bias = {0}> {
        product = MatMul(x, up.weight) y = Add(product, up.bias) }""",
        **weights,
    )


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("as_pairs", [False, True])
def test_change_beside_quantised_weight_is_one_matrix(as_pairs: bool, dora: bool) -> None:
    weights = {"up.weight": RNG.standard_normal((32, 4)).astype(np.float32), "up.bias": np.ones(4, np.float32)}
    model = quantised(layer(**weights), as_pairs=as_pairs)
    adapter = an_adapter({"up": random_pair((4, 32), magnitude=np.arange(1.0, 5.0) if dora else None)})
    found, steps = planned(model, adapter)
    stored_weight = found.by_name["up.weight"][0].matrix.astype(np.float64)
    branches_at_quantised_weights(model, found, steps)
    x = RNG.standard_normal((3, 32)).astype(np.float32)
    expected = x.astype(np.float64) @ changed(stored_weight, adapter.pairs["up"]).T + 1
    operators = {node.op_type for node in model.graph}
    assert operators & {"MatMulNBits", "DequantizeLinear"}  # it is still quantised
    runner = OnnxRunner(
        InMemoryGraph("quantised", *in_memory(model)), optimise=False
    )  # optimised, x may be rounded to 8 bits
    assert np.abs(runner.run({"x": x})["y"] - expected).max() < 1e-4
    assert np.abs(expected - 1 - x @ stored_weight.T).max() > 1
    again = quantised(layer(**weights), as_pairs=as_pairs)
    found, steps = planned(again, adapter)
    sum_at_weights(again, found, steps)
    assert np.abs(in_fp64(again, x=x) - expected).max() < 1e-6  # the products with scales are in fp32


def test_weight_without_branch_is_summed() -> None:
    weight = RNG.standard_normal((4, 5)).astype(np.float32)
    text = "g (float[5, b] x) => (float[4, b] y) <float[4, 5] up.weight = {0}> { y = MatMul(up.weight, x) }"
    model = filled(text, **{"up.weight": weight})
    adapter = an_adapter({"up": random_pair((4, 5))})
    found, steps = planned(model, adapter)
    assert branches_where_possible(model, found, steps)[0].startswith("1 weight cannot have a branch: ")
    x = RNG.standard_normal((5, 3)).astype(np.float32)
    assert np.abs(in_fp64(model, x=x) - changed(weight, adapter.pairs["up"]) @ x.astype(np.float64)).max() < EXACT


def biased() -> tuple[ir.Model, Any]:
    weights = {"up.weight": RNG.standard_normal((32, 4)).astype(np.float32), "up.bias": np.ones(4, np.float32)}
    shift = np.array([1.0, 2.0, 3.0, 4.0], np.float32)
    return layer(**weights), an_adapter({"up": random_pair((4, 32))}, biases={"up": shift})


@pytest.mark.parametrize("factor", [1.0, 1.1, 0.0])
def test_strength_multiplies_scales_and_bias_changes(factor: float) -> None:
    model, adapter = biased()
    tensor = model.graph.initializers["up.weight"].const_value
    assert tensor is not None
    weight = tensor.numpy().T
    found, steps = planned(model, adapter)
    sum_at_weights(model, found, at_strength(steps, factor))
    x = RNG.standard_normal((3, 32)).astype(np.float32)
    expected = x.astype(np.float64) @ changed(weight, adapter.pairs["up"], factor=factor).T + 1
    expected += factor * adapter.biases["up"]
    assert np.abs(in_fp64(model, x=x) - expected).max() < 1e-5 * max(1.0, factor)


def test_whole_tensor_is_independent_of_strength() -> None:
    def graph() -> ir.Model:
        weights = {"up.weight": np.ones((32, 4), np.float32), "up.bias": np.ones(4, np.float32)}
        return layer(**weights)

    new = np.array([5.0, 6.0, 7.0, 8.0], np.float32)
    adapter = an_adapter({"up": random_pair((4, 32))}, replaced={"up.bias": new})
    model = graph()
    found, steps = planned(model, adapter)
    without_pairs = at_strength(steps, 0.0)
    assert [step.weight for step in without_pairs.steps] == ["up.bias"]
    sum_at_weights(model, found, without_pairs)
    assert np.array_equal(in_fp64(model, x=np.zeros((1, 32), np.float32))[0], new)
    alone = graph()
    _, steps = planned(alone, an_adapter({}, replaced={"up.bias": new}))
    assert at_strength(steps, 0.0).steps == ()
    whole = {"up.weight": np.ones((32, 4), np.float32), "up.bias": new}
    _, steps = planned(graph(), an_adapter({"up": random_pair((4, 32))}, replaced=whole, biases={"up": new}))
    assert [(bool(step.terms), step.shift is None) for step in steps.steps] == [(True, True), (False, False)]
    assert [(step.terms, step.shift) for step in at_strength(steps, 0.0).steps] == [((), None)] * 2
