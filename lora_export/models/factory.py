"""A model that a function of the user returns: `package.module:factory` or `file.py:factory`."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lora_export.errors import InputRefused
from lora_export.models.model import Axes, Model, ModelInputs, Sizes
from lora_export.models.tracing import with_dictionaries
from lora_export.user_code import failures_of_user_code

# --- Call the factory ---


def from_module(module: nn.Module, example_inputs: Any) -> Model:
    """A model of a copy of `module`, as if a factory had returned (module, example_inputs)."""
    return from_factory(type(module).__name__, lambda: (copy.deepcopy(module), example_inputs))


def from_factory(source: str, factory: Callable[[], Any]) -> Model:
    """Call a factory that returns (module, example_inputs). The module is put in eval mode and converted to fp32.

    Raises InputRefused where the factory fails, where it returns something else, where the example inputs do not fit
    the module, and where the model fails at another batch size.
    """
    with failures_of_user_code(source):
        result = factory()
    module, example_inputs = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(module, nn.Module):
        raise InputRefused(
            f"{source} returned {type(module).__name__}; a factory returns a module, or (module, example_inputs)"
        )
    if example_inputs is None:
        raise InputRefused(f"{source} returned a module without example inputs; return (module, example_inputs)")
    module.eval().to(torch.float32)
    named = _named(source, module, example_inputs)
    module = with_dictionaries(module, named)
    axes, sizes = varying_axes(source, module, named)
    return Model(source, module, axes, functools.partial(resampled, named, axes), sizes)


# --- Example inputs ---


def _named(source: str, module: nn.Module, example_inputs: Any) -> ModelInputs:
    """The example inputs by the names of forward's parameters."""
    parameters = list(inspect.signature(module.forward).parameters)
    if isinstance(example_inputs, torch.Tensor):
        example_inputs = (example_inputs,)
    by_name = isinstance(example_inputs, Mapping)
    named = dict(example_inputs) if by_name else dict(zip(parameters, example_inputs, strict=False))
    unknown = [name for name in named if name not in parameters]
    if unknown or (not by_name and len(example_inputs) > len(parameters)):
        raise InputRefused(f"{source}: the example inputs do not fit forward({', '.join(parameters)})")
    if not named or not all(isinstance(value, torch.Tensor) for value in named.values()):
        raise InputRefused(f"{source}: example inputs are tensors, as one tensor, a tuple, or a dict by name")
    return {name: named[name].detach() for name in parameters if name in named}


def varying_axes(source: str, module: nn.Module, example_inputs: ModelInputs) -> tuple[Axes, Sizes]:
    """The axes that may vary, found by running the module at other sizes, and the sizes of the example inputs.

    Axes of equal size are taken to vary together.
    """
    every = _named_axes(source, example_inputs)
    sizes = {symbol: example_inputs[name].shape[axis] for name, axes in every.items() for axis, symbol in axes.items()}
    generator = torch.Generator().manual_seed(0)
    varying = set()
    for symbol, size in sizes.items():
        trial = resampled(example_inputs, every, {**sizes, symbol: size + 1}, generator)
        try:
            with torch.no_grad():
                module(**trial)
        except Exception as error:  # any exception of the user's model means that this size is fixed
            if symbol == "batch":
                raise InputRefused(f"{source}: the model fails at another batch size, {size + 1}: {error}") from error
        else:
            varying.add(symbol)
    axes = {name: {axis: each for axis, each in own.items() if each in varying} for name, own in every.items()}
    return axes, {symbol: sizes[symbol] for symbol in varying}


def _named_axes(source: str, example_inputs: ModelInputs) -> Axes:
    """A symbol for each axis of each input. The first axis is `batch`; others are named after the first of their size.

    Raises InputRefused unless all inputs have one batch size of at least 2.
    """
    batches = {value.shape[0] for value in example_inputs.values() if value.ndim}
    if len(batches) != 1 or batches == {1}:
        raise InputRefused(
            f"{source}: the example inputs' first axis is the batch, the same in all of them and at least 2 "
            f"(a single row is taken for a constant when a model is traced); here it is {sorted(batches)}"
        )
    by_size: dict[int, str] = {}
    return {
        name: {
            axis: by_size.setdefault(size, f"{name}_axis{axis}") if axis else "batch"
            for axis, size in enumerate(value.shape)
        }
        for name, value in example_inputs.items()
    }


def resampled(example_inputs: ModelInputs, axes: Axes, sizes: Sizes, generator: torch.Generator) -> ModelInputs:
    """New inputs like the example ones: floats of the same mean and deviation, integers from the example's rows."""
    resampled = {}
    for name, example in example_inputs.items():
        shape = [sizes.get(axes[name].get(axis, ""), size) for axis, size in enumerate(example.shape)]
        if example.is_floating_point():
            deviation = float(example.std()) if example.numel() > 1 else 0.0
            noise = torch.randn(shape, generator=generator, dtype=torch.float32)
            resampled[name] = (float(example.mean()) + (deviation or 1.0) * noise).to(example.dtype)
        else:
            # Rows of the example, cut or repeated: ids stay in range and no mask hides a whole row.
            rows = example[torch.randint(0, example.shape[0], (shape[0],), generator=generator)]
            for axis, size in itertools.islice(enumerate(shape), 1, None):
                rows = rows.index_select(axis, torch.arange(size) % example.shape[axis])
            resampled[name] = rows
    return resampled
