"""An initializer of its own for every weight that changes; tables that an adapter repeats are left out of its plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file, save_file

from lora_export import plan
from lora_export.errors import InputRefused
from lora_export.formats.onnx_adapter import refuse_new_tables
from lora_export.graph.find_sites import find_sites
from lora_export.graph.merge.fold import fold_graph, without_unchanged_tables
from lora_export.graph.onnx_file.reading import load_graph
from lora_export.lora import LoraPair
from lora_export.plan import Plan
from lora_export.storage import block_copy
from support import small_graphs
from support.content_graphs import GEMM, MATMUL, PACKED, QKV, base_checkpoint, product_graph
from support.graphs import a_graph, an_adapter, quantised, run, stored
from support.handmade import base_file, graph_file, peft_adapter
from support.insertion import EMBEDDING, EMBEDDING_PAIR, TABLE
from support.requantised_graphs import (
    BLOCK_SIZES,
    IN,
    LOCATIONS,
    OUT,
    RNG,
    A,
    W,
    dequantised_weight,
    dequantize_graph,
    merge_requantised,
    save_model,
)
from support.small_graphs import LINEAR, PAIR, SHARED, SQUARE, TIED_TABLE, folded


@pytest.mark.parametrize(("stored_as", "node"), [(PACKED.T, MATMUL), (PACKED, GEMM)], ids=["columns", "rows"])
def test_folding_into_block_keeps_bytes_of_neighbours(tmp_path: Path, stored_as: Any, node: str) -> None:
    model = product_graph(stored_as, node)
    found = find_sites(model, base_checkpoint(tmp_path, QKV))
    pairs = {name: LoraPair(a=[[1, -1]], b=b, scale=2.0) for name, b in {"q": [[1], [0]], "v": [[3]]}.items()}
    fold_graph(model, found, plan.make([an_adapter(pairs)], found.specs))
    after = stored(model, "W").T if node is MATMUL else stored(model, "W")
    assert np.array_equal(after, [[1 + 2, 2 - 2], [3, 4], [5, 6], [7 + 6, 8 - 6]])
    assert np.array_equal(run(model, x=np.float32([[1, 0]]))["y"], [[3, 3, 5, 13]])


def test_block_is_replaced_in_layout_of_parameter(tmp_path: Path) -> None:
    model = product_graph(PACKED.T)
    found = find_sites(model, base_checkpoint(tmp_path, QKV))
    whole = np.float32([[9, 8], [7, 6]])
    fold_graph(model, found, plan.make([an_adapter({}, replaced={"q.weight": whole})], found.specs))
    assert np.array_equal(stored(model, "W").T, [[9, 8], [7, 6], [5, 6], [7, 8]])


def test_other_reader_of_shared_tensor_keeps_it() -> None:
    model = a_graph(SHARED, modules={"first": "a.fc", "second": "b.fc"})
    folded(model, an_adapter({"b.fc": SQUARE}))
    assert np.array_equal(stored(model, "a.fc.weight"), [[1, 2], [3, 4]])
    assert np.array_equal(stored(model, "b.fc.weight"), [[1 + 1, 2 + 2], [3, 4]])
    assert np.array_equal(run(model, x=np.float32([[1, 0]]))["y"], [[1 * 2 + 2 * 3, 1 * 4 + 2 * 4]])


def test_changed_weight_keeps_its_name() -> None:
    model = a_graph(SHARED, modules={"first": "a.fc", "second": "b.fc"})
    folded(model, an_adapter({"a.fc": SQUARE}))
    assert np.array_equal(stored(model, "a.fc.weight"), [[2, 4], [3, 4]])
    assert np.array_equal(stored(model, "b.fc.weight"), [[1, 2], [3, 4]])
    again = find_sites(model)
    assert {name: [site.node.name for site in sites] for name, sites in again.by_name.items()} == {
        "a.fc.weight": ["first"], "b.fc.weight": ["second"],
    }  # fmt: skip


def test_module_called_twice_changes_at_both_sites() -> None:
    model = a_graph(SHARED, modules={"first": "a.fc", "second": "a.fc"})
    folded(model, an_adapter({"a.fc": SQUARE}))
    assert list(model.graph.initializers) == ["a.fc.weight"]
    assert np.array_equal(stored(model, "a.fc.weight"), [[2, 4], [3, 4]])


def test_tied_head_is_untied_from_embedding() -> None:
    modules = {"e": "embed", "n": "head", "t": "head"}
    model = a_graph(TIED_TABLE.replace("tied.weight", "embed.weight"), modules=modules)
    pair = LoraPair(a=[[1, 0]], b=[[0], [0], [1]], scale=1.0)
    folded(model, an_adapter({"head": pair}))
    assert np.array_equal(stored(model, "embed.weight"), [[1, 2], [3, 4], [5, 6]])
    assert np.array_equal(stored(model, "head.weight"), [[1, 2], [3, 4], [5 + 1, 6]])
    assert [node.op_type for node in model.graph] == ["Gather", "Transpose", "MatMul"]
    assert np.array_equal(run(model, ids=np.array([0]))["y"], [[5, 11, 18]])
    again = {spec.name: spec for spec in find_sites(model).specs}
    assert again["head.weight"].shape == (3, 2)


def test_every_copy_of_parameter_changes() -> None:
    model = a_graph(
        """
        g (float[N,2] x) => (float[N,2] y)
        <float[2,2] fc.weight = {1,2,3,4}, float[2,2] val_1 = {1,3,2,4}>
        { [first] h = Gemm <transB = 1> (x, fc.weight)
          [second] y = MatMul(h, val_1) }""",
        modules={"first": "fc", "second": "fc"},
        val_1="fc.weight",
    )
    folded(model, an_adapter({"fc": SQUARE}))
    assert np.array_equal(stored(model, "fc.weight"), [[2, 2], [5, 4]])
    assert np.array_equal(stored(model, "val_1"), [[2, 5], [2, 4]])


def test_linear_reader_determines_layout_of_shared_matrix() -> None:
    model = a_graph(
        """
        g (float[2,2] x) => (float[2,2] y)
        <float[2,2] m.weight = {1,2,3,4}>
        { [r] z = Relu(m.weight)
          [n] h = MatMul(x, m.weight)
          [a] y = Add(h, z) }""",
        modules={"r": "m", "n": "m"},
    )
    folded(model, an_adapter({"m": SQUARE}))
    assert np.array_equal(stored(model, "m.weight"), [[1 + 1, 2 + 2], [3, 4]])


# --- Quantised weights: tensors of their own for each one that changes ---


def two_layers(**shared_tensors: str) -> ir.Model:
    """A graph of two layers a and b. `shared_tensors` are the tensors of a that b reads too."""
    uses = {"levels": "lb", "scales": "sb", "zeros": "zb"} | shared_tensors
    model = ir.from_onnx_text(f"""
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N,2] x) => (float[N,2] y)
        <int8[2,2] la = {{1, 2, 3, 127}}, float[2] sa = {{1, 2}}, int8[2] za = {{0, 0}},
         int8[2,2] lb = {{4, 3, 2, 127}}, float[2] sb = {{3, 4}}, int8[2] zb = {{0, 0}}>
        {{ v = DequantizeLinear <axis = 1> (la, sa, za)
           [a] h = MatMul(x, v)
           w = DequantizeLinear <axis = 1> ({uses["levels"]}, {uses["scales"]}, {uses["zeros"]})
           [b] y = MatMul(h, w) }}""")
    for node in model.graph:
        if node.op_type == "MatMul":
            node.metadata_props["pkg.torch.onnx.name_scopes"] = repr(["", str(node.name), "linear"])
    for name in {"lb", "sb", "zb"} - set(uses.values()):
        del model.graph.initializers[name]
    return model


@pytest.mark.parametrize(
    "shared_tensors", [{"levels": "la"}, {"scales": "sa"}, {"zeros": "za"}, {"levels": "la", "scales": "sa"}]
)
@LOCATIONS
def test_shared_tensors_are_copied_for_changed_layer(
    shared_tensors: dict[str, str], beside: bool, tmp_path: Path
) -> None:
    path = save_model(two_layers(**shared_tensors), tmp_path / "m.onnx", beside=beside)
    before = {name: dequantised_weight(load_graph(path), f"{name}.weight") for name in "ab"}
    model, _ = merge_requantised(path, peft_adapter(tmp_path / "ad", {"b": ([[10, 100]], [[1], [-1]])}))
    found = find_sites(model)
    after = {name: found.by_name[f"{name}.weight"][0].matrix for name in "ab"}
    assert np.array_equal(after["a"], before["a"])
    expected = before["b"] + np.array([[10, 100], [-10, -100]])
    scale = np.array([[1], [2]] if "scales" in shared_tensors else [[3], [4]])
    assert (np.abs(after["b"] - expected) <= scale * 0.501).all()
    x = np.eye(2, dtype=np.float32)
    # onnxruntime would multiply such weights in eight bits.
    (output,) = onnx.reference.ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})
    np.testing.assert_allclose(output, x @ after["a"].T @ after["b"].T, rtol=1e-5)
    assert len(model.graph.initializers) == 6 - len(shared_tensors.keys() - {"levels"})  # only integers are copied


def test_integers_with_several_scales_are_refused(tmp_path: Path) -> None:
    model = two_layers(levels="la")
    for node in model.graph:
        if node.name == "b":
            node.metadata_props["pkg.torch.onnx.name_scopes"] = repr(["", "a", "linear"])
    path = save_model(model, tmp_path / "m.onnx")
    adapter = peft_adapter(tmp_path / "ad", {"a": ([[10, 100]], [[1], [-1]])})
    with pytest.raises(InputRefused, match=r"several scales|no weight for a"):
        merge_requantised(path, adapter)


@BLOCK_SIZES
@pytest.mark.parametrize("as_pairs", [False, True])
@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
def test_block_changes_and_neighbours_keep_bytes(
    use_dora: bool, as_pairs: bool, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_copy, "BLOCK", block)
    parts = {"q": W.T[:20], "k": W.T[20:30], "v": W.T[30:]}
    base = base_file(tmp_path / "b.safetensors", {f"attn.{name}.weight": part for name, part in parts.items()})
    model = quantised(
        ir.from_proto(onnx.load(graph_file(tmp_path / "f.onnx", {"packed_1": W}))), symmetric=False, as_pairs=as_pairs
    )
    path = save_model(model, tmp_path / "q.onnx", beside=True)
    pairs = {f"attn.{name}": (A, RNG.normal(size=(len(parts[name]), 4)) * 0.1) for name in "qv"}
    adapter = peft_adapter(tmp_path / "ad", pairs, use_dora=use_dora)
    lengths = {name: RNG.uniform(5, 9, len(pair[1])).astype(np.float32) for name, pair in pairs.items()}
    if use_dora:
        file = adapter / "adapter_model.safetensors"
        vectors = {f"base_model.model.{name}.lora_magnitude_vector": length for name, length in lengths.items()}
        save_file(load_file(file) | vectors, file)
    before = find_sites(model).unnamed[0].matrix
    after, report = merge_requantised(path, adapter, base=base)
    total = before.astype(np.float64)
    for name, rows in (("attn.q", slice(20)), ("attn.v", slice(30, None))):
        total[rows] += pairs[name][1] @ pairs[name][0]
        if use_dora:
            total[rows] *= (lengths[name] / np.linalg.norm(total[rows], axis=1))[:, None]
    found = find_sites(after).unnamed[0].matrix
    assert found[20:30].tobytes() == before[20:30].tobytes()
    changed = np.r_[:20, 30:OUT]
    assert np.linalg.norm(found[changed] - total[changed]) < 0.12 * np.linalg.norm(total[changed])
    assert {result.weight: result.retention > 0.9 for result in report.results} == {
        "attn.q.weight": True, "attn.v.weight": True,
    }  # fmt: skip


def test_block_sharing_scale_with_neighbours_leaves_them(tmp_path: Path) -> None:
    parts = {"q": W.T[:20], "k": W.T[20:]}
    base = base_file(tmp_path / "b.safetensors", {f"attn.{name}.weight": part for name, part in parts.items()})
    scale = np.float32(np.abs(W).max() / 127)
    model = dequantize_graph("int8 by tensor")
    for name, array in {"fc.weight_quantized": np.rint(W / scale).astype(np.int8), "s": scale}.items():
        value = model.graph.initializers[name]
        value.const_value, value.shape = ir.Tensor(np.asarray(array), name=name), ir.Shape(np.shape(array))
    value = model.graph.initializers["fc.weight_quantized"]
    value.name = "packed"
    model.graph.inputs[0].shape, model.graph.outputs[0].shape = ir.Shape(["N", IN]), ir.Shape(["N", OUT])
    path = save_model(model, tmp_path / "q.onnx")
    before = find_sites(model).unnamed[0].matrix.copy()
    adapter = peft_adapter(tmp_path / "q", {"attn.q": (A, RNG.normal(size=(20, 4)) * 0.1)})
    after, report = merge_requantised(path, adapter, base=base)
    found = find_sites(after).unnamed[0].matrix
    assert found[20:].tobytes() == before[20:].tobytes() and not np.array_equal(found[:20], before[:20])
    assert [(each.weight, each.retention > 0.9) for each in report.results] == [("attn.q.weight", True)]


# --- Tables that an adapter repeats: PEFT saves the base's own embeddings beside the pair that changes them ---


OUT_IN = np.float32([[1, 2, 3], [4, 5, 6]])


def planned(model: ir.Model, module: str, pair: LoraPair, table: Any) -> Plan:
    adapter = an_adapter({module: pair}, replaced={f"{module}.weight": np.asarray(table)})
    sites = find_sites(model)
    return without_unchanged_tables(plan.make([adapter], sites.specs), sites)


@pytest.mark.parametrize(
    ("graph", "module", "pair", "table"),
    [
        (EMBEDDING, "words", EMBEDDING_PAIR, TABLE.astype(np.float32)),
        (EMBEDDING, "words", EMBEDDING_PAIR, TABLE.astype(ml_dtypes.bfloat16)),
        (small_graphs.GEMM, "m", PAIR, OUT_IN),
        (LINEAR, "m", PAIR, OUT_IN.T),
    ],
)
def test_an_equal_table_is_left_out(graph: str, module: str, pair: LoraPair, table: Any) -> None:
    steps = planned(a_graph(graph), module, pair, table)
    assert [(step.replace, len(step.terms)) for step in steps.steps] == [(None, 1)]
    refuse_new_tables(steps)


def test_a_table_with_one_other_value_stays_and_is_not_swapped() -> None:
    table = TABLE.astype(np.float32)
    table[3, 1] += 1
    steps = planned(a_graph(EMBEDDING), "words", EMBEDDING_PAIR, table)
    assert np.array_equal(steps.steps[0].replace, table)
    with pytest.raises(InputRefused, match=r"these tensors would differ from the base's:\n  default, words\.weight\n"):
        refuse_new_tables(steps)
