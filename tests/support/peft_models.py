"""Models that PEFT adapts, and whether an adapter that was read is the one that PEFT has."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from torch import nn

from lora_export import formats
from lora_export.lora import Adapter


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.blocks = nn.ModuleList([nn.ModuleDict({n: nn.Linear(4, 4) for n in ("up", "down")}) for _ in range(2)])
        self.last = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block["down"](block["up"](x)).relu()
        return self.last(x)


@torch.no_grad()
def fill(model: nn.Module, part: str = "", *, std: float = 1.0, generator: torch.Generator | None = None) -> None:
    """Give what is trained of a model, and has `part` in its name, random values: no value is zero."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and part in name:
            parameter.normal_(std=std, generator=generator)


def trained(base: nn.Module, **config: Any) -> peft.PeftModel:
    """PEFT's model with an adapter as after training: no value is zero."""
    torch.manual_seed(0)
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config))
    fill(model)
    return model.eval()


def read_back(model: peft.PeftModel, folder: Path) -> Adapter:
    model.save_pretrained(folder)
    return formats.load(folder)


def agrees(adapter: Adapter, model: peft.PeftModel) -> bool:
    """Whether the adapter has PEFT's pairs, on PEFT's modules, at PEFT's scales; and no others."""
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    return adapter.pairs.keys() == layers.keys() and all(
        all(map(_equal, (pair.a, pair.b, pair.magnitude), _parameters(layers[name])))
        and pair.embedding is isinstance(layers[name], peft.tuners.lora.Embedding)
        and pair.scale == layers[name].scaling["default"]
        for name, pair in adapter.pairs.items()
    )


def _parameters(layer: peft.tuners.lora.LoraLayer) -> tuple[Any, ...]:
    if isinstance(layer, peft.tuners.lora.Embedding):
        a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    else:
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return a, b, layer.lora_magnitude_vector["default"].weight if layer.lora_magnitude_vector else None


def _equal(ours: Any, theirs: torch.Tensor | None) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    return np.array_equal(ours.ravel(), theirs.detach().numpy().ravel())


def whole_tensors(adapter: Adapter) -> dict[str, list[Any]]:
    return {name: tensor.tolist() for name, tensor in adapter.replaced.items()}
