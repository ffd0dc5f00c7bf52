"""Names that PyTorch keeps to itself and that layers need, each behind one function.

The tests name what a new version of PyTorch has removed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The parameters of a module itself, by attribute. Where adapters are attached, `.weight` is W + ΔW instead."""
    return module._parameters


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """The buffers of a module itself, by attribute."""
    return module._buffers


def own_modules(module: nn.Module) -> dict[str, nn.Module | None]:
    """The children of a module, by attribute."""
    return module._modules


def unsaved_buffers(module: nn.Module) -> set[str]:
    """The attributes of the module's own buffers that its state_dict leaves out."""
    return module._non_persistent_buffers_set


def without_subclass_rules() -> AbstractContextManager[Any]:
    """A context in which operators treat subclasses of Tensor as tensors: a result is none of a parameter's class."""
    return torch._C.DisableTorchFunctionSubclass()


def reshaped_alone(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The values in another shape, which count as no view. The tensor must not be used afterwards."""
    reshaped: Tensor = torch.ops.aten._unsafe_view(tensor, list(shape))
    return reshaped
