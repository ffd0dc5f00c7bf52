"""Fused operators read W + A·B in place of W, and W itself without an adapter."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import peft
import pytest
import torch
from numpy.typing import NDArray

import lora_export as le
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
from support.cli import Capture, answer
from support.exporters import checkpoint_of, model_of, token_inputs, torchscript
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


def a_wide_pair() -> LoraPair:
    """For q, k and v in one matrix."""
    return LoraPair(a=0.2 * RNG.normal(size=(2, HIDDEN)), b=0.2 * RNG.normal(size=(3 * HIDDEN, 2)), scale=1.0)


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


# Of an Attention: its further inputs as the graph declares them and as it passes them, their values, and attributes.
ATTENTIONS: dict[str, tuple[str, str, dict[str, NDArray[Any]], str]] = {
    "": ("", "", {}, ""),
    "lengths": (", int32[B] m", ", m", {"m": np.int32([5, 3])}, ""),
    "mask": (", int32[B,S] m", ", m", {"m": np.int32([[1] * 5, [0, 0, 1, 1, 1]])}, ", mask_filter_value = -100.0"),
    "causal": ("", "", {}, ", unidirectional = 1"),
    "past": (
        f", float[2,B,{HEADS},P,16] p", ", , p", {"p": RNG.normal(size=(2, 2, HEADS, 3, 16)).astype(np.float32)},
        ", unidirectional = 1, scale = 0.3",
    ),
    "added": (", float[B,H,S,S] a", ", , , a", {"a": RNG.normal(size=(2, HEADS, 5, 5)).astype(np.float32)}, ""),
    "two sizes": (", int32[B] m", ", m", {"m": np.int32([5, 3])}, ", qkv_hidden_sizes = [64, 64, 128]"),
}  # fmt: skip


def an_attention(kind: str, weight: NDArray[Any]) -> tuple[ir.Model, Arrays]:
    """A graph of Attention with this weight (in, out), and its inputs. With a past, it returns the next one."""
    declared, passed, given, attributes, *_ = ATTENTIONS.get(kind) or WHOLE[kind]
    new, returned = (f", float[2,B,{HEADS},T,16] next", ", next") if "p" in given else ("", "")
    model = ir.from_onnx_text(f"""
        <ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
        g (float[B,S,{HIDDEN}] x{declared}) => (float[B,S,N] y{new}) <float[1] "w.weight" = {{0}}, float[1] b = {{0}}>
        {{ y{returned} = com.microsoft.Attention <num_heads = {HEADS}{attributes}> (x, "w.weight", b{passed}) }}""")
    bias = np.random.default_rng(2).normal(size=weight.shape[1]).astype(np.float32)
    for name, array in (("w.weight", weight), ("b", bias)):
        value = model.graph.initializers[name]
        value.const_value, value.shape = ir.Tensor(array, name=name), ir.Shape(array.shape)
    return model, {"x": TOKENS, **given}


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_rows_of_attention_have_their_own_adapter(kind: str) -> None:
    width = HIDDEN * (4 if kind == "two sizes" else 3)
    weight = np.random.default_rng(3).normal(scale=0.2, size=(HIDDEN, width)).astype(np.float32)
    pairs = [LoraPair(a=pair.a, b=0.2 * RNG.normal(size=(width, len(pair.a))), scale=0.5) for pair in OTHERS.values()]
    model, inputs = an_attention(kind, weight)
    base = run(model, **inputs)
    in_rows(model, find_sites(model), *(an_adapter({"w": pair}, name=f"{at}") for at, pair in enumerate(pairs)))
    assert {node.op_type for node in model.graph} >= {"Gemm", "MultiHeadAttention"}
    alone = run(model, **inputs, adapter_ids=np.array([0, 0]))
    assert {name: value.tobytes() for name, value in alone.items()} == {
        name: value.tobytes() for name, value in base.items()
    }
    mixed = run(model, **inputs, adapter_ids=np.array([2, 1]))
    for row, pair in enumerate(reversed(pairs)):
        changed, _ = an_attention(kind, np.float32(weight + pair.delta().T))
        expected = run(changed, **inputs)
        assert np.abs(expected["y"][row] - base["y"][row]).max() > 0.1
        np.testing.assert_allclose(mixed["y"][row], expected["y"][row], rtol=0, atol=1e-4)
        if "next" in base:
            np.testing.assert_allclose(mixed["next"][:, row], expected["next"][:, row], rtol=0, atol=1e-4)


def test_the_shape_of_a_mask_that_the_graph_computes_is_inferred() -> None:
    """Only the layer's own input has a shape in the file."""
    model, inputs = an_attention("mask", RNG.normal(size=(HIDDEN, 3 * HIDDEN)).astype(np.float32))
    (node,) = model.graph
    cast = ir.node("Cast", [node.inputs[3]], attributes={"to": ir.DataType.INT32})
    model.graph.insert_before(node, cast)
    node.replace_input_with(3, cast.outputs[0])
    base = run(model, **inputs)["y"]
    in_rows(model, find_sites(model), an_adapter({"w": LoraPair(OTHERS["k"].a, np.ones((3 * HIDDEN, 2)), 1.0)}))
    found = run(model, **inputs, adapter_ids=np.array([0, 1]))["y"]
    assert found[0].tobytes() == base[0].tobytes() and np.abs(found[1] - base[1]).max() > 0.1


