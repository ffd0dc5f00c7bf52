"""The peak memory of a merge into a graph: independent of the size of the weights, quantised ones too."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from support import peak
from support.handmade import peft_adapter

WIDTH = 4096
BLOCK = 32
LIMIT = 200  # MiB
# Outputs of the head, its rank, outputs of each other layer. Both adapters are in memory and have the same size.
SMALL, LARGE = (14_000, 127, 2_800), (140_000, 16, 28_000)


def floats(layers: Mapping[str, int]) -> Iterator[tuple[onnx.NodeProto, list[TensorProto]]]:
    for name, rows in layers.items():
        tensor = TensorProto(name=f"{name}.weight", data_type=TensorProto.FLOAT16, dims=[WIDTH, rows])
        yield helper.make_node("MatMul", ["x", tensor.name], [f"y.{name}"], name=name), [tensor]


def four_bits(layers: Mapping[str, int]) -> Iterator[tuple[onnx.NodeProto, list[TensorProto]]]:
    for name, rows in layers.items():
        blocks = WIDTH // BLOCK
        levels = TensorProto(name=f"{name}.weight_Q4", data_type=TensorProto.UINT8, dims=[rows, blocks, BLOCK // 2])
        scales = TensorProto(name=f"{name}.weight_scales", data_type=TensorProto.FLOAT16, dims=[rows * blocks])
        shape = {"K": WIDTH, "N": rows, "bits": 4, "block_size": BLOCK}
        inputs = ["x", levels.name, scales.name]
        node = helper.make_node("MatMulNBits", inputs, [f"y.{name}"], name=name, domain="com.microsoft", **shape)
        yield node, [levels, scales]


def in_bands(layers: Mapping[str, int]) -> Iterator[tuple[onnx.NodeProto, list[TensorProto]]]:
    """Scales that 128 rows share, which are longer than a block."""
    for name, rows in layers.items():
        levels = TensorProto(name=f"{name}.weight_quantized", data_type=TensorProto.INT8, dims=[WIDTH, rows])
        scales = TensorProto(name=f"{name}.weight_scale", data_type=TensorProto.FLOAT16, dims=[WIDTH // 128, rows])
        pair = helper.make_node(
            "DequantizeLinear", [levels.name, scales.name], [f"w.{name}"], name=f"dq.{name}", axis=0, block_size=128
        )
        yield pair, [levels, scales]
        yield helper.make_node("MatMul", ["x", f"w.{name}"], [f"y.{name}"], name=name), []


def sparse_graph(path: Path, parts: Iterator[tuple[onnx.NodeProto, list[TensorProto]]]) -> Path:
    """A graph whose weights are zeros in a sparse file beside it."""
    nodes, tensors = [], []
    for node, theirs in parts:
        nodes.append(node)
        tensors += theirs
    place = 0
    for tensor in tensors:
        size = int(np.prod(tensor.dims, dtype=np.int64)) * (2 if tensor.data_type == TensorProto.FLOAT16 else 1)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": f"{path.name}.data", "offset": place, "length": size}.items():
            tensor.external_data.add(key=key, value=str(value))
        place += size + -size % 4096
    data = path.with_name(f"{path.name}.data")
    data.touch()
    os.truncate(data, place)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["batch", WIDTH])
    outputs = [node.output[0] for node in nodes if node.op_type != "DequantizeLinear"]
    ys = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["batch", None]) for name in outputs]
    graph = helper.make_graph(nodes, "g", [x], ys, tensors)
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    path.write_bytes(helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString())
    return path


def merge(graph: Path, adapter: Path, out: Path) -> list[object]:
    return ["merge", graph, adapter, "-o", out, "--requantize"]


def export(graph: Path, adapter: Path, out: Path) -> list[object]:
    """The command without verification, for which onnxruntime reads the whole graph."""
    return ["onnx", graph, "-a", adapter, "-o", out, "--lora", "merged", "--no-verify"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "kind", "layers"),
    [(merge, floats, 32), (merge, four_bits, 8), (merge, in_bands, 4), (export, floats, 32)],
)
def test_ten_times_larger_graph_needs_no_more_memory(tmp_path, command, kind, layers):
    peaks, sizes = [], []
    for name, (rows, rank, others) in {"small": SMALL, "large": LARGE}.items():
        if kind is in_bands:  # each of its tensors needs several passes
            rows, rank, others = rows // 5, 2 * rank, others // 5  # noqa: PLW2901
        graph = sparse_graph(
            tmp_path / f"{name}.onnx", kind({"head": rows, **{f"layer.{number}": others for number in range(layers)}})
        )
        rng = np.random.default_rng(0)
        pair = rng.standard_normal((rank, WIDTH)), rng.standard_normal((rows, rank))
        adapter, out = peft_adapter(tmp_path / name, {"head": pair}), tmp_path / f"{name}.out.onnx"
        run = peak.run([sys.executable, "-m", "lora_export", *command(graph, adapter, out)])
        assert run.code == 0
        peaks.append(run.peak)
        (data,) = tmp_path.glob(f"{name}.out.onnx.*.data")
        sizes.append(data.stat().st_size)
        data.unlink()
        print(f"{name}: {sizes[-1] / 1e9:.2f} GB, {peaks[-1]:.0f} MiB, {run.seconds:.0f} s")
    assert sizes[1] > 9.9 * sizes[0]
    assert sizes[1] > 8e9 or kind is not floats
    assert max(peaks) <= LIMIT
    assert abs(peaks[1] - peaks[0]) < 16  # MiB
