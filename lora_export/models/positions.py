"""How a model of transformers finds the positions of its tokens where it is not given them."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from lora_export.graph.cache_names import IDS, MASK, POSITION_IDS
from lora_export.models.export import tracing
from lora_export.models.failures import named_failures


def takes_positions(module: nn.Module) -> bool:
    """Whether positions are a parameter of the model's forward."""
    return POSITION_IDS in inspect.signature(module.forward).parameters


def counts_by_mask(module: nn.Module) -> bool:
    """Whether the model counts the ones of the mask (OPT), and not all positions. Runs it twice."""
    ids = torch.arange(3).expand(2, -1)
    padded = {IDS: ids, MASK: (ids > 0).long()}  # the first position is padding
    with tracing(module), named_failures(module, padded, "padded prompt"):
        without, given = (
            module(**padded, **positions)[0][:, -1] for positions in ({}, {POSITION_IDS: ids.contiguous()})
        )
    return not torch.allclose(without, given)
