"""Pairs on layers of a model that no output reads: without effect they are left out, else refused with a way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lora_export.api.onnx_from_model import export_from_model, write_graphs
from lora_export.api.onnx_request import OnnxRequest
from lora_export.errors import MatchError
from lora_export.graph.unread_layers import notes_on_unread
from lora_export.lora import LoraPair
from lora_export.models.export import to_onnx
from lora_export.models.load import from_factory
from lora_export.plan import Step, Term
from support.api import Recorder
from support.graphs import an_adapter as pairs_of
from support.plans import matrix, vector

PAIR = LoraPair(a=np.ones((1, 3)), b=np.ones((3, 1)), scale=0.5)
IDLE = LoraPair(a=np.ones((1, 3)), b=np.zeros((3, 1)), scale=0.5)
WIDE = LoraPair(a=np.ones((1, 4)), b=np.ones((3, 1)), scale=0.5)


class Pooled(nn.Module):
    """As BigBird with a classifier: the pooler is computed, and no output reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.pooler = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.pooler(x)
        return self.q(x)


def model() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Pooled().eval(), torch.ones(2, 3)


@pytest.mark.parametrize("lora", ["merged", "nodes", "inputs", "rows", "slots"])
def test_a_pair_without_effect_is_left_out_with_a_note(lora: str, tmp_path: Path) -> None:
    seen = Recorder()
    adapter = pairs_of({"q": PAIR, "pooler": IDLE}, name="fr", sha256="00" * 32)
    request: dict[str, Any] = {"target": "all-linear"} if lora in ("inputs", "slots") else {}
    made = export_from_model(
        OnnxRequest(model(), tmp_path / "m.onnx", lora=lora, adapters=[adapter], **request, **seen.callbacks)
    )
    note = "note: the pairs of fr on pooler, which no output of the graph reads, have no effect: left out"
    assert seen.messages.count(note) == 1 and made.proof is not None and made.proof.verdict.same
    assert made.plan is not None and [step.weight for step in made.plan.steps] == ["q.weight"]


def test_a_pair_with_effect_is_refused_with_a_way_out(tmp_path: Path) -> None:
    adapter = pairs_of({"q": PAIR, "pooler": PAIR}, name="fr")
    with pytest.raises(MatchError, match="the graph has no weight for pooler") as refused:
        export_from_model(OnnxRequest(model(), tmp_path / "m.onnx", adapters=[adapter]))
    assert "no output reads them" in str(refused.value) and 'merge("BASE", "ADAPTER")' in str(refused.value)
    assert list(tmp_path.iterdir()) == []


class OfOneName(nn.Module):
    """A layer that no output reads, and one whose name ends as its own."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.aux = nn.Linear(3, 3), nn.ModuleDict({"q": nn.Linear(3, 3)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.q(x)
        return self.aux["q"](x)  # type: ignore[no-any-return]


def test_a_pair_is_not_given_to_a_layer_of_a_longer_name(tmp_path: Path) -> None:
    adapter = pairs_of({"q": PAIR}, name="fr")
    with pytest.raises(MatchError, match="the graph has no weight for q"):
        export_from_model(OnnxRequest((OfOneName().eval(), torch.ones(2, 3)), tmp_path / "m.onnx", adapters=[adapter]))


def test_a_named_target_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MatchError, match="the graph has no weight for pooler") as refused:
        export_from_model(OnnxRequest(model(), tmp_path / "m.onnx", lora="inputs", target=["q", "pooler"]))
    assert "leave them out of target" in str(refused.value)


@pytest.mark.parametrize(
    ("pairs", "biases", "problem"),
    [
        ({"q": WIDE, "pooler": IDLE}, {}, r"q\.weight is \(3, 3\)"),
        (
            {"q": PAIR, "pooler": IDLE},
            {"pooler": np.ones(3, np.float32)},
            r"in fr:\n.*no weight for pooler\.bias",
        ),
        ({"pooler": PAIR}, {}, "the graph has no weight for pooler"),
    ],
)
def test_what_does_not_fit_otherwise_stays_an_error(pairs: Any, biases: Any, problem: str, tmp_path: Path) -> None:
    adapter = pairs_of(pairs, name="fr", biases=biases)
    with pytest.raises(MatchError, match=problem) as refused:
        export_from_model(OnnxRequest(model(), tmp_path / "m.onnx", adapters=[adapter]))
    assert len(refused.value.misfits) == 1


def test_every_adapter_of_a_step_is_named_and_counted() -> None:
    idle = Step(matrix("pooler.weight", 3), (Term("fr", "pooler", IDLE), Term("de", "pooler", IDLE)))
    notes = [
        f"the pairs of {name} on pooler, which no output of the graph reads, have no effect: left out"
        for name in ("fr", "de")
    ]
    assert notes_on_unread([idle], planned=[idle]) == notes and notes_on_unread([], planned=[idle]) == []
    for other in (
        Step(matrix("q.weight", 3), (Term("fr", "q", PAIR),)),
        Step(vector("q.bias", 3), shift=np.ones(3, np.float32), shift_of=("fr",)),
    ):
        with pytest.raises(MatchError, match=r"1 of 3 targets(.|\n)* in fr:\n.*the graph has no weight for q"):
            notes_on_unread([idle, other], planned=[idle, other])


@pytest.mark.parametrize("pair", [IDLE, PAIR])
def test_layers_that_none_of_several_graphs_has(pair: LoraPair, tmp_path: Path) -> None:
    """Each graph lacks layers of the others: what all of them lack is known at the end."""
    seen, base = Recorder(), from_factory("pooled", model)
    adapter = pairs_of({"q": PAIR, "pooler": pair}, name="fr")
    output = tmp_path / "decoder_model.onnx"
    options = OnnxRequest(model(), output, task="text2text-generation", adapters=[adapter], **seen.callbacks)
    graphs = {output.name: to_onnx(base.module, base.example_inputs(), axes=base.axes)}
    if pair is PAIR:
        with pytest.raises(MatchError, match=r"1 of 2 targets(.|\n)* in fr:\n.*the graph has no weight for pooler"):
            write_graphs(base, graphs, options, [], tmp_path)
    else:
        write_graphs(base, graphs, options, [], tmp_path)
        assert [text for text in seen.messages if "pairs of fr on pooler, which no output" in text]
