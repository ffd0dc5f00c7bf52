"""Quantised candidates are compared with references that have their weights; notes give the distance to the model."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from transformers.pytorch_utils import Conv1D

from defects import subjects
from lora_export import cli, layers, plan
from lora_export.errors import Different, InputRefused, Undecided
from lora_export.graph.find_sites import find_sites
from lora_export.graph.insert.adapter_nodes import insert_nodes
from lora_export.graph.merge.copy_parts import MergeRun
from lora_export.graph.merge.merge_graph import merge_graph
from lora_export.graph.onnx_file import reading
from lora_export.graph.onnx_file.reading import load_graph, open_graph
from lora_export.graph.onnx_file.writing import save_graph
from lora_export.graph.site import Site
from lora_export.lora import Adapter, LoraPair, TokenRows
from lora_export.models.export import to_onnx
from lora_export.models.load import from_module, load_model
from lora_export.models.model import Model
from lora_export.models.stored_parameter import StoredParameter
from lora_export.models.traced_lengths import with_traced_lengths
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.verification import parity
from lora_export.verification.against_graph import GraphReferences
from lora_export.verification.against_pytorch import PyTorchReferences
from lora_export.verification.proof import prove
from lora_export.verification.references import References, quantised_weights
from lora_export.verification.references.requantised_graph import RequantisedGraph
from lora_export.weights.checkpoint import open_checkpoint
from support import FACTORIES
from support.graphs import quantised
from support.handmade import peft_adapter
from support.slow import slow
from support.wide_model import adapter_for_wide

DIFFERENT = parity.Outcome.DIFFERENT
UNDIAGNOSED = pytest.mark.usefixtures("undiagnosed")


@pytest.fixture(scope="module")
def wide() -> Model:
    return with_traced_lengths(load_model(f"{FACTORIES}:wide"))


@pytest.fixture(scope="module")
def graph(wide: Model) -> ir.Model:
    return to_onnx(wide.module, wide.example_inputs(), axes=wide.axes)


def beside(graph: ir.Model, adapter: Adapter, folder: Path) -> Path:
    found = find_sites(graph)
    insert_nodes(graph, found, plan.make([adapter], found.specs))
    return saved(graph, folder)


def saved(graph: ir.Model, folder: Path) -> Path:
    save_graph(graph, folder, "m.onnx")
    return folder / "m.onnx"


def exact(graph: ir.Model, level: int) -> ir.Model:
    for node in graph.graph:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", level)
    return graph


def verdict_of(path: Path, model: Model, *adapters: Adapter, **how: Any) -> parity.Verdict:
    return prove(OnnxRunner(path), PyTorchReferences(model, adapters, **how)).verdict


@pytest.mark.parametrize("as_pairs", [False, True], ids=["MatMulNBits", "DequantizeLinear"])
def test_adapter_beside_quantised_weights_is_same_and_distance_noted(
    as_pairs: bool, wide: Model, graph: ir.Model, tmp_path: Path
) -> None:
    path = beside(exact(quantised(graph.clone(), as_pairs=as_pairs), 0), adapter_for_wide(4.0), tmp_path)
    verdict = verdict_of(path, wide, adapter_for_wide(4.0))
    assert verdict.same, str(verdict)
    (note,) = [note for note in verdict.notes if "quantised" in note]
    weights = quantised_weights.find(open_graph(path), wide)
    assert set(weights) == {"up.weight", "down.weight"}
    for name, weight in weights.items():
        original = wide.module.state_dict()[name].double().numpy()
        assert weight.distance == pytest.approx(np.linalg.norm(weight.values - original) / np.linalg.norm(original))
        assert 0.04 < weight.distance < 0.2
    assert f"{max(weight.distance for weight in weights.values()):.1%} from the model's weights" in note


def in_file(model: Model, read: list[str]) -> Model:
    """The model with weights that are read when they are needed; `read` gets the name of each that is."""
    module = copy.deepcopy(model.module)

    def read_again(name: str, values: torch.Tensor) -> torch.Tensor:
        read.append(name)
        return values.detach().clone()

    for path, owner in module.named_modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                make = functools.partial(read_again, f"{path}.{name}", parameter)
                owner._parameters[name] = StoredParameter(parameter.shape, make)
    return replace(model, module=module)


@pytest.mark.slow
def test_weights_in_a_file_give_way_to_the_quantised_ones(wide: Model, graph: ir.Model, tmp_path: Path) -> None:
    path = beside(exact(quantised(graph.clone()), 0), adapter_for_wide(4.0), tmp_path)
    model = in_file(wide, [])
    assert verdict_of(path, model, adapter_for_wide(4.0)).same
    found = quantised_weights.find(open_graph(path), model)
    module = quantised_weights.with_dequantised_weights(model, found).module
    assert torch.equal(module.get_parameter("up.weight"), torch.from_numpy(found["up.weight"].values))
    assert isinstance(model.module.get_parameter("up.weight"), StoredParameter)


def test_graph_of_floats_is_compared_with_no_weight(wide: Model, graph: ir.Model, tmp_path: Path) -> None:
    read: list[str] = []
    assert quantised_weights.find(open_graph(saved(graph.clone(), tmp_path)), in_file(wide, read)) == {}
    assert not read
    assert quantised_weights.with_dequantised_weights(wide, {}) is wide


def test_a_proof_parses_its_candidate_once(
    wide: Model, graph: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []
    monkeypatch.setattr(reading, "open_graph", lambda path: opened.append(path) or open_graph(path))
    assert verdict_of(beside(graph.clone(), adapter_for_wide(4.0), tmp_path), wide, adapter_for_wide(4.0)).same
    assert len(opened) == 1


def test_gates_stay_tight_beside_quantised_weights(wide: Model, graph: ir.Model, tmp_path: Path) -> None:
    few = exact(quantised(graph.clone()), 0)
    path = beside(few, adapter_for_wide(1.01), tmp_path)  # far less than the weights' rounding
    assert verdict_of(path, wide, adapter_for_wide()).outcome is DIFFERENT


def test_quantised_graph_without_the_adapter_is_different(wide: Model, graph: ir.Model, tmp_path: Path) -> None:
    path = saved(exact(quantised(graph.clone()), 0), tmp_path)
    assert verdict_of(path, wide).same
    assert verdict_of(path, wide, adapter_for_wide()).outcome is DIFFERENT


def test_original_model_is_not_changed(wide: Model, graph: ir.Model, tmp_path: Path) -> None:
    before = copy.deepcopy(wide.module.state_dict())
    weights = quantised_weights.find(open_graph(saved(quantised(graph.clone()), tmp_path)), wide)
    other = quantised_weights.with_dequantised_weights(wide, weights)
    assert all(torch.equal(before[name], value) for name, value in wide.module.state_dict().items())
    tensors = other.module.state_dict()
    assert all(np.array_equal(tensors[name].numpy(), weight.values) for name, weight in weights.items())


def test_weights_behind_one_that_the_model_lacks_are_found(wide: Model, graph: ir.Model, tmp_path: Path) -> None:
    path = saved(quantised(graph.clone()), tmp_path)
    first, *others = quantised_weights.find(open_graph(path), wide)
    module = copy.deepcopy(wide.module)
    delattr(module, first.partition(".")[0])
    assert others and list(quantised_weights.find(open_graph(path), replace(wide, module=module))) == others


def test_weights_of_another_model_are_different(wide: Model, graph: ir.Model, tmp_path: Path) -> None:
    strange = graph.clone()
    value = next(value for value in strange.graph.initializers.values() if "down.weight" in (value.name or ""))
    assert value.const_value is not None
    value.const_value = ir.Tensor(np.random.default_rng(1).permuted(value.const_value.numpy()), name=value.name)
    with pytest.raises(Different, match=r"no rounding of the model's: down.weight \(1\d\d% away\)"):
        prove(OnnxRunner(saved(quantised(strange), tmp_path)), PyTorchReferences(wide))


# --- merged into the quantised weights -----------------------------------------------------------


def requantised(base: Path, adapter: Adapter, folder: Path, min_retention: float = 0) -> Path:
    """What `merge --requantize` makes of a graph."""
    graph = open_graph(base)
    found = find_sites(graph.model)
    steps = plan.make([adapter], found.specs)
    folder.mkdir(exist_ok=True)
    merge_graph(
        steps, graph, found, folder, MergeRun(file_name="merged.onnx", requantise=True, min_retention=min_retention)
    )
    return folder / "merged.onnx"


def with_other(path: Path, change: Callable[[str, NDArray[Any]], NDArray[Any]], folder: Path) -> Path:
    """The graph with other numbers in its initializers."""
    model = load_graph(path)
    for name, value in model.graph.initializers.items():
        assert value.const_value is not None
        array = value.const_value.numpy()
        value.const_value = ir.Tensor(change(name, array.copy()).astype(array.dtype), name=name)
    folder.mkdir()
    return saved(model, folder)


SCHEMES: dict[str, dict[str, Any]] = {
    "4 bits": {},
    "4 bits, zero points": {"symmetric": False},
    "8 bits": {"bits": 8},
    "DequantizeLinear": {"as_pairs": True},
}
WRONG_MERGES = {  # with the schemes of the quick tests
    "scale x 1.1": ("4 bits", "DequantizeLinear"),
    "missing in one": ("4 bits, zero points", "8 bits"),
    "one row of B lost": ("4 bits", "DequantizeLinear"),
    "an integer off by one": SCHEMES,
}


@pytest.mark.parametrize("name", SCHEMES)
def test_correct_requantised_merge_is_same(name: str, wide: Model, graph: ir.Model, tmp_path: Path) -> None:
    scheme = SCHEMES[name]
    base = saved(exact(quantised(graph.clone(), **scheme), 0), tmp_path)
    path = requantised(base, adapter_for_wide(), tmp_path / "merged")
    verdict = verdict_of(path, wide, adapter_for_wide(), origin=base)
    assert verdict.same, str(verdict)
    costs = [each.figures.merge_loss for each in verdict.comparisons if each.figures]
    assert all(cost is not None and 0.001 < cost < (0.3 if scheme in ({}, {"bits": 8}) else 0.6) for cost in costs)
    (note,) = [note for note in verdict.notes if "merged into 2 quantised weights" in note]
    assert re.search(r"They contain (8\d|99|100)% of the change on average", note)


@UNDIAGNOSED
@pytest.mark.parametrize(
    ("fault", "name"),
    [
        (fault, name) if name in quick else slow(fault, name)
        for (fault, quick), name in itertools.product(WRONG_MERGES.items(), SCHEMES)
    ],
)
def test_wrong_requantised_merge_is_different(
    fault: str, name: str, wide: Model, graph: ir.Model, tmp_path: Path
) -> None:
    base = saved(exact(quantised(graph.clone(), **SCHEMES[name]), 0), tmp_path)
    right = adapter_for_wide()
    wrong = adapter_for_wide(1.1) if fault == "scale x 1.1" else right
    if fault == "missing in one":
        wrong = replace(right, pairs={"up": right.pairs["up"]})
    if fault == "one row of B lost":
        pair = right.pairs["up"]
        wrong = replace(right, pairs={**right.pairs, "up": replace(pair, b=pair.b * (np.arange(96) != 7)[:, None])})
    path = requantised(base, wrong, tmp_path / "merged")
    if fault == "an integer off by one":

        def off(name: str, array: NDArray[Any]) -> NDArray[Any]:
            if array.dtype.itemsize == 1 and "up.weight" in name and "scale" not in name and "zero" not in name:
                array.view(np.uint8).reshape(-1)[5] ^= 1
            return array

        path = with_other(path, off, tmp_path / "off")
    verdict = verdict_of(path, wide, right, origin=base)
    assert verdict.outcome is DIFFERENT, str(verdict)


PROMOTED = {
    "4 bits, to 8": ({}, 0.1, "MatMulNBits"),
    "4 bits with zero points, to 8": ({"symmetric": False}, 0.1, "MatMulNBits"),
    "4 bits, to floats": ({}, 2e-3, "Transpose"),
    "8 bits, to floats": ({"bits": 8}, 2e-3, "Transpose"),
    "DequantizeLinear, to floats": ({"as_pairs": True}, 0.1, "MatMul"),
}


@UNDIAGNOSED
@pytest.mark.parametrize("case", PROMOTED)
def test_promoted_layers_are_w_and_its_change(case: str, wide: Model, graph: ir.Model, tmp_path: Path) -> None:
    scheme, strength, operator = PROMOTED[case]
    base = saved(exact(quantised(graph.clone(), **scheme), 0), tmp_path)
    adapter = adapter_for_wide(strength)
    path = requantised(base, adapter, tmp_path / "merged", 0.5)
    own = load_graph(path)
    assert operator in {node.op_type for node in own.graph} and "DequantizeLinear" not in {n.op_type for n in own.graph}
    assert all(node.attributes.get_int("bits", 8) == 8 for node in own.graph)
    graphs = replace(GraphReferences.open(base, "merged"), requantised=True).with_adapters([adapter])
    measures: list[References] = [PyTorchReferences(wide, [adapter], origin=base), graphs]

    def outcomes(candidate: Path) -> set[parity.Outcome]:
        return {prove(OnnxRunner(candidate), references).verdict.outcome for references in measures}

    def off(name: str, array: NDArray[Any]) -> NDArray[Any]:
        if "up.weight" in name and array.dtype == np.uint8:
            array.reshape(-1)[5] = (int(array.reshape(-1)[5]) + 2) % 256
        elif "up.weight" in name and array.ndim == 2 and operator != "MatMulNBits":
            array[3, 4] += 1e-3 * np.abs(array).max()
        return array

    def unmerged(name: str, array: NDArray[Any]) -> NDArray[Any]:
        if "down.weight" not in name or operator == "MatMulNBits":
            return array
        before = quantised_weights.find(open_graph(base), wide)["down.weight"].values
        return before if before.shape == array.shape else before.T

    assert outcomes(path) == {parity.Outcome.SAME}
    assert outcomes(with_other(path, off, tmp_path / "off")) == {DIFFERENT}
    if operator != "MatMulNBits":
        assert outcomes(with_other(path, unmerged, tmp_path / "unmerged")) == {DIFFERENT}
    part = replace(adapter, pairs={"up": adapter.pairs["up"]})
    # In few bits, W is the nearest to W + ΔW: that is no wrong number, but it has lost the change.
    assert parity.Outcome.SAME not in outcomes(requantised(base, part, tmp_path / "missing", 0.5))
    pair = replace(adapter.pairs["down"], scale=1.1 * adapter.pairs["down"].scale)
    scaled = replace(adapter, pairs={**adapter.pairs, "down": pair})
    assert outcomes(requantised(base, scaled, tmp_path / "scaled", 0.5)) == {DIFFERENT}


@UNDIAGNOSED
@pytest.mark.parametrize("strength", [1.0, 0.1], ids=["kept", "promoted"])
def test_the_reference_has_no_arithmetic_of_merges(
    strength: float, wide: Model, graph: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = saved(exact(quantised(graph.clone()), 0), tmp_path), adapter_for_wide(strength)
    delta = LoraPair.delta
    monkeypatch.setattr(LoraPair, "delta", lambda *args, **how: delta(*args, **how) * np.float32(1.3))
    path = requantised(base, adapter, tmp_path / "merged", 0.5)
    graphs = replace(GraphReferences.open(base, "merged"), requantised=True).with_adapters([adapter])
    assert prove(OnnxRunner(path), graphs).verdict.outcome is DIFFERENT


@pytest.mark.parametrize("rows", [6, 4], ids=["oblong", "square"])
def test_rows_in_place_of_those_of_a_quantised_table(rows: int, tmp_path: Path) -> None:
    table = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 21]>
        g (int64[N] ids) => (float[N,4] y) <int8[1] "emb.weight_quantized" = {0}, float s = {0.5}>
        { t = DequantizeLinear ("emb.weight_quantized", s)
          y = Gather(t, ids) }""")
    value, integers = table.graph.initializers["emb.weight_quantized"], np.arange(rows * 4).reshape(rows, 4)
    value.const_value = ir.Tensor(integers.astype(np.int8), name=value.name)
    value.type, value.shape = ir.TensorType(ir.DataType.INT8), ir.Shape(integers.shape)
    own = TokenRows(np.array([1, 3]), np.full((2, 4), 0.3, np.float32))
    adapter = Adapter(name="a", format="peft", pairs={}, token_rows={"emb.weight": own})
    base = saved(table, tmp_path)

    def faults(candidate: Path) -> list[str]:
        sites = find_sites(open_graph(base).model)
        return list(RequantisedGraph(load_graph(candidate)).faults(sites, plan.make([adapter], sites.specs)))

    path = requantised(base, adapter, tmp_path / "merged")
    assert faults(path) == []
    wrong = with_other(
        path, lambda _, array: array + 0.1 * (np.arange(array.size) == 5).reshape(array.shape), tmp_path / "off"
    )
    assert faults(wrong) == [f"emb.weight: 1 of {rows * 4} numbers are not W + s·BA, rounded once"]


