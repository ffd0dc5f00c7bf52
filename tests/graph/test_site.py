"""Sites: the entries that they read, in the orientation of the stored tensor and as (out, in)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from lora_export import plan
from lora_export.errors import MatchError
from lora_export.graph.exporter_names import NAME_SCOPES
from lora_export.graph.find_sites import find_sites
from lora_export.graph.merge.fold import fold_graph
from lora_export.graph.site import Site, common_dtype
from lora_export.lora import LoraPair
from lora_export.plan import Layout
from lora_export.weights.checkpoint import open_checkpoint
from support.content_graphs import GEMM, MATMUL, PACKED, only_site, product_graph
from support.graphs import an_adapter, quantised, run, stored
from support.handmade import base_file
from support.one_weight_graphs import WEIGHT, X, attention, attention_graph, graph_reading
from support.small_graphs import DELTA, PAIR

ORIENTATIONS = pytest.mark.parametrize(
    ("stored_as", "node"), [(PACKED.T, MATMUL), (PACKED, GEMM)], ids=["in_out", "out_in"]
)


def site_of(stored_as: np.ndarray, node: str, block: range | None = None) -> Site:
    return replace(only_site(find_sites(product_graph(stored_as, node))), block=block)


@ORIENTATIONS
def test_matrix_of_whole_weight_is_out_in(stored_as: np.ndarray, node: str) -> None:
    site = site_of(stored_as, node)
    assert np.array_equal(site.matrix, PACKED)
    assert np.array_equal(site.array, stored_as)
    assert (site.shape, site.stored_shape, site.node_outputs) == (stored_as.shape, stored_as.shape, 4)


@ORIENTATIONS
def test_block_is_part_of_outputs(stored_as: np.ndarray, node: str) -> None:
    site = site_of(stored_as, node, range(1, 3))
    assert np.array_equal(site.matrix, PACKED[1:3])
    assert np.array_equal(site.stored_array, stored_as)
    assert site.shape == site.array.shape
    assert (site.node_outputs, site.location) == (4, f"{node[8:14].split('(')[0].split()[0]} `n` [1:3]")


def test_nearest_keeps_representable_values_of_block() -> None:
    weight = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)  # (in, out)
    site = replace(only_site(find_sites(quantised(product_graph(weight)))), block=range(2, 5))
    stored = site.matrix.astype(np.float64)
    step = np.abs(stored).max() / 100
    assert np.allclose(site.nearest(stored + step), stored, atol=1e-6)
    assert not np.allclose(site.nearest(stored + 40 * step), stored, atol=step)


def test_common_dtype_holds_all_readers() -> None:
    site = site_of(PACKED, GEMM)
    half, bfloat, double = (replace(site, dtype=dtype) for dtype in ("float16", "bfloat16", "float64"))
    assert common_dtype([half, half]) == "float16"
    assert common_dtype([half, bfloat]) == "float32"
    assert common_dtype([half, double]) == "float64"


# --- Readers of a weight: the layout for each operator, and the nodes between them. ---


def fold_into(model: ir.Model) -> None:
    found = find_sites(model)
    fold_graph(model, found, plan.make([an_adapter({"m": PAIR})], found.specs))


def only(model: ir.Model) -> Site:
    (site,) = find_sites(model).by_name["m.weight"]
    return site


LINEAR = """<domain: "own", opset_import: ["" : 20]>
    linear (x, w) => (y) { v = Transpose <perm = [1, 0]> (w) y = MatMul(x, v) }"""


NESTED = (
    LINEAR
    + """<domain: "own", opset_import: ["" : 20, "own" : 1]>
    outer (w, x) => (y) { i = Identity(w) y = own.linear(x, i) }"""
)


# body, layout of W, functions, and the factor of the product
PRODUCTS: dict[str, tuple[str, Layout, str, float]] = {
    "FusedMatMul": ("y = com.microsoft.FusedMatMul <alpha = 0.5> (x, W)", Layout.IN_OUT, "", 0.5),
    "FusedMatMul, transB": ("y = com.microsoft.FusedMatMul <transB = 1> (x, W)", Layout.OUT_IN, "", 1),
    "FusedGemm": (
        'y = com.microsoft.FusedGemm <transB = 1, activation = "LeakyRelu", activation_alpha = 1.0> (x, W)',
        Layout.OUT_IN, "", 1,
    ),
    "Gemm, alpha": ("y = Gemm <alpha = 3.0> (x, W)", Layout.IN_OUT, "", 3),
    "behind Identity": ("i = Identity(W) y = MatMul(x, i)", Layout.IN_OUT, "", 1),
    "behind two Transposes": ("a = Transpose(W) b = Transpose(a) y = MatMul(x, b)", Layout.IN_OUT, "", 1),
    "behind Transpose": ("i = Identity(W) a = Transpose(i) y = MatMul(x, a)", Layout.OUT_IN, "", 1),
    "in a function": ("y = own.linear(x, W)", Layout.OUT_IN, LINEAR, 1),
    "in a function in a function": ("y = own.outer(W, x)", Layout.OUT_IN, NESTED, 1),
}  # fmt: skip


@pytest.mark.parametrize(("body", "layout", "functions", "factor"), PRODUCTS.values(), ids=PRODUCTS.keys())
def test_layer_is_found_and_folded_through_each_operator(
    body: str, layout: Layout, functions: str, factor: float
) -> None:
    model = graph_reading(body, layout, functions=functions)
    assert only(model).layout is layout
    np.testing.assert_allclose(run(model, x=X)["y"], factor * X @ WEIGHT.T)
    fold_into(model)
    np.testing.assert_allclose(run(model, x=X)["y"], factor * X @ (WEIGHT + DELTA).T)


FIRST = {
    "MatMul": ("y = MatMul(W, x)", Layout.OUT_IN),
    "FusedMatMul": ("y = com.microsoft.FusedMatMul(W, x)", Layout.OUT_IN),
    "FusedMatMul, transA": ("y = com.microsoft.FusedMatMul <transA = 1> (W, x)", Layout.IN_OUT),
    "behind Transpose": ("t = Transpose(W) y = MatMul(t, x)", Layout.IN_OUT),
}


@pytest.mark.parametrize(("body", "layout"), FIRST.values(), ids=FIRST.keys())
def test_weight_can_be_first_operand(body: str, layout: Layout) -> None:
    model = graph_reading(body, layout, x="float[3,N]", y="float[2,N]")
    assert only(model).layout is layout
    np.testing.assert_allclose(run(model, x=X.T.copy())["y"], WEIGHT @ X.T)
    fold_into(model)
    np.testing.assert_allclose(run(model, x=X.T.copy())["y"], (WEIGHT + DELTA) @ X.T)


@pytest.mark.parametrize("half", [np.float16, ml_dtypes.bfloat16])
def test_weight_behind_cast_keeps_stored_dtype(half: Any) -> None:
    model = graph_reading("c = Cast <to = 1> (W) y = MatMul(x, c)", Layout.IN_OUT)
    model.graph.initializers["m.weight"].const_value = ir.Tensor(WEIGHT.T.astype(half), name="m.weight")
    model.graph.initializers["m.weight"].dtype = ir.DataType.from_numpy(np.dtype(half))
    site, (spec,) = only(model), find_sites(model).specs
    assert (spec.dtype, site.dtype) == (str(np.dtype(half)), "float32")
    fold_into(model)
    assert stored(model, "m.weight").dtype == half
    assert np.array_equal(stored(model, "m.weight").astype(np.float32), (WEIGHT + DELTA).T)


def test_isolated_weight_keeps_cast_of_shared_one() -> None:
    model = graph_reading(
        "c = Cast <to = 1> (W) h = MatMul(x, c) r = Identity(c) z = ReduceSum(r) y = Add(h, z)", Layout.IN_OUT
    )
    model.graph.initializers["m.weight"].const_value = ir.Tensor(WEIGHT.T.astype(np.float16), name="m.weight")
    model.graph.initializers["m.weight"].dtype = ir.DataType.FLOAT16
    for node, module in {"MatMul": "m", "ReduceSum": "other"}.items():
        (reader,) = [other for other in model.graph if other.op_type == node]
        reader.metadata_props[NAME_SCOPES] = repr(["", module, "f"])
    fold_into(model)
    np.testing.assert_allclose(run(model, x=X)["y"], X @ (WEIGHT + DELTA).T + WEIGHT.sum())


def test_folded_weight_of_constant_node_becomes_initializer() -> None:
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[N,3] x) => (float[N,2] y)
        { k = Constant <value = float[3,2] {1,4,2,5,3,6}> ()
          y = MatMul(x, k) }""")
    model.graph[1].metadata_props[NAME_SCOPES] = repr(["", "m", "linear"])
    fold_into(model)
    np.testing.assert_allclose(run(model, x=X)["y"], X @ (WEIGHT + DELTA).T)
    assert [node.op_type for node in model.graph] == ["MatMul"]
    assert [site.name for site in find_sites(model).linear] == ["m.weight"]


