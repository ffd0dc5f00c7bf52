"""Adapters as they are applied to a PyTorch model: combined, and tied tensors untied or changed alike."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import lora_export as le
from lora_export import layers, plan
from lora_export.adapters.combine import combine_in_plan
from lora_export.api.adapted_model import adapted_model
from lora_export.callbacks import ignore
from lora_export.errors import InputRefused, WrongUsage
from lora_export.lora import Adapter, LoraPair
from lora_export.models.load import from_module
from lora_export.options.combining import Applied, Combination
from support.slow import slow
from support.tied import tied_model

IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 1]])


class TiedWords(nn.Module):
    """A table of words, one layer, and an output that is tied to the table."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.fc, self.head = nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 7, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.fc(self.words(ids))))


def adapter(name: str, seed: int, *modules: str) -> Adapter:
    rng = np.random.default_rng(seed)
    shapes = {"words": (6, 7), "fc": (6, 6), "head": (7, 6)}
    pairs = {
        module: LoraPair(
            a=rng.standard_normal((2, shapes[module][1])),
            b=rng.standard_normal((shapes[module][0], 2)),
            scale=0.5,
            embedding=module == "words",
        )
        for module in modules
    }
    return Adapter(name, "peft", pairs, sha256=f"{seed:02}" * 32)


FIRST, SECOND = adapter("first", 1, "fc", "head"), adapter("second", 2, "fc", "words", "head")


