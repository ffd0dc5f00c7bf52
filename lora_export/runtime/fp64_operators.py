"""Operators in fp64, whatever a model casts to, and whatever its weights are stored in.

A model in fp64 takes two to four times the memory of its file. Here a weight in a narrower dtype is widened for the
operator that computes with it, and dropped afterwards. fp64 represents every number of the narrower floats, so the
results are those of a model in fp64. Views and rows of a weight stay in its own dtype until something is computed.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import nn
from torch.overrides import TorchFunctionMode

from lora_export.layers.torch_internals import TorchDispatchMode, grouped_products, tree_map
from lora_export.models.stored_parameter import NARROW_DTYPES, StoredParameter

NARROWING_METHODS = frozenset({torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16})
GROUPED_MM = grouped_products()
READ_DTYPE = torch.Tensor.dtype.__get__  # type: ignore[attr-defined]
# Names of what moves numbers and computes nothing, as a function or a method; `__get__` is any other attribute.
# fmt: off
MOVES_NUMBERS = frozenset({
    "__get__", "__set__", "__getitem__", "__len__", "__iter__", "chunk", "contiguous", "detach", "dim", "expand",
    "expand_as", "flatten", "index_select", "is_contiguous", "is_floating_point", "movedim", "narrow",
    "ndimension", "numel", "permute", "reshape", "select", "size", "split", "squeeze", "stride", "t", "transpose",
    "unbind", "unflatten", "unsqueeze", "untyped_storage", "view", "view_as",
})
# fmt: on
IN_PLACE = frozenset({"__iadd__", "__isub__", "__imul__", "__itruediv__", "__setitem__"})
# Bytes in fp64 of a linear layer's weight that are there at once. A core's cache holds most of them, and the memory is
# used again: with new memory for each weight, the kernel takes longer to provide it than the layer to compute.
MOST_WIDENED = 16 << 20


class Fp64Operators(TorchFunctionMode):
    """Widens the narrow weights of a module where they are used, and replaces casts to a narrower float by fp64.

    PyTorch has no fp64 kernel for products of experts, so these are computed one expert after the other.
    """

    def __init__(self, module: nn.Module, narrow: NarrowOperators):
        super().__init__()
        tensors = itertools.chain(module.parameters(), module.buffers())
        self._stored = {_memory(tensor) for tensor in tensors if tensor.dtype in NARROW_DTYPES and tensor.numel()}
        self._narrow = narrow
        self._scratch = torch.empty(0, dtype=torch.float64)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in NARROWING_METHODS:
            return args[0].double()
        if func is GROUPED_MM and (args[0].ndim, args[1].ndim) == (2, 3):
            return _grouped_products(*args, **kwargs)
        args = tuple(torch.float64 if _is_narrow(arg) else arg for arg in args)
        kwargs = {name: torch.float64 if _is_narrow(value) else value for name, value in kwargs.items()}
        if self._stored and _has_narrow((args, tuple(kwargs.values()))):
            return self._with_widened_weights(func, args, kwargs)
        return func(*args, **kwargs)

    def _with_widened_weights(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = getattr(func, "__name__", "")
        if func is READ_DTYPE:
            return torch.float64 if self._is_stored(args[0]) else func(*args)
        if name in MOVES_NUMBERS or func is F.embedding:
            with self._narrow.paused():
                return tree_map(self._widened_copy, func(*args, **kwargs))
        if func is F.linear and not kwargs and self._is_stored(args[1]):
            return self._linear(args[0], self._as_stored(args[1]), *args[2:])
        changed = 1 if name in IN_PLACE or (name.endswith("_") and not name.endswith("__")) else 0
        rest, kwargs = tree_map(self._widened, (args[changed:], kwargs))
        return func(*args[:changed], *rest, **kwargs)

    def _linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """A linear layer in fp64, so many outputs at a time that few of its weights are there in fp64."""
        bias = None if bias is None else bias.double()
        rows = max(1, MOST_WIDENED // (8 * weight.shape[1]))
        with self._narrow.paused():
            parts = weight.split(rows)
        if len(parts) == 1:
            return F.linear(x, self._in_scratch(weight), bias)
        products = x.new_empty(*x.shape[:-1], len(weight))
        for number, part in enumerate(parts):
            own = slice(number * rows, number * rows + len(part))
            products[..., own] = F.linear(x, self._in_scratch(part), None if bias is None else bias[own])
        return products

    def _in_scratch(self, values: torch.Tensor) -> torch.Tensor:
        """The values in fp64, until the next call."""
        with self._narrow.paused():
            if self._scratch.numel() < values.numel() or self._scratch.device != values.device:
                self._scratch = torch.empty(values.numel(), dtype=torch.float64, device=values.device)
            return self._scratch[: values.numel()].view(values.shape).copy_(values)

    def _is_stored(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.dtype in NARROW_DTYPES and _memory(value) in self._stored

    def _as_stored(self, value: torch.Tensor) -> torch.Tensor:
        """The values of a weight in the dtype in which it is stored."""
        if not isinstance(value, StoredParameter):
            return value
        with self._narrow.paused():
            return value.stored()

    def _widened(self, value: Any) -> Any:
        if not self._is_stored(value):
            return value
        with self._narrow.paused():
            return self._as_stored(value).double()

    def _widened_copy(self, value: Any) -> Any:
        """A copy of some numbers of a weight, in fp64; a view of a weight itself."""
        is_copy = isinstance(value, torch.Tensor) and value.dtype in NARROW_DTYPES and not self._is_stored(value)
        return value.double() if is_copy else value


class NarrowOperators(TorchDispatchMode):
    """Records which operators produce a narrower float although everything should be fp64."""

    def __init__(self, seen: set[str]):
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = seen
        self.largest_result = 0  # bytes
        self._is_paused = False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing: numbers of a weight are moved."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if not self._is_paused and isinstance(value, torch.Tensor):
                self.largest_result = max(self.largest_result, 0 if func.is_view else value.nbytes)
                if value.dtype in NARROW_DTYPES:
                    self.seen.add(str(func))
        return result


def _is_narrow(value: Any) -> bool:
    return isinstance(value, torch.dtype) and value in NARROW_DTYPES


def _has_narrow(values: Any) -> bool:
    """Whether a tensor among arguments, or in a list of them, is of a dtype that weights are stored in."""
    return any(
        value.dtype in NARROW_DTYPES if isinstance(value, torch.Tensor) else _has_narrow(value)
        for value in values
        if isinstance(value, torch.Tensor | list | tuple)
    )


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _grouped_products(rows: torch.Tensor, weights: torch.Tensor, offs: torch.Tensor, **_: None) -> torch.Tensor:
    """Products of rows (rows, in) with the weights (experts, in, out); the rows of expert i end before `offs[i]`."""
    products, begin = rows.new_zeros(len(rows), weights.shape[-1]), 0
    for weight, end in zip(weights, offs.tolist(), strict=True):
        products[begin:end] = rows[begin:end] @ weight.double()
        begin = end
    return products
