"""A parameter whose values are read, from a file or from a narrower dtype, when something computes with them.

A module of such parameters takes next to no memory. Its `state_dict`, its shapes and its dtypes are those of the whole
model. Each operator gets the values that the module would have had in memory, bit for bit, and they are dropped
afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor, nn

from lora_export.layers.torch_internals import own_parameters, without_subclass_rules
from lora_export.models.internals import tree_map

MOST_WIDENED_WEIGHTS = 1 << 30  # bytes in fp64; a model with more weights keeps them in their own dtype
SMALLEST_STREAMED = 1 << 18  # numbers; a smaller tensor stays in memory
# Floats that fp32 represents. Values that are stored in another dtype are converted when they are read.
NARROW_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})

_VALUES = frozenset({"data", "T", "mT", "H", "mH", "real", "imag"})  # attributes that have the values in them
_LAYOUT = frozenset({"stride", "is_contiguous"})
# fmt: off
_FACTS = frozenset({
    "__len__", "data_ptr", "dim", "element_size", "get_device", "is_complex", "is_floating_point", "ndimension",
    "nelement", "numel", "requires_grad_", "size", "untyped_storage",
})
# fmt: on


class StoredParameter(nn.Parameter):
    """A read-only parameter of these sizes. `stored` returns its values, in the dtype in which they are stored.

    Where it is used outside of PyTorch's functions, as by an extension, the values are NaN: a leak cannot pass for a
    result. Raises RuntimeError for every attempt to change it.
    """

    _make: Callable[[], Tensor]

    def __new__(cls, shape: Sequence[int], make: Callable[[], Tensor], dtype: torch.dtype = torch.float32) -> Any:
        made: Any = torch.full((), math.nan, dtype=dtype).expand(*shape).as_subclass(cls)
        made._make = make
        return made

    def __init__(self, *_: Any) -> None:
        """Nothing is left to do."""

    def stored(self) -> Tensor:
        """The values, made now, in their own dtype where that is a narrow one."""
        values = self._make()
        return values if values.dtype in NARROW_DTYPES else values.to(self.dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> StoredParameter:
        made = StoredParameter(self.shape, self._make, self.dtype)
        memo[id(self)] = made
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"StoredParameter({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        attribute = getattr(getattr(func, "__self__", None), "__name__", "") if name in ("__get__", "__set__") else ""
        with without_subclass_rules():
            if name in _FACTS or (attribute and attribute not in _VALUES):
                return func(*args, **kwargs)
            if name in _LAYOUT:
                return func(torch.empty(args[0].shape, dtype=args[0].dtype, device="meta"), *args[1:], **kwargs)
            if isinstance(args[0] if args else None, StoredParameter) and _changes(name):
                raise RuntimeError(f"{name}: the values of a stored parameter cannot be changed")
            if func is Tensor.double:
                return args[0].stored().double()
            if func is F.embedding and isinstance(args[1], StoredParameter):  # reads the rows alone
                return func(args[0], args[1].stored(), *args[2:], **kwargs).to(args[1].dtype)
            args, kwargs = tree_map(_values, (args, kwargs))
            return func(*args, **kwargs)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """The module's `state_dict`, in which stored parameters are not read."""
    tensors = module.state_dict(keep_vars=True)
    return {name: value if isinstance(value, StoredParameter) else value.detach() for name, value in tensors.items()}


def read_stored(module: nn.Module) -> None:
    """Read every stored parameter below a module into memory, in place, in its own dtype. Tied ones stay tied."""
    read: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in own_parameters(owner).items():
            if isinstance(parameter, StoredParameter):
                if id(parameter) not in read:
                    values = parameter.stored().to(parameter.dtype)
                    read[id(parameter)] = nn.Parameter(values, requires_grad=False)
                own_parameters(owner)[name] = read[id(parameter)]


def packed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in another dtype: as a parameter that is converted when something computes with it."""
    kept = tensor.detach()
    return StoredParameter(kept.shape, lambda: kept, dtype)


def _changes(name: str) -> bool:
    """Whether a function of this name changes its first argument."""
    is_in_place = name.endswith("_") and not name.endswith("__")
    return is_in_place or name in ("__set__", "__setitem__") or (name.startswith("__i") and name.endswith("__"))


def _values(value: Any) -> Any:
    return value.stored().to(value.dtype) if isinstance(value, StoredParameter) else value
