"""Integers, scales and zero points that several layers or blocks share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file, save_file

from lora_export.errors import InputRefused
from lora_export.graph.find_sites import find_sites
from lora_export.graph.onnx_file.reading import load_graph
from lora_export.storage import block_copy
from support.graphs import quantised
from support.handmade import base_file, graph_file, peft_adapter
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
    scale = np.abs(expected).max(axis=1, keepdims=True) / 127
    assert (np.abs(after["b"] - expected) <= scale * 0.501).all()
    x = np.eye(2, dtype=np.float32)
    # onnxruntime would multiply such weights in eight bits.
    (output,) = onnx.reference.ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})
    np.testing.assert_allclose(output, x @ after["a"].T @ after["b"].T, rtol=1e-5)
    if shared_tensors == {"zeros": "za"}:  # zero points of a symmetric scheme do not change
        assert "za" in model.graph.initializers and not any("zeros" in name for name in model.graph.initializers)


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
    pairs = {f"attn.{name}": (A, RNG.normal(size=(len(parts[name]), 4)) * 0.3) for name in "qv"}
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


def test_block_sharing_scale_with_neighbours_is_refused(tmp_path: Path) -> None:
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
    for names, refused in (("q", True), ("qk", False)):
        pairs = {f"attn.{name}": (A, RNG.normal(size=(len(parts[name]), 4))) for name in names}
        adapter = peft_adapter(tmp_path / names, pairs)
        if refused:
            with pytest.raises(InputRefused, match=r"attn.q.weight shares a scale with its neighbours in packed"):
                merge_requantised(path, adapter, base=base)
        else:
            _, report = merge_requantised(path, adapter, base=base)
            assert [result.retention > 0.9 for result in report.results] == [True, True]
