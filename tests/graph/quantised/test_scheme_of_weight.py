"""Schemes that can be quantised again, and those that are refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from lora_export import cli
from lora_export.graph.onnx_file.reading import load_graph
from support.folder_contents import folder_contents
from support.handmade import peft_adapter
from support.requantised_graphs import dequantize_graph, merge_command, save_model


def with_tensors(kind: str, arrays: dict[str, NDArray[Any]]) -> ir.Model:
    model = dequantize_graph(kind)
    for name, array in arrays.items():
        value, tensor = model.graph.initializers[name], ir.Tensor(array, name=name)
        value.const_value, value.type = tensor, ir.TensorType(tensor.dtype)
    return model


WEIGHT, FLOAT8 = "fc.weight_quantized", ml_dtypes.float8_e4m3fn
float8 = partial(with_tensors, "int8 by tensor", {WEIGHT: np.ones((2, 2), FLOAT8), "z": np.zeros((), FLOAT8)})
int32 = partial(with_tensors, "int8 by row", {WEIGHT: np.ones((2, 2), np.int32)})
without_zero_points = partial(with_tensors, "int8 by row", {WEIGHT: np.ones((2, 2), np.uint8)})
not_finite = partial(with_tensors, "int8 by row", {"s": np.float32([1, np.nan])})


def nf4() -> ir.Model:
    return ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
        g (float[N,16] x) => (float[N,2] y)
        <uint8[16] "fc.weight_Bnb4" = {0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0}, float[2] s = {0.5, 2}>
        { y = com.microsoft.MatMulBnb4 <K = 16, N = 2, quant_type = 1, block_size = 16> (x, "fc.weight_Bnb4", s) }""")


def by_group_index() -> ir.Model:
    return ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
        g (float[N,3] x) => (float[N,2] y)
        <uint8[2,1,8] "fc.weight_Q4" = {0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0}, float[2] s = {1, 2}, int32[3] i = {0, 0, 0}>
        { y = com.microsoft.MatMulNBits <K = 3, N = 2, bits = 4, block_size = 16> (x, "fc.weight_Q4", s, , i) }""")


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (float8, r"fc.weight is quantised in a way that cannot be repeated \(float8e4m3fn by tensor\)"),
        (int32, r"fc.weight is quantised in a way that cannot be repeated \(int32 by channel\)"),
        (without_zero_points, r"fc.weight is quantised without zero points .*: it cannot store negative values"),
        (not_finite, r"fc.weight: the base holds 2 values that are not finite"),
        (nf4, r"lora_A.weight: fc.weight is uint8 of MatMulBnb4: a quantised weight is never merged silently"),
        (
            by_group_index,
            r"lora_A.weight: fc.weight is uint8 of MatMulNBits: a quantised weight is never merged silently",
        ),
    ],
)
@pytest.mark.parametrize("beside", [False, True])
def test_unsupported_scheme_is_refused_by_name(
    make: Callable[[], ir.Model], problem: str, beside: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_model(make(), tmp_path / "m.onnx", beside=beside)
    wide = load_graph(path).graph.inputs[0].shape[1]
    adapter = peft_adapter(tmp_path / "ad", {"fc": (np.ones((1, int(wide))), [[1], [2]])})
    before = folder_contents(tmp_path)
    assert cli.run(merge_command(path, adapter, "--requantize")) == 3
    assert re.search(problem, capsys.readouterr().err)
    assert folder_contents(tmp_path) == before
