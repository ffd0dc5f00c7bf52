"""Small models of PyTorch with their exported graphs. Each is exported once a session. For tests against PyTorch."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lora_export import layers, plan
from lora_export.lora import Adapter
from lora_export.models import export
from lora_export.models.model import Axes
from support import kept_exports
from support.graphs import Arrays, run
from support.tiny_models import tiny_bert, tiny_llama


class Mlp(nn.Module):
    """Linear layers over two-dimensional inputs, which become Gemm nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.down = nn.Linear(8, 3)
        nn.init.zeros_(self.down.bias)
        self.norm.running_var.fill_(3.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.norm(self.up(x))))


class Encoder(nn.Module):
    """A convolution, and `nn.TransformerEncoder` with two layers of equal weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 16, 3, padding=1)
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.encoder(self.conv(x).transpose(1, 2))
        return {"scores": self.head(hidden), "pooled": hidden.mean(1)}


TOKEN_AXES = {0: "batch", 1: "sequence"}
AXES: dict[str, Axes] = {
    "mlp": {"x": {0: "batch"}},
    "encoder": {"x": {0: "batch", 2: "sequence"}},
    "bert": {"input_ids": TOKEN_AXES, "attention_mask": TOKEN_AXES, "token_type_ids": TOKEN_AXES},
    "llama": {"input_ids": TOKEN_AXES, "attention_mask": TOKEN_AXES},
}
SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 40}
MODEL_BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "mlp": Mlp,
    "encoder": Encoder,
    "bert": lambda: tiny_bert(**SIZES),
    "llama": lambda: tiny_llama(**SIZES, num_attention_heads=4, tie_word_embeddings=True),
}
LLAMA = pytest.param("llama", marks=pytest.mark.slow)  # its export takes as long as the others together
EVERY_MODEL = pytest.mark.parametrize("name", ["mlp", "encoder", "bert", LLAMA])


@dataclass(frozen=True, eq=False)
class ExportedModel:
    """A module and its exported graph. Each caller gets its own copy of the graph; all share the module."""

    module: nn.Module
    graph: ir.Model
    axes: Axes


def inputs(name: str, batch: int = 2, length: int = 7, *, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs of a model, by name."""
    torch.manual_seed(seed)
    if name == "mlp":
        return {"x": torch.randn(batch, 4)}
    if name == "encoder":
        return {"x": torch.randn(batch, 3, length)}
    ids = torch.randint(0, 50, (batch, length))
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[1::2, -2:] = 0
    made = {"input_ids": ids, "attention_mask": mask}
    return made | {"token_type_ids": (ids + 1) % 2} if name == "bert" else made


@functools.cache
def _exported(name: str) -> ExportedModel:
    torch.manual_seed(0)
    module = MODEL_BUILDERS[name]().eval()
    with mock.patch.object(kept_exports.use, "folder", kept_exports.use.place):  # also for a test of exporters
        return ExportedModel(module, export.to_onnx(module, inputs(name), axes=AXES[name]), AXES[name])


def exported(name: str) -> ExportedModel:
    """The module of this name with a new copy of its graph, exported with 2 rows of 7 tokens."""
    made = _exported(name)
    return ExportedModel(made.module, made.graph.clone(), made.axes)


def eager(module: nn.Module, feeds: Mapping[str, Tensor]) -> Arrays:
    """The outputs of a module in PyTorch, by name."""
    with torch.no_grad():
        outputs = module(**feeds)
    if isinstance(outputs, Tensor):
        outputs = {"output_0": outputs}
    return {name: value.numpy() for name, value in outputs.items() if isinstance(value, Tensor)}


def assert_computes(graph: ir.Model, base: ir.Model, reference: nn.Module, name: str) -> None:
    """The graph computes what the reference does, for two shapes of inputs, and the base does not."""
    for batch, length in [(1, 5), (3, 12)]:
        feeds = inputs(name, batch, length, seed=2)
        arrays = {key: value.numpy() for key, value in feeds.items()}
        output, before = run(graph, **arrays), run(base, **arrays)
        for key, value in eager(reference, feeds).items():
            np.testing.assert_allclose(output[key], value, rtol=1e-4, atol=1e-5)
            assert np.abs(value - before[key]).max() > 1e-2


def attached(module: nn.Module, adapter: Adapter) -> nn.Module:
    """A copy of the module with the adapter attached in PyTorch. Tied weights are untied first."""
    steps = plan.make([adapter], layers.specs(module))
    adapted = with_changes(module, {step.weight: np.zeros(()) for step in steps.low_rank})
    layers.attach(adapted, steps)
    return adapted


def with_changes(module: nn.Module, changes: Mapping[str, NDArray[Any]]) -> nn.Module:
    """A copy of the module whose parameters are W + ΔW, summed by NumPy in fp64. Tied weights are untied first."""
    plain = copy.deepcopy(module)
    for name, change in changes.items():
        owner, _, attribute = name.rpartition(".")
        holder = plain.get_submodule(owner)
        weight = getattr(holder, attribute).detach().double().numpy()
        setattr(holder, attribute, nn.Parameter(torch.from_numpy((weight + change).astype(np.float32))))
    return plain
