"""Graphs in fp64, against NumPy, and the operators with an fp64 kernel in onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from lora_export.graph.find_sites import find_sites
from lora_export.graph.onnx_file.writing import in_memory
from lora_export.graph.operators import MICROSOFT
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.ort_session import InMemoryGraph
from lora_export.verification.references.base_graph import inferred_types
from lora_export.verification.references.graph_fp64 import FP64_OPERATORS, KEEPS_ROUNDING, compute_weights_late, widen
from support.graphs import a_graph, quantised, run

DOUBLE, INT, BOOL = TensorProto.DOUBLE, TensorProto.INT64, TensorProto.BOOL
# The types of an operator's inputs, where these are not one or two fp64 tensors.
INPUTS: dict[str, list[int]] = {
    "BatchNormalization": [DOUBLE] * 5, "Clip": [DOUBLE] * 3, "CumSum": [DOUBLE, INT], "Expand": [DOUBLE, INT],
    "Gather": [DOUBLE, INT], "GatherElements": [DOUBLE, INT], "GatherND": [DOUBLE, INT],
    "LayerNormalization": [DOUBLE] * 3, "Pad": [DOUBLE, INT], "Range": [DOUBLE] * 3, "Reshape": [DOUBLE, INT],
    "ScatterElements": [DOUBLE, INT, DOUBLE], "ScatterND": [DOUBLE, INT, DOUBLE], "Slice": [DOUBLE, INT, INT],
    "Split": [DOUBLE, INT], "Squeeze": [DOUBLE, INT], "Tile": [DOUBLE, INT], "TopK": [DOUBLE, INT],
    "Unsqueeze": [DOUBLE, INT],
    "Where": [BOOL, DOUBLE, DOUBLE],
}  # fmt: skip
TWO = {
    *("Add", "Concat", "Div", "Einsum", "Equal", "FusedMatMul", "Gemm", "Greater", "GreaterOrEqual", "Less"),
    *("LessOrEqual", "MatMul", "Max", "Min", "Mod", "Mul", "Pow", "Sub", "Sum", "SimplifiedLayerNormalization"),
}
ATTRIBUTES: dict[str, dict[str, Any]] = {"Concat": {"axis": 0}, "Einsum": {"equation": "ij,jk->ik"}, "Mod": {"fmod": 1}}


@pytest.mark.parametrize(("domain", "operator"), sorted(FP64_OPERATORS))
def test_onnxruntime_has_fp64_kernel_of_every_listed_operator(domain: str, operator: str) -> None:
    kinds = INPUTS.get(operator, [DOUBLE] * (2 if operator in TWO else 1))
    names = [f"x{number}" for number in range(len(kinds))]
    outputs = ["y", "indices"] if operator == "TopK" else ["y"]
    node = helper.make_node(operator, names, outputs, domain=domain, **ATTRIBUTES.get(operator, {}))
    inputs = [helper.make_tensor_value_info(name, kind, None) for name, kind in zip(names, kinds, strict=True)]
    graph = helper.make_graph([node], "g", inputs, [onnx.ValueInfoProto(name="y")])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(MICROSOFT, 1)]
    message = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    session = onnxruntime.InferenceSession(message, providers=["CPUExecutionProvider"])  # raises without such a kernel
    assert [value.name for value in session.get_inputs()] == names


def in_fp64(model: ir.Model, **feeds: Any) -> tuple[NDArray[Any], tuple[str, ...]]:
    """The first output of the widened graph, and the operators that stayed narrow."""
    narrow = widen(model, inferred_types)
    (output, *_) = OnnxRunner(InMemoryGraph("wide", *in_memory(model)), optimise=False).run(feeds).values()
    return output, narrow


LAYERS = """
mlp (float[b, 4] x) => (float[b, 3] y)
<float[4, 8] w, float[8] c, float[3, 8] v> {
    hidden = MatMul(x, w)
    moved = Add(hidden, c)
    active = Tanh(moved)
    y = Gemm<transB: int = 1, alpha: float = 0.5>(active, v)
}
"""


def fill_randomly(model: ir.Model, dtype: Any = np.float32) -> dict[str, NDArray[Any]]:
    """Fill every initializer with random numbers. Returns the arrays by name."""
    rng = np.random.default_rng(0)
    arrays = {}
    for name, value in model.graph.initializers.items():
        assert value.shape is not None
        arrays[name] = rng.standard_normal(tuple(value.shape)).astype(dtype)
        value.const_value = ir.Tensor(arrays[name], name=name)
    return arrays


def layers() -> tuple[ir.Model, dict[str, NDArray[Any]], NDArray[np.float32]]:
    model = a_graph(LAYERS.replace("<float[4, 8] w", "<float[4, 8] w = {0}").replace("float[8] c", "float[8] c = {0}")
                    .replace("float[3, 8] v", "float[3, 8] v = {0}"))  # fmt: skip
    x = np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32)
    return model, fill_randomly(model), x


def test_wide_graph_equals_numpy_and_keeps_stored_dtypes() -> None:
    model, held, x = layers()
    w, c, v, wide_x = (array.astype(np.float64) for array in (held["w"], held["c"], held["v"], x))
    expected = 0.5 * np.tanh(wide_x @ w + c) @ v.T
    in_fp32 = run(model, x=x)["y"]
    output, narrow = in_fp64(model, x=x)
    assert output.dtype == np.float64 and narrow == ()
    assert np.abs(output - expected).max() < 1e-15 < 1e-9 < np.abs(in_fp32 - expected).max()
    assert {name: model.graph.initializers[name].dtype for name in held} == dict.fromkeys(held, ir.DataType.FLOAT)


def test_operator_without_fp64_kernel_stays_and_is_reported() -> None:
    model, held, x = layers()
    (tanh,) = (node for node in model.graph if node.op_type == "Tanh")
    tanh.op_type = "Erf"
    output, narrow = in_fp64(model, x=x)
    assert narrow == ("Erf",)
    hidden = x.astype(np.float64) @ held["w"].astype(np.float64) + held["c"]
    active = run(a_graph("g (float[n, m] x) => (float[n, m] y) { y = Erf(x) }"), x=hidden.astype(np.float32))["y"]
    assert np.abs(output - 0.5 * active.astype(np.float64) @ held["v"].T.astype(np.float64)).max() < 1e-15


def test_narrow_operator_keeps_half_precision_and_outputs_fp64() -> None:
    body = "g (float16[n] x) => (float16[n] y, float16[n] z) { twice = Add(x, x) y = Erf(twice) z = Neg(y) }"
    model = a_graph(body)
    output, narrow = in_fp64(model, x=np.array([0.25, 0.3, 2.0], np.float16))
    (erf,) = (node for node in model.graph if node.op_type == "Erf")
    assert narrow == ("Erf",) and erf.inputs[0] is not None
    assert erf.inputs[0].dtype is erf.outputs[0].dtype is ir.DataType.FLOAT16
    assert output.dtype == np.float64 and [output.name for output in model.graph.outputs] == ["y", "z"]


def test_cast_to_half_precision_rounds_only_if_intended() -> None:
    def graph() -> ir.Model:
        body = "g (float[n] x) => (float[n] y) { half = Cast<to: int = 10>(x) y = Cast<to: int = 1>(half) }"
        return a_graph(body)

    x = np.array([1.0001, 3.14159], np.float32)
    output, narrow = in_fp64(graph(), x=x)
    assert np.array_equal(output, x.astype(np.float64)) and narrow == ()
    rounding = graph()
    next(iter(rounding.graph)).metadata_props[KEEPS_ROUNDING] = "once"
    output, _ = in_fp64(rounding, x=x)
    assert np.array_equal(output, x.astype(np.float16).astype(np.float64))


def test_subgraph_reads_values_in_former_dtype() -> None:
    model = a_graph("""
        g (float[n] x, bool c) => (float[n] y) {
            twice = Add(x, x)
            z = If (c) <then_branch = yes () => (float[n] a) { a = Erf(twice) },
                        else_branch = no () => (float[n] b) { b = Neg(twice) }>
            y = Mul(z, z)
        }
    """)
    x = np.array([0.25, 2.0], np.float32)
    output, narrow = in_fp64(model, x=x, c=np.array(False))
    assert np.array_equal(output, (2 * x.astype(np.float64)) ** 2) and narrow == ("If",)


def test_missing_types_are_inferred() -> None:
    model, held, x = layers()
    for node in model.graph:
        for output in node.outputs:
            if not output.is_graph_output():
                output.type = None
    output, _ = in_fp64(model, x=x)
    hidden = np.tanh(x.astype(np.float64) @ held["w"].astype(np.float64) + held["c"])
    assert np.abs(output - 0.5 * hidden @ held["v"].T.astype(np.float64)).max() < 1e-15


@pytest.mark.parametrize("bits", [4, 8])
def test_matmul_nbits_becomes_matmul_by_dequantised_weight(bits: int) -> None:
    model, _, x = layers()
    small = quantised(model, bits=bits, block=16)
    (node,) = (node for node in small.graph if node.op_type == "MatMulNBits")
    (found,) = (site for site in find_sites(small).unnamed if site.node is node)
    weight = found.matrix.astype(np.float64)  # (out, in)
    held = {name: value.const_value.numpy() for name, value in small.graph.initializers.items() if value.const_value}
    output, narrow = in_fp64(small, x=x)
    expected = 0.5 * np.tanh(x.astype(np.float64) @ weight.T + held["c"]) @ held["v"].T.astype(np.float64)
    assert np.abs(output - expected).max() < 1e-15 and narrow == ()


def test_nodes_of_constants_move_to_the_beginning() -> None:
    model = a_graph("""
        g (float[N,2] x) => (float[N,2] y)
        <float[2,2] a = {1,2,3,4}, float[2,2] b = {1,0,1,1}>
        { h = MatMul(x, a)
          t = Transpose(b)
          u = Add(t, b)
          k = MatMul(h, u)
          z = Add(x, a)
          y = Add(k, z) }""")
    x = np.float32([[1, 2], [3, 4]])
    before = run(model, x=x)["y"]
    compute_weights_late(model)
    assert [node.op_type for node in model.graph] == ["Transpose", "Add", "MatMul", "MatMul", "Add", "Add"]
    assert [node.outputs[0].name for node in model.graph] == ["t", "u", "h", "k", "z", "y"]
    assert np.array_equal(run(model, x=x)["y"], before)
