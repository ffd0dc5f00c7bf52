"""Adapters folded into a graph in memory: W' = W + ΔW, and all other tensors keep their bytes."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxscript.optimizer
import pytest
import torch

from lora_export import plan
from lora_export.graph.find_sites import find_sites
from lora_export.graph.merge.fold import fold_graph
from lora_export.lora import LoraPair
from support.exported_models import LLAMA, assert_computes, eager, exported, inputs, with_changes
from support.graphs import a_graph, an_adapter, contents, run, stored
from support.small_graphs import GEMM, LINEAR, PAIR, folded, random_adapter


def test_matmul_weight_gains_transposed_change() -> None:
    model = a_graph(LINEAR)
    results = folded(model, an_adapter({"m": PAIR}))
    assert np.array_equal(stored(model, "m.weight"), [[1 + 2, 4 + 4], [2, 5], [3 - 2, 6 - 4]])
    assert [(r.weight, r.changed, r.elements, r.retention, r.noise) for r in results] == [("m.weight", 4, 6, 1, 0)]
    assert results[0].relative_change == pytest.approx(np.sqrt(40 / 91))


def test_gemm_weight_gains_change() -> None:
    model = a_graph(GEMM)
    folded(model, an_adapter({"m": PAIR}))
    assert np.array_equal(stored(model, "m.weight"), [[3, 2, 1], [8, 5, 2]])


def test_weight_behind_transpose_gains_change() -> None:
    model = a_graph("""
        g (float[N,3] x) => (float[N,2] y)
        <float[2,3] m.weight = {1,2,3,4,5,6}>
        { [t] w = Transpose <perm = [1, 0]> (m.weight)
          [n] y = MatMul(x, w) }""")
    folded(model, an_adapter({"m": PAIR}))
    assert np.array_equal(stored(model, "m.weight"), [[3, 2, 1], [8, 5, 2]])
    assert np.array_equal(run(model, x=np.float32([[1, 1, 1]]))["y"], [[6, 15]])


def test_adapters_are_summed_at_their_strengths() -> None:
    model = a_graph(GEMM)
    one, two = an_adapter({"m": PAIR}, name="one"), an_adapter({"m": PAIR}, name="two")
    folded(model, one, two, strengths=[1.0, -2.0])
    assert np.array_equal(stored(model, "m.weight"), [[1 - 2, 2, 3 + 2], [4 - 4, 5, 6 + 4]])


def test_other_initializers_keep_their_bytes() -> None:
    model = a_graph(LINEAR)
    before = contents(model)
    folded(model, an_adapter({"m": PAIR}))
    after = contents(model)
    assert before.pop("m.weight") != after.pop("m.weight")
    assert before == after


def test_bias_is_changed() -> None:
    model = a_graph(LINEAR)
    shift = np.float32([1, 2])
    results = folded(model, an_adapter({"m": PAIR}, biases={"m": shift}))
    assert np.array_equal(stored(model, "m.bias"), [11, 22])
    assert [result.weight for result in results] == ["m.weight", "m.bias"]


def test_whole_tensor_replaces_weight_in_its_stored_layout() -> None:
    model = a_graph(LINEAR.replace("m.weight", "val_1"), modules={"n": "m"})
    whole = np.float64([[1, 2, 3], [4, 5, 7]])  # (out, in), the layout of the model
    folded(model, an_adapter({}, replaced={"m.weight": whole, "other.bias": np.float32([1, 2])}))
    assert np.array_equal(stored(model, "val_1"), [[1, 4], [2, 5], [3, 7]])
    assert stored(model, "val_1").dtype == np.float32
    assert np.array_equal(stored(model, "other.bias"), [1, 2])


def test_whole_tensor_in_fp64_is_rounded_as_pytorch_does() -> None:
    model = a_graph(GEMM)
    model.graph.initializers["m.weight"].const_value = ir.Tensor(np.ones((2, 3), ml_dtypes.bfloat16), name="m.weight")
    whole = np.full((2, 3), 1 + 2**-8 + 2**-40)  # a tie of bfloat16 once it is rounded to fp32
    folded(model, an_adapter({}, replaced={"m.weight": whole}))
    expected = torch.from_numpy(whole).to(torch.bfloat16).float().numpy()
    assert np.array_equal(stored(model, "m.weight").astype(np.float32), expected)


def test_whole_conv1d_weight_is_stored_unchanged() -> None:
    model = a_graph(LINEAR)
    whole = np.arange(6, dtype=np.float32).reshape(3, 2)  # (in, out), the layout of transformers' Conv1D
    folded(model, an_adapter({}, replaced={"m.weight": whole}))
    assert np.array_equal(stored(model, "m.weight"), whole)


def test_sum_is_rounded_once_to_dtype_of_graph() -> None:
    model = a_graph(GEMM)
    weight = np.array([[1, 2, 3], [4, 5, 256]]).astype(ml_dtypes.bfloat16)
    model.graph.initializers["m.weight"].const_value = ir.Tensor(weight, name="m.weight")
    results = folded(model, an_adapter({"m": LoraPair(a=[[0, 0, 1]], b=[[0], [1]], scale=1.0)}))
    assert stored(model, "m.weight").dtype == ml_dtypes.bfloat16
    assert stored(model, "m.weight")[1, 2] == 256  # 257 is halfway between 256 and 258, and 256 is even
    assert (results[0].changed, results[0].retention) == (0, 0)


@pytest.mark.parametrize("text", [GEMM, GEMM.replace("<transB = 1> ", "").replace("2,3", "3,2")], ids=["out", "in"])
def test_dora_scales_each_output_to_its_magnitude(text: str) -> None:
    pair = LoraPair(a=PAIR.a, b=PAIR.b, scale=1.0, magnitude=[3, 0.5])
    model = a_graph(text)
    before = stored(model, "m.weight").astype(np.float64)
    (result,) = folded(model, an_adapter({"m": pair}))
    view = before if "transB" in text else before.T
    total = view + pair.delta()
    expected = total * (pair.magnitude / np.linalg.norm(total, axis=1))[:, None]
    after = stored(model, "m.weight")
    np.testing.assert_allclose(after if "transB" in text else after.T, expected, rtol=2e-7)
    assert result.retention == pytest.approx(1)
    relative = np.linalg.norm(expected - view) / np.linalg.norm(view)
    assert result.relative_change == pytest.approx(relative, rel=1e-6) and relative > 0.1


@pytest.mark.parametrize("magnitude", [None, [2, 0.5]])
def test_embedding_and_convolution_are_folded(magnitude: list[float] | None) -> None:
    # The test sets the layouts of the specs.
    model = a_graph(
        """g (int64[n] ids, float[b, 3, 4] x) => (float[n, 2] rows, float[b, 2, l] y)
        <float[5, 2] words.weight = {1, 2, 3, 4, 5, 6, 7, 8, 9, 1},
         float[2, 3, 2] c.weight = {1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3}>
        { rows = Gather(words.weight, ids)  y = Conv(x, c.weight) }"""
    )
    rng = np.random.default_rng(0)
    words = LoraPair(
        a=rng.normal(size=(1, 5)), b=rng.normal(size=(2, 1)), scale=0.5, magnitude=magnitude, embedding=True
    )
    kernel = LoraPair(a=rng.normal(size=(2, 3, 2)), b=rng.normal(size=(2, 2, 1)), scale=0.5, magnitude=magnitude)
    before = {name: stored(model, name).astype(np.float64) for name in ("words.weight", "c.weight")}
    layouts = {"words.weight": plan.Layout.EMBEDDING, "c.weight": plan.Layout.OUT_IN}
    found = find_sites(model)
    specs = [dataclasses.replace(spec, layout=layouts[spec.name]) for spec in found.specs]
    fold_graph(model, found, plan.make([an_adapter({"words": words, "c": kernel})], specs))
    for name, pair in (("words.weight", words), ("c.weight", kernel)):
        total = (before[name].T if pair.embedding else before[name]) + pair.delta()
        if magnitude:
            length = np.linalg.norm(total.reshape(2, -1), axis=1)
            total *= (np.array(magnitude) / length).reshape(2, *[1] * (total.ndim - 1))
        np.testing.assert_allclose(stored(model, name), total.T if pair.embedding else total, rtol=3e-7)


def test_pair_is_added_to_whole_tensor_of_adapter() -> None:
    model = a_graph(GEMM)
    whole = np.full((2, 3), 100, np.float32)
    (result,) = folded(model, an_adapter({"m": PAIR}, replaced={"m.weight": whole}))
    assert stored(model, "m.weight").tolist() == (whole + PAIR.delta()).tolist()
    assert result.retention == 1


@pytest.mark.parametrize("name", ["encoder", "bert", LLAMA])
def test_folded_export_whose_equal_tensors_are_one_equals_pytorch(name: str) -> None:
    made = exported(name)
    adapter, changes = random_adapter(made.graph)
    base, before = made.graph.clone(), {key: value.clone() for key, value in made.module.state_dict().items()}
    onnxscript.optimizer.optimize_ir(made.graph)
    assert len(made.graph.graph.initializers) < len(base.graph.initializers)
    folded(made.graph, adapter)
    assert_computes(made.graph, base, with_changes(made.module, changes), name)
    assert all(torch.equal(value, before[key]) for key, value in made.module.state_dict().items())


def test_layer_before_batch_norm_equals_pytorch() -> None:
    made = exported("mlp")
    adapter, changes = random_adapter(made.graph)
    folded(made.graph, adapter)
    feeds = inputs("mlp", 5, seed=2)
    expected = eager(with_changes(made.module, changes), feeds)
    np.testing.assert_allclose(run(made.graph, x=feeds["x"].numpy())["output_0"], expected["output_0"], rtol=1e-4)


def test_replaced_head_and_bias_equal_pytorch() -> None:
    made = exported("bert")
    weight, bias = np.ones((3, 16), np.float32), np.float32([1, 2, 3])
    folded(made.graph, an_adapter({}, replaced={"classifier.weight": weight, "classifier.bias": bias}))
    reference = with_changes(made.module, {})
    with torch.no_grad():
        reference.get_parameter("classifier.weight").copy_(torch.from_numpy(weight))
        reference.get_parameter("classifier.bias").copy_(torch.from_numpy(bias))
    feeds = inputs("bert", 3, 5, seed=2)
    output = run(made.graph, **{key: value.numpy() for key, value in feeds.items()})
    np.testing.assert_allclose(output["logits"], eager(reference, feeds)["logits"], rtol=1e-5, atol=1e-5)
