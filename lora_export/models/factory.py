"""A model that a function of the user returns: `package.module:factory` or `file.py:factory`."""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import inspect
import itertools
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_export.errors import InputRefused
from lora_export.models.model import Axes, Inputs, Model, Sizes


def of_module(module: nn.Module, examples: Any) -> Model:
    """A module in hand with its example inputs, as a factory would return them; the module itself stays as it is."""
    return from_factory(type(module).__name__, lambda: (copy.deepcopy(module), examples))


def find_factory(place: str, name: str) -> Callable[[], Any]:
    module: Any
    if place.endswith(".py"):
        path = Path(place)
        if not path.is_file():
            raise InputRefused(f"there is no file {path}")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(path.stem, module)  # so that what it defines can be pickled and deep-copied
        with _their_failures(place):
            spec.loader.exec_module(module)
    else:
        if str(Path.cwd()) not in sys.path:
            sys.path.append(str(Path.cwd()))  # a package in the current folder; last, so that it shadows nothing
        with _their_failures(place):
            try:
                module = importlib.import_module(place)
            except ModuleNotFoundError as error:
                raise InputRefused(f"cannot import {place}: {error}") from error
    factory = getattr(module, name, None)
    if not callable(factory):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise InputRefused(f"{place} has no function {name}; it has {', '.join(known) or 'none'}")
    return factory  # type: ignore[no-any-return]


@contextlib.contextmanager
def _their_failures(source: str) -> Iterator[None]:
    """What goes wrong in the user's own code, told with its place."""
    try:
        yield
    except InputRefused:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise InputRefused(
            f"{source} failed at {place.filename}:{place.lineno}: {type(error).__name__}: {error}"
        ) from error


def from_factory(source: str, factory: Callable[[], Any]) -> Model:
    with _their_failures(source):
        made = factory()
    module, examples = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, nn.Module):
        raise InputRefused(
            f"{source} returned {type(module).__name__}; a factory returns a module, or (module, example_inputs)"
        )
    if examples is None:
        raise InputRefused(f"{source} returned a module without example inputs; return (module, example_inputs)")
    module.eval().to(torch.float32)
    named = _named(source, module, examples)
    axes, sizes = _varying_axes(source, module, named)
    return Model(source, module, axes, lambda wanted, generator: _resampled(named, axes, wanted, generator), sizes)


def _named(source: str, module: nn.Module, examples: Any) -> Inputs:
    """Example inputs under the names of forward's parameters."""
    parameters = list(inspect.signature(module.forward).parameters)
    if isinstance(examples, torch.Tensor):
        examples = (examples,)
    named = dict(examples) if isinstance(examples, Mapping) else dict(zip(parameters, examples, strict=False))
    strange = [name for name in named if name not in parameters]
    if strange or (not isinstance(examples, Mapping) and len(examples) > len(parameters)):
        raise InputRefused(f"{source}: the example inputs do not fit forward({', '.join(parameters)})")
    if not named or not all(isinstance(value, torch.Tensor) for value in named.values()):
        raise InputRefused(f"{source}: example inputs are tensors, as one tensor, a tuple, or a dict by name")
    return {name: named[name].detach() for name in parameters if name in named}


def _varying_axes(source: str, module: nn.Module, examples: Inputs) -> tuple[Axes, Sizes]:
    """Which axes may vary: found by trying. Axes of one size are taken to vary together.

    The first axis is the batch; another is called after the first input that has its size.
    """
    batches = {value.shape[0] for value in examples.values() if value.ndim}
    if len(batches) != 1 or batches == {1}:
        raise InputRefused(
            f"{source}: the example inputs' first axis is the batch, the same in all of them and at least 2 "
            f"(a single row is taken for a constant when a model is traced); here it is {sorted(batches)}"
        )
    symbols: dict[tuple[str, int], str] = {}
    by_size: dict[int, str] = {}
    for name, value in examples.items():
        for axis, size in enumerate(value.shape):
            symbols[name, axis] = by_size.setdefault(size, f"{name}_axis{axis}") if axis else "batch"
    sizes = {symbol: examples[name].shape[axis] for (name, axis), symbol in symbols.items()}
    generator = torch.Generator().manual_seed(0)
    every: Axes = {name: {axis: symbols[name, axis] for axis in range(value.ndim)} for name, value in examples.items()}
    varying = set()
    for symbol, size in sizes.items():
        trial = _resampled(examples, every, {**sizes, symbol: size + 1}, generator)
        try:
            with torch.no_grad():
                module(**trial)
        except Exception as error:  # whatever the user's model raises means: not at this size
            if symbol == "batch":
                raise InputRefused(f"{source}: the model fails at another batch size, {size + 1}: {error}") from error
        else:
            varying.add(symbol)
    axes = {
        name: {axis: symbol for axis, symbol in there.items() if symbol in varying} for name, there in every.items()
    }
    return axes, {symbol: sizes[symbol] for symbol in varying}


def _resampled(examples: Inputs, axes: Axes, sizes: Sizes, generator: torch.Generator) -> Inputs:
    """New inputs that look like the examples: floats with their mean and spread, whole numbers out of their rows."""
    made = {}
    for name, example in examples.items():
        shape = [sizes.get(axes[name].get(axis, ""), size) for axis, size in enumerate(example.shape)]
        if example.is_floating_point():
            spread = float(example.std()) if example.numel() > 1 else 0.0
            noise = torch.randn(shape, generator=generator, dtype=torch.float32)
            made[name] = (float(example.mean()) + (spread or 1.0) * noise).to(example.dtype)
        else:
            # Rows of the example, cut or repeated: ids stay in range and no mask hides a whole row.
            rows = example[torch.randint(0, example.shape[0], (shape[0],), generator=generator)]
            for axis, size in itertools.islice(enumerate(shape), 1, None):
                rows = rows.index_select(axis, torch.arange(size) % example.shape[axis])
            made[name] = rows
    return made
