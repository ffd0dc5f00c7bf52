"""The model as the reference of adapters whose heads have another number of labels than its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from lora_export import layers
from lora_export.layers.module_tensors import named_tensors, tensor_registry
from lora_export.lora import Adapter
from lora_export.models.model import Model
from lora_export.plan.own_heads import with_labels_of
from lora_export.verification.references.module_copies import shared_copy


def with_labels(model: Model, adapters: Sequence[Adapter]) -> Model:
    """The model with as many labels as the heads of the adapters have; itself where it has as many.

    All other tensors are shared. The rows of its own head are repeated: they are what the control without adapters
    computes with. Raises InputRefused where the model lacks a layer of a head.
    """
    before = layers.specs(model.module)
    after = before
    for adapter in adapters:
        after = with_labels_of(adapter, after)
    shapes = {new.name: new.shape for old, new in zip(before, after, strict=True) if old.shape != new.shape}
    if not shapes:
        return model
    module = shared_copy(model.module)
    for name, owner, attribute, tensor in list(named_tensors(module)):
        if name in shapes:
            rows = tensor.detach()[torch.arange(shapes[name][0]) % len(tensor)].clone()
            tensor_registry(owner, attribute)[attribute] = nn.Parameter(rows, requires_grad=False)
            if isinstance(owner, nn.Linear):
                owner.out_features = len(rows)
    return replace(model, module=module)