def test_requantised_merge_multiplied_in_int8_is_decided(wide: Model, graph: ir.Model, tmp_path: Path) -> None:
    base = saved(exact(quantised(graph.clone()), 4), tmp_path)
    path = requantised(base, adapter_for_wide(), tmp_path / "merged")
    verdict = verdict_of(path, wide, adapter_for_wide(), origin=base)
    assert verdict.same, str(verdict)
    wrong = requantised(base, adapter_for_wide(1.5), tmp_path / "wrong")
    verdict = verdict_of(wrong, wide, adapter_for_wide(), origin=base)
    assert verdict.outcome is DIFFERENT


def test_adapter_below_the_second_rounding_is_undecided(wide: Model, graph: ir.Model, tmp_path: Path) -> None:
    base = saved(exact(quantised(graph.clone()), 0), tmp_path)
    path = requantised(base, adapter_for_wide(0.05), tmp_path / "merged")
    verdict = verdict_of(path, wide, adapter_for_wide(0.05), origin=base)
    assert verdict.outcome is parity.Outcome.UNDECIDED, str(verdict)
    (reason,) = verdict.distinct_reasons
    assert reason.gate == "loss" and "a graph of more bits" in reason.remedy


def test_requantised_merge_without_its_origin_is_undecided(wide: Model, graph: ir.Model, tmp_path: Path) -> None:
    base = saved(exact(quantised(graph.clone()), 0), tmp_path)
    path = requantised(base, adapter_for_wide(), tmp_path / "merged")
    message = r"up.weight: 1.00 ± 0.0\d+ of the adapter's change is in it, and \d\d% .*would decide it: .*base=\"BASE"
    with pytest.raises(Undecided, match=rf"{message}\.onnx"):
        prove(OnnxRunner(path), PyTorchReferences(wide, [adapter_for_wide()]))


