"""Adapters in a graph by the other way, in fp64, against W + ΔW that NumPy computes in fp64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from lora_export import plan
from lora_export.graph.exporter_metadata import FOLDED_FROM
from lora_export.graph.find_sites import find_sites
from lora_export.graph.onnx_file.writing import in_memory
from lora_export.graph.site import NameSource
from lora_export.lora import LoraPair
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.ort_session import InMemoryGraph
from lora_export.verification.references.graph_fp64 import widen
from lora_export.verification.references.graph_sessions import inferred_types
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
    (answer, *_) = OnnxRunner(InMemoryGraph("wide", *in_memory(model)), optimise=False).run(feeds).values()
    return answer


def pair(shape: tuple[int, ...], rank: int = 2, **options: Any) -> LoraPair:
    """A random pair for a weight of this shape, (out, in, ...)."""
    out, inner, *kernel = shape
    a, b = RNG.standard_normal((rank, inner, *kernel)), RNG.standard_normal((out, rank, *[1] * len(kernel)))
    return LoraPair(a=a, b=b, scale=0.3, **options)


def changed(weight: Wide, *pairs: LoraPair, factor: float = 1.0) -> Wide:
    """What pairs make of a weight (out, in, ...)."""
    total = weight.astype(np.float64).reshape(len(weight), -1)
    for there in pairs:
        a, b = (side.astype(np.float64).reshape(len(side), -1) for side in (there.a, there.b))
        total = total + factor * there.scale * b @ a
        if there.magnitude is not None:
            total *= (there.magnitude / np.linalg.norm(total, axis=1))[:, None]
    return total.reshape(weight.shape)


def filled(text: str, **weights: NDArray[Any]) -> ir.Model:
    model = a_graph(text)
    for name, array in weights.items():
        model.graph.initializers[name].const_value = ir.Tensor(array, name=name)
    return model


MATMUL = "g (float[b, 5] x) => (float[b, 4] y) <float[5, 4] up.weight = {0}> { y = MatMul(x, up.weight) }"
GEMM = "g (float[b, 5] x) => (float[b, 4] y) <float[4, 5] up.weight = {0}> { y = Gemm<transB: int = 1>(x, up.weight) }"
TURNED = """g (float[b, 5] x) => (float[b, 4] y) <float[4, 5] up.weight = {0}> {
    turned = Transpose<perm = [1, 0]>(up.weight) y = MatMul(x, turned) }"""
WAYS = {"beside": branches_where_possible, "at": sum_at_weights}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("text", [MATMUL, GEMM, TURNED])
def test_a_linear_layer_reads_what_numpy_computes(text: str, dora: bool, way: str) -> None:
    weight = RNG.standard_normal((4, 5)).astype(np.float32)  # (out, in)
    model = filled(text, **{"up.weight": np.ascontiguousarray(weight.T) if text is MATMUL else weight})
    if text is MATMUL:
        model.graph.initializers["up.weight"].metadata_props[FOLDED_FROM] = "['up.weight']"
    adapter = an_adapter({"up": pair((4, 5), magnitude=np.arange(1.0, 5.0) if dora else None)})
    x = RNG.standard_normal((3, 5)).astype(np.float32)
    found, steps = planned(model, adapter)
    WAYS[way](model, found, steps)
    expected = x.astype(np.float64) @ changed(weight, adapter.pairs["up"]).T
    # A branch's s·B and length are rounded to the weight's type; the sum at the weight is not.
    assert np.abs(in_fp64(model, x=x) - expected).max() < (EXACT if way == "at" and not dora else 3e-6)
    assert np.abs(expected - x @ weight.T).max() > 0.1


def test_an_embedding_and_a_convolution_read_what_numpy_computes() -> None:
    table, kernel = RNG.standard_normal((7, 3)).astype(np.float32), RNG.standard_normal((2, 3, 3)).astype(np.float32)
    model = filled(
        """g (int64[b, s] ids, float[b, 3, s] x) => (float[b, s, 3] y, float[b, 2, s] z)
        <float[7, 3] words.weight = {0}, float[2, 3, 3] conv.weight = {0}> {
            y = Gather(words.weight, ids) z = Conv<pads = [1, 1]>(x, conv.weight) }""",
        **{"words.weight": table, "conv.weight": kernel},
    )
    looked_up = replace(pair((3, 7)), embedding=True)
    adapter = an_adapter({"words": looked_up, "conv": pair((2, 3, 3))})
    feeds = {"ids": np.array([[0, 6, 3]]), "x": RNG.standard_normal((1, 3, 3)).astype(np.float32)}
    found, steps = planned(model, adapter)
    sum_at_weights(model, found, steps)
    widen(model, inferred_types)
    answers = OnnxRunner(InMemoryGraph("wide", *in_memory(model)), optimise=False).run(feeds)
    rows = changed(table.T, looked_up).T[feeds["ids"]]
    assert np.abs(answers["y"] - rows).max() < EXACT
    padded = np.pad(feeds["x"][0].astype(np.float64), ((0, 0), (1, 1)))
    windows = np.stack([padded[:, place : place + 3] for place in range(3)])  # (place, in, kernel)
    convolved = np.einsum("oik,pik->op", changed(kernel, adapter.pairs["conv"]), windows)
    assert np.abs(answers["z"][0] - convolved).max() < 1e-5  # onnxruntime has no fp64 convolution


@pytest.mark.parametrize("dora", [False, True])
def test_a_block_of_a_packed_weight_changes_alone(dora: bool) -> None:
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
    told = replace(found, by_name=named, unnamed=())
    adapter = an_adapter({"k": pair((4, 5), magnitude=np.arange(1.0, 5.0) if dora else None)})
    sum_at_weights(model, told, plan.make([adapter], told.specs))
    x = RNG.standard_normal((3, 5)).astype(np.float32)
    expected = np.concatenate([weight[:2].astype(np.float64), changed(weight[2:], adapter.pairs["k"])])
    assert np.abs(in_fp64(model, x=x) - x.astype(np.float64) @ expected.T).max() < EXACT


def in_half(rounded: bool) -> tuple[Wide, Wide]:
    """What a half precision graph gives in fp64, and W + ΔW for it."""
    weight = RNG.standard_normal((4, 5)).astype(np.float16)
    text = GEMM.replace("float[", "float16[")
    model = filled(text, **{"up.weight": weight})
    adapter = an_adapter({"up": pair((4, 5))})
    found, steps = planned(model, adapter)
    sum_at_weights(model, found, steps, rounded=rounded)
    x = np.eye(5, dtype=np.float16)
    return in_fp64(model, x=x).T, changed(weight.astype(np.float64), adapter.pairs["up"])


def test_a_sum_in_half_precision_is_rounded_where_that_is_meant() -> None:
    answer, exact = in_half(rounded=False)
    assert np.abs(answer - exact).max() < EXACT
    answer, exact = in_half(rounded=True)
    assert np.array_equal(answer, exact.astype(np.float16).astype(np.float64))
    assert np.abs(answer - exact).max() > 1e-5


def layer(**weights: NDArray[Any]) -> ir.Model:
    return filled(
        """g (float[b, 32] x) => (float[b, 4] y) <float[32, 4] up.weight = {0}, float[4] up.bias = {0}> {
        product = MatMul(x, up.weight) y = Add(product, up.bias) }""",
        **weights,
    )


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("as_pairs", [False, True])
def test_beside_a_quantised_weight_stands_one_matrix(as_pairs: bool, dora: bool) -> None:
    weights = {"up.weight": RNG.standard_normal((32, 4)).astype(np.float32), "up.bias": np.ones(4, np.float32)}
    model = quantised(layer(**weights), as_pairs=as_pairs)
    adapter = an_adapter({"up": pair((4, 32), magnitude=np.arange(1.0, 5.0) if dora else None)})
    found, steps = planned(model, adapter)
    held = found.by_name["up.weight"][0].matrix.astype(np.float64)
    branches_at_quantised_weights(model, found, steps)
    x = RNG.standard_normal((3, 32)).astype(np.float32)
    expected = x.astype(np.float64) @ changed(held, adapter.pairs["up"]).T + 1
    kinds = {node.op_type for node in model.graph}
    assert kinds & {"MatMulNBits", "DequantizeLinear"}  # it is still quantised
    runner = OnnxRunner(
        InMemoryGraph("quantised", *in_memory(model)), optimise=False
    )  # else x may be rounded to 8 bits
    assert np.abs(runner.run({"x": x})["y"] - expected).max() < 1e-4
    assert np.abs(expected - 1 - x @ held.T).max() > 1
    again = quantised(layer(**weights), as_pairs=as_pairs)
    found, steps = planned(again, adapter)
    sum_at_weights(again, found, steps)
    assert np.abs(in_fp64(again, x=x) - expected).max() < 1e-6  # the scales' products are fp32's


def test_where_nothing_can_stand_beside_the_sum_is_at_the_weight() -> None:
    weight = RNG.standard_normal((4, 5)).astype(np.float32)
    text = "g (float[5, b] x) => (float[4, b] y) <float[4, 5] up.weight = {0}> { y = MatMul(up.weight, x) }"
    model = filled(text, **{"up.weight": weight})
    adapter = an_adapter({"up": pair((4, 5))})
    found, steps = planned(model, adapter)
    assert branches_where_possible(model, found, steps) == 1
    x = RNG.standard_normal((5, 3)).astype(np.float32)
    assert np.abs(in_fp64(model, x=x) - changed(weight, adapter.pairs["up"]) @ x.astype(np.float64)).max() < EXACT


def biased() -> tuple[ir.Model, Any]:
    weights = {"up.weight": RNG.standard_normal((32, 4)).astype(np.float32), "up.bias": np.ones(4, np.float32)}
    shift = np.array([1.0, 2.0, 3.0, 4.0], np.float32)
    return layer(**weights), an_adapter({"up": pair((4, 32))}, biases={"up": shift})


@pytest.mark.parametrize(("factor", "told"), [(1.0, 1.0), (1.1, 1.1), (0.0, 0.0)])
def test_strength_is_of_scales_and_shifts(factor: float, told: float) -> None:
    model, adapter = biased()
    held = model.graph.initializers["up.weight"].const_value
    assert held is not None
    weight = held.numpy().T
    found, steps = planned(model, adapter)
    sum_at_weights(model, found, at_strength(steps, factor))
    x = RNG.standard_normal((3, 32)).astype(np.float32)
    expected = x.astype(np.float64) @ changed(weight, adapter.pairs["up"], factor=told).T + 1
    expected += told * adapter.biases["up"]
    assert np.abs(in_fp64(model, x=x) - expected).max() < 1e-5 * max(1.0, told)


def test_a_whole_tensor_takes_its_place_and_stays_without_strength_beside_pairs() -> None:
    def graph() -> ir.Model:
        weights = {"up.weight": np.ones((32, 4), np.float32), "up.bias": np.ones(4, np.float32)}
        return layer(**weights)

    new = np.array([5.0, 6.0, 7.0, 8.0], np.float32)
    adapter = an_adapter({"up": pair((4, 32))}, replaced={"up.bias": new})
    model = graph()
    found, steps = planned(model, adapter)
    off = at_strength(steps, 0.0)
    assert [step.weight for step in off.steps] == ["up.bias"]
    sum_at_weights(model, found, off)
    assert np.array_equal(in_fp64(model, x=np.zeros((1, 32), np.float32))[0], new)
    alone = graph()
    _, steps = planned(alone, an_adapter({}, replaced={"up.bias": new}))
    assert at_strength(steps, 0.0).steps == ()
