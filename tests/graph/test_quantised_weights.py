"""Quantised weights in graphs: their dequantised values, their names, and adapters beside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from lora_export import plan
from lora_export.errors import InputRefused
from lora_export.graph.find_sites import Sites, find_sites
from lora_export.graph.insert.adapter_nodes import insert_nodes
from lora_export.graph.merge.fold import fold_graph
from lora_export.graph.site import NameSource, Site
from lora_export.lora import LoraPair
from lora_export.plan import Layout
from lora_export.weights.checkpoint import Checkpoint, open_checkpoint
from support.graphs import a_graph, an_adapter, quantised, run
from support.handmade import base_file

RNG = np.random.default_rng(0)


WEIGHTS = {
    name: RNG.normal(size=(48, 80)).astype(np.float32) for name in "abc"
}  # (out, in); 80 is not a multiple of 32


def a_product(weight: NDArray[Any], *, name: str = "val_49", module: str = "") -> ir.Model:
    out, inner = weight.shape
    model = a_graph(
        f"""
        g (float[N,{inner}] x) => (float[N,{out}] y)
        <float[{inner},{out}] W = {{{",".join("0" * weight.size)}}}>
        {{ [n] y = MatMul(x, W) }}""",
        modules={"n": module} if module else None,
    )
    value = model.graph.initializers["W"]
    value.const_value, value.name = ir.Tensor(np.ascontiguousarray(weight.T), name=name), name
    return model


def base(folder: Path, tensors: Mapping[str, Any]) -> Checkpoint:
    named = {f"{name}.weight": tensor for name, tensor in tensors.items()}
    return open_checkpoint(base_file(folder / "base.safetensors", named))


def only(found: Sites) -> Site:
    (site,) = (*found.linear, *found.unnamed)
    return site


def test_four_bits_are_dequantised_by_hand() -> None:
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
        g (float[N,3] x) => (float[N,2] y)
        <uint8[2,1,8] W = {152, 7, 0,0,0,0,0,0, 143, 10, 0,0,0,0,0,0}, float[2] s = {0.5, 2}>
        { y = com.microsoft.MatMulNBits <K = 3, N = 2, bits = 4, block_size = 16> (x, W, s) }""")
    site = only(find_sites(model))
    # 152 = 9 * 16 + 8, 7; 143 = 8 * 16 + 15, 10; minus 8 each
    assert np.array_equal(site.matrix, [[0, 0.5, -0.5], [14, 0, 4]])
    assert (site.shape, site.layout, site.dtype) == ((2, 3), Layout.OUT_IN, "float32")
    assert site.quantised is not None
    assert site.quantised.kind == "4 bits in blocks of 16"


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "block"), [(2, 16), (4, 32), (4, 128), (8, 32)])
def test_matmul_nbits_weight_equals_onnxruntime(bits: int, block: int, symmetric: bool) -> None:
    model = quantised(a_product(WEIGHTS["a"]), bits=bits, block=block, symmetric=symmetric)
    assert [node.op_type for node in model.graph] == ["MatMulNBits"]
    site = only(find_sites(model))
    output = run(model, x=np.eye(80, dtype=np.float32))["y"]
    np.testing.assert_allclose(site.matrix.T, output, rtol=1e-5, atol=1e-6)
    assert 0.001 < np.linalg.norm(site.matrix - WEIGHTS["a"]) / np.linalg.norm(WEIGHTS["a"]) < 0.6


INTEGERS = RNG.integers(-8, 8, size=(6, 4))


DEQUANTIZE_WEIGHTS = {
    "by tensor": (INTEGERS.astype(np.int8), "", np.float32(0.5), np.int8(3)),
    "by column": (INTEGERS.astype(np.int8), "<axis = 1>", RNG.random(4, np.float32), None),
    "by row": (INTEGERS.astype(np.int8), "<axis = 0>", RNG.random(6, np.float32), np.arange(6).astype(np.int8)),
    "negative axis": (INTEGERS.astype(np.int8), "<axis = -2>", RNG.random(6, np.float32), None),
    "4 bits in blocks": (
        (INTEGERS + 8).astype(ml_dtypes.uint4), "<axis = 0, block_size = 4>",
        RNG.random((2, 4), np.float32), RNG.integers(0, 16, (2, 4)).astype(ml_dtypes.uint4),
    ),
}  # fmt: skip