@pytest.fixture(scope="module")
def merged_before(wide: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph whose weights were merged, and then quantised once."""
    module = copy.deepcopy(wide.module)
    layers.fold(module, plan.make([adapter_for_wide()], layers.specs(module)))
    graph = exact(quantised(to_onnx(module, wide.example_inputs(), axes=wide.axes)), 0)
    return saved(graph, tmp_path_factory.mktemp("merged_before"))


def test_merge_quantised_once_needs_no_origin(wide: Model, merged_before: Path) -> None:
    path = merged_before
    verdict = verdict_of(path, wide, adapter_for_wide())
    assert verdict.same, str(verdict)
    weights = quantised_weights.find(open_graph(path), wide, plan.make([adapter_for_wide()], layers.specs(wide.module)))
    for name, weight in weights.items():
        assert weight.merge is not None and weight.merge.fraction == pytest.approx(1, abs=0.02)
        assert np.array_equal(weight.merge.base, wide.module.state_dict()[name].numpy())
        moved = np.linalg.norm(weight.values - weight.merge.base) / np.linalg.norm(weight.values)
        assert weight.distance < 0.2 < moved


def test_strength_of_a_merged_adapter_is_applied(wide: Model, graph: ir.Model, tmp_path: Path) -> None:
    base = saved(exact(quantised(graph.clone()), 0), tmp_path)
    path = requantised(base, adapter_for_wide(0.5), tmp_path / "merged")
    verdict = verdict_of(path, wide, adapter_for_wide(), strengths=[0.5], origin=base)
    assert verdict.same, str(verdict)
    assert any(re.search(r"They contain (99|100)% of the change", note) for note in verdict.notes)


def test_one_wrong_integer_of_a_merge_quantised_once_is_different(
    wide: Model, merged_before: Path, tmp_path: Path
) -> None:

    def off(name: str, array: NDArray[Any]) -> NDArray[Any]:
        if array.dtype == np.uint8 and "down.weight" in name:
            array.reshape(-1)[5] ^= 1
        return array

    wrong = with_other(merged_before, off, tmp_path / "off")
    verdict = verdict_of(wrong, wide, adapter_for_wide())
    assert verdict.outcome is DIFFERENT


def test_weights_without_an_adapter_must_equal_the_origins(wide: Model, graph: ir.Model, tmp_path: Path) -> None:
    base = saved(exact(quantised(graph.clone()), 0), tmp_path)
    alone = replace(adapter_for_wide(), pairs={"up": adapter_for_wide().pairs["up"]})
    one = requantised(base, alone, tmp_path / "one")
    assert verdict_of(one, wide, alone, origin=base).same
    both = requantised(base, adapter_for_wide(), tmp_path / "both")
    with pytest.raises(Different, match=r"no adapter changes are not those of .*m.onnx: down.weight"):
        prove(OnnxRunner(both), PyTorchReferences(wide, [alone], origin=base))


def test_adapter_beside_the_origins_weights_is_no_merge(wide: Model, graph: ir.Model, tmp_path: Path) -> None:
    few = exact(quantised(graph.clone()), 0)
    (tmp_path / "base").mkdir()
    base = saved(few.clone(), tmp_path / "base")
    path = beside(few, adapter_for_wide(), tmp_path)
    verdict = verdict_of(path, wide, adapter_for_wide(), origin=base)
    assert verdict.same and not any("merged into" in note for note in verdict.notes)


def test_origin_and_candidate_must_both_be_quantised(wide: Model, graph: ir.Model, tmp_path: Path) -> None:
    base = saved(exact(quantised(graph.clone()), 0), tmp_path)
    path = requantised(base, adapter_for_wide(), tmp_path / "merged")
    (tmp_path / "floats").mkdir()
    floats = saved(graph.clone(), tmp_path / "floats")
    with pytest.raises(InputRefused, match=r"floats/m.onnx has no quantised weights of the model"):
        prove(OnnxRunner(path), PyTorchReferences(wide, [adapter_for_wide()], origin=floats))
    with pytest.raises(InputRefused, match="the candidate has no quantised weights"):
        prove(OnnxRunner(floats), PyTorchReferences(wide, [adapter_for_wide()], origin=base))


class Turned(nn.Module):
    """A layer whose weight is (in, out), as in GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = Conv1D(120, 40)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


def dequantised(weight: NDArray[np.float32], *, axis: int) -> ir.Model:
    """y = x W, W (in, out) in int8 with a scale for each index of an axis."""
    scales = np.abs(weight).max(1 - axis) / 127
    levels = np.rint(weight / (scales if axis else scales[:, None])).astype(np.int8)
    inner, out = weight.shape
    graph = ir.from_onnx_text(f"""
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N,M,{inner}] x) => (float[N,M,{out}] y) <int8[1] "fc.weight_quantized" = {{0}}, float[1] s = {{0}}>
        {{ w = DequantizeLinear <axis = {axis}> ("fc.weight_quantized", s)
          y = MatMul(x, w) }}""")
    for name, array in {"fc.weight_quantized": levels, "s": scales}.items():
        value = graph.graph.initializers[name]
        value.const_value = ir.Tensor(array, name=name)
        value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape(array.shape)
    graph.graph.node(1).name = "product"
    return graph


@pytest.mark.parametrize(("axis", "block"), [(0, 0), (1, 32)])
def test_int8_rounding_follows_onnxruntimes_fusion(axis: int, block: int, tmp_path: Path) -> None:
    """It fuses a scale for each output, and then multiplies in int8. It does not fuse a scale for each input."""
    torch.manual_seed(0)
    turned = from_module(Turned(), {"x": torch.randn(3, 7, 40)})
    path = saved(dequantised(turned.module.fc.weight.detach().numpy(), axis=axis), tmp_path)  # type: ignore[union-attr]
    runner = OnnxRunner(path)
    x = np.ones((2, 5, 40), np.float32)
    executed = functools.partial(runner.executed_nodes, lambda other: other.run({"x": x}))
    weights = quantised_weights.find(open_graph(path), turned, executed=executed)
    assert weights["fc.weight"].activation_block == block
    verdict = prove(runner, PyTorchReferences(turned)).verdict
    assert verdict.same, str(verdict)


def test_transposed_parameter_is_merged_and_verified(tmp_path: Path) -> None:
    torch.manual_seed(0)
    turned = from_module(Turned(), {"x": torch.randn(3, 7, 40)})
    base = saved(dequantised(turned.module.fc.weight.detach().numpy(), axis=1), tmp_path)  # type: ignore[union-attr]
    rng = np.random.default_rng(0)

    def adapter(scale: float) -> Adapter:
        return Adapter(name="a", format="test", pairs={"fc": LoraPair(a=a, b=b, scale=scale)})

    a, b = rng.normal(size=(2, 40)) / 8, rng.normal(size=(120, 2)) / 8
    path = requantised(base, adapter(0.2), tmp_path / "merged")
    verdict = verdict_of(path, turned, adapter(0.2), origin=base)
    assert verdict.same, str(verdict)
    assert any("merged into 1 quantised weight:" in note for note in verdict.notes)
    wrong = verdict_of(path, turned, adapter(0.22), origin=base)
    assert "weights" in {reason.gate for reason in wrong.reasons}


def stripped(graph: ir.Model) -> ir.Model:
    """The graph without names that identify its weights."""
    for number, value in enumerate(list(graph.graph.initializers.values())):
        value.name = f"w{number}"
    for number, node in enumerate(graph.graph):
        node.name = f"n{number}"
        node.metadata_props.clear()
    return graph


@UNDIAGNOSED
@pytest.mark.parametrize("names", ["with names", "without names"])
def test_hugging_face_merge_is_matched_through_its_origin(names: str, tmp_path: Path) -> None:
    """Names are matched by the checkpoint's content, which a merged weight no longer has."""
    llama, few = subjects.loaded("llama"), exact(quantised(subjects._exported("llama").clone(), block=16), 0)
    base = saved(few if names == "with names" else stripped(few), tmp_path)
    adapter = subjects.adapter("llama", "linear")
    graph = open_graph(base)
    found = find_sites(graph.model, open_checkpoint(Path(llama.source)))
    (tmp_path / "merged").mkdir()
    merge_graph(
        plan.make([adapter], found.specs),
        graph,
        found,
        tmp_path / "merged",
        MergeRun(file_name="m.onnx", requantise=True),
    )
    path = tmp_path / "merged" / "m.onnx"
    verdict = verdict_of(path, llama, adapter, origin=base)
    assert verdict.same, str(verdict)
    assert any("merged into 12 quantised weights" in note for note in verdict.notes)
    with pytest.raises(
        Undecided,
        match="of the adapter's change is in it"
        if names == "with names"
        else r"the names of \d+ quantised weights are unknown",
    ):
        prove(OnnxRunner(path), PyTorchReferences(llama, [adapter]))
    name = "model.layers.1.self_attn.q_proj"
    scaled = replace(adapter, pairs={**adapter.pairs, name: replace(adapter.pairs[name], scale=2.2)})
    wrong = verdict_of(path, llama, scaled, origin=base)
    assert wrong.outcome is DIFFERENT
    assert [reason.text.partition(":")[0] for reason in wrong.reasons if reason.gate == "weights"] == [f"{name}.weight"]


# --- the nearest value that scales allow, by hand ------------------------------------------------------


def only_site(text: str, name: str = "fc.weight") -> Site:
    return find_sites(ir.from_onnx_text(text)).by_name[name][0]


@pytest.mark.parametrize(
    ("zeros", "expected"),
    # Integers 0 to 15 less 8, times 0.5 and -2; with zero points, less 3 and less 10.
    [("", [[-4, 0.5, 3.5], [16, 2, -14]]), (", uint8[2,1] z = {3, 10}", [[-1.5, 0.5, 6], [20, 2, -10]])],
)
def test_nearest_value_of_four_bits(zeros: str, expected: list[list[float]]) -> None:
    site = only_site(f"""
        <ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
        g (float[N,3] x) => (float[N,2] y) <uint8[2,1,8] "fc.weight_Q4" = {{{", ".join(["0"] * 16)}}},
           float[2] s = {{0.5, -2}}{zeros}>
        {{ y = com.microsoft.MatMulNBits <K = 3, N = 2, bits = 4, block_size = 16>
               (x, "fc.weight_Q4", s{", z" if zeros else ""}) }}""")
    assert site.nearest(np.array([[-100, 0.6, 100], [100, 2.9, -100]])).tolist() == expected


def test_nearest_value_of_a_block_in_packed_weights() -> None:
    """q and v side by side in one (in, out) matrix; each column has a scale and a zero point."""
    graph = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N,3] x) => (float[N,4] y)
        <int8[3,4] "fc.weight_quantized" = {0,0,0,0, 0,0,0,0, 0,0,0,0}, float[4] s = {1, 0.5, 2, 4},
         int8[4] z = {0, 100, -28, 0}>
        { d = DequantizeLinear <axis = 1> ("fc.weight_quantized", s, z)
          y = MatMul(x, d) }""")
    (site,) = find_sites(graph).by_name["fc.weight"]
    block = replace(site, block=range(2, 4))
    values = np.array([[-1000, 3.1, 1000], [9.0, -6.5, -2.1]])  # (out, in)
    assert block.nearest(values).tolist() == [[-200, 4, 310], [8, -8, -4]]
    assert site.nearest(np.zeros((4, 3))).tolist() == np.zeros((4, 3)).tolist()


# --- diagnosed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_pairs", [False, True], ids=["MatMulNBits", "DequantizeLinear"])
def test_quantised_graph_is_diagnosed(as_pairs: bool, wide: Model, graph: ir.Model, tmp_path: Path) -> None:
    few = exact(quantised(graph.clone(), as_pairs=as_pairs), 4)
    path = beside(few.clone(), adapter_for_wide(4.0), tmp_path)
    right = prove(OnnxRunner(path), PyTorchReferences(wide, [adapter_for_wide(4.0)]), trace=True).diagnosis
    assert right is not None and right.first is None
    assert [layer.name for layer in right.layers] == ["up", "down"]
    assert all(0 < layer.error < 1.2 * layer.deployed_error for layer in right.layers)
    lost = replace(adapter_for_wide(4.0), pairs={"up": adapter_for_wide(4.0).pairs["up"]})
    (tmp_path / "lost").mkdir()
    candidate = OnnxRunner(beside(few, lost, tmp_path / "lost"))
    wrong = prove(candidate, PyTorchReferences(wide, [adapter_for_wide(4.0)])).diagnosis
    assert wrong is not None and wrong.first == "down" and "its adapter is missing" in wrong.why


@pytest.mark.parametrize("as_pairs", [False, True], ids=["MatMulNBits", "DequantizeLinear"])
def test_requantised_merge_is_diagnosed(as_pairs: bool, wide: Model, graph: ir.Model, tmp_path: Path) -> None:
    base = saved(exact(quantised(graph.clone(), as_pairs=as_pairs), 4), tmp_path)
    path = requantised(base, adapter_for_wide(), tmp_path / "merged")
    right = prove(OnnxRunner(path), PyTorchReferences(wide, [adapter_for_wide()], origin=base), trace=True).diagnosis
    assert right is not None and right.first is None and len(right.layers) == 2
    scaled = requantised(base, adapter_for_wide(1.5), tmp_path / "scaled")
    wrong = prove(OnnxRunner(scaled), PyTorchReferences(wide, [adapter_for_wide()], origin=base)).diagnosis
    assert wrong is not None and wrong.first == "up"
    found = "1" if as_pairs else "(4[6-9]|5)"  # the scales of a DequantizeLinear stay, and cut half of the rest off
    assert re.search(rf"has 1\.{found}\d* times the correct .* is no more than rounding error", wrong.why), wrong.why


def test_verify_command_takes_the_origin_of_a_requantised_merge(
    wide: Model, graph: ir.Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = saved(exact(quantised(graph.clone()), 0), tmp_path)
    pairs = {name: (pair.a.tolist(), pair.b.tolist()) for name, pair in adapter_for_wide().pairs.items()}
    adapter, merged = peft_adapter(tmp_path / "adapter", pairs), tmp_path / "merged.onnx"
    assert cli.run(["merge", str(base), str(adapter), "-o", str(merged), "--requantize"]) == 0
    verify = ["verify", str(merged), "--model", f"{FACTORIES}:wide", "-a", str(adapter)]
    capsys.readouterr()
    assert cli.run([*verify, "--base", str(base), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["outcome"] == "same" and list(document["about"]["base"]["sha256"]) == ["m.onnx"]
    assert cli.run(verify) == 5
    assert "--base BASE.onnx" in capsys.readouterr().err
    assert cli.run([*verify, "--base", str(tmp_path / "none.onnx")]) == 3
    assert cli.run([*verify, "--base", str(adapter)]) == 2


# --- in int8 -------------------------------------------------------------------------------------


def test_pytorchs_error_includes_int8_rounding(wide: Model, graph: ir.Model, tmp_path: Path) -> None:
    path = beside(exact(quantised(graph.clone()), 4), adapter_for_wide(4.0), tmp_path)
    verdict = verdict_of(path, wide, adapter_for_wide(4.0))
    assert verdict.same, str(verdict)
    assert any("in int8" in note for note in verdict.notes)
    ratios = [each.figures.ratio for each in verdict.comparisons if each.figures and each.figures.ratio]
    assert ratios == pytest.approx([1.0] * 3, rel=0.1)
