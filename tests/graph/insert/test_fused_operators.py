"""Fused operators read W + A·B in place of W, and W itself without an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from lora_export import plan
from lora_export.errors import InputRefused
from lora_export.formats import onnx_adapter
from lora_export.graph.find_sites import Sites, find_sites
from lora_export.graph.insert.adapter_inputs import checked_contract, contract_dora_factors, insert_inputs
from lora_export.graph.insert.adapter_nodes import insert_nodes
from lora_export.graph.insert.adapter_rows import insert_rows
from lora_export.graph.merge.fold import fold_graph
from lora_export.graph.onnx_file.reading import load_graph
from lora_export.graph.onnx_file.writing import save_graph
from lora_export.lora import Adapter, LoraPair
from lora_export.plan import Layout
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.weights.checkpoint import Checkpoint, open_checkpoint
from support.cli import Capture, answer, call
from support.graphs import Arrays, an_adapter, run, stored
from support.handmade import base_file, peft_adapter
from support.one_weight_graphs import WEIGHT, X, attention, attention_graph, graph_reading
from support.small_graphs import DELTA, PAIR

HIDDEN, HEADS = 64, 4


RNG = np.random.default_rng(1)


TOKENS = RNG.normal(size=(2, 5, HIDDEN)).astype(np.float32)


def a_pair(rank: int, *, dora: bool = False) -> LoraPair:
    a, b = 0.2 * RNG.normal(size=(rank, HIDDEN)), 0.2 * RNG.normal(size=(HIDDEN, rank))
    return LoraPair(a=a, b=b, scale=0.5, magnitude=RNG.uniform(4, 12, HIDDEN) if dora else None)


# DoRA for q, LoRA for v, nothing for k.
PAIRS = {"q": a_pair(3, dora=True), "v": a_pair(2)}


OTHERS = {"k": a_pair(2), "v": a_pair(4)}


@pytest.fixture
def packed(tmp_path: Path) -> tuple[ir.Model, Checkpoint, dict[str, NDArray[Any]]]:
    """An Attention of q, k and v in one matrix, the checkpoint that names them, and their weights (out, in)."""
    model = attention_graph(HIDDEN, HEADS)
    whole = stored(model, "w").T.copy()
    weights = {name: whole[HIDDEN * at : HIDDEN * (at + 1)] for at, name in enumerate("qkv")}
    tensors = {f"{name}.weight": weight for name, weight in weights.items()}
    return model, open_checkpoint(base_file(tmp_path / "base.safetensors", tensors)), weights


def expected(weights: dict[str, NDArray[Any]], pairs: dict[str, LoraPair]) -> NDArray[Any]:
    changed = {name: weight.astype(np.float64) for name, weight in weights.items()}
    for name, pair in pairs.items():
        changed[name] = changed[name] + pair.delta()
        if pair.magnitude is not None:
            changed[name] *= (pair.magnitude / np.linalg.norm(changed[name], axis=1))[:, None]
    return attention(TOKENS, *changed.values(), heads=HEADS)


def assert_computes(outputs: Arrays, weights: dict[str, NDArray[Any]], pairs: dict[str, LoraPair]) -> None:
    np.testing.assert_allclose(outputs["y"], expected(weights, pairs), rtol=1e-4, atol=1e-3)
    assert np.abs(expected(weights, pairs) - expected(weights, {})).max() > 0.5


def test_attention_reads_changed_weights_with_nodes(packed: Any) -> None:
    model, checkpoint, weights = packed
    found = find_sites(model, checkpoint)
    before = stored(model, "w").tobytes()
    insert_nodes(model, found, plan.make([an_adapter(PAIRS)], found.specs))
    assert stored(model, "w").tobytes() == before
    assert {"q.lora_A.weight", "q.lora_B.weight", "q.lora_magnitude_vector.weight"} <= set(model.graph.initializers)
    assert_computes(run(model, x=TOKENS), weights, PAIRS)
    # The weights are found behind the inserted nodes, and another adapter can be merged into them.
    again = find_sites(model, checkpoint)
    assert {(site.name, site.block) for site in again.linear if site.block} == {
        (site.name, site.block) for site in found.linear
    }
    fold_graph(model, again, plan.make([an_adapter({"k": OTHERS["k"]})], again.specs))
    assert_computes(run(model, x=TOKENS), weights, {**PAIRS, "k": OTHERS["k"]})


def test_attention_takes_adapters_as_inputs_one_after_another(packed: Any, tmp_path: Path) -> None:
    model, checkpoint, weights = packed
    base = run(model, x=TOKENS)["y"]
    found = find_sites(model, checkpoint)
    names = [f"{name}.weight" for name in "qkv"]
    contract = insert_inputs(model, found, names, dora=["q.weight"])
    path = tmp_path / "open.onnx"
    save_graph(model, tmp_path, path.name)
    assert OnnxRunner(path).run({"x": TOKENS})["y"].tobytes() == base.tobytes()
    for pairs in (PAIRS, OTHERS):
        adapter = an_adapter(pairs, sha256="1")
        steps = plan.make([adapter], [place.spec for place in contract.places])
        values = onnx_adapter.input_values(
            contract, steps, adapter.name, contract_dora_factors(model, contract, steps, adapter.name)
        )
        onnx_adapter.write(tmp_path / "a.onnx_adapter", values, contract, sha256="1")
        assert_computes(OnnxRunner(path).with_adapter(tmp_path / "a.onnx_adapter").run({"x": TOKENS}), weights, pairs)
    assert checked_contract(load_graph(path), path).places == contract.places
    other = load_graph(path)
    other.graph.initializers["w"].const_value = ir.Tensor(stored(other, "w") + np.float32(1), name="w")
    with pytest.raises(InputRefused, match=r"q.weight: differs from the weight for which"):
        checked_contract(other, path)


def in_rows(model: ir.Model, found: Sites, *adapters: Adapter, batch: str = "B") -> None:
    insert_rows(model, found, plan.make(adapters, found.specs, one_at_a_time=True), batch=batch)


def test_rows_of_attention_are_refused_with_advice(packed: Any) -> None:
    model, checkpoint, _ = packed
    with pytest.raises(InputRefused, match=r"read by Attention, .*Merge the adapter.*before its nodes were fused"):
        in_rows(model, find_sites(model, checkpoint), an_adapter(PAIRS))


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ('"Tanh"', np.tanh),
        ('"Relu"', lambda y: np.maximum(y, 0)),
        ('"LeakyRelu", activation_alpha = 0.25', lambda y: np.where(y < 0, y / 4, y)),
    ],
)
def test_rows_of_a_fused_product_have_their_own_adapter(activation: str, function: Any) -> None:
    body = f"y = com.microsoft.FusedGemm <transB = 1, activation = {activation}> (x, W)"
    model, found = planned_on(body, Layout.OUT_IN)
    base, other = run(model, x=-X)["y"], LoraPair(a=PAIR.a, b=-PAIR.b, scale=3.0)
    in_rows(model, found, an_adapter({"m": PAIR}, name="one"), an_adapter({"m": other}, name="two"), batch="N")
    output = run(model, x=-X, adapter_ids=np.array([2, 1]))["y"]
    changed = np.stack([-X[0] @ (WEIGHT + other.delta()).T, -X[1] @ (WEIGHT + DELTA).T])
    np.testing.assert_allclose(output, function(changed), rtol=1e-5)
    assert run(model, x=-X, adapter_ids=np.array([0, 0]))["y"].tobytes() == base.tobytes()


def test_an_unknown_activation_is_refused_with_advice() -> None:
    model, found = planned_on('y = com.microsoft.FusedGemm <transB = 1, activation = "Swishy"> (x, W)', Layout.OUT_IN)
    with pytest.raises(InputRefused, match=r"read by FusedGemm, .*Merge the adapter"):
        in_rows(model, found, an_adapter({"m": PAIR}), batch="N")


@pytest.mark.parametrize("mode", ["nodes", "inputs"])
def test_command_verifies_attention_with_adapter(packed: Any, tmp_path: Path, mode: str, capsys: Capture) -> None:
    model, checkpoint, weights = packed
    save_graph(model, tmp_path, "base.onnx")
    plain = {name: LoraPair(a=pair.a, b=pair.b, scale=1.0) for name, pair in PAIRS.items()}
    peft_adapter(
        tmp_path / "a", {name: (pair.a, pair.b) for name, pair in plain.items()},
        rank_pattern={"v": 2}, alpha_pattern={"v": 2},
    )  # fmt: skip
    out = tmp_path / "out.onnx"
    arguments = ("-a", tmp_path / "a", "--base", checkpoint.path, "--lora", mode, "-o", out)
    code, document = answer(capsys, "onnx", tmp_path / "base.onnx", *arguments)
    assert (code, document["proof"]["outcome"], document.get("bits_of_base", True)) == (0, "same", True)
    runner = OnnxRunner(out)
    runner = runner.with_adapter(tmp_path / "a.onnx_adapter") if mode == "inputs" else runner
    assert_computes(runner.run({"x": TOKENS}), weights, plain)
    assert call("onnx", tmp_path / "base.onnx", *arguments[:-4], "--lora", "rows", "-o", tmp_path / "rows.onnx") == 3


FUSED = {
    "FusedMatMul": ("y = com.microsoft.FusedMatMul <alpha = 0.5> (x, W)", Layout.IN_OUT, 0.5),
    "FusedMatMul, transB": ("y = com.microsoft.FusedMatMul <transB = 1> (x, W)", Layout.OUT_IN, 1),
    "FusedMatMul behind Transpose": ("t = Transpose(W) y = com.microsoft.FusedMatMul (x, t)", Layout.OUT_IN, 1),
    "FusedGemm": (
        'y = com.microsoft.FusedGemm <transB = 1, activation = "LeakyRelu", activation_alpha = 1.0> (x, W)',
        Layout.OUT_IN, 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("body", "layout", "factor"), FUSED.values(), ids=FUSED.keys())
@pytest.mark.parametrize("dora", [False, True])
def test_fused_product_reads_changed_weight(body: str, layout: Layout, factor: float, dora: bool) -> None:
    pair = LoraPair(a=PAIR.a, b=PAIR.b, scale=2.0, magnitude=np.float32([3, 5])) if dora else PAIR
    adapter = an_adapter({"m": pair})
    changed = WEIGHT + DELTA
    if dora:
        changed = np.float32([[3], [5]]) * changed / np.linalg.norm(changed, axis=1, keepdims=True)
    model, found = planned_on(body, layout)
    insert_nodes(model, found, plan.make([adapter], found.specs))
    np.testing.assert_allclose(run(model, x=X)["y"], factor * X @ changed.T, rtol=1e-5)
    model, found = planned_on(body, layout)
    contract = insert_inputs(model, found, ["m.weight"], dora=["m.weight"])
    values = parameters(model, contract, adapter)
    np.testing.assert_allclose(run(model, x=X, **values)["y"], factor * X @ changed.T, rtol=1e-5)
    assert run(model, x=X)["y"].tobytes() == run(planned_on(body, layout)[0], x=X)["y"].tobytes()


def planned_on(body: str, layout: Layout) -> tuple[ir.Model, Sites]:
    model = graph_reading(body, layout)
    return model, find_sites(model)


def parameters(model: ir.Model, contract: Any, adapter: Adapter) -> dict[str, NDArray[Any]]:
    steps = plan.make([adapter], [place.spec for place in contract.places])
    return onnx_adapter.input_values(
        contract, steps, adapter.name, contract_dora_factors(model, contract, steps, adapter.name)
    )
