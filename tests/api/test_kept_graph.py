"""A base is exported once for many adapters, and each of them gets the graph that it gets alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from lora_export.api import kept_graph
from lora_export.api.kept_graph import exported_once
from lora_export.api.onnx_from_model import export_from_model
from lora_export.api.onnx_request import OnnxRequest
from lora_export.lora import Adapter, LoraPair
from lora_export.models import export
from lora_export.models.load import from_module
from lora_export.models.model import Model
from lora_export.storage.output_lock import output_lock
from support.folder_contents import folder_contents
from support.graphs import a_graph, an_adapter
from support.small_graphs import GEMM

PAIRS = {
    "0": LoraPair(np.float32([[1, 2, 3]]), np.float32([[1], [2], [3], [4]]), 0.5),
    "2": LoraPair(np.float32([[1, 0, 2, 1]]), np.float32([[1], [2]]), 0.25),
}


def a_model(seed: int = 0) -> Model:
    """Two layers, the first without a bias, as a MatMul in the graph."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2))
    return from_module(module, torch.ones(2, 3))


def adapter(name: str) -> Adapter:
    return an_adapter({name: PAIRS[name]}, name=f"on {name}", sha256="00" * 32)


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The modules that are exported."""
    found: list[nn.Module] = []
    to_onnx = export.to_onnx

    def counted(module: nn.Module, *arguments: Any, **options: Any) -> ir.Model:
        found.append(module)
        return to_onnx(module, *arguments, **options)

    monkeypatch.setattr(export, "to_onnx", counted)
    return found


@pytest.mark.parametrize("lora", ["merged", "nodes", "inputs", "rows"])
def test_each_adapter_gets_the_graph_that_it_gets_alone(lora: Any, tmp_path: Path, exports: list[nn.Module]) -> None:
    verify = lora == "merged"
    for name in PAIRS:
        for how, graphs in (("alone", None), ("kept", tmp_path / "graphs")):
            (tmp_path / how).mkdir(exist_ok=True)
            output = tmp_path / how / f"{name}.onnx"
            adapters = [adapter(name)]
            options = OnnxRequest(a_model(), output, lora=lora, adapters=adapters, graphs=graphs, verify=verify)
            result = export_from_model(options)
            assert not verify or (result.proof is not None and result.proof.verdict.same)
    assert len(exports) == 3  # two alone, one for both
    assert folder_contents(tmp_path / "kept") == folder_contents(tmp_path / "alone")


def other_weights(model: Model) -> Model:
    return a_model(seed=1)


def other_code(model: Model) -> Model:
    model.module[1] = nn.ReLU()  # type: ignore[operator]
    return model


def other_axes(model: Model) -> Model:
    return replace(model, axes={})


def another_buffer(model: Model) -> Model:
    model.module[1].register_buffer("table", torch.ones(1), persistent=False)  # type: ignore[operator, union-attr]
    return model


def another_function(model: Model) -> Model:
    """As by another argument of a factory: no class, no weight and no name is another one."""
    model.module[1].forward = lambda x: 2 * torch.tanh(x)  # type: ignore[operator, union-attr]
    return model


def another_attribute(model: Model) -> Model:
    """That has no effect on the example inputs: the length of a window, for instance."""
    model.module[1].window = 3  # type: ignore[operator, union-attr]
    return model


def other_values_of_inputs(model: Model) -> Model:
    return replace(model, make_inputs=lambda *_: {"input": torch.zeros(2, 3)})


def another_config(model: Model) -> Model:
    """That has no effect on the example inputs, and is no plain data."""
    model.module.config = SimpleNamespace(to_dict=lambda: {"window": 3})  # type: ignore[assignment]
    return model


OTHERS = [another_config, other_weights, other_code, other_axes, another_buffer, another_function, another_attribute]


@pytest.mark.parametrize("changed", [*OTHERS, other_values_of_inputs])
def test_another_model_has_another_graph(changed: Callable[[Model], Model], tmp_path: Path) -> None:
    made: list[str] = []

    def export_as(name: str) -> Callable[[], list[ir.Model]]:
        return lambda: (made.append(name), [a_graph(GEMM)])[1]

    exported_once(tmp_path, a_model(), [None, None], export_as("first"))
    exported_once(tmp_path, a_model(), [None, None], export_as("same"))
    exported_once(tmp_path, changed(a_model()), [None, None], export_as("other"))
    exported_once(tmp_path, a_model(), [None, 20], export_as("opset"))
    exported_once(tmp_path, a_model(), ["text-generation", None], export_as("task"))
    assert made == ["first", "other", "opset", "task"]


def test_others_wait_for_the_one_that_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process has the lock, and ends without a graph."""
    asked = threading.Event()
    monkeypatch.setattr(time, "sleep", lambda _: asked.set())
    base = a_model()
    own = tmp_path / kept_graph._key(base, [None])
    with output_lock(tmp_path / f".{own.name}.export", own):
        export_it = lambda: [export.to_onnx(base.module, base.example_inputs(), axes=base.axes)] * 2  # noqa: E731
        waiting = threading.Thread(target=exported_once, args=(tmp_path, base, [None], export_it))
        waiting.start()
        assert asked.wait(20) and not own.exists()
    waiting.join(60)
    assert sorted(path.name for path in own.iterdir()) == ["graph0.data", "graph0.onnx", "graph1.data", "graph1.onnx"]
    assert [path.name for path in tmp_path.iterdir()] == [own.name]
