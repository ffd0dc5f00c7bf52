"""Two PEFT adapters on layers of several kinds, and what PEFT's `add_weighted_adapter` makes of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import peft
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_export.adapters.combine import kept_at_random

IDS = torch.tensor([[1, 4, 2, 0]])
LAYERS = ("table", "linear", "conv1d", "kernel", "point")
LAYOUT = {"conv1d": "in_out"}  # the others are out_in, or known by their shape
WEIGHTS = (0.7, -1.5)


class Layers(nn.Module):
    """Ids (batch, 4) through a layer of each kind. All matrices are square, so that a transposed one is wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 6)
        self.linear, self.conv1d = nn.Linear(6, 6), Conv1D(6, 6)
        self.kernel, self.point = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv1d(torch.tanh(self.linear(self.table(ids)))).reshape(-1, 4, 3, 2)
        result: Tensor = self.point(torch.tanh(self.kernel(x)))
        return result


def layers() -> Layers:
    torch.manual_seed(3)
    return Layers()


def adapted(folder: Path, *configs: dict[str, Any]) -> peft.PeftModel:
    """A model with adapters `one`, `two`, ... of these fields of LoraConfig, and random A and B; saved in the folder.

    The base is saved as `base.safetensors`.
    """
    net = layers()
    save_file({name: value.contiguous() for name, value in net.state_dict().items()}, folder / "base.safetensors")
    model: Any = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, own in zip(("one", "two", "three"), configs, strict=False):
            config = peft.LoraConfig(**({"r": 2, "lora_alpha": 3, "target_modules": list(LAYERS)} | own))
            if model is None:
                model = peft.get_peft_model(net, config, adapter_name=name)
            else:
                model.add_adapter(name, config)
        generator = torch.Generator().manual_seed(7)
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.data = torch.randn(value.shape, generator=generator) / 2
        model.save_pretrained(folder)
    return model


def combined_by_peft(model: peft.PeftModel, method: str, **options: Any) -> dict[str, NDArray[np.float32]]:
    """The merged weights of PEFT's own combination."""
    names = list(model.peft_config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(names, list(WEIGHTS[: len(names)]), "both", combination_type=method, **options)
        model.set_adapter("both")
        merged = model.merge_and_unload()
    return {name: value.detach().numpy() for name, value in merged.state_dict().items()}


@contextmanager
def our_masks(seed: int, *, whole: bool) -> Iterator[None]:
    """PEFT draws the random entries that `kept_at_random` draws: for A and B of each layer, or of whole changes."""
    spelled = {
        layer: f"base_model.model.{layer}.lora_{'embedding_A' if layer == 'table' else 'A.weight'}" for layer in LAYERS
    }
    keys = iter([
        (f"{seed}/{number}/{spelled[layer]}" + ("" if whole else f"/{side}"), whole and layer in ("table", "conv1d"))
        for layer in LAYERS
        for side in ("A" if whole else "AB")
        for number in range(2)
    ])  # fmt: skip

    def bernoulli(probabilities: Tensor) -> Tensor:
        key, transposed = next(keys)
        shape = probabilities.T.shape if transposed else probabilities.shape
        kept = kept_at_random(tuple(shape), float(probabilities.flatten()[0]), key)
        return torch.from_numpy((kept.T if transposed else kept).astype(np.float32).copy())

    with mock.patch("peft.utils.merge_utils.torch.bernoulli", bernoulli):
        yield
    assert next(keys, None) is None
