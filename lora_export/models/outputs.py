"""What a module returns, by name: tensors of nested outputs, and dictionaries in place of dataclasses.

Exporters take no dataclasses: a module that returns one returns a dictionary instead.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lora_export.errors import RuntimeRefused
from lora_export.layers.torch_internals import exchange_forward
from lora_export.models.model import ModelInputs


def named_outputs(outputs: Any) -> dict[str, torch.Tensor]:
    """The tensors in a module's outputs, by a mapping's own keys, or as `output_0`, `output_1` … in order.

    The names of nested tensors are joined with a dot. Values that are no tensors are left out. Raises
    RuntimeRefused where no tensor is found, and where two have one name.
    """
    named: dict[str, torch.Tensor] = {}
    for name, tensor in _named(outputs):
        if name in named:
            raise RuntimeRefused(f"the model returns two outputs of the name {name}. Give each a name of its own")
        named[name] = tensor
    if not named:
        raise RuntimeRefused(f"the model returned {type(outputs).__name__}, which contains no tensors")
    return named


def have_names(outputs: Mapping[str, Any]) -> bool:
    """Whether a model named its outputs. False where `named_outputs` did, so that only their order has a meaning."""
    return not all(name.startswith("output_") for name in outputs)


def _named(outputs: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(outputs, torch.Tensor):
        yield prefix or "output_0", outputs
    elif isinstance(outputs, Mapping):
        for key, value in outputs.items():
            yield from _named(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(outputs, tuple | list):
        for number, value in enumerate(outputs):
            yield from _named(value, f"{prefix}.{number}" if prefix else f"output_{number}")


def with_dictionaries(module: nn.Module, example_inputs: ModelInputs) -> nn.Module:
    """The module itself; if it returns a dataclass for these inputs, it returns its fields by name from now on.

    Runs it once. A module that fails is left as it is: the next run reports the failure.
    """
    with contextlib.suppress(Exception), torch.no_grad():
        if _has_dataclass(module(**example_inputs)):
            convert_outputs(module, _as_dictionaries)
    return module


def convert_outputs(module: nn.Module, convert: Callable[[Any], Any]) -> None:
    """Let a module return what `convert` makes of its outputs, from now on."""
    cls = type(module)

    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return convert(cls.forward(self, *args, **kwargs))

    exchange_forward(module, forward)


@contextlib.contextmanager
def distinct_outputs(module: nn.Module) -> Iterator[None]:
    """Let a module return its tensors by name while active, and copies of what it returns twice, is given, or has.

    An exporter has one name for each tensor, and none for what is no tensor.
    """
    own, forward = vars(module).get("forward"), module.forward

    @functools.wraps(forward)
    def distinct(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        known = set(map(id, (*args, *kwargs.values(), *module.parameters(), *module.buffers())))
        outputs = named_outputs(forward(*args, **kwargs))
        for name, tensor in outputs.items():
            outputs[name] = tensor.clone() if id(tensor) in known else tensor
            known.add(id(tensor))
        return outputs

    distinct.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]  # a stated one has `self`
    vars(module)["forward"] = distinct
    try:
        yield
    finally:
        del vars(module)["forward"]
        if own is not None:
            vars(module)["forward"] = own


def _as_dictionaries(value: Any) -> Any:
    """The value with every dataclass as a dictionary of those of its fields that are not None."""
    if _is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {name: _as_dictionaries(each) for name, each in fields.items() if each is not None}
    return type(value)(map(_as_dictionaries, value)) if type(value) in (tuple, list) else value


def _has_dataclass(value: Any) -> bool:
    return _is_dataclass(value) or (type(value) in (tuple, list) and any(map(_has_dataclass, value)))


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type | Mapping)  # transformers' outputs are both
