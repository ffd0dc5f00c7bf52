"""Weights of which each of several processes holds a share (FSDP): PyTorch's DTensor.

PyTorch puts the whole values in their place while the block that owns them computes.
"""

from __future__ import annotations

import sys

from torch import Tensor


def own_share(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: all of it, where it is in no shares."""
    loaded = sys.modules.get("torch.distributed.tensor")  # by `fully_shard`
    return tensor.to_local() if loaded and isinstance(tensor, loaded.DTensor) else tensor


def is_in_shares(tensor: Tensor) -> bool:
    """Whether this process holds a share of the tensor alone."""
    return own_share(tensor) is not tensor
