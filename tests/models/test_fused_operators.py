"""Onnxruntime's own operators in a decoder's graph: the same values, for batches with padding too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from lora_export.errors import RuntimeRefused
from lora_export.graph.onnx_file.writing import save_graph
from lora_export.models.cached_decoder import export_decoder
from lora_export.models.fused_operators import fuse_operators
from lora_export.models.past_length import takes_shared_buffer
from lora_export.runtime.kv_cache import CacheRunner, with_cache
from lora_export.runtime.onnx_runner import OnnxRunner
from support.generators import DECODERS, assert_same_logits


def operators(graph: ir.Model) -> set[str]:
    return {node.op_type for node in graph.graph}


@pytest.mark.parametrize("provider", ["cpu", "cuda"])
def test_fused_graph_computes_the_same_in_batches_with_padding(provider: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = DECODERS["llama"]().eval()
    graph = export_decoder(module)
    declared = [value.shape for value in (*graph.graph.inputs, *graph.graph.outputs)]
    assert "GroupQueryAttention" not in operators(graph)
    fuse_operators(graph, provider)
    assert {"RotaryEmbedding", "SkipSimplifiedLayerNormalization"} <= operators(graph)
    assert ("GroupQueryAttention" in operators(graph)) == (provider == "cpu")  # CUDA has it in half precision only
    assert takes_shared_buffer(graph) == (provider == "cpu")
    assert [value.shape for value in (*graph.graph.inputs, *graph.graph.outputs)] == declared
    *_, path = save_graph(graph, tmp_path, "model.onnx")
    runner = with_cache(OnnxRunner(path))
    assert isinstance(runner, CacheRunner)
    assert runner.takes_padding  # its mask is a bias of the attention, which knows where the padding is
    assert_same_logits(runner, module)


def test_optional_inputs_are_no_constants() -> None:
    rank = ir.SymbolicDim("rank")
    x, b = (
        ir.Value(name=name, shape=ir.Shape([2, size]), type=ir.TensorType(ir.DataType.FLOAT))
        for name, size in (("x", 2), ("b", rank))
    )
    b.const_value = ir.tensor(np.zeros((2, 0), np.float32), name="b")
    product = ir.node("MatMul", [x, b])
    graph = ir.Graph([x, b], product.outputs, nodes=[product], initializers=[b], opset_imports={"": 20})
    model = ir.Model(graph, ir_version=10)
    fuse_operators(model, "cpu")
    assert [node.op_type for node in model.graph] == ["MatMul"]
    assert model.graph.initializers["b"].const_value is not None
    assert b in model.graph.inputs


@pytest.mark.parametrize("number", [1e-8, 1 + 2.0**-17])
def test_numbers_that_are_nearly_zero_or_one_stay(number: float) -> None:
    shape, dtype = ir.Shape([2]), ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="x", shape=shape, type=dtype)
    c = ir.Value(name="c", shape=ir.Shape([]), type=dtype, const_value=ir.tensor(np.float32(number), name="c"))
    node = ir.node("Add" if number < 1 else "Mul", [x, c])
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[c], opset_imports={"": 20})
    model = ir.Model(graph, ir_version=10)
    fuse_operators(model, "cpu")
    assert [each.op_type for each in model.graph] == [node.op_type]
    assert [value.name for value in model.graph.inputs] == ["x"]
    assert model.graph.initializers["c"].const_value is not None


def test_failure_of_a_rewrite_tells_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: object) -> None:
        raise ValueError("no such axis")

    monkeypatch.setattr("transformers.exporters.onnxruntime_fusions._STEPS", ((fails, None),))
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 20}), ir_version=10)
    with pytest.raises(RuntimeRefused, match="cannot be fused for cpu: no such axis") as refused:
        fuse_operators(model, "cpu")
    assert "Without fuse=" in str(refused.value)


def test_attention_without_a_bias_is_known_to_count_the_mask(tmp_path: Path) -> None:
    torch.manual_seed(0)
    graph = export_decoder(DECODERS["llama"]().eval())
    fuse_operators(graph, "cpu")
    for node in graph.graph:
        if node.op_type == "GroupQueryAttention":
            node.replace_input_with(10, None)
    *_, path = save_graph(graph, tmp_path, "model.onnx")
    runner = with_cache(OnnxRunner(path))
    assert isinstance(runner, CacheRunner)
    assert not runner.takes_padding
    assert "its GroupQueryAttention takes no padding within a sequence: none was tried" in runner.notes
