"""Copies of a module that share its tensors or convert them, and a module widened to fp64 in place."""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from lora_export.layers.torch_internals import exchange_forward
from lora_export.models import stored_parameter
from lora_export.models.outputs import named_outputs
from lora_export.models.stored_parameter import NARROW_DTYPES, StoredParameter, packed
from lora_export.runtime.memory import release_memory


def shared_copy(module: nn.Module) -> nn.Module:
    """A copy with the very same parameters and buffers; where the original's move, the copy's move too."""
    return copy.deepcopy(module, {id(tensor): tensor for tensor in _tensors(module)})


def limit_outputs(module: nn.Module, names: Sequence[str]) -> None:
    """Let a module return these of its outputs alone, from now on; what it lacks of them stays away."""
    cls = type(module)

    def forward(self: Any, *args: Any, **inputs: Any) -> dict[str, torch.Tensor]:
        outputs = named_outputs(cls.forward(self, *args, **inputs))
        return {name: outputs[name] for name in names if name in outputs}

    forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
    exchange_forward(module, forward)


def converted_copy(module: nn.Module, convert: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """A copy whose parameters and buffers are the converted ones of the original. Takes memory for these alone."""
    memo: dict[int, Any] = {}
    for tensor in _tensors(module):
        converted = convert(tensor if isinstance(tensor, StoredParameter) else tensor.detach())
        is_parameter = isinstance(tensor, nn.Parameter) and not isinstance(converted, StoredParameter)
        memo[id(tensor)] = nn.Parameter(converted, requires_grad=tensor.requires_grad) if is_parameter else converted
    return copy.deepcopy(module, memo)


def to_double(tensor: torch.Tensor) -> torch.Tensor:
    """A copy, floats as fp64."""
    return tensor.double() if tensor.is_floating_point() else tensor.clone()


def to_single(tensor: torch.Tensor) -> torch.Tensor:
    """A copy, floats as fp32; a stored parameter of fp32 itself."""
    if isinstance(tensor, StoredParameter) and tensor.dtype is torch.float32:
        return tensor
    return tensor.float() if tensor.is_floating_point() else tensor.clone()


def to_packed_single(tensor: torch.Tensor) -> torch.Tensor:
    """As `to_single`; a large tensor of a half precision keeps its memory, and is fp32 where it is used."""
    is_half = tensor.dtype in (torch.float16, torch.bfloat16)
    is_packed = is_half and tensor.numel() >= stored_parameter.SMALLEST_STREAMED
    return packed(tensor, torch.float32) if is_packed else to_single(tensor)


def parameters_and_buffers(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers; a tensor with several names comes once for each."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


@contextlib.contextmanager
def widened(module: nn.Module) -> Iterator[None]:
    """Convert the module's floats to fp64 in place, and back at the end; those of a large module stay as they are.

    `Fp64Runner` widens the weights of a large module where they are used, in every run again. A tensor takes memory in
    one precision at a time. Every module that shares it sees the change. fp64 represents all numbers of the narrower
    floats, so nothing is lost on the way back.
    """
    before = [] if is_large(module) else [(one, one.dtype) for one in _tensors(module) if one.dtype in NARROW_DTYPES]
    try:
        _convert_in_place([(tensor, torch.float64) for tensor, _ in before])
        yield
    finally:
        _convert_in_place(before)
        if before:  # the gaps between the narrow tensors stay with the allocator otherwise
            release_memory(fp64_bytes(module))


def is_large(module: nn.Module) -> bool:
    """Whether the references leave the module's weights in their own dtype.

    Operators of a compiled function cannot be followed, so a module that has one is never large.
    """
    if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
        return False
    is_stored = any(isinstance(tensor, StoredParameter) for tensor in module.parameters())
    return is_stored or fp64_bytes(module) > stored_parameter.MOST_WIDENED_WEIGHTS


def fp64_bytes(module: nn.Module) -> int:
    """The memory that the module's parameters and buffers take in fp64."""
    return sum(8 * tensor.numel() for tensor in _tensors(module))


def _convert_in_place(wanted: Sequence[tuple[torch.Tensor, torch.dtype]]) -> None:
    """Convert tensors to dtypes. Those of one shape and memory share it afterwards, too; views of a part do not."""
    converted: dict[Any, torch.Tensor] = {}
    for tensor, dtype in wanted:
        memory = tensor.data_ptr(), tensor.shape, tensor.stride()
        if memory not in converted or not tensor.numel():
            converted[memory] = tensor.detach().to(dtype)
        tensor.data = converted[memory]


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    return itertools.chain(module.parameters(), module.buffers())
