"""What several tests share: proofs."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch

from lora_export import layers, plan
from lora_export.lora import Adapter, LoraPair
from lora_export.models import model
from lora_export.runtime import torch_runners
from lora_export.runtime.runner import Runner
from lora_export.verification.proof import Proof
from lora_export.verification.references.attached_module import attach_adapters
from lora_export.verification.row_proofs import MixedRow, _judged, _mixed_cases


def an_adapter(scale: float = 1.0, module: str = "dense") -> Adapter:
    rng = np.random.default_rng(0)
    pair = LoraPair(a=rng.standard_normal((2, 8)), b=rng.standard_normal((8, 2)), scale=scale)
    return Adapter(name="a", format="test", pairs={module: pair}, sha256="0a")


def folded(base: model.Model, adapter: Adapter, strength: float = 1.0) -> torch_runners.ModuleRunner:
    module = copy.deepcopy(base.module)
    layers.fold(module, plan.make([adapter], layers.specs(module), strengths=[strength]))
    return torch_runners.ModuleRunner(module)


def attached_copy(
    base: model.Model, adapters: Sequence[Adapter], strengths: Sequence[float] | None = None
) -> torch.nn.Module:
    """A copy of the model's module with adapters attached."""
    return attach_adapters(copy.deepcopy(base.module), adapters, strengths)


def judge_mixed(candidate: Runner, proofs: Sequence[Proof], order: Sequence[int]) -> Proof:
    """Judge a candidate whose rows have different adapters, as the ids in `order` over and over along the batch.

    `proofs` are, by id, those of whole batches whose rows all have the same adapter, on the same inputs.
    """
    return _judged(proofs, _mixed_cases(candidate, proofs, [MixedRow((one,), (1.0,), one) for one in order]))


def bf16_merge(base: model.Model, adapter: Adapter, *, strength: float = 1.0) -> torch_runners.ModuleRunner:
    """The merged module as a bf16 checkpoint holds it: every weight of the changed layer rounded."""
    module = folded(base, adapter, strength).module
    with torch.no_grad():
        module.dense.weight.copy_(module.dense.weight.bfloat16())
    return torch_runners.ModuleRunner(module, stored_dtypes={"dense.weight": "bfloat16", "dense.bias": "float32"})
