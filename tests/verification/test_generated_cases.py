"""What the generated inputs reach: exports that are wrong only at some sizes or for some values are not `same`."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers

from lora_export.graph.onnx_file.writing import save_graph
from lora_export.models.export import to_onnx
from lora_export.models.load import load_model
from lora_export.models.model import Model
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.verification import parity
from lora_export.verification.against_pytorch import PyTorchReferences
from lora_export.verification.proof import prove
from support.small_models import small_model


def verdict_of(graph: ir.Model, model: Model, folder: Path) -> parity.Verdict:
    folder.mkdir()
    save_graph(graph, folder, "m.onnx")
    return prove(OnnxRunner(folder / "m.onnx"), PyTorchReferences(model)).verdict


def exported(model: Model) -> ir.Model:
    return to_onnx(model.module, model.example_inputs(), axes=model.axes)


@functools.cache
def subject(name: str) -> tuple[Model, ir.Model]:
    """A model and its export, which no test changes."""
    model = load_model(str(small_model(name, Path(tempfile.mkdtemp()) / "base")))
    return model, exported(model)


@pytest.mark.parametrize("name", ["vit", "bert", "llama"])
def test_a_right_export_is_same(name: str, tmp_path: Path) -> None:
    model, graph = subject(name)
    assert verdict_of(graph.clone(), model, tmp_path / "right").same


# --- values --------------------------------------------------------------------------------------


def with_clip(graph: ir.Model, name: str, limit: float) -> ir.Model:
    """The graph with an input that is clipped to [-limit, limit]."""
    (value,) = (value for value in graph.graph.inputs if value.name == name)
    bounds = []
    for bound in (-limit, limit):
        tensor = ir.Tensor(np.array(bound, np.float32), name=f"bound{bound}")
        type_ = ir.TensorType(tensor.dtype)
        bounds.append(ir.Value(name=tensor.name, const_value=tensor, type=type_, shape=tensor.shape))
        graph.graph.initializers[f"bound{bound}"] = bounds[-1]
    readers = list(value.uses())
    clip = ir.node("Clip", [value, *bounds])
    clip.outputs[0].name, clip.outputs[0].type, clip.outputs[0].shape = f"{name}.clipped", value.type, value.shape
    for node, index in readers:
        node.replace_input_with(index, clip.outputs[0])
    graph.graph.insert_before(graph.graph[0], clip)
    return graph


@pytest.mark.parametrize("limit", [1.0, 2.0, 3.0])
def test_clipped_pixels_are_different(limit: float, tmp_path: Path) -> None:
    model, graph = subject("vit")
    clipped = with_clip(graph.clone(), "pixel_values", limit)
    assert verdict_of(clipped, model, tmp_path / "wrong").outcome is parity.Outcome.DIFFERENT


# --- sizes ---------------------------------------------------------------------------------------


def wrong_where(graph: ir.Model, condition: Callable[[int], bool], axis: int) -> ir.Model:
    """The graph whose first output is 1 greater where the size of the first input's axis fulfils a condition."""
    table = ir.Tensor(np.float32([condition(size) for size in range(1000)]), name="wrong_sizes")
    errors = ir.Value(name=table.name, const_value=table, type=ir.TensorType(table.dtype), shape=table.shape)
    graph.graph.initializers["wrong_sizes"] = errors
    output = graph.graph.outputs[0]
    shape = ir.node("Shape", [graph.graph.inputs[0]], {"start": axis, "end": axis + 1})
    error = ir.node("Gather", [errors, shape.outputs[0]])
    total = ir.node("Add", [output, error.outputs[0]])
    total.outputs[0].name, output.name = output.name, f"{output.name}.right"
    total.outputs[0].type, total.outputs[0].shape = output.type, output.shape
    shape.outputs[0].name, error.outputs[0].name = "its_size", "its_error"
    graph.graph.extend([shape, error, total])
    graph.graph.outputs[0] = total.outputs[0]
    return graph


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize(
    ("axis", "condition"),
    [(0, lambda size: size % 2 == 0 and size > 2), (1, lambda size: size > 32), (1, lambda size: size > 60)],
    ids=["even batches", "more than 32 tokens", "more than 60 tokens"],
)
def test_graph_that_is_wrong_at_some_sizes_is_different(
    name: str, axis: int, condition: Callable[[int], bool], tmp_path: Path
) -> None:
    model, graph = subject(name)
    wrong = verdict_of(wrong_where(graph.clone(), condition, axis), model, tmp_path / "wrong")
    assert wrong.outcome is parity.Outcome.DIFFERENT


@pytest.mark.slow
@pytest.mark.parametrize("window", [32, 150])
def test_export_without_its_sliding_window_is_different(window: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, sliding_window=window,
    )  # fmt: skip
    transformers.MistralForCausalLM(config).save_pretrained(tmp_path / "base")
    model = load_model(str(tmp_path / "base"))
    assert verdict_of(exported(model), model, tmp_path / "right").same
    without = load_model(str(tmp_path / "base"))
    without.module.config.sliding_window = None
    wrong = verdict_of(exported(without), model, tmp_path / "wrong")
    assert wrong.outcome is parity.Outcome.DIFFERENT
    assert {reason.case for reason in wrong.reasons} == {f"batch 1 x sequence {max(96, window + 32)}"}