def outputs(module: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return module(IDS)


def by_hand(tied: str, one: Adapter) -> torch.Tensor:
    """The outputs with W + ΔW for each name, or with the sum of all changes for both."""
    module = TiedWords()
    change = {name: torch.tensor(pair.delta()) for name, pair in one.pairs.items()}
    table, head = change.get("words", torch.zeros(6, 7)).T, change.get("head", torch.zeros(7, 6))
    weight = module.words.weight.detach()
    both = table + head
    with torch.no_grad():
        module.fc.weight += change["fc"]
        module.words.weight = nn.Parameter(weight + (both if tied == "both" else table))
        module.head.weight = nn.Parameter(weight + (both if tied == "both" else head))
    return outputs(module)


@pytest.mark.parametrize("tied", ["untie", "both"])
@pytest.mark.parametrize("one", [FIRST, SECOND], ids=["head", "head+words"])
def test_attached_and_folded_adapters_compute_the_sum_by_hand(one: Adapter, tied: str) -> None:
    model = from_module(TiedWords(), IDS)
    found = adapted_model(model, [one], (), Applied(tied=tied), ignore)
    assert model.module.head.weight is model.module.words.weight
    for put in (layers.attach, layers.fold):
        again = adapted_model(model, [one], (), Applied(tied=tied), ignore).model.module
        module = again if tied == "untie" else TiedWords()
        put(module, plan.make(found.adapters, layers.specs(module)))
        torch.testing.assert_close(outputs(module), by_hand(tied, one), rtol=1e-5, atol=1e-5)


def test_without_an_option_tied_tensors_are_refused_with_both() -> None:
    with pytest.raises(InputRefused, match=r'tied="untie" gives each a tensor of its own.*tied="both" changes all'):
        module = TiedWords()
        layers.attach(module, plan.make([FIRST], layers.specs(module)))


@pytest.mark.slow
def test_a_layout_that_the_model_has_anyway_is_named() -> None:
    said: list[str] = []
    model = from_module(TiedWords(), {"ids": IDS})
    adapted_model(model, [FIRST], (), Applied(layout={"*": "in_out"}, tied="both"), said.append)
    assert said == ["note: layout= has no effect: the classes of the model's layers determine their own"]


@pytest.mark.parametrize("tied", ["untie", "both"])
def test_a_torchscript_file_with_tied_changes_is_proven(tied: str, tmp_path: Path) -> None:
    source = (TiedWords(), IDS)
    result = le.export_torchscript(source, tmp_path / "m.pt", adapters=[SECOND], tied=tied)
    assert result.proof is not None and result.proof.verdict
    found = torch.jit.load(tmp_path / "m.pt")(IDS)
    torch.testing.assert_close(found, by_hand(tied, SECOND), rtol=1e-5, atol=1e-5)
    other = {"untie": "both", "both": "untie"}[tied]
    assert le.verify(tmp_path / "m.pt", source, adapters=[SECOND], tied=other).verdict.outcome == "different"


@pytest.mark.parametrize("dtype", ["float16", slow("bfloat16")])
@pytest.mark.parametrize("module", ["lm_head", slow("embed_tokens")])
def test_a_tied_table_in_half_precision_is_rounded_under_each_name(module: str, dtype: str, tmp_path: Path) -> None:
    """The file of a merge has one of the two names."""
    model = tied_model(tmp_path / "base")
    one = model.adapter(tmp_path / "adapter", module, "q_proj")
    le.merge(model.base, one, tmp_path / "out", tied="both", dtype=dtype)
    assert le.verify(tmp_path / "out", model.base, adapters=one, tied="both").verdict.same
    assert le.verify(tmp_path / "out", model.base, adapters=one, tied="untie").verdict.outcome == "different"


class Mixing(nn.Module):
    """A linear layer and a square matrix that is stored (in, out), in a layer of its own class."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.mix = nn.Linear(6, 6), nn.Module()
        self.mix.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.fc(x)) @ self.mix.weight


@pytest.mark.parametrize("suffix", ["onnx", "pt"])
def test_the_layout_of_an_own_class_can_be_stated(suffix: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    one = Adapter("ad", "peft", {"mix": LoraPair(rng.standard_normal((1, 6)), rng.standard_normal((6, 1)), 1.0)})
    x, module = torch.randn(3, 6), Mixing()
    source, out, export = (
        (module, x),
        tmp_path / f"m.{suffix}",
        le.export_onnx if suffix == "onnx" else le.export_torchscript,
    )
    with pytest.raises(InputRefused, match=r'mix\.weight.*layout=\{"NAME": "out_in"\}'):
        export(source, out, adapters=[one])
    export(source, out, adapters=[one], layout={"mix": "in_out"})
    expected = torch.tanh(module.fc(x)) @ (module.mix.weight + torch.tensor(one.pairs["mix"].delta()).T)
    found = torch.jit.load(out)(x) if suffix == "pt" else run(out, x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not hasattr(module.mix, "lora_layout")
    for layout, outcome in (("in_out", "same"), ("out_in", "different")):
        assert le.verify(out, source, adapters=[one], layout={"mix": layout}).verdict.outcome == outcome


def run(graph: Path, x: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    return torch.tensor(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


COMBINED = Combination("dare_linear", density=0.6, seed=3)


@pytest.fixture(scope="module")
def untied() -> tuple[nn.Module, torch.Tensor]:
    module = TiedWords()
    module.head.weight = nn.Parameter(module.head.weight.detach().clone())
    return module, IDS


def combined_by_plan(module: nn.Module, combination: Combination) -> torch.Tensor:
    """As a merge combines: the pairs of each weight in its plan."""
    steps = plan.make([FIRST, SECOND_LINEAR], layers.specs(module), strengths=[1.0, -0.5])
    folded = TiedWords()
    folded.head.weight = nn.Parameter(folded.head.weight.detach().clone())
    layers.fold(folded, combine_in_plan(steps, combination))
    return outputs(folded)


SECOND_LINEAR = adapter("second", 2, "fc", "head")


@pytest.mark.slow
@pytest.mark.parametrize("lora", ["merged", "nodes"])
def test_exports_combine_as_a_merge_does(untied, lora: str, tmp_path: Path) -> None:
    how = {"adapters": [FIRST, SECOND_LINEAR], "weights": [1.0, -0.5], "combination": COMBINED}
    expected = combined_by_plan(untied[0], COMBINED)
    result = le.export_torchscript(untied, tmp_path / "m.pt", lora=lora, **how)
    assert result.proof is not None and result.proof.verdict
    torch.testing.assert_close(torch.jit.load(tmp_path / "m.pt")(IDS), expected, rtol=1e-4, atol=1e-5)
    if lora == "merged":
        wrong = how | {"combination": Combination("dare_linear", density=0.6, seed=4)}
        assert le.verify(tmp_path / "m.pt", untied, **wrong).verdict.outcome == "different"


@pytest.mark.slow
def test_an_onnx_graph_combines_as_a_merge_does(untied, tmp_path: Path) -> None:
    how = {"adapters": [FIRST, SECOND_LINEAR], "weights": [1.0, -0.5], "combination": "linear"}
    le.export_onnx(untied, tmp_path / "base.onnx", verify=False)
    le.export_onnx(untied, tmp_path / "m.onnx", **how)
    record = json.loads(next(p.value for p in onnx.load(tmp_path / "m.onnx").metadata_props if p.key == "lora_export"))
    assert [one["name"] for one in record["adapters"]] == ["first", "second"]
    assert record["settings"]["combine"] == {"method": "linear"}
    le.export_onnx(tmp_path / "base.onnx", tmp_path / "from_graph.onnx", **how)
    assert le.verify(tmp_path / "from_graph.onnx", untied, **how)
    with pytest.raises(InputRefused, match="already contains the adapter"):
        le.export_onnx(tmp_path / "from_graph.onnx", tmp_path / "twice.onnx", **how)


@pytest.mark.parametrize("lora", ["inputs", "rows"])
def test_adapters_that_run_one_by_one_are_not_combined(untied, lora: str, tmp_path: Path) -> None:
    with pytest.raises(WrongUsage, match='combination= is for lora="merged" and nodes'):
        le.export_onnx(untied, tmp_path / "m.onnx", adapters=[FIRST], lora=lora, combination="linear")
    assert not list(tmp_path.iterdir())


def test_a_graph_is_not_tied(tmp_path: Path) -> None:
    with pytest.raises(WrongUsage, match='tied="both" is for models'):
        le.export_onnx("m.onnx", tmp_path / "out.onnx", adapters=[FIRST], tied="both")