def test_convolution_kernel_has_layout_of_parameter() -> None:
    kernel = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    model = ir.from_onnx_text(f"""
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[N,3,L] x) => (float[N,2,M] y) <float[2,3,2] "c.weight" = {{{",".join(map(str, range(12)))}}}>
        {{ y = Conv(x, "c.weight") }}""")
    (spec,) = find_sites(model).specs
    assert (spec.shape, spec.layout) == ((2, 3, 2), Layout.OUT_IN)
    found, x = find_sites(model), np.random.default_rng(0).normal(size=(1, 3, 5)).astype(np.float32)
    pair = LoraPair(a=np.ones((1, 3, 2)), b=np.float32([[1], [2]]).reshape(2, 1, 1), scale=1.0)
    fold_graph(model, found, plan.make([an_adapter({"c": pair})], found.specs))
    after = kernel + np.float32([1, 2])[:, None, None]
    windows = np.lib.stride_tricks.sliding_window_view(x, 2, axis=2)  # (batch, in, position, kernel)
    np.testing.assert_allclose(run(model, x=x)["y"], np.einsum("bilk,oik->bol", windows, after), rtol=1e-5)


def test_gathered_table_is_embedding() -> None:
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 20]>
        g (int64[N] ids) => (float[N,2] y) <float[3,2] "e.weight" = {1,2,3,4,5,6}> { y = Gather("e.weight", ids) }""")
    found = find_sites(model)
    assert [(spec.shape, spec.layout) for spec in found.specs] == [((3, 2), Layout.EMBEDDING)]
    assert not (found.linear or found.notes)
    pair = LoraPair(a=[[1, 2]], b=[[1], [2], [3]], scale=1.0)  # of a linear layer whose weight is 3 x 2
    with pytest.raises(MatchError):
        plan.make([an_adapter({"e": pair})], found.specs)


@pytest.mark.parametrize("body", ["y = Gather <axis = 1> (W, i)", "t = Transpose(W) y = Gather(t, i)"])
def test_table_of_columns_is_no_embedding(body: str) -> None:
    model = graph_reading(f"i = Cast <to = 7> (x) {body}", Layout.IN_OUT, x="float[N]", y="float[A,B]")
    assert only(model).layout is Layout.OTHER


def test_attention_reads_packed_q_k_v_which_can_be_folded(tmp_path: Path) -> None:
    model = attention_graph()
    packed = stored(model, "w").T.copy()  # (3 hidden, hidden)
    weights = {name: packed[4 * at : 4 * at + 4] for at, name in enumerate("qkv")}
    checkpoint = open_checkpoint(
        base_file(tmp_path / "base.safetensors", {f"{n}.weight": w for n, w in weights.items()})
    )
    found = find_sites(model, checkpoint)
    assert [(site.name, site.block) for site in found.linear] == [
        ("q.weight", range(4)), ("k.weight", range(4, 8)), ("v.weight", range(8, 12)),
    ]  # fmt: skip
    rng = np.random.default_rng(1)
    pairs = {name: LoraPair(a=rng.normal(size=(1, 4)), b=rng.normal(size=(4, 1)), scale=1.0) for name in "qv"}
    steps = plan.make([an_adapter(pairs)], found.specs)
    fold_graph(model, found, steps)
    x = rng.normal(size=(2, 3, 4)).astype(np.float32)
    changed = {name: w + (pairs[name].delta() if name in pairs else 0) for name, w in weights.items()}
    np.testing.assert_allclose(run(model, x=x)["y"], attention(x, *changed.values()), rtol=1e-4, atol=1e-5)
    assert np.abs(attention(x, *changed.values()) - attention(x, *weights.values())).max() > 0.1


def test_function_reading_weight_twice_determines_no_layout() -> None:
    functions = """<domain: "own", opset_import: ["" : 20]>
        both (x, w) => (y) { v = Transpose(w) h = MatMul(x, v) y = MatMul(h, w) }"""
    model = graph_reading("y = own.both(x, W)", Layout.OUT_IN, y="float[N,3]", functions=functions)
    assert not find_sites(model).by_name


def test_transposition_set_by_caller_of_function_is_unknown() -> None:
    functions = """<domain: "own", opset_import: ["" : 20]>
        transposed <transB> (x, w) => (y) { y = Gemm <transB: int = @transB> (x, w) }"""
    model = graph_reading("y = own.transposed <transB = 1> (x, W)", Layout.OUT_IN, functions=functions)
    assert only(model).layout is Layout.OTHER


@pytest.mark.parametrize("trip", ["Loop", "Scan"])
def test_weight_captured_by_loop_body_is_found(trip: str) -> None:
    body = {
        "Loop": "n = Constant <value_int = 2> () y = Loop (n, , x) <body = b (int64 i, bool c, float[N,3] h) => "
        "(bool c2, float[N,3] o) { c2 = Identity(c) p = MatMul(h, W) o = MatMul(p, V) }>",
        "Scan": "y, z = Scan <num_scan_inputs = 1, body = b (float[3] h, float[3] s) => (float[3] h2, float[2] o) "
        "{ h2 = Identity(h) o = MatMul(s, W) }> (i0, x)",
    }[trip]
    model = ir.from_onnx_text(f"""
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[N,3] x) => ({"float[N,3] y" if trip == "Loop" else "float[N,2] z"})
        <float[3,2] "m.weight" = {{1,4,2,5,3,6}}, float[2,3] V = {{1,0,0,0,1,0}}, float[3] i0 = {{0,0,0}}>
        {{ {body.replace("W", '"m.weight"')} }}""")
    assert only(model).layout is Layout.IN_OUT
    fold_into(model)
    assert np.array_equal(stored(model, "m.weight"), (WEIGHT + DELTA).T)
    assert onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
