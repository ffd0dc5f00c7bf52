"""Branches that read the same x multiply it by their A together, and compute what they computed apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from graphs import a_graph, an_adapter, attached, eager, exported, inputs, planned, run, stored
from numpy.typing import NDArray

from lora_export.graph import sharing
from lora_export.graph.branches import branch
from lora_export.graph.sites import find
from lora_export.lora import LoraPair

X = np.array([[1, 2, 3], [-1, 0, 2]], np.float32)
# Three layers that read x, and one that reads what the first makes of it.
LAYERS = """
    g (float[2,3] x) => (float[2,2] q, float[2,2] k, float[2,2] v, float[2,2] o)
    <float[3,2] a.weight = {1,2,3,4,5,6}, float[3,2] b.weight = {6,5,4,3,2,1}, float[3,2] c.weight = {1,0,0,1,1,1},
     float[2,2] d.weight = {2,0,0,2}>
    { q = MatMul(x, a.weight)
      k = MatMul(x, b.weight)
      v = MatMul(x, c.weight)
      o = MatMul(q, d.weight) }"""


def pair(rank: int, seed: int, *, magnitude: bool = False, inner: int = 3) -> LoraPair:
    """Of small integers, so that sums are exact; other ranks and scales than its neighbours'."""
    rng = np.random.default_rng(seed)
    a, b = rng.integers(1, 4, (rank, inner)), rng.integers(1, 4, (2, rank))
    lengths = np.array([2, 3], np.float32) if magnitude else None
    return LoraPair(a.astype(np.float32), b.astype(np.float32), 1.0 + seed, magnitude=lengths)


PAIRS = {"a": pair(1, 0), "b": pair(3, 1), "c": pair(2, 2), "d": pair(2, 3, inner=2)}


def woven(pairs: dict[str, LoraPair], body: str = LAYERS, *, apart: bool = False) -> ir.Model:
    model = a_graph(body)
    with pytest.MonkeyPatch.context() as patch:
        if apart:
            patch.setattr(sharing, "MOST_RANKS", 0)
        branch(model, *planned(model, an_adapter(pairs)))
    return model


def kinds(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def answers(model: ir.Model) -> Mapping[str, NDArray[Any]]:
    return run(model, x=X)


def test_layers_of_one_input_multiply_it_by_their_a_together():
    together, apart = woven(PAIRS), woven(PAIRS, apart=True)
    assert kinds(apart) == {"MatMul": 4 + 8, "Add": 4}
    assert kinds(together) == {"MatMul": 4 + 1 + 3 + 2, "Add": 4, "Concat": 1 + 3}  # d reads another x
    before, after = answers(apart), answers(together)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    x_a = X @ PAIRS["a"].a.T @ (PAIRS["a"].b.T * PAIRS["a"].scale)
    assert np.array_equal(after["q"], X @ stored(together, "a.weight") + x_a)


def test_each_layer_keeps_its_a_and_b_under_its_name():
    model = woven(PAIRS)
    for module, there in PAIRS.items():
        assert np.array_equal(stored(model, f"{module}.lora_A.weight"), there.a.T)
        assert np.array_equal(stored(model, f"{module}.lora_B.weight"), there.b.T * np.float32(there.scale))
    assert find(model).notes == ()  # whoever looks for the layers is not told of these


def test_dora_rescales_its_own_layer_and_no_other():
    pairs = {**PAIRS, "b": pair(3, 1, magnitude=True)}
    together, apart = woven(pairs), woven(pairs, apart=True)
    assert kinds(together)["MatMul"] == kinds(apart)["MatMul"] - 2
    before, after = answers(apart), answers(together)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert not np.array_equal(after["k"], answers(woven(PAIRS))["k"])


def test_ranks_that_are_many_stay_apart():
    wide = {"a": pair(33, 0), "b": pair(32, 1)}
    assert kinds(woven(wide)) == kinds(woven(wide, apart=True))
    narrower = {"a": pair(32, 0), "b": pair(32, 1)}
    assert kinds(woven(narrower))["MatMul"] == kinds(woven(narrower, apart=True))["MatMul"] - 1


def test_other_dtypes_and_turned_inputs_stay_apart():
    halves = LAYERS.replace("k = MatMul(x, b.weight)", "h = Cast <to = 10> (x)\n k = MatMul(h, b.weight)")
    halves = halves.replace("float[3,2] b", "float16[3,2] b").replace("float[2,2] k", "float16[2,2] k")
    turned = LAYERS.replace("v = MatMul(x, c.weight)", "t = Transpose(x)\n v = Gemm <transA = 1> (t, c.weight)")
    for body in (halves, turned):
        together, apart = woven(PAIRS, body), woven(PAIRS, body, apart=True)
        assert kinds(together)["MatMul"] == kinds(apart)["MatMul"] - 1  # the two others share
        before, after = answers(apart), answers(together)
        assert all(np.array_equal(before[name], after[name]) for name in before)


def test_a_llama_with_shared_products_is_pytorchs():
    there, feeds = exported("llama"), inputs("llama")
    model = there.graph.clone()
    rng = np.random.default_rng(0)
    pairs = {
        spec.name.removesuffix(".weight"): LoraPair(
            rng.standard_normal((4, spec.shape[1])).astype(np.float32) / 8,
            rng.standard_normal((spec.shape[0], 4)).astype(np.float32) / 8,
            1.5,
        )
        for spec in find(model).specs
        if "_proj" in spec.name
    }
    adapter = an_adapter(pairs)
    base = eager(there.module, feeds)
    branch(model, *planned(model, adapter))
    assert kinds(model)["Concat"] >= 2 + 5
    wanted = eager(attached(there.module, adapter), feeds)
    got = run(model, **{name: array.numpy() for name, array in feeds.items()})
    for name, array in wanted.items():
        assert np.abs(array - base[name]).max() > 1e-2
        np.testing.assert_allclose(got[name], array, atol=2e-5)
