"""Python code of models that a trace cannot follow, exchanged while it runs.

What stands in its place computes the same, without a branch on a value or a number made of a size.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lora_export.models.shared_context import SharedContext

EXPERTS_CHOSEN = "expert_hit"  # the variable of the experts that a loop visits


@contextlib.contextmanager
def traceable_code(module: nn.Module) -> Iterator[None]:
    """While the context is active, a model can be traced whose code could not be.

    - `tensor_split` makes equal parts of an open axis by their open sizes: the first ones may have one more. PyTorch
      2.13 takes the sizes at hand for those of all inputs, also where the model computes with them.
    - A write at an open place (`x[:, n // 2] = y`) writes into a view of it. PyTorch 2.13 takes the place at hand.
    - A part that is converted into the dtype that it has stays as it is. PyTorch exchanges its parameters, which it
      cannot in a trace (Switch Transformers).

    In files of transformers:
    - `len` of a tensor is a size, as a trace has it. Python's own makes a number of it, which fixes the size: RT-DETR
      and its relatives take `len` of a batch.
    - A loop over the experts that were chosen visits all of them: those that no token chose add nothing (DBRX, Switch
      Transformers).
    """
    kinds: set[Any] = {type(part) for part in module.modules()}
    classes = [cls for cls in kinds if cls.__module__.startswith("transformers.models.")]
    with contextlib.ExitStack() as exchanged:
        for name in {cls.__module__ for cls in classes}:
            exchanged.enter_context(_sizes_in(name))
        for cls in classes:
            code = getattr(cls.forward, "__code__", None)
            if code is not None and EXPERTS_CHOSEN in code.co_varnames:
                exchanged.enter_context(_visiting_all(cls))
        exchanged.enter_context(_OF_PYTORCH)
        yield


@functools.cache
def _sizes_in(file: str) -> SharedContext:
    return SharedContext(lambda: mock.patch.object(sys.modules[file], "len", _size_or_length, create=True))


def _size_or_length(value: Any) -> int:
    return value.shape[0] if isinstance(value, torch.Tensor) and value.ndim else len(value)


@functools.cache
def _visiting_all(cls: Any) -> SharedContext:
    forward = cls.forward

    @functools.wraps(forward)
    def visiting_all(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _EveryIndex(getattr(self, "num_experts", sys.maxsize)):
            return forward(self, *args, **kwargs)

    return SharedContext(lambda: mock.patch.object(cls, "forward", visiting_all))


class _Index(list[int]):
    """An index as code reads it that expects a tensor (1,) of it."""

    def item(self) -> int:
        return self[0]


class _EveryIndex(TorchFunctionMode):
    """The places of a mask that are not zero are its first ones, and no selection of tokens is taken for empty."""

    def __init__(self, most: int):
        super().__init__()
        self._most = most  # behind them, DBRX's mask has the tokens that chose none

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.nonzero and args[0].ndim == 1:
            return [_Index([number]) for number in range(min(args[0].shape[0], self._most))]
        if func is torch.Tensor.numel and args[0].ndim == 1:
            return 1
        return func(*args, **(kwargs or {}))


def _parts_of_open_sizes(owner: Any) -> Any:
    split: Callable[..., Any] = owner.tensor_split

    def tensor_split(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(("sections", "dim"), args, strict=False)) | kwargs
        number, axis = given.get("sections", given.get("indices_or_sections")), given.get("dim", given.get("axis", 0))
        if type(number) is not int or not isinstance(x.shape[axis], torch.SymInt):
            return split(x, *args, **kwargs)
        return x.split_with_sizes([(x.shape[axis] + number - 1 - part) // number for part in range(number)], axis)

    return mock.patch.object(owner, "tensor_split", tensor_split)


def _writes_at_open_places() -> Any:
    write: Callable[..., None] = torch.Tensor.__setitem__

    def set_item(x: torch.Tensor, key: Any, value: Any) -> None:
        places = key if isinstance(key, tuple) else (key,)
        if not any(isinstance(each, torch.SymInt) for each in places) or not all(map(_makes_a_view, places)):
            write(x, key, value)
        elif isinstance(value, torch.Tensor):
            part = _view_at(x, places)
            part.copy_(value.reshape(value.shape[max(0, value.ndim - part.ndim) :]))  # as a write does
        else:
            _view_at(x, places).fill_(value)

    return mock.patch.object(torch.Tensor, "__setitem__", set_item)


def _makes_a_view(place: Any) -> bool:
    return place is None or place is Ellipsis or type(place) in (int, torch.SymInt, slice)


def _view_at(x: torch.Tensor, places: tuple[Any, ...]) -> torch.Tensor:
    """The part of a tensor at these places, none of which is a tensor, a list or a bool."""
    named = sum(each is not None and each is not Ellipsis for each in places)
    part, axis = x, 0
    for each in places:
        if each is Ellipsis:
            axis += x.ndim - named
        elif each is None or isinstance(each, slice):
            part = part[(*[slice(None)] * axis, each)]
            axis += 1
        else:
            part = part.select(axis, each)
    return part


def _unchanged_parts() -> Any:
    convert: Callable[..., nn.Module] = nn.Module.to

    def to(module: nn.Module, *args: Any, **options: Any) -> nn.Module:
        if len(args) == 1 and not options and isinstance(args[0], torch.dtype):
            tensors = (*module.parameters(), *module.buffers())
            if all(each.dtype == args[0] or not (each.is_floating_point() or each.is_complex()) for each in tensors):
                return module
        return convert(module, *args, **options)

    return mock.patch.object(nn.Module, "to", to)


_OF_PYTORCH = SharedContext(
    _unchanged_parts,
    _writes_at_open_places,
    *(functools.partial(_parts_of_open_sizes, owner) for owner in (torch, torch.Tensor)),
)
