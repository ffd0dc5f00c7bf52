"""PyTorch with numbers moved by one rounding: what a right computation in fp32 may make of them, too.

The error of one run is one draw. A moved weight stands for sums in another order. A moved result of exp or sin stands
for another library: no standard fixes how these round, and the angle of a time step of 1000 is off by a thousand times
the rounding of its frequency.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_export.verification.module_copies import converted_copy

MOVED_WEIGHTS = (
    "PyTorch was measured with each weight moved to a neighbouring number in fp32, too; the largest error counts: the "
    "order of its sums alone was a lucky one"
)
MOVED_FUNCTIONS = (
    "PyTorch was measured with each weight and each result of exp, pow, sin and cos moved to a neighbouring number in "
    "fp32, too; the largest error counts: libraries round these functions in ways of their own"
)
DRAWS_OF_ROUNDING = 4  # runs of each kind, at most
# What angles are made of. Not log: T5 makes whole numbers of it, and a rounding chooses another row of a table.
LIBRARY_FUNCTIONS = frozenset({"cos", "exp", "exp2", "pow", "sin"})
# With moved functions, relative to the error without. What is further away has chosen another way at a threshold.
FARTHEST_MOVED = 10.0


def moved_module(module: nn.Module, seed: int) -> nn.Module:
    """A copy in which every finite fp32 parameter is moved to the next number, up or down."""
    generator = torch.Generator().manual_seed(seed)
    moved = converted_copy(module, torch.Tensor.clone)
    for parameter in moved.parameters():
        if parameter.dtype is torch.float32:
            parameter.data = _moved(parameter.data, generator)
    return moved


class MovedFunctions(TorchDispatchMode):
    """While it is active, results of LIBRARY_FUNCTIONS in fp32 are moved to the next number; 0, 1 and -1 stay exact.

    `count` is that of the results.
    """

    def __init__(self, seed: int):
        super().__init__()  # type: ignore[no-untyped-call]
        self.generator, self.count = torch.Generator().manual_seed(seed), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name.rstrip("_") in LIBRARY_FUNCTIONS and _is_fp32(result) and not _is_product(func, args):
            self.count += 1
            is_exact = (result == 0) | (result.abs() == 1)  # a mask, or the end of a function's range
            moved = torch.where(is_exact, result, _moved(result, self.generator))
            return result.copy_(moved) if name.endswith("_") else moved
        return result


def _is_fp32(result: Any) -> bool:
    return isinstance(result, Tensor) and result.dtype is torch.float32 and result.layout is torch.strided


def _is_product(func: Any, args: Any) -> bool:
    """Whether it is a power that libraries compute by products: x² and the like."""
    return func is torch.ops.aten.pow.Tensor_Scalar and float(args[1]).is_integer()


def _moved(values: Tensor, generator: torch.Generator) -> Tensor:
    """Each finite number's neighbour, up or down by chance. A number whose neighbour is not finite stays."""
    goes_up = torch.rand(values.shape, generator=generator).to(values.device) < 0.5
    moved = torch.nextafter(values, torch.where(goes_up, torch.inf, -torch.inf))
    return torch.where(torch.isfinite(moved) & torch.isfinite(values), moved, values)