def a_pair(kind: str, *, transposed: bool = False) -> ir.Model:
    integers, attributes, scale, zero = DEQUANTIZE_WEIGHTS[kind]
    inner = 4 if transposed else 6
    model = ir.from_onnx_text(f"""
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N,{inner}] x) => (float[N,{10 - inner}] y) <int8[1] W = {{0}}, float s = {{0}}, int8[1] z = {{0}}>
        {{ w = DequantizeLinear {attributes} (W, s{", z" if zero is not None else ""})
           {"v = Transpose(w) y = MatMul(x, v)" if transposed else "y = MatMul(x, w)"} }}""")
    for name, array in {"W": integers, "s": scale, "z": zero}.items():
        value = model.graph.initializers[name]
        if array is None:
            del model.graph.initializers[name]
            continue
        value.const_value = ir.Tensor(np.asarray(array), name=name)
        value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape(np.shape(array))
    return model


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", DEQUANTIZE_WEIGHTS)
def test_dequantize_linear_weight_equals_onnx_definition(kind: str, transposed: bool) -> None:
    model = a_pair(kind, transposed=transposed)
    site = only(find_sites(model))
    output = onnx.reference.ReferenceEvaluator(ir.to_proto(model)).run(
        None, {"x": np.eye(4 if transposed else 6, dtype=np.float32)}
    )[0]
    np.testing.assert_allclose(site.matrix.T, output, rtol=1e-6)
    assert site.layout is (Layout.OUT_IN if transposed else Layout.IN_OUT)


