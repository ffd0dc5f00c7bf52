"""How a candidate stores its weights: rounded in a checkpoint, or quantised in a graph."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnxruntime.transformers.float16 import convert_float_to_float16
from torch import nn

from defects import subjects
from lora_export import plan
from lora_export.errors import Different, InputRefused
from lora_export.graph.find_sites import find_sites
from lora_export.graph.insert.adapter_nodes import insert_nodes
from lora_export.graph.merge.fold import fold_graph
from lora_export.graph.onnx_file.writing import save_graph
from lora_export.graph.quantised_weights import Steps
from lora_export.lora import Adapter
from lora_export.models.export import to_onnx
from lora_export.models.load import from_module, load_model
from lora_export.models.model import Model
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.three_graphs import EncoderDecoderRunner
from lora_export.runtime.torch_runners import ModuleRunner
from lora_export.verification import parity
from lora_export.verification.against_pytorch import PyTorchReferences
from lora_export.verification.inputs.model_inputs import as_declared
from lora_export.verification.parity import Wide
from lora_export.verification.proof import prove
from lora_export.verification.references.candidate_weights import quantised_weights_of, rounding_of
from lora_export.verification.references.half_precision import is_half_inside, note_on_half
from lora_export.verification.references.quantisation_error import NearestNumbers, quantisation_error_of
from lora_export.verification.references.quantised_weights import DequantisedWeight, QuantisedMerge
from support.graphs import a_graph, quantised
from support.slow import slow_but
from support.small_layers import a_linear, a_model
from support.small_models import small_model

pytestmark = pytest.mark.usefixtures("undiagnosed")

MODEL = from_module(a_model(), torch.ones(2, 3))


class Prefixed(nn.Module):
    """The layer under the name `bert.0`, beside a head."""

    def __init__(self) -> None:
        super().__init__()
        self.bert, self.head = a_model(), nn.Linear(2, 1)


@pytest.mark.parametrize(
    ("module", "stored", "rounded"),
    [
        (a_model(), {"0.weight": "bfloat16", "0.bias": "float32"}, {"0.weight": "bfloat16"}),
        (
            Prefixed(),
            {"0.weight": "float16", "head.weight": "float16"},
            {"bert.0.weight": "float16", "head.weight": "float16"},
        ),
        (a_linear(), {"bert.0.weight": "bfloat16"}, {"weight": "bfloat16"}),
        (a_model(), {"0.weight": "float64", "other": "bfloat16"}, {}),
        (Prefixed(), {"weight": "float32", "0.weight": "float16"}, {"bert.0.weight": "float16"}),
    ],
    ids=["its own names", "the file lacks a prefix", "the module lacks a prefix", "no half precision", "longest name"],
)
def test_weights_in_half_precision_are_rounded_by_name(
    module: nn.Module, stored: dict[str, str], rounded: dict[str, str]
) -> None:
    candidate = ModuleRunner(a_model(), stored_dtypes=stored)
    rounding, preferred = rounding_of(candidate, module, {})
    assert rounding == rounded
    assert preferred.keys() == candidate.module.state_dict().keys()


@pytest.mark.parametrize(
    ("stored", "rounded"),
    [
        ({"0.weight": "float16"}, {"0.weight": "float16", "1.weight": "float16"}),
        ({"0.weight": "float16", "1.weight": "float32"}, {"0.weight": "float16"}),
    ],
    ids=["the file has one name", "the file has both"],
)
def test_a_tied_weight_is_rounded_under_all_its_names(stored: dict[str, str], rounded: dict[str, str]) -> None:
    tied, apart = (nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)) for _ in range(2))
    tied[1].weight = tied[0].weight
    assert rounding_of(ModuleRunner(tied, stored_dtypes=stored), apart, {})[0] == rounded


def a_quantised_graph(folder: Path, *, name: str = "quantised.onnx", shift: float = 0.0) -> Path:
    model = a_graph("g (float[N,32] x) => (float[N,16] y) <float[1] fc.weight = {0}> { [n] y = MatMul(x, fc.weight) }")
    value = model.graph.initializers["fc.weight"]
    weight = np.random.default_rng(0).normal(size=(32, 16)).astype(np.float32) + np.float32(shift)
    value.const_value, value.shape = ir.Tensor(weight, name="fc.weight"), ir.Shape([32, 16])
    ir.save(quantised(model, bits=4), folder / name)
    return folder / name


def test_only_a_graph_has_quantised_weights(tmp_path: Path) -> None:
    assert quantised_weights_of(ModuleRunner(a_model()), MODEL, None, None, {}) == {}
    path = tmp_path / "float.onnx"
    ir.save(a_graph("g (float[N,3] x) => (float[N,3] y) { y = Relu(x) }"), path)
    inputs = {"first": {"x": np.ones((2, 3), np.float32)}}
    assert quantised_weights_of(OnnxRunner(path), MODEL, None, None, inputs) == {}


def test_an_origin_of_a_candidate_without_quantised_weights_is_refused() -> None:
    refused = r"no quantised weights, so it was not made from base\.onnx\. Leave out base="
    with pytest.raises(InputRefused, match=refused):
        quantised_weights_of(ModuleRunner(a_model()), MODEL, None, Path("base.onnx"), {})


def test_quantised_weights_are_found_and_their_nodes_are_executed(tmp_path: Path) -> None:
    layer = nn.Linear(32, 16, bias=False)
    path = a_quantised_graph(tmp_path)
    weight = np.random.default_rng(0).normal(size=(32, 16)).astype(np.float32)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight.T.copy()))
    module = nn.Sequential()
    module.add_module("fc", layer)
    inputs = {"first": {"x": np.ones((2, 32), np.float32)}}
    found = quantised_weights_of(OnnxRunner(path), from_module(module, torch.ones(2, 32)), None, None, inputs)
    assert list(found) == ["fc.weight"]
    distance = np.linalg.norm(found["fc.weight"].values - weight.T) / np.linalg.norm(weight)
    assert 0 < distance < 0.3
    # Nothing was merged into it, so no weight of the model is rounded.
    assert rounding_of(OnnxRunner(path), module, found) == ({}, {})


def test_a_merged_quantised_weight_is_rounded_as_the_graph_rounds_it(tmp_path: Path) -> None:
    values = np.float32([[1, 2], [3, 4]])

    def down(weight: Wide) -> NearestNumbers:
        ones = np.ones_like(weight)
        return NearestNumbers(np.floor(weight), Steps(ones, ones, 7), eps=0.0, has_float_zeros=False)

    merge = QuantisedMerge(
        values, 1.0, standard_error=0.1, distance=0.1, error=quantisation_error_of(values, values, down(values))
    )
    plain = DequantisedWeight("4 bits", values, 0.1, 0, down)
    merged = DequantisedWeight("4 bits", values, 0.1, 0, down, merge)
    runner = OnnxRunner(a_quantised_graph(tmp_path))
    rounding, preferred = rounding_of(runner, a_model(), {"plain": plain, "merged": merged})
    assert list(rounding) == list(preferred) == ["merged"]
    assert callable(rounding["merged"]) and rounding["merged"](np.array([[1.7, 2.2]])).tolist() == [[1, 2]]
    assert preferred["merged"].tolist() == values.tolist()


def test_the_graphs_of_an_encoder_decoder_have_the_same_numbers(tmp_path: Path) -> None:
    float_graph = tmp_path / "float.onnx"
    ir.save(a_graph("g (float[N,3] x) => (float[N,3] y) { y = Relu(x) }"), float_graph)
    weight = torch.from_numpy(np.random.default_rng(0).normal(size=(32, 16)).astype(np.float32).T.copy())
    module = nn.Sequential()
    module.add_module("fc", nn.Linear(32, 16, bias=False))
    module.fc.weight.data = weight
    model = from_module(module, torch.ones(2, 32))
    first, again = a_quantised_graph(tmp_path), a_quantised_graph(tmp_path, name="again.onnx")
    runners = [OnnxRunner(path) for path in (float_graph, first, again)]
    found = quantised_weights_of(EncoderDecoderRunner(tmp_path, tuple(runners)), model, None, None, {})
    assert found.keys() == {"fc.weight"} and found["fc.weight"].error is not None
    runners[2] = OnnxRunner(a_quantised_graph(tmp_path, name="other.onnx", shift=0.01))
    with pytest.raises(Different, match=r"other\.onnx has other numbers in fc\.weight than the graphs beside it"):
        quantised_weights_of(EncoderDecoderRunner(tmp_path, tuple(runners)), model, None, None, {})


# --- half precision ---

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
@pytest.mark.parametrize("name", slow_but(["net"], SUBJECTS))
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


@pytest.mark.parametrize("name", slow_but(["net"], SUBJECTS))
def test_fp16_graph_is_different_from_fp32_with_a_note(name: str, tmp_path: Path) -> None:
    adapter = subjects.adapter(name, "linear")
    runner = saved(in_fp16(adapted(name, adapter, "merged")), tmp_path)
    verdict = prove(runner, PyTorchReferences(subjects.loaded(name), [adapter])).verdict
    assert verdict.outcome is parity.Outcome.DIFFERENT and verdict.dtype == "float32"
    assert note_on_half() in verdict.notes


@pytest.mark.parametrize("name", slow_but(["net"], SUBJECTS))
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


@pytest.mark.parametrize("name", slow_but(["net"], SUBJECTS))
def test_quantised_graph_with_fp16_scales_is_judged_in_fp16(name: str, tmp_path: Path) -> None:
    adapter = subjects.adapter(name, "linear")
    graph = quantised(in_fp16(subjects._exported(name).clone()), bits=8)
    for node in graph.graph:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)
    found = find_sites(graph)
    insert_nodes(graph, found, plan.make([adapter], found.specs))
    runner = saved(graph, tmp_path)
    assert is_half_inside(runner)
    verdict = prove(runner, PyTorchReferences(halved(name), [adapter])).verdict
    assert verdict.same, str(verdict)


@pytest.mark.slow
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