# Of an Attention that MultiHeadAttention cannot replace, as in ATTENTIONS; what rows are refused with.
STARTS = {"m": np.int32([5, 4, 0, 1])}  # the ends of the rows' tokens, then their starts
WHOLE: dict[str, tuple[str, str, dict[str, NDArray[Any]], str, str]] = {
    "rotary positions": ("", "", {}, ", do_rotary = 1", "do_rotary = 1"),
    "a shared buffer": ("", "", {}, ", past_present_share_buffer = 1", "past_present_share_buffer = 1"),
    "four dimensions": (", int32[B,1,M,M] m", ", m", {}, "", "a mask of 4 dimensions"),
    "an unknown shape": (", int32 m", ", m", {}, "", "a mask of an unknown shape"),
    "starts": (", int32[C] m", ", m", STARTS, "", r"a mask of the shape \[C\], which is not one length for each row"),
    "starts of two": (", int32[4] m", ", m", STARTS, "", r"a mask of the shape \[4\], which is not one length"),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_rows_of_an_attention_that_stays_whole_are_refused_with_the_reason(kind: str) -> None:
    model, _ = an_attention(kind, np.zeros((HIDDEN, 3 * HIDDEN), np.float32))
    reason = WHOLE[kind][-1]
    with pytest.raises(
        InputRefused, match=rf"read by Attention with {reason}.*Merge the adapter.*before its nodes wer"
    ):
        in_rows(model, find_sites(model), an_adapter({"w": a_wide_pair()}))


@pytest.mark.parametrize("mode", ["merged", "nodes", "rows", "slots"])
def test_command_proves_or_refuses_attention_with_starts(mode: str, tmp_path: Path) -> None:
    model, inputs = an_attention("starts", np.float32(0.2 * RNG.normal(size=(HIDDEN, 3 * HIDDEN))))
    save_graph(model, tmp_path, "base.onnx")
    np.savez(tmp_path / "in.npz", **inputs)
    peft_adapter(tmp_path / "a", {"w": ((pair := a_wide_pair()).a, pair.b)})
    options: Any = {"lora": mode, "inputs": tmp_path / "in.npz", **({"slots": 2} if mode == "slots" else {})}

    def export(*, verify: bool = True) -> Any:
        return le.export_onnx(
            tmp_path / "base.onnx", tmp_path / "out.onnx", adapters=tmp_path / "a", verify=verify, **options
        )

    if mode in ("merged", "nodes"):
        assert export().proof.verdict.outcome == "same"
        return
    for verify in (True, False):
        with pytest.raises(InputRefused, match=r"read by Attention with a mask of the shape \[C\]"):
            export(verify=verify)
    assert not (tmp_path / "out.onnx").exists()


CONVOLUTIONS: dict[str, tuple[str, Any]] = {
    "Relu": ("", lambda y: np.maximum(y, 0)),
    "LeakyRelu": (", activation_params = [0.25]", lambda y: np.where(y < 0, y / 4, y)),
    "Clip": (", activation_params = [-1.0, 3.0]", lambda y: np.clip(y, -1, 3)),
}


@pytest.mark.parametrize("mode", ["nodes", "inputs", "rows"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_fused_convolution_is_taken_apart(name: str, mode: str) -> None:
    parameters, function = CONVOLUTIONS[name]
    model = ir.from_onnx_text(f"""
        <ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
        g (float[N,3,4,4] x) => (float[N,8,2,2] y) <float[1] "m.weight" = {{0}}, float[8] b = {{0,1,2,3,-1,-2,-3,0}}>
        {{ y = com.microsoft.FusedConv <activation = "{name}"{parameters}> (x, "m.weight", b) }}""")
    draw = np.random.default_rng(0)
    x, weight = draw.normal(size=(2, 3, 4, 4)).astype(np.float32), draw.normal(size=(8, 3, 3, 3)).astype(np.float32)
    value = model.graph.initializers["m.weight"]
    value.const_value, value.shape = ir.Tensor(weight, name="m.weight"), ir.Shape(weight.shape)
    pair = LoraPair(a=draw.normal(size=(2, 3, 3, 3)), b=draw.normal(size=(8, 2, 1, 1)), scale=0.5)
    base, adapter, found = run(model, x=x)["y"], an_adapter({"m": pair}), find_sites(model)
    given: Arrays = {}
    if mode == "rows":
        in_rows(model, found, adapter, batch="N")
        given = {"adapter_ids": np.array([1, 1])}
        assert run(model, x=x, adapter_ids=np.array([0, 0]))["y"].tobytes() == base.tobytes()
    elif mode == "inputs":
        contract = insert_inputs(model, found, ["m.weight"])
        given = parameters_of(model, contract, adapter)
        assert run(model, x=x)["y"].tobytes() == base.tobytes()
    else:
        insert_nodes(model, found, plan.make([adapter], found.specs))
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(2, 3))
    expected = np.einsum("ncijkl,ockl->noij", windows, weight + pair.delta())
    expected += np.float32([0, 1, 2, 3, -1, -2, -3, 0])[:, None, None]
    np.testing.assert_allclose(run(model, x=x, **given)["y"], function(expected), rtol=1e-4, atol=1e-4)
    assert np.abs(function(expected) - base).max() > 0.5


def test_fused_convolution_that_adds_a_value_is_refused_with_advice() -> None:
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
        g (float[N,3,1,1] x, float[N,2,1,1] z) => (float[N,2,1,1] y) <float[2,3,1,1] "m.weight" = {1,2,3,4,5,6}>
        { y = com.microsoft.FusedConv <activation = "Relu"> (x, "m.weight", , z) }""")
    pair = LoraPair(a=PAIR.a[:, :, None, None], b=PAIR.b[:, :, None, None], scale=1.0)
    with pytest.raises(InputRefused, match=r"read by FusedConv, .*Merge the adapter"):
        in_rows(model, find_sites(model), an_adapter({"m": pair}), batch="N")


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


@pytest.mark.parametrize("mode", ["nodes", "inputs", "rows", "slots"])
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
    if mode in ("inputs", "slots"):
        file = tmp_path / "a.onnx_adapter"
        runner = runner.with_adapter(file) if mode == "inputs" else runner.with_slot_files({"a": file})
    ids = {"adapter_ids": np.array([1, 1])} if mode in ("rows", "slots") else {}
    assert_computes(runner.run({"x": TOKENS, **ids}), weights, plain)


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
    values = parameters_of(model, contract, adapter)
    np.testing.assert_allclose(run(model, x=X, **values)["y"], factor * X @ changed.T, rtol=1e-5)
    base = run(planned_on(body, layout)[0], x=X)["y"].tobytes()
    assert run(model, x=X)["y"].tobytes() == base
    model, found = planned_on(body, layout)
    in_rows(model, found, an_adapter({"m": LoraPair(a=-PAIR.a, b=PAIR.b, scale=1.0)}, name="other"), adapter, batch="N")
    np.testing.assert_allclose(run(model, x=X, adapter_ids=np.array([2, 2]))["y"], factor * X @ changed.T, rtol=1e-5)
    assert run(model, x=X, adapter_ids=np.array([0, 0]))["y"].tobytes() == base


def planned_on(body: str, layout: Layout) -> tuple[ir.Model, Sites]:
    model = graph_reading(body, layout)
    return model, find_sites(model)


def parameters_of(model: ir.Model, contract: Any, adapter: Adapter) -> dict[str, NDArray[Any]]:
    steps = plan.make([adapter], [place.spec for place in contract.places])
    return onnx_adapter.input_values(
        contract, steps, adapter.name, contract_dora_factors(model, contract, steps, adapter.name)
    )


@pytest.fixture(scope="module")
def optimised_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT as onnxruntime's optimiser of transformers fuses it."""
    optimizer = pytest.importorskip("onnxruntime.transformers.optimizer")
    folder, module = tmp_path_factory.mktemp("bert"), model_of("bert")
    before = module.config._attn_implementation
    module.set_attn_implementation("eager")  # whose nodes the optimiser knows
    try:
        torchscript("bert", folder / "plain.onnx")
    finally:
        module.set_attn_implementation(before)
    fused = optimizer.optimize_model(str(folder / "plain.onnx"), "bert", num_heads=4, hidden_size=32, opt_level=0)
    fused.save_model_to_file(str(folder / "fused.onnx"))
    found = {node.op_type for node in load_graph(folder / "fused.onnx").graph}
    assert found >= {"Attention", "EmbedLayerNormalization", "SkipLayerNormalization", "BiasGelu"}
    return folder / "fused.onnx"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["rows", "slots"])
def test_an_optimised_bert_has_an_adapter_for_each_row(mode: str, optimised_bert: Path, tmp_path: Path) -> None:
    expected = {}
    for seed, targets in enumerate((["query", "value", "dense"], ["key", "classifier"], "all-linear"), 1):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=seed, lora_alpha=8, target_modules=targets, init_lora_weights=False)
        model = peft.get_peft_model(copy.deepcopy(model_of("bert")), config).eval()
        model.save_pretrained(tmp_path / f"a{seed}")
        with torch.no_grad():
            expected[seed] = model(**token_inputs(4)).logits.numpy()
    shape: Any = {"slots": 3, "max_rank": 3, "target": "all-linear"} if mode == "slots" else {}
    result = le.export_onnx(
        optimised_bert, tmp_path / "served.onnx", adapters=[tmp_path / f"a{seed}" for seed in expected],
        checkpoint=checkpoint_of("bert"), lora=mode, **shape,
    )  # fmt: skip
    assert result.proof is not None and result.proof.verdict.outcome == "same"
    inputs = {name: value.numpy() for name, value in token_inputs(4).items()}
    base, runner = OnnxRunner(optimised_bert).run(inputs)["logits"], OnnxRunner(tmp_path / "served.onnx")
    if mode == "slots":
        runner = runner.with_slot_files({f"a{seed}": tmp_path / f"a{seed}.onnx_adapter" for seed in expected})
    assert runner.run({**inputs, "adapter_ids": np.zeros(4, np.int64)})["logits"].tobytes() == base.tobytes()
    mixed = runner.run({**inputs, "adapter_ids": np.array([3, 0, 1, 2])})["logits"]
    assert mixed[1].tobytes() == base[1].tobytes()
    for row, seed in ((0, 3), (2, 1), (3, 2)):
        np.testing.assert_allclose(mixed[row], expected[seed][row], rtol=0, atol=1e-6)
        assert np.abs(expected[seed][row] - base[row]).max() > 0.02