def test_group_index_is_noted_as_unsupported() -> None:
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
        g (float[N,3] x) => (float[N,2] y)
        <uint8[2,1,8] W = {0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0}, float[2] s = {0.5, 2}, int32[3] i = {0, 0, 0}>
        { y = com.microsoft.MatMulNBits <K = 3, N = 2, bits = 4, block_size = 16> (x, W, s, , i) }""")
    found = find_sites(model)
    assert not (found.by_name or found.unnamed)
    assert found.notes == ("1 MatMulNBits node holds quantised weights in an unsupported format",)


@pytest.mark.parametrize("as_pairs", [False, True])
def test_quantised_weight_keeps_name_of_parameter(as_pairs: bool) -> None:
    found = find_sites(quantised(a_product(WEIGHTS["a"], name="encoder.query.weight"), as_pairs=as_pairs))
    assert {name: site.named_by for name, (site,) in found.by_name.items()} == {
        "encoder.query.weight": NameSource.INITIALIZER
    }
    (spec,) = found.specs
    assert (spec.matrix, spec.dtype) == ((48, 80), "float32")


@pytest.mark.parametrize(
    ("bits", "block", "as_pairs"),
    [(4, 32, False), (4, 128, False), (8, 32, False), (2, 32, False), (4, 32, True), (4, 128, True)],
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_quantised_weight_is_found_in_base(
    tmp_path: Path, bits: int, block: int, symmetric: bool, as_pairs: bool
) -> None:
    model = quantised(a_product(WEIGHTS["b"]), bits=bits, block=block, symmetric=symmetric, as_pairs=as_pairs)
    assert not find_sites(model).by_name
    found = find_sites(model, base(tmp_path, WEIGHTS))
    assert {name: site.named_by for name, (site,) in found.by_name.items()} == {"b.weight": NameSource.CONTENT}
    assert [(spec.shape, spec.layout) for spec in found.specs] == [((48, 80), Layout.OUT_IN)]


def test_packed_quantised_weights_are_found_block_by_block(tmp_path: Path) -> None:
    packed = np.concatenate([WEIGHTS["c"], WEIGHTS["a"][:16], WEIGHTS["b"]])
    tensors = WEIGHTS | {"a": WEIGHTS["a"][:16]}
    found = find_sites(quantised(a_product(packed)), base(tmp_path, tensors))
    assert [(site.name, site.block) for site in found.linear] == [
        ("c.weight", range(48)), ("a.weight", range(48, 64)), ("b.weight", range(64, 112)),
    ]  # fmt: skip
    for site in found.linear:
        own = tensors[site.name.removesuffix(".weight")]
        assert np.linalg.norm(site.matrix - own) < 0.2 * np.linalg.norm(own)


def test_quantised_weight_of_other_model_is_unnamed(tmp_path: Path) -> None:
    other_weight = np.random.default_rng(1).normal(size=(48, 80)).astype(np.float32)
    found = find_sites(quantised(a_product(other_weight)), base(tmp_path, WEIGHTS))
    assert not found.by_name


def test_two_equally_near_weights_name_nothing(tmp_path: Path) -> None:
    found = find_sites(
        quantised(a_product(WEIGHTS["a"])), base(tmp_path, {"a": WEIGHTS["a"], "b": WEIGHTS["a"] * 1.01})
    )
    assert not found.by_name
    assert "its content, which equals a.weight and b.weight" in str(found)


def test_wrong_name_of_quantised_weight_is_refused(tmp_path: Path) -> None:
    model = quantised(a_product(WEIGHTS["b"], name="a.weight"))
    with pytest.raises(InputRefused, match=r"a.weight by initializer, b.weight by content"):
        find_sites(model, base(tmp_path, WEIGHTS))


PAIR = LoraPair(a=RNG.normal(size=(3, 80)), b=RNG.normal(size=(48, 3)), scale=0.5)


@pytest.mark.parametrize("as_pairs", [False, True])
def test_folding_into_quantised_weight_is_refused_with_advice(as_pairs: bool) -> None:
    model = quantised(a_product(WEIGHTS["a"], name="a.weight"), as_pairs=as_pairs)
    found = find_sites(model)
    steps = plan.make([an_adapter({"a": PAIR})], found.specs)
    before = ir.to_proto(model).SerializeToString()
    with pytest.raises(InputRefused, match=r'a.weight is quantised .*lora="nodes".*float model'):
        fold_graph(model, found, steps)
    assert ir.to_proto(model).SerializeToString() == before


def test_nothing_is_folded_when_one_weight_is_quantised() -> None:
    numbers = ",".join(map(str, range(32)))
    body = f"""
        g (float[N,32] x, float[N,2] z) => (float[N,1] y, float[N,2] t)
        <float[2,2] f.weight = {{1,2,3,4}}, float[32,1] q.weight = {{{numbers}}}>
        {{ t = Gemm (z, f.weight)
           y = MatMul (x, q.weight) }}"""
    model = quantised(a_graph(body))
    found = find_sites(model)
    pairs = {"f": LoraPair(a=[[1, 1]], b=[[1], [1]], scale=1.0), "q": LoraPair(a=np.ones((1, 32)), b=[[1]], scale=1.0)}
    before = ir.to_proto(model).SerializeToString()
    with pytest.raises(InputRefused, match=r"q.weight is quantised"):
        fold_graph(model, found, plan.make([an_adapter(pairs)], found.specs))
    assert ir.to_proto(model).SerializeToString() == before


@pytest.mark.parametrize("as_pairs", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
def test_adapter_beside_quantised_weight_adds_its_change(as_pairs: bool, symmetric: bool) -> None:
    model = quantised(a_product(WEIGHTS["a"], name="a.weight"), symmetric=symmetric, as_pairs=as_pairs)
    x = RNG.normal(size=(5, 80)).astype(np.float32)
    before = run(model, x=x)["y"]
    found = find_sites(model)
    insert_nodes(model, found, plan.make([an_adapter({"a": PAIR})], found.specs))
    expected = before + 0.5 * x.astype(np.float64) @ PAIR.a.T.astype(np.float64) @ PAIR.b.T.astype(np.float64)
    np.testing.assert_allclose(run(model, x=x)["y"], expected, rtol=1e-4, atol=1e-4)
    assert np.abs(expected - before).max() > 1
