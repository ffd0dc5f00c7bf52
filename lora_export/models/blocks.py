"""The blocks of a model, such as `model.layers.3`, and runs on shapes alone that compute blocks of one kind once."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Hashable, Iterator
from typing import Any

from torch import Tensor, nn

OWN_NUMBER = "layer_idx"  # of a block, in transformers: it finds the block's part of a cache
OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}
SIMPLE = bool | int | float | complex | str | bytes | type | None


def blocks_of(module: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost lists of layers, each once."""
    seen: set[nn.Module] = set()
    for part in module.modules():
        if isinstance(part, nn.ModuleList) and part not in seen:
            for block in part:
                if block not in seen:
                    yield block
                seen.update(block.modules())


@contextlib.contextmanager
def each_kind_of_block_once(module: nn.Module) -> Iterator[None]:
    """Where a block equals one before it but for its weights' values and its number, return what that one returned.

    For runs on shapes alone, without a cache: there, both make the same tensors of arguments of the same shapes. A
    block that is given more than tensors, tuples and simple values is always run: it may write into what it is given.
    """
    known: dict[Hashable, Any] = {}

    def forward(kind: Hashable, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            key = kind, _shape_of(args), _shape_of(tuple(sorted(kwargs.items())))
        except TypeError:  # an argument that is more than that
            return original(*args, **kwargs)
        if key not in known:
            known[key] = original(*args, **kwargs)
        return known[key]

    blocks = [block for block in blocks_of(module) if "forward" not in block.__dict__]
    forwards = [functools.partial(forward, _kind_of(block), block.forward) for block in blocks]
    try:
        for block, own in zip(blocks, forwards, strict=True):
            block.__dict__["forward"] = own
        yield
    finally:
        for block in blocks:
            del block.__dict__["forward"]


def _kind_of(block: nn.Module) -> Hashable:
    """What all blocks have in common that compute alike. What is no simple value must be the same object."""
    return tuple(
        (path, type(part), _settings_of(part), _tensors_of(part._parameters), _tensors_of(part._buffers))
        for path, part in block.named_modules()
    )


def _settings_of(part: nn.Module) -> Hashable:
    names = sorted(vars(part).keys() - OF_EVERY_MODULE - {OWN_NUMBER})
    return tuple((name, _setting(getattr(part, name))) for name in names)


def _setting(value: Any) -> Hashable:
    if isinstance(value, tuple | list):  # as the sizes of norms and convolutions are
        return type(value), tuple(map(_setting, value))
    if isinstance(value, functools.partial):  # as activations are
        return tuple(map(_setting, (value.func, *value.args, *itertools.chain(*sorted(value.keywords.items())))))
    return type(value), value if isinstance(value, SIMPLE) else id(value)


def _tensors_of(tensors: dict[str, Any]) -> Hashable:
    return tuple((name, None if each is None else _shape_of(each)) for name, each in tensors.items())


def _shape_of(value: Any) -> Hashable:
    """Raises TypeError for what is no tensor, tuple or simple value."""
    if isinstance(value, Tensor):
        sizes = tuple(map(str, (*value.shape, *value.stride())))  # of symbols, too
        return value.dtype, value.device, value.requires_grad, sizes
    if isinstance(value, tuple):
        return type(value), tuple(map(_shape_of, value))
    if isinstance(value, SIMPLE):
        return type(value), value
    raise TypeError(f"{type(value).__name__} is no simple value")
