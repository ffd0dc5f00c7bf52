"""The values of a graph that are a module's input and output."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest

from lora_export.graph.find_sites import find_sites
from lora_export.verification.diagnose.graph_taps import Tap, expose, find_taps
from support.graphs import a_graph

WEIGHTS = "float[2,2] m.weight = {1,2,3,4}, float[2] m.bias = {5,6}, float[2,1] A = {1,0}, float[1,2] B = {0,1}"
BEFORE = "float[2,2] n.weight = {1,2,3,5}, float[2,1] n.lora_A.weight = {1,0}, float[1,2] n.lora_B.weight = {0,1}"


def taps_of(body: str, *, biased: bool = True) -> list[Tap]:
    model = a_graph(f"g (float[N,2] x, float[N,2] other) => (float[N,2] y) <{WEIGHTS}, {BEFORE}> {{ {body} }}")
    taps = find_taps(model, find_sites(model), ["x", "other"], {"n.weight": False, "m.weight": biased})
    return [tap for tap in taps if tap.name == "m.weight"]


@pytest.mark.parametrize(
    ("body", "output"),
    [
        ("h = MatMul(x, m.weight) y = Relu(h)", "h"),
        ("h = MatMul(x, m.weight) k = Add(h, m.bias) y = Relu(k)", "k"),
        ("h = MatMul(x, m.weight) a = MatMul(x, A) b = MatMul(a, B) k = Add(h, b) y = Relu(k)", "k"),
        ("h = MatMul(x, m.weight) y = Add(h, other)", "h"),
        ("h = MatMul(x, m.weight) a = MatMul(other, A) b = MatMul(a, B) y = Add(h, b)", "h"),
        (
            "n = MatMul(other, n.weight) a = MatMul(other, n.lora_A.weight) b = MatMul(a, n.lora_B.weight) "
            "r = Add(n, b) h = MatMul(x, m.weight) y = Add(h, r)",
            "h",
        ),
        (
            "h = MatMul(x, m.weight) n = MatMul(other, n.weight) a = MatMul(other, n.lora_A.weight) "
            "b = MatMul(a, n.lora_B.weight) r = Add(n, b) y = Add(h, r)",
            "h",
        ),
    ],
    ids=["product", "bias", "branch", "residual", "branch of another input", "residual with a branch", "later one"],
)
def test_output_of_a_module_includes_its_bias_and_branch(body: str, output: str) -> None:
    (tap,) = taps_of(body)
    assert (tap.name, tap.x, tap.y, tap.has_bias) == ("m.weight", "x", output, True)


def test_constant_is_no_bias_of_a_module_without_one() -> None:
    (tap,) = taps_of("h = MatMul(x, m.weight) y = Add(h, m.bias)", biased=False)
    assert tap.y == "h"


def test_exposed_graph_returns_the_inner_values() -> None:
    model = a_graph(
        f"g (float[N,2] x) => (float[N,2] y) <{WEIGHTS}> {{ r = Relu(x) h = MatMul(r, m.weight) y = Neg(h) }}"
    )
    exposed = expose(model, find_taps(model, find_sites(model), ["x"], {"m.weight": False}))
    assert exposed.outputs == ("r", "h")
    session = onnxruntime.InferenceSession(exposed.message, providers=["CPUExecutionProvider"])
    r, h = session.run(["r", "h"], {"x": np.array([[-1, 2]], np.float32)})
    assert r.tolist() == [[0, 2]] and h.tolist() == [[6, 8]]
