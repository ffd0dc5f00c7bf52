"""LoKr's two factors beside a weight, by hand. `test_scales` has factors of inputs."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from lora_export.errors import InputRefused
from lora_export.lora import LoraPair
from lora_export.pairs.structured import KroneckerPair
from support.graphs import a_graph, an_adapter, run, stored
from support.insertion import with_nodes

W1, W2 = np.float32([[1, 2], [0, -1], [3, 1]]), np.float32([[1, 0, 2], [2, -1, 1]])
LOKR = KroneckerPair({"w1": W1, "w2": W2}, 0.5)
DELTA = np.kron(W1, W2) / 2  # (6, 6)
WEIGHT = np.arange(36, dtype=np.float32).reshape(6, 6) % 5
X = np.arange(24, dtype=np.float32).reshape(2, 2, 6) % 7 - 3
BODIES = {
    "MatMul": ("float[N,L,6] x", "[n] y = MatMul(x, m.weight)", X, 1.0),
    "Gemm with alpha and a bias": ("float[N,6] x", "[n] y = Gemm <alpha = 0.5> (x, m.weight, m.bias)", X[0], 0.5),
}


def graph_of(shape: str, body: str) -> str:
    values = ",".join(map(str, WEIGHT.T.reshape(-1).astype(int)))
    stored = f"float[6,6] m.weight = {{{values}}}, float[6] m.bias = {{1,2,3,4,5,6}}"
    return f"g ({shape}) => (float[N,M] y) <{stored}> {{ {body} }}"


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("others", [{}, {"two": LoraPair(a=np.ones((1, 6)), b=np.ones((6, 1)), scale=1.0)}])
def test_nodes_multiply_by_both_factors(name, others):
    shape, body, x, alpha = BODIES[name]
    model = a_graph(graph_of(shape, body).replace("float[N,M] y", "float[N,L,6] y" if x.ndim == 3 else "float[N,6] y"))
    with_nodes(model, an_adapter({"m": LOKR}), *(an_adapter({"m": pair}, name=name) for name, pair in others.items()))
    total = WEIGHT + DELTA + (1 if others else 0)
    assert np.array_equal(run(model, x=x)["y"], alpha * x @ total.T + (np.arange(6) + 1 if "Gemm" in name else 0))
    label = ".default" if others else ""
    assert np.array_equal(stored(model, f"m.lokr_w1{label}.weight"), W1)
    assert np.array_equal(stored(model, f"m.lokr_w2{label}.weight"), W2.T / 2)


CONVOLUTIONS = {  # attributes, the kernel, the sizes of an input's places
    "one dimension": ("strides = [2], dilations = [2], pads = [1, 2]", (2,), (9,)),
    "two dimensions": ("strides = [1, 2], pads = [1, 0, 0, 1]", (3, 2), (5, 6)),
    "three dimensions, a kernel of 1": ("", (1, 1, 1), (2, 3, 2)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("flat", [False, True], ids=["a kernel in w2", "a matrix for the kernel"])
def test_a_convolution_is_one_by_the_second_factor(name: str, flat: bool) -> None:
    attributes, kernel, places = CONVOLUTIONS[name]
    rng = np.random.default_rng(0)
    w2 = rng.integers(-2, 3, (2, 3, *kernel)).astype(np.float32)
    change = np.einsum("ab,cd...->acbd...", W1, w2).reshape(6, 6, *kernel) / 2
    pair = KroneckerPair({"w1": W1, "w2": w2}, 0.5)
    if flat:
        pair = KroneckerPair({"w1": W1, "w2": w2.reshape(2, -1)}, 0.5).with_kernel(kernel)
    weight = rng.integers(-2, 3, change.shape).astype(np.float32)
    x = rng.integers(-2, 3, (2, 6, *places)).astype(np.float32)
    expected, model = (_convolution(attributes, weight + other, len(places)) for other in (change, 0))
    with_nodes(model, an_adapter({"m": pair}))
    assert np.array_equal(run(model, x=x)["y"], run(expected, x=x)["y"])
    assert stored(model, "m.lokr_w2.weight").shape == w2.shape and "m.lora_A.weight" not in model.graph.initializers


def _convolution(attributes: str, weight: np.ndarray, places: int) -> ir.Model:
    sizes, values = ",".join(map(str, weight.shape)), ",".join(map(str, weight.reshape(-1)))
    outer = ",".join(f"P{number}" for number in range(places))
    inner = ",".join(f"Q{number}" for number in range(places))
    return a_graph(f"""
        g (float[N,6,{outer}] x) => (float[N,6,{inner}] y)
        <float[{sizes}] m.weight = {{{values}}}, float[6] m.bias = {{1,2,3,4,5,6}}>
        {{ [n] y = Conv {f"<{attributes}>" if attributes else ""} (x, m.weight, m.bias) }}""")


@pytest.mark.parametrize("strength", [1, -2, 0])
def test_each_run_chooses_the_strength(strength):
    model = a_graph(graph_of("float[N,6] x", "[n] y = MatMul(x, m.weight)").replace("float[N,M] y", "float[N,6] y"))
    with_nodes(model, an_adapter({"m": LOKR}), strength_input=True)
    output = run(model, x=X[0], adapter_strengths=np.float32([strength]))["y"]
    assert np.array_equal(output, X[0] @ (WEIGHT + strength * DELTA).T)


def test_a_transposed_input_is_refused():
    body = "[n] y = Gemm <transA = 1> (x, m.weight, m.bias)"
    with pytest.raises(InputRefused, match=r"LoKr's factors cannot be beside Gemm: its input .* is transposed"):
        with_nodes(a_graph(graph_of("float[6,N] x", body)), an_adapter({"m": LOKR}))


@pytest.mark.parametrize(
    ("shapes", "is_cheap"), [(((3, 2), (2, 3)), True), (((2, 2), (2, 2)), False), (((1, 6), (6, 1)), False)]
)
def test_factors_are_cheap_where_they_cost_less_than_the_weight(shapes, is_cheap):
    pair = KroneckerPair(dict(zip(("w1", "w2"), map(np.ones, shapes), strict=True)), 1.0)
    assert pair.is_cheap is is_cheap
    assert not pair.part(np.array([0]), None).is_cheap
