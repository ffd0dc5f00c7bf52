"""Quantised candidates: judged by what their weights are, told how far those lie from the model's."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from graphs import quantised
from torch import nn

from lora_export import layers, model, parity, plan, proof, standin
from lora_export.errors import Different, Undecided
from lora_export.export import to_onnx
from lora_export.graph import branches, files, sites
from lora_export.lora import Adapter, LoraPair
from lora_export.runtime import OnnxRunner

FACTORIES = Path(__file__).parent / "factories.py"


def an_adapter(scale: float = 1.0) -> Adapter:
    rng = np.random.default_rng(0)
    shapes = {"up": (96, 64), "down": (64, 96)}
    pairs = {
        name: LoraPair(a=rng.normal(size=(4, inner)) / 8, b=rng.normal(size=(out, 4)) / 8, scale=scale)
        for name, (out, inner) in shapes.items()
    }
    return Adapter(name="a", format="test", pairs=pairs, sha256="0a")


@pytest.fixture(scope="module")
def wide() -> model.Model:
    return model.load(f"{FACTORIES}:wide")


@pytest.fixture(scope="module")
def graph(wide: model.Model) -> ir.Model:
    return to_onnx(wide.module, wide.examples(), axes=wide.axes)


def beside(graph: ir.Model, adapter: Adapter, folder: Path) -> Path:
    found = sites.find(graph)
    branches.branch(graph, found, plan.make([adapter], found.specs))
    return saved(graph, folder)


def saved(graph: ir.Model, folder: Path) -> Path:
    files.save(graph, folder, "m.onnx")
    return folder / "m.onnx"


def exact(graph: ir.Model, level: int) -> ir.Model:
    for node in graph.graph:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", level)
    return graph


@pytest.mark.parametrize("as_pairs", [False, True], ids=["MatMulNBits", "DequantizeLinear"])
def test_an_adapter_beside_few_bits_is_the_same_and_the_distance_is_told(
    as_pairs: bool, wide: model.Model, graph: ir.Model, tmp_path: Path
) -> None:
    path = beside(exact(quantised(graph.clone(), as_pairs=as_pairs), 0), an_adapter(4.0), tmp_path)
    verdict = proof.prove(OnnxRunner(path), wide, [an_adapter(4.0)]).verdict
    assert verdict.same, str(verdict)
    (note,) = [note for note in verdict.notes if "quantised" in note]
    held = standin.stand_ins(path, wide)
    assert set(held) == {"up.weight", "down.weight"}
    for name, there in held.items():
        own = wide.module.state_dict()[name].double().numpy()
        assert there.distance == pytest.approx(np.linalg.norm(there.weight - own) / np.linalg.norm(own))
        assert 0.04 < there.distance < 0.2
    assert f"{max(there.distance for there in held.values()):.1%} from the model's weights" in note


def test_the_adapter_is_judged_as_sharply_as_beside_floats(wide: model.Model, graph: ir.Model, tmp_path: Path) -> None:
    few = exact(quantised(graph.clone()), 0)
    path = beside(few, an_adapter(1.01), tmp_path)  # far less than the weights' rounding
    assert proof.prove(OnnxRunner(path), wide, [an_adapter()]).verdict.outcome is parity.Outcome.DIFFERENT


def test_few_bits_without_the_adapter_are_different(wide: model.Model, graph: ir.Model, tmp_path: Path) -> None:
    path = saved(exact(quantised(graph.clone()), 0), tmp_path)
    assert proof.prove(OnnxRunner(path), wide, []).verdict.same
    assert proof.prove(OnnxRunner(path), wide, [an_adapter()]).verdict.outcome is parity.Outcome.DIFFERENT


def test_a_graph_of_floats_has_no_stand_ins(wide: model.Model, graph: ir.Model, tmp_path: Path) -> None:
    assert standin.stand_ins(saved(graph.clone(), tmp_path), wide) == {}
    assert standin.standing_in(wide, {}) is wide


def test_the_model_keeps_its_own_weights(wide: model.Model, graph: ir.Model, tmp_path: Path) -> None:
    before = copy.deepcopy(wide.module.state_dict())
    held = standin.stand_ins(saved(quantised(graph.clone()), tmp_path), wide)
    other = standin.standing_in(wide, held)
    assert all(torch.equal(before[name], value) for name, value in wide.module.state_dict().items())
    assert all(np.array_equal(other.module.state_dict()[name].numpy(), there.weight) for name, there in held.items())


def test_another_models_weights_are_no_rounding_of_this_ones(
    wide: model.Model, graph: ir.Model, tmp_path: Path
) -> None:
    strange = graph.clone()
    value = next(value for value in strange.graph.initializers.values() if "down.weight" in (value.name or ""))
    assert value.const_value is not None
    value.const_value = ir.Tensor(np.random.default_rng(1).permuted(value.const_value.numpy()), name=value.name)
    with pytest.raises(Different, match=r"no rounding of the model's: down.weight \(1\d\d% away\)"):
        proof.prove(OnnxRunner(saved(quantised(strange), tmp_path)), wide, [])


def test_an_adapter_that_was_merged_before_cannot_be_told_from_rounding(wide: model.Model, tmp_path: Path) -> None:
    module = copy.deepcopy(wide.module)
    layers.fold(module, plan.make([an_adapter(0.2)], layers.specs(module)))
    merged = to_onnx(module, wide.examples(), axes=wide.axes)
    with pytest.raises(Undecided, match=r"hold the adapter already \(up.weight, down.weight\).*--lora nodes"):
        proof.prove(OnnxRunner(saved(quantised(merged), tmp_path)), wide, [an_adapter(0.2)])


def test_where_the_graph_multiplies_in_int8_pytorch_errs_as_it_does(
    wide: model.Model, graph: ir.Model, tmp_path: Path
) -> None:
    path = beside(exact(quantised(graph.clone()), 4), an_adapter(4.0), tmp_path)
    verdict = proof.prove(OnnxRunner(path), wide, [an_adapter(4.0)]).verdict
    assert verdict.same, str(verdict)
    assert any("in int8" in note for note in verdict.notes)
    ratios = [there.figures.ratio for there in verdict.comparisons if there.figures and there.figures.ratio]
    assert ratios == pytest.approx([1.0] * 3, rel=0.1)


def test_eight_bits_hold_127_of_a_blocks_largest() -> None:
    module = nn.Module()
    module.layer = nn.Linear(4, 4, bias=False)
    nn.init.eye_(module.layer.weight)
    weight = np.eye(4, dtype=np.float32)
    standin.round_activations(module, {"layer.weight": standin.StandIn("4 bits", weight, 0.0, block=2)})
    answer = module.layer(torch.tensor([[127.0, 3.4, 0.0, 0.0], [1.0, 0.5, -12.7, 0.34]]))
    expected = [[127, 3, 0, 0], [1, 64 / 127, -12.7, 0.3]]
    np.testing.assert_allclose(answer.detach().numpy(), expected, rtol=1e-6)
