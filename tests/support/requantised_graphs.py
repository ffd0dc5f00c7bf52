"""Graphs of one quantised weight, and merges that quantise it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from lora_export import formats, plan
from lora_export.graph.find_sites import find_sites
from lora_export.graph.merge.copy_parts import MergeRun
from lora_export.graph.merge.merge_graph import merge_graph
from lora_export.graph.onnx_file.reading import load_graph, open_graph
from lora_export.weights.checkpoint import open_checkpoint
from lora_export.weights.merge_report import MergeReport
from support.handmade import graph_file

RNG = np.random.default_rng(0)
IN, OUT = 80, 48  # 80 is not a multiple of 32
W = RNG.normal(size=(IN, OUT)).astype(np.float32)
A, B = RNG.normal(size=(4, IN)), RNG.normal(size=(OUT, 4)) * 0.3
BLOCK_SIZES = pytest.mark.parametrize("block", [1000, 1 << 21], ids=["in many blocks", "in one"])
LOCATIONS = pytest.mark.parametrize("beside", [False, True], ids=["inside", "beside"])
# Two of the four pairs of the above, and the other two
PAIRED = pytest.mark.parametrize(("beside", "block"), [(False, 1000), (True, 1 << 21)])
PAIRED_OTHERWISE = pytest.mark.parametrize(("beside", "block"), [(True, 1000), (False, 1 << 21)])

# kind -> integers (in, out), attributes, scales, zero points
DEQUANTISED = {
    "int8 by tensor": ([[2, -2], [4, 126]], "<axis = 0>", np.float32(0.5), np.int8(0)),
    "int8 by column": ([[2, -2], [4, 127]], "<axis = 1>", np.float32([0.5, 1]), None),
    "int8 by row": ([[2, -2], [4, 127]], "<axis = 0>", np.float32([0.5, 1]), None),
    "uint8 by column": ([[2, 128], [4, 255]], "<axis = 1>", np.float32([0.5, 1]), np.uint8([3, 130])),
    "int4 by column": (
        [[2, -2], [4, -8]],
        "<axis = 1>",
        np.array([0.5, 1], ml_dtypes.bfloat16),
        np.array([1, -1], ml_dtypes.int4),
    ),
    "int4 down": ([[2, -2], [4, -8]], "<axis = 0, block_size = 2>", np.float32([[0.5, -1]]), None),
    "int16 by tensor": ([[2, -2], [4, 126]], "<axis = 0>", np.float32(0.5), np.int16(0)),
}


def dequantize_graph(kind: str) -> ir.Model:
    """A graph with a 2 x 2 weight `fc.weight` (in, out) behind a DequantizeLinear."""
    integers, attributes, scale, zero = DEQUANTISED[kind]
    dtype = np.dtype(kind.split()[0]) if "4" not in kind.split()[0] else ml_dtypes.int4
    proto = ir.to_proto(
        ir.from_onnx_text(f"""
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N,2] x) => (float[N,2] y) <int8[1] "fc.weight_quantized" = {{0}}, float s = {{0}}, int8[1] z = {{0}}>
        {{ w = DequantizeLinear {attributes} ("fc.weight_quantized", s{", z" if zero is not None else ""})
           v = Cast <to = 1> (w)
           y = MatMul(x, v) }}""")
    )
    model = ir.from_proto(proto)
    for name, array in {"fc.weight_quantized": np.array(integers).astype(dtype), "s": scale, "z": zero}.items():
        value = model.graph.initializers[name]
        if array is None:
            del model.graph.initializers[name]
            continue
        value.const_value = ir.Tensor(np.asarray(array), name=name)
        value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape(np.shape(array))
    return model


def float_graph(path: Path, weight: NDArray[Any] = W) -> ir.Model:
    """A graph with the float weight `fc.weight` (in, out)."""
    return ir.from_proto(onnx.load(graph_file(path, {"fc.weight": weight})))


def save_model(model: ir.Model, path: Path, *, beside: bool = False) -> Path:
    """Save a graph, its tensors inside its file or beside it."""
    external = {"save_as_external_data": True, "location": "w.data", "size_threshold": 0} if beside else {}
    onnx.save(ir.to_proto(model), path, **external)
    return path


def merge_requantised(
    path: Path, adapter: Path, *, base: Path | None = None, **options: Any
) -> tuple[ir.Model, MergeReport]:
    """Merge an adapter into a graph's file and quantise the weights again. Returns the merged graph and the report."""
    stage = path.parent / f"out{len(list(path.parent.iterdir()))}"
    stage.mkdir()
    graph = open_graph(path)
    sites = find_sites(graph.model, None if base is None else open_checkpoint(base))
    steps = plan.make([formats.load(adapter)], sites.specs)
    report = merge_graph(steps, graph, sites, stage, MergeRun(file_name="m.onnx", requantise=True, **options))
    return load_graph(stage / "m.onnx"), report


def merge_command(path: Path, adapter: Path, *options: str) -> list[str]:
    """The command line of a merge into `merged.onnx`."""
    return ["merge", str(path), str(adapter), "-o", str(path.with_name("merged.onnx")), *options]


def dequantised_weight(model: ir.Model, name: str = "fc.weight") -> NDArray[np.float32]:
    """The weight that the graph computes with (out, in)."""
    return find_sites(model).by_name[name][0].matrix


def retention_and_noise(report: MergeReport) -> tuple[float, float]:
    """The statistics of the only changed weight."""
    (result,) = report.results
    return result.retention, result.noise


def expected_retention_and_noise(before: Any, change: Any, after: Any) -> tuple[float, float]:
    """The same statistics in fp64."""
    actual = np.asarray(after, np.float64) - before
    retention = float(np.vdot(actual, change) / np.vdot(change, change))
    return retention, float(np.linalg.norm(actual - change) / np.linalg.norm(change))
