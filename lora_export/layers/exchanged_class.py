"""Another class for one module, from now on: its tensors, names and hooks stay, and it computes in another way.

A class in place of a method of the instance: copies of the module are of this class, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

_MADE: dict[tuple[Any, ...], type[nn.Module]] = {}


def subclass(
    name: str, bases: tuple[type[nn.Module], ...], attributes: Mapping[str, object] = MappingProxyType({})
) -> type[nn.Module]:
    """The class of this name, with these bases and attributes. One is made for each name, bases and attributes' names.

    Modules of one class get one class again: code that is compiled or chosen by class is so once.
    """
    key = name, bases, *attributes
    if key not in _MADE:
        _MADE[key] = type(name, bases, dict(attributes))
    return _MADE[key]


def exchange_class(module: nn.Module, other: type[nn.Module]) -> None:
    """Make a module an instance of `other`: a subclass of its class, or the class that it had before."""
    module.__class__ = other


def exchange_forward(module: nn.Module, forward: Callable[..., Any], **attributes: object) -> None:
    """Give a module this `forward`, and these attributes of a class. Its class keeps its name and place."""
    cls = type(module)
    names = {"forward": forward, "__module__": cls.__module__, **attributes}
    exchange_class(module, type(cls.__name__, (cls,), names))
