"""Graphs that tests share in a run: an export is made anew for whatever could change it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from torch import nn

from lora_export.layers.torch_internals import exchange_forward
from lora_export.models import export
from support import kept_exports
from support.graphs import run

X = {"x": torch.ones(2, 3, 2)}  # of three dimensions: weights are stored transposed
AXES = {"x": {0: "batch"}}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.other = nn.Linear(2, 2), nn.Linear(2, 2)
        self.factor = 2.0
        self.register_buffer("offset", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(self.one(x)) * self.factor + self.offset


def times(net: Net, factor: float) -> None:
    exchange_forward(net, lambda self, x: self.one(x) * factor)


def tied(net: Net) -> None:
    net.other.weight = net.one.weight


def equal(net: Net) -> None:
    net.other.weight = nn.Parameter(net.one.weight.detach().clone())


CHANGES: dict[str, Callable[[Net], object]] = {
    "a number of a buffer": lambda net: net.offset.add_(1),
    "a buffer": lambda net: net.register_buffer("mean", torch.zeros(2)),
    "a buffer of another dtype": lambda net: net.register_buffer("mean", torch.zeros(2, dtype=torch.int32)),
    "a setting": lambda net: setattr(net, "factor", 3.0),
    "its mode": lambda net: net.eval(),
    "a hook": lambda net: net.one.register_forward_hook(lambda _, inputs, output: output + inputs[0]),
    "its forward": lambda net: times(net, 2.0),
    "what its forward holds": lambda net: times(net, 3.0),
    "gradients": lambda net: net.requires_grad_(False),
    "tied weights": tied,
    "equal weights": equal,
    "dtype": lambda net: net.half(),
}


def test_whatever_changes_an_export_changes_its_key() -> None:
    nets = [Net(), copy.deepcopy(Net())]
    for change in CHANGES.values():
        nets.append(Net())
        change(nets[-1])
    keys = [kept_exports.key("model", (net,), X) for net in nets]
    assert None not in keys and keys[0] == keys[1]
    assert len(set(keys)) == len(CHANGES) + 1
    assert kept_exports.key("model", (Net(),), {"x": torch.zeros(2, 3, 2)}) not in keys
    assert kept_exports.key("model", (Net(),), (each for each in keys)) is None


def test_an_equal_model_gets_the_kept_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_exports.use, "folder", tmp_path)
    first, second = (export.to_onnx(Net(), X, axes=AXES) for _ in range(2))
    assert len(list(tmp_path.glob("*.onnx"))) == len(list(tmp_path.glob("*.simplified"))) == 1
    assert ir.to_proto(first).SerializeToString() == ir.to_proto(second).SerializeToString()
    (output,) = run(second, x=X["x"].numpy()).values()
    torch.testing.assert_close(torch.tensor(output), Net()(**X))
    changed = Net()
    CHANGES["a setting"](changed)
    (output,) = run(export.to_onnx(changed, X, axes=AXES), x=X["x"].numpy()).values()
    torch.testing.assert_close(torch.tensor(output), changed(**X))
    assert len(list(tmp_path.glob("*.onnx"))) == 2


def test_a_kept_graph_has_the_weights_of_the_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_exports.use, "folder", tmp_path)
    export.to_onnx(Net(), X, axes=AXES)
    trained = Net()
    for weight in trained.parameters():
        weight.data += torch.rand(weight.shape)
    kept = ir.to_proto(export.to_onnx(trained, X, axes=AXES)).SerializeToString()
    assert len(list(tmp_path.glob("*.onnx"))) == 1
    monkeypatch.setattr(kept_exports.use, "folder", None)
    assert kept == ir.to_proto(export.to_onnx(trained, X, axes=AXES)).SerializeToString()


def test_a_graph_with_other_weights_than_the_modules_is_not_kept(tmp_path: Path) -> None:
    graph = export.to_onnx(Net(), X, axes=AXES)
    trained = Net()
    trained.one.bias.data += 1
    with pytest.raises(AssertionError, match=r"one\.bias"):
        kept_exports.save(graph, tmp_path / "m.onnx", trained)
