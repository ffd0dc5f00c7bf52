"""Graphs that compute in fp16 and return fp32 are judged in fp16 where that is stated, and only there."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnxruntime.transformers.float16 import convert_float_to_float16

from defects import subjects
from lora_export import plan
from lora_export.graph.find_sites import find_sites
from lora_export.graph.insert.adapter_nodes import insert_nodes
from lora_export.graph.merge.fold import fold_graph
from lora_export.graph.onnx_file.writing import save_graph
from lora_export.lora import Adapter
from lora_export.models.export import to_onnx
from lora_export.models.load import load_model
from lora_export.models.model import Model
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.verification import parity
from lora_export.verification.against_pytorch import PyTorchReferences
from lora_export.verification.inputs.model_inputs import as_declared
from lora_export.verification.proof import prove
from lora_export.verification.references.half_precision import is_half_inside, note_on_half
from support.graphs import quantised
from support.small_models import small_model

SUBJECTS = ("llama", "net")


def in_fp16(graph: ir.Model, *, keep_io: bool = True) -> ir.Model:
    made = ir.from_proto(convert_float_to_float16(ir.to_proto(graph), keep_io_types=keep_io))
    made.graph.sort()  # the converter appends its casts of the inputs at the end
    return made


def saved(graph: ir.Model, folder: Path) -> OnnxRunner:
    folder.mkdir(parents=True, exist_ok=True)
    save_graph(graph, folder, "m.onnx")
    return OnnxRunner(folder / "m.onnx")


def adapted(name: str, adapter: Adapter, mode: str) -> ir.Model:
    graph = subjects._exported(name).clone()
    found = find_sites(graph)
    (fold_graph if mode == "merged" else insert_nodes)(graph, found, plan.make([adapter], found.specs))
    return graph


@functools.cache
def halved(name: str) -> Model:
    return load_model(subjects.loaded(name).source, dtype=torch.float16)


@pytest.mark.parametrize("mode", ["merged", "nodes"])
@pytest.mark.parametrize("name", SUBJECTS)
def test_fp16_graph_with_fp32_outputs_is_judged_in_fp16(name: str, mode: str, tmp_path: Path) -> None:
    adapter = subjects.adapter(name, "linear")
    runner = saved(in_fp16(adapted(name, adapter, mode)), tmp_path)
    assert is_half_inside(runner)
    right = prove(runner, PyTorchReferences(halved(name), [adapter])).verdict
    assert right.same, str(right)
    assert right.dtype == "float16"
    assert {each.figures.dtype for each in right.comparisons if each.figures} == {"float32"}
    off = prove(runner, PyTorchReferences(halved(name), [subjects.adapter(name, "linear", seed=1)])).verdict
    assert off.outcome is parity.Outcome.DIFFERENT


@pytest.mark.parametrize("name", SUBJECTS)
def test_fp16_graph_is_different_from_fp32_with_a_note(name: str, tmp_path: Path) -> None:
    adapter = subjects.adapter(name, "linear")
    runner = saved(in_fp16(adapted(name, adapter, "merged")), tmp_path)
    verdict = prove(runner, PyTorchReferences(subjects.loaded(name), [adapter])).verdict
    assert verdict.outcome is parity.Outcome.DIFFERENT and verdict.dtype == "float32"
    assert note_on_half() in verdict.notes


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_few_products_in_fp16_do_not_widen_the_limits(name: str, tmp_path: Path) -> None:
    """The limits of fp16 are for graphs that compute in it: a single small product does not make one."""
    adapter = subjects.adapter(name, "linear")
    graph = adapted(name, adapter, "merged")
    assert not is_half_inside(saved(graph.clone(), tmp_path / "fp32"))
    small = min((site for site in find_sites(graph).linear if not site.block), key=lambda site: np.prod(site.shape))
    value = small.value
    assert value.const_value is not None and value.name is not None
    value.const_value = ir.Tensor(value.const_value.numpy().astype(np.float16), name=value.name)
    value.type = ir.TensorType(ir.DataType.FLOAT16)
    cast = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)})
    cast.outputs[0].name = f"{value.name}.cast"
    for node, index in list(value.uses()):
        if node is not cast:
            node.replace_input_with(index, cast.outputs[0])
    graph.graph.insert_before(graph.graph[0], cast)
    runner = saved(graph, tmp_path / "mixed")
    assert not is_half_inside(runner)
    verdict = prove(runner, PyTorchReferences(halved(name), [adapter])).verdict
    assert verdict.outcome is parity.Outcome.DIFFERENT
    assert any("dtype is float32" in reason.text for reason in verdict.reasons)


def test_quantised_graph_with_fp16_scales_is_judged_in_fp16(tmp_path: Path) -> None:
    adapter = subjects.adapter("llama", "linear")
    graph = quantised(in_fp16(subjects._exported("llama").clone()), bits=8)
    for node in graph.graph:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)
    found = find_sites(graph)
    insert_nodes(graph, found, plan.make([adapter], found.specs))
    runner = saved(graph, tmp_path)
    assert is_half_inside(runner)
    verdict = prove(runner, PyTorchReferences(halved("llama"), [adapter])).verdict
    assert verdict.same, str(verdict)


def test_float_inputs_are_given_in_the_declared_dtype(tmp_path: Path) -> None:
    base = small_model("vit", tmp_path / "base")
    model = load_model(str(base))
    graph = to_onnx(model.module, model.example_inputs(), axes=model.axes)
    runner = saved(in_fp16(graph), tmp_path / "graph")
    verdict = prove(runner, PyTorchReferences(load_model(str(base), dtype=torch.float16))).verdict
    assert verdict.outcome is not parity.Outcome.DIFFERENT, str(verdict)
    assert all(each.figures and each.figures.ratio and each.figures.ratio < 2 for each in verdict.comparisons)
    pixels = np.float16([1.5])
    assert as_declared(runner, {"pixel_values": pixels, "other": pixels})["pixel_values"].dtype == np.float32
    assert as_declared(runner, {"pixel_values": pixels, "other": pixels})["other"].dtype == np.float16
    narrow = saved(in_fp16(graph, keep_io=False), tmp_path / "narrow")
    assert as_declared(narrow, {"pixel_values": pixels})["pixel_values"].dtype == np.float16
    assert not is_half_inside(narrow)
