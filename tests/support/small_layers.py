"""Small modules and adapters whose products can be computed by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_export import layers, plan
from lora_export.lora import Adapter, LoraPair
from lora_export.pairs.stages import Blocks
from lora_export.pairs.transforms import WeightTransform
from lora_export.plan import Plan


def integers(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).integers(-2, 3, size=shape).astype(np.float32)


def a_pair(out: int, inner: int, *, rank: int = 2, scale: float = 0.5, seed: int = 0) -> LoraPair:
    return LoraPair(a=integers(rank, inner, seed=seed + 1), b=integers(out, rank, seed=seed + 2), scale=scale)


def ones(out: int, into: int, *kernel: int, **fields: Any) -> LoraPair:
    return LoraPair(a=np.ones((1, into, *kernel)), b=np.ones((out, 1, *[1] * len(kernel))), scale=1.0, **fields)


def turned_by_nothing(into: int) -> WeightTransform:
    """A rotation of each input by itself, as PEFT's OFT has of a layer of prime width."""
    stage = Blocks(turned=True, less_identity=np.zeros((into, 1, 1), np.float32))
    stored = {"oft_R.weight": np.zeros((into, 0), np.float32)}
    settings = {"block": 1, "terms": 5, "embedding": False}
    return WeightTransform("OFT", stored, lambda *_: (stage,), (0, into), settings=settings)


def an_adapter(pairs: Mapping[str, LoraPair], *, name: str = "default", **fields: Any) -> Adapter:
    return Adapter(name=name, format="test", pairs=pairs, **fields)


def plan_for(module: nn.Module, *adapters: Adapter, **options: Any) -> Plan:
    return plan.make(adapters, layers.specs(module), **options)


def by_hand(module: nn.Module, changes: Mapping[str, NDArray[Any]]) -> nn.Module:
    """A plain copy whose tensors are W + ΔW, added in NumPy's fp64."""
    plain = copy.deepcopy(module)
    with torch.no_grad():
        for name, change in changes.items():
            tensor = plain.state_dict()[name]
            tensor.copy_(torch.from_numpy(tensor.double().numpy() + change))
    return plain


def delta(pair: LoraPair, strength: float = 1.0) -> NDArray[np.float64]:
    return strength * pair.scale * (pair.b.astype(np.float64) @ pair.a.astype(np.float64))


def a_linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    """W = [[1, 2, 3], [4, 5, 6]], bias = [1, -1]."""
    linear = nn.Linear(3, 2, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 2, 3], [4, 5, 6]]))
        linear.bias.copy_(torch.tensor([1.0, -1]))
    return linear


def a_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """The layer above under the name `0`."""
    return nn.Sequential(a_linear(dtype))


# ΔW = 2 * [[1], [2]] [[1, 0, -1]] = [[2, 0, -2], [4, 0, -4]]
PAIR = LoraPair(a=np.array([[1, 0, -1]]), b=np.array([[1], [2]]), scale=2.0)
X = torch.tensor([[1.0, 1, 2]])  # W x + bias = [10, 20], ΔW x = [-2, -4]


def equal(left: Tensor, right: Tensor) -> bool:
    return left.dtype is right.dtype and torch.equal(left, right)


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[str]:
    calls: list[str] = []
    real = getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


TARGETS = {"self_attn": (24, 8), "self_attn.out_proj": (8, 8), "linear1": (16, 8), "linear2": (8, 16)}


def an_encoder_layer(**options: Any) -> nn.TransformerEncoderLayer:
    torch.manual_seed(1)
    return nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, dropout=0.0, batch_first=True, **options)


def encoder_changes(prefix: str = "", seed: int = 0) -> tuple[dict[str, LoraPair], dict[str, NDArray[np.float64]]]:
    pairs = {prefix + key: a_pair(*shape, scale=0.125, seed=seed) for key, shape in TARGETS.items()}
    weights = {key: "in_proj_weight" if key.endswith("self_attn") else "weight" for key in pairs}
    return pairs, {f"{key}.{weights[key]}": delta(pair) for key, pair in pairs.items()}


class Everything(nn.Module):
    """A layer of each kind, and strides, paddings and dilations of all sorts."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.fc, self.fan = nn.Embedding(11, 6, padding_idx=0), nn.Linear(6, 8), Conv1D(8, 8)
        self.one = nn.Conv1d(8, 6, 3, padding="same")
        self.two = nn.Conv2d(1, 4, (2, 3), stride=(2, 1), padding=(1, 0), bias=False)
        self.three = nn.Conv3d(1, 3, 2, padding=1)
        nn.init.normal_(self.fan.bias)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.fan(torch.tanh(self.fc(self.words(ids))))
        y = torch.tanh(self.one(x.transpose(1, 2)))
        return self.three(torch.tanh(self.two(y.unsqueeze(1))).unsqueeze(1))


def base_of(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()
