"""What several tests share: proofs."""

from __future__ import annotations

import copy

import numpy as np
import torch

from lora_export import layers, plan
from lora_export.lora import Adapter, LoraPair
from lora_export.models import model
from lora_export.runtime import torch_runners


def an_adapter(scale: float = 1.0, module: str = "dense") -> Adapter:
    rng = np.random.default_rng(0)
    pair = LoraPair(a=rng.standard_normal((2, 8)), b=rng.standard_normal((8, 2)), scale=scale)
    return Adapter(name="a", format="test", pairs={module: pair}, sha256="0a")


def folded(base: model.Model, adapter: Adapter, strength: float = 1.0) -> torch_runners.ModuleRunner:
    module = copy.deepcopy(base.module)
    layers.fold(module, plan.make([adapter], layers.specs(module), strengths=[strength]))
    return torch_runners.ModuleRunner(module)


def bf16_merge(base: model.Model, adapter: Adapter, *, strength: float = 1.0) -> torch_runners.ModuleRunner:
    """The merged module as a bf16 checkpoint holds it: every weight of the changed layer rounded."""
    module = folded(base, adapter, strength).module
    with torch.no_grad():
        module.dense.weight.copy_(module.dense.weight.bfloat16())
    return torch_runners.ModuleRunner(module, stored_dtypes={"dense.weight": "bfloat16", "dense.bias": "float32"})
