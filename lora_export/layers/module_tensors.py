"""What an nn.Module holds: each tensor's names, who owns it, and how it lies."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lora_export.errors import InputRefused
from lora_export.plan import Layout, TensorSpec

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class Place(NamedTuple):
    """One name of a tensor: a tied tensor has several."""

    name: str
    owner: nn.Module
    attribute: str
    tensor: Tensor


def places_in(module: nn.Module) -> Iterator[Place]:
    """Every parameter and persistent buffer, in the order of the state_dict."""
    for path, owner in module.named_modules(remove_duplicate=False):
        for attribute, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is not None and attribute not in owner._non_persistent_buffers_set:
                yield Place(f"{path}.{attribute}" if path else attribute, owner, attribute, tensor)


def specs(module: nn.Module) -> list[TensorSpec]:
    """Name, shape, dtype and layout of every tensor in the module's state_dict; both names of a tied one."""
    found = []
    for name, owner, attribute, tensor in places_in(module):
        if nn.parameter.is_lazy(tensor):
            raise InputRefused(f"{name} has no shape yet: run the lazy module on an example first")
        found.append(
            TensorSpec(
                name=name,
                shape=tuple(tensor.shape),
                dtype=str(tensor.dtype).removeprefix("torch."),
                layout=layout_of(owner, attribute),
                nbytes=tensor.nbytes,
            )
        )
    return found


def layout_of(owner: nn.Module, attribute: str) -> Layout:
    if isinstance(owner, (nn.Linear, *CONVOLUTIONS)) and attribute == "weight":
        return Layout.OUT_IN
    if isinstance(owner, nn.Embedding) and attribute == "weight":
        return Layout.EMBEDDING
    if isinstance(owner, nn.MultiheadAttention) and attribute in ATTENTION_WEIGHTS:
        return Layout.OUT_IN
    if isinstance(owner, conv1d()) and attribute == "weight":
        return Layout.IN_OUT
    if attribute == "weight" and isinstance(told := getattr(owner, "lora_layout", None), Layout):
        return told  # a program's matrix, of whose layer nothing but its name is left
    return Layout.OTHER


def conv1d() -> tuple[type[nn.Module], ...]:
    """transformers' Conv1D where transformers is loaded: no module can hold one otherwise."""
    loaded = sys.modules.get("transformers.pytorch_utils")
    return (loaded.Conv1D,) if loaded else ()


def slots_of(owner: nn.Module, attribute: str) -> dict[str, Any]:
    return owner._parameters if attribute in owner._parameters else owner._buffers


def oriented(weight: Tensor, layout: Layout) -> Tensor:
    """Between a weight as it is stored and its (out, in, ...) view, either way."""
    return weight.T if layout.is_turned else weight


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


# --- Between NumPy and torch: bf16 has no common name ---


def as_tensor(array: NDArray[Any]) -> Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.tensor(array.view(np.uint16)).view(torch.bfloat16)
    return torch.tensor(array)


def as_array(tensor: Tensor) -> NDArray[Any]:
    own = tensor.detach().cpu().clone()
    if own.dtype is torch.bfloat16:
        bits: NDArray[Any] = own.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return bits
    array: NDArray[Any] = own.numpy()
    return array
