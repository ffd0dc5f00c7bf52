"""An ONNX file from a PyTorch model: what is exported, refused and written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lora_export.api.onnx_from_model import (
    check_fit,
    export_from_model,
    future_adapters,
    without_changed_ties,
    write_with_adapters,
)
from lora_export.api.onnx_request import OnnxRequest
from lora_export.errors import InputRefused, MatchError
from lora_export.graph.onnx_file.reading import load_graph
from lora_export.lora import Adapter, LoraPair
from lora_export.models.load import from_module
from lora_export.models.model import Model
from support.api import Recorder
from support.graphs import a_graph
from support.graphs import an_adapter as pairs_of
from support.small_graphs import LINEAR, PAIR


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.two.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.tanh(self.one(x)))


def a_linear_model() -> Model:
    module = nn.Sequential()
    module.add_module("m", nn.Linear(3, 2))
    return from_module(module, torch.ones(2, 3))


def options(lora: str, *adapters: Adapter, **fields: Any) -> OnnxRequest:
    return OnnxRequest("base", Path(fields.pop("output", "m.onnx")), lora=lora, adapters=adapters, **fields)


def test_future_adapters_have_a_pair_at_each_target_and_no_effect() -> None:
    (future,) = future_adapters(a_linear_model(), options("inputs", target="m"))
    assert list(future.pairs) == ["m"] and future.is_identity and future.name == "target"
    assert future_adapters(a_linear_model(), options("inputs")) == []
    with pytest.raises(InputRefused, match="q"):
        future_adapters(a_linear_model(), options("inputs", target="q"))


def test_what_does_not_fit_the_module_is_refused_before_the_export(tmp_path: Path) -> None:
    wrong = pairs_of({"elsewhere": PAIR}, name="fr")
    with pytest.raises(MatchError, match="elsewhere"):
        check_fit(a_linear_model(), options("merged", wrong), [])
    seen = Recorder()
    with pytest.raises(MatchError):
        request = options("merged", wrong, output=tmp_path / "m.onnx", **seen.callbacks)
        export_from_model(replace(request, model=(a_linear_model().module, torch.ones(2, 3))))
    assert "exporting the base" not in seen.stages and list(tmp_path.iterdir()) == []


def test_a_pair_on_a_tied_weight_is_refused() -> None:
    tied = from_module(Tied(), torch.ones(2, 3))
    one = pairs_of({"one": LoraPair(a=np.ones((1, 3)), b=np.ones((3, 1)), scale=1.0)})
    with pytest.raises(InputRefused, match=r"one tensor under several names: one\.weight and two\.weight"):
        check_fit(tied, options("merged", one), [])
    wanted = options("inputs", target="one")
    with pytest.raises(InputRefused, match="one tensor under several names"):
        check_fit(tied, wanted, future_adapters(tied, wanted))


def test_a_changed_tie_gets_a_tensor_of_its_own() -> None:
    tied, seen = from_module(Tied(), torch.ones(2, 3)), Recorder()
    whole = pairs_of({}, replaced={"two.weight": np.eye(3, dtype=np.float32)})
    untied = without_changed_ties(tied, options("merged", whole, **seen.callbacks))
    assert untied is not tied and untied.module.two.weight is not untied.module.one.weight
    assert tied.module.two.weight is tied.module.one.weight, "the given model is unchanged"
    (message,) = seen.messages
    assert message.startswith("note: two.weight is tied to another tensor in the model")
    other = pairs_of({"m": PAIR})
    base = a_linear_model()
    assert without_changed_ties(base, options("merged", other)) is base
    assert without_changed_ties(tied, options("merged")) is tied


def test_without_adapters_the_base_is_written(tmp_path: Path) -> None:
    assert write_with_adapters(a_graph(LINEAR), options("merged"), [], tmp_path) == (None, [])
    assert len(load_graph(tmp_path / "m.onnx").graph.inputs) == 1


def test_a_merge_below_rounding_is_refused(tmp_path: Path) -> None:
    tiny = pairs_of({"m": LoraPair(a=np.full((1, 3), 1e-6), b=np.full((2, 1), 1e-6), scale=1.0)})
    with pytest.raises(InputRefused, match="rounding"):
        write_with_adapters(a_graph(LINEAR), options("merged", tiny), [], tmp_path)
    assert list(tmp_path.iterdir()) == []
